"""How far a run's answer goes, as matplotlib figures: how stable its peak is, and how strong its corruption was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vitpatch.plots.style import BLUE, GREEN, GREY, ORANGE, Caption, headline, legend_below, whiskers
from vitpatch.types import counted

MOST_BARS, NAMED_BARS = 48, 16
"""Of more places that have a number, or a name, the ``NAMED_BARS`` most frequent are drawn."""
SHOWN_SHARE = 0.005
"""Bars below are without a number."""
IN_SET = 0.15
"""How dark the ground of the peak set is."""
DAMAGE = {"prob_drop": "mean drop of the probability of the true class", "accuracy_drop": "drop of accuracy"}


@dataclass(frozen=True)
class Stability:
    """How often each place of a group is its peak in resamples.

    ``places`` (places,) in words, ``axis`` what they are, ``shares`` (places,) that add up to 1, ``members`` (places,)
    whether a place may be the peak, ``best`` the peak itself; ``size`` its mean effect, ``halves`` the same from split
    halves.
    """

    group: str
    axis: str
    places: Sequence[str]
    shares: np.ndarray
    members: np.ndarray
    best: int
    size: float
    halves: float


def peak_stability(groups: Sequence[Stability], caption: Caption) -> Figure:
    """For each group the share of resamples in which each place is the peak, the peak set in colour.

    Of many places the most frequent are drawn.
    """
    columns = min(len(groups), 3)
    rows = ceil(len(groups) / columns)
    bars = max(len(_drawn(group)) for group in groups)
    width = float(np.clip(1.2 + 0.3 * bars, 7 if columns == 1 else 4.0, 14 if columns == 1 else 5.6))
    figure = Figure(figsize=(max(width * columns, 7), 3.2 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, group in zip(panels, groups, strict=False):
        _draw_bars(axes, group)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("share of resamples\nin which it is the peak")
    legend_below(figure, [], 3, _key())
    what = "stability of the peak over resamples of clusters; split halves: chosen on one half, measured on the other"
    headline(figure, caption.title, what, caption.sample)
    return figure


def _key() -> list[Artist]:
    """What grounds, bars and stars mean."""
    return [
        Patch(facecolor=BLUE, alpha=IN_SET, label="may be the peak (95 % peak set)"),
        Patch(facecolor=GREY, label="shown to be below the peak"),
        Line2D([], [], color="black", marker="*", linestyle="", label="the peak of all images"),
    ]


def _drawn(group: Stability) -> np.ndarray:
    """The places that are drawn, in order."""
    named = not group.places[0].isdecimal()
    if len(group.places) <= (NAMED_BARS if named else MOST_BARS):
        return np.arange(len(group.places))
    return np.sort(np.lexsort((~group.members, -group.shares))[:NAMED_BARS])


def _draw_bars(axes: Axes, group: Stability) -> None:
    at = _drawn(group)
    x, shares = np.arange(len(at)), group.shares[at]
    for i in x[group.members[at]]:
        axes.axvspan(i - 0.5, i + 0.5, color=BLUE, alpha=IN_SET, linewidth=0)
    axes.bar(x, shares, color=[BLUE if member else GREY for member in group.members[at]], width=0.7)
    for i, share in enumerate(shares):
        if share >= SHOWN_SHARE:
            place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{100 * share:.0f} %", (x[i], share), fontsize=7 if len(at) <= 24 else 5.5, **place)
    axes.plot(x[at == group.best], np.full((at == group.best).sum(), 1.12), "*", color="black", markersize=8)
    long = max(len(group.places[place]) for place in at) > 2
    every = 1 if len(at) <= 24 else 2
    axes.set_xticks(x[::every], [group.places[place] for place in at[::every]], rotation=90 if long else 0, fontsize=8)
    axes.set_xlim(-0.6, len(at) - 0.4)
    axes.set_ylim(0, 1.2)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_yticks(np.linspace(0, 1, 5))
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlabel(
        group.axis if len(at) == len(group.places) else f"the {len(at)} of {len(group.places)} most frequent"
    )
    size = f"peak effect {group.size:+.3f}, from split halves {group.halves:+.3f}"
    number = f"peak set: {group.members.sum()} of {len(group.places)}"
    axes.set_title("\n".join(filter(None, (group.group, size, number))), fontsize=9)


def strength_curve(calibration: Mapping[str, Any], title: str) -> Figure:
    """Damage on training images by strength, with intervals; the drop that was wanted and the strength chosen.

    ``calibration`` is the manifest's: ``curve`` with ``strength``, ``drop``, ``low``, ``high`` a point.
    """
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    curve = pd.DataFrame(calibration["curve"]).astype(float).rename(columns={"low": "drop_low", "high": "drop_high"})
    curve, key = curve.sort_values("strength"), f"corruption.{calibration['key']}"
    x, drop, strength = curve["strength"].to_numpy(), calibration["drop"]["drop"], calibration["strength"]
    axes.axhline(0, color="black", linewidth=0.8)
    known = ", 95 % interval" if curve["drop_low"].notna().any() else ""
    axes.plot(x, curve["drop"], "o-", color=BLUE, markersize=5, linewidth=1.6, label=f"measured{known}", zorder=3)
    whiskers(axes, x, curve, "drop", color=BLUE)
    wanted = calibration["wanted"]
    axes.axhline(wanted, color=ORANGE, linestyle="--", linewidth=1.5, label=f"wanted: {wanted:.3g}")
    axes.axvline(strength, color=GREEN, linestyle=":", linewidth=1.8, label=f"chosen: {key} = {strength:.4g}")
    axes.plot(
        strength, drop, "*", color=GREEN, markersize=15, markeredgecolor="black", zorder=4, label=_reached(calibration)
    )
    axes.set_xlabel(key)
    axes.set_ylabel(DAMAGE.get(calibration["damage"], calibration["damage"]))
    axes.xaxis.set_major_locator(MaxNLocator(9))
    axes.grid(alpha=0.25)
    legend_below(figure, [axes], 2)
    shape = "rises all along the grid" if calibration["monotone"] else "does not rise all along the grid"
    sample = f"{counted(calibration['images'], 'training image')} in {counted(calibration['clusters'], 'cluster')}"
    headline(figure, title, f"calibrate={calibration['asked']}: damage {shape}; n = {sample}; intervals over clusters")
    return figure


def _reached(calibration: Mapping[str, Any]) -> str:
    """The drop at the chosen strength, with its interval, in words."""
    drop = calibration["drop"]
    known = "" if drop["low"] is None else f" [{drop['low']:.3f}, {drop['high']:.3f}]"
    return f"reached: {drop['drop']:.3f}{known}"
