"""One side of a pair of runs: the effects of its included images, by image and patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vitpatch.compare.comparison import FinishedRun
from vitpatch.errors import VitPatchError
from vitpatch.runs.results import patches_in
from vitpatch.schema import PATCH_COLUMNS
from vitpatch.stats.bootstrap import Array
from vitpatch.stats.result import total_by_image
from vitpatch.types import Direction, Donor, Metric

SAME_PATCH = ("site", "layer", "head", "tokens", "first_layer", "n_layers")
"""What two patches have in common that are one: the window that was asked for may differ where it is clipped."""


@dataclass(frozen=True)
class Side:
    """Of the included images, in order of ``ids`` (images,): ``clusters`` and ``total`` effect (images,), and
    ``effects`` (images, patches) float32, patches as in ``summary.csv``."""

    ids: NDArray[np.int64]
    clusters: NDArray[np.int64]
    total: Array
    effects: Array

    @classmethod
    def of(cls, run: FinishedRun) -> Side:
        """Reads it from a run's files. Raises ``VitPatchError`` where they are broken or do not fit together."""
        try:
            examples, patches = run.examples(), patches_in(run.folder)
            if patches.to_numpy().tolist() != run.summary[list(PATCH_COLUMNS)].to_numpy().tolist():
                raise ValueError("summary.csv and effects.parquet are not of the same patches")
            kept = examples["included"].to_numpy(bool)
            effects = _effects(run, kept, len(patches))
            config = run.manifest["config"]
            total = total_by_image(
                examples, Donor(run.manifest["donors"][0]), Direction(config["direction"]), Metric(config["metric"])
            )
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise VitPatchError(
                f"{run.folder.path}: a file is broken ({reason}); run it again (overwrite=true)"
            ) from error
        ids, clusters = (examples[name].to_numpy(np.int64)[kept] for name in ("example_id", "cluster"))
        return cls(ids, clusters, total[kept], effects)

    def at(self, images: NDArray[np.intp], patches: NDArray[np.intp]) -> tuple[Array, Array]:
        """The effects of some images and patches, and the images' total effects."""
        return self.effects[np.ix_(images, patches)], self.total[images]


def _effects(run: FinishedRun, kept: NDArray[np.bool_], patches: int) -> Array:
    """``effect`` of the images kept, read a row group at a time."""
    effects = np.empty((int(kept.sum()), patches), dtype=np.float32)
    image = row = 0
    with pq.ParquetFile(run.folder.effects) as file:
        for group in range(file.num_row_groups):
            values = file.read_row_group(group, columns=["effect"])["effect"].to_numpy().reshape(-1, patches)
            values = values[kept[image : image + len(values)]]
            image += file.metadata.row_group(group).num_rows // patches
            effects[row : row + len(values)] = values
            row += len(values)
    if image != len(kept):
        raise ValueError(f"{image} images have effects, {len(kept)} have base runs")
    return effects


def same_patches(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """The patches that two summaries have in common: ``SAME_PATCH``, the windows and the rows of both.

    Clipped, several windows of a run may be one patch: each is paired with its own window where the other run has it,
    else the first of one run with the first of the other.
    """
    rows_a, rows_b = _rows_by_patch(a), _rows_by_patch(b)
    both = [
        (*patch, *windows, *rows)
        for patch in rows_a
        if patch in rows_b
        for windows, rows in _met(rows_a[patch], rows_b[patch])
    ]
    return pd.DataFrame(both, columns=[*SAME_PATCH, "window_a", "window_b", "row_a", "row_b"])


def _rows_by_patch(summary: pd.DataFrame) -> dict[tuple, dict[int, int]]:
    """The rows of each patch by window."""
    found: dict[tuple, dict[int, int]] = {}
    columns = (summary[name].tolist() for name in (*SAME_PATCH, "window"))
    for row, (*patch, window) in enumerate(zip(*columns, strict=True)):
        found.setdefault(tuple(patch), {})[window] = row
    return found


def _met(a: dict[int, int], b: dict[int, int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(windows, rows) of one patch in both, from its rows by window."""
    own = [((window, window), (a[window], b[window])) for window in a if window in b]
    return own or [((next(iter(a)), next(iter(b))), (next(iter(a.values())), next(iter(b.values()))))]
