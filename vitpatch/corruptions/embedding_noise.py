"""Noise on patch embeddings, as causal tracing of language models has it on the subject's word embeddings.

Meng et al. 2022, Locating and Editing Factual Associations in GPT (section 2.1, appendix B.1): ν = 3 standard
deviations of embeddings. There the embeddings are those of the subject's tokens, here those of all image patches,
before positions are added; special tokens, which hold nothing of the image, get none.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vitpatch.checks import Count, check_arguments
from vitpatch.corruptions.base import USE_ALONE, Corruption, Strength, generators
from vitpatch.corruptions.moments import Moments
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch

SPAWN_KEY = (1,)
"""Sets these draws apart from those of pixel noise with the same seed and id."""


class EmbeddingNoise(Corruption):
    """Adds Gaussian noise to the patch embeddings.

    Its standard deviation is ``std`` times that of patch embeddings over training images: of all values pooled
    (``scale`` ``global``, one number) or channel by channel (``channel``). ``draws`` are the independent draws an image
    has; probabilities are average_draws over them. ``std`` 0 is the identity.
    """

    strength_key, strongest = "std", 10.0
    is_inside_model = needs_training = True

    @check_arguments("corruption")
    def __init__(
        self,
        std: Annotated[Strength, "in standard deviations of patch embeddings"] = 3.0,
        scale: Literal["global", "channel"] = "global",
        draws: Count = 1,
    ) -> None:
        self.std, self.scale, self.draws = float(std), scale, draws
        self.spread: NDArray[np.floating] | None = None

    def with_statistics(self, moments: Moments) -> EmbeddingNoise:
        """A copy that knows the embeddings' standard deviation."""
        return self.with_spread(moments.spread(self.scale))

    def with_spread(self, spread: ArrayLike) -> EmbeddingNoise:
        """A copy that knows the embeddings' standard deviation: one number, or (width,) of each channel."""
        new = copy.copy(self)
        new.spread = np.asarray(spread)
        return new

    def describe_statistics(self) -> dict[str, Any]:
        """``embedding_std``: one number, or of the channels how many, their mean, the smallest and the largest."""
        std = self.spread
        if std.ndim == 0:
            return {"embedding_std": float(std)}
        channels = {"channels": len(std), "mean": std.mean(), "smallest": std.min(), "largest": std.max()}
        return {"embedding_std": channels}

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same: the pixels are left alone.

        Raises ``VitPatchError`` where the spread is not known: then nobody adds the noise inside the model, as when
        another corruption calls this one.
        """
        if self.spread is None:
            raise VitPatchError(USE_ALONE.format(self.option_name))
        return batch.images

    def embedding_noise(self, ids: Tensor, seed: int, embedded: tuple[int, int], draw: int = 0) -> Tensor:
        """What is added to the patch embeddings, float32 (batch, patches, width), on the CPU.

        ``ids`` (batch,); ``embedded`` is (patches, width). A function of (seed, id, draw) alone, whatever ``std`` is.
        """
        assert self.spread is not None, "the spread of the embeddings is not known: with_statistics"
        draws = torch.empty(len(ids), *embedded, dtype=torch.float32)
        for row, generator in zip(draws, generators(ids, seed, draw, spawn_key=SPAWN_KEY), strict=True):
            row.normal_(generator=generator)
        return self.std * torch.as_tensor(self.spread, dtype=torch.float32) * draws
