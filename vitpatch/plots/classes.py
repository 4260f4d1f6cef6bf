"""Effects on the images of each class → matplotlib figures: a heatmap of class × layer, and a profile a class."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitpatch.formatting import format_count
from vitpatch.plots import style
from vitpatch.plots.heatmaps import draw_numbers
from vitpatch.plots.style import Caption
from vitpatch.stats.inference import Resamples
from vitpatch.stats.result import RunResult
from vitpatch.stats.summary import in_layer_order


@dataclass(frozen=True)
class ClassEffects:
    """Effects on the images of a class: columns ``effect``, ``effect_low``, ``effect_high``, a row a layer, without an
    interval of fewer clusters than ``FEW_CLUSTERS``; ``total`` is the mean total effect, NaN where there is none."""

    name: str
    images: int
    clusters: int
    effects: pd.DataFrame
    total: float


def largest_classes(classes: Sequence[ClassEffects]) -> tuple[list[ClassEffects], str]:
    """The ``MOST_CLASSES`` classes with the most images, in their order; and words for a title that say so."""
    if len(classes) <= style.MOST_CLASSES:
        return list(classes), ""
    largest = sorted(range(len(classes)), key=lambda i: -classes[i].images)[: style.MOST_CLASSES]
    words = f"; the {style.MOST_CLASSES} of {len(classes)} classes with the most images"
    return [classes[i] for i in sorted(largest)], words


def class_figures(result: RunResult, summary: pd.DataFrame, caption: Caption) -> dict[str, Figure]:
    """The heatmap of class × layer and the profile of each class, of the series that the peak is in."""
    series = summary["series"].iloc[0] if result.peak is None else result.peak_series
    rows = in_layer_order(summary, np.flatnonzero(summary["series"] == series))
    effects, means = list(_class_effects(result, rows)), summary["effect"].iloc[rows].tolist()
    if series:
        caption = caption.add_to_title(f": {series}")
    layers, axis = summary["layer"].iloc[rows].tolist(), style.layer_words(set(summary["window"].iloc[rows]))
    return {
        "heatmap": class_heatmap(effects, layers, axis, caption),
        "classes": class_profiles(effects, layers, means, axis, caption),
    }


def _class_effects(result: RunResult, rows: NDArray[np.intp]) -> Iterator[ClassEffects]:
    """Effects on the images of each class, at some rows of the summary; no interval of few clusters."""
    examples, study = result.examples, result.study
    labels, clusters, total = (examples[name].to_numpy() for name in ("label", "cluster", "total_effect"))
    names = {row["label"]: style.label_words(row) for row in examples.drop_duplicates("label").to_dict("records")}
    effects = result.effects[:, rows]
    for label in np.unique(labels):
        images = labels == label
        resamples = Resamples(clusters[images], study.seed)
        table = pd.DataFrame(resamples.spread(effects[images], method=study.interval).columns("effect"))
        if resamples.n < style.FEW_CLUSTERS:
            table[["effect_low", "effect_high"]] = np.nan
        yield ClassEffects(names[label], int(images.sum()), resamples.n, table, float(total[images].mean()))


def class_heatmap(classes: Sequence[ClassEffects], layers: Sequence[int], layer_axis: str, caption: Caption) -> Figure:
    """Mean effect, class × layer; numbers in bold where the class's own 95 % interval leaves 0 out.

    Of more than ``MOST_CLASSES`` those with the most images are shown, and the title says so. ``layer_axis`` names the
    axis.
    """
    classes, selection = largest_classes(classes)
    size = max(2.6 + 0.62 * len(layers), style.LEAST_WIDTH), max(1.9 + 0.36 * len(classes), style.LEAST_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    names = [f"{style.shorten(group.name)} (n = {group.images})" for group in classes]
    image = draw_numbers(axes, [group.effects for group in classes], names, layers)
    axes.set_xlabel(layer_axis)
    style.add_colour_bar(figure, image, [axes], f"mean {caption.effect}")
    bold = f"bold: 95 % interval without 0, of classes in {style.FEW_CLUSTERS} clusters or more"
    style.set_headline(figure, caption.title, f"{caption.sample}{selection}; {bold}")
    return figure


def class_profiles(
    effects: Sequence[ClassEffects], layers: Sequence[int], means: Sequence[float], layer_axis: str, caption: Caption
) -> Figure:
    """A small profile for each class, with interval, and the ``means`` of all images by layer, on the same axes.

    Of more than ``MOST_CLASSES`` those with the most images are shown, and the title says so.
    """
    drawn, selection = largest_classes(effects)
    columns = _columns(len(drawn))
    rows = ceil(len(drawn) / columns)
    figure = Figure(figsize=(max(2.15 * columns + 0.8, 7), 1.75 * rows + 1.3), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, group in zip(panels, drawn, strict=False):
        _draw_class(axes, group, layers, means)
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axes in panels[max(len(drawn) - columns, 0) : len(drawn)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("\n".join(textwrap.wrap(layer_axis, 30)), fontsize=8)
    figure.supylabel(f"mean {caption.effect}", fontsize=9)
    style.add_legend_below(figure, panels[: len(drawn)], 3)
    has_small_classes = caption.clusters > 1 and any(group.clusters < style.FEW_CLUSTERS for group in drawn)
    few = f"; none of fewer than {style.FEW_CLUSTERS}" if has_small_classes else ""
    style.set_headline(figure, caption.title, f"{caption.sample}{selection}; {caption.intervals}{few}")
    return figure


def _columns(panels: int) -> int:
    """How many panels stand side by side: about as many as below each other, with few gaps."""
    near = ceil(sqrt(1.3 * panels))
    return min(range(max(near - 1, 1), near + 2), key=lambda columns: (-panels % columns, abs(columns - near)))


def _draw_class(axes: Axes, group: ClassEffects, layers: Sequence[int], means: Sequence[float]) -> None:
    axes.axhline(0, color="black", linewidth=0.7)
    if not np.isnan(group.total):
        axes.axhline(group.total, color=style.ORANGE, linewidth=1.3, linestyle="--", label="total effect of the class")
    axes.plot(layers, means, color=style.GREY, linewidth=1.2, linestyle=":", label="all images")
    look = {"color": style.BLUE, "markersize": 3, "linewidth": 1.4, "label": "class"}
    style.draw_series(axes, layers, group.effects, "effect", bar_alpha=0.7, **look)
    sample = f"{format_count(group.images, 'image')} in {format_count(group.clusters, 'cluster')}"
    axes.set_title(f"{style.shorten(group.name, 26)}\n{sample}", fontsize=8)
    style.number_layers(axes, layers, most=7)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", alpha=0.25)
