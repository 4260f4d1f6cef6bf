"""Hydra's callback for a sweep: what it refuses at the start, how far it is, and its end in a table of all runs.

Where the value of a key is a name, what was typed is used, although Hydra's grammar reads a number or a boolean:
``data.path=2024_11_28`` is the number 20241128 to Hydra, ``model.revision=1e5`` is 100000.0.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from vitpatch.checks import check_no_secret
from vitpatch.cli.sweep_record import (
    SweepRecord,
    check_same_settings,
    make_record,
    split_into_jobs,
    sweep_overrides,
    write_matched_corruptions,
)
from vitpatch.errors import VitPatchError
from vitpatch.formatting import format_count
from vitpatch.io import describe_disk_error
from vitpatch.runs.config import NAMES, check_names_are_text
from vitpatch.runs.names import describe_fixed, run_name

if TYPE_CHECKING:
    from vitpatch.runs.results import RunStatus

log = logging.getLogger(__name__)

NAMES_OR_NUMBERS = ("data.classes", "data.label_map")
"""Keys whose values may be numbers too: what is typed as Python writes a number (``3``) is one, ``1_000`` is a name."""
READERS = {OverrideLexer.INT: int, OverrideLexer.FLOAT: float, OverrideLexer.BOOL: lambda text: text.lower() == "true"}
"""Tokens of Hydra's grammar that are no text, and how it reads them."""
WANDB_RUN_VARIABLES = tuple(
    f"WANDB_{name}" for name in ("RUN_ID", "RESUME", "RESUME_FROM", "FORK_FROM", "SWEEP_ID", "SWEEP_PARAM_PATH")
)
"""Variables that say which Weights & Biases run one is, which runs of a sweep must not share."""
STOPPED = threading.Event()
"""Set once a job in this process was interrupted: no other begins."""
PATIENCE_S = 10.0
"""How long a sweep that is interrupted waits for its jobs in other processes."""


