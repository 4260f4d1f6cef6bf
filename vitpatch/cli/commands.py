"""The commands ``vitpatch`` and ``vitpatch-train``; in a checkout they are also ``patch.py`` and ``train_eval.py``.

A job of theirs ends in a finished folder, or in one line with the reason. Where the value of a key is a name, what was
typed is used, although Hydra's grammar reads a number or a boolean: ``data.path=2024_11_28`` is the number 20241128 to
Hydra, ``model.revision=1e5`` is 100000.0.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from vitpatch.checks import check_no_secret
from vitpatch.cli.sweep import Sweep, remove_wandb_variables
from vitpatch.cli.sweep_record import as_value
from vitpatch.errors import SIGNALS, Interrupted, VitPatchError
from vitpatch.formatting import one_line
from vitpatch.io import check_writable, describe_disk_error
from vitpatch.runs.config import CONF, NAMES, launched, register_resolvers

if TYPE_CHECKING:
    from vitpatch.runs.folder import RunFolder

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""The exit code of a run that CTRL-C ended."""
STOPPED_BEFORE = "stopped from outside before it began"
STOPPED_HALFWAY = "stopped from outside before it was done"
STOPPED = threading.Event()
"""Set once a job in this process was interrupted: no other begins."""
NAMES_OR_NUMBERS = ("data.classes", "data.label_map")
"""Keys whose values may be numbers too: what is typed as Python writes a number (``3``) is one, ``1_000`` is a name."""
READERS = {OverrideLexer.INT: int, OverrideLexer.FLOAT: float, OverrideLexer.BOOL: lambda text: text.lower() == "true"}
"""Tokens of Hydra's grammar that are no text, and how it reads them."""


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
        if Sweep.launched is not None:  # Hydra has not called its end
            Sweep.launched.report()


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the program with one line where a start is refused, before Hydra writes anything down."""
    try:
        yield
    except VitPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


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


def _quote_swept_names(config: DictConfig) -> None:
    """Puts quotes around names in what a config, with Hydra's part, sweeps over."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    for key, value in params.items():
        if isinstance(value, str):
            params[key] = quote_names(f"{key}={value}").partition("=")[2]


class HydraCallback(Callback):
    """Refuses what cannot work before Hydra writes anything; hands a sweep's start and end to ``Sweep``.

    A process in which a launcher runs jobs has a copy of the callback as it was at the sweep's start.
    """

    def __init__(self, naming: Any = None) -> None:
        """``naming`` is for the jobs' configs: what ``run_name`` needs to know of the sweep."""
        self._sweep: Sweep | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a secret in the command, and tries the run's folder."""
        STOPPED.clear()
        with exit_on_error():
            _check_no_secrets(config)
            check_writable(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a secret in the command; begins the sweep."""
        STOPPED.clear()
        with exit_on_error():
            _check_no_secrets(config)
            _quote_swept_names(config)
            self._sweep = Sweep.start(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Of a sweep's job: another process that runs it may have an environment of its own."""
        if config.hydra.mode == RunMode.MULTIRUN:
            remove_wandb_variables()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Logs how far the sweep is."""
        if self._sweep is not None:
            self._sweep.log_progress()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The table of runs and their comparison; exit code 1 if any fell short."""
        self._sweep.end(config)


def _check_no_secrets(config: DictConfig) -> None:
    """Raises ``VitPatchError`` where the command holds a secret."""
    try:
        typed = [override.partition("=") for override in (*config.hydra.overrides.task, *config.hydra.overrides.hydra)]
    except InterpolationResolutionError:  # the job says which key cannot be resolved
        return
    for key, _, value in typed:
        check_no_secret({key.lstrip("+~"): value})


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
