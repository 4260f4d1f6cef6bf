"""Files that are written whole or not at all, and paths in the order in which people sort them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpatch.errors import VitPatchError

if TYPE_CHECKING:
    import pandas as pd

PART = ".part"
"""How names of temporary files end: those that a killed process left may be deleted."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write that do not say which file they are of: full, over quota, over the limit of a process."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, which is renamed to ``path`` when the block ends without an exception.

    The content is flushed to the disk before the rename, and the rename before this returns, so that a power cut leaves
    no file without its content. Raises ``OSError`` that names ``path`` where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{PART}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_names(path.parent)
    except OSError as error:
        if error.errno in DISK_FULL and error.filename in (None, str(temporary)):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def describe_disk_error(error: OSError, folder: Path) -> str:
    """What the disk refused, and at which file: a full or read-only disk is the user's to mend."""
    return f"{error.strerror or error}: {error.filename or folder}"


def check_writable(folder: Path) -> None:
    """Raises ``VitPatchError`` where ``folder`` cannot be made or written: Hydra would end in a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name: a process that is killed leaves nothing
            file.write(b"0" * 65536)
            file.flush()
    except OSError as error:
        remedy = "choose another (hydra.run.dir, hydra.sweep.dir)"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"free some space, or {remedy}"
        raise VitPatchError(f"output folder {folder}: {error.strerror}; {remedy}") from error


def _sync_names(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        names = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(names)
        finally:
            os.close(names)


def checksum(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as readable JSON, by rename; a number that is not known (NaN) is null."""
    text = json.dumps(nan_to_none(value), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Writes a table without its index, by rename; what is not known is an empty field."""
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False)


def nan_to_none(value: Any) -> Any:
    """``value`` with ``None`` for numbers that are not known, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: nan_to_none(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def natural_sort(paths: Iterable[Path]) -> list[Path]:
    """Paths as people sort them: ``window=3`` before ``window=10``, ``std=0.05`` before ``std=0.1``."""
    return sorted(paths, key=lambda path: [_split_numbers(part) for part in path.parts])


def _split_numbers(text: str) -> list[tuple[float, str]]:
    """Sort keys of the texts and numbers that a name alternates between."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]
