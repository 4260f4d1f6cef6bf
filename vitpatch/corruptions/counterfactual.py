"""Corruptions that take something from another image: the image's partner, by ``ImageBatch.others``.

``kind`` is which image that is: ``same_class``, ``other_class``, ``nearest_luminance`` (of another class), or
``pair``, the data's own; ``vitpatch.data.partners`` chooses it, always of another cluster.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from vitpatch.checks import Share, check_arguments
from vitpatch.corruptions.base import Corruption, no_masks
from vitpatch.corruptions.masked import infilled, masks_of
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch, Partner


class _FromPartner(Corruption):
    """Takes something from the partner."""

    strength_key = "amount"

    @check_arguments("corruption")
    def __init__(
        self,
        kind: Partner = Partner.OTHER_CLASS,
        amount: Annotated[Share, "the share that is the partner's"] = 1.0,
    ) -> None:
        self.partner, self.amount = Partner(kind), float(amount)

    def _others(self, batch: ImageBatch) -> ImageBatch:
        if batch.others is None:
            raise VitPatchError(
                f"corruption {self.option_name} needs a partner of each image ({self.partner}) and the batch has "
                "none: give ImageBatch.others, as patch.py does"
            )
        return batch.others


class OtherImage(_FromPartner):
    """Another image in the place of this one: the counterfactual input (Meng et al. 2022; Zhang & Nanda 2024).

    ``amount`` mixes the two: 0 the identity, 1 the partner.
    """

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape, at amount 1 the partners' images."""
        return torch.lerp(batch.images, self._others(batch).images, self.amount)


class BackgroundSwap(_FromPartner):
    """The object before its partner's background (Mixed-Rand, Mixed-Same of Xiao et al. 2021, Noise or Signal).

    The partner's own object is filled from around it (``masked.infilled``); the object is laid on by its soft mask.
    Of a ``pair`` the image's mask stands for both.
    ``amount`` is the share of the way there: 0 the identity, 1 the partner's background.
    """

    needs_masks = True

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape; where the mask is 1, the same values."""
        masks, others = masks_of(batch, self), self._others(batch)
        if others.masks is None:
            raise no_masks(self)
        ground = infilled(others.images, others.masks)
        return torch.lerp(batch.images, ground, (self.amount * (1 - masks)).expand_as(ground))
