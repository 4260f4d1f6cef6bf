"""Tables → matplotlib figures. No disk, no tracker, no global state: each function returns a ``Figure``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from vitpatch.types import PREFIX, SUFFIX, Direction, Donor, Estimate, Metric, counted

# Okabe & Ito's colours, told apart by colour-blind people and by lightness
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
MOST_CLASSES = 40
MOST_LINES = 8
"""More series than these are drawn as dots."""
APART = 0.07
"""How far series are drawn apart, in layers."""
NAMED = 5
"""Of dots, how many are named."""
FEW_CLUSTERS = 5
"""A class of fewer has no interval to speak of."""
LEAST_WIDTH, LEAST_HEIGHT = 5.5, 3.2
"""Inches of a heatmap that a title and a colour bar have room in."""
LEAST_LIMIT = 1e-6
"""Effects below are what rounding leaves: no colour scale ends before."""
LONGEST_NAME = 32
"""Letters of a class's name."""
STYLES = tuple(
    zip((BLUE, "#CC79A7", "#000000", "#56B4E9", "#882255", "#999933", "#7F7F7F", "#332288"), "os^DvPX*", strict=True)
)
"""(colour, marker) of the lines of a figure; green and orange are the clean and the corrupted run's."""
CHARACTERS_AN_INCH = 13.0
"""Of a title."""
LEGEND_ROW = 0.21
"""Inches."""
LABEL_CHARACTERS_AN_INCH = 15
"""Of a colour bar's label."""
LEGEND_CHARACTERS_AN_INCH, LEGEND_HANDLE = 14.5, 8
"""Of a legend's label; characters that a handle takes the room of."""


def headline(figure: Figure, *lines: str) -> None:
    """The figure's title, each line broken where the figure ends."""
    width = int(figure.get_figwidth() * CHARACTERS_AN_INCH)
    parts = [part for line in lines for piece in line.split("\n") for part in textwrap.wrap(piece, width)]
    figure.suptitle("\n".join(parts), fontsize=10)


METRIC_NAMES = {
    Metric.PROB: "probability of the true class",
    Metric.LOG_ODDS: "log odds of the true class (nats)",
    Metric.LOGIT: "logit of the true class",
    Metric.LOGIT_DIFF: "logit of the true class − its rival's",
    Metric.KL: "KL(clean ‖ run) (nats)",
}


PREDICTED = " (predicted)"
"""After the name of a label that the image does not have."""
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
    """What every figure of a run says of it: a title of a line or two, the metric, images and clusters.

    ``interval`` is the method of its intervals; ``cause`` whose effect is measured, where it is no base run's.
    """

    title: str
    metric: Metric
    images: int
    clusters: int
    interval: str = "percentile"
    cause: str = ""

    @property
    def sample(self) -> str:
        """The sample in words."""
        return f"n = {counted(self.images, 'image')} in {counted(self.clusters, 'cluster')}"

    @property
    def intervals(self) -> str:
        """In words, what intervals are."""
        if self.clusters < 2:
            return "one cluster: no intervals"
        return f"95 % {INTERVALS[self.interval]} bootstrap intervals over clusters"

    @property
    def effect(self) -> str:
        """In words, what is measured, in two lines."""
        return f"effect {f'of {self.cause} ' if self.cause else ''}on the\n{METRIC_NAMES[self.metric]}"


def label_words(example: Mapping[str, Any]) -> str:
    """The label of a row of ``examples.parquet`` as a person reads it."""
    return str(example["label_name"]) + PREDICTED * bool(example["label_is_predicted"])


def place_words(layer: int, series: str) -> str:
    """A layer, and its series where there are several."""
    return f"layer {layer}{f', {series}' if series else ''}"


def doubt_words(total: Estimate, donor: Donor, direction: Direction) -> str:
    """What to say of a total effect whose interval holds 0; else nothing."""
    if not total.holds_zero:
        return ""
    if donor is Donor.PAIR:
        return DOES_NOT_MOVE
    return DOES_NOT_DIFFER if donor is Donor.SAME_CLASS and direction is Direction.NOISE else NO_MORE_THAN


