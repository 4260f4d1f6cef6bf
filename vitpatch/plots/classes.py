"""Effects on the images of each class → matplotlib figures: a heatmap of class × layer, and a profile a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitpatch.formatting import format_count
from vitpatch.plots import layout, style
from vitpatch.plots.heatmaps import draw_numbers
from vitpatch.plots.layout import Strip
from vitpatch.plots.style import Caption
from vitpatch.stats.inference import Resamples
from vitpatch.stats.result import RunResult
from vitpatch.stats.summary import in_layer_order

PANELS_A_ROW = 5
PALE = 0.35  # how opaque the line of a class of few clusters is
TICKS_A_PANEL = 5


@dataclass(frozen=True)
class ClassEffects:
    """Effects on the images of a class: columns ``effect``, ``effect_low``, ``effect_high``, a row a layer, without an
    interval of fewer clusters than ``FEW_CLUSTERS``; ``total`` is the mean total effect, NaN where there is none."""

    name: str
    images: int
    clusters: int
    effects: pd.DataFrame
    total: float

    @property
    def is_small(self) -> bool:
        """Whether it has too few clusters for an interval."""
        return self.clusters < style.FEW_CLUSTERS


def largest_classes(classes: Sequence[ClassEffects]) -> tuple[list[ClassEffects], str]:
    """The ``MOST_CLASSES`` classes with the most images, in their order; and words for a title that say so."""
    if len(classes) <= style.MOST_CLASSES:
        return list(classes), ""
    largest = sorted(range(len(classes)), key=lambda i: -classes[i].images)[: style.MOST_CLASSES]
    words = f"; the {style.MOST_CLASSES} of {len(classes)} classes with the most images"
    return [classes[i] for i in sorted(largest)], words


def class_figures(result: RunResult, summary: pd.DataFrame, caption: Caption) -> dict[str, Figure]:
    """The heatmap of class × layer and the profile of each class, of the series that the peak is in.

    None of a single class, whose effects are those of all images.
    """
    if result.examples["label"].nunique() < 2:
        return {}
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

    Small classes are pale. Of more than ``MOST_CLASSES`` those with the most images
    are shown, and the title says so. ``layer_axis`` names the axis.
    """
    classes, selection = largest_classes(classes)
    size = max(2.6 + 0.62 * len(layers), layout.LEAST_WIDTH), max(1.9 + 0.36 * len(classes), layout.LEAST_HEIGHT)
    figure = layout.make_figure(*size)
    axes = figure.add_subplot()
    names = [f"{style.shorten(group.name)} (n = {group.images})" for group in classes]
    small = [i for i, group in enumerate(classes) if group.is_small]
    image = draw_numbers(axes, [group.effects for group in classes], names, layers, pale=small)
    axes.set_xlabel(layer_axis)
    layout.add_colour_bar(image, axes, None, f"mean {caption.effect}")
    pale = f"; pale: fewer than {style.FEW_CLUSTERS} clusters" if small else ""
    note = f"bold: 95 % interval without 0{pale}"
    layout.set_headline(figure, caption.title, f"{caption.sample}{selection}; {note}")
    return figure


def class_profiles(
    effects: Sequence[ClassEffects], layers: Sequence[int], means: Sequence[float], layer_axis: str, caption: Caption
) -> Figure:
    """A small profile for each class, with interval, and the ``means`` of all images by layer, on the same scale.

    The lines of small classes are pale. Of more than ``MOST_CLASSES`` those with the most images are shown, and the
    title says so.
    """
    drawn, selection = largest_classes(effects)
    rows = ceil(len(drawn) / layout.panels_a_row(PANELS_A_ROW, 0.9))
    columns = ceil(len(drawn) / rows)
    figure = layout.make_figure(max(2.0 * columns + 1.0, 7), 1.9 * rows + 1.2)
    panels = figure.subplots(rows, 1, sharey=True, squeeze=False, gridspec_kw={"hspace": 0.4})[:, 0]
    strip = Strip(columns, min(layers) - 0.5, max(layers) + 0.5)
    for i, axes in enumerate(panels):
        _draw_classes(axes, strip, drawn[i * columns : (i + 1) * columns], layers, means)
    panels[-1].set_xlabel(layer_axis, fontsize=9)
    panels[rows // 2].set_ylabel(f"mean {caption.effect}", fontsize=9, y=0.5 if rows % 2 else 1.2)
    layout.add_legend_below(figure, panels, 4)
    has_small_classes = caption.clusters > 1 and any(group.is_small for group in drawn)
    few = f"; none of fewer than {style.FEW_CLUSTERS}" if has_small_classes else ""
    layout.set_headline(figure, caption.title, f"{caption.sample}{selection}; {caption.intervals}{few}")
    return figure


def _draw_classes(
    axes: Axes, strip: Strip, classes: Sequence[ClassEffects], layers: Sequence[int], means: Sequence[float]
) -> None:
    """The profiles of a row of classes, a panel each."""
    number = len(classes)
    x, starts = [strip.place(panel, layers) for panel in range(number)], strip.starts[:number]
    axes.axhline(0, color="black", linewidth=0.7, zorder=1)
    totals = {"color": style.ORANGE, "linewidth": 1.3, "linestyle": "--", "label": "total effect of the class"}
    if not np.isnan(classes[0].total):
        axes.hlines([group.total for group in classes], starts, starts + strip.width, **totals)
    look = {"color": style.GREY, "linewidth": 1.2, "linestyle": ":", "marker": "_", "label": "all images"}
    axes.plot(*style.break_line(np.concatenate(x), [*means] * number), **look)
    for is_small, words in ((False, "class"), (True, f"class of fewer than {style.FEW_CLUSTERS} clusters")):
        some = [i for i, group in enumerate(classes) if group.is_small == is_small]
        if some:
            rows = pd.concat([classes[i].effects for i in some], ignore_index=True)
            look = {"color": style.BLUE, "markersize": 3, "linewidth": 1.4, "bar_alpha": 0.7, "label": words}
            look |= {"alpha": PALE} if is_small else {}
            style.draw_series(axes, np.concatenate([x[i] for i in some]), rows, "effect", **look)
    for start, group in zip(starts, classes, strict=True):
        sample = f"{format_count(group.images, 'image')} in {format_count(group.clusters, 'cluster')}"
        words, ink = f"{style.shorten(group.name, 26)}\n{sample}", style.GREY if group.is_small else "black"
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8, "color": ink}
        axes.text(start + strip.width / 2, 1.02, words, **place)
    strip.draw_frames(axes, number, layers, [str(layer) for layer in layers], TICKS_A_PANEL)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", alpha=0.25)
