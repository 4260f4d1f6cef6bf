"""Donors that are no run: zeros, and the means of a site over images, by position."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vitpatch.models.vit import PatchableViT, Place
from vitpatch.patching.full_forward import AblationValues
from vitpatch.types import Site


def zero_values(model: PatchableViT, site: Site) -> AblationValues:
    """Zeros of a site, in all layers."""
    sizes = model.sizes
    shape: tuple[int, ...] = (sizes.tokens, model.width)
    if site.by_head:
        last = sizes.tokens if site is Site.PATTERN else model.width // sizes.heads
        shape = (sizes.heads, sizes.tokens, last)
    return {(site, layer): torch.zeros(shape, device=model.device) for layer in range(sizes.depth)}


@torch.no_grad()
def mean_values(model: PatchableViT, site: Site, pixels: Iterable[Tensor]) -> AblationValues:
    """The mean of a site over images, by position, in all layers; ``pixels`` are batches of normalised images."""
    read = Site.RESID_PRE if site is Site.PATTERN else site  # no module hands over the pattern
    places = tuple((read, layer) for layer in range(model.sizes.depth))
    wide = torch.float32 if model.device.type == "mps" else torch.float64  # mps has no float64
    total: dict[Place, Tensor] = {}
    images = 0
    for batch in pixels:
        images += len(batch)
        with model.reading(places) as values:
            model(batch)
        for (_, layer), value in values.items():
            summed = _by_head(model, site, layer, value).sum(0, dtype=wide)
            total[site, layer] = total.get((site, layer), 0) + summed
    return {place: (value / images).float() for place, value in total.items()}


def _by_head(model: PatchableViT, site: Site, layer: int, value: Tensor) -> Tensor:
    """Values (batch, tokens, channels) as ``AblationValues`` have them, before the batch is summed over."""
    if site is Site.PATTERN:
        return model.blocks[layer].heads(value, pattern=True).pattern
    return value.unflatten(-1, (model.sizes.heads, -1)).transpose(1, 2) if site.by_head else value
