"""CTRL-C once: what is being done is finished and kept; twice: at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""From the keyboard, and from a cluster that takes the machine back."""
TOGETHER_S = 2.0
"""Signals so near each other are one: a terminal and the launcher of several processes both pass CTRL-C on."""


class Interrupted(Exception):
    """A run was asked to stop, and did, with what was done kept. Not ``KeyboardInterrupt``, which Lightning takes."""


@contextmanager
def waiting(say: Callable[[], None], together_s: float = 0.0) -> Iterator[Callable[[], bool]]:
    """For the length of the block the first signal only calls ``say``; the function given tells whether one came.

    A second one is a ``KeyboardInterrupt``, unless it comes within ``together_s`` of the first. Outside the main
    thread, where signals do not arrive, nothing is changed.
    """
    asked, until = threading.Event(), float("inf")
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def first(signum: int, frame: Any) -> None:
        nonlocal until
        if asked.is_set():
            if time.monotonic() >= until:
                raise KeyboardInterrupt
            return
        asked.set()
        until = time.monotonic() + together_s
        say()

    before = {number: signal.signal(number, first) for number in SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
