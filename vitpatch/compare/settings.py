"""Settings of runs that can change their numbers: what differs, what should not, and which runs match by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from vitpatch.formatting import (
    class_name,
    corruption_words,
    data_name,
    digest,
    format_count,
    model_name,
    option_identity,
    transfer_words,
)
from vitpatch.runs.reading import FinishedRun
from vitpatch.study import VIEW_KEYS
from vitpatch.types import format_window

OPTION_GROUPS = ("model", "data", "corruption", "target")  # config groups whose options' names are shown
KEYS_WITHOUT_IMAGES = ("name", "num_workers", "on_error")  # keys of ``data`` that do not change which images are read
KEYS_WITHOUT_WEIGHTS = (
    "name", "allow_bin", "readout", "anatomy", "image_size", "crop_share", "resample", "mean", "std", "prompts",
)  # fmt: skip
"""Keys of ``model`` that do not change which weights are loaded."""
ZERO_SHOT = "ZeroShotCheckpoint"


@dataclass(frozen=True)
class Setting:
    """One thing that runs may differ in: ``value`` is for comparing, ``words`` for people."""

    value: str
    words: str


RunSettings = Mapping[str, Setting]


def run_settings(run: FinishedRun) -> dict[str, Setting]:
    """What a run's effects depend on, by name. Controls, synergy and the test of p only add columns: left out."""
    identity, config = run.identity, run.config
    target, model_keys = identity["target"], ("weights", "architecture", "readout", "row", "preprocessing")
    calibrated = {key: identity.get(key) for key in ("calibrate", "matched", "corruption_code")}
    images = format_count(run.manifest["counts"]["images"], "image")
    settings = {
        "model": ([identity.get(key) for key in model_keys], model_name(config["model"])),
        "precision": (identity["precision"], format_setting(identity["precision"])),
        "data": (identity["data"], f"{data_name(config['data'])}, {images}"),
        "corruption": ([option_identity(identity["corruption"]), calibrated], corruption_words(config["corruption"])),
        "training images": (identity.get("training"), identity.get("training") or "none"),
        "site": (target["site"], target["site"]),
        "tokens": ([target["tokens"], target["grid"]], format_setting(target["tokens"])),
        "heads": (target["heads"], format_setting(target["heads"])),
        "layers": (target["layers"], format_setting(target["layers"]) or "all"),
        "window": (identity["window"], format_windows(identity["window"])),
        "donor": (identity["donors"][0], identity["donors"][0]),
        "direction": (identity["direction"], transfer_words(run.donor, identity["direction"])),
    }
    rest = ("metric", "rival", "include", "seed")
    settings |= {key: (identity[key], str(identity[key])) for key in rest}
    settings["code"] = (identity["numbers_version"], f"numbers version {identity['numbers_version']}")
    return {name: Setting(digest(value), words) for name, (value, words) in settings.items()}


def differing_settings(a: RunSettings, b: RunSettings) -> list[str]:
    """The names of the settings that differ."""
    return [name for name in a if a[name].value != b[name].value]


def describe_differing_settings(a: RunSettings, b: RunSettings) -> str:
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
    table = pd.DataFrame({run.name: pd.Series(_flat_settings(run), dtype=object) for run in runs}, dtype=object)
    keys = list(dict.fromkeys(key for run in runs for key in _flat_settings(run)))
    table = table.reindex(pd.Index(keys, name="key", dtype=object)).fillna("")
    return table[table.nunique(axis=1) > 1]


def _flat_settings(run: FinishedRun) -> dict[str, str]:
    """A run's settings as text, by key; nested keys are joined by dots."""
    config = run.config
    identity = run.identity | {"corruption": config["corruption"]}  # with the calibrated strength
    settings = {f"options.{group}": config.get("options", {}).get(group) for group in OPTION_GROUPS}
    settings["model.path"] = config["model"]["path"]
    settings |= {f"data.{key}": config["data"].get(key) for key in ("path", "split", "limit")}
    settings["window"] = format_windows(identity.pop("window"))
    return {key: format_setting(value) for key, value in (settings | dict(_flatten("", identity))).items()}


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, item in value.items():
        yield from _flatten(f"{prefix}.{key}" if prefix else str(key), item)


