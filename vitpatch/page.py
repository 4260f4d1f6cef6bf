"""Comparison → its page: one HTML file with all that it needs, which asks nothing of any server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vitpatch import page_charts, page_tables
from vitpatch.cells import Table
from vitpatch.charts import Chart
from vitpatch.comparison import Comparison
from vitpatch.page_gallery import Album, albums
from vitpatch.store import written_beside

ASSETS = Path(__file__).parent / "assets" / "page"
LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js", "sortable.auto.min.js")
CONTROLS = {"effect": "donor’s effect", "effect_same_class": "another image of the class", "effect_other_class": "an image of another class"}
SYNERGY = {"synergy_prob": "synergy, probability", "synergy_log_odds": "synergy, log odds (nats)"}


@dataclass(frozen=True)
class Panels:
    """Charts in rows and columns; ``None`` is an empty place."""

    title: str
    columns: int
    charts: Sequence[Chart | None]


@dataclass(frozen=True)
class Section:
    """A part of the page: ``name`` in its address, what is said first, then panels, charts, tables and albums.

    A table with ``folded`` is behind a click.
    """

    name: str
    title: str
    lead: str
    panels: Sequence[Panels] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    albums: Sequence[Album] = ()
    facts: Sequence[tuple[str, str]] = ()


def write_page(comparison: Comparison, file: Path) -> None:
    """Writes the page of a comparison, by rename; its links are relative to the file's folder."""
    text = page(comparison)
    with written_beside(file) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def page(comparison: Comparison) -> str:
    """The page's text. All that is shown is escaped, and only the page's own scripts may run in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["embedded"] = embedded
    scripts = [_asset(name) for name in (*LIBRARIES, "page.js")]
    number = len(comparison.runs)
    return environment.get_template("page.html.jinja").render(
        title=f"Comparison of {number} runs" if number > 1 else comparison.overview["title"].iloc[0],
        warnings=comparison.warnings,
        sections=[section for section in sections(comparison) if not _is_empty(section)],
        scripts=[Markup(script) for script in scripts],  # noqa: S704 – files of this package
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        css=Markup(_asset("page.css")),  # noqa: S704
    )


def embedded(value: Any) -> Markup:
    """A value as JSON that no text in it can end the script element of."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)  # noqa: S704


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _is_empty(section: Section) -> bool:
    tables = [table for table in (*section.tables, *section.folded) if table.rows]
    return not (section.panels or section.charts or tables or section.albums or section.facts)


def sections(comparison: Comparison) -> Iterator[Section]:
    """The parts of the page, in order; some may be empty."""
    several = len(comparison.runs) > 1
    yield _what(comparison)
    yield _grid(comparison)
    yield Section(
        "overlay",
        "Corruptions overlaid",
        "The profiles of one window, one scale; a click in a legend picks one.",
        panels=[
            Panels(grid.title, min(2, len(charts)), charts) for grid, charts in page_charts.overlays(comparison)
        ],
    )
    yield Section(
        "heatmap",
        "Run × layer",
        "Mean effects. A frame: the 95 % interval leaves 0 out. Of a run with many series the one with the peak.",
        charts=page_charts.heatmaps(comparison),
    )
    yield _peaks(comparison)
    yield _differences(comparison)
    yield _matched(comparison)
    yield Section(
        "rank",
        "Rank correlation of profiles",
        "Spearman’s, of the series that has the peak; 1: the layers come in the same order.",
        charts=[page_charts.rank_correlation(comparison)] if several else [],
        folded=[page_tables.rank_correlation(comparison)] if several else [],
    )
    yield Section(
        "depth",
        "By relative depth",
        "Models of different depth, layer ℓ of L blocks at (ℓ + ½) / L.",
        charts=page_charts.relative_depths(comparison),
    )
    yield _beside(comparison, SYNERGY, "synergy", "Synergy of windows")
    yield _beside(comparison, CONTROLS, "controls", "Controls")
    made, said = albums(comparison)
    lead = "Images of each run, the metric as each layer is patched; green the clean run’s, orange and dashed the corrupted one’s. "
    yield Section("gallery", "Images", lead + said, albums=made)


def _what(comparison: Comparison) -> Section:
    several = len(comparison.runs) > 1
    lead = "The same in all runs:" if several else ""
    tables = [page_tables.what_was_run(comparison)]
    folded = [page_tables.settings(comparison)] if several and len(comparison.settings) else []
    return Section("what", "What was run", lead, tables=tables, folded=folded, facts=page_tables.common(comparison))


def _grid(comparison: Comparison) -> Section:
    metrics = dict.fromkeys(comparison.overview["metric"])
    what = "; ".join(page_charts.axis_words(metric) for metric in metrics)
    lead = (
        f"Mean {what}, by layer; a window stands at its centre. One scale. Ribbons and bars: 95 % bootstrap intervals over "
        "clusters. Dashed: total effect. Hollow: the window is clipped at the network’s end."
    )
    panels = [
        Panels(grid.title, len(grid.windows), [chart for row in cells for chart in row])
        for grid, cells in page_charts.grid(comparison)
    ]
    return Section("grid", "Layer profiles", lead, panels=panels)


def _peaks(comparison: Comparison) -> Section:
    lead = (
        "The layer whose mean effect goes furthest towards the total effect. p and the peak set (the layers that may be the "
        "peak) are corrected for all places tried; stability: the share of resamples with this peak; split halves: its effect, found on one half and measured on the other. The orange tick is the total effect."
    )
    return Section("peaks", "Peaks", lead, charts=page_charts.peaks(comparison), tables=[page_tables.peaks(comparison)])


def _differences(comparison: Comparison) -> Section:
    lead = (
        "Runs on the same images: effects of one corruption, or shares recovered across corruptions; intervals by resampling "
        "clusters once for both. A row is the patch where two runs differ most – the largest of many, so read it with its corrected p; differences.csv has all."
    )
    tables = [page_tables.differences(comparison)] if len(comparison.differences) else []
    folded = [page_tables.not_subtracted(comparison)] if len(comparison.not_subtracted) else []
    charts = page_charts.differences(comparison)
    return Section("differences", "Paired differences", lead, charts=charts, tables=tables, folded=folded)


def _matched(comparison: Comparison) -> Section:
    lead = "Runs of the folders that were given, matched by what they share."
    tables = [page_tables.matched(comparison)] if len(comparison.matched) else []
    return Section("matched", "Between groups", lead, tables=tables)


def _beside(comparison: Comparison, columns: dict[str, str], name: str, title: str) -> Section:
    """A table of columns that only some runs have."""
    own = {column: words for column, words in columns.items() if column != "effect"}
    is_there = any(column in comparison.profiles and comparison.profiles[column].notna().any() for column in own)
    leads = {
        "synergy": "A window’s effect beyond the sum of its layers’ own.",
        "controls": "The same patches with activations of other images.",
    }
    if not is_there:
        return Section(name, title, "")
    rows = comparison.profiles
    has = rows[[column for column in own if column in rows]].notna().any(axis=1)
    some = page_tables.beside(_with_profiles(comparison, rows[has]), columns, title)
    return Section(name, title, leads[name], folded=[some])


def _with_profiles(comparison: Comparison, rows: Any) -> Comparison:
    from dataclasses import replace

    return replace(comparison, profiles=rows)
