"""The run folder: shards while it runs, parquet and csv after, ``manifest.json`` as the last act."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.io import PART, atomic_write, checksum, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


class FolderLocked(VitPatchError):
    """Another process is running in the folder."""


class RunFolder:
    """One run's files below ``path``."""

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
        lock = self._acquire() if self._lock.exists() else FileLock(self._lock)
        if lock is None:
            return self._describe_process()
        lock.release()
        return None

    def _acquire(self) -> FileLock | None:
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
        shutil.rmtree(self.figures, ignore_errors=True)
        self.figures.mkdir(parents=True)

    def save_figures(self, figures: Mapping[str, Mapping[str, Figure]]) -> dict[str, list[Path]]:
        """Writes ``figures``, by a name and then by file name, as ``figures/FILE.png``; the paths by the outer name."""
        return {name: [self._save(figure, file) for file, figure in group.items()] for name, group in figures.items()}

    def _save(self, figure: Figure, name: str) -> Path:
        self.figures.mkdir(exist_ok=True)
        path = self.figures / f"{name}.png"
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
        return path

    @contextmanager
    def writing_manifest(self, manifest: dict[str, Any]) -> Iterator[Path]:
        """The manifest under a passing name for the length of the block; its end, by rename, finishes the run."""
        with atomic_write(self.manifest) as temporary:
            write_json(temporary, manifest)
            yield temporary

    def mark_planned(self, plan: str) -> None:
        """Records that the last start was a dry run; nothing else in the folder changes."""
        self.start.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.start, {"state": "planned", "reason": plan})

    def restore_config(self) -> None:
        """Makes ``.hydra/config.yaml`` that of the run which is finished here, if there is one.

        Hydra writes each start's there before anything else: also that of one which is refused, or finds another at
        work.
        """
        config = (self.read_manifest() or {}).get("config")
        if config is not None:
            of_hydra = {key: value for key, value in config.items() if key not in ("options", "run_id")}
            with atomic_write(self.start.parent / "config.yaml") as temporary:
                temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(of_hydra)), encoding="utf-8")

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


DONE = ("finished", "finished before", "planned")
"""The status of a run that a sweep does not wait for."""


@dataclass(frozen=True)
class RunStatus:
    """A run of a sweep. ``status``: finished, ``finished before`` this start, planned, failed, interrupted, running,
    unfinished (killed), not started (the sweep ended before). ``seconds`` of a finished run, its peak's layer, and the
    effect there, on ``metric``; what is not known is ``None``.
    """

    run: str
    status: str
    reason: str = ""
    seconds: float | None = None
    peak_layer: int | None = None
    effect: float | None = None
    effect_low: float | None = None
    effect_high: float | None = None
    metric: str = ""

    @property
    def fell_short(self) -> bool:
        """Whether the run is not done."""
        return self.status not in DONE


def read_status(folder: RunFolder, since: float = 0.0) -> RunStatus:
    """The status of the run in a folder; one that was finished before ``since`` is ``finished before``."""
    name = folder.path.name
    if (process := folder.locked_by()) is not None:
        return RunStatus(name, "running", process)
    try:
        status, reason = folder.status()
        if status != "finished":
            return RunStatus(name, status, reason)
        if folder.manifest.stat().st_mtime < since:
            status = "finished before"
        manifest = folder.read_manifest()
        metric = manifest.get("config", {}).get("metric", "")
        return RunStatus(name, status, seconds=manifest.get("seconds"), metric=metric, **_read_peak(folder, manifest))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        return RunStatus(name, "failed", f"its files cannot be read ({one_line(error, 80)})")


def _read_peak(folder: RunFolder, manifest: dict[str, Any]) -> dict[str, Any]:
    """Layer and effect of the row of ``summary.csv`` that the manifest names; nothing where there is no peak."""
    peak = manifest.get("peak") or {}
    if peak.get("layer") is None or not folder.summary.exists():
        return {}
    summary = pd.read_csv(folder.summary)
    row = summary[(summary[list(peak)] == pd.Series(peak)).all(axis=1)].iloc[0]
    effect = {name: float(row[name]) for name in ("effect", "effect_low", "effect_high")}
    return {"peak_layer": int(row["layer"])} | effect
