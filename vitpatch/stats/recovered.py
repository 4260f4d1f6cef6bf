"""The share of the total effect that a patch recovers, mean effect / mean total effect, with its interval.

Pure: numpy. Both means are recomputed on each resample of clusters.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from vitpatch.stats.inference import TAIL, Array, Spread, unknown_spread
from vitpatch.types import Estimate

MOST_TIMES = 100
"""As many clusters as there are, so many times: of more it is not said that they would be enough."""


def is_denominator(total: Estimate) -> bool:
    """Whether shares of a total effect are given: its interval leaves 0 out, or it is exact (one cluster) and not 0."""
    return total.excludes_zero or (np.isnan(total.se) and abs(total.mean) > 0)


def clusters_to_exclude_zero(total: Estimate, clusters: int) -> int | None:
    """About how many clusters such as these bring 0 out of the interval of a mean total effect of this size.

    The interval narrows with the root of the number of clusters. ``None`` where it takes more than ``MOST_TIMES`` as
    many, so that the size of the mean is not known well enough to say, and where no interval is known.
    """
    if not (total.known and total.mean):
        return None
    reach = total.mean - total.low if total.mean > 0 else total.high - total.mean
    times = (reach / total.mean) ** 2
    return ceil(clusters * times) if times <= MOST_TIMES else None


def recovered(effects: Spread, total: Spread) -> dict[str, Array]:
    """The columns ``recovered``, ``recovered_low`` and ``recovered_high`` of mean effects over one total effect.

    All NaN where the total effect is no denominator; of one cluster the ratio without an interval. Where all resampled
    total effects have one sign, the interval is that of the resampled ratios, by the method of the effects; else it is
    ``fieller_interval``, whose ends may be infinite.
    """
    if not is_denominator(total.estimates[0]):
        return unknown_spread(len(effects.mean)).columns("recovered")
    if total.resampled is None or not has_other_sign(total).any():
        return effects.ratio_to(total).columns("recovered")
    mean = effects.mean / total.mean
    low, high = fieller_interval(effects.resampled, total.resampled[:, 0])
    return {"recovered": mean, "recovered_low": np.minimum(low, mean), "recovered_high": np.maximum(high, mean)}


def has_other_sign(total: Spread) -> NDArray[np.bool_]:
    """The resamples, (resamples,) bool, in which a total effect has not the sign of its mean, but 0 or the other."""
    return (np.sign(total.resampled) != np.sign(total.mean)).any(1)


def fieller_interval(effects: Array, totals: Array) -> tuple[Array, Array]:
    """From the least to the largest ratio ρ for which the percentile interval of effect − ρ · total holds 0, by column.

    ``effects`` (resamples, columns), ``totals`` (resamples,) → both ends (columns,). It is Fieller's set (1954) with
    the bootstrap's percentiles in place of t's. A ratio itself jumps from +∞ to −∞ where its denominator changes sign;
    effect − ρ · total does not. Where all totals have one sign these are the percentiles of the ratios. Where the
    percentile interval of the totals holds 0 every ratio is possible: both ends are infinite.
    """
    sign = 1 if (totals > 0).sum() >= (totals < 0).sum() else -1
    return _low_end(sign * effects, sign * totals), -_low_end(-sign * effects, sign * totals)


def _low_end(effects: Array, totals: Array) -> Array:
    """The least ρ at which as many of effect − ρ · total are below 0 as ``TAIL`` says, the totals being mostly above 0.

    Over sorted ratios the number below 0 grows by one at a ratio with a total above 0, and falls by one at the others.
    """
    rank = TAIL * (len(totals) - 1)
    varies = totals != 0
    ratios = effects[varies] / totals[varies, None]
    order = np.argsort(ratios, axis=0)
    always = (totals < 0).sum() + (effects[~varies] < 0).sum(0)  # below 0 at ρ = −∞
    steps = np.where(totals[varies] > 0, 1, -1)[order]
    below = np.vstack([always[None], always + np.cumsum(steps, axis=0)])
    ratios = np.vstack([np.full_like(effects[:1], -np.inf), np.take_along_axis(ratios, order, axis=0)])

    def reach(number: int) -> Array:
        first = (below >= number).argmax(0)
        return np.take_along_axis(ratios, first[None], axis=0)[0]

    low, next_up = reach(int(rank) + 1), reach(int(rank) + 2)
    with np.errstate(invalid="ignore"):  # −∞ − −∞
        between = low + (rank - int(rank)) * (next_up - low)
    return np.where(np.isneginf(low), -np.inf, between)


def subtract_recovered(a: Spread, total_a: Spread, b: Spread, total_b: Spread) -> tuple[Array, Array, Array]:
    """The shares recovered a − b with the ends of their interval, (columns,) each; both on the same resamples.

    A resample in which a total effect has the other sign counts as beyond both ends, so that the interval is too wide
    rather than too narrow; of more such resamples than a tail has, the ends are infinite.
    """
    other_sign = has_other_sign(total_a) | has_other_sign(total_b) if a.resampled is not None else np.zeros(1, bool)
    if not other_sign.any():
        ratios = a.ratio_to(total_a), b.ratio_to(total_b)
        parts = [(ratio.resampled, ratio.left_out) for ratio in ratios]
        difference = Spread(
            ratios[0].mean - ratios[1].mean, *(None if x is None else x - y for x, y in zip(*parts, strict=True))
        )
        return difference.mean, *difference.interval
    mean, kept = a.mean / total_a.mean - b.mean / total_b.mean, ~other_sign
    resampled = a.resampled[kept] / total_a.resampled[kept] - b.resampled[kept] / total_b.resampled[kept]
    beyond = np.full((other_sign.sum(), len(mean)), np.inf)
    tail = int(TAIL * (len(other_sign) - 1))
    low = np.sort(np.vstack([resampled, -beyond]), axis=0)[tail]
    high = np.sort(np.vstack([resampled, beyond]), axis=0)[-1 - tail]
    return mean, np.minimum(low, mean), np.maximum(high, mean)
