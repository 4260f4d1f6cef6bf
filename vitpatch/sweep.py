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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from vitpatch.launch import is_follower, place
from vitpatch.peers import sweep_overrides, write_corruptions
from vitpatch.secrets import check_no_secret
from vitpatch.spec import VitPatchError, counted

if TYPE_CHECKING:
    from vitpatch.states import RunState
    from vitpatch.store import RunFolder

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long a sweep that is interrupted waits for its jobs in other processes."""
INTERRUPTED = 130
"""The exit code of a run that CTRL-C ended."""
BEFORE = "stopped from outside before it began"


def to_the_end(main: Callable[[], None]) -> None:
    """Calls Hydra's ``main``; a sweep that is stopped, or whose launcher breaks, ends in the table of its runs too."""
    try:
        main()
    except KeyboardInterrupt:  # outside of a job, which answers for itself
        log.error("interrupted: the same command goes on with what is not finished")
        sys.exit(INTERRUPTED)
    finally:
        if SweepCallback.launching is not None:  # Hydra has not called its end
            SweepCallback.launching.tell()


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
    alone = place() is None or module != "vitpatch.run"
    try:
        if SweepCallback.stopped:  # a launcher hands this process the next job
            raise KeyboardInterrupt
        reason = (_run_in if alone else _among_others)(
            path, lambda: importlib.import_module(module).run(cfg, path, options)
        )
    except KeyboardInterrupt:  # also while torch was loaded, or before anybody was in the folder
        log.error("interrupted: %s: %s", path, BEFORE)
        _leave_before(path)
        SweepCallback.stopped = True
        sys.exit(INTERRUPTED)
    except SystemExit:
        SweepCallback.stopped = True
        raise
    if reason is None:
        return
    if reason:
        log.error("error: %s", reason)
    if hydra_cfg.mode == RunMode.RUN:
        sys.exit(1)


def _among_others(path: Path, run: Callable[[], None]) -> str | None:
    """As ``_run_in``, of processes that a launcher started: the first runs, the others follow it and say nothing."""
    from vitpatch.crew import outside
    from vitpatch.worker import follow_job

    try:
        others = outside()
        if others.at.rank:
            code = follow_job(others, path.resolve())
            if code == INTERRUPTED:
                sys.exit(INTERRUPTED)
            return "" if code else None
        others.next_job()
    except VitPatchError as error:
        return str(error)
    code = INTERRUPTED
    try:
        reason = _run_in(path, run)
        code = 0 if reason is None else 1
        return reason
    finally:
        others.over(code)


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


def _leave_before(path: Path) -> None:
    """Leaves a word of a run that did not begin, unless another process is in its folder."""
    from vitpatch.store import Held, RunFolder

    with suppress(Held, OSError), RunFolder(path).held():
        _leave(RunFolder(path), "interrupted", BEFORE)


def _leave(folder: RunFolder, state: str, reason: str) -> None:
    try:
        folder.fail(state, reason)
    except OSError as error:
        log.warning("%s cannot be written either (%s)", folder.failed, error.strerror)


