"""A process that follows: it does its share of another's run. ``crew`` starts ``python -m vitpatch.runs.worker``."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from vitpatch.corruptions import Moments
from vitpatch.errors import VitPatchError
from vitpatch.runs.crew import OFTEN_S, Board, Follower, Order, Outside, read_order
from vitpatch.runs.devices import share
from vitpatch.runs.interrupt import SIGNALS, TOGETHER_S, Interrupted, waiting
from vitpatch.runs.predict import data_of, follow
from vitpatch.runs.setup import Setup, prepare
from vitpatch.runs.shards import Shards
from vitpatch.runs.trainer import make_trainer_of, on_threads

LATE_S = 120.0
"""What a shared disk may take to show a file on another machine."""


def obey(order: Order, follower: Follower, local_rank: int, shards: Shards) -> None:
    """Does this process's share of ``order`` into ``shards``; how it ended is said, and never raised."""
    try:
        numbers = share(order.numbers, follower.rank, order.processes)
        if numbers:
            setup = _setup(order)
            data = data_of(setup, order.batch_size)
            data.numbers = numbers
            with on_threads(order.threads):
                follow(setup, data, make_trainer_of(setup.cfg), shards, follower, local_rank)
        follower.end("done")
    except (Interrupted, KeyboardInterrupt, SystemExit):  # the last is Lightning's for the second CTRL-C
        follower.end("stopped")
    except (VitPatchError, OSError) as error:
        follower.end("failed", " ".join(str(error).split()))
    except Exception as error:  # our own mistake: the traceback is for whoever reports it
        traceback.print_exc()
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        follower.end("failed", f"process {follower.rank}: {said} (a bug in vitpatch; please report it)")


def _setup(order: Order) -> Setup:
    """What the first process has loaded and found. Raises ``VitPatchError`` where anything differs here."""
    calibrations = None if order.calibrations is None else Path(order.calibrations)
    setup = prepare(OmegaConf.create(order.config), calibrations)
    if setup.run_id != order.run_id:
        raise VitPatchError(
            f"process on {socket.gethostname()}: its weights, data or code differ from the first one's; make them the "
            "same on all machines"
        )
    if order.statistics is not None:
        statistics = Moments(**{name: np.asarray(value) for name, value in order.statistics.items()})
        setup = replace(setup, corruption=setup.corruption.with_statistics(statistics))
    return setup


def follow_job(outside: Outside, run: Path) -> int:
    """Follows the first process of a launcher at the job of the folder ``run``; the exit code of that job."""
    board = outside.next_job()
    over, beats = threading.Event(), itertools.count()

    def beat() -> None:
        while not over.wait(1.0):
            try:
                board.say(f"beat/{outside.at.rank}", next(beats))
            except RuntimeError:  # the store is gone, and with it the first process
                os._exit(1)

    threading.Thread(target=beat, daemon=True).start()
    log, before = logging.getLogger("vitpatch"), logging.getLogger("vitpatch").level
    log.setLevel(logging.WARNING)  # the first process tells
    try:
        while (told := board.heard("order")) is None and board.heard("over") is None:
            time.sleep(OFTEN_S)
        if told is not None:
            _obey_outside(outside, board, told, run)
        while (code := board.heard("over")) is None:
            time.sleep(OFTEN_S)
        over.set()
        board.say(f"gone/{outside.at.rank}", True)
        return code
    except RuntimeError as error:  # of the store
        raise VitPatchError(f"process {outside.at.rank}: the first process is gone") from error
    finally:
        over.set()
        log.setLevel(before)


def _obey_outside(outside: Outside, board: Board, told: Mapping[str, str], run: Path) -> None:
    """Does this process's share of the order that was told of; signals reach each process here."""
    at = outside.at
    with waiting(lambda: None, together_s=TOGETHER_S) as asked:
        follower = Follower(board, at.rank, at.world, asked)
        until = time.monotonic() + (LATE_S if told["folder"] == str(run) else 0.0)
        while (order := read_order(run / "shards", told["digest"])) is None:
            if time.monotonic() > until:
                reason = f"process {at.rank} was given the folder {run}, the first one {told['folder']}"
                follower.end("failed", f"{reason}; give one that all share: hydra.run.dir=FOLDER, or sweep=NAME")
                return
            time.sleep(OFTEN_S)
        obey(order, follower, at.local_rank, Shards(run / "shards"))


def main(words: str, shards: str, rank: str, leader: str) -> None:
    """Follows the process ``leader`` as the ``rank``-th of the run in ``shards``, by what the file ``words`` says."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the leader judges them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_watch, args=[int(leader)], daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    board = Board(torch.distributed.FileStore(words))
    order = read_order(Path(shards), board.heard("order"))
    obey(order, Follower(board, int(rank), order.processes), int(rank), Shards(Path(shards)))


def _watch(leader: int) -> None:
    """Ends this process at once where its leader is gone: another start may be in the folder soon."""
    while os.getppid() == leader:
        time.sleep(OFTEN_S)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
