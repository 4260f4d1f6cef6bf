"""What a run's numbers allow to say: facts of its finding, found by rules. Pure: numpy and pandas.

A place is *shown* where two things hold: its family-wise p is below 0.05, and its simultaneous interval leaves 0 out.
Rows are rows of the summary, by number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vitpatch.stats.inference import LEVEL, TAIL, Array, Resamples
from vitpatch.stats.recovered import clusters_to_exclude_zero, is_denominator
from vitpatch.stats.result import RunResult, is_handover, total_effects
from vitpatch.stats.summary import OWN_MINUS, GroupPeak, group_rows, in_layer_order
from vitpatch.types import PREFIX, SUFFIX, Donor, Estimate, Include, Metric, Site, TokenGroup

LEAST_CLUSTERS = 6
"""Of fewer no p of a test by signs is below 0.05: it is at least 2 / 2 ** clusters."""
HALF, MOST = 0.5, 0.9
"""Shares of the total effect, for which the smallest prefix and suffix are looked for that recover them."""


@dataclass(frozen=True)
class Remedies:
    """What would make a total effect that is not shown large enough; what is not known to help is ``None``.

    ``metric``: the stored metric in which the total effect is clearest, and its total effect there; ``clean_correct``:
    the total effect over the images that the clean run gets right; ``clusters``: about how many are enough, if it stays
    as large. Of the first two the interval leaves 0 out.
    """

    metric: tuple[Metric, Estimate] | None = None
    clean_correct: Estimate | None = None
    clusters: int | None = None


@dataclass(frozen=True)
class Places:
    """What is shown among rows whose layers are compared: those of a window and a kind of tokens, in order of layer.

    ``best`` goes furthest towards the total effect; ``alike`` are the rows that are not told apart from it, with it;
    ``shown`` are shown to go there, ``opposed`` are shown to go the other way, the furthest first. ``clusters``: about
    how many bring 0 out of the interval of ``best``, if its effect stays as large; ``None`` where that is no matter.
    """

    rows: tuple[int, ...]
    best: int
    alike: tuple[int, ...]
    shown: tuple[int, ...]
    opposed: tuple[int, ...]
    clusters: int | None

    @property
    def best_is_shown(self) -> bool:
        """Whether the row that goes furthest is shown to; others may be where it is not, which vary less."""
        return self.best in self.shown


@dataclass(frozen=True)
class Control:
    """What the image's own activations do beyond those of another image there, with its family-wise p."""

    donor: Donor
    difference: Estimate
    p: float

    @property
    def is_shown(self) -> bool:
        """Whether the two are shown to differ."""
        return bool(self.difference.excludes_zero and self.p < 1 - LEVEL)


@dataclass(frozen=True)
class Takeover:
    """The first layer, as a position among ``layers``, at which CLS recovers more than the image patches.

    ``at``, and the ends of its interval over resamples of clusters; ``len(layers)`` = at none of them. ``low`` and
    ``high`` are ``None`` where that is not known, as of one cluster. ``cls`` and ``patches`` are rows, one a layer.
    """

    layers: tuple[int, ...]
    cls: tuple[int, ...]
    patches: tuple[int, ...]
    at: int
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class Reach:
    """The smallest prefixes or suffixes that recover ``HALF`` and ``MOST`` of the total effect, ``None`` = none does.

    ``window`` is ``PREFIX`` or ``SUFFIX``; ``longest`` is the row of the longest one.
    """

    window: int
    half: int | None
    most: int | None
    longest: int


@dataclass(frozen=True)
class Finding:
    """Facts of a run, as far as its intervals go.

    ``by_construction``: every effect is the total effect. ``remedies`` are there where a total effect is not shown:
    then nothing is said of places. ``places``, the group that goes furthest first, are without prefixes and suffixes,
    and without what a ``takeover`` is said of. ``controls`` are at the best row of the first places.
    """

    by_construction: bool = False
    remedies: Remedies | None = None
    places: tuple[Places, ...] = ()
    controls: tuple[Control, ...] = ()
    takeover: Takeover | None = None
    reaches: tuple[Reach, ...] = ()


