"""A run's finding in words: a few plain sentences, made of facts that rules have found.

Intervals of effects at places are simultaneous ones, since places are chosen among many by their effects; those of
shares of the total effect are of the place alone, as ``recovered`` in ``summary.csv``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vitpatch.formatting import format_count, format_effect, format_interval, format_layers
from vitpatch.plots.style import METRIC_NAMES, SITE_WORDS, TOKEN_WORDS, describe_place, doubt_words, token_kind
from vitpatch.stats.finding import Control, Finding, Places, Reach, Remedies, Takeover
from vitpatch.stats.result import RunResult
from vitpatch.types import (
    ALL_HEADS,
    PREFIX,
    Direction,
    Donor,
    Estimate,
    Include,
    Metric,
    Site,
    Tested,
)

MOST_GROUPS, MOST_NAMED = 4, 3
"""So many groups of rows beside the first are described; of groups with several places a layer so many are named."""


@dataclass(frozen=True)
class Verbs:
    """What activations do that move a run towards the donor's, what those do that move it furthest, and the reverse."""

    towards: str
    most: str
    away: str


RESTORE = Verbs("restore", "restore most", "make it worse")
DAMAGE = Verbs("do damage", "do most damage", "make it better")
HARM = Verbs("do harm", "do most harm", "make it better")
MOVE = Verbs("move the run towards the donor's", "move the run furthest towards the donor's", "move it away from that")


def finding_sentences(result: RunResult, finding: Finding, corruption: str = "the corruption") -> list[str]:
    """The finding in a few sentences; ``corruption`` is its name."""
    sentences = list(_sentences(result, finding, corruption))
    return [f"{sentence[0].upper()}{sentence[1:]}" for sentence in sentences]


def _sentences(result: RunResult, finding: Finding, corruption: str) -> Iterator[str]:
    if finding.remedies is not None:
        yield f"{_doubt_words(result, corruption)} ({_sample_words(result)}). Nothing is said of places."
        if ways := list(_ways_out(result, finding.remedies)):
            yield f"{'; '.join(ways)}."
    elif not result.study.donor.is_constant:
        yield f"{_total_words(result, corruption)} ({_sample_words(result)})."
    if finding.by_construction:
        yield (
            "every layer has the total effect by construction, since the whole residual stream is replaced: where the "
            "effect lies is not asked."
        )
    if finding.takeover is not None:
        yield _takeover_words(result, finding.takeover)
    for reach in finding.reaches:
        yield _reach_words(result.summary, reach)
    if finding.places:
        yield from _places_sentences(result, finding.places)
    if finding.controls:
        yield _control_words(result, finding.controls)


# --- the total effect ---


def _total_words(result: RunResult, corruption: str) -> str:
    """The total effect as what the corruption does, or of another donor as it is."""
    study = result.study
    if study.donor is not Donor.PAIR:
        return f"the total effect, {study.donor} donor − {study.direction.recipient} run, is {_of_metric(result)}"
    return f"under {corruption} the {METRIC_NAMES[study.metric]} {_change_words(result)}"


def _doubt_words(result: RunResult, corruption: str) -> str:
    """The same of a total effect that is not shown."""
    study, total = result.study, result.total
    if study.donor is Donor.PAIR and total.mean == total.low == total.high == 0:
        return f"both runs have the same {METRIC_NAMES[study.metric]}: the total effect is 0"
    if study.donor is Donor.PAIR and total.holds_zero:
        return f"{corruption} is not shown to change the {METRIC_NAMES[study.metric]}, which {_change_words(result)}"
    reason = doubt_words(total, study.donor, study.direction) or "the total effect is not known to differ from 0"
    return f"{reason}: {_of_metric(result)}"


def _change_words(result: RunResult) -> str:
    """What the metric does under the corruption: "falls by", with the interval."""
    study, total = result.study, result.total
    if study.metric is Metric.KL:
        return f"is {_size(total)}"
    rises = (total.mean > 0) == (study.direction is Direction.NOISE)
    verb = ("rise" if rises else "fall") + "s" * (study.metric is not Metric.LOG_ODDS)
    return f"{verb} by {_size(total)}"


def _size(estimate: Estimate) -> str:
    """An estimate with its interval, turned so that it is above 0."""
    mean, low, high = estimate.mean, estimate.low, estimate.high
    return format_effect(*((-mean, -high, -low) if mean < 0 else (mean, low, high))).replace("+", "")


def _of_metric(result: RunResult) -> str:
    total = result.total
    return f"{format_effect(total.mean, total.low, total.high)} on the {METRIC_NAMES[result.study.metric]}"


