"""Effects by layer → the profile of a run, with its controls, and of windows of several sizes: matplotlib figures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vitpatch.formatting import format_interval
from vitpatch.plots import layout, style
from vitpatch.plots.style import Caption
from vitpatch.types import Estimate, format_window

CONTROLS = (
    {"color": "#CC79A7", "marker": "s", "linestyle": "--"},
    {"color": "#000000", "marker": "^", "linestyle": "-."},
)
"""Lines of controls that are drawn with one series."""
GREY_CONTROLS = (
    {"color": style.GREY, "marker": "d", "linestyle": "--"},
    {"color": style.GREY, "marker": "x", "linestyle": ":"},
)
"""The same with several series, which have the colours."""
STRETCH = 1.5  # controls that would stretch the axis by more than this are drawn whole in a panel of their own
PANELS_A_ROW = 4


@dataclass(frozen=True)
class References:
    """What effects are compared with in a profile, and the labels of these lines.

    ``total`` is the total effect, its mean NaN where there is none; ``all_layers`` the effect of all layers at once;
    ``own`` the label of the run's own donor, ``controls`` those of others by their columns; ``unselected`` that of the
    column ``effect_unselected``, where the means are of selected images.
    """

    total: Estimate
    all_layers: Estimate | None = None
    own: str = "mean effect"
    controls: Mapping[str, str] = field(default_factory=dict)
    unselected: str = ""


def draw_profile(axes: Axes, summary: pd.DataFrame, references: References, label: str, whole: bool = True) -> None:
    """Mean effect by layer with its interval and the simultaneous one, and the total effect as a line.

    ``summary`` has a column ``series`` that tells rows of one layer apart; ``label`` names the effect. Of more than
    ``MOST_LINES`` series, and of several that are not the same from layer to layer, each row is a dot, and those with
    the largest effects are named. Clipped windows have hollow markers, rows of the peak set rings. Controls of one
    series are drawn with it, and stretch the axis only where they are to be ``whole`` on it.
    """
    draw_references(axes, references)
    if _as_points(summary):
        _draw_points(axes, summary, references)
    else:
        _draw_lines(axes, summary, references)
    if summary["series"].nunique() == 1:
        limits = axes.get_ylim()
        _draw_controls(axes, summary, references, CONTROLS, (-np.inf, np.inf) if whole else limits)
        if not whole:
            axes.set_ylim(limits)
    label_axes(axes, summary, label)
    if summary["recovered"].notna().any() and references.total.mean:
        _share_of_total(axes, references.total)


def layer_profile(summary: pd.DataFrame, references: References, caption: Caption) -> Figure:
    """``draw_profile`` as a figure.

    Controls of one series that would stretch the axis are whole in a panel below; those of several series have a panel
    each.
    """
    has_panels, is_points = _need_panels(summary, references), _as_points(summary)
    figure = layout.make_figure(layout.figure_width(summary["layer"].nunique()), 4.4)
    axes, panels = _add_panels(figure, summary["series"].nunique() if has_panels else 0)
    draw_profile(axes, summary, references, caption.effect, whole=not has_panels)
    for panel, (name, rows, look, _) in zip(panels, style.each_series(summary), strict=False):
        _draw_whole(panel, rows, references, look, name or "the same, on an axis that holds all donors")
        label_axes(panel, rows, "effect" if panel is panels[0] else "", most=24 if len(panels) == 1 else 6)
        panel.set_xlabel("\n".join(textwrap.wrap(panel.get_xlabel(), 24 if len(panels) > 1 else 80)))
    markers = [] if is_points else marker_legend(summary)
    layout.add_legend_below(figure, [axes, *panels], 1 if is_points else 2, markers)
    layout.set_headline(figure, caption.title, f"{caption.sample}; {caption.intervals}")
    return figure


def _as_points(summary: pd.DataFrame) -> bool:
    """Whether each row is a dot: of many series, or of several that are not the same from layer to layer."""
    number = summary["series"].nunique()
    return number > style.MOST_LINES or (number > 1 and not style.has_order(summary))


def _need_panels(summary: pd.DataFrame, references: References) -> bool:
    """Whether each series needs a panel of its own to show all its donors."""
    if not references.controls or _as_points(summary):
        return False
    own = _axis_length(summary, ["effect", "effect_sim"], references.total)
    whole = _axis_length(summary, ["effect", "effect_sim", *references.controls], references.total)
    return summary["series"].nunique() > 1 or whole > STRETCH * own


def _axis_length(summary: pd.DataFrame, columns: Sequence[str], total: Estimate) -> float:
    """The length of an axis that holds 0, the total effect, columns and their intervals, as far as these are known."""
    names = [f"{column}{end}" for column in columns for end in ("", "_low", "_high")]
    values = summary[[name for name in names if name in summary]].to_numpy(float)
    ends = [0, total.mean, *values.flat]
    return float(np.nanmax(ends) - np.nanmin(ends))


def _add_panels(figure: Figure, number: int) -> tuple[Axes, list[Axes]]:
    """Adds a wide panel, and ``number`` panels below it, side by side."""
    if not number:
        return figure.add_subplot(), []
    columns = layout.panels_a_row(min(number, PANELS_A_ROW), 1.4)
    rows = ceil(number / columns)
    figure.set_figheight(4.4 + 2.9 * rows)
    gaps = {"wspace": 0.06, "hspace": 0.3 if number == 1 else 0.45}
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=(4.4, *[2.6] * rows), **gaps)
    axes, panels = figure.add_subplot(grid[0, :]), []
    for i in range(number):
        panels.append(figure.add_subplot(grid[1 + i // columns, i % columns], sharey=panels[0] if panels else None))
        panels[-1].tick_params(labelleft=i % columns == 0)
    return axes, panels


def draw_references(axes: Axes, references: References) -> None:
    """Draws lines at 0, at the total effect with its interval, and at the effect of all layers at once, where known."""
    axes.axhline(0, color="black", linewidth=0.8)
    total, all_layers = references.total, references.all_layers
    if not np.isnan(total.mean):
        label = f"total effect {total.mean:+.3f}{', 95 % interval' if total.known else ''}"
        axes.axhline(total.mean, color=style.ORANGE, linewidth=1.8, linestyle="--", label=label)
        if total.known:
            axes.axhspan(total.low, total.high, color=style.ORANGE, alpha=0.12, linewidth=0)
    if all_layers is not None:
        label = f"all layers patched at once {all_layers.mean:+.3f}"
        axes.axhline(all_layers.mean, color=style.GREEN, linewidth=2.4, linestyle=":", label=label)


def _draw_lines(axes: Axes, summary: pd.DataFrame, references: References) -> None:
    """A line a series with both intervals, rings at the peak set; means of all images dashed in grey."""
    for name, rows, look, x in style.each_series(summary):
        colour, is_member = look["color"], _may_be_peak(rows)
        label = name or references.own
        style.draw_series(axes, x, rows, "effect", hollow=is_clipped(rows), label=label, **look)
        style.draw_whiskers(axes, x, rows, "effect_sim", thick=False, color=colour, alpha=0.8)
        axes.plot(x[is_member], rows["effect"][is_member], "o", zorder=4, **_ring(colour))
        if references.unselected:
            grey = {"color": style.GREY, "linestyle": (0, (5, 2)), "linewidth": 1.3, "label": references.unselected}
            grey |= {"marker": look["marker"], "markersize": 3}
            style.draw_series(axes, rows["layer"], rows, "effect_unselected", **grey)


def is_clipped(rows: pd.DataFrame) -> np.ndarray:
    """Which rows are of windows that the network's end clips, (rows,) bool."""
    return (rows["n_layers"] < rows["window"]).to_numpy()


