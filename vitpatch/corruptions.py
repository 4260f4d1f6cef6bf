"""Corruptions: ``(ImageBatch, seed) → images``, batched, on the device the batch is on.

A corruption is a class whose constructor's parameters are the keys of its file in ``conf/corruption/``. Called with
a batch and the run's seed it returns float32 images of the same shape, (batch, 3, height, width), still on the
[0, 1] scale. What is random in it must be a function of the seed and the image's id alone – ``normal_like`` is –
so that a result does not depend on the batch, the order or the device.

What a class says of itself, in class attributes that are all optional (``traits``): ``strength_key``, the parameter
that makes it stronger, 0 = the identity, and ``strongest``, where that ends; ``needs_masks``; ``partner``, which
other image it asks for in ``ImageBatch.others``.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitpatch.spec import BT601_LUMA, ImageBatch, Partner, VitPatchError

Corruption = Callable[[ImageBatch, int], Tensor]


@dataclass(frozen=True)
class Traits:
    """What a corruption says of itself; of a user's own class that says nothing, the defaults."""

    strength_key: str | None = None
    strongest: float = 1.0
    needs_masks: bool = False
    partner: Partner | None = None


def traits(corruption: Corruption) -> Traits:
    """The traits of a corruption, from its attributes."""
    said = {field.name: getattr(corruption, field.name, field.default) for field in fields(Traits)}
    return Traits(**said)


def corrupted(corruption: Corruption, images: ImageBatch, seed: int) -> Tensor:
    """The corruption's images, checked: a user's own class can be anything."""
    name, kind = type(corruption).__name__, traits(corruption).partner
    if kind is not None and images.partners is not None:
        images = replace(images, others=images.partners[kind])
    try:
        result = corruption(images, seed)
    except VitPatchError:
        raise
    except Exception as error:  # a user's class may raise anything: where it did is what they look for
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
        raise VitPatchError(f"corruption {name} raised {type(error).__name__}: {error} ({where})") from error
    if not isinstance(result, Tensor) or result.shape != images.images.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise VitPatchError(f"corruption {name} gave {got}; expected {tuple(images.images.shape)}")
    return result


def normal_like(batch: ImageBatch, seed: int) -> Tensor:
    """Standard normal draws of the images' shape, a function of (seed, id) alone; drawn on the CPU."""
    draws = torch.empty(batch.images.shape, dtype=torch.float32)
    for row, example_id in zip(draws, batch.ids.tolist(), strict=True):
        state = int(np.random.SeedSequence([seed, example_id]).generate_state(1, np.uint64)[0] >> 1)
        row.normal_(generator=torch.Generator().manual_seed(state))
    return draws.to(batch.images.device)


def strength(key: str, value: float, unit: str) -> float:
    """``value`` where it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise VitPatchError(f"corruption.{key} {value!r}: expected a number ≥ 0, {unit}")
    return float(value)


class Identity:
    """Leaves the image as it is: the null, under which every effect is 0."""

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same."""
        return batch.images


class Gray:
    """Takes the colour away: BT.601 luma in all three channels (ITU-R BT.601-7, 2.5.1)."""

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape, three equal channels."""
        luma = batch.images.new_tensor(BT601_LUMA).view(1, 3, 1, 1)
        return (batch.images * luma).sum(1, keepdim=True).expand_as(batch.images)


class Noise:
    """Adds Gaussian pixel noise.

    ``std`` is on the [0, 1] scale of the pixels, at the model's input size; the sum is clipped to [0, 1] unless
    ``clip`` is false. ``std`` 0 is the identity.
    """

    def __init__(self, std: float, clip: bool = True) -> None:
        if not isinstance(clip, bool):
            raise VitPatchError(f"corruption.clip {clip!r}: expected true or false")
        self.std, self.clip = strength("std", std, "on the [0, 1] scale of the pixels"), clip

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        noisy = batch.images + self.std * normal_like(batch, seed)
        return noisy.clamp(0, 1) if self.clip else noisy


class Blur:
    """Gaussian blur.

    ``sigma`` is in pixels of the model's input; the kernel reaches 4 σ to each side and the border pixels are
    repeated outward. ``sigma`` 0 is the identity.
    """

    REACH = 4.0  # kernel half-width in σ, as in scipy.ndimage.gaussian_filter

    def __init__(self, sigma: float) -> None:
        self.sigma = strength("sigma", sigma, "in pixels")

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        radius = int(self.REACH * self.sigma + 0.5)
        if radius == 0:
            return batch.images
        offsets = torch.arange(-radius, radius + 1, device=batch.images.device, dtype=torch.float32)
        kernel = torch.softmax(-(offsets**2) / (2 * self.sigma**2), dim=0)
        kernel = kernel.expand(3, 1, 1, -1)  # (channels, 1, 1, 2 radius + 1): each channel by itself
        wide = F.pad(batch.images, (radius,) * 4, mode="replicate")
        rows = F.conv2d(wide, kernel, groups=3)
        return F.conv2d(rows, kernel.transpose(2, 3), groups=3)
