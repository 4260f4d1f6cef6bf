"""Starts of ``patch.py`` that die when they are told to: ``python deaths.py`` takes orders as lines of JSON.

It has imported everything, so that a start is a fork, and is soon where it matters. A start dies by SIGKILL after some
seconds, or just before its n-th act on the disk (a rename, removal, folder, or file opened to be written).
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ACTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}
DIED = 86
"""The exit code of a start that died at an act."""


class Starts:
    """The process that starts runs; closed with ``close``."""

    def __init__(self, output: Path) -> None:
        self._output = output
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(
        self, *overrides: str, kill_after: float | None = None, die_at: int | None = None, pictures: bool = False
    ) -> tuple[int, str, float, int]:
        """(exit code or −signal, what was printed, seconds, acts on the disk) of one start."""
        order = dict(overrides=overrides, output=str(self._output), kill_after=kill_after, die_at=die_at)
        self._process.stdin.write(json.dumps(order | {"pictures": pictures}) + "\n")
        self._process.stdin.flush()
        code, seconds, acts = json.loads(self._process.stdout.readline())
        return code, self._output.read_text(errors="replace"), seconds, acts

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


def _start(overrides, output, kill_after, die_at, pictures) -> tuple[int, float, int]:
    read, write = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(overrides, output, die_at, pictures, write)
    os.close(write)
    try:
        code = _killed_after(child, started, kill_after)
    finally:
        acts = os.read(read, 100)
        os.close(read)
    return code, time.monotonic() - started, int(acts or 0)


def _killed_after(child: int, started: float, seconds: float | None) -> int:
    while seconds is not None and time.monotonic() - started < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    if seconds is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(overrides, output, die_at, pictures, write) -> None:
    """Is the run, and never comes back."""
    code, acts = 1, 0
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        if not pictures:
            from vitpatch import run

            run.draw = lambda *everything: {}
        (folder,) = [of.partition("=")[2] for of in overrides if of.startswith("hydra.run.dir=")]

        def counts(event, arguments):
            nonlocal acts
            if event not in ACTS or not _is_there(event, arguments, folder):
                return
            acts += 1
            if acts == die_at:
                os._exit(DIED)

        sys.addaudithook(counts)
        sys.argv = ["patch.py", *overrides]
        try:
            runpy.run_path("patch.py", run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os.write(write, str(acts).encode())
        os._exit(code if isinstance(code, int) else 1)


def _is_there(event: str, arguments: tuple, folder: str) -> bool:
    """Whether an act changes something in the run's folder; a name without a folder is one that is being emptied."""
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return False
    name = arguments[0]
    if not isinstance(name, str | os.PathLike):
        return False
    name = os.fspath(name)
    return isinstance(name, str) and (
        name.startswith(folder) or (event in ("os.remove", "os.rmdir") and "/" not in name)
    )


def _import_everything() -> None:
    sys.path.insert(0, str(ROOT))
    import datasets
    import torch
    import transformers

    import vitpatch.run
    from vitpatch import classifiers, sweep, tracking  # noqa: F401

    assert vitpatch.run and transformers.ViTForImageClassification and transformers.ViTImageProcessorPil
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


if __name__ == "__main__":
    _import_everything()
    for line in sys.stdin:
        print(json.dumps(_start(**json.loads(line))), flush=True)
