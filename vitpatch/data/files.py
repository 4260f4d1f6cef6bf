"""Images in a data set saved to disk and on the hub; and which files are of the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitpatch.data.sources import ImageSource, features_of, is_image, is_visible
from vitpatch.errors import ArgumentError, VitPatchError
from vitpatch.hub import commit_of, local_copy, resolve_path

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)


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
        split = self.split or (next(iter(data)) if len(data) == 1 else None)
        if split not in data:
            raise ArgumentError(f"split {self.split or 'null'}: the data have {', '.join(data)}; choose one")
        return data[split]


@dataclass(frozen=True, kw_only=True)
class HubImages(ImageSource):
    """A data set of the Hugging Face hub by its id, or its local copy.

    ``config_name`` where it has several, ``revision`` a commit or tag. ``streaming`` reads the rows where they are, for
    what does not fit the disk: they are gone through once for the labels and once for the images.
    """

    config_name: str | None = None
    revision: str | None = None
    streaming: bool = False

    def rows(self) -> datasets.Dataset | datasets.IterableDataset:
        """The rows of the split, downloaded or from the cache, or a stream of them."""
        from datasets import enable_progress_bars

        where = resolve_path(self.path, "data.path")
        if self.split is None:
            raise ArgumentError("split is missing: name the split, such as split=test")
        if Path(where).is_dir():
            if self.revision is not None:
                raise VitPatchError(f"data.revision {self.revision}: {self.path} is a local folder; leave it null")
        else:  # a download may take long
            enable_progress_bars()
        try:
            return self._load(where, self.revision)
        except ConnectionError:  # datasets looks for what it prepared itself, not for what was downloaded
            if (copy := local_copy(where, self.revision, "dataset")) is None:
                raise
        return self._load(str(copy), None)

    def _load(self, where: str, revision: str | None) -> datasets.Dataset | datasets.IterableDataset:
        from datasets import load_dataset, load_dataset_builder

        if Path(where).is_dir():
            of_splits = load_dataset_builder(where, self.config_name).config.data_files or {}
            _check_all_are_of_a_split(Path(where), of_splits)
            _check_same_classes([Path(file) for file in of_splits.get(self.split, ()) if file.endswith(".parquet")])
        return load_dataset(where, self.config_name, revision=revision, split=self.split, streaming=self.streaming)

    def fingerprint(self) -> str:
        """What stands for the images of a stream: the commit on the hub, or names, sizes and times of local files."""
        path = Path(self.path).expanduser()
        if not path.is_dir():
            commit = commit_of(self.path, self.revision, "dataset") or self.revision
            return f"{self.path} {self.config_name} {self.split} {commit}"
        files = [file for file in files_below(path) if file.is_file()]
        return " ".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)


def _check_all_are_of_a_split(folder: Path, of_splits: Mapping[str, Sequence[str]]) -> None:
    """Logs images below a folder that are in none of the splits that ``datasets`` finds there (files by split).

    Raises ``VitPatchError`` where it took words in files' names for splits: such images lie beside others of a split.
    """
    listed = {Path(file) for files in of_splits.values() for file in files}
    absolute = folder.absolute()
    are_images = listed and not any(file.suffix == ".parquet" for file in listed)
    lost = [file for file in images_below(absolute) if file not in listed] if are_images else []
    if not lost:
        return
    splits = ", ".join(map(str, of_splits))
    what = f"{len(lost)} images, such as {lost[0].relative_to(absolute)}, are in none of its splits ({splits})"
    if {file.parent for file in lost} & {file.parent for file in listed}:
        raise VitPatchError(
            f"data.path {folder}: {what}: datasets takes words in files' names for splits; data=imagefolder does not"
        )
    log.warning("data.path %s: %s", folder, what)


def _check_same_classes(files: Sequence[Path]) -> None:
    """Raises ``VitPatchError`` where parquet files number classes differently: all would be read like the first."""
    classes = [{name: kind.names for name, kind in features_of(f).items() if hasattr(kind, "names")} for f in files]
    for file, of_file in zip(files, classes, strict=True):
        if of_file != classes[0]:
            raise VitPatchError(f"data.path {file.parent}: {file.name} has other classes than {files[0].name}")


def files_below(folder: Path) -> list[Path]:
    """All visible files below a folder, at any depth, also behind links to folders; ascending."""
    return sorted(_walk(folder, tuple(folder.resolve().parents)))


def _walk(folder: Path, above: tuple[Path, ...]) -> list[Path]:
    real = folder.resolve()
    if real in above:  # a link to a folder that it lies in
        return []
    files = []
    for entry in filter(is_visible, folder.iterdir()):
        files += _walk(entry, (*above, real)) if entry.is_dir() else [entry]  # a broken link is a file, and is reported
    return files


def images_below(folder: Path) -> list[Path]:
    """The visible images at any depth below a folder, ascending."""
    return [file for file in files_below(folder) if is_image(file)]


def images_in(folder: Path) -> list[Path]:
    """The visible images that lie in a folder itself, ascending."""
    return sorted(file for file in folder.iterdir() if is_visible(file) and is_image(file) and not file.is_dir())
