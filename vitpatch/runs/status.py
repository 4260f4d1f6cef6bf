"""How a run stands, read from its folder, whoever made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from vitpatch.formatting import one_line
from vitpatch.runs.folder import RunFolder

DONE = ("finished", "finished before", "planned")
"""States with which a sweep is content."""


@dataclass(frozen=True)
class RunState:
    """A run of a sweep. ``state``: finished, ``finished before`` this start, planned, failed, interrupted, running,
    unfinished (killed), not started (the sweep ended before). ``seconds`` of a finished run, its peak's layer, and the
    effect there, on ``metric``; what is not known is ``None``.
    """

    run: str
    state: str
    reason: str = ""
    seconds: float | None = None
    peak_layer: int | None = None
    effect: float | None = None
    effect_low: float | None = None
    effect_high: float | None = None
    metric: str = ""

    @property
    def fell_short(self) -> bool:
        """Whether the sweep is not done with it."""
        return self.state not in DONE


def state_of(folder: RunFolder, since: float = 0.0) -> RunState:
    """How the run in a folder stands; one that was finished before ``since`` is ``finished before``."""
    if (holder := folder.holder()) is not None:
        return RunState(folder.path.name, "running", holder)
    try:
        state, reason = folder.state()
        if state != "finished":
            return RunState(folder.path.name, state, reason)
        if folder.manifest.stat().st_mtime < since:
            state = "finished before"
        manifest = folder.finished()
        found = {"seconds": manifest.get("seconds"), "metric": manifest.get("config", {}).get("metric", "")}
        return RunState(folder.path.name, state, **found, **_of_peak(folder, manifest))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        return RunState(folder.path.name, "failed", f"its files cannot be read ({one_line(error, 80)})")


def _of_peak(folder: RunFolder, manifest: dict[str, Any]) -> dict[str, Any]:
    """Layer and effect of the row of ``summary.csv`` that the manifest names; nothing where there is no peak."""
    peak = manifest.get("peak") or {}
    if peak.get("layer") is None or not folder.summary.exists():
        return {}
    summary = pd.read_csv(folder.summary)
    row = summary[(summary[list(peak)] == pd.Series(peak)).all(axis=1)].iloc[0]
    effect = {name: float(row[name]) for name in ("effect", "effect_low", "effect_high")}
    return {"peak_layer": int(row["layer"])} | effect
