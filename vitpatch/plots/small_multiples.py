"""Small profiles beside each other → matplotlib figures: windows beside the sums of their layers, and classes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import ceil, sqrt

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitpatch.plots.profile import Beside, clipped_of, conventions, finish, references
from vitpatch.plots.style import (
    APART,
    BLUE,
    FEW_CLUSTERS,
    GREY,
    ORANGE,
    STYLES,
    Caption,
    OfClass,
    cut,
    headline,
    legend_below,
    number_layers,
    whiskers,
    width_for,
    with_most_images,
)
from vitpatch.types import Estimate, counted, window_word


def windows(summary: pd.DataFrame, sums: pd.DataFrame, total: Estimate, caption: Caption) -> Figure:
    """Mean effect of windows of each size, dashed the sum of their layers' alone, and below the difference of the two.

    ``sums`` have ``sum`` and ``synergy``, with its interval, in rows of the summary's index, for windows of several
    layers; empty where single layers are not known. A column a token group.
    """
    groups = list(dict.fromkeys(summary["tokens"]))
    width = min(width_for(summary["layer"].nunique()) * (1 + 0.6 * (len(groups) - 1)), 22)
    rows = 2 if len(sums) else 1
    figure = Figure(figsize=(width, 4.4 + 2.6 * (rows - 1)), layout="constrained")
    shared = {"sharex": "col", "sharey": "row"}
    grid = figure.subplots(rows, len(groups), squeeze=False, height_ratios=(4.4, 2.6)[:rows], **shared)
    for i, (panels, tokens) in enumerate(zip(grid.T, groups, strict=True)):
        of_group = summary[summary["tokens"] == tokens]
        references(panels[0], Beside(total))
        for j, window in enumerate(dict.fromkeys(of_group["window"])):
            _draw_window(panels, of_group[of_group["window"] == window].sort_values("layer"), sums, j)
        for axes, words in zip(panels, (caption.effect, "window − sum"), strict=False):
            axes.axhline(0, color="black", linewidth=0.8)
            finish(axes, of_group, words if i == 0 else "")
        panels[0].set_title(f"tokens: {tokens}" if len(groups) > 1 else "", fontsize=9, loc="left")
    more = conventions(summary.assign(effect_sim_low=np.nan, in_peak_set=False), 1)
    if len(sums):
        more.append(Line2D([], [], color=GREY, linestyle="--", label="sum of the effects of the window's layers alone"))
    legend_below(figure, list(grid[0]), 2, more)
    headline(figure, caption.title, f"{caption.sample}; {caption.intervals}")
    return figure


def _draw_window(panels: Sequence[Axes], rows: pd.DataFrame, sums: pd.DataFrame, at: int) -> None:
    """The windows of one size, and beside them what is known of their layers; ``at`` the size's place among them."""
    colour, marker = STYLES[at % len(STYLES)]
    aside, effect, clipped = APART * (at - 1), rows["effect"].to_numpy(), clipped_of(rows)
    x = rows["layer"].to_numpy() + aside
    whiskers(panels[0], x, rows, "effect", color=colour)
    window = rows["window"].iloc[0]
    label = f"window {window}" if window > 0 else window_word(window)
    panels[0].plot(x, effect, marker, color=colour, linestyle="-", linewidth=1.8, zorder=3, label=label)
    panels[0].plot(x[clipped], effect[clipped], marker, color=colour, markerfacecolor="white", zorder=3.1)
    known = sums.loc[[row for row in rows.index if row in sums.index]]
    if len(known):
        x = rows["layer"].loc[known.index].to_numpy() + aside
        panels[0].plot(x, known["sum"], "--", color=colour, linewidth=1.5, zorder=2.8)
        whiskers(panels[1], x, known, "synergy", color=colour)
        panels[1].plot(x, known["synergy"], marker, color=colour, linestyle="-", linewidth=1.5, markersize=5, zorder=3)


def classes(
    of_classes: Sequence[OfClass], layers: Sequence[int], everyone: Sequence[float], layer_axis: str, caption: Caption
) -> Figure:
    """A small profile for each class, with interval, beside the means of all images, on the same axes.

    Of more than ``MOST_CLASSES`` those with the most images are shown, and the title says so.
    """
    shown, some = with_most_images(of_classes)
    columns = _columns(len(shown))
    rows = ceil(len(shown) / columns)
    figure = Figure(figsize=(max(2.15 * columns + 0.8, 7), 1.75 * rows + 1.3), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, one in zip(panels, shown, strict=False):
        _draw_class(axes, one, layers, everyone)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes in panels[max(len(shown) - columns, 0) : len(shown)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("\n".join(textwrap.wrap(layer_axis, 30)), fontsize=8)
    figure.supylabel(f"mean {caption.effect}", fontsize=9)
    legend_below(figure, panels[: len(shown)], 3)
    some_few = caption.clusters > 1 and any(one.clusters < FEW_CLUSTERS for one in shown)
    few = f"; none of fewer than {FEW_CLUSTERS}" if some_few else ""
    headline(figure, caption.title, f"{caption.sample}{some}; {caption.intervals}{few}")
    return figure


def _columns(panels: int) -> int:
    """How many panels side by side: about as many as below each other, with few gaps."""
    near = ceil(sqrt(1.3 * panels))
    return min(range(max(near - 1, 1), near + 2), key=lambda columns: (-panels % columns, abs(columns - near)))


def _draw_class(axes: Axes, one: OfClass, layers: Sequence[int], everyone: Sequence[float]) -> None:
    axes.axhline(0, color="black", linewidth=0.7)
    if not np.isnan(one.total):
        axes.axhline(one.total, color=ORANGE, linewidth=1.3, linestyle="--", label="total effect of the class")
    axes.plot(layers, everyone, color=GREY, linewidth=1.2, linestyle=":", label="all images")
    rows = pd.DataFrame({"effect_low": [e.low for e in one.effects], "effect_high": [e.high for e in one.effects]})
    whiskers(axes, np.asarray(layers, dtype=float), rows, "effect", color=BLUE, alpha=0.7)
    style = {"color": BLUE, "markersize": 3, "linewidth": 1.4, "label": "class"}
    axes.plot(layers, [e.mean for e in one.effects], "o-", **style)
    sample = f"{counted(one.images, 'image')} in {counted(one.clusters, 'cluster')}"
    axes.set_title(f"{cut(one.name, 26)}\n{sample}", fontsize=8)
    number_layers(axes, layers, most=7)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", alpha=0.25)
