"""Whether a family's row is true of a model: verified on a small random batch when it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vitpatch.errors import VitPatchError
from vitpatch.models.families import is_known_family
from vitpatch.models.parts import Block, Change, Reader
from vitpatch.models.vit import HOOKED, PatchableViT, Place
from vitpatch.types import ALL_HEADS, BaseRun, Site


@torch.no_grad()
def verify_model(model: PatchableViT) -> None:
    """Verifies on three random images that the family's row is true of this model, and notes what it cannot do.

    Raises ``VitPatchError`` unless, in whole forward passes with hooks: every site has a value in each pass, of its
    shape; a block's output is its input + scaled attention + scaled MLP, and the input of the MLP's norm is the
    block's input + scaled attention; putting a run's own values back changes no logit; values put in are what goes on.

    What need not be true is noted on the model:
    - ``reader`` becomes the first of its readouts that gives its logits.
    - ``stepwise`` becomes false where no readout does, or blocks run by their parts give other values: every patch is
      then a full forward pass.
    - ``by_heads`` becomes false where attention does not follow the formula of ``vitpatch.models.parts.Block``: every
      patch of heads is then a full forward pass.
    - ``missing`` gets the sites by head that have no value. Of a user's own row whose attention does not follow the
      formula it gets ``q``, ``k`` and ``v`` too, since nothing shows that they are what they are called.

    All of it is computed in float32 or wider: in lower precision different values could pass for equal.
    """
    if torch.finfo(model.dtype).bits < 32:
        wide = PatchableViT(
            copy.deepcopy(model.model).float(), model.family, model.preprocessing, model.head, model.input_size
        )
        verify_model(wide)
        model.reader = model.readers[wide.readers.index(wide.reader)]
        model.stepwise, model.by_heads, model.missing = wide.stepwise, wide.by_heads, wide.missing
        return
    with torch.autocast(model.device.type, enabled=False):
        values, logits, pixels = _verify_whole_runs(model)
        _verify_parts(model, values, logits, pixels)


def _verify_whole_runs(model: PatchableViT) -> tuple[dict[Place, Tensor], Tensor, Tensor]:
    """Checks what must be true; the values at all places, the logits and the pixels of a forward pass."""
    name, pixels = model.family.name, torch.rand(3, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(model.device, model.dtype)
    sites = [site for site in (*HOOKED, Site.RESID_MID) if site not in model.missing]
    places = tuple((site, layer) for site in sites for layer in range(model.sizes.depth))
    with model.reading(places) as values:
        plain = model(pixels)
    for site, layer in (place for place in places if place not in values):
        if not site.by_head:
            raise VitPatchError(f"{name}: {site} of layer {layer} is never computed")
        model.missing.add(site)
    if not plain.isfinite().all():
        layer = model.first_bad_layer(pixels)
        where = "in the classifier" if layer is None else f"from layer {layer} on"
        raise VitPatchError(f"the model's values are not finite {where}, on random pixels; check its weights and dtype")
    for (site, layer), value in values.items():
        want = (3, model.sizes.tokens, *([] if site.by_head else [model.width]))
        if value.shape[: len(want)] != want:
            raise VitPatchError(f"{name}: {site} of layer {layer} is {tuple(value.shape)}, expected {want}")
    for layer, block in enumerate(model.blocks):
        before, after = values[Site.RESID_PRE, layer], values[Site.RESID_POST, layer]
        attention, mlp = (block.scaled(site, values[site, layer]) for site in (Site.ATTN_OUT, Site.MLP_OUT))
        if not _equal(model, before + attention + mlp, after):
            raise VitPatchError(f"{name}: block {layer} is not input + attention + MLP; not supported")
        if not _equal(model, before + attention, values[Site.RESID_MID, layer]):
            raise VitPatchError(f"{name}: what enters norm2 of block {layer} is not input + attention; not supported")
    with model.replacing({place: value for place, value in values.items() if place[0] is not Site.RESID_MID}):
        same = model(pixels)
    with model.replacing({(Site.RESID_POST, 0): values[Site.RESID_POST, 0].flip(0)}):
        flipped = model(pixels)
    for what, got, want in (("its own values", same, plain), ("another run's values", flipped, plain.flip(0))):
        if not _equal(model, got, want):
            raise VitPatchError(f"{name}: a run patched with {what} has the wrong logits")
    return values, plain, pixels


def _verify_parts(model: PatchableViT, values: Mapping[Place, Tensor], logits: Tensor, pixels: Tensor) -> None:
    """Notes on the model what need not be true: that its parts give its own values, and attention is the formula's."""
    layers, last = range(model.sizes.depth), values[Site.RESID_POST, model.sizes.depth - 1]
    readers = (reader for reader in model.readers if _passes(_readout_gives_logits, model, reader, last, logits))
    reader = next(readers, None)
    model.stepwise = reader is not None and _passes(_parts_give_values, model, pixels, values)
    model.reader = reader or model.reader
    model.by_heads = not model.missing and all(_passes(_heads_give_values, model, layer, values) for layer in layers)
    if model.by_heads or is_known_family(model.family):
        return
    model.missing |= {Site.Q, Site.K, Site.V}
    if Site.Z not in model.missing and not all(_passes(_z_gives_attention, model, layer, values) for layer in layers):
        model.missing.add(Site.Z)


