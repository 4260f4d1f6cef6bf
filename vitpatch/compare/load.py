"""Finished runs read from their folders, and the tables that a comparison of them is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from vitpatch.errors import VitPatchError
from vitpatch.formatting import describe_fixed
from vitpatch.io import natural_sort
from vitpatch.names import SWEEP_FILE
from vitpatch.runs.folder import VIEWS, RunFolder
from vitpatch.runs.reading import FinishedRun, RunLocation, read_json
from vitpatch.runs.results import read_status

COMPARISON = "comparison"  # the folder inside a sweep's that comparisons are written to
NOT_RUNS = {COMPARISON, VIEWS, "wandb", ".hydra"}  # folders that hold copies, in which nothing is a run of its own


@dataclass(frozen=True)
class Comparison:
    """Tables that compare finished runs; page and figures are made from them alone.

    ``warnings``: what the runs should agree in and do not (weights of one model, data, code version), a line each.
    ``left_out``: runs that are not compared, being broken or not finished, a line each. ``fixed``: what was typed for
    all runs of a folder, by the folder's name, "" = the only one. ``title`` is the page's, "" = made of the runs.

    Tables, in which ``run``, ``a`` and ``b`` are ``FinishedRun.name``:

    ``overview``, a row a run: ``run, group, title, model, data, corruption`` (in words, also that there is none),
    ``strength, calibrated`` (in words, "" = not calibrated), ``site, tokens, heads, windows, direction, donor,
    transfer`` (the last two in words), ``metric, include, n, n_clusters, accuracy_clean, accuracy_corrupt, prob_clean,
    prob_corrupt, total_effect, total_effect_low, total_effect_high, peak_layer, peak_place`` (in words),
    ``peak_relative_depth, peak_effect, peak_effect_low, peak_effect_high, peak_recovered, peak_recovered_low,
    peak_recovered_high, peak_p, peak_set`` (in words), ``peak_stability, peak_effect_split_halves, depth`` (blocks of
    the model), ``seconds, weights, data_digest, code, finding`` (sentences), ``notes, folder, config`` (paths relative
    to the comparison's folder), ``wandb_url``.

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
    title: str = ""

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
    records = [read_json(file) if (file := folder / SWEEP_FILE).exists() else {} for folder in folders]
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
        return "run_id" in read_json(manifest)
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


def number_or_nan(value: float | None) -> float:
    """A number of a manifest; null becomes NaN."""
    return np.nan if value is None else float(value)
