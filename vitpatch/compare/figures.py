"""Comparison → its figures: charts for the page, with captions and links, and the same for PNG and SVG files.

To add one: a function that yields a ``Figure``, called in ``make_figures``; for a section of its own also a line in
``page.make_sections`` and the section's title and text in ``assets/page/page.html.jinja``.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import altair as alt
import numpy as np
import pandas as pd

from vitpatch.compare import layout, tables
from vitpatch.compare.charts import Heatmap, Intervals, Profile, Spec, inline_data, spec_of
from vitpatch.compare.layout import Grid
from vitpatch.compare.load import Comparison
from vitpatch.compare.pairs import largest_differences
from vitpatch.compare.tables import Link
from vitpatch.formatting import run_labels, short_labels
from vitpatch.stats.result import series_names

MAX_DOTS = 200  # points of a panel with many series; of more those with the largest effects
MAX_PAIRS = 40  # pairs of runs whose differences by layer can be picked, from the largest on
MAX_FILE_ROWS, MAX_FILE_PAIRS = 60, 30  # runs, or pairs of runs, of a figure in a file that has a row each
MAX_RANK_WORDS = 20  # runs of a rank correlation whose cells have their numbers in a file
PANEL_WIDTH, OVERLAY_WIDTH, FIGURE_WIDTH, LAYER_WIDTH, MIN_HEATMAP_WIDTH = 250, 373, 560, 34, 240
"""Pixels in a file: of a panel, of a chart of several corruptions, of a single chart, of a heatmap's column, and of a
heatmap."""
TITLE_LETTERS = 110  # letters of a line of a file's title
FILES = re.compile(
    r"(grid|overlay|shares|heatmap|peaks|differences|rank_correlation|relative_depth)(_[a-z0-9_]+)?[.](png|svg|pdf)"
)
"""Names of the files that figures are saved to."""
INTERVALS = "95 % bootstrap intervals over clusters"


@dataclass(frozen=True)
class Chart:
    """A chart: ``label`` for a reader who does not see it, ``caption`` over it, ``links`` under it; ``wide`` ones
    scroll where the page is narrow."""

    drawing: Profile | Heatmap | Intervals
    label: str
    caption: str = ""
    links: Sequence[Link] = ()
    wide: bool = False

    @property
    def spec(self) -> Spec:
        """The chart of the page as a Vega-Lite specification."""
        return spec_of(self.drawing.chart())


@dataclass(frozen=True)
class Figure:
    """Charts that belong together, in a ``section`` of the page and in files called ``name``.

    ``charts`` are the page's, with the ``heading`` over them; ``in_file`` what a file has, each ``width`` pixels wide,
    below the ``title`` and its ``lines``; empty = there is no file. ``columns``: panels side by side, each with its
    caption, of the page and of the file; (0, 0) = one chart. ``None`` instead of a chart: nothing was run there.
    """

    section: str
    name: str
    title: str
    lines: Sequence[str]
    charts: Sequence[Chart | None]
    in_file: Sequence[Chart | None]
    width: int
    heading: str = ""
    columns: tuple[int, int] = (0, 0)

    def draw(self, comparison: Comparison) -> alt.Chart:
        """The figure of the files: its charts, a title, and below it what all runs share."""
        if self.columns[1]:
            figure = alt.concat(*map(self._draw_panel, self.in_file), columns=self.columns[1])
        else:
            (chart,) = self.in_file
            figure = chart.drawing.chart(self.width)
        overview = comparison.overview
        shared = [
            overview[name].iloc[0] for name in ("model", "data", "site", "transfer") if overview[name].nunique() == 1
        ]
        subtitle = [part for line in (" · ".join(shared), *self.lines) for part in textwrap.wrap(line, TITLE_LETTERS)]
        title = f"{self.title} – {self.heading}" if self.heading else self.title
        return figure.properties(title=alt.TitleParams(text=textwrap.wrap(title, TITLE_LETTERS), subtitle=subtitle))

    def _draw_panel(self, chart: Chart | None) -> alt.Chart | alt.LayerChart:
        if chart is None:
            height = next(panel.drawing.height for panel in self.in_file if panel)
            text = alt.Chart(inline_data([{}])).mark_text(color="#57606a").encode(text=alt.value("not run"))
            return text.properties(width=self.width, height=height)
        caption = alt.TitleParams(text=textwrap.wrap(chart.caption, 48), fontSize=11, fontWeight="normal", offset=6)
        return chart.drawing.chart(self.width).properties(title=caption)


def make_figures(comparison: Comparison) -> list[Figure]:
    """All figures of a comparison, without those that show nothing."""
    addresses = {row["run"]: tables.run_links(row)[0].address for row in comparison.overview.to_dict("records")}
    return [
        *_profile_figures(comparison),
        *_share_figures(comparison),
        *_heatmap_figures(comparison, addresses),
        *_peak_figures(comparison, addresses),
        *_difference_figures(comparison),
        *_rank_correlation_figure(comparison, addresses),
        *_relative_depth_figure(comparison),
    ]


def _profile_figures(comparison: Comparison) -> Iterator[Figure]:
    """For each grid its panels, corruption × window, and for each window with several corruptions a chart of them all.

    The panels of a file have lines in the same colours; the first of each row has the title of the axis.
    """
    overview, grids = comparison.overview.set_index("run", drop=False), layout.make_grids(comparison)
    for number, grid in enumerate(grids, start=1):
        end, columns = f"_{number}" if len(grids) > 1 else "", len(grid.windows)
        scale = layout.effect_range(comparison, grid.metric, grid.transfer)
        title = layout.effect_title(grid.metric)
        sample = layout.describe_sample(overview.loc[list(pd.concat(grid.panels.values())["run"].unique())])
        places = [(corruption, window) for corruption in grid.corruptions for window in grid.windows]
        charts = [
            _panel_chart(grid.panels[place], overview, place, scale) if place in grid.panels else None
            for place in places
        ]
        names = list(dict.fromkeys(name for chart in charts if chart for name in chart.drawing.lines))
        in_file = []
        for at, chart in enumerate(charts):
            if chart is not None:
                axis = None if at % columns else textwrap.wrap(title, 28)
                drawing = replace(chart.drawing, title=axis, names=names if chart.drawing.lines else [])
                chart = replace(chart, drawing=drawing)
            in_file.append(chart)
        line = f"{sample}; {INTERVALS}; dashed: total effect; hollow: window clipped at the network's end"
        both = (columns, columns)
        yield Figure("grid", f"grid{end}", "profiles", [line], charts, in_file, PANEL_WIDTH, grid.title, both)
        overlays = list(_overlay_charts(grid, scale, title))
        if overlays:
            line, both = f"{sample}; {INTERVALS}", (min(2, len(overlays)), len(overlays))
            words, name = "corruptions overlaid", f"overlay{end}"
            yield Figure("overlay", name, words, [line], overlays, overlays, OVERLAY_WIDTH, grid.title, both)


def _panel_chart(
    panel: pd.DataFrame, overview: pd.DataFrame, place: tuple[str, str], scale: tuple[float, float]
) -> Chart:
    runs = overview.loc[list(panel["run"].unique())].to_dict("records")
    rows, n_lines, note = layout.shorten_line_names(panel), panel["line"].nunique(), ""
    if n_lines > layout.MAX_SERIES and len(rows) > MAX_DOTS:
        note = f"; the {MAX_DOTS} of {len(rows)} patches with the largest effects"
        rows = rows.loc[rows["effect"].abs().nlargest(MAX_DOTS).index].sort_index()
    names = None if n_lines <= layout.MAX_SERIES or len(runs) > 1 else []
    tooltips = {key: title for key, title in layout.TOOLTIPS.items() if key != "line" or set(panel["line"]) != {""}}
    totals = [  # each in the colour of its run's first line
        {"run": name, "line": line, "value": total, "words": tables.format_value(overview.loc[name], "total_effect")}
        for name, line in rows.drop_duplicates("run").set_index("run")["line"].items()
        if np.isfinite(total := overview.loc[name, "total_effect"])
    ]
    profile = Profile(layout.profile_rows(rows), None, scale, tooltips, names, totals)
    corruption, words = place[0], layout.window_heading(place[1])
    labels = run_labels([run["run"] for run in runs]) if len(runs) > 1 else {}
    links = [
        replace(link, word=f"{labels[run['run']]}: {link.word}") if labels else link
        for run in runs
        for link in tables.run_links(run)
    ]
    sample = layout.describe_sample(pd.DataFrame(runs))
    label = f"{corruption}, {words}: mean effect by layer, {sample}"
    return Chart(profile, label, f"{corruption}, {words} ({sample}{note})", links)


def _overlay_charts(grid: Grid, scale: tuple[float, float], title: str) -> Iterator[Chart]:
    for window in grid.windows:
        if sum((corruption, window) in grid.panels for corruption in grid.corruptions) > 1:
            rows, truncation = layout.legend_lines(layout.overlay_rows(grid, window))
            words = layout.window_heading(window)
            profile = Profile(layout.profile_rows(rows), title, scale, layout.TOOLTIPS, height=280)
            caption = f"{words}; {truncation}" if truncation else words
            yield Chart(profile, f"All corruptions by layer, {words}", caption)


def _share_figures(comparison: Comparison) -> Iterator[Figure]:
    """Shares recovered of all corruptions on one axis, those of clean into corrupted beside those of the reverse."""
    by_title: dict[str, list[Chart]] = {}
    runs: dict[str, set[str]] = {}
    for title, window, rows in layout.share_tables(comparison):
        runs.setdefault(title, set()).update(rows["run"])
        rows, truncation = layout.legend_lines(rows)
        lines, scale, note = layout.clip_intervals(layout.profile_rows(rows, "recovered"))
        profile = Profile(lines, "share of the total effect recovered", scale, layout.TOOLTIPS, height=280)
        heading = layout.window_heading(window)
        words = "; ".join(filter(None, (heading, truncation, note)))
        chart = Chart(profile, f"Shares recovered by layer, {heading}", words)
        by_title.setdefault(title, []).append(chart)
    for number, (title, charts) in enumerate(by_title.items(), start=1):
        end, columns = f"_{number}" if len(by_title) > 1 else "", (min(2, len(charts)), len(charts))
        words, heading = "corruptions overlaid", " · ".join(filter(None, ("share recovered", title)))
        sample = layout.describe_sample(comparison.overview[comparison.overview["run"].isin(runs[title])])
        lines = [f"{sample}; {INTERVALS}"]
        yield Figure("overlay", f"shares{end}", words, lines, charts, charts, OVERLAY_WIDTH, heading, columns)


def _runs_by_metric(comparison: Comparison) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """Each metric with its rows of ``overview`` and the end of a file's name, "" where there is one metric."""
    by_metric = comparison.overview.groupby("metric", sort=False)
    for metric, runs in by_metric:
        yield str(metric), runs, f"_{metric}" if len(by_metric) > 1 else ""


