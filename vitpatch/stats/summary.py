"""Effects by image → a table of means, intervals and tests, a row a patch. Pure: numpy and pandas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vitpatch.stats.inference import (
    Array,
    Resamples,
    Spread,
    cluster_sums,
    row_blocks,
    sign_flip_p,
    simultaneous_interval,
    unknown_spread,
)
from vitpatch.stats.recovered import recovered
from vitpatch.types import Direction, Donor, Estimate, Tested, format_window

SPLITS = 500
TIE = 1e-6
"""Means closer than this are of one size where the furthest is looked for."""

OWN_MINUS = {Donor.SAME_CLASS: "own_minus_same", Donor.OTHER_CLASS: "own_minus_other"}
"""Columns of the own donor's effects less a control's."""


@dataclass(frozen=True)
class Measured:
    """What was measured of each image and patch, (images, patches) each.

    ``effects`` are on the headline metric, ``log_odds`` and ``prob`` on these; ``direct`` is the part of the effect on
    the log odds that goes straight to the readout; ``correct``: whether the patched run predicts the label;
    ``delta_norm``: how far donor and recipient differ. ``controls`` are effects with other images as donors, by column
    (``effect_*``, ``log_odds_*``), NaN where an image has no such partner.
    """

    effects: Array
    correct: NDArray[np.bool_]
    log_odds: Array
    direct: Array
    delta_norm: Array
    prob: Array | None = None
    controls: Mapping[str, Array] = field(default_factory=dict)

    def select(self, images: NDArray[np.bool_]) -> Measured:
        """Some of the images, (images,) bool."""
        arrays = {name: values[images] for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        return replace(self, **arrays, controls={name: values[images] for name, values in self.controls.items()})


def measured_columns(donors: Sequence[Donor]) -> list[str]:
    """The columns of ``effects.parquet`` that ``measure`` takes."""
    names = ["effect", "log_odds", "prob", "direct_log_odds", "delta_norm", *_measured_controls(donors)]
    return [*names, "pred", "n_tokens"]


def _measured_controls(donors: Sequence[Donor]) -> list[str]:
    return [f"{name}_{donor}" for donor in donors[1:] for name in ("effect", "log_odds")]


def measure(
    rows: Iterable[pd.DataFrame], examples: pd.DataFrame, patches: int, direction: Direction, donors: Sequence[Donor]
) -> tuple[Measured, NDArray[np.bool_]]:
    """What was measured of all images, and whether a token group of an image is empty, (images,).

    ``rows`` of ``effects.parquet`` are some images' at a time, with ``measured_columns``.
    """
    names = [name for name in measured_columns(donors) if name not in ("pred", "n_tokens")]
    floats = {name: np.empty((len(examples), patches), dtype=np.float32) for name in names}
    correct = np.empty((len(examples), patches), dtype=bool)
    is_empty = np.zeros(len(examples), dtype=bool)
    labels = examples["label"].to_numpy()
    recipient = {name: examples[f"{name}_{direction.recipient}"].to_numpy() for name in ("prob", "log_odds")}
    first = 0
    for table in rows:
        here = slice(first, first + len(table) // patches)
        for name, values in floats.items():
            values[here] = table[name].to_numpy().reshape(-1, patches)
            for metric, base in recipient.items():
                if name.startswith(metric):
                    values[here] -= base[here, None]
        correct[here] = table["pred"].to_numpy().reshape(-1, patches) == labels[here, None]
        is_empty[here] = (table["n_tokens"].to_numpy().reshape(-1, patches) == 0).any(1)
        first = here.stop
    assert first == len(examples), f"{first} images have effects, {len(examples)} have base runs"
    measured = Measured(
        effects=floats["effect"],
        correct=correct,
        log_odds=floats["log_odds"],
        direct=floats["direct_log_odds"],
        delta_norm=floats["delta_norm"],
        prob=floats["prob"],
        controls={name: floats[name] for name in _measured_controls(donors)},
    )
    return measured, is_empty


@dataclass(frozen=True)
class GroupPeak:
    """Where the peak may be in a group of rows whose layers are compared: those of a window and a kind of tokens.

    ``rows`` of the summary in order of layer, ``stability`` how often each is the peak of a resample; ``members`` the
    rows that are not significantly below ``best``; ``size`` the peak's effect from split halves.
    """

    name: str
    best: int
    members: NDArray[np.intp]
    rows: NDArray[np.intp]
    stability: Array
    size: float


def summary_table(
    patches: pd.DataFrame,
    measured: Measured,
    examples: pd.DataFrame,
    resamples: Resamples,
    total_sign: float,
    *,
    method: str = "percentile",
    tested: Tested = Tested.LOG_ODDS,
    compare_controls: bool = True,
) -> tuple[pd.DataFrame, list[GroupPeak]]:
    """All columns of ``summary.csv``, a row a patch, and the peaks of its groups of rows.

    Arguments as in ``summarize``; ``total_sign`` is the sign of the total effect, 0 = there is no peak; ``tested`` the
    effects that p is of; ``compare_controls``: whether the own donor's effects may be compared with the controls'.
    """
    summary = summarize(patches, measured, examples, resamples, method)
    kind, own = ("log_odds", measured.log_odds) if tested is Tested.LOG_ODDS else ("effect", measured.effects)
    columns = _control_columns(measured, resamples, method)
    columns["p"] = sign_flip_p(own, resamples.clusters, resamples.seed)
    for donor, name in OWN_MINUS.items():
        control = measured.controls.get(f"{kind}_{donor}")
        if control is not None and compare_controls:
            columns |= _own_minus_control(name, own - control, resamples, method)
    columns |= _synergy_columns(measured, summary, resamples, method)
    peaks = list(_group_peaks(summary, measured.effects, total_sign, resamples)) if total_sign else []
    return summary.assign(**columns, **_peak_columns(peaks, len(summary))), peaks


def summarize(
    patches: pd.DataFrame,
    measured: Measured,
    examples: pd.DataFrame,
    resamples: Resamples,
    method: str = "percentile",
) -> pd.DataFrame:
    """Means over images with their intervals, a row a patch.

    ``patches`` has a row a patch (site, layer, head, …); ``examples`` a row an image with ``total_effect``, and with
    ``label`` there are macro-averages; ``resamples`` are of these images. ``recovered`` is empty where the interval of
    the mean total effect holds 0, or there is no total effect. ``delta_norm`` is the mean over the images where it is
    defined. ``method`` is of all intervals but the simultaneous ones, which are over all rows.
    """
    total, columns = examples[["total_effect"]].to_numpy(float), len(patches)
    spread = resamples.spread(measured.effects, measured.log_odds, measured.direct, total, method=method)
    effects, log_odds, direct = (spread[i * columns : (i + 1) * columns] for i in range(3))
    known, macro = ~np.isnan(measured.delta_norm), {}
    if "label" in examples:
        macro = resamples.macro_spread(measured.effects, examples["label"].to_numpy(), method).columns("effect_macro")
    with np.errstate(invalid="ignore"):
        delta_norm = np.where(known, measured.delta_norm, 0).sum(0, dtype=float) / known.sum(0)
    low, high = effects.interval
    simultaneous_low, simultaneous_high = effects.simultaneous
    return patches.assign(
        n=len(examples),
        n_clusters=resamples.n,
        effect=effects.mean,
        effect_se=effects.se,
        effect_low=low,
        effect_high=high,
        **recovered(effects, spread[3 * columns :]),
        accuracy=measured.correct.mean(0),
        **log_odds.columns("log_odds_effect"),
        **direct.columns("direct_log_odds"),
        delta_norm=delta_norm,
        **macro,
        effect_sim_low=simultaneous_low,
        effect_sim_high=simultaneous_high,
    )


def _control_columns(measured: Measured, resamples: Resamples, method: str) -> dict[str, Array]:
    """For each control the number of images that have such a partner, the mean effect and interval over these."""
    columns: dict[str, Array] = {}
    for name, values in measured.controls.items():
        if name.startswith("effect_"):
            known = ~np.isnan(values[:, 0])
            columns[name.replace("effect", "n", 1)] = np.full(values.shape[1], known.sum())
            columns |= _spread_of_known(values, known, resamples, method).columns(name)
    return columns


def _own_minus_control(name: str, difference: Array, resamples: Resamples, method: str) -> dict[str, Array]:
    """Mean, interval and family-wise p of own − control, over the images that have such a partner."""
    known = ~np.isnan(difference[:, 0])
    columns = _spread_of_known(difference, known, resamples, method).columns(name)
    unknown = np.full(difference.shape[1], np.nan)
    clusters, seed = resamples.clusters[known], resamples.seed
    p = sign_flip_p(difference[known], clusters, seed) if known.any() else unknown
    return columns | {f"p_{name}": p}


def _spread_of_known(values: Array, known: NDArray[np.bool_], resamples: Resamples, method: str) -> Spread:
    """Means over the images that are ``known``; NaN where none is."""
    if not known.any():
        return unknown_spread(values.shape[1])
    return resamples.select(known).spread(values[known], method=method)


def _synergy_columns(measured: Measured, summary: pd.DataFrame, resamples: Resamples, method: str) -> dict[str, Array]:
    """A window's effect less the sum of its layers', NaN in rows where these are not known."""
    singles, columns = single_rows(summary), {}
    for name, effects in (("synergy_prob", measured.prob), ("synergy_log_odds", measured.log_odds)):
        if singles and effects is not None:
            values = synergy(effects, list(singles), list(singles.values()))
            for column, known in resamples.spread(values, method=method).columns(name).items():
                columns[column] = np.full(len(summary), np.nan)
                columns[column][list(singles)] = known
    return columns


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
    """Where the peak may be: ``best`` the observed one, ``members`` the columns not significantly below it.

    ``stability`` (columns,) is how often each is the peak of a resample, by the same rule; NaN of one cluster.
    """

    best: int
    members: tuple[int, ...]
    stability: Array


def peak_set(effects: Array, sign: float, clusters: NDArray[np.integer], seed: int) -> Peaks:
    """The layers whose simultaneous interval of (best − this) holds 0, by max-T over the layers.

    ``effects`` (images, layers) in order of layer; the best goes furthest towards ``sign``, as in ``peak``. Of
    one cluster all layers are in the set.
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


