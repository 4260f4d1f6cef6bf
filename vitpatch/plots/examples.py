"""Pages of single images → matplotlib figures: the images, and the metric or the effects as they are patched."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitpatch.plots import layout, style
from vitpatch.plots.heatmaps import COLOURS, colour_limit
from vitpatch.plots.layout import Strip, mosaic
from vitpatch.plots.maps import cls_rows, displayed_part, lay_over, rows_over_image
from vitpatch.plots.style import Caption
from vitpatch.stats.result import RunResult
from vitpatch.stats.summary import in_layer_order
from vitpatch.types import BaseRun, Metric

MOST_MAPS = 12  # of more layers this many, evenly spread, are on an example page
PANEL = 1.5  # inches that an image has on a page
BETWEEN = 0.28  # between its clean and its corrupted picture, in widths of one
TICKS_A_PANEL = 6
MOST_PIXELS = 160  # of a side of a picture with a map
MEANS_OF_DRAWS = ", means of {} draws"
"""Ends the words on how a page's images were chosen, where what is shown is not what the run itself drew."""


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
    """What is drawn of one image; ``label`` stands with it.

    ``curves`` by series its layers in order and the metric there, (layers,) each; or ``maps``, effects (layers, rows,
    columns) over the image, or one of layer × head; ``cls`` stands below each map: what is not an image patch.
    """

    image: ExampleImage
    curves: Mapping[str, tuple[NDArray[np.integer], NDArray[np.floating]]]
    maps: NDArray[np.floating] | None = None
    cls: Sequence[str] = ()
    label: str = ""


def in_even_steps(effects: NDArray[np.floating], number: int) -> NDArray[np.intp]:
    """Positions of so many effects from the largest to the smallest, each the nearest to one of even steps between."""
    left, chosen = np.arange(len(effects)), []
    for step in np.linspace(effects.max(), effects.min(), number):
        at = np.abs(effects[left] - step).argmin()
        chosen.append(left[at])
        left = np.delete(left, at)
    return np.array(chosen)[np.argsort(-effects[chosen], kind="stable")]


def image_page(result: RunResult, page: ExamplePage, caption: Caption, summary: pd.DataFrame) -> Figure:
    """The figure of a page; ``summary`` has a column ``series``."""
    metric, at = style.METRIC_NAMES[caption.metric], rows_over_image(summary)
    most = layout.panels_a_row(len(page.images), 0.8)
    if at is None and most < len(page.images):
        spread = np.linspace(0, len(page.images) - 1, most).round().astype(int)
        page = replace(page, images=[page.images[i] for i in spread], chosen=f"{most} of {page.chosen}")
    height, width = page.images[0].pictures[BaseRun.CLEAN].shape[:2]
    if at is not None:
        caption = caption.add_to_title(displayed_part(summary, at.flat[0]))
        figure = layout.make_figure(1.15 * (2 + min(MOST_MAPS, len(at))) + 0.6, 1.2 + 1.5 * len(page.images))
        draw_page([figure.add_subplot()], result, page, summary)
        what = f"effect on the {metric}, each image on its own scale, over the clean image"
    else:
        heights = [1.05 * PANEL * (2 * height / width + 4 * BETWEEN), 1.1 * PANEL]
        figure = layout.make_figure(PANEL * max(len(page.images), 4) + 1.2, sum(heights) + 1.2)
        axes = figure.subplots(2, 1, gridspec_kw={"height_ratios": heights, "hspace": 0.06})
        draw_page(axes, result, page, summary)
        layout.add_legend_below(figure, [axes[1]], 3)
        what = metric
        if result.study.target.one_head_at_a_time:
            caption = caption.add_to_title(displayed_part(summary, 0, heads=False))
            what = f"effect on the {metric}, each image on its own scale"
        elif (number := summary["series"].nunique()) > style.MOST_LINES:
            what += f"; the first {style.MOST_LINES} of {number} series"
    layout.set_headline(figure, caption.title, what, f"{page.chosen}, of {caption.sample}")
    return figure


