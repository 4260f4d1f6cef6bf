"""The images of a data set with their labels, masks and ids, decoded one by one."""

from __future__ import annotations

import copy
import hashlib
import io
import logging
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vitpatch.data.labels import LEFT_OUT
from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

MANY_IMAGES = 5000
"""From so many images on, a log line says that reading them takes a while."""


@dataclass(frozen=True)
class ColumnNames:
    """Which columns hold what; all but ``image`` may be ``None``. ``pair`` has each image's counterpart."""

    image: str
    label: str | None = None
    mask: str | None = None
    cluster: str | None = None
    name: str | None = None
    pair: str | None = None

    @property
    def of_images(self) -> list[str]:
        """The columns that hold images."""
        return [column for column in (self.image, self.mask, self.pair) if column is not None]


class StreamedRows:
    """Some rows of a stream by position. Going forward reads on; going back reads from the start again."""

    def __init__(self, stream: datasets.IterableDataset, ids: NDArray[np.int64]) -> None:
        self._stream, self._ids = stream, ids
        self._next, self._rest, self._last = 0, None, {}

    def __getitem__(self, position: int) -> dict[str, Any]:
        wanted = int(self._ids[position])
        if self._rest is None or wanted < self._next - 1:
            self._rest, self._next = iter(self._stream), 0
        while self._next <= wanted:
            self._last = next(self._rest)
            self._next += 1
        return self._last

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which begins the stream itself."""
        return {"_stream": self._stream, "_ids": self._ids, "_next": 0, "_rest": None, "_last": {}}


@dataclass(eq=False)
class LabelledImages:
    """The selected rows of a source, in order of their ids.

    ``rows`` gives a row by position, its images undecoded. ``ids`` (images,) int64, their numbers in the split;
    ``labels`` (images,) int64, ``UNKNOWN`` of an image without; ``label_names`` by label or ``None``; ``clusters``
    (images,): any values that are equal within a cluster, ``None`` of an image that is one by itself, which become
    int64, numbered by first appearance. ``where`` names the data in errors; ``on_error`` and ``num_workers`` are the
    source's.

    ``digest`` identifies ids, images, labels and clusters, whatever their files are called; with a ``fingerprint`` it
    is made of that instead of the images, which are then not read for it. ``left_out`` counts the images whose label
    is mapped to no class.
    """

    rows: datasets.Dataset | StreamedRows
    columns: ColumnNames
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...] | None
    clusters: Any
    where: str
    fingerprint: str | None = None
    on_error: str = "raise"
    num_workers: int = 0

    def __post_init__(self) -> None:
        self.clusters = _number_clusters(self.clusters)
        self.digest = self._digest()
        self._kept, self.left_out = np.arange(len(self.ids)), 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels of their own."""
        return self.columns.label is not None

    def label_by_classes(self, classes: Sequence[int], names: Sequence[str] | None, number: int) -> LabelledImages:
        """A copy with each label replaced by its class of a model that has a ``number`` of classes, called ``names``.

        ``classes`` by label; images whose class is ``LEFT_OUT`` are not in the copy. A class of one label keeps the
        label's name.
        """
        of_label = np.array(classes, dtype=np.int64)
        kept = np.flatnonzero(of_label[self.labels] != LEFT_OUT)
        if not len(kept):
            raise VitPatchError("data.label_map: leaves all images out")
        label_names: list[list[str]] = [[] for _ in range(number)]  # by class
        for label in np.unique(self.labels[kept]) if self.label_names is not None else ():
            label_names[classes[label]].append(self.label_names[label])
        class_names = names or [" / ".join(of_class) or str(index) for index, of_class in enumerate(label_names)]
        new = copy.copy(self)
        new.label_names = tuple(
            of_class[0] if len(of_class) == 1 else name for of_class, name in zip(label_names, class_names, strict=True)
        )
        new.labels, new.ids, new._kept = of_label[self.labels[kept]], self.ids[kept], self._kept[kept]
        new.left_out = len(self) - len(kept)
        new.clusters = _number_clusters(self.clusters[kept])
        new.digest = hashlib.sha256(f"{self.digest} {list(classes)}".encode()).hexdigest()[:16]
        return new

    def positions(self, ids: Sequence[int]) -> NDArray[np.intp]:
        """The positions of images by their ids."""
        return np.searchsorted(self.ids, ids)

    def image(self, position: int, of_pair: bool = False) -> Image.Image:
        """The image, or the data's own counterpart of it, as RGB, turned upright by its EXIF tag.

        Raises ``VitPatchError`` that names file and row.
        """
        return to_rgb(self._decode(position, self.columns.pair if of_pair else self.columns.image))

    def mask(self, position: int) -> Image.Image | None:
        """The object mask as RGB gray, where the data have masks."""
        column = self.columns.mask
        return to_mask(self._decode(position, column)) if column else None

    def name(self, example_id: int) -> str:
        """A name to show for an image: its ``name`` column, the stem of its file, or its id."""
        row = self._row(int(self.positions([example_id])[0]))
        if self.columns.name is not None:
            return str(row[self.columns.name])
        file = _file(row[self.columns.image])
        return Path(file).stem if file else f"image {example_id}"

    def _row(self, position: int) -> dict[str, Any]:
        return self.rows[int(self._kept[position])]

    def _decode(self, position: int, column: str) -> Image.Image:
        stored = self._row(position)[column]
        try:
            image = Image.open(io.BytesIO(_bytes(stored)))
            image.load()
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise ValueError("its pixels are 32-bit numbers of unknown range")
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "the row has none" if stored is None else one_line(error, 120)
            if isinstance(error, UnidentifiedImageError):
                reason = "no known image format" if _bytes(stored) else "it has 0 bytes"
            file = _file(stored)
            where = f"data row {self.ids[position]} " + (f"({file})" if file else f"of {self.where}")
            raise VitPatchError(
                f"{where}, column {column}: not a readable image ({reason}); data.on_error=skip leaves it out"
            ) from error
        return image

    def _digest(self) -> str:
        total = hashlib.sha256(self.ids.tobytes() + self.labels.tobytes() + self.clusters.tobytes())
        if self.fingerprint is not None:
            pair = f" {self.columns.pair}" if self.columns.pair else ""
            total.update(f"{self.fingerprint} {self.columns.image} {self.columns.mask}{pair}".encode())
            return total.hexdigest()[:16]
        if len(self) > MANY_IMAGES:
            log.info("reading %d images of %s once, to identify them", len(self), self.where)
        for row in self.rows:
            for column in self.columns.of_images:
                try:
                    total.update(hashlib.sha256(_bytes(row[column])).digest())
                except (OSError, TypeError):  # reported when the row is read
                    total.update(b"unreadable")
        return total.hexdigest()[:16]


def _number_clusters(values: Iterable[Hashable | None]) -> NDArray[np.int64]:
    """Numbers by first appearance, (images,); ``None`` is a cluster each time."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(object() if v is None else v, len(numbers)) for v in values], np.int64)


def _file(stored: dict[str, Any] | None) -> str | None:
    return stored["path"] if stored and stored.get("path") else None


def _bytes(stored: dict[str, Any]) -> bytes:
    return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB; what is transparent becomes white, as on paper; 16-bit gray is scaled to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """An object mask as RGB gray."""
    return image.convert("L").convert("RGB")
