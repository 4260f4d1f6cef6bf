"""Two runs on the same images: paired differences of their effects. Pure: numpy, the seed an argument.

The unit is the cluster. Both runs are taken on one resample of clusters, so what they share cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vitpatch.stats.bootstrap import Array, Resamples, Spread
from vitpatch.stats.inference import sign_flip_p
from vitpatch.stats.summary import MIN_STANDARD_ERRORS


@dataclass(frozen=True)
class Apart:
    """What two runs say of each patch, and how far apart they are, (patches,) each: ``difference`` = a − b with its
    interval; ``p`` is family-wise over the patches, ``None`` where it is not tested."""

    value_a: Array
    value_b: Array
    difference: Array
    low: Array
    high: Array
    p: Array | None


def of_effects(a: Array, b: Array, clusters: NDArray[np.integer], seed: int, method: str = "percentile") -> Apart:
    """Mean differences of effects: (images, patches) twice, (images,) → (patches,).

    p by sign flips of clusters, of the null that the two runs could change places; it is of the metric that the effects
    are in, which under this null is as likely above 0 as below, whatever the metric.
    """
    apart = a - b
    spread = _resamples(clusters.tobytes(), seed).spread(apart, method=method)
    low, high = spread.interval
    return Apart(
        a.mean(0, dtype=float), b.mean(0, dtype=float), spread.mean, low, high, sign_flip_p(apart, clusters, seed)
    )


def of_recovered(
    a: Array,
    b: Array,
    totals: tuple[Array, Array],
    clusters: NDArray[np.integer],
    seed: int,
    method: str = "percentile",
) -> Apart | tuple[bool, bool]:
    """Differences of mean effect / mean total effect, both ratios on one resample of clusters.

    ``totals`` are the total effects of a and b, (images,) each. Where a mean total effect is within
    ``MIN_STANDARD_ERRORS`` standard errors of 0 nothing is subtracted: then which of the two are.
    """
    patches = a.shape[1]
    beside = np.column_stack(totals)
    spread = _resamples(clusters.tobytes(), seed).spread(a, b, beside, method=method)
    of_a, of_b, of_totals = spread[:patches], spread[patches : 2 * patches], spread[2 * patches :]
    unknown = ~(np.abs(of_totals.mean) > MIN_STANDARD_ERRORS * of_totals.se)
    if unknown.any():
        return bool(unknown[0]), bool(unknown[1])
    ratio_a, ratio_b = of_a.over(of_totals[:1]), of_b.over(of_totals[1:])
    low, high = (apart := _less(ratio_a, ratio_b)).interval
    return Apart(ratio_a.mean, ratio_b.mean, apart.mean, low, high, None)


def same_clusters(a: NDArray[np.integer], b: NDArray[np.integer]) -> bool:
    """Whether two numberings of the same images put them into the same clusters: (images,) each."""
    together = np.unique(np.column_stack([a, b]), axis=0)
    return len(together) == len(np.unique(a)) == len(np.unique(b))


def _less(a: Spread, b: Spread) -> Spread:
    """a − b, resample by resample."""
    parts = ((a.resampled, b.resampled), (a.left_out, b.left_out))
    return Spread(a.mean - b.mean, *(None if x is None else x - y for x, y in parts))


@lru_cache(maxsize=2)
def _resamples(clusters: bytes, seed: int) -> Resamples:
    """The resamples of clusters (int64, as bytes): the same for most pairs of a sweep, and drawn once."""
    return Resamples(np.frombuffer(clusters, dtype=np.int64), seed)
