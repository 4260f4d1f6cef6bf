"""The training images beside the images of a run: what strengths and spreads are taken from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from torch.utils.data import DataLoader

from vitpatch.data.images import BadImage, Decoded, LabelledImages, collate, start_method
from vitpatch.data.selection import AUTO
from vitpatch.data.sources import ImageSource
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch

log = logging.getLogger(__name__)

SHUFFLE_SEED = 0
"""Training splits are often sorted by class; a stream, which is not to be read whole, is taken as it comes."""


def training_images(source: ImageSource, split: str | None, limit: int | None) -> LabelledImages:
    """``limit`` images of the training split of the run's data, of the same classes, labels as the data have them.

    Raises ``VitPatchError`` where the data have no such split.
    """
    seed = AUTO if source.streams else SHUFFLE_SEED
    try:
        images = replace(source, split=split, limit=limit, per_class=None, shuffle_seed=seed).open(keys="train_")
    except VitPatchError as error:
        raise VitPatchError(f"training images: {error}") from error
    if split == source.split:
        log.warning("train_split %s is data.split: training images and the run's are of one split", split)
    return images


def batches_of(decoded: Decoded, size: int) -> Iterator[tuple[ImageBatch | None, list[BadImage]]]:
    """Batches of training images; what cannot be read is left out, or ends the run, as ``on_error`` says.

    Raises ``VitPatchError`` where none can be read.
    """
    images, readable = decoded.images, 0
    workers = images.num_workers
    how = start_method(workers)
    loader = DataLoader(decoded, size, num_workers=workers, multiprocessing_context=how, collate_fn=collate)
    for batch, bad in loader:
        if bad and images.on_error == "raise":
            raise VitPatchError(f"training images: {bad[0].reason}")
        readable += 0 if batch is None else len(batch)
        yield batch, bad
    if not readable:
        raise VitPatchError(f"training images: none of the {len(images)} can be read")
