"""Effects by layer → the profile of a run with its controls, a matplotlib figure. No disk, no tracker."""

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

from vitpatch.plots.style import (
    APART,
    BLUE,
    GREEN,
    GREY,
    MOST_LINES,
    NAMED,
    ORANGE,
    STYLES,
    Caption,
    headline,
    layer_words,
    legend_below,
    name_points,
    number_layers,
    whiskers,
    width_for,
)
from vitpatch.types import Estimate

CONTROLS = (("#CC79A7", "s", "--"), ("#000000", "^", "-."))
"""(colour, marker, line) of controls beside one series."""
GREY_CONTROLS = ((GREY, "d", "--"), (GREY, "x", ":"))
"""The same beside several, which have the colours."""
STRETCH = 1.5
"""Controls that would stretch the axis by more than this are drawn whole in a panel of their own."""
PANELS_A_ROW = 4


@dataclass(frozen=True)
class Beside:
    """What stands beside the effects of a profile.

    ``total`` effect, its mean NaN where there is none; ``together`` the effect of all layers at once; ``own`` the
    donor in words, and ``controls``, in words by their column of the summary; ``everyone``, in words, the images of the
    column ``effect_unselected``, where the means are of selected ones.
    """

    total: Estimate
    together: Estimate | None = None
    own: str = "mean effect"
    controls: Mapping[str, str] = field(default_factory=dict)
    everyone: str = ""


def layer_profile(summary: pd.DataFrame, beside: Beside, caption: Caption) -> Figure:
    """Mean effect by layer with its interval and the simultaneous one, and the total effect as a line.

    ``summary`` has a column ``series`` that tells rows of one layer apart. Of more than ``MOST_LINES`` series each row
    is a dot, and those with the largest effects are named. Clipped windows have hollow markers, rows of the peak set
    rings. Controls of one series are drawn with it, and whole in a panel below where they leave its axis; those of
    several series have a panel each.
    """
    series = list(dict.fromkeys(summary["series"]))
    figure = Figure(figsize=(width_for(summary["layer"].nunique()), 4.4), layout="constrained")
    below = _series_below(summary, series, beside)
    axes, panels = _stacked(figure, len(below))
    references(axes, beside)
    if len(series) > MOST_LINES:
        _dots(axes, summary, beside)
    else:
        _lines(axes, summary, series, beside)
    if len(series) == 1:
        _add_controls(axes, summary, beside, keep_axis=bool(below))
    finish(axes, summary, caption.effect)
    if summary["recovered"].notna().any():
        _share_of_total(axes, beside.total)
    for panel, name in zip(panels, below, strict=True):
        rows = summary[summary["series"] == name]
        _draw_whole(panel, rows, beside, series, name)
        finish(panel, rows, "effect" if panel is panels[0] else "", most=24 if len(panels) == 1 else 6)
        panel.set_xlabel("\n".join(textwrap.wrap(panel.get_xlabel(), 24 if len(panels) > 1 else 80)))
    legend_below(figure, [axes, *panels], 1 if len(series) > MOST_LINES else 2, conventions(summary, len(series)))
    headline(figure, caption.title, f"{caption.sample}; {caption.intervals}")
    return figure


def _series_below(summary: pd.DataFrame, series: Sequence[str], beside: Beside) -> list[str]:
    """The series whose donors have a panel of their own."""
    if not beside.controls or len(series) > MOST_LINES:
        return []
    own = _reach(summary, ["effect", "effect_sim"], beside)
    whole = _reach(summary, ["effect", "effect_sim", *beside.controls], beside)
    return list(series) if len(series) > 1 or whole > STRETCH * own else []


def _reach(summary: pd.DataFrame, columns: Sequence[str], beside: Beside) -> float:
    """How far an axis reaches that holds 0, the total effect, columns and the ends of their intervals, as far as these
    are known."""
    names = [f"{column}{end}" for column in columns for end in ("", "_low", "_high")]
    values = summary[[name for name in names if name in summary]].to_numpy(float)
    ends = [0, beside.total.mean, *values.flat]
    return float(np.nanmax(ends) - np.nanmin(ends))


