"""Pairs of runs: what is subtracted, and in words why the rest is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from vitpatch.compare.comparison import FinishedRun
from vitpatch.compare.pairs import Apart, of_effects, of_recovered, same_clusters
from vitpatch.compare.settings import Aspect, differing, windows_words
from vitpatch.compare.sides import Side, same_patches
from vitpatch.errors import VitPatchError
from vitpatch.formatting import counted
from vitpatch.types import Donor, Interval, Metric, option_identity, read_inclusion

MOST_RUNS = 60
"""Of more runs only those pairs are subtracted that differ in one aspect: all pairs grow with the square."""
COLUMNS = (
    "a, b, quantity, site, layer, head, tokens, n_layers, window_a, window_b, n, n_clusters, value_a, value_b, "
    "difference, low, high, p, caution"
).split(", ")
FEW_CLUSTERS = 20
"""Of fewer a percentile interval is clearly too narrow."""
Pair = tuple[FinishedRun, FinishedRun]
OfRun = Mapping[str, Mapping[str, Aspect]]


def chosen(runs: Sequence[FinishedRun], of_run: OfRun, matched: Iterable[Pair]) -> list[Pair]:
    """The pairs that are looked at, in order of the first run: all of up to ``MOST_RUNS``; else those that differ in
    one aspect at most, and ``matched``."""
    asked = {(a.name, b.name) for a, b in matched}
    return [
        (a, b)
        for a, b in combinations(runs, 2)
        if len(runs) <= MOST_RUNS or (a.name, b.name) in asked or len(differing(of_run[a.name], of_run[b.name])) <= 1
    ]


def subtracted(pairs: Sequence[Pair], of_run: OfRun) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables ``differences`` and ``not_subtracted`` of ``Comparison``, for pairs in order of the first run.

    ``of_run`` has the aspects of each.

    At most two runs' effects are in memory at once.
    """
    found, unfound = [], []
    held: tuple[str, Side | VitPatchError] | None = None
    for a, b in pairs:
        reason = why_not(a, b)
        if not reason and differing(of_run[a.name], of_run[b.name]) == ["include"]:
            reason = "the same patches: on the images that both include the effects are equal"
        if not reason:
            if held is None or held[0] != a.name:
                held = None  # before the next is read
                held = (a.name, _side(a))
            result = _differences(a, b, held[1], _side(b))
            if isinstance(result, pd.DataFrame):
                found.append(result)
                continue
            reason = result
        unfound.append({"a": a.name, "b": b.name, "reason": reason})
    differences = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)
    return differences, pd.DataFrame(unfound, columns=["a", "b", "reason"])


def is_same_corruption(a: FinishedRun, b: FinishedRun) -> bool:
    """Whether two runs were made with one corruption of one strength, given or found; of random ones with any seed."""
    one, other = (option_identity(run.manifest["config"]["corruption"]) for run in (a, b))
    return one == other


def why_not(a: FinishedRun, b: FinishedRun) -> str:
    """Why two runs are not subtracted, as far as manifests and summaries say; "" = they may be.

    With one corruption the donors may differ: the effects are then against one base run. The ratios that are compared
    across corruptions are of one donor only.
    """
    of_a, of_b = a.manifest, b.manifest
    if of_a["identity"]["data"] != of_b["identity"]["data"]:
        return "the data differ: not the same images, or their labels are other classes"
    if (depths := (of_a["model"]["layers"], of_b["model"]["layers"]))[0] != depths[1]:
        return f"the models have {depths[0]} and {depths[1]} layers: compare them by relative depth"
    for key in ("direction", "metric"):
        if of_a["config"][key] != of_b["config"][key]:
            return f"the {key} differs: {of_a['config'][key]} and {of_b['config'][key]}"
    if of_a["config"]["metric"] == Metric.LOGIT_DIFF:
        return "logit_diff regresses under any disturbance: compare runs in prob or log_odds"
    if not is_same_corruption(a, b) and (reason := _no_ratios(of_a["donors"][0], of_b["donors"][0])):
        return reason
    return "" if len(same_patches(a.summary, b.summary)) else f"no patch in common: {_patches_apart(a, b)}"


def _no_ratios(donor_a: str, donor_b: str) -> str:
    if donor_a != donor_b:
        return f"corruption and donor differ ({donor_a} and {donor_b}): recovered is compared for one donor"
    return f"recovered has no meaning: donor {donor_a} is no run" if Donor(donor_a).is_constant else ""