def _sample_words(result: RunResult) -> str:
    """How many images, in how many clusters, and how these were chosen and labelled."""
    images, rule = len(result.examples), result.study.include
    words = format_count(images, "image")
    if result.clusters < images:
        words += f" in {format_count(result.clusters, 'cluster')}"
    if rule.rule is Include.CLEAN_CORRECT:
        words += " that the clean run gets right"
    elif rule.selects_on_the_outcome:
        words += f" chosen by what the corruption did to them, include={rule}"
    words += ", labelled by the clean run" * result.labels_are_predicted
    return words + ", without intervals, so of these alone" * (result.clusters < 2)


def _ways_out(result: RunResult, remedies: Remedies) -> Iterator[str]:
    """What would make the total effect large enough, in a few words each."""
    if remedies.metric is not None:
        metric, of_metric = remedies.metric
        name = METRIC_NAMES[metric]
        if metric is Metric.KL:
            yield f"the {name}, which any change raises, is {_size(of_metric)}"
        else:
            yield f"on the {name} it is {format_effect(of_metric.mean, of_metric.low, of_metric.high)}"
    if (right := remedies.clean_correct) is not None:
        where = "over the images that the clean run gets right"
        yield f"{where} it is {format_effect(right.mean, right.low, right.high)}"
    if remedies.clusters is not None:
        yield f"{_needed_words(result, remedies.clusters)} would be enough, if it stays as large"


def _needed_words(result: RunResult, clusters: int) -> str:
    """About how many clusters are needed, which are called images where each is one."""
    noun = "cluster" if result.clusters < len(result.examples) else "image"
    return f"about {format_count(clusters, noun)} (now {result.clusters})"


# --- places ---


def _places_sentences(result: RunResult, places: Sequence[Places]) -> Iterator[str]:
    first, others = places[0], places[1:]
    if len(first.rows) == 1:
        yield from _only_place(result, first)
    elif result.clusters < 2:
        where = f"{_place_with_window(result, first.best)}: {_effect(result, first.best)}"
        yield f"{_donor_words(result, first)} {_verbs(result).most} at {where}."
    else:
        yield from _first_group(result, first)
    if others:
        some = [_other_group(result, group, first) for group in others[:MOST_GROUPS]]
        more = [f"{len(others) - MOST_GROUPS} more in summary.csv"] * (len(others) > MOST_GROUPS)
        yield f"{'; '.join(some + more)}."
    if opposed := [group for group in places if group.opposed]:
        yield _opposed_words(result, opposed)


def _first_group(result: RunResult, group: Places) -> Iterator[str]:
    """Where the effect is furthest, what is not told apart from that, and where it is shown in all."""
    subject, verbs, best = _donor_words(result, group), _verbs(result), group.best
    noun, effect = _noun_of(result, group), _effect(result, best)
    if not group.best_is_shown:
        furthest = f"the furthest is {_place_with_window(result, best)}, {_effect(result, best, with_share=False)}"
        claim = f"are not shown to {verbs.towards} at any {noun}"
        if group.shown:
            claim = f"are shown to {verbs.towards} at {_list_rows(result, group, group.shown)}"
            furthest += ", which is not shown"
        yield f"{subject} {claim}: {furthest}{_enough_words(result, group)}."
        return
    if len(group.alike) == len(group.shown) == len(group.rows) > 1:
        yield (
            f"{subject} {verbs.towards} at every {noun}, and no {noun} is told apart from the furthest, "
            f"{_place_with_window(result, best)}: {effect}."
        )
        return
    others = [row for row in group.alike if row != best]
    apart = f"it is told apart from every other {noun}"
    if others:
        everything = f"any other {noun}" if len(group.alike) == len(group.rows) else _list_rows(result, group, others)
        apart = f"not told apart from {everything}"
    yield f"{subject} {verbs.most} at {_place_with_window(result, best)}: {effect}; {apart}."
    if len(group.shown) > 1:
        everywhere = len(group.shown) == len(group.rows)
        where = f"every {noun}" if everywhere else _list_rows(result, group, group.shown)
        yield f"they are shown to {verbs.towards} at {where}."


def _enough_words(result: RunResult, group: Places) -> str:
    """The p that leaves the furthest place in doubt where its interval does not, or how many clusters would show it."""
    best = result.summary.iloc[group.best]
    if group.clusters is None:
        is_by_p = best["effect_sim_low"] > 0 or best["effect_sim_high"] < 0
        return f", {'since' if group.shown else 'but'} p = {best['p']:.2f}" * bool(is_by_p and not group.best_is_shown)
    return f"; {_needed_words(result, group.clusters)} would show it, if it stays as large"