def draw_page(axes: Sequence[Axes], result: RunResult, page: ExamplePage, summary: pd.DataFrame) -> None:
    """The images of a page: their pictures, and below on the second axes what patching does to each.

    These are curves, or effects of layer × head. Maps over the image are beside its pictures, on one axes.
    """
    at = rows_over_image(summary)
    if at is not None:
        traces = [make_trace(result, image, summary, at, cls_rows(summary, at)) for image in page.images]
        draw_map_rows(axes[0], traces, summary["layer"].iloc[at[:, 0, 0]].tolist())
    elif result.study.target.one_head_at_a_time:
        first = np.flatnonzero(summary["tokens"] == summary["tokens"].iloc[0])
        at = in_layer_order(summary, first).reshape(1, summary["layer"].nunique(), -1)
        traces = [make_trace(result, image, summary, at) for image in page.images]
        heads, layers = list(dict.fromkeys(summary["head"])), sorted(set(summary["layer"]))
        draw_pictures(axes[0], traces, draw_head_maps(axes[1], traces, heads, layers))
    else:
        traces = [make_trace(result, image, summary) for image in page.images]
        draw_pictures(axes[0], traces, draw_curves(axes[1], traces, result.study.metric))
        axes[1].set_xlabel(style.layer_words(set(summary["window"])))


