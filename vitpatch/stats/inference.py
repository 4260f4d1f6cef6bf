"""What may be claimed of effects: means and intervals by resampling, family-wise tests, and where the peak may be.

Pure: numpy, the seed an argument. Columns are patches or layers. The unit is the cluster throughout: images of one
cluster (an object's views, an emoji's skin tones) are not independent, so whole clusters are resampled (Davison &
Hinkley 1997, section 3.8, the ratio of cluster sums).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from vitpatch.errors import VitPatchError
from vitpatch.types import Direction, Estimate, Interval, Metric

RESAMPLES = 2000
FLIPS = 9999
LEVEL = 0.95
TAIL = (1 - LEVEL) / 2

ROUNDING = 1e-12
"""What differs by less than this share of its size differs by rounding."""
INERT = 1e-6
"""An effect closer to 0, in log odds on average over a cluster's images, is what rounding leaves: it counts as 0."""
TIED = 1e-12
"""Statistics on the scale of ``_studentised`` closer than this are equal: sums in another order round differently."""
WEIGHTS_AT_ONCE = 4_000_000
"""Bounds the resampling weights in memory, at 32 MB."""

Array = NDArray[np.floating]


def cluster_sums(values: Array, clusters: NDArray[np.integer]) -> tuple[Array, Array]:
    """(images, columns), (images,) → sums (clusters, columns) and image counts (clusters,), float64."""
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.zeros((index.max() + 1, values.shape[1]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index).astype(float)


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of ``rows`` so that a block of ``width`` columns keeps to ``WEIGHTS_AT_ONCE``."""
    step = max(1, WEIGHTS_AT_ONCE // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True, eq=False)
class Resamples:
    """The resamples that all numbers of a run share, so that ratios and differences can be taken row by row.

    ``clusters`` (images,) numbers the cluster of each image; ``number`` resamples of as many clusters as there are,
    with replacement, are a function of ``seed`` and the number of clusters.
    """

    clusters: NDArray[np.integer]
    seed: int
    number: int = RESAMPLES

    def select(self, images: NDArray[np.bool_]) -> Resamples:
        """Resamples of the clusters that some of the images, (images,) bool, are in."""
        return self if images.all() else Resamples(self.clusters[images], self.seed, self.number)

    @cached_property
    def index(self) -> NDArray[np.intp]:
        """The cluster of each image, counted from 0: (images,)."""
        return np.unique(self.clusters, return_inverse=True)[1]

    @cached_property
    def n(self) -> int:
        """How many clusters there are."""
        return int(self.index.max()) + 1

    def sums(self, *values: Array) -> tuple[Array, Array]:
        """Sums over clusters of columns side by side, (clusters, columns), and image counts (clusters,)."""
        parts = [cluster_sums(part, self.index) for part in values]
        return np.hstack([sums for sums, _ in parts]), parts[0][1]

    def means(self, *values: Array) -> Array:
        """Means over images in every resample, of columns side by side: (images, columns) … → (resamples, columns)."""
        sums, counts = self.sums(*values)
        means = np.empty((self.number, sums.shape[1]))
        for rows, weights in self.weights():
            means[rows] = (weights @ sums) / (weights @ counts)[:, None]
        return means

    def weights(self, width: int = 1) -> Iterator[tuple[slice, Array]]:
        """How often each cluster is in a resample, (resamples, clusters) in pieces; ``width`` a piece is widened to."""
        if self._kept is None:
            yield from self._drawn(width)
            return
        for rows in row_blocks(self.number, max(self.n, width)):
            yield rows, self._kept[rows].astype(float)

    @cached_property
    def _kept(self) -> NDArray[np.uint8] | None:
        """All weights, drawn once, where they fit in a byte each (256 draws of one cluster of n do not occur)."""
        if self.number * self.n > 8 * WEIGHTS_AT_ONCE:
            return None
        kept = np.empty((self.number, self.n), dtype=np.uint8)
        for rows, weights in self._drawn():
            kept[rows] = weights
        return kept

    def _drawn(self, width: int = 1) -> Iterator[tuple[slice, Array]]:
        rng, even = np.random.default_rng(self.seed), np.full(self.n, 1 / self.n)
        for rows in row_blocks(self.number, max(self.n, width)):
            yield rows, rng.multinomial(self.n, even, size=rows.stop - rows.start).astype(float)

    def spread(self, *values: Array, method: str = "percentile") -> Spread:
        """Means of columns side by side, (images, columns) …, with their spread."""
        if method not in list(Interval):
            raise VitPatchError(f"method={method}: unknown; use {' or '.join(Interval)}")
        mean = np.concatenate([part.mean(0, dtype=float) for part in values])
        if self.n < 2:
            return Spread(mean)
        return Spread(mean, self.means(*values), left_out(*self.sums(*values)) if method == "bca" else None)

    def macro_spread(self, values: Array, labels: NDArray[np.integer], method: str = "percentile") -> Spread:
        """Means over classes of class means, with their spread: (images, columns), (images,) → (columns,) each.

        Clusters are resampled as for ``spread``, not within classes; a class without images in a resample is left out
        of that resample.
        """
        classes = ByClass(values, labels, self.index)
        mean = classes.macro_means(np.ones((1, self.n)))[0]
        if self.n < 2:
            return Spread(mean)
        resampled = np.vstack([classes.macro_means(weights) for _, weights in self.weights(classes.cells)])
        return Spread(mean, resampled, classes.macro_left_out() if method == "bca" else None)


class ByClass:
    """Sums and counts of the images of each class and cluster that occur together, a cell, in order of class.

    ``values`` (images, columns), ``labels`` (images,), ``index`` (images,) the cluster counted from 0.
    """

    def __init__(self, values: Array, labels: NDArray[np.integer], index: NDArray[np.integer]):
        class_index, n = np.unique(labels, return_inverse=True)[1], int(index.max()) + 1
        cells, cell_index = np.unique(class_index * n + index, return_inverse=True)
        self.cells = len(cells)
        self.sums, self.counts = cluster_sums(values, cell_index)
        self.class_index, self.cluster_index = np.divmod(cells, n)
        self.starts = np.flatnonzero(np.diff(self.class_index, prepend=-1))

    def macro_means(self, weights: Array) -> Array:
        """Means over classes of class means, clusters counted ``weights`` times: (…, clusters) → (…, columns)."""
        weights = weights[:, self.cluster_index]
        images = np.add.reduceat(weights * self.counts, self.starts, axis=1)  # (…, classes)
        there = images > 0
        share = np.divide(1, images, out=np.zeros_like(images), where=there) / there.sum(1, keepdims=True)
        return (weights * share[:, self.class_index]) @ self.sums

    def macro_left_out(self) -> Array:
        """The same without each cluster in turn: (clusters, columns)."""
        sums = np.add.reduceat(self.sums, self.starts)  # (classes, columns)
        counts = np.add.reduceat(self.counts, self.starts)
        means, rest = sums / counts[:, None], (counts[self.class_index] - self.counts)[:, None]  # of a cell's class
        without = np.divide(sums[self.class_index] - self.sums, rest, out=np.zeros_like(self.sums), where=rest > 0)
        changes, _ = cluster_sums(without - means[self.class_index], self.cluster_index)
        classes = len(means) - np.bincount(self.cluster_index, weights=rest[:, 0] == 0)
        return (means.sum(0) + changes) / classes[:, None]


def left_out(sums: Array, counts: Array) -> Array:
    """Means over images without each cluster in turn, the jackknife over clusters: (clusters, columns)."""
    return (sums.sum(0) - sums) / (counts.sum() - counts)[:, None]


@dataclass(frozen=True)
class Spread:
    """Means (columns,), the same in resamples (resamples, columns), and without each cluster (clusters, columns).

    ``resampled`` is ``None`` where there is one cluster: nothing is known of its spread, all is NaN. ``left_out`` is
    there where intervals are BCa, ``None`` where they are percentiles.
    """

    mean: Array
    resampled: Array | None = None
    left_out: Array | None = None

    def __getitem__(self, columns: slice) -> Spread:
        """Some of the columns."""
        parts = (self.resampled, self.left_out)
        return Spread(self.mean[columns], *(None if part is None else part[:, columns] for part in parts))

    def ratio_to(self, other: Spread) -> Spread:
        """Ratios to the one column of another, resample by resample."""
        parts = ((self.resampled, other.resampled), (self.left_out, other.left_out))
        return Spread(self.mean / other.mean, *(None if a is None else a / b for a, b in parts))

    @property
    def se(self) -> Array:
        """Standard errors (columns,): the standard deviation over resamples."""
        return np.full_like(self.mean, np.nan) if self.resampled is None else self.resampled.std(0, ddof=1)

    @property
    def interval(self) -> tuple[Array, Array]:
        """The ends of each column's interval of ``LEVEL``, the mean inside (equal values differ by rounding alone)."""
        if self.resampled is None:
            return np.full_like(self.mean, np.nan), np.full_like(self.mean, np.nan)
        if self.left_out is None:
            low, high = np.quantile(self.resampled, [TAIL, 1 - TAIL], axis=0)
        else:
            low, high = bca_interval(self.mean, self.resampled, self.left_out)
        return np.minimum(low, self.mean), np.maximum(high, self.mean)

    def columns(self, name: str) -> dict[str, Array]:
        """Columns of a table, ``name``, ``name_low`` and ``name_high``; all NaN where a mean is not known."""
        known = self if not np.isnan(self.mean).any() else unknown_spread(len(self.mean))
        low, high = known.interval
        return {name: known.mean, f"{name}_low": low, f"{name}_high": high}

    @property
    def simultaneous(self) -> tuple[Array, Array]:
        """The ends of the intervals that hold all columns' means at once at ``LEVEL``."""
        if self.resampled is None:
            return np.full_like(self.mean, np.nan), np.full_like(self.mean, np.nan)
        return simultaneous_interval(self.mean, self.resampled)

    @property
    def estimates(self) -> list[Estimate]:
        """An ``Estimate`` a column."""
        return [Estimate(*map(float, row)) for row in zip(self.mean, self.se, *self.interval, strict=True)]


def unknown_spread(columns: int) -> Spread:
    """The spread of columns whose means are not known: all is NaN."""
    return Spread(np.full(columns, np.nan))


def bca_interval(mean: Array, resampled: Array, left_out: Array) -> tuple[Array, Array]:
    """The bias-corrected and accelerated interval of ``LEVEL`` (Efron 1987), by column.

    ``mean`` (columns,), ``resampled`` (resamples, columns), ``left_out`` (clusters, columns). The acceleration is from
    the jackknife over clusters; of resamples that equal the mean half count as below it. Without variance both ends
    are the mean; where all resamples are on one side of the mean the bias correction is infinite and the ends NaN.
    """
    rounding = ROUNDING * np.abs(resampled).max(0)
    below = ((resampled < mean - rounding).mean(0) + (resampled <= mean + rounding).mean(0)) / 2
    ends = np.full((2, len(mean)), np.nan)
    for column, share in enumerate(below):
        if is_flat(resampled[:, column]):
            ends[:, column] = mean[column]
        elif 0 < share < 1:
            tails = _bca_tails(share, left_out[:, column])
            ends[:, column] = np.quantile(resampled[:, column], tails)
    return ends[0], ends[1]


def _bca_tails(below: float, left_out: Array) -> list[float]:
    """Which quantiles of the resampled means are the ends.

    The acceleration is at most 1/6, so that no denominator is 0 of fewer than 18 000 resamples.
    """
    normal, apart = NormalDist(), left_out.mean() - left_out
    bias, acceleration = normal.inv_cdf(below), (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    shifted = (bias + z for z in (normal.inv_cdf((1 - LEVEL) / 2), normal.inv_cdf((1 + LEVEL) / 2)))
    return [normal.cdf(bias + z / (1 - acceleration * z)) for z in shifted]


def is_flat(resampled: Array) -> NDArray[np.bool_]:
    """Whether a column does not vary beyond rounding: (resamples, …) → (…)."""
    return np.ptp(resampled, axis=0) <= ROUNDING * np.abs(resampled).max(0)


def simultaneous_interval(mean: Array, resampled: Array) -> tuple[Array, Array]:
    """Intervals that hold all columns' true means at once at ``LEVEL``: (columns,), (resamples, columns) → both ends.

    Max-T (Westfall & Young 1993): mean ± q · se, se the column's standard deviation over resamples and q the quantile
    of the largest |resampled − mean| / se of a resample. Columns without variance have zero width.
    """
    varies = ~is_flat(resampled)
    if not varies.any():
        return mean.copy(), mean.copy()
    se = np.where(varies, resampled.std(0, ddof=1), 0)
    furthest = (np.abs(resampled - mean)[:, varies] / se[varies]).max(1)
    reach = np.quantile(furthest, LEVEL) * se
    return mean - reach, mean + reach


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
