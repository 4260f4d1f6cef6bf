"""Pages of single images → matplotlib figures: the images, and the metric or the effects as they are patched."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitpatch.plots.heatmaps import cls_rows, colour_limit, displayed_part, draw_map, rows_over_image
from vitpatch.plots.style import (
    GREEN,
    METRIC_NAMES,
    MOST_LINES,
    ORANGE,
    STYLES,
    Caption,
    cut,
    headline,
    layer_words,
    place_words,
)
from vitpatch.stats.result import RunResult
from vitpatch.stats.summary import in_layer_order
from vitpatch.types import BaseRun, Metric

MOST_MAPS = 12
"""Of more layers this many, evenly spread, are on an example page."""


@dataclass(frozen=True)
class ExampleImage:
    """One image of a page: ``pictures`` (height, width, 3) uint8, predictions and metric of the base runs; ``patched``
    (patches,), the metric of the patched ones."""

    example_id: int
    name: str
    pictures: Mapping[BaseRun, NDArray[np.uint8]]
    predicted: Mapping[BaseRun, str]
    base: Mapping[BaseRun, float]
    patched: NDArray[np.floating]


@dataclass(frozen=True)
class ExamplePage:
    """A page's name, how its images were picked in words, and these."""

    name: str
    chosen: str
    images: Sequence[ExampleImage]


@dataclass(frozen=True)
class Trace:
    """What is drawn of one image; ``label`` stands at its left.

    ``curves`` by series its layers in order and the metric there, (layers,) each; or ``maps``, effects (layers, rows,
    columns) over the image, or one of layer × head; ``cls`` stands below each map: what is not an image patch.
    """

    image: ExampleImage
    curves: Mapping[str, tuple[NDArray[np.integer], NDArray[np.floating]]]
    maps: NDArray[np.floating] | None = None
    cls: Sequence[str] = ()
    label: str = ""


def image_pages(
    outcome: RunResult, pages: Sequence[ExamplePage], caption: Caption, summary: pd.DataFrame
) -> dict[str, Figure]:
    """The figure of each page by its name; ``summary`` has a column ``series``."""
    over_image = rows_over_image(summary)
    if over_image is None and not outcome.study.target.one_head_at_a_time:
        axis = layer_words(set(summary["window"]))
        return {page.name: example_page(_traces(outcome, page, summary), axis, page.chosen, caption) for page in pages}
    if over_image is not None:
        at, cls, numbers = over_image, cls_rows(summary, over_image), None
        panels = [f"layer {layer}" for layer in summary["layer"].iloc[at[:, 0, 0]]]
        caption = caption.extended(displayed_part(summary, at.flat[0]))
    else:
        first = np.flatnonzero(summary["tokens"] == summary["tokens"].iloc[0])
        at = in_layer_order(summary, first).reshape(1, summary["layer"].nunique(), -1)
        cls, numbers = [], (list(dict.fromkeys(summary["head"])), sorted(set(summary["layer"])))
        panels, caption = ["layer × head"], caption.extended(displayed_part(summary, 0, heads=False))
    return {
        page.name: map_page(_traces(outcome, page, summary, at, cls), panels, numbers, page.chosen, caption)
        for page in pages
    }


def _traces(
    outcome: RunResult,
    page: ExamplePage,
    summary: pd.DataFrame,
    at: NDArray[np.intp] | None = None,
    cls: Sequence[int] = (),
) -> list[Trace]:
    """What is drawn of each image; ``at``: rows of the summary as maps, ``cls``: those of the CLS token."""
    layers, series = summary["layer"].to_numpy(), summary["series"]
    rows_of_series = {n: in_layer_order(summary, np.flatnonzero(series == n)) for n in dict.fromkeys(series)}
    traces = []
    for image in page.images:
        effects, label = image.patched - image.base[outcome.study.direction.recipient], ""
        if outcome.peak is not None:
            place = place_words(outcome.peak_layer, outcome.peak_series)
            label = f"effect {effects[outcome.peak.name]:+.3f}\nat {place}"
        curves = {name: (layers[rows], image.patched[rows]) for name, rows in rows_of_series.items()}
        maps = None if at is None else effects[at]
        traces.append(Trace(image, curves, maps, [f"CLS {effect:+.2f}" for effect in effects[list(cls)]], label))
    return traces


