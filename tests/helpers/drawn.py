"""What is wrong with a figure as it is drawn: limits, words and data of each of its axes."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

NO_NUMBER = re.compile(r"(?<![^\W_])(nan|inf)(?![^\W_])")
"""What is never said."""
LEAVES_ITS_AXES = {("layer_profile", 0)}
"""(figure, axes) whose controls may leave it: they are whole in a panel below."""
FALLS_BACK = "whole = direct"
"""The one line that does not go from left to right."""


def problems_of(figure: Figure, name: str) -> list[str]:
    """In words what cannot be so, whether the figure is written yet or not."""
    words = [text.get_text() for text in figure.findobj(Text) if text.get_visible()]
    found = [f"says {text!r}" for text in words if NO_NUMBER.search(text)]
    for i, axes in enumerate(figure.axes):
        if axes.get_visible() and axes.axison:
            whole = (name, i) not in LEAVES_ITS_AXES
            title = axes.get_title(loc="left") or axes.get_title()
            found += [f"axes {i}, {title!r}: {what}" for what in _of_axes(axes, whole)]
    return found


def cut_off(figure: Figure) -> list[str]:
    """In words where a figure, laid out and drawn, goes over its edge by more than a twentieth of an inch."""
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    over = {"left": -box.x0, "below": -box.y0, "right": box.x1 - width, "above": box.y1 - height}
    return [f"cut off {side} by {by:.2f} inches" for side, by in over.items() if by > 0.05]


def _of_axes(axes: Axes, whole: bool) -> list[str]:
    found = []
    for name, limits in (("x", axes.get_xlim()), ("y", axes.get_ylim())):
        if not np.isfinite(limits).all() or limits[0] == limits[1]:
            found.append(f"{name} axis from {limits[0]} to {limits[1]}")
    lines = [line for line in axes.get_lines() if line.get_transform() == axes.transData]
    if not (axes.images or axes.patches or axes.collections or any(len(_known(line)) for line in lines)):
        found.append("nothing is drawn")
    low, high = sorted(axes.get_ylim())
    for line in lines:
        points, label = _known(line), line.get_label()
        if whole and len(points) and not (low <= points[:, 1].min() and points[:, 1].max() <= high):
            found.append(f"{label} leaves {low} … {high}")
        is_joined = line.get_linestyle() not in ("None", "", " ") and label != FALLS_BACK
        if is_joined and (np.diff(points[:, 0]) < 0).any():
            found.append(f"{label} goes back and forth: {points[:, 0]}")
    return found


def _known(line: Line2D) -> np.ndarray:
    """The points of a line that are numbers, (points, 2)."""
    points = np.column_stack([np.asarray(values, float) for values in line.get_data()])
    return points[np.isfinite(points).all(1)]
