"""Maps over the image, and pages of single images, from an outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitpatch.patching.tokens import cell
from vitpatch.plots import examples as pages
from vitpatch.plots import style as plots
from vitpatch.plots.examples import Page, ShownImage
from vitpatch.stats.result import Outcome
from vitpatch.stats.summary import in_layer_order
from vitpatch.types import window_word


def also(caption: plots.Caption, words: str) -> plots.Caption:
    """A caption with some words more in the first line of its title."""
    first, newline, rest = caption.title.partition("\n")
    return replace(caption, title=f"{first}{words}{newline}{rest}")


def over_the_image(summary: pd.DataFrame) -> NDArray[np.intp] | None:
    """Rows of ``each`` or ``grid`` as (layers, rows, columns), of the first window and head; ``None`` without them.

    Where there are several, ``_first_of`` says so.
    """
    kinds = [name.partition(":")[0] for name in summary["tokens"] if cell(name)]
    if not kinds:
        return None
    first = summary[[name.startswith(f"{kinds[0]}:") and cell(name) is not None for name in summary["tokens"]]]
    first = first[(first["window"] == first["window"].iloc[0]) & (first["head"] == first["head"].iloc[0])]
    cells = [cell(name) for name in first["tokens"]]
    layers = {layer: i for i, layer in enumerate(sorted(set(first["layer"])))}
    at = np.empty((len(layers), *(max(c[axis] for c in cells) + 1 for axis in (0, 1))), dtype=np.intp)
    for row, layer, (y, x) in zip(first.index, first["layer"], cells, strict=True):
        at[layers[layer], y, x] = row
    return at


def _first_of(summary: pd.DataFrame, row: int, heads: bool = True) -> str:
    """What is shown of a run with several windows, heads or kinds of token groups, in words for a title."""
    said = {"window": window_word(summary["window"].loc[row])}
    if heads:
        said["head"] = summary["head"].loc[row]
    words = [f"{name} {value}" for name, value in said.items() if summary[name].nunique() > 1]
    kinds = {name.partition(":")[0] for name in summary["tokens"]}
    if len(kinds) > 1:
        words.append(f"tokens {summary['tokens'].loc[row].partition(':')[0]}")
    return f"; shown: {', '.join(words)}" if words else ""


def _of_cls(summary: pd.DataFrame, at: NDArray[np.intp]) -> list[int]:
    """The rows of ``each:cls`` by layer, of the window and head that maps are of; empty where there are none."""
    shown = summary.iloc[at.flat[0]]
    same = (summary["window"] == shown["window"]) & (summary["head"] == shown["head"])
    rows = summary[same & (summary["tokens"] == "each:cls")].sort_values("layer").index
    return rows.tolist() if len(rows) == len(at) else []


def mean_maps(summary: pd.DataFrame, at: NDArray[np.intp], caption: plots.Caption) -> Figure:
    """Mean effects over the image, of the rows ``at`` (layers, rows, columns)."""
    layers = summary["layer"].iloc[at[:, 0, 0]].tolist()
    shown = summary.iloc[at.flat[0]]
    of_cls = summary["effect"].iloc[_of_cls(summary, at)]
    beside = [f", CLS {effect:+.3f}" for effect in of_cls] or [""] * len(layers)
    caption = also(caption, _first_of(summary, at.flat[0]))
    what = "token" if shown["tokens"].startswith("each") else "block of patches"
    return pages.effect_maps(summary["effect"].to_numpy()[at], layers, beside, what, caption)


def image_pages(
    outcome: Outcome, shown: Sequence[Page], caption: plots.Caption, summary: pd.DataFrame
) -> dict[str, Figure]:
    """A page for each choice of images."""
    return {
        page.name: _page(_traces(outcome, page.images, summary), outcome, summary, page.chosen, caption)
        for page in shown
    }


def _page(
    traces: list[pages.Trace], outcome: Outcome, summary: pd.DataFrame, chosen: str, caption: plots.Caption
) -> Figure:
    over_image = over_the_image(summary)
    if traces[0].maps is not None:
        row = 0 if over_image is None else over_image.flat[0]
        caption = also(caption, _first_of(summary, row, heads=over_image is not None))
    if over_image is not None:
        names = [f"layer {layer}" for layer in summary["layer"].iloc[over_image[:, 0, 0]]]
        return pages.map_page(traces, names, None, chosen, caption)
    if traces[0].maps is not None:
        heads, layers = list(dict.fromkeys(summary["head"])), sorted(set(summary["layer"]))
        return pages.map_page(traces, ["layer × head"], pages.MapAxes(heads, layers), chosen, caption)
    return pages.example_page(traces, plots.layer_words(set(summary["window"])), chosen, caption)


def _maps_at(outcome: Outcome, summary: pd.DataFrame) -> NDArray[np.intp] | None:
    """Rows of the summary as maps of one image: over the image by layer, or one of layer × head."""
    over_image = over_the_image(summary)
    if over_image is None and outcome.study.target.one_head_at_a_time:
        first = np.flatnonzero(summary["tokens"] == summary["tokens"].iloc[0])
        return in_layer_order(summary, first).reshape(1, summary["layer"].nunique(), -1)
    return over_image


def _traces(outcome: Outcome, images: Sequence[ShownImage], summary: pd.DataFrame) -> list[pages.Trace]:
    """What is drawn of each image, from what was kept of it."""
    maps, over_image = _maps_at(outcome, summary), over_the_image(summary)
    of_cls = [] if over_image is None else _of_cls(summary, over_image)
    of_series = {name: np.flatnonzero(summary["series"] == name) for name in dict.fromkeys(summary["series"])}
    of_series = {name: in_layer_order(summary, rows) for name, rows in of_series.items()}
    recipient, layers, traces = outcome.study.direction.recipient, summary["layer"].to_numpy(), []
    for image in images:
        effects = image.patched - image.base[recipient]
        traces.append(
            pages.Trace(
                name=image.name,
                pictures=image.pictures,
                predictions=image.predicted,
                base=image.base,
                patched={name: (layers[rows], image.patched[rows]) for name, rows in of_series.items()},
                maps=None if maps is None else effects[maps],
                said=_said(outcome, effects),
                beside=tuple(f"CLS {effect:+.2f}" for effect in effects[of_cls]),
            )
        )
    return traces


def _said(outcome: Outcome, effects: NDArray[np.floating]) -> str:
    """An image's effect at the peak of all, in words."""
    if outcome.peak is None:
        return ""
    place = plots.place_words(outcome.peak_layer, outcome.peak_series)
    return f"effect {effects[outcome.peak.name]:+.3f}\nat {place}"
