"""Comparison → its page: one HTML file with sections, charts, tables and images, which asks nothing of any server."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import vl_convert
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from vitpatch.compare import figures, tables
from vitpatch.compare.charts import GREEN, ORANGE, THEMES, Profile
from vitpatch.compare.figures import Chart
from vitpatch.compare.layout import MAX_SERIES, effect_title, peak_series
from vitpatch.compare.load import Comparison, FinishedRun
from vitpatch.compare.tables import Link, Table, run_links
from vitpatch.io import atomic_write
from vitpatch.plots.examples import ExampleImage, ExamplePage
from vitpatch.plots.profile import is_clipped
from vitpatch.stats.result import series_names
from vitpatch.titles import run_labels
from vitpatch.types import BaseRun, Metric

ASSETS = Path(__file__).parents[1] / "assets" / "page"
MAX_BYTES = 4_900_000
"""Of a page."""
MAX_LEFT_OUT = 12
"""Runs that are not compared, named at the top."""
LEFT_OUT = (
    (),
    ("gallery",),
    ("gallery", "overlay", "controls", "synergy"),
    ("gallery", "overlay", "controls", "synergy", "grid"),
)
"""The sections that a page goes without, more and more, until it is small enough."""
MAX_IMAGES, IMAGES_A_RUN = 48, 4
"""Images in all, as far as each run has one, and of a run."""
IMAGE_BUDGET = 1_500_000
"""Letters that images take in all."""
THUMBNAIL_SIDE, LOSSLESS_SIDE = 160, 64
"""Pixels of an image's longer side at most; up to how many it is kept to the pixel."""
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
class Picture:
    """An image as an address that holds it, and the words under it."""

    address: str
    words: str


@dataclass(frozen=True)
class Card:
    """An image of a run: its name, clean and corrupted, and its metric by patched layer."""

    name: str
    pictures: Sequence[Picture]
    chart: Chart


@dataclass(frozen=True)
class Album:
    """The cards of a run; ``chosen`` says how its images were picked."""

    run: str
    chosen: str
    links: Sequence[Link]
    cards: Sequence[Card]


@dataclass(frozen=True)
class Section:
    """A part of the page: ``name`` in its address, a paragraph that leads in, then what it shows; ``folded`` tables are
    behind a click."""

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
        filled = [table for table in (*self.tables, *self.folded) if table.rows]
        return not (self.panels or self.charts or filled or self.albums or self.facts)


def write_page(comparison: Comparison, file: Path) -> None:
    """Writes the page of a comparison, by rename; its links are relative to the file's folder."""
    sections = make_sections(comparison)
    for without in LEFT_OUT:
        text = render_page(comparison, sections, without)
        if len(text.encode()) <= MAX_BYTES:
            break
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def render_page(comparison: Comparison, sections: Sequence[Section], without: Sequence[str] = ()) -> str:
    """The page's text, ``without`` some sections.

    All text is escaped, and only the page's own scripts may run in it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"embedded": embedded, "breakable": breakable}
    scripts, number = page_scripts(), len(comparison.runs)
    more = len(comparison.left_out) - MAX_LEFT_OUT
    return environment.get_template("page.html.jinja").render(
        title=f"Comparison of {number} runs" if number > 1 else comparison.overview["title"].iloc[0],
        warnings=comparison.warnings,
        left_out=[*comparison.left_out[:MAX_LEFT_OUT], *([f"… and {more} more"] if more > 0 else [])],
        sections=[section for section in sections if section.name not in without],
        without=", ".join(without),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        css=Markup(_read_asset("page.css")),
    )


def page_scripts() -> list[str]:
    """Vega, Vega-Lite and Vega-Embed as vl-convert brings them, the sorting of tables, and the page's own script."""
    own = f"const themes = {embedded(THEMES)};\n{_read_asset('page.js')}"
    return [vl_convert.javascript_bundle(), _read_asset("sortable.auto.min.js"), own]


def embedded(value: Any) -> Markup:
    """A value as JSON in which no text can end the script element that it is in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def breakable(text: str) -> Markup:
    """A run's name, escaped, that may be broken after its commas and slashes."""
    return Markup(re.sub("([,/])", r"\1<wbr>", str(escape(text))))


