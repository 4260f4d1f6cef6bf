"""What ``datasets`` makes of a local folder without a word: files that it leaves out, classes that it mixes up."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitpatch.data.folders import images_below
from vitpatch.errors import VitPatchError

log = logging.getLogger(__name__)


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
