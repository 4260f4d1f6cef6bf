"""How profiles are laid out in charts: panels by corruption and window, lines, scales, and the words at them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vitpatch.compare.load import Comparison
from vitpatch.compare.tables import format_number, format_value, is_known
from vitpatch.formatting import LONGEST, run_labels, shorten_names
from vitpatch.plots.profile import is_clipped
from vitpatch.plots.style import METRIC_NAMES
from vitpatch.stats.result import series_names
from vitpatch.types import Metric, format_window

FACETS = ("model", "data", "site", "tokens", "heads", "transfer", "metric", "include")
"""Columns of ``overview`` in which the runs of one grid are equal."""
MAX_SERIES = 8
"""Of a run with more, the one with the peak is drawn where several runs are in one chart; alone it has points without
lines."""
MAX_LINES = 24  # lines of a chart of several runs
TOOLTIPS = {
    "line": "line",
    "layer": "layer",
    "layers": "layers patched",
    "effect": "effect [95 %]",
    "recovered": "recovered [95 %]",
    "p": "p, corrected",
}
"""Text fields of ``profile_rows`` with their titles."""


@dataclass(frozen=True)
class Grid:
    """Panels by corruption and window; ``title`` says in what it differs from other grids, "" where there is one.

    A panel has the rows of ``profiles`` of its runs, with the name of their ``line``, "" = the only one.
    """

    title: str
    metric: str
    transfer: str
    corruptions: tuple[str, ...]
    windows: tuple[str, ...]
    panels: Mapping[tuple[str, str], pd.DataFrame]


def make_grids(comparison: Comparison) -> list[Grid]:
    """Grids that hold every profile, each in one panel. Runs that differ only outside ``FACETS`` share a panel."""
    overview = comparison.overview
    differing = [name for name in FACETS if overview[name].nunique(dropna=False) > 1]
    grids = []
    for key, runs in overview.groupby(list(FACETS), sort=False, dropna=False):
        facets = dict(zip(FACETS, key, strict=True))
        values = {name: facets[name] for name in differing if facets[name]}
        title = " · ".join(value if name == "transfer" else f"{name} {value}" for name, value in values.items())
        grids.append(_make_grid(title, runs, comparison.profiles))
    return grids


def _make_grid(title: str, runs: pd.DataFrame, profiles: pd.DataFrame) -> Grid:
    corruptions = _corruption_words(runs)
    rows = profiles[profiles["run"].isin(corruptions)]
    places = [rows["run"].map(corruptions), rows["window"].map(format_window)]
    panels = {place: _name_lines(panel) for place, panel in rows.groupby(places, sort=False)}
    windows = sorted(set(rows["window"]), key=lambda window: (window < 0, window))
    metric, transfer = (str(runs[name].iloc[0]) for name in ("metric", "transfer"))
    names = tuple(dict.fromkeys(corruptions.values()))
    return Grid(title, metric, transfer, names, tuple(map(format_window, windows)), panels)


def _name_lines(panel: pd.DataFrame) -> pd.DataFrame:
    names = pd.concat([pd.Series(series_names(own), own.index) for _, own in panel.groupby("run", sort=False)])
    if panel["run"].nunique() > 1:
        labels = run_labels(list(dict.fromkeys(panel["run"])))
        names = panel["run"].map(labels).str.cat(names, sep=" ").str.strip()
    return panel.assign(line=names)


def overlay_rows(grid: Grid, window: str) -> pd.DataFrame:
    """Rows of one window, lines named by corruption; of a panel with more than ``MAX_SERIES`` lines the one with the
    largest effect."""
    tables = []
    for corruption in grid.corruptions:
        if (rows := grid.panels.get((corruption, window))) is not None:
            rows = largest_series(rows, "line")
            tables.append(rows.assign(line=(f"{corruption} " + rows["line"]).str.strip()))
    return pd.concat(tables, ignore_index=True)


def largest_series(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows; of more than ``MAX_SERIES`` series, named by ``column``, those of the one with the largest effect."""
    if rows[column].nunique() <= MAX_SERIES:
        return rows
    return rows[rows[column] == rows.loc[rows["effect"].abs().idxmax(), column]]


