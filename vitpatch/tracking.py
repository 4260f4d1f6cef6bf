"""The tracker: Weights & Biases or nothing. Always finished, also after an exception; never asks, never hangs.

The tracker is a witness: when Weights & Biases fails the run goes on, with one warning.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from vitpatch.spec import Donor, VitPatchError

log = logging.getLogger(__name__)

MODES = ("auto", "offline", "online")
MODES_OF_WANDB = ("online", "offline", "disabled", "dryrun")
INIT_TIMEOUT_S = 20.0
MOST_SERIES = 64


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

    def finish(self, exit_code: int) -> None:
        """Nothing."""


class NoTracker:
    """``logger=none``: results stay on the disk."""

    @contextmanager
    def run(self, info: RunInfo) -> Iterator[Silent]:
        """A run that logs nothing."""
        yield Silent()


class WandbTracker:
    """``logger=wandb``: a Weights & Biases run in the project ``project``, its group the sweep.

    ``mode``: ``online`` needs a key; ``offline`` writes below the run's folder, for ``wandb sync``; ``auto`` is
    online where there is a key and the server answers within 20 s, else offline. ``WANDB_MODE`` in the environment
    decides for ``auto``. A server that did not answer is not asked again by the same process.
    """

    unreachable: ClassVar[bool] = False

    def __init__(self, mode: str = "auto", project: str = "vitpatch", entity: str | None = None) -> None:
        if mode not in MODES:
            raise VitPatchError(f"logger.mode {mode!r}: expected one of {', '.join(MODES)}")
        self.mode, self.project, self.entity = mode, project, entity

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
        mode = _mode(self.mode)
        if mode == "online" and (self.mode == "online" or not WandbTracker.unreachable):
            try:
                return _Tracked(self._init(info, mode))
            except Exception as error:  # wandb has no one class for "the server did not answer"
                if self.mode == "online":
                    raise VitPatchError(
                        f"logger.mode=online: Weights & Biases did not start: {_said(error)}"
                    ) from error
                log.warning("Weights & Biases did not answer (%s); logging offline from here on", _said(error))
                WandbTracker.unreachable = True
        try:
            return _Tracked(self._init(info, mode if mode == "disabled" else "offline"))
        except Exception as error:  # the run must end well without its witness
            log.warning("Weights & Biases did not start (%s); the results are on disk only", _said(error))
            return Silent()

    def _init(self, info: RunInfo, mode: str) -> Any:
        import wandb

        os.environ["WANDB_DATA_DIR"] = str(info.folder / "wandb")  # else artifacts are staged outside the run's folder
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
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=INIT_TIMEOUT_S),
        )
        run.define_metric("layer")
        run.define_metric("effect/*", step_metric="layer")
        return run


def _mode(asked: str) -> str:
    """``offline``, ``online`` or ``disabled``, from what is asked for and what is there."""
    of_environment = os.environ.get("WANDB_MODE") or "online"
    if of_environment not in MODES_OF_WANDB:
        raise VitPatchError(f"WANDB_MODE={of_environment}: expected one of {', '.join(MODES_OF_WANDB)}, or unset it")
    if asked == "offline" or (asked == "auto" and of_environment != "online"):
        return "disabled" if asked == "auto" and of_environment == "disabled" else "offline"
    import wandb

    try:
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
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Tracked(Silent):
    """A Weights & Biases run; whatever goes wrong in it is a warning, once."""

    def __init__(self, run: Any) -> None:
        self._run, self._broken = run, False
        self.about = {"mode": run.settings.mode, "id": run.id}
        if run.settings.mode == "online":
            self.about["url"] = run.url
        if run.settings.mode == "offline":
            self.sync_command = f"wandb sync {shlex.quote(str(run.settings.sync_dir))}"

    def log(self, results: Results) -> None:
        """History by layer, summary, media, the table and the artifact, as the contract names them."""
        self._guard(lambda: self._log(results))

    def finish(self, exit_code: int) -> None:
        """Ends the run; ``exit_code`` other than 0 marks it failed."""
        self._guard(lambda: self._run.finish(exit_code=exit_code))

    def _guard(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # the run must end well without its witness
            if not self._broken:
                later = f"; later: {self.sync_command}" if self.sync_command else ""
                log.warning("Weights & Biases failed (%s); the results are complete on disk%s", error, later)
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
        artifact = wandb.Artifact(f"effects-{run.id}", type="effects")
        for name, path in results.files.items():
            artifact.add_file(str(path), name=name)
        run.log_artifact(artifact)
