"""Noise on patch embeddings, as in causal tracing of language models, which adds it to the subject's embeddings.

Meng et al. 2022, Locating and Editing Factual Associations in GPT (section 2.1, appendix B.1): ν = 3 standard
deviations of embeddings. There the embeddings are those of the subject's tokens, here those of all image patches,
before positions are added; special tokens, which hold nothing of the image, get none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vitpatch.checks import Count
from vitpatch.corruptions.base import USE_ALONE, Corruption, Strength, generators
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch

SPAWN_KEY = (1,)
"""Makes these draws others than those of pixel noise with the same seed and id."""


@dataclass(frozen=True)
class Moments:
    """Number, means and sums of squared deviations of values by channel: (), (width,), (width,), float64."""

    number: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    def spread(self, scale: str) -> NDArray[np.float64]:
        """The standard deviation, n − 1 in the denominator: ``global`` (), ``channel`` (width,).

        ``channel``: of a channel's values over all patches of all images, about the channel's mean. ``global``: of all
        values of all channels together, about their one mean, as ``Tensor.std`` of the whole does.
        """
        if scale == "channel":
            return np.sqrt(self.squares / (self.number - 1))
        between = self.number * ((self.mean - self.mean.mean()) ** 2).sum()
        return np.sqrt((self.squares.sum() + between) / (self.number * len(self.mean) - 1))


def measure_moments(batches: Iterable[Tensor]) -> Moments:
    """The moments of patch embeddings, batches of (images, patches, width), in one pass in float64.

    Chan, Golub & LeVeque 1983: sums of squares about the mean are merged, so that a large mean costs no digits.
    """
    parts = [_moments(batch.double().flatten(0, 1)) for batch in batches]
    numbers = np.array([part.number for part in parts])[:, None]
    means = np.stack([part.mean for part in parts])
    mean = (numbers * means).sum(0) / numbers.sum()
    squares = sum(part.squares for part in parts) + (numbers * (means - mean) ** 2).sum(0)
    return Moments(int(numbers.sum()), mean, squares)


def _moments(values: Tensor) -> Moments:
    """The moments of one batch of values (number, width)."""
    mean = values.mean(0)
    return Moments(len(values), mean.cpu().numpy(), ((values - mean) ** 2).sum(0).cpu().numpy())


@dataclass(eq=False)
class EmbeddingNoise(Corruption):
    """Adds Gaussian noise to the patch embeddings.

    Its standard deviation is ``std`` times that of patch embeddings over training images: of all values pooled
    (``scale`` ``global``, one number) or channel by channel (``channel``). ``draws`` are the independent draws an image
    has; its probabilities are the mean over them. ``std`` 0 is the identity.
    """

    std: Annotated[Strength, "in standard deviations of patch embeddings"] = 3.0
    scale: Literal["global", "channel"] = "global"
    draws: Count = 1
    strength_key, strongest = "std", 10.0
    is_inside_model = needs_training = True
    spread = None
    """The embeddings' standard deviation, an array, once ``with_statistics`` has it."""

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

        Raises ``VitPatchError`` where the spread is not known: then the noise is not added inside the model either,
        for instance because another corruption calls this one.
        """
        if self.spread is None:
            raise VitPatchError(USE_ALONE.format(self.option_name))
        return batch.images

    def embedding_noise(self, ids: Tensor, seed: int, embedding_shape: tuple[int, int], draw: int = 0) -> Tensor:
        """What is added to the patch embeddings, float32 (batch, patches, width), on the CPU.

        ``ids`` (batch,); ``embedding_shape`` is (patches, width). A function of (seed, id, draw) alone, whatever
        ``std`` is.
        """
        assert self.spread is not None, "the spread of the embeddings is not known: with_statistics"
        streams = generators(ids, seed, draw, spawn_key=SPAWN_KEY)
        draws = torch.stack([torch.randn(embedding_shape, generator=generator) for generator in streams])
        return self.std * torch.as_tensor(self.spread, dtype=torch.float32) * draws