def _group_peaks(summary: pd.DataFrame, effects: Array, total_sign: float, resamples: Resamples) -> Iterator[GroupPeak]:
    """For each group of rows that layers are compared in: the rows that may be its peak, and its size."""
    for name, rows in group_rows(summary).items():
        ordered = in_layer_order(summary, rows)
        values = effects[:, ordered]
        peaks = peak_set(values, total_sign, resamples.clusters, resamples.seed)
        size = peak_size(values, total_sign, resamples.clusters, resamples.seed)
        members = ordered[list(peaks.members)]
        yield GroupPeak(name, int(ordered[peaks.best]), members, ordered, peaks.stability, size)


def _peak_columns(peaks: Sequence[GroupPeak], rows: int) -> dict[str, Array]:
    """Whether a row may be its group's peak, and how often it is in resamples."""
    member, share = np.zeros(rows, dtype=bool), np.full(rows, np.nan)
    for peak in peaks:
        member[peak.members], share[peak.rows] = True, peak.stability
    return {"in_peak_set": member, "peak_share": share} if peaks else {}


def window_names(summary: pd.DataFrame) -> list[str]:
    """Each row's window as it stands in names of series: ``w3``, ``prefix``, ``suffix``."""
    return [format_window(window) if window < 1 else f"w{window}" for window in summary["window"]]


