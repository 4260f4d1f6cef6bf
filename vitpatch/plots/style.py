"""What figures share: colours and marks, the words on them, and series by layer drawn on axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from vitpatch.formatting import format_count
from vitpatch.types import ALL_HEADS, PREFIX, SUFFIX, Direction, Donor, Estimate, Metric, Site, token_position

# Okabe & Ito's colours, told apart by colour-blind people and by lightness
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
MOST_CLASSES = 40
MOST_LINES = 8  # more series than these are drawn as dots
APART = 0.07  # how far series are drawn apart, in layers
LARGEST_STEP = 1.5  # between layers that a line joins: neighbours, a little apart
NAMED = 5  # of dots, how many are named
FEW_CLUSTERS = 5  # a class of fewer has no interval to speak of
LEAST_LIMIT = 1e-6  # effects below are what rounding leaves: no colour scale ends before
LONGEST_NAME = 32  # letters of a class's name
COLOURS = (BLUE, "#CC79A7", "#000000", "#56B4E9", "#882255", "#999933", "#7F7F7F", "#332288")
STYLES = tuple({"color": colour, "marker": marker} for colour, marker in zip(COLOURS, "os^DvPX*", strict=True))
"""Of the lines of a figure; green and orange are the clean and the corrupted run's."""


METRIC_NAMES = {
    Metric.PROB: "probability of the true class",
    Metric.LOG_ODDS: "log odds of the true class (nats)",
    Metric.LOGIT: "logit of the true class",
    Metric.LOGIT_DIFF: "logit of the true class − its rival's",
    Metric.KL: "KL(clean ‖ run) (nats)",
}

SITE_WORDS = {
    Site.RESID_PRE: "residual states before a layer",
    Site.ATTN_OUT: "attention outputs",
    Site.RESID_MID: "residual states between attention and MLP",
    Site.MLP_OUT: "MLP outputs",
    Site.RESID_POST: "residual states after a layer",
    Site.Z: "head outputs",
    Site.Q: "queries",
    Site.K: "keys",
    Site.V: "values",
    Site.PATTERN: "attention patterns",
}
TOKEN_WORDS = {
    "all": "",
    "cls": " at CLS",
    "registers": " at the registers",
    "patches": " at the image patches",
    "object": " at the object's patches",
    "background": " at the background's patches",
    "random_object": " at as many random patches",
    "each": " at single tokens",
    "grid": " at single blocks of patches",
}

PREDICTED = " (predicted)"  # after the name of a label that the image does not have
DOES_NOT_MOVE = "the total effect's interval holds 0: this corruption is not shown to move the model"
DOES_NOT_DIFFER = (
    "the total effect's interval holds 0: on average another image says as much for a label as the image itself, as a "
    "derangement within a class must"
)
NO_MORE_THAN = (
    "the total effect's interval holds 0: another image's clean run is not shown to say more or less for a label than "
    "the run that it is put into"
)
INTERVALS = {"percentile": "percentile", "bca": "BCa"}


@dataclass(frozen=True)
class Caption:
    """The words on every figure of a run: a title of a line or two, the metric, how many images and clusters.

    ``interval`` is the method of the intervals; ``cause`` what has the effect, where it is not a base run.
    """

    title: str
    metric: Metric
    images: int
    clusters: int
    interval: str = "percentile"
    cause: str = ""

    def add_to_title(self, words: str) -> Caption:
        """The caption with words added to the first line of its title."""
        first, newline, rest = self.title.partition("\n")
        return replace(self, title=f"{first}{words}{newline}{rest}")

    @property
    def sample(self) -> str:
        """The sample in words."""
        return f"n = {format_count(self.images, 'image')} in {format_count(self.clusters, 'cluster')}"

    @property
    def intervals(self) -> str:
        """In words, what the intervals are."""
        if self.clusters < 2:
            return "one cluster: no intervals"
        return f"95 % {INTERVALS[self.interval]} bootstrap intervals over clusters"

    @property
    def effect(self) -> str:
        """In words, what is measured, in two lines, for a y axis."""
        return f"effect {f'of {self.cause} ' if self.cause else ''}on the\n{METRIC_NAMES[self.metric]}"


def label_words(example: Mapping[str, Any]) -> str:
    """The label of a row of ``examples.parquet`` as a person reads it."""
    return str(example["label_name"]) + PREDICTED * bool(example["label_is_predicted"])


def place_words(layer: int, series: str) -> str:
    """A layer, and its series where there are several."""
    return f"layer {layer}{f', {series}' if series else ''}"


def token_kind(tokens: str) -> str:
    """The kind of a token group: ``each`` of ``each:0x3``."""
    return tokens.partition(":")[0]


def describe_place(row: Mapping[str, Any]) -> str:
    """A place of a summary in words: its layer, head and token."""
    words, tokens = f"layer {row['layer']}", row["tokens"]
    if row["head"] != ALL_HEADS:
        words = f"head {row['head']} of {words}"
    if (position := token_position(tokens)) is not None:
        kind = "token" if token_kind(tokens) == "each" else "block"
        return f"{words}, {kind} in row {position[0]}, column {position[1]}"
    name = tokens.partition(":")[2]
    return words + (f" at {'CLS' if name == 'cls' else name}" if name else "")


