"""Comparison → the image gallery of its page: clean and corrupted images, and the metric by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitpatch.compare.cells import Link, run_links
from vitpatch.compare.charts import Chart, Profile, Trace
from vitpatch.compare.comparison import Comparison, FinishedRun
from vitpatch.compare.layout import MOST_SERIES
from vitpatch.compare.run_labels import run_labels
from vitpatch.compare.thumbnails import data_url
from vitpatch.plots.examples import Page, ShownImage
from vitpatch.plots.profile import clipped_of
from vitpatch.stats.result import series_of
from vitpatch.types import BaseRun, Metric

MOST_IMAGES, OF_A_RUN = 48, 4
"""Images in all, as far as each run has one, and of a run."""
BUDGET = 1_500_000
"""Letters that images take in all."""
SIDES = {BaseRun.CLEAN: "clean", BaseRun.CORRUPT: "corrupt"}


@dataclass(frozen=True)
class Picture:
    """An image as an address that holds it, and what is said under it."""

    address: str
    words: str


@dataclass(frozen=True)
class Card:
    """An image of a run: its name, clean and corrupted, and its trace."""

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


def albums(comparison: Comparison) -> tuple[list[Album], str]:
    """An album a run that kept images, within ``BUDGET``; and in words what is left out, "" = nothing."""
    labels = run_labels([run.name for run in comparison.runs])
    each = max(1, min(OF_A_RUN, MOST_IMAGES // len(comparison.runs)))
    of_overview = comparison.overview.set_index("run", drop=False)
    made: list[Album] = []
    spent = left_out = 0
    for run in comparison.runs:
        row, page = of_overview.loc[run.name].to_dict(), _first_page(run)
        cards = [_card(run, row, image) for image in _some(page.images, each)] if page else []
        kept = []
        for card in cards:
            spent += sum(len(picture.address) for picture in card.pictures)
            kept += [card] * (spent <= BUDGET and len(kept) + sum(len(album.cards) for album in made) < MOST_IMAGES)
        left_out += len(cards) - len(kept)
        if kept:
            made.append(Album(labels[run.name], _chosen(page, len(kept)), run_links(row), kept))
    said = f"{left_out} more are left out, so that the page stays small. " if left_out else ""
    return made, f"{said}figures/ in a run’s folder has more." if made else ""


def _first_page(run: FinishedRun) -> Page | None:
    """The first page of the images that a run kept."""
    return next(iter(run.shown()), None) if run.folder.pages.exists() else None


def _some(images: Sequence[ShownImage], number: int) -> list[ShownImage]:
    """So many of a page's images at most, spread over all."""
    return [images[i] for i in np.linspace(0, len(images) - 1, min(number, len(images))).round().astype(int)]


def _chosen(page: Page, shown: int) -> str:
    """How a page's images were picked, and how many of them are shown."""
    return page.chosen if shown == len(page.images) else f"{shown} of {page.chosen}"


def _card(run: FinishedRun, row: dict[str, Any], image: ShownImage) -> Card:
    pictures = [
        Picture(data_url(image.pictures[base]), f"{word} {image.base[base]:.2f}: {image.predicted[base]}")
        for base, word in SIDES.items()
    ]
    return Card(image.name, pictures, _trace(run, row, image))


def _trace(run: FinishedRun, row: dict[str, Any], image: ShownImage) -> Chart:
    """The metric as each patch is made; of many series the one with the peak."""
    summary = run.summary.assign(line=series_of(run.summary), value=image.patched, clipped=clipped_of(run.summary))
    if summary["line"].nunique() > MOST_SERIES:
        is_peak = (summary["layer"] == row["peak_layer"]) & (summary["effect"] == row["peak_effect"])
        line = (summary[is_peak] if is_peak.any() else summary)["line"].iloc[0]
        summary = summary[summary["line"] == line]
    rows = [
        {**dict.fromkeys(("low", "high"), np.nan), **own, row["metric"]: f"{own['value']:.3f}"}
        for own in summary[["line", "layer", "value", "clipped"]].to_dict("records")
    ]
    names = list(dict.fromkeys(summary["line"]))
    base = image.base
    domain = (-0.03, 1.03) if row["metric"] == Metric.PROB else None
    said = [*(["line"] if len(names) > 1 else []), "layer", row["metric"]]
    profile = Profile(rows, names, row["metric"], domain, said, height=110)
    trace = Trace(profile, base[BaseRun.CLEAN], base[BaseRun.CORRUPT])
    caption = f"series {names[0]}" if names[0] and len(names) == 1 else ""
    return Chart(trace.spec(), f"{row['metric']} of {image.name} by patched layer", caption)
