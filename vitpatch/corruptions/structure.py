"""Corruptions that keep a part of an image's structure: low frequencies, amplitudes, edges, or small pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from vitpatch.checks import Ge, Interval, Share
from vitpatch.corruptions.base import Amount, Blend, Corruption, luma, uniform
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch


@dataclass(eq=False)
class LowPass(Blend):
    """Takes away what is finer than a cutoff: a Butterworth filter, 1 / (1 + (f / cutoff)^2n) with n = 3.

    ``cutoff`` is in cycles per image – of its shorter side –, where half of the amplitude passes; ``amount`` is the
    share of the finer content that is taken away: 0 the identity, 1 the filtered image. Order 3 and not a sharp edge,
    which rings (Gonzalez & Woods, Digital Image Processing, 4.8). The image is mirrored at its borders, so that they do
    not bleed into the opposite ones; the mean is kept; what little rings over [0, 1] is clipped.
    """

    cutoff: Annotated[float, Interval(ge=0.01, le=10_000), "in cycles per image"]
    amount: Amount = 1.0

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        return super().__call__(batch, seed).clamp(0, 1) if self.amount else batch.images

    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        images = batch.images
        height, width = images.shape[-2:]
        mirrored = torch.cat([images, images.flip(-1)], dim=-1)
        mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2)  # (batch, 3, 2 height, 2 width), periodic
        down = torch.fft.fftfreq(2 * height, device=images.device)[:, None]
        across = torch.fft.rfftfreq(2 * width, device=images.device)
        cycles = (down**2 + across**2).sqrt() * min(height, width)  # per image, (2 height, width + 1)
        gain = 1 / (1 + (cycles / self.cutoff) ** 6)
        filtered = torch.fft.irfft2(torch.fft.rfft2(mirrored) * gain, s=(2 * height, 2 * width))
        return filtered[..., :height, :width]


@dataclass(eq=False)
class PhaseScramble(Corruption):
    """Adds noise to the phases of the Fourier spectrum and leaves its amplitudes: textures stay, shapes go.

    ``width`` in degrees: each phase is moved by a draw from [-width, width] (Wichmann, Braun & Gegenfurtner 2006;
    Geirhos et al. 2018); 0 the identity, 180 all phases random. One field of draws for the three channels, so that
    colours keep their relation, odd in frequency, so that the image is real; the mean and the other frequencies that
    are their own opposites stay. The spectrum is that of the image repeated without end, so opposite borders meet.
    Clipped to [0, 1], which takes from the amplitudes of images with much contrast.
    """

    width: Annotated[float, Interval(ge=0, le=180), "in degrees of phase"] = 180.0
    strength_key, strongest = "width", 180.0

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        return self.unclipped(batch, seed).clamp(0, 1) if self.width else batch.images

    def unclipped(self, batch: ImageBatch, seed: int) -> Tensor:
        """The images with the amplitudes of the originals, not yet clipped."""
        turns = math.radians(self.width) * odd_draws(batch, seed).to(batch.images.device)
        spectrum = torch.fft.fft2(batch.images) * torch.polar(torch.ones_like(turns), turns)
        return torch.fft.ifft2(spectrum).real


def odd_draws(batch: ImageBatch, seed: int) -> Tensor:
    """(batch, 1, height, width) uniform in [-1, 1), one value a frequency, minus itself at the opposite frequency.

    0 where a frequency is its own opposite.
    """
    height, width = batch.images.shape[-2:]
    draws = 2 * uniform(batch, seed, 1, height, width) - 1
    number = torch.arange(height * width).view(height, width)
    opposite = _at_opposite(number)
    return torch.where(number > opposite, draws, torch.where(number < opposite, -_at_opposite(draws), 0.0))


def _at_opposite(values: Tensor) -> Tensor:
    """The values at minus each frequency."""
    return values.flip(-2, -1).roll((1, 1), (-2, -1))


@dataclass(eq=False)
class Edges(Blend):
    """Draws the edges dark on white: 1 − the Sobel magnitude of the BT.601 luma.

    Scaled so that an upright or level step from 0 to 1 is black (Sobel & Feldman 1968, kernels over 4), clipped;
    borders are repeated outward. Edges of equal luma are not seen. ``amount`` mixes image and drawing: 0 the identity,
    1 the drawing.
    """

    amount: Amount = 1.0

    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        across = batch.images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
        kernels = torch.stack([across, across.T])[:, None]  # (2, 1, 3, 3): across, down
        slopes = F.conv2d(F.pad(luma(batch.images), (1, 1, 1, 1), mode="replicate"), kernels)
        return 1 - slopes.square().sum(1, keepdim=True).sqrt().clamp(max=1)


@dataclass(eq=False)
class PatchShuffle(Corruption):
    """Cuts the image into ``grid`` × ``grid`` cells and lets them change places: pieces stay, the whole goes.

    ``amount`` is the share of cells that move – none of them stays where it is –: 0 the identity, 1 all (as in Zhang &
    Zhu 2019, Interpreting adversarially trained CNNs, but for cells that a plain permutation leaves). A smaller share
    moves some of the same cells. Each image's order is a draw of its own.
    """

    grid: Annotated[int, Ge(2), "of cells a side"] = 4
    amount: Annotated[Share, "the share of cells that move"] = 1.0
    strength_key = "amount"

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        height, width = batch.images.shape[-2:]
        if height % self.grid or width % self.grid:
            fits = [str(n) for n in range(2, min(height, width) // 2 + 1) if height % n == width % n == 0]
            raise VitPatchError(
                f"corruption.grid {self.grid}: does not divide the model's {height} × {width} pixels; "
                f"take {' or '.join(fits[:6]) or 'another model'}"
            )
        source = self._sources(batch, seed).to(batch.images.device)
        cells = batch.images.unflatten(3, (self.grid, -1)).unflatten(2, (self.grid, -1))
        cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (batch, cells, 3, cell height, cell width)
        cells = cells[torch.arange(len(batch), device=source.device)[:, None], source]
        cells = cells.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 4, 2, 5)
        return cells.reshape(batch.images.shape)

    def _sources(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, cells): the cell that comes to each place."""
        order = uniform(batch, seed, self.grid**2).argsort(1)
        number = int(self.amount * self.grid**2 + 0.5)
        moved = order[:, : max(number, 2) if number else 0]  # one alone has no place to go
        return torch.arange(self.grid**2).repeat(len(batch), 1).scatter(1, moved, moved.roll(1, dims=1))
