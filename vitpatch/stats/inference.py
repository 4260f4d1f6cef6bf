"""What may be claimed of effects: family-wise tests, the set of peaks, their size, and how many clusters it takes.

Pure: numpy, the seed an argument. Columns are patches or layers; the unit is the cluster throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from vitpatch.errors import VitPatchError
from vitpatch.stats.bootstrap import LEVEL, ROUNDING, Array, Resamples, cluster_sums, row_blocks, simultaneous_interval
from vitpatch.types import Direction, Metric

FLIPS = 9999
SPLITS = 500
INERT = 1e-6
"""An effect closer to 0, in log odds on average over a cluster's images, is what rounding leaves: it counts as 0."""
TIE = 1e-6
"""Means closer than this are of one size where the furthest is looked for."""
TIED = 1e-12
"""Statistics on the scale of ``_studentised`` closer than this are equal: sums in another order round differently."""


def check_signed(metric: Metric, direction: Direction) -> None:
    """Raises ``VitPatchError`` where effects have no sign to flip: KL from the clean run, put into the clean run."""
    if metric is Metric.KL and direction is Direction.NOISE:
        raise VitPatchError(
            "metric=kl, direction=noise: effects are ≥ 0 by construction, so their mean is never 0; test log_odds"
        )


def sign_flip_p(values: Array, clusters: NDArray[np.integer], seed: int, flips: int = FLIPS) -> Array:
    """Family-wise p that the mean over images is 0, two-sided: (images, columns), (images,) → (columns,).

    The null is that what a cluster adds to the mean is as likely positive as negative, all columns of a cluster
    together: signs of cluster *sums* S are flipped, so that the statistic Σ s S is the mean over images of the flipped
    data times their number, whatever the sizes of clusters. It is studentised by √Σ S², the null's own standard error,
    which flips leave as it is (the score form of the wild cluster bootstrap with Rademacher weights: Kline & Santos
    2012; Cameron, Gelbach & Miller 2008). Max-T (Westfall & Young 1993): p = (1 + #{max |u*| ≥ |u|}) / (flips + 1), u
    as in ``_studentised``, the maximum over the columns given. One cluster: 1. All values must be known, and in
    ``log_odds``: what is neutral there has a mean in ``prob`` that is not 0.
    """
    assert not np.isnan(values).any(), "an effect is NaN: only known ones can be tested"
    studentised = _studentised(values, clusters)
    observed = np.abs(studentised.sum(0)) - TIED
    rng, beyond = np.random.default_rng(seed), np.zeros(values.shape[1], dtype=int)
    for rows in row_blocks(flips, max(studentised.shape)):
        signs = np.where(rng.random((rows.stop - rows.start, len(studentised))) < 0.5, -1.0, 1.0)
        largest = np.abs(signs @ studentised).max(1)
        beyond += len(largest) - np.searchsorted(np.sort(largest), observed)
    return (1 + beyond) / (flips + 1)


def _studentised(values: Array, clusters: NDArray[np.integer]) -> Array:
    """Cluster sums S over √(clusters · Σ S²): (clusters, columns); their sum over clusters is the statistic u.

    u = Σ S / √(n Σ S²) is in [−1, 1] and on one scale for all columns. 0 where all sums are; a sum that rounding leaves
    of images that cancel, or of a patch that changes nothing, is 0.
    """
    sums, counts = cluster_sums(values, clusters)
    rounding = np.maximum(INERT, ROUNDING * np.abs(values).max(0))
    sums[np.abs(sums) <= rounding * counts[:, None]] = 0
    size = np.sqrt(len(sums) * (sums**2).sum(0))
    return np.divide(sums, size, out=np.zeros_like(sums), where=size > 0)


def peak(effects: Array, total: float) -> int | None:
    """The index whose mean goes furthest in the direction of the total effect, the lowest on a tie.

    ``effects`` (columns,) are means in order of layer; ``None`` where the mean total effect is 0 and has no direction.
    """
    return None if total == 0 else int(furthest(effects, np.sign(total)))


def furthest(means: Array, sign: float) -> NDArray[np.intp]:
    """The column whose mean goes furthest towards ``sign``, the lowest within ``TIE``: (…, columns) → (…)."""
    means = np.sign(sign) * means
    assert not np.isnan(means).any(), "a mean is NaN: the furthest is of known ones"
    return np.argmax(means >= means.max(-1, keepdims=True) - TIE, axis=-1)


@dataclass(frozen=True)
class Peaks:
    """Where the peak may be: ``best`` the observed one, ``members`` the columns that are not shown to be below it.

    ``stability`` (columns,) is how often each is the peak of a resample, by the same rule; NaN of one cluster.
    """

    best: int
    members: tuple[int, ...]
    stability: Array


def peak_set(effects: Array, sign: float, clusters: NDArray[np.integer], seed: int) -> Peaks:
    """The layers whose simultaneous interval of (best − this) holds 0, by max-T over the layers.

    ``effects`` (images, layers) in order of layer; the best goes furthest towards ``sign``, as in ``peak``. Of
    one cluster all layers are in the set: none is shown to be below.
    """
    assert sign, "the total effect is 0: there is no direction and no peak"
    spread = Resamples(clusters, seed).spread(effects)
    best = int(furthest(spread.mean, sign))
    if spread.resampled is None:
        return Peaks(best, tuple(range(len(spread.mean))), np.full(len(spread.mean), np.nan))
    means, resampled = np.sign(sign) * spread.mean, np.sign(sign) * spread.resampled
    low, _ = simultaneous_interval(means[best] - means, resampled[:, best, None] - resampled)
    often = np.bincount(furthest(resampled, 1), minlength=len(means)) / len(resampled)
    return Peaks(best, tuple(np.flatnonzero(low <= TIE).tolist()), often)


def peak_size(effects: Array, sign: float, clusters: NDArray[np.integer], seed: int, splits: int = SPLITS) -> float:
    """The mean effect at the peak, chosen on one half of the clusters and measured on the other, both ways.

    ``effects`` (images, layers) → the average over random splits; NaN of one cluster. The largest of noisy means is
    biased up, this is the expected effect of a layer so chosen: never above the true peak's on average, and below it
    as far as half of the clusters choose another.
    """
    assert sign, "the total effect is 0: there is no direction and no peak"
    sums, counts = cluster_sums(effects, clusters)
    if (n := len(counts)) < 2:
        return np.nan
    rng, sizes = np.random.default_rng(seed), []
    for rows in row_blocks(splits, max(sums.shape)):
        halves = rng.permuted(np.tile(np.arange(n) < n // 2, (rows.stop - rows.start, 1)), axis=1)
        one, other = ((half @ sums) / (half @ counts)[:, None] for half in (halves.astype(float), 1.0 - halves))
        sizes += [_pick(other, furthest(one, sign)), _pick(one, furthest(other, sign))]
    return float(np.concatenate(sizes).mean())


def _pick(means: Array, columns: NDArray[np.intp]) -> Array:
    """The value of each row in its own column: (rows, columns), (rows,) → (rows,)."""
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