def join_differing(*columns: Sequence[str]) -> list[str]:
    """Names by row: the values of those columns that differ between rows, joined by ``-``; ``""`` where none does."""
    differ = [values for values in columns if len(set(values)) > 1]
    return ["-".join(parts) for parts in zip(*differ, strict=True)] if differ else [""] * len(columns[0])


def group_rows(summary: pd.DataFrame) -> dict[str, NDArray[np.intp]]:
    """Rows that layers are compared in, by name: those of one window and one kind of tokens; ``""`` = all."""
    names = join_differing(window_names(summary), [name.partition(":")[0] for name in summary["tokens"]])
    return {name: np.flatnonzero(np.array(names) == name) for name in dict.fromkeys(names)}


def in_layer_order(summary: pd.DataFrame, rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Rows of the summary from the first layer to the last, as they came within one layer."""
    return rows[np.argsort(summary["layer"].to_numpy()[rows], kind="stable")]


def single_rows(summary: pd.DataFrame) -> dict[int, list[int]]:
    """For each row of several layers the rows of its layers alone, where all of them are there."""
    ones = summary[summary["window"] == 1]
    alone = dict(zip(zip(ones["tokens"], ones["head"], ones["layer"], strict=True), ones.index, strict=True))
    singles = {}
    for row in summary[summary["n_layers"] > 1].itertuples() if alone else ():
        layers = [alone.get((row.tokens, row.head, layer)) for layer in range(row.first_layer, row.last_layer + 1)]
        if None not in layers:
            singles[row.Index] = layers
    return singles


def estimates(values: Array, clusters: NDArray[np.integer], seed: int, method: str = "percentile") -> list[Estimate]:
    """An ``Estimate`` for each column of (images, columns); ``method`` of the interval: ``percentile`` or ``bca``."""
    return Resamples(clusters, seed).spread(values, method=method).estimates


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
