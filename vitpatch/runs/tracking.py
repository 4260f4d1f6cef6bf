"""The tracker: Weights & Biases or nothing.

No run depends on its tracker. Where Weights & Biases fails, or is slow, the run goes on, with one warning and the
command that uploads it later; nothing ever asks for input.
"""

from __future__ import annotations

import logging
import os
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import pandas as pd
from omegaconf import DictConfig

from vitpatch.checks import Interval, check_fields
from vitpatch.errors import VitPatchError
from vitpatch.runs.config import construct_option
from vitpatch.types import Donor

log = logging.getLogger(__name__)

WANDB_MODES = ("online", "offline", "disabled", "dryrun")
INIT_TIMEOUT_S = 15.0
"""How long a run's start waits for the server."""
SERVICE_TIMEOUT_S = 60.0
"""How long a call may take beyond wandb's own time-outs (a request to the server has 19 s) before it has hung."""
MOST_SERIES = 64
MOST_HTML_BYTES = 10_000_000
"""A larger page is in the artifact only."""


@dataclass(frozen=True)
class RunInfo:
    """What identifies a tracked run: its folder, whose name is the run's, its sweep (``group``) and its config."""

    folder: Path
    group: str
    config: dict[str, Any]
    job_type: str = "patch"


@dataclass(frozen=True)
class Results:
    """What is logged of a finished run or a comparison: tables, pictures and scalars by key, and files to keep.

    ``kind`` is the type of the artifact that keeps the files: ``effects`` or ``comparison``. ``history``: (layer,
    values) in order of layer. ``notes``: what was found, in words. ``page``, one of the files, is logged as HTML.
    """

    kind: str
    tables: Mapping[str, pd.DataFrame]
    pictures: Mapping[str, Sequence[Path]]
    files: Mapping[str, Path]
    history: Iterable[tuple[int, dict[str, float]]] = ()
    scalars: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""
    page: Path | None = None


def history(summary: pd.DataFrame, series: Sequence[str]) -> Iterator[tuple[int, dict[str, float]]]:
    """(layer, values) in order of layer; keys are ``effect/mean`` or, with several series, ``effect/w3/mean``.

    ``series`` has a name for each row of ``summary.csv``, such as ``w3``, ``h5`` or ``cls``, that distinguishes rows of
    the same layer; empty where there is one row a layer. Nothing where there are more than ``MOST_SERIES``: the table
    ``effects`` has them all.
    """
    if len(set(series)) > MOST_SERIES:
        return
    columns = {"mean": "effect", "low": "effect_low", "high": "effect_high", "recovered": "recovered"}
    columns |= {str(donor): f"effect_{donor}" for donor in Donor if donor.partner}  # controls
    for layer, rows in summary.assign(series=list(series)).groupby("layer", sort=True):
        values = {}
        for row in rows.to_dict("records"):
            prefix = f"effect/{row['series']}/" if row["series"] else "effect/"
            values |= {prefix + key: row[name] for key, name in columns.items() if pd.notna(row.get(name))}
        yield int(layer), values


class UntrackedRun:
    """A run that is logged nowhere."""

    sync_command: str | None = None
    details: dict[str, Any] | None = None
    """For the manifest: ``mode``, ``id`` and, of an online run, ``url``."""

    def log(self, results: Results) -> None:
        """Logs nothing."""


class NoTracker:
    """``logger=none``: results stay on the disk."""

    @contextmanager
    def run(self, info: RunInfo) -> Iterator[UntrackedRun]:
        """A run that logs nothing."""
        yield UntrackedRun()


@runtime_checkable
class Tracker(Protocol):
    """What ``logger`` can be."""

    def run(self, info: RunInfo) -> AbstractContextManager[UntrackedRun]:
        """A tracked run, which ends with the block."""


def make_tracker(cfg: DictConfig) -> Tracker:
    """The tracker that a config asks for; where it names none, that is ``logger=none``."""
    return NoTracker() if cfg.get("logger") is None else construct_option(cfg, "logger", Tracker)


