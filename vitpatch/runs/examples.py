"""Which images a run shows, and what of them is kept: chosen by their effects, decoded and corrupted again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from vitpatch.data.datamodule import ImageDataModule
from vitpatch.formatting import counted
from vitpatch.plots.examples import ExampleImage, ExamplePage
from vitpatch.plots.style import label_words, place_words
from vitpatch.runs.batches import BatchPatcher
from vitpatch.runs.setup import Setup
from vitpatch.runs.trainer import on_device
from vitpatch.stats.result import RunResult, base_metric
from vitpatch.types import BaseRun, ImageBatch

IMAGES_A_PAGE = 6
DRAWS = 10
"""Of noise on embeddings, for an image that is looked at by itself (Meng et al. 2022)."""


def choose_examples(setup: Setup, outcome: RunResult, data: ImageDataModule) -> list[ExamplePage]:
    """Pages of the images that the corruption moves most, of images by their effect at the peak, and drawn by lot.

    On the trainer's device where the model is needed again.
    """
    also = f", means of {DRAWS} draws" if _is_drawn_again(setup) else ""
    pages = _choices(outcome)
    where = on_device(setup.model, setup.trainer, setup.cfg.matmul_precision) if also else nullcontext()
    with where:
        return [ExamplePage(name, words + also, list(_images(setup, outcome, data, at))) for name, words, at in pages]


def _is_drawn_again(setup: Setup) -> bool:
    """Whether single images are shown by more draws of noise than the run took."""
    return setup.corruption.is_inside_model and setup.corruption.draws < DRAWS


def _choices(outcome: RunResult) -> Iterator[tuple[str, str, NDArray[np.intp]]]:
    """(name of the page, how they were picked, positions among the included images)."""
    total, number = outcome.examples["total_effect"].to_numpy(), min(IMAGES_A_PAGE, len(outcome.examples))
    images = counted(number, "image")
    if not np.isnan(total).any():
        most = np.argsort(-(outcome.total_sign or 1) * total, kind="stable")[:number]
        yield "largest", f"the {images} with the largest total effect", most
    if outcome.peak is not None:
        by_effect = np.argsort(-outcome.total_sign * outcome.effects[:, outcome.peak.name], kind="stable")
        spread = by_effect[np.linspace(0, len(by_effect) - 1, number).round().astype(int)]
        place = place_words(outcome.peak_layer, outcome.peak_series)
        yield "sorted", f"{images} from the largest to the smallest effect at {place}", spread
    lot = np.random.default_rng(outcome.study.seed).choice(len(total), number, replace=False)
    yield "random", f"{images} drawn by lot", np.sort(lot)


def _images(setup: Setup, outcome: RunResult, data: ImageDataModule, rows: Sequence[int]) -> Iterator[ExampleImage]:
    """The images at ``rows`` of the outcome: decoding and corruption are functions of the image's id."""
    examples = outcome.examples.iloc[rows]
    batch = data.batch_of(examples["example_id"].tolist())
    images = {BaseRun.CLEAN: batch.images, BaseRun.CORRUPT: setup.corruption.pixels(batch, setup.study.seed)}
    as_bytes = {
        run: (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for run, x in images.items()
    }
    names = setup.label_names
    base, patched, predictions = _numbers(setup, outcome, examples, rows, batch)
    for i, example in enumerate(examples.to_dict("records")):
        metric = {run: float(values[i]) for run, values in base.items()}
        predicted = {run: int(predictions[run][i]) for run in BaseRun}
        yield ExampleImage(
            example_id=int(example["example_id"]),
            name=f"{setup.images.name(example['example_id'])} – {label_words(example)}",
            pictures={run: as_bytes[run][i] for run in BaseRun},
            predicted={run: names[p] if names else str(p) for run, p in predicted.items()},
            base=metric,
            patched=patched[i],
        )


def _numbers(
    setup: Setup, outcome: RunResult, examples: pd.DataFrame, rows: Sequence[int], batch: ImageBatch
) -> tuple[dict[BaseRun, NDArray], NDArray, dict[BaseRun, NDArray]]:
    """The headline metric of the base runs (images,) and of the patched ones (images, patches), and predictions.

    Those of the files; of noise on embeddings the mean over ``DRAWS`` draws, by the model again.
    """
    metric, recipient = setup.study.metric, setup.study.direction.recipient
    if _is_drawn_again(setup):
        known = replace(batch, labels=torch.tensor(examples["label"].tolist()))
        measured = BatchPatcher(setup, len(rows), DRAWS).columns(known.to(setup.model.device))
        examples = pd.DataFrame({name: values for name, values in measured.examples.items() if values.ndim == 1})
        effects = measured.effects["effect"].reshape(len(rows), -1)
    else:
        effects = outcome.effects[rows]
    base = {run: base_metric(examples, run, metric) for run in BaseRun}
    predictions = {run: examples[f"pred_{run}"].to_numpy() for run in BaseRun}
    return base, base[recipient][:, None] + effects, predictions
