"""A run's result from the files that it left, its status, and the result in words; needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from vitpatch.formatting import format_count, format_interval, one_line
from vitpatch.io import nan_to_none
from vitpatch.plots.style import doubt_words
from vitpatch.runs.folder import RunFolder
from vitpatch.stats.inference import FLIPS, RESAMPLES
from vitpatch.stats.recovered import clusters_to_exclude_zero
from vitpatch.stats.result import RunResult, is_handover
from vitpatch.study import run_title, without_view
from vitpatch.types import BaseRun, Direction, Estimate, Metric, Site, Tested, TokenGroup

OF_ONE_VIEW = ("unselected", "planning")
"""Entries of a manifest that it has in some views."""


def notes(result: RunResult) -> list[str]:
    """What a reader of the means must know."""
    study, summary, selected = result.study, result.summary, result.unselected
    texts = []
    if result.labels_are_predicted:
        texts.append("the images have no labels: each one's is what the clean run predicts, so the clean accuracy is 1")
    if empty := int(result.examples["has_empty_group"].sum()):
        where = f"images in which a token group has no token: {empty}"
        texts.append(f"{where}; their effect there is 0, and they are in the means")
    if selected is not None:
        total = "" if np.isnan(selected.total.mean) else f"total effect {selected.total.mean:+.3f}, "
        peak = "no peak layer" if selected.peak_layer is None else f"peak layer {selected.peak_layer}"
        texts.append(
            f"include={study.include}: images are chosen by what the corruption did to them, which biases every mean "
            f"away from 0; of all {format_count(selected.images, 'image')}: {total}{peak}"
        )
    if study.test is Tested.HEADLINE and study.metric is not Metric.LOG_ODDS:
        texts.append(
            f"p is of effects on {study.metric}: a patch that is neutral in log odds has a mean there that is not 0, "
            "and may be called"
        )
    if result.controls and study.direction is Direction.NOISE:
        texts.append(
            "controls take clean activations of other images, the own donor is the corrupted run: they are not compared"
        )
    if study.donor.is_constant:
        texts.append(
            f"donor={study.donor}: is no run, so there is no total effect and recovered is empty; the peak is what "
            "does most harm"
        )
        return texts
    if (summary["tokens"] == TokenGroup.ALL).all() and Site(summary["site"].iloc[0]).is_stream:
        texts.append(
            "the whole residual stream is replaced, so the run is the donor's from there: every layer's effect is the "
            "total effect, and the peak says nothing; target.tokens=[cls,patches] says where it lies"
        )
    if doubt := doubt_words(result.total, study.donor, study.direction):
        texts.append(doubt)
    if not result.total.known:
        texts.append("no interval: all images are of one cluster")
    if summary["recovered"].isna().all():
        texts.append(_why_recovered_is_empty(result))
        if is_handover(summary):
            texts.append("there is no picture of the handover: nothing is known of what is recovered")
    if is_handover(summary) and summary["window"].nunique() > 1:
        texts.append("there is no picture of the handover: it is drawn where there is one window")
    return texts


def _why_recovered_is_empty(result: RunResult) -> str:
    total = result.total
    if total.mean == 0:
        return "recovered is empty: the total effect is 0"
    if not total.known:
        return f"recovered is empty: the total effect has no {result.study.interval} interval"
    reason = f"recovered is empty: the interval of the total effect holds 0, {_with_interval(total)}"
    if (needed := clusters_to_exclude_zero(total, result.clusters)) is not None:
        has = f"{format_count(needed, 'cluster')}, of which there are {result.clusters}"
        reason += f"; if it stays as large, about {has}, leave 0 out"
    return reason


def manifest_entries(result: RunResult) -> dict[str, Any]:
    """The result as entries of the manifest; what is not known is null, with the reason in ``notes``."""
    study, selected, group, peak = result.study, result.unselected, result.peak_group, _peak(result)
    entries = {
        "total_effect": asdict(result.total),
        "peak_layer": result.peak_layer,
        "peak_effect": peak["effect"],
        "label_is_predicted": result.labels_are_predicted,
        "peak": {name: peak[name] for name in ("layer", "head", "tokens", "window")},
        "peak_set": None if group is None else _peak_layers(result),
        "peak_stability": None if group is None else peak["peak_share"],
        "peak_effect_split_halves": None if group is None else group.size,
    }
    if selected is not None:
        total = asdict(selected.total)
        entries["unselected"] = {"n": selected.images, "total_effect": total, "peak_layer": selected.peak_layer}
    if result.needed is not None:
        width, clusters = result.needed
        entries["planning"] = {"interval_width": width, "clusters": clusters, "has": result.clusters}
    entries["statistics"] = {
        "interval": study.interval,
        "resamples": RESAMPLES,
        "sign_flips": FLIPS,
        "tests": study.metric if study.test is Tested.HEADLINE else Metric.LOG_ODDS,
        "images": len(result.examples),
        "clusters": result.clusters,
    }
    no_peak = "peak_layer is null: the mean total effect is 0 and has no direction"
    return entries | {"notes": notes(result) + [no_peak] * (result.peak is None)}


def _peak(result: RunResult) -> dict[str, Any]:
    """The row of the peak, as Python's own numbers; all ``None`` where there is no peak."""
    if result.peak is None:
        return dict.fromkeys(result.summary)
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in result.peak.items()}


