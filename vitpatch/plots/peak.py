"""How far a run's answer goes, as matplotlib figures: how stable its peak is, and how strong its corruption was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vitpatch.formatting import format_count, format_interval
from vitpatch.plots import layout, style
from vitpatch.plots.style import Caption
from vitpatch.stats.result import series_names
from vitpatch.stats.summary import GroupPeak

MOST_BARS, NAMED_BARS = 48, 16
"""Of more places that have a number, or a name, the ``NAMED_BARS`` most frequent are drawn."""
LABELLED_SHARE = 0.005  # bars up to it are without a number
IN_SET = 0.15  # how dark the ground of the peak set is
DAMAGE = {"prob_drop": "mean drop of the probability of the true class", "accuracy_drop": "drop of accuracy"}


def peak_stability(groups: Sequence[GroupPeak], summary: pd.DataFrame, caption: Caption) -> Figure:
    """For each group of rows the share of resamples in which each place is its peak, the peak set in colour.

    Places are layers, or layers and series where a group has several rows a layer; of many the most frequent are drawn.
    """
    by_layer = all(summary["layer"].iloc[group.rows].is_unique for group in groups)
    places = [_places(summary.iloc[group.rows], by_layer) for group in groups]
    columns = layout.panels_a_row(min(len(groups), 3), 2.0)
    rows = ceil(len(groups) / columns)
    bars = max(len(_most_frequent(group, by_layer)) for group in groups)
    width = float(np.clip(1.2 + 0.3 * bars, 7 if columns == 1 else 4.0, 14 if columns == 1 else 5.6))
    figure = layout.make_figure(max(width * columns, 7), 3.5 * rows + 0.6)
    gaps = {"wspace": 0.06, "hspace": 0.6 if by_layer else 1.1}
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True, gridspec_kw=gaps).ravel()
    for axes, group, names in zip(panels, groups, places, strict=False):
        drawn = _most_frequent(group, by_layer)
        _draw_bars(axes, group, drawn, [names[i] for i in drawn])
        axes.set_xlabel(style.layer_words(set(summary["window"].iloc[group.rows])) if by_layer else "")
        if len(drawn) < len(names):
            axes.set_xlabel(f"the {len(drawn)} of {len(names)} most frequent")
        size = f"peak effect {summary['effect'].iloc[group.best]:+.3f}, from split halves {group.size:+.3f}"
        number = f"peak set: {len(group.members)} of {len(names)}"
        axes.set_title("\n".join(filter(None, (group.name, size, number))), fontsize=9)
    for axes in panels[len(groups) :]:
        axes.remove()
    for axes in panels[::columns]:
        axes.set_ylabel("share of resamples\nin which it is the peak")
    below = [group.stability[~np.isin(group.rows, group.members)] for group in groups]
    key = [
        Patch(facecolor=style.BLUE, alpha=IN_SET, label="may be the peak (95 % peak set)"),
        *[Patch(facecolor=style.GREY, label="shown to be below the peak")] * any(shares.any() for shares in below),
        Line2D([], [], color="black", marker="*", linestyle="", label="the peak of all images"),
    ]
    layout.add_legend_below(figure, [], 3, key)
    what = "stability of the peak over resamples of clusters; split halves: chosen on one half, measured on the other"
    layout.set_headline(figure, caption.title, what, caption.sample)
    return figure


def _places(rows: pd.DataFrame, by_layer: bool) -> list[str]:
    """The places of a group's rows, in words."""
    if by_layer:
        return [str(layer) for layer in rows["layer"]]
    return [style.place_words(layer, name) for layer, name in zip(rows["layer"], series_names(rows), strict=True)]


def _most_frequent(group: GroupPeak, by_layer: bool) -> np.ndarray:
    """The places that are drawn, in order: positions in ``group.rows``."""
    if len(group.rows) <= (MOST_BARS if by_layer else NAMED_BARS):
        return np.arange(len(group.rows))
    is_member = np.isin(group.rows, group.members)
    return np.sort(np.lexsort((~is_member, -group.stability))[:NAMED_BARS])


