"""How the runs of a sweep stand: read from their folders, whoever made them; in a table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from vitpatch.io import in_order
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.status import DONE, RunState, state_of
from vitpatch.titles import elided
from vitpatch.types import duration

LONGEST_RUN, LONGEST_REASON = 44, 60
"""Letters of a name and of a reason in the table."""


def states_of(root: Path, since: float) -> list[RunState]:
    """The runs of the sweep in ``root`` that were started since a time of the disk's clock, in order of their names,
    which are their paths below it."""
    found = [(folder.path.relative_to(root).as_posix(), state_of(folder, since)) for folder in _started(root, since)]
    return [replace(state, run=name) for name, state in found]


def _started(root: Path, since: float) -> list[RunFolder]:
    """Hydra writes ``.hydra/`` anew for every job it starts, with every launcher, also for one that is then skipped."""
    overrides = in_order(folder / ".hydra" / "overrides.yaml" for folder in _jobs_below(root))
    return [RunFolder(file.parent.parent) for file in overrides if _is_new(file, since)]


def _jobs_below(root: Path) -> Iterator[Path]:
    """The folders of jobs, which may be deeper than one below; what is in one is not looked into."""
    for folder, inside, _ in os.walk(root):
        if ".hydra" in inside:
            inside.clear()
            yield Path(folder)


def _is_new(file: Path, since: float) -> bool:
    return file.exists() and file.stat().st_mtime >= since


def not_started(folders: Sequence[str], states: Sequence[RunState]) -> list[RunState]:
    """Those of a sweep's ``folders`` of which there is no state."""
    known = {state.run for state in states}
    return [RunState(name, "not started") for name in dict.fromkeys(folders) if name not in known]


def lines(states: Sequence[RunState]) -> list[str]:
    """The table: run, state, seconds, peak layer, effect with its interval, and the first words of a reason."""
    metrics = {state.metric for state in states if state.metric}
    effect = f"effect ({metrics.pop()})" if len(metrics) == 1 else "effect"
    names = elided([state.run for state in states], LONGEST_RUN)  # no two the same
    rows = [("run", "state", "seconds", "peak layer", effect, "reason")]
    rows += [_cells(state, names[state.run]) for state in states]
    if not any(state.reason for state in states):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (str.ljust, str.ljust, str.rjust, str.rjust, str.ljust, str.ljust)
    return [
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=False)).rstrip()
        for row in rows
    ]


def _cells(state: RunState, name: str) -> tuple[str, ...]:
    return (
        name,
        state.state,
        "–" if state.seconds is None else f"{state.seconds:.1f}",
        "–" if state.peak_layer is None else str(state.peak_layer),
        _effect(state),
        state.reason if len(state.reason) <= LONGEST_REASON else f"{state.reason[: LONGEST_REASON - 1]}…",
    )


def _effect(state: RunState) -> str:
    if state.effect is None:
        return "–"
    known = state.effect_low == state.effect_low  # else NaN: one cluster
    return f"{state.effect:+.3f}" + (f" [{state.effect_low:+.3f}, {state.effect_high:+.3f}]" if known else "")


def shortcomings(states: Sequence[RunState]) -> list[str]:
    """A line for each reason why runs fell short, with their names."""
    names: dict[tuple[str, str], list[str]] = {}
    for state in states:
        if state.fell_short:
            names.setdefault((state.state, state.reason), []).append(state.run)
    said = [(state, " and ".join(runs), reason) for (state, reason), runs in names.items()]
    return [": ".join(filter(None, parts)) for parts in said]


def counted_up(states: Sequence[RunState], root: Path) -> str:
    """How many finished, in a line."""
    planned = sum(state.state == "planned" for state in states)
    finished = sum(state.state in DONE for state in states) - planned
    dry = f" ({planned} only planned, dry_run=true)" if planned else ""
    return f"{finished} of {len(states)} runs finished in {root}{dry}"


def as_table(states: Sequence[RunState]) -> pd.DataFrame:
    """The rows of ``states.csv``."""
    return pd.DataFrame([asdict(state) for state in states]).astype({"peak_layer": "Int64"})


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
    RunFolder(root).write_csv(root / "states.csv", as_table(states))