def make_trace(
    result: RunResult,
    image: ExampleImage,
    summary: pd.DataFrame,
    at: NDArray[np.intp] | None = None,
    cls: Sequence[int] = (),
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


def draw_head_maps(axes: Axes, traces: Sequence[Trace], heads: Sequence[int], layers: Sequence[int]) -> Strip:
    """The effects layer × head, a panel an image, each on its own scale. Returns where the panels are."""
    strip = Strip(len(traces), -0.5, len(heads) - 0.5)
    for panel, trace in enumerate(traces):
        sides = strip.place(panel, [-0.5, len(heads) - 0.5])
        limit = colour_limit(trace.maps)
        look = {"cmap": COLOURS, "vmin": -limit, "vmax": limit, "aspect": "auto", "interpolation": "nearest"}
        axes.imshow(trace.maps[0], extent=(*sides, len(layers) - 0.5, -0.5), **look)
        axes.text(sides.mean(), 1.02, f"± {limit:.3f}", transform=axes.get_xaxis_transform(), fontsize=7, ha="center")
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    strip.draw_frames(axes, len(traces), range(len(heads)), [str(head) for head in heads], TICKS_A_PANEL)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    return strip


def draw_pictures(axes: Axes, traces: Sequence[Trace], strip: Strip) -> None:
    """Clean and, below, corrupted picture of each image, with its name above and what the model says below each."""
    images = [trace.image for trace in traces]
    height, width = images[0].pictures[BaseRun.CLEAN].shape[:2]
    tall, between, right = strip.width * height / width, strip.width * BETWEEN, strip.starts[-1] + strip.width
    tiles, step = [[image.pictures[run] for image in images] for run in BaseRun], tall + between
    axes.imshow(mosaic(tiles, (between / tall, strip.gap / strip.width)), extent=(0, right, step + tall, 0))
    small, most = {"fontsize": 8, "va": "top"}, 17 if layout.is_for_print() else 24
    for x, trace in zip(strip.starts, traces, strict=True):
        image = trace.image
        name = "\n".join(textwrap.wrap(image.name, most)[:2])
        axes.text(x, -0.1 * between, name, **small | {"va": "bottom"})
        for y, run in zip((tall, step + tall), BaseRun, strict=True):
            said = f"{run}, {image.base[run]:.2f}\n“{style.shorten(image.predicted[run], most - 2)}”"
            axes.text(x, y + 0.1 * between, said, **small)
        axes.text(x, 2 * step + 0.1 * between, trace.label, **small)
    axes.set_xlim(0, right)
    axes.set_ylim(2 * step + between, -between)
    axes.set_axis_off()


def draw_curves(axes: Axes, traces: Sequence[Trace], metric: Metric) -> Strip:
    """The metric as each layer's window is patched, with both base runs as lines: a panel an image, on one scale.

    Returns where the panels are.
    """
    layers = sorted({int(layer) for trace in traces for at, _ in trace.curves.values() for layer in at})
    strip = Strip(len(traces), layers[0] - 0.5, layers[-1] + 0.5)
    for run, colour, dashes in ((BaseRun.CLEAN, style.GREEN, "-"), (BaseRun.CORRUPT, style.ORANGE, "--")):
        label = {BaseRun.CLEAN: "clean run", BaseRun.CORRUPT: "corrupted run"}[run]
        look = {"color": colour, "linestyle": dashes, "linewidth": 1.5, "label": label}
        axes.hlines([trace.image.base[run] for trace in traces], strip.starts, strip.starts + strip.width, **look)
    for look, name in zip(style.STYLES, traces[0].curves, strict=False):
        label = f"patched run, {name}" if name else "patched run"
        x = np.concatenate([strip.place(panel, trace.curves[name][0]) for panel, trace in enumerate(traces)])
        y = np.concatenate([trace.curves[name][1] for trace in traces])
        axes.plot(*style.break_line(x, y), markersize=3.5, linewidth=1.2, label=label, **look)
    if metric is Metric.PROB:
        axes.set_ylim(-0.03, 1.03)
    strip.draw_frames(axes, len(traces), layers, [str(layer) for layer in layers], TICKS_A_PANEL)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.set_ylabel(str(metric), fontsize=8)
    return strip


def draw_map_rows(axes: Axes, traces: Sequence[Trace], layers: Sequence[int]) -> None:
    """For each image, a row: clean, corrupted, and its maps over it, each image on its own scale."""
    kept = np.unique(np.linspace(0, len(layers) - 1, min(MOST_MAPS, len(layers))).round().astype(int))
    step = -(-max(traces[0].image.pictures[BaseRun.CLEAN].shape) // MOST_PIXELS)
    tiles = []
    for trace in traces:
        clean, corrupt = (trace.image.pictures[run][::step, ::step] for run in BaseRun)
        limit = colour_limit(trace.maps)
        tiles.append([clean, corrupt, *(lay_over(clean, trace.maps[i], limit) for i in kept)])
    tall, gap = clean.shape[0] / clean.shape[1], 0.08
    down, across = tall + (0.75 if layout.is_for_print() else 0.5), 1 + gap
    shape = (len(kept) + 1) * across + 1, (len(traces) - 1) * down + tall
    axes.imshow(mosaic(tiles, (down / tall - 1, gap)), extent=(0, shape[0], shape[1], 0))
    small = {"fontsize": 7, "va": "top"}
    for row, trace in enumerate(traces):
        _label_row(axes, trace, row * down, row * down + tall, across)
        for column, i in enumerate(kept, start=2):
            axes.text(column * across, row * down - 0.03, f"layer {layers[i]}", **small | {"va": "bottom"})
            if trace.cls:
                axes.text(column * across, row * down + tall + 0.03, trace.cls[i], **small)
    axes.set_xlim(0, shape[0])
    axes.set_ylim(shape[1] + 0.25, -0.25)
    axes.set_axis_off()


def _label_row(axes: Axes, trace: Trace, above: float, below: float, across: float) -> None:
    """The words at the pictures of an image, whose row begins and ends at these heights."""
    image, small = trace.image, {"fontsize": 7, "va": "top"}
    axes.text(0, above - 0.03, style.shorten(image.name, 36), **small | {"va": "bottom"})
    for column, run in enumerate(BaseRun):
        said = f"{run}, {image.base[run]:.2f}\n“{style.shorten(image.predicted[run], 14)}”"
        axes.text(column * across, below + 0.03, said, **small)
    words = f"{trace.label}\nred, blue: ± {colour_limit(trace.maps):.3f}".strip()
    axes.text(-0.04, (above + below) / 2, words, fontsize=7, rotation=90, va="center", ha="right")
