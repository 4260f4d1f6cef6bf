"""Whether a family's row is true of a model: shown on a small random batch when it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from vitpatch.model import HOOKED, PatchableViT, Place
from vitpatch.spec import ALL_HEADS, Site, VitPatchError

log = logging.getLogger(__name__)

NOT_STEPWISE = "run by its parts this model has other logits; every patch is a full forward pass"


@torch.no_grad()
def prove(model: PatchableViT) -> None:
    """Shows on a small random batch that the family's row is true of this model, or raises ``VitPatchError``.

    Checked: every site is met once a pass, in its shape; a block's output is its input plus attention plus MLP;
    putting a run's own values back changes no logit; values put in are what goes on. Where only the run by parts
    has other logits, ``stepwise`` becomes false: patches are then full forward passes.
    """
    name, pixels = model.family.name, torch.rand(3, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(model.device, model.dtype)
    places = tuple((site, layer) for site in (*HOOKED, Site.RESID_MID) for layer in range(model.sizes.depth))
    with model.reading(places) as values:
        plain = model(pixels)
    if missed := [place for place in places if place not in values]:
        raise VitPatchError(f"{name}: {missed[0][0]} of layer {missed[0][1]} is never computed")
    if not plain.isfinite().all():
        layer = model.first_bad_layer(pixels)
        where = "in the classifier" if layer is None else f"from layer {layer} on"
        raise VitPatchError(f"the model's values are not finite {where}, on random pixels; check its weights and dtype")
    for (site, layer), value in values.items():
        if value.shape[:2] != (3, model.sizes.tokens):
            want = (3, model.sizes.tokens)
            raise VitPatchError(f"{name}: {site} of layer {layer} is {tuple(value.shape)}, expected {want} first")
    for layer in range(model.sizes.depth):
        before, after = values[Site.RESID_PRE, layer], values[Site.RESID_POST, layer]
        if not _equal(model, before + values[Site.ATTN_OUT, layer] + values[Site.MLP_OUT, layer], after):
            raise VitPatchError(f"{name}: block {layer} is not input + attention + MLP; not supported")
    with model.replacing({place: value for place, value in values.items() if place[0] is not Site.RESID_MID}):
        same = model(pixels)
    with model.replacing({(Site.RESID_POST, 0): values[Site.RESID_POST, 0].flip(0)}):
        flipped = model(pixels)
    for what, got, want in (("its own values", same, plain), ("another run's values", flipped, plain.flip(0))):
        if not _equal(model, got, want):
            raise VitPatchError(f"{name}: a run patched with {what} has the wrong logits")
    model.stepwise = _parts_are_true(model, pixels, plain, values)
    if not model.stepwise:
        log.warning("%s: %s", name, NOT_STEPWISE)


def _parts_are_true(model: PatchableViT, pixels: Tensor, logits: Tensor, values: Mapping[Place, Tensor]) -> bool:
    """Whether the parts give the sites' values and the logits, attention taken apart by head included."""
    try:
        stream = model.embed(pixels)
        for layer in range(model.sizes.depth):
            heads = model.heads(layer, stream)
            patterned = model.heads(layer, stream, pattern=True)
            added = model.attention(layer, stream)
            ways = [values[Site.ATTN_OUT, layer], model.project(layer, model.z(layer, heads))]
            ways.append(model.project(layer, model.z(layer, patterned)))
            if not all(_equal(model, way, added) for way in ways) or not _projects(model, layer, model.z(layer, heads)):
                return False
            stream = stream + added
            stream = stream + model.mlp(layer, stream)
        read = stream[:, : model.sizes.reads]
        unmoved = model.direct(read, torch.zeros(1, *read.shape, device=read.device))[0]
        return _equal(model, model.readout(read), logits) and _equal(model, unmoved, logits)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # a row that does not fit this model's modules
        return False


def _projects(model: PatchableViT, layer: int, z: Tensor) -> bool:
    """Whether a change of ``z`` goes through the output projection as its weight says, all heads' or one's."""
    other, one = z.flip(0), z.clone()
    one[:, 0] = other[:, 0]
    before = model.project(layer, z)
    for new, change, head in ((other, other - z, ALL_HEADS), (one, (other - z)[:, :1], 0)):
        if not _equal(model, before + model.project_change(layer, change, head), model.project(layer, new)):
            return False
    return True


def _equal(model: PatchableViT, got: Tensor, want: Tensor) -> bool:
    types = [model.dtype, torch.float32]  # a pattern is float32 also in float64
    if torch.is_autocast_enabled(model.device.type):
        types.append(torch.get_autocast_dtype(model.device.type))
    eps = max(torch.finfo(kind).eps for kind in types)
    rounding = 64 * eps * float(want.float().abs().max())
    return torch.allclose(got.float(), want.float(), rtol=0, atol=rounding)
