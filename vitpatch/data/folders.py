"""A folder of images, whose classes are folders, or are in metadata files: a row an image, named by its file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vitpatch.data.files import files_below, images_below, images_in
from vitpatch.data.labels import fold_name, number_names
from vitpatch.data.sources import AUTO, ImageSource, is_visible
from vitpatch.errors import ArgumentError, VitPatchError
from vitpatch.formatting import first_few

if TYPE_CHECKING:
    import datasets
    import pyarrow

log = logging.getLogger(__name__)

OTHER_SPLIT_NAMES = {"validation": ("val", "valid", "dev"), "train": ("training",), "test": ("testing",)}
"""Other names of a split's folder."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
"""The column of images' paths from the metadata file's folder; ``NAME_file_name`` has those of another column, NAME."""
IMAGE = "image"
"""What ``file_name`` becomes."""


@dataclass(frozen=True, kw_only=True)
class FolderImages(ImageSource):
    """A folder with one folder of images a class, or with such a folder for each split; one image; a folder of images.

    A class folder without any file is a class that has no images here. Files and folders whose names begin with a dot,
    and those that systems leave behind, are not of the data (``vitpatch.data.sources.is_visible``). ``metadata`` files
    give columns to the images that they list. A single image, and loose ones with ``label_column=None``, have no
    labels.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_column == AUTO and Path(self.path).expanduser().is_file():
            object.__setattr__(self, "label_column", None)

    def rows(self) -> datasets.Dataset:
        """The rows in order of class, then file name; of metadata in their order."""
        path = Path(self.path).expanduser()
        if path.is_file():
            if self.split is not None:
                raise ArgumentError(f"split {self.split}: data.path {self.path} is one image; leave it null")
            return Listing.of_files([path]).rows
        if not path.is_dir():
            raise VitPatchError(
                f"data.path {self.path}: no such folder; give a folder with one folder of images a class, or an image"
            )
        folder = self._split_folder(path)
        listing = read_metadata(folder, path)
        if listing is None:
            listing = Listing.of_files(images_below(folder))
        else:
            _check_files(listing, folder, missing=self.on_error == "raise", twice=self.cluster_column is None)
        return self._with_labels(listing, folder)

    def _split_folder(self, path: Path) -> Path:
        """The folder of the split, or ``path`` itself where it has the classes."""
        inside = [folder for folder in _folders_in(path) if images_below(folder)]
        names = ", ".join(folder.name for folder in inside) or "no folder of images"
        if self.split is not None:
            for name in (self.split, *OTHER_SPLIT_NAMES.get(self.split, ())):
                if path / name in inside:
                    return path / name
            raise ArgumentError(f"split {self.split}: the data have {names}; choose one, or null for all of it")
        flat = [bool(images_in(folder)) for folder in inside]
        has_metadata = any((path / name).is_file() for name in METADATA)
        if self.label_column is None or images_in(path) or all(flat) or has_metadata:
            return path
        if any(flat):
            raise VitPatchError(
                f"data.path {self.path}: the images in {names} lie at different depths; the split names one of them"
            )
        if len(inside) > 1:
            raise ArgumentError(f"split null: the data have {names}; choose one")
        return inside[0]

    def _with_labels(self, listing: Listing, folder: Path) -> datasets.Dataset:
        """The rows with the labels of metadata, or else of the folders.

        Raises ``VitPatchError`` where they contradict each other.
        """
        rows, column = listing.rows, self.label_column
        if column == AUTO and "label" in rows.features:
            return _with_folders_names(listing, folder, f"data.path {self.path}: {listing.names}")
        has_labels = "label" in rows.features or any(hasattr(kind, "names") for kind in rows.features.values())
        return rows if column is None or column in rows.features or has_labels else self._by_folders(listing, folder)

    def _by_folders(self, listing: Listing, folder: Path) -> datasets.Dataset:
        """The rows, each labelled by the class folder in ``folder`` that its image is in."""
        from datasets import ClassLabel

        files = listing.images
        if not files or any(file.parent == folder for file in files):
            what = "a loose image?" if files else "no image is below it"
            others = [name for name in listing.rows.features if name not in listing.image_columns]
            hint = f"; data.label_column names the column of {listing.names} with labels: {', '.join(others)}"
            raise VitPatchError(
                f"data.path {self.path}: its images are not in one folder a class ({what}){hint if others else ''}; "
                "without labels: data.label_column=null"
            )
        empty = [] if listing.names else [inside.name for inside in _folders_in(folder) if not files_below(inside)]
        if empty:
            log.info("data.path %s: %s: a class without images", self.path, ", ".join(empty))
        numbers, names = number_names([file.relative_to(folder).parts[0] for file in files], empty)
        return listing.rows.add_column("label", numbers.tolist(), feature=ClassLabel(names=list(names)))


@dataclass(frozen=True)
class Listing:
    """Rows with one image file each. ``image_columns`` hold files; ``names`` are the metadata files, "" without any."""

    rows: datasets.Dataset
    image_columns: Sequence[str] = (IMAGE,)
    names: str = ""

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Listing:
        """The files without metadata."""
        import pyarrow

        return cls(_as_images(pyarrow.table({IMAGE: pyarrow.array(map(str, files), "string")}), [IMAGE]))

    @cached_property
    def images(self) -> list[Path]:
        """The file of each row's image: other columns of files hold masks and counterparts."""
        return self.files(IMAGE if IMAGE in self.image_columns else self.image_columns[0])

    def files(self, column: str) -> list[Path | None]:
        """The files in a column."""
        return [stored and Path(stored["path"]) for stored in self.rows[column]]