def _heatmap_figures(comparison: Comparison, addresses: Mapping[str, str]) -> Iterator[Figure]:
    """Run × layer, a figure a metric."""
    table = layout.lines_table(comparison)
    for metric, runs, end in _runs_by_metric(comparison):
        rows = layout.shorten_line_names(table[table["run"].isin(runs["run"])])
        first = rows["line"].unique()[:MAX_FILE_ROWS]
        in_file = rows[rows["line"].isin(first)]
        lines = [f"{layout.describe_sample(runs)}; dot: 95 % interval without 0"]
        lines += [f"the first {MAX_FILE_ROWS} rows"] * (len(in_file) < len(rows))
        width = max(MIN_HEATMAP_WIDTH, LAYER_WIDTH * in_file["layer"].nunique())
        charts = [[_heatmap_chart(cells, metric, addresses)] for cells in (rows, in_file)]
        yield Figure("heatmap", f"heatmap{end}", "run × layer", lines, *charts, width)


def _heatmap_chart(rows: pd.DataFrame, metric: str, addresses: Mapping[str, str]) -> Chart:
    cells = layout.profile_rows(rows).rename(columns={"line": "row"})
    cells = cells.assign(column=cells["layer"], sure=(cells["low"] > 0) | (cells["high"] < 0))
    layers, limit = sorted(set(rows["layer"])), float(np.nanmax(np.abs(rows["effect"].to_numpy(float)), initial=0))
    heatmap = Heatmap(
        rows=cells.drop(columns=["low", "high", "clipped"]),
        row_names=list(rows["line"].unique()),
        column_names=layers,
        column_title="layer",
        title=layout.effect_title(metric),
        limit=limit,
        tooltips={"row" if key == "line" else key: title for key, title in layout.TOOLTIPS.items()},
        addresses={line: addresses[run] for line, run in zip(rows["line"], rows["run"], strict=True)},
    )
    label = f"Heatmap of effects, run by layer, on {metric}"
    return Chart(heatmap, label, "A cell leads to its run’s folder.", wide=True)


