"""Tables → charts of a page, as Vega-Lite specifications: declared, never drawn by code of our own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitpatch.compare.cells import Link
from vitpatch.plots.style import LEAST_LIMIT

Spec = dict[str, Any]
Row = Mapping[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""Names the language; nothing is fetched."""
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]
"""Seven, beside the page's eight colours: 56 lines are told apart."""
ORANGE, GREEN, GREY, BLUE = "#D55E00", "#009E73", "#888888", "#3B8FD0"
STEP, STEP_NAMED = 20, 38
"""Pixels a row of a heatmap, and one with its name above."""
LAYER_AXIS = {"format": "d", "tickMinStep": 1, "grid": False}
LEADS_TO = {"field": "href", "type": "nominal"}
"""The channel of an address that a click leads to."""


@dataclass(frozen=True)
class Chart:
    """``spec`` of a chart, ``label`` for a reader who does not see it, ``caption`` and ``links`` at it; ``wide`` ones
    scroll where the page is narrow."""

    spec: Spec
    label: str
    caption: str = ""
    links: Sequence[Link] = ()
    wide: bool = False


def chart_of(height: int, rows: Sequence[Row], **parts: Any) -> Spec:
    """A specification as wide as its box, of Vega-Lite's ``parts``."""
    size = {"width": "container", "height": height, "autosize": {"type": "fit-x", "contains": "padding"}}
    return {"$schema": SCHEMA, **size, "data": values(rows), **parts}


def values(rows: Sequence[Row]) -> Spec:
    """Inline data; numbers of five digits, what is not known null."""
    return {"values": [{key: _short(value) for key, value in row.items()} for row in rows]}