class SweepCallback(Callback):
    """Refuses a folder that cannot be written before Hydra fails in it; says how far a sweep is, and how it ended.

    Other processes, in which launchers run jobs, have a copy of what the launching one knew at the sweep's start.
    """

    launching: ClassVar[SweepCallback | None] = None
    """That of the sweep that this process has launched and not ended."""
    stopped: ClassVar[bool] = False
    """Whether a job in this process was interrupted: no other begins."""

    def __init__(self) -> None:
        self._root, self._since, self._jobs = Path(), 0.0, None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a secret in the command, and tries the run's folder."""
        SweepCallback.stopped = False
        _refuse_secrets(config)
        if is_follower():
            return
        _try_writing(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Tries the sweep's folder, notes the time and how many runs there are, and which corruptions are matched."""
        if is_follower():  # the first process does, and tells
            return
        _refuse_secrets(config)
        self._root = Path(str(config.hydra.sweep.dir))
        _try_writing(self._root)
        self._since, self._jobs = _disk_time(self._root), jobs_of(config)
        SweepCallback.launching, SweepCallback.stopped = self, False
        if not str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            signal.signal(signal.SIGINT, self._stop)  # the jobs, in other processes, have it too
        write_corruptions(config, kwargs.get("config_name"))
        if self._jobs is not None:
            log.info("sweep: %s in %s", counted(len(self._jobs), "run"), self._root)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Says how far the sweep is."""
        if config.hydra.mode == RunMode.MULTIRUN and self._jobs is not None:
            from vitpatch.states import progress

            line = progress(self._root, self._since, _disk_time(self._root), len(self._jobs))
            if line is not None:
                log.info("%s", line)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The table of runs and their comparison; exit code 1 if any fell short."""
        if is_follower():
            return
        states = self.tell(config)
        if not states or any(state.fell_short for state in states):
            sys.exit(1)

    def tell(self, config: DictConfig | None = None) -> list[RunState]:
        """Ends the sweep with the table of its runs, their comparison where there is a config, and why some fell short.

        These are given back.
        """
        from vitpatch import states as room

        SweepCallback.launching = None
        states = room.states_of(self._root, self._since)
        if self._jobs is not None and len(states) < len(self._jobs):
            states += room.not_started(self._jobs.folders(), states)
        try:
            room.write(states, self._root)
        except OSError as error:  # a disk that takes no more does not hide how the sweep ended
            log.warning("%s", _of_the_disk(error, self._root))
        for line in room.lines(states):
            log.info("%s", line)
        if config is not None and any(state.metric for state in states):  # of a patching run that is finished
            _report(self._root, config, track=any(state.state == "finished" for state in states))
        log.info("%s", room.counted_up(states, self._root))
        for line in room.shortcomings(states):
            log.error("%s", line)
        return states

    def _stop(self, signum: int, frame: Any) -> None:
        """CTRL-C where jobs run in other processes: these keep what is done, and the sweep ends."""
        signal.signal(signum, signal.SIG_IGN)
        from vitpatch.states import states_of

        until = time.monotonic() + PATIENCE_S
        while any(s.state == "running" for s in states_of(self._root, self._since)) and time.monotonic() < until:
            time.sleep(0.2)
        raise KeyboardInterrupt


def _report(root: Path, config: DictConfig, track: bool) -> None:
    """Compares the sweep's runs; these are what they are, also where that goes wrong."""
    from vitpatch.report import report

    try:
        report(root, config, track)
    except (VitPatchError, OSError) as error:
        log.warning("comparison: %s", error)
    except Exception:  # our own mistake: the traceback is for whoever reports it
        log.exception("comparison: a bug in vitpatch; please report it. The runs are complete")


@dataclass(frozen=True)
class Jobs:
    """The jobs of a sweep by their overrides, in order."""

    config: DictConfig
    overrides: Sequence[Sequence[str]]
    loader: ConfigLoader

    def __len__(self) -> int:
        return len(self.overrides)

    def folders(self) -> list[str]:
        """The names of their folders; those that cannot be composed are left to Hydra, which says so."""
        names = []
        for number, overrides in enumerate(self.overrides):
            with suppress(HydraException, OmegaConfBaseException):
                composed = self.loader.load_sweep_config(self.config, list(overrides))
                with open_dict(composed):
                    composed.hydra.job.id = composed.hydra.job.num = number
                names.append(str(composed.hydra.sweep.subdir))
        return names


def jobs_of(config: DictConfig) -> Jobs | None:
    """The jobs of the sweep of ``config``; ``None`` where only its sweeper knows."""
    if not str(config.hydra.sweeper._target_).endswith(".BasicSweeper"):
        return None
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    overrides = [job for chunk in BasicSweeper.split_arguments(sweep_overrides(config), None) for job in chunk]
    return Jobs(config, overrides, GlobalHydra.instance().config_loader())


def _refuse_secrets(config: DictConfig) -> None:
    """Ends the program with one line where the command holds a secret, before Hydra writes it down."""
    try:
        check_no_secret({"command": list(config.hydra.overrides.task)})
    except VitPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _disk_time(folder: Path) -> float:
    """Now, by the clock of the disk that holds ``folder``."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return min(os.fstat(file.fileno()).st_mtime, time.time())


def _try_writing(folder: Path) -> None:
    """Ends the program with one line where ``folder`` cannot be made or written: Hydra would end in a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name: a process that is killed leaves nothing
            file.write(b"0" * 65536)
            file.flush()
    except OSError as error:
        remedy = "free some space, or choose another (hydra.run.dir, hydra.sweep.dir)"
        print(f"error: output folder {folder}: {error.strerror}; {remedy}", file=sys.stderr)
        sys.exit(1)
