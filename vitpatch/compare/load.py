"""Finished runs read from their folders, and the tables that a comparison of them is made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from vitpatch.errors import VitPatchError
from vitpatch.formatting import describe_fixed, one_line
from vitpatch.io import natural_sort
from vitpatch.names import SWEEP_FILE
from vitpatch.plots.examples import ExamplePage
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.results import read_pages, read_status
from vitpatch.schema import PATCH_COLUMNS
from vitpatch.types import Donor

COMPARISON = "comparison"  # the folder inside a sweep's that comparisons are written to
NOT_RUNS = {COMPARISON, "wandb", ".hydra"}  # folders that hold copies, in which nothing is a run of its own
MANIFEST_KEYS = {
    "": "run_id title donors notes seconds identity config model versions counts total_effect peak",
    "identity": "numbers_version weights precision data corruption target window donors direction seed",
    "config": "model data corruption direction metric seed interval",
    "model": "layers weights",
    "versions": "vitpatch",
    "counts": "images",
    "total_effect": "mean low high",
    "peak": "layer head tokens window",
}
"""What a manifest must have for a comparison, by its part ("" = at the top)."""
SUMMARY_COLUMNS = (*PATCH_COLUMNS, "n", "n_clusters", "effect", "effect_low", "effect_high", "recovered", "p")
EXAMPLES_COLUMNS = "example_id label included cluster prob_clean prob_corrupt pred_clean pred_corrupt".split()


@dataclass(frozen=True)
class RunLocation:
    """A run's folder, its name, which no other run of the comparison has, and ``group``, the name of the folder on the
    command line that it is in."""

    name: str
    group: str
    folder: RunFolder


@dataclass(frozen=True)
class FinishedRun(RunLocation):
    """A run that is compared, with its manifest and ``summary.csv``."""

    manifest: Mapping[str, Any]
    summary: pd.DataFrame

    @property
    def identity(self) -> Mapping[str, Any]:
        """What can change the run's numbers: what is computed, and how it is read."""
        return self.manifest["identity"] | self.manifest.get("view", {})  # which earlier versions had in the identity

    @property
    def config(self) -> Mapping[str, Any]:
        """The composed config."""
        return self.manifest["config"]

    @property
    def donor(self) -> Donor:
        """The donor of the run's effects."""
        return Donor(self.manifest["donors"][0])

    @property
    def depth(self) -> int:
        """How many blocks the model has."""
        return self.manifest["model"]["layers"]

    def examples(self) -> pd.DataFrame:
        """The rows of ``examples.parquet``."""
        return pd.read_parquet(self.folder.examples)

    def example_pages(self) -> list[ExamplePage]:
        """The images of its example pages."""
        return read_pages(self.folder.pages)


