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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment

from vitpatch.errors import VitPatchError
from vitpatch.io import write_json
from vitpatch.runs.devices import Devices
from vitpatch.runs.interrupt import SIGNALS, Interrupted
from vitpatch.runs.launch import Place, place
from vitpatch.types import digest

OFTEN_S = 0.2
"""Between looks at the words, for one who waits."""
GRACE_S = 10.0
"""What the others have to finish a batch, once the run has failed."""
SILENCE_S = 60.0
"""After so long without a word a process on another machine is taken to be gone."""
MEETING_S = 300.0
"""Until all processes that a launcher started must be there."""
ORDER = "order.json"


@dataclass(frozen=True)
class Order:
    """What the first process hands to the others, in the run's folder: its ``config``, the batches that are to be done.

    ``config`` has the strength that was found, ``statistics`` are the moments of patch embeddings,
    ``calibrations`` the sweep's folder of these, ``threads`` those of a process: a follower takes nothing from training
    images but means, each for itself.
    """

    run_id: str
    config: Mapping[str, Any]
    batch_size: int
    numbers: Sequence[int]
    processes: int
    calibrations: str | None = None
    statistics: Mapping[str, Any] | None = None
    threads: int | None = None

    def write(self, shards: Path) -> str:
        """Leaves it in the folder ``shards``; its digest."""
        write_json(shards / ORDER, asdict(self))
        return digest(asdict(self))


def read_order(shards: Path, asked: str) -> Order | None:
    """The order with this digest from the folder ``shards``; ``None`` where it is not there (yet)."""
    try:
        order = json.loads((shards / ORDER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return Order(**order) if digest(order) == asked else None


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

    def __init__(self, board: Board, rank: int, processes: int, asked: Callable[[], bool] = lambda: False) -> None:
        self._board, self.rank, self.processes, self._asked = board, rank, processes, asked

    def stopped(self) -> bool:
        """Whether this process was asked to stop, or the first one said so."""
        return self._asked() or bool(self._board.heard("stop"))

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


def processes_of(devices: Devices, numbers: Sequence[int]) -> int:
    """How many processes share these batches: started here no more than have one, else all that there are."""
    return devices.processes if outside() is not None else min(devices.processes, len(numbers))


@contextmanager
def led(order: Order, shards: Path) -> Iterator[Leader | Alone]:
    """Those who work on ``order`` with this process, in the folder ``shards``, for the length of the block.

    At its end they have ended, by themselves or with the run. They are started here unless a launcher did.
    """
    if order.processes == 1:
        yield Alone()
        return
    launched = outside()
    words = _started_here(order, shards) if launched is None else launched.of_job(order, shards)
    with words as leader:
        try:
            yield leader
        except BaseException as error:
            leader.stop()
            _wait(leader, error)
            raise


@contextmanager
def _started_here(order: Order, shards: Path) -> Iterator[Leader]:
    """Processes of this one, which are gone at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="vitpatch-") as folder:
        words = Path(folder) / "words"
        board = Board(torch.distributed.FileStore(str(words)))
        board.say("order", order.write(shards))
        children: dict[int, subprocess.Popen] = {}
        leader = Leader(board, order.processes, lambda rank: _exit_of(children[rank]))
        try:
            for rank in range(1, order.processes):
                children[rank] = _started(words, shards, rank)
            yield leader
        finally:
            for child in children.values():
                _reap(child, GRACE_S if leader.ended() else 0.0)


def _wait(leader: Leader, error: BaseException) -> None:
    """Until the others have ended: their batches too are kept where the run is interrupted, else not at any price."""
    grace = {Interrupted: math.inf, VitPatchError: GRACE_S}.get(type(error), 0.0)
    until = time.monotonic() + grace
    while not leader.ended() and time.monotonic() < until:
        time.sleep(OFTEN_S)


def _started(words: Path, shards: Path, rank: int) -> subprocess.Popen:
    """Another process of this program, which judges signals for it: it gets none."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-P", "-m", "vitpatch.runs.worker", str(words), str(shards), str(rank), str(os.getpid())]
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


class Outside:
    """The processes that a launcher started, this one among them: their words, those of each job apart."""

    def __init__(self, at: Place) -> None:
        self.at, self._jobs = at, 0
        self._store = _rendezvous(at)
        self.board = Board(self._store)

    def next_job(self) -> Board:
        """The board of the job that begins: every process runs the same jobs in the same order."""
        self._jobs += 1
        self.board = Board(torch.distributed.PrefixStore(f"vitpatch/{self._jobs}", self._store))
        return self.board

    @contextmanager
    def of_job(self, order: Order, shards: Path) -> Iterator[Leader]:
        """The others at the job that runs, once they were given ``order``."""
        last: dict[int, tuple[Any, float]] = {}

        def lost(rank: int) -> str | None:
            beat, now = self.board.heard(f"beat/{rank}"), time.monotonic()
            if rank not in last or last[rank][0] != beat:
                last[rank] = beat, now
            return f"has not been heard of for {SILENCE_S:.0f} s" if now - last[rank][1] > SILENCE_S else None

        self.board.say("order", {"digest": order.write(shards), "folder": str(shards.parent)})
        yield Leader(self.board, self.at.world, lost)

    def over(self, code: int) -> None:
        """Tells the others that this job has ended, and waits a little for them to hear it: the store may be here."""
        until = time.monotonic() + GRACE_S
        with suppress(RuntimeError):  # the store may have gone first
            self.board.say("over", code)
            while time.monotonic() < until and any(not self.board.heard(f"gone/{r}") for r in range(1, self.at.world)):
                time.sleep(OFTEN_S)


@cache
def outside() -> Outside | None:
    """The processes that a launcher started with this one; ``None`` where none did. Waits until all are there."""
    at = place()
    return None if at is None else Outside(at)


def _rendezvous(at: Place) -> torch.distributed.Store:
    """The store that all processes of a launcher have, in the agent of torchrun, else in the first process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        slurm = SLURMEnvironment(auto_requeue=False)
        os.environ |= {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": str(slurm.main_port)}
    try:
        url = f"env://?rank={at.rank}&world_size={at.world}"
        store, _, _ = next(torch.distributed.rendezvous(url, timeout=timedelta(seconds=MEETING_S)))
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise VitPatchError(f"process {at.rank} of {at.world} did not meet the others: {said}") from error
    return store
