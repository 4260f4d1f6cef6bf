"""What a plan is run on, besides the model: images, where each token group is in them, and ablation values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitpatch.errors import ArgumentError
from vitpatch.models.vit import PatchableViT, Place
from vitpatch.types import Run, Site, Sizes, Target, TokenGroup, token_position

MASK_GROUPS = (TokenGroup.OBJECT, TokenGroup.BACKGROUND, TokenGroup.RANDOM_OBJECT)
"""Groups that differ between images: they need the data's object masks."""
OBJECT_SHARE = 0.5
"""An image patch is part of the object when at least this share of its pixels is."""

AblationValues = Mapping[Place, Tensor]
"""Values of a site, the same for all images, before a fixed layer scale: (tokens, width); by head (heads, tokens, head
width); of ``pattern`` (heads, query tokens, key tokens)."""


@dataclass(frozen=True)
class Inputs:
    """Images and what is put into their runs.

    ``pixels`` normalised, (images, 3, height, width) by base run; ``noise`` (images, image patches, width) of the base
    runs whose patch embeddings it is added to; ``masks`` bool (images, tokens) by token group; ``constants`` of a donor
    that is no run.
    """

    pixels: Mapping[Run, Tensor]
    noise: Mapping[Run, Tensor]
    masks: Mapping[str, Tensor]
    constants: AblationValues | None = None


def token_names(target: Target, sizes: Sizes) -> tuple[str, ...]:
    """The names of a target's token groups, ``each`` and ``grid`` spelt out: ``each:0x3``, ``grid:1x0``.

    Raises ``ArgumentError`` for a group that the model does not have.
    """
    return tuple(dict.fromkeys(name for group in target.tokens for name in _expand_group(group, target, sizes)))


def _expand_group(group: TokenGroup, target: Target, sizes: Sizes) -> list[str]:
    rows, columns = sizes.grid
    names = []
    if group is TokenGroup.EACH:
        names = [f"each:{name}" for name in sizes.special]
    elif group is TokenGroup.GRID:
        if target.grid is None:
            raise ArgumentError("tokens grid: say its blocks too, for instance grid=[4,4]")
        if rows % target.grid[0] or columns % target.grid[1]:
            raise ArgumentError(
                f"grid {list(target.grid)}: does not divide the model's {rows} × {columns} image patches"
            )
        rows, columns = target.grid
    else:
        has = {TokenGroup.CLS: "cls" in sizes.special, TokenGroup.REGISTERS: bool(_registers(sizes))}
        if not has.get(group, True):
            raise ArgumentError(f"tokens {group}: the model has none; before its patches: {list(sizes.special)}")
        return [str(group)]
    return names + [f"{group}:{row}x{column}" for row in range(rows) for column in range(columns)]


def _registers(sizes: Sizes) -> list[int]:
    return [i for i, name in enumerate(sizes.special) if name.startswith("register")]


def needs_masks(names: Sequence[str]) -> bool:
    """Whether one of the groups is taken from the data's object masks."""
    return bool(set(names) & set(MASK_GROUPS))


def possible_tokens(name: str, sizes: Sizes, blocks: tuple[int, int] | None) -> np.ndarray:
    """Where a group may be in some image, bool (tokens,): of a group that needs no masks, where it is in every image.

    ``blocks`` (rows, columns) are those of the group ``grid``.
    """
    special, (rows, columns) = len(sizes.special), sizes.grid
    mask = np.zeros(sizes.tokens, dtype=bool)
    patches = mask[special:].reshape(rows, columns)  # a view
    if name == TokenGroup.ALL:
        mask[:] = True
    elif name == TokenGroup.CLS:
        mask[sizes.special.index("cls")] = True
    elif name == TokenGroup.REGISTERS:
        mask[_registers(sizes)] = True
    elif name == TokenGroup.PATCHES or name in MASK_GROUPS:
        patches[:] = True
    elif (position := token_position(name)) is None:
        mask[sizes.special.index(name.partition(":")[2])] = True
    else:
        row, column = position
        height, width = (1, 1) if name.startswith("each") else (rows // blocks[0], columns // blocks[1])
        patches[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
    return mask


def token_masks(
    names: Sequence[str],
    sizes: Sizes,
    blocks: tuple[int, int] | None,
    masks: Tensor | None,
    ids: Sequence[int],
    seed: int,
) -> Tensor:
    """Where each group is in each image of a batch: bool (groups, batch, tokens), on the CPU.

    ``masks`` (batch, 1, height, width) in [0, 1], 1 = object, for the groups that need them. ``random_object`` has as
    many patches as ``object``, drawn as a function of (seed, id) alone.
    """
    groups = {name: np.tile(possible_tokens(name, sizes, blocks), (len(ids), 1)) for name in names}
    if needs_masks(names):
        if masks is None:
            first = next(name for name in names if name in MASK_GROUPS)
            raise ArgumentError(f"tokens {first}: the data have no object masks; set data.mask_column, or give masks")
        share = F.adaptive_avg_pool2d(masks.float().cpu(), sizes.grid).flatten(1).numpy()  # (batch, patches)
        is_object = share >= OBJECT_SHARE
        drawn = np.zeros_like(is_object)
        for row, example_id in enumerate(ids):
            rng = np.random.default_rng([seed, int(example_id), 1])  # 1: apart from the draws of noise
            drawn[row, rng.permutation(is_object.shape[1])[: is_object[row].sum()]] = True
        for group, patches in zip(MASK_GROUPS, (is_object, ~is_object, drawn), strict=True):
            if group in groups:
                groups[group][:, len(sizes.special) :] = patches
    return torch.from_numpy(np.stack([groups[name] for name in names]))


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
        for (_, layer), value in values.items():  # (batch, tokens, channels)
            if site is Site.PATTERN:
                value = model.blocks[layer].heads(value, pattern=True).pattern
            elif site.by_head:
                value = value.unflatten(-1, (model.sizes.heads, -1)).transpose(1, 2)
            total[site, layer] = total.get((site, layer), 0) + value.sum(0, dtype=wide)
    return {place: (value / images).float() for place, value in total.items()}
