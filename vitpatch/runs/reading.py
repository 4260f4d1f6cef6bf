"""Finished runs from their files alone: tables, results and example pages, as they were made or in another view."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitpatch.checks import suggest
from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.io import atomic_write, write_csv, write_json
from vitpatch.plots.examples import MEANS_OF_DRAWS, ExampleImage, ExamplePage
from vitpatch.plots.layout import FigureOptions
from vitpatch.plots.run_figures import draw
from vitpatch.runs.folder import VIEW_FILE, RunFolder
from vitpatch.runs.results import manifest_in_view
from vitpatch.schema import PAGES_SCHEMA, PATCH_COLUMNS
from vitpatch.stats.inference import check_signed
from vitpatch.stats.result import RunResult, analyze, base_metric
from vitpatch.stats.summary import measure, measured_columns
from vitpatch.stats.view import effects_in_view, examples_in_view, stored_columns
from vitpatch.study import VIEW_KEYS, Study, View, read_study, read_view
from vitpatch.types import BaseRun, Donor, Tested

MANIFEST_KEYS = {
    "": "run_id title donors notes seconds identity config model versions counts total_effect peak",
    "identity": "numbers_version weights precision data corruption target window donors direction seed",
    "config": "model data corruption direction metric seed interval",
    "model": "layers weights",
    "versions": "vitpatch",
    "counts": "images",
    "total_effect": "mean low high",
    "peak": "layer head tokens window",
}
"""What the manifest of a finished run must have, by its part ("" = at the top)."""
SUMMARY_COLUMNS = (*PATCH_COLUMNS, "n", "n_clusters", "effect", "effect_low", "effect_high", "recovered", "p")
EXAMPLES_COLUMNS = "example_id label included cluster prob_clean prob_corrupt pred_clean pred_corrupt".split()


@dataclass(frozen=True)
class RunTables:
    """The tables of a run's images as ``study`` reads them; its files are in the view ``written``.

    Without ``written`` they are those of the files, for which nothing needs to be known of the study.
    """

    folder: RunFolder
    study: Study | None = None
    written: View | None = None

    @property
    def is_as_written(self) -> bool:
        """Whether the files have just these tables."""
        return self.written is None or self.study.of_tables == self.written.of_tables

    @cached_property
    def examples(self) -> pd.DataFrame:
        """The rows of ``examples.parquet``."""
        examples = pd.read_parquet(self.folder.examples)
        if "label_is_predicted" not in examples:  # of an earlier version
            examples["label_is_predicted"] = False
        if self.is_as_written:
            return examples
        self._check_stored(self.folder.examples, list(examples))
        return examples_in_view(examples, self.study, self.written.rival)

    @cached_property
    def patches(self) -> pd.DataFrame:
        """What names each patch, a row each."""
        return read_patches(self.folder)

    def effects(self, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
        """Some columns of ``effects.parquet``, a row group at a time, which holds all patches of some images."""
        needed, first = columns, 0
        if not self.is_as_written:
            needed = stored_columns(columns, self.study, self.written.rival)
            self._check_stored(self.folder.effects, columns)
        with pq.ParquetFile(self.folder.effects) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=needed).to_pandas()
                if not self.is_as_written:
                    examples = self.examples[first : first + len(table) // len(self.patches)]
                    table = effects_in_view(table, examples, self.study, self.written.rival, columns)
                    first += len(examples)
                yield table

    def _check_stored(self, file: Path, columns: Sequence[str]) -> None:
        """Raises ``VitPatchError`` where a file of an earlier version has not what these columns are made of."""
        there = pq.read_schema(file).names
        needed = stored_columns([name for name in columns if name in there], self.study, self.written.rival)
        if missing := [name for name in needed if name not in there and name != "label_is_predicted"]:
            view = self.study.view.as_config()
            asked = [f"{key}={view[key]}" for key, value in self.written.as_config().items() if view[key] != value]
            raise VitPatchError(
                f"{self.folder.path}: cannot be read with {', '.join(asked)}: an earlier version made this run and did "
                f"not store {missing[0]}; run it again (overwrite=true)"
            )

    def analyze(self, donors: Sequence[Donor]) -> RunResult:
        """Means, intervals, tests and the peak. Raises ``VitPatchError`` where no image is included."""
        rows = self.effects(measured_columns(donors))
        measured, has_empty_group = measure(rows, self.examples, len(self.patches), self.study.direction, donors)
        examples = self.examples.assign(has_empty_group=has_empty_group)
        leave_outs = pd.read_parquet(self.folder.leave_outs) if self.folder.leave_outs.exists() else None
        return analyze(self.study, donors, examples, self.patches, measured, leave_outs)


def read_patches(folder: RunFolder) -> pd.DataFrame:
    """What names each patch, a row each, from the rows of the first image."""
    with pq.ParquetFile(folder.effects) as file:
        first = file.read_row_group(0, columns=["example_id", *PATCH_COLUMNS]).to_pandas()
    return first[first["example_id"] == first["example_id"].iloc[0]][list(PATCH_COLUMNS)].reset_index(drop=True)


@dataclass(frozen=True)
class RunLocation:
    """A run's folder, its name, which no other run of the comparison has, and ``group``, the name of the folder on the
    command line that it is in."""

    name: str
    group: str
    folder: RunFolder


@dataclass(frozen=True)
class FinishedRun(RunLocation):
    """A finished run, with its manifest and ``summary.csv``: as it was made or, after ``read``, in another view.

    In another view manifest and summary are what they would be had the run been made in it; ``written`` is then the
    view that its files are in, ``analyzed`` its result.
    """

    manifest: Mapping[str, Any]
    summary: pd.DataFrame
    written: View | None = None
    analyzed: RunResult | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        """What can change the run's numbers: what is computed, and how it is read."""
        return self.manifest["identity"] | self.manifest.get("view", {})  # which earlier versions had in the identity

    @property
    def config(self) -> Mapping[str, Any]:
        """The composed config."""
        return self.manifest["config"]

    @property
    def view(self) -> View:
        """How its numbers are read."""
        known = self.config | self.identity
        return read_view(View().as_config() | {key: known[key] for key in VIEW_KEYS if key in known})

    @property
    def study(self) -> Study:
        """What it measures."""
        return read_study(self.config)

    @property
    def donors(self) -> tuple[Donor, ...]:
        """The donor of the run's effects, then those of its controls."""
        return tuple(map(Donor, self.manifest["donors"]))

    @property
    def donor(self) -> Donor:
        """The donor of the run's effects."""
        return self.donors[0]

    @property
    def depth(self) -> int:
        """How many blocks the model has."""
        return self.manifest["model"]["layers"]

    @property
    def finding(self) -> list[str]:
        """In sentences, what its numbers say."""
        return list(self.manifest.get("finding") or ())

    @property
    def tables(self) -> RunTables:
        """The tables of its images."""
        return RunTables(self.folder) if self.written is None else RunTables(self.folder, self.study, self.written)

    @property
    def examples(self) -> pd.DataFrame:
        """The rows of ``examples.parquet``, which is read for them."""
        return self.tables.examples

    @property
    def effects(self) -> pd.DataFrame:
        """The rows of ``effects.parquet``, which is read for them: one an image and patch."""
        return pd.concat(self.tables.effects(pq.read_schema(self.folder.effects).names), ignore_index=True)

    @property
    def result(self) -> RunResult:
        """What its figures are drawn from."""
        return self.analyzed or RunTables(self.folder, self.study).analyze(self.donors)

    @property
    def pages(self) -> list[ExamplePage]:
        """Its example pages: the images that were chosen when it was made, with their metric in this view."""
        pages = read_pages(self.folder.pages) if self.folder.pages.exists() else []
        return pages if self.written is None else _pages_in_view(pages, self)

    @property
    def images(self) -> dict[str, Sequence[ExampleImage]]:
        """The images of its example pages by the page's name, such as ``largest``."""
        return {page.name: page.images for page in self.pages}

    def save(self, path: Path, options: FigureOptions) -> RunFolder:
        """Writes its manifest as ``view.json``, ``summary.csv`` and figures into a folder that is no run's."""
        result, folder = self.result, RunFolder(path)
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(path / VIEW_FILE, self.manifest)
        write_csv(folder.summary, result.summary)
        if result.marginals is not None:
            write_csv(folder.marginals, result.marginals)
        shutil.rmtree(folder.figures, ignore_errors=True)
        folder.save_figures(draw(result, self.pages, self.manifest, options), options)
        return folder

    def read(self, **changes: Any) -> FinishedRun:
        """The run in another view: with another ``metric``, ``rival``, ``include``, ``interval`` or ``test``.

        Values are those of ``patch.py``; what is not given stays. Nothing is computed by a model, and no file changes.
        Raises ``VitPatchError`` for what is no such value, where no image is included, and where the run is of an
        earlier version that did not store what the view needs.
        """
        for key in changes:
            if key not in VIEW_KEYS:
                raise VitPatchError(f"{key}: is not how a run is read; {suggest(key, VIEW_KEYS)}")
        return self.read_as(read_view(self.view.as_config() | changes))

    def read_as(self, view: View) -> FinishedRun:
        """The run in this view, as ``read`` has it."""
        if view == self.view:
            return self
        study, written = self.study.read_as(view), self.written or self.view
        if study.test is Tested.HEADLINE:
            check_signed(study.metric, study.direction)
        result = RunTables(self.folder, study, written).analyze(self.donors)
        manifest = manifest_in_view(self.manifest, result)
        return replace(self, manifest=manifest, summary=result.summary, written=written, analyzed=result)