def _stacked(figure: Figure, number: int) -> tuple[Axes, list[Axes]]:
    """A wide panel, and so many below it, side by side."""
    if not number:
        return figure.add_subplot(), []
    columns = min(number, PANELS_A_ROW)
    rows = ceil(number / columns)
    figure.set_figheight(4.4 + 2.6 * rows)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=(4.4, *[2.6] * rows))
    axes, panels = figure.add_subplot(grid[0, :]), []
    for i in range(number):
        panels.append(figure.add_subplot(grid[1 + i // columns, i % columns], sharey=panels[0] if panels else None))
        panels[-1].tick_params(labelleft=i % columns == 0)
    return axes, panels


def references(axes: Axes, beside: Beside) -> None:
    """0, the total effect with its interval, and the effect of all layers at once, where there are such."""
    axes.axhline(0, color="black", linewidth=0.8)
    total, together = beside.total, beside.together
    if not np.isnan(total.mean):
        label = f"total effect {total.mean:+.3f}{', 95 % interval' if total.known else ''}"
        axes.axhline(total.mean, color=ORANGE, linewidth=1.8, linestyle="--", label=label)
        if total.known:
            axes.axhspan(total.low, total.high, color=ORANGE, alpha=0.12, linewidth=0)
    if together is not None:
        label = f"all layers patched at once {together.mean:+.3f}"
        axes.axhline(together.mean, color=GREEN, linewidth=2.4, linestyle=":", label=label)


def _lines(axes: Axes, summary: pd.DataFrame, series: Sequence[str], beside: Beside) -> None:
    """Every series a line; unselected means dashed in grey."""
    for i, ((colour, marker), name) in enumerate(zip(STYLES, series, strict=False)):
        rows = summary[summary["series"] == name].sort_values("layer")
        aside = APART * (i - (len(series) - 1) / 2)  # so that intervals do not hide each other
        _line(axes, rows, name or beside.own, (colour, marker, "-"), aside)
        if beside.everyone:
            style = {"color": GREY, "linestyle": (0, (5, 2)), "linewidth": 1.3, "label": beside.everyone}
            axes.plot(rows["layer"], rows["effect_unselected"], marker, markersize=3, **style)


def _line(axes: Axes, rows: pd.DataFrame, label: str, style: tuple[str, str, Any], aside: float) -> None:
    """One series: a line, both intervals, full markers, hollow ones where the window is clipped, rings."""
    colour, marker, line = style
    layers, effect = rows["layer"].to_numpy() + aside, rows["effect"].to_numpy()
    whiskers(axes, layers, rows, "effect", color=colour)
    whiskers(axes, layers, rows, "effect_sim", thick=False, color=colour, alpha=0.8)
    axes.plot(layers, effect, marker, color=colour, linestyle=line, linewidth=1.8, zorder=3, label=label)
    clipped = clipped_of(rows)
    axes.plot(layers[clipped], effect[clipped], marker, color=colour, markerfacecolor="white", zorder=3.1)
    member = _may_be_peak(rows)
    axes.plot(layers[member], effect[member], "o", zorder=4, **_ring(colour))


def clipped_of(rows: pd.DataFrame) -> np.ndarray:
    """Which rows are of windows that the network's end clips, (rows,) bool."""
    return (rows["n_layers"] < rows["window"]).to_numpy()


def _may_be_peak(rows: pd.DataFrame) -> np.ndarray:
    """Members of the peak set, where there are resamples to say so."""
    if "peak_share" not in rows:
        return np.zeros(len(rows), dtype=bool)
    return (rows["in_peak_set"] & rows["peak_share"].notna()).to_numpy(bool)


def _ring(colour: str) -> dict[str, Any]:
    return {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": colour, "markeredgewidth": 1.0}


def conventions(summary: pd.DataFrame, series: int) -> list[Line2D]:
    """Legend entries for what markers and bars mean, of those that are drawn."""
    if series > MOST_LINES:
        return []
    bar = {"color": GREY, "linestyle": "", "marker": "|", "markersize": 11}
    shown = []
    if summary["effect_low"].notna().any():
        shown.append(Line2D([], [], markeredgewidth=1.8, label="95 % interval", **bar))
    if summary["effect_sim_low"].notna().any():
        thin = f"95 % for all {len(summary)} places at once (simultaneous)"
        shown.append(Line2D([], [], markeredgewidth=0.7, label=thin, **bar))
    if clipped_of(summary).any():
        hollow = {"color": GREY, "linestyle": "", "marker": "o", "markerfacecolor": "white"}
        shown.append(Line2D([], [], label="window clipped at the network's end", **hollow))
    if _may_be_peak(summary).any():
        label = "may be the peak (95 % peak set)"
        shown.append(Line2D([], [], linestyle="", marker="o", label=label, **_ring(GREY) | {"markersize": 9}))
    return shown


def _dots(axes: Axes, summary: pd.DataFrame, beside: Beside) -> None:
    """Every row a dot; the largest with name, interval and controls."""
    number = summary["series"].nunique()
    label = f"mean effect, {number} a layer; the {NAMED} largest, with 95 % interval:"
    axes.plot(summary["layer"], summary["effect"], "o", color=BLUE, markersize=4, alpha=0.35, label=label)
    largest = summary.loc[summary["effect"].abs().nlargest(NAMED).index]
    whiskers(axes, largest["layer"].to_numpy(float), largest, "effect", color=BLUE, alpha=0.5)
    rows = largest.to_dict("records")
    name_points(axes, [(row["layer"], row["effect"], _said(row, beside.controls)) for row in rows])


def _said(row: dict[str, Any], controls: Mapping[str, str]) -> str:
    """A row, its effect with interval and those of controls, in words."""
    interval = "" if np.isnan(row["effect_low"]) else f" [{row['effect_low']:+.3f}, {row['effect_high']:+.3f}]"
    donors = {column: column.removeprefix("effect_").replace("_", " ") for column in controls}
    known = {donor: row[column] for column, donor in donors.items() if not np.isnan(row[column])}
    others = "".join(f"; {donor} {effect:+.3f}" for donor, effect in known.items())
    return f"layer {row['layer']}, {row['series']}: {row['effect']:+.3f}{interval}{others}"


def _add_controls(axes: Axes, rows: pd.DataFrame, beside: Beside, keep_axis: bool) -> None:
    """The controls of one series as lines; ``keep_axis``: only as far as they keep to the axis as it is."""
    limits = axes.get_ylim()
    _controls(axes, rows, beside, CONTROLS, limits if keep_axis else (-np.inf, np.inf))
    if keep_axis:
        axes.set_ylim(limits)


def _controls(
    axes: Axes,
    rows: pd.DataFrame,
    beside: Beside,
    styles: Sequence[tuple[str, str, str]],
    within: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    """Each control a line, with intervals of the means ``within`` these."""
    rows = rows.sort_values("layer")
    for i, ((colour, marker, line), (column, words)) in enumerate(zip(styles, beside.controls.items(), strict=False)):
        layers = rows["layer"].to_numpy() + 1.5 * APART * (i + 1)
        inside = rows[column].between(*within).to_numpy()
        whiskers(axes, layers[inside], rows[inside], column, color=colour, alpha=0.7)
        look = {"color": colour, "linestyle": line, "linewidth": 1.4, "markersize": 4.5, "zorder": 2.5}
        axes.plot(layers, rows[column], marker, label=words, **look)


def _draw_whole(axes: Axes, rows: pd.DataFrame, beside: Beside, series: Sequence[str], name: str) -> None:
    """All donors of one series, on an axis that holds them."""
    rows, (colour, marker) = rows.sort_values("layer"), STYLES[series.index(name)]
    axes.axhline(0, color="black", linewidth=0.8)
    if not np.isnan(beside.total.mean):
        axes.axhline(beside.total.mean, color=ORANGE, linewidth=1.4, linestyle="--")
    whiskers(axes, rows["layer"].to_numpy(float), rows, "effect", color=colour)
    axes.plot(rows["layer"], rows["effect"], marker, color=colour, linestyle="-", linewidth=1.6, markersize=5)
    _controls(axes, rows, beside, CONTROLS if len(series) == 1 else GREY_CONTROLS)
    axes.set_title(name or "the same, on an axis that holds all donors", fontsize=9, loc="left")


def finish(axes: Axes, rows: pd.DataFrame, words: str, most: int = 24) -> None:
    """Names the axes; at most so many layers are numbered."""
    axes.set_xlabel(layer_words(set(rows["window"])))
    axes.set_ylabel(words)
    number_layers(axes, rows["layer"], most)
    axes.grid(axis="y", alpha=0.25)


def _share_of_total(axes: Axes, total: Estimate) -> None:
    """A second axis in shares of the total effect, where the total effect is a denominator."""
    if total.holds_zero or not total.known:
        return
    share = axes.secondary_yaxis("right", functions=(lambda y: y / total.mean, lambda s: s * total.mean))
    share.set_ylabel("share of the total effect recovered")
    share.yaxis.set_major_locator(MaxNLocator(6))
