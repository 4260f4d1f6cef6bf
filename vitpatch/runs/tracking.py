"""The tracker: Weights & Biases or nothing. Always finished, also after an exception; never asks, never hangs.

The tracker is a witness: when Weights & Biases fails, or is slow, the run goes on, with one warning and the command to
sync later. Every wait for it has an end.
"""

from __future__ import annotations

import atexit
import logging
import os
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import pandas as pd
from omegaconf import DictConfig

from vitpatch.checks import Interval, check_arguments
from vitpatch.errors import VitPatchError
from vitpatch.runs.config import construct_option
from vitpatch.types import Donor

log = logging.getLogger(__name__)

MODES_OF_WANDB = ("online", "offline", "disabled", "dryrun")
INIT_TIMEOUT_S = 15.0
"""How long a run's start waits for the server; wandb itself takes up to 5 s more to give up."""
LOG_TIMEOUT_S = 45.0
"""How long a finished run's results may take to be handed to wandb's own process, which uploads them."""
FINISH_GRACE_S = 5.0
"""How long after its own timeout, and at its end, wandb's own process is waited for before it is left alone."""
WAITED_FOR = "waited-for"
"""The name of threads that something with an end is done in."""
MOST_SERIES = 64
MOST_HTML_BYTES = 10_000_000
"""A page over this is in the artifact only."""


@dataclass(frozen=True)
class RunInfo:
    """How a run is to be found: its folder, whose name is the run's, the sweep it is of, and its config."""

    folder: Path
    group: str
    config: dict[str, Any]
    job_type: str = "patch"


@dataclass(frozen=True)
class Results:
    """What is shown of a finished run: rows of ``summary.csv``, scalars, pictures by name, files to keep.

    ``series`` (a name a row) tells rows of one layer apart – ``w3``, ``h5``, ``cls`` –; empty where there is one.
    """

    summary: pd.DataFrame
    series: Sequence[str]
    scalars: dict[str, Any]
    pictures: dict[str, list[Path]]
    files: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """What is shown of a comparison: tables by the names of their csv files, pictures (PNG) by name, files to keep.

    ``page``, one of the files, is shown as it is.
    """

    tables: Mapping[str, pd.DataFrame]
    pictures: Mapping[str, Path]
    files: Mapping[str, Path]
    page: Path


def history(results: Results) -> Iterator[tuple[int, dict[str, float]]]:
    """(layer, values) in order of layer; keys as the contract has them, ``effect/mean`` or ``effect/w3/mean``.

    Nothing where there are more than ``MOST_SERIES``: the table ``effects`` has them all.
    """
    if len(set(results.series)) > MOST_SERIES:
        return
    rows = results.summary.assign(series=list(results.series)).sort_values("layer", kind="stable")
    for layer, of_layer in rows.groupby("layer", sort=True):
        values = {}
        for row in of_layer.to_dict("records"):
            prefix = f"effect/{row['series']}/" if row["series"] else "effect/"
            of_row = {"mean": row["effect"], "low": row["effect_low"], "high": row["effect_high"]}
            of_row["recovered"] = row["recovered"]
            of_row |= {str(donor): row.get(f"effect_{donor}") for donor in Donor if donor.partner}  # controls
            values |= {prefix + name: value for name, value in of_row.items() if pd.notna(value)}
        yield int(layer), values


class Silent:
    """A tracked run that nobody tracks."""

    sync_command: str | None = None
    about: dict[str, Any] | None = None

    def log(self, results: Results) -> None:
        """Nothing."""

    def log_comparison(self, compared: Compared) -> None:
        """Nothing."""

    def finish(self, exit_code: int) -> None:
        """Nothing."""


class NoTracker:
    """``logger=none``: results stay on the disk."""

    @contextmanager
    def run(self, info: RunInfo) -> Iterator[Silent]:
        """A run that logs nothing."""
        yield Silent()


@runtime_checkable
class Tracker(Protocol):
    """What ``logger`` can be."""

    def run(self, info: RunInfo) -> AbstractContextManager[Silent]:
        """A tracked run for the length of the block."""


def tracker_of(cfg: DictConfig) -> Tracker:
    """The tracker that a config asks for; where it names none, that is ``logger=none``."""
    return NoTracker() if cfg.get("logger") is None else construct_option(cfg, "logger", Tracker)


