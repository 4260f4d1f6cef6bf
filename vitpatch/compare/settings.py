"""Settings of runs that can change their numbers: what differs, what should not, and which runs match by them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from vitpatch.compare.load import FinishedRun
from vitpatch.formatting import class_name, corruption_words, counted, data_words, digest, option_identity, short
from vitpatch.types import format_window

OPTION_GROUPS = ("model", "data", "corruption", "target")
"""Config groups whose options' names are shown."""
KEYS_WITHOUT_IMAGES = ("num_workers", "on_error")
"""Keys of ``data`` that do not change which images are read."""
KEYS_WITHOUT_WEIGHTS = (
    "name", "allow_bin", "readout", "anatomy", "image_size", "crop_share", "resample", "mean", "std", "prompts",
)  # fmt: skip
"""Keys of ``model`` that do not change which weights are loaded."""
ZERO_SHOT = "ZeroShotCheckpoint"


@dataclass(frozen=True)
class Setting:
    """One thing that runs may differ in: ``value`` is equal exactly where it is the same; and in words."""

    value: str
    words: str


RunSettings = Mapping[str, Setting]


def run_settings(run: FinishedRun) -> dict[str, Setting]:
    """What a run's effects depend on, by name. Controls, synergy and how p is taken only add columns: left out."""
    identity, config = run.manifest["identity"], run.manifest["config"]
    target, model_keys = identity["target"], ("weights", "architecture", "readout", "row", "preprocessing")
    calibrated = {key: identity.get(key) for key in ("calibrate", "matched", "corruption_code")}
    images = counted(run.manifest["counts"]["images"], "image")
    settings = {
        "model": ([identity.get(key) for key in model_keys], short(config["model"]["path"])),
        "precision": (identity["precision"], _words(identity["precision"])),
        "data": (identity["data"], f"{data_words(config['data'])}, {images}"),
        "corruption": ([option_identity(identity["corruption"]), calibrated], corruption_words(config["corruption"])),
        "training images": (identity.get("training"), identity.get("training") or "none"),
        "site": (target["site"], target["site"]),
        "tokens": ([target["tokens"], target["grid"]], _words(target["tokens"])),
        "heads": (target["heads"], _words(target["heads"])),
        "layers": (target["layers"], _words(target["layers"]) or "all"),
        "window": (identity["window"], format_windows(identity["window"])),
        "donor": (identity["donors"][0], identity["donors"][0]),
    }
    rest = ("direction", "metric", "rival", "include", "seed")
    settings |= {key: (identity[key], str(identity[key])) for key in rest}
    settings["code"] = (identity["numbers_version"], f"numbers version {identity['numbers_version']}")
    return {name: Setting(digest(value), words) for name, (value, words) in settings.items()}


def differing_settings(a: RunSettings, b: RunSettings) -> list[str]:
    """The names of the settings that differ."""
    return [name for name in a if a[name].value != b[name].value]


def describe_differing(a: RunSettings, b: RunSettings) -> str:
    """The settings that differ, in words; with a digest where the words are the same."""
    described = []
    for name in differing_settings(a, b):
        words = [a[name].words, b[name].words]
        if words[0] == words[1]:
            words = [f"{setting.words} [{setting.value[:6]}]" for setting in (a[name], b[name])]
        described.append(f"{name}: {' / '.join(words)}")
    return "; ".join(described)


def format_windows(windows: Sequence[int]) -> str:
    """The windows of a run as they are asked for."""
    return ", ".join(map(format_window, windows))


def settings_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """The table ``settings`` of ``Comparison``; "" = the run has no such key."""
    values = {run.name: dict(_flat_settings(run)) for run in runs}
    keys = dict.fromkeys(key for settings in values.values() for key in settings)
    rows = {key: [settings.get(key, "") for settings in values.values()] for key in keys}
    differing = {key: row for key, row in rows.items() if len(set(row)) > 1}
    return pd.DataFrame(differing.values(), index=pd.Index(differing, name="key", dtype=object), columns=list(values))


