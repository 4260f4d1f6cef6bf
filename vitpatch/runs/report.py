"""A run's result in words and for other programs: notes, the manifest's entries, the tracker's, the closing lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from vitpatch.formatting import counted, format_interval
from vitpatch.plots.style import doubt_words
from vitpatch.runs.folder import RunFolder
from vitpatch.stats.inference import FLIPS, RESAMPLES
from vitpatch.stats.result import RunResult, is_handover
from vitpatch.types import BaseRun, Direction, Estimate, Metric, Site, Tested, TokenGroup

NO_LABELS = "the images have no labels: each one's is what the clean run predicts, so the clean accuracy is 1"
EMPTY_GROUPS = "images in which a token group has no token: {}; their effect there is 0, and they are in the means"
SELECTED = (
    "include={}: images are chosen by what the corruption did to them, which biases every mean away from 0; "
    "of all {}: {}{}"
)
TESTED_ELSEWHERE = (
    "p is of effects on {}: a patch that is neutral in log odds has a mean there that is not 0, and may be called"
)
NOT_COMPARED = (
    "controls take clean activations of other images, the own donor is the corrupted run: they are not compared"
)
CONSTANT_DONOR = (
    "donor={}: is no run, so there is no total effect and recovered is empty; the peak is what does most harm"
)
WHOLE_STREAM = (
    "the whole residual stream is replaced, so the run is the donor's from there: every layer's effect is the total "
    "effect, and the peak says nothing; target.tokens=[cls,patches] says where it lies"
)
NO_INTERVAL = "no interval: all images are of one cluster"
NOT_RECOVERED = "recovered is empty: the mean total effect is within 3 standard errors of 0, or has none"
NO_HANDOVER = "there is no picture of the handover: nothing is known of what is recovered"
HANDOVER_OF_ONE_WINDOW = "there is no picture of the handover: it is drawn where there is one window"
NO_PEAK = "peak_layer is null: the mean total effect is 0 and has no direction"


def notes(outcome: RunResult) -> list[str]:
    """What a reader of the means must know."""
    study, summary, selected = outcome.study, outcome.summary, outcome.unselected
    texts = []
    if outcome.labels_are_predicted:
        texts.append(NO_LABELS)
    if empty := int(outcome.examples["has_empty_group"].sum()):
        texts.append(EMPTY_GROUPS.format(empty))
    if selected is not None:
        total = "" if np.isnan(selected.total.mean) else f"total effect {selected.total.mean:+.3f}, "
        peak = "no peak layer" if selected.peak_layer is None else f"peak layer {selected.peak_layer}"
        texts.append(SELECTED.format(study.include, counted(selected.images, "image"), total, peak))
    if study.test is Tested.HEADLINE and study.metric is not Metric.LOG_ODDS:
        texts.append(TESTED_ELSEWHERE.format(study.metric))
    if outcome.controls and study.direction is Direction.NOISE:
        texts.append(NOT_COMPARED)
    if study.donor.is_constant:
        return [*texts, CONSTANT_DONOR.format(study.donor)]
    if (summary["tokens"] == TokenGroup.ALL).all() and Site(summary["site"].iloc[0]).is_stream:
        texts.append(WHOLE_STREAM)
    if doubt := doubt_words(outcome.total, study.donor, study.direction):
        texts.append(doubt)
    if not outcome.total.known:
        texts.append(NO_INTERVAL)
    if summary["recovered"].isna().all():
        texts += [NOT_RECOVERED, *[NO_HANDOVER] * is_handover(summary)]
    if is_handover(summary) and summary["window"].nunique() > 1:
        texts.append(HANDOVER_OF_ONE_WINDOW)
    return texts


def manifest_entries(outcome: RunResult) -> dict[str, Any]:
    """The result as entries of the manifest; what is not known is null, with the reason in ``notes``."""
    study, selected = outcome.study, outcome.unselected
    entries = {
        "total_effect": _entries(outcome.total),
        "peak_layer": outcome.peak_layer,
        "peak_effect": _peak_value(outcome, "effect"),
        "label_is_predicted": outcome.labels_are_predicted,
        "peak": {name: _peak_value(outcome, name) for name in ("layer", "head", "tokens", "window")},
        **_peak_group(outcome),
    }
    if selected is not None:
        total = _entries(selected.total)
        entries["unselected"] = {"n": selected.images, "total_effect": total, "peak_layer": selected.peak_layer}
    if outcome.needed is not None:
        width, clusters = outcome.needed
        entries["planning"] = {"interval_width": width, "clusters": clusters, "has": outcome.clusters}
    entries["statistics"] = {
        "interval": study.interval,
        "resamples": RESAMPLES,
        "sign_flips": FLIPS,
        "tests": study.metric if study.test is Tested.HEADLINE else Metric.LOG_ODDS,
        "images": len(outcome.examples),
        "clusters": outcome.clusters,
    }
    return entries | {"notes": [*notes(outcome), *[NO_PEAK] * (outcome.peak is None)]}


def _entries(estimate: Estimate) -> dict[str, float | None]:
    values = {name: getattr(estimate, name) for name in ("mean", "se", "low", "high")}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def _peak_value(outcome: RunResult, column: str) -> Any:
    if outcome.peak is None:
        return None
    value = outcome.peak[column]
    return value.item() if hasattr(value, "item") else value


def _peak_group(outcome: RunResult) -> dict[str, Any]:
    """The layers that may be the peak, how often the peak is it in resamples, its size from split halves."""
    group = outcome.peak_group
    if group is None:
        return {"peak_set": None, "peak_stability": None, "peak_effect_split_halves": None}
    layers = outcome.summary["layer"].to_numpy()[group.members]
    stability = float(outcome.peak["peak_share"])
    return {
        "peak_set": sorted({int(layer) for layer in layers}),
        "peak_stability": None if np.isnan(stability) else stability,
        "peak_effect_split_halves": None if np.isnan(group.size) else group.size,
    }


def tracker_values(outcome: RunResult) -> dict[str, Any]:
    """The tracker's summary values."""
    examples = outcome.examples
    values = {
        "total_effect": _entries(outcome.total)["mean"],
        "peak_layer": outcome.peak_layer,
        "peak_effect": _peak_value(outcome, "effect"),
    }
    for base_run in BaseRun:
        values[f"prob_{base_run}"] = float(examples[f"prob_{base_run}"].mean())
        values[f"accuracy_{base_run}"] = float((examples[f"pred_{base_run}"] == examples["label"]).mean())
    return values


