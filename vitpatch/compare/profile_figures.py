"""Comparison → figures of layer profiles: corruption × window, overlaid, by relative depth. No disk, no tracker."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitpatch.compare.comparison import Comparison
from vitpatch.compare.figure_words import INTERVALS, axis_words, plain, sample, title_of
from vitpatch.compare.layout import (
    MOST_BESIDE,
    MOST_SERIES,
    Grid,
    Panel,
    images_of,
    lines,
    overlaid,
    scale_of,
    window_heading,
)
from vitpatch.compare.run_labels import LONGEST, elided
from vitpatch.plots.profile import clipped_of
from vitpatch.plots.style import (
    APART,
    BLUE,
    GREY,
    ORANGE,
    STYLES,
    headline,
    layer_words,
    legend_below,
    number_layers,
    whiskers,
)


def grid_figure(comparison: Comparison, grid: Grid) -> Figure:
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
            ax.set_title(plain(f"{corruption}, {window_heading(window)}", int(13 * 3.3)), fontsize=8.5, loc="left")
    axes[0][0].set_ylim(*scale_of(comparison, grid.metric))
    figure.supylabel(axis_words(grid.metric).replace("\n", " "), fontsize=9)
    legend_below(figure, list(axes.ravel()), 2, _conventions(grid.panels.values()))
    what = f"profiles{f' – {grid.title}' if grid.title else ''}"
    said = f"{sample(overview.loc[list(used)])}; {INTERVALS}; dashed: total effect"
    headline(figure, *title_of(comparison, what, said, *_unnamed(styles)))
    return figure


@dataclass(frozen=True)
class Style:
    """How a line is drawn, and its label in a legend, "" = none."""

    colour: str
    marker: str
    label: str


def _styles(names: Sequence[str], after: Mapping[str, str] | None = None) -> dict[str, Style]:
    """By line's name its style, in all panels of a figure; the first ``MOST_BESIDE`` have labels, no two the same, with
    words ``after`` them."""
    short = elided(list(dict.fromkeys(names)), LONGEST)
    styles = {}
    for i, (name, words) in enumerate(short.items()):
        # a colour comes again after eight lines, then with another marker
        colour, marker = STYLES[i % len(STYLES)][0], STYLES[(i + i // len(STYLES)) % len(STYLES)][1]
        label = f"{words} {after[name] if after else ''}".strip() if i < MOST_BESIDE else ""
        styles[name] = Style(colour, marker, plain(label))
    return styles


def _unnamed(styles: Mapping[str, Style]) -> list[str]:
    """For a title, how many lines a legend leaves out."""
    more = len(styles) - MOST_BESIDE
    return [f"the legend has the first {MOST_BESIDE} of {len(styles)} lines; profiles.csv has all"] if more > 0 else []


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


def overlay_figure(comparison: Comparison, grid: Grid) -> Figure | None:
    """All corruptions in one panel a window."""
    of = {window: overlaid(grid, window) for window in grid.windows}
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
        axes.set_title(window_heading(window), fontsize=9, loc="left")
        number_layers(axes, pd.concat(named.values())["layer"], 12)
        axes.set_xlabel("layer", fontsize=9)
        axes.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel(axis_words(grid.metric))
    panels[0].set_ylim(*scale_of(comparison, grid.metric))
    legend_below(figure, list(panels), 2)
    runs = comparison.overview[comparison.overview["run"].isin({r for p in grid.panels.values() for r in p.runs})]
    what = f"corruptions overlaid{f' – {grid.title}' if grid.title else ''}"
    headline(figure, *title_of(comparison, what, f"{sample(runs)}; {INTERVALS}", *_unnamed(styles)))
    return figure


def relative_depth_figure(comparison: Comparison) -> Figure | None:
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
    styles = dict(list(_styles(list(blocks), blocks).items())[:MOST_BESIDE])
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
    more = f"; the first {MOST_BESIDE} of {len(blocks)}" if len(blocks) > MOST_BESIDE else ""
    shown = comparison.overview[comparison.overview["run"].isin(table.loc[table["line"].isin(list(styles)), "run"])]
    headline(figure, *title_of(comparison, f"runs by relative depth{more}", f"{sample(shown)}; {INTERVALS}"))
    return figure
