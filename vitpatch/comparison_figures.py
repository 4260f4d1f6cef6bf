"""Comparison → matplotlib figures, the page's charts for papers. No disk, no tracker."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitpatch.comparison import Comparison
from vitpatch.facets import MOST_SERIES, Grid, Panel, grids, images_of, lines, scale_of
from vitpatch.page_tables import largest, place_words
from vitpatch.plots import (
    APART,
    BLUE,
    GREY,
    METRIC_NAMES,
    ORANGE,
    STYLES,
    cut,
    headline,
    layer_words,
    legend_below,
    number_layers,
    whiskers,
)
from vitpatch.profiles import clipped_of
from vitpatch.run_labels import elided, run_labels
from vitpatch.spec import Metric, counted
from vitpatch.store import DPI, written_beside

MOST_ROWS = 60
"""Runs or pairs in a figure that has a row each."""
MOST_NAMED = 24
"""Lines that a legend names."""
LONGEST = 46
"""Letters of a run's name."""
INTERVALS = "95 % bootstrap intervals over clusters"


def draw(comparison: Comparison) -> dict[str, Figure]:
    """The figures by the names of their files; without those that have nothing to show."""
    drawn: dict[str, Figure | None] = {}
    for i, grid in enumerate(found := grids(comparison), start=1):
        end = f"_{i}" if len(found) > 1 else ""
        drawn[f"grid{end}"] = _grid(comparison, grid)
        drawn[f"overlay{end}"] = _overlay(comparison, grid)
    for metric in (metrics := list(dict.fromkeys(comparison.overview["metric"]))):
        end = f"_{metric}" if len(metrics) > 1 else ""
        drawn[f"heatmap{end}"] = _heatmap(comparison, metric)
        drawn[f"peaks{end}"] = _peaks(comparison, metric)
    for quantity in ("effect", "recovered"):
        drawn[f"differences_{quantity}"] = _differences(comparison, quantity)
    drawn["rank_correlation"] = _rank_correlation(comparison)
    drawn["relative_depth"] = _relative_depth(comparison)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as ``path`` with .png and .svg after it, by rename."""
    for kind in ("png", "svg"):
        with written_beside(path.with_name(f"{path.name}.{kind}")) as beside:
            figure.savefig(beside, format=kind, dpi=DPI)


def sample(runs: pd.DataFrame) -> str:
    """Images and clusters of some rows of ``overview``, in words; where they differ, from the least to the most."""
    counts = []
    for column, word in (("n", "image"), ("n_clusters", "cluster")):
        low, high = int(runs[column].min()), int(runs[column].max())
        counts.append(counted(low, word) if low == high else f"{low}–{high} {word}s")
    return f"n = {counts[0]} in {counts[1]}"


def _title(comparison: Comparison, words: str, *lines: str) -> Sequence[str]:
    """A figure's title: what it shows, of what, and ``lines``."""
    overview = comparison.overview
    alike = [
        str(overview[name].iloc[0]) for name in ("model", "data", "site", "direction") if overview[name].nunique() == 1
    ]
    return [_plain(words), *([_plain(", ".join(alike))] if alike else []), *lines]


def _short(names: Sequence[str]) -> list[str]:
    """Names of runs or lines at an axis."""
    return [_plain(name) for name in elided(names, LONGEST).values()]


def _labels(comparison: Comparison) -> dict[str, str]:
    """By run's name what stands at an axis."""
    labels = run_labels(list(comparison.overview["run"]))
    return dict(zip(labels, _short(list(labels.values())), strict=True))


def _plain(words: str, longest: int = 400) -> str:
    """Words of a user's, of so many letters at most, in which a dollar sign is one."""
    return cut(words, longest).replace("$", r"\$")


def _axis(metric: str) -> str:
    return f"effect on the\n{METRIC_NAMES[Metric(metric)]}"


