"""Per-image effects → means and intervals. Pure: numpy and pandas, the seed an argument.

The unit is the cluster: images of one cluster (an object's views, an emoji's skin tones) are not independent, so
whole clusters are resampled (Davison & Hinkley 1997, section 3.8, the ratio of cluster sums).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vitpatch.spec import Estimate

RESAMPLES = 2000
LEVEL = 0.95
TIE = 1e-6
"""Means closer than this are one size where the furthest is looked for."""
MIN_STANDARD_ERRORS = 3.0
"""A mean total effect within this many standard errors of 0 is no denominator."""

WEIGHTS_AT_ONCE = 4_000_000
"""Bounds the resampling weights in memory, at 32 MB."""

Array = NDArray[np.floating]


def cluster_sums(values: Array, clusters: NDArray[np.integer]) -> tuple[Array, Array]:
    """(images, columns), (images,) → sums (clusters, columns) and image counts (clusters,), float64."""
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.zeros((index.max() + 1, values.shape[1]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index).astype(float)


def resampled_means(values: Array, clusters: NDArray[np.integer], seed: int, resamples: int = RESAMPLES) -> Array:
    """Means over images in resamples of whole clusters: (images, columns) → (resamples, columns).

    All columns share the resamples, so that ratios and differences of columns can be taken row by row.
    """
    sums, counts = cluster_sums(values, clusters)
    rng, n = np.random.default_rng(seed), len(counts)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, WEIGHTS_AT_ONCE // n)  # resamples at a time
    for start in range(0, resamples, step):
        rows = slice(start, min(start + step, resamples))
        weights = rng.multinomial(n, np.full(n, 1 / n), size=rows.stop - rows.start).astype(float)
        means[rows] = (weights @ sums) / (weights @ counts)[:, None]
    return means


def interval(means: Array) -> tuple[Array, Array]:
    """The percentile interval of ``LEVEL`` over the first axis."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high


def estimates(values: Array, clusters: NDArray[np.integer], seed: int) -> list[Estimate]:
    """An ``Estimate`` for each column of (images, columns)."""
    mean = values.mean(0, dtype=float)
    if len(np.unique(clusters)) < 2:
        return [Estimate(float(m), np.nan, np.nan, np.nan) for m in mean]
    means = resampled_means(values, clusters, seed)
    low, high = interval(means)
    low, high = np.minimum(low, mean), np.maximum(high, mean)  # equal values differ by rounding alone
    return [Estimate(*map(float, row)) for row in zip(mean, means.std(0, ddof=1), low, high, strict=True)]


def recovered(effects: Array, total: Array, clusters: NDArray[np.integer], seed: int) -> Array | None:
    """Mean effect / mean total effect with its interval: (images, columns), (images,) → (3, columns).

    Both means are recomputed on each resample. ``None`` where the mean total effect is within
    ``MIN_STANDARD_ERRORS`` standard errors of 0, or has none.
    """
    (estimate,) = estimates(total[:, None], clusters, seed)
    if not abs(estimate.mean) > MIN_STANDARD_ERRORS * estimate.se:
        return None
    means = resampled_means(np.column_stack([effects, total]), clusters, seed)
    ratio = effects.mean(0, dtype=float) / total.mean(dtype=float)
    low, high = interval(means[:, :-1] / means[:, -1:])
    return np.stack([ratio, np.minimum(low, ratio), np.maximum(high, ratio)])


def peak(effects: Array, total: float) -> int | None:
    """The index whose mean goes furthest in the direction of the total effect, the lowest on a tie.

    ``effects`` (columns,) are means in order of layer; ``None`` where the mean total effect is 0 and has no direction.
    """
    if total == 0:
        return None
    towards = np.sign(total) * effects
    return int(np.flatnonzero(towards >= towards.max() - TIE)[0])


@dataclass(frozen=True)
class Measured:
    """What was measured of each image and patch, (images, patches) each.

    ``effects`` of the headline metric; ``correct`` whether the patched run's prediction is the label; ``log_odds`` the
    effect on the log odds and ``direct`` its direct share; ``delta_norm`` how far donor and recipient differ.
    """

    effects: Array
    correct: NDArray[np.bool_]
    log_odds: Array
    direct: Array
    delta_norm: Array

    def of(self, images: NDArray) -> Measured:
        """Some of the images."""
        parts = (self.effects, self.correct, self.log_odds, self.direct, self.delta_norm)
        return Measured(*(values[images] for values in parts))


def summarize(patches: pd.DataFrame, measured: Measured, examples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The rows of ``summary.csv``: one a patch, means over the images given.

    ``patches`` has a row a patch (site, layer, head, …); ``examples`` has a row an image with ``cluster`` and
    ``total_effect``. ``delta_norm`` is the mean over the images where it is defined.
    """
    effects, correct = measured.effects, measured.correct
    clusters = examples["cluster"].to_numpy()
    rows = estimates(effects, clusters, seed)
    ratios = recovered(effects, examples["total_effect"].to_numpy(float), clusters, seed)
    low_mid_high = np.full((3, len(rows)), np.nan) if ratios is None else ratios
    return patches.assign(
        n=len(examples),
        n_clusters=len(np.unique(clusters)),
        effect=[r.mean for r in rows],
        effect_se=[r.se for r in rows],
        effect_low=[r.low for r in rows],
        effect_high=[r.high for r in rows],
        recovered=low_mid_high[0],
        recovered_low=low_mid_high[1],
        recovered_high=low_mid_high[2],
        accuracy=correct.mean(0),
        **_with_interval("log_odds_effect", measured.log_odds, clusters, seed),
        **_with_interval("direct_log_odds", measured.direct, clusters, seed),
        delta_norm=_mean_of_known(measured.delta_norm),
    )


def _with_interval(name: str, values: Array, clusters: NDArray[np.integer], seed: int) -> dict[str, list[float]]:
    """Columns ``name``, ``name_low``, ``name_high``; empty where a value is not known."""
    if np.isnan(values).any():
        return {f"{name}{end}": [np.nan] * values.shape[1] for end in ("", "_low", "_high")}
    rows = estimates(values, clusters, seed)
    return {name: [r.mean for r in rows], f"{name}_low": [r.low for r in rows], f"{name}_high": [r.high for r in rows]}


def _mean_of_known(values: Array) -> Array:
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0, dtype=float) / known.sum(0)


def by_class(effects: Array, labels: NDArray[np.integer], clusters: NDArray[np.integer], seed: int) -> Iterator[tuple]:
    """For each label in order: (label, images, [Estimate of each column])."""
    for label in np.unique(labels):
        of_class = labels == label
        yield int(label), int(of_class.sum()), estimates(effects[of_class], clusters[of_class], seed)