def example_page(traces: Sequence[Trace], layer_axis: str, chosen: str, caption: Caption) -> Figure:
    """For each image: clean, corrupted, and the metric as each layer's window is patched, with both base runs as lines.

    ``layer_axis`` names the axis, ``chosen`` says in words how the images were picked.
    """
    figure = Figure(figsize=(9.5, 1.1 + 1.75 * len(traces)), layout="constrained")
    grid = figure.subplots(len(traces), 3, width_ratios=(1, 1, 3.4), squeeze=False)
    for row, trace in zip(grid, traces, strict=True):
        _draw_pictures(row, trace)
        _draw_curves(row[2], trace, caption.metric)
    grid[-1][2].set_xlabel(layer_axis)
    handles, labels = grid[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    number = len(traces[0].curves)
    some = f"; the first {MOST_LINES} of {number} series" if number > MOST_LINES else ""
    headline(figure, caption.title, f"{METRIC_NAMES[caption.metric]}; {chosen}{some}", f"of {caption.sample}")
    return figure


def _draw_pictures(row: Sequence[Axes], trace: Trace) -> None:
    image = trace.image
    for axes, run in zip(row[:2], BaseRun, strict=True):
        axes.imshow(image.pictures[run], interpolation="nearest")
        axes.set_xticks([]), axes.set_yticks([])
        axes.set_xlabel(f"{run}, {image.base[run]:.2f}\n“{cut(image.predicted[run], 24)}”", fontsize=8)
    row[0].set_title("\n".join(textwrap.wrap(image.name, 24)[:2]), fontsize=8, loc="left")
    row[0].set_ylabel(trace.label, fontsize=7)


def _draw_curves(axes: Axes, trace: Trace, metric: Metric) -> None:
    base = trace.image.base
    axes.axhline(base[BaseRun.CLEAN], color=GREEN, linewidth=1.5, linestyle="-", label="clean run")
    axes.axhline(base[BaseRun.CORRUPT], color=ORANGE, linewidth=1.5, linestyle="--", label="corrupted run")
    for (colour, marker), (name, (layers, patched)) in zip(STYLES, trace.curves.items(), strict=False):
        label = f"patched run, {name}" if name else "patched run"
        axes.plot(layers, patched, f"{marker}-", color=colour, markersize=4, linewidth=1.2, label=label)
    if metric is Metric.PROB:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(sorted({int(layer) for layers, _ in trace.curves.values() for layer in layers}))
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.set_ylabel(str(metric), fontsize=8)


def map_page(
    traces: Sequence[Trace],
    panels: Sequence[str],
    numbers: tuple[Sequence[int], Sequence[int]] | None,
    chosen: str,
    caption: Caption,
) -> Figure:
    """For each image: clean, corrupted, and its maps, each image on its own scale.

    ``panels`` name the maps of an image; ``numbers`` are the heads and layers of a map that is not over the image.
    """
    kept = np.unique(np.linspace(0, len(panels) - 1, min(MOST_MAPS, len(panels))).round().astype(int))
    wide = 1.0 if numbers is None else 4.0
    figure = Figure(figsize=(3.4 + wide * len(kept), 1.2 + 1.5 * len(traces)), layout="constrained")
    ratios = (1.3, 1.3, *[wide] * len(kept))
    grid = figure.subplots(len(traces), 2 + len(kept), width_ratios=ratios, squeeze=False)
    for row, trace in zip(grid, traces, strict=True):
        _draw_pictures(row, trace)
        limit = colour_limit(trace.maps)
        for axes, at in zip(row[2:], kept, strict=True):
            image = draw_map(axes, trace.maps[at], limit)
            axes.set_title(panels[at], fontsize=7)
            if numbers is not None:
                _number_cells(axes, *numbers)
            elif trace.cls:
                axes.set_xlabel(trace.cls[at], fontsize=7)
        bar = figure.colorbar(image, ax=list(row[2:]), pad=0.01)
        bar.ax.tick_params(labelsize=7)
    what = f"effect on the {METRIC_NAMES[caption.metric]}, each image on its own scale"
    headline(figure, caption.title, what, chosen, f"of {caption.sample}")
    return figure


def _number_cells(axes: Axes, heads: Sequence[int], layers: Sequence[int]) -> None:
    """Lets a map of layer × head fill its panel, its rows and columns numbered as layers and heads are."""
    axes.set_aspect("auto")
    axes.set_xlabel("head", fontsize=7)
    axes.set_ylabel("layer", fontsize=7)
    for axis, numbers in ((axes.xaxis, heads), (axes.yaxis, layers)):
        ticks = range(0, len(numbers), 1 if len(numbers) <= 16 else 2)
        axis.set_ticks(ticks, [str(numbers[i]) for i in ticks])
        axis.set_tick_params(labelsize=6)