def closing_lines(outcome: RunResult, folder: RunFolder, title: str, more_notes: Sequence[str] = ()) -> list[str]:
    """The few lines that end a run; ``more_notes`` are those on its labels and probabilities."""
    values, images = tracker_values(outcome), len(outcome.examples)
    corrupt = f", corrupt {values['accuracy_corrupt']:.3f}" * outcome.study.depends_on_corruption
    clusters = f" in {counted(outcome.clusters, 'cluster')}" * (outcome.clusters < images)
    total = f"{_with_interval(outcome.total)} on {outcome.study.metric}"
    if np.isnan(outcome.total.mean):
        total = f"none on {outcome.study.metric} (donor {outcome.study.donor})"
    texts = [
        f"{folder.path}",
        f"  run           {title}",
        f"  accuracy      clean {values['accuracy_clean']:.3f}{corrupt}",
        f"  total effect  {total}, n = {counted(images, 'image')}{clusters}",
    ]
    texts += [f"  note          {note}" for note in [*more_notes, *notes(outcome)]]
    texts += _peak_lines(outcome)
    if outcome.needed is not None:
        width, needed = outcome.needed
        takes = counted(needed, "cluster")
        texts.append(f"  planning      an interval {width:.2g} wide at the peak takes about {takes}")
    pictures = ", ".join(sorted(path.name for path in folder.figures.iterdir()))
    return [*texts, f"  pictures      {pictures} in figures/"]


def _peak_lines(outcome: RunResult) -> list[str]:
    peak, series = outcome.peak, outcome.peak_series
    if peak is None:
        return ["  peak layer    none: the mean total effect is 0"]
    share = "" if np.isnan(peak["recovered"]) else f", {peak['recovered']:.0%} of the total effect"
    where = f"{outcome.peak_layer} ({series})" if series else str(outcome.peak_layer)
    texts = [f"  peak layer    {where}: {_with_interval(_estimate(peak, 'effect'))}{share}", *_peak_set_line(outcome)]
    for donor in outcome.controls:
        images = int(peak[f"n_{donor}"])
        some = f", n = {counted(images, 'image')}" * (images < len(outcome.examples))
        texts.append(f"  control       {donor} there: {_with_interval(_estimate(peak, f'effect_{donor}'))}{some}")
    return texts


def _peak_set_line(outcome: RunResult) -> list[str]:
    entries, group = _peak_group(outcome), outcome.peak_group
    if entries["peak_stability"] is None:
        return []
    layers = ", ".join(map(str, entries["peak_set"]))
    places = f"layer{'s' * (',' in layers)} {layers}"
    if not outcome.summary["layer"].iloc[group.rows].is_unique:
        places = f"{len(group.members)} of {len(group.rows)} places, in {places}"
    return [
        f"  peak set      {places}; in {entries['peak_stability']:.0%} of resamples the peak is this one; "
        f"{entries['peak_effect_split_halves']:+.3f} from split halves"
    ]


def _estimate(row: pd.Series, column: str) -> Estimate:
    return Estimate(row[column], np.nan, row[f"{column}_low"], row[f"{column}_high"])


def _with_interval(estimate: Estimate) -> str:
    if np.isnan(estimate.mean):
        return "none: no included image has such a partner"
    if not estimate.known:
        return f"{estimate.mean:+.3f} (one cluster: no interval)"
    return format_interval(estimate.mean, estimate.low, estimate.high)