def _pages_in_view(pages: Sequence[ExamplePage], run: FinishedRun) -> list[ExamplePage]:
    """The same images, with the metric of their base runs and patched runs in the run's view."""
    tables, study = run.tables, run.study
    examples = tables.examples
    base = {run: pd.Series(base_metric(examples, run, study.metric), examples["example_id"]) for run in BaseRun}
    ids = {image.example_id for page in pages for image in page.images}
    patched = {}
    for table in tables.effects(["example_id", "effect"]):
        for example_id, rows in table[table["example_id"].isin(ids)].groupby("example_id"):
            patched[example_id] = base[study.direction.recipient][example_id] + rows["effect"].to_numpy()
    of, was = run.view, run.written
    how = [f"on {was.metric}"] * (of.metric is not was.metric)
    how += [f"of {was.include} images"] * (of.include != was.include)
    chosen = f"chosen {' '.join(how)}: " * bool(how)
    included, in_view = set(run.result.examples["example_id"]), []
    for page in pages:
        images = [
            replace(image, base={r: base[r][image.example_id] for r in BaseRun}, patched=patched[image.example_id])
            for image in page.images
            if image.example_id in included
        ]
        words = chosen + re.sub(MEANS_OF_DRAWS.format(r"\d+"), "", page.chosen)  # the run took draws of its own
        words += f", {len(images)} of them here" * (len(images) < len(page.images))
        if images:
            in_view.append(replace(page, chosen=words, images=images))
    return in_view


