"""Corruptions by spatial frequency, in the Fourier domain: what is kept is a band, or the amplitudes."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from vitpatch.checks import Interval, Share, check_arguments
from vitpatch.corruptions.base import Corruption, uniform
from vitpatch.types import ImageBatch


class LowPass(Corruption):
    """Takes away what is finer than a cutoff: a Butterworth filter, 1 / (1 + (f / cutoff)^2n) with n = 3.

    ``cutoff`` is in cycles per image – of its shorter side –, where half of the amplitude passes; ``amount`` is the
    share of the filter's work: 0 the identity, 1 the filtered image. Order 3 and not a sharp edge, which rings
    (Gonzalez & Woods, Digital Image Processing, 4.8). The image is mirrored at its borders, so that they do not bleed
    into the opposite ones; the mean is kept; what little rings over [0, 1] is clipped.
    """

    strength_key = "amount"
    ORDER = 3

    @check_arguments("corruption")
    def __init__(
        self,
        cutoff: Annotated[float, Interval(ge=0.01, le=10_000), "in cycles per image"],
        amount: Annotated[Share, "the share of the finer content taken away"] = 1.0,
    ) -> None:
        self.cutoff, self.amount = float(cutoff), float(amount)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        if self.amount == 0:
            return batch.images
        height, width = batch.images.shape[-2:]
        mirrored = torch.cat([batch.images, batch.images.flip(-1)], dim=-1)
        mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2)  # (batch, 3, 2 height, 2 width), periodic
        filtered = torch.fft.irfft2(
            torch.fft.rfft2(mirrored) * self._gain(height, width, batch.images), s=(2 * height, 2 * width)
        )
        return torch.lerp(batch.images, filtered[..., :height, :width], self.amount).clamp(0, 1)

    def _gain(self, height: int, width: int, like: Tensor) -> Tensor:
        """(2 height, width + 1): what passes at each frequency of the mirrored image."""
        down = torch.fft.fftfreq(2 * height, device=like.device)[:, None]
        across = torch.fft.rfftfreq(2 * width, device=like.device)
        cycles = (down**2 + across**2).sqrt() * min(height, width)  # per image
        return 1 / (1 + (cycles / self.cutoff) ** (2 * self.ORDER))


class PhaseScramble(Corruption):
    """Adds noise to the phases of the Fourier spectrum and leaves its amplitudes: textures stay, shapes go.

    ``width`` in degrees: each phase is moved by a draw from [-width, width] (Wichmann, Braun & Gegenfurtner 2006;
    Geirhos et al. 2018); 0 the identity, 180 all phases random. One field of draws for the three channels, so that
    colours keep their relation, odd in frequency, so that the image is real; the mean and the other frequencies that
    are their own opposites stay. The spectrum is that of the image repeated without end, so opposite borders meet.
    Clipped to [0, 1], which takes from the amplitudes of images with much contrast.
    """

    strength_key, strongest = "width", 180.0

    @check_arguments("corruption")
    def __init__(self, width: Annotated[float, Interval(ge=0, le=180), "in degrees of phase"] = 180.0) -> None:
        self.width = float(width)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        return self.unclipped(batch, seed).clamp(0, 1) if self.width else batch.images

    def unclipped(self, batch: ImageBatch, seed: int) -> Tensor:
        """The images with the amplitudes of the originals, not yet clipped."""
        turns = math.radians(self.width) * odd_field(batch, seed).to(batch.images.device)
        spectrum = torch.fft.fft2(batch.images) * torch.polar(torch.ones_like(turns), turns)
        return torch.fft.ifft2(spectrum).real


def odd_field(batch: ImageBatch, seed: int) -> Tensor:
    """(batch, 1, height, width) uniform in [-1, 1), one value a frequency, minus itself at the opposite frequency.

    0 where a frequency is its own opposite.
    """
    height, width = batch.images.shape[-2:]
    draws = 2 * uniform(batch, seed, 1, height, width) - 1
    number = torch.arange(height * width).view(height, width)
    opposite = _opposite(number)
    return torch.where(number > opposite, draws, torch.where(number < opposite, -_opposite(draws), 0.0))


def _opposite(field: Tensor) -> Tensor:
    """The field's values at minus each frequency."""
    return field.flip(-2, -1).roll((1, 1), (-2, -1))
