"""A plan by full forward passes with hooks, one a patch: for models whose parts do not give their own logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitpatch.errors import VitPatchError
from vitpatch.models.parts import Act
from vitpatch.models.vit import PatchableViT, Place
from vitpatch.patching.metrics import DirectEffects, Inputs
from vitpatch.patching.plan import Plan
from vitpatch.types import ALL_HEADS, Patch, Run, Site


def full_forwards(
    plan: Plan, model: PatchableViT, inputs: Inputs, direct_effects: DirectEffects
) -> tuple[dict[Run, Tensor], Tensor, Tensor]:
    """Logits of the base runs (batch, classes), of the patched runs (runs, batch, classes), and NaN for direct ones.

    Raises ``VitPatchError`` for ``pattern``, which no module hands over.
    """
    if plan.target.site is Site.PATTERN:
        raise VitPatchError(f"target=pattern: {model.caveat(Site.PATTERN)}, which hands over no pattern; use z")
    places, recipient = plan.places, plan.recipient
    base, values = {}, {}
    for run in plan.base_runs:
        with model.reading(places) as values[run]:
            base[run] = model(inputs.pixels[run], inputs.noise.get(run))
    received = values[recipient]
    donors = [
        values[run] if (run := plan.base_run_of(i)) is not None else _constants(inputs, received, plan.target.site)
        for i in range(len(plan.donors))
    ]
    for site, layer in places:
        both = (model.blocks[layer].scaled(site, of[site, layer]) for of in (donors[0], received))
        direct_effects.add_norms(site, layer, *both)
    patched = []
    for patch, donor in plan.runs:
        with model.hooked(_acts(patch, donors[donor], inputs.masks[patch.tokens], model)):
            patched.append(model(inputs.pixels[recipient], inputs.noise.get(recipient)))
    direct = base[recipient].new_full((len(plan.patches), *base[recipient].shape), torch.nan)
    return base, torch.stack(patched), direct


def _constants(inputs: Inputs, received: Mapping[Place, Tensor], site: Site) -> dict[Place, Tensor]:
    """Ablation values as a hook has them: (batch, tokens, channels), before a fixed layer scale."""
    constants = {}
    for place, like in received.items():
        value = inputs.constants[place].to(like.dtype)
        constants[place] = (value.transpose(0, 1).flatten(1) if site.by_head else value).expand_as(like)
    return constants


def _acts(patch: Patch, donors: Mapping[Place, Tensor], mask: Tensor, model: PatchableViT) -> dict[Place, Act]:
    """The functions that make a patch, by the place whose value they replace."""
    acts: dict[Place, Act] = {}
    for layer in patch.layers:
        value = donors[patch.site, layer]
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
    """The functions for ``resid_mid``, which is no module's output: attention adds what makes it the donor's."""
    before: list[Tensor] = []
    scale = model.blocks[layer].scaled(Site.ATTN_OUT, torch.ones_like(donor[:1, :1]))
    if not scale.all():
        raise VitPatchError(f"target=resid_mid: a layer scale of layer {layer} is 0; use resid_post")

    def note(stream: Tensor) -> None:
        before[:] = [stream]

    def act(added: Tensor) -> Tensor:
        return torch.where(mask[..., None], (donor - before[0]) / scale, added)

    return {(Site.RESID_PRE, layer): note, (Site.ATTN_OUT, layer): act}
