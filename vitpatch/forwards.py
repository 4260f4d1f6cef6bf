"""A plan by full forward passes with hooks, one a patch: for models whose parts do not give their own logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitpatch.hooks import Act
from vitpatch.model import PatchableViT, Place
from vitpatch.plan import Plan
from vitpatch.readings import Readings
from vitpatch.spec import ALL_HEADS, BaseRun, Patch, Site, VitPatchError


def full_forwards(
    plan: Plan, model: PatchableViT, pixels: Mapping[BaseRun, Tensor], masks: dict[str, Tensor], readings: Readings
) -> tuple[dict[BaseRun, Tensor], Tensor, Tensor]:
    """Logits of the base runs (batch, classes), of the patches (patches, batch, classes), and NaN for the direct ones.

    Raises ``VitPatchError`` for ``pattern``, which no module hands over.
    """
    if plan.target.site is Site.PATTERN:
        raise VitPatchError(f"target=pattern: {model.caveat(Site.PATTERN)}, which hands over no pattern; use z")
    donor, recipient = plan.direction.donor, plan.direction.recipient
    places = tuple(plan.readings_at)
    with model.reading(places) as donated:
        base = {donor: model(pixels[donor])}
    with model.reading(places) as received:
        base[recipient] = model(pixels[recipient])
    for site, layer in places:
        both = (model.blocks[layer].scaled(site, values[site, layer]) for values in (donated, received))
        readings.norms(site, layer, *both)
    patched = []
    for patch in plan.patches:
        with model.hooked(_acts(patch, donated, masks[patch.tokens], model)):
            patched.append(model(pixels[recipient]))
    return base, torch.stack(patched), torch.full((len(patched), *base[donor].shape), torch.nan)


def _acts(patch: Patch, donated: Mapping[Place, Tensor], mask: Tensor, model: PatchableViT) -> dict[Place, Act]:
    acts: dict[Place, Act] = {}
    for layer in patch.layers:
        value = donated[patch.site, layer]
        if patch.site is Site.RESID_MID:
            acts |= _through_attention(layer, value, mask, model)
        else:
            acts[patch.site, layer] = _mixing(value, mask, patch.head, model.sizes.heads)
    return acts


def _mixing(donor: Tensor, mask: Tensor, head: int, heads: int) -> Callable[[Tensor], Tensor]:
    """The donor's values at the tokens of ``mask`` (batch, tokens), of one head or all channels."""

    def act(own: Tensor) -> Tensor:
        where = mask[..., None]
        if head != ALL_HEADS:
            of_head = torch.zeros(own.shape[-1], dtype=torch.bool, device=own.device)
            of_head.view(heads, -1)[head] = True
            where = where & of_head
        return torch.where(where, donor, own)

    return act


def _through_attention(layer: int, donor: Tensor, mask: Tensor, model: PatchableViT) -> dict[Place, Act]:
    """``resid_mid``, which is no module's output: attention is made to add what takes the stream there."""
    before: list[Tensor] = []
    scale = model.blocks[layer].scaled(Site.ATTN_OUT, torch.ones_like(donor[:1, :1]))
    if not scale.all():
        raise VitPatchError(f"target=resid_mid: a layer scale of layer {layer} is 0; use resid_post")

    def note(stream: Tensor) -> None:
        before[:] = [stream]

    def act(added: Tensor) -> Tensor:
        return torch.where(mask[..., None], (donor - before[0]) / scale, added)

    return {(Site.RESID_PRE, layer): note, (Site.ATTN_OUT, layer): act}
