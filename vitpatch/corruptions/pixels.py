"""Corruptions of all pixels alike: colour, noise, blur, and none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from vitpatch.corruptions.base import Amount, Blend, Corruption, Strength, normal_like
from vitpatch.types import BT601_LUMA, ImageBatch


def luma(images: Tensor) -> Tensor:
    """(batch, 3, height, width) → (batch, 1, height, width): ITU-R BT.601-7, 2.5.1, of the stored (gamma) values."""
    return (images * images.new_tensor(BT601_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Each channel of (batch, channels, height, width) blurred by ``sigma`` pixels; the border is repeated outward."""
    radius, channels = int(4 * sigma + 0.5), images.shape[1]
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


@dataclass(eq=False)
class Gray(Blend):
    """Takes the colour away: BT.601 luma in all three channels (ITU-R BT.601-7, 2.5.1).

    ``amount`` is the share of colour that is taken away: 0 the identity, 1 no colour.
    """

    amount: Amount = 1.0

    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        return luma(batch.images)


@dataclass(eq=False)
class Noise(Corruption):
    """Adds Gaussian pixel noise.

    ``std`` is on the [0, 1] scale of the pixels, at the model's input size; the sum is clipped to [0, 1] unless
    ``clip`` is false. ``std`` 0 is the identity.
    """

    std: Annotated[Strength, "on the [0, 1] scale of the pixels"]
    clip: bool = True
    strength_key = "std"

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        noisy = batch.images + self.std * normal_like(batch, seed)
        return noisy.clamp(0, 1) if self.clip else noisy


@dataclass(eq=False)
class Blur(Corruption):
    """Gaussian blur.

    ``sigma`` is in pixels of the model's input; the kernel reaches 4 σ to each side, as in
    ``scipy.ndimage.gaussian_filter``, and the border pixels are repeated outward. ``sigma`` 0 is the identity; 40 at
    224 pixels is where the widest published series ends (Geirhos et al. 2018, Generalisation in humans and deep
    neural networks).
    """

    sigma: Annotated[Strength, "in pixels"]
    strength_key, strongest = "sigma", 40.0

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        return gaussian_blur(batch.images, self.sigma)
