"""Corruptions of all pixels alike: colour, noise, blur, and none."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from vitpatch.checks import Share, check_arguments
from vitpatch.corruptions.base import Corruption, Strength, normal_like
from vitpatch.types import BT601_LUMA, ImageBatch


def luma(images: Tensor) -> Tensor:
    """(batch, 3, height, width) → (batch, 1, height, width): ITU-R BT.601-7, 2.5.1, of the stored (gamma) values."""
    return (images * images.new_tensor(BT601_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def gaussian_blur(images: Tensor, sigma: float, reach: float = 4.0) -> Tensor:
    """Each channel of (batch, channels, height, width) blurred, ``sigma`` in pixels; the border is repeated outward."""
    radius, channels = int(reach * sigma + 0.5), images.shape[1]
    if radius == 0:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    kernel = kernel.expand(channels, 1, 1, -1)  # (channels, 1, 1, 2 radius + 1): each channel by itself
    wide = F.pad(images, (radius,) * 4, mode="replicate")
    rows = F.conv2d(wide, kernel, groups=channels)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=channels)


class Identity(Corruption):
    """Leaves the image as it is: the null, under which every effect is 0."""


class Gray(Corruption):
    """Takes the colour away: BT.601 luma in all three channels (ITU-R BT.601-7, 2.5.1).

    ``amount`` is the share of the way there: 0 the identity, 1 no colour.
    """

    strength_key = "amount"

    @check_arguments("corruption")
    def __init__(self, amount: Annotated[Share, "the share of colour taken away"] = 1.0) -> None:
        self.amount = float(amount)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape, at amount 1 three equal channels."""
        return torch.lerp(batch.images, luma(batch.images).expand_as(batch.images), self.amount)


class Noise(Corruption):
    """Adds Gaussian pixel noise.

    ``std`` is on the [0, 1] scale of the pixels, at the model's input size; the sum is clipped to [0, 1] unless
    ``clip`` is false. ``std`` 0 is the identity.
    """

    strength_key = "std"

    @check_arguments("corruption")
    def __init__(self, std: Annotated[Strength, "on the [0, 1] scale of the pixels"], clip: bool = True) -> None:
        self.std, self.clip = float(std), clip

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        noisy = batch.images + self.std * normal_like(batch, seed)
        return noisy.clamp(0, 1) if self.clip else noisy


class Blur(Corruption):
    """Gaussian blur.

    ``sigma`` is in pixels of the model's input; the kernel reaches 4 σ to each side, as in
    ``scipy.ndimage.gaussian_filter``, and the border pixels are repeated outward. ``sigma`` 0 is the identity; 40 at
    224 pixels is where the widest published series ends (Geirhos et al. 2018, Generalisation in humans and deep
    neural networks).
    """

    strength_key, strongest = "sigma", 40.0

    @check_arguments("corruption")
    def __init__(self, sigma: Annotated[Strength, "in pixels"]) -> None:
        self.sigma = float(sigma)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        return gaussian_blur(batch.images, self.sigma)