def _peak_figures(comparison: Comparison, addresses: Mapping[str, str]) -> Iterator[Figure]:
    """The peak effect of each run with its interval, a figure a metric; no file where no run has a peak."""
    labels = short_labels(list(comparison.overview["run"]))
    tooltips = {"run": "run", "peak": "peak", "words": "peak effect [95 %]", "total_words": "total effect"}
    for metric, runs, end in _runs_by_metric(comparison):
        records = runs.to_dict("records")
        rows = {
            "row": [f"{labels[run['run']]}, {_describe_peak(run)}" for run in records],
            "value": runs["peak_effect"],
            "low": runs["peak_effect_low"],
            "high": runs["peak_effect_high"],
            "total": runs["total_effect"],
            "run": runs["run"],
            "href": [addresses[run["run"]] for run in records],
            "peak": [run["peak_place"] or "none" for run in records],
            "words": [tables.format_value(run, "peak_effect") for run in records],
            "total_words": [tables.format_value(run, "total_effect") for run in records],
        }
        intervals = Intervals(pd.DataFrame(rows), layout.effect_title(metric), tooltips)
        chart = Chart(intervals, f"Peak effect of each run on {metric}, with intervals")
        known = intervals.rows[intervals.rows["value"].notna()]
        in_file = [replace(chart, drawing=replace(intervals, rows=known[:MAX_FILE_ROWS]))] if len(known) else []
        lines = [f"{layout.describe_sample(runs)}; {INTERVALS}; orange: total effect"]
        lines += [f"the first {MAX_FILE_ROWS} of {len(known)} runs"] * (len(known) > MAX_FILE_ROWS)
        yield Figure("peaks", f"peaks{end}", "peak of each run", lines, [chart], in_file, FIGURE_WIDTH)


