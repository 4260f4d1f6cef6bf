"""Images in files: parquet, folders, one image, a data set saved to disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vitpatch.columns import AUTO
from vitpatch.data import ColumnNames
from vitpatch.sources import ImageSource
from vitpatch.spec import VitPatchError

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
            if path.suffix.lower() in _image_suffixes():
                raise VitPatchError(f"data.path {self.path}: is an image; use data=imagefolder data.path={self.path}")
            if self.split is not None:
                raise VitPatchError(f"data.split {self.split}: data.path {self.path} is one file; leave it null")
            files = [path]
        elif path.is_dir():
            files = self._in_folder(path)
        else:
            root = Path(path.anchor)
            files = sorted(root.glob(str(path.relative_to(root))))
        if not files:
            raise VitPatchError(
                f"data.path {self.path}: no such file or folder; give a parquet file, a glob, or a folder of them and "
                "data.split"
            )
        first, *others = (Features.from_arrow_schema(parquet.read_schema(file)) for file in files)
        if unlike := [file.name for file, features in zip(files[1:], others, strict=True) if features != first]:
            raise VitPatchError(f"data.path {self.path}: {unlike[0]} has other columns or classes than {files[0].name}")
        if not sum(parquet.read_metadata(file).num_rows for file in files):
            raise VitPatchError(f"data.path {self.path}: the selection is empty; there is no row in it")
        return Dataset.from_parquet([str(file) for file in files])

    def _in_folder(self, folder: Path) -> list[Path]:
        """The files of the split; without one, all, where they are not of several."""
        files = sorted(folder.glob("*.parquet"))
        splits = sorted({found[1] for file in files if (found := re.match(_OF_A_SPLIT, file.name))})
        if self.split is None and len(splits) > 1:
            raise VitPatchError(f"data.split null: the data have {', '.join(splits)}; choose one")
        if self.split is not None:
            files = [f for f in files if re.fullmatch(rf"{re.escape(self.split)}([-_.]?\d.*)?\.parquet", f.name)]
        if not files:
            raise VitPatchError(
                f"data.path {self.path}: no file {self.split or ''}*.parquet in it; give a parquet file, a glob, or a "
                f"folder of them and data.split{f' (one of {chr(44).join(splits)})' if splits else ''}"
            )
        return files


_OF_A_SPLIT = r"(train|test|validation|valid|val|dev)([-_.]?\d.*)?\.parquet$"
_CALLED = {"validation": ("val", "valid", "dev"), "train": ("training",), "test": ("testing",)}
"""Other names of a split's folder."""


@dataclass(frozen=True, kw_only=True)
class FolderImages(ImageSource):
    """A folder with one folder of images a class, or with such a folder for each split; one image; a folder of images.

    A single image, and loose ones with ``label_column=None``, have no labels.
    """

    def rows(self) -> datasets.Dataset:
        """The rows in order of class, then file name."""
        path = Path(self.path).expanduser()
        if path.is_file():
            if self.split is not None:
                raise VitPatchError(f"data.split {self.split}: data.path {self.path} is one image; leave it null")
            return _of_files([path])
        if not path.is_dir():
            raise VitPatchError(
                f"data.path {self.path}: no such folder; give a folder with one folder of images a class, or an image"
            )
        folder = self._of_split(path)
        if self.label_column is None:
            return _of_files(_images_below(folder))
        return self._by_class(folder)

    def _of_split(self, path: Path) -> Path:
        """The folder of the split, or ``path`` itself where it has the classes."""
        inside = sorted(folder for folder in path.iterdir() if folder.is_dir() and _images_below(folder))
        names = ", ".join(folder.name for folder in inside) or "no folder of images"
        if self.split is not None:
            called = (self.split, *_CALLED.get(self.split, ()))
            found = next((folder for name in called for folder in inside if folder.name == name), None)
            if found is None:
                raise VitPatchError(
                    f"data.split {self.split}: the data have {names}; choose one, or null for all of it"
                )
            return found
        flat = [bool(_images_in(folder)) for folder in inside]
        if self.label_column is None or _images_in(path) or all(flat):
            return path
        if any(flat):
            raise VitPatchError(
                f"data.path {self.path}: the images in {names} lie at different depths; data.split names one of them"
            )
        if len(inside) > 1:
            raise VitPatchError(f"data.split null: the data have {names}; choose one")
        return inside[0]

    def _by_class(self, folder: Path) -> datasets.Dataset:
        """Images by the folder that they are in; a ``metadata`` file beside them is read as ``datasets`` does."""
        from datasets import load_dataset

        if any(folder.glob("metadata.*")):
            return load_dataset("imagefolder", data_dir=str(folder), data_files="**", split="train")
        classes = sorted(f for f in folder.iterdir() if f.is_dir() and _images_below(f))
        if _images_in(folder) or not classes:
            what = "a loose image?" if classes or _images_in(folder) else "no image is below it"
            raise VitPatchError(
                f"data.path {self.path}: its images are not in one folder a class ({what}); without labels: "
                "data.label_column=null"
            )
        files = [_images_below(of_class) for of_class in classes]
        labels = [label for label, of_class in enumerate(files) for _ in of_class]
        return _of_files([file for of_class in files for file in of_class], labels, [f.name for f in classes])

    def asked(self, features: Mapping[str, Any]) -> ColumnNames:
        """The columns as the keys name them; loose images have no labels."""
        columns = super().asked(features)
        return replace(columns, label=None) if columns.label == AUTO and "label" not in features else columns


def _of_files(files: list[Path], labels: list[int] | None = None, names: list[str] | None = None) -> datasets.Dataset:
    """Rows of image files, with labels where they have some."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    columns: dict[str, Any] = {"image": [{"bytes": None, "path": str(file)} for file in files]}
    features = {"image": ImageFeature(decode=False)}
    if labels is not None:
        columns, features = columns | {"label": labels}, features | {"label": ClassLabel(names=names)}
    return Dataset.from_dict(columns, features=Features(features))


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _image_suffixes())


def _images_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _image_suffixes())


@dataclass(frozen=True, kw_only=True)
class DiskImages(ImageSource):
    """A folder written by ``save_to_disk``."""

    def rows(self) -> datasets.Dataset:
        """The rows of the split."""
        from datasets import Dataset, load_from_disk

        path = Path(self.path).expanduser()
        if not path.is_dir():
            raise VitPatchError(f"data.path {self.path}: no such folder; give one that save_to_disk of datasets wrote")
        found = load_from_disk(str(path))
        if isinstance(found, Dataset):
            if self.split is not None:
                raise VitPatchError(f"data.split {self.split}: the data have no splits; leave it null")
            return found
        return found[_split(self, found)]


def _split(source: ImageSource, splits: Mapping[str, Any]) -> str:
    wanted = source.split or (next(iter(splits)) if len(splits) == 1 else None)
    if wanted not in splits:
        asked = "null" if source.split is None else source.split
        raise VitPatchError(f"data.split {asked}: the data have {', '.join(splits)}; choose one")
    return wanted


@cache
def _image_suffixes() -> set[str]:
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN} - {".pdf"}