def _passes(check: Callable[..., bool], *arguments: Any) -> bool:
    """Whether a check is true; it is not where it cannot be made, since the row does not fit this model's modules."""
    try:
        return check(*arguments)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


def _readout_gives_logits(model: PatchableViT, reader: Reader, last: Tensor, logits: Tensor) -> bool:
    """Whether a readout of the last stream gives the logits, and so does the direct effect of no change."""
    read = last[:, : reader.reads]
    everywhere = torch.arange(reader.reads, device=read.device)
    unchanged = reader.direct(read, [Change(everywhere, torch.zeros_like(read))])[0]
    return _equal(model, reader(read), logits) and (bool(unchanged.isnan().all()) or _equal(model, unchanged, logits))


def _parts_give_values(model: PatchableViT, pixels: Tensor, values: Mapping[Place, Tensor]) -> bool:
    """Whether the blocks, run by attention and MLP from the embeddings on, give the sites' values."""
    stream = model.embed(pixels)
    for layer, block in enumerate(model.blocks):
        added = block.attention(stream)
        if not _equal(model, block.scaled(Site.ATTN_OUT, values[Site.ATTN_OUT, layer]), added):
            return False
        stream = stream + added
        stream = stream + block.mlp(stream)
        if not _equal(model, stream, values[Site.RESID_POST, layer]):
            return False
    return True


def _heads_give_values(model: PatchableViT, layer: int, values: Mapping[Place, Tensor]) -> bool:
    """Whether a block's attention is the formula's: all of it, some queries, and each head's part of the projection."""
    block, stream = model.blocks[layer], values[Site.RESID_PRE, layer]
    added, heads, reads = block.attention(stream), block.heads(stream), model.sizes.reads
    z = block.z(heads)
    by_site = {Site.Q: heads.q, Site.K: heads.k, Site.V: heads.v, Site.Z: z}
    return (
        all(_equal(model, block.project(way), added) for way in (z, block.z(block.heads(stream, pattern=True))))
        and all(_equal(model, value.transpose(1, 2).flatten(2), values[site, layer]) for site, value in by_site.items())
        and _equal(model, block.project(block.z(heads.at_queries(slice(0, reads)))), added[:, :reads])
        and _equal(model, block.z(heads.select(0)), z[:, :1])
        and _projection_is_linear(model, block, z)
    )


def _projection_is_linear(model: PatchableViT, block: Block, z: Tensor) -> bool:
    """Whether a change of ``z`` goes through the output projection as its weight says, all heads' or one's."""
    other, one = z.flip(0), z.clone()
    one[:, 0] = other[:, 0]
    before = block.project(z)
    return all(
        _equal(model, before + block.project_change(change, head), block.project(new))
        for new, change, head in ((other, other - z, ALL_HEADS), (one, (other - z)[:, :1], 0))
    )


def _z_gives_attention(model: PatchableViT, layer: int, values: Mapping[Place, Tensor]) -> bool:
    """Whether what is taken for ``z`` goes through the output projection to what attention gives."""
    output = model.blocks[layer].hook_point(Site.Z).module(values[Site.Z, layer])
    return _equal(model, output, values[Site.ATTN_OUT, layer])


@torch.no_grad()
def matches_own_forward(model: PatchableViT, pixels: Mapping[BaseRun, Tensor], base: Mapping[BaseRun, Tensor]) -> bool:
    """Whether the base runs' logits, computed by parts, are those of the model's own forward, on the first image.

    What was verified when the model was loaded may no longer be true: a hook may do something else in each call.
    """
    whole = model(torch.cat([pixels[run][:1] for run in BaseRun]))
    return _equal(model, torch.cat([base[run][:1] for run in BaseRun]), whole, roundings=512)


def _equal(model: PatchableViT, got: Tensor, want: Tensor, roundings: int = 64) -> bool:
    """Whether values are equal within so many roundings of the largest of them."""
    types = [model.dtype, torch.float32]  # a pattern is float32 also in float64
    if torch.is_autocast_enabled(model.device.type):
        types.append(torch.get_autocast_dtype(model.device.type))
    eps = max(torch.finfo(kind).eps for kind in types)
    rounding = roundings * eps * float(want.float().abs().max())
    return torch.allclose(got.float(), want.float(), rtol=0, atol=rounding)
