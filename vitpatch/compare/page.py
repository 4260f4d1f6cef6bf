"""Comparison → its page: one HTML file with sections, charts, tables and images, which asks nothing of any server."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import vl_convert
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from vitpatch.compare import tables
from vitpatch.compare.charts import ASSETS, GREEN, ORANGE, THEMES, Profile
from vitpatch.compare.figures import Chart, Figure
from vitpatch.compare.layout import effect_title, peak_series
from vitpatch.compare.load import Comparison
from vitpatch.compare.tables import Link, Table, run_links
from vitpatch.formatting import run_labels
from vitpatch.io import atomic_write
from vitpatch.plots.examples import ExampleImage
from vitpatch.plots.profile import is_clipped
from vitpatch.runs.reading import FinishedRun
from vitpatch.stats.result import series_names
from vitpatch.types import BaseRun, Metric

MAX_BYTES = 4_900_000  # of a page
MAX_LEFT_OUT = 12  # runs that are not compared, named at the top
LARGEST_SECTIONS = ((), ("gallery",), ("overlay", "controls", "synergy"), ("grid",))
"""The sections that a page goes without, one step after the other, until it is small enough."""
MAX_IMAGES, IMAGES_A_RUN = 48, 4  # images in all, as far as each run has one, and of a run
IMAGE_BUDGET = 1_500_000  # letters that images take in all
THUMBNAIL_SIDE, LOSSLESS_SIDE = 160, 64
"""Pixels of an image's longer side at most; up to how many it is kept to the pixel."""
CONTROLS = {
    "effect": "donor’s effect",
    "effect_same_class": "another image of the class",
    "effect_other_class": "an image of another class",
}
SYNERGY = {"synergy_prob": "synergy, probability", "synergy_log_odds": "synergy, log odds (nats)"}


@dataclass(frozen=True)
class Card:
    """An image of a run: its name, clean and corrupted (address that holds it, words under it), and its metric by
    patched layer."""

    name: str
    pictures: Sequence[tuple[str, str]]
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
    """What a section of the page shows; its title and text are in the template. ``folded`` tables open by a click."""

    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    albums: Sequence[Album] = ()
    images_left_out: int = 0
    facts: Sequence[tuple[str, str]] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        filled = [table for table in (*self.tables, *self.folded) if table.rows]
        return not (self.figures or filled or self.albums or self.facts)


def write_page(comparison: Comparison, figures: Sequence[Figure], file: Path) -> None:
    """Writes the page of a comparison, by rename; its links are relative to the file's folder."""
    sections, without = make_sections(comparison, figures), ()
    for step in LARGEST_SECTIONS:
        without += step
        text = render_page(comparison, sections, without)
        if len(text.encode()) <= MAX_BYTES:
            break
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def render_page(comparison: Comparison, sections: Mapping[str, Section], without: Sequence[str] = ()) -> str:
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
    environment.filters |= {"script_json": script_json, "breakable": breakable}
    scripts, number = page_scripts(), len(comparison.runs)
    several = number > 1
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    more = len(comparison.left_out) - MAX_LEFT_OUT
    return environment.get_template("page.html.jinja").render(
        title=comparison.title or (f"Comparison of {number} runs" if several else comparison.overview["title"].iloc[0]),
        several=several,
        metrics="; ".join(map(effect_title, dict.fromkeys(comparison.overview["metric"]))),
        fixed=comparison.fixed,
        warnings=comparison.warnings,
        left_out=[*comparison.left_out[:MAX_LEFT_OUT], *([f"… and {more} more"] if more > 0 else [])],
        sections={name: section for name, section in sections.items() if name not in without},
        images_left_out=sections["gallery"].images_left_out if "gallery" in sections else 0,
        without=", ".join(without),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests),
        css=Markup(_read_asset("page.css")),
    )


def page_scripts() -> list[str]:
    """Vega, Vega-Lite and Vega-Embed as vl-convert brings them, the sorting of tables, and the page's own script."""
    own = f"const themes = {script_json(THEMES)};\n{_read_asset('page.js')}"
    return [vega_bundle(), _read_asset("sortable.auto.min.js"), own]


def vega_bundle() -> str:
    """``vl_convert.javascript_bundle()``. It takes seconds, so it is kept in the user's cache folder, by version."""
    with suppress(OSError, RuntimeError):  # no such folder, or not to be written
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitpatch"
        file = folder / f"vega-{version('vl-convert-python')}.js"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as temporary:
                temporary.write_text(vl_convert.javascript_bundle(), encoding="utf-8", newline="\n")
        return file.read_text(encoding="utf-8")
    return vl_convert.javascript_bundle()


