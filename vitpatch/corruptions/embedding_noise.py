"""Noise on patch embeddings, as causal tracing of language models has it on the subject's word embeddings.

Meng et al. 2022, Locating and Editing Factual Associations in GPT (section 2.1, appendix B.1): ν = 3 standard
deviations of embeddings. There the embeddings are those of the subject's tokens, here those of all image patches,
before positions are added; special tokens, which hold nothing of the image, get none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpatch.checks import Count, check_arguments
from vitpatch.corruptions.pixels import USE_ALONE, OnEmbeddings, Strength, called
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch

APART = 1
"""Sets these draws apart from those of pixel noise with the same seed and id."""


class EmbeddingNoise:
    """Adds Gaussian noise to the patch embeddings.

    Its standard deviation is ``std`` times that of patch embeddings over training images: of all values pooled
    (``scale`` ``global``, one number) or channel by channel (``channel``). ``draws`` are the independent draws an image
    has; probabilities are averaged over them. ``std`` 0 is the identity.
    """

    strength_key, strongest = "std", 10.0

    @check_arguments("corruption")
    def __init__(
        self,
        std: Annotated[Strength, "in standard deviations of patch embeddings"] = 3.0,
        scale: Literal["global", "channel"] = "global",
        draws: Count = 1,
    ) -> None:
        self.std, self.scale, self.draws = float(std), scale, draws
        self._spread: Tensor | None = None

    def with_spread(self, spread: float | NDArray[np.floating]) -> EmbeddingNoise:
        """A copy that knows the embeddings' standard deviation: one number, or (width,) of each channel."""
        new = copy.copy(self)
        new._spread = torch.as_tensor(spread, dtype=torch.float32)
        return new

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same: the pixels are left alone.

        Raises ``VitPatchError`` where the spread is not known: then nobody adds the noise inside the model, as when
        another corruption calls this one.
        """
        if self._spread is None:
            raise VitPatchError(USE_ALONE.format(called(self)))
        return batch.images

    def noise(self, ids: Tensor, seed: int, patches: int, width: int, draw: int = 0) -> Tensor:
        """What is added to the patch embeddings, float32 (batch, patches, width), on the CPU.

        ``ids`` (batch,). A function of (seed, id, draw) alone, whatever ``std`` is.
        """
        assert self._spread is not None, "the spread of the embeddings is not known: with_spread"
        return self.std * self._spread * _normal(ids, seed, patches, width, draw)


def _normal(ids: Tensor, seed: int, patches: int, width: int, draw: int) -> Tensor:
    """Standard normal draws (batch, patches, width), a function of (seed, id, draw) alone."""
    draws = torch.empty(len(ids), patches, width, dtype=torch.float32)
    for row, example_id in zip(draws, ids.tolist(), strict=True):
        sequence = np.random.SeedSequence([seed, example_id, draw], spawn_key=(APART,))
        state = int(sequence.generate_state(1, np.uint64)[0] >> 1)
        row.normal_(generator=torch.Generator().manual_seed(state))
    return draws


def noise_of(corruption: Any, ids: Tensor, seed: int, embedded: tuple[int, int], draw: int = 0) -> Tensor | None:
    """The noise on patch embeddings of a corruption that has some; ``embedded`` is the model's (patches, width)."""
    return corruption.noise(ids, seed, *embedded, draw) if isinstance(corruption, OnEmbeddings) else None


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


def moments(batches: Iterable[Tensor]) -> Moments:
    """The moments of embeddings (batch, patches, width) in batches, one pass, in float64.

    Chan, Golub & LeVeque 1983: sums of squares about the mean are merged, so that a large mean costs no digits.
    """
    parts = [_moments_of(batch.double().flatten(0, 1)) for batch in batches]
    return _merged(parts)


def _moments_of(values: Tensor) -> Moments:
    """Of values (number, width)."""
    mean = values.mean(0)
    return Moments(len(values), mean.cpu().numpy(), ((values - mean) ** 2).sum(0).cpu().numpy())


def _merged(parts: Sequence[Moments]) -> Moments:
    numbers = np.array([part.number for part in parts])[:, None]
    means = np.stack([part.mean for part in parts])
    mean = (numbers * means).sum(0) / numbers.sum()
    squares = sum(part.squares for part in parts) + (numbers * (means - mean) ** 2).sum(0)
    return Moments(int(numbers.sum()), mean, squares)