class WandbTracker:
    """``logger=wandb``: a Weights & Biases run in the project ``project``, its group the sweep.

    ``mode``: ``online`` needs a key; ``offline`` writes below the run's folder, for ``wandb sync``; ``auto`` is
    online where there is a key and the server answers within 20 s, else offline. ``WANDB_MODE`` in the environment
    decides for ``auto``. A server that did not answer is not asked again by the same process. ``finish_timeout``:
    seconds that a run's end waits for its upload; what is left then goes with ``wandb sync``.
    """

    unreachable: ClassVar[bool] = False

    @check_arguments("logger")
    def __init__(
        self,
        mode: Literal["auto", "offline", "online"] = "auto",
        project: str = "vitpatch",
        entity: str | None = None,
        finish_timeout: Annotated[float, Interval(gt=0, le=86_400), "in seconds"] = 60.0,
    ) -> None:
        self.mode, self.project, self.entity, self.finish_timeout = mode, project, entity, float(finish_timeout)

    @contextmanager
    def run(self, info: RunInfo) -> Iterator[Silent]:
        """A Weights & Biases run for the length of the block; an exception marks it failed and is passed on.

        Raises ``VitPatchError`` when ``online`` is asked for and there is no key or no answer.
        """
        tracked = self._start(info)
        try:
            yield tracked
        except BaseException:
            tracked.finish(exit_code=1)
            raise
        tracked.finish(exit_code=0)

    def _start(self, info: RunInfo) -> Silent:
        os.environ.setdefault(
            "OTEL_SDK_DISABLED", "true"
        )  # wandb's own telemetry waits 20 s for a silent server at exit
        mode = _mode(self.mode)
        if mode == "online" and (self.mode == "online" or not WandbTracker.unreachable):
            try:
                return self._begin(info, mode)
            except Exception as error:  # wandb has no one class for "the server did not answer"
                _let_go()
                if self.mode == "online":
                    raise VitPatchError(
                        f"logger.mode=online: Weights & Biases did not start: {_said(error)}"
                    ) from error
                log.warning("Weights & Biases did not answer (%s); logging offline from here on", _said(error))
                WandbTracker.unreachable = True
        mode = mode if mode == "disabled" else "offline"
        try:
            return self._begin(info, mode)
        except Exception:  # wandb's own process may have died between two runs: a new one
            _let_go()
        try:
            return self._begin(info, mode)
        except Exception as error:  # the run must end well without its witness
            _let_go()
            log.warning("Weights & Biases did not start (%s); the results are on disk only", _said(error))
            return Silent()

    def _begin(self, info: RunInfo, mode: str) -> Silent:
        begun = []
        within(INIT_TIMEOUT_S + 2 * FINISH_GRACE_S, lambda: begun.append(self._init(info, mode)))
        atexit.unregister(_end)
        atexit.register(_end)  # after wandb's own hook, so before it in turn
        return _Tracked(begun[0])

    def _init(self, info: RunInfo, mode: str) -> Any:
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
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=info.folder.name,
            group=info.group,
            job_type=info.job_type,
            config=info.config,
            dir=str(info.folder),
            mode=mode,
            reinit="finish_previous",
            settings=settings,
        )
        if run.id == os.environ.get("WANDB_RUN_ID") and "WANDB_SWEEP_ID" not in os.environ:  # else it is an agent's
            log.warning("Weights & Biases: the run has the id of WANDB_RUN_ID, %s; it replaces what has it", run.id)
        if info.job_type == "patch":
            run.define_metric("layer")
            run.define_metric("effect/*", step_metric="layer")
        return run


def within(seconds: float, act: Callable[[], None]) -> None:
    """Calls ``act`` in a thread; raises what it raises, or ``TimeoutError`` when it takes longer, and leaves it."""
    ended: list[BaseException | None] = []

    def call() -> None:
        try:
            act()
            ended.append(None)
        except BaseException as error:  # passed on to whoever waits
            ended.append(error)

    thread = threading.Thread(
        target=call, name=WAITED_FOR, daemon=True
    )  # a daemon: it must not hold up the program's end
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if ended[0] is not None:
        raise ended[0]


def _end() -> None:
    """Ends wandb's own process, without its tracebacks where it is dead already."""
    import wandb

    with suppress(Exception, SystemExit):  # wandb exits with its process's code
        wandb.teardown()


def _hush() -> None:
    """From now on wandb's threads end without a traceback: their process is taken from under them."""
    before = threading.excepthook
    if before.__module__ == __name__:
        return

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not arguments.exc_type.__module__.startswith("wandb."):
            before(arguments)

    threading.excepthook = hook


