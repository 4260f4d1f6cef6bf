"""A sweep of jobs: what it refuses at its start, how far it is, and its end in a word on all."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from vitpatch.interrupt import SIGNALS
from vitpatch.job import INTERRUPTED, STOPPED, of_the_disk
from vitpatch.launch import is_follower
from vitpatch.peers import sweep_overrides, write_corruptions
from vitpatch.secrets import check_no_secret
from vitpatch.spec import VitPatchError, counted

if TYPE_CHECKING:
    from vitpatch.states import RunState

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long a sweep that is interrupted waits for its jobs in other processes."""


def to_the_end(main: Callable[[], None]) -> None:
    """Calls Hydra's ``main``; a sweep that is stopped, or whose launcher breaks, ends in the table of its runs too."""
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
        if SweepCallback.launching is not None:  # Hydra has not called its end
            SweepCallback.launching.tell()


class SweepCallback(Callback):
    """Refuses a folder that cannot be written before Hydra fails in it; says how far a sweep is, and how it ended.

    Other processes, in which launchers run jobs, have a copy of what the launching one knew at the sweep's start.
    """

    launching: ClassVar[SweepCallback | None] = None
    """That of the sweep that this process has launched and not ended."""

    def __init__(self) -> None:
        self._root, self._since, self._jobs = Path(), 0.0, None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a secret in the command, and tries the run's folder."""
        STOPPED.clear()
        _refuse_secrets(config)
        if is_follower():
            return
        _try_writing(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Tries the sweep's folder, notes the time and how many runs there are, and which corruptions are matched."""
        if is_follower():  # the first process does, and tells
            return
        _refuse_secrets(config)
        _check_name(config)
        self._root = Path(str(config.hydra.sweep.dir))
        _try_writing(self._root)
        self._since, self._jobs = _disk_time(self._root), jobs_of(config)
        SweepCallback.launching = self
        STOPPED.clear()
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
        try:
            states = self.tell(config)
        except Exception:  # our own mistake, of which Hydra would warn and exit with 0
            log.exception("the sweep's end: a bug in vitpatch; please report it. The runs are what they are")
            sys.exit(1)
        if not states or any(state.fell_short for state in states):
            sys.exit(1)

    def tell(self, config: DictConfig | None = None) -> list[RunState]:
        """Ends the sweep with the table of its runs, their comparison where there is a config, and why some fell short.

        The runs are given back; where none has begun there is nothing to say.
        """
        from vitpatch import states as room

        SweepCallback.launching = None
        states = room.states_of(self._root, self._since)
        if not states:
            return []
        if self._jobs is not None and len(states) < len(self._jobs):
            states += room.not_started(self._jobs.folders(), states)
        try:
            room.write(states, self._root)
        except OSError as error:  # a disk that takes no more does not hide how the sweep ended
            log.warning("%s", of_the_disk(error, self._root))
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
        """The names of their folders; of those that cannot be composed, of which Hydra says why, their overrides."""
        return [self._folder(number, overrides) for number, overrides in enumerate(self.overrides)]

    def _folder(self, number: int, overrides: Sequence[str]) -> str:
        try:
            composed = self.loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = number
            return str(composed.hydra.sweep.subdir)
        except (HydraException, OmegaConfBaseException):
            return ",".join(overrides)


def jobs_of(config: DictConfig) -> Jobs | None:
    """The jobs of the sweep of ``config``; ``None`` where only its sweeper knows."""
    if not str(config.hydra.sweeper._target_).endswith(".BasicSweeper"):
        return None
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    split = BasicSweeper.split_arguments(sweep_overrides(config), None)
    overrides = dict.fromkeys(tuple(job) for chunk in split for job in chunk)  # window=1,1 is one run
    return Jobs(config, list(overrides), GlobalHydra.instance().config_loader())


def _refuse_secrets(config: DictConfig) -> None:
    """Ends the program with one line where the command holds a secret, before Hydra writes it down."""
    try:
        given = [override.partition("=") for override in (*config.hydra.overrides.task, *config.hydra.overrides.hydra)]
    except InterpolationResolutionError:  # the job says which key cannot be resolved
        return
    try:
        for key, _, value in given:
            check_no_secret({key.lstrip("+~"): value})
    except VitPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _check_name(config: DictConfig) -> None:
    """Ends the program with one line where a sweep's name is no folder of its own below ``multirun/``."""
    name = str(config.get("sweep"))
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        remedy = "expected the name of a folder below multirun/; for one elsewhere hydra.sweep.dir"
        print(f"error: sweep '{name}': {remedy}", file=sys.stderr)
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
        remedy = "choose another (hydra.run.dir, hydra.sweep.dir)"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"free some space, or {remedy}"
        print(f"error: output folder {folder}: {error.strerror}; {remedy}", file=sys.stderr)
        sys.exit(1)