def _as_images(table: pyarrow.Table, columns: Sequence[str]) -> datasets.Dataset:
    """Rows whose ``columns`` of paths are images."""
    from datasets import Dataset, Image

    rows = Dataset(table)
    for column in columns:
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def read_metadata(folder: Path, top: Path) -> Listing | None:
    """The rows of metadata files for images below ``folder``; ``None`` where there is no such row.

    The files lie at any depth below it, or above it up to ``top``. Those of another format (metadata.tsv) are logged.
    Raises ``VitPatchError`` for what cannot be read.
    """
    from datasets import concatenate_datasets

    above = [parent for parent in folder.parents if parent == top or top in parent.parents]
    files = [*(file for parent in above for file in sorted(filter(is_visible, parent.iterdir()))), *files_below(folder)]
    parts: list[Listing] = []
    for file in files:
        if file.stem.lower() != "metadata" or not file.is_file():
            continue
        if file.name not in METADATA:
            log.warning("data.path %s: %s is not read; metadata files are %s", top, file.name, ", ".join(METADATA))
            continue
        part = _read_metadata_file(file, folder, top)
        if not len(part.rows):
            continue
        if parts and part.rows.features != parts[0].rows.features:
            raise VitPatchError(f"data.path {top}: {part.names} has other columns than {parts[0].names}")
        parts.append(part)
    if not parts:
        return None
    names = " and ".join(dict.fromkeys(part.names for part in parts)) if len(parts) < 3 else f"{len(parts)} files"
    rows = concatenate_datasets([part.rows for part in parts])  # columns by name
    return Listing(rows, parts[0].image_columns, names)


def _read_metadata_file(file: Path, folder: Path, top: Path) -> Listing:
    """The rows of one metadata file whose images are below ``folder``."""
    import pyarrow
    from pyarrow import csv, json, parquet

    if file.suffix == ".csv":  # empty text is a text, and a name such as NA is no missing value
        table = csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True))
    else:
        table = json.read_json(file) if file.suffix == ".jsonl" else parquet.read_table(file)
    where = f"data.path {top}: {file.relative_to(top)}"
    texts = (pyarrow.string(), pyarrow.large_string())
    keys = [field.name for field in table.schema if f"_{field.name}".endswith(f"_{FILE_NAME}") and field.type in texts]
    if not keys:
        raise VitPatchError(f"{where} has no column {FILE_NAME} of text; it has {', '.join(table.column_names)}")
    columns = {key.removesuffix(FILE_NAME).removesuffix("_") or IMAGE: table[key].to_pylist() for key in keys}
    table = table.drop_columns([*keys, *({*columns} & {*table.column_names} - {*keys})])
    for column, names in columns.items():
        files = [_path_in(file.parent, name, where) for name in names]
        table = table.append_column(column, pyarrow.array(files, "string"))
    listing = Listing(_as_images(table, [*columns]), [*columns], file.name)
    images = listing.images
    if None in images:
        raise VitPatchError(f"{where}: row {images.index(None)} has no {FILE_NAME}")
    inside = [row for row, image in enumerate(images) if folder in image.parents]
    return Listing(listing.rows.select(inside), [*columns], file.name)


