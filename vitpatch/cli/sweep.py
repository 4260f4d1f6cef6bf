"""A sweep, as the process that launches it sees it: its start, how far it is, and its end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vitpatch.cli.sweep_record import (
    SweepRecord,
    as_value,
    check_same_settings,
    make_record,
    split_into_jobs,
    sweep_overrides,
    write_matched_corruptions,
)
from vitpatch.errors import VitPatchError
from vitpatch.formatting import describe_fixed, format_count
from vitpatch.io import check_writable, describe_disk_error
from vitpatch.names import run_name
from vitpatch.runs.config import check_names_are_text

if TYPE_CHECKING:
    from vitpatch.runs.results import RunStatus

log = logging.getLogger(__name__)

WANDB_RUN_VARIABLES = tuple(
    f"WANDB_{name}" for name in ("RUN_ID", "RESUME", "RESUME_FROM", "FORK_FROM", "SWEEP_ID", "SWEEP_PARAM_PATH")
)
"""Variables that say which Weights & Biases run one is, which runs of a sweep must not share."""
PATIENCE_S = 10.0
"""How long a sweep that is interrupted waits for its jobs in other processes."""


@dataclass
class Sweep:
    """A sweep in the folder ``root``: what it refuses at the start, how far it is, and its end in a table of all runs.

    ``folders`` are those of its runs, below ``root``; ``None`` where only another sweeper than Hydra's own knows them.
    ``since``: when it began, by the disk's clock.
    """

    launched: ClassVar[Sweep | None] = None
    """The one that this process has launched and not ended."""

    root: Path
    folders: Sequence[str] | None = None
    since: float = 0.0

    @classmethod
    def start(cls, config: DictConfig) -> Sweep:
        """Names the runs and tries the sweep's folder; notes the time, and which corruptions are matched.

        Raises ``VitPatchError`` for what cannot work.
        """
        overrides = sweep_overrides(config)
        _check_sweep_name(config, overrides)
        root = Path(str(config.hydra.sweep.dir))
        folders = _name_runs(root, config, overrides)
        sweep = Sweep.launched = cls(root, folders, _disk_time(root))
        if not str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            signal.signal(signal.SIGINT, sweep._stop)  # the jobs, in other processes, have it too
        remove_wandb_variables()
        write_matched_corruptions(config, overrides)
        if folders is not None:
            log.info("sweep: %s in %s", format_count(len(folders), "run"), root)
        return sweep

    def log_progress(self) -> None:
        """Logs how far the sweep is, where its runs are known."""
        from vitpatch.cli.status import describe_progress

        if self.folders is None:
            return
        line = describe_progress(self.root, self.since, _disk_time(self.root), len(self.folders))
        if line is not None:
            log.info("%s", line)

    def end(self, config: DictConfig | None) -> None:
        """Reports the sweep, and exits with 1 if any of its runs fell short."""
        try:
            runs = self.report(config)
        except Exception:  # our own mistake, of which Hydra would warn and exit with 0
            log.exception("the sweep's end: a bug in vitpatch; please report it. The runs are what they are")
            sys.exit(1)
        if not runs or not all(run.is_done for run in runs):
            sys.exit(1)

    def report(self, config: DictConfig | None = None) -> list[RunStatus]:
        """Ends the sweep with the table of its runs, their comparison where there is a config, and why some fell short.

        Returns the runs; where none has begun nothing is printed.
        """
        from vitpatch.cli import status

        Sweep.launched = None
        runs = status.read_statuses(self.root, self.since)
        if not runs:
            return []
        runs += status.list_not_started(self.folders or (), runs)
        try:
            status.write_states(runs, self.root)
        except OSError as error:  # a disk that takes no more does not hide how the sweep ended
            log.warning("%s", describe_disk_error(error, self.root))
        record = SweepRecord.read(self.root)
        if record is not None and (shared := describe_fixed(record.fixed)):
            log.info("all runs: %s", shared)
        for line in status.format_table(runs):
            log.info("%s", line)
        if config is not None and any(run.metric for run in runs):  # of a patching run that is finished
            _compare(self.root, config, track=any(run.status == "finished" for run in runs))
        log.info("%s", status.count_finished(runs, self.root))
        for line in status.list_unfinished(runs):
            log.error("%s", line)
        return runs

    def _stop(self, signum: int, frame: Any) -> None:
        """CTRL-C where jobs run in other processes: these keep what is done, and the sweep ends."""
        signal.signal(signum, signal.SIG_IGN)
        from vitpatch.cli.status import read_statuses

        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and any(run.status == "running" for run in read_statuses(self.root, self.since)):
            time.sleep(0.2)
        raise KeyboardInterrupt


def _compare(root: Path, config: DictConfig, track: bool) -> None:
    """Compares the sweep's runs; where that goes wrong it is logged, and the runs stay as they are."""
    from vitpatch.cli.compare import report_sweep

    try:
        report_sweep(root, config, track)
    except (VitPatchError, OSError) as error:
        log.warning("comparison: %s", error)
    except Exception:  # our own mistake: the traceback is for whoever reports it
        log.exception("comparison: a bug in vitpatch; please report it. The runs are complete")


