"""Between groups of runs: which are each other's counterparts, and what differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from vitpatch.compare.comparison import FinishedRun
from vitpatch.compare.settings import Aspect, differing_words

COLUMNS = (
    "a, b, differing, total_effect_a, total_effect_b, peak_layer_a, peak_layer_b, peak_effect_a, peak_effect_b, "
    "quantity, largest_difference, largest_layer, largest_low, largest_high, largest_p, reason"
).split(", ")
Pair = tuple[FinishedRun, FinishedRun]
OfRun = Mapping[str, Mapping[str, Aspect]]


def groups_of(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """The runs of each given folder, in order."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def counterparts(runs: Sequence[FinishedRun], of_run: OfRun) -> list[Pair]:
    """The matched runs of every two groups, ``of_run`` being the aspects of each.

    An aspect that the groups have no value of in common is what they differ in, and is left aside. Runs are matched
    that are equal in all others; of several such the one with the same name below its folder; and of what then has no
    counterpart, runs of the same name.
    """
    groups = list(groups_of(runs).values())
    return [pair for a, b in combinations(groups, 2) for pair in _between(a, b, of_run)]


def _between(group_a: Sequence[FinishedRun], group_b: Sequence[FinishedRun], of_run: OfRun) -> list[Pair]:
    shared = [
        name for name in of_run[group_a[0].name] if _values(group_a, name, of_run) & _values(group_b, name, of_run)
    ]

    def key(run: FinishedRun) -> tuple[str, ...]:
        return tuple(of_run[run.name][name].value for name in shared)

    pairs = []
    for a in group_a:
        alike = [b for b in group_b if key(b) == key(a)]
        named = [b for b in alike if _below(b) == _below(a)]
        pairs += [(a, b) for b in named or alike]
    has_one = {run.name for pair in pairs for run in pair}
    rest_a, rest_b = ([run for run in group if run.name not in has_one] for group in (group_a, group_b))
    return pairs + [(a, b) for a in rest_a for b in rest_b if _below(a) == _below(b)]


def _values(group: Sequence[FinishedRun], aspect: str, of_run: OfRun) -> set[str]:
    return {of_run[run.name][aspect].value for run in group}


def _below(run: FinishedRun) -> str:
    """A run's name below the folder that was given."""
    return run.name.removeprefix(f"{run.group}/") if run.name != run.group else ""


def matched(
    runs: Sequence[FinishedRun],
    pairs: Sequence[Pair],
    of_run: OfRun,
    overview: pd.DataFrame,
    differences: pd.DataFrame,
    not_subtracted: pd.DataFrame,
) -> pd.DataFrame:
    """The table ``matched`` of ``Comparison``, from its other tables: the pairs, then the runs without another."""
    of_overview = overview.set_index("run")
    apart = dict(iter(differences.groupby(["a", "b"]))) if len(differences) else {}
    reasons = {(row.a, row.b): row.reason for row in not_subtracted.itertuples()}
    rows: list[dict[str, Any]] = []
    for a, b in pairs:
        names = (a.name, b.name)
        row: dict[str, Any] = {"a": a.name, "b": b.name}
        row["differing"] = differing_words(*(of_run[name] for name in names))
        row |= _numbers(of_overview, *names)
        row |= _largest(apart[names]) if names in apart else {"reason": reasons[names]}
        rows.append(row)
    table = pd.DataFrame([*rows, *_alone(runs, pairs, of_overview)], columns=COLUMNS)
    return table.astype(dict.fromkeys(("peak_layer_a", "peak_layer_b", "largest_layer"), "Int64"))


def _numbers(overview: pd.DataFrame, a: str, b: str) -> dict[str, Any]:
    """Total effect and peak of both; a name "" is no run."""
    columns = ("total_effect", "peak_layer", "peak_effect")
    return {
        f"{column}_{side}": overview.loc[name, column]
        for side, name in (("a", a), ("b", b))
        for column in columns
        if name
    }


def _largest(rows: pd.DataFrame) -> dict[str, Any]:
    """The patch with the largest difference."""
    row = rows.iloc[int(np.argmax(np.abs(rows["difference"].to_numpy())))]
    found = {"quantity": row["quantity"], "largest_difference": row["difference"], "largest_layer": row["layer"]}
    return found | {f"largest_{name}": row[name] for name in ("low", "high", "p")}


def _alone(runs: Sequence[FinishedRun], pairs: Sequence[Pair], overview: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """A row for each run and other group that has no counterpart of it."""
    groups = groups_of(runs)
    met = {(one.name, other.group) for a, b in pairs for one, other in ((a, b), (b, a))}
    for first, second in combinations(groups, 2):
        for own, other, side in ((first, second, "a"), (second, first, "b")):
            for run in groups[own]:
                if (run.name, other) not in met:
                    names = {"a": "", "b": "", side: run.name}
                    reason = f"no counterpart in {other}"
                    yield names | _numbers(overview, names["a"], names["b"]) | {"differing": "", "reason": reason}
