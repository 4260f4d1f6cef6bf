"""A job of Hydra: it ends in a finished folder, or in one line with the reason."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError

from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.runs.distributed import Interrupted

if TYPE_CHECKING:
    from vitpatch.runs.folder import RunFolder

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""The exit code of a run that CTRL-C ended."""
STOPPED_BEFORE = "stopped from outside before it began"
STOPPED_HALFWAY = "stopped from outside before it was done"
STOPPED = threading.Event()
"""Set once a job in this process was interrupted: no other begins."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended, and why, in one line."""

    status: Literal["finished", "failed", "interrupted"]
    reason: str = ""

    @property
    def exit_code(self) -> int:
        """What a process with this job alone exits with."""
        return {"finished": 0, "failed": 1, "interrupted": INTERRUPTED}[self.status]


def job(module: str, cfg: DictConfig) -> None:
    """Calls ``run(cfg, folder, options)`` of ``module``; what it raises becomes a line and ``failed.json``.

    A single run that failed exits with 1; in a sweep the other jobs go on, and the sweep's end reports it. An
    interrupted one exits with 130. While a job runs no other process can run in its folder.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads slow a shared machine 7-fold
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_interrupt)  # Lightning's predict would swallow it
    hydra_cfg = HydraConfig.get()
    path = Path(hydra_cfg.runtime.output_dir)
    options = {group: name for group, name in hydra_cfg.runtime.choices.items() if not group.startswith("hydra")}
    try:
        if STOPPED.is_set():  # a launcher hands this process the next job
            raise KeyboardInterrupt
        outcome = _run_in(path, lambda: importlib.import_module(module).run(cfg, path, options))
    except KeyboardInterrupt:  # while torch was loaded, or while the end was being written
        outcome = _record_interruption(path)
    if outcome.status == "interrupted":
        STOPPED.set()
        if outcome.reason:
            log.error("interrupted: %s: %s; the same command goes on with it", path, outcome.reason)
        sys.exit(outcome.exit_code)
    if outcome.reason:
        log.error("error: %s", outcome.reason)
    if hydra_cfg.mode == RunMode.RUN and outcome.exit_code:
        sys.exit(outcome.exit_code)


def _run_in(path: Path, run: Callable[[], None]) -> Outcome:
    """Calls ``run`` while no other process can run in the folder, and leaves there why it did not finish."""
    from vitpatch.runs.folder import FolderLocked, RunFolder

    folder = RunFolder(path)
    try:
        with folder.locked():
            folder.start.unlink(missing_ok=True)  # of an earlier start
            try:
                outcome = _attempt(run, path)
                _record(folder, outcome)
            finally:
                folder.restore_config()
            return outcome
    except FolderLocked as error:  # the folder is the other's: nothing is left in it
        return Outcome("failed", str(error))
    except OSError as error:
        return Outcome("failed", describe_disk_error(error, path))


def _attempt(run: Callable[[], None], path: Path) -> Outcome:
    """Calls ``run``; every exception becomes an outcome."""
    try:
        run()
    except VitPatchError as error:
        return Outcome("failed", str(error).replace("\n", " "))
    except InterpolationResolutionError as error:
        return Outcome("failed", f"{error.full_key}: {one_line(error.msg)}")
    except OSError as error:
        return Outcome("failed", describe_disk_error(error, path))
    except Interrupted as error:
        return Outcome("interrupted", str(error))
    except (KeyboardInterrupt, SystemExit):
        return Outcome("interrupted", STOPPED_HALFWAY)
    except Exception as error:  # our own mistake: the traceback is for whoever reports it
        traceback.print_exc()
        reason = f"{type(error).__name__}: {one_line(error, 500)} (a bug in vitpatch; please report it)"
        return Outcome("failed", reason)
    return Outcome("finished")


def describe_disk_error(error: OSError, folder: Path) -> str:
    """What the disk refused, and at which file: a full or read-only disk is the user's to mend."""
    return f"{error.strerror or error}: {error.filename or folder}"


def _raise_interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _record_interruption(path: Path) -> Outcome:
    """Of a job that did not begin, or whose end was being written; nothing is left where another process runs."""
    from vitpatch.runs.folder import FolderLocked, RunFolder

    folder = RunFolder(path)
    has_begun = any(folder.shards.glob("batch-*.json"))
    outcome = Outcome("interrupted", STOPPED_HALFWAY if has_begun else STOPPED_BEFORE)
    with suppress(FolderLocked, OSError), folder.locked():
        _record(folder, outcome)
    return outcome


def _record(folder: RunFolder, outcome: Outcome) -> None:
    """Leaves in the folder why a job did not finish."""
    if outcome.status == "finished":
        return
    try:
        folder.mark_failed(outcome.status, outcome.reason)
    except OSError as error:
        log.warning("%s cannot be written either (%s)", folder.failed, error.strerror)