@dataclass
class WandbTracker:
    """``logger=wandb``: a Weights & Biases run in the project ``project``, its group the sweep.

    ``mode``: ``online`` needs a key; ``offline`` writes below the run's folder, for ``wandb sync``; ``auto`` is
    online where there is a key and the server answers within 15 s, else offline. ``WANDB_MODE`` in the environment
    decides for ``auto``. A server that did not answer is not asked again by the same process. ``finish_timeout``:
    seconds that a run's end waits for its upload; what is left then is uploaded by ``wandb sync``.
    """

    mode: Literal["auto", "offline", "online"] = "auto"
    project: str = "vitpatch"
    entity: str | None = None
    finish_timeout: Annotated[float, Interval(gt=0, le=86_400), "in seconds"] = 60.0
    unreachable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, "logger")

    @contextmanager
    def run(self, info: RunInfo) -> Iterator[UntrackedRun]:
        """A Weights & Biases run for the length of the block; an exception marks it failed and is passed on.

        Raises ``VitPatchError`` when ``online`` is asked for and there is no key or no answer.
        """
        tracked = self._start(info)
        if tracked is None:
            yield UntrackedRun()
            return
        try:
            yield tracked
        except BaseException:
            tracked.finish(exit_code=1)
            raise
        tracked.finish(exit_code=0)

    def _start(self, info: RunInfo) -> _WandbRun | None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's telemetry waits for a silent server at exit
        mode = _choose_mode(self.mode)
        if mode == "online" and WandbTracker.unreachable and self.mode != "online":
            mode = "offline"
        for attempt in ("online", "offline") if mode == "online" else (mode,):
            try:
                return self._init(info, attempt)
            except Exception as error:  # wandb has no one class for "the server did not answer"
                reason = _first_line(error)
                if self.mode == "online":
                    raise VitPatchError(f"logger.mode=online: Weights & Biases did not start: {reason}") from error
                if attempt == "online":
                    log.warning("Weights & Biases did not answer (%s); logging offline from here on", reason)
                    WandbTracker.unreachable = True
                else:
                    log.warning("Weights & Biases did not start (%s); the results are on disk only", reason)
        return None

    def _init(self, info: RunInfo, mode: str) -> _WandbRun:
        import wandb

        os.environ["WANDB_DATA_DIR"] = str(info.folder / "wandb")  # else artifacts are staged outside the run's folder
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            x_disable_meta=True,  # the command line, which may name what should not leave the machine
            disable_git=True,  # the remote's address may hold a password
            disable_code=True,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
        )
        service = _Service()
        try:
            with service.time_limit(INIT_TIMEOUT_S + SERVICE_TIMEOUT_S):
                run = wandb.init(
                    project=self.project,
                    entity=self.entity,
                    name=info.folder.name,
                    group=info.group,
                    job_type=info.job_type,
                    config=info.config,
                    dir=str(info.folder),
                    mode=mode,
                    reinit="create_new",  # wandb's globals stay as they are
                    settings=settings,
                )
                if info.job_type == "patch":
                    run.define_metric("layer")
                    run.define_metric("effect/*", step_metric="layer")
        except BaseException:
            service.end()
            raise
        if run.id == os.environ.get("WANDB_RUN_ID") and "WANDB_SWEEP_ID" not in os.environ:  # else it is an agent's
            log.warning("Weights & Biases: the run has the id of WANDB_RUN_ID, %s; it replaces what has it", run.id)
        return _WandbRun(run, service)


def _choose_mode(asked: str) -> str:
    """``offline``, ``online`` or ``disabled``, from the key ``logger.mode``, the environment and wandb's login."""
    environment = os.environ.get("WANDB_MODE") or "online"
    if environment not in WANDB_MODES:
        raise VitPatchError(f"WANDB_MODE={environment}: expected one of {', '.join(WANDB_MODES)}, or unset it")
    if asked == "auto" and environment == "disabled":
        return "disabled"
    if asked == "offline" or (asked == "auto" and environment != "online"):
        return "offline"
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:  # of several classes: a key of the wrong form, an unreadable netrc
        if asked == "online":
            raise VitPatchError(f"logger.mode=online: {_first_line(error)}") from error
        log.warning("Weights & Biases key: %s; logging offline", _first_line(error))
        return "offline"
    if not has_key and asked == "online":
        raise VitPatchError("logger.mode=online: no Weights & Biases key; run `wandb login` or use logger.mode=offline")
    return "online" if has_key else "offline"