def share_tables(comparison: Comparison) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Profiles of shares recovered that can stand on one axis, whatever is put into what: title, window and rows each.

    Rows as of ``overlay_rows``, of runs whose share is known and that are equal in ``FACETS`` but for ``transfer``, of
    two runs or more, of each its ``largest_series``; a line is named by corruption and, where they differ, by what is
    put into what.
    """
    profiles = comparison.profiles[comparison.profiles["recovered"].notna()]
    overview = comparison.overview[comparison.overview["run"].isin(profiles["run"])]
    facets = [name for name in FACETS if name != "transfer"]
    differing = [name for name in facets if overview[name].nunique(dropna=False) > 1]
    for key, runs in overview.groupby(facets, sort=False, dropna=False):
        values = dict(zip(facets, key, strict=True))
        title = " · ".join(f"{name} {values[name]}" for name in differing if values[name])
        names = _corruption_words(runs)
        if runs["transfer"].nunique() > 1:
            names = {row["run"]: f"{names[row['run']]}, {row['transfer']}" for row in runs.to_dict("records")}
        for window, rows in profiles[profiles["run"].isin(names)].groupby("window"):
            own = {run: names[run] for run in rows["run"].unique()}
            if len(set(own.values())) < len(own):
                own = run_labels(list(own))
            if len(own) > 1:
                rows = pd.concat([largest_series(of_run, "series") for _, of_run in rows.groupby("run", sort=False)])
                lines = rows["run"].map(own).str.cat(rows["series"], sep=" ").str.strip()
                yield title, format_window(window), rows.assign(line=lines)


def _corruption_words(runs: pd.DataFrame) -> dict[str, str]:
    """By run its corruption with its strength, of rows of ``overview``."""
    return {
        row["run"]: f"{row['corruption']} ({row['strength']})" if is_known(row["strength"]) else str(row["corruption"])
        for row in runs.to_dict("records")
    }


def lines_table(comparison: Comparison) -> pd.DataFrame:
    """``profiles`` as lines of one chart, named by ``line``; of a run with more than ``MAX_SERIES`` series the one with
    the peak."""
    labels = run_labels(list(comparison.overview["run"]))
    tables = []
    for row in comparison.overview.to_dict("records"):
        rows = peak_series(comparison.profiles[comparison.profiles["run"] == row["run"]], "series", row)
        tables.append(rows.assign(line=(f"{labels[row['run']]} " + rows["series"]).str.strip()))
    return pd.concat(tables, ignore_index=True)


def peak_series(rows: pd.DataFrame, column: str, overview_row: Mapping[str, object]) -> pd.DataFrame:
    """The rows of a run; of more than ``MAX_SERIES`` series, named by ``column``, those of the series with the peak, or
    of the first where there is no peak."""
    if rows[column].nunique() <= MAX_SERIES:
        return rows
    is_peak = (rows["layer"] == overview_row["peak_layer"]) & (rows["effect"] == overview_row["peak_effect"])
    return rows[rows[column] == (rows[is_peak] if is_peak.any() else rows)[column].iloc[0]]


def effect_range(comparison: Comparison, metric: str, transfer: str) -> tuple[float, float]:
    """The one scale of all panels of a metric and of what is put into what, since effects of the reverse have the other
    sign: 0, effects with their intervals, and total effects."""
    overview = comparison.overview
    runs = overview[(overview["metric"] == metric) & (overview["transfer"] == transfer)]
    rows = comparison.profiles[comparison.profiles["run"].isin(runs["run"])]
    effects = rows[["effect", "effect_low", "effect_high"]].to_numpy(float)
    ends = np.array([0.0, *effects.flat, *runs["total_effect"].astype(float)])
    known = ends[np.isfinite(ends)]
    low, high = float(known.min()), float(known.max())
    margin = 0.04 * max(high - low, 1e-6)
    return low - margin, high + margin


def shorten_line_names(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with names of lines that are short enough for a legend, no two the same."""
    return rows.assign(line=rows["line"].map(shorten_names(list(dict.fromkeys(rows["line"])), LONGEST)))


