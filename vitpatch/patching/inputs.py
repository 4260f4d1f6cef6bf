"""What a plan is run on, besides the model: pixels, masks, noise, and the values of donors that are no run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitpatch.models.vit import PatchableViT, Place
from vitpatch.types import BaseRun, Run

Constants = Mapping[Place, Tensor]
"""Values of a site, the same for all images, before a fixed layer scale: (tokens, width); by head (heads, tokens, head
width); of ``pattern`` (heads, query tokens, key tokens)."""


@dataclass(frozen=True)
class Given:
    """``pixels`` normalised, (images, 3, height, width) by base run; ``masks`` bool (images, tokens) by token group.

    ``constants`` of a donor that is no run; ``noise`` (images, image patches, width) of the corrupted run's patch
    embeddings.
    """

    pixels: Mapping[Run, Tensor]
    masks: Mapping[str, Tensor]
    constants: Constants | None = None
    noise: Tensor | None = None

    def noise_of(self, run: Run) -> Tensor | None:
        """The noise on a run's patch embeddings."""
        return self.noise if run is BaseRun.CORRUPT else None

    def embedded(self, model: PatchableViT, runs: Sequence[Run]) -> Tensor:
        """The streams that enter the first block, (runs · images, tokens, width)."""
        pixels = torch.cat([self.pixels[run] for run in runs])
        if self.noise is None:
            return model.embed(pixels)
        quiet = torch.zeros_like(self.noise)
        return model.embed(pixels, torch.cat([quiet if self.noise_of(run) is None else self.noise for run in runs]))
