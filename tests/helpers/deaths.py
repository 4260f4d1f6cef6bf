"""Starts of ``patch.py`` that die when they are told to: ``python deaths.py`` takes orders as lines of JSON.

It has imported everything, so that a start is a fork, and is soon where it matters. A start dies by SIGKILL after some
seconds, or just before its n-th act on the disk (a rename, removal, folder, or file opened to be written).
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
ACTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}
KILL = -1
"""In place of a signal to the session: SIGKILL to the run alone, not to its worker processes."""
DIED = 86
"""The exit code of a start that died at an act."""


class Starts:
    """The process that starts runs; closed with ``close``."""

    def __init__(self, output: Path) -> None:
        self._output = output
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *overrides: str, **orders) -> tuple[int, str, float, int]:
        """(exit code or −signal, what was printed, seconds, acts on the disk) of one start, as ``_start`` has it."""
        order = dict(overrides=overrides, output=str(self._output)) | orders
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        code, seconds, acts = json.loads(self._process.stdout.readline())
        return code, self._output.read_text(errors="replace"), seconds, acts

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)  # on a machine that has much to do it takes long to end
        self._process.stdout.close()


def _start(overrides, output, kill_after=None, signals=(), **orders) -> tuple[int, float, int]:
    """Kills after seconds; or sends ``signals`` to its session: (a file of the run's folder, or what is said, number).

    The other orders are of ``_become``.
    """
    (folder,) = [of.partition("=")[2] for of in overrides if of.startswith("hydra.run.dir=")]
    read, write = os.pipe()
    started = time.monotonic()
    Path(output).write_text("")
    child = os.fork()
    if child == 0:
        _become(overrides, output, write, folder, **orders)
    os.close(write)
    status = None
    if kill_after is not None:
        status = _ended(child, lambda: time.monotonic() - started > kill_after)
        if status is None:
            os.kill(child, signal.SIGKILL)
    for sign, number in signals:
        if status is None:
            status = _ended(child, lambda sign=sign: (Path(folder) / sign).exists() or sign in Path(output).read_text())
        if status is None:
            os.kill(child, signal.SIGKILL) if number == KILL else os.killpg(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1] if status is None else status)
    acts = os.read(read, 100)  # of one that was killed there are none
    os.close(read)
    return code, time.monotonic() - started, int(acts or 0)


def _ended(child: int, comes: Callable[[], bool]) -> int | None:
    """Waits for what ``comes``; how the child ended, if it did before."""
    while not comes():
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
    return None


def _become(overrides, output, write, folder, die_at=None, pictures=False, slow=0.0, biggest=None, until=None) -> None:
    """Is the run, and never comes back; ``slow`` seconds more a batch, no file over ``biggest`` bytes.

    The fifth batch waits ``until`` a file is there.
    """
    code, acts = 1, 0
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & has ignored
        file = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        _change(pictures, slow, biggest, until)

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
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os.write(write, str(acts).encode())
        os._exit(code if isinstance(code, int) else 1)


def _change(pictures: bool, slow: float, biggest: int | None, until: str | None) -> None:
    from vitpatch.runs import predict, run

    if not pictures:
        run.draw = lambda *everything: {}
    if slow:
        step = predict.PatchingModule.predict_step
        predict.PatchingModule.predict_step = lambda *args: time.sleep(slow) or step(*args)
    if until is not None:
        at_once = predict.PatchingModule.predict_step

        def waits(module, batch, number=0):
            while number >= 4 and not Path(until).exists():
                time.sleep(0.01)
            return at_once(module, batch, number)

        predict.PatchingModule.predict_step = waits
    if biggest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (biggest, biggest))


def _is_there(event: str, arguments: tuple, folder: str) -> bool:
    """Whether an act changes something in the run's folder; a name without a folder is one that is being emptied."""
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return False
    name = arguments[0]
    if not isinstance(name, str | os.PathLike):
        return False
    name = os.fsdecode(name)
    return name.startswith(folder) or (event in ("os.remove", "os.rmdir") and "/" not in name)


def _import_everything() -> None:
    sys.path.insert(0, str(ROOT))
    import datasets
    import torch
    import transformers

    import vitpatch.runs.run
    from vitpatch.cli import sweep  # noqa: F401
    from vitpatch.models import checkpoint  # noqa: F401
    from vitpatch.runs import tracking  # noqa: F401

    assert vitpatch.runs.run and transformers.ViTForImageClassification and transformers.ViTImageProcessorPil
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


if __name__ == "__main__":
    _import_everything()
    for line in sys.stdin:
        print(json.dumps(_start(**json.loads(line))), flush=True)
