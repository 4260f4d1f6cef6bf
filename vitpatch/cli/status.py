"""The status of a sweep's runs, read from their folders, whichever process made them; as a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from vitpatch.formatting import format_duration, format_interval, shorten_names
from vitpatch.io import natural_sort, write_csv
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.results import RunStatus, read_status

LONGEST_RUN, LONGEST_REASON = 44, 60
"""Letters of a name and of a reason in the table."""


def read_statuses(root: Path, since: float) -> list[RunStatus]:
    """The runs of the sweep in ``root`` that were started since a time of the disk's clock, in order of their names.

    A run's name is its path below ``root``.
    """
    return [
        replace(read_status(folder, since), run=folder.path.relative_to(root).as_posix())
        for folder in _find_started(root, since)
    ]


def _find_started(root: Path, since: float) -> list[RunFolder]:
    """The folders of the jobs that were started since: Hydra then writes ``.hydra/`` anew, with every launcher."""
    jobs = []
    for folder, inside, _ in os.walk(root):
        if ".hydra" in inside:
            inside.clear()  # a job's folder has no other job below
            jobs.append(Path(folder))
    return [RunFolder(job) for job in natural_sort(jobs) if _is_new(job / ".hydra" / "overrides.yaml", since)]


def _is_new(file: Path, since: float) -> bool:
    return file.exists() and file.stat().st_mtime >= since


def list_not_started(folders: Sequence[str], runs: Sequence[RunStatus]) -> list[RunStatus]:
    """A status for each of a sweep's ``folders`` that is not among ``runs``."""
    known = {run.run for run in runs}
    return [RunStatus(name, "not started") for name in dict.fromkeys(folders) if name not in known]


def format_table(runs: Sequence[RunStatus]) -> list[str]:
    """The lines of a table: run, state, seconds, peak layer, effect with its interval, and the start of a reason."""
    metrics = {run.metric for run in runs if run.metric}
    effect = f"effect ({metrics.pop()})" if len(metrics) == 1 else "effect"
    names = shorten_names([run.run for run in runs], LONGEST_RUN)  # no two the same
    table = pd.DataFrame(
        {
            "run": names[run.run],
            "state": run.status,
            "seconds": "–" if run.seconds is None else f"{run.seconds:.1f}",
            "peak layer": "–" if run.peak_layer is None else str(run.peak_layer),
            effect: format_interval(run.effect, run.effect_low, run.effect_high),
            "reason": run.reason if len(run.reason) <= LONGEST_REASON else f"{run.reason[: LONGEST_REASON - 1]}…",
        }
        for run in runs
    )
    if not table["reason"].any():
        table = table.drop(columns="reason")
    widths = {column: max(len(column), *table[column].str.len()) for column in table}
    sides = {column: ">" if column in ("seconds", "peak layer") else "<" for column in table}
    cells = {column: f"{{:{sides[column]}{widths[column]}}} ".format for column in table}
    text = table.to_string(index=False, justify="left", formatters=cells)
    return [line.rstrip() for line in text.splitlines()]


def list_unfinished(runs: Sequence[RunStatus]) -> list[str]:
    """A line for each reason why runs are not done, with their names."""
    names: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        if not run.is_done:
            names.setdefault((run.status, run.reason), []).append(run.run)
    return [": ".join(filter(None, (status, " and ".join(some), reason))) for (status, reason), some in names.items()]


def count_finished(runs: Sequence[RunStatus], root: Path) -> str:
    """How many finished, in a line."""
    planned = sum(run.status == "planned" for run in runs)
    finished = sum(run.is_done for run in runs) - planned
    dry = f" ({planned} only planned, dry_run=true)" if planned else ""
    return f"{finished} of {len(runs)} runs finished in {root}{dry}"


def describe_progress(root: Path, since: float, now: float, total: int) -> str | None:
    """How many of a sweep's ``total`` runs have ended, and the time left as runs took so far; ``None`` = all have."""
    folders = _find_started(root, since)
    ended = [folder for folder in folders if folder.manifest.exists() or _is_new(folder.failed, since)]
    made = [folder for folder in ended if _is_new(folder.manifest, since)]
    left = total - len(ended)
    if left <= 0:
        return None
    about = f", about {format_duration((now - since) / len(made) * left)} left" if made else ""
    return f"sweep: {len(ended)} of {total} runs are through{about}"


def write_states(runs: Sequence[RunStatus], root: Path) -> None:
    """Writes ``states.csv`` into the sweep's folder."""
    table = pd.DataFrame([asdict(run) for run in runs]).astype({"peak_layer": "Int64"})
    write_csv(root / "states.csv", table.rename(columns={"status": "state"}))
