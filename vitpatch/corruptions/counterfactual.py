"""Corruptions that take something from another image: the image's partner, by ``ImageBatch.others``.

``kind`` is which image that is: ``same_class``, ``other_class``, ``nearest_luminance`` (of another class), or
``pair``, the data's own; ``vitpatch.data.partners`` chooses it, always of another cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitpatch.corruptions.base import Amount, Blend, missing_masks
from vitpatch.corruptions.masked import inpaint
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch, Partner


@dataclass(eq=False)
class OtherImage(Blend):
    """Another image in the place of this one: the counterfactual input (Meng et al. 2022; Zhang & Nanda 2024).

    ``amount`` mixes the two: 0 the identity, 1 the partner.
    """

    kind: Partner = Partner.OTHER_CLASS
    amount: Amount = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.partner = Partner(self.kind)

    def _partners(self, batch: ImageBatch) -> ImageBatch:
        if batch.others is None:
            raise VitPatchError(
                f"corruption {self.option_name} needs a partner of each image ({self.partner}) and the batch has "
                "none: give ImageBatch.others, as patch.py does"
            )
        return batch.others

    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        return self._partners(batch).images


class BackgroundSwap(OtherImage):
    """The object before its partner's background (Mixed-Rand, Mixed-Same of Xiao et al. 2021, Noise or Signal).

    The partner's own object is filled from around it (``masked.inpaint``); the object is laid on by its soft mask.
    Of a ``pair`` the image's mask stands for both.
    ``amount`` is the share of the way there: 0 the identity, 1 the partner's background.
    """

    region, needs_masks = "background", True

    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        others = self._partners(batch)
        if others.masks is None:
            raise missing_masks(self)
        return inpaint(others.images, others.masks)
