"""The figures of a run, from its outcome and a few of its images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitpatch import pages, plots, stats
from vitpatch.corruptions import corrupted
from vitpatch.data import ImageDataModule
from vitpatch.outcome import DOES_NOT_MOVE, Outcome, is_handover, metric_of, series_of
from vitpatch.setup import Setup
from vitpatch.spec import BaseRun, Estimate, counted
from vitpatch.store import RunFolder
from vitpatch.tokens import cell

IMAGES_A_PAGE = 6
MOST_GROUPS = 4
"""Token groups side by side in the heatmap of heads."""


@matplotlib.rc_context({"text.parse_math": False})  # a label may hold a dollar
def draw(folder: RunFolder, setup: Setup, outcome: Outcome, data: ImageDataModule) -> dict[str, list[Path]]:
    """Draws the run's figures into its folder; their files, by the names they have in the tracker."""
    title = f"{setup.title}\n{DOES_NOT_MOVE}" if outcome.total.holds_zero else setup.title
    caption = plots.Caption(title, setup.study.metric, len(outcome.examples), outcome.clusters)
    summary = outcome.summary.assign(series=series_of(outcome.summary))
    drawn = {
        "layer_profile": plots.layer_profile(summary, outcome.total, caption),
        "heatmap": _class_heatmap(setup, outcome, summary, caption),
        **_figures_of_target(setup, summary, caption),
    }
    files = {name: [folder.save(figure, name)] for name, figure in drawn.items()}
    pictures = _pages(setup, outcome, data, caption, summary)
    return files | {"examples": [folder.save(page, f"examples_{name}") for name, page in pictures]}


def _figures_of_target(setup: Setup, summary: pd.DataFrame, caption: plots.Caption) -> dict[str, Figure]:
    """What some targets have beside the profile."""
    target, drawn = setup.study.target, {}
    if target.one_head_at_a_time and summary["tokens"].nunique() <= MOST_GROUPS:
        drawn["heads"] = plots.head_heatmap(summary, caption)
    if is_handover(summary) and summary["window"].nunique() == 1 and summary["recovered"].notna().all():
        drawn["handover"] = plots.handover(summary, caption)
    if summary["direct_log_odds"].notna().all():
        drawn["direct"] = plots.direct_effects(summary, caption)
    if (at := _over_the_image(summary)) is not None:
        drawn["maps"] = _mean_maps(summary, at, caption)
    return drawn


def _class_heatmap(setup: Setup, outcome: Outcome, summary: pd.DataFrame, caption: plots.Caption) -> Figure:
    """Class × layer, of the series that the peak is in."""
    series = summary["series"].iloc[0] if outcome.peak is None else summary.loc[outcome.peak.name, "series"]
    rows = np.flatnonzero(summary["series"] == series)
    labels, names = outcome.examples["label"].to_numpy(), outcome.examples.set_index("label")["label_name"].to_dict()
    clusters = outcome.examples["cluster"].to_numpy()
    of_class = stats.by_class(outcome.effects[:, rows], labels, clusters, setup.study.seed)
    cells = []
    for label, images, estimates in of_class:
        if len(np.unique(clusters[labels == label])) < plots.FEW_CLUSTERS:
            estimates = [_without_interval(estimate) for estimate in estimates]
        cells.append((names[label], images, estimates))
    if series:
        caption = _also(caption, f": {series}")
    words = plots.layer_words(set(summary["window"].iloc[rows]))
    return plots.class_heatmap(cells, summary["layer"].iloc[rows].tolist(), words, caption)


def _without_interval(estimate: Estimate) -> Estimate:
    """An interval of a few clusters says little."""
    return Estimate(estimate.mean, np.nan, np.nan, np.nan)


def _also(caption: plots.Caption, words: str) -> plots.Caption:
    """A caption with some words more in the first line of its title."""
    first, newline, rest = caption.title.partition("\n")
    return replace(caption, title=f"{first}{words}{newline}{rest}")


def _over_the_image(summary: pd.DataFrame) -> NDArray[np.intp] | None:
    """Rows of ``each`` or ``grid`` as (layers, rows, columns), of the first window and head; ``None`` without them.

    Where there are several, ``_first_of`` says so.
    """
    kinds = [name.partition(":")[0] for name in summary["tokens"] if cell(name)]
    if not kinds:
        return None
    first = summary[[name.startswith(f"{kinds[0]}:") and cell(name) is not None for name in summary["tokens"]]]
    first = first[(first["window"] == first["window"].iloc[0]) & (first["head"] == first["head"].iloc[0])]
    cells = [cell(name) for name in first["tokens"]]
    layers = {layer: i for i, layer in enumerate(dict.fromkeys(first["layer"]))}
    at = np.empty((len(layers), *(max(c[axis] for c in cells) + 1 for axis in (0, 1))), dtype=np.intp)
    for row, layer, (y, x) in zip(first.index, first["layer"], cells, strict=True):
        at[layers[layer], y, x] = row
    return at


def _first_of(summary: pd.DataFrame, row: int, heads: bool = True) -> str:
    """What is shown of a run with several windows, heads or kinds of token groups, in words for a title."""
    names = ("window", "head") if heads else ("window",)
    words = [f"{name} {summary[name].loc[row]}" for name in names if summary[name].nunique() > 1]
    kinds = {name.partition(":")[0] for name in summary["tokens"]}
    if len(kinds) > 1:
        words.append(f"tokens {summary['tokens'].loc[row].partition(':')[0]}")
    return f"; shown: {', '.join(words)}" if words else ""