def _flat_settings(run: FinishedRun) -> Iterator[tuple[str, str]]:
    config = run.manifest["config"]
    identity = run.manifest["identity"] | {"corruption": config["corruption"]}  # with the calibrated strength
    for group in OPTION_GROUPS:
        yield f"options.{group}", _words(config.get("options", {}).get(group))
    yield "model.path", _words(config["model"]["path"])
    for key in ("path", "split", "limit"):
        yield f"data.{key}", _words(config["data"].get(key))
    yield "window", format_windows(identity.pop("window"))
    yield from _flatten("", identity)


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(value, Mapping):
        yield prefix, _words(value)
        return
    for key, item in value.items():
        yield from _flatten(f"{prefix}.{key}" if prefix else str(key), item)


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_words(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def match_groups(
    runs: Sequence[FinishedRun], settings: Mapping[str, RunSettings]
) -> list[tuple[FinishedRun, FinishedRun]]:
    """The matching runs of every two groups; ``settings`` by run's name.

    A setting that two groups have no value of in common is what they differ in, and is left aside. Runs match that are
    equal in all others; of several such the ones with the same name below their folders. Runs that then have no match
    are matched by that name alone.
    """
    groups = list(runs_by_group(runs).values())
    return [pair for a, b in combinations(groups, 2) for pair in _match(a, b, settings)]


def runs_by_group(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """The runs of each group, in order."""
    return {alike[0].group: alike for alike in _group(runs, lambda run: run.group)}


def _match(
    group_a: Sequence[FinishedRun], group_b: Sequence[FinishedRun], settings: Mapping[str, RunSettings]
) -> list[tuple[FinishedRun, FinishedRun]]:
    def values(group: Sequence[FinishedRun], name: str) -> set[str]:
        return {settings[run.name][name].value for run in group}

    shared = [name for name in settings[group_a[0].name] if values(group_a, name) & values(group_b, name)]

    def key(run: FinishedRun) -> tuple[str, ...]:
        return tuple(settings[run.name][name].value for name in shared)

    pairs = []
    for a in group_a:
        alike = [b for b in group_b if key(b) == key(a)]
        same_name = [b for b in alike if _name_below(b) == _name_below(a)]
        pairs += [(a, b) for b in same_name or alike]
    matched = {run.name for pair in pairs for run in pair}
    rest_a, rest_b = ([run for run in group if run.name not in matched] for group in (group_a, group_b))
    return pairs + [(a, b) for a in rest_a for b in rest_b if _name_below(a) == _name_below(b)]


def _name_below(run: FinishedRun) -> str:
    """A run's name below the folder on the command line."""
    return run.name.removeprefix(f"{run.group}/") if run.name != run.group else ""


def consistency_warnings(runs: Sequence[FinishedRun]) -> tuple[str, ...]:
    """The warnings of ``Comparison``: one model with several weights, one data set with several contents, several
    versions of the code; and a run that is there twice."""
    return (*_several_weights(runs), *_several_contents(runs), *_several_versions(runs), *_duplicates(runs))


def _several_weights(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """Of runs that ask for one checkpoint."""
    for alike in _group(runs, _requested_weights):
        path = short(alike[0].manifest["config"]["model"]["path"])
        yield from _warn(f"model {path}: one path, several weights", alike, _loaded_weights)


def _requested_weights(run: FinishedRun) -> str:
    """What the config says of which weights are loaded.

    A zero-shot head is made from the data's label names. Manifests of earlier versions have no digest of the checkpoint
    without it, so that runs on other data cannot be compared.
    """
    model = run.manifest["config"]["model"]
    if class_name(str(model.get("_target_"))) == ZERO_SHOT and "checkpoint" not in run.manifest["model"]:
        return digest([model, run.manifest["identity"]["data"]])
    return digest({key: value for key, value in model.items() if key not in KEYS_WITHOUT_WEIGHTS})


def _loaded_weights(run: FinishedRun) -> str:
    model = run.manifest["model"]
    return model.get("checkpoint", model["weights"])


def _several_contents(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """Of runs of one model: labels are the model's classes, so that another model's digest may differ."""

    def requested(run: FinishedRun) -> str:
        config = run.manifest["config"]
        return digest([{k: v for k, v in config["data"].items() if k not in KEYS_WITHOUT_IMAGES}, config["model"]])

    for alike in _group(runs, requested):
        data = alike[0].manifest["config"]["data"]
        where = f"data {data_words(data)}, split {data.get('split')}: one path, several contents"
        yield from _warn(where, alike, lambda run: run.manifest["identity"]["data"])


def _several_versions(runs: Sequence[FinishedRun]) -> Iterator[str]:
    yield from _warn(
        "several numbers versions of vitpatch", runs, lambda run: str(run.manifest["identity"]["numbers_version"])
    )
    yield from _warn("several versions of vitpatch", runs, lambda run: run.manifest["versions"]["vitpatch"])


def _duplicates(runs: Sequence[FinishedRun]) -> Iterator[str]:
    for alike in _group(runs, lambda run: run.manifest["run_id"]):
        if len(alike) > 1:
            names = " and ".join(run.name for run in alike)
            yield f"{names} are the same run (run_id {alike[0].manifest['run_id']}): their differences are 0"


def _group(runs: Sequence[FinishedRun], key: Callable[[FinishedRun], Hashable]) -> list[list[FinishedRun]]:
    groups: dict[Hashable, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _warn(what: str, runs: Sequence[FinishedRun], value: Callable[[FinishedRun], str]) -> Iterator[str]:
    """A line that names the runs of each value, where there are several."""
    if len(groups := _group(runs, value)) > 1:
        yield f"{what}: " + "; ".join(f"{value(group[0])} of {', '.join(r.name for r in group)}" for group in groups)