@dataclass(frozen=True)
class Comparison:
    """Tables that compare finished runs; page and figures are made from them alone.

    ``warnings``: what the runs should agree in and do not (weights of one model, data, code version), a line each.
    ``left_out``: runs that are not compared, being broken or not finished, a line each. ``fixed``: what was typed for
    all runs of a folder, by the folder's name, "" = the only one. Tables, in which ``run``, ``a``
    and ``b`` are ``FinishedRun.name``:

    ``overview``, a row a run: ``run, group, title, model, data, corruption`` (in words, also that there is none),
    ``strength, calibrated`` (in words, "" = not calibrated), ``site, tokens, heads, windows, direction, donor,
    transfer`` (the last two in words), ``metric, include, n, n_clusters, accuracy_clean, accuracy_corrupt, prob_clean,
    prob_corrupt, total_effect, total_effect_low, total_effect_high, peak_layer, peak_place`` (in words),
    ``peak_relative_depth, peak_effect, peak_effect_low, peak_effect_high, peak_recovered, peak_recovered_low,
    peak_recovered_high, peak_p, peak_set`` (in words), ``peak_stability, peak_effect_split_halves, depth`` (blocks of
    the model), ``seconds, weights, data_digest, code, notes, folder, config`` (paths relative to the comparison's
    folder), ``wandb_url``.

    ``profiles``, a row a run and patch: ``run, series`` (what differs between rows of one layer, "" = nothing), all
    columns of ``summary.csv``, ``depth, relative_depth`` = (layer + ½) / depth.

    ``differences``, a row a pair of runs and patch that both have: ``a, b, quantity`` (``effect``, or ``recovered``
    across corruptions), ``site, layer, head, tokens, n_layers, window_a, window_b, n, n_clusters, value_a, value_b,
    difference`` = a − b, ``low, high, p`` (family-wise over the pair's patches; of effects), ``caution`` (in words).

    ``not_subtracted``, a row a pair without differences: ``a, b, reason``. ``settings``: a row a key of the runs'
    identity that differs between runs (the index), a column a run. ``rank_correlation``: Spearman's of the profiles,
    runs (the index) × runs.

    ``matched``, a row a pair of runs of two groups that match: ``a, b, differing`` (settings, in words),
    ``total_effect_a, total_effect_b, peak_layer_a, peak_layer_b, peak_effect_a, peak_effect_b``, of the patch where
    they differ most ``quantity, largest_difference, largest_layer, largest_low, largest_high, largest_p``, or
    ``reason``, why they are not subtracted; then the runs without a match, ``a`` or ``b`` being "".
    """

    runs: tuple[FinishedRun, ...]
    warnings: tuple[str, ...]
    overview: pd.DataFrame
    profiles: pd.DataFrame
    differences: pd.DataFrame
    not_subtracted: pd.DataFrame
    settings: pd.DataFrame
    rank_correlation: pd.DataFrame
    matched: pd.DataFrame
    left_out: tuple[str, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the names of their csv files; an index becomes the first column."""
        names = "overview profiles differences not_subtracted settings rank_correlation matched".split()
        tables = {name: getattr(self, name) for name in names}
        return {  # a run may have the index's name
            name: table if table.index.name is None else table.reset_index(allow_duplicates=True)
            for name, table in tables.items()
        }


def find_runs(folders: Sequence[Path]) -> list[RunLocation]:
    """The finished patching runs in and below folders, each once, in order of folder and path.

    A group is named as its folder, numbered where several folders have one name. A run is named by its path below the
    folder; of several folders the group comes first. Raises ``VitPatchError`` for a folder that does not exist or holds
    no manifest.
    """
    for folder in folders:
        if not folder.is_dir():
            raise VitPatchError(f"{folder}: no such folder; give a run's or a sweep's")
    paths = [[file.parent for file in _files_of_runs(folder, "manifest.json") if _is_run(file)] for folder in folders]
    for folder, found in zip(folders, paths, strict=True):
        if not found:
            raise VitPatchError(f"{folder}: no finished run of this version is in or below it")
    return _locate(folders, paths)


def fixed_overrides(folders: Sequence[Path]) -> dict[str, str]:
    """What was typed for all runs of each sweep's folder, in one text, by the folder's name, "" where it is alone."""
    records = [_read_json(file) if (file := folder / SWEEP_FILE).exists() else {} for folder in folders]
    names = list(_group_names(folders)) if len(folders) > 1 else [""]
    shared = (describe_fixed(record.get("fixed", ())) for record in records)
    return {name: text for name, text in zip(names, shared, strict=True) if text}


def list_unfinished(folders: Sequence[Path]) -> list[str]:
    """The patching runs in and below folders that have no manifest: name, state and reason, a line each."""
    paths = [
        [file.parents[1] for file in _files_of_runs(folder, ".hydra/hydra.yaml") if _is_unfinished(file)]
        for folder in folders
    ]
    states = [(run.name, read_status(run.folder)) for run in _locate(folders, paths)]
    return [f"{name}: {state.status}: {state.reason}" for name, state in states if not state.is_done]


def _files_of_runs(folder: Path, file: str) -> list[Path]:
    """Files with this name in and below a folder, without those inside folders of ``NOT_RUNS``."""
    levels = len(Path(file).parts)
    return [
        path for path in natural_sort(folder.rglob(file)) if not NOT_RUNS & {*path.relative_to(folder).parts[:-levels]}
    ]


def _is_run(manifest: Path) -> bool:
    """Whether a manifest is of a patching run, or cannot be read; others are of training or of another program."""
    try:
        return "run_id" in _read_json(manifest)
    except ValueError:
        return True


def _is_unfinished(hydra: Path) -> bool:
    """Whether a ``hydra.yaml`` is of a patching run that has no manifest."""
    if (hydra.parents[1] / "manifest.json").exists():
        return False
    try:
        return yaml.safe_load(hydra.read_text(encoding="utf-8"))["hydra"]["job"]["name"] == "patch"
    except (ValueError, KeyError, TypeError, yaml.YAMLError):  # half-written, or not Hydra's
        return False


def _locate(folders: Sequence[Path], paths: Sequence[Sequence[Path]]) -> list[RunLocation]:
    """Locations of the runs at ``paths`` (by folder), each once."""
    runs: dict[Path, RunLocation] = {}
    for folder, group, of_folder in zip(folders, _group_names(folders), paths, strict=True):
        for path in of_folder:
            below = path.relative_to(folder).as_posix()
            name = "/".join(part for part in (group if len(folders) > 1 else "", below) if part not in ("", "."))
            runs.setdefault(path.resolve(), RunLocation(name or group, group, RunFolder(path)))
    return list(runs.values())


def _group_names(folders: Sequence[Path]) -> Iterator[str]:
    names = [folder.resolve().name for folder in folders]
    often, seen = Counter(names), Counter()
    for name in names:
        seen[name] += 1
        while (numbered := f"{name} ({seen[name]})") in often:
            seen[name] += 1
        yield numbered if often[name] > 1 else name


def load_run(location: RunLocation) -> FinishedRun:
    """Reads a finished run. Of its effects only the end of the file is read, which shows that the file is complete.

    Raises ``VitPatchError`` where a file is of another version, or broken.
    """
    folder = location.folder
    try:
        manifest = _read_json(folder.manifest)
        for part, keys in MANIFEST_KEYS.items():
            file = f"manifest.json, {part}," if part else "manifest.json"
            _check_names(file, keys.split(), manifest[part] if part else manifest)
        run = FinishedRun(**vars(location), manifest=manifest, summary=pd.read_csv(folder.summary))
        _check_names("manifest.json, view,", ("metric", "rival", "include"), run.identity)
        _check_names("summary.csv", SUMMARY_COLUMNS, run.summary)
        _check_names("examples.parquet", EXAMPLES_COLUMNS, run.examples())
        _check_names("effects.parquet", ("effect", *PATCH_COLUMNS), pq.read_schema(folder.effects).names)
        peak_row(run)
        if folder.pages.exists():
            run.example_pages()
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise broken_run(folder, "of another version, or a file is broken", error) from error
    return run


def broken_run(folder: RunFolder, what: str, error: Exception) -> VitPatchError:
    """The error of a run whose files cannot be used, in one line."""
    reason = one_line(error, 160)
    return VitPatchError(f"{folder.path}: {what} ({reason}); run it again (overwrite=true)")


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _check_names(file: str, expected: Iterable[str], present: Container[str]) -> None:
    if missing := [name for name in expected if name not in present]:
        raise ValueError(f"{file} has no {', '.join(missing)}")


def number_or_nan(value: float | None) -> float:
    """A number of a manifest; null becomes NaN."""
    return np.nan if value is None else float(value)


def peak_row(run: FinishedRun) -> pd.Series | None:
    """The row of ``summary.csv`` that the manifest calls the peak; ``None`` where there is no peak."""
    if (peak := run.manifest["peak"])["layer"] is None:
        return None
    is_peak = np.logical_and.reduce([run.summary[name] == value for name, value in peak.items()])
    if not is_peak.any():
        raise ValueError("summary.csv has no row of the manifest's peak")
    return run.summary[is_peak].iloc[0]
