"""The run folder: shards while it runs, parquet and csv after, ``manifest.json`` as the last act."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from vitpatch.types import BaseRun, Donor, Metric, Patch, VitPatchError

DPI = 130
PART = ".part"
"""The end of a passing name: what a killed process left under one is nobody's."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write that do not say which file they are of: full, over quota, over the limit of a process."""
_OF_EACH_BASE_RUN = (Metric.PROB, Metric.LOG_ODDS, Metric.LOGIT, Metric.LOGIT_DIFF)

EXAMPLES_SCHEMA = pa.schema(
    [("example_id", pa.int64()), ("label", pa.int64()), ("label_name", pa.string()), ("rival", pa.int64())]
    + [("label_is_predicted", pa.bool_()), ("included", pa.bool_()), ("cluster", pa.int64())]
    + [(f"{metric}_{run}", pa.float32()) for run in BaseRun for metric in _OF_EACH_BASE_RUN]
    + [(f"pred_{run}", pa.int64()) for run in BaseRun]
    + [("kl_corrupt", pa.float32())]
)
"""One row an image, in order of ``example_id``; with partners for donors also ``of_partners``.

``label_is_predicted``: the image has no label, and the clean run's prediction stands in for it.
"""

PATCH_COLUMNS = ("site", "layer", "head", "tokens", "window", "first_layer", "last_layer", "n_layers")
"""What names a patch in ``effects.parquet`` and ``summary.csv``."""

EFFECTS_SCHEMA = pa.schema(
    [("example_id", pa.int64())]
    + [(name, pa.string() if name in ("site", "tokens") else pa.int64()) for name in PATCH_COLUMNS]
    + [(str(metric), pa.float32()) for metric in Metric]
    + [("pred", pa.int64()), ("effect", pa.float32())]
    + [("delta_norm", pa.float32()), ("direct_log_odds", pa.float32()), ("n_tokens", pa.int64())]
)
"""One row an image and patch, in order of ``example_id``, then patch.

``delta_norm``: norm of donor − recipient over norm of the recipient at the site, over the patched tokens and layers.
``direct_log_odds``: change of the log odds where the replacement is carried straight to the readout, the scale of the
last layer norm frozen. ``n_tokens``: how many tokens of this image are patched. With controls also ``of_controls``.
"""

LEAVE_OUTS_SCHEMA = pa.schema(
    [("example_id", pa.int64())]
    + [(name, pa.string() if name in ("site", "tokens") else pa.int64()) for name in (*PATCH_COLUMNS, "without")]
    + [("prob", pa.float32()), ("log_odds", pa.float32()), ("effect", pa.float32())]
)
"""One row an image and window of ``effects.parquet`` without one of its layers, ``without``; in their order."""

CONTROLLED = (Metric.PROB, Metric.LOG_ODDS, "effect")
"""What is stored of a control."""


OF_CORRUPTION = "partner_corruption"
"""Column of ``examples.parquet``: ``example_id`` of the image that a corruption with partners takes."""


def of_partners(donors: Sequence[Donor], together: bool) -> list[pa.Field]:
    """Columns of ``examples.parquet`` for donors that are other images, and for all layers patched at once.

    ``partner_*`` is the other image's ``example_id`` (−1: it has none); ``prob_*`` and so on what its clean run says of
    this image's label.
    """
    others = [donor for donor in donors if donor.partner is not None]
    fields = [
        pa.field(f"{name}_{donor}", pa.int64() if name == "partner" else pa.float32())
        for donor in others
        for name in ("partner", *Metric)
    ]
    return fields + [pa.field(f"{name}_all_layers", pa.float32()) for name in CONTROLLED if together]


def of_controls(donors: Sequence[Donor]) -> list[pa.Field]:
    """Columns of ``effects.parquet`` for the donors after the first: the same patch with their activations."""
    return [pa.field(f"{name}_{donor}", pa.float32()) for donor in donors[1:] for name in CONTROLLED]


def with_fields(schema: pa.Schema, fields: Iterable[pa.Field]) -> pa.Schema:
    """A schema with columns more."""
    return pa.schema([*schema, *fields])


def patch_columns(patches: Sequence[Patch]) -> dict[str, np.ndarray]:
    """What names each patch, by column, (patches,) each; a window without a layer is named as the whole one is."""
    rows = [(str(p.site), p.layer, p.head, str(p.tokens), p.window, *_ends(p)) for p in patches]
    return {name: np.array(values) for name, values in zip(PATCH_COLUMNS, zip(*rows, strict=True), strict=True)}


def _ends(patch: Patch) -> tuple[int, int, int]:
    layers = sorted({*patch.layers, *((patch.without,) if patch.without >= 0 else ())})
    return layers[0], layers[-1], len(layers)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A name to write to that becomes ``path`` by rename, when and only when the block ends well.

    What was written is on the disk before the name is, and the name before anything that follows from it, so that a
    power cut leaves no name without it. Raises ``OSError`` that names ``path`` where the disk is full.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{PART}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        _sync_names(path.parent)
    except OSError as error:
        if error.errno in DISK_FULL and error.filename in (None, str(beside)):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        beside.unlink(missing_ok=True)


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
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)
    with written_beside(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """``value`` with ``None`` for numbers that are not known, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: without_nan(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Paths as people sort them: ``window=3`` before ``window=10``, ``std=0.05`` before ``std=0.1``."""
    return sorted(paths, key=lambda path: [_numbers_apart(part) for part in path.parts])


def _numbers_apart(text: str) -> list[tuple[float, str]]:
    """Numbers and what is between them, which alternate."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


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
