"""Effects over the image → matplotlib figures: a map a layer, of means; and of one image over its picture."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from vitpatch.plots import layout, style
from vitpatch.plots.heatmaps import COLOURS, colour_limit
from vitpatch.plots.style import Caption
from vitpatch.types import format_window, token_position

MAPS_A_ROW, LEAST_MAP = 4, 1.2  # inches of a map for print, with its words
MAP, BESIDE_MAPS = 2.2, 1.2  # inches of a map, and beside all maps for the colour bar
GAP_ABOVE, GAP_BESIDE = 0.2, 0.08  # of a map, in its widths
MARK = {"color": "black", "markersize": 3, "markeredgecolor": "white", "markeredgewidth": 0.5}
PICTURE_GREY = 0.45  # how dark the picture below a map is


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


def draw_maps(axes: Axes, summary: pd.DataFrame, at: NDArray[np.intp]) -> AxesImage:
    """Mean effects over the image of the rows ``at`` (layers, rows, columns), a map a layer, on one scale.

    A dot marks where the 95 % interval leaves 0 out.
    """
    means, low, high = (summary[f"effect{end}"].to_numpy()[at] for end in ("", "_low", "_high"))
    layers = summary["layer"].iloc[at[:, 0, 0]].tolist()
    cls = [f", CLS {effect:+.3f}" for effect in summary["effect"].iloc[cls_rows(summary, at)]] or [""] * len(layers)
    norm, (_, rows, columns) = TwoSlopeNorm(0, *(sign * colour_limit(means) for sign in (-1, 1))), at.shape
    height, marks, a_row = rows / columns, [], _maps_a_row(len(layers))  # height of a map, in its widths
    for i, (layer, words) in enumerate(zip(layers, cls, strict=True)):
        x, y = i % a_row * (1 + GAP_BESIDE), i // a_row * (height + GAP_ABOVE)
        image = axes.imshow(
            means[i], cmap=COLOURS, norm=norm, extent=(x, x + 1, y + height, y), interpolation="nearest"
        )
        axes.text(x, y - 0.02, f"layer {layer}{words}", fontsize=8, va="bottom")
        axes.plot([x, x + 1, x + 1, x, x], [y, y, y + height, y + height, y], color="black", linewidth=0.8)
        marks.append([(x, y)] + (np.argwhere((low[i] > 0) | (high[i] < 0))[:, ::-1] + 0.5) / columns)
    axes.plot(*np.concatenate(marks).T, "o", label="95 % interval without 0", **MARK)
    down = -(-len(layers) // a_row)
    axes.set_xlim(-0.01, a_row * (1 + GAP_BESIDE) - GAP_BESIDE + 0.01)
    axes.set_ylim(down * (height + GAP_ABOVE) - GAP_ABOVE + 0.01, -GAP_ABOVE)
    axes.set_axis_off()
    return image


def _maps_a_row(layers: int) -> int:
    return layout.panels_a_row(min(MAPS_A_ROW, layers), LEAST_MAP)


def effect_maps(summary: pd.DataFrame, at: NDArray[np.intp], caption: Caption) -> Figure:
    """``draw_maps`` as a figure."""
    columns = _maps_a_row(len(at))
    rows = -(-len(at) // columns)
    figure = layout.make_figure(max(MAP * columns + BESIDE_MAPS, layout.LEAST_WIDTH), layout.LEAST_HEIGHT)
    width = min((figure.get_figwidth() - BESIDE_MAPS) / columns, MAP)
    height = width * rows * (at.shape[1] / at.shape[2] + GAP_ABOVE) + 0.9
    figure.set_figheight(max(height, figure.get_figheight()))
    axes = figure.add_subplot()
    image = draw_maps(axes, summary, at)
    what = "token" if summary["tokens"].iloc[at.flat[0]].startswith("each") else "block of patches"
    label = f"mean effect of a {what} on the {style.METRIC_NAMES[caption.metric]}"
    layout.add_colour_bar(image, axes, None, label)
    title = caption.add_to_title(displayed_part(summary, at.flat[0])).title
    layout.set_headline(figure, title, f"{caption.sample}; dot: 95 % interval without 0")
    return figure


def lay_over(picture: NDArray[np.uint8], effects: NDArray[np.floating], limit: float) -> NDArray[np.uint8]:
    """Effects (rows, columns) in colour over a picture (height, width, 3) in pale grey, the less opaque the smaller."""
    grey = 255 - PICTURE_GREY * (255 - picture.mean(2, keepdims=True))
    height, width = picture.shape[:2]
    row, column = (np.arange(size) * cells // size for size, cells in zip((height, width), effects.shape, strict=True))
    values = effects[row[:, None], column] / limit  # (height, width)
    colours = matplotlib.colormaps[COLOURS]((values + 1) / 2)[..., :3] * 255
    opacity = np.abs(values)[..., None] ** 0.7
    return (opacity * colours + (1 - opacity) * grey).round().astype(np.uint8)
