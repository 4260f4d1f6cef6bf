"""From the stream that leaves the last block to logits, and the direct effect of a change of the stream on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitpatch.models.families import EVERYTHING, PATCHES, POOLED, Readout


@dataclass(frozen=True)
class Change:
    """What is added to the stream of each row at some ``tokens``, (n,) int64: ``values`` (rows, n, width)."""

    tokens: Tensor
    values: Tensor


class Reader:
    """A ``Readout`` of a model with these ``special`` tokens before its patches, ``tokens`` in all."""

    def __init__(self, model: nn.Module, readout: Readout, special: tuple[str, ...], tokens: int) -> None:
        self.readout, self._special = readout, special
        self._submodule = model.get_submodule
        parts = {part for parts in readout.heads.values() for part in parts}
        pooled = parts & {PATCHES, EVERYTHING, POOLED}
        self.reads = tokens if pooled else max(map(special.index, parts)) + 1
        """The classifier reads this many tokens, the first ones."""

    def __call__(self, stream: Tensor) -> Tensor:
        """The last stream at the tokens that are read, (rows, reads, width) → logits (rows, classes)."""
        normed = self._module(self.readout.norm)(stream)
        return self._logits(
            {head: self._module(self.readout.pooled_norm)(self._parts(normed, head)) for head in self.readout.heads}
        )

    def _module(self, path: str | None) -> Callable[[Tensor], Tensor]:
        return nn.Identity() if path is None else self._submodule(path)

    def _parts(self, normed: Tensor, head: str) -> Tensor:
        """What a head reads of (rows, reads, width): its parts side by side."""
        return torch.cat([self._part(normed, part) for part in self.readout.heads[head]], -1)

    def _part(self, normed: Tensor, part: str) -> Tensor:
        if part == POOLED:
            return self._module(self.readout.pool)(normed)
        if part in (PATCHES, EVERYTHING):
            return normed[:, len(self._special) if part == PATCHES else 0 :].mean(1)
        return normed[:, self._special.index(part)]

    def _logits(self, by_head: dict[str, Tensor]) -> Tensor:
        logits = [self._submodule(head)(parts) for head, parts in by_head.items()]
        return logits[0] if len(logits) == 1 else sum(logits) / len(logits)

    def direct(self, stream: Tensor, changes: Iterable[Change]) -> Tensor:
        """Logits (changes, rows, classes) of the last ``stream`` (rows, reads, width) with each change added to it.

        The scale of the norms stays that of ``stream``, so that the way is linear up to the classifier (the direct
        effect of Elhage et al. 2021, with a frozen layer norm). NaN where a norm is of an unknown kind.
        """
        norm, pooled_norm = self._module(self.readout.norm), self._module(self.readout.pooled_norm)
        normed = norm(stream)
        unmoved = {head: self._parts(normed, head) for head in self.readout.heads}
        carry = frozen(norm, stream)
        carry_pooled = {head: frozen(pooled_norm, parts) for head, parts in unmoved.items()}
        logits = []
        for change in changes:
            if carry is None or None in carry_pooled.values():
                after = {head: pooled_norm(parts) for head, parts in unmoved.items()}
                logits.append(torch.full_like(self._logits(after), torch.nan))
                continue
            moved = carry(change.values, change.tokens)
            by_head = {}
            for head, before in unmoved.items():
                added = self._moved(normed, change.tokens, moved, head)
                by_head[head] = (pooled_norm(before) + carry_pooled[head](added, slice(None))).to(stream.dtype)
            logits.append(self._logits(by_head))
        return torch.stack(logits)

    def _moved(self, normed: Tensor, tokens: Tensor, moved: Tensor, head: str) -> Tensor:
        """What a head's parts change by where the normed stream is ``moved`` (rows, n, width) at these ``tokens``."""
        parts = []
        for part in self.readout.heads[head]:
            if part == POOLED:
                new = normed.to(moved.dtype).index_add(1, tokens, moved).to(normed.dtype)
                parts.append((self._part(new, part) - self._part(normed, part)).to(moved.dtype))
                continue
            special = len(self._special)
            if part in (PATCHES, EVERYTHING):
                first = special if part == PATCHES else 0
                weight = (tokens >= first).to(moved.dtype) / (self.reads - first)
            else:
                weight = (tokens == self._special.index(part)).to(moved.dtype)
            parts.append(torch.einsum("rnw,n->rw", moved, weight))
        return torch.cat(parts, -1)


def frozen(norm: nn.Module, at: Tensor) -> Callable[[Tensor, Tensor | slice], Tensor] | None:
    """A norm's linear map with its scale that of ``at`` (rows, …, width), for changes at some of its tokens.

    In float32 or wider. ``None`` for a norm of an unknown kind.
    """
    wide = torch.promote_types(at.dtype, torch.float32)
    if isinstance(norm, nn.Identity):
        return lambda change, tokens: change.to(wide)
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return None
    wider, centred = at.to(wide), isinstance(norm, nn.LayerNorm)
    square = wider.var(-1, keepdim=True, unbiased=False) if centred else wider.square().mean(-1, keepdim=True)
    scale = (square + (torch.finfo(at.dtype).eps if norm.eps is None else norm.eps)).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight

    def carry(change: Tensor, tokens: Tensor | slice) -> Tensor:
        change = change.to(wide)
        if centred:
            change = change - change.mean(-1, keepdim=True)
        return change * (scale[:, tokens] if at.dim() == 3 else scale)

    return carry
