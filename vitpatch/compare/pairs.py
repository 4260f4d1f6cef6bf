"""Pairs of runs on the same images: paired differences of their effects, and in words why some are not subtracted.

The unit is the cluster. Both runs are taken on one resample of clusters, so that what they share cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from vitpatch.checks import read_inclusion
from vitpatch.compare.settings import (
    RunSettings,
    describe_differing_settings,
    differing_settings,
    format_windows,
    runs_by_group,
)
from vitpatch.errors import VitPatchError
from vitpatch.formatting import format_count, option_identity, transfer_words
from vitpatch.runs.reading import FinishedRun, broken_run
from vitpatch.schema import PATCH_COLUMNS
from vitpatch.stats.inference import Array, Resamples, sign_flip_p
from vitpatch.stats.recovered import is_denominator, subtract_recovered
from vitpatch.stats.result import total_effects
from vitpatch.types import Direction, Interval, Metric

MAX_RUNS = 60
"""Of more runs only pairs that differ in one setting are subtracted: the number of pairs grows with the square."""
COLUMNS = (
    "a, b, quantity, site, layer, head, tokens, n_layers, window_a, window_b, n, n_clusters, value_a, value_b, "
    "difference, low, high, p, caution"
).split(", ")
MATCHED_COLUMNS = (
    "a, b, differing, total_effect_a, total_effect_b, peak_layer_a, peak_layer_b, peak_effect_a, peak_effect_b, "
    "quantity, largest_difference, largest_layer, largest_low, largest_high, largest_p, reason"
).split(", ")
FEW_CLUSTERS = 20  # of fewer a percentile interval is clearly too narrow
PATCH_IDENTITY = ("site", "layer", "head", "tokens", "first_layer", "n_layers")
"""What two equal patches have in common; the window that was asked for may differ where it is clipped."""
Pair = tuple[FinishedRun, FinishedRun]


@dataclass(frozen=True)
class RunEffects:
    """Effects of a run's included images, in order of ``ids`` (images,): ``clusters`` and ``total`` effect (images,),
    and ``effects`` (images, patches) float32, patches as in ``summary.csv``."""

    ids: NDArray[np.int64]
    clusters: NDArray[np.int64]
    total: Array
    effects: Array

    @classmethod
    def read(cls, run: FinishedRun) -> RunEffects:
        """Reads a run's files. Raises ``VitPatchError`` where they are broken or do not fit together."""
        try:
            tables = run.tables
            examples, patches = tables.examples, tables.patches
            if patches.to_numpy().tolist() != run.summary[list(PATCH_COLUMNS)].to_numpy().tolist():
                raise ValueError("summary.csv and effects.parquet are not of the same patches")
            included = examples["included"].to_numpy(bool)
            effects = np.concatenate([rows["effect"].to_numpy() for rows in tables.effects(["effect"])])
            effects = effects.reshape(-1, len(patches))
            if len(effects) != len(included):
                raise ValueError(f"{len(effects)} images have effects, {len(included)} have base runs")
            direction, metric = Direction(run.config["direction"]), Metric(run.config["metric"])
            total = total_effects(examples, run.donor, direction, metric)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise broken_run(run.folder, "a file is broken", error) from error
        ids, clusters = (examples[name].to_numpy(np.int64)[included] for name in ("example_id", "cluster"))
        return cls(ids, clusters, total[included], effects[included])


def subtract_effects(
    a: Array, b: Array, clusters: NDArray[np.integer], seed: int, method: str = "percentile"
) -> dict[str, Array]:
    """Mean differences of effects: (images, patches) twice, (images,) → columns of ``differences``, (patches,) each.

    p by sign flips of clusters, of the null that the two runs could change places; it is of the metric that the effects
    are in, which under this null is as likely above 0 as below, whatever the metric.
    """
    difference = a - b
    spread = _resamples(clusters.tobytes(), seed).spread(difference, method=method)
    p = sign_flip_p(difference, clusters, seed)
    low, high = spread.interval
    means = {"value_a": a.mean(0, dtype=float), "value_b": b.mean(0, dtype=float)}
    return means | {"difference": spread.mean, "low": low, "high": high, "p": p}