def _draw_bars(axes: Axes, group: GroupPeak, drawn: np.ndarray, names: Sequence[str]) -> None:
    """Bars of the places ``drawn``, named ``names``."""
    x, shares, is_member = np.arange(len(drawn)), group.stability[drawn], np.isin(group.rows[drawn], group.members)
    for i in x[is_member]:
        axes.axvspan(i - 0.5, i + 0.5, color=style.BLUE, alpha=IN_SET, linewidth=0)
    axes.bar(x, shares, color=[style.BLUE if member else style.GREY for member in is_member], width=0.7)
    for i, share in enumerate(shares):
        if share > LABELLED_SHARE:
            place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{100 * share:.0f} %", (x[i], share), fontsize=7 if len(x) <= 24 else 5.5, **place)
    best = x[group.rows[drawn] == group.best]
    axes.plot(best, np.full(len(best), 1.12), "*", color="black", markersize=8)
    every, is_long = 1 if len(x) <= 24 else 2, max(map(len, names)) > 2
    axes.set_xticks(x[::every], names[::every], rotation=90 if is_long else 0, fontsize=8)
    axes.set_xlim(-0.6, len(x) - 0.4)
    axes.set_ylim(0, 1.2)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_yticks(np.linspace(0, 1, 5))
    axes.grid(axis="y", alpha=0.25)


def draw_strength(axes: Axes, calibration: Mapping[str, Any]) -> None:
    """Damage on training images by strength, with intervals; the drop that was wanted and the strength chosen.

    ``calibration`` is the manifest's: ``curve`` with ``strength``, ``drop``, ``low``, ``high`` a point.
    """
    curve = pd.DataFrame(calibration["curve"]).astype(float).rename(columns={"low": "drop_low", "high": "drop_high"})
    curve, key = curve.sort_values("strength"), f"corruption.{calibration['key']}"
    x, drop, strength = curve["strength"], calibration["drop"]["drop"], calibration["strength"]
    axes.axhline(0, color="black", linewidth=0.8)
    known = ", 95 % interval" if curve["drop_low"].notna().any() else ""
    style.draw_whiskers(axes, x, curve, "drop", color=style.BLUE)
    axes.plot(x, curve["drop"], "o-", color=style.BLUE, markersize=5, linewidth=1.6, label=f"measured{known}")
    wanted = calibration["wanted"]
    axes.axhline(wanted, color=style.ORANGE, linestyle="--", linewidth=1.5, label=f"wanted: {wanted:.3g}")
    axes.axvline(strength, color=style.GREEN, linestyle=":", linewidth=1.8, label=f"chosen: {key} = {strength:.4g}")
    ends = calibration["drop"]
    reached = f"reached: {format_interval(drop, ends['low'], ends['high'], '.3f')}"
    axes.plot(strength, drop, "*", color=style.GREEN, markersize=15, markeredgecolor="black", zorder=4, label=reached)
    axes.set_xlabel(key)
    axes.set_ylabel(DAMAGE.get(calibration["damage"], calibration["damage"]))
    axes.xaxis.set_major_locator(MaxNLocator(9))
    axes.grid(alpha=0.25)


def strength_curve(calibration: Mapping[str, Any], title: str) -> Figure:
    """``draw_strength`` as a figure."""
    figure = layout.make_figure(7.5, 4.6)
    axes = figure.add_subplot()
    draw_strength(axes, calibration)
    layout.add_legend_below(figure, [axes], 2)
    shape = "rises all along the grid" if calibration["monotone"] else "does not rise all along the grid"
    sample = (
        f"{format_count(calibration['images'], 'training image')} in {format_count(calibration['clusters'], 'cluster')}"
    )
    layout.set_headline(
        figure, title, f"calibrate={calibration['asked']}: damage {shape}; n = {sample}; intervals over clusters"
    )
    return figure
