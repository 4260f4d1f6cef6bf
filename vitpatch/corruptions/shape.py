"""Corruptions that keep lines and lose surfaces, or keep small pieces and lose the whole."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from vitpatch.checks import Ge, Share, check_arguments
from vitpatch.corruptions.base import Corruption, uniform
from vitpatch.corruptions.pixels import luma
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch


class Edges(Corruption):
    """Draws the edges dark on white: 1 − the Sobel magnitude of the BT.601 luma.

    Scaled so that an upright or level step from 0 to 1 is black (Sobel & Feldman 1968, kernels over 4), clipped;
    borders are repeated outward. Edges of equal luma are not seen. ``amount`` mixes image and drawing: 0 the identity,
    1 the drawing.
    """

    strength_key = "amount"

    @check_arguments("corruption")
    def __init__(self, amount: Annotated[Share, "the share of the drawing in the image"] = 1.0) -> None:
        self.amount = float(amount)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape, at amount 1 three equal channels."""
        across = batch.images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
        kernels = torch.stack([across, across.T])[:, None]  # (2, 1, 3, 3): across, down
        slopes = F.conv2d(F.pad(luma(batch.images), (1, 1, 1, 1), mode="replicate"), kernels)
        drawn = 1 - slopes.square().sum(1, keepdim=True).sqrt().clamp(max=1)
        return torch.lerp(batch.images, drawn.expand_as(batch.images), self.amount)


class PatchShuffle(Corruption):
    """Cuts the image into ``grid`` × ``grid`` cells and lets them change places: pieces stay, the whole goes.

    ``amount`` is the share of cells that move – none of them stays where it is –: 0 the identity, 1 all (as in Zhang &
    Zhu 2019, Interpreting adversarially trained CNNs, but for cells that a plain permutation leaves). A smaller share
    moves some of the same cells. Each image's order is a draw of its own.
    """

    strength_key = "amount"

    @check_arguments("corruption")
    def __init__(
        self,
        grid: Annotated[int, Ge(2), "of cells a side"] = 4,
        amount: Annotated[Share, "the share of cells that move"] = 1.0,
    ) -> None:
        self.grid, self.amount = grid, float(amount)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        height, width = batch.images.shape[-2:]
        if height % self.grid or width % self.grid:
            fits = [str(n) for n in range(2, min(height, width) // 2 + 1) if height % n == width % n == 0]
            raise VitPatchError(
                f"corruption.grid {self.grid}: does not divide the model's {height} × {width} pixels; "
                f"take {' or '.join(fits[:6]) or 'another model'}"
            )
        source = self._sources(batch, seed).to(batch.images.device)  # (batch, cells): whose place is taken from where
        cells = batch.images.unflatten(3, (self.grid, -1)).unflatten(2, (self.grid, -1))
        cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (batch, cells, 3, cell height, cell width)
        cells = cells[torch.arange(len(batch), device=source.device)[:, None], source]
        cells = cells.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 4, 2, 5)
        return cells.reshape(batch.images.shape)

    def _sources(self, batch: ImageBatch, seed: int) -> Tensor:
        order = uniform(batch, seed, self.grid**2).argsort(1)
        number = int(self.amount * self.grid**2 + 0.5)
        moved = order[:, : max(number, 2) if number else 0]  # one alone has no place to go
        return torch.arange(self.grid**2).repeat(len(batch), 1).scatter(1, moved, moved.roll(1, dims=1))
