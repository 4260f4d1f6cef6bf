"""Altair charts by layer, by run, and of intervals: one specification for the page, SVG and PNG."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from vitpatch.io import atomic_write
from vitpatch.plots.style import LEAST_LIMIT

Spec = dict[str, Any]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]
"""Seven, beside eight colours: 56 lines are told apart."""
ORANGE, GREEN, GREY, BLUE = "#D55E00", "#009E73", "#888888", "#3B8FD0"
ROW_HEIGHT, NAMED_ROW_HEIGHT = 20, 38  # pixels of a heatmap's row, and of one with its name above
MAX_COLUMNS_OF_WORDS = 12  # columns of a heatmap of the page whose cells have room for words
FORMATS = ("svg", "png")
"""Of a comparison's figures, where nothing else is asked for."""
PNG_SCALE = 2  # pixels of a PNG per pixel of a chart


ASSETS = Path(__file__).parents[1] / "assets" / "page"
THEMES = json.loads((ASSETS / "themes.json").read_text(encoding="utf-8"))
"""Vega-Lite's ``config`` for each scheme of the page; colours are told apart by colour-blind readers."""
FILE_CONFIG = THEMES["light"] | {
    "background": "#ffffff",
    "padding": 12,
    "font": "Helvetica, Arial, sans-serif",
    "title": {"anchor": "start", "fontSize": 13, "subtitleColor": "#57606a", "subtitleFontSize": 11, "offset": 12},
}
"""The same for figures in files."""


def spec_of(chart: Any) -> Spec:
    """A chart as a Vega-Lite specification, without altair's own theme.

    It is not checked against Vega-Lite's schema, which takes longer than the rest: tests check all kinds of charts.
    """
    with alt.data_transformers.enable(consolidate_datasets=False):
        spec = chart.to_dict(validate=False)
    spec.pop("config", None)
    return spec


def save_figure(chart: Any, path: Path, formats: Iterable[str] = FORMATS) -> None:
    """Writes a chart as ``path``.svg and so on, by rename. SVG and PDF keep their text as text."""
    text = json.dumps(spec_of(chart), ensure_ascii=False)
    options: Spec = {"config": FILE_CONFIG, "allowed_base_urls": []}
    drawn = {
        "svg": lambda: vl_convert.vegalite_to_svg(text, **options).encode(),
        "png": lambda: vl_convert.vegalite_to_png(_drawable(text), scale=PNG_SCALE, **options),
        "pdf": lambda: vl_convert.vegalite_to_pdf(_drawable(text), **options),
    }
    for kind in formats:
        with atomic_write(path.with_name(f"{path.name}.{kind}")) as temporary:
            temporary.write_bytes(drawn[kind]())


def _drawable(text: str) -> str:
    """JSON in which letters that no installed font has are written as code points, else all were the same box."""
    return re.sub(
        "[^\x00-\u024f]", lambda match: match[0] if _has_glyph(match[0]) else rf"\\u{ord(match[0]):04x}", text
    )


@cache
def _has_glyph(letter: str) -> bool:
    return _picture(letter) != _picture("\ue000")  # private use: no font has it


@cache
def _picture(letter: str) -> bytes:
    text = f'<text y="20" font-family="{FILE_CONFIG["font"]}" font-size="16">{letter}</text>'
    return vl_convert.svg_to_png(f'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32">{text}</svg>')


