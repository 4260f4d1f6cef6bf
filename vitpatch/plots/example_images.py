"""The images on a run's example pages, as they are kept in ``pages.parquet``: to be drawn without data or model."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from vitpatch.io import written_beside
from vitpatch.types import BaseRun

PREDICTED = " (predicted)"
"""What a person reads after a label that the image does not have."""

SCHEMA = pa.schema(
    [("page", pa.string()), ("chosen", pa.string()), ("example_id", pa.int64()), ("name", pa.string())]
    + [(f"{run}_png", pa.binary()) for run in BaseRun]
    + [(f"predicted_{run}", pa.string()) for run in BaseRun]
    + [(f"metric_{run}", pa.float64()) for run in BaseRun]
    + [("patched", pa.list_(pa.float64()))]
)
"""One row an image of a page, in their order; ``chosen`` says in words how the page's images were picked.

``*_png`` are the images as the model was given them; ``metric_*`` and ``patched`` the headline metric of the base runs
and, a value a patch, of the patched ones.
"""


def label_words(example: Mapping[str, Any]) -> str:
    """The label of a row of ``examples.parquet`` as a person reads it."""
    return str(example["label_name"]) + PREDICTED * bool(example["label_is_predicted"])


@dataclass(frozen=True)
class ShownImage:
    """One image of a page: ``pictures`` (height, width, 3) uint8, predictions and metric of the base runs; ``patched``
    (patches,), the metric of the patched ones."""

    example_id: int
    name: str
    pictures: Mapping[BaseRun, NDArray[np.uint8]]
    predicted: Mapping[BaseRun, str]
    base: Mapping[BaseRun, float]
    patched: NDArray[np.floating]


@dataclass(frozen=True)
class Page:
    """A page's name, how its images were picked in words, and these."""

    name: str
    chosen: str
    images: Sequence[ShownImage]


@dataclass(frozen=True)
class Shown:
    """All pages of a run."""

    of_run: Sequence[Page]

    def pages(self) -> Iterator[tuple[str, str, Sequence[ShownImage]]]:
        """(name, how its images were picked, images) of each page."""
        return ((page.name, page.chosen, page.images) for page in self.of_run)

    def write(self, path: Path) -> None:
        """Writes the pages' file, by rename."""
        rows = [_row(page, image) for page in self.of_run for image in page.images]
        with written_beside(path) as beside:
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), beside)

    @classmethod
    def read(cls, path: Path) -> Shown:
        """The pages of a finished run."""
        pages: dict[tuple[str, str], list[ShownImage]] = {}
        for row in pq.read_table(path).to_pylist():
            pages.setdefault((row["page"], row["chosen"]), []).append(_image(row))
        return cls([Page(name, chosen, images) for (name, chosen), images in pages.items()])


def _row(page: Page, image: ShownImage) -> dict[str, object]:
    row = {"page": page.name, "chosen": page.chosen, "example_id": image.example_id, "name": image.name}
    for run in BaseRun:
        png = io.BytesIO()
        Image.fromarray(image.pictures[run]).save(png, "PNG")
        row |= {f"{run}_png": png.getvalue(), f"predicted_{run}": image.predicted[run]}
        row[f"metric_{run}"] = image.base[run]
    return row | {"patched": image.patched.tolist()}


def _image(row: Mapping[str, object]) -> ShownImage:
    pictures = {run: np.asarray(Image.open(io.BytesIO(row[f"{run}_png"]))) for run in BaseRun}
    predicted = {run: row[f"predicted_{run}"] for run in BaseRun}
    base = {run: row[f"metric_{run}"] for run in BaseRun}
    return ShownImage(row["example_id"], row["name"], pictures, predicted, base, np.array(row["patched"]))
