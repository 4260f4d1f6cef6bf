"""Images, labels, masks and ids, on their way to the corruption: decoding, batches."""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
import multiprocessing
import signal
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from vitpatch.data.labels import LEFT_OUT
from vitpatch.data.partners import NOBODY
from vitpatch.errors import VitPatchError
from vitpatch.types import BT601_LUMA, ImageBatch, Partner

log = logging.getLogger(__name__)

MANY = 5000
"""Images whose reading takes long enough to say so."""
GRACE = 20
"""Seconds that a worker process goes on after SIGTERM, for the batch to be finished."""
UNKNOWN = -1
"""The label of an image that has none: the clean run's prediction takes its place."""


@dataclass(frozen=True)
class BadImage:
    """A row whose image cannot be read, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class ColumnNames:
    """Which columns hold what; all but ``image`` may be ``None``. ``pair`` has each image's counterpart."""

    image: str
    label: str | None = None
    mask: str | None = None
    cluster: str | None = None
    name: str | None = None
    pair: str | None = None


class Rows(Protocol):
    """Rows with undecoded images, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class LabelledImages:
    """The selected rows of a source, in order of their ids.

    ``ids`` (images,) int64, their numbers in the split; ``labels`` (images,) int64, ``UNKNOWN`` of an image without;
    ``label_names`` by label or ``None``, and whether labels are only their places in ``alphabetical`` order;
    ``clusters`` (images,) int64, numbered by first appearance; ``digest``
    identifies ids, images, labels and clusters, whatever their files are called – of a ``fingerprint``, where images
    are not to be read for it. ``on_error`` and ``num_workers`` are the source's. ``left_out`` counts the images whose
    label is mapped to no class.
    """

    def __init__(
        self,
        rows: Rows,
        columns: ColumnNames,
        ids: NDArray[np.int64],
        labels: NDArray[np.int64],
        label_names: tuple[str, ...] | None,
        clusters: Sequence[Any],
        where: str,
        fingerprint: str | None = None,
        on_error: str = "raise",
        num_workers: int = 0,
        alphabetical: bool = False,
    ) -> None:
        self.alphabetical = alphabetical
        self._rows, self.columns, self.ids, self.labels, self.label_names = rows, columns, ids, labels, label_names
        self._where, self.on_error, self.num_workers = where, on_error, num_workers
        numbers: dict[Any, int] = {}
        self.clusters: NDArray[np.int64] = np.array([numbers.setdefault(v, len(numbers)) for v in clusters], np.int64)
        self.digest = self._digest(fingerprint)
        self._kept, self.left_out = np.arange(len(ids)), 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels of their own."""
        return self.columns.label is not None

    def as_classes(self, classes: Sequence[int] | None, names: Sequence[str] | None, number: int) -> LabelledImages:
        """The same with each label replaced by its class of a model with these names; those left out are gone."""
        if classes is None:
            return self
        new = copy.copy(self)
        of_label = np.array(classes, dtype=np.int64)
        kept = np.flatnonzero(of_label[self.labels] != LEFT_OUT)
        if not len(kept):
            raise VitPatchError("data.label_map: leaves all images out")
        own: list[list[str]] = [[] for _ in range(number)]
        for label in np.unique(self.labels) if self.label_names is not None else ():
            if classes[label] != LEFT_OUT:
                own[classes[label]].append(self.label_names[label])
        theirs = names or [" / ".join(of_class) or str(index) for index, of_class in enumerate(own)]
        named = [of_class[0] if len(of_class) == 1 else theirs[index] for index, of_class in enumerate(own)]
        new.labels, new.label_names, new.alphabetical = of_label[self.labels][kept], tuple(named), False
        new.ids, new._kept, new.left_out = self.ids[kept], self._kept[kept], len(self) - len(kept)
        new.digest = hashlib.sha256(f"{self.digest} {list(classes)}".encode()).hexdigest()[:16]
        _, first, again = np.unique(self.clusters[kept], return_index=True, return_inverse=True)
        new.clusters = np.argsort(np.argsort(first))[again]  # numbered by first appearance
        return new

    def positions(self, ids: Sequence[int]) -> NDArray[np.intp]:
        """Where these ids stand."""
        return np.searchsorted(self.ids, ids)

    def image(self, position: int) -> Image.Image:
        """The image as RGB, turned upright by its EXIF tag. Raises ``VitPatchError`` that names file and row."""
        return _rgb(self._decoded(position, self.columns.image))

    def mask(self, position: int) -> Image.Image | None:
        """The object mask as RGB gray, where the data have masks."""
        column = self.columns.mask
        return self._decoded(position, column).convert("L").convert("RGB") if column else None

    def pair(self, position: int) -> Image.Image:
        """The data's own counterpart of an image, as RGB."""
        return _rgb(self._decoded(position, self.columns.pair))

    def name(self, example_id: int) -> str:
        """What a person calls an image: its ``name`` column, its file, or its row."""
        row = self._row(int(self.positions([example_id])[0]))
        if self.columns.name is not None:
            return str(row[self.columns.name])
        return _file(row[self.columns.image]) or f"row {example_id}"

    def _row(self, position: int) -> dict[str, Any]:
        return self._rows[int(self._kept[position])]

    def _decoded(self, position: int, column: str) -> Image.Image:
        stored = self._row(position)[column]
        file = _file(stored)
        at = self.ids[position]
        where = f"data row {at}" + (f" ({file})" if file else f" of {self._where}") + f", column {column}"
        try:
            image = Image.open(io.BytesIO(_bytes(stored)))
            image.load()
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise ValueError("its pixels are 32-bit numbers of unknown range")
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            reason = _why_unreadable(stored, error)
            raise VitPatchError(
                f"{where}: not a readable image ({reason}); data.on_error=skip leaves it out"
            ) from error
        return image

    def _digest(self, fingerprint: str | None) -> str:
        total = hashlib.sha256(self.ids.tobytes() + self.labels.tobytes() + self.clusters.tobytes())
        if fingerprint is not None:
            pair = f" {self.columns.pair}" if self.columns.pair else ""
            total.update(f"{fingerprint} {self.columns.image} {self.columns.mask}{pair}".encode())
            return total.hexdigest()[:16]
        if len(self) > MANY:
            log.info("reading %d images of %s once, to identify them", len(self), self._where)
        columns = [c for c in (self.columns.image, self.columns.mask, self.columns.pair) if c]
        for row in self._rows:
            for column in columns:
                try:
                    total.update(hashlib.sha256(_bytes(row[column])).digest())
                except (OSError, TypeError):  # said when the row is read
                    total.update(b"unreadable")
        return total.hexdigest()[:16]