def _only_place(result: RunResult, group: Places) -> Iterator[str]:
    """What is shown at the only place of a group; what is shown the other way has a sentence of its own."""
    does, is_said = _verbs(result).towards, group.best_is_shown or result.clusters < 2
    if not group.opposed:
        place, effect = _place_with_window(result, group.best), _effect(result, group.best, with_share=is_said)
        does = does if is_said else f"are not shown to {does}"
        yield f"{_donor_words(result, group)} {does} at {place}: {effect}{_enough_words(result, group)}."


def _other_group(result: RunResult, group: Places, first: Places) -> str:
    """What is shown of another window or other tokens, in a few words."""
    row, lead = result.summary.iloc[group.best], result.summary.iloc[first.best]
    parts = []
    if result.summary["window"].nunique() > 1:
        parts.append(f"with window {row['window']}")
    if token_kind(row["tokens"]) != token_kind(lead["tokens"]) or not parts:
        parts.append((TOKEN_WORDS[token_kind(row["tokens"])] or " at all tokens").strip())
    where = " ".join(parts)
    if not group.best_is_shown and result.clusters > 1:
        return f"{where} shown at {_list_rows(result, group, group.shown)}" if group.shown else f"{where} nowhere shown"
    return f"{where} most at {_describe_row(result, group.best)}, {_effect(result, group.best)}"


def _opposed_words(result: RunResult, groups: Sequence[Places]) -> str:
    """Where activations move the run the other way, and how far, against the total effect."""
    towards = result.total_sign * result.summary["effect"].to_numpy()
    worst = min((group.opposed[0] for group in groups), key=lambda row: towards[row])
    where = " and ".join(_list_rows(result, group, group.opposed, with_window=True) for group in groups)
    group = next(group for group in groups if worst in group.opposed)
    most = ""
    if sum(len(group.opposed) for group in groups) > 1:
        most = f", most at {_place_with_window(result, worst) if len(groups) > 1 else _describe_row(result, worst)}"
    row = result.summary.iloc[worst]
    effect = format_effect(row["effect"], row["effect_sim_low"], row["effect_sim_high"])
    against = ""
    if not result.study.donor.is_constant:
        against = f", against a total effect of {format_effect(result.total.mean, np.nan, np.nan)}"
    return f"{_donor_words(result, group)} {_verbs(result).away} at {where}{most}: {effect}{against}."


def _verbs(result: RunResult) -> Verbs:
    """What the donor's activations do where they move a run towards the total effect."""
    study = result.study
    if study.donor.is_constant:
        return HARM
    clean_is_higher = (result.total_sign > 0) != (study.direction is Direction.NOISE)
    clean_is_better = clean_is_higher != (study.metric is Metric.KL)
    if study.donor is not Donor.PAIR or not clean_is_better:
        return MOVE
    return RESTORE if study.direction is Direction.DENOISE else DAMAGE


def _effect(result: RunResult, row: int, with_share: bool = True) -> str:
    """An effect with its simultaneous interval, and its share of the total effect."""
    values = result.summary.iloc[row]
    words = format_effect(values["effect"], values["effect_sim_low"], values["effect_sim_high"])
    if not with_share or np.isnan(values["recovered"]):
        return words
    share = format_interval(values["recovered"], values["recovered_low"], values["recovered_high"], ".0%")
    return f"{words}, {share} of the total effect"


# --- names of places ---


def _donor_words(result: RunResult, group: Places) -> str:
    """What is put where, in the plural."""
    study, row = result.study, result.summary.iloc[group.best]
    what = SITE_WORDS[Site(row["site"])] + TOKEN_WORDS[token_kind(row["tokens"])]
    if study.donor.is_constant:
        return f"{what} set to {'zero' if study.donor is Donor.ZERO else 'their mean'}"
    if study.donor is not Donor.PAIR:
        return f"{what} of another image of {'its' if study.donor is Donor.SAME_CLASS else 'another'} class"
    return f"{'clean' if study.direction is Direction.DENOISE else 'corrupted'} {what}"


def _noun_of(result: RunResult, group: Places) -> str:
    """What a place of a group is called."""
    rows = result.summary.iloc[list(group.rows)]
    if rows["layer"].is_unique:
        return "layer"
    kinds = {"head": (rows["head"] != ALL_HEADS).any(), "token": (rows["tokens"].map(token_kind) == "each").any()}
    kinds["block"] = (rows["tokens"].map(token_kind) == "grid").any()
    names = [name for name, is_it in kinds.items() if is_it]
    return names[0] if len(names) == 1 else "place"


def _place_with_window(result: RunResult, row: int) -> str:
    """A place in words, with its window where that is not one layer."""
    return _describe_row(result, row) + _window_words(result, row)


def _window_words(result: RunResult, row: int) -> str:
    """The window of a row in brackets; "" where all are of one layer."""
    windows = result.summary["window"]
    return "" if (windows == 1).all() else f" (window {windows.iloc[row]})"