def _peak_layers(result: RunResult) -> list[int]:
    """The layers that may be the peak."""
    return sorted({int(layer) for layer in result.summary["layer"].to_numpy()[result.peak_group.members]})


def manifest_in_view(manifest: Mapping[str, Any], result: RunResult) -> dict[str, Any]:
    """The manifest of a run as it would be had it been made in the view of ``result``."""
    study, entries = result.study, manifest_entries(result)
    view, counts, identity = study.view, manifest["counts"], without_view(manifest["identity"])
    config = manifest["config"] | view.as_config() | {"wanted_width": study.wanted_width}
    kind = manifest["model"].get("problem_type")
    calibrated = identity.get("calibrate") if manifest.get("calibration") else None
    title = run_title(config, study, readout=identity.get("readout"), problem_type=kind, calibrated=calibrated)
    alone = result.without_partner
    dropped = {why: number for why, number in counts.get("dropped", {}).items() if not why.startswith("not ")}
    if not_included := counts["read"] - alone - len(result.examples):
        dropped[f"not {study.include}"] = not_included
    in_view = {
        **{key: value for key, value in manifest.items() if key not in OF_ONE_VIEW},
        "title": title,
        "config": config,
        "identity": identity,
        "view_id": view.view_id,
        "view": view.as_config(),
        "counts": counts | {"included": len(result.examples), "dropped": dropped, "clusters": result.clusters},
        **entries,
        "notes": [*manifest.get("label_notes", []), *entries["notes"]],
    }
    return nan_to_none(in_view)


def tracker_values(result: RunResult) -> dict[str, Any]:
    """The tracker's summary values."""
    examples, total = result.examples, result.total.mean
    values = {
        "total_effect": None if np.isnan(total) else total,
        "peak_layer": result.peak_layer,
        "peak_effect": _peak(result)["effect"],
    }
    for base_run in BaseRun:
        values[f"prob_{base_run}"] = float(examples[f"prob_{base_run}"].mean())
        values[f"accuracy_{base_run}"] = float((examples[f"pred_{base_run}"] == examples["label"]).mean())
    return values


def closing_lines(result: RunResult, folder: RunFolder, title: str, more_notes: Sequence[str] = ()) -> list[str]:
    """The few lines that end a run; ``more_notes`` are those on its labels and probabilities."""
    values, images = tracker_values(result), len(result.examples)
    corrupt = f", corrupt {values['accuracy_corrupt']:.3f}" * result.study.depends_on_corruption
    clusters = f" in {format_count(result.clusters, 'cluster')}" * (result.clusters < images)
    total = f"{_with_interval(result.total)} on {result.study.metric}"
    if np.isnan(result.total.mean):
        total = f"none on {result.study.metric} (donor {result.study.donor})"
    lines = [
        f"{folder.path}",
        f"  run           {title}",
        f"  accuracy      clean {values['accuracy_clean']:.3f}{corrupt}",
        f"  total effect  {total}, n = {format_count(images, 'image')}{clusters}",
        *(f"  note          {note}" for note in [*more_notes, *notes(result)]),
        *_peak_lines(result),
    ]
    if result.needed is not None:
        width, needed = result.needed
        takes = format_count(needed, "cluster")
        lines.append(f"  planning      an interval {width:.2g} wide at the peak takes about {takes}")
    pictures = ", ".join(sorted(path.name for path in folder.figures.iterdir()))
    return [*lines, f"  pictures      {pictures} in figures/"]


