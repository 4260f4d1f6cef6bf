"""Finished runs in a table, a row each, and their profiles under one another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitpatch.compare.comparison import FinishedRun
from vitpatch.compare.load import known, peak_row
from vitpatch.compare.settings import windows_words
from vitpatch.stats.result import series_of
from vitpatch.titles import corruption_name, data_words, short, strength_words
from vitpatch.types import BaseRun, Direction, Donor, Metric, depends_on_corruption, read_inclusion

OF_STUDY = {"direction": Direction, "metric": Metric, "rival": BaseRun}
ENDS = ("", "_low", "_high")


def overview(runs: Sequence[FinishedRun], place: Path) -> pd.DataFrame:
    """The table ``overview`` of ``Comparison``; ``place`` is the folder that paths are relative to."""
    return pd.DataFrame([_row(run, place) for run in runs])


def _row(run: FinishedRun, place: Path) -> dict[str, Any]:
    manifest, config, identity = run.manifest, run.manifest["config"], run.manifest["identity"]
    corruption, target, tracking = config["corruption"], identity["target"], manifest.get("tracking") or {}
    summary, total = run.summary, manifest["total_effect"]
    row = {"run": run.name, "group": run.group, "title": manifest["title"], "model": short(config["model"]["path"])}
    row |= {"data": data_words(config["data"]), "corruption": f"none: {manifest['donors'][0]} as donor"}
    row |= {"strength": "", "calibrated": ""}
    if _depends_on_corruption(run):
        row |= {"corruption": corruption_name(corruption), "strength": strength_words(corruption)}
        row["calibrated"] = _calibrated(manifest)
    row |= {"site": target["site"], "tokens": ", ".join(target["tokens"]), "heads": _heads(target["heads"])}
    row |= {"windows": windows_words(identity["window"]), "direction": identity["direction"]}
    row |= {"donor": manifest["donors"][0], "metric": identity["metric"], "include": identity["include"]}
    row |= {"n": int(summary["n"].iloc[0]), "n_clusters": int(summary["n_clusters"].iloc[0]), **_base_runs(run)}
    row |= {"total_effect": known(total["mean"])}
    row |= {f"total_effect{end}": known(total[end.strip("_")]) for end in ENDS[1:]}
    row |= _peak(run) | {"depth": manifest["model"]["layers"], "seconds": manifest["seconds"]}
    row |= {"weights": manifest["model"]["weights"], "data_digest": identity["data"], "code": code_of(run)}
    row |= {"notes": "; ".join(manifest["notes"]), "folder": _relative(run.folder.path, place)}
    composed = run.folder.path / ".hydra" / "config.yaml"
    row |= {"config": _relative(composed, place) if composed.exists() else ""}
    return row | {"wandb_url": tracking.get("url") or ""}


def _depends_on_corruption(run: FinishedRun) -> bool:
    identity = run.manifest["identity"]
    direction, metric, rival = (of(identity[key]) for key, of in OF_STUDY.items())
    donor, include = Donor(run.manifest["donors"][0]), read_inclusion(identity["include"])
    return depends_on_corruption(donor, direction, metric, rival, include)


def code_of(run: FinishedRun) -> str:
    """The version of the code that made a run."""
    return f"{run.manifest['versions']['vitpatch']}, numbers {run.manifest['identity']['numbers_version']}"


def _peak(run: FinishedRun) -> dict[str, Any]:
    peak, manifest = peak_row(run), run.manifest
    numbers = [f"peak_{name}{end}" for name in ("effect", "recovered") for end in ENDS]
    names = ["peak_layer", "peak_place", "peak_relative_depth", *numbers, "peak_p"]
    row: dict[str, Any] = dict.fromkeys(names, np.nan) | {"peak_place": ""}
    if peak is not None:
        series = series_of(run.summary)[run.summary.index.get_loc(peak.name)]
        row["peak_layer"] = int(peak["layer"])
        row["peak_place"] = f"layer {int(peak['layer'])}{f', {series}' if series else ''}"
        row["peak_relative_depth"] = relative_depth(int(peak["layer"]), manifest["model"]["layers"])
        row |= {name: float(peak[name.removeprefix("peak_")]) for name in [*numbers, "peak_p"]}
    layers = manifest.get("peak_set") or []
    row["peak_set"] = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else ""
    return row | {name: known(manifest.get(name)) for name in ("peak_stability", "peak_effect_split_halves")}


def relative_depth(layer: Any, depth: int) -> Any:
    """Where in a model of ``depth`` blocks a layer is: the middle of its block, in 0 … 1."""
    return (layer + 0.5) / depth


def _base_runs(run: FinishedRun) -> dict[str, float]:
    """Accuracy and probability of the label in both base runs, over the included images."""
    names = ["label", "included", *(f"{what}_{base}" for what in ("pred", "prob") for base in BaseRun)]
    examples = pd.read_parquet(run.folder.examples, columns=names)
    examples = examples[examples["included"]]
    row = {f"accuracy_{base}": float((examples[f"pred_{base}"] == examples["label"]).mean()) for base in BaseRun}
    return row | {f"prob_{base}": float(examples[f"prob_{base}"].mean()) for base in BaseRun}


def _calibrated(manifest: Any) -> str:
    found = manifest.get("calibration")
    if not found:
        return ""
    drop = known(found["drop"]["drop"])
    return f"{found['asked']}: {found['key']}={found['strength']:.4g}, {found['damage']} {drop:.3f}"


def _heads(heads: Any) -> str:
    return "" if heads is None else heads if isinstance(heads, str) else ", ".join(map(str, heads))


def _relative(path: Path, place: Path) -> str:
    return Path(os.path.relpath(path.resolve(), place.resolve())).as_posix()


def profiles(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """The table ``profiles`` of ``Comparison``; a run without a column has nothing there."""
    tables = []
    for run in runs:
        depth, summary = run.manifest["model"]["layers"], run.summary
        named = pd.DataFrame({"run": run.name, "series": series_of(summary)}, index=summary.index)
        where = {"depth": depth, "relative_depth": relative_depth(summary["layer"], depth)}
        tables.append(pd.concat([named, summary.assign(**where)], axis=1))
    return pd.concat(tables, ignore_index=True)
