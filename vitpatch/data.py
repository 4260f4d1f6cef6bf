"""Images, labels, masks and ids, on their way to the corruption: sources, decoding, batches."""

from __future__ import annotations

import hashlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitpatch.hub import explain, resolve
from vitpatch.spec import ImageBatch, VitPatchError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")
MANY = 5000
"""Images whose reading takes long enough to say so."""


@dataclass(frozen=True, kw_only=True)
class ImageSource(ABC):
    """Where labelled images are, and which of them: the keys of ``conf/data/*.yaml``.

    ``limit`` takes the first rows in order (``None`` = all). Images with the same value of ``cluster_column`` are
    not independent. ``mask_column`` has gray images, white = object. An image that cannot be read stops the run,
    or with ``on_error="skip"`` is left out and counted.
    """

    path: str
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    mask_column: str | None = None
    cluster_column: str | None = None
    limit: int | None = None
    num_workers: int = 0
    on_error: str = "raise"

    @abstractmethod
    def rows(self) -> datasets.Dataset:
        """All rows of the split, images undecoded where the format allows it."""

    def open(self) -> LabelledImages:
        """The selected rows, checked; read once per process. Raises ``VitPatchError``."""
        return _open(self)


@dataclass(frozen=True, kw_only=True)
class ParquetImages(ImageSource):
    """A parquet file, or a folder with ``SPLIT*.parquet``; an image column as ``datasets`` writes it."""

    def rows(self) -> datasets.Dataset:
        """The rows of the file or files."""
        from datasets import Dataset
        from pyarrow import parquet

        path = Path(self.path).expanduser()
        files = [path] if path.is_file() else sorted(path.glob(f"{self.split or ''}*.parquet"))
        if not files:
            what = f"no file {self.split or ''}*.parquet in it" if path.is_dir() else "no such file or folder"
            raise VitPatchError(
                f"data.path {self.path}: {what}; give a parquet file, or a folder of them and data.split"
            )
        if not sum(parquet.read_metadata(file).num_rows for file in files):
            raise VitPatchError(f"data.path {self.path}: the selection is empty; there is no row in it")
        return Dataset.from_parquet([str(file) for file in files])


@dataclass(frozen=True, kw_only=True)
class FolderImages(ImageSource):
    """A folder with one folder of images a class, or with such a folder for each split."""

    def rows(self) -> datasets.Dataset:
        """The rows in order of class, then file name."""
        from datasets import load_dataset

        path = Path(self.path).expanduser()
        if not path.is_dir():
            raise VitPatchError(
                f"data.path {self.path}: no such folder; give a folder with one folder of images a class"
            )
        return self._split_of(load_dataset("imagefolder", data_dir=str(path)))

    def _split_of(self, splits: datasets.DatasetDict) -> datasets.Dataset:
        wanted = self.split or (next(iter(splits)) if len(splits) == 1 else None)
        if wanted not in splits:
            raise VitPatchError(f"data.split {self.split}: the data have {', '.join(splits)}; choose one")
        if "label" not in splits[wanted].column_names:
            raise VitPatchError(f"data.path {self.path}: its images are not in one folder a class (a loose image?)")
        return splits[wanted]


@dataclass(frozen=True, kw_only=True)
class HubImages(ImageSource):
    """A data set of the Hugging Face hub by its id, or its local copy."""

    def rows(self) -> datasets.Dataset:
        """The rows of the split, downloaded or from the cache."""
        from datasets import load_dataset

        where = resolve(self.path, "data.path")
        if self.split is None:
            raise VitPatchError("data.split is missing: name the split, such as data.split=test")
        return load_dataset(where, split=self.split)


@dataclass(frozen=True)
class BadImage:
    """A row whose image cannot be read, and why."""

    row: int
    reason: str


