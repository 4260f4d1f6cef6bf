"""Jobs of Hydra: each ends in a sealed folder or in one line that says why not; a sweep ends in a word on all."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from vitpatch.peers import write_corruptions
from vitpatch.spec import VitPatchError

if TYPE_CHECKING:
    from vitpatch.store import RunFolder

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""The exit code of a run that CTRL-C ended."""


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
        reason = _run_in(path, lambda: importlib.import_module(module).run(cfg, path, options))
    except KeyboardInterrupt:  # while torch was loaded, or before anybody was in the folder
        log.error("interrupted: %s: stopped from outside before it began", path)
        sys.exit(INTERRUPTED)
    if reason is None:
        return
    log.error("error: %s", reason)
    if hydra_cfg.mode == RunMode.RUN:
        sys.exit(1)


def _run_in(path: Path, run: Callable[[], None]) -> str | None:
    """Calls ``run`` while nobody else can run in the folder; why it failed, which is also left there."""
    from vitpatch.store import Held, RunFolder

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
        return _of_the_disk(error, path)


def _tried(folder: RunFolder, run: Callable[[], None]) -> str | None:
    """Calls ``run``; why it failed. Ends the program where it was interrupted."""
    from vitpatch.interrupt import Interrupted

    try:
        run()
    except VitPatchError as error:
        return str(error).replace("\n", " ")
    except OSError as error:
        return _of_the_disk(error, folder.path)
    except (Interrupted, KeyboardInterrupt, SystemExit) as error:
        how = f"{error}" if isinstance(error, Interrupted) else "stopped from outside before it was done"
        _leave(folder, "interrupted", how)
        log.error("interrupted: %s: %s; the same command goes on with it", folder.path, how)
        sys.exit(INTERRUPTED)
    except Exception as error:  # our own mistake: the traceback is for whoever reports it
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]} (a bug in vitpatch; please report it)"
    return None


def _of_the_disk(error: OSError, folder: Path) -> str:
    """A full or read-only disk is the user's to mend; the file is named."""
    return f"{error.strerror or error}: {error.filename or folder}"


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _leave(folder: RunFolder, state: str, reason: str) -> None:
    try:
        folder.fail(state, reason)
    except OSError as error:
        log.warning("%s cannot be written either (%s)", folder.failed, error.strerror)


class SweepCallback(Callback):
    """Refuses a folder that cannot be written before Hydra fails in it; ends a sweep with its states and exit code."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Tries the run's folder."""
        _try_writing(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Tries the sweep's folder, notes the time, and which corruptions are to be matched."""
        folder = Path(str(config.hydra.sweep.dir))
        _try_writing(folder)
        self._started = _disk_time(folder)
        write_corruptions(config, kwargs.get("config_name"))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """A line for each run that did not finish, the last word on all, exit code 1 if any fell short."""
        from vitpatch.store import RunFolder

        root = Path(str(config.hydra.sweep.dir))
        # Hydra writes .hydra/ anew for every job of this sweep, with every launcher, also for one that is then skipped
        jobs = [
            p.parent.parent for p in sorted(root.glob("*/.hydra/overrides.yaml")) if p.stat().st_mtime >= self._started
        ]
        states = {folder: RunFolder(folder).state() for folder in jobs}
        short = {folder: state for folder, state in states.items() if state[0] not in ("finished", "planned")}
        planned = sum(state == "planned" for state, _ in states.values())
        dry = f" ({planned} only planned, dry_run=true)" if planned else ""
        log.info("%d of %d runs finished in %s%s", len(states) - len(short) - planned, len(states), root, dry)
        by_reason: dict[tuple[str, str | None], list[str]] = {}
        for folder, outcome in short.items():
            by_reason.setdefault(outcome, []).append(folder.name)
        for (state, reason), names in by_reason.items():
            log.error("%s: %s: %s", state, " and ".join(names), reason)
        if short or not jobs:
            sys.exit(1)


def _disk_time(folder: Path) -> float:
    """Now, by the clock of the disk that holds ``folder``."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        return min(Path(file.name).stat().st_mtime, time.time())


def _try_writing(folder: Path) -> None:
    """Ends the program with one line where ``folder`` cannot be made or written: Hydra would end in a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"0" * 65536)
            file.flush()
    except OSError as error:
        remedy = "free some space, or choose another (hydra.run.dir, hydra.sweep.dir)"
        print(f"error: output folder {folder}: {error.strerror}; {remedy}", file=sys.stderr)
        sys.exit(1)
