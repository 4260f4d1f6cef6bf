"""Images as batches, decoded at the model's input size in worker processes; those of the training split too."""

from __future__ import annotations

import logging
import math
import multiprocessing
import signal
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Subset

from vitpatch.data.arrays import luminance
from vitpatch.data.images import LabelledImages
from vitpatch.data.partners import NO_PARTNER
from vitpatch.data.sources import AUTO, ImageSource
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch, Partner

log = logging.getLogger(__name__)

GRACE_S = 20
"""Seconds that a worker process goes on after SIGTERM, for the batch to be finished."""
TRAINING_SHUFFLE_SEED = 0
"""Training splits are often sorted by class. A stream is not shuffled, since that would read all of it."""
PartnerPositions = Mapping[Partner, NDArray[np.int64]]
"""By kind of partner the position of each image's partner, (images,), −1 = it has none."""


@dataclass(frozen=True)
class BadImage:
    """A row whose image cannot be read, and why."""

    row: int
    reason: str


class DecodedImages(Dataset):
    """Images at the model's input size by position, each a batch of one; one that cannot be read is a ``BadImage``.

    ``to_input`` makes an image a tensor (3, height, width). An image whose partner of a ``needed`` kind cannot be read
    is a ``BadImage`` too: its corruption is made from the partner.
    """

    def __init__(
        self,
        images: LabelledImages,
        to_input: Any,
        masks: bool = True,
        partners: PartnerPositions | None = None,
        needed: Collection[Partner] = (),
    ) -> None:
        self.images, self._to_input, self._masks = images, to_input, masks
        self._partners, self._needed = partners or {}, needed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> ImageBatch | BadImage:
        """The image at a position with its partners; where it has none, itself by the id −1."""
        image = self._image(position)
        if isinstance(image, BadImage) or not self._partners:
            return image
        partners = {}
        for kind, positions in self._partners.items():
            at = int(positions[position])
            partner = None if at == NO_PARTNER else self._image(at, of_pair=kind is Partner.PAIR)
            if isinstance(partner, BadImage) and kind in self._needed:
                row = int(self.images.ids[position])
                return BadImage(row, f"the partner of row {row}: {partner.reason}")
            is_readable = isinstance(partner, ImageBatch)
            partners[kind] = partner if is_readable else replace(image, ids=torch.tensor([NO_PARTNER]))
        return replace(image, partners=partners)

    def _image(self, position: int, of_pair: bool = False) -> ImageBatch | BadImage:
        """An image, or its counterpart, which has its mask, id and label."""
        images = self.images
        try:
            pixels = self._to_input(images.image(position, of_pair))
            mask = images.mask(position) if self._masks else None
        except VitPatchError as error:
            return BadImage(int(images.ids[position]), str(error))
        masks = None if mask is None else self._to_input(mask)[None, :1]
        id_and_label = (torch.tensor([numbers[position]]) for numbers in (images.ids, images.labels))
        return ImageBatch(pixels[None], *id_and_label, masks)


def mean_luminance(images: LabelledImages, to_input: Any) -> NDArray[np.float64]:
    """The mean BT.601 luma of each image at the model's input size, (images,); NaN of one that cannot be read."""
    means = np.full(len(images), np.nan)
    decoded = DecodedImages(images, to_input, masks=False)
    for position in range(len(images)):
        if isinstance(image := decoded[position], ImageBatch):
            means[position] = luminance(image.images[0])
    return means


