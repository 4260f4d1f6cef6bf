"""A sweep of jobs: what it refuses at its start, how far it is, and its end in a word on all."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from vitpatch.cli.job import INTERRUPTED, STOPPED, of_the_disk
from vitpatch.cli.sweep_record import SweepRecord, check_same, record_of
from vitpatch.errors import VitPatchError
from vitpatch.runs.distributed import SIGNALS, launched
from vitpatch.runs.name_overrides import as_value, check_names, quote_swept_names, with_quotes
from vitpatch.runs.peers import sweep_overrides, write_corruptions
from vitpatch.runs.run_names import run_name
from vitpatch.runs.secrets import check_no_secret
from vitpatch.types import counted

if TYPE_CHECKING:
    from vitpatch.runs.status import RunState

log = logging.getLogger(__name__)

OF_ONE_WANDB_RUN = tuple(
    f"WANDB_{name}" for name in ("RUN_ID", "RESUME", "RESUME_FROM", "FORK_FROM", "SWEEP_ID", "SWEEP_PARAM_PATH")
)
"""Variables that say which Weights & Biases run one is, which runs of a sweep must not share."""
PATIENCE_S = 10.0
"""How long a sweep that is interrupted waits for its jobs in other processes."""


def to_the_end(main: Callable[[], None]) -> None:
    """Calls Hydra's ``main``; a sweep that is stopped, or whose launcher breaks, ends in the table of its runs too.

    Names in the command are what was typed, also where Hydra would read numbers.
    """
    with _in_one_line():
        if launched() is not None and _assists():
            return
        sys.argv[1:] = map(with_quotes, sys.argv[1:])
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


def _assists() -> bool:
    """Whether this is not rank 0 of the processes that a launcher started; it then has assisted that to its end."""
    from vitpatch.runs.distributed import launched_group
    from vitpatch.runs.predict import assist

    group = launched_group()
    if group.rank:
        assist(group)
    return group.rank > 0


class SweepCallback(Callback):
    """Refuses a folder that cannot be written before Hydra fails in it; says how far a sweep is, and how it ended.

    Other processes, in which launchers run jobs, have a copy of what the launching one knew at the sweep's start.
    """

    launching: ClassVar[SweepCallback | None] = None
    """That of the sweep that this process has launched and not ended."""

    def __init__(self, naming: Any = None) -> None:
        """``naming`` is for the jobs' configs: what ``run_name`` needs to know of the sweep."""
        self._root, self._since = Path(), 0.0
        self._folders: list[str] | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a secret in the command, and tries the run's folder."""
        STOPPED.clear()
        with _in_one_line():
            _check_no_secrets(config)
        _try_writing(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Names the runs and tries the sweep's folder; notes the time, and which corruptions are matched."""
        with _in_one_line():
            _check_no_secrets(config)
            quote_swept_names(config)
            overrides = sweep_overrides(config)
            _check_sweep_name(config, overrides)
            self._root = Path(str(config.hydra.sweep.dir))
            self._name_runs(config, overrides)
        self._since = _disk_time(self._root)
        SweepCallback.launching = self
        STOPPED.clear()
        if not str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            signal.signal(signal.SIGINT, self._stop)  # the jobs, in other processes, have it too
        _leave_wandb_variables()
        write_corruptions(config, kwargs.get("config_name"))
        if self._folders is not None:
            log.info("sweep: %s in %s", counted(len(self._folders), "run"), self._root)

    def _name_runs(self, config: DictConfig, overrides: Sequence[Override]) -> None:
        """Tells the jobs, by Hydra's part of their configs, how they are named; and writes ``sweep.json``.

        Raises ``VitPatchError`` where runs of other settings are in the sweep's folder, or two would be in one.
        """
        jobs = jobs_of(config)
        before = SweepRecord.read(self._root)
        record = record_of(overrides, jobs and jobs.overrides, before)
        config.hydra.overrides.hydra.append(f"hydra.callbacks.sweep.naming={as_value(record.naming())}")
        self._folders = jobs and jobs.folders(record.naming())
        _check_one_model_a_folder(config, self._folders or ())
        is_replaced = config.get("overwrite") is True and before and set(before.runs) <= set(self._folders or ())
        if before and not is_replaced:
            check_same(self._root, before, record)
        _try_writing(self._root)
        record.write(self._root)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Another process that runs a job may have an environment of its own."""
        if config.hydra.mode == RunMode.MULTIRUN:
            _leave_wandb_variables()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Says how far the sweep is."""
        if config.hydra.mode == RunMode.MULTIRUN and self._folders is not None:
            from vitpatch.cli.status import progress

            line = progress(self._root, self._since, _disk_time(self._root), len(self._folders))
            if line is not None:
                log.info("%s", line)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The table of runs and their comparison; exit code 1 if any fell short."""
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
        from vitpatch.cli import status as room

        SweepCallback.launching = None
        states = room.states_of(self._root, self._since)
        if not states:
            return []
        states += room.not_started(self._folders or (), states)
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
        from vitpatch.cli.status import states_of

        until = time.monotonic() + PATIENCE_S
        while any(s.state == "running" for s in states_of(self._root, self._since)) and time.monotonic() < until:
            time.sleep(0.2)
        raise KeyboardInterrupt


def _report(root: Path, config: DictConfig, track: bool) -> None:
    """Compares the sweep's runs; these are what they are, also where that goes wrong."""
    from vitpatch.compare.report import report

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

    def folders(self, naming: Mapping[str, Any]) -> list[str]:
        """The names of their folders; of those that cannot be composed, of which Hydra says why, their overrides.

        Raises ``VitPatchError`` where two jobs would be in one folder.
        """
        of: dict[str, Sequence[str]] = {}
        for number, overrides in enumerate(self.overrides):
            folder = self._folder(number, overrides, naming)
            other = of.setdefault(folder, overrides)
            if list(other) != list(overrides):  # window=1,1 is one run
                apart = [",".join(o for o in one if o not in two) for one, two in permutations((other, overrides))]
                raise VitPatchError(
                    f"hydra.sweep.subdir: the runs {' and '.join(apart)} would be in one folder, {folder}; leave it "
                    "out, or let it name all that is swept"
                )
        return list(of)

    def _folder(self, number: int, overrides: Sequence[str], naming: Mapping[str, Any]) -> str:
        subdir = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["subdir"]
        if subdir.startswith("${run_name:${hydra.overrides.task},"):  # as conf has it
            return run_name(overrides, naming)
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
    return Jobs(config, [job for chunk in split for job in chunk], GlobalHydra.instance().config_loader())


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Ends the program with one line where a start is refused, before Hydra writes anything down."""
    try:
        yield
    except VitPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _check_no_secrets(config: DictConfig) -> None:
    """Raises ``VitPatchError`` where the command holds a secret."""
    try:
        given = [override.partition("=") for override in (*config.hydra.overrides.task, *config.hydra.overrides.hydra)]
    except InterpolationResolutionError:  # the job says which key cannot be resolved
        return
    for key, _, value in given:
        check_no_secret({key.lstrip("+~"): value})


def _check_sweep_name(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Raises ``VitPatchError`` where a sweep's name is no folder of its own below ``multirun/``."""
    if any(override.key_or_group == "sweep" and override.is_sweep_override() for override in overrides):
        raise VitPatchError("sweep: several names; one sweep has one, start one after the other")
    check_names(config)
    name = str(config.get("sweep"))
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or config.get("sweep") is None:
        raise VitPatchError(
            f"sweep '{name}': expected the name of a folder below multirun/; for one elsewhere hydra.sweep.dir"
        )


def _check_one_model_a_folder(config: DictConfig, runs: Sequence[str]) -> None:
    """Raises ``VitPatchError`` where several trainings would save their models in one folder."""
    save_to = OmegaConf.to_container(config, resolve=False).get("save_to")
    if save_to and "${" not in str(save_to) and len(runs) > 1:
        raise VitPatchError(
            f"save_to {save_to}: {len(runs)} runs would save their models there, each over the one before; leave it "
            "out (a run's folder has its model), or let it name what is swept: 'save_to=models/${seed}'"
        )


def _leave_wandb_variables() -> None:
    """Takes from the environment what makes a Weights & Biases run that run: a sweep's runs have ids of their own."""
    there = [name for name in OF_ONE_WANDB_RUN if os.environ.pop(name, None) is not None]
    if there:
        log.warning("%s: of one Weights & Biases run; this sweep's have ids of their own", ", ".join(there))


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
