"""Figures with images in them: example pages, and maps of effects over the image."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from vitpatch.plots.style import (
    GREEN,
    LEAST_LIMIT,
    METRIC_NAMES,
    MOST_LINES,
    ORANGE,
    STYLES,
    Caption,
    colour_bar,
    cut,
    headline,
)
from vitpatch.types import BaseRun, Metric

MOST_MAPS = 12
"""Of more layers this many, evenly spread, are on an example page."""


@dataclass(frozen=True)
class ShownImage:
    """One image of a page: ``pictures`` (height, width, 3) uint8, predictions and metric of the base runs; ``patched``
    (patches,), the metric of the patched ones."""

    example_id: int
    name: str
    pictures: Mapping[BaseRun, NDArray[np.uint8]]
    predicted: Mapping[BaseRun, str]
    base: Mapping[BaseRun, float]
    patched: NDArray[np.floating]


@dataclass(frozen=True)
class Page:
    """A page's name, how its images were picked in words, and these."""

    name: str
    chosen: str
    images: Sequence[ShownImage]


@dataclass(frozen=True)
class Trace:
    """One image for an example page.

    ``pictures`` (height, width, 3) uint8 and ``base``, the metric, by base run; ``patched`` by series its layers in
    order and the metric there, (layers,) each; or ``maps``, effects (layers, rows, columns) over the image, or one of
    layer × head; ``beside`` a map, in words, what is not an image patch; ``said`` of the image, in words.
    """

    name: str
    pictures: dict[BaseRun, NDArray[np.uint8]]
    predictions: dict[BaseRun, str]
    base: dict[BaseRun, float]
    patched: dict[str, tuple[NDArray[np.integer], NDArray[np.floating]]]
    maps: NDArray[np.floating] | None = None
    beside: tuple[str, ...] = ()
    said: str = ""


@dataclass(frozen=True)
class MapAxes:
    """What the columns and rows of a map are that is not over the image: numbers of heads and of layers."""

    heads: Sequence[int]
    layers: Sequence[int]