def inline_data(rows: pd.DataFrame | Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Rows as a chart embeds them: numbers of five digits, null where not known."""
    records = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
    return alt.InlineData(values=[{key: _rounded(value) for key, value in row.items()} for row in records])


def _rounded(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _layered(layers: Sequence[alt.Chart], rows: Any, height: int, width: int | None) -> alt.LayerChart:
    """The layers as one chart, ``width`` pixels wide; ``None`` = as wide as its box on the page."""
    chart = alt.layer(*layers, data=inline_data(rows), height=height, width="container" if width is None else width)
    return chart if width else chart.properties(autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))


def _tooltips(titles: Mapping[str, str]) -> list[alt.Tooltip]:
    """Tooltips that show text fields, given as title by field."""
    return [alt.Tooltip(field=name, type="nominal", title=title) for name, title in titles.items()]


def _hover_and_click(titles: Mapping[str, str], width: int | None) -> Spec:
    """Tooltip and link of marks on the page; nothing in a file, which has a ``width``."""
    click = alt.Href(field="href", type="nominal")
    return {"tooltip": _tooltips(titles), "href": click} if width is None else {}


def _rule(channel: str, value: float = 0, **mark: Any) -> alt.Chart:
    """A line across the chart at a value of the channel x or y."""
    rule = alt.Chart(inline_data([{}])).mark_rule(**({"color": GREY, "strokeWidth": 1} | mark))
    return rule.encode(**{channel: alt.datum(_rounded(value))})


def _level_rules(rows: Sequence[Mapping[str, Any]], quantity: str, **mark: Any) -> alt.Chart:
    """Lines across at the field ``value``; their tooltip has ``run`` and, titled ``quantity``, ``words``."""
    rules, tooltips = alt.Chart(inline_data(rows)).mark_rule(**mark), _tooltips({"run": "run", "words": quantity})
    return rules.encode(y=alt.Y(field="value", type="quantitative"), tooltip=tooltips)


def _all_known(rows: pd.DataFrame, *names: str) -> pd.Series:
    return rows[list(names)].notna().all(axis=1)


@dataclass(frozen=True)
class Profile:
    """Values by layer: lines with ribbons, full markers, and hollow ones where ``clipped``.

    ``rows`` have ``line, layer, value, low, high, clipped`` and the text fields of ``tooltips`` (titles by field).
    ``low_beyond`` and ``high_beyond``, where there are any, say which ends of intervals have an arrow.
    ``names`` are the lines that a legend lists, by default all; where it is empty, points have one colour and no lines.
    ``totals`` have ``run, line, value, words``: dashed, several in the colours of their lines. ``levels``: (value,
    name, colour, dashes) of lines across, instead of one at 0. ``x`` is a field with its title; its values are in 0 … 1
    where it is not the layer. ``picks``: a list picks which rows are seen, by their field ``pick``.
    """

    rows: pd.DataFrame
    title: str | list[str] | None
    domain: Sequence[float] | None
    tooltips: Mapping[str, str]
    names: Sequence[str] | None = None
    totals: Sequence[Mapping[str, Any]] = ()
    levels: Sequence[tuple[float, str, str, list[int]]] = ()
    x: tuple[str, str] = ("layer", "layer")
    height: int = 170
    picks: Sequence[str] = ()
    _picked: alt.Parameter = field(
        default_factory=lambda: alt.selection_point(name="picked", fields=["line"], bind="legend")
    )

    @property
    def lines(self) -> list[str]:
        """The names of the lines that are drawn, in order."""
        return list(self.rows["line"].unique() if self.names is None else self.names)

    def chart(self, width: int | None = None) -> alt.LayerChart:
        """For the page, where hovering shows numbers and a click in the legend picks a line; with a ``width`` in pixels
        for a file."""
        in_page, rows = width is None, self.rows
        picks_line = in_page and len(self.lines) > 1
        opacity = self._opacity if picks_line else alt.value
        layers = [self._level(*level) for level in self.levels] or [_rule("y")]
        if self.totals:
            layers.append(self._total_effects().encode(opacity=opacity(1)))
        ends = {"x": self._x, "y": self._y("low"), "y2": alt.Y2("high"), "color": self._colour}
        has_intervals = bool(_all_known(rows, "low", "high").any())
        if self.lines:
            if has_intervals:
                faint = opacity(0.12 if len(self.lines) > 1 else 0.2)
                layers.append(alt.Chart().mark_area(line=False).encode(**ends, opacity=faint))
            line = alt.Chart().mark_line(strokeWidth=2)
            layers.append(line.encode(x=self._x, y=self._y(), color=self._colour, opacity=opacity(1)))
        if has_intervals and (not self.lines or rows["line"].value_counts().min() < 2):
            layers.append(alt.Chart().mark_rule().encode(**ends, opacity=opacity(0.5)))
        for end, angle in (("low", 180), ("high", 0)):  # of intervals that go on beyond the scale
            if rows.get(f"{end}_beyond", pd.Series(dtype=bool)).any():
                arrows = alt.Chart().mark_point(shape="arrow", filled=True, size=180, angle=angle)
                arrows = arrows.transform_filter(f"datum.{end}_beyond")
                layers.append(arrows.encode(x=self._x, y=self._y(end), color=self._colour, opacity=opacity(1)))
        points = [
            self._points(clipped).encode(opacity=opacity(1)) for clipped in sorted(set(map(bool, rows["clipped"])))
        ]
        layers += [points[0].add_params(self._picked) if picks_line else points[0], *points[1:]]
        if in_page:
            layers.append(self._nearest_point())
        chart = _layered(layers, rows, self.height, width)
        if self.picks:
            pick = alt.binding_select(options=list(self.picks))
            chart = chart.add_params(alt.param(name="Pair", value=self.picks[0], bind=pick))
            chart = chart.transform_filter("datum.pick === Pair")
        return chart

    @property
    def _x(self) -> alt.X:
        name, title = self.x
        axis, scale = {"format": "d", "tickMinStep": 1}, {"zero": False}
        if name != "layer":
            axis, scale = {"format": ".1f", "values": [0, 0.2, 0.4, 0.6, 0.8, 1]}, {"domain": [0, 1]}
        axis, scale = alt.Axis(grid=False, **axis), alt.Scale(nice=False, **scale)
        return alt.X(field=name, type="quantitative", title=title, scale=scale, axis=axis)

    def _y(self, name: str = "value") -> alt.Y:
        scale = alt.Scale(zero=False, nice=True)
        if self.domain is not None:
            scale = alt.Scale(domain=[_rounded(end) for end in self.domain], nice=False)
        return alt.Y(field=name, type="quantitative", title=self.title, scale=scale)

    @property
    def _colour(self) -> alt.Color | Any:
        return alt.Color(**self._by_line()) if self.lines else alt.value(BLUE)

    def _by_line(self, **scale: Any) -> Spec:
        """Colour or shape by the field ``line``, with a legend of named lines where there are several."""
        legend = None
        if len(self.lines) > 1:
            values = {} if all(self.lines) else {"values": [name for name in self.lines if name]}
            legend = alt.Legend(
                title=None, orient="bottom", columns=1, labelLimit=0, symbolLimit=60, symbolOpacity=1, **values
            )
        domain = alt.Scale(domain=self.lines, **scale)
        return {"field": "line", "type": "nominal", "scale": domain, "legend": legend}

    def _opacity(self, full: float) -> Any:
        return alt.when(self._picked).then(alt.value(full)).otherwise(alt.value(full / 8))

    def _total_effects(self) -> alt.Chart:
        has_colours = len(self.totals) > 1 and len(self.lines) > 1
        rules = _level_rules(self.totals, "total effect", strokeDash=[6, 4], strokeWidth=1.6)
        return rules.encode(color=self._colour if has_colours else alt.value(ORANGE))

    def _level(self, value: float, name: str, colour: str, dashes: list[int]) -> alt.Chart:
        rows = [{"value": value, "run": name, "words": f"{value:.3f}"}]
        return _level_rules(rows, "metric", color=colour, strokeDash=dashes, strokeWidth=1.8)

    def _points(self, clipped: bool) -> alt.Chart:
        """Markers; those of clipped windows hollow."""
        points = alt.Chart(name="hollow" if clipped else "points")
        points = points.mark_point(filled=not clipped, size=45, strokeWidth=1.6)
        shape = alt.Shape(**self._by_line(range=SHAPES)) if self.lines else alt.value("circle")
        filtered = points.transform_filter(f"datum.clipped === {str(clipped).lower()}")
        return filtered.encode(x=self._x, y=self._y(), color=self._colour, shape=shape)

    def _nearest_point(self) -> alt.Chart:
        """A ring at the point nearest to the pointer, with its tooltip."""
        near = alt.selection_point(name="near", on="pointerover", nearest=True, clear="pointerout")
        ring = alt.Chart(name="ring").mark_point(size=150, color=GREY, strokeWidth=2).add_params(near)
        opacity = alt.when(near, empty=False).then(alt.value(1)).otherwise(alt.value(0))
        return ring.encode(x=self._x, y=self._y(), opacity=opacity, tooltip=_tooltips(self.tooltips))


@dataclass(frozen=True)
class Heatmap:
    """Values as colours: ``rows`` have ``row, column, value``, the text fields of ``tooltips``, and ``sure``: a dot.

    ``row_names`` and ``column_names`` are in their order. The colours end at ``limit`` on both sides of 0, or with a
    ``lowest`` value begin there, in shades of one colour. ``addresses`` has by row where a click on its cells leads.
    ``words`` is a field that is written into the cells, "" = none; on the page where it has room.
    """

    rows: pd.DataFrame
    row_names: Sequence[str]
    column_names: Sequence[Any]
    column_title: str | None
    title: str
    limit: float
    tooltips: Mapping[str, str]
    addresses: Mapping[str, str]
    words: str = ""
    lowest: float | None = None

    def chart(self, width: int | None = None) -> alt.LayerChart:
        """For the page; with a ``width`` in pixels for a file."""
        limit, angle = max(self.limit, LEAST_LIMIT), 0 if self.column_title else -40
        scale = alt.Scale(scheme="redblue", reverse=True, domain=[_rounded(-limit), 0, _rounded(limit)], type="linear")
        strong = alt.expr.abs(alt.datum.value) > 0.6 * limit
        if self.lowest is not None:
            scale = alt.Scale(scheme="blues", domain=[_rounded(self.lowest), _rounded(limit)], type="linear")
            strong = alt.datum.value > self.lowest + 0.6 * (limit - self.lowest)
        legend = alt.Legend(orient="bottom", direction="horizontal", gradientLength=220, titleLimit=0)
        colour = alt.Color(field="value", type="quantitative", scale=scale, title=self.title, legend=legend)
        x_axis, y_axis = alt.Axis(labelLimit=0, labelAngle=angle), alt.Axis(labelLimit=0)
        x = alt.X(field="column", type="nominal", sort=self.column_names, title=self.column_title, axis=x_axis)
        y = alt.Y(field="row", type="nominal", sort=self.row_names, title=None, axis=y_axis)
        shared = {"x": x, "y": y, **_hover_and_click(self.tooltips, width)}
        ink = alt.when(strong).then(alt.value("#ffffff")).otherwise(alt.value("#444444"))
        layers = [alt.Chart().mark_rect().encode(**shared, color=colour)]
        if self.rows["sure"].any():
            dots = alt.Chart().mark_point(filled=True, size=9, opacity=1).transform_filter("datum.sure")
            layers.append(dots.encode(**shared, color=ink))
        if self.words and (width or len(self.column_names) <= MAX_COLUMNS_OF_WORDS):
            text = alt.Text(field=self.words, type="nominal")
            layers.append(alt.Chart().mark_text(fontSize=9).encode(**shared, text=text, color=ink))
        addresses = inline_data([{"row": row, "href": address} for row, address in self.addresses.items()])
        lookup = alt.LookupData(data=addresses, key="row", fields=["href"])
        chart = _layered(layers, self.rows, ROW_HEIGHT * len(self.row_names), width)
        return chart.transform_lookup(lookup="row", from_=lookup)  # an address is embedded once a row of the heatmap


@dataclass(frozen=True)
class Intervals:
    """A row a point with its interval, below the row's name: ``rows`` have ``row, value, low, high``, ``total`` (a tick
    where it is known), ``href`` and the text fields of ``tooltips``."""

    rows: pd.DataFrame
    title: str
    tooltips: Mapping[str, str]

    def chart(self, width: int | None = None) -> alt.LayerChart:
        """For the page; with a ``width`` in pixels for a file."""
        blue = alt.value(BLUE)
        y = alt.Y(field="row", type="nominal", sort=list(self.rows["row"]), title=None, axis=None)
        shared = {"y": y, **_hover_and_click(self.tooltips, width)}
        interval = alt.Chart().mark_rule(strokeWidth=2)
        interval = interval.encode(x=self._x("low"), x2=alt.X2("high"), color=blue, **shared)
        tick = alt.Chart().mark_tick(thickness=2, color=ORANGE, size=14).encode(x=self._x("total"), **shared)
        point = alt.Chart().mark_point(filled=True, size=70, opacity=1)
        point = point.encode(x=self._x("value"), color=blue, **shared)
        layers = [_rule("x")]
        for fields, layer in ((("low", "high"), interval), (("total",), tick), (("value",), point)):
            if _all_known(self.rows, *fields).any():  # a scale without any number has no ends
                layers.append(layer)
        # the whole name is on hover where the page is narrower
        limit = {"expr": "width"} if width is None else 0
        name = alt.Chart().mark_text(align="left", baseline="bottom", dy=-9, limit=limit)
        layers.append(name.encode(x=alt.value(5), text=alt.Text(field="row"), **shared))
        return _layered(layers, self.rows, NAMED_ROW_HEIGHT * len(self.rows), width)

    def _x(self, name: str) -> alt.X:
        """The x channel of a field, on an axis that includes 0 and has as many ticks as there is room for."""
        axis = alt.Axis(tickCount={"expr": "max(2, width / 80)"})
        scale = alt.Scale(zero=True, nice=True)
        return alt.X(field=name, type="quantitative", title=self.title, scale=scale, axis=axis)
