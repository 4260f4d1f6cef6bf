"""Several processes at one run: the first leads, the others follow; they exchange words, and files in the run's folder.

No tensor goes between them, so nobody waits inside a collective call: each looks at the words between its batches.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vitpatch.devices import Devices
from vitpatch.interrupt import SIGNALS, Interrupted
from vitpatch.spec import VitPatchError

OFTEN_S = 0.2
"""Between looks at the words, for one who waits."""
GRACE_S = 10.0
"""What the others have to finish a batch, once the run has failed."""


@dataclass(frozen=True)
class Order:
    """What the first process hands to the others: the run's final ``config``, and the batches that are to be done.

    ``shards`` is their folder. ``config`` has the strength that was found, ``spread`` is the standard deviation of
    patch embeddings, ``calibrations`` the sweep's folder of these: a follower takes nothing from training images but
    means, each for itself.
    """

    run_id: str
    shards: str
    config: Mapping[str, Any]
    batch_size: int
    numbers: list[int]
    processes: int
    calibrations: str | None = None
    spread: float | list[float] | None = None


class Board:
    """Words that the processes leave for each other, JSON by key, in a store of torch's."""

    def __init__(self, store: torch.distributed.Store) -> None:
        self._store = store

    def say(self, key: str, value: Any) -> None:
        """Leaves a word."""
        self._store.set(key, json.dumps(value))

    def heard(self, key: str) -> Any:
        """The word that was left; ``None`` = none yet."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


class Follower:
    """What a process that follows sees, and says at its end."""

    def __init__(self, board: Board, rank: int, processes: int) -> None:
        self._board, self.rank, self.processes = board, rank, processes

    def stopped(self) -> bool:
        """Whether the first process said that the run is to stop."""
        return bool(self._board.heard("stop"))

    def end(self, state: str, reason: str = "") -> None:
        """Says how its share ended: done, stopped, or failed and why."""
        self._board.say(f"end/{self.rank}", {"state": state, "reason": reason})


class Leader:
    """What the first process sees; ``lost`` says of a rank why its process is gone, ``None`` = it is there."""

    rank = 0

    def __init__(self, board: Board, processes: int, lost: Callable[[int], str | None]) -> None:
        self._board, self.processes, self._lost = board, processes, lost

    def stop(self) -> None:
        """Tells the others to stop after their batches."""
        self._board.say("stop", True)

    def stopped(self) -> bool:
        """Whether another process was asked to stop. Raises ``VitPatchError`` where one failed or is gone."""
        ends = self._ends()
        for end in ends.values():
            if end is not None and end["state"] == "failed":
                raise VitPatchError(end["reason"])
        return any(end is not None and end["state"] == "stopped" for end in ends.values())

    def ended(self) -> bool:
        """Whether all others have ended, however."""
        return all(end is not None for end in self._ends().values())

    def _ends(self) -> dict[int, dict[str, str] | None]:
        return {rank: self._end(rank) for rank in range(1, self.processes)}

    def _end(self, rank: int) -> dict[str, str] | None:
        lost = self._lost(rank)  # before the word is looked for: it may be the last act
        word = self._board.heard(f"end/{rank}")
        if word is None and lost is not None:
            return {"state": "failed", "reason": f"process {rank} of {self.processes} {lost}"}
        return word


class Alone:
    """A run on one device."""

    rank, processes = 0, 1

    def stop(self) -> None:
        """Nobody is there to stop."""

    def stopped(self) -> bool:
        """Nobody else can ask for it."""
        return False

    def ended(self) -> bool:
        """Nobody is waited for."""
        return True


@contextmanager
def led(devices: Devices, order: Order) -> Iterator[Leader | Alone]:
    """Those who work on ``order`` with this process, started here, for the length of the block.

    At its end they have ended: by themselves, or with the run.
    """
    if order.processes == 1:
        yield Alone()
        return
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(devices.threads)
    with tempfile.TemporaryDirectory(prefix="vitpatch-") as folder:
        words = Path(folder) / "words"
        board = Board(torch.distributed.FileStore(str(words)))
        board.say("order", asdict(order))
        children: dict[int, subprocess.Popen] = {}
        leader = Leader(board, order.processes, lambda rank: _exit_of(children[rank]))
        try:
            for rank in range(1, order.processes):
                children[rank] = _started(words, rank, devices)
            yield leader
        except BaseException as error:
            leader.stop()
            _wait(leader, error)
            raise
        finally:
            torch.set_num_threads(threads)
            for child in children.values():
                _reap(child, GRACE_S if leader.ended() else 0.0)


def _wait(leader: Leader, error: BaseException) -> None:
    """Until the others have ended: their batches too are kept where the run is interrupted, else not at any price."""
    grace = {Interrupted: math.inf, VitPatchError: GRACE_S}.get(type(error), 0.0)
    until = time.monotonic() + grace
    while not leader.ended() and time.monotonic() < until:
        time.sleep(OFTEN_S)


def _started(words: Path, rank: int, devices: Devices) -> subprocess.Popen:
    """Another process of this program, which judges signals for it: it gets none."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    environment = {"OMP_NUM_THREADS": str(devices.threads)} | os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-P", "-m", "vitpatch.worker", str(words), str(rank), str(os.getpid())]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # handed down: blocked in it from the first
    try:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_of(child: subprocess.Popen) -> str | None:
    """How a process ended, in words; ``None`` = it has not."""
    code = child.poll()
    if code is None:
        return None
    return f"was ended by signal {-code}" if code < 0 else f"ended with code {code} before its batches were done"


def _reap(child: subprocess.Popen, grace: float) -> None:
    """Waits for a process that has said its last word, and ends it where it does not go."""
    try:
        child.wait(grace)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
