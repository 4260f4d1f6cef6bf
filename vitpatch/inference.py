"""What may be claimed of effects: family-wise tests, the set of peaks, their size, and how many clusters it takes.

Pure: numpy, the seed an argument. Columns are patches or layers; the unit is the cluster throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitpatch.resamples import ROUNDING, Array, cluster_sums, in_steps
from vitpatch.spec import Direction, Metric, VitPatchError

FLIPS = 9999
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
    turn all clusters the same way. One cluster: 1. All values must be known.
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
