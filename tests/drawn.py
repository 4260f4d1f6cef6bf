"""What is wrong with a figure as it is drawn: limits, words and data of each of its axes."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

NO_NUMBER = re.compile(r"(?<![^\W_])(nan|inf|None)(?![^\W_])")
"""What a figure never says."""


def problems_of(figure: Figure) -> list[str]:
    """In words what cannot be so; the figure is laid out before (``savefig``)."""
    words = [text.get_text() for text in figure.findobj(Text) if text.get_visible()]
    found = [f"says {text!r}" for text in words if NO_NUMBER.search(text)]
    for i, axes in enumerate(axes for axes in figure.axes if axes.get_visible() and axes.axison):
        found += [f"axes {i}, {axes.get_title(loc='left') or axes.get_title()!r}: {what}" for what in _of_axes(axes)]
    return found


def _of_axes(axes: Axes) -> list[str]:
    found = []
    for name, limits in (("x", axes.get_xlim()), ("y", axes.get_ylim())):
        if not np.isfinite(limits).all() or limits[0] == limits[1]:
            found.append(f"{name} axis from {limits[0]} to {limits[1]}")
    if not _has_data(axes):
        found.append("nothing is drawn")
    return found


def _has_data(axes: Axes) -> bool:
    """Whether a line with several, or a marked, finite point, an image, a bar or a collection is there."""
    if axes.images or axes.patches or axes.collections:
        return True
    return any(np.isfinite(_points(line)).all(1).any() for line in axes.get_lines())


def _points(line) -> np.ndarray:
    return np.column_stack([np.asarray(values, float) for values in line.get_data()])