def subtract_shares(
    a: Array,
    b: Array,
    totals: tuple[Array, Array],
    clusters: NDArray[np.integer],
    names: tuple[str, str],
    seed: int,
    method: str = "percentile",
) -> dict[str, Array | float]:
    """Differences of mean effect / mean total effect, both ratios on the same resamples of clusters; the same columns.

    ``totals`` are the total effects of a and b, (images,) each, ``names`` those of the runs. Raises ``VitPatchError``
    where the interval of a mean total effect holds 0.
    """
    patches = a.shape[1]
    spread = _resamples(clusters.tobytes(), seed).spread(a, b, np.column_stack(totals), method=method)
    spread_a, spread_b, spread_totals = spread[:patches], spread[patches : 2 * patches], spread[2 * patches :]
    is_known = [is_denominator(total) for total in spread_totals.estimates]
    if not all(is_known):
        unknown = " and ".join(name for name, known in zip(names, is_known, strict=True) if not known)
        where = f"on {format_count(len(a), 'image')} the interval of the total effect of {unknown} holds 0"
        raise VitPatchError(f"recovered is not known: {where}")
    total_a, total_b = spread_totals[:1], spread_totals[1:]
    difference, low, high = subtract_recovered(spread_a, total_a, spread_b, total_b)
    shares = {"value_a": spread_a.mean / total_a.mean, "value_b": spread_b.mean / total_b.mean}
    return shares | {"difference": difference, "low": low, "high": high, "p": np.nan}


@lru_cache(maxsize=2)
def _resamples(clusters: bytes, seed: int) -> Resamples:
    """The resamples of clusters (int64, as bytes), kept because most pairs of a sweep have the same."""
    return Resamples(np.frombuffer(clusters, dtype=np.int64), seed)


def same_clusters(a: NDArray[np.integer], b: NDArray[np.integer]) -> bool:
    """Whether two numberings of the same images put them into the same clusters: (images,) each."""
    together = np.unique(np.column_stack([a, b]), axis=0)
    return len(together) == len(np.unique(a)) == len(np.unique(b))


