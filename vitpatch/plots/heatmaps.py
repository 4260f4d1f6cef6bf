"""Effects as colours: heads by layer, and maps over the image → matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from vitpatch.plots import style
from vitpatch.plots.style import Caption
from vitpatch.types import format_window, token_position


def head_heatmap(summary: pd.DataFrame, caption: Caption) -> Figure:
    """Mean effect, layer × head, a panel a token group; numbers in bold where the 95 % interval leaves 0 out."""
    groups, heads = (list(dict.fromkeys(summary[name])) for name in ("tokens", "head"))
    layers = sorted(set(summary["layer"]))
    width, height = (1.6 + 0.5 * len(heads)) * len(groups) + 1, 1.6 + 0.32 * len(layers)
    figure = Figure(figsize=(max(width, style.LEAST_WIDTH), max(height, style.LEAST_HEIGHT)), layout="constrained")
    limit = float(summary["effect"].abs().max())
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, tokens in zip(panels, groups, strict=True):
        rows = summary[summary["tokens"] == tokens].set_index("head")
        cells = [rows[rows["layer"] == layer].loc[heads] for layer in layers]
        image = draw_numbers(axes, cells, [str(layer) for layer in layers], heads, limit)
        axes.set_xlabel("head" if len(groups) == 1 else f"head, at {tokens}")
    panels[0].set_ylabel("layer")
    style.add_colour_bar(figure, image, panels, f"mean {caption.effect}")
    style.set_headline(figure, caption.title, f"{caption.sample}; bold: 95 % interval without 0")
    return figure


def draw_numbers(
    axes: Axes, rows: Sequence[pd.DataFrame], row_names: Sequence[str], columns: Sequence[int], limit: float = 0
) -> AxesImage:
    """Effects as colours and numbers, bold where the 95 % interval leaves 0 out.

    ``rows`` has a table of cells a row, in order of ``columns``; the colours end at ``limit`` or at the largest effect.
    """
    means, low, high = (np.stack([cells[f"effect{end}"] for cells in rows]) for end in ("", "_low", "_high"))
    limit = max(limit, colour_limit(means))
    image = axes.imshow(means, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    for (row, column), value in np.ndenumerate(means):
        without_zero = low[row, column] > 0 or high[row, column] < 0
        emphasis = {"fontweight": "bold"} if without_zero else {"alpha": 0.75}
        ink = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(column, row, _short(value), ha="center", va="center", fontsize=7, color=ink, **emphasis)
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), row_names)
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
    figure = Figure(figsize=(max(2.2 * columns + 1.2, style.LEAST_WIDTH), 2.3 * rows + 0.9), layout="constrained")
    panels, limit = figure.subplots(rows, columns, squeeze=False).ravel(), colour_limit(maps)
    for axes, layer, values, words in zip(panels, layers, maps, cls, strict=False):
        image = draw_map(axes, values, limit)
        axes.set_title(f"layer {layer}{words}", fontsize=8)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    what = "token" if summary["tokens"].iloc[at.flat[0]].startswith("each") else "block of patches"
    style.add_colour_bar(figure, image, panels, f"mean effect of a {what} on the {style.METRIC_NAMES[caption.metric]}")
    style.set_headline(figure, caption.add_to_title(displayed_part(summary, at.flat[0])).title, caption.sample)
    return figure


def colour_limit(maps: NDArray[np.floating]) -> float:
    """Where the colours end on both sides of 0: the largest effect."""
    return max(float(np.nanmax(np.abs(maps))), style.LEAST_LIMIT)


def draw_map(axes: Axes, values: NDArray[np.floating], limit: float) -> AxesImage:
    """A map (rows, columns) as colours, 0 white, without ticks."""
    image = axes.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), interpolation="nearest")
    axes.set_xticks([]), axes.set_yticks([])
    return image
