"""The finished runs below folders, read to be compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from vitpatch.compare.comparison import FinishedRun
from vitpatch.errors import VitPatchError
from vitpatch.io import in_order
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.status import read_status
from vitpatch.schema import PATCH_COLUMNS

COMPARISON = "comparison"
"""The folder in a sweep's that comparisons are written to."""
NOT_RUNS = {COMPARISON, "wandb", ".hydra"}
"""Folders in which nothing is a run of its own: copies lie there."""
TOP = ("run_id", "title", "donors", "notes", "seconds")
MANIFEST = {
    "identity": (
        *("numbers_version", "weights", "precision", "data", "corruption", "target", "window", "donors"),
        *("direction", "metric", "rival", "include", "seed"),
    ),
    "config": ("model", "data", "corruption", "direction", "metric", "seed", "interval"),
    "model": ("layers", "weights"),
    "versions": ("vitpatch",),
    "counts": ("images",),
    "total_effect": ("mean", "low", "high"),
    "peak": ("layer", "head", "tokens", "window"),
}
"""What a manifest must have, of what is compared, and by its part."""
SUMMARY = (*PATCH_COLUMNS, "n", "n_clusters", "effect", "effect_low", "effect_high", "recovered", "p")
EXAMPLES = ("example_id", "label", "included", "cluster", "prob_clean", "prob_corrupt", "pred_clean", "pred_corrupt")
"""What tables must have, of what is compared."""


@dataclass(frozen=True)
class Found:
    """A manifest, and the names of its run and of the given folder that it is below."""

    name: str
    group: str
    folder: RunFolder


def found_below(folders: Sequence[Path]) -> list[Found]:
    """The manifests in and below folders, each once, in order of folder and path; training's are left out.

    A group is a given folder's name, with its number after it where several have one name. A run is named by its path
    below the one folder given; where there are several, the group comes first. Raises ``VitPatchError`` for a folder
    that is not there or holds no manifest.
    """
    return _named(folders, _runs_below)


def unfinished_below(folders: Sequence[Path]) -> list[str]:
    """The patching runs in and below folders that have no manifest: each with its state and why, in a line."""
    return [
        f"{found.name}: {run.status}: {run.reason}"
        for found in _named(folders, _begun_below)
        if (run := read_status(found.folder)).fell_short
    ]


def _named(folders: Sequence[Path], below: Callable[[Path], Iterable[Path]]) -> list[Found]:
    found: dict[Path, Found] = {}
    for folder, group in zip(folders, _groups(folders), strict=True):
        for path in below(folder):
            place = path.relative_to(folder).as_posix()
            name = "/".join(part for part in (group if len(folders) > 1 else "", place) if part not in ("", "."))
            found.setdefault(path.resolve(), Found(name or group, group, RunFolder(path)))
    return list(found.values())


def read(found: Found) -> FinishedRun:
    """A finished run with its manifest and summary; that its effects are whole is seen from their end.

    Raises ``VitPatchError`` where it is of another version, or a file is broken.
    """
    try:
        manifest = _json(found.folder.manifest)
        _check("manifest.json", (*TOP, *MANIFEST), manifest)
        for part, keys in MANIFEST.items():
            _check(f"manifest.json, {part},", keys, manifest[part])
        run = FinishedRun(found.name, found.group, found.folder, manifest, pd.read_csv(found.folder.summary))
        _check("summary.csv", SUMMARY, run.summary)
        _check("examples.parquet", EXAMPLES, run.examples())
        _check("effects.parquet", ("effect", *PATCH_COLUMNS), pq.read_schema(found.folder.effects).names)
        peak_row(run)
        if run.folder.pages.exists():
            run.shown()
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise VitPatchError(
            f"{found.folder.path}: of another version, or a file is broken ({reason}); run it again (overwrite=true)"
        ) from error
    return run


def known(value: float | None) -> float:
    """A number of a manifest, whose null is NaN here."""
    return np.nan if value is None else float(value)


def peak_row(run: FinishedRun) -> pd.Series | None:
    """The row of ``summary.csv`` that the manifest calls the peak; ``None`` where there is no peak."""
    if (peak := run.manifest["peak"])["layer"] is None:
        return None
    is_it = np.logical_and.reduce([run.summary[name] == value for name, value in peak.items()])
    if not is_it.any():
        raise ValueError("summary.csv has no row of the manifest's peak")
    return run.summary[is_it].iloc[0]


def _runs_below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise VitPatchError(f"{folder}: no such folder; give a run's or a sweep's")
    manifests = in_order(folder.rglob("manifest.json"))
    runs = [path.parent for path in manifests if _is_run(path, folder)]
    if not runs:
        raise VitPatchError(f"{folder}: no finished run of this version is in or below it")
    return runs


def _begun_below(folder: Path) -> list[Path]:
    """Folders of patching runs, as Hydra makes them, in which there is no manifest."""
    starts = in_order(folder.rglob(".hydra/hydra.yaml"))
    return [path.parent.parent for path in starts if _is_begun(path, folder)]


def _is_begun(start: Path, folder: Path) -> bool:
    run = start.parent.parent
    if (run / "manifest.json").exists() or NOT_RUNS & set(run.relative_to(folder).parts):
        return False
    try:
        return yaml.safe_load(start.read_text(encoding="utf-8"))["hydra"]["job"]["name"] == "patch"
    except (ValueError, KeyError, TypeError, yaml.YAMLError):  # half-written, or not Hydra's
        return False


def _is_run(manifest: Path, folder: Path) -> bool:
    """Whether a manifest is a patching run's, or cannot be read; others are not ours, or training's."""
    if NOT_RUNS & set(manifest.relative_to(folder).parts):
        return False
    try:
        return "run_id" in _json(manifest)
    except ValueError:
        return True


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _check(file: str, wanted: Iterable[str], there: Container[str]) -> None:
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(f"{file} has no {', '.join(missing)}")


def _groups(folders: Sequence[Path]) -> Iterator[str]:
    names = [folder.resolve().name for folder in folders]
    often, seen = Counter(names), Counter()
    for name in names:
        seen[name] += 1
        while (numbered := f"{name} ({seen[name]})") in often:
            seen[name] += 1
        yield numbered if often[name] > 1 else name
