"""What of a run's settings can change its numbers: flat, to be shown, and by aspect, to tell what two runs share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vitpatch.compare.comparison import FinishedRun
from vitpatch.formatting import counted
from vitpatch.titles import corruption_words, data_words, short
from vitpatch.types import digest, option_identity, window_word

OPTIONS = ("model", "data", "corruption", "target")
"""Config groups whose options' names are shown."""


@dataclass(frozen=True)
class Aspect:
    """One thing that runs may differ in: ``value`` is equal where it is the same; in words."""

    value: str
    words: str


def aspects(run: FinishedRun) -> dict[str, Aspect]:
    """What a run's effects are made of, by name; what only adds to them (controls, synergy, how p is taken) is not."""
    identity, config = run.manifest["identity"], run.manifest["config"]
    target, of_model = identity["target"], ("weights", "architecture", "readout", "row", "preprocessing")
    calibrated = {key: identity.get(key) for key in ("calibrate", "matched", "corruption_code")}
    found = {
        "model": ([identity.get(key) for key in of_model], short(config["model"]["path"])),
        "precision": (identity["precision"], _words(identity["precision"])),
        "data": (
            identity["data"],
            f"{data_words(config['data'])}, {counted(run.manifest['counts']['images'], 'image')}",
        ),
        "corruption": ([option_identity(identity["corruption"]), calibrated], corruption_words(config["corruption"])),
        "training images": (identity.get("training"), identity.get("training") or "none"),
        "site": (target["site"], target["site"]),
        "tokens": ([target["tokens"], target["grid"]], _words(target["tokens"])),
        "heads": (target["heads"], _words(target["heads"])),
        "layers": (target["layers"], _words(target["layers"]) or "all"),
        "window": (identity["window"], windows_words(identity["window"])),
        "donor": (identity["donors"][0], identity["donors"][0]),
    }
    rest = ("direction", "metric", "rival", "include", "seed")
    found |= {key: (identity[key], str(identity[key])) for key in rest}
    found["code"] = (identity["numbers_version"], f"numbers version {identity['numbers_version']}")
    return {name: Aspect(digest(value), words) for name, (value, words) in found.items()}


def differing(a: Mapping[str, Aspect], b: Mapping[str, Aspect]) -> list[str]:
    """The names of the aspects that are not the same."""
    return [name for name in a if a[name].value != b[name].value]


def differing_words(a: Mapping[str, Aspect], b: Mapping[str, Aspect]) -> str:
    """What is not the same in words; where the words are, with a digest."""
    return "; ".join(f"{name}: {_told_apart(a[name], b[name])}" for name in differing(a, b))


def _told_apart(a: Aspect, b: Aspect) -> str:
    if a.words != b.words:
        return f"{a.words} / {b.words}"
    return f"{a.words} [{a.value[:6]}] / {b.words} [{b.value[:6]}]"


def windows_words(windows: Sequence[int]) -> str:
    """The windows of a run as they are asked for."""
    return ", ".join(map(window_word, windows))


def settings(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """A row a key that is not the same in all runs, its value in words by run; "" = it has none."""
    values = {run.name: dict(_flat(run)) for run in runs}
    keys = dict.fromkeys(key for of_run in values.values() for key in of_run)
    rows = {key: [of_run.get(key, "") for of_run in values.values()] for key in keys}
    apart = {key: row for key, row in rows.items() if len(set(row)) > 1}
    return pd.DataFrame(apart.values(), index=pd.Index(apart, name="key", dtype=object), columns=list(values))


def _flat(run: FinishedRun) -> Iterator[tuple[str, str]]:
    config = run.manifest["config"]
    identity = run.manifest["identity"] | {"corruption": config["corruption"]}  # with the strength that was found
    for group in OPTIONS:
        yield f"options.{group}", _words(config.get("options", {}).get(group))
    yield "model.path", _words(config["model"]["path"])
    for key in ("path", "split", "limit"):
        yield f"data.{key}", _words(config["data"].get(key))
    yield "window", windows_words(identity.pop("window"))
    yield from _flattened("", identity)


def _flattened(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(value, Mapping):
        yield prefix, _words(value)
        return
    for key, of in value.items():
        yield from _flattened(f"{prefix}.{key}" if prefix else str(key), of)


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_words(of)}" for key, of in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