def _grid(comparison: Comparison, grid: Grid) -> Figure:
    """Profiles, corruption × window, on one scale."""
    rows, columns = len(grid.corruptions), len(grid.windows)
    figure = Figure(figsize=(max(6.5, 1.2 + 3.3 * columns), 1.3 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    overview = comparison.overview.set_index("run", drop=False)
    used = {run for panel in grid.panels.values() for run in panel.runs}
    drawn = [panel for panel in grid.panels.values() if len(panel.lines) <= MOST_SERIES]
    styles = _styles([name for panel in drawn for name in panel.lines])
    for row, corruption in zip(axes, grid.corruptions, strict=True):
        for ax, window in zip(row, grid.windows, strict=True):
            panel = grid.panels.get((corruption, window))
            if panel is None:
                ax.set_axis_off()
                continue
            _draw_panel(ax, panel, overview.loc[list(panel.runs)], styles)
            ax.set_title(_plain(f"{corruption}, {_window_words(window)}", int(13 * 3.3)), fontsize=8.5, loc="left")
    axes[0][0].set_ylim(*scale_of(comparison, grid.metric))
    figure.supylabel(_axis(grid.metric).replace("\n", " "), fontsize=9)
    legend_below(figure, list(axes.ravel()), 2, _conventions(grid.panels.values()))
    what = f"profiles{f' – {grid.title}' if grid.title else ''}"
    said = f"{sample(overview.loc[list(used)])}; {INTERVALS}; dashed: total effect"
    headline(figure, *_title(comparison, what, said, *_unnamed(styles)))
    return figure


def _window_words(window: str) -> str:
    return f"window {window}" if window.isdigit() else window


@dataclass(frozen=True)
class Style:
    """How a line is drawn, and its label in a legend, "" = none."""

    colour: str
    marker: str
    label: str


def _styles(names: Sequence[str], after: Mapping[str, str] | None = None) -> dict[str, Style]:
    """By line's name its style, in all panels of a figure; the first ``MOST_NAMED`` have labels, no two the same, with
    words ``after`` them."""
    short = elided(list(dict.fromkeys(names)), LONGEST)
    styles = {}
    for i, (name, words) in enumerate(short.items()):
        # a colour comes again after eight lines, then with another marker
        colour, marker = STYLES[i % len(STYLES)][0], STYLES[(i + i // len(STYLES)) % len(STYLES)][1]
        label = f"{words} {after[name] if after else ''}".strip() if i < MOST_NAMED else ""
        styles[name] = Style(colour, marker, _plain(label))
    return styles


def _unnamed(styles: Mapping[str, Style]) -> list[str]:
    """For a title, how many lines a legend leaves out."""
    more = len(styles) - MOST_NAMED
    return [f"the legend has the first {MOST_NAMED} of {len(styles)} lines; profiles.csv has all"] if more > 0 else []


def _draw_panel(axes: Axes, panel: Panel, runs: pd.DataFrame, styles: Mapping[str, Style]) -> None:
    """The lines of a panel; of more than ``MOST_SERIES`` all points in one colour. Of several runs the total effects
    have their lines' colours."""
    axes.axhline(0, color="black", linewidth=0.8)
    names = panel.lines
    is_dots = len(names) > MOST_SERIES
    for i, (run, total) in enumerate(totals := list(runs["total_effect"].dropna().items())):
        first = panel.rows.loc[panel.rows["run"] == run, "line"].iloc[0]
        colour = ORANGE if is_dots or len(runs) == 1 else styles[first].colour
        # what lies on one another is seen by turns
        dashes = (5 * i, (5, 5 * len(totals) - 2)) if len(totals) < 4 else (0, (5, 3))
        axes.axhline(total, color=colour, linewidth=1.4, linestyle=dashes)
    if is_dots:
        axes.plot(panel.rows["layer"], panel.rows["effect"], "o", color=BLUE, markersize=3, alpha=0.4)
    else:
        for i, name in enumerate(names):
            aside = APART * (i - (len(names) - 1) / 2)
            _draw_line(axes, panel.rows[panel.rows["line"] == name], styles[name], aside)
    number_layers(axes, panel.rows["layer"], 12)
    axes.set_xlabel(layer_words(set(panel.rows["window"])), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)


def _draw_line(axes: Axes, rows: pd.DataFrame, style: Style, aside: float) -> None:
    rows = rows.sort_values("layer")
    layers, effect, clipped = rows["layer"].to_numpy(float) + aside, rows["effect"].to_numpy(), clipped_of(rows)
    look = {"color": style.colour, "marker": style.marker, "markersize": 4.5}
    whiskers(axes, layers, rows, "effect", color=style.colour)
    label = {"label": style.label} if style.label else {}
    axes.plot(layers, effect, linestyle="-", linewidth=1.5, zorder=3, **look, **label)
    axes.plot(layers[clipped], effect[clipped], linestyle="", markerfacecolor="white", zorder=3.1, **look)


def _conventions(panels: Collection[Panel]) -> list[Line2D]:
    """Legend entries for what is drawn in every panel."""
    several = any(len(panel.runs) > 1 and len(panel.lines) <= MOST_SERIES for panel in panels)
    colour, whose = (GREY, ", in its run's colour") if several else (ORANGE, "")
    shown = [Line2D([], [], color=colour, linestyle="--", linewidth=1.4, label=f"total effect{whose}")]
    if any(clipped_of(panel.rows).any() for panel in panels):
        hollow = {"color": GREY, "linestyle": "", "marker": "o", "markerfacecolor": "white"}
        shown.append(Line2D([], [], label="window clipped at the network's end", **hollow))
    return shown


def _overlay(comparison: Comparison, grid: Grid) -> Figure | None:
    """All corruptions in one panel a window."""
    of = {window: _overlaid(grid, window) for window in grid.windows}
    there = {window: named for window, named in of.items() if len(named) > 1}
    if not there:
        return None
    figure = Figure(figsize=(max(6.5, 1 + 4.2 * len(there)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(there), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(name for named in there.values() for name in named))
    styles = _styles(
        names, {name: f"({images_of([named[name] for named in there.values() if name in named])})" for name in names}
    )
    for axes, (window, named) in zip(panels, there.items(), strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        for name, rows in named.items():
            aside = APART * (names.index(name) - (len(names) - 1) / 2) * min(1, 8 / len(names))
            _draw_line(axes, rows, styles[name], aside)
        axes.set_title(_window_words(window), fontsize=9, loc="left")
        number_layers(axes, pd.concat(named.values())["layer"], 12)
        axes.set_xlabel("layer", fontsize=9)
        axes.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel(_axis(grid.metric))
    panels[0].set_ylim(*scale_of(comparison, grid.metric))
    legend_below(figure, list(panels), 2)
    runs = comparison.overview[comparison.overview["run"].isin({r for p in grid.panels.values() for r in p.runs})]
    what = f"corruptions overlaid{f' – {grid.title}' if grid.title else ''}"
    headline(figure, *_title(comparison, what, f"{sample(runs)}; {INTERVALS}", *_unnamed(styles)))
    return figure


def _overlaid(grid: Grid, window: str) -> dict[str, pd.DataFrame]:
    """Rows by line, of one window; of a panel with more than ``MOST_SERIES`` lines the one with the largest effect."""
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


def _colours(axes: Axes, values: np.ndarray, limit: float, rows: Sequence[str], columns: Sequence[Any]) -> Any:
    """A heatmap with named rows and columns, 0 white."""
    limit = max(limit, 1e-12)
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
    figure = Figure(figsize=(4.2 + 0.34 * len(layers), 1.9 + 0.26 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    image = _colours(axes, effect, float(np.nanmax(np.abs(effect))), _short(names), layers)
    for row, column in np.argwhere((low > 0) | (high < 0)):
        ink = "white" if abs(effect[row, column]) > 0.6 * np.nanmax(np.abs(effect)) else "#444444"
        axes.plot(column, row, "o", color=ink, markersize=2)
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label=f"mean {_axis(metric)}", pad=0.02)
    more = f"; the first {MOST_ROWS}" if table["line"].nunique() > MOST_ROWS else ""
    headline(figure, *_title(comparison, f"run × layer{more}", f"{sample(runs)}; dot: 95 % interval without 0"))
    return figure


def _peaks(comparison: Comparison, metric: str) -> Figure | None:
    """Each run's peak effect with its interval, and its total effect."""
    runs = comparison.overview[(comparison.overview["metric"] == metric) & comparison.overview["peak_effect"].notna()]
    if not len(runs):
        return None
    labels, shown = _labels(comparison), runs.iloc[:MOST_ROWS]
    rows = [
        {"value": row["peak_effect"], "low": row["peak_effect_low"], "high": row["peak_effect_high"]}
        | {"name": f"{labels[row['run']]}\n{row['peak_place']}"}
        for row in shown.to_dict("records")
    ]
    figure = _forest(rows, _axis(metric).replace("\n", " "), "peak effect", 0.42)
    axes = figure.axes[0]
    axes.plot(shown["total_effect"], range(len(shown)), "|", color=ORANGE, markersize=13, label="total effect")
    legend_below(figure, [axes], 2)
    more = f"; the first {MOST_ROWS} runs" if len(runs) > MOST_ROWS else ""
    headline(figure, *_title(comparison, f"peak of each run{more}", f"{sample(runs)}; {INTERVALS}"))
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
    labels, shown = _labels(comparison), pairs[: MOST_ROWS // 2]
    rows = [
        {"value": row["difference"], "low": row["low"], "high": row["high"]}
        | {"name": f"{labels[row['a']]}\n− {labels[row['b']]}: {place_words(row)}"}
        for row in shown
    ]
    words = "difference in the share recovered" if quantity == "recovered" else "difference in effect"
    figure = _forest(rows, f"{words}, a − b, where it is largest", words, 0.45)
    low, high = min(row["n"] for row in pairs), max(row["n"] for row in pairs)
    images = counted(low, "image") if low == high else f"{low}–{high} images"
    more = f"; the {len(shown)} largest of {len(pairs)} pairs" if len(shown) < len(pairs) else ""
    said = f"n = {images} included in both; 95 % intervals, both runs resampled together"
    caveat = "each the largest of its layers" + (": see the corrected p" if quantity != "recovered" else "")
    headline(figure, *_title(comparison, f"paired differences{more}", said, caveat))
    return figure


def _rank_correlation(comparison: Comparison) -> Figure | None:
    """Runs × runs."""
    table = comparison.rank_correlation.iloc[:MOST_ROWS, :MOST_ROWS]
    if len(table) < 2:
        return None
    labels = _labels(comparison)
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
    headline(figure, *_title(comparison, "rank correlation of layer profiles", "of the series that has the peak"))
    return figure


def _relative_depth(comparison: Comparison) -> Figure | None:
    """Shares recovered by relative depth, where depths differ."""
    table = lines(comparison)
    table = table[table["recovered"].notna()]
    if comparison.overview["depth"].nunique() < 2 or table["run"].nunique() < 2:
        return None
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for level in (0, 1):
        axes.axhline(level, color="black", linewidth=0.8)
    blocks = {
        str(name): f"({int(rows['depth'].iloc[0])} blocks, {images_of([rows])})"
        for name, rows in table.groupby("line", sort=False)
    }
    styles = dict(list(_styles(list(blocks), blocks).items())[:MOST_NAMED])
    for name, style in styles.items():
        rows = table[table["line"] == name].sort_values("layer")
        whiskers(axes, rows["relative_depth"].to_numpy(), rows, "recovered", color=style.colour, alpha=0.6)
        look = {"color": style.colour, "marker": style.marker, "markersize": 4.5, "label": style.label}
        axes.plot(rows["relative_depth"], rows["recovered"], linestyle="-", **look)
    axes.set_xlim(0, 1)
    axes.set_xlabel("relative depth, (layer + ½) / blocks")
    axes.set_ylabel("share of the total effect recovered")
    axes.grid(axis="y", alpha=0.25)
    legend_below(figure, [axes], 2)
    more = f"; the first {MOST_NAMED} of {len(blocks)}" if len(blocks) > MOST_NAMED else ""
    shown = comparison.overview[comparison.overview["run"].isin(table.loc[table["line"].isin(list(styles)), "run"])]
    headline(figure, *_title(comparison, f"runs by relative depth{more}", f"{sample(shown)}; {INTERVALS}"))
    return figure
