"""What may be claimed of effects: family-wise tests, the set of peaks, their size, and how many clusters it takes.

Pure: numpy, the seed an argument. Columns are patches or layers; the unit is the cluster throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from vitpatch.resamples import LEVEL, ROUNDING, Array, Resamples, cluster_sums, in_steps, simultaneous_interval
from vitpatch.spec import Direction, Metric, VitPatchError
from vitpatch.stats import TIE, furthest

FLIPS = 9999
SPLITS = 500
TIED = 1e-12
"""Statistics on the scale of ``_shares`` closer than this are equal: sums in another order round differently."""


def check_signed(metric: Metric, direction: Direction) -> None:
    """Raises ``VitPatchError`` where effects have no sign to flip: KL from the clean run, put into the clean run."""
    if metric is Metric.KL and direction is Direction.NOISE:
        raise VitPatchError(
            "metric=kl, direction=noise: effects are ≥ 0 by construction, so their mean is never 0; test log_odds"
        )


def cluster_t(values: Array, clusters: NDArray[np.integer]) -> Array:
    """The t statistic of cluster means against 0: (images, columns), (images,) → (columns,).

    Every cluster counts once, whatever its number of images; the mean is therefore not that of ``estimates`` where
    clusters differ in size. Without variance t is 0 where the mean is 0, else infinite; NaN of one cluster.
    """
    share, n = _shares(_scaled(values, clusters)), len(np.unique(clusters))
    if n < 2:
        return np.full(values.shape[1], np.nan)
    beside = np.where(1 - np.abs(share) < TIED, 0, 1 - share**2)
    with np.errstate(divide="ignore"):
        return np.sqrt(n - 1) * share / np.sqrt(beside)


def sign_flip_p(values: Array, clusters: NDArray[np.integer], seed: int, flips: int = FLIPS) -> Array:
    """Family-wise p by sign flips of clusters, two-sided: (images, columns), (images,) → (columns,).

    The null is that cluster means are as likely positive as negative, all columns of a cluster together. Max-T
    (Westfall & Young 1993): p = (1 + #{max |t*| ≥ |t|}) / (flips + 1), t as in ``cluster_t``, the maximum over the
    columns given. Without variance p is 1 where the mean is 0; else |t| is infinite and equalled only by flips that
    turn all clusters the same way. One cluster: 1. All values must be known, and in ``log_odds``: what is neutral
    there has a mean in ``prob`` that is not 0.
    """
    assert not np.isnan(values).any(), "an effect is NaN: only known ones can be tested"
    scaled = _scaled(values, clusters)
    observed = np.abs(_shares(scaled)) - TIED
    rng, beyond = np.random.default_rng(seed), np.zeros(values.shape[1], dtype=int)
    for rows in in_steps(flips, max(scaled.shape)):
        signs = np.where(rng.random((rows.stop - rows.start, len(scaled))) < 0.5, -1.0, 1.0)
        largest = np.abs(signs @ scaled).max(1)
        beyond += len(largest) - np.searchsorted(np.sort(largest), observed)
    return (1 + beyond) / (flips + 1)


def _scaled(values: Array, clusters: NDArray[np.integer]) -> Array:
    """Cluster means over √(clusters · their sum of squares): (clusters, columns); 0 where all means are 0."""
    sums, counts = cluster_sums(values, clusters)
    means = sums / counts[:, None]
    means[np.abs(means) <= ROUNDING * np.abs(values).max(0)] = 0  # what is left of images that cancel
    size = np.sqrt(len(means) * (means**2).sum(0))
    return np.divide(means, size, out=np.zeros_like(means), where=size > 0)


def _shares(scaled: Array) -> Array:
    """u = Σ m / √(n Σ m²) in [−1, 1], a monotone function of t = √(n − 1) · u / √(1 − u²), the same for all columns.

    Flips leave Σ m² as it is, so u* is one product of signs and matrix, finite where t* is not.
    """
    return scaled.sum(0)


@dataclass(frozen=True)
class Peaks:
    """Where the peak may be: ``best`` the observed one, ``members`` the columns that are not shown to be below it.

    ``stability`` (columns,) is how often each is the peak of a resample, by the same rule; NaN of one cluster.
    """

    best: int
    members: tuple[int, ...]
    stability: Array


def peak_set(effects: Array, towards: float, clusters: NDArray[np.integer], seed: int) -> Peaks:
    """The layers whose simultaneous interval of (best − this) holds 0, by max-T over the layers.

    ``effects`` (images, layers) in order of layer; the best goes furthest ``towards`` a sign, as in ``stats.peak``. Of
    one cluster all layers are in the set: none is shown to be below.
    """
    assert towards, "the total effect is 0: there is no direction and no peak"
    spread = Resamples(clusters, seed).spread(effects)
    best = int(furthest(spread.mean, towards))
    if spread.resampled is None:
        return Peaks(best, tuple(range(len(spread.mean))), np.full(len(spread.mean), np.nan))
    means, resampled = np.sign(towards) * spread.mean, np.sign(towards) * spread.resampled
    low, _ = simultaneous_interval(means[best] - means, resampled[:, best, None] - resampled)
    often = np.bincount(furthest(resampled, 1), minlength=len(means)) / len(resampled)
    return Peaks(best, tuple(np.flatnonzero(low <= TIE).tolist()), often)


def peak_size(effects: Array, towards: float, clusters: NDArray[np.integer], seed: int, splits: int = SPLITS) -> float:
    """The mean effect at the peak, chosen on one half of the clusters and measured on the other, both ways.

    ``effects`` (images, layers) → the average over random splits; NaN of one cluster. The largest of noisy means is
    biased up, this is the expected effect of a layer so chosen: never above the true peak's on average, and below it
    as far as half of the clusters choose another.
    """
    assert towards, "the total effect is 0: there is no direction and no peak"
    sums, counts = cluster_sums(effects, clusters)
    if (n := len(counts)) < 2:
        return np.nan
    rng, sizes = np.random.default_rng(seed), []
    for rows in in_steps(splits, max(sums.shape)):
        halves = rng.permuted(np.tile(np.arange(n) < n // 2, (rows.stop - rows.start, 1)), axis=1)
        one, other = ((half @ sums) / (half @ counts)[:, None] for half in (halves.astype(float), 1.0 - halves))
        sizes += [_at(other, furthest(one, towards)), _at(one, furthest(other, towards))]
    return float(np.concatenate(sizes).mean())


def _at(means: Array, columns: NDArray[np.intp]) -> Array:
    """One column of each row."""
    return np.take_along_axis(means, columns[:, None], axis=1)[:, 0]


def clusters_needed(values: Array, clusters: NDArray[np.integer], width: float) -> int:
    """How many clusters such as these make an interval of ``LEVEL`` about ``width`` wide, from end to end.

    ``values`` (images,). Normal approximation, 2 · 1.96 · se, with the linearised se of a ratio of cluster sums
    (Cochran 1977, section 2.11), which falls with the root of the number of clusters. At least 2.
    """
    if not width > 0:
        raise VitPatchError(f"width {width}: the interval's full width is above 0, in units of the effect")
    sums, counts = cluster_sums(values[:, None], clusters)
    if (n := len(counts)) < 2:
        raise VitPatchError("one cluster says nothing of how clusters differ; measure at least 2")
    apart = sums[:, 0] - values.mean(dtype=float) * counts
    per_cluster = np.sqrt((apart**2).sum() * n / (n - 1)) / counts.mean() / np.sqrt(n)
    return max(2, ceil((2 * NormalDist().inv_cdf((1 + LEVEL) / 2) * per_cluster / width) ** 2))