def common_patches(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """The patches that two summaries have in common: ``PATCH_IDENTITY``, the windows and the rows of both.

    Windows that are clipped may be the same patch. Each is paired with the same window of the other run; where the
    other has none of these windows, its first is paired with the first.
    """
    rows_a, rows_b = _rows_by_patch(a), _rows_by_patch(b)
    both = []
    for patch in rows_a:
        if patch in rows_b:
            of_a, of_b = rows_a[patch], rows_b[patch]  # rows by window
            windows = [(window, window) for window in of_a if window in of_b] or [(next(iter(of_a)), next(iter(of_b)))]
            both += [(*patch, *pair, of_a[pair[0]], of_b[pair[1]]) for pair in windows]
    return pd.DataFrame(both, columns=[*PATCH_IDENTITY, "window_a", "window_b", "row_a", "row_b"])


def _rows_by_patch(summary: pd.DataFrame) -> dict[tuple, dict[int, int]]:
    rows: dict[tuple, dict[int, int]] = {}
    columns = (summary[name].tolist() for name in (*PATCH_IDENTITY, "window"))
    for row, (*patch, window) in enumerate(zip(*columns, strict=True)):
        rows.setdefault(tuple(patch), {})[window] = row
    return rows


def choose_pairs(
    runs: Sequence[FinishedRun], settings: Mapping[str, RunSettings], matched: Iterable[Pair]
) -> list[Pair]:
    """The pairs that are compared, in order of the first run: all of up to ``MAX_RUNS`` runs; of more those that differ
    in one setting at most, and ``matched``. ``settings`` by run's name."""
    matched_names = {(a.name, b.name) for a, b in matched}
    return [
        (a, b)
        for a, b in combinations(runs, 2)
        if len(runs) <= MAX_RUNS
        or (a.name, b.name) in matched_names
        or len(differing_settings(settings[a.name], settings[b.name])) <= 1
    ]


def subtract_pairs(pairs: Sequence[Pair], settings: Mapping[str, RunSettings]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables ``differences`` and ``not_subtracted`` of ``Comparison``, for pairs in order of the first run.

    ``settings`` by run's name. The effects of at most two runs are in memory at once.
    """
    tables, reasons = [], []
    effects_of_a: dict[str, RunEffects] = {}
    for a, b in pairs:
        try:
            check_comparable(a, b)
            if differing_settings(settings[a.name], settings[b.name]) == ["include"]:
                raise VitPatchError("the same patches: on the images that both include the effects are equal")
            if a.name not in effects_of_a:
                effects_of_a.clear()  # before the next is read
                effects_of_a[a.name] = RunEffects.read(a)
            tables.append(_subtract(a, b, effects_of_a[a.name], RunEffects.read(b)))
        except VitPatchError as error:
            reasons.append({"a": a.name, "b": b.name, "reason": str(error)})
    differences = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    return differences, pd.DataFrame(reasons, columns=["a", "b", "reason"])


def have_same_corruption(a: FinishedRun, b: FinishedRun) -> bool:
    """Whether two runs have one corruption of one strength, asked for or calibrated; of random ones with any seed."""
    one, other = (option_identity(run.config["corruption"]) for run in (a, b))
    return one == other


def check_comparable(a: FinishedRun, b: FinishedRun) -> None:
    """Raises ``VitPatchError`` where manifests and summaries show that two runs cannot be subtracted.

    With one corruption the donors may differ: the effects are then against one base run. The ratios that are compared
    across corruptions are of one donor only.
    """
    if a.identity["data"] != b.identity["data"]:
        raise VitPatchError("the data differ: not the same images, or their labels are other classes")
    if a.depth != b.depth:
        raise VitPatchError(f"the models have {a.depth} and {b.depth} layers: compare them by relative depth")
    if a.config["direction"] != b.config["direction"]:
        transfers = [transfer_words(run.donor, run.config["direction"]) for run in (a, b)]
        raise VitPatchError(f"the direction differs: {transfers[0]} and {transfers[1]}")
    if a.config["metric"] != b.config["metric"]:
        raise VitPatchError(f"the metric differs: {a.config['metric']} and {b.config['metric']}")
    if a.config["metric"] == Metric.LOGIT_DIFF:
        raise VitPatchError("logit_diff regresses under any disturbance: compare runs in prob or log_odds")
    if not have_same_corruption(a, b):
        if a.donor != b.donor:
            raise VitPatchError(
                f"corruption and donor differ ({a.donor} and {b.donor}): recovered is compared for one donor"
            )
        if a.donor.is_constant:
            raise VitPatchError(f"recovered has no meaning: donor {a.donor} is no run")
    if not len(common_patches(a.summary, b.summary)):
        raise VitPatchError(f"no patch in common: {_differing_patches(a, b)}")


def _differing_patches(a: FinishedRun, b: FinishedRun) -> str:
    """What the patches of two runs differ in."""
    differing = []
    for name in ("site", "tokens", "window", "head"):
        values = [_list_values(run.summary[name]) for run in (a, b)]
        if values[0] != values[1]:
            differing.append(f"{name}{'s' * (name[-1] != 's')} {values[0]} and {values[1]}")
    return ", ".join(differing) or "other layers"


def _list_values(column: pd.Series, most: int = 5) -> str:
    """The values of a column of a summary in words."""
    values = list(dict.fromkeys(column))
    words = [format_windows([value]) if column.name == "window" else str(value) for value in values]
    words = ["all" if column.name == "head" and word == "-1" else word for word in words]
    return ", ".join(words[:most]) + (" …" if len(words) > most else "")


def _subtract(a: FinishedRun, b: FinishedRun, effects_a: RunEffects, effects_b: RunEffects) -> pd.DataFrame:
    """The rows of a pair. Raises ``VitPatchError`` where the two cannot be subtracted."""
    _, at_a, at_b = np.intersect1d(effects_a.ids, effects_b.ids, assume_unique=True, return_indices=True)
    if not len(at_a):
        raise VitPatchError("no image is included in both")
    clusters = effects_a.clusters[at_a]
    if not same_clusters(clusters, effects_b.clusters[at_b]):
        raise VitPatchError("the images are in other clusters")
    patches = common_patches(a.summary, b.summary)
    values = effects_a.effects[np.ix_(at_a, patches["row_a"])], effects_b.effects[np.ix_(at_b, patches["row_b"])]
    how = {"seed": _common(a, b, "seed", 0), "method": _common(a, b, "interval", str(Interval.PERCENTILE))}
    if have_same_corruption(a, b):
        quantity, result = "effect", subtract_effects(*values, clusters, **how)
    else:
        totals = (effects_a.total[at_a], effects_b.total[at_b])
        quantity, result = "recovered", subtract_shares(*values, totals, clusters, (a.name, b.name), **how)
    n_clusters = len(np.unique(clusters))
    pair = {"a": a.name, "b": b.name, "quantity": quantity, "n": len(at_a), "n_clusters": n_clusters}
    return patches.assign(**pair, **result, caution=describe_caution(a, b, n_clusters))[COLUMNS]


def _common(a: FinishedRun, b: FinishedRun, key: str, default: int | str) -> int | str:
    """The value of a config key that both runs have, ``default`` where they differ."""
    values = {run.config[key] for run in (a, b)}
    return values.pop() if len(values) == 1 else default


def describe_caution(a: FinishedRun, b: FinishedRun, clusters: int) -> str:
    """Why a pair's differences are less certain than their intervals say: images chosen by an outcome, few clusters."""
    cautions, rules = [], [run.identity["include"] for run in (a, b)]
    by_outcome = [
        run.name for run, rule in zip((a, b), rules, strict=True) if read_inclusion(rule).selects_on_the_outcome
    ]
    if by_outcome and not (have_same_corruption(a, b) and rules[0] == rules[1]):
        cautions.append(f"the images are chosen by what the corruption does to them in {' and '.join(by_outcome)}")
    if clusters < FEW_CLUSTERS:
        cautions.append(f"the interval of {format_count(clusters, 'cluster')} is too narrow")
    return "; ".join(cautions)


def largest_differences(differences: pd.DataFrame) -> pd.DataFrame:
    """The row of each pair where its runs differ most; the pairs from the largest on, effects before shares."""
    size = differences["difference"].astype(float).abs()
    at = size.groupby([differences["a"], differences["b"]], sort=False).idxmax()
    rows = differences.loc[at].assign(size=size.loc[at])
    return rows.sort_values(["quantity", "size"], ascending=[True, False], kind="stable").drop(columns="size")


def matched_table(
    runs: Sequence[FinishedRun],
    pairs: Sequence[Pair],
    settings: Mapping[str, RunSettings],
    overview: pd.DataFrame,
    differences: pd.DataFrame,
    not_subtracted: pd.DataFrame,
) -> pd.DataFrame:
    """The table ``matched`` of ``Comparison``, from its other tables: the pairs, then the runs without a match."""
    rows = [(a.name, b.name, describe_differing_settings(settings[a.name], settings[b.name])) for a, b in pairs]
    table = pd.DataFrame(rows, columns=["a", "b", "differing"]).merge(not_subtracted, how="left", on=["a", "b"])
    table = pd.concat([table, _runs_without_match(runs, pairs)], ignore_index=True)
    numbers = overview.set_index("run")[["total_effect", "peak_layer", "peak_effect"]]
    for side in "ab":
        table = table.join(numbers.add_suffix(f"_{side}"), on=side)
    largest = largest_differences(differences).set_index(["a", "b"])[
        ["quantity", "difference", "layer", "low", "high", "p"]
    ]
    largest = largest.add_prefix("largest_").rename(columns={"largest_quantity": "quantity"})
    table = table.join(largest, on=["a", "b"])[MATCHED_COLUMNS]
    return table.astype(dict.fromkeys(("peak_layer_a", "peak_layer_b", "largest_layer"), "Int64"))


def _runs_without_match(runs: Sequence[FinishedRun], pairs: Sequence[Pair]) -> pd.DataFrame:
    """A row for each run and other group in which it has no match; ``a`` or ``b``, which has no run, is ""."""
    groups = runs_by_group(runs)
    matched = {(one.name, other.group) for a, b in pairs for one, other in ((a, b), (b, a))}
    rows = []
    for first, second in combinations(groups, 2):
        for own, other, side in ((first, second, "a"), (second, first, "b")):
            row = {"a": "", "b": "", "differing": "", "reason": f"no counterpart in {other}"}
            rows += [row | {side: run.name} for run in groups[own] if (run.name, other) not in matched]
    return pd.DataFrame(rows, columns=["a", "b", "differing", "reason"])
