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

from vitpatch.plots import style
from vitpatch.plots.heatmaps import cls_rows, colour_limit, displayed_part, draw_map, rows_over_image
from vitpatch.plots.style import Caption
from vitpatch.stats.result import RunResult
from vitpatch.stats.summary import in_layer_order
from vitpatch.types import BaseRun, Metric

MOST_MAPS = 12  # of more layers this many, evenly spread, are on an example page


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
    """A page's name, in words how its images were chosen, and the images."""

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
    result: RunResult, pages: Sequence[ExamplePage], caption: Caption, summary: pd.DataFrame
) -> dict[str, Figure]:
    """The figure of each page by its name; ``summary`` has a column ``series``."""
    at, cls, panels, numbers = rows_over_image(summary), [], [], None
    if at is not None:
        cls, panels = cls_rows(summary, at), [f"layer {layer}" for layer in summary["layer"].iloc[at[:, 0, 0]]]
        caption = caption.add_to_title(displayed_part(summary, at.flat[0]))
    elif result.study.target.one_head_at_a_time:
        first = np.flatnonzero(summary["tokens"] == summary["tokens"].iloc[0])
        at = in_layer_order(summary, first).reshape(1, summary["layer"].nunique(), -1)
        panels, numbers = ["layer × head"], (list(dict.fromkeys(summary["head"])), sorted(set(summary["layer"])))
        caption = caption.add_to_title(displayed_part(summary, 0, heads=False))
    figures = {}
    for page in pages:
        traces = [_trace(result, image, summary, at, cls) for image in page.images]
        if at is None:
            axis = style.layer_words(set(summary["window"]))
            figures[page.name] = example_page(traces, axis, page.chosen, caption)
        else:
            figures[page.name] = map_page(traces, panels, numbers, page.chosen, caption)
    return figures


def _trace(
    result: RunResult, image: ExampleImage, summary: pd.DataFrame, at: NDArray[np.intp] | None, cls: Sequence[int]
) -> Trace:
    """What is drawn of an image; ``at``: rows of the summary as maps, ``cls``: its rows of the CLS token."""
    effects, label = image.patched - image.base[result.study.direction.recipient], ""
    if result.peak is not None:
        place = style.place_words(result.peak_layer, result.peak_series)
        label = f"effect {effects[result.peak.name]:+.3f}\nat {place}"
    by_series = {name: rows.sort_values("layer") for name, rows in summary.groupby("series", sort=False)}
    curves = {name: (rows["layer"].to_numpy(), image.patched[rows.index]) for name, rows in by_series.items()}
    below = [f"CLS {effect:+.2f}" for effect in effects[list(cls)]]
    return Trace(image, curves, None if at is None else effects[at], below, label)


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
    number, what = len(traces[0].curves), f"{style.METRIC_NAMES[caption.metric]}; {chosen}"
    if number > style.MOST_LINES:
        what += f"; the first {style.MOST_LINES} of {number} series"
    style.set_headline(figure, caption.title, what, f"of {caption.sample}")
    return figure


def _draw_pictures(row: Sequence[Axes], trace: Trace) -> None:
    image = trace.image
    for axes, run in zip(row[:2], BaseRun, strict=True):
        axes.imshow(image.pictures[run], interpolation="nearest")
        axes.set_xticks([]), axes.set_yticks([])
        axes.set_xlabel(f"{run}, {image.base[run]:.2f}\n“{style.shorten(image.predicted[run], 24)}”", fontsize=8)
    row[0].set_title("\n".join(textwrap.wrap(image.name, 24)[:2]), fontsize=8, loc="left")
    row[0].set_ylabel(trace.label, fontsize=7)


def _draw_curves(axes: Axes, trace: Trace, metric: Metric) -> None:
    base = trace.image.base
    axes.axhline(base[BaseRun.CLEAN], color=style.GREEN, linewidth=1.5, linestyle="-", label="clean run")
    axes.axhline(base[BaseRun.CORRUPT], color=style.ORANGE, linewidth=1.5, linestyle="--", label="corrupted run")
    for look, (name, (layers, patched)) in zip(style.STYLES, trace.curves.items(), strict=False):
        label = f"patched run, {name}" if name else "patched run"
        axes.plot(layers, patched, linestyle="-", markersize=4, linewidth=1.2, label=label, **look)
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
    what = f"effect on the {style.METRIC_NAMES[caption.metric]}, each image on its own scale"
    style.set_headline(figure, caption.title, what, chosen, f"of {caption.sample}")
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
