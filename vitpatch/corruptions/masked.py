"""Corruptions by the object's mask: what is done to the object, and what to the rest.

Masks are soft, (batch, 1, height, width) in [0, 1], 1 = object: a pixel that is half object is changed by half. What
is taken away leaves a hole; ``fill`` is what stands there: ``mean`` the mean colour of the background, ``gray`` 0.5
in all channels, ``white``, ``black``. Means are of the stored (gamma) values.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from vitpatch.checks import Share, check_arguments
from vitpatch.corruptions.base import Corruption, no_masks, uniform
from vitpatch.corruptions.pixels import gaussian_blur, luma
from vitpatch.types import ImageBatch

Fill = Literal["mean", "gray", "white", "black"]
FILLS = {"gray": 0.5, "white": 1.0, "black": 0.0}
"""Colours that are the same for all images."""
TOUCHED = 0.05
"""Of a mask: pixels with less are not counted into the object's box; resizing smears a mask by so much."""


def masks_of(batch: ImageBatch, corruption: Corruption) -> Tensor:
    """The masks. Raises ``VitPatchError`` where there are none."""
    if batch.masks is None:
        raise no_masks(corruption)
    return batch.masks


def mean_colour(images: Tensor, weights: Tensor) -> Tensor:
    """(batch, 3, 1, 1): the mean of ``images`` by ``weights`` (batch, 1, height, width); gray 0.5 where all are 0."""
    total = weights.sum((2, 3), keepdim=True)
    mean = (images * weights).sum((2, 3), keepdim=True) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, mean, 0.5).clamp(0, 1)


def filling(fill: str, images: Tensor, masks: Tensor) -> Tensor:
    """(batch, 3, height, width): what stands where something was taken away."""
    colour = mean_colour(images, 1 - masks) if fill == "mean" else images.new_tensor(FILLS[fill])
    return colour.expand_as(images)


def boxes(masks: Tensor) -> Tensor:
    """(batch, 1, height, width) bool: the smallest upright box around each object; nowhere where there is none."""
    there = masks > TOUCHED
    return _between(there.any(3, keepdim=True), 2) & _between(there.any(2, keepdim=True), 3)


def _between(there: Tensor, dim: int) -> Tensor:
    """True from the first to the last true value."""
    seen = there.int()
    return (seen.cummax(dim).values & seen.flip(dim).cummax(dim).values.flip(dim)).bool()


class _Desaturate(Corruption):
    """Takes the colour of one region away."""

    strength_key, needs_masks = "amount", True

    @check_arguments("corruption")
    def __init__(self, amount: Annotated[Share, "the share of colour taken away"] = 1.0) -> None:
        self.amount = float(amount)

    def _desaturated(self, images: Tensor, where: Tensor) -> Tensor:
        return torch.lerp(images, luma(images).expand_as(images), (self.amount * where).expand_as(images))


class DesaturateObject(_Desaturate):
    """Takes the colour of the object away: BT.601 luma by the soft mask. ``amount`` as of ``gray``, 0 the identity."""

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape; where the mask is 0, the same values."""
        return self._desaturated(batch.images, masks_of(batch, self))


class DesaturateBackground(_Desaturate):
    """Takes the colour around the object away: the counterpart of ``desaturate_object``. ``amount`` 0 the identity."""

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape; where the mask is 1, the same values."""
        return self._desaturated(batch.images, 1 - masks_of(batch, self))


class Silhouette(Corruption):
    """The object's outline, filled with one colour.

    ``fill``: ``mean``, the object's mean colour weighted by the soft mask – colour stays, texture and inner lines
    go –, or ``black`` – colour goes too. ``bg``: ``white``, or ``keep`` the background. ``amount`` mixes image and
    silhouette: 0 the identity, 1 the silhouette. (Black on white: Baker et al. 2018; Geirhos et al. 2019.)
    """

    strength_key, needs_masks = "amount", True

    @check_arguments("corruption")
    def __init__(
        self,
        fill: Literal["mean", "black"] = "mean",
        bg: Literal["white", "keep"] = "white",
        amount: Annotated[Share, "the share of the silhouette in the image"] = 1.0,
    ) -> None:
        self.fill, self.bg, self.amount = fill, bg, float(amount)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        images, masks = batch.images, masks_of(batch, self)
        colour = mean_colour(images, masks) if self.fill == "mean" else images.new_zeros(1)
        ground = images if self.bg == "keep" else torch.ones_like(images)
        silhouette = torch.lerp(ground, colour.expand_as(images), masks.expand_as(images))
        return torch.lerp(images, silhouette, self.amount)