def script_json(value: Any) -> Markup:
    """A value as JSON for a script element, which no text in it can end."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def breakable(text: str) -> Markup:
    """A run's name, escaped, with places for line breaks after its commas and slashes."""
    return Markup(re.sub("([,/])", r"\1<wbr>", str(escape(text))))


def _read_asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def make_sections(comparison: Comparison, figures: Sequence[Figure]) -> dict[str, Section]:
    """The parts of the page that are not empty, by name, in order."""
    drawn: dict[str, list[Figure]] = defaultdict(list)
    for figure in figures:
        drawn[figure.section].append(figure)
    several = len(comparison.runs) > 1
    albums, left_out = make_albums(comparison)
    sections = {
        "found": Section(tables=[tables.findings_table(comparison)]),
        "what": Section(
            tables=[tables.runs_table(comparison)],
            folded=[tables.settings_table(comparison)] if several and len(comparison.settings) else [],
            facts=tables.shared_facts(comparison),
        ),
        "grid": Section(drawn["grid"]),
        "overlay": Section(drawn["overlay"]),
        "heatmap": Section(drawn["heatmap"]),
        "peaks": Section(drawn["peaks"], [tables.peaks_table(comparison)]),
        "differences": Section(
            drawn["differences"],
            [tables.differences_table(comparison)],
            folded=[tables.not_subtracted_table(comparison)],
        ),
        "matched": Section(tables=[tables.matched_table(comparison)]),
        "rank": Section(drawn["rank"], folded=[tables.rank_correlation_table(comparison)] if several else []),
        "depth": Section(drawn["depth"]),
        "synergy": Section(folded=[tables.profiles_table(comparison, SYNERGY, "Synergy of windows")]),
        "controls": Section(folded=[tables.profiles_table(comparison, CONTROLS, "Controls")]),
        "gallery": Section(albums=albums, images_left_out=left_out),
    }
    return {name: section for name, section in sections.items() if not section.is_empty}


def make_albums(comparison: Comparison) -> tuple[list[Album], int]:
    """An album a run that kept images, within ``IMAGE_BUDGET``; and how many images are left out."""
    labels = run_labels([run.name for run in comparison.runs])
    images_a_run = max(1, min(IMAGES_A_RUN, MAX_IMAGES // len(comparison.runs)))
    overview = comparison.overview.set_index("run", drop=False)
    albums: list[Album] = []
    letters = cards = left_out = 0
    for run in comparison.runs:
        row, page = overview.loc[run.name].to_dict(), next(iter(run.pages), None)
        images = [] if page is None else page.images
        spread = np.linspace(0, len(images) - 1, min(images_a_run, len(images))).round().astype(int)
        kept: list[Card] = []
        for image in (images[i] for i in spread):
            words = [f"{base} {image.base[base]:.2f}: {image.predicted[base]}" for base in BaseRun]
            addresses = [data_url(image.pictures[base]) for base in BaseRun]
            letters += sum(map(len, addresses))
            if letters <= IMAGE_BUDGET and len(kept) + cards < MAX_IMAGES:
                pictures = list(zip(addresses, words, strict=True))
                kept.append(Card(image.name, pictures, _image_chart(run, row, image)))
            else:
                left_out += 1
        cards += len(kept)
        if kept:
            chosen = page.chosen if len(kept) == len(images) else f"{len(kept)} of {page.chosen}"
            albums.append(Album(labels[run.name], chosen, run_links(row), kept))
    return albums, left_out


def _image_chart(run: FinishedRun, row: dict[str, Any], image: ExampleImage) -> Chart:
    """The metric of an image by patched layer; where there are many series, of the one with the peak."""
    rows = run.summary.assign(line=series_names(run.summary), value=image.patched, clipped=is_clipped(run.summary))
    rows = peak_series(rows, "line", row).assign(low=np.nan, high=np.nan)
    rows, names = rows.assign(words=rows["value"].map("{:.3f}".format)), list(rows["line"].unique())
    tooltips = {"line": "line"} if len(names) > 1 else {}
    profile = Profile(
        rows[["line", "layer", "value", "low", "high", "clipped", "words"]],
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
    """``picture`` (height, width, 3) as a ``data:`` address: a small one as PNG, others as a smaller JPEG."""
    image, file = Image.fromarray(picture), io.BytesIO()
    kind = "png" if max(image.size) <= LOSSLESS_SIDE else "jpeg"
    if kind == "png":
        image.save(file, "PNG", optimize=True)
    else:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.convert("RGB").save(file, "JPEG", quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