def legend_lines(rows: pd.DataFrame, with_depth: bool = False) -> tuple[pd.DataFrame, str]:
    """Rows of the first ``MAX_LINES`` lines, their names short and with the number of images (and of blocks); and in
    words how many lines are left out."""
    lines = list(dict.fromkeys(rows["line"]))
    names = {}
    rows = shorten_line_names(rows[rows["line"].isin(lines[:MAX_LINES])])
    for line, of_line in rows.groupby("line", sort=False):
        depth = f"{of_line['depth'].iloc[0]} blocks, " if with_depth else ""
        names[line] = f"{line} ({depth}n = {format_counts(of_line['n'])})".strip()
    truncation = f"the first {MAX_LINES} of {len(lines)} lines" if len(lines) > MAX_LINES else ""
    return rows.assign(line=rows["line"].map(names)), truncation


def profile_rows(rows: pd.DataFrame, column: str = "effect") -> pd.DataFrame:
    """Rows of ``profiles`` with a ``line`` as ``charts.Profile`` takes them, with the text fields of ``TOOLTIPS``."""
    records = rows.to_dict("records")
    layers = [(row["first_layer"], row["last_layer"]) for row in records]
    return pd.DataFrame(
        {
            "line": rows["line"].to_numpy(),
            "layer": rows["layer"].to_numpy(),
            "value": rows[column].to_numpy(),
            "low": [row.get(f"{column}_low", np.nan) for row in records],
            "high": [row.get(f"{column}_high", np.nan) for row in records],
            "clipped": is_clipped(rows),
            "layers": [str(first) if first == last else f"{first}–{last}" for first, last in layers],
            "effect": [format_value(row, "effect") for row in records],
            "recovered": [format_value(row, "recovered", ".0%") for row in records],
            "p": [format_number(row.get("p"), ".4f") for row in records],
        }
    )


def clip_intervals(rows: pd.DataFrame) -> tuple[pd.DataFrame, tuple[float, float] | None, str]:
    """Rows of ``profile_rows`` whose intervals end on a scale, the scale, and words on what goes on beyond it.

    The scale holds 0 and all values, and beside them has room for as much again; ``low_beyond`` and ``high_beyond`` say
    which ends are cut there. ``None`` and "" where none is.
    """
    low, high = min(0.0, rows["value"].min()), max(0.0, rows["value"].max())
    reach = max(high - low, 1.0)
    domain = max(low - reach, rows["low"].min()), min(high + reach, rows["high"].max())
    ends = {"low_beyond": rows["low"] < domain[0], "high_beyond": rows["high"] > domain[1]}
    if not any(beyond.any() for beyond in ends.values()):
        return rows, None, ""
    clipped = {end: rows[end].clip(*domain) for end in ("low", "high")}
    return rows.assign(**clipped, **ends), domain, "arrow: an interval goes on beyond the scale"


def effect_title(metric: str) -> str:
    """The title of an axis of effects on a metric."""
    return f"effect on the {METRIC_NAMES[Metric(metric)]}"


def window_heading(window: str) -> str:
    """The heading of a window's panels: ``window 3``, or the name of the window where it is not a number."""
    return f"window {window}" if window.isdigit() else window


def format_counts(counts: Iterable[int]) -> str:
    """Counts in words: ``6``, or ``4–6`` where they differ."""
    low, high = int(min(counts)), int(max(counts))
    return str(low) if low == high else f"{low}–{high}"


def count_words(counts: Iterable[int], noun: str) -> str:
    """Counts of things in words: ``1 image``, ``4–6 images``."""
    return f"{format_counts(counts)} {noun}{'s' * (max(counts) != 1)}"


def describe_sample(runs: pd.DataFrame) -> str:
    """Images and clusters of rows of ``overview``: ``n = 4–6 images in 3 clusters``."""
    return f"n = {count_words(runs['n'], 'image')} in {count_words(runs['n_clusters'], 'cluster')}"
