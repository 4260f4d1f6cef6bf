"""Comparison → matplotlib figures, the page's charts for papers. No disk, no tracker."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from vitpatch.compare.comparison import Comparison
from vitpatch.compare.figure_words import INTERVALS, axis_words, labels_of, plain, sample, title_of
from vitpatch.compare.layout import grids, least_to_most, lines
from vitpatch.compare.page_tables import largest, place_words
from vitpatch.compare.profile_figures import grid_figure, overlay_figure, relative_depth_figure
from vitpatch.compare.run_labels import LONGEST, elided
from vitpatch.io import written_beside
from vitpatch.plots.style import BLUE, LEAST_HEIGHT, LEAST_LIMIT, ORANGE, colour_bar, headline, legend_below
from vitpatch.runs.folder import DPI

MOST_ROWS = 60
"""Runs or pairs in a figure that has a row each."""
FIGURES = re.compile(
    r"(grid|overlay|heatmap|peaks|differences|rank_correlation|relative_depth)(_[a-z0-9_]+)?[.](png|svg)"
)
"""Names of the files that ``draw`` and ``save`` make."""


def draw(comparison: Comparison) -> dict[str, Figure]:
    """The figures by the names of their files; without those that have nothing to show."""
    drawn: dict[str, Figure | None] = {}
    for i, grid in enumerate(found := grids(comparison), start=1):
        end = f"_{i}" if len(found) > 1 else ""
        drawn[f"grid{end}"] = grid_figure(comparison, grid)
        drawn[f"overlay{end}"] = overlay_figure(comparison, grid)
    for metric in (metrics := list(dict.fromkeys(comparison.overview["metric"]))):
        end = f"_{metric}" if len(metrics) > 1 else ""
        drawn[f"heatmap{end}"] = _heatmap(comparison, metric)
        drawn[f"peaks{end}"] = _peaks(comparison, metric)
    for quantity in ("effect", "recovered"):
        drawn[f"differences_{quantity}"] = _differences(comparison, quantity)
    drawn["rank_correlation"] = _rank_correlation(comparison)
    drawn["relative_depth"] = relative_depth_figure(comparison)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as ``path`` with .png and .svg after it, by rename."""
    for kind in ("png", "svg"):
        with written_beside(path.with_name(f"{path.name}.{kind}")) as beside:
            figure.savefig(beside, format=kind, dpi=DPI)


def _colours(axes: Axes, values: np.ndarray, limit: float, rows: Sequence[str], columns: Sequence[Any]) -> Any:
    """A heatmap with named rows and columns, 0 white."""
    limit = max(limit, LEAST_LIMIT)
    image = axes.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(columns)), [str(column) for column in columns], fontsize=8)
    return image