class LabelledImages:
    """The selected rows of a source; ``ids`` are their numbers in the split.

    ``labels`` (images,) int64; ``label_names`` by label or ``None``; ``clusters`` (images,) int64, numbered by first
    appearance; ``digest`` identifies images, labels and clusters, whatever their files are called.
    """

    def __init__(self, source: ImageSource, rows: datasets.Dataset) -> None:
        self.source, self._rows = source, rows
        self.labels = np.array(rows[source.label_column], dtype=np.int64)
        feature = rows.features[source.label_column]
        self.label_names: tuple[str, ...] | None = tuple(feature.names) if hasattr(feature, "names") else None
        of_cluster = rows[source.cluster_column] if source.cluster_column else range(len(rows))
        numbers: dict[Any, int] = {}
        self.clusters: NDArray[np.int64] = np.array([numbers.setdefault(v, len(numbers)) for v in of_cluster], np.int64)
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, row: int) -> Image.Image:
        """The image as RGB, turned upright by its EXIF tag. Raises ``VitPatchError`` that names file and row."""
        return _rgb(self._decoded(row, self.source.image_column))

    def mask(self, row: int) -> Image.Image | None:
        """The object mask as RGB gray, where the source has masks."""
        column = self.source.mask_column
        return self._decoded(row, column).convert("L").convert("RGB") if column else None

    def name(self, row: int) -> str:
        """What a person calls the row: its ``name`` column, its file, or its number."""
        if "name" in self._rows.column_names:
            return str(self._rows[row]["name"])
        return self._file(self._rows[row][self.source.image_column]) or f"row {row}"

    def _decoded(self, row: int, column: str) -> Image.Image:
        stored = self._rows[row][column]
        file = self._file(stored)
        where = f"data row {row}" + (f" ({file})" if file else f" of {self.source.path}") + f", column {column}"
        try:
            image = Image.open(io.BytesIO(_bytes(stored)))
            image.load()
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            reason = _why_unreadable(stored, error)
            raise VitPatchError(
                f"{where}: not a readable image ({reason}); data.on_error=skip leaves it out"
            ) from error
        return image

    def _file(self, stored: dict[str, Any]) -> str | None:
        return stored["path"] if stored and stored.get("path") else None

    def _digest(self) -> str:
        if len(self) > MANY:
            log.info("reading %d images of %s once, to identify them", len(self), self.source.path)
        total = hashlib.sha256(self.labels.tobytes() + self.clusters.tobytes())
        columns = [c for c in (self.source.image_column, self.source.mask_column) if c]
        for row in self._rows.select_columns(columns):
            for column in columns:
                try:
                    total.update(hashlib.sha256(_bytes(row[column])).digest())
                except (OSError, TypeError):  # said when the row is read
                    total.update(b"unreadable")
        return total.hexdigest()[:16]


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


@lru_cache(maxsize=4)
def _open(source: ImageSource) -> LabelledImages:
    import datasets

    datasets.disable_progress_bars()
    if source.on_error not in ON_ERROR:
        raise VitPatchError(f"data.on_error {source.on_error!r}: expected one of {', '.join(ON_ERROR)}")
    if source.limit is not None and (type(source.limit) is not int or source.limit < 1):
        raise VitPatchError(f"data.limit {source.limit!r}: expected a whole number, 1 or more, or null for all")
    if type(source.num_workers) is not int or source.num_workers < 0:
        raise VitPatchError(f"data.num_workers {source.num_workers!r}: expected a whole number, 0 or more")
    if not source.path:
        raise VitPatchError("data.path is missing: say where the images are")
    with _one_line(source):
        rows = source.rows()
    rows = _checked_columns(source, rows)
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    if not len(rows):
        raise VitPatchError(f"data {source.path}: the selection is empty; there is no image to patch")
    return LabelledImages(source, rows)


@contextmanager
def _one_line(source: ImageSource) -> Iterator[None]:
    """Turns what ``datasets`` raises on loading into one line."""
    try:
        yield
    except VitPatchError:
        raise
    except Exception as error:  # datasets, pyarrow, fsspec and httpx share no class
        download = "--repo-type dataset "
        raise VitPatchError(f"data {source.path}: {explain(error, source.path, 'data.path', download)}") from error


