"""The moments of patch embeddings over training images: what noise on embeddings is scaled by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


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
