"""A run's result from the files that it left, its status, and the result in words; needs no model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitpatch.formatting import format_count, format_interval, one_line
from vitpatch.io import atomic_write
from vitpatch.plots.examples import ExampleImage, ExamplePage
from vitpatch.plots.style import doubt_words
from vitpatch.runs.folder import RunFolder
from vitpatch.schema import PAGES_SCHEMA, PATCH_COLUMNS
from vitpatch.stats.inference import FLIPS, RESAMPLES
from vitpatch.stats.recovered import clusters_to_exclude_zero
from vitpatch.stats.result import RunResult, analyze, is_handover
from vitpatch.stats.summary import Measured
from vitpatch.stats.view import depends_on_view, effects_in_view, examples_in_view, stored_columns
from vitpatch.study import Study, View
from vitpatch.types import BaseRun, Direction, Donor, Estimate, Metric, Site, Tested, TokenGroup


def analyze_files(folder: RunFolder, study: Study, donors: Sequence[Donor]) -> RunResult:
    """Means, intervals, tests and the peak, from the merged files.

    Raises ``VitPatchError`` where no image is included.
    """
    examples, patches = pd.read_parquet(folder.examples), read_patches(folder)
    if "label_is_predicted" not in examples:  # of an earlier version
        examples["label_is_predicted"] = False
    measured, examples["has_empty_group"] = _read_effects(folder, examples, len(patches), study, donors)
    leave_outs = pd.read_parquet(folder.leave_outs) if folder.leave_outs.exists() else None
    return analyze(study, donors, examples, patches, measured, leave_outs)


def tables_in_view(tables: Mapping[str, pa.Table], study: Study) -> Mapping[str, pa.Table]:
    """The tables of some images, by the names of their files, from those of the default view."""
    written = View().rival
    examples = examples_in_view(tables["examples"].to_pandas(), study, written)
    changed = {"examples": examples}
    for kind, table in tables.items():
        if kind != "examples":
            names = [name for name in table.column_names if depends_on_view(name)]
            stored = table.select(stored_columns(names, study, written)).to_pandas()
            changed[kind] = effects_in_view(stored, examples, study, written, names)
    return {kind: _replace_columns(table, changed[kind]) for kind, table in tables.items()}


def _replace_columns(table: pa.Table, changed: pd.DataFrame) -> pa.Table:
    """A table with those columns of ``changed`` that depend on the view."""
    for number, field in enumerate(table.schema):
        if depends_on_view(field.name):
            table = table.set_column(number, field, pa.array(changed[field.name].to_numpy(), field.type))
    return table


def read_patches(folder: RunFolder) -> pd.DataFrame:
    """What names each patch, a row each, from the rows of the first image."""
    with pq.ParquetFile(folder.effects) as file:
        first = file.read_row_group(0, columns=["example_id", *PATCH_COLUMNS]).to_pandas()
    return first[first["example_id"] == first["example_id"].iloc[0]][list(PATCH_COLUMNS)].reset_index(drop=True)


def _read_effects(
    folder: RunFolder, examples: pd.DataFrame, patches: int, study: Study, donors: Sequence[Donor]
) -> tuple[Measured, np.ndarray]:
    """What was measured of all images, and whether a token group of an image is empty, a row group at a time."""
    controls = [f"{name}_{donor}" for donor in donors[1:] for name in ("effect", "log_odds")]
    names = ["effect", "log_odds", "prob", "direct_log_odds", "delta_norm", *controls]
    floats = {name: np.empty((len(examples), patches), dtype=np.float32) for name in names}
    correct = np.empty((len(examples), patches), dtype=bool)
    is_empty = np.zeros(len(examples), dtype=bool)
    labels = examples["label"].to_numpy()
    recipient = {name: examples[f"{name}_{study.direction.recipient}"].to_numpy() for name in ("prob", "log_odds")}
    row = 0
    with pq.ParquetFile(folder.effects) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[*names, "pred", "n_tokens"])
            here = slice(row, row + table.num_rows // patches)
            for name, values in floats.items():
                values[here] = table[name].to_numpy().reshape(-1, patches)
                for metric, base in recipient.items():
                    if name.startswith(metric):
                        values[here] -= base[here, None]
            correct[here] = table["pred"].to_numpy().reshape(-1, patches) == labels[here, None]
            is_empty[here] = (table["n_tokens"].to_numpy().reshape(-1, patches) == 0).any(1)
            row = here.stop
    assert row == len(examples), f"{row} images have effects, {len(examples)} have base runs"
    measured = Measured(
        effects=floats["effect"],
        correct=correct,
        log_odds=floats["log_odds"],
        direct=floats["direct_log_odds"],
        delta_norm=floats["delta_norm"],
        prob=floats["prob"],
        controls={name: floats[name] for name in controls},
    )
    return measured, is_empty


def write_pages(path: Path, pages: Sequence[ExamplePage]) -> None:
    """Writes the example pages as ``pages.parquet``, by rename."""
    rows = [_row(page, image) for page in pages for image in page.images]
    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, PAGES_SCHEMA), temporary)


def read_pages(path: Path) -> list[ExamplePage]:
    """The example pages of a finished run."""
    pages: dict[tuple[str, str], list[ExampleImage]] = {}
    for row in pq.read_table(path).to_pylist():
        pages.setdefault((row["page"], row["chosen"]), []).append(_image(row))
    return [ExamplePage(name, chosen, images) for (name, chosen), images in pages.items()]


def _row(page: ExamplePage, image: ExampleImage) -> dict[str, Any]:
    row = {"page": page.name, "chosen": page.chosen, "example_id": image.example_id, "name": image.name}
    for run in BaseRun:
        png = io.BytesIO()
        Image.fromarray(image.pictures[run]).save(png, "PNG")
        row |= {f"{run}_png": png.getvalue(), f"predicted_{run}": image.predicted[run]}
        row[f"metric_{run}"] = image.base[run]
    return row | {"patched": image.patched.tolist()}


def _image(row: Mapping[str, Any]) -> ExampleImage:
    pictures = {run: np.asarray(Image.open(io.BytesIO(row[f"{run}_png"]))) for run in BaseRun}
    predicted = {run: row[f"predicted_{run}"] for run in BaseRun}
    base = {run: row[f"metric_{run}"] for run in BaseRun}
    return ExampleImage(row["example_id"], row["name"], pictures, predicted, base, np.array(row["patched"]))


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