def find(result: RunResult) -> Finding:
    """The facts of a run."""
    study, summary = result.study, result.summary
    has_total, tokens = not study.donor.is_constant, summary["tokens"].to_numpy()
    is_whole = has_total & Site(summary["site"].iloc[0]).is_stream & (tokens == TokenGroup.ALL)
    if has_total and not is_denominator(result.total):
        return Finding(by_construction=is_whole.all(), remedies=find_remedies(result))
    if is_whole.all():
        return Finding(by_construction=True)
    is_single = (summary["window"].to_numpy() > 0) & ~is_whole
    takeover = find_takeover(result) if has_total and is_handover(summary) else None
    if takeover is not None:
        is_single &= ~np.isin(tokens, (TokenGroup.CLS, TokenGroup.PATCHES))
    places = find_places(result, is_single)
    return Finding(
        places=places,
        controls=tuple(find_controls(result, places[0].best)) if places and places[0].best_is_shown else (),
        takeover=takeover,
        reaches=tuple(find_reaches(result)) if has_total else (),
    )


def shown_signs(summary: pd.DataFrame) -> NDArray[np.int_]:
    """For each row the sign of its effect where it is shown, else 0."""
    low, high = summary["effect_sim_low"].to_numpy(), summary["effect_sim_high"].to_numpy()
    return np.where(summary["p"] < 1 - LEVEL, (low > 0).astype(int) - (high < 0), 0)


def find_places(result: RunResult, is_asked: NDArray[np.bool_]) -> tuple[Places, ...]:
    """The groups of rows that are all asked for, (rows,) bool; the one that goes furthest first."""
    signs = result.total_sign * shown_signs(result.summary)
    towards = result.total_sign * result.summary["effect"].to_numpy()
    found = [_find_group(result, peak, signs, towards) for peak in result.peaks if is_asked[peak.rows].all()]
    return tuple(sorted(found, key=lambda places: -towards[places.best]))


def _find_group(result: RunResult, peak: GroupPeak, signs: Array, towards: Array) -> Places:
    rows, best = peak.rows, result.summary.iloc[peak.best]
    effect = Estimate(best["effect"], np.nan, best["effect_sim_low"], best["effect_sim_high"])
    needed = clusters_to_exclude_zero(effect, result.clusters)
    is_in_doubt = signs[peak.best] <= 0 < towards[peak.best] and effect.holds_zero
    opposed = rows[signs[rows] < 0]
    return Places(
        rows=tuple(rows.tolist()),
        best=peak.best,
        alike=tuple(peak.members.tolist()),
        shown=tuple(rows[signs[rows] > 0].tolist()),
        opposed=tuple(opposed[np.argsort(towards[opposed], kind="stable")].tolist()),
        clusters=max(needed, LEAST_CLUSTERS) if is_in_doubt and needed is not None else None,
    )


def find_controls(result: RunResult, at: int) -> Iterator[Control]:
    """What the own donor does beyond each control at a row, as far as they are compared."""
    row = result.summary.iloc[at]
    for donor in result.controls:
        name = OWN_MINUS[donor]
        if name in row and not np.isnan(row[name]):
            difference = Estimate(row[name], np.nan, row[f"{name}_low"], row[f"{name}_high"])
            yield Control(donor, difference, row[f"p_{name}"])


def find_takeover(result: RunResult) -> Takeover | None:
    """At which layer CLS takes over from the image patches, with its interval; ``None`` where no window has a size."""
    takeover = read_takeover(result.summary)
    resamples = Resamples(result.examples["cluster"].to_numpy(), result.study.seed)
    if takeover is None or resamples.n < 2:
        return takeover
    ahead = result.effects[:, list(takeover.cls)] - result.effects[:, list(takeover.patches)]
    firsts = np.sort(_first_above_zero(resamples.means(result.total_sign * ahead)))
    tail = int(TAIL * (len(firsts) - 1))
    return replace(takeover, low=int(firsts[tail]), high=int(firsts[-1 - tail]))