def format_setting(value: Any) -> str:
    """A setting as text; a list by its items; "" = none."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(format_setting, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={format_setting(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def match_groups(
    runs: Sequence[FinishedRun], settings: Mapping[str, RunSettings]
) -> list[tuple[FinishedRun, FinishedRun]]:
    """The matching runs of every two groups; ``settings`` by run's name.

    A setting of which two groups share no value is what the groups differ in, and is not compared. Runs match that are
    equal in all other settings; of several such runs, those with the same name below their folders. Runs that are then
    without a match are matched by that name alone.
    """
    pairs = []
    for group_a, group_b in combinations(runs_by_group(runs).values(), 2):
        values_a, values_b = (_values_by_setting(group, settings) for group in (group_a, group_b))
        shared = [name for name in values_a if values_a[name] & values_b[name]]
        by_settings = []
        for a in group_a:
            equal = [b for b in group_b if all(settings[a.name][n].value == settings[b.name][n].value for n in shared)]
            same_name = [b for b in equal if _name_below(b) == _name_below(a)]
            by_settings += [(a, b) for b in same_name or equal]
        matched = {run.name for pair in by_settings for run in pair}
        rest_a, rest_b = ([run for run in group if run.name not in matched] for group in (group_a, group_b))
        pairs += by_settings + [(a, b) for a in rest_a for b in rest_b if _name_below(a) == _name_below(b)]
    return pairs


def _values_by_setting(runs: Sequence[FinishedRun], settings: Mapping[str, RunSettings]) -> dict[str, set[str]]:
    return {name: {settings[run.name][name].value for run in runs} for name in settings[runs[0].name]}


def runs_by_group(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """The runs of each group, in order."""
    return {group[0].group: group for group in _group_by(runs, lambda run: run.group)}


def _name_below(run: FinishedRun) -> str:
    """A run's name below the folder on the command line."""
    return run.name.removeprefix(f"{run.group}/") if run.name != run.group else ""


def consistency_warnings(runs: Sequence[FinishedRun]) -> tuple[str, ...]:
    """The warnings of ``Comparison``: one model with several weights, one data set with several contents, several
    versions of the code; and a run that is there twice.

    Contents are compared between runs of one model: labels are the model's classes, so that another model's digest may
    differ.
    """
    warnings = []
    for group in _group_by(runs, _requested_weights):
        name = model_name(group[0].config["model"])
        warnings += _warn(f"model {name}: one path, several weights", group, _loaded_weights)
    for group in _group_by(runs, _requested_images):
        data = group[0].config["data"]
        what = f"data {data_name(data)}, split {data.get('split')}: one path, several contents"
        warnings += _warn(what, group, lambda run: run.identity["data"])
    numbers = "several numbers versions of vitpatch"
    warnings += _warn(numbers, runs, lambda run: str(run.identity["numbers_version"]))
    warnings += _warn("several versions of vitpatch", runs, lambda run: run.manifest["versions"]["vitpatch"])
    for group in _group_by(runs, lambda run: digest([run.manifest["run_id"], *map(run.identity.get, VIEW_KEYS)])):
        if len(group) > 1:
            names, run_id = " and ".join(run.name for run in group), group[0].manifest["run_id"]
            warnings.append(f"{names} are the same run (run_id {run_id}): their differences are 0")
    return tuple(warnings)


def _requested_weights(run: FinishedRun) -> str:
    """A digest of the keys that choose weights.

    A zero-shot head is made from the data's label names. Manifests of earlier versions have no digest of the checkpoint
    without it, so that runs on other data cannot be compared.
    """
    model = run.config["model"]
    if class_name(str(model.get("_target_"))) == ZERO_SHOT and "checkpoint" not in run.manifest["model"]:
        return digest([model, run.identity["data"]])
    return digest({key: value for key, value in model.items() if key not in KEYS_WITHOUT_WEIGHTS})


def _loaded_weights(run: FinishedRun) -> str:
    model = run.manifest["model"]
    return model.get("checkpoint", model["weights"])


def _requested_images(run: FinishedRun) -> str:
    """A digest of the keys that choose images, and of the model."""
    config = run.config
    data = {key: value for key, value in config["data"].items() if key not in KEYS_WITHOUT_IMAGES}
    return digest([data, config["model"]])


def _group_by(runs: Sequence[FinishedRun], key: Callable[[FinishedRun], str]) -> list[list[FinishedRun]]:
    """Runs with the same key together, in order."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _warn(what: str, runs: Sequence[FinishedRun], value: Callable[[FinishedRun], str]) -> list[str]:
    """A line that names the runs of each value, where there are several values."""
    groups = [f"{value(group[0])} of {', '.join(run.name for run in group)}" for group in _group_by(runs, value)]
    return [f"{what}: {'; '.join(groups)}"] if len(groups) > 1 else []
