"""Which patches a run makes: decided from numbers alone, without a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vitpatch.spec import Direction, Patch, Site, Target, TokenGroup, VitPatchError, window_layers


@dataclass(frozen=True)
class Plan:
    """The patches of a run, in the order of the rows of ``effects.parquet``, and their direction."""

    patches: tuple[Patch, ...]
    direction: Direction

    @property
    def recorded(self) -> tuple[tuple[Site, int], ...]:
        """The (site, layer) pairs that are read from the donor, each once."""
        return tuple(sorted({(patch.site, layer) for patch in self.patches for layer in patch.layers}))

    @property
    def restores_everything(self) -> bool:
        """Whether every patch hands over the whole residual stream: the effect is then the total effect everywhere."""
        return all(p.site is Site.RESID_POST and p.tokens is TokenGroup.ALL for p in self.patches)


@lru_cache
def make_plan(target: Target, window: int, direction: Direction, depth: int) -> Plan:
    """The plan for a model of ``depth`` blocks.

    Raises ``VitPatchError`` where the window or a layer does not fit the model.
    """
    if not 1 <= window <= depth:
        raise VitPatchError(f"window {window}: the model has {depth} layers; use 1 to {depth}")
    layers = tuple(range(depth)) if target.layers is None else target.layers
    for layer in layers:
        if not 0 <= layer < depth:
            raise VitPatchError(f"target.layers {layer}: the model has {depth} layers; use 0 to {depth - 1}")
    patches = (Patch(target.site, c, window, window_layers(c, window, depth), target.tokens) for c in layers)
    return Plan(tuple(patches), direction)
