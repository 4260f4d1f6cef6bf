"""Per-image effects → means and intervals. Pure: numpy and pandas, the seed an argument; resamples of clusters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vitpatch.stats.bootstrap import RESAMPLES, Array, Resamples, Spread
from vitpatch.types import Estimate

TIE = 1e-6
"""Means closer than this are one size where the furthest is looked for."""
MIN_STANDARD_ERRORS = 3.0
"""A mean total effect within this many standard errors of 0 is no denominator."""


def resampled_means(values: Array, clusters: NDArray[np.integer], seed: int, resamples: int = RESAMPLES) -> Array:
    """Means over images in resamples of whole clusters: (images, columns) → (resamples, columns).

    All columns share the resamples, so that ratios and differences of columns can be taken row by row.
    """
    return Resamples(clusters, seed, resamples).means(values)


def estimates(values: Array, clusters: NDArray[np.integer], seed: int, method: str = "percentile") -> list[Estimate]:
    """An ``Estimate`` for each column of (images, columns); ``method`` of the interval: ``percentile`` or ``bca``."""
    return Resamples(clusters, seed).spread(values, method=method).estimates


def macro_estimates(
    values: Array, labels: NDArray[np.integer], clusters: NDArray[np.integer], seed: int, method: str = "percentile"
) -> list[Estimate]:
    """As ``estimates``, of the mean over classes of class means; ``labels`` (images,).

    A class without images in a resample is left out of that resample.
    """
    return Resamples(clusters, seed).macro_spread(values, labels, method).estimates


def recovered(
    effects: Array, total: Array, clusters: NDArray[np.integer], seed: int, method: str = "percentile"
) -> Array | None:
    """Mean effect / mean total effect with its interval: (images, columns), (images,) → (3, columns).

    Both means are recomputed on each resample. ``None`` where the mean total effect is within
    ``MIN_STANDARD_ERRORS`` standard errors of 0, or has none.
    """
    both = Resamples(clusters, seed).spread(effects, total[:, None], method=method)
    return _recovered(both[:-1], both[-1:])


def _recovered(effects: Spread, total: Spread) -> Array | None:
    if not abs(total.mean[0]) > MIN_STANDARD_ERRORS * total.se[0]:
        return None
    ratios = effects.over(total)
    return np.stack([ratios.mean, *ratios.interval])


def peak(effects: Array, total: float) -> int | None:
    """The index whose mean goes furthest in the direction of the total effect, the lowest on a tie.

    ``effects`` (columns,) are means in order of layer; ``None`` where the mean total effect is 0 and has no direction.
    """
    return None if total == 0 else int(furthest(effects, np.sign(total)))


def furthest(means: Array, towards: float) -> NDArray[np.intp]:
    """The column whose mean goes furthest towards a sign, the lowest within ``TIE``: (…, columns) → (…)."""
    means = np.sign(towards) * means
    assert not np.isnan(means).any(), "a mean is NaN: the furthest is of known ones"
    return np.argmax(means >= means.max(-1, keepdims=True) - TIE, axis=-1)


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


def summarize(
    patches: pd.DataFrame, measured: Measured, examples: pd.DataFrame, seed: int, method: str = "percentile"
) -> pd.DataFrame:
    """The rows of ``summary.csv``: one a patch, means over the images given.

    ``patches`` has a row a patch (site, layer, head, …); ``examples`` has a row an image with ``cluster`` and
    ``total_effect``, and with ``label`` there are macro-averages. ``delta_norm`` is the mean over the images where it
    is defined. ``method`` is of all intervals but the simultaneous ones, which are over all rows.
    """
    resamples, total = Resamples(examples["cluster"].to_numpy(), seed), examples[["total_effect"]].to_numpy(float)
    columns = len(patches)
    spread = resamples.spread(measured.effects, measured.log_odds, measured.direct, total, method=method)
    effects, log_odds, direct = (spread[i * columns : (i + 1) * columns] for i in range(3))
    ratios = _recovered(effects, spread[3 * columns :])
    low_mid_high = np.full((3, columns), np.nan) if ratios is None else ratios
    macro = {}
    if "label" in examples:
        of_classes = resamples.macro_spread(measured.effects, examples["label"].to_numpy(), method)
        macro = with_ends("effect_macro", of_classes)
    return patches.assign(
        n=len(examples),
        n_clusters=resamples.n,
        effect=effects.mean,
        effect_se=effects.se,
        **_ends("effect", effects.interval),
        recovered=low_mid_high[0],
        **_ends("recovered", low_mid_high[1:]),
        accuracy=measured.correct.mean(0),
        **with_ends("log_odds_effect", log_odds),
        **with_ends("direct_log_odds", direct),
        delta_norm=_mean_of_known(measured.delta_norm),
        **macro,
        **_ends("effect_sim", effects.simultaneous),
    )


def _ends(name: str, ends: Iterable[Array]) -> dict[str, Array]:
    low, high = ends
    return {f"{name}_low": low, f"{name}_high": high}


def with_ends(name: str, spread: Spread) -> dict[str, Array]:
    """Columns of means and intervals, ``name``, ``name_low``, ``name_high``; empty where a value is not known."""
    if np.isnan(spread.mean).any():
        spread = Spread(np.full_like(spread.mean, np.nan), None, None)
    return {name: spread.mean, **_ends(name, spread.interval)}


def _mean_of_known(values: Array) -> Array:
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0, dtype=float) / known.sum(0)


def by_class(
    effects: Array, labels: NDArray[np.integer], clusters: NDArray[np.integer], seed: int, method: str = "percentile"
) -> Iterator[tuple]:
    """For each label in order: (label, images, [Estimate of each column])."""
    for label in np.unique(labels):
        of_class = labels == label
        yield int(label), int(of_class.sum()), estimates(effects[of_class], clusters[of_class], seed, method)


def synergy(effects: Array, windows: Sequence[int], singles: Sequence[Sequence[int]]) -> Array:
    """What a window does beyond the sum of its layers, by image: (images, columns) → (images, windows).

    s(W) = e(W) − Σ e({l}) over the layers of W after clipping; ``windows`` are the columns of the W, ``singles`` for
    each the columns of its layers alone. In ``prob`` and ``log_odds``, where effects may add up; 0 of a single layer.
    """
    assert len(windows) == len(singles) and all(singles), f"{len(windows)} windows, single layers {singles}"
    return np.stack(
        [effects[:, window] - effects[:, list(alone)].sum(1) for window, alone in zip(windows, singles, strict=True)],
        axis=1,
    )


def marginal(effects: Array, pairs: Sequence[tuple[int, int | None]]) -> Array:
    """What a layer adds to the rest of its window, e(W) − e(W without l): (images, columns) → (images, pairs).

    ``pairs`` are the columns of W and of W without l, ``None`` where no layer is left, whose effect is 0.
    """
    return np.stack([effects[:, whole] - (0 if rest is None else effects[:, rest]) for whole, rest in pairs], axis=1)
