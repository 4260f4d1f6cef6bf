"""Small profiles side by side → matplotlib figures: windows with the sums of their layers, and classes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import ceil, sqrt

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitpatch.formatting import counted
from vitpatch.plots.heatmaps import ClassEffects, with_most_images
from vitpatch.plots.profile import References, conventions, draw_references, is_clipped, label_axes
from vitpatch.plots.style import (
    APART,
    BLUE,
    FEW_CLUSTERS,
    GREY,
    ORANGE,
    STYLES,
    Caption,
    cut,
    draw_series,
    headline,
    legend_below,
    number_layers,
    width_for,
)
from vitpatch.types import Estimate, format_window


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
        rows_of_group = summary[summary["tokens"] == tokens]
        draw_references(panels[0], References(total))
        for j, window in enumerate(dict.fromkeys(rows_of_group["window"])):
            _draw_window(panels, rows_of_group[rows_of_group["window"] == window].sort_values("layer"), sums, j)
        for axes, words in zip(panels, (caption.effect, "window − sum"), strict=False):
            axes.axhline(0, color="black", linewidth=0.8)
            label_axes(axes, rows_of_group, words if i == 0 else "")
        panels[0].set_title(f"tokens: {tokens}" if len(groups) > 1 else "", fontsize=9, loc="left")
    more = conventions(summary.assign(effect_sim_low=np.nan, in_peak_set=False), 1)
    if len(sums):
        more.append(Line2D([], [], color=GREY, linestyle="--", label="sum of the effects of the window's layers alone"))
    legend_below(figure, list(grid[0]), 2, more)
    headline(figure, caption.title, f"{caption.sample}; {caption.intervals}")
    return figure


def _draw_window(panels: Sequence[Axes], rows: pd.DataFrame, sums: pd.DataFrame, at: int) -> None:
    """The windows of one size and what is known of their layers; ``at`` the size's place among them."""
    window, (colour, marker) = rows["window"].iloc[0], STYLES[at % len(STYLES)]
    look, layers = {"color": colour, "marker": marker}, rows["layer"] + APART * (at - 1)
    label = f"window {window}" if window > 0 else format_window(window)
    draw_series(panels[0], layers, rows, "effect", hollow=is_clipped(rows), label=label, **look)
    known = sums.loc[[row for row in rows.index if row in sums.index]]
    if len(known):
        layers = layers[known.index]
        panels[0].plot(layers, known["sum"], "--", color=colour, linewidth=1.5, zorder=2.8)
        draw_series(panels[1], layers, known, "synergy", linewidth=1.5, markersize=5, **look)


def classes(
    effects: Sequence[ClassEffects], layers: Sequence[int], means: Sequence[float], layer_axis: str, caption: Caption
) -> Figure:
    """A small profile for each class, with interval, and the ``means`` of all images by layer, on the same axes.

    Of more than ``MOST_CLASSES`` those with the most images are shown, and the title says so.
    """
    drawn, some = with_most_images(effects)
    columns = _columns(len(drawn))
    rows = ceil(len(drawn) / columns)
    figure = Figure(figsize=(max(2.15 * columns + 0.8, 7), 1.75 * rows + 1.3), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, one in zip(panels, drawn, strict=False):
        _draw_class(axes, one, layers, means)
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axes in panels[max(len(drawn) - columns, 0) : len(drawn)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("\n".join(textwrap.wrap(layer_axis, 30)), fontsize=8)
    figure.supylabel(f"mean {caption.effect}", fontsize=9)
    legend_below(figure, panels[: len(drawn)], 3)
    some_few = caption.clusters > 1 and any(one.clusters < FEW_CLUSTERS for one in drawn)
    few = f"; none of fewer than {FEW_CLUSTERS}" if some_few else ""
    headline(figure, caption.title, f"{caption.sample}{some}; {caption.intervals}{few}")
    return figure


def _columns(panels: int) -> int:
    """How many panels side by side: about as many as below each other, with few gaps."""
    near = ceil(sqrt(1.3 * panels))
    return min(range(max(near - 1, 1), near + 2), key=lambda columns: (-panels % columns, abs(columns - near)))


def _draw_class(axes: Axes, one: ClassEffects, layers: Sequence[int], means: Sequence[float]) -> None:
    axes.axhline(0, color="black", linewidth=0.7)
    if not np.isnan(one.total):
        axes.axhline(one.total, color=ORANGE, linewidth=1.3, linestyle="--", label="total effect of the class")
    axes.plot(layers, means, color=GREY, linewidth=1.2, linestyle=":", label="all images")
    style = {"color": BLUE, "markersize": 3, "linewidth": 1.4, "label": "class"}
    draw_series(axes, layers, one.effects, "effect", bar_alpha=0.7, **style)
    sample = f"{counted(one.images, 'image')} in {counted(one.clusters, 'cluster')}"
    axes.set_title(f"{cut(one.name, 26)}\n{sample}", fontsize=8)
    number_layers(axes, layers, most=7)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", alpha=0.25)
