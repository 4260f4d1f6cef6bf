"""Finished runs → the tables ``overview``, ``profiles`` and ``rank_correlation`` of a comparison."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitpatch.compare.load import number_or_nan
from vitpatch.compare.settings import format_setting, format_windows
from vitpatch.formatting import corruption_name, data_name, format_layers, model_name, strength_words, transfer_words
from vitpatch.plots.style import place_words
from vitpatch.runs.reading import FinishedRun, peak_row
from vitpatch.stats.inference import Array
from vitpatch.stats.result import series_names
from vitpatch.types import BaseRun, Direction, Metric

MIN_LAYERS = 3  # ranks of fewer layers are not correlated


def overview_table(runs: Sequence[FinishedRun], base: Path) -> pd.DataFrame:
    """The table ``overview`` of ``Comparison``; ``base`` is the folder that paths are relative to."""
    return pd.DataFrame([_overview_row(run, base) for run in runs])


def _overview_row(run: FinishedRun, base: Path) -> dict[str, Any]:
    manifest, config, identity = run.manifest, run.config, run.identity
    target, summary, total = identity["target"], run.summary, manifest["total_effect"]
    composed = run.folder.path / ".hydra" / "config.yaml"
    return {
        "run": run.name,
        "group": run.group,
        "title": manifest["title"],
        "model": model_name(config["model"]),
        "data": data_name(config["data"]),
        **_corruption_columns(run),
        "site": target["site"],
        "tokens": format_setting(target["tokens"]),
        "heads": format_setting(target["heads"]),
        "windows": format_windows(identity["window"]),
        "direction": identity["direction"],
        "donor": str(run.donor),
        "transfer": transfer_words(run.donor, identity["direction"]),
        "metric": identity["metric"],
        "include": identity["include"],
        "n": int(summary["n"].iloc[0]),
        "n_clusters": int(summary["n_clusters"].iloc[0]),
        **_base_run_columns(run),
        "total_effect": number_or_nan(total["mean"]),
        "total_effect_low": number_or_nan(total["low"]),
        "total_effect_high": number_or_nan(total["high"]),
        **_peak_columns(run),
        "depth": run.depth,
        "seconds": manifest["seconds"],
        "weights": manifest["model"]["weights"],
        "data_digest": identity["data"],
        "code": f"{manifest['versions']['vitpatch']}, numbers {identity['numbers_version']}",
        "finding": " ".join(run.finding),
        "notes": "; ".join(manifest["notes"]),
        "folder": _relative(run.folder.path, base),
        "config": _relative(composed, base) if composed.exists() else "",
        "wandb_url": (manifest.get("tracking") or {}).get("url") or "",
    }


def _corruption_columns(run: FinishedRun) -> dict[str, str]:
    """Corruption, strength and calibration in words; no corruption where the corrupted run plays no part."""
    if not run.view.shows_corruption(run.donor, Direction(run.identity["direction"])):
        return {"corruption": f"none: {run.donor} as donor", "strength": "", "calibrated": ""}
    corruption, calibrated = run.config["corruption"], ""
    if found := run.manifest.get("calibration"):
        damage = f"{found['damage']} {number_or_nan(found['drop']['drop']):.3f}"
        calibrated = f"{found['asked']}: {found['key']}={found['strength']:.4g}, {damage}"
    words = {"corruption": corruption_name(corruption), "strength": strength_words(corruption)}
    return words | {"calibrated": calibrated}


def _base_run_columns(run: FinishedRun) -> dict[str, float]:
    """Accuracy and probability of the label in both base runs, over the included images."""
    examples = run.examples
    examples = examples[examples["included"]]
    row = {f"accuracy_{base}": float((examples[f"pred_{base}"] == examples["label"]).mean()) for base in BaseRun}
    return row | {f"prob_{base}": float(examples[f"prob_{base}"].mean()) for base in BaseRun}


def _peak_columns(run: FinishedRun) -> dict[str, Any]:
    peak, manifest = peak_row(run), run.manifest
    numbers = [*(f"{name}{end}" for name in ("effect", "recovered") for end in ("", "_low", "_high")), "p"]
    row: dict[str, Any] = {"peak_layer": np.nan, "peak_place": "", "peak_relative_depth": np.nan}
    row |= {f"peak_{name}": np.nan if peak is None else float(peak[name]) for name in numbers}
    if peak is not None:
        layer, series = int(peak["layer"]), series_names(run.summary)[run.summary.index.get_loc(peak.name)]
        row["peak_layer"], row["peak_place"] = layer, place_words(layer, series)
        row["peak_relative_depth"] = relative_depth(layer, run.depth)
    layers = manifest.get("peak_set")
    row["peak_set"] = format_layers(layers) if layers else ""
    return row | {name: number_or_nan(manifest.get(name)) for name in ("peak_stability", "peak_effect_split_halves")}


def relative_depth(layer: Any, depth: int) -> Any:
    """The place of a layer in a model of ``depth`` blocks, in 0 … 1: the middle of its block."""
    return (layer + 0.5) / depth


def _relative(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()


def profiles_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """The table ``profiles`` of ``Comparison``; NaN in columns that a run does not have."""
    tables = []
    for run in runs:
        depth, summary = run.depth, run.summary
        names = pd.DataFrame({"run": run.name, "series": series_names(summary)}, index=summary.index)
        depths = {"depth": depth, "relative_depth": relative_depth(summary["layer"], depth)}
        tables.append(pd.concat([names, summary.assign(**depths)], axis=1))
    return pd.concat(tables, ignore_index=True)


def rank_correlation_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Spearman's correlation of profiles, runs × runs.

    Two profiles are compared at the relative depths of the one with fewer layers; the other is interpolated to them,
    where it has layers on both sides. NaN where a profile is constant, or fewer than ``MIN_LAYERS`` layers remain.
    """
    profiles, at_depths = [_peak_profile(run) for run in runs], {}
    for depths, _ in profiles:
        if tuple(depths) not in at_depths:
            effects = [np.interp(depths, *profile, left=np.nan, right=np.nan) for profile in profiles]
            table = pd.DataFrame(dict(enumerate(effects)))
            at_depths[tuple(depths)] = table.corr(method="spearman", min_periods=MIN_LAYERS).to_numpy()
    values = np.empty((len(runs), len(runs)))
    for i, j in combinations_with_replacement(range(len(runs)), 2):
        fewer = min(i, j, key=lambda run: len(profiles[run][0]))
        values[i, j] = values[j, i] = at_depths[tuple(profiles[fewer][0])][i, j]
    names = [run.name for run in runs]
    return pd.DataFrame(values, index=pd.Index(names, name="run"), columns=names)


def _peak_profile(run: FinishedRun) -> tuple[Array, Array]:
    """Relative depths and mean effects (layers,) of a run's series that has its peak (the first, if there is no peak).

    Effects count towards the total effect, so that runs of both directions and all metrics have their peak at the top;
    where there is no total effect (the donor is no run) they count towards damage.
    """
    summary, peak = run.summary, peak_row(run)
    like: Mapping[str, Any] = summary.iloc[0] if peak is None else peak
    in_series = [summary[name] == like[name] for name in ("site", "tokens", "head", "window")]
    rows = summary[np.logical_and.reduce(in_series)].sort_values("layer")
    depths = relative_depth(rows["layer"].to_numpy(float), run.depth)
    total = number_or_nan(run.manifest["total_effect"]["mean"])
    if np.isnan(total):
        total = 1.0 if run.config["metric"] == Metric.KL else -1.0
    return depths, rows["effect"].to_numpy(float) * (1.0 if total >= 0 else -1.0)
