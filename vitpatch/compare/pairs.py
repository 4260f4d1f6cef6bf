"""Pairs of runs on the same images: paired differences of their effects, and in words why some are not subtracted.

The unit is the cluster. Both runs are taken on one resample of clusters, so that what they share cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vitpatch.checks import read_inclusion
from vitpatch.compare.load import FinishedRun, broken_run
from vitpatch.compare.settings import (
    RunSettings,
    describe_differing,
    differing_settings,
    format_windows,
    runs_by_group,
)
from vitpatch.errors import VitPatchError
from vitpatch.formatting import counted
from vitpatch.identity import option_identity
from vitpatch.runs.results import read_patches
from vitpatch.schema import PATCH_COLUMNS
from vitpatch.stats.bootstrap import Array, Resamples, Spread
from vitpatch.stats.inference import sign_flip_p
from vitpatch.stats.result import total_effects
from vitpatch.stats.summary import MIN_STANDARD_ERRORS
from vitpatch.types import Direction, Donor, Interval, Metric

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
FEW_CLUSTERS = 20
"""Of fewer a percentile interval is clearly too narrow."""
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
            examples, patches = run.examples(), read_patches(run.folder)
            if patches.to_numpy().tolist() != run.summary[list(PATCH_COLUMNS)].to_numpy().tolist():
                raise ValueError("summary.csv and effects.parquet are not of the same patches")
            included = examples["included"].to_numpy(bool)
            effects = _read_effects(run, included, len(patches))
            donor, config = Donor(run.manifest["donors"][0]), run.manifest["config"]
            total = total_effects(examples, donor, Direction(config["direction"]), Metric(config["metric"]))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise broken_run(run.folder, "a file is broken", error) from error
        ids, clusters = (examples[name].to_numpy(np.int64)[included] for name in ("example_id", "cluster"))
        return cls(ids, clusters, total[included], effects)


def _read_effects(run: FinishedRun, included: NDArray[np.bool_], patches: int) -> Array:
    """``effect`` of the included images (images, patches), read a row group at a time."""
    effects = np.empty((int(included.sum()), patches), dtype=np.float32)
    image = row = 0
    with pq.ParquetFile(run.folder.effects) as file:
        for group in range(file.num_row_groups):
            values = file.read_row_group(group, columns=["effect"])["effect"].to_numpy().reshape(-1, patches)
            values = values[included[image : image + len(values)]]
            image += file.metadata.row_group(group).num_rows // patches
            effects[row : row + len(values)] = values
            row += len(values)
    if image != len(included):
        raise ValueError(f"{image} images have effects, {len(included)} have base runs")
    return effects


@dataclass(frozen=True)
class PairedDifference:
    """Values of both runs by patch, and ``difference`` = a − b with its interval, (patches,) each; ``p`` is family-wise
    over the patches, NaN where it is not tested."""

    value_a: Array
    value_b: Array
    difference: Array
    low: Array
    high: Array
    p: Array | float = np.nan


def subtract_effects(
    a: Array, b: Array, clusters: NDArray[np.integer], seed: int, method: str = "percentile"
) -> PairedDifference:
    """Mean differences of effects: (images, patches) twice, (images,) → (patches,).

    p by sign flips of clusters, of the null that the two runs could change places; it is of the metric that the effects
    are in, which under this null is as likely above 0 as below, whatever the metric.
    """
    difference = a - b
    spread = _resamples(clusters.tobytes(), seed).spread(difference, method=method)
    p = sign_flip_p(difference, clusters, seed)
    return PairedDifference(a.mean(0, dtype=float), b.mean(0, dtype=float), spread.mean, *spread.interval, p)


def subtract_recovered(
    a: Array,
    b: Array,
    totals: tuple[Array, Array],
    clusters: NDArray[np.integer],
    seed: int,
    method: str = "percentile",
) -> PairedDifference | tuple[bool, bool]:
    """Differences of mean effect / mean total effect, both ratios on one resample of clusters.

    ``totals`` are the total effects of a and b, (images,) each. Where a mean total effect is within
    ``MIN_STANDARD_ERRORS`` standard errors of 0 nothing is subtracted: then for which of the two it is.
    """
    patches = a.shape[1]
    spread = _resamples(clusters.tobytes(), seed).spread(a, b, np.column_stack(totals), method=method)
    spread_a, spread_b, spread_totals = spread[:patches], spread[patches : 2 * patches], spread[2 * patches :]
    unknown = ~(np.abs(spread_totals.mean) > MIN_STANDARD_ERRORS * spread_totals.se)
    if unknown.any():
        return bool(unknown[0]), bool(unknown[1])
    ratio_a, ratio_b = spread_a.over(spread_totals[:1]), spread_b.over(spread_totals[1:])
    parts = ((ratio_a.resampled, ratio_b.resampled), (ratio_a.left_out, ratio_b.left_out))
    difference = Spread(ratio_a.mean - ratio_b.mean, *(None if x is None else x - y for x, y in parts))
    return PairedDifference(ratio_a.mean, ratio_b.mean, difference.mean, *difference.interval)


@lru_cache(maxsize=2)
def _resamples(clusters: bytes, seed: int) -> Resamples:
    """The resamples of clusters (int64, as bytes): the same for most pairs of a sweep, and drawn once."""
    return Resamples(np.frombuffer(clusters, dtype=np.int64), seed)


def same_clusters(a: NDArray[np.integer], b: NDArray[np.integer]) -> bool:
    """Whether two numberings of the same images put them into the same clusters: (images,) each."""
    together = np.unique(np.column_stack([a, b]), axis=0)
    return len(together) == len(np.unique(a)) == len(np.unique(b))


def same_patches(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """The patches that two summaries have in common: ``PATCH_IDENTITY``, the windows and the rows of both.

    Clipped, several windows of a run may be one patch: each is paired with its own window where the other run has it,
    else the first of one run with the first of the other.
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
    asked = {(a.name, b.name) for a, b in matched}
    return [
        (a, b)
        for a, b in combinations(runs, 2)
        if len(runs) <= MAX_RUNS
        or (a.name, b.name) in asked
        or len(differing_settings(settings[a.name], settings[b.name])) <= 1
    ]


