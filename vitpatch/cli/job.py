"""A job of Hydra: it ends in a sealed folder, or in one line that says why not."""

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError

from vitpatch.errors import VitPatchError
from vitpatch.runs.distributed import Interrupted

if TYPE_CHECKING:
    from vitpatch.runs.folder import RunFolder

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""The exit code of a run that CTRL-C ended."""
BEFORE, HALFWAY = (f"stopped from outside before it {what}" for what in ("began", "was done"))
STOPPED = threading.Event()
"""Set once a job in this process was interrupted: no other begins."""


def job(module: str, cfg: DictConfig) -> None:
    """Calls ``run(cfg, folder, options)`` of ``module``; what it raises becomes a line and ``failed.json``.

    A single run then exits with 1; in a sweep the other jobs go on, and the sweep's end tells. While it runs no other
    process can run in its folder.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads slow a shared machine 7-fold
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # Lightning's predict would swallow it
    hydra_cfg = HydraConfig.get()
    path = Path(hydra_cfg.runtime.output_dir)
    options = {group: name for group, name in hydra_cfg.runtime.choices.items() if not group.startswith("hydra")}
    try:
        if STOPPED.is_set():  # a launcher hands this process the next job
            raise KeyboardInterrupt
        reason = _run_in(path, lambda: importlib.import_module(module).run(cfg, path, options))
    except KeyboardInterrupt:  # also while torch was loaded, or before anybody was in the folder
        _say_interrupted(path)
        STOPPED.set()
        sys.exit(INTERRUPTED)
    except SystemExit:
        STOPPED.set()
        raise
    if reason is None:
        return
    if reason:
        log.error("error: %s", reason)
    if hydra_cfg.mode == RunMode.RUN:
        sys.exit(1)


def _run_in(path: Path, run: Callable[[], None]) -> str | None:
    """Calls ``run`` while nobody else can run in the folder; why it failed, which is also left there."""
    from vitpatch.runs.folder import Held, RunFolder

    folder = RunFolder(path)
    try:
        with folder.held():
            folder.start.unlink(missing_ok=True)  # of an earlier start
            try:
                reason = _tried(folder, run)
                if reason is not None:
                    _leave(folder, "failed", reason)
                return reason
            finally:
                folder.restore_config()
    except Held as error:  # the folder is the other's: nothing is left in it
        return str(error)
    except OSError as error:
        return of_the_disk(error, path)


def _tried(folder: RunFolder, run: Callable[[], None]) -> str | None:
    """Calls ``run``; why it failed. Ends the program where it was interrupted."""
    try:
        run()
    except VitPatchError as error:
        return str(error).replace("\n", " ")
    except InterpolationResolutionError as error:
        return f"{error.full_key}: {' '.join(str(error.msg).split())}"
    except OSError as error:
        return of_the_disk(error, folder.path)
    except (Interrupted, KeyboardInterrupt, SystemExit) as error:
        how = f"{error}" if isinstance(error, Interrupted) else HALFWAY
        _leave(folder, "interrupted", how)
        log.error("interrupted: %s: %s; the same command goes on with it", folder.path, how)
        sys.exit(INTERRUPTED)
    except Exception as error:  # our own mistake: the traceback is for whoever reports it
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]} (a bug in vitpatch; please report it)"
    return None


def of_the_disk(error: OSError, folder: Path) -> str:
    """A full or read-only disk is the user's to mend; the file is named."""
    return f"{error.strerror or error}: {error.filename or folder}"


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _say_interrupted(path: Path) -> None:
    """Of a run that did not begin, or whose end was being written down; unless another process is in its folder."""
    from vitpatch.runs.folder import Held, RunFolder

    folder = RunFolder(path)
    how = BEFORE if not any(folder.shards.glob("batch-*.json")) else HALFWAY
    log.error("interrupted: %s: %s", path, how)
    with suppress(Held, OSError), folder.held():
        _leave(folder, "interrupted", how)


def _leave(folder: RunFolder, state: str, reason: str) -> None:
    try:
        folder.fail(state, reason)
    except OSError as error:
        log.warning("%s cannot be written either (%s)", folder.failed, error.strerror)