def _ignore_signals(worker: int) -> None:
    """In a worker process: CTRL-C and SIGTERM reach it too, but the run decides when its workers stop.

    SIGTERM is also how Python ends workers that are left at its exit, so it is delayed, not ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))


def start_method(workers: int) -> str | None:
    """How a loader's worker processes are started; ``None`` = Python's default.

    In processes that Hydra's launcher starts, the default is loky, which cannot start workers of a torch loader.
    """
    return "fork" if workers and multiprocessing.get_start_method() == "loky" else None


def collate(images: Sequence[ImageBatch | BadImage]) -> tuple[ImageBatch | None, list[BadImage]]:
    """The readable images as one batch (``None`` where there is none), and the unreadable ones."""
    readable = [image for image in images if isinstance(image, ImageBatch)]
    return (_join(readable) if readable else None), [image for image in images if isinstance(image, BadImage)]


def _join(batches: Sequence[ImageBatch]) -> ImageBatch:
    masks = None if batches[0].masks is None else torch.cat([batch.masks for batch in batches])
    partners = {kind: _join([batch.partners[kind] for batch in batches]) for kind in batches[0].partners or ()}
    tensors = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "ids", "labels"))
    return ImageBatch(*tensors, masks, partners=partners or None)


def batch_loader(decoded: Dataset, batch_size: int, workers: int) -> DataLoader:
    """A loader of (ImageBatch | None, [BadImage]) in order, with this number of worker processes."""
    return DataLoader(
        decoded,
        batch_size=batch_size,
        num_workers=workers,
        multiprocessing_context=start_method(workers),
        collate_fn=collate,
        worker_init_fn=_ignore_signals,
    )


class ImageDataModule(lightning.LightningDataModule):
    """Batches of a run in order of ``example_id``, decoded in worker processes.

    ``numbers``: which of the ``batches`` are read, ascending; all, unless some are done.
    """

    def __init__(self, decoded: DecodedImages, batch_size: int) -> None:
        super().__init__()
        self.decoded, self.images, self.batch_size = decoded, decoded.images, batch_size
        self.batches = math.ceil(len(decoded) / batch_size)
        self.numbers: Sequence[int] = range(self.batches)

    def positions_of(self, numbers: Iterable[int]) -> list[int]:
        """The positions of the images of these batches."""
        size, last = self.batch_size, len(self.images)
        return [at for number in numbers for at in range(number * size, min((number + 1) * size, last))]

    def predict_dataloader(self) -> DataLoader:
        """(ImageBatch | None, [BadImage]) batches; only the last of all may be short, so they stay what they are."""
        positions = self.positions_of(self.numbers)
        return batch_loader(Subset(self.decoded, positions), self.batch_size, self.images.num_workers)

    def transfer_batch_to_device(self, batch: tuple, device: torch.device, dataloader_idx: int) -> tuple:
        """Moves the images, leaves the errors."""
        images, bad = batch
        return (None if images is None else images.to(device)), bad

    def batch_of(self, ids: Sequence[int]) -> ImageBatch:
        """The images with these ids as one batch, for figures."""
        batch, _ = collate([self.decoded[position] for position in self.images.positions(ids)])
        assert batch is not None and len(batch) == len(ids), f"rows {list(ids)} were readable before"
        return batch


def training_images(source: ImageSource, split: str | None, limit: int | None) -> LabelledImages:
    """``limit`` images of the training split of the run's data, of the same classes; labels are those of the data.

    Raises ``VitPatchError`` where the data have no such split.
    """
    seed = AUTO if source.streaming else TRAINING_SHUFFLE_SEED
    try:
        images = replace(source, split=split, limit=limit, per_class=None, shuffle_seed=seed).open(keys="train_")
    except VitPatchError as error:
        raise VitPatchError(f"training images: {error}") from error
    if split == source.split:
        log.warning("train_split %s is data.split: training images and the run's are of one split", split)
    return images


def training_batches(decoded: DecodedImages, size: int) -> Iterator[tuple[ImageBatch | None, list[BadImage]]]:
    """Batches of training images; what cannot be read is left out, or ends the run, as ``on_error`` says.

    Raises ``VitPatchError`` where none can be read.
    """
    images, readable = decoded.images, 0
    for batch, bad in batch_loader(decoded, size, images.num_workers):
        if bad and images.on_error == "raise":
            raise VitPatchError(f"training images: {bad[0].reason}")
        readable += 0 if batch is None else len(batch)
        yield batch, bad
    if not readable:
        raise VitPatchError(f"training images: none of the {len(images)} can be read")
