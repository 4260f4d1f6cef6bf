"""A run's result from the files that it left, its status, and the result in words; needs no model."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitpatch.formatting import corruption_name, format_count, format_interval, one_line, override_key
from vitpatch.io import nan_to_none
from vitpatch.plots.finding import finding_sentences
from vitpatch.runs.folder import RunFolder
from vitpatch.schema import OBJECT_OVERLAP
from vitpatch.stats.finding import find
from vitpatch.stats.inference import FLIPS, RESAMPLES
from vitpatch.stats.recovered import clusters_to_exclude_zero
from vitpatch.stats.result import RunResult, is_handover
from vitpatch.stats.suggestions import Possible, suggest
from vitpatch.stats.summary import estimates
from vitpatch.study import VIEW_KEYS, run_title, without_view
from vitpatch.types import BaseRun, Direction, Estimate, Include, Metric, Tested

PACKAGE = Path(__file__).parents[1]
OF_ONE_VIEW = ("unselected", "planning")
"""Entries of a manifest that it has in some views."""
MOST_OVERLAP = 0.5
"""Of the object's patches, in a control for the object."""


def notes(result: RunResult, calibration: Mapping[str, Any] | None = None) -> list[str]:
    """What a reader of the means must know beside the finding; ``calibration`` is the manifest's."""
    study, summary, selected = result.study, result.summary, result.unselected
    texts = _calibration_notes(result, calibration) if calibration else []
    if result.labels_are_predicted:
        texts.append("the images have no labels: each one's is what the clean run predicts, so the clean accuracy is 1")
    if empty := int(result.examples["has_empty_group"].sum()):
        where = f"images in which a token group has no token: {empty}"
        texts.append(f"{where}; their effect there is 0, and they are in the means")
    if OBJECT_OVERLAP in result.examples and result.examples[OBJECT_OVERLAP].notna().any():
        overlap = result.examples[OBJECT_OVERLAP].mean()
        hardly = "; warning: it is hardly a control, being mostly the object itself" * bool(overlap > MOST_OVERLAP)
        texts.append(f"of random_object's patches {overlap:.0%} are the object's, on average{hardly}")
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
    elif is_handover(summary) and summary["recovered"].isna().all():
        texts.append("there is no picture of the handover: nothing is known of what is recovered")
    elif is_handover(summary) and summary["window"].nunique() > 1:
        texts.append("there is no picture of the handover: it is drawn where there is one window")
    return texts


def _calibration_notes(result: RunResult, calibration: Mapping[str, Any]) -> list[str]:
    """That the damage which a run was calibrated to lies outside the interval of the run's own damage, if it does.

    Nothing is said of images that were chosen by the damage.
    """
    if result.study.include.selects_on_the_outcome:
        return []
    examples, wanted = result.examples, calibration["wanted"]
    is_prob = calibration["damage"] == "prob_drop"
    scores = [examples[f"prob_{run}"] if is_prob else examples[f"pred_{run}"] == examples["label"] for run in BaseRun]
    drops = scores[0].to_numpy(float) - scores[1].to_numpy(float)
    (drop,) = estimates(drops[:, None], examples["cluster"].to_numpy(), result.study.seed)
    if not drop.known or drop.low <= wanted <= drop.high:
        return []
    own = format_interval(drop.mean, drop.low, drop.high, ".3f")
    images = "these images" if result.study.include.rule is Include.ALL else "the included images"
    where = f"calibrate={calibration['asked']}: over {images} the drop is {own}"
    return [f"{where}, which leaves the wanted {wanted:.3g} out"]


def _notes_on_empty_values(result: RunResult) -> list[str]:
    """Why values of the summary and the manifest are empty."""
    texts = []
    if not result.study.donor.is_constant and result.summary["recovered"].isna().all():
        texts.append(_why_recovered_is_empty(result))
    return texts + ["peak_layer is null: the mean total effect is 0 and has no direction"] * (result.peak is None)


def _why_recovered_is_empty(result: RunResult) -> str:
    total = result.total
    if total.mean == 0:
        return "recovered is empty: the total effect is 0"
    if not total.known:
        return f"recovered is empty: the total effect has no {result.study.interval} interval"
    reason = f"recovered is empty: the interval of the total effect holds 0, {estimate_words(total)}"
    if (needed := clusters_to_exclude_zero(total, result.clusters)) is not None:
        has = f"{format_count(needed, 'cluster')}, of which there are {result.clusters}"
        reason += f"; if it stays as large, about {has}, leave 0 out"
    return reason


