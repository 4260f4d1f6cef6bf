"""Comparison → its charts: the same for the page, with captions and links, and for PNG and SVG files, with titles."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from vitpatch.compare.charts import Heatmap, Intervals, Profile, Spec, inline_data, spec_of
from vitpatch.compare.layout import (
    MAX_SERIES,
    TOOLTIPS,
    Grid,
    Panel,
    effect_range,
    effect_title,
    format_counts,
    grids,
    legend_lines,
    lines_table,
    overlay_rows,
    profile_rows,
    sample_words,
    short_lines,
    window_heading,
)
from vitpatch.compare.load import Comparison
from vitpatch.compare.tables import (
    Link,
    describe_patch,
    difference_cell,
    difference_format,
    estimate_of,
    format_estimate,
    format_number,
    largest_differences,
    run_links,
)
from vitpatch.stats.result import series_names
from vitpatch.titles import run_labels, short_labels

MAX_DOTS = 200
"""Points of a panel with many series; of more those with the largest effects."""
MAX_PAIRS = 40
"""Pairs of runs whose differences by layer can be picked, from the largest on."""
MAX_FILE_ROWS, MAX_FILE_PAIRS = 60, 30
"""Runs, or pairs of runs, of a figure in a file that has a row each."""
MAX_RANK_WORDS = 20
"""Runs of a rank correlation whose cells have their numbers in a file."""
PANEL_WIDTH, FIGURE_WIDTH, LAYER_WIDTH, TITLE_LETTERS = 250, 560, 34, 110
"""Pixels of a panel, of a single chart, and of a heatmap's column, in a file; letters of a line of its title."""
FILES = re.compile(
    r"(grid|overlay|heatmap|peaks|differences|rank_correlation|relative_depth)(_[a-z0-9_]+)?[.](png|svg)"
)
"""Names of the files that figures are saved to."""
INTERVALS = "95 % bootstrap intervals over clusters"


@dataclass(frozen=True)
class Chart:
    """A chart of the page: ``label`` for a reader who does not see it, ``caption`` and ``links`` at it; ``wide`` ones
    scroll where the page is narrow."""

    drawing: Profile | Heatmap | Intervals
    label: str
    caption: str = ""
    links: Sequence[Link] = ()
    wide: bool = False

    @property
    def spec(self) -> Spec:
        """As Vega-Lite, for the page."""
        return spec_of(self.drawing.chart())


def grid_charts(comparison: Comparison) -> list[tuple[Grid, list[Chart | None]]]:
    """For each grid its panels by row, corruption × window; ``None`` where nothing was run."""
    overview, charts = comparison.overview.set_index("run", drop=False), []
    for grid in grids(comparison):
        scale = effect_range(comparison, grid.metric)
        places = [(corruption, window) for corruption in grid.corruptions for window in grid.windows]
        panels = [
            _panel_chart(grid.panels[place], overview, place, scale) if place in grid.panels else None
            for place in places
        ]
        charts.append((grid, panels))
    return charts


def _panel_chart(panel: Panel, overview: pd.DataFrame, place: tuple[str, str], scale: tuple[float, float]) -> Chart:
    runs = overview.loc[list(panel.runs)].to_dict("records")
    rows, is_joined = short_lines(panel.rows), len(panel.lines) <= MAX_SERIES or len(panel.runs) > 1
    note = ""
    if len(panel.lines) > MAX_SERIES and len(rows) > MAX_DOTS:
        note = f"; the {MAX_DOTS} of {len(rows)} patches with the largest effects"
        rows = rows.loc[rows["effect"].abs().nlargest(MAX_DOTS).index].sort_index()
    names = list(dict.fromkeys(rows["line"])) if is_joined else []
    tooltips = {key: title for key, title in TOOLTIPS.items() if key != "line" or panel.lines != [""]}
    profile = Profile(profile_rows(rows), names, None, scale, tooltips, totals=_totals(runs, rows))
    corruption, words = place[0], window_heading(place[1])
    labels = run_labels(panel.runs) if len(runs) > 1 else {}
    links = [
        replace(link, word=f"{labels[run['run']]}: {link.word}") if labels else link
        for run in runs
        for link in run_links(run)
    ]
    sample = sample_words(pd.DataFrame(runs))
    label = f"{corruption}, {words}: mean effect by layer, {sample}"
    return Chart(profile, label, f"{corruption}, {words} ({sample}{note})", links)


