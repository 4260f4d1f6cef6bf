"""A process that follows: it does its share of another's run. ``python -m vitpatch.worker`` is what ``crew`` starts."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from vitpatch.config import construct
from vitpatch.crew import OFTEN_S, Board, Follower, Order
from vitpatch.devices import share
from vitpatch.embedding_noise import OnEmbeddings
from vitpatch.interrupt import SIGNALS, Interrupted
from vitpatch.predict import data_of, follow
from vitpatch.setup import Setup, prepare
from vitpatch.shards import Shards
from vitpatch.spec import VitPatchError


def obey(order: Order, follower: Follower, local_rank: int, shards: Shards) -> None:
    """Does this process's share of ``order`` into ``shards``; how it ended is said, and never raised."""
    try:
        numbers = share(order.numbers, follower.rank, order.processes)
        if numbers:
            setup = _setup(order)
            data = data_of(setup, order.batch_size)
            data.numbers = numbers
            follow(setup, data, construct(setup.cfg.trainer), shards, follower, local_rank)
        follower.end("done")
    except Interrupted:
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
            f"process on {os.uname().nodename}: its weights, data or code differ from the first one's; make them the "
            "same on all machines"
        )
    if isinstance(setup.corruption, OnEmbeddings):
        setup = replace(setup, corruption=setup.corruption.with_spread(np.asarray(order.spread)))
    return setup


def main(words: str, rank: str, leader: str) -> None:
    """Follows the process ``leader`` as the ``rank``-th of its run, by the store in the file ``words``."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the leader judges them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_watch, args=[int(leader)], daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    board = Board(torch.distributed.FileStore(words))
    order = Order(**board.heard("order"))
    obey(order, Follower(board, int(rank), order.processes), int(rank), Shards(Path(order.shards)))


def _watch(leader: int) -> None:
    """Ends this process at once where its leader is gone: another start may be in the folder soon."""
    while os.getppid() == leader:
        time.sleep(OFTEN_S)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