def load_run(run: RunLocation | Path | str) -> FinishedRun:
    """Reads a finished run, from its folder or from where a comparison has found it.

    Of its effects only the end of the file is read, which shows that the file is complete. Raises ``VitPatchError`` for
    what is no folder of a finished run, and where a file is of another version, or broken.
    """
    if not isinstance(run, RunLocation):
        folder = RunFolder(Path(run))
        name = folder.path.resolve().name
        run = RunLocation(name, name, folder)
        if not folder.manifest.exists():
            reason = "no finished run of this version is in it" if folder.path.is_dir() else "no such folder"
            raise VitPatchError(f"{folder.path}: {reason}; give a run's")
    try:
        return _load(run)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise broken_run(run.folder, "of another version, or a file is broken", error) from error


def _load(location: RunLocation) -> FinishedRun:
    folder = location.folder
    manifest = read_json(folder.manifest)
    for part, keys in MANIFEST_KEYS.items():
        file = f"manifest.json, {part}," if part else "manifest.json"
        _check_names(file, keys.split(), manifest[part] if part else manifest)
    run = FinishedRun(**vars(location), manifest=manifest, summary=pd.read_csv(folder.summary))
    _check_names("manifest.json, view,", ("metric", "rival", "include"), run.identity)
    _check_names("summary.csv", SUMMARY_COLUMNS, run.summary)
    _check_names("examples.parquet", EXAMPLES_COLUMNS, pq.read_schema(folder.examples).names)
    _check_names("effects.parquet", ("effect", *PATCH_COLUMNS), pq.read_schema(folder.effects).names)
    peak_row(run)
    if folder.pages.exists():
        read_pages(folder.pages)
    return run


def broken_run(folder: RunFolder, what: str, error: Exception) -> VitPatchError:
    """The error of a run whose files cannot be used, in one line."""
    reason = one_line(error, 160)
    return VitPatchError(f"{folder.path}: {what} ({reason}); run it again (overwrite=true)")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's mapping, empty where it holds something else."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _check_names(file: str, expected: Iterable[str], present: Container[str]) -> None:
    if missing := [name for name in expected if name not in present]:
        raise ValueError(f"{file} has no {', '.join(missing)}")


def peak_row(run: FinishedRun) -> pd.Series | None:
    """The row of ``summary.csv`` that the manifest calls the peak; ``None`` where there is no peak."""
    if (peak := run.manifest["peak"])["layer"] is None:
        return None
    is_peak = np.logical_and.reduce([run.summary[name] == value for name, value in peak.items()])
    if not is_peak.any():
        raise ValueError("summary.csv has no row of the manifest's peak")
    return run.summary[is_peak].iloc[0]


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
