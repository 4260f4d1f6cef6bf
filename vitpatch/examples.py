"""Which images a run shows, and what of them is kept: chosen by their effects, decoded and corrupted again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vitpatch.corruptions import corrupted
from vitpatch.data import ImageDataModule
from vitpatch.outcome import Outcome, metric_of
from vitpatch.setup import Setup
from vitpatch.shown import Page, Shown, ShownImage
from vitpatch.spec import BaseRun, counted

IMAGES_A_PAGE = 6


def chosen(setup: Setup, outcome: Outcome, data: ImageDataModule) -> Shown:
    """Pages of the images that the corruption moves most, of images by their effect at the peak, and drawn by lot."""
    return Shown(
        [Page(name, words, list(_images(setup, outcome, data, rows))) for name, words, rows in _choices(outcome)]
    )


def _choices(outcome: Outcome) -> Iterator[tuple[str, str, NDArray[np.intp]]]:
    """(name of the page, how they were picked, positions among the included images)."""
    total, number = outcome.examples["total_effect"].to_numpy(), min(IMAGES_A_PAGE, len(outcome.examples))
    images = counted(number, "image")
    if not np.isnan(total).any():
        most = np.argsort(-(outcome.towards or 1) * total, kind="stable")[:number]
        yield "largest", f"the {images} with the largest total effect", most
    if outcome.peak is not None:
        by_effect = np.argsort(-outcome.towards * outcome.effects[:, outcome.peak.name], kind="stable")
        spread = by_effect[np.linspace(0, len(by_effect) - 1, number).round().astype(int)]
        yield "sorted", f"{images} from the largest to the smallest effect at {outcome.peak_place}", spread
    lot = np.random.default_rng(outcome.study.seed).choice(len(total), number, replace=False)
    yield "random", f"{images} drawn by lot", np.sort(lot)


def _images(setup: Setup, outcome: Outcome, data: ImageDataModule, rows: Sequence[int]) -> Iterator[ShownImage]:
    """The images at ``rows`` of the outcome: decoding and corruption are functions of the image's id."""
    examples = outcome.examples.iloc[rows]
    batch = data.batch_of(examples["example_id"].tolist())
    images = {BaseRun.CLEAN: batch.images, BaseRun.CORRUPT: corrupted(setup.corruption, batch, setup.study.seed)}
    as_bytes = {
        run: (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for run, x in images.items()
    }
    names, study = setup.label_names, setup.study
    base = {run: metric_of(examples, run, study.metric) for run in BaseRun}
    for i, (row, example) in enumerate(zip(rows, examples.to_dict("records"), strict=True)):
        of_image = {run: float(values[i]) for run, values in base.items()}
        predicted = {run: int(example[f"pred_{run}"]) for run in BaseRun}
        yield ShownImage(
            example_id=int(example["example_id"]),
            name=f"{setup.images.name(example['example_id'])} – {example['label_name']}",
            pictures={run: as_bytes[run][i] for run in BaseRun},
            predicted={run: names[p] if names else str(p) for run, p in predicted.items()},
            base=of_image,
            patched=of_image[study.direction.recipient] + outcome.effects[row],
        )