def _heatmap(comparison: Comparison, metric: str) -> Figure:
    """Run × layer; a dot where the interval leaves 0 out."""
    runs = comparison.overview[comparison.overview["metric"] == metric]
    table = lines(comparison)
    table = table[table["run"].isin(runs["run"])]
    names, layers = list(dict.fromkeys(table["line"]))[:MOST_ROWS], sorted(set(table["layer"]))
    cells = table.drop_duplicates(["line", "layer"]).set_index(["line", "layer"])
    effect, low, high = (
        cells[name].unstack().reindex(index=names, columns=layers).to_numpy(float)
        for name in ("effect", "effect_low", "effect_high")
    )
    size = 4.2 + 0.34 * len(layers), max(1.9 + 0.26 * len(names), LEAST_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = _colours(
        axes,
        effect,
        float(np.nanmax(np.abs(effect))),
        [plain(name) for name in elided(names, LONGEST).values()],
        layers,
    )
    for row, column in np.argwhere((low > 0) | (high < 0)):
        ink = "white" if abs(effect[row, column]) > 0.6 * np.nanmax(np.abs(effect)) else "#444444"
        axes.plot(column, row, "o", color=ink, markersize=2)
    axes.set_xlabel("layer")
    colour_bar(figure, image, [axes], f"mean {axis_words(metric)}")
    more = f"; the first {MOST_ROWS}" if table["line"].nunique() > MOST_ROWS else ""
    headline(figure, *title_of(comparison, f"run × layer{more}", f"{sample(runs)}; dot: 95 % interval without 0"))
    return figure


def _peaks(comparison: Comparison, metric: str) -> Figure | None:
    """Each run's peak effect with its interval, and its total effect."""
    runs = comparison.overview[(comparison.overview["metric"] == metric) & comparison.overview["peak_effect"].notna()]
    if not len(runs):
        return None
    labels, shown = labels_of(comparison), runs.iloc[:MOST_ROWS]
    rows = [
        {"value": row["peak_effect"], "low": row["peak_effect_low"], "high": row["peak_effect_high"]}
        | {"name": f"{labels[row['run']]}\n{row['peak_place']}"}
        for row in shown.to_dict("records")
    ]
    figure = _forest(rows, axis_words(metric).replace("\n", " "), "peak effect", 0.42)
    axes = figure.axes[0]
    axes.plot(shown["total_effect"], range(len(shown)), "|", color=ORANGE, markersize=13, label="total effect")
    legend_below(figure, [axes], 2)
    more = f"; the first {MOST_ROWS} runs" if len(runs) > MOST_ROWS else ""
    headline(figure, *title_of(comparison, f"peak of each run{more}", f"{sample(runs)}; {INTERVALS}"))
    return figure


def _forest(rows: Sequence[Mapping[str, Any]], words: str, label: str, height: float) -> Figure:
    """A point with its interval a row, from the top."""
    figure = Figure(figsize=(8, 1.5 + height * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="black", linewidth=0.8)
    places = np.arange(len(rows))
    value, low, high = (np.array([row[name] for row in rows], float) for name in ("value", "low", "high"))
    axes.hlines(places, low, high, color=BLUE, linewidth=1.8)
    axes.plot(value, places, "o", color=BLUE, markersize=5, label=label)
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(words)
    axes.grid(axis="x", alpha=0.25)
    return figure


def _differences(comparison: Comparison, quantity: str) -> Figure | None:
    """Of each pair the largest difference, with its interval."""
    pairs = [row for row in largest(comparison.differences) if row["quantity"] == quantity]
    if not pairs:
        return None
    labels, shown = labels_of(comparison), pairs[: MOST_ROWS // 2]
    rows = [
        {"value": row["difference"], "low": row["low"], "high": row["high"]}
        | {"name": f"{labels[row['a']]}\n− {labels[row['b']]}: {place_words(row)}"}
        for row in shown
    ]
    words = "difference in the share recovered" if quantity == "recovered" else "difference in effect"
    figure = _forest(rows, f"{words}, a − b, where it is largest", words, 0.45)
    counts = [row["n"] for row in pairs]
    images = f"{least_to_most(counts)} image{'s' * (max(counts) != 1)}"
    more = f"; the {len(shown)} largest of {len(pairs)} pairs" if len(shown) < len(pairs) else ""
    said = f"n = {images} included in both; 95 % intervals, both runs resampled together"
    caveat = "each the largest of its layers" + (": see the corrected p" if quantity != "recovered" else "")
    headline(figure, *title_of(comparison, f"paired differences{more}", said, caveat))
    return figure


def _rank_correlation(comparison: Comparison) -> Figure | None:
    """Runs × runs."""
    table = comparison.rank_correlation.iloc[:MOST_ROWS, :MOST_ROWS]
    if len(table) < 2:
        return None
    labels = labels_of(comparison)
    names = [labels[name] for name in table.columns]
    side = 0.3 * len(names)
    figure = Figure(figsize=(4.6 + side, 3.4 + side), layout="constrained")
    axes = figure.add_subplot()
    image = _colours(axes, table.to_numpy(float), 1.0, names, names)
    axes.tick_params(axis="x", rotation=90)
    if len(names) <= 20:
        for (row, column), value in np.ndenumerate(table.to_numpy(float)):
            ink = "white" if abs(value) > 0.6 else "black"
            axes.text(
                column,
                row,
                "" if np.isnan(value) else f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color=ink,
            )
    figure.colorbar(image, ax=axes, label="Spearman's rank correlation", pad=0.02)
    headline(figure, *title_of(comparison, "rank correlation of layer profiles", "of the series that has the peak"))
    return figure
