"""Where in a comparison's grid a profile stands: corruption × window, and a grid for each model, data, target, …"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vitpatch.compare.comparison import Comparison
from vitpatch.compare.run_labels import run_labels
from vitpatch.stats.result import series_of
from vitpatch.types import window_word

FACETS = ("model", "data", "site", "tokens", "heads", "direction", "donor", "metric", "include")
"""What profiles of one grid share, columns of ``overview``."""
MOST_SERIES = 8
"""Of a run with more, the one with the peak stands for it where runs stand beside each other."""
MOST_BESIDE = 24
"""Lines that a legend names, in a chart or figure that runs stand beside each other in."""


@dataclass(frozen=True)
class Panel:
    """A cell of a grid: its runs and their rows of ``profiles``, with the column ``line`` that tells them apart."""

    runs: tuple[str, ...]
    rows: pd.DataFrame

    @property
    def lines(self) -> list[str]:
        """The names of its lines, in order; one line may be called ""."""
        return list(dict.fromkeys(self.rows["line"]))


@dataclass(frozen=True)
class Grid:
    """Panels by corruption and window; ``title`` says in words what other grids differ in, "" where there is one."""

    title: str
    metric: str
    corruptions: tuple[str, ...]
    windows: tuple[str, ...]
    panels: Mapping[tuple[str, str], Panel]


def corruption_words(row: Mapping[str, object]) -> str:
    """Corruption and strength of a row of ``overview``."""
    strength = row["strength"]
    return f"{row['corruption']} ({strength})" if strength and strength == strength else str(row["corruption"])


def grids(comparison: Comparison) -> list[Grid]:
    """All profiles, each in one panel; a panel holds several runs where these differ in what makes no facet."""
    overview = comparison.overview
    differing = [name for name in FACETS if overview[name].nunique(dropna=False) > 1]
    found = []
    for values, runs in overview.groupby(list(FACETS), sort=False, dropna=False):
        said = dict(zip(FACETS, values, strict=True))
        title = ", ".join(f"{name} {said[name]}" for name in differing if said[name])
        found.append(_grid(title, runs, comparison.profiles))
    return found


def _grid(title: str, runs: pd.DataFrame, profiles: pd.DataFrame) -> Grid:
    corruption = {row["run"]: corruption_words(row) for row in runs.to_dict("records")}
    rows = profiles[profiles["run"].isin(corruption)]
    places = pd.Series(list(zip(rows["run"].map(corruption), rows["window"].map(window_word), strict=True)), rows.index)
    panels = {place: _panel(rows.loc[group.index]) for place, group in places.groupby(places, sort=False)}
    windows = [window_word(window) for window in sorted(set(rows["window"]), key=lambda window: (window < 0, window))]
    return Grid(title, str(runs["metric"].iloc[0]), tuple(dict.fromkeys(corruption.values())), tuple(windows), panels)


def _panel(rows: pd.DataFrame) -> Panel:
    runs = tuple(dict.fromkeys(rows["run"]))
    names = pd.concat([pd.Series(series_of(own), own.index) for _, own in rows.groupby("run", sort=False)])
    if len(runs) > 1:
        names = rows["run"].map(run_labels(runs)).str.cat(names, sep=" ").str.strip()
    return Panel(runs, rows.assign(line=names))


def images_of(rows: Sequence[pd.DataFrame]) -> str:
    """``n = 6`` of a line's rows of ``profiles``."""
    return f"n = {least_to_most([n for some in rows for n in some['n']])}"


def least_to_most(counts: Sequence[int]) -> str:
    """Counts in words: ``6``, or ``4–6`` where they differ."""
    low, high = int(min(counts)), int(max(counts))
    return str(low) if low == high else f"{low}–{high}"


def window_heading(window: str) -> str:
    """A window's name in a grid as the heading of its panels."""
    return f"window {window}" if window.isdigit() else window


def overlaid(grid: Grid, window: str) -> dict[str, pd.DataFrame]:
    """Rows by line, of one window, the lines named by corruption; of a panel with more than ``MOST_SERIES`` lines the
    one with the largest effect."""
    found = {}
    for corruption in grid.corruptions:
        panel = grid.panels.get((corruption, window))
        for name in _some_lines(panel) if panel is not None else []:
            found[f"{corruption} {name}".strip()] = panel.rows[panel.rows["line"] == name]
    return found


def _some_lines(panel: Panel) -> Sequence[str]:
    if len(panel.lines) <= MOST_SERIES:
        return panel.lines
    return [panel.rows.loc[panel.rows["effect"].abs().idxmax(), "line"]]


def lines(comparison: Comparison) -> pd.DataFrame:
    """``profiles`` as lines that stand beside each other, named by ``line``; of a run with more than ``MOST_SERIES``
    series the one with the peak."""
    labels = run_labels(list(comparison.overview["run"]))
    kept = []
    for row in comparison.overview.to_dict("records"):
        rows = comparison.profiles[comparison.profiles["run"] == row["run"]]
        if rows["series"].nunique() > MOST_SERIES:
            rows = rows[rows["series"] == _peak_series(rows, row)]
        kept.append(rows.assign(line=[f"{labels[row['run']]} {series}".strip() for series in rows["series"]]))
    return pd.concat(kept, ignore_index=True)


def _peak_series(rows: pd.DataFrame, of_overview: Mapping[str, object]) -> str:
    is_peak = (rows["layer"] == of_overview["peak_layer"]) & (rows["effect"] == of_overview["peak_effect"])
    return str((rows[is_peak] if is_peak.any() else rows)["series"].iloc[0])


def scale_of(comparison: Comparison, metric: str) -> tuple[float, float]:
    """The one scale of all panels of a metric: 0, effects with their intervals, and total effects."""
    of = comparison.overview[comparison.overview["metric"] == metric]
    rows = comparison.profiles[comparison.profiles["run"].isin(of["run"])]
    ends = [rows[name].to_numpy(float) for name in ("effect", "effect_low", "effect_high")]
    known = np.concatenate([*ends, of["total_effect"].to_numpy(float), [0.0]])
    known = known[np.isfinite(known)]
    low, high = float(known.min()), float(known.max())
    room = 0.04 * max(high - low, 1e-6)
    return low - room, high + room
