"""Effects as colours: classes or heads by layer, and maps over the image → matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from vitpatch.plots.style import (
    FEW_CLUSTERS,
    LEAST_HEIGHT,
    LEAST_LIMIT,
    LEAST_WIDTH,
    METRIC_NAMES,
    MOST_CLASSES,
    Caption,
    colour_bar,
    cut,
    headline,
)
from vitpatch.types import format_window, token_position


@dataclass(frozen=True)
class ClassEffects:
    """Effects on the images of a class: columns ``effect``, ``effect_low``, ``effect_high``, a row a layer, without an
    interval of fewer clusters than ``FEW_CLUSTERS``; ``total`` is the mean total effect, NaN where there is none."""

    name: str
    images: int
    clusters: int
    effects: pd.DataFrame
    total: float


def with_most_images(classes: Sequence[ClassEffects]) -> tuple[list[ClassEffects], str]:
    """At most ``MOST_CLASSES`` classes, in their order, and in words for a title which."""
    if len(classes) <= MOST_CLASSES:
        return list(classes), ""
    largest = sorted(range(len(classes)), key=lambda i: -classes[i].images)[:MOST_CLASSES]
    words = f"; the {MOST_CLASSES} of {len(classes)} classes with the most images"
    return [classes[i] for i in sorted(largest)], words


def class_heatmap(classes: Sequence[ClassEffects], layers: Sequence[int], layer_axis: str, caption: Caption) -> Figure:
    """Mean effect, class × layer; numbers in bold where the class's own 95 % interval leaves 0 out.

    Of more than ``MOST_CLASSES`` those with the most images are shown, and the title says so. ``layer_axis`` names the
    axis.
    """
    classes, some = with_most_images(classes)
    size = max(2.6 + 0.62 * len(layers), LEAST_WIDTH), max(1.9 + 0.36 * len(classes), LEAST_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = _draw_numbers(axes, [one.effects for one in classes])
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(classes)), [f"{cut(one.name)} (n = {one.images})" for one in classes])
    axes.set_xlabel(layer_axis)
    colour_bar(figure, image, [axes], f"mean {caption.effect}")
    bold = f"bold: 95 % interval without 0, of classes in {FEW_CLUSTERS} clusters or more"
    headline(figure, caption.title, f"{caption.sample}{some}; {bold}")
    return figure


def head_heatmap(summary: pd.DataFrame, caption: Caption) -> Figure:
    """Mean effect, layer × head, a panel a token group; numbers in bold where the 95 % interval leaves 0 out."""
    groups, heads = (list(dict.fromkeys(summary[name])) for name in ("tokens", "head"))
    layers = sorted(set(summary["layer"]))
    width, height = (1.6 + 0.5 * len(heads)) * len(groups) + 1, 1.6 + 0.32 * len(layers)
    figure = Figure(figsize=(max(width, LEAST_WIDTH), max(height, LEAST_HEIGHT)), layout="constrained")
    limit = float(summary["effect"].abs().max())
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, tokens in zip(panels, groups, strict=True):
        rows = summary[summary["tokens"] == tokens].set_index("head")
        image = _draw_numbers(axes, [rows[rows["layer"] == layer].loc[heads] for layer in layers], limit)
        axes.set_xticks(range(len(heads)), [str(head) for head in heads])
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlabel("head" if len(groups) == 1 else f"head, at {tokens}")
    panels[0].set_ylabel("layer")
    colour_bar(figure, image, panels, f"mean {caption.effect}")
    headline(figure, caption.title, f"{caption.sample}; bold: 95 % interval without 0")
    return figure


def _draw_numbers(axes: Axes, rows: Sequence[pd.DataFrame], limit: float = 0) -> AxesImage:
    """Effects as colours and numbers, a table of cells a row; the colours end at ``limit`` or the largest effect."""
    means, low, high = (np.stack([cells[f"effect{end}"] for cells in rows]) for end in ("", "_low", "_high"))
    limit = max(limit, colour_limit(means))
    image = axes.imshow(means, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    for (row, column), value in np.ndenumerate(means):
        without_zero = low[row, column] > 0 or high[row, column] < 0
        style = {"fontweight": "bold"} if without_zero else {"alpha": 0.75}
        ink = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(column, row, _short(value), ha="center", va="center", fontsize=7, color=ink, **style)
    return image


def _short(value: float) -> str:
    if abs(value) < 0.005:
        return "0"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.1f}"


def rows_over_image(summary: pd.DataFrame) -> NDArray[np.intp] | None:
    """Rows of ``each`` or ``grid`` as (layers, rows, columns), of the first window and head; ``None`` without them.

    Where there are several, ``displayed_part`` says so.
    """
    kinds = [name.partition(":")[0] for name in summary["tokens"] if token_position(name)]
    if not kinds:
        return None
    first = summary[
        [name.startswith(f"{kinds[0]}:") and token_position(name) is not None for name in summary["tokens"]]
    ]
    first = first[(first["window"] == first["window"].iloc[0]) & (first["head"] == first["head"].iloc[0])]
    cells = [token_position(name) for name in first["tokens"]]
    layers = {layer: i for i, layer in enumerate(sorted(set(first["layer"])))}
    at = np.empty((len(layers), *(max(c[axis] for c in cells) + 1 for axis in (0, 1))), dtype=np.intp)
    for row, layer, (y, x) in zip(first.index, first["layer"], cells, strict=True):
        at[layers[layer], y, x] = row
    return at


def displayed_part(summary: pd.DataFrame, row: int, heads: bool = True) -> str:
    """What maps show of a run with several windows, heads or kinds of token groups, in words for a title."""
    displayed = {"window": format_window(summary["window"].loc[row])}
    if heads:
        displayed["head"] = summary["head"].loc[row]
    words = [f"{name} {value}" for name, value in displayed.items() if summary[name].nunique() > 1]
    if len({name.partition(":")[0] for name in summary["tokens"]}) > 1:
        words.append(f"tokens {summary['tokens'].loc[row].partition(':')[0]}")
    return f"; shown: {', '.join(words)}" if words else ""


def cls_rows(summary: pd.DataFrame, at: NDArray[np.intp]) -> list[int]:
    """The rows of ``each:cls`` by layer, of the window and head that maps are of; empty where there are none."""
    first = summary.iloc[at.flat[0]]
    same = (summary["window"] == first["window"]) & (summary["head"] == first["head"])
    rows = summary[same & (summary["tokens"] == "each:cls")].sort_values("layer").index
    return rows.tolist() if len(rows) == len(at) else []


def effect_maps(summary: pd.DataFrame, at: NDArray[np.intp], caption: Caption) -> Figure:
    """Mean effects over the image of the rows ``at`` (layers, rows, columns): a panel a layer, one scale."""
    maps, layers = summary["effect"].to_numpy()[at], summary["layer"].iloc[at[:, 0, 0]].tolist()
    cls = [f", CLS {effect:+.3f}" for effect in summary["effect"].iloc[cls_rows(summary, at)]] or [""] * len(layers)
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(2.2 * columns + 1.2, LEAST_WIDTH), 2.3 * rows + 0.9), layout="constrained")
    panels, limit = figure.subplots(rows, columns, squeeze=False).ravel(), colour_limit(maps)
    for axes, layer, values, words in zip(panels, layers, maps, cls, strict=False):
        image = draw_map(axes, values, limit)
        axes.set_title(f"layer {layer}{words}", fontsize=8)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    what = "token" if summary["tokens"].iloc[at.flat[0]].startswith("each") else "block of patches"
    colour_bar(figure, image, panels, f"mean effect of a {what} on the {METRIC_NAMES[caption.metric]}")
    headline(figure, caption.extended(displayed_part(summary, at.flat[0])).title, caption.sample)
    return figure


def colour_limit(maps: NDArray[np.floating]) -> float:
    """The colours' end on both sides of 0."""
    return max(float(np.nanmax(np.abs(maps))), LEAST_LIMIT)


def draw_map(axes: Axes, values: NDArray[np.floating], limit: float) -> AxesImage:
    """A map (rows, columns) as colours, 0 white, without ticks."""
    image = axes.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), interpolation="nearest")
    axes.set_xticks([]), axes.set_yticks([])
    return image