def _short(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    return float(f"{value:.5g}") if np.isfinite(value) else None


def tooltip(names: Sequence[str]) -> list[Spec]:
    """Hover that says fields of the data under their own names; all are words."""
    return [{"field": name, "type": "nominal"} for name in names]


def quantity(name: str, title: str | None, domain: Sequence[float] | None = None, **axis: Any) -> Spec:
    """A channel of numbers, on a given scale where there is a domain; ``axis`` are properties of Vega-Lite's."""
    scale: Spec = (
        {"zero": False, "nice": name != "layer"}
        if domain is None
        else {"domain": [_short(end) for end in domain], "nice": False}
    )
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def by_line(names: Sequence[str], shapes: bool = False) -> Spec:
    """Colour, or marker, of the field ``line``, with a legend where there are several; colours are the page's.

    Without ``names`` all have one.
    """
    if not names:
        return {"value": "circle" if shapes else BLUE}
    scale = {"domain": list(names)} | ({"range": SHAPES} if shapes else {})
    legend = {"title": None, "orient": "bottom", "columns": 1, "labelLimit": 0, "symbolLimit": 60, "symbolOpacity": 1}
    return {"field": "line", "type": "nominal", "scale": scale, "legend": legend if len(names) > 1 else None}


@dataclass(frozen=True)
class Profile:
    """Values by layer: lines with ribbons, full markers, and hollow ones where ``clipped``.

    ``rows`` have ``line, layer, value, low, high, clipped`` and the fields ``said`` on hover; ``names`` are the lines;
    ``title`` and ``domain`` the y axis'. ``totals`` have ``run, line, value, total effect`` (in words) and are dashed,
    several in the colours of their lines. ``x`` is a field with its title, in 0 … 1 where it is not the layer. Without
    ``joined`` points have no lines.
    """

    rows: Sequence[Row]
    names: Sequence[str]
    title: str | None
    domain: Sequence[float] | None
    said: Sequence[str]
    totals: Sequence[Row] = ()
    x: tuple[str, str] = ("layer", "layer")
    joined: bool = True
    height: int = 170

    def spec(self) -> Spec:
        """The chart, as wide as its box; with several lines a click in the legend picks one."""
        layers = [_zero(), *([self._totals()] if self.totals else [])]
        has_intervals = any(_is_known(row, "low", "high") for row in self.rows)
        if self.joined:
            layers += [*([self._ribbon()] if has_intervals else []), self._line()]
        if has_intervals and (not self.joined or min(Counter(row["line"] for row in self.rows).values()) < 2):
            layers.append(self._bars())
        layers.append(self._points(clipped=False))
        if any(row["clipped"] for row in self.rows):
            layers.append(self._points(clipped=True))
        return chart_of(self.height, self.rows, layer=[*layers, self._near()])

    @property
    def _x(self) -> Spec:
        name, title = self.x
        if name == "layer":
            return quantity(name, title, **LAYER_AXIS)
        return quantity(name, title, (0, 1), grid=False, values=[0, 0.2, 0.4, 0.6, 0.8, 1], format=".1f")

    @property
    def _y(self) -> Spec:
        return quantity("value", self.title, self.domain)

    @property
    def _is_picked(self) -> bool:
        return 1 < len(self.names)

    def _strength(self, full: float) -> Spec:
        if not self._is_picked:
            return {"value": full}
        return {"condition": {"param": "picked", "value": full}, "value": full / 8}

    def _totals(self) -> Spec:
        colour = by_line(self.names) if len(self.totals) > 1 and self._is_picked else {"value": ORANGE}
        said = tooltip(["run", "total effect"])
        encoding = {"y": {"field": "value", "type": "quantitative"}, "color": colour, "tooltip": said}
        mark = {"type": "rule", "strokeDash": [6, 4], "strokeWidth": 1.6}
        return {"data": values(self.totals), "mark": mark, "encoding": encoding | {"opacity": self._strength(1)}}

    def _ribbon(self) -> Spec:
        ends = {"y": quantity("low", self.title, self.domain), "y2": {"field": "high"}}
        colour = {"color": by_line(self.names), "opacity": self._strength(0.12 if self._is_picked else 0.2)}
        return {"mark": {"type": "area", "line": False}, "encoding": {"x": self._x, **ends, **colour}}

    def _bars(self) -> Spec:
        ends = {"y": quantity("low", self.title, self.domain), "y2": {"field": "high"}}
        colour = {"color": by_line(self.names), "opacity": self._strength(0.5)}
        return {"mark": "rule", "encoding": {"x": self._x, **ends, **colour}}

    def _line(self) -> Spec:
        colour = {"color": by_line(self.names), "opacity": self._strength(1)}
        return {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"x": self._x, "y": self._y, **colour}}

    def _points(self, clipped: bool) -> Spec:
        """Markers; those of clipped windows hollow."""
        mark = {"type": "point", "filled": not clipped, "size": 45, "strokeWidth": 1.6}
        colour = {"color": by_line(self.names), "shape": by_line(self.names, shapes=True)}
        encoding = {"x": self._x, "y": self._y, **colour, "opacity": self._strength(1)}
        layer = {
            "transform": [{"filter": f"datum.clipped === {str(clipped).lower()}"}],
            "mark": mark,
            "encoding": encoding,
        }
        if self._is_picked and not clipped:
            layer["params"] = [{"name": "picked", "select": {"type": "point", "fields": ["line"]}, "bind": "legend"}]
        return layer

    def _near(self) -> Spec:
        """A ring at the point that the pointer is nearest to, and what is said of it."""
        near = {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}
        shown = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
        encoding = {"x": self._x, "y": self._y, "opacity": shown, "tooltip": tooltip(self.said)}
        mark = {"type": "point", "size": 150, "color": GREY, "strokeWidth": 2}
        return {"params": [{"name": "near", "select": near}], "mark": mark, "encoding": encoding}


def _zero() -> Spec:
    mark = {"type": "rule", "color": GREY, "strokeWidth": 1}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": {"y": {"datum": 0}}}


def _is_known(row: Row, *names: str) -> bool:
    """Whether fields of a row are numbers; a scale without any has no ends."""
    return all(_short(row[name]) is not None for name in names)


@dataclass(frozen=True)
class Heatmap:
    """Values as colours, ``rows`` having ``row, column, value`` and the fields ``said`` on hover; 0 is in the middle.

    ``row_names`` and ``column_names`` are in their order; ``limit`` is the colours' end on both sides; ``addresses``
    has by row where a click on its cells leads.
    """

    rows: Sequence[Row]
    row_names: Sequence[str]
    column_names: Sequence[Any]
    column_title: str | None
    title: str
    limit: float
    said: Sequence[str]
    addresses: Mapping[str, str]

    def spec(self) -> Spec:
        """The chart; cells whose ``sure`` is true have a dot."""
        y = {
            "field": "row",
            "type": "nominal",
            "sort": list(self.row_names),
            "title": None,
            "axis": {"labelLimit": 0},
        }
        x = {"field": "column", "type": "nominal", "sort": list(self.column_names), "title": self.column_title}
        x["axis"] = {"labelLimit": 0, "labelAngle": 0 if self.column_title else -40}
        limit = max(self.limit, LEAST_LIMIT)
        scale = {"scheme": "redblue", "reverse": True, "domain": [_short(-limit), 0, _short(limit)], "type": "linear"}
        legend = {"orient": "bottom", "direction": "horizontal", "gradientLength": 220, "titleLimit": 0}
        colour = {"field": "value", "type": "quantitative", "scale": scale, "title": self.title, "legend": legend}
        place = {"x": x, "y": y, "tooltip": tooltip(self.said), "href": LEADS_TO}
        layers = [{"mark": {"type": "rect"}, "encoding": place | {"color": colour}}]
        if any(row["sure"] for row in self.rows):
            dot = {"type": "point", "filled": True, "size": 9, "opacity": 1}
            sure, strong = [{"filter": "datum.sure"}], f"abs(datum.value) > {0.6 * limit}"
            ink = {"condition": {"test": strong, "value": "#ffffff"}, "value": "#444444"}
            layers.append({"transform": sure, "mark": dot, "encoding": place | {"color": ink}})
        return chart_of(STEP * len(self.row_names), self.rows, transform=[self._found()], layer=layers)

    def _found(self) -> Spec:
        """Finds each cell's address, so that the data have it once a row."""
        table = values([{"row": row, "href": address} for row, address in self.addresses.items()])
        return {"lookup": "row", "from": {"data": table, "key": "row", "fields": ["href"]}}