def _peak_lines(result: RunResult) -> list[str]:
    peak, series, group = result.peak, result.peak_series, result.peak_group
    if peak is None:
        return ["  peak layer    none: the mean total effect is 0"]
    share = "" if np.isnan(peak["recovered"]) else f", {peak['recovered']:.0%} of the total effect"
    where = f"{result.peak_layer} ({series})" if series else str(result.peak_layer)
    lines = [f"  peak layer    {where}: {_with_interval(_estimate(peak, 'effect'))}{share}"]
    if group is not None and not np.isnan(peak["peak_share"]):
        layers = _peak_layers(result)
        places = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        if not result.summary["layer"].iloc[group.rows].is_unique:
            places = f"{len(group.members)} of {len(group.rows)} places, in {places}"
        lines.append(
            f"  peak set      {places}; in {peak['peak_share']:.0%} of resamples the peak is this one; "
            f"{group.size:+.3f} from split halves"
        )
    for donor in result.controls:
        images = int(peak[f"n_{donor}"])
        some = f", n = {format_count(images, 'image')}" * (images < len(result.examples))
        lines.append(f"  control       {donor} there: {_with_interval(_estimate(peak, f'effect_{donor}'))}{some}")
    return lines


def _estimate(row: pd.Series, column: str) -> Estimate:
    return Estimate(row[column], np.nan, row[f"{column}_low"], row[f"{column}_high"])


def _with_interval(estimate: Estimate) -> str:
    if np.isnan(estimate.mean):
        return "none: no included image has such a partner"
    if not estimate.known:
        return f"{estimate.mean:+.3f} (one cluster: no interval)"
    return format_interval(estimate.mean, estimate.low, estimate.high)


@dataclass(frozen=True)
class RunStatus:
    """How a run of a sweep stands; what is not known is ``None``.

    ``status``: finished, ``finished before`` this start, planned, failed, interrupted, running, unfinished (killed), or
    not started (the sweep ended before). Of a finished run its ``seconds``, the layer of its peak, and the effect
    there, on ``metric``.
    """

    run: str
    status: str
    reason: str = ""
    seconds: float | None = None
    peak_layer: int | None = None
    effect: float | None = None
    effect_low: float | None = None
    effect_high: float | None = None
    metric: str = ""

    @property
    def is_done(self) -> bool:
        """Whether a sweep has nothing left to do for the run."""
        return self.status in ("finished", "finished before", "planned")


def read_status(folder: RunFolder, since: float = 0.0) -> RunStatus:
    """The status of the run in a folder; one that was finished before ``since`` is ``finished before``."""
    name = folder.path.name
    if (process := folder.locked_by()) is not None:
        return RunStatus(name, "running", process)
    try:
        status, reason = folder.status()
        if status != "finished":
            return RunStatus(name, status, reason)
        if folder.manifest.stat().st_mtime < since:
            status = "finished before"
        manifest = folder.read_manifest()
        metric = manifest.get("config", {}).get("metric", "")
        return RunStatus(name, status, seconds=manifest.get("seconds"), metric=metric, **_read_peak(folder, manifest))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        return RunStatus(name, "failed", f"its files cannot be read ({one_line(error, 80)})")


def _read_peak(folder: RunFolder, manifest: dict[str, Any]) -> dict[str, Any]:
    """Layer and effect of the row of ``summary.csv`` that the manifest names; nothing where there is no peak."""
    peak = manifest.get("peak") or {}
    if peak.get("layer") is None or not folder.summary.exists():
        return {}
    summary = pd.read_csv(folder.summary)
    row = summary[(summary[list(peak)] == pd.Series(peak)).all(axis=1)].iloc[0]
    effect = {name: float(row[name]) for name in ("effect", "effect_low", "effect_high")}
    return {"peak_layer": int(row["layer"])} | effect
