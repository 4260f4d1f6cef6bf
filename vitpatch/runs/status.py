"""The status of a run, read from its folder, whichever process made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from vitpatch.formatting import one_line
from vitpatch.runs.folder import RunFolder

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
        manifest = folder.finished()
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
