"""How alike the layer profiles of runs are: rank correlation, also of models of different depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from vitpatch.compare.comparison import FinishedRun
from vitpatch.compare.load import known, peak_row
from vitpatch.compare.overview import relative_depth
from vitpatch.stats.bootstrap import Array
from vitpatch.types import Metric

LEAST_LAYERS = 3
"""Of fewer layers ranks say nothing."""
SERIES = ("site", "tokens", "head", "window")


def profile_of(run: FinishedRun) -> tuple[Array, Array]:
    """Relative depths and mean effects (layers,) of a run's series that has its peak (its first, where there is none).

    Effects are towards the total effect (of a donor that is no run, towards damage), so that runs of both directions
    and all metrics have their peak at the top.
    """
    summary, peak = run.summary, peak_row(run)
    like = summary.iloc[0] if peak is None else peak
    rows = summary[np.logical_and.reduce([summary[name] == like[name] for name in SERIES])].sort_values("layer")
    depths = relative_depth(rows["layer"].to_numpy(float), run.manifest["model"]["layers"])
    return depths, rows["effect"].to_numpy(float) * _towards(run)


def _towards(run: FinishedRun) -> float:
    total = known(run.manifest["total_effect"]["mean"])
    if np.isnan(total):
        return 1.0 if run.manifest["config"]["metric"] == Metric.KL else -1.0
    return 1.0 if total >= 0 else -1.0


def rank_correlation(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Spearman's correlation of profiles, runs × runs.

    NaN where a profile is constant, or there are fewer than ``LEAST_LAYERS`` layers.
    """
    profiles, values = [profile_of(run) for run in runs], np.full((len(runs), len(runs)), np.nan)
    for i, profile in enumerate(profiles):
        values[i, i] = spearman(profile, profile)
    for i, j in combinations(range(len(runs)), 2):
        values[i, j] = values[j, i] = spearman(profiles[i], profiles[j])
    names = [run.name for run in runs]
    return pd.DataFrame(values, index=pd.Index(names, name="run"), columns=names)


def spearman(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
    """Spearman's correlation of two profiles, (depths, effects) each, at the depths of the one with fewer layers.

    The other is interpolated between its layers, where it has layers on both sides.
    """
    few, many = (a, b) if len(a[0]) <= len(b[0]) else (b, a)
    inside = (few[0] >= many[0][0]) & (few[0] <= many[0][-1])
    if inside.sum() < LEAST_LAYERS:
        return np.nan
    ours, theirs = few[1][inside], np.interp(few[0][inside], *many)
    ranks = [pd.Series(values).rank().to_numpy() for values in (ours, theirs)]
    if any(np.ptp(of) == 0 for of in ranks):
        return np.nan
    return float(np.corrcoef(*ranks)[0, 1])
