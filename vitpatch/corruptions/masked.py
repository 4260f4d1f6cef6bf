"""Corruptions of the object or of its background, by the object's mask.

Masks are soft, (batch, 1, height, width) in [0, 1], 1 = object: a pixel that is half object is changed by half.
``fill`` is the colour that replaces what is taken away: ``mean`` the mean colour of the background, ``gray`` 0.5 in all
channels, ``white``, ``black``. Means are of the stored (gamma) values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitpatch.corruptions.base import Amount, Blend, Gray, gaussian_blur, uniform
from vitpatch.types import ImageBatch

Fill = Literal["mean", "gray", "white", "black"]
FILLS = {"gray": 0.5, "white": 1.0, "black": 0.0}
"""Colours that are the same for all images."""
LEAST_MASK = 0.05
"""Pixels whose mask is less are not counted into the object's box; resizing smears a mask by so much."""


def mean_colour(images: Tensor, weights: Tensor) -> Tensor:
    """(batch, 3, 1, 1): the mean of ``images`` by ``weights`` (batch, 1, height, width); gray 0.5 where all are 0."""
    total = weights.sum((2, 3), keepdim=True)
    mean = (images * weights).sum((2, 3), keepdim=True) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, mean, 0.5).clamp(0, 1)


def bounding_boxes(masks: Tensor) -> Tensor:
    """(batch, 1, height, width) bool: the smallest upright box around each object; nowhere where there is none."""
    is_object = masks > LEAST_MASK
    return _first_to_last(is_object.any(3, keepdim=True), 2) & _first_to_last(is_object.any(2, keepdim=True), 3)


def _first_to_last(values: Tensor, dim: int) -> Tensor:
    """True from the first to the last true value."""
    values = values.int()
    return (values.cummax(dim).values & values.flip(dim).cummax(dim).values.flip(dim)).bool()


class DesaturateObject(Gray):
    """Takes the colour of the object away: BT.601 luma by the soft mask. ``amount`` as of ``gray``, 0 the identity."""

    region, needs_masks = "object", True


class DesaturateBackground(Gray):
    """Takes the colour around the object away: the counterpart of ``desaturate_object``. ``amount`` 0 the identity."""

    region, needs_masks = "background", True


@dataclass(eq=False)
class Silhouette(Blend):
    """The object's outline, filled with one colour.

    ``fill``: ``mean``, the object's mean colour weighted by the soft mask – colour stays, texture and inner lines
    go –, or ``black`` – colour goes too. ``bg``: ``white``, or ``keep`` the background. ``amount`` mixes image and
    silhouette: 0 the identity, 1 the silhouette. (Black on white: Baker et al. 2018; Geirhos et al. 2019.)
    """

    fill: Literal["mean", "black"] = "mean"
    bg: Literal["white", "keep"] = "white"
    amount: Amount = 1.0
    needs_masks = True

    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        images, masks = batch.images, self.masks_of(batch)
        colour = mean_colour(images, masks) if self.fill == "mean" else images.new_zeros(1)
        ground = images if self.bg == "keep" else torch.ones_like(images)
        return torch.lerp(ground, colour, masks)


@dataclass(eq=False)
class _Removal(Blend):
    """Replaces a part of the image by ``fill``."""

    fill: Fill = "mean"
    amount: Amount = 1.0
    needs_masks = True

    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        if self.fill == "mean":
            return mean_colour(batch.images, 1 - self.masks_of(batch))
        return batch.images.new_tensor(FILLS[self.fill])


class ObjectOnly(_Removal):
    """The object without its background (Only-FG of Xiao et al. 2021, Noise or Signal).

    The background fades into ``fill``: by default its own mean colour, so that its colour stays and its texture goes.
    ``amount`` is the share of the way there: 0 the identity, 1 no background.
    """

    region = "background"


class BackgroundOnly(_Removal):
    """The background without the object, nor its outline (Only-BG-B of Xiao et al. 2021, Noise or Signal).

    The upright box around the object fades into ``fill``, by default the background's mean colour. ``amount`` is the
    share of the way there: 0 the identity, 1 no object.
    """

    def _weight(self, batch: ImageBatch, seed: int) -> Tensor:
        masks = self.masks_of(batch)
        return self.amount * torch.where(bounding_boxes(masks), 1.0, masks)


@dataclass(eq=False)
class Occlude(_Removal):
    """Covers the object from one side, within its outline; the background stays.

    ``amount`` is the share of the object's area, by the soft mask, that is covered: 0 the identity, 1 the whole
    object. The side is a direction drawn for each image; a larger amount covers the same and more. ``fill`` is what
    covers it, mid-gray by default.
    """

    fill: Fill = "gray"

    def _weight(self, batch: ImageBatch, seed: int) -> Tensor:
        return self.masks_of(batch) * self._cover(batch, seed)

    def _cover(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 1, height, width) of 0 and 1; computed on the CPU, where sums are the same for every device."""
        masks = self.masks_of(batch).cpu().double()
        height, width = masks.shape[2:]
        angle = 2 * math.pi * uniform(batch, seed, 1).double()
        across = torch.arange(width) * angle.cos()[:, :, None]  # (batch, 1, width)
        down = torch.arange(height)[:, None] * angle.sin()[:, :, None]  # (batch, height, 1)
        order = (across + down).flatten(1).argsort(dim=1, stable=True)  # from the side inward
        area = masks.flatten(1).gather(1, order).cumsum(1)
        before = area - masks.flatten(1).gather(1, order)
        cover = torch.zeros_like(area).scatter(1, order, (before < self.amount * area[:, -1:]).double())
        return cover.view_as(masks).to(batch.images)


def inpaint(images: Tensor, masks: Tensor) -> Tensor:
    """The background alone, the object's place filled smoothly from around it.

    Normalised convolution (Knutsson & Westin 1993) with a Gaussian of σ = 1/8 of the shorter side; far from any
    background it goes to the background's mean colour.
    """
    sigma, faint = min(images.shape[-2:]) / 8, 0.01
    known = 1 - masks
    near = gaussian_blur(images * known, sigma) + faint * mean_colour(images, known)
    around = near / (gaussian_blur(known, sigma) + faint)
    return torch.lerp(images, around.clamp(0, 1), masks)
