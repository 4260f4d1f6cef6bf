"""Comparison → the sections of its page, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vitpatch.compare import page_charts, page_tables
from vitpatch.compare.cells import Table
from vitpatch.compare.charts import Chart
from vitpatch.compare.comparison import Comparison
from vitpatch.compare.page_gallery import Album, albums

CONTROLS = {
    "effect": "donor’s effect",
    "effect_same_class": "another image of the class",
    "effect_other_class": "an image of another class",
}
SYNERGY = {"synergy_prob": "synergy, probability", "synergy_log_odds": "synergy, log odds (nats)"}
LEADS = {
    "grid": "Ribbons and bars: 95 % bootstrap intervals over clusters. Dashed: total effect. Hollow: the window is "
    "clipped at the network’s end.",
    "overlay": "The profiles of one window, one scale; a click in a legend picks one.",
    "heatmap": "Mean effects. A dot: the cell’s own 95 % interval leaves 0 out, not corrected for the many cells. Of a "
    "run with many series the one with the peak.",
    "peaks": "The layer whose mean effect goes furthest towards the total effect, which is the orange tick. p is "
    "of the effect in log odds, whatever the metric is, unless a run says test=headline. It and the peak set (the "
    "layers that may be the peak) are corrected for all places tried. Stability: share of resamples with this peak. "
    "Split halves: its effect, found on one half of the clusters and measured on the other.",
    "differences": "Runs on the same images: effects of one corruption, or shares recovered across corruptions; both "
    "runs are resampled together. A row is the patch where two runs differ most, so it is the largest of many: effects "
    "have a p corrected for that, shares have none, and their interval is too narrow. differences.csv has all.",
    "matched": "Runs of the folders that were given, matched by what they share.",
    "rank": "Spearman’s, of the series that has the peak. 1: the layers come in the same order; white: a profile "
    "that does not vary.",
    "depth": "Models of different depth: layer ℓ of L blocks is at (ℓ + ½) / L.",
    "synergy": "A window’s effect beyond the sum of its layers’ own.",
    "controls": "The same patches with activations of other images.",
    "gallery": "The metric as each layer is patched; green the clean run’s, orange and dashed the corrupted one’s.",
}


@dataclass(frozen=True)
class Panels:
    """Charts in rows and columns; ``None`` is an empty place."""

    title: str
    columns: int
    charts: Sequence[Chart | None]


@dataclass(frozen=True)
class Section:
    """A part of the page: ``name`` in its address, what is said first, then what it shows; ``folded`` tables are behind
    a click."""

    name: str
    title: str
    lead: str
    panels: Sequence[Panels] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    albums: Sequence[Album] = ()
    facts: Sequence[tuple[str, str]] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to be seen."""
        tables = [table for table in (*self.tables, *self.folded) if table.rows]
        return not (self.panels or self.charts or tables or self.albums or self.facts)


def sections(comparison: Comparison, without: Sequence[str] = ()) -> Iterator[Section]:
    """The parts of the page that there is something in, in order, ``without`` some."""
    parts = (_what, _grid, _overlay, _heatmap, _peaks, _differences, _matched, _rank, _depth, _synergy, _controls)
    made = (part(comparison) for part in (*parts, _gallery) if part.__name__.strip("_") not in without)
    return (section for section in made if not section.is_empty)


def _what(comparison: Comparison) -> Section:
    several = len(comparison.runs) > 1
    lead = "The same in all runs:" if several else ""
    tables = [page_tables.what_was_run(comparison)]
    folded = [page_tables.settings(comparison)] if several and len(comparison.settings) else []
    return Section("what", "What was run", lead, tables=tables, folded=folded, facts=page_tables.common(comparison))


def _grid(comparison: Comparison) -> Section:
    metrics = dict.fromkeys(comparison.overview["metric"])
    what = "; ".join(page_charts.axis_words(metric) for metric in metrics)
    lead = f"Mean {what}, by layer; a window stands at its centre. One scale. {LEADS['grid']}"
    panels = [
        Panels(grid.title, len(grid.windows), [chart for row in cells for chart in row])
        for grid, cells in page_charts.grid(comparison)
    ]
    return Section("grid", "Layer profiles", lead, panels=panels)


def _overlay(comparison: Comparison) -> Section:
    made = page_charts.overlays(comparison)
    panels = [Panels(grid.title, min(2, len(charts)), charts) for grid, charts in made]
    return Section("overlay", "Corruptions overlaid", LEADS["overlay"], panels=panels)


def _heatmap(comparison: Comparison) -> Section:
    return Section("heatmap", "Run × layer", LEADS["heatmap"], charts=page_charts.heatmaps(comparison))


def _peaks(comparison: Comparison) -> Section:
    charts, tables = page_charts.peaks(comparison), [page_tables.peaks(comparison)]
    return Section("peaks", "Peaks", LEADS["peaks"], charts=charts, tables=tables)


def _differences(comparison: Comparison) -> Section:
    tables, folded = [page_tables.differences(comparison)], [page_tables.not_subtracted(comparison)]
    charts = page_charts.differences(comparison)
    return Section(
        "differences", "Paired differences", LEADS["differences"], charts=charts, tables=tables, folded=folded
    )


def _matched(comparison: Comparison) -> Section:
    return Section("matched", "Between groups", LEADS["matched"], tables=[page_tables.matched(comparison)])


def _rank(comparison: Comparison) -> Section:
    several = len(comparison.runs) > 1
    charts = [page_charts.rank_correlation(comparison)] if several else []
    folded = [page_tables.rank_correlation(comparison)] if several else []
    return Section("rank", "Rank correlation of profiles", LEADS["rank"], charts=charts, folded=folded)


def _depth(comparison: Comparison) -> Section:
    return Section("depth", "By relative depth", LEADS["depth"], charts=page_charts.relative_depths(comparison))


def _synergy(comparison: Comparison) -> Section:
    return _beside(comparison, "synergy", "Synergy of windows", SYNERGY)


def _controls(comparison: Comparison) -> Section:
    return _beside(comparison, "controls", "Controls", CONTROLS)


def _beside(comparison: Comparison, name: str, title: str, columns: dict[str, str]) -> Section:
    """A table of columns of ``profiles`` that only some rows have, ``effect`` being what they are beside."""
    profiles = comparison.profiles
    own = [column for column in columns if column != "effect" and column in profiles]
    has = profiles[own].notna().any(axis=1)
    if not has.any():
        return Section(name, title, "")
    table = page_tables.beside(replace(comparison, profiles=profiles[has]), columns, title)
    return Section(name, title, LEADS[name], folded=[table])


def _gallery(comparison: Comparison) -> Section:
    made, said = albums(comparison)
    return Section("gallery", "Images", f"{LEADS['gallery']} {said}", albums=made)