def example_page(traces: Sequence[Trace], layer_words: str, chosen: str, caption: Caption) -> Figure:
    """For each image: clean, corrupted, and the metric as each layer's window is patched, with both base runs as lines.

    ``layer_words`` name the axis, ``chosen`` says in words how the images were picked.
    """
    figure = Figure(figsize=(9.5, 1.1 + 1.75 * len(traces)), layout="constrained")
    grid = figure.subplots(len(traces), 3, width_ratios=(1, 1, 3.4), squeeze=False)
    for row, trace in zip(grid, traces, strict=True):
        _draw_pictures(row, trace)
        _draw_trace(row[2], trace, caption.metric)
    grid[-1][2].set_xlabel(layer_words)
    handles, labels = grid[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    number = len(traces[0].patched)
    some = f"; the first {MOST_LINES} of {number} series" if number > MOST_LINES else ""
    headline(figure, caption.title, f"{METRIC_NAMES[caption.metric]}; {chosen}{some}", f"of {caption.sample}")
    return figure


def _draw_pictures(row: Sequence[Axes], trace: Trace) -> None:
    for axes, run in zip(row[:2], BaseRun, strict=True):
        axes.imshow(trace.pictures[run], interpolation="nearest")
        axes.set_xticks([]), axes.set_yticks([])
        axes.set_xlabel(f"{run}, {trace.base[run]:.2f}\n“{cut(trace.predictions[run], 24)}”", fontsize=8)
    row[0].set_title("\n".join(textwrap.wrap(trace.name, 24)[:2]), fontsize=8, loc="left")
    row[0].set_ylabel(trace.said, fontsize=7)


def _draw_trace(axes: Axes, trace: Trace, metric: Metric) -> None:
    axes.axhline(trace.base[BaseRun.CLEAN], color=GREEN, linewidth=1.5, linestyle="-", label="clean run")
    axes.axhline(trace.base[BaseRun.CORRUPT], color=ORANGE, linewidth=1.5, linestyle="--", label="corrupted run")
    for (colour, marker), (name, (layers, patched)) in zip(STYLES, trace.patched.items(), strict=False):
        label = f"patched run, {name}" if name else "patched run"
        axes.plot(layers, patched, f"{marker}-", color=colour, markersize=4, linewidth=1.2, label=label)
    if metric is Metric.PROB:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(sorted({int(layer) for layers, _ in trace.patched.values() for layer in layers}))
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.set_ylabel(str(metric), fontsize=8)


def effect_maps(
    maps: NDArray[np.floating], layers: Sequence[int], beside: Sequence[str], what: str, caption: Caption
) -> Figure:
    """Mean effects over the image, (layers, rows, columns): a panel a layer, one scale.

    ``beside`` are words for each panel on what is not an image patch, the CLS token; ``what`` a cell is.
    """
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(2.2 * columns + 1.2, 2.3 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    limit = _limit(maps)
    for axes, layer, values, words in zip(panels, layers, maps, beside, strict=False):
        image = _draw_map(axes, values, limit)
        axes.set_title(f"layer {layer}{words}", fontsize=8)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    colour_bar(figure, image, panels, f"mean effect of a {what} on the {METRIC_NAMES[caption.metric]}")
    headline(figure, caption.title, caption.sample)
    return figure


def map_page(
    traces: Sequence[Trace], panels: Sequence[str], map_axes: MapAxes | None, chosen: str, caption: Caption
) -> Figure:
    """For each image: clean, corrupted, and its maps, each image on its own scale.

    ``panels`` name the maps of an image; ``map_axes`` are those of a map that is not over the image.
    """
    kept = np.unique(np.linspace(0, len(panels) - 1, min(MOST_MAPS, len(panels))).round().astype(int))
    wide = 1.0 if map_axes is None else 4.0
    figure = Figure(figsize=(3.4 + wide * len(kept), 1.2 + 1.5 * len(traces)), layout="constrained")
    ratios = (1.3, 1.3, *[wide] * len(kept))
    grid = figure.subplots(len(traces), 2 + len(kept), width_ratios=ratios, squeeze=False)
    for row, trace in zip(grid, traces, strict=True):
        _draw_pictures(row, trace)
        limit = _limit(trace.maps)
        for axes, at in zip(row[2:], kept, strict=True):
            image = _draw_map(axes, trace.maps[at], limit)
            axes.set_title(panels[at], fontsize=7)
            if map_axes is not None:
                _number(axes, map_axes)
            elif trace.beside:
                axes.set_xlabel(trace.beside[at], fontsize=7)
        bar = figure.colorbar(image, ax=list(row[2:]), pad=0.01)
        bar.ax.tick_params(labelsize=7)
    what = f"effect on the {METRIC_NAMES[caption.metric]}, each image on its own scale"
    headline(figure, caption.title, what, chosen, f"of {caption.sample}")
    return figure


def _number(axes: Axes, map_axes: MapAxes) -> None:
    """Lets a map that is no image fill its panel, its rows and columns numbered as heads and layers are."""
    axes.set_aspect("auto")
    axes.set_xlabel("head", fontsize=7)
    axes.set_ylabel("layer", fontsize=7)
    for axis, numbers in ((axes.xaxis, map_axes.heads), (axes.yaxis, map_axes.layers)):
        shown = range(0, len(numbers), 1 if len(numbers) <= 16 else 2)
        axis.set_ticks(shown, [str(numbers[i]) for i in shown])
        axis.set_tick_params(labelsize=6)


def _limit(maps: NDArray[np.floating]) -> float:
    return max(float(np.nanmax(np.abs(maps))), LEAST_LIMIT)


def _draw_map(axes: Axes, values: NDArray[np.floating], limit: float) -> AxesImage:
    image = axes.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), interpolation="nearest")
    axes.set_xticks([]), axes.set_yticks([])
    return image
