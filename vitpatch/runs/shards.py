"""The finished batches of a run on the disk: a stopped run resumes from them, and its result is the same to the bit.

``begun.json`` names the run and how its images are cut into batches. A batch is a parquet file for each table; it is
finished once ``batch-<number>.json`` is there, with the checksums of these files. Both JSON files hold their own
checksum. The folder is removed when the run is finished.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from vitpatch.errors import VitPatchError
from vitpatch.formatting import digest
from vitpatch.io import atomic_write, checksum, nan_to_none, write_json

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_NAMED = 3
"""Settings named in a line, at most."""
LONGEST_VALUE = 40
"""Letters of a setting's value in a line, at most."""
SKIPS = {"selection.on_error": "skip"}
"""Of an identity: unreadable images are left out."""


@dataclass(frozen=True)
class Begun:
    """What a run began with: its ``identity`` and digest, the images a batch, the calls' sizes once they are known.

    ``images`` and ``rows`` of a call follow from the memory that was free, ``threads`` of a process (``None``: not on a
    CPU) from the machine; a run that goes on keeps to them, since products are rounded differently by others.
    """

    run_id: str
    identity: Mapping[str, Any]
    batch_size: int
    images: int | None = None
    rows: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class BatchDone:
    """A batch that is on the disk: checksums of its tables' files, and the images that could not be read, (row, why).

    ``said``: what was found out on the way, ``line`` and ``precision_error`` of ``vitpatch.runs.predict.Done``.
    """

    files: Mapping[str, str]
    bad: Sequence[tuple[int, str]] = ()
    said: Mapping[str, Any] = field(default_factory=dict)


class Shards:
    """A run's batches in the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = path / "begun.json"

    def begun(self) -> Begun | None:
        """What the run that is here began with; ``None`` where there is none, or none that can be read."""
        return _read(self._begun, Begun)

    def begin(self, begun: Begun) -> Begun:
        """Prepares the folder for a run, or resumes the same run where it is here. Returns how that run began.

        A run that an unreadable image stopped may resume as one that leaves such images out: so far there were none.
        Raises ``VitPatchError`` where batches of another run are here.
        """
        there = self.begun()
        if there is not None and there.run_id == begun.run_id:
            return there
        if there is not None and flat(there.identity) | SKIPS == flat(begun.identity):
            there = replace(there, run_id=begun.run_id, identity=begun.identity)
            self.keep(there)
            return there
        if there is not None and self.records():
            raise VitPatchError(
                f"{self.path.parent} holds an unfinished run with other {differing(there.identity, begun.identity)}; "
                "choose another folder or sweep name, or overwrite=true"
            )
        if there is None and any(self.path.glob("[!.]*")):  # nobody knows whose batches these are
            log.warning("%s: missing or damaged on the disk; every batch is computed again", self._begun)
        self.drop()
        self.path.mkdir(parents=True)
        self.keep(begun)
        return begun

    def keep(self, begun: Begun) -> None:
        """Writes how the run began, with what has become known since."""
        _write(self._begun, begun)

    def drop(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.path, ignore_errors=True)

    def done(self) -> dict[int, BatchDone]:
        """The undamaged batches, by number; a damaged one is logged as a warning and loses its record."""
        found = self.records()
        for record in self.path.glob("batch-*.json"):
            number = _number(record)
            if number in found and all(self._is_whole(number, kind, found[number]) for kind in found[number].files):
                continue
            log.warning("batch %d: its shard is damaged on the disk; it is computed again", number)
            record.unlink()
            found.pop(number, None)
        return found

    def numbers(self) -> list[int]:
        """The numbers of the batches that have a record, damaged or not."""
        return [_number(record) for record in self.path.glob("batch-*.json")]

    def records(self) -> dict[int, BatchDone]:
        """The batches as they were written, by number in order; their shards may be damaged since."""
        read = ((_number(record), _read(record, BatchDone)) for record in sorted(self.path.glob("batch-*.json")))
        return {number: batch for number, batch in read if batch is not None}

    def write(
        self,
        number: int,
        tables: Mapping[str, pa.Table],
        bad: Sequence[tuple[int, str]] = (),
        said: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one batch's rows of each table, then its record; ``number`` is its place in the order of batches."""
        files = {}
        for kind, table in tables.items():
            with atomic_write(self._shard(kind, number)) as temporary:
                pq.write_table(table, temporary)
                files[kind] = checksum(temporary)
        _write(self._record(number), BatchDone(files, list(bad), dict(said or {})))

    def merge(self, into: Mapping[str, Path], batches: int) -> None:
        """Joins the shards of all ``batches`` into one file a table, in order, a row group a shard.

        Raises ``VitPatchError`` where a batch is not there as it was written.
        """
        found = self.records()
        for number in range(batches):
            if number not in found:
                raise _damaged(self._record(number))
        for kind, path in into.items():
            shards = [(number, found[number]) for number in range(batches) if kind in found[number].files]
            if not shards:  # of leave-outs, where there are none
                continue
            schema = self._table(kind, *shards[0]).schema
            with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
                last_id = -1
                for number, batch in shards:
                    table = self._table(kind, number, batch)
                    ids = table["example_id"]
                    assert ids[0].as_py() > last_id, f"batch {number} starts at image {ids[0]}, after image {last_id}"
                    last_id = ids[-1].as_py()
                    writer.write_table(table)

    def _table(self, kind: str, number: int, batch: BatchDone) -> pa.Table:
        if not self._is_whole(number, kind, batch):
            raise _damaged(self._shard(kind, number))
        return pq.read_table(self._shard(kind, number))

    def _record(self, number: int) -> Path:
        return self.path / f"batch-{number:08d}.json"

    def _shard(self, kind: str, number: int) -> Path:
        return self.path / f"{kind}-{number:08d}.parquet"

    def _is_whole(self, number: int, kind: str, batch: BatchDone) -> bool:
        shard = self._shard(kind, number)
        return shard.exists() and checksum(shard) == batch.files[kind]


def _damaged(path: Path) -> VitPatchError:
    return VitPatchError(f"{path}: damaged on the disk, or gone; the same command computes it again")


def _number(record: Path) -> int:
    return int(record.stem.partition("-")[2])


def _write(path: Path, value: Begun | BatchDone) -> None:
    """Writes ``value`` with a checksum of itself."""
    fields = nan_to_none(asdict(value))
    write_json(path, fields | {"sha256": digest(fields)})


def _read(path: Path, kind: type[T]) -> T | None:
    """What ``_write`` wrote; ``None`` where there is no file, or a damaged one."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return kind(**fields) if fields.pop("sha256") == digest(fields) else None
    except (FileNotFoundError, ValueError, TypeError, AttributeError, KeyError):  # damaged on the disk
        return None


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What two runs' identities differ in, in words: the first few keys with both values."""
    there, here = flat(theirs), flat(ours)
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    named = [f"{key} ({_brief(there.get(key))} there, {_brief(here.get(key))} here)" for key in keys[:MOST_NAMED]]
    more = f" and {len(keys) - MOST_NAMED} more" * (len(keys) > MOST_NAMED)
    return ", ".join(named) + more if named else "settings"


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; values as JSON has them."""
    if isinstance(value, Mapping) and value:
        return {k: v for name, of in value.items() for k, v in flat(of, f"{key}.{name}" if key else str(name)).items()}
    return {key: json.loads(json.dumps(value, default=str))}


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
