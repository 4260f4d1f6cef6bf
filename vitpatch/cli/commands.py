"""The commands ``vitpatch`` and ``vitpatch-train``; in a checkout they are also ``patch.py`` and ``train_eval.py``.

A job of theirs ends in a finished folder, or in one line with the reason.
"""

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

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError

from vitpatch.cli.sweep import STOPPED, SweepCallback, exit_on_error, quote_names
from vitpatch.errors import SIGNALS, Interrupted, VitPatchError
from vitpatch.formatting import one_line
from vitpatch.io import describe_disk_error
from vitpatch.runs.config import CONF, launched, register_resolvers

if TYPE_CHECKING:
    from vitpatch.runs.folder import RunFolder

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""The exit code of a run that CTRL-C ended."""
STOPPED_BEFORE = "stopped from outside before it began"
STOPPED_HALFWAY = "stopped from outside before it was done"


def patch() -> None:
    """One patching run, or with ``-m`` a sweep: ``vitpatch -m corruption=gray,noise window=1,3,5``."""
    run_command(hydra.main(version_base="1.3", config_path=str(CONF), config_name="patch")(_patch))


def train() -> None:
    """Trains a classifier and evaluates it, clean and corrupted: ``vitpatch-train [overrides]``."""
    run_command(hydra.main(version_base="1.3", config_path=str(CONF), config_name="train_eval")(_train))


def _patch(cfg: DictConfig) -> None:
    run_job("vitpatch.runs.run", cfg)


def _train(cfg: DictConfig) -> None:
    run_job("vitpatch.training.fit", cfg)


def run_command(main: Callable[[], None]) -> None:
    """Calls Hydra's ``main``; a sweep that is stopped, or whose launcher breaks, ends in the table of its runs too.

    Names in the command are what was typed, also where Hydra would read numbers.
    """
    register_resolvers()
    with exit_on_error():
        if launched() is not None and _assists():
            return
        sys.argv[1:] = map(quote_names, sys.argv[1:])
    try:
        main()
    except KeyboardInterrupt:  # outside of a job, which answers for itself
        log.error("interrupted: the same command goes on with what is not finished")
        sys.exit(INTERRUPTED)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # another CTRL-C has nothing to stop any more
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        raise
    finally:
        if SweepCallback.launched is not None:  # Hydra has not called its end
            SweepCallback.launched.report()


def _assists() -> bool:
    """Whether this is not rank 0 of the processes that a launcher started; it then has assisted that to its end."""
    from vitpatch.runs.predict import assist
    from vitpatch.runs.trainer import launched_group

    group = launched_group()
    if group.rank:
        assist(group)
    return group.rank > 0


@dataclass(frozen=True)
class JobResult:
    """How a job ended, and why, in one line."""

    status: Literal["finished", "failed", "interrupted"]
    reason: str = ""


def run_job(module: str, cfg: DictConfig) -> None:
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
        result = _run_in(path, lambda: importlib.import_module(module).run(cfg, path, options))
    except KeyboardInterrupt:  # while torch was loaded, or while the end was being written
        result = _record_interruption(path)
    if result.status == "interrupted":
        STOPPED.set()
        if result.reason:
            log.error("interrupted: %s: %s; the same command goes on with it", path, result.reason)
        sys.exit(INTERRUPTED)
    if result.status == "failed":
        log.error("error: %s", result.reason)
        if hydra_cfg.mode == RunMode.RUN:
            sys.exit(1)


def _run_in(path: Path, run: Callable[[], None]) -> JobResult:
    """Calls ``run`` while no other process can run in the folder, and leaves there why it did not finish."""
    from vitpatch.runs.folder import FolderLocked, RunFolder

    folder = RunFolder(path)
    try:
        with folder.locked():
            folder.start.unlink(missing_ok=True)  # of an earlier start
            try:
                result = _attempt(run, path)
                _record(folder, result)
            finally:
                folder.restore_config()
            return result
    except FolderLocked as error:  # the folder is the other's: nothing is left in it
        return JobResult("failed", str(error))
    except OSError as error:
        return JobResult("failed", describe_disk_error(error, path))


def _attempt(run: Callable[[], None], path: Path) -> JobResult:
    """Calls ``run``; every exception becomes a result."""
    try:
        run()
    except VitPatchError as error:
        return JobResult("failed", str(error).replace("\n", " "))
    except InterpolationResolutionError as error:
        return JobResult("failed", f"{error.full_key}: {one_line(error.msg)}")
    except OSError as error:
        return JobResult("failed", describe_disk_error(error, path))
    except Interrupted as error:
        return JobResult("interrupted", str(error))
    except (KeyboardInterrupt, SystemExit):
        return JobResult("interrupted", STOPPED_HALFWAY)
    except Exception as error:  # our own mistake: the traceback is for whoever reports it
        traceback.print_exc()
        reason = f"{type(error).__name__}: {one_line(error, 500)} (a bug in vitpatch; please report it)"
        return JobResult("failed", reason)
    return JobResult("finished")


def _raise_interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _record_interruption(path: Path) -> JobResult:
    """Of a job that did not begin, or whose end was being written; nothing is left where another process runs."""
    from vitpatch.runs.folder import FolderLocked, RunFolder

    folder = RunFolder(path)
    has_begun = any(folder.shards.glob("batch-*.json"))
    result = JobResult("interrupted", STOPPED_HALFWAY if has_begun else STOPPED_BEFORE)
    with suppress(FolderLocked, OSError), folder.locked():
        _record(folder, result)
    return result


def _record(folder: RunFolder, result: JobResult) -> None:
    """Leaves in the folder why a job did not finish."""
    if result.status == "finished":
        return
    try:
        folder.mark_failed(result.status, result.reason)
    except OSError as error:
        log.warning("%s cannot be written either (%s)", folder.failed, error.strerror)