class _Removal(Corruption):
    """Puts ``fill`` where something is taken away."""

    strength_key, needs_masks = "amount", True

    @check_arguments("corruption")
    def __init__(self, fill: Fill = "mean", amount: Annotated[Share, "the share that is taken away"] = 1.0) -> None:
        self.fill, self.amount = fill, float(amount)

    def _filled(self, batch: ImageBatch, where: Tensor) -> Tensor:
        images, masks = batch.images, masks_of(batch, self)
        return torch.lerp(images, filling(self.fill, images, masks), where.expand_as(images))


class ObjectOnly(_Removal):
    """The object without its background (Only-FG of Xiao et al. 2021, Noise or Signal).

    The background fades into ``fill``: by default its own mean colour, so that its colour stays and its texture goes.
    ``amount`` is the share of the way there: 0 the identity, 1 no background.
    """

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape; where the mask is 1, the same values."""
        return self._filled(batch, self.amount * (1 - masks_of(batch, self)))


class BackgroundOnly(_Removal):
    """The background without the object, nor its outline (Only-BG-B of Xiao et al. 2021, Noise or Signal).

    The upright box around the object fades into ``fill``, by default the background's mean colour. ``amount`` is the
    share of the way there: 0 the identity, 1 no object.
    """

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape; outside of the box, where the mask is 0, the same values."""
        masks = masks_of(batch, self)
        return self._filled(batch, self.amount * torch.where(boxes(masks), 1.0, masks))


class Occlude(_Removal):
    """Covers the object from one side, within its outline; the background stays.

    ``amount`` is the share of the object's area, by the soft mask, that is covered: 0 the identity, 1 the whole
    object. The side is a direction drawn for each image; a larger amount covers the same and more. ``fill`` is what
    covers it, mid-gray by default.
    """

    def __init__(self, fill: Fill = "gray", amount: float = 1.0) -> None:
        super().__init__(fill, amount)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape; where the mask is 0, the same values."""
        return self._filled(batch, masks_of(batch, self) * self._covered(batch, seed))

    def _covered(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 1, height, width) of 0 and 1; computed on the CPU, where sums are the same for every device."""
        masks = masks_of(batch, self).cpu().double()
        height, width = masks.shape[2:]
        angle = 2 * math.pi * uniform(batch, seed, 1).double()
        across = torch.arange(width) * angle.cos()[:, :, None]  # (batch, 1, width)
        down = torch.arange(height)[:, None] * angle.sin()[:, :, None]  # (batch, height, 1)
        order = (across + down).flatten(1).argsort(dim=1, stable=True)  # from the side inward
        area = masks.flatten(1).gather(1, order).cumsum(1)
        before = area - masks.flatten(1).gather(1, order)
        covered = torch.zeros_like(area).scatter(1, order, (before < self.amount * area[:, -1:]).double())
        return covered.view_as(masks).to(batch.images)


def infilled(images: Tensor, masks: Tensor) -> Tensor:
    """The background alone, the object's place filled smoothly from around it.

    Normalised convolution (Knutsson & Westin 1993) with a Gaussian of σ = 1/8 of the shorter side; far from any
    background it goes to the background's mean colour.
    """
    sigma, faint = min(images.shape[-2:]) / 8, 0.01
    known = 1 - masks
    near = gaussian_blur(images * known, sigma) + faint * mean_colour(images, known)
    around = near / (gaussian_blur(known, sigma) + faint)
    return torch.lerp(images, around.clamp(0, 1), masks.expand_as(images))