def _first_line(error: Exception) -> str:
    """The first line of an error's text: wandb's advice on its settings follows in the next."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


class _Service:
    """The process of wandb's own that writes and uploads a run; it is started for each run and ends with it.

    wandb has time-outs for its server, but none for this process: calls wait for it without end, and nothing public
    stops it. So it is killed where it does not answer, and the calls fail.
    """

    def __init__(self) -> None:
        import wandb

        connection = wandb.setup(wandb.Settings(silent=True))._connection  # None where wandb is disabled
        self._process = connection and connection._proc and connection._proc._process

    @contextmanager
    def time_limit(self, seconds: float) -> Iterator[None]:
        """Kills the process where the block takes longer. Raises ``TimeoutError`` where the block then fails."""
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        if self._process:
            timer.start()
        try:
            yield
        except Exception as error:
            if expired.is_set():
                raise TimeoutError(f"no answer within {seconds:.0f} s") from error
            raise
        finally:
            timer.cancel()

    def end(self) -> None:
        """Ends the process; of one that is dead already nothing is left."""
        import wandb

        with suppress(Exception, SystemExit), self.time_limit(SERVICE_TIMEOUT_S):  # wandb exits with its process's code
            wandb.teardown()
        if self._process:
            self._process.kill()
            self._process.wait()


class _WandbRun(UntrackedRun):
    """A Weights & Biases run; the first thing that goes wrong in it is a warning, the rest is silent."""

    def __init__(self, run: Any, service: _Service) -> None:
        self._run, self._service, self._failed = run, service, False
        mode = run.settings.mode
        self.details = {"mode": mode, "id": run.id} | ({"url": run.url} if mode == "online" else {})
        self._sync = f"wandb sync {shlex.quote(str(run.settings.sync_dir))}"
        self.sync_command = self._sync if mode == "offline" else None

    def log(self, results: Results) -> None:
        """History by layer, summary, media, tables, and an artifact with all files."""
        self._attempt(lambda: self._log(results))

    def finish(self, exit_code: int) -> None:
        """Ends the run; ``exit_code`` other than 0 marks it failed."""
        self._attempt(lambda: self._run.finish(exit_code=exit_code), self._run.settings.finish_timeout)
        self._service.end()

    def _attempt(self, act: Callable[[], None], own_timeout: float = 0.0) -> None:
        try:
            with self._service.time_limit(own_timeout + SERVICE_TIMEOUT_S):
                act()
        except Exception as error:  # of any class; the run must end well without its tracker
            WandbTracker.unreachable |= isinstance(error, TimeoutError)
            if not self._failed:
                message = "Weights & Biases failed (%s); the results are complete on disk; later: %s"
                log.warning(message, _first_line(error), self._sync)
            self._failed = True

    def _log(self, results: Results) -> None:
        import wandb

        for layer, values in results.history:
            self._run.log({"layer": layer, **values})
        media: dict[str, Any] = {}
        for name, paths in results.pictures.items():
            images = [wandb.Image(str(path)) for path in paths]
            media[name] = images[0] if len(images) == 1 else images
        for name, table in results.tables.items():
            if not isinstance(table.index, pd.RangeIndex):  # its rows have names
                table = table.reset_index(names=table.index.name or "run")
            media[name] = wandb.Table(dataframe=table, allow_mixed_types=results.kind == "comparison")
        if results.page is not None and results.page.stat().st_size <= MOST_HTML_BYTES:
            media["page"] = wandb.Html(str(results.page), inject=False)
        self._run.log(media)
        self._run.summary.update(dict(results.scalars))
        if results.notes:
            self._run.notes = results.notes
        artifact = wandb.Artifact(f"{results.kind}-{self._run.id}", type=results.kind)
        for name, path in results.files.items():
            artifact.add_file(str(path), name=name)
        self._run.log_artifact(artifact)
