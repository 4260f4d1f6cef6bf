"""Images as they are given in Python – PIL's, arrays, tensors – as pixels, read as those of files are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitpatch.checks import whole_numbers
from vitpatch.data.images import to_mask, to_rgb
from vitpatch.data.partners import check_partners, choose_partners
from vitpatch.errors import VitPatchError
from vitpatch.formatting import first_few
from vitpatch.types import BT601_LUMA, ImageBatch, Partner

ToInput = Callable[[Image.Image], Tensor]
"""A PIL RGB image → float32 (3, height, width) in [0, 1]."""


@dataclass(frozen=True)
class GivenImages:
    """How images that are given become pixels: by a model's ``to_input``, to its ``size`` (height, width), or, where
    these are ``None``, as they are."""

    to_input: ToInput | None = None
    size: tuple[int, int] | None = None

    def batch(self, images: Any, masks: Any, ids: Any, labels: Any) -> ImageBatch:
        """A batch; ids that are not given are the rows, labels 0, and there may be no masks.

        Raises ``VitPatchError``, which names the argument, for what cannot be read or is not of each image.
        """
        pixels = self._pixels("images", images, self.size)
        number = len(pixels)
        ids = _of_each("ids", range(number) if ids is None else ids, number)
        labels = _of_each("labels", [0] * number if labels is None else labels, number)
        if masks is not None:
            masks = self._like("masks", masks, pixels)
        return ImageBatch(pixels, ids, labels, masks)

    def pairs(self, pairs: Any, batch: ImageBatch) -> ImageBatch:
        """The images' own counterparts, which have their masks, ids and labels."""
        return replace(batch, images=self._like("pairs", pairs, batch.images))

    def _like(self, key: str, images: Any, pixels: Tensor) -> Tensor:
        """What is given of each of some images, of their size."""
        others = self._pixels(key, images, tuple(pixels.shape[2:]))
        if len(others) != len(pixels):
            raise VitPatchError(f"{key}: {len(others)} of them, {len(pixels)} images")
        return others

    def _pixels(self, key: str, images: Any, size: tuple[int, int] | None) -> Tensor:
        pixels = read_pixels(key, images, self.to_input)
        if size not in (None, found := tuple(pixels.shape[2:])):
            raise VitPatchError(f"{key}: {found[0]} × {found[1]} pixels; expected {size[0]} × {size[1]}")
        return pixels


def read_pixels(key: str, images: Any, to_input: ToInput | None = None) -> Tensor:
    """Images → float32 (images, 3, height, width) in [0, 1]; where ``key`` is ``masks`` (images, 1, height, width).

    PIL images, one or several, and bytes (images, height, width, 3), of masks (images, height, width), become what
    ``to_input`` makes of them, or keep their size; numbers must have the shape of the result, and stay as they are.
    """
    is_mask = key == "masks"
    channels, last = (1, "") if is_mask else (3, ", 3")
    expected = f"PIL images, bytes (images, height, width{last}), or numbers (images, {channels}, height, width)"
    if isinstance(images, Image.Image):
        images = [images]
    if not isinstance(images, np.ndarray | Tensor):
        images = list(images) if isinstance(images, Iterable) else [images]
        if not images or not all(isinstance(image, Image.Image) for image in images):
            got = f"a list of {type(images[0]).__name__}" if images else "nothing"
            raise VitPatchError(f"{key}: got {got}; expected {expected}")
        return _stack(key, images, to_input)
    pixels = torch.as_tensor(images).cpu()
    is_bytes = pixels.dtype == torch.uint8 and pixels.dim() == 3 + (not is_mask) and (is_mask or pixels.shape[3] == 3)
    if is_bytes and len(pixels):
        return _stack(key, [Image.fromarray(image) for image in pixels.numpy()], to_input)
    if not pixels.is_floating_point() or pixels.dim() != 4 or pixels.shape[1] != channels or not len(pixels):
        got = f"{str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}"
        raise VitPatchError(f"{key}: got {got}; expected {expected}")
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= 1:
        raise VitPatchError(f"{key}: values {low:.3g} to {high:.3g}; expected 0 to 1, as before normalisation")
    return pixels.float()


def _stack(key: str, images: Sequence[Image.Image], to_input: ToInput | None) -> Tensor:
    as_rgb, channels = (to_mask, 1) if key == "masks" else (to_rgb, 3)
    pixels = [(to_input or _to_tensor)(as_rgb(image))[:channels] for image in images]
    sizes = dict.fromkeys(f"{image.shape[1]} × {image.shape[2]}" for image in pixels)
    if len(sizes) > 1:
        raise VitPatchError(f"{key}: of {first_few([*sizes])} pixels; give the model too, which has one size for all")
    return torch.stack(pixels)


def _of_each(key: str, values: Any, number: int) -> Tensor:
    """Whole numbers, one an image, as a tensor."""
    numbers = whole_numbers(key, values)
    if len(numbers) != number:
        raise VitPatchError(f"{key}: {len(numbers)} of them, {number} images")
    return torch.tensor(numbers, dtype=torch.int64)


def choose_others(batch: ImageBatch, kind: Partner, clusters: Any, seed: int, corruption: str) -> ImageBatch:
    """Each image's partner among the others, which a run on these images would choose; not for ``pair``.

    ``clusters`` (images,) of any kind, ``None`` = every image by itself. Raises ``VitPatchError`` where an image has no
    partner, for the ``corruption`` of this name.
    """
    clusters = batch.ids.numpy() if clusters is None else np.asarray(clusters)
    if len(clusters) != len(batch):
        raise VitPatchError(f"clusters: {len(clusters)} of them, {len(batch)} images")
    light = np.array([luminance(image) for image in batch.images])
    positions = choose_partners(kind, batch.labels.numpy(), clusters, seed, light)
    check_partners(kind, positions, batch.ids.numpy(), corruption)
    return batch.part(torch.from_numpy(positions))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def luminance(image: Tensor) -> float:
    """The mean BT.601 luma of an image (3, height, width)."""
    return float(image.mean((1, 2)) @ torch.tensor(BT601_LUMA))
