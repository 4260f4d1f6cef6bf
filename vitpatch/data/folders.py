"""A folder of images, with their classes as folders or in metadata files: a row an image, named by its file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpatch.data.files import files_below, images_below, images_in, is_visible
from vitpatch.data.images import ColumnNames
from vitpatch.data.labels import fold
from vitpatch.data.sources import AUTO, ImageSource
from vitpatch.errors import ArgumentError, VitPatchError

if TYPE_CHECKING:
    import datasets
    import pyarrow

log = logging.getLogger(__name__)

_OTHER_SPLIT_NAMES = {"validation": ("val", "valid", "dev"), "train": ("training",), "test": ("testing",)}
"""Other names of a split's folder."""
NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
"""The column of images' paths from the metadata file's folder; ``NAME_file_name`` has those of another column, NAME."""
IMAGE = "image"
"""What ``file_name`` becomes."""


@dataclass(frozen=True, kw_only=True)
class FolderImages(ImageSource):
    """A folder with one folder of images a class, or with such a folder for each split; one image; a folder of images.

    A class folder without any file is a class that has no images here. Files and folders whose names begin with a dot,
    and those that systems leave behind, are not of the data (``vitpatch.data.files``). ``metadata`` files give
    columns to the images that they list. A single image, and loose ones with ``label_column=None``, have no labels.
    """

    def rows(self) -> datasets.Dataset:
        """The rows in order of class, then file name; of metadata in their order."""
        path = Path(self.path).expanduser()
        if path.is_file():
            if self.split is not None:
                raise ArgumentError(f"split {self.split}: data.path {self.path} is one image; leave it null")
            return _file_rows([path])
        if not path.is_dir():
            raise VitPatchError(
                f"data.path {self.path}: no such folder; give a folder with one folder of images a class, or an image"
            )
        folder = self._split_folder(path)
        log_unread(folder, path)
        if (metadata := read_metadata(folder, path)) is not None:
            check_files(metadata, folder, missing=self.on_error == "raise", twice=self.cluster_column is None)
            return self._with_labels(metadata, folder).rows()
        files = images_below(folder)
        return _file_rows(files, None if self.label_column is None else self._class_names(files, folder))

    def _split_folder(self, path: Path) -> Path:
        """The folder of the split, or ``path`` itself where it has the classes."""
        inside = [folder for folder in _folders_in(path) if images_below(folder)]
        names = ", ".join(folder.name for folder in inside) or "no folder of images"
        if self.split is not None:
            called = (self.split, *_OTHER_SPLIT_NAMES.get(self.split, ()))
            chosen = next((folder for name in called for folder in inside if folder.name == name), None)
            if chosen is None:
                raise ArgumentError(f"split {self.split}: the data have {names}; choose one, or null for all of it")
            return chosen
        flat = [bool(images_in(folder)) for folder in inside]
        listed = any((path / name).is_file() for name in NAMES)
        if self.label_column is None or images_in(path) or all(flat) or listed:
            return path
        if any(flat):
            raise VitPatchError(
                f"data.path {self.path}: the images in {names} lie at different depths; the split names one of them"
            )
        if len(inside) > 1:
            raise ArgumentError(f"split null: the data have {names}; choose one")
        return inside[0]

    def _class_names(self, files: list[Path], folder: Path, metadata: Metadata | None = None) -> list[str]:
        """The name of the folder, of those in ``folder``, that each image is in."""
        if not files or any(file.parent == folder for file in files):
            what = "a loose image?" if files else "no image is below it"
            says = ""
            if metadata is not None and metadata.features:
                says = f"; data.label_column names the column of {metadata.names} with labels: "
                says += ", ".join(metadata.features)
            raise VitPatchError(
                f"data.path {self.path}: its images are not in one folder a class ({what}){says}; without labels: "
                "data.label_column=null"
            )
        return [file.relative_to(folder).parts[0] for file in files]

    def _with_labels(self, metadata: Metadata, folder: Path) -> Metadata:
        """Labels are the metadata's, else the folders'; raises ``VitPatchError`` where they contradict each other."""
        from datasets import Features, Value

        images = metadata.images
        if self.label_column in (AUTO, "label") and not metadata.has_labels:
            columns = metadata.columns | {"label": self._class_names(images, folder, metadata)}
            return replace(metadata, columns=columns, features=Features(metadata.features | {"label": Value("string")}))
        if self.label_column == AUTO and "label" in metadata.features:
            where = f"data.path {self.path}: {metadata.names}"
            _check_folders_agree(images, _as_text(metadata, "label"), folder, where)
            return _named_by_folders(metadata, folder)
        return metadata

    def classes_without_images(self) -> tuple[str, ...]:
        """The names of class folders that have no file at all, where labels are folders."""
        path = Path(self.path).expanduser()
        if not path.is_dir():
            return ()
        folder = self._split_folder(path)
        if images_in(folder) or read_metadata(folder, path) is not None:
            return ()
        return tuple(inside.name for inside in _folders_in(folder) if not files_below(inside))

    def asked(self, features: Mapping[str, Any]) -> ColumnNames:
        """The columns as the keys name them; a single image has no label."""
        columns = super().asked(features)
        one = columns.label == AUTO and Path(self.path).expanduser().is_file()
        return replace(columns, label=None) if one else columns


def _folders_in(folder: Path) -> list[Path]:
    return sorted(inside for inside in folder.iterdir() if inside.is_dir() and is_visible(inside))


def _as_text(metadata: Metadata, column: str) -> list[str | None]:
    """A column of names, of ClassLabel too, as text."""
    names = getattr(metadata.features[column], "names", None)
    values = metadata.columns[column]
    return [None if v is None else names[v] if names and 0 <= v < len(names) else str(v) for v in values]


def _check_folders_agree(files: list[Path], labels: list[str | None], folder: Path, where: str) -> None:
    """Folders that are called like labels hold these labels' images."""
    called = {fold(label) for label in labels if label is not None}
    for file, label in zip(files, labels, strict=True):
        inside = file.relative_to(folder)
        if label is not None and len(inside.parts) > 1 and fold(inside.parts[0]) in called - {fold(label)}:
            raise VitPatchError(
                f"{where} calls {inside} {label!r}, its folder {inside.parts[0]!r}; mend one of them, or say "
                "data.label_column=label for what the file says"
            )


def _named_by_folders(metadata: Metadata, folder: Path) -> Metadata:
    """Labels that are numbers from 0 on, one for each folder, are called as the folders are."""
    from datasets import ClassLabel, Features, Value

    labels, files = metadata.columns["label"], [file.relative_to(folder) for file in metadata.images]
    called = {(label, file.parts[0]) for label, file in zip(labels, files, strict=True) if len(file.parts) > 1}
    numbers, names = ({pair[at] for pair in called} for at in (0, 1))
    is_number = isinstance(kind := metadata.features["label"], Value) and kind.dtype.startswith(("int", "uint"))
    if not is_number or {*labels} != {*range(len(called))} or not len(called) == len(numbers) == len(names) > 1:
        return metadata
    label = ClassLabel(names=[name for _, name in sorted(called)])
    return replace(metadata, features=Features(metadata.features | {"label": label}))


def _file_rows(files: list[Path], labels: list[str] | None = None) -> datasets.Dataset:
    """Rows of image files, with the names of their classes where they have some."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    columns: dict[str, Any] = {"image": [{"bytes": None, "path": str(file)} for file in files]}
    features = {"image": ImageFeature(decode=False)}
    if labels is not None:
        columns, features = columns | {"label": labels}, features | {"label": Value("string")}
    return Dataset.from_dict(columns, features=Features(features))


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