def subtract_pairs(pairs: Sequence[Pair], settings: Mapping[str, RunSettings]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables ``differences`` and ``not_subtracted`` of ``Comparison``, for pairs in order of the first run.

    ``settings`` by run's name. The effects of at most two runs are in memory at once.
    """
    tables, reasons = [], []
    in_memory: tuple[str, RunEffects | VitPatchError] | None = None
    for a, b in pairs:
        reason = reason_against(a, b)
        if not reason and differing_settings(settings[a.name], settings[b.name]) == ["include"]:
            reason = "the same patches: on the images that both include the effects are equal"
        if not reason:
            if in_memory is None or in_memory[0] != a.name:
                in_memory = None  # before the next is read
                in_memory = (a.name, _effects_or_error(a))
            result = _subtract(a, b, in_memory[1], _effects_or_error(b))
            if isinstance(result, pd.DataFrame):
                tables.append(result)
                continue
            reason = result
        reasons.append({"a": a.name, "b": b.name, "reason": reason})
    differences = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    return differences, pd.DataFrame(reasons, columns=["a", "b", "reason"])


def is_same_corruption(a: FinishedRun, b: FinishedRun) -> bool:
    """Whether two runs have one corruption of one strength, asked for or calibrated; of random ones with any seed."""
    one, other = (option_identity(run.manifest["config"]["corruption"]) for run in (a, b))
    return one == other


def reason_against(a: FinishedRun, b: FinishedRun) -> str:
    """Why two runs are not subtracted, as far as manifests and summaries tell; "" = they may be.

    With one corruption the donors may differ: the effects are then against one base run. The ratios that are compared
    across corruptions are of one donor only.
    """
    manifest_a, manifest_b = a.manifest, b.manifest
    if manifest_a["identity"]["data"] != manifest_b["identity"]["data"]:
        return "the data differ: not the same images, or their labels are other classes"
    if (depths := (manifest_a["model"]["layers"], manifest_b["model"]["layers"]))[0] != depths[1]:
        return f"the models have {depths[0]} and {depths[1]} layers: compare them by relative depth"
    for key in ("direction", "metric"):
        if manifest_a["config"][key] != manifest_b["config"][key]:
            return f"the {key} differs: {manifest_a['config'][key]} and {manifest_b['config'][key]}"
    if manifest_a["config"]["metric"] == Metric.LOGIT_DIFF:
        return "logit_diff regresses under any disturbance: compare runs in prob or log_odds"
    if not is_same_corruption(a, b):
        donor_a, donor_b = manifest_a["donors"][0], manifest_b["donors"][0]
        if donor_a != donor_b:
            return f"corruption and donor differ ({donor_a} and {donor_b}): recovered is compared for one donor"
        if Donor(donor_a).is_constant:
            return f"recovered has no meaning: donor {donor_a} is no run"
    return "" if len(same_patches(a.summary, b.summary)) else f"no patch in common: {_differing_patches(a, b)}"


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


def _effects_or_error(run: FinishedRun) -> RunEffects | VitPatchError:
    try:
        return RunEffects.read(run)
    except VitPatchError as error:
        return error


def _subtract(
    a: FinishedRun, b: FinishedRun, effects_a: RunEffects | VitPatchError, effects_b: RunEffects | VitPatchError
) -> pd.DataFrame | str:
    """The rows of a pair, or why there are none."""
    for effects in (effects_a, effects_b):
        if isinstance(effects, VitPatchError):
            return str(effects)
    _, at_a, at_b = np.intersect1d(effects_a.ids, effects_b.ids, assume_unique=True, return_indices=True)
    if not len(at_a):
        return "no image is included in both"
    clusters = effects_a.clusters[at_a]
    if not same_clusters(clusters, effects_b.clusters[at_b]):
        return "the images are in other clusters"
    patches = same_patches(a.summary, b.summary)
    values_a = effects_a.effects[np.ix_(at_a, patches["row_a"])]
    values_b = effects_b.effects[np.ix_(at_b, patches["row_b"])]
    seed, method = _common(a, b, "seed", 0), _common(a, b, "interval", str(Interval.PERCENTILE))
    if is_same_corruption(a, b):
        quantity, result = "effect", subtract_effects(values_a, values_b, clusters, seed, method)
    else:
        totals = (effects_a.total[at_a], effects_b.total[at_b])
        quantity, result = "recovered", subtract_recovered(values_a, values_b, totals, clusters, seed, method)
    if not isinstance(result, PairedDifference):
        names = " and ".join(run.name for run, is_unknown in zip((a, b), result, strict=True) if is_unknown)
        images = counted(len(at_a), "image")
        return f"recovered is not known: on {images} the total effect of {names} is within 3 SE of 0"
    n_clusters = len(np.unique(clusters))
    pair = {"a": a.name, "b": b.name, "quantity": quantity, "n": len(at_a), "n_clusters": n_clusters}
    return patches.assign(**pair, **vars(result), caution=caution(a, b, n_clusters))[COLUMNS]


def _common(a: FinishedRun, b: FinishedRun, key: str, default: int | str) -> int | str:
    """The value of a config key that both runs have, ``default`` where they differ."""
    values = {run.manifest["config"][key] for run in (a, b)}
    return values.pop() if len(values) == 1 else default


def caution(a: FinishedRun, b: FinishedRun, clusters: int) -> str:
    """Why to mistrust a pair's differences beyond their intervals: images chosen by an outcome, few clusters."""
    cautions, rules = [], [run.manifest["identity"]["include"] for run in (a, b)]
    by_outcome = [
        run.name for run, rule in zip((a, b), rules, strict=True) if read_inclusion(rule).selects_on_the_outcome
    ]
    if by_outcome and not (is_same_corruption(a, b) and rules[0] == rules[1]):
        cautions.append(f"the images are chosen by what the corruption does to them in {' and '.join(by_outcome)}")
    if clusters < FEW_CLUSTERS:
        cautions.append(f"the interval of {counted(clusters, 'cluster')} is too narrow")
    return "; ".join(cautions)


def matched_table(
    runs: Sequence[FinishedRun],
    pairs: Sequence[Pair],
    settings: Mapping[str, RunSettings],
    overview: pd.DataFrame,
    differences: pd.DataFrame,
    not_subtracted: pd.DataFrame,
) -> pd.DataFrame:
    """The table ``matched`` of ``Comparison``, from its other tables: the pairs, then the runs without a match."""
    overview = overview.set_index("run")
    by_pair = dict(iter(differences.groupby(["a", "b"]))) if len(differences) else {}
    reasons = {(row.a, row.b): row.reason for row in not_subtracted.itertuples()}
    rows: list[dict[str, Any]] = []
    for a, b in pairs:
        names = (a.name, b.name)
        differing = describe_differing(settings[a.name], settings[b.name])
        largest = _largest_difference(by_pair[names]) if names in by_pair else {"reason": reasons[names]}
        rows.append({"a": a.name, "b": b.name, "differing": differing, **_effects(overview, *names), **largest})
    table = pd.DataFrame([*rows, *_rows_without_match(runs, pairs, overview)], columns=MATCHED_COLUMNS)
    return table.astype(dict.fromkeys(("peak_layer_a", "peak_layer_b", "largest_layer"), "Int64"))


def _effects(overview: pd.DataFrame, a: str, b: str) -> dict[str, Any]:
    """Total effect and peak of both runs; a name "" is no run."""
    return {
        f"{column}_{side}": overview.loc[name, column]
        for side, name in (("a", a), ("b", b))
        for column in ("total_effect", "peak_layer", "peak_effect")
        if name
    }


def _largest_difference(rows: pd.DataFrame) -> dict[str, Any]:
    row = rows.iloc[int(np.argmax(np.abs(rows["difference"].to_numpy())))]
    return {"quantity": row["quantity"]} | {
        f"largest_{name}": row[name] for name in ("difference", "layer", "low", "high", "p")
    }


def _rows_without_match(
    runs: Sequence[FinishedRun], pairs: Sequence[Pair], overview: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    """A row for each run and other group in which it has no match."""
    groups = runs_by_group(runs)
    matched = {(one.name, other.group) for a, b in pairs for one, other in ((a, b), (b, a))}
    for first, second in combinations(groups, 2):
        for own, other, side in ((first, second, "a"), (second, first, "b")):
            for run in groups[own]:
                if (run.name, other) not in matched:
                    names = {"a": "", "b": "", side: run.name}
                    reason = f"no counterpart in {other}"
                    yield names | _effects(overview, **names) | {"differing": "", "reason": reason}
