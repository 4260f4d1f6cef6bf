"""Metadata files of images in folders: a row an image, named by its file, in the forms that ``datasets`` knows."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpatch.data.folders import files_below, images_below, is_visible
from vitpatch.errors import VitPatchError

if TYPE_CHECKING:
    import datasets
    import pyarrow

log = logging.getLogger(__name__)

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
"""The column of images' paths from the metadata file's folder; ``NAME_file_name`` has those of another column, NAME."""
IMAGE = "image"
"""What ``file_name`` becomes."""


@dataclass(frozen=True)
class Metadata:
    """Columns by name, a value a row; those ``of_files`` hold their paths. ``names`` tells the metadata files."""

    columns: dict[str, list[Any]]
    features: datasets.Features
    of_files: tuple[str, ...]
    names: str

    @property
    def images(self) -> list[Path]:
        """The file of each row's image."""
        return self.columns[_main(self.of_files)]

    @property
    def has_labels(self) -> bool:
        """Whether a column is the labels' without being named."""
        from datasets import ClassLabel

        return "label" in self.features or any(isinstance(kind, ClassLabel) for kind in self.features.values())

    def rows(self) -> datasets.Dataset:
        """The rows, their files as images."""
        from datasets import Dataset, Features
        from datasets import Image as ImageFeature

        stored = {
            name: [None if file is None else {"bytes": None, "path": str(file)} for file in self.columns[name]]
            for name in self.of_files
        }
        features = {**self.features, **dict.fromkeys(self.of_files, ImageFeature(decode=False))}
        return Dataset.from_dict({**self.columns, **stored}, features=Features(features))


def read_metadata(folder: Path, top: Path) -> Metadata | None:
    """What metadata files say of the images below ``folder``; ``None`` where there are none, or they say nothing.

    They lie at any depth below it, or above it up to ``top``. Raises ``VitPatchError`` for what cannot be read.
    """
    files = [file for file in _called_metadata(folder, top) if file.name in NAMES]
    parts = [part for file in files if (part := _read(file, folder, top)) is not None]
    if not parts:
        return None
    first = parts[0]
    for part in parts[1:]:
        if part.features != first.features:
            raise VitPatchError(f"data.path {top}: {part.names} has other columns than {first.names}")
    columns = {name: [value for part in parts for value in part.columns[name]] for name in first.columns}
    names = " and ".join(dict.fromkeys(part.names for part in parts)) if len(parts) < 3 else f"{len(parts)} files"
    return Metadata(columns, first.features, first.of_files, names)


def log_unread(folder: Path, top: Path) -> None:
    """Logs the files that are called metadata in a form that is not read."""
    for file in _called_metadata(folder, top):
        if file.name not in NAMES:
            log.warning("data.path %s: %s is not read; metadata files are %s", top, file.name, ", ".join(NAMES))


def _called_metadata(folder: Path, top: Path) -> list[Path]:
    """The files called metadata, in any form, below ``folder`` and above it up to ``top``."""
    above = [parent for parent in folder.parents if parent == top or top in parent.parents]
    there = [*(file for parent in above for file in sorted(filter(is_visible, parent.iterdir()))), *files_below(folder)]
    return [file for file in there if file.stem.lower() == "metadata" and file.is_file()]


def _read(file: Path, folder: Path, top: Path) -> Metadata | None:
    """The rows of one metadata file whose images are below ``folder``."""
    from datasets import Features, Value

    where = f"data.path {top}: {file.relative_to(top)}"
    table = _table(file)
    features = dict(Features.from_arrow_schema(table.schema))
    texts = [Value("string"), Value("large_string")]
    keys = [key for key, kind in features.items() if (f"_{key}").endswith(f"_{FILE_NAME}") and kind in texts]
    if not keys:
        raise VitPatchError(f"{where} has no column {FILE_NAME} of text; it has {', '.join(features)}")
    columns = {key: table[key].to_pylist() for key in features if key not in keys}
    renamed = {key: key.removesuffix(FILE_NAME).removesuffix("_") or IMAGE for key in keys}
    for key, name in renamed.items():
        columns[name] = [_inside(value, file.parent, where) for value in table[key].to_pylist()]
    images = columns[_main(tuple(renamed.values()))]
    if None in images:
        raise VitPatchError(f"{where}: row {images.index(None)} has no {FILE_NAME}")
    kept = [row for row, image in enumerate(images) if folder in image.parents]
    if not kept:
        return None
    columns = {name: [values[row] for row in kept] for name, values in columns.items()}
    rest = {key: kind for key, kind in features.items() if key not in keys and key not in renamed.values()}
    return Metadata(columns, Features(rest), tuple(renamed.values()), file.name)


def _main(of_files: tuple[str, ...]) -> str:
    """The column of the images themselves: others hold masks and counterparts."""
    return IMAGE if IMAGE in of_files else of_files[0]


def _table(file: Path) -> pyarrow.Table:
    """A metadata file; empty text is a text, and a name such as NA is no missing value."""
    from pyarrow import csv, json, parquet

    if file.suffix == ".csv":
        return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True))
    return json.read_json(file) if file.suffix == ".jsonl" else parquet.read_table(file)


def _inside(name: str | None, folder: Path, where: str) -> Path | None:
    """The file of a name, which must lie below the metadata file's folder, as ``datasets`` wants it."""
    if not name:
        return None
    path = Path(os.path.normpath(name.replace("\\", "/")))
    if path.is_absolute() or "://" in name or path.parts[0] == "..":
        raise VitPatchError(f"{where}: {FILE_NAME} {name!r}; expected a path inside its folder")
    return folder / path


def check_files(metadata: Metadata, folder: Path, missing: bool, twice: bool) -> None:
    """Compares the files that metadata list with those that lie below ``folder``; what is not listed is logged.

    Raises ``VitPatchError`` for files that are not there (``missing``), and for images that have two rows (``twice``).
    """
    listed = {file for name in metadata.of_files for file in metadata.columns[name] if file is not None}
    gone = sorted(file for file in listed if not file.exists())
    if missing and gone:
        raise VitPatchError(
            f"{metadata.names} lists {len(gone)} files that are not there: {_some(gone, folder)}; "
            "data.on_error=skip leaves them out"
        )
    again = [file for file, number in Counter(metadata.images).items() if number > 1]
    if twice and again:
        raise VitPatchError(
            f"{metadata.names} lists {len(again)} images more than once: {_some(again, folder)}; leave one row of "
            "each, or name a column with data.cluster_column whose value such rows share"
        )
    if rest := [file for file in images_below(folder) if file not in listed]:
        log.warning(
            "data.path %s: %d images are in no row of %s and are left out: %s",
            folder, len(rest), metadata.names, _some(rest, folder),
        )  # fmt: skip


def _some(files: list[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) if folder in file.parents else str(file) for file in files[:3]]
    return ", ".join(names) + (", …" if len(files) > 3 else "")
