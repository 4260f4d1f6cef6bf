"""The run folder: shards while it runs, parquet and csv after, ``manifest.json`` as the last act."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from vitpatch.errors import VitPatchError
from vitpatch.io import PART, checksum, write_json, written_beside

DPI = 130


class Held(VitPatchError):
    """Another process is at work in the folder."""


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
        self._lock, self._holder = (path / ".hydra" / name for name in ("lock", "holder.json"))

    @property
    def tables(self) -> list[Path]:
        """The parquet and csv files that are there."""
        every = (self.examples, self.effects, self.leave_outs, self.summary, self.marginals, self.pages)
        return [file for file in every if file.exists()]

    def checksums(self) -> dict[str, str]:
        """Of the parquet and csv files that are there, by name."""
        return {file.name: checksum(file) for file in self.tables}

    def finished(self) -> dict[str, Any] | None:
        """The manifest of the finished run in this folder, if there is one."""
        return json.loads(self.manifest.read_text(encoding="utf-8")) if self.manifest.exists() else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes out of the folder for the length of the block; a process that dies lets go.

        What killed ones left half-written is removed.

        Raises ``Held`` where another is in it.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock, blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise Held(f"{self.path}: {self._who()}; wait for it, or stop it") from error
        try:
            for folder in (self.path, self.shards, self._lock.parent):
                for left in folder.glob(f".*{PART}"):
                    left.unlink()
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            write_json(self._holder, {"process": os.getpid(), "host": socket.gethostname(), "since": since})
            yield
        finally:
            self._holder.unlink(missing_ok=True)
            lock.release()

    def holder(self) -> str | None:
        """Who is at work in the folder, in words; ``None`` = nobody."""
        if not self._lock.exists():
            return None
        lock = FileLock(self._lock, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            return self._who()
        lock.release()
        return None

    def _who(self) -> str:
        try:
            of = json.loads(self._holder.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # it has only just come
            return "another process is at work in it"
        return f"process {of['process']} on {of['host']} is at work in it since {of['since']}"

    def begin(self) -> None:
        """Clears what an earlier run left but its shards; the manifest goes first."""
        for file in (self.manifest, self.failed, *self.tables):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.figures, ignore_errors=True)
        self.figures.mkdir(parents=True)

    def write_csv(self, path: Path, table: pd.DataFrame) -> None:
        """Writes a table; what is not known is an empty field."""
        with written_beside(path) as beside:
            table.to_csv(beside, index=False)

    def save(self, drawn: Mapping[str, Mapping[str, Figure]]) -> dict[str, list[Path]]:
        """Writes figures as ``figures/NAME.png``, by the names of their files; the files by the outer name."""
        return {name: [self._save(figure, file) for file, figure in of.items()] for name, of in drawn.items()}

    def _save(self, figure: Figure, name: str) -> Path:
        self.figures.mkdir(exist_ok=True)
        path = self.figures / f"{name}.png"
        with written_beside(path) as beside:
            figure.savefig(beside, format="png", dpi=DPI)
        return path

    @contextmanager
    def sealing(self, manifest: dict[str, Any]) -> Iterator[Path]:
        """The manifest under a passing name for the length of the block; its end, by rename, finishes the run."""
        with written_beside(self.manifest) as beside:
            write_json(beside, manifest)
            yield beside

    def plan_only(self, line: str) -> None:
        """Leaves a word that the last start was a dry run; nothing else in the folder is touched."""
        self.start.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.start, {"state": "planned", "reason": line})

    def restore_config(self) -> None:
        """Makes ``.hydra/config.yaml`` that of the run which is finished here, if there is one.

        Hydra writes each start's there before anything else: also that of one which is refused, or finds another at
        work.
        """
        config = (self.finished() or {}).get("config")
        if config is not None:
            of_hydra = {key: value for key, value in config.items() if key not in ("options", "run_id")}
            with written_beside(self.start.parent / "config.yaml") as beside:
                beside.write_text(OmegaConf.to_yaml(OmegaConf.create(of_hydra)), encoding="utf-8")

    def fail(self, state: str, reason: str) -> None:
        """Leaves ``failed.json``; batches that are done stay, to go on from.

        A finished run that is still in the folder is not touched: ``begin`` takes the manifest away, so where there is
        one the failed run never began, and its word goes to ``.hydra/start.json``.
        """
        said = {"state": state, "reason": reason}
        if self.manifest.exists():
            write_json(self.start, said)
            return
        if not any(self.shards.glob("batch-*.json")):
            shutil.rmtree(self.shards, ignore_errors=True)
        write_json(self.failed, said)

    def state(self) -> tuple[str, str]:
        """(finished | planned | failed | interrupted | unfinished, reason) of the last start in this folder."""
        for word in (self.start, self.failed):
            if word.exists():
                said = json.loads(word.read_text(encoding="utf-8"))
                return said["state"], said["reason"]
        if self.manifest.exists():
            return "finished", ""
        return "unfinished", "it left neither manifest.json nor failed.json"