def _totals(runs: Sequence[Mapping[str, Any]], rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Total effects of the runs of a panel with these rows; of a run with several lines in the first one's colour."""
    first = rows.drop_duplicates("run").set_index("run")["line"]
    return [
        {
            "run": run["run"],
            "line": first[run["run"]],
            "value": run["total_effect"],
            "words": format_estimate(*estimate_of(run, "total_effect")),
        }
        for run in runs
        if np.isfinite(run["total_effect"]) and run["run"] in first
    ]


def overlay_charts(comparison: Comparison) -> list[tuple[Grid, list[Chart]]]:
    """For each grid a chart a window with all its corruptions, where there are several."""
    overlays = []
    for grid in grids(comparison):
        scale, title, charts = effect_range(comparison, grid.metric), effect_title(grid.metric), []
        for window in grid.windows:
            if sum((corruption, window) in grid.panels for corruption in grid.corruptions) > 1:
                rows, more = legend_lines(overlay_rows(grid, window))
                names, words = list(dict.fromkeys(rows["line"])), window_heading(window)
                profile = Profile(profile_rows(rows), names, title, scale, TOOLTIPS, height=280)
                caption = f"{words}; {more}" if more else words
                charts.append(Chart(profile, f"All corruptions by layer, {words}", caption))
        overlays.append((grid, charts))
    return overlays


def heatmap_charts(comparison: Comparison, most: int | None = None) -> dict[str, Chart]:
    """Run × layer, a chart a metric, of the first ``most`` lines."""
    table, folders, charts = lines_table(comparison), _addresses(comparison), {}
    metrics = comparison.overview.set_index("run")["metric"]
    for metric in dict.fromkeys(metrics):
        rows = short_lines(table[table["run"].map(metrics) == metric])
        names = list(dict.fromkeys(rows["line"]))[:most]
        rows = rows[rows["line"].isin(names)]
        cells = profile_rows(rows).rename(columns={"line": "row"})
        cells = cells.assign(column=cells["layer"], sure=(cells["low"] > 0) | (cells["high"] < 0))
        cells = cells.drop(columns=["low", "high", "clipped"])
        layers, limit = sorted(set(rows["layer"])), float(np.nanmax(np.abs(rows["effect"].to_numpy(float)), initial=0))
        addresses = {line: folders[run] for line, run in zip(rows["line"], rows["run"], strict=True)}
        tooltips = {"row" if key == "line" else key: title for key, title in TOOLTIPS.items()}
        heatmap = Heatmap(cells, names, layers, "layer", effect_title(metric), limit, tooltips, addresses)
        label = f"Heatmap of effects, run by layer, on {metric}"
        charts[metric] = Chart(heatmap, label, "A cell leads to its run’s folder.", wide=True)
    return charts


def peak_charts(comparison: Comparison) -> dict[str, Chart]:
    """The peak effect of each run with its interval, a chart a metric."""
    labels, addresses, charts = short_labels(list(comparison.overview["run"])), _addresses(comparison), {}
    tooltips = {"run": "run", "peak": "peak", "words": "peak effect [95 %]", "total_words": "total effect"}
    for metric, runs in comparison.overview.groupby("metric", sort=False):
        records = runs.to_dict("records")
        rows = {
            "row": [f"{labels[run['run']]}, {run['peak_place'] or 'no peak'}" for run in records],
            "value": runs["peak_effect"],
            "low": runs["peak_effect_low"],
            "high": runs["peak_effect_high"],
            "total": runs["total_effect"],
            "run": runs["run"],
            "href": [addresses[run["run"]] for run in records],
            "peak": [run["peak_place"] or "none" for run in records],
            "words": [format_estimate(*estimate_of(run, "peak_effect")) for run in records],
            "total_words": [format_estimate(*estimate_of(run, "total_effect")) for run in records],
        }
        intervals = Intervals(pd.DataFrame(rows), effect_title(str(metric)), tooltips)
        charts[str(metric)] = Chart(intervals, f"Peak effect of each run on {metric}, with intervals")
    return charts


def difference_charts(comparison: Comparison) -> list[Chart]:
    """Differences by layer, with intervals, of a pair that is picked from a list: a chart a quantity."""
    labels, charts = short_labels(list(comparison.overview["run"])), []
    for quantity in ("effect", "recovered"):
        pairs = [row for row in largest_differences(comparison.differences) if row["quantity"] == quantity]
        if not pairs:
            continue
        picks = {(row["a"], row["b"]): f"{labels[row['a']]} − {labels[row['b']]}" for row in pairs[:MAX_PAIRS]}
        rows = _difference_rows(comparison.differences, picks)
        limit = 1.05 * max(float(np.nanmax(np.abs(rows[["value", "low", "high"]].to_numpy(float)))), 0.01)
        lines = list(dict.fromkeys(rows["line"]))
        names, words = lines if len(lines) <= MAX_SERIES else [], _difference_title(quantity)
        tooltips = {"pick": "pair", "place": "place", "words": "a − b [95 %]", "a": "a", "b": "b"}
        options = list(dict.fromkeys(picks.values()))
        profile = Profile(rows, names, words, (-limit, limit), tooltips, height=240, picks=options)
        charts.append(Chart(profile, f"Paired {words} by layer, with intervals", f"{words}, run a − run b"))
    return charts


def _difference_title(quantity: str) -> str:
    return "difference in the share recovered" if quantity == "recovered" else "difference in effect"


def _difference_rows(differences: pd.DataFrame, picks: Mapping[tuple[str, str], str]) -> pd.DataFrame:
    """The rows of the pairs in ``picks``; ``line`` is what differs between those of one layer."""
    tables = []
    for pair, rows in differences.groupby(["a", "b"], sort=False):
        if pair in picks:
            lines = series_names(rows.assign(window=rows["window_a"]))
            tables.append(rows.assign(line=lines, pick=picks[pair], value=rows["difference"], clipped=False))
    table = short_lines(pd.concat(tables, ignore_index=True))
    records = table.to_dict("records")
    words = {
        "place": [describe_patch(row) for row in records],
        "words": [difference_cell(row, "difference", "low", "high").text for row in records],
        "a": [format_number(row["value_a"], difference_format(row["quantity"])) for row in records],
        "b": [format_number(row["value_b"], difference_format(row["quantity"])) for row in records],
    }
    return table[["line", "pick", "layer", "value", "low", "high", "clipped"]].assign(**words)


def _addresses(comparison: Comparison) -> dict[str, str]:
    """By run's name the address of its folder."""
    return {row["run"]: run_links(row)[0].address for row in comparison.overview.to_dict("records")}


def rank_correlation_chart(comparison: Comparison, most: int | None = None) -> Chart:
    """Runs × runs, of the first ``most`` runs."""
    table, labels = comparison.rank_correlation.iloc[:most, :most], short_labels(list(comparison.overview["run"]))
    cells = [
        {"row": labels[a], "column": labels[b], "value": value, "sure": False, "words": format_number(value, ".2f")}
        for a, row in table.iterrows()
        for b, value in row.items()
    ]
    names = [labels[run] for run in table.index]
    addresses = {labels[run]: address for run, address in _addresses(comparison).items() if run in table.index}
    tooltips = {"row": "row", "column": "column", "words": "rank correlation"}
    words = "words" if len(names) <= MAX_RANK_WORDS else ""
    title = "rank correlation of profiles"
    heatmap = Heatmap(pd.DataFrame(cells), names, names, None, title, 1.0, tooltips, addresses, words)
    caption = "A cell leads to the folder of its row’s run."
    return Chart(heatmap, "Heatmap of rank correlations, run by run", caption, wide=True)


def relative_depth_chart(comparison: Comparison) -> Chart | None:
    """Shares recovered by relative depth, where runs have different depths."""
    table = lines_table(comparison)
    table = table[table["recovered"].notna()]
    if comparison.overview["depth"].nunique() < 2 or table["run"].nunique() < 2:
        return None
    table, more = legend_lines(table, with_depth=True)
    rows = profile_rows(table, "recovered").assign(relative_depth=table["relative_depth"].to_numpy())
    names, x = list(dict.fromkeys(table["line"])), ("relative_depth", "relative depth, (layer + ½) / blocks")
    title, tooltips = "share of the total effect recovered", TOOLTIPS | {"relative_depth": "relative depth"}
    profile = Profile(rows, names, title, None, tooltips, x=x, height=300)
    return Chart(profile, "Share recovered by relative depth", more)


def file_figures(comparison: Comparison) -> dict[str, Any]:
    """The figures by the names of their files, as altair charts with titles; without those that show nothing."""
    figures: dict[str, Any] = {}
    grid_panels, overlays = grid_charts(comparison), overlay_charts(comparison)
    for number, ((grid, panels), (_, charts)) in enumerate(zip(grid_panels, overlays, strict=True), start=1):
        end, of_grid = f"_{number}" if len(overlays) > 1 else "", f" – {grid.title}" if grid.title else ""
        runs = comparison.overview[comparison.overview["run"].isin({r for p in grid.panels.values() for r in p.runs})]
        lines = [
            f"{sample_words(runs)}; {INTERVALS}; dashed: total effect; hollow: window clipped at the network's end"
        ]
        figure = alt.concat(*_file_panels(grid, panels), columns=len(grid.windows))
        figures[f"grid{end}"] = _titled(figure, comparison, f"profiles{of_grid}", lines)
        if charts:
            panels = [_captioned(chart.drawing.chart(FIGURE_WIDTH * 2 // 3), chart.caption) for chart in charts]
            lines = [f"{sample_words(runs)}; {INTERVALS}"]
            figures[f"overlay{end}"] = _titled(
                alt.hconcat(*panels), comparison, f"corruptions overlaid{of_grid}", lines
            )
    figures |= _heatmap_figures(comparison) | _peak_figures(comparison) | _difference_figures(comparison)
    if len(comparison.runs) > 1:
        chart = rank_correlation_chart(comparison, MAX_FILE_ROWS)
        drawn = chart.drawing.chart(LAYER_WIDTH * len(chart.drawing.row_names))
        words, lines = "rank correlation of layer profiles", ["Spearman's, of the series that has the peak"]
        figures["rank_correlation"] = _titled(drawn, comparison, words, lines)
    if (chart := relative_depth_chart(comparison)) is not None:
        drawn = chart.drawing.chart(FIGURE_WIDTH)
        lines = [f"{sample_words(comparison.overview)}; {INTERVALS}", chart.caption]
        figures["relative_depth"] = _titled(drawn, comparison, "runs by relative depth", lines)
    return figures


def _titled(figure: Any, comparison: Comparison, words: str, lines: Sequence[str]) -> Any:
    """A figure with a title: what it shows, of what (as far as all runs share it), and ``lines``."""
    overview = comparison.overview
    shared = [
        overview[name].iloc[0] for name in ("model", "data", "site", "direction") if overview[name].nunique() == 1
    ]
    subtitle = [part for line in (", ".join(shared), *lines) for part in textwrap.wrap(line, TITLE_LETTERS)]
    return figure.properties(title=alt.TitleParams(text=textwrap.wrap(words, TITLE_LETTERS), subtitle=subtitle))


def _captioned(chart: alt.LayerChart, caption: str) -> alt.LayerChart:
    lines = textwrap.wrap(caption, 48)
    return chart.properties(title=alt.TitleParams(text=lines, fontSize=11, fontWeight="normal", offset=6))


def _file_panels(grid: Grid, panels: Sequence[Chart | None]) -> list[alt.LayerChart]:
    """The panels of a grid, lines in the same colours in all; the first of each row has the title of the axis."""
    profiles = [panel.drawing for panel in panels if panel is not None]
    names = list(dict.fromkeys(name for profile in profiles for name in profile.names))
    drawn = []
    for number, panel in enumerate(panels):
        if panel is None:
            text = alt.Chart(inline_data([{}])).mark_text(color="#57606a").encode(text=alt.value("not run"))
            drawn.append(text.properties(width=PANEL_WIDTH, height=profiles[0].height))
            continue
        title = None if number % len(grid.windows) else textwrap.wrap(effect_title(grid.metric), 28)
        profile = replace(panel.drawing, title=title, names=names if panel.drawing.names else [])
        drawn.append(_captioned(profile.chart(PANEL_WIDTH), panel.caption))
    return drawn


def _heatmap_figures(comparison: Comparison) -> dict[str, Any]:
    charts, figures = heatmap_charts(comparison, MAX_FILE_ROWS), {}
    for metric, chart in charts.items():
        runs = comparison.overview[comparison.overview["metric"] == metric]
        names, layers = chart.drawing.row_names, chart.drawing.column_names
        lines = [f"{sample_words(runs)}; dot: 95 % interval without 0"]
        lines += [f"the first {MAX_FILE_ROWS} rows"] * (len(names) == MAX_FILE_ROWS)
        drawn = _titled(chart.drawing.chart(max(240, LAYER_WIDTH * len(layers))), comparison, "run × layer", lines)
        figures[f"heatmap_{metric}" if len(charts) > 1 else "heatmap"] = drawn
    return figures


def _peak_figures(comparison: Comparison) -> dict[str, Any]:
    charts, figures = peak_charts(comparison), {}
    for metric, chart in charts.items():
        runs = comparison.overview[comparison.overview["metric"] == metric]
        rows = chart.drawing.rows[chart.drawing.rows["value"].notna()]
        if len(rows):
            lines = [f"{sample_words(runs)}; {INTERVALS}; orange: total effect"]
            lines += [f"the first {MAX_FILE_ROWS} of {len(rows)} runs"] * (len(rows) > MAX_FILE_ROWS)
            drawn = replace(chart.drawing, rows=rows[:MAX_FILE_ROWS]).chart(FIGURE_WIDTH)
            name = f"peaks_{metric}" if len(charts) > 1 else "peaks"
            figures[name] = _titled(drawn, comparison, "peak of each run", lines)
    return figures


def _difference_figures(comparison: Comparison) -> dict[str, Any]:
    """Of each pair the largest difference, with its interval."""
    labels, figures = short_labels(list(comparison.overview["run"])), {}
    largest = largest_differences(comparison.differences)
    for quantity in ("effect", "recovered"):
        pairs = [row for row in largest if row["quantity"] == quantity]
        if not pairs:
            continue
        shown = pd.DataFrame(pairs[:MAX_FILE_PAIRS])
        names = [f"{labels[row['a']]} − {labels[row['b']]}: {describe_patch(row)}" for row in shown.to_dict("records")]
        rows = shown[["low", "high"]].assign(row=names, value=shown["difference"], total=np.nan)
        title = f"{_difference_title(quantity)}, a − b, where it is largest"
        counts = [row["n"] for row in pairs]
        images = f"n = {format_counts(counts)} image{'s' * (max(counts) != 1)} included in both"
        corrected = ": see the corrected p" if quantity == "effect" else ""
        lines = [
            f"{images}; 95 % intervals, both runs resampled together",
            f"each the largest of its layers{corrected}",
        ]
        lines += [f"the {len(shown)} largest of {len(pairs)} pairs"] * (len(shown) < len(pairs))
        drawn = Intervals(rows, title, {}).chart(FIGURE_WIDTH)
        figures[f"differences_{quantity}"] = _titled(drawn, comparison, "paired differences", lines)
    return figures