def _let_go() -> None:
    """Ends wandb's own process, or leaves it alone where that takes long; the next run starts a new one."""
    import wandb

    _hush()
    with suppress(TimeoutError):
        within(FINISH_GRACE_S, _end)
    wandb.run = None  # a run left alone is still the open one, and with one open there is no key for the next


def _mode(asked: str) -> str:
    """``offline``, ``online`` or ``disabled``, from what is asked for and what is there."""
    of_environment = os.environ.get("WANDB_MODE") or "online"
    if of_environment not in MODES_OF_WANDB:
        raise VitPatchError(f"WANDB_MODE={of_environment}: expected one of {', '.join(MODES_OF_WANDB)}, or unset it")
    if asked == "offline" or (asked == "auto" and of_environment != "online"):
        return "disabled" if asked == "auto" and of_environment == "disabled" else "offline"
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:  # of several classes: a key of the wrong form, an unreadable netrc
        if asked == "online":
            raise VitPatchError(f"logger.mode=online: {_said(error)}") from error
        log.warning("Weights & Biases key: %s; logging offline", _said(error))
        return "offline"
    if not has_key and asked == "online":
        raise VitPatchError("logger.mode=online: no Weights & Biases key; run `wandb login` or use logger.mode=offline")
    return "online" if has_key else "offline"


def _said(error: Exception) -> str:
    """The first line of what an error says; advice on wandb's settings follows in the next."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


class _Tracked(Silent):
    """A Weights & Biases run; whatever goes wrong in it is a warning, once."""

    def __init__(self, run: Any) -> None:
        self._run, self._broken, self._hung = run, False, False
        self.about = {"mode": run.settings.mode, "id": run.id}
        self._sync = f"wandb sync {shlex.quote(str(run.settings.sync_dir))}"
        if run.settings.mode == "online":
            self.about["url"] = run.url
        if run.settings.mode == "offline":
            self.sync_command = self._sync

    def log(self, results: Results) -> None:
        """History by layer, summary, media, the table and the artifact, as the contract names them."""
        self._guard(LOG_TIMEOUT_S, lambda: self._log(results))

    def log_comparison(self, compared: Compared) -> None:
        """``table/NAME``, ``figure/NAME`` and ``page``, and an artifact of type ``comparison`` with all files."""
        self._guard(LOG_TIMEOUT_S, lambda: self._log_comparison(compared))

    def finish(self, exit_code: int) -> None:
        """Ends the run; ``exit_code`` other than 0 marks it failed."""
        if not self._hung:
            wait = self._run.settings.finish_timeout + FINISH_GRACE_S
            self._guard(wait, lambda: self._run.finish(exit_code=exit_code))
        if self._broken:
            _let_go()

    def _guard(self, seconds: float, act: Callable[[], None]) -> None:
        try:
            within(seconds, act)
        except Exception as error:  # the run must end well without its witness
            self._hung |= isinstance(error, TimeoutError)
            WandbTracker.unreachable |= self._hung
            if not self._broken:
                log.warning(
                    "Weights & Biases failed (%s); the results are complete on disk; later: %s",
                    _said(error),
                    self._sync,
                )
            self._broken = True

    def _log(self, results: Results) -> None:
        import wandb

        run = self._run
        for layer, values in history(results):
            run.log({"layer": layer, **values})
        pictures = {name: [wandb.Image(str(p)) for p in paths] for name, paths in results.pictures.items()}
        media = {name: images[0] if len(images) == 1 else images for name, images in pictures.items()}
        run.log({**media, "effects": wandb.Table(dataframe=results.summary)})
        run.summary.update(results.scalars)
        self._keep("effects", results.files)

    def _log_comparison(self, compared: Compared) -> None:
        import wandb

        shown = {f"figure/{name}": wandb.Image(str(path)) for name, path in compared.pictures.items()}
        for name, table in compared.tables.items():
            shown[f"table/{name}"] = wandb.Table(dataframe=_plain(table), allow_mixed_types=True)
        if compared.page.stat().st_size <= MOST_HTML_BYTES:
            shown["page"] = wandb.Html(str(compared.page), inject=False)
        self._run.log(shown)
        self._keep("comparison", compared.files)

    def _keep(self, kind: str, files: Mapping[str, Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
        for name, path in files.items():
            artifact.add_file(str(path), name=name)
        self._run.log_artifact(artifact)


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its row names as a column, where they are more than numbers."""
    return table if isinstance(table.index, pd.RangeIndex) else table.reset_index(names=table.index.name or "run")
