"""The run folder: shards while it runs, parquet and csv after, ``manifest.json`` as the last act.

A stopped run resumes from its shards, and its result is the same to the bit. ``begun.json`` names the run and how its
images are cut into batches. A batch is a parquet file for each table; it is finished once ``batch-<number>.json`` is
there, with the checksums of these files. Both JSON files hold their own checksum. The shards are removed once the run
is finished.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from vitpatch.errors import VitPatchError
from vitpatch.formatting import describe_difference, digest, flatten
from vitpatch.io import PART, atomic_write, checksum, nan_to_none, write_json
from vitpatch.study import VIEW_KEYS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vitpatch.plots.layout import FigureOptions

log = logging.getLogger(__name__)

T = TypeVar("T")
Tables = Mapping[str, pa.Table]
"""A batch's tables, by the names of their files."""

VIEWS, VIEW_FILE = "views", "view.json"
"""The folder of a run's other views, and the file that says which one a folder has: a manifest, as it would be."""
SKIPS = {"selection.on_error": "skip"}
"""The entry of a flat identity by which unreadable images are left out."""


class FolderLocked(VitPatchError):
    """Another process is running in the folder."""


class RunFolder:
    """The files of one run, in the folder ``path``; not all of them need to be there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.examples = path / "examples.parquet"
        self.effects = path / "effects.parquet"
        self.leave_outs = path / "leave_outs.parquet"
        self.summary = path / "summary.csv"
        self.marginals = path / "marginals.csv"
        self.pages = path / "pages.parquet"
        self.figures = path / "figures"
        self.manifest = path / "manifest.json"
        self.failed = path / "failed.json"
        self.start = path / ".hydra" / "start.json"
        self.shards = path / "shards"
        self._lock, self._process = (path / ".hydra" / name for name in ("lock", "holder.json"))

    @property
    def tables(self) -> list[Path]:
        """The parquet and csv files that are there."""
        every = (self.examples, self.effects, self.leave_outs, self.summary, self.marginals, self.pages)
        return [file for file in every if file.exists()]

    def checksums(self) -> dict[str, str]:
        """Of the parquet and csv files that are there, by name."""
        return {file.name: checksum(file) for file in self.tables}

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest of the finished run in this folder, if there is one."""
        return json.loads(self.manifest.read_text(encoding="utf-8")) if self.manifest.exists() else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out of the folder for the length of the block; the lock of a dead process is free.

        Removes what killed processes left half-written. Raises ``FolderLocked`` where another process is in it.
        """
        lock = self._acquire()
        if lock is None:
            raise FolderLocked(f"{self.path}: {self._describe_process()}; wait for it, or stop it")
        try:
            for folder in (self.path, self.shards, self._lock.parent):
                for half_written in folder.glob(f".*{PART}"):
                    half_written.unlink()
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            write_json(self._process, {"process": os.getpid(), "host": socket.gethostname(), "since": since})
            yield
        finally:
            self._process.unlink(missing_ok=True)
            lock.release()

    def locked_by(self) -> str | None:
        """Which process is running in the folder, in words; ``None`` = none."""
        if not self._lock.exists():
            return None
        lock = self._acquire()
        if lock is None:
            return self._describe_process()
        lock.release()
        return None

    def _acquire(self) -> FileLock | None:
        """The lock, acquired; ``None`` where another process has it."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _describe_process(self) -> str:
        try:
            process = json.loads(self._process.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # it has only just come
            return "another process is at work in it"
        return f"process {process['process']} on {process['host']} is at work in it since {process['since']}"

    def begin(self) -> None:
        """Clears what an earlier run left but its shards; the manifest goes first."""
        for file in (self.manifest, self.failed, *self.tables):
            file.unlink(missing_ok=True)
        for folder in (self.figures, self.path / VIEWS):
            shutil.rmtree(folder, ignore_errors=True)
        self.figures.mkdir(parents=True)

    def save_figures(self, figures: Mapping[str, Figure], options: FigureOptions) -> dict[str, list[Path]]:
        """Writes figures as ``figures/NAME.FORMAT``; their paths, by name."""
        self.figures.mkdir(exist_ok=True)
        return {
            name: [self._save(figure, name, kind, options.dpi) for kind in options.formats]
            for name, figure in figures.items()
        }

    def _save(self, figure: Figure, name: str, kind: str, dpi: int) -> Path:
        from vitpatch.plots.layout import save_figure

        path = self.figures / f"{name}.{kind}"
        with atomic_write(path) as temporary:
            save_figure(figure, temporary, kind, dpi)
        return path

    @contextmanager
    def writing_manifest(self, manifest: dict[str, Any]) -> Iterator[Path]:
        """Writes the manifest under a temporary name; the end of the block renames it, and so finishes the run."""
        with atomic_write(self.manifest) as temporary:
            write_json(temporary, manifest)
            yield temporary

    def mark_planned(self, plan: str) -> None:
        """Records that the last start was a dry run; nothing else in the folder changes."""
        self.start.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.start, {"state": "planned", "reason": plan})

    def restore_config(self) -> None:
        """Writes the config of the run that is finished here, if there is one, to ``.hydra/config.yaml`` again.

        Hydra writes each start's config there before anything else, also where the start is then refused.
        """
        config = (self.read_manifest() or {}).get("config")
        if config is not None:
            of_hydra = {key: value for key, value in config.items() if key not in ("options", "run_id")}
            with atomic_write(self.start.parent / "config.yaml") as temporary:
                temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(of_hydra)), encoding="utf-8")

    def typed_arguments(self) -> list[str] | None:
        """What was typed behind the command that started the run here, but for where it goes.

        ``None`` where Hydra did not start it.
        """
        file = self.start.parent / "hydra.yaml"
        if not file.exists():
            return None
        hydra = OmegaConf.to_container(OmegaConf.load(file), resolve=False)["hydra"]
        sources, overrides = hydra["runtime"]["config_sources"], hydra["overrides"]
        found_in = [f"--config-dir={one['path']}" for one in sources if one["provider"] == "command-line"]
        searched = [override for override in overrides["hydra"] if override.startswith("hydra.searchpath=")]
        return [*found_in, *searched, *overrides["task"]]

    def mark_failed(self, status: str, reason: str) -> None:
        """Writes ``failed.json``; finished batches stay, for the next start.

        A finished run that is still in the folder is not touched: ``begin`` removes the manifest, so where there is one
        the failed run never began, and its status goes to ``.hydra/start.json``.
        """
        record = {"state": status, "reason": reason}
        if self.manifest.exists():
            write_json(self.start, record)
            return
        if not any(self.shards.glob("batch-*.json")):
            shutil.rmtree(self.shards, ignore_errors=True)
        write_json(self.failed, record)

    def status(self) -> tuple[str, str]:
        """(finished | planned | failed | interrupted | unfinished, reason) of the last start in this folder."""
        for file in (self.start, self.failed):
            if file.exists():
                record = json.loads(file.read_text(encoding="utf-8"))
                return record["state"], record["reason"]
        if self.manifest.exists():
            return "finished", ""
        return "unfinished", "it left neither manifest.json nor failed.json"


