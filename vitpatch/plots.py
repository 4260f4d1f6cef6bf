"""Tables → matplotlib figures. No disk, no tracker, no global state: each function returns a ``Figure``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vitpatch.spec import BaseRun, Estimate, Metric

# Okabe & Ito's colours, told apart by colour-blind people and by lightness
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
MOST_CLASSES = 40

METRIC_NAMES = {
    Metric.PROB: "probability of the true class",
    Metric.LOG_ODDS: "log odds of the true class (nats)",
    Metric.LOGIT: "logit of the true class",
    Metric.LOGIT_DIFF: "logit of the true class − its rival's",
    Metric.KL: "KL(clean ‖ run) (nats)",
}


@dataclass(frozen=True)
class Caption:
    """What every figure of a run says of it: a title of a line or two, the metric, and the number of images."""

    title: str
    metric: Metric
    images: int
    clusters: int

    @property
    def sample(self) -> str:
        """The sample in words, with the clusters where they are fewer than the images."""
        clusters = f" in {self.clusters} clusters" if self.clusters < self.images else ""
        return f"n = {self.images} images{clusters}"


@dataclass(frozen=True)
class Trace:
    """One image for an example page: pictures (height, width, 3) uint8, and its metric by patch and base run."""

    name: str
    pictures: dict[BaseRun, NDArray[np.uint8]]
    predictions: dict[BaseRun, str]
    base: dict[BaseRun, float]
    patched: NDArray[np.floating]


def layer_profile(summary: pd.DataFrame, total: Estimate, caption: Caption) -> Figure:
    """Mean effect by layer with its 95 % interval, the total effect as a line; clipped windows have hollow markers."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    layers, effect = summary["layer"].to_numpy(), summary["effect"].to_numpy()
    clipped = (summary["n_layers"] < summary["window"]).to_numpy()
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(total.mean, color=ORANGE, linewidth=1.8, linestyle="--", label="total effect, 95 % interval")
    if total.known:
        axes.axhspan(total.low, total.high, color=ORANGE, alpha=0.15, linewidth=0)
    error = np.abs(np.stack([effect - summary["effect_low"], summary["effect_high"] - effect]))
    axes.errorbar(layers, effect, yerr=error, color=BLUE, linewidth=1.8, capsize=3, zorder=2)
    axes.plot(layers[~clipped], effect[~clipped], "o", color=BLUE, zorder=3, label="mean effect, 95 % interval")
    if clipped.any():
        label = "window clipped at the network's end"
        axes.plot(layers[clipped], effect[clipped], "o", color=BLUE, markerfacecolor="white", zorder=3, label=label)
    window = int(summary["window"].iloc[0])
    axes.set_xlabel("layer" if window == 1 else f"layer at the centre of the window of {window}")
    axes.set_ylabel(f"effect on the\n{METRIC_NAMES[caption.metric]}")
    axes.set_xticks(layers)
    _share_of_total(axes, total)
    axes.legend(loc="best", frameon=False, fontsize=9)
    axes.grid(axis="y", alpha=0.25)
    axes.set_title(f"{caption.title}\n{caption.sample}", fontsize=10)
    return figure


def _share_of_total(axes: Axes, total: Estimate) -> None:
    """A second axis in shares of the total effect, where the total effect is a denominator."""
    if total.holds_zero or not total.known:
        return
    share = axes.secondary_yaxis("right", functions=(lambda y: y / total.mean, lambda s: s * total.mean))
    share.set_ylabel("share of the total effect recovered")
    share.yaxis.set_major_locator(MaxNLocator(6))


def class_heatmap(rows: Sequence[tuple[str, int, list[Estimate]]], layers: Sequence[int], caption: Caption) -> Figure:
    """Mean effect, class × layer; numbers in bold where the class's own 95 % interval leaves 0 out.

    ``rows`` are (class name, images, an ``Estimate`` a layer); of more than ``MOST_CLASSES`` those with the most
    images are shown, and the title says so.
    """
    shown = sorted(sorted(rows, key=lambda row: -row[1])[:MOST_CLASSES], key=rows.index)
    means = np.array([[e.mean for e in estimates] for _, _, estimates in shown])
    limit = max(float(np.abs(means).max()), 1e-12)
    figure = Figure(figsize=(2.6 + 0.62 * len(layers), 1.9 + 0.36 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(means, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    for (row, column), value in np.ndenumerate(means):
        estimate = shown[row][2][column]
        style = {"fontweight": "bold"} if estimate.known and not estimate.holds_zero else {"alpha": 0.75}
        ink = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(column, row, _short(value), ha="center", va="center", fontsize=7, color=ink, **style)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(shown)), [f"{name} (n = {images})" for name, images, _ in shown])
    axes.set_xlabel("layer (the window's centre)")
    figure.colorbar(image, ax=axes, label=f"mean effect on the\n{METRIC_NAMES[caption.metric]}", pad=0.02)
    some = f"; the {MOST_CLASSES} of {len(rows)} classes with the most images" if len(shown) < len(rows) else ""
    axes.set_title(f"{caption.title}\n{caption.sample}{some}; bold: 95 % interval without 0", fontsize=10)
    return figure


def _short(value: float) -> str:
    if abs(value) < 0.005:
        return "0"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.1f}"


def example_page(traces: Sequence[Trace], layers: Sequence[int], chosen: str, caption: Caption) -> Figure:
    """For each image: clean, corrupted, and the metric as each layer's window is patched, with both base runs as lines.

    ``chosen`` says in words how the images were picked.
    """
    figure = Figure(figsize=(9.5, 1.1 + 1.75 * len(traces)), layout="constrained")
    grid = figure.subplots(len(traces), 3, width_ratios=(1, 1, 3.4), squeeze=False)
    for row, trace in zip(grid, traces, strict=True):
        for axes, run in zip(row[:2], BaseRun, strict=True):
            axes.imshow(trace.pictures[run], interpolation="nearest")
            axes.set_xticks([]), axes.set_yticks([])
            axes.set_xlabel(f"{run}: “{trace.predictions[run]}”", fontsize=8)
        row[0].set_title("\n".join(textwrap.wrap(trace.name, 26)[:2]), fontsize=8, loc="left")
        _draw_trace(row[2], trace, layers, caption.metric)
    grid[-1][2].set_xlabel("layer (the window's centre)")
    handles, labels = grid[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{caption.title}\n{METRIC_NAMES[caption.metric]}; {chosen}, of {caption.sample}", fontsize=10)
    return figure


def _draw_trace(axes: Axes, trace: Trace, layers: Sequence[int], metric: Metric) -> None:
    axes.axhline(trace.base[BaseRun.CLEAN], color=GREEN, linewidth=1.5, linestyle="-", label="clean run")
    axes.axhline(trace.base[BaseRun.CORRUPT], color=ORANGE, linewidth=1.5, linestyle="--", label="corrupted run")
    axes.plot(layers, trace.patched, "o-", color=BLUE, markersize=4, linewidth=1.2, label="patched run")
    if metric is Metric.PROB:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(layers)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.set_ylabel(str(metric), fontsize=8)