def _name_runs(root: Path, config: DictConfig, overrides: Sequence[Override]) -> list[str] | None:
    """Hands the naming to the jobs, in Hydra's part of their configs, and writes ``sweep.json``; the runs' folders.

    Raises ``VitPatchError`` where runs of other settings are in the sweep's folder, or two would be in one.
    """
    has_own_sweeper = not str(config.hydra.sweeper._target_).endswith(".BasicSweeper")
    jobs = None if has_own_sweeper else split_into_jobs(overrides)  # which only that sweeper knows
    before = SweepRecord.read(root)
    record = make_record(overrides, jobs, before)
    config.hydra.overrides.hydra.append(f"hydra.callbacks.sweep.naming={as_value(record.naming())}")
    folders = None if jobs is None else _run_folders(config, jobs, record.naming())
    _check_one_model_a_folder(config, folders or ())
    is_replaced = config.get("overwrite") is True and before and set(before.runs) <= set(folders or ())
    if before and not is_replaced:
        check_same_settings(root, before, record)
    check_writable(root)
    record.write(root)
    return folders


def _run_folders(config: DictConfig, jobs: Sequence[Sequence[str]], naming: Mapping[str, Any]) -> list[str]:
    """The folders of the jobs, below the sweep's.

    Raises ``VitPatchError`` where two jobs would be in one folder.
    """
    overrides_in: dict[str, Sequence[str]] = {}
    for number, overrides in enumerate(jobs):
        folder = _run_folder(config, number, overrides, naming)
        other = overrides_in.setdefault(folder, overrides)
        if list(other) != list(overrides):  # window=1,1 is one run
            apart = [",".join(o for o in one if o not in two) for one, two in permutations((other, overrides))]
            raise VitPatchError(
                f"hydra.sweep.subdir: the runs {' and '.join(apart)} would be in one folder, {folder}; leave it "
                "out, or let it name all that is swept"
            )
    return list(overrides_in)


def _run_folder(config: DictConfig, number: int, overrides: Sequence[str], naming: Mapping[str, Any]) -> str:
    """The folder of one job; of one that cannot be composed, for which Hydra gives the reason, its overrides."""
    subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]
    if subdir.startswith("${run_name:${hydra.overrides.task},"):  # as conf has it
        return run_name(overrides, naming)
    try:
        composed = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        return str(composed.hydra.sweep.subdir)
    except (HydraException, OmegaConfBaseException):
        return ",".join(overrides)


def _check_sweep_name(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Raises ``VitPatchError`` where a sweep's name is no folder of its own below ``multirun/``."""
    if any(override.key_or_group == "sweep" and override.is_sweep_override() for override in overrides):
        raise VitPatchError("sweep: several names; one sweep has one, start one after the other")
    check_names_are_text(config)
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


def remove_wandb_variables() -> None:
    """Takes from the environment what makes a Weights & Biases run that run: a sweep's runs have ids of their own."""
    removed = [name for name in WANDB_RUN_VARIABLES if os.environ.pop(name, None) is not None]
    if removed:
        log.warning("%s: of one Weights & Biases run; this sweep's have ids of their own", ", ".join(removed))


def _disk_time(folder: Path) -> float:
    """Now, by the clock of the disk that holds ``folder``."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return min(os.fstat(file.fileno()).st_mtime, time.time())