class SweepCallback(Callback):
    """Refuses what cannot work before Hydra writes anything; logs the progress of a sweep, and its end.

    A process in which a launcher runs jobs has a copy of the callback as it was at the sweep's start.
    """

    launched: ClassVar[SweepCallback | None] = None
    """That of the sweep that this process has launched and not ended."""

    def __init__(self, naming: Any = None) -> None:
        """``naming`` is for the jobs' configs: what ``run_name`` needs to know of the sweep."""
        self._root, self._since = Path(), 0.0
        self._folders: list[str] | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a secret in the command, and tries the run's folder."""
        STOPPED.clear()
        with exit_on_error():
            _check_no_secrets(config)
            _check_writable(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Names the runs and tries the sweep's folder; notes the time, and which corruptions are matched."""
        with exit_on_error():
            _check_no_secrets(config)
            quote_swept_names(config)
            overrides = sweep_overrides(config)
            _check_sweep_name(config, overrides)
            self._root = Path(str(config.hydra.sweep.dir))
            self._name_runs(config, overrides)
        self._since = _disk_time(self._root)
        SweepCallback.launched = self
        STOPPED.clear()
        if not str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            signal.signal(signal.SIGINT, self._stop)  # the jobs, in other processes, have it too
        _remove_wandb_variables()
        write_matched_corruptions(config, overrides)
        if self._folders is not None:
            log.info("sweep: %s in %s", format_count(len(self._folders), "run"), self._root)

    def _name_runs(self, config: DictConfig, overrides: Sequence[Override]) -> None:
        """Hands the naming to the jobs, in Hydra's part of their configs, and writes ``sweep.json``.

        Raises ``VitPatchError`` where runs of other settings are in the sweep's folder, or two would be in one.
        """
        has_own_sweeper = not str(config.hydra.sweeper._target_).endswith(".BasicSweeper")
        jobs = None if has_own_sweeper else split_into_jobs(overrides)  # which only that sweeper knows
        before = SweepRecord.read(self._root)
        record = make_record(overrides, jobs, before)
        config.hydra.overrides.hydra.append(f"hydra.callbacks.sweep.naming={as_value(record.naming())}")
        self._folders = None if jobs is None else _run_folders(config, jobs, record.naming())
        _check_one_model_a_folder(config, self._folders or ())
        is_replaced = config.get("overwrite") is True and before and set(before.runs) <= set(self._folders or ())
        if before and not is_replaced:
            check_same_settings(self._root, before, record)
        _check_writable(self._root)
        record.write(self._root)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Removes the variables here too: another process that runs a job may have an environment of its own."""
        if config.hydra.mode == RunMode.MULTIRUN:
            _remove_wandb_variables()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Logs how far the sweep is."""
        if config.hydra.mode == RunMode.MULTIRUN and self._folders is not None:
            from vitpatch.cli.status import describe_progress

            line = describe_progress(self._root, self._since, _disk_time(self._root), len(self._folders))
            if line is not None:
                log.info("%s", line)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The table of runs and their comparison; exit code 1 if any fell short."""
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

        SweepCallback.launched = None
        runs = status.read_statuses(self._root, self._since)
        if not runs:
            return []
        runs += status.list_not_started(self._folders or (), runs)
        try:
            status.write_states(runs, self._root)
        except OSError as error:  # a disk that takes no more does not hide how the sweep ended
            log.warning("%s", describe_disk_error(error, self._root))
        record = SweepRecord.read(self._root)
        if record is not None and (shared := describe_fixed(record.fixed)):
            log.info("all runs: %s", shared)
        for line in status.format_table(runs):
            log.info("%s", line)
        if config is not None and any(run.metric for run in runs):  # of a patching run that is finished
            _compare(self._root, config, track=any(run.status == "finished" for run in runs))
        log.info("%s", status.count_finished(runs, self._root))
        for line in status.list_unfinished(runs):
            log.error("%s", line)
        return runs

    def _stop(self, signum: int, frame: Any) -> None:
        """CTRL-C where jobs run in other processes: these keep what is done, and the sweep ends."""
        signal.signal(signum, signal.SIG_IGN)
        from vitpatch.cli.status import read_statuses

        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and any(
            run.status == "running" for run in read_statuses(self._root, self._since)
        ):
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


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the program with one line where a start is refused, before Hydra writes anything down."""
    try:
        yield
    except VitPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _check_no_secrets(config: DictConfig) -> None:
    """Raises ``VitPatchError`` where the command holds a secret."""
    try:
        typed = [override.partition("=") for override in (*config.hydra.overrides.task, *config.hydra.overrides.hydra)]
    except InterpolationResolutionError:  # the job says which key cannot be resolved
        return
    for key, _, value in typed:
        check_no_secret({key.lstrip("+~"): value})


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


def _remove_wandb_variables() -> None:
    """Takes from the environment what makes a Weights & Biases run that run: a sweep's runs have ids of their own."""
    removed = [name for name in WANDB_RUN_VARIABLES if os.environ.pop(name, None) is not None]
    if removed:
        log.warning("%s: of one Weights & Biases run; this sweep's have ids of their own", ", ".join(removed))


def _disk_time(folder: Path) -> float:
    """Now, by the clock of the disk that holds ``folder``."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return min(os.fstat(file.fileno()).st_mtime, time.time())


def _check_writable(folder: Path) -> None:
    """Raises ``VitPatchError`` where ``folder`` cannot be made or written: Hydra would end in a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name: a process that is killed leaves nothing
            file.write(b"0" * 65536)
            file.flush()
    except OSError as error:
        remedy = "choose another (hydra.run.dir, hydra.sweep.dir)"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"free some space, or {remedy}"
        raise VitPatchError(f"output folder {folder}: {error.strerror}; {remedy}") from error


def quote_names(override: str) -> str:
    """An override with quotes around values that are names; other overrides, and invalid ones, as they are.

    Raises ``VitPatchError`` for a name that cannot have quotes: a mapping's key.
    """
    key, _, value = override.partition("=")
    key = key.lstrip("+")
    if key not in (*NAMES, *NAMES_OR_NUMBERS):
        return override
    try:
        tree, quoted = _parse(override), override
    except HydraException:  # of "=" or letters beyond ASCII in a name; commas are between several
        is_plain = key in NAMES and not set(value) & set("'\"[](){}$\\")
        start = override.partition("=")[0]
        return f"{start}={','.join(map(as_value, value.split(',')))}" if is_plain else override
    for place, token in reversed(list(_find_non_texts(tree))):
        read = READERS[token.type](token.text)
        if key in NAMES_OR_NUMBERS and not isinstance(read, bool) and str(read) == token.text:
            continue
        if isinstance(place, OverrideParser.DictKeyContext):
            raise VitPatchError(
                f"{key}: Hydra reads its key {token.text} as {read!r}; write the mapping into a YAML file, the key in "
                "quotes"
            )
        quoted = f"{quoted[: place.start.start]}'{token.text}'{quoted[place.stop.stop + 1 :]}"
    return re.sub(r"=choice\((.*,.*)\)$", r"=\1", quoted) if quoted != override else override  # choice() drops quotes


def _parse(override: str) -> Any:
    """The tree of an override by Hydra's grammar. Raises ``HydraException``."""
    lexer = OverrideLexer(InputStream(override))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(HydraErrorListener())
    return parser.override()


def _find_non_texts(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The nodes of a parsed override that Hydra reads as a number or a boolean, in order, each with its token.

    A node includes the spaces around the token.
    """
    if isinstance(tree, OverrideParser.FunctionContext) and tree.ID().getText() != "choice":
        return
    if isinstance(tree, OverrideParser.DictKeyContext | OverrideParser.PrimitiveContext):
        tokens = [node.symbol for node in tree.getChildren() if node.symbol.type != OverrideLexer.WS]
        if len(tokens) == 1 and tokens[0].type in READERS:
            yield tree, tokens[0]
        return
    for child in getattr(tree, "children", None) or ():
        yield from _find_non_texts(child)


def quote_swept_names(config: DictConfig) -> None:
    """Puts quotes around names in what a config, with Hydra's part, sweeps over."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    for key, value in params.items():
        if isinstance(value, str):
            params[key] = quote_names(f"{key}={value}").partition("=")[2]


def as_value(value: Any) -> str:
    """A mapping, a list or a text as the value of an override, which Hydra reads as just this."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(as_value, value))}]"
    return "null" if value is None else QuotedString(value, Quote.single).with_quotes()
