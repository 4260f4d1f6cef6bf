"""A run's result from the files that it left; needs no model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitpatch.io import atomic_write
from vitpatch.plots.examples import ExampleImage, ExamplePage
from vitpatch.runs.folder import RunFolder
from vitpatch.schema import PAGES_SCHEMA, PATCH_COLUMNS
from vitpatch.stats.result import RunResult, analyze
from vitpatch.stats.summary import Measured
from vitpatch.types import BaseRun, Donor, Study


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