def read_takeover(summary: pd.DataFrame) -> Takeover | None:
    """The same from the shares that a summary has, so without the interval; in the narrowest window."""
    windows = summary["window"][summary["window"] > 0]
    if windows.empty:
        return None
    is_asked = (summary["window"] == windows.min()).to_numpy()
    of_tokens = (
        np.flatnonzero(is_asked & (summary["tokens"] == name)) for name in (TokenGroup.CLS, TokenGroup.PATCHES)
    )
    cls, patches = (in_layer_order(summary, rows) for rows in of_tokens)
    shares, layers = summary["recovered"].to_numpy(), summary["layer"].to_numpy()[cls]
    at = int(_first_above_zero((shares[cls] - shares[patches])[None])[0])
    return Takeover(tuple(layers.tolist()), tuple(cls.tolist()), tuple(patches.tolist()), at)


def _first_above_zero(values: Array) -> NDArray[np.intp]:
    """The first column above 0, or how many columns there are: (rows, columns) → (rows,)."""
    above = np.hstack([values > 0, np.ones((len(values), 1), dtype=bool)])
    return above.argmax(1)


def find_reaches(result: RunResult) -> Iterator[Reach]:
    """For prefixes and suffixes of each group the smallest that recover enough."""
    summary = result.summary
    for rows in group_rows(summary).values():
        window = int(summary["window"].iloc[rows[0]])
        if window not in (PREFIX, SUFFIX) or not summary["layer"].iloc[rows].is_unique:
            continue
        growing = in_layer_order(summary, rows)[:: 1 if window == PREFIX else -1]
        shares = summary["recovered"].to_numpy()[growing]
        half, most = (_first_row(growing, shares >= least) for least in (HALF, MOST))
        yield Reach(window, half, most, int(growing[-1]))


def _first_row(rows: NDArray[np.intp], is_enough: NDArray[np.bool_]) -> int | None:
    return int(rows[is_enough.argmax()]) if is_enough.any() else None


def find_remedies(result: RunResult) -> Remedies:
    """What would make a total effect that is not shown large enough."""
    study, examples, clean_correct = result.study, result.examples, None
    right = (examples["pred_clean"] == examples["label"]).to_numpy()
    if study.include.rule is Include.ALL and right.any() and not right.all():
        total = _total_effect(result, study.metric, right)
        clean_correct = total if total.excludes_zero else None
    return Remedies(_find_metric(result), clean_correct, clusters_to_exclude_zero(result.total, result.clusters))


def _find_metric(result: RunResult) -> tuple[Metric, Estimate] | None:
    """The other stored metric whose total effect is largest against its standard error, among those that are shown.

    ``kl`` only where there is no other, since it is above 0 by construction; never ``logit_diff``, which regresses.
    """
    every, totals = np.ones(len(result.examples), dtype=bool), {}
    for metric in set(Metric) - {Metric.LOGIT_DIFF, result.study.metric}:
        total = _total_effect(result, metric, every)
        if total.excludes_zero:
            totals[metric] = total
    if not totals:
        return None
    signed = {metric: total for metric, total in totals.items() if metric is not Metric.KL} or totals
    return min(signed.items(), key=lambda item: item[1].se / abs(item[1].mean))


def _total_effect(result: RunResult, metric: Metric, images: NDArray[np.bool_]) -> Estimate:
    """The mean total effect on a metric over some of the images, (images,) bool."""
    study, examples = result.study, result.examples[images]
    total = total_effects(examples, study.donor, study.direction, metric)
    resamples = Resamples(examples["cluster"].to_numpy(), study.seed)
    return resamples.spread(total[:, None], method=study.interval).estimates[0]
