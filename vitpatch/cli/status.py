"""The status of a sweep's runs, read from their folders, whichever process made them; as a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from vitpatch.compare.run_labels import elided
from vitpatch.formatting import duration, format_interval
from vitpatch.io import in_order
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.status import DONE, RunState, state_of

LONGEST_RUN, LONGEST_REASON = 44, 60
"""Letters of a name and of a reason in the table."""


def read_states(root: Path, since: float) -> list[RunState]:
    """The runs of the sweep in ``root`` that were started since a time of the disk's clock, in order of their names,
    which are their paths below it."""
    return [
        replace(state_of(folder, since), run=folder.path.relative_to(root).as_posix())
        for folder in _started(root, since)
    ]


def _started(root: Path, since: float) -> list[RunFolder]:
    """Hydra writes ``.hydra/`` anew for every job it starts, with every launcher, also for one that is then skipped."""
    jobs = []
    for folder, inside, _ in os.walk(root):
        if ".hydra" in inside:
            inside.clear()  # a job's folder has no other job below
            jobs.append(Path(folder))
    return [RunFolder(job) for job in in_order(jobs) if _is_new(job / ".hydra" / "overrides.yaml", since)]


def _is_new(file: Path, since: float) -> bool:
    return file.exists() and file.stat().st_mtime >= since


def not_started(folders: Sequence[str], states: Sequence[RunState]) -> list[RunState]:
    """Those of a sweep's ``folders`` of which there is no state."""
    known = {state.run for state in states}
    return [RunState(name, "not started") for name in dict.fromkeys(folders) if name not in known]


def format_table(states: Sequence[RunState]) -> list[str]:
    """The lines of a table: run, state, seconds, peak layer, effect with its interval, and the start of a reason."""
    metrics = {state.metric for state in states if state.metric}
    effect = f"effect ({metrics.pop()})" if len(metrics) == 1 else "effect"
    names = elided([state.run for state in states], LONGEST_RUN)  # no two the same
    table = pd.DataFrame(
        {
            "run": names[state.run],
            "state": state.state,
            "seconds": "–" if state.seconds is None else f"{state.seconds:.1f}",
            "peak layer": "–" if state.peak_layer is None else str(state.peak_layer),
            effect: format_interval(state.effect, state.effect_low, state.effect_high),
            "reason": state.reason if len(state.reason) <= LONGEST_REASON else f"{state.reason[: LONGEST_REASON - 1]}…",
        }
        for state in states
    )
    if not table["reason"].any():
        table = table.drop(columns="reason")
    widths = {column: max(len(column), *table[column].str.len()) for column in table}
    sides = {column: ">" if column in ("seconds", "peak layer") else "<" for column in table}
    cells = {column: f"{{:{sides[column]}{widths[column]}}} ".format for column in table}
    text = table.to_string(index=False, justify="left", formatters=cells)
    return [line.rstrip() for line in text.splitlines()]


def list_shortcomings(states: Sequence[RunState]) -> list[str]:
    """A line for each reason why runs fell short, with their names."""
    runs: dict[tuple[str, str], list[str]] = {}
    for state in states:
        if state.fell_short:
            runs.setdefault((state.state, state.reason), []).append(state.run)
    return [": ".join(filter(None, (state, " and ".join(names), reason))) for (state, reason), names in runs.items()]


def count_finished(states: Sequence[RunState], root: Path) -> str:
    """How many finished, in a line."""
    planned = sum(state.state == "planned" for state in states)
    finished = sum(state.state in DONE for state in states) - planned
    dry = f" ({planned} only planned, dry_run=true)" if planned else ""
    return f"{finished} of {len(states)} runs finished in {root}{dry}"


def progress(root: Path, since: float, now: float, total: int) -> str | None:
    """How far a sweep of ``total`` runs is, with the time left by the runs made so far; ``None`` = it is through."""
    folders = _started(root, since)
    ended = [folder for folder in folders if folder.manifest.exists() or _is_new(folder.failed, since)]
    made = [folder for folder in ended if _is_new(folder.manifest, since)]
    left = total - len(ended)
    if left <= 0:
        return None
    about = f", about {duration((now - since) / len(made) * left)} left" if made else ""
    return f"sweep: {len(ended)} of {total} runs are through{about}"


def write(states: Sequence[RunState], root: Path) -> None:
    """Writes ``states.csv`` into the sweep's folder."""
    table = pd.DataFrame([asdict(state) for state in states]).astype({"peak_layer": "Int64"})
    RunFolder(root).write_csv(root / "states.csv", table)