def _file(stored: dict[str, Any] | None) -> str | None:
    return stored["path"] if stored and stored.get("path") else None


def _why_unreadable(stored: dict[str, Any] | None, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format" if _bytes(stored) else "it has 0 bytes"
    return "the row has none" if stored is None else " ".join(str(error).split())[:120] or type(error).__name__


def _bytes(stored: dict[str, Any]) -> bytes:
    return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def _rgb(image: Image.Image) -> Image.Image:
    """Upright RGB; what is transparent becomes white, as on paper; 16-bit gray is scaled to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


Positions = Mapping[Partner, NDArray[np.int64]]
"""By kind of partner where each image's stands, −1 = it has none (``vitpatch.data.partners``)."""


@dataclass(frozen=True)
class Item:
    """An image as it is batched: (3, height, width), its mask (1, height, width) or ``None``; and its partners."""

    image: Tensor
    mask: Tensor | None
    example_id: int
    label: int
    partners: Mapping[Partner, Item] | None = None


class Decoded(Dataset):
    """Rows as tensors at the model's input size; a row that cannot be read is a ``BadImage``.

    So is one whose partner of a ``needed`` kind cannot be read: its corruption is made of that.
    """

    def __init__(
        self,
        images: LabelledImages,
        to_input: Any,
        masks: bool = True,
        partners: Positions | None = None,
        needed: Collection[Partner] = (),
    ) -> None:
        self.images, self._to_input, self._masks = images, to_input, masks
        self._partners, self._needed = partners or {}, needed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Item | BadImage:
        """The image at a position with its partners; where it has none, itself by the id −1."""
        item = self._item(position)
        if isinstance(item, BadImage) or not self._partners:
            return item
        partners = {}
        for kind, where in self._partners.items():
            other = self._partner(kind, int(where[position]), position, item)
            if isinstance(other, BadImage) and kind in self._needed:
                return BadImage(item.example_id, f"the partner of row {item.example_id}: {other.reason}")
            partners[kind] = replace(item, example_id=NOBODY) if isinstance(other, BadImage) else other
        return replace(item, partners=partners)

    def _item(self, position: int) -> Item | BadImage:
        example_id = int(self.images.ids[position])
        try:
            image, mask = self.images.image(position), self.images.mask(position) if self._masks else None
        except VitPatchError as error:
            return BadImage(example_id, str(error))
        masked = None if mask is None else self._to_input(mask)[:1]
        return Item(self._to_input(image), masked, example_id, int(self.images.labels[position]))

    def _partner(self, kind: Partner, at: int, position: int, item: Item) -> Item | BadImage:
        if at < 0:
            return replace(item, example_id=NOBODY)
        if kind is not Partner.PAIR:
            return self._item(at)
        try:
            return replace(item, image=self._to_input(self.images.pair(position)))
        except VitPatchError as error:
            return BadImage(item.example_id, str(error))


def mean_luminance(images: LabelledImages, to_input: Any) -> NDArray[np.float64]:
    """The mean BT.601 luma of each image at the model's input size, (images,); NaN of one that cannot be read."""
    found = np.full(len(images), np.nan)
    for position, item in enumerate(map(Decoded(images, to_input, masks=False).__getitem__, range(len(images)))):
        if not isinstance(item, BadImage):
            found[position] = float(item.image.mean((1, 2)) @ torch.tensor(BT601_LUMA))
    return found


def _leave_stopping_to_the_run(worker: int) -> None:
    """A terminal sends CTRL-C to worker processes too, a cluster SIGTERM: the run decides when they stop.

    SIGTERM is also how Python ends those that are left at its exit, so it is put off only.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


def start_method(workers: int) -> str | None:
    """How a loader's worker processes are started; ``None`` = as Python does.

    In processes of a launcher that is by loky, which starts none for a loader of torch.
    """
    return "fork" if workers and multiprocessing.get_start_method() == "loky" else None


def collate(items: Sequence[Item | BadImage]) -> tuple[ImageBatch | None, list[BadImage]]:
    """The readable items as a batch (``None`` where there is none), and the others."""
    bad = [item for item in items if isinstance(item, BadImage)]
    good = [item for item in items if not isinstance(item, BadImage)]
    return (_batch(good) if good else None), bad


def _batch(items: Sequence[Item]) -> ImageBatch:
    masks = None if items[0].mask is None else torch.stack([item.mask for item in items])
    ids, labels = (torch.tensor([getattr(item, name) for item in items]) for name in ("example_id", "label"))
    partners = {kind: _batch([item.partners[kind] for item in items]) for kind in items[0].partners or ()}
    return ImageBatch(torch.stack([item.image for item in items]), ids, labels, masks, partners=partners or None)


class ImageDataModule(lightning.LightningDataModule):
    """Batches of a run in order of ``example_id``, decoded in worker processes.

    ``numbers``: which of the ``batches`` are read, ascending; all, unless some are done.
    """

    def __init__(
        self,
        images: LabelledImages,
        to_input: Any,
        batch_size: int,
        partners: Positions | None = None,
        needed: Collection[Partner] = (),
    ) -> None:
        super().__init__()
        self.images, self.batch_size = images, batch_size
        self.decoded = Decoded(images, to_input, partners=partners, needed=needed)
        self.batches = math.ceil(len(images) / batch_size)
        self.numbers: Sequence[int] = range(self.batches)

    @property
    def positions(self) -> list[int]:
        """Where the images of the batches that are read stand."""
        return self.positions_of(self.numbers)

    def positions_of(self, numbers: Iterable[int]) -> list[int]:
        """Where the images of these batches stand."""
        size, last = self.batch_size, len(self.images)
        return [at for number in numbers for at in range(number * size, min((number + 1) * size, last))]

    def predict_dataloader(self) -> DataLoader:
        """(ImageBatch | None, [BadImage]) batches; only the last of all may be short, so they stay what they are."""
        return DataLoader(
            Subset(self.decoded, self.positions),
            batch_size=self.batch_size,
            shuffle=False,
            num_workers=self.images.num_workers,
            multiprocessing_context=start_method(self.images.num_workers),
            collate_fn=collate,
            worker_init_fn=_leave_stopping_to_the_run,
        )

    def transfer_batch_to_device(self, batch: tuple, device: torch.device, dataloader_idx: int) -> tuple:
        """Moves the images, leaves the errors."""
        images, bad = batch
        return (None if images is None else images.to(device)), bad

    def batch_of(self, ids: Sequence[int]) -> ImageBatch:
        """The given images as one batch, for pictures."""
        batch, _ = collate([self.decoded[position] for position in self.images.positions(ids)])
        assert batch is not None and len(batch) == len(ids), f"rows {list(ids)} were readable before"
        return batch
