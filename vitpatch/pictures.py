"""The figures of a run, from its outcome and a few of its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vitpatch import plots, stats
from vitpatch.corruptions import corrupted
from vitpatch.data import ImageDataModule
from vitpatch.outcome import DOES_NOT_MOVE, Outcome, metric_of
from vitpatch.setup import Setup
from vitpatch.spec import BaseRun
from vitpatch.store import RunFolder

IMAGES_A_PAGE = 6


def draw(folder: RunFolder, setup: Setup, outcome: Outcome, data: ImageDataModule) -> dict[str, list[Path]]:
    """Draws the run's figures into its folder; their files, by the names they have in the tracker."""
    title = f"{setup.title}\n{DOES_NOT_MOVE}" if outcome.total.holds_zero else setup.title
    caption = plots.Caption(title, setup.study.metric, len(outcome.examples), outcome.clusters)
    layers = [patch.layer for patch in setup.plan.patches]
    labels, names = outcome.examples["label"].to_numpy(), outcome.examples.set_index("label")["label_name"].to_dict()
    of_class = stats.by_class(outcome.effects, labels, outcome.examples["cluster"].to_numpy(), setup.study.seed)
    rows = [(names[label], images, estimates) for label, images, estimates in of_class]
    return {
        "layer_profile": [folder.save(plots.layer_profile(outcome.summary, outcome.total, caption), "layer_profile")],
        "heatmap": [folder.save(plots.class_heatmap(rows, layers, caption), "heatmap")],
        "examples": [
            folder.save(page, f"examples_{name}") for name, page in _pages(setup, outcome, data, caption, layers)
        ],
    }


def _pages(
    setup: Setup, outcome: Outcome, data: ImageDataModule, caption: plots.Caption, layers: list[int]
) -> list[tuple[str, Figure]]:
    """Two example pages: the images that the corruption moves most, and images drawn by lot."""
    total = outcome.examples["total_effect"].to_numpy()
    number = min(IMAGES_A_PAGE, len(total))
    most = np.argsort(-np.sign(outcome.total.mean or 1) * total, kind="stable")[:number]
    lot = np.sort(np.random.default_rng(setup.study.seed).choice(len(total), number, replace=False))
    chosen = {
        "largest": (most, f"the {number} images with the largest total effect"),
        "random": (lot, f"{number} images drawn by lot"),
    }
    return [
        (name, plots.example_page(_traces(setup, outcome, data, rows), layers, words, caption))
        for name, (rows, words) in chosen.items()
    ]


def _traces(setup: Setup, outcome: Outcome, data: ImageDataModule, rows: np.ndarray) -> list[plots.Trace]:
    """The images at ``rows`` of the outcome, drawn again: decoding and corruption are functions of the image's id."""
    examples = outcome.examples.iloc[rows]
    batch = data.batch_of(examples["example_id"].tolist())
    pictures = {BaseRun.CLEAN: batch.images, BaseRun.CORRUPT: corrupted(setup.corruption, batch, setup.study.seed)}
    as_bytes = {
        run: (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy() for run, images in pictures.items()
    }
    names = setup.label_names
    recipient = setup.plan.direction.recipient
    traces = []
    for i, (row, example) in enumerate(zip(rows, examples.to_dict("records"), strict=True)):
        frame = examples.iloc[[i]]
        base = {run: float(metric_of(frame, run, setup.study.metric)[0]) for run in BaseRun}
        predicted = {run: example[f"pred_{run}"] for run in BaseRun}
        traces.append(
            plots.Trace(
                name=f"{setup.images.name(example['example_id'])} – {example['label_name']}",
                pictures={run: as_bytes[run][i] for run in BaseRun},
                predictions={run: names[p] if names else str(p) for run, p in predicted.items()},
                base=base,
                patched=base[recipient] + outcome.effects[row],
            )
        )
    return traces