def _patches_apart(a: FinishedRun, b: FinishedRun) -> str:
    """What two runs without a common patch differ in."""
    sides = [{name: _listed(run, name) for name in ("site", "tokens", "window", "head")} for run in (a, b)]
    apart = [
        f"{name}{'s' * (name[-1] != 's')} {sides[0][name]} and {sides[1][name]}"
        for name in sides[0]
        if sides[0][name] != sides[1][name]
    ]
    return ", ".join(apart) or "other layers"


def _listed(run: FinishedRun, column: str, most: int = 5) -> str:
    """The values of a column of the summary in words."""
    values = list(dict.fromkeys(run.summary[column]))
    words = [windows_words([value]) if column == "window" else str(value) for value in values]
    words = ["all" if column == "head" and word == "-1" else word for word in words]
    return ", ".join(words[:most]) + (" …" if len(words) > most else "")


def _side(run: FinishedRun) -> Side | VitPatchError:
    """A run's side, or why there is none."""
    try:
        return Side.of(run)
    except VitPatchError as error:
        return error


def _differences(
    a: FinishedRun, b: FinishedRun, of_a: Side | VitPatchError, of_b: Side | VitPatchError
) -> pd.DataFrame | str:
    """The rows of a pair, or why there are none."""
    for side in (of_a, of_b):
        if isinstance(side, VitPatchError):
            return str(side)
    _, at_a, at_b = np.intersect1d(of_a.ids, of_b.ids, assume_unique=True, return_indices=True)
    if not len(at_a):
        return "no image is included in both"
    clusters = of_a.clusters[at_a]
    if not same_clusters(clusters, of_b.clusters[at_b]):
        return "the images are in other clusters"
    patches = same_patches(a.summary, b.summary)
    effects_a, total_a = of_a.at(at_a, patches["row_a"].to_numpy())
    effects_b, total_b = of_b.at(at_b, patches["row_b"].to_numpy())
    if is_same_corruption(a, b):
        quantity, apart = "effect", of_effects(effects_a, effects_b, clusters, _seed(a, b), _method(a, b))
    else:
        quantity, totals = "recovered", (total_a, total_b)
        apart = of_recovered(effects_a, effects_b, totals, clusters, _seed(a, b), _method(a, b))
    if not isinstance(apart, Apart):
        names = " and ".join(run.name for run, near in zip((a, b), apart, strict=True) if near)
        images = counted(len(at_a), "image")
        return f"recovered is not known: on {images} the total effect of {names} is within 3 SE of 0"
    counts = {"n": len(at_a), "n_clusters": len(np.unique(clusters))}
    counts["caution"] = caution(a, b, counts["n_clusters"])
    return _rows(patches, apart).assign(a=a.name, b=b.name, quantity=quantity, **counts)[COLUMNS]


def caution(a: FinishedRun, b: FinishedRun, clusters: int) -> str:
    """What to mind of a pair's differences beside their intervals: images chosen by an outcome, few clusters."""
    said, rules = [], [run.manifest["identity"]["include"] for run in (a, b)]
    by_outcome = [
        run.name for run, rule in zip((a, b), rules, strict=True) if read_inclusion(rule).selects_on_the_outcome
    ]
    if by_outcome and not (is_same_corruption(a, b) and rules[0] == rules[1]):
        said.append(f"the images are chosen by what the corruption does to them in {' and '.join(by_outcome)}")
    if clusters < FEW_CLUSTERS:
        said.append(f"the interval of {counted(clusters, 'cluster')} is too narrow")
    return "; ".join(said)


def _rows(patches: pd.DataFrame, apart: Apart) -> pd.DataFrame:
    """The columns of ``differences`` that are by patch."""
    values = {name: getattr(apart, name) for name in ("value_a", "value_b", "difference", "low", "high")}
    return patches.assign(**values, p=np.nan if apart.p is None else apart.p)


def _seed(a: FinishedRun, b: FinishedRun) -> int:
    """The seed of both runs, 0 where they have two."""
    seeds = {run.manifest["config"]["seed"] for run in (a, b)}
    return seeds.pop() if len(seeds) == 1 else 0


def _method(a: FinishedRun, b: FinishedRun) -> str:
    """The interval of both runs, percentile where they have two."""
    methods = {run.manifest["config"]["interval"] for run in (a, b)}
    return methods.pop() if len(methods) == 1 else str(Interval.PERCENTILE)
