"""What is wrong with a figure: of matplotlib as it is drawn, of altair in its specification and its PNG."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

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


def views_of(spec: dict) -> list[dict]:
    """The charts of a specification that have axes of their own, in order; data that they share are in each."""
    inner = [part for key in ("concat", "hconcat", "vconcat") for part in spec.get(key, ())]
    shared = {"data": spec["data"]} if "data" in spec else {}
    return [view for part in inner for view in views_of(shared | part)] if inner else [spec]


def layers_of(spec: dict) -> list[dict]:
    """The layers of all charts of a specification, each with its rows as ``data``, filtered as it says."""
    layers = []
    for view in views_of(spec):
        for layer in view.get("layer", [view]):
            rows = layer.get("data", view.get("data"))["values"]
            for step in layer.get("transform", ()):
                name, _, value = step["filter"].removeprefix("datum.").partition(" === ")
                rows = [row for row in rows if row[name] is (json.loads(value) if value else True)]
            layers.append(layer | {"data": {"values": rows}})
    return layers


def chart_problems(spec: dict) -> list[str]:
    """In words what cannot be so in a specification: words that are no words, marks and scales of nothing, values that
    leave their scale, lines that go back and forth."""
    found = [f"says {text!r}" for text in _texts(spec) if NO_NUMBER.search(text)]
    for layer in layers_of(spec):
        rows, encoding, mark = layer["data"]["values"], layer["encoding"], layer["mark"]
        kind = mark if isinstance(mark, str) else mark["type"]
        if not rows:
            found.append(f"{kind}: nothing is drawn")
        for channel in encoding.values():
            if not (isinstance(channel, dict) and channel.get("type") == "quantitative" and "field" in channel):
                continue
            values = np.array([row[channel["field"]] for row in rows], dtype=float)
            known, domain = values[np.isfinite(values)], (channel.get("scale") or {}).get("domain")
            if rows and not len(known):
                found.append(f"{kind}: {channel['field']} of nothing")
            if domain is not None and not domain[0] < domain[-1]:
                found.append(f"{kind}: a scale from {domain[0]} to {domain[-1]}")
            elif domain is not None and len(known) and not domain[0] <= known.min() <= known.max() <= domain[-1]:
                found.append(f"{kind}: {channel['field']} leaves {domain}")
        if kind == "line":
            found += [f"line {line!r} has a layer twice" for line in _twice(rows, encoding["x"]["field"])]
    return found


def _texts(spec: object) -> list[str]:
    """All strings of a specification but the names of fields and the like, which are no words."""
    if isinstance(spec, dict):
        return [text for key, value in spec.items() if key not in ("$schema", "field") for text in _texts(value)]
    if isinstance(spec, list):
        return [text for value in spec for text in _texts(value)]
    return [spec] if isinstance(spec, str) else []


def _twice(rows: list[dict], x: str) -> set[str]:
    """Lines with two points at one x of one picked pair."""
    places = [(row.get("pick"), row["line"], row[x]) for row in rows]
    return {line for _, line, _ in places if len(set(places)) < len(places)}


def reaches_the_edge(png: Path) -> bool:
    """Whether anything is drawn at the very edge of a picture with a white margin, so that it may be cut off."""
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGB"))
    edges = [pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]]
    return any((edge != 255).any() for edge in edges)