def _may_be_peak(rows: pd.DataFrame) -> np.ndarray:
    """Which rows are in the peak set, as far as there are resamples, (rows,) bool."""
    if "peak_share" not in rows:
        return np.zeros(len(rows), dtype=bool)
    return (rows["in_peak_set"] & rows["peak_share"].notna()).to_numpy(bool) & has_peak(rows)


def has_peak(rows: pd.DataFrame) -> np.ndarray:
    """Which rows are of windows with a peak, (rows,) bool: not prefixes and suffixes, the longest of which has all."""
    return (rows["window"] > 0).to_numpy()


def _ring(colour: str) -> dict[str, Any]:
    return {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": colour, "markeredgewidth": 1.0}


def marker_legend(summary: pd.DataFrame) -> list[Line2D]:
    """Legend entries that explain the markers and bars of lines."""
    bar = {"color": style.GREY, "linestyle": "", "marker": "|", "markersize": 11}
    entries = []
    if summary["effect_low"].notna().any():
        entries.append(Line2D([], [], markeredgewidth=1.8, label="95 % interval", **bar))
    if summary["effect_sim_low"].notna().any():
        thin = f"95 % for all {len(summary)} places at once (simultaneous)"
        entries.append(Line2D([], [], markeredgewidth=0.7, label=thin, **bar))
    if is_clipped(summary).any():
        hollow = {"color": style.GREY, "linestyle": "", "marker": "o", "markerfacecolor": "white"}
        entries.append(Line2D([], [], label="window clipped at the network's end", **hollow))
    if _may_be_peak(summary).any():
        label = "may be the peak (95 % peak set)"
        entries.append(Line2D([], [], linestyle="", marker="o", label=label, **_ring(style.GREY) | {"markersize": 9}))
    return entries


def _draw_points(axes: Axes, summary: pd.DataFrame, references: References) -> None:
    """Every row a dot; the largest with name, interval and controls."""
    number = summary["series"].nunique()
    label = f"mean effect, {number} a layer; the {style.NAMED} largest, with 95 % interval:"
    axes.plot(summary["layer"], summary["effect"], "o", color=style.BLUE, markersize=4, alpha=0.35, label=label)
    largest = summary.loc[summary["effect"].abs().nlargest(style.NAMED).index]
    style.draw_whiskers(axes, largest["layer"].to_numpy(float), largest, "effect", color=style.BLUE, alpha=0.5)
    rows = largest.to_dict("records")
    style.name_points(axes, [(row["layer"], row["effect"], _point_label(row, references.controls)) for row in rows])


def _point_label(row: dict[str, Any], controls: Mapping[str, str]) -> str:
    """A row's place, its effect with interval and those of controls."""
    donors = {column: column.removeprefix("effect_").replace("_", " ") for column in controls}
    others = "".join(f"; {name} {row[c]:+.3f}" for c, name in donors.items() if not np.isnan(row[c]))
    effect = format_interval(row["effect"], row["effect_low"], row["effect_high"])
    return f"{style.place_words(row['layer'], row['series'])}: {effect}{others}"


def _draw_controls(
    axes: Axes,
    rows: pd.DataFrame,
    references: References,
    looks: Sequence[Mapping[str, str]],
    within: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    """Each control a line, with intervals of the means ``within`` these."""
    rows = rows.sort_values("layer")
    more = {"linewidth": 1.4, "markersize": 4.5, "zorder": 2.5, "bar_alpha": 0.7}
    for i, (look, (column, label)) in enumerate(zip(looks, references.controls.items(), strict=False), start=1):
        ends = [f"{column}_low", f"{column}_high"]
        inside = rows.assign(**rows[ends].where(rows[column].between(*within)))
        style.draw_series(axes, rows["layer"] + 1.5 * style.APART * i, inside, column, label=label, **look, **more)


def _draw_whole(axes: Axes, rows: pd.DataFrame, references: References, look: Mapping[str, str], title: str) -> None:
    """All donors of one series, on an axis that holds them; ``look`` is the series' own."""
    axes.axhline(0, color="black", linewidth=0.8)
    if not np.isnan(references.total.mean):
        axes.axhline(references.total.mean, color=style.ORANGE, linewidth=1.4, linestyle="--")
    style.draw_series(axes, rows["layer"], rows, "effect", linewidth=1.6, markersize=5, zorder=2, **look)
    _draw_controls(axes, rows, references, GREY_CONTROLS if rows["series"].iloc[0] else CONTROLS)
    axes.set_title(title, fontsize=9, loc="left")


def label_axes(axes: Axes, rows: pd.DataFrame, y_label: str, most: int = 24) -> None:
    """Names the axes; at most so many layers are numbered."""
    axes.set_xlabel(style.layer_words(set(rows["window"])))
    axes.set_ylabel(y_label)
    style.number_layers(axes, rows["layer"], most)
    axes.grid(axis="y", alpha=0.25)


def _share_of_total(axes: Axes, total: Estimate) -> None:
    """A second axis in shares of the total effect."""
    share = axes.secondary_yaxis("right", functions=(lambda y: y / total.mean, lambda s: s * total.mean))
    share.set_ylabel("share of the total effect recovered")
    share.yaxis.set_major_locator(MaxNLocator(6))


def draw_windows(
    axes: Axes, summary: pd.DataFrame, sums: pd.DataFrame, total: Estimate, label: str, below: Axes | None = None
) -> None:
    """Mean effect of windows of each size, of one token group, and the sum of the effects of their layers (dashed).

    ``sums`` have ``sum`` and ``synergy``, with its interval, in rows of the summary's index, for windows of several
    layers; empty where single layers are not known. The difference goes on the axes ``below``.
    """
    draw_references(axes, References(total))
    for at, window in enumerate(dict.fromkeys(summary["window"])):
        _draw_window([axes, below], summary[summary["window"] == window].sort_values("layer"), sums, at)
    label_axes(axes, summary, label)
    if below is not None:
        below.axhline(0, color="black", linewidth=0.8)
        label_axes(below, summary, "window − sum" if label else "")


def windows(summary: pd.DataFrame, sums: pd.DataFrame, total: Estimate, caption: Caption) -> Figure:
    """``draw_windows`` as a figure, a column a token group; below it the difference, where ``sums`` are known."""
    groups = list(dict.fromkeys(summary["tokens"]))
    width = min(layout.figure_width(summary["layer"].nunique()) * (1 + 0.6 * (len(groups) - 1)), 22)
    rows = 2 if len(sums) else 1
    figure = layout.make_figure(width, 4.4 + 2.6 * (rows - 1))
    shape = {"squeeze": False, "sharex": "col", "sharey": "row", "height_ratios": (4.4, 2.6)[:rows]}
    grid = figure.subplots(rows, len(groups), gridspec_kw={"wspace": 0.05, "hspace": 0.2}, **shape)
    for i, (panels, tokens) in enumerate(zip(grid.T, groups, strict=True)):
        rows_of_group = summary[summary["tokens"] == tokens]
        below = panels[1] if len(sums) else None
        draw_windows(panels[0], rows_of_group, sums, total, "" if i else caption.effect, below)
        panels[0].set_title(f"tokens: {tokens}" if len(groups) > 1 else "", fontsize=9, loc="left")
        if below is not None:
            panels[0].set_xlabel("")
    more = marker_legend(summary.assign(effect_sim_low=np.nan, in_peak_set=False))
    if len(sums):
        label = "sum of the effects of the window's layers alone"
        more.append(Line2D([], [], color=style.GREY, linestyle="--", label=label))
    layout.add_legend_below(figure, list(grid[0]), 2, more)
    layout.set_headline(figure, caption.title, f"{caption.sample}; {caption.intervals}")
    return figure


def _draw_window(panels: Sequence[Axes | None], rows: pd.DataFrame, sums: pd.DataFrame, at: int) -> None:
    """Draws the windows of one size, and the sums of their layers where known; ``at`` is the number of the size."""
    window, look = rows["window"].iloc[0], style.STYLES[at % len(style.STYLES)]
    layers = rows["layer"] + style.APART * (at - 1)
    label = f"window {window}" if window > 0 else format_window(window)
    style.draw_series(panels[0], layers, rows, "effect", hollow=is_clipped(rows), label=label, **look)
    known = sums.loc[[row for row in rows.index if row in sums.index]]
    if len(known):
        layers = layers[known.index]
        sums_line = style.break_line(layers, known["sum"])
        panels[0].plot(*sums_line, "--", color=look["color"], linewidth=1.5, zorder=2.8)
    if len(known) and panels[1] is not None:
        style.draw_series(panels[1], layers, known, "synergy", linewidth=1.5, markersize=5, **look)