def _read_asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def make_sections(comparison: Comparison) -> list[Section]:
    """The parts of the page that are not empty, in order."""
    several = len(comparison.runs) > 1
    metrics = "; ".join(map(effect_title, dict.fromkeys(comparison.overview["metric"])))
    grid_panels = [Panels(grid.title, len(grid.windows), charts) for grid, charts in figures.grid_charts(comparison)]
    overlays = [(grid, charts) for grid, charts in figures.overlay_charts(comparison) if charts]
    depth = figures.relative_depth_chart(comparison)
    albums, gallery_words = make_albums(comparison)
    sections = [
        Section(
            "what",
            "What was run",
            "The same in all runs:" if several else "",
            tables=[tables.runs_table(comparison)],
            folded=[tables.settings_table(comparison)] if several and len(comparison.settings) else [],
            facts=tables.shared_facts(comparison),
        ),
        Section(
            "grid",
            "Layer profiles",
            f"Mean {metrics}, by layer; a window stands at its centre. One scale. {LEADS['grid']}",
            panels=grid_panels,
        ),
        Section(
            "overlay",
            "Corruptions overlaid",
            LEADS["overlay"],
            panels=[Panels(grid.title, min(2, len(charts)), charts) for grid, charts in overlays],
        ),
        Section("heatmap", "Run × layer", LEADS["heatmap"], charts=[*figures.heatmap_charts(comparison).values()]),
        Section(
            "peaks",
            "Peaks",
            LEADS["peaks"],
            charts=[*figures.peak_charts(comparison).values()],
            tables=[tables.peaks_table(comparison)],
        ),
        Section(
            "differences",
            "Paired differences",
            LEADS["differences"],
            charts=figures.difference_charts(comparison),
            tables=[tables.differences_table(comparison)],
            folded=[tables.not_subtracted_table(comparison)],
        ),
        Section("matched", "Between groups", LEADS["matched"], tables=[tables.matched_table(comparison)]),
        Section(
            "rank",
            "Rank correlation of profiles",
            LEADS["rank"],
            charts=[figures.rank_correlation_chart(comparison)] if several else [],
            folded=[tables.rank_correlation_table(comparison)] if several else [],
        ),
        Section("depth", "By relative depth", LEADS["depth"], charts=[depth] if depth else []),
        _values_section(comparison, "synergy", "Synergy of windows", SYNERGY),
        _values_section(comparison, "controls", "Controls", CONTROLS),
        Section("gallery", "Images", f"{LEADS['gallery']} {gallery_words}", albums=albums),
    ]
    return [section for section in sections if not section.is_empty]


def _values_section(comparison: Comparison, name: str, title: str, columns: dict[str, str]) -> Section:
    """A table of columns of ``profiles`` that only some rows have, with the rows' ``effect`` if it is among them."""
    profiles = comparison.profiles
    own = [column for column in columns if column != "effect" and column in profiles]
    profiles = profiles[profiles[own].notna().any(axis=1)]
    table = tables.profiles_table(replace(comparison, profiles=profiles), columns, title)
    return Section(name, title, LEADS[name], folded=[table])


def make_albums(comparison: Comparison) -> tuple[list[Album], str]:
    """An album a run that kept images, within ``IMAGE_BUDGET``; and in words what is left out, "" = nothing."""
    labels = run_labels([run.name for run in comparison.runs])
    images_a_run = max(1, min(IMAGES_A_RUN, MAX_IMAGES // len(comparison.runs)))
    overview = comparison.overview.set_index("run", drop=False)
    albums: list[Album] = []
    letters = left_out = 0
    for run in comparison.runs:
        row, page = overview.loc[run.name].to_dict(), first_page(run)
        images = [] if page is None else page.images
        spread = np.linspace(0, len(images) - 1, min(images_a_run, len(images))).round().astype(int)
        kept: list[Card] = []
        for image in (images[i] for i in spread):
            pictures = [
                Picture(data_url(image.pictures[base]), f"{base} {image.base[base]:.2f}: {image.predicted[base]}")
                for base in BaseRun
            ]
            letters += sum(len(picture.address) for picture in pictures)
            if letters <= IMAGE_BUDGET and len(kept) + sum(len(album.cards) for album in albums) < MAX_IMAGES:
                kept.append(Card(image.name, pictures, _image_chart(run, row, image)))
            else:
                left_out += 1
        if kept:
            chosen = page.chosen if len(kept) == len(images) else f"{len(kept)} of {page.chosen}"
            albums.append(Album(labels[run.name], chosen, run_links(row), kept))
    words = f"{left_out} more are left out, so that the page stays small. " if left_out else ""
    return albums, f"{words}figures/ in a run’s folder has more." if albums else ""


def first_page(run: FinishedRun) -> ExamplePage | None:
    """The first page of the images that a run kept."""
    return next(iter(run.example_pages()), None) if run.folder.pages.exists() else None


def _image_chart(run: FinishedRun, row: dict[str, Any], image: ExampleImage) -> Chart:
    """The metric of an image as each patch is made; of many series the one with the peak."""
    rows = run.summary.assign(line=series_names(run.summary), value=image.patched, clipped=is_clipped(run.summary))
    if rows["line"].nunique() > MAX_SERIES:
        rows = peak_series(rows, "line", row)
    rows = rows.assign(low=np.nan, high=np.nan, words=[f"{value:.3f}" for value in rows["value"]])
    rows, names = rows[["line", "layer", "value", "low", "high", "clipped", "words"]], list(dict.fromkeys(rows["line"]))
    tooltips = {"line": "line"} if len(names) > 1 else {}
    profile = Profile(
        rows,
        names,
        row["metric"],
        (-0.03, 1.03) if row["metric"] == Metric.PROB else None,
        tooltips | {"layer": "layer", "words": row["metric"]},
        levels=[
            (image.base[BaseRun.CLEAN], "clean", GREEN, [1, 0]),
            (image.base[BaseRun.CORRUPT], "corrupt", ORANGE, [6, 4]),
        ],
        height=110,
    )
    caption = f"series {names[0]}" if names[0] and len(names) == 1 else ""
    return Chart(profile, f"{row['metric']} of {image.name} by patched layer", caption)


def data_url(picture: NDArray[np.uint8]) -> str:
    """``picture`` (height, width, 3) as a ``data:`` address: PNG of a small one, else a smaller JPEG."""
    image, file = Image.fromarray(picture), io.BytesIO()
    kind = "png" if max(image.size) <= LOSSLESS_SIDE else "jpeg"
    if kind == "png":
        image.save(file, "PNG", optimize=True)
    else:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.convert("RGB").save(file, "JPEG", quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