def _describe_peak(run: tables.Row) -> str:
    """The peak of a row of ``overview`` in words, with the layers that may be the peak."""
    if not run["peak_place"]:
        return "no peak"
    return run["peak_place"] + (f" (peak set: {run['peak_set']})" if run["peak_set"] else "")


def _difference_figures(comparison: Comparison) -> Iterator[Figure]:
    """A figure a quantity. On the page: differences by layer, of a pair picked from a list. In a file: the largest
    difference of each pair."""
    labels, largest = short_labels(list(comparison.overview["run"])), largest_differences(comparison.differences)
    for quantity, pairs in largest.groupby("quantity"):
        words = "difference in the share recovered" if quantity == "recovered" else "difference in effect"
        names = [f"{labels[a]} − {labels[b]}" for a, b in zip(pairs["a"], pairs["b"], strict=True)]
        picks = dict(zip(zip(pairs["a"], pairs["b"], strict=True), names[:MAX_PAIRS], strict=False))
        chart = Chart(
            _difference_profile(comparison.differences, picks, words),
            f"Paired {words} by layer, with intervals",
            f"{words}, run a − run b",
        )
        places = [
            f"{name}: {tables.describe_patch(row)}" for name, row in zip(names, pairs.to_dict("records"), strict=True)
        ]
        rows = pairs[["low", "high"]].assign(row=places, value=pairs["difference"], total=np.nan)[:MAX_FILE_PAIRS]
        intervals = Intervals(rows, f"{words}, a − b, where it is largest", {})
        images = layout.count_words(pairs["n"], "image")
        corrected = ": see the corrected p" if quantity == "effect" else ""
        lines = [
            f"n = {images} included in both; 95 % intervals, both runs resampled together",
            f"each the largest of its layers{corrected}",
        ]
        lines += [f"the {len(rows)} largest of {len(pairs)} pairs"] * (len(rows) < len(pairs))
        in_file, name = [replace(chart, drawing=intervals)], f"differences_{quantity}"
        yield Figure("differences", name, "paired differences", lines, [chart], in_file, FIGURE_WIDTH)


