"""Images in files: parquet, folders, one image, a data set saved to disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpatch.data.columns import AUTO
from vitpatch.data.folders import files_below, images_below, images_in, is_image, is_visible, visible_matches
from vitpatch.data.images import ColumnNames
from vitpatch.data.labels import fold
from vitpatch.data.metadata import NAMES as METADATA_NAMES
from vitpatch.data.metadata import Metadata, check_files, log_unread, read_metadata
from vitpatch.data.sources import ImageSource
from vitpatch.errors import ArgumentError, VitPatchError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, kw_only=True)
class ParquetImages(ImageSource):
    """A parquet file, a glob, or a folder with ``SPLIT.parquet`` or ``SPLIT-0….parquet``, as ``datasets`` writes."""

    def rows(self) -> datasets.Dataset:
        """The rows of the file or files, in order of their names."""
        from datasets import Dataset, Features
        from pyarrow import parquet

        path = Path(self.path).expanduser()
        if path.is_file():
            if is_image(path):
                raise VitPatchError(f"data.path {self.path}: is an image; use data=imagefolder data.path={self.path}")
            if self.split is not None:
                raise ArgumentError(f"split {self.split}: data.path {self.path} is one file; leave it null")
            files = [path]
        elif path.is_dir():
            files = self._in_folder(path)
        else:
            files = visible_matches(path)
        if not files:
            raise VitPatchError(
                f"data.path {self.path}: no such file or folder; give a parquet file, a glob, or a folder of them and "
                "its split"
            )
        first, *others = (Features.from_arrow_schema(parquet.read_schema(file)) for file in files)
        if unlike := [file.name for file, features in zip(files[1:], others, strict=True) if features != first]:
            raise VitPatchError(f"data.path {self.path}: {unlike[0]} has other columns or classes than {files[0].name}")
        if not sum(parquet.read_metadata(file).num_rows for file in files):
            raise VitPatchError(f"data.path {self.path}: the selection is empty; there is no row in it")
        return Dataset.from_parquet([str(file) for file in files])

    def _in_folder(self, folder: Path) -> list[Path]:
        """The files of the split; without one, all, where they are not of several."""
        files = sorted(filter(is_visible, folder.glob("*.parquet")))
        splits = sorted({found[1] for file in files if (found := re.match(_SPLIT_FILE, file.name))})
        if self.split is None and len(splits) > 1:
            raise ArgumentError(f"split null: the data have {', '.join(splits)}; choose one")
        if self.split is not None:
            files = [f for f in files if re.fullmatch(rf"{re.escape(self.split)}([-_.]?\d.*)?\.parquet", f.name)]
        if not files:
            raise VitPatchError(
                f"data.path {self.path}: no file {self.split or ''}*.parquet in it; give a parquet file, a glob, or a "
                f"folder of them and its split{f' (one of {chr(44).join(splits)})' if splits else ''}"
            )
        return files


_SPLIT_FILE = r"(train|test|validation|valid|val|dev)([-_.]?\d.*)?\.parquet$"
_OTHER_SPLIT_NAMES = {"validation": ("val", "valid", "dev"), "train": ("training",), "test": ("testing",)}
"""Other names of a split's folder."""


@dataclass(frozen=True, kw_only=True)
class FolderImages(ImageSource):
    """A folder with one folder of images a class, or with such a folder for each split; one image; a folder of images.

    A class folder without any file is a class that has no images here. Files and folders whose names begin with a dot,
    and those that systems leave behind, are not of the data (``vitpatch.data.folders``). ``metadata`` files give
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
        listed = any((path / name).is_file() for name in METADATA_NAMES)
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


@dataclass(frozen=True, kw_only=True)
class DiskImages(ImageSource):
    """A folder written by ``save_to_disk``."""

    def rows(self) -> datasets.Dataset:
        """The rows of the split."""
        from datasets import Dataset, load_from_disk

        path = Path(self.path).expanduser()
        if not path.is_dir():
            raise VitPatchError(f"data.path {self.path}: no such folder; give one that save_to_disk of datasets wrote")
        data = load_from_disk(str(path))
        if isinstance(data, Dataset):
            if self.split is not None:
                raise ArgumentError(f"split {self.split}: the data have no splits; leave it null")
            return data
        return data[_split(self, data)]


def _split(source: ImageSource, splits: Mapping[str, Any]) -> str:
    wanted = source.split or (next(iter(splits)) if len(splits) == 1 else None)
    if wanted not in splits:
        asked = "null" if source.split is None else source.split
        raise ArgumentError(f"split {asked}: the data have {', '.join(splits)}; choose one")
    return wanted