def _checked_columns(source: ImageSource, rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with images undecoded, or a ``VitPatchError`` for a column that is missing or of another kind."""
    import datasets

    asked = ("image_column", "label_column", "mask_column", "cluster_column")
    for key, column in ((key, getattr(source, key)) for key in asked):
        if column is not None and column not in rows.column_names:
            raise VitPatchError(f"data.{key} {column!r}: the data have the columns {', '.join(rows.column_names)}")
    for column in filter(None, (source.image_column, source.mask_column)):
        kind = rows.features[column]
        if not isinstance(kind, datasets.Image) and not _stores_images(kind):
            raise VitPatchError(f"data column {column!r} holds {kind}; expected images (encoded bytes)")
        rows = rows.cast_column(column, datasets.Image(decode=False))
    label = rows.features[source.label_column]
    if not isinstance(label, datasets.ClassLabel) and not str(getattr(label, "dtype", "")).startswith(("int", "uint")):
        raise VitPatchError(
            f"data.label_column {source.label_column!r} holds {label}; expected whole numbers or ClassLabel"
        )
    if None in rows[source.label_column]:
        raise VitPatchError(f"data.label_column {source.label_column!r}: some rows have no label")
    return rows


def _stores_images(kind: Any) -> bool:
    """Whether a column without an Image feature holds what one is stored as: a struct of bytes and path, or bytes."""
    return (isinstance(kind, dict) and set(kind) >= {"bytes", "path"}) or getattr(kind, "dtype", None) == "binary"


def check_labels(images: LabelledImages, classes: int, model_names: Sequence[str] | None) -> None:
    """Raises ``VitPatchError`` unless the data's labels are the model's: number, names where both have them, range."""
    data_names = images.label_names
    if data_names is not None and len(data_names) != classes:
        raise VitPatchError(f"the data have {len(data_names)} classes, the model {classes}: not the same labels")
    for index, (of_data, of_model) in enumerate(zip(data_names or (), model_names or (), strict=False)):
        if _folded(of_data) != _folded(of_model):
            which = f"label {index} is {of_data!r} in the data and {of_model!r} in the model"
            raise VitPatchError(f"{which}: names must agree in order; use a model trained on these labels")
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= classes:
        raise VitPatchError(
            f"the data have labels from {low} to {high}; the model's {classes} go from 0 to {classes - 1}"
        )


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "")


class Decoded(Dataset):
    """Rows as tensors at the model's input size; a row that cannot be read is a ``BadImage``."""

    def __init__(self, images: LabelledImages, to_input: Any, masks: bool = True) -> None:
        self.images, self._to_input, self._masks = images, to_input, masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor | None, int, int] | BadImage:
        """(image (3, height, width), mask (1, height, width) or None, id, label)."""
        try:
            image, mask = self.images.image(row), self.images.mask(row) if self._masks else None
        except VitPatchError as error:
            return BadImage(row, str(error))
        masked = None if mask is None else self._to_input(mask)[:1]
        return self._to_input(image), masked, row, int(self.images.labels[row])


def collate(items: Sequence[tuple | BadImage]) -> tuple[ImageBatch | None, list[BadImage]]:
    """The readable items as a batch (``None`` where there is none), and the others."""
    bad = [item for item in items if isinstance(item, BadImage)]
    good = [item for item in items if not isinstance(item, BadImage)]
    if not good:
        return None, bad
    images, masks, ids, labels = zip(*good, strict=True)
    stacked = None if masks[0] is None else torch.stack(masks)
    return ImageBatch(torch.stack(images), torch.tensor(ids), torch.tensor(labels), stacked), bad


class ImageDataModule(lightning.LightningDataModule):
    """Batches of a run in order of ``example_id``, decoded in worker processes."""

    def __init__(self, images: LabelledImages, to_input: Any, batch_size: int) -> None:
        super().__init__()
        self.images, self.batch_size = images, batch_size
        self.decoded = Decoded(images, to_input)

    def predict_dataloader(self) -> DataLoader:
        """(ImageBatch | None, [BadImage]) batches."""
        workers = self.images.source.num_workers
        return DataLoader(
            self.decoded, batch_size=self.batch_size, shuffle=False, num_workers=workers, collate_fn=collate
        )

    def transfer_batch_to_device(self, batch: tuple, device: torch.device, dataloader_idx: int) -> tuple:
        """Moves the images, leaves the errors."""
        images, bad = batch
        return (None if images is None else images.to(device)), bad

    def batch_of(self, rows: Sequence[int]) -> ImageBatch:
        """The given rows as one batch, for pictures."""
        batch, _ = collate([self.decoded[row] for row in rows])
        assert batch is not None and len(batch) == len(rows), f"rows {list(rows)} were readable before"
        return batch
