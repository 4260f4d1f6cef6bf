"""Comparison → the charts of its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from vitpatch.compare.cells import run_links
from vitpatch.compare.charts import Chart, Heatmap, Profile, intervals, picked_profile
from vitpatch.compare.comparison import Comparison
from vitpatch.compare.layout import (
    MOST_BESIDE,
    MOST_SERIES,
    Grid,
    grids,
    images_of,
    least_to_most,
    lines,
    overlaid,
    scale_of,
    window_heading,
)
from vitpatch.compare.page_tables import difference_form, largest, place_words, said_estimate, said_number
from vitpatch.compare.run_labels import LONGEST, elided, run_labels, short_labels
from vitpatch.plots.profile import clipped_of
from vitpatch.plots.style import METRIC_NAMES
from vitpatch.stats.result import series_of
from vitpatch.types import Metric

MOST_DOTS = 200
"""Points of a run's patches in a panel; of more those with the largest effects."""
LEADS = "A cell leads to its run’s folder."
MOST_PAIRS = 40
"""Pairs of runs whose differences are drawn, from the largest on."""
SAID = ("line", "layer", "layers patched", "effect [95 %]", "recovered [95 %]", "p, corrected")
Records = list[dict[str, Any]]


def axis_words(metric: str) -> str:
    """The axis of effects on a metric."""
    return f"effect on the {METRIC_NAMES[Metric(metric)]}"


def records(rows: pd.DataFrame, column: str = "effect") -> Records:
    """Rows of ``profiles`` with a ``line`` as a chart has them."""
    clipped = clipped_of(rows)
    return [
        {
            "line": row["line"],
            "layer": row["layer"],
            "value": row[column],
            "low": row.get(f"{column}_low", np.nan),
            "high": row.get(f"{column}_high", np.nan),
            "clipped": bool(is_clipped),
            "layers patched": _layers_words(row),
            "effect [95 %]": said_estimate(row, "effect"),
            "recovered [95 %]": said_estimate(row, "recovered", ".0%"),
            "p, corrected": said_number(row.get("p"), ".4f"),
        }
        for row, is_clipped in zip(rows.to_dict("records"), clipped, strict=True)
    ]


def _layers_words(row: Mapping[str, Any]) -> str:
    first, last = row["first_layer"], row["last_layer"]
    return f"{first}" if first == last else f"{first}–{last}"


def grid(comparison: Comparison) -> list[tuple[Grid, list[list[Chart | None]]]]:
    """For each grid its charts, corruption × window; ``None`` where nothing was run."""
    found = []
    for one in grids(comparison):
        scale = scale_of(comparison, one.metric)
        cells = [
            [_panel(comparison, one, (corruption, window), scale) for window in one.windows]
            for corruption in one.corruptions
        ]
        found.append((one, cells))
    return found


def _panel(comparison: Comparison, of: Grid, place: tuple[str, str], scale: tuple[float, float]) -> Chart | None:
    panel = of.panels.get(place)
    if panel is None:
        return None
    corruption, window = place
    runs = comparison.overview.set_index("run", drop=False).loc[list(panel.runs)].to_dict("records")
    rows, is_joined = _shortened(panel.rows), len(panel.lines) <= MOST_SERIES or len(panel.runs) > 1
    if len(panel.lines) > MOST_SERIES and len(rows) > MOST_DOTS:
        rows = rows.loc[rows["effect"].abs().nlargest(MOST_DOTS).index].sort_index()
    names = list(dict.fromkeys(rows["line"])) if is_joined else []
    said = [name for name in SAID if name != "line" or panel.lines != [""]]
    profile = Profile(records(rows), names, None, scale, said, totals=_totals(runs, rows), joined=is_joined)
    words = window_heading(window)
    note = (
        f"; the {len(rows)} of {len(panel.rows)} patches with the largest effects"
        if len(rows) < len(panel.rows)
        else ""
    )
    named = run_labels(panel.runs) if len(runs) > 1 else {}
    links = [
        replace(link, word=f"{named[run['run']]}: {link.word}") if named else link
        for run in runs
        for link in run_links(run)
    ]
    label = f"{corruption}, {words}: mean effect by layer, {_sample(runs)}"
    return Chart(profile.spec(), label, f"{corruption}, {words} ({_sample(runs)}{note})", links)


def _sample(runs: Sequence[Mapping[str, Any]]) -> str:
    images, clusters = (least_to_most([run[name] for run in runs]) for name in ("n", "n_clusters"))
    return f"n = {images} in {clusters} clusters"