def _of_cls(summary: pd.DataFrame, at: NDArray[np.intp]) -> list[int]:
    """The rows of ``each:cls`` by layer, of the window and head that maps are of; empty where there are none."""
    shown = summary.iloc[at.flat[0]]
    same = (summary["window"] == shown["window"]) & (summary["head"] == shown["head"])
    rows = summary[same & (summary["tokens"] == "each:cls")].index
    return rows.tolist() if len(rows) == len(at) else []


def _mean_maps(summary: pd.DataFrame, at: NDArray[np.intp], caption: plots.Caption) -> Figure:
    layers = summary["layer"].iloc[at[:, 0, 0]].tolist()
    shown = summary.iloc[at.flat[0]]
    of_cls = summary["effect"].iloc[_of_cls(summary, at)]
    beside = [f", CLS {effect:+.3f}" for effect in of_cls] or [""] * len(layers)
    caption = _also(caption, _first_of(summary, at.flat[0]))
    what = "token" if shown["tokens"].startswith("each") else "block of patches"
    return pages.effect_maps(summary["effect"].to_numpy()[at], layers, beside, what, caption)


def _pages(
    setup: Setup, outcome: Outcome, data: ImageDataModule, caption: plots.Caption, summary: pd.DataFrame
) -> list[tuple[str, Figure]]:
    """Two example pages: the images that the corruption moves most, and images drawn by lot."""
    total = outcome.examples["total_effect"].to_numpy()
    number = min(IMAGES_A_PAGE, len(total))
    most = np.argsort(-np.sign(outcome.total.mean or 1) * total, kind="stable")[:number]
    lot = np.sort(np.random.default_rng(setup.study.seed).choice(len(total), number, replace=False))
    chosen = {
        "largest": (most, f"the {counted(number, 'image')} with the largest total effect"),
        "random": (lot, f"{counted(number, 'image')} drawn by lot"),
    }
    return [
        (name, _page(_traces(setup, outcome, data, rows, summary), setup, summary, words, caption))
        for name, (rows, words) in chosen.items()
    ]


def _page(
    traces: list[pages.Trace], setup: Setup, summary: pd.DataFrame, chosen: str, caption: plots.Caption
) -> Figure:
    layers, over_image = list(dict.fromkeys(summary["layer"])), _over_the_image(summary)
    if traces[0].maps is not None:
        row = 0 if over_image is None else over_image.flat[0]
        caption = _also(caption, _first_of(summary, row, heads=over_image is not None))
    if over_image is not None:
        return pages.map_page(traces, [f"layer {layer}" for layer in layers], None, chosen, caption)
    if traces[0].maps is not None:
        heads = list(dict.fromkeys(summary["head"]))
        return pages.map_page(traces, ["layer × head"], pages.MapAxes(heads, layers), chosen, caption)
    return pages.example_page(traces, layers, plots.layer_words(set(summary["window"])), chosen, caption)


def _maps_at(setup: Setup, summary: pd.DataFrame) -> NDArray[np.intp] | None:
    """Rows of the summary as maps of one image: over the image by layer, or one of layer × head."""
    over_image = _over_the_image(summary)
    if over_image is None and setup.study.target.one_head_at_a_time:
        first = summary[summary["tokens"] == summary["tokens"].iloc[0]]
        return first.index.to_numpy().reshape(1, first["layer"].nunique(), -1)
    return over_image


def _traces(
    setup: Setup, outcome: Outcome, data: ImageDataModule, rows: np.ndarray, summary: pd.DataFrame
) -> list[pages.Trace]:
    """The images at ``rows`` of the outcome, drawn again: decoding and corruption are functions of the image's id."""
    examples = outcome.examples.iloc[rows]
    batch = data.batch_of(examples["example_id"].tolist())
    pictures = {BaseRun.CLEAN: batch.images, BaseRun.CORRUPT: corrupted(setup.corruption, batch, setup.study.seed)}
    as_bytes = {
        run: (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy() for run, images in pictures.items()
    }
    names, maps, over_image = setup.label_names, _maps_at(setup, summary), _over_the_image(summary)
    of_cls = [] if over_image is None else _of_cls(summary, over_image)
    series = {name: np.flatnonzero(summary["series"] == name) for name in dict.fromkeys(summary["series"])}
    recipient = setup.plan.direction.recipient
    traces = []
    for i, (row, example) in enumerate(zip(rows, examples.to_dict("records"), strict=True)):
        frame = examples.iloc[[i]]
        base = {run: float(metric_of(frame, run, setup.study.metric)[0]) for run in BaseRun}
        predicted = {run: example[f"pred_{run}"] for run in BaseRun}
        patched = base[recipient] + outcome.effects[row]
        traces.append(
            pages.Trace(
                name=f"{setup.images.name(example['example_id'])} – {example['label_name']}",
                pictures={run: as_bytes[run][i] for run in BaseRun},
                predictions={run: names[p] if names else str(p) for run, p in predicted.items()},
                base=base,
                patched={name: patched[at] for name, at in series.items()},
                maps=None if maps is None else outcome.effects[row][maps],
                beside=tuple(f"CLS {effect:+.2f}" for effect in outcome.effects[row][of_cls]),
            )
        )
    return traces