def _describe_row(result: RunResult, row: int) -> str:
    return describe_place(result.summary.iloc[row])


def _list_rows(result: RunResult, group: Places, rows: Sequence[int], with_window: bool = False) -> str:
    """Places in words: layers as ranges; of groups with several places a layer how many they are, or a few by name."""
    layers = sorted({int(layer) for layer in result.summary["layer"].iloc[list(rows)]})
    noun, end = _noun_of(result, group), _window_words(result, group.best) if with_window else ""
    if noun == "layer":
        return format_layers(layers) + end
    if len(rows) <= MOST_NAMED:
        return " and ".join(_describe_row(result, row) for row in rows) + end
    return f"{len(rows)} of {len(group.rows)} {noun}s, in {format_layers(layers)}{end}"


# --- handover, prefixes and suffixes, controls ---


def _takeover_words(result: RunResult, takeover: Takeover) -> str:
    """At which layer CLS takes over, with its interval and the shares there."""
    at = min(takeover.at, len(takeover.layers) - 1)
    cls, patches = (_share(result.summary, rows[at]) for rows in (takeover.cls, takeover.patches))
    if takeover.at > at:
        where = f"at layer {takeover.layers[-1]} {cls} against {patches}"
        return f"CLS has more of the total effect than the image patches at {takeover_layer(takeover)}: {where}."
    return (
        f"CLS takes over from the image patches at {takeover_layer(takeover)}, the first at which it has more of the "
        f"total effect: {cls} against {patches}."
    )


def takeover_layer(takeover: Takeover) -> str:
    """The layer of a takeover with its interval: ``layer 5 [4, 6]``, or ``no layer [11, none]``."""
    names = [*map(str, takeover.layers), "none"]
    layer = "no layer" if takeover.at == len(takeover.layers) else f"layer {names[takeover.at]}"
    return layer if takeover.low is None else f"{layer} [{names[takeover.low]}, {names[takeover.high]}]"


def _share(summary: pd.DataFrame, row: int) -> str:
    values = summary.iloc[row]
    return format_interval(values["recovered"], values["recovered_low"], values["recovered_high"], ".0%")


def _reach_words(summary: pd.DataFrame, reach: Reach) -> str:
    """Which prefix or suffix has half of the total effect, and which most of it, by means."""
    kind = "prefix" if reach.window == PREFIX else "suffix"

    def layers(row: int) -> str:
        ends = summary["first_layer"].iloc[row], summary["last_layer"].iloc[row]
        return f"{format_layers(range(ends[0], ends[1] + 1))}, {_share(summary, row)}"

    longest = f"the longest is {layers(reach.longest)}"
    if reach.half is None:
        return f"no {kind} has half of the total effect, by its mean; {longest}."
    words = f"the smallest {kind} whose mean is half of the total effect is {layers(reach.half)}"
    if reach.most is None:
        return f"{words}; none has 90%, {longest}."
    if reach.most == reach.half:
        return f"{words}, which is 90% as well."
    with_most = "only the longest has 90%," if reach.most == reach.longest else "the smallest with 90% is"
    return f"{words}; {with_most} {layers(reach.most)}."


def _control_words(result: RunResult, controls: Sequence[Control]) -> str:
    """Whether what is restored is the image's own or goes with its class, as far as controls tell them apart."""
    headline = result.study.test is Tested.HEADLINE
    unit = METRIC_NAMES[result.study.metric if headline else Metric.LOG_ODDS].replace(" (nats)", ", nats")
    lower_is_better = headline and result.study.metric is Metric.KL
    less = {c.donor: c.is_shown and (c.difference.mean > 0) != lower_is_better for c in controls}
    if less.get(Donor.SAME_CLASS):
        claim = "what is restored there is more than the class"
    elif less.get(Donor.OTHER_CLASS):
        claim = "what is restored there goes with the class, and nothing beyond the class is shown"
    else:
        claim = "what is restored there is not shown to be the image's own"
    clauses = [_control_clause(control, less[control.donor]) for control in controls]
    return f"{claim}: as donor there, {'; '.join(clauses)} (own − other image, in {unit})."


def _control_clause(control: Control, is_less: bool) -> str:
    other = "another image of its class" if control.donor is Donor.SAME_CLASS else "an image of another class"
    does = "does less than the image itself" if is_less else "does more than the image itself"
    if not control.is_shown:
        does = "is not told apart from the image itself"
    difference = control.difference
    but = f", but p = {control.p:.2f}" * (difference.excludes_zero and not control.is_shown)
    return f"{other} {does}, {format_effect(difference.mean, difference.low, difference.high)}{but}"
