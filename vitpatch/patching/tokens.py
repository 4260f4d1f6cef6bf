"""Token groups: their names, row by row, and where they are in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vitpatch.errors import ArgumentError
from vitpatch.types import Sizes, Target, TokenGroup, token_position

if TYPE_CHECKING:
    from torch import Tensor

MASK_GROUPS = (TokenGroup.OBJECT, TokenGroup.BACKGROUND, TokenGroup.RANDOM_OBJECT)
"""Groups that differ between images: they need the data's object masks."""
OBJECT_SHARE = 0.5
"""A patch is object when at least this share of its pixels is."""


def token_names(target: Target, sizes: Sizes) -> tuple[str, ...]:
    """The names of a target's token groups, ``each`` and ``grid`` spelt out.

    Raises ``VitPatchError`` for a group that the model does not have.
    """
    names: list[str] = []
    for group in target.tokens:
        names += _expand_group(group, target, sizes)
    return tuple(dict.fromkeys(names))


def _expand_group(group: TokenGroup, target: Target, sizes: Sizes) -> list[str]:
    rows, columns = sizes.grid
    if group is TokenGroup.EACH:
        return [f"each:{name}" for name in sizes.special] + _cells("each", rows, columns)
    if group is TokenGroup.GRID:
        if target.grid is None:
            raise ArgumentError("tokens grid: say its blocks too, for instance grid=[4,4]")
        if rows % target.grid[0] or columns % target.grid[1]:
            raise ArgumentError(
                f"grid {list(target.grid)}: does not divide the model's {rows} × {columns} image patches"
            )
        return _cells("grid", *target.grid)
    has = {TokenGroup.CLS: "cls" in sizes.special, TokenGroup.REGISTERS: _registers(sizes) != []}
    if not has.get(group, True):
        raise ArgumentError(f"tokens {group}: the model has none; before its patches: {list(sizes.special)}")
    return [str(group)]


def _cells(name: str, rows: int, columns: int) -> list[str]:
    return [f"{name}:{row}x{column}" for row in range(rows) for column in range(columns)]


def _registers(sizes: Sizes) -> list[int]:
    return [i for i, name in enumerate(sizes.special) if name.startswith("register")]


def needs_masks(names: Sequence[str]) -> bool:
    """Whether one of the groups is taken from the data's object masks."""
    return bool(set(names) & set(MASK_GROUPS))


def fixed_tokens(name: str, sizes: Sizes, blocks: tuple[int, int] | None) -> np.ndarray:
    """Where a group that is the same in every image is: bool (tokens,). ``blocks`` are those of the group ``grid``."""
    special, (rows, columns) = len(sizes.special), sizes.grid
    mask = np.zeros(sizes.tokens, dtype=bool)
    patches = mask[special:].reshape(rows, columns)  # a view
    if name == TokenGroup.ALL:
        mask[:] = True
    elif name == TokenGroup.CLS:
        mask[sizes.special.index("cls")] = True
    elif name == TokenGroup.REGISTERS:
        mask[_registers(sizes)] = True
    elif name == TokenGroup.PATCHES:
        patches[:] = True
    elif (at := token_position(name)) is None:
        mask[sizes.special.index(name.partition(":")[2])] = True
    else:
        height, width = (1, 1) if name.startswith("each") else (rows // blocks[0], columns // blocks[1])
        patches[at[0] * height : (at[0] + 1) * height, at[1] * width : (at[1] + 1) * width] = True
    return mask


def possible_tokens(name: str, sizes: Sizes, blocks: tuple[int, int] | None) -> np.ndarray:
    """Where a group may be in some image: bool (tokens,)."""
    return fixed_tokens(TokenGroup.PATCHES if name in MASK_GROUPS else name, sizes, blocks)


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
    import torch

    if masks is None and needs_masks(names):
        raise ArgumentError(
            f"tokens {next(n for n in names if n in MASK_GROUPS)}: the data have no object masks; "
            "set data.mask_column, or give masks"
        )
    groups = _mask_groups(masks, sizes, ids, seed) if needs_masks(names) else {}
    for name in names:
        if name not in groups:
            groups[name] = np.broadcast_to(fixed_tokens(name, sizes, blocks), (len(ids), sizes.tokens))
    return torch.from_numpy(np.stack([groups[name] for name in names]))


def _mask_groups(masks: Tensor, sizes: Sizes, ids: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    import torch.nn.functional as F

    share = F.adaptive_avg_pool2d(masks.float().cpu(), sizes.grid).flatten(1).numpy()  # (batch, patches)
    is_object = share >= OBJECT_SHARE
    drawn = np.zeros_like(is_object)
    for row, example_id in enumerate(ids):
        rng = np.random.default_rng([seed, int(example_id), 1])  # 1: apart from the draws of noise
        drawn[row, rng.permutation(is_object.shape[1])[: is_object[row].sum()]] = True
    none = np.zeros((len(ids), len(sizes.special)), dtype=bool)
    groups = {TokenGroup.OBJECT: is_object, TokenGroup.BACKGROUND: ~is_object, TokenGroup.RANDOM_OBJECT: drawn}
    return {str(group): np.hstack([none, patches]) for group, patches in groups.items()}