def intervals(rows: Sequence[Row], title: str, said: Sequence[str]) -> Spec:
    """A point with its interval a row, under the row's name: ``row, value, low, high, href``, and ``total`` as a tick
    where it is known."""
    y = {"field": "row", "type": "nominal", "sort": [row["row"] for row in rows], "title": None, "axis": None}
    place, blue = {"y": y, "href": LEADS_TO, "tooltip": tooltip(said)}, {"color": {"value": BLUE}}
    zero = {"data": {"values": [{}]}, "mark": {"type": "rule", "color": GREY}, "encoding": {"x": {"datum": 0}}}
    # with the row's whole name on hover where the page is narrower than that
    name = {"type": "text", "align": "left", "baseline": "bottom", "dy": -9, "limit": {"expr": "width"}}
    point = {"type": "point", "filled": True, "size": 70, "opacity": 1}
    tick = {"type": "tick", "thickness": 2, "color": ORANGE, "size": 14}
    ends = {"x": _from_zero("low", title), "x2": {"field": "high"}}
    layers = [
        (("low", "high"), {"type": "rule", "strokeWidth": 2}, place | ends | blue),
        (("total",), tick, place | {"x": _from_zero("total", title)}),
        (("value",), point, place | {"x": _from_zero("value", title)} | blue),
    ]
    shown = [
        {"mark": mark, "encoding": encoding}
        for names, mark, encoding in layers
        if any(_is_known(row, *names) for row in rows)
    ]
    names = {"mark": name, "encoding": place | {"x": {"value": 5}, "text": {"field": "row"}}}
    return chart_of(STEP_NAMED * len(rows), rows, layer=[zero, *shown, names])


def _from_zero(name: str, title: str) -> Spec:
    """Numbers on an axis that holds 0 and numbers it: as many ticks as there is room for."""
    axis = {"tickCount": {"expr": "max(2, width / 80)"}}
    return {"field": name, "type": "quantitative", "title": title, "scale": {"zero": True, "nice": True}, "axis": axis}


def picked_profile(profile: Profile, labels: Sequence[str]) -> Spec:
    """A profile of which a list picks what is seen, by the field ``pick`` of its rows."""
    picking = {"name": "Pair", "value": labels[0], "bind": {"input": "select", "options": list(labels)}}
    return profile.spec() | {"params": [picking], "transform": [{"filter": "datum.pick === Pair"}]}


@dataclass(frozen=True)
class Trace:
    """One image's metric by layer: ``rows`` as of ``Profile``, and the levels of the clean and the corrupted run."""

    profile: Profile
    clean: float
    corrupt: float

    def spec(self) -> Spec:
        """The chart: the clean run's level a green line, the corrupted one's orange and dashed."""
        chart = self.profile.spec()
        levels = [_level(self.clean, "clean", GREEN, [1, 0]), _level(self.corrupt, "corrupt", ORANGE, [6, 4])]
        return chart | {"layer": [*levels, *chart["layer"][1:]]}


def _level(value: float, run: str, colour: str, dash: list[int]) -> Spec:
    mark = {"type": "rule", "color": colour, "strokeDash": dash, "strokeWidth": 1.8}
    rows = values([{"value": value, "run": run, "metric": f"{value:.3f}"}])
    encoding = {"y": {"field": "value", "type": "quantitative"}, "tooltip": tooltip(["run", "metric"])}
    return {"data": rows, "mark": mark, "encoding": encoding}