def _path_in(folder: Path, name: str | None, where: str) -> str | None:
    """The path of a file name. Raises ``VitPatchError`` where it leaves the metadata file's ``folder``."""
    if not name:
        return None
    path = Path(os.path.normpath(name.replace("\\", "/")))
    if path.is_absolute() or "://" in name or path.parts[0] == "..":
        raise VitPatchError(f"{where}: {FILE_NAME} {name!r}; expected a path inside its folder")
    return str(folder / path)


def _check_files(listing: Listing, folder: Path, missing: bool, twice: bool) -> None:
    """Compares the files that metadata list with those that lie below ``folder``; images in no row are logged.

    Raises ``VitPatchError`` for files that are not there (``missing``), and for images that have two rows (``twice``).
    """
    listed = {file for column in listing.image_columns for file in listing.files(column) if file is not None}
    absent = sorted(file for file in listed if not file.exists())
    if missing and absent:
        raise VitPatchError(
            f"{listing.names} lists {len(absent)} files that are not there: {_list_files(absent, folder)}; "
            "data.on_error=skip leaves them out"
        )
    repeated = [file for file, number in Counter(listing.images).items() if number > 1]
    if twice and repeated:
        raise VitPatchError(
            f"{listing.names} lists {len(repeated)} images more than once: {_list_files(repeated, folder)}; leave one "
            "row of each, or name a column with data.cluster_column whose value such rows share"
        )
    if unlisted := [file for file in images_below(folder) if file not in listed]:
        log.warning(
            "data.path %s: %d images are in no row of %s and are left out: %s",
            folder, len(unlisted), listing.names, _list_files(unlisted, folder),
        )  # fmt: skip


def _with_folders_names(listing: Listing, folder: Path, where: str) -> datasets.Dataset:
    """Labels that are numbers from 0 on, one for each folder, get the names of the folders.

    Raises ``VitPatchError`` where an image lies in a folder with the name of another label.
    """
    from datasets import ClassLabel, Value

    kind, labels = listing.rows.features["label"], listing.rows["label"][:]
    names = getattr(kind, "names", None)
    texts = [None if v is None else names[v] if names and 0 <= v < len(names) else str(v) for v in labels]
    files = [file.relative_to(folder) for file in listing.images]
    all_labels = {fold_name(text) for text in texts if text is not None}
    for file, text in zip(files, texts, strict=True):
        if text is not None and len(file.parts) > 1 and fold_name(file.parts[0]) in all_labels - {fold_name(text)}:
            raise VitPatchError(
                f"{where} calls {file} {text!r}, its folder {file.parts[0]!r}; mend one of them, or say "
                "data.label_column=label for what the file says"
            )
    pairs = {(label, file.parts[0]) for label, file in zip(labels, files, strict=True) if len(file.parts) > 1}
    is_number = isinstance(kind, Value) and kind.dtype.startswith(("int", "uint"))
    is_one_each = len(pairs) == len({label for label, _ in pairs}) == len({name for _, name in pairs}) > 1
    if not is_number or not is_one_each or {*labels} != {*range(len(pairs))}:
        return listing.rows
    return listing.rows.cast_column("label", ClassLabel(names=[name for _, name in sorted(pairs)]))


def _folders_in(folder: Path) -> list[Path]:
    return sorted(inside for inside in folder.iterdir() if inside.is_dir() and is_visible(inside))


def _list_files(files: list[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) if folder in file.parents else str(file) for file in files[:4]]
    return first_few(names, 3)