@dataclass(frozen=True)
class Begun:
    """What a run began with: its ``identity`` and the digest of that, and how many images a batch has.

    How many ``images`` and ``rows`` a call has follows from the memory that was free (``None``: not known yet), how
    many ``threads`` a process has (``None``: not on a CPU) from the machine. A run that is resumed uses the same
    numbers, since others round products differently.
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

    ``about_run``: ``line`` and ``precision_error`` of ``vitpatch.runs.predict.PredictionResult``, where they are known.
    """

    files: Mapping[str, str]
    bad: Sequence[tuple[int, str]] = ()
    about_run: Mapping[str, Any] = field(default_factory=dict)


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
        earlier = self.begun()
        if earlier is not None and earlier.run_id == begun.run_id:
            return earlier
        if earlier is not None and flatten(earlier.identity) | SKIPS == flatten(begun.identity):
            earlier = replace(earlier, run_id=begun.run_id, identity=begun.identity)
            self.write_begun(earlier)
            return earlier
        if earlier is not None and self.records():
            if set(VIEW_KEYS) & set(earlier.identity):
                raise VitPatchError(
                    f"{self.path.parent} holds an unfinished run of an earlier version, whose batches lack columns; "
                    "choose another folder or sweep name, or overwrite=true"
                )
            difference = describe_difference(earlier.identity, begun.identity)
            raise VitPatchError(
                f"{self.path.parent} holds an unfinished run with other {difference}; choose another folder or sweep "
                "name, or overwrite=true"
            )
        if earlier is None and any(self.path.glob("[!.]*")):  # nobody knows whose batches these are
            log.warning("%s: missing or damaged on the disk; every batch is computed again", self._begun)
        self.remove()
        self.path.mkdir(parents=True)
        self.write_begun(begun)
        return begun

    def write_begun(self, begun: Begun) -> None:
        """Writes how the run began, with what has become known since."""
        _write(self._begun, begun)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def records(self) -> dict[int, BatchDone]:
        """The batches as they were written, by number in order; their shards may be damaged since."""
        read = ((number, _read(self._record(number), BatchDone)) for number in self.numbers())
        return {number: batch for number, batch in read if batch is not None}

    def numbers(self) -> list[int]:
        """The numbers of the batches that have a record, damaged or not, in order."""
        return sorted(int(record.stem.partition("-")[2]) for record in self.path.glob("batch-*.json"))

    def done(self) -> dict[int, BatchDone]:
        """The undamaged batches, by number; a damaged one is logged as a warning and loses its record."""
        records = self.records()
        for number in self.numbers():
            batch = records.get(number)
            if batch is not None and all(self._is_whole(number, kind, batch) for kind in batch.files):
                continue
            log.warning("batch %d: its shard is damaged on the disk; it is computed again", number)
            self._record(number).unlink()
            records.pop(number, None)
        return records

    def write(
        self,
        number: int,
        tables: Mapping[str, pa.Table],
        bad: Sequence[tuple[int, str]] = (),
        about_run: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one batch's rows of each table, then its record; ``number`` is its place in the order of batches."""
        files = {}
        for kind, table in tables.items():
            with atomic_write(self._shard(kind, number)) as temporary:
                pq.write_table(table, temporary)
                files[kind] = checksum(temporary)
        _write(self._record(number), BatchDone(files, list(bad), dict(about_run or {})))

    def merge(self, into: Mapping[str, Path], batches: int, in_view: Callable[[Tables], Tables] = dict) -> None:
        """Joins the shards of all ``batches`` into one file a table, in order, a row group a shard.

        ``in_view`` makes of a batch's tables what is written. Raises ``VitPatchError`` where a batch is not there as it
        was written.
        """
        records = self.records()
        for number in range(batches):
            if number not in records:
                raise _damaged(self._record(number))
        writers: dict[str, pq.ParquetWriter] = {}
        with ExitStack() as files:
            for tables in self._read_shards(records):
                for kind, table in in_view(tables).items():
                    if kind not in writers:
                        temporary = files.enter_context(atomic_write(into[kind]))
                        writers[kind] = files.enter_context(pq.ParquetWriter(temporary, table.schema))
                    writers[kind].write_table(table, row_group_size=len(table))

    def _read_shards(self, records: Mapping[int, BatchDone]) -> Iterator[Tables]:
        """The tables of each batch in order, and so of images. Raises ``VitPatchError`` for a damaged one."""
        last_id = -1
        for number, batch in records.items():
            for kind in batch.files:
                if not self._is_whole(number, kind, batch):
                    raise _damaged(self._shard(kind, number))
            tables = {kind: pq.read_table(self._shard(kind, number)) for kind in batch.files}
            if tables:  # none of a batch without a readable image
                ids = tables["examples"]["example_id"]
                assert ids[0].as_py() > last_id, f"batch {number} starts at image {ids[0]}, after image {last_id}"
                last_id = ids[-1].as_py()
                yield tables

    def _record(self, number: int) -> Path:
        return self.path / f"batch-{number:08d}.json"

    def _shard(self, kind: str, number: int) -> Path:
        return self.path / f"{kind}-{number:08d}.parquet"

    def _is_whole(self, number: int, kind: str, batch: BatchDone) -> bool:
        shard = self._shard(kind, number)
        return shard.exists() and checksum(shard) == batch.files[kind]


def _damaged(path: Path) -> VitPatchError:
    return VitPatchError(f"{path}: damaged on the disk, or gone; the same command computes it again")


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
