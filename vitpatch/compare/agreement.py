"""What runs that are compared disagree in and should not, in a line each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

from vitpatch.compare.comparison import FinishedRun
from vitpatch.formatting import class_name
from vitpatch.titles import data_words, short
from vitpatch.types import digest

NO_NUMBER = ("num_workers", "on_error")
"""Keys of ``data`` that do not say which images are read."""
NO_WEIGHTS = (
    "name", "allow_bin", "readout", "anatomy", "image_size", "crop_share", "resample", "mean", "std", "prompts",
)  # fmt: skip
"""Keys of ``model`` that do not say which weights a checkpoint has."""
ZERO_SHOT = "ZeroShotCheckpoint"


def disagreements(runs: Sequence[FinishedRun]) -> tuple[str, ...]:
    """The warnings of ``Comparison``: one model with several weights, one data set with several contents, several
    versions of the code; and a run that is there twice."""
    return (*_weights(runs), *_data(runs), *_code(runs), *_same(runs))


def _weights(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """Runs of one checkpoint, by the keys that say which weights it has."""
    for alike in _by(runs, _asked_weights):
        path = short(alike[0].manifest["config"]["model"]["path"])
        yield from _said(f"model {path}: one path, several weights", alike, _weights_of)


def _asked_weights(run: FinishedRun) -> str:
    """What decides, beside the files, which weights a run has.

    A head that was made from the data's label names is not the checkpoint's alone: older manifests have no digest
    without it, and say nothing of runs on other data.
    """
    model = run.manifest["config"]["model"]
    if class_name(str(model.get("_target_"))) == ZERO_SHOT and "checkpoint" not in run.manifest["model"]:
        return digest([model, run.manifest["identity"]["data"]])
    return digest({key: of for key, of in model.items() if key not in NO_WEIGHTS})


def _weights_of(run: FinishedRun) -> str:
    model = run.manifest["model"]
    return model.get("checkpoint", model["weights"])


def _data(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """Of one model: labels are the model's classes, so that another model's digest may differ."""

    def asked(run: FinishedRun) -> str:
        config = run.manifest["config"]
        return digest([{k: v for k, v in config["data"].items() if k not in NO_NUMBER}, config["model"]])

    for alike in _by(runs, asked):
        data = alike[0].manifest["config"]["data"]
        where = f"data {data_words(data)}, split {data.get('split')}: one path, several contents"
        yield from _said(where, alike, lambda run: run.manifest["identity"]["data"])


def _code(runs: Sequence[FinishedRun]) -> Iterator[str]:
    yield from _said(
        "several numbers versions of vitpatch", runs, lambda run: str(run.manifest["identity"]["numbers_version"])
    )
    yield from _said("several versions of vitpatch", runs, lambda run: run.manifest["versions"]["vitpatch"])


def _same(runs: Sequence[FinishedRun]) -> Iterator[str]:
    for alike in _by(runs, lambda run: run.manifest["run_id"]):
        if len(alike) > 1:
            names = " and ".join(run.name for run in alike)
            yield f"{names} are the same run (run_id {alike[0].manifest['run_id']}): their differences are 0"


def _by(runs: Sequence[FinishedRun], key: Callable[[FinishedRun], Hashable]) -> list[list[FinishedRun]]:
    groups: dict[Hashable, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _said(what: str, runs: Sequence[FinishedRun], of: Callable[[FinishedRun], str]) -> Iterator[str]:
    """A line that names the runs of each value, where there are several."""
    if len(groups := _by(runs, of)) > 1:
        yield f"{what}: " + "; ".join(f"{of(group[0])} of {', '.join(r.name for r in group)}" for group in groups)
