"""Files in folders of images: which are of the data, which a system left there, and which ``datasets`` leaves out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from vitpatch.errors import VitPatchError

log = logging.getLogger(__name__)

LEFT_BY_SYSTEMS = ("__MACOSX", "@eaDir")
"""Folders that macOS puts into archives and network disks beside images, full of files that are named like images."""


def is_visible(path: Path) -> bool:
    """Whether a file or folder is of the data: its name does not begin with a dot, and no system left it there.

    ``datasets`` passes over these too, and over every folder that begins with two underscores: here ``__background__``
    is a class.
    """
    return not path.name.startswith(".") and path.name not in LEFT_BY_SYSTEMS


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


def is_image(path: Path) -> bool:
    """Whether the suffix of a file, in upper or lower case, is one of an image that Pillow opens."""
    return path.suffix.lower() in _image_suffixes()


def images_in(folder: Path) -> list[Path]:
    """The visible images that lie in a folder itself, ascending."""
    return sorted(f for f in folder.iterdir() if is_visible(f) and is_image(f) and not f.is_dir())


def images_below(folder: Path) -> list[Path]:
    """The visible images at any depth below a folder, ascending."""
    return [file for file in files_below(folder) if is_image(file)]


def visible_matches(path: Path) -> list[Path]:
    """The files that a pattern matches, ascending; hidden ones only where the pattern itself names them."""
    root = Path(path.anchor)
    pattern = path.relative_to(root)
    hidden = _hidden_parts(pattern)
    return sorted(file for file in root.glob(str(pattern)) if _hidden_parts(file.relative_to(root)) == hidden)


def _hidden_parts(path: Path) -> int:
    return sum(not is_visible(Path(part)) for part in path.parts)


@cache
def _image_suffixes() -> set[str]:
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN} - {".pdf"}


def check_images_of_splits(folder: Path, of_splits: Mapping[str, Sequence[str]]) -> None:
    """Logs images below a folder that are in none of its splits, which are files by split.

    Words in files' names make splits, of which the other files of their folders are no part: raises ``VitPatchError``.
    """
    listed = {Path(file) for files in of_splits.values() for file in files}
    if not listed or any(file.suffix == ".parquet" for file in listed):
        return
    absolute = folder.absolute()
    lost = [file for file in images_below(absolute) if file not in listed]
    if not lost:
        return
    splits = ", ".join(map(str, of_splits))
    what = f"{len(lost)} images, such as {lost[0].relative_to(absolute)}, are in none of its splits ({splits})"
    if {file.parent for file in lost} & {file.parent for file in listed}:
        raise VitPatchError(
            f"data.path {folder}: {what}: datasets takes words in files' names for splits; data=imagefolder does not"
        )
    log.warning("data.path %s: %s", folder, what)


def check_same_classes(files: Sequence[Path]) -> None:
    """Raises ``VitPatchError`` where parquet files number classes differently: all would be read as the first is."""
    from datasets import ClassLabel, Features
    from pyarrow import parquet

    classes = [
        {
            name: kind.names
            for name, kind in Features.from_arrow_schema(parquet.read_schema(file)).items()
            if isinstance(kind, ClassLabel)
        }
        for file in files
    ]
    for file, of_file in zip(files, classes, strict=True):
        if of_file != classes[0]:
            raise VitPatchError(f"data.path {file.parent}: {file.name} has other classes than {files[0].name}")