def manifest_entries(result: RunResult, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The result as entries of the manifest, of which ``config`` and ``calibration`` are known.

    What is not known is null, with the reason in ``notes``; these begin with the ``label_notes``.
    """
    study, selected, group, peak = result.study, result.unselected, result.peak_group, _peak(result)
    entries = {
        "finding": finding_sentences(result, find(result), corruption_name(manifest["config"]["corruption"])),
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
    own = [*notes(result, manifest.get("calibration")), *_notes_on_empty_values(result)]
    return entries | {"notes": [*manifest.get("label_notes", ()), *own]}


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
    study, entries = result.study, manifest_entries(result, manifest)
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
        "next": [],  # the run's own follow from another finding
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


def next_runs(result: RunResult, folder: RunFolder, typed: Sequence[str], possible: Possible) -> list[tuple[str, str]]:
    """What to run next: a reason and a command each, made of what was ``typed`` to start the run."""
    runs = []
    for suggestion in suggest(result, find(result), possible):
        changes = suggestion.overrides
        is_read = set(changes) <= set(VIEW_KEYS)
        runs.append((suggestion.reason, (read_command(folder, changes) if is_read else run_command(typed, changes))))
    return runs


def run_command(typed: Sequence[str], overrides: Mapping[str, str]) -> str:
    """The command of another run, quoted for a shell: the arguments ``typed``, with other values of some keys.

    Where the option of a group is changed, keys that were typed of the former option are left out; so are those that
    belong to the one start.
    """
    groups = {key for key in overrides if key in ("target", "corruption")}
    dropped = {"overwrite", "dry_run", *overrides}
    kept = [
        argument
        for argument in typed
        if (key := override_key(argument)) not in dropped and key.partition(".")[0] not in groups
    ]
    script = [_python(), os.path.relpath(PACKAGE.parent / "patch.py")]
    changed = [f"{key}={value}" for key, value in overrides.items()]
    return shlex.join([*(_own_command("vitpatch") or script), *kept, *changed])


def read_command(folder: RunFolder, view: Mapping[str, str]) -> str:
    """The command that reads a finished run again in another view."""
    path = os.path.relpath(folder.path)
    path = str(folder.path) if path.startswith("..") else path
    program = _own_command("vitpatch-compare") or [_python(), "-m", "vitpatch.compare"]
    return shlex.join([*program, path, *(part for key, value in view.items() for part in (f"--{key}", value))])


def _own_command(name: str) -> list[str]:
    """One of the package's own commands, where this program is one or the package is a wheel's; else none."""
    if not (PACKAGE / "conf").is_dir() and not Path(sys.argv[0]).stem.startswith("vitpatch"):
        return []
    beside = Path(sys.executable).with_name(name)  # of an installation for one user it is elsewhere, on the path
    return [_found_as(beside) if beside.exists() else name]


def _python() -> str:
    """How this Python is called here."""
    return _found_as(Path(sys.executable), "python")


def _found_as(program: Path, name: str | None = None) -> str:
    """How a program is called here: by its name where a shell finds that one, else by its path."""
    name = name or program.name
    found = shutil.which(name)
    is_it = found is not None and Path(found).parent.resolve() == program.parent.resolve()
    path = os.path.relpath(program)
    return name if is_it else str(program) if path.startswith("..") else path


def closing_lines(
    result: RunResult, folder: RunFolder, manifest: Mapping[str, Any], to_run: Sequence[tuple[str, str]] = ()
) -> list[str]:
    """The few lines that end a run; ``to_run`` next, a reason and a command each."""
    values, images = tracker_values(result), len(result.examples)
    corrupt = f", corrupt {values['accuracy_corrupt']:.3f}" * result.study.depends_on_corruption
    clusters = f" in {format_count(result.clusters, 'cluster')}" * (result.clusters < images)
    all_notes = [*manifest.get("label_notes", ()), *notes(result, manifest.get("calibration"))]
    total = f"{estimate_words(result.total)} on {result.study.metric}"
    if np.isnan(result.total.mean):
        total = f"none on {result.study.metric} (donor {result.study.donor})"
    lines = [
        f"{folder.path}",
        *(f"  {'' if at else 'finding':14}{sentence}" for at, sentence in enumerate(manifest["finding"])),
        f"  run           {manifest['title']}",
        f"  accuracy      clean {values['accuracy_clean']:.3f}{corrupt}",
        f"  total effect  {total}, n = {format_count(images, 'image')}{clusters}",
        *(f"  note          {note}" for note in all_notes),
    ]
    if result.needed is not None:
        width, needed = result.needed
        takes = format_count(needed, "cluster")
        lines.append(f"  planning      an interval {width:.2g} wide at the peak takes about {takes}")
    pictures = ", ".join(sorted(path.name for path in folder.figures.iterdir()))
    lines.append(f"  pictures      {pictures} in figures/")
    for reason, command in to_run:
        lines += [f"  next          {reason}:", f"    {command}"]
    return lines


def estimate_words(estimate: Estimate) -> str:
    """A mean with its interval, or why there is none."""
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