def layer_words(windows: set[int]) -> str:
    """What the layer on an axis is of windows of these numbers of layers, ``PREFIX`` or ``SUFFIX``."""
    counted = [window for window in windows if window > 1]
    centre = f"the centre of a window of {counted[0]}" if len(counted) == 1 else "a window's centre"
    words = [centre] * bool(counted) + ["the last of a prefix"] * (PREFIX in windows)
    words += ["the first of a suffix"] * (SUFFIX in windows)
    return f"layer ({', '.join(words)})" if words else "layer"


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 1, more: Sequence[Artist] = ()) -> None:
    """The legend of some axes, each label once, and ``more`` entries, below the figure, which grows by as much.

    In as many columns as there is room for, ``columns`` at most; what is wider than the figure is broken.
    """
    entries = [pair for one in axes for pair in zip(*one.get_legend_handles_labels(), strict=True)]
    by_label = {label: handle for handle, label in entries} | {str(one.get_label()): one for one in more}
    if not by_label:
        return
    room = int(figure.get_figwidth() * LEGEND_CHARACTERS_AN_INCH)
    columns = max(1, min(columns, room // (max(map(len, by_label)) + LEGEND_HANDLE)))
    labels = ["\n".join(textwrap.wrap(label, room - LEGEND_HANDLE)) for label in by_label]
    rows = max(len(by_label), sum(label.count("\n") + 1 for label in labels))
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-rows // columns))
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 8.5}
    figure.legend(by_label.values(), labels, **place)


def colour_bar(figure: Figure, image: AxesImage, axes: Sequence[Axes], words: str) -> None:
    """The colour bar of some axes, its name broken where the figure ends."""
    bar = figure.colorbar(image, ax=list(axes), pad=0.02)
    room = max(int((figure.get_figheight() - 1) * LABEL_CHARACTERS_AN_INCH), 12)
    bar.set_label("\n".join(textwrap.wrap(words, room)), fontsize=8)


def width_for(layers: int) -> float:
    """Inches that a profile of so many layers is wide."""
    return float(np.clip(2.5 + 0.28 * layers, 8, 16))


def number_layers(axes: Axes, layers: Iterable[int], most: int = 24) -> None:
    """Ticks at the layers, of many at every second, third, …; half a layer is left beside the first and the last."""
    layers = sorted(set(layers))
    axes.set_xticks(layers[:: -(-len(layers) // most)])
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)


def whiskers(axes: Axes, x: NDArray, rows: pd.DataFrame, column: str, thick: bool = True, **style: object) -> None:
    """Intervals of a column as bars at ``x`` (rows,), with caps where ``thick``; nothing where there is none."""
    low, high = (rows[f"{column}_{end}"].to_numpy(float) for end in ("low", "high"))
    known = ~np.isnan(low)
    if not known.any():
        return
    axes.vlines(x[known], low[known], high[known], linewidth=1.6 if thick else 0.7, zorder=2, **style)
    for end in (low, high) if thick else ():
        axes.plot(x[known], end[known], "_", markersize=6, zorder=2, **style)


def name_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Numbers points from the largest on; the legend has their names."""
    for i, (x, y, name) in enumerate(points, start=1):
        side = {"ha": "left", "xytext": (5, -3)} if i % 2 else {"ha": "right", "xytext": (-5, -3)}
        axes.annotate(str(i), (x, y), textcoords="offset points", fontsize=8, **side)
        axes.plot([], [], " ", label=f"{i}: {name}")


@dataclass(frozen=True)
class OfClass:
    """Effects on the images of a class: an ``Estimate`` a layer, without an interval of fewer than ``FEW_CLUSTERS``;
    ``total`` is the mean total effect, NaN where there is none."""

    name: str
    images: int
    clusters: int
    effects: Sequence[Estimate]
    total: float


def with_most_images(classes: Sequence[OfClass]) -> tuple[list[OfClass], str]:
    """At most ``MOST_CLASSES`` classes, in their order, and in words for a title which."""
    kept = {id(one) for one in sorted(classes, key=lambda one: -one.images)[:MOST_CLASSES]}
    shown = [one for one in classes if id(one) in kept]
    if len(shown) == len(classes):
        return shown, ""
    return shown, f"; the {MOST_CLASSES} of {len(classes)} classes with the most images"


def class_heatmap(classes: Sequence[OfClass], layers: Sequence[int], layer_axis: str, caption: Caption) -> Figure:
    """Mean effect, class × layer; numbers in bold where the class's own 95 % interval leaves 0 out.

    Of more than ``MOST_CLASSES`` those with the most images are shown, and the title says so. ``layer_axis`` names the
    axis.
    """
    shown, some = with_most_images(classes)
    size = max(2.6 + 0.62 * len(layers), LEAST_WIDTH), max(1.9 + 0.36 * len(shown), LEAST_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    estimates = [one.effects for one in shown]
    image = _heatmap(axes, estimates, max(abs(e.mean) for row in estimates for e in row))
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(shown)), [f"{cut(one.name)} (n = {one.images})" for one in shown])
    axes.set_xlabel(layer_axis)
    colour_bar(figure, image, [axes], f"mean {caption.effect}")
    bold = f"bold: 95 % interval without 0, of classes in {FEW_CLUSTERS} clusters or more"
    headline(figure, caption.title, f"{caption.sample}{some}; {bold}")
    return figure


def cut(name: str, longest: int = LONGEST_NAME) -> str:
    """A class's name, of so many letters at most."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _heatmap(axes: Axes, estimates: Sequence[Sequence[Estimate]], limit: float) -> AxesImage:
    """Means as colours and numbers, rows × columns; ``limit`` is the colours' end on both sides of 0."""
    limit = max(limit, LEAST_LIMIT)
    means = np.array([[e.mean for e in row] for row in estimates])
    image = axes.imshow(means, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    for (row, column), value in np.ndenumerate(means):
        estimate = estimates[row][column]
        style = {"fontweight": "bold"} if estimate.known and not estimate.holds_zero else {"alpha": 0.75}
        ink = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(column, row, _short(value), ha="center", va="center", fontsize=7, color=ink, **style)
    return image


def head_heatmap(summary: pd.DataFrame, caption: Caption) -> Figure:
    """Mean effect, layer × head, a panel a token group; numbers in bold where the 95 % interval leaves 0 out."""
    groups, heads = (list(dict.fromkeys(summary[name])) for name in ("tokens", "head"))
    layers = sorted(set(summary["layer"]))
    width, height = (1.6 + 0.5 * len(heads)) * len(groups) + 1, 1.6 + 0.32 * len(layers)
    figure = Figure(figsize=(max(width, LEAST_WIDTH), max(height, LEAST_HEIGHT)), layout="constrained")
    limit = float(summary["effect"].abs().max())
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, tokens in zip(panels, groups, strict=True):
        rows = summary[summary["tokens"] == tokens].set_index(["layer", "head"])
        cells = [[_estimate(rows.loc[(layer, head)]) for head in heads] for layer in layers]
        image = _heatmap(axes, cells, limit)
        axes.set_xticks(range(len(heads)), [str(head) for head in heads])
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlabel("head" if len(groups) == 1 else f"head, at {tokens}")
    panels[0].set_ylabel("layer")
    colour_bar(figure, image, panels, f"mean {caption.effect}")
    headline(figure, caption.title, f"{caption.sample}; bold: 95 % interval without 0")
    return figure


def _estimate(row: pd.Series) -> Estimate:
    return Estimate(row["effect"], row["effect_se"], row["effect_low"], row["effect_high"])


def handover(summary: pd.DataFrame, caption: Caption) -> Figure:
    """Share of the total effect recovered by the residual stream at CLS and at the image patches, by layer."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for level in (0, 1):
        axes.axhline(level, color="black", linewidth=0.8)
    for (colour, marker), tokens in zip(STYLES, ("cls", "patches"), strict=False):
        rows = summary[summary["tokens"] == tokens].sort_values("layer")
        share = rows["recovered"].to_numpy()
        label = f"{summary['site'].iloc[0]} at {tokens}"
        axes.plot(rows["layer"], share, marker, color=colour, linestyle="-", linewidth=1.8, label=label)
        whiskers(axes, rows["layer"].to_numpy(float), rows, "recovered", color=colour)
    number_layers(axes, summary["layer"])
    axes.set_xlabel(layer_words(set(summary["window"])))
    axes.set_ylabel("share of the total effect recovered")
    axes.legend(loc="best", frameon=False, fontsize=9)
    axes.grid(axis="y", alpha=0.25)
    headline(
        figure, caption.title, "handover: where the information moves to CLS", f"{caption.sample}; {caption.intervals}"
    )
    return figure


def direct_effects(summary: pd.DataFrame, caption: Caption) -> Figure:
    """Effect on the log odds beside its direct share: by layer, or of many series as dots, direct against whole."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    series = list(dict.fromkeys(summary["series"]))
    if len(series) > MOST_LINES // 2:
        _scatter_direct(axes, summary)
    else:
        for i, ((colour, marker), name) in enumerate(zip(STYLES, series, strict=False)):
            rows = summary[summary["series"] == name].sort_values("layer")
            beside = APART * (i - (len(series) - 1) / 2)
            for column, look, word in (("log_odds_effect", "-", "whole"), ("direct_log_odds", ":", "direct")):
                value = rows[column].to_numpy()
                label = f"{name}: {word} effect" if name else f"{word} effect"
                style = {"color": colour, "marker": marker, "linestyle": look, "label": label}
                fill = {} if word == "whole" else {"markerfacecolor": "white"}
                x = rows["layer"].to_numpy() + beside
                axes.plot(x, value, linewidth=1.8, **style, **fill)
                whiskers(axes, x, rows, column, color=colour)
        number_layers(axes, summary["layer"])
        axes.set_xlabel(layer_words(set(summary["window"])))
        axes.set_ylabel("change of the log odds of the true class (nats)")
    if len(series) > MOST_LINES // 2:
        legend_below(figure, [axes])
    else:
        axes.legend(loc="best", frameon=False, fontsize=9)
    axes.grid(axis="y", alpha=0.25)
    what = "direct: carried straight to the readout, last layer norm's scale frozen"
    headline(figure, caption.title, what, f"{caption.sample}; {caption.intervals}")
    return figure


def _scatter_direct(axes: Axes, summary: pd.DataFrame) -> None:
    x, y = summary["direct_log_odds"], summary["log_odds_effect"]
    points = axes.scatter(x, y, c=summary["layer"], cmap="viridis", s=18)
    axes.figure.colorbar(points, ax=axes, label="layer")
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=GREY, linewidth=1, linestyle="--", label="whole = direct")
    largest = summary.loc[y.abs().nlargest(NAMED).index].to_dict("records")
    name_points(
        axes, [(r["direct_log_odds"], r["log_odds_effect"], f"layer {r['layer']}, {r['series']}") for r in largest]
    )
    axes.set_xlabel("direct effect on the log odds of the true class (nats)")
    axes.set_ylabel("whole effect on the log odds\nof the true class (nats)")


def _short(value: float) -> str:
    if abs(value) < 0.005:
        return "0"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.1f}"
