"""Effects as colours → matplotlib figures: heads by layer, and what every table of colours shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from vitpatch.plots import layout, style
from vitpatch.plots.style import Caption

COLOURS = "RdBu_r"
NUMBERS = "numbers: 95 % interval without 0"


def draw_heads(axes: Axes, rows: pd.DataFrame, limit: float = 0) -> AxesImage:
    """Mean effect, layer × head, of one token group; numbers as in ``draw_numbers``."""
    heads, layers = list(dict.fromkeys(rows["head"])), sorted(set(rows["layer"]))
    by_layer = rows.set_index("head")
    cells = [by_layer[by_layer["layer"] == layer].loc[heads] for layer in layers]
    image = draw_numbers(axes, cells, [str(layer) for layer in layers], heads, limit)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    return image


def head_heatmap(summary: pd.DataFrame, caption: Caption) -> Figure:
    """``draw_heads`` as a figure, a panel a token group."""
    groups = list(dict.fromkeys(summary["tokens"]))
    panel, height = 1.6 + 0.5 * summary["head"].nunique(), 1.6 + 0.32 * summary["layer"].nunique()
    width = max(panel * len(groups) + 1, layout.LEAST_WIDTH)
    figure = layout.make_figure(width, max(height, layout.LEAST_HEIGHT))
    ratios = {"width_ratios": [*[panel] * len(groups), 0.25], "wspace": 0.1}
    *panels, bar = figure.subplots(1, len(groups) + 1, gridspec_kw=ratios)
    limit = float(summary["effect"].abs().max())
    for axes, tokens in zip(panels, groups, strict=True):
        image = draw_heads(axes, summary[summary["tokens"] == tokens], limit)
        if len(groups) > 1:
            axes.set_xlabel(f"head, at {tokens}")
        if axes is not panels[0]:
            axes.set_ylabel("")
    layout.add_colour_bar(image, panels[0], bar, f"mean {caption.effect}")
    layout.set_headline(figure, caption.title, f"{caption.sample}; {NUMBERS}")
    return figure


def draw_numbers(
    axes: Axes,
    rows: Sequence[pd.DataFrame],
    row_names: Sequence[str],
    columns: Sequence[int],
    limit: float = 0,
    pale: Sequence[int] = (),
) -> AxesImage:
    """Effects as colours, and as numbers where the 95 % interval leaves 0 out; all of them where there is no interval.

    ``rows`` has a table of cells a row, in order of ``columns``; those with the numbers ``pale`` are paler than the
    others. The colours end at ``limit`` or at the largest effect.
    """
    means, low, high = (np.stack([cells[f"effect{end}"] for cells in rows]) for end in ("", "_low", "_high"))
    limit = max(limit, colour_limit(means))
    image = axes.imshow(means, cmap=COLOURS, norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    axes.barh(pale, len(columns), 1, -0.5, color="white", alpha=0.55)
    rotation = 90 if layout.numbers_stand(len(columns)) else 0
    place = {"ha": "center", "va": "center", "rotation": rotation, "in_layout": False}
    for row, column in np.argwhere((low > 0) | (high < 0) | np.isnan(low).all()):
        value = means[row, column]
        ink = "white" if abs(value) > 0.6 * limit and row not in pale else "black"
        axes.text(column, row, _short(value, limit), fontsize=7, color=ink, **place)
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), row_names)
    for row in pale:
        axes.get_yticklabels()[row].set_color(style.GREY)
    return image


def _short(value: float, limit: float) -> str:
    """A number of a table whose largest is about ``limit``: two digits of it, ``.12``, ``-.034``."""
    if abs(value) >= 0.995:
        return f"{value:.1f}"
    text = f"{value:.{3 if limit < 0.1 else 2}f}"
    return text.replace("0.", ".", 1) if float(text) else "0"


def colour_limit(effects: NDArray[np.floating]) -> float:
    """Where the colours end on both sides of 0: the largest effect."""
    return max(float(np.nanmax(np.abs(effects))), style.LEAST_LIMIT)
