"""Effects on the images of each class → a matplotlib figure: a heatmap of class × layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitpatch.plots import layout, style
from vitpatch.plots.heatmaps import NUMBERS, draw_numbers
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

    @property
    def words(self) -> str:
        """Its name, how many images it has, and its total effect, for which there is no room in print."""
        has_total = not (np.isnan(self.total) or layout.is_for_print())
        return f"{style.shorten(self.name)} (n = {self.images}{f', total {self.total:+.2f}' * has_total})"

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


def class_effects(result: RunResult, summary: pd.DataFrame) -> tuple[list[ClassEffects], pd.DataFrame]:
    """Effects on the images of each class, of the series that the peak is in, and the rows of the summary that they are
    of, in order of layer."""
    series = summary["series"].iloc[0] if result.peak is None else result.peak_series
    rows = in_layer_order(summary, np.flatnonzero(summary["series"] == series))
    return list(_class_effects(result, rows)), summary.iloc[rows]


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


def class_heatmap(classes: Sequence[ClassEffects], rows: pd.DataFrame, caption: Caption) -> Figure:
    """Mean effect, class × layer, with a number where the class's own 95 % interval leaves 0 out.

    Small classes are pale. Of more than ``MOST_CLASSES`` those with the most images are shown, and the title says so.
    ``rows`` of the summary are what the effects of each class are of.
    """
    classes, selection = largest_classes(classes)
    size = max(2.6 + 0.62 * len(rows), layout.LEAST_WIDTH), max(1.9 + 0.36 * len(classes), layout.LEAST_HEIGHT)
    figure = layout.make_figure(*size)
    axes = figure.add_subplot()
    small = [i for i, group in enumerate(classes) if group.is_small]
    names = [group.words for group in classes]
    image = draw_numbers(axes, [group.effects for group in classes], names, rows["layer"].tolist(), pale=small)
    axes.set_xlabel(style.layer_words(set(rows["window"])))
    layout.add_colour_bar(image, axes, None, f"mean {caption.effect}")
    pale = f"; pale: fewer than {style.FEW_CLUSTERS} clusters" if small else ""
    if series := rows["series"].iloc[0]:
        caption = caption.add_to_title(f": {series}")
    layout.set_headline(figure, caption.title, f"{caption.sample}{selection}; {NUMBERS}{pale}")
    return figure