def _difference_profile(differences: pd.DataFrame, picks: Mapping[tuple[str, str], str], words: str) -> Profile:
    """Differences by layer of the pairs in ``picks``; ``line`` is what differs between the rows of one layer."""
    rows_by_pair = []
    for pair, rows in differences.groupby(["a", "b"], sort=False):
        if pair in picks:
            lines = series_names(rows.assign(window=rows["window_a"]))
            rows_by_pair.append(rows.assign(line=lines, pick=picks[pair], clipped=False))
    table = layout.shorten_line_names(pd.concat(rows_by_pair, ignore_index=True))
    records = tables.with_interval_names(table).to_dict("records")
    columns = ["line", "pick", "layer", "difference", "low", "high", "clipped"]
    rows = table[columns].rename(columns={"difference": "value"})
    rows = rows.assign(place=[tables.describe_patch(row) for row in records])
    for name, key in (("words", "difference"), ("a", "value_a"), ("b", "value_b")):
        rows[name] = [tables.difference_cell(row, key).text for row in records]
    ends = rows[["value", "low", "high"]].to_numpy(float)
    limit = 1.05 * max(float(np.abs(ends[np.isfinite(ends)]).max()), 0.01)
    names = None if rows["line"].nunique() <= layout.MAX_SERIES else []
    tooltips = {"pick": "pair", "place": "place", "words": "a − b [95 %]", "a": "a", "b": "b"}
    options = list(dict.fromkeys(picks.values()))
    return Profile(rows, words, (-limit, limit), tooltips, names, height=240, picks=options)


def _rank_correlation_figure(comparison: Comparison, addresses: Mapping[str, str]) -> Iterator[Figure]:
    """Runs × runs, where there are several and they have layers enough for ranks."""
    table = comparison.rank_correlation
    if table.where(~np.eye(len(table), dtype=bool)).notna().any(axis=None):
        first = table.iloc[:MAX_FILE_ROWS, :MAX_FILE_ROWS]
        charts = [[_rank_correlation_chart(part, list(table.index), addresses)] for part in (table, first)]
        words, lines = "rank correlation of layer profiles", ["Spearman's, of the series that has the peak"]
        yield Figure("rank", "rank_correlation", words, lines, *charts, LAYER_WIDTH * len(first))


def _rank_correlation_chart(table: pd.DataFrame, runs: Sequence[str], addresses: Mapping[str, str]) -> Chart:
    labels = short_labels(runs)
    cells = [
        {
            "row": labels[a],
            "column": labels[b],
            "value": np.nan if a == b else value,
            "sure": False,
            "words": "" if a == b else tables.format_number(value, ".2f"),
        }
        for a, row in table.iterrows()
        for b, value in row.items()
    ]
    values = pd.DataFrame(cells)["value"]
    lowest = None if values.min() < 0 else np.floor(10 * min(values.min(), 0.9) + 1e-9) / 10  # of rounded tenths
    names = [labels[run] for run in table.index]
    heatmap = Heatmap(
        rows=pd.DataFrame(cells),
        row_names=names,
        column_names=names,
        column_title=None,
        title="rank correlation of profiles",
        limit=values.abs().max() if lowest is None else 1.0,
        lowest=lowest,
        tooltips={"row": "row", "column": "column", "words": "rank correlation"},
        addresses={labels[run]: addresses[run] for run in table.index},
        words="words" if len(names) <= MAX_RANK_WORDS else "",
    )
    caption = "A cell leads to the folder of its row’s run."
    return Chart(heatmap, "Heatmap of rank correlations, run by run", caption, wide=True)


def _relative_depth_figure(comparison: Comparison) -> Iterator[Figure]:
    """Shares recovered by relative depth, where runs have different depths."""
    table = layout.lines_table(comparison)
    table = table[table["recovered"].notna()]
    if comparison.overview["depth"].nunique() < 2 or table["run"].nunique() < 2:
        return
    table, truncation = layout.legend_lines(table, with_depth=True)
    rows, scale, note = layout.clip_intervals(layout.profile_rows(table, "recovered"))
    rows = rows.assign(relative_depth=table["relative_depth"].to_numpy())
    x = ("relative_depth", "relative depth, (layer + ½) / blocks")
    title, tooltips = "share of the total effect recovered", layout.TOOLTIPS | {"relative_depth": "relative depth"}
    profile, words = Profile(rows, title, scale, tooltips, x=x, height=300), "; ".join(filter(None, (truncation, note)))
    charts = [Chart(profile, "Share recovered by relative depth", words)]
    lines = [f"{layout.describe_sample(comparison.overview)}; {INTERVALS}", words]
    yield Figure("depth", "relative_depth", "runs by relative depth", lines, charts, charts, FIGURE_WIDTH)