def _totals(runs: Sequence[Mapping[str, Any]], rows: pd.DataFrame) -> Records:
    """Total effects of the runs of a panel, which has these rows; of a run with several lines in the first one's
    colour."""
    first = rows.drop_duplicates("run").set_index("run")["line"]
    return [
        {"run": run["run"], "line": first[run["run"]], "value": run["total_effect"]}
        | {"total effect": said_estimate(dict(run), "total_effect")}
        for run in runs
        if np.isfinite(run["total_effect"]) and run["run"] in first
    ]


def _shortened(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose lines have names that a legend has room for, no two the same."""
    return rows.assign(line=rows["line"].map(elided(list(dict.fromkeys(rows["line"])), LONGEST)))


def _with_images(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Rows of the first ``MOST_BESIDE`` lines, named shortly and with their images; and in words what is left out."""
    lines = list(dict.fromkeys(rows["line"]))
    rows = _shortened(rows[rows["line"].isin(lines[:MOST_BESIDE])])
    images = {line: f"{line} ({images_of([of_line])})".strip() for line, of_line in rows.groupby("line", sort=False)}
    more = f"the first {MOST_BESIDE} of {len(lines)} lines" if len(lines) > MOST_BESIDE else ""
    return rows.assign(line=rows["line"].map(images)), more


def overlays(comparison: Comparison) -> list[tuple[Grid, list[Chart]]]:
    """For each grid with several corruptions a chart a window, all corruptions in it."""
    found = []
    for one in grids(comparison):
        scale = scale_of(comparison, one.metric)
        charts = [chart for window in one.windows if (chart := _overlay(one, window, scale)) is not None]
        if charts:
            found.append((one, charts))
    return found


def _overlay(of: Grid, window: str, scale: tuple[float, float]) -> Chart | None:
    if sum((corruption, window) in of.panels for corruption in of.corruptions) < 2:
        return None
    named = overlaid(of, window)
    rows, more = _with_images(pd.concat([rows.assign(line=name) for name, rows in named.items()], ignore_index=True))
    names = list(dict.fromkeys(rows["line"]))
    profile = Profile(records(rows), names, axis_words(of.metric), scale, SAID, height=280)
    words = window_heading(window)
    return Chart(profile.spec(), f"All corruptions by layer, {words}", f"{words}; {more}" if more else words)


def heatmaps(comparison: Comparison) -> list[Chart]:
    """Run × layer, a chart a metric."""
    table = lines(comparison)
    metric_of, folders = comparison.overview.set_index("run")["metric"], _folders(comparison)
    found = []
    for metric in dict.fromkeys(metric_of):
        rows = _shortened(table[table["run"].map(metric_of) == metric])
        cells = [
            one | {"row": one["line"], "column": one["layer"], "sure": low > 0 or high < 0}
            for one, low, high in zip(records(rows), rows["effect_low"], rows["effect_high"], strict=True)
        ]
        names, layers = list(dict.fromkeys(rows["line"])), sorted(set(rows["layer"]))
        limit = float(np.nanmax(np.abs(rows["effect"].to_numpy(float)), initial=0))
        addresses = {line: folders[run] for line, run in zip(rows["line"], rows["run"], strict=True)}
        heatmap = Heatmap(cells, names, layers, "layer", axis_words(metric), limit, SAID, addresses)
        found.append(Chart(heatmap.spec(), f"Heatmap of effects, run by layer, on {metric}", LEADS, wide=True))
    return found


def peaks(comparison: Comparison) -> list[Chart]:
    """The peak's effect of each run with its interval, a chart a metric."""
    labels, folders = _labels(comparison), _folders(comparison)
    found = []
    for metric, runs in comparison.overview.groupby("metric", sort=False):
        rows = [
            {
                "row": labels[run["run"]],
                "value": run["peak_effect"],
                "low": run["peak_effect_low"],
                "high": run["peak_effect_high"],
                "total": run["total_effect"],
                "run": run["run"],
                "href": folders[run["run"]],
                "peak": run["peak_place"] or "none",
                "peak effect [95 %]": said_estimate(run, "peak_effect"),
                "total effect": said_estimate(run, "total_effect"),
            }
            for run in runs.to_dict("records")
        ]
        said = ["run", "peak", "peak effect [95 %]", "total effect"]
        chart = intervals(rows, axis_words(str(metric)), said)
        found.append(Chart(chart, f"Peak effect of each run on {metric}, with intervals"))
    return found


def differences(comparison: Comparison) -> list[Chart]:
    """Differences by layer, with intervals, of a pair that is picked from a list: a chart a quantity."""
    labels = _labels(comparison)
    found = []
    for quantity in ("effect", "recovered"):
        pairs = [row for row in largest(comparison.differences) if row["quantity"] == quantity][:MOST_PAIRS]
        if not pairs:
            continue
        picks = {(row["a"], row["b"]): f"{labels[row['a']]} − {labels[row['b']]}" for row in pairs}
        of_pairs = _of_pairs(comparison.differences, picks)
        short = elided(list(dict.fromkeys(row["line"] for row in of_pairs)), LONGEST)
        rows = [_difference(row | {"line": short[row["line"]]}, picks) for row in of_pairs]
        words = "difference in the share recovered" if quantity == "recovered" else "difference in effect"
        names = list(dict.fromkeys(row["line"] for row in rows))
        said = ["pick", "place", "a − b [95 %]", "a", "b"]
        is_joined = len(names) <= MOST_SERIES
        profile = Profile(rows, names if is_joined else [], words, _domain(rows), said, joined=is_joined, height=240)
        chart = picked_profile(profile, list(dict.fromkeys(picks.values())))
        found.append(Chart(chart, f"Paired {words} by layer, with intervals", f"{words}, run a − run b", wide=False))
    return found


def _domain(rows: Records) -> tuple[float, float]:
    """One scale for all pairs, around 0."""
    ends = np.array([[row["value"], row["low"], row["high"]] for row in rows], float)
    limit = 1.05 * max(float(np.nanmax(np.abs(ends))), 0.01)
    return -limit, limit


def _of_pairs(differences: pd.DataFrame, picks: Mapping[tuple[str, str], str]) -> Records:
    """The rows of pairs that are drawn; ``line`` tells those of one layer apart."""
    pairs = [rows for names, rows in differences.groupby(["a", "b"], sort=False) if names in picks]
    return [
        row
        for rows in pairs
        for row in rows.assign(line=series_of(rows.assign(window=rows["window_a"]))).to_dict("records")
    ]


def _difference(row: dict[str, Any], picks: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    form = difference_form(row["quantity"])
    return {
        "pick": picks[row["a"], row["b"]],
        "line": row["line"],
        "layer": row["layer"],
        "value": row["difference"],
        "low": row["low"],
        "high": row["high"],
        "clipped": False,
        "place": place_words(row),
        "a − b [95 %]": said_estimate(
            row | {"difference_low": row["low"], "difference_high": row["high"]}, "difference", form
        ),
        "a": said_number(row["value_a"], form),
        "b": said_number(row["value_b"], form),
    }


def _labels(comparison: Comparison) -> dict[str, str]:
    return short_labels(list(comparison.overview["run"]))


def _folders(comparison: Comparison) -> dict[str, str]:
    """By run's name the address of its folder."""
    return {row["run"]: run_links(row)[0].address for row in comparison.overview.to_dict("records")}


def rank_correlation(comparison: Comparison) -> Chart:
    """Runs × runs."""
    table = comparison.rank_correlation
    labels = _labels(comparison)
    rows = [
        {
            "row": labels[a],
            "column": labels[b],
            "value": table.loc[a, b],
            "sure": False,
            "rank correlation": said_number(table.loc[a, b], ".2f"),
        }
        for a in table.index
        for b in table.columns
    ]
    said = ("row", "column", "rank correlation")
    names, folders = list(labels.values()), {labels[run]: folder for run, folder in _folders(comparison).items()}
    return Chart(
        Heatmap(rows, names, names, None, "rank correlation of profiles", 1.0, said, folders).spec(),
        "Heatmap of rank correlations, run by run",
        "A cell leads to the folder of its row’s run.",
        wide=True,
    )


def relative_depths(comparison: Comparison) -> list[Chart]:
    """Shares recovered by relative depth, where runs have different depths."""
    if comparison.overview["depth"].nunique() < 2:
        return []
    table = lines(comparison)
    table = table[table["recovered"].notna()]
    if table["run"].nunique() < 2:
        return []
    table, more = _with_images(table)
    rows = [
        one | {"relative_depth": depth}
        for one, depth in zip(records(table, "recovered"), table["relative_depth"], strict=True)
    ]
    names, said = list(dict.fromkeys(table["line"])), (*SAID, "relative_depth")
    profile = Profile(
        rows,
        names,
        "share of the total effect recovered",
        None,
        said,
        x=("relative_depth", "relative depth"),
        height=300,
    )
    return [Chart(profile.spec(), "Share recovered by relative depth", more)]