def doubt_words(total: Estimate, donor: Donor, direction: Direction) -> str:
    """What a total effect means whose interval holds 0; "" for others."""
    if not total.holds_zero:
        return ""
    if donor is Donor.PAIR:
        return DOES_NOT_MOVE
    return DOES_NOT_DIFFER if donor is Donor.SAME_CLASS and direction is Direction.NOISE else NO_MORE_THAN


def layer_words(windows: set[int]) -> str:
    """Names the layer axis for windows of these sizes (or ``PREFIX``, ``SUFFIX``): which layer a window stands at."""
    counted = [window for window in windows if window > 1]
    centre = f"the centre of a window of {counted[0]}" if len(counted) == 1 else "a window's centre"
    words = [centre] * bool(counted) + ["the last of a prefix"] * (PREFIX in windows)
    words += ["the first of a suffix"] * (SUFFIX in windows)
    return f"layer ({', '.join(words)})" if words else "layer"


def number_layers(axes: Axes, layers: Iterable[int], most: int = 24) -> None:
    """Sets ticks at the layers (of many at every second, third, …), limits half a layer beyond the ends."""
    layers = sorted(set(layers))
    axes.set_xticks(layers[:: -(-len(layers) // most)])
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)


def draw_whiskers(axes: Axes, x: NDArray, rows: pd.DataFrame, column: str, thick: bool = True, **style: object) -> None:
    """Draws intervals of a column as bars at ``x`` (rows,), with caps where ``thick``.

    Nothing where there is none, or where it is unbounded.
    """
    if f"{column}_low" not in rows:
        return
    low, high = (rows[f"{column}_{end}"].to_numpy(float) for end in ("low", "high"))
    known = np.isfinite(low) & np.isfinite(high)
    if not known.any():
        return
    axes.vlines(x[known], low[known], high[known], linewidth=1.6 if thick else 0.7, zorder=2, **style)
    for end in (low, high) if thick else ():
        axes.plot(x[known], end[known], "_", markersize=6, zorder=2, **style)


def draw_series(
    axes: Axes,
    x: Iterable[float],
    rows: pd.DataFrame,
    column: str,
    *,
    hollow: NDArray[np.bool_] | None = None,
    bar_alpha: float | None = None,
    **style: Any,
) -> None:
    """Draws a series: a column's means (rows,) at ``x`` as markers, and their intervals, where it has any, as whiskers.

    A line joins neighbouring layers, where rows have an order. ``hollow``: which markers, (rows,) bool, have no
    filling; ``style``: ``color`` and what else ``Axes.plot`` takes.
    """
    x, style = np.asarray(x, dtype=float), {"marker": "o", "linestyle": "-", "linewidth": 1.8, "zorder": 3} | style
    if not has_order(rows):
        style["linestyle"] = ""
    draw_whiskers(axes, x, rows, column, color=style["color"], alpha=bar_alpha)
    axes.plot(*break_line(x, rows[column]), **style)
    if hollow is not None:
        blank = {"linestyle": "", "label": None, "markerfacecolor": "white", "zorder": style["zorder"] + 0.1}
        axes.plot(x[hollow], rows[column][hollow], **style | blank)


def break_line(x: Iterable[float], y: Iterable[float]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Points by layer, in order, as a line that does not join layers between which others were not asked for."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    gaps = np.flatnonzero(np.diff(x) > LARGEST_STEP) + 1
    return np.insert(x, gaps, np.nan), np.insert(y, gaps, np.nan)


def has_order(rows: pd.DataFrame) -> bool:
    """Whether rows that differ in layer alone are of the same thing: heads, and places over the image, are not."""
    is_head = "head" in rows and (rows["head"] >= 0).any()
    return not is_head and not ("tokens" in rows and any(map(token_position, rows["tokens"].unique())))


def each_series(
    summary: pd.DataFrame, column: str = "series"
) -> Iterator[tuple[str, pd.DataFrame, dict[str, str], NDArray[np.floating]]]:
    """The first ``MOST_LINES`` values of a column: each with its rows in order of layer, the style of its line, its x.

    x (rows,) are the layers, moved aside so that the intervals of several series do not hide each other.
    """
    names = list(dict.fromkeys(summary[column]))
    for i, (name, look) in enumerate(zip(names, STYLES, strict=False)):
        rows = summary[summary[column] == name].sort_values("layer")
        yield name, rows, look, rows["layer"].to_numpy() + APART * (i - (len(names) - 1) / 2)


def name_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Writes a number at each point, of points above each other on both sides; the legend has their names."""
    at_x: Counter[float] = Counter()
    for i, (x, y, name) in enumerate(points, start=1):
        at_x[x] += 1
        away = 5 + 8 * ((at_x[x] - 1) // 2)  # points; beside each other where there are more
        side = {"ha": "left", "xytext": (away, -3)} if at_x[x] % 2 else {"ha": "right", "xytext": (-away, -3)}
        axes.annotate(str(i), (x, y), textcoords="offset points", fontsize=8, **side)
        axes.plot([], [], " ", label=f"{i}: {name}")


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """A class's name, cut to ``longest`` letters."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
