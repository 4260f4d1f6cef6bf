"""A vision transformer by its parts: a block's attention (by head where asked) and MLP, and the readout after the last.

A part is called on the residual stream and runs the model's own modules. ``HookPoint`` is where a value passes between
them: hooks read or replace it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitpatch.models.families import EVERYTHING, PATCHES, POOLED, Family, Readout
from vitpatch.types import ALL_HEADS, Site

Act = Callable[[Tensor], Tensor | None]
"""What is done with a value; what it returns, unless ``None``, goes on in its place."""


class HookPoint(NamedTuple):
    """Where a value passes: the input of a module, else its output; all of it, or one third of its channels.

    A third is the queries, keys or values of one projection to all three.
    """

    module: nn.Module
    is_input: bool
    third: int | None = None


@contextmanager
def attached(act: Act, point: HookPoint) -> Iterator[None]:
    """Inside the block ``act`` is called with the value that passes a hook point.

    It is called before all other hooks of the module and again after them: what a model's own hook records of a layer
    is the replaced value, and so is what goes on. An act that replaces must therefore give the same value twice.
    """

    def act_on(value: Tensor) -> Tensor | None:
        if point.third is None:
            return act(value)
        thirds = list(value.chunk(3, -1))
        new = act(thirds[point.third])
        if new is None:
            return None
        thirds[point.third] = new
        return torch.cat(thirds, -1)

    def on_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        new = act_on(first_argument(args, kwargs))
        if new is None:
            return None
        return replace_first_argument(args, kwargs, new)

    def on_output(module: nn.Module, args: tuple, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)  # attention returns its weights as a second output
        new = act_on(output[0] if is_tuple else output)
        return (new, *output[1:]) if is_tuple and new is not None else new

    with ExitStack() as hooks:
        for prepend in (True, False):
            if point.is_input:
                handle = point.module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=prepend)
            else:
                handle = point.module.register_forward_hook(on_output, prepend=prepend)
            hooks.enter_context(handle)
        yield


def first_argument(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module of a transformer is called with, by position or as ``hidden_states``."""
    return args[0] if args else kwargs["hidden_states"]


def replace_first_argument(args: tuple, kwargs: dict[str, Any], new: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with another tensor for ``first_argument``."""
    return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})


class _Stopped(Exception):
    """Ends a forward pass."""


def run_until(model: nn.Module, pixels: Tensor, point: HookPoint) -> Tensor | None:
    """The value that passes a hook point in a forward pass, which ends there; ``None`` if none passes."""
    values: list[Tensor] = []

    def keep(value: Tensor) -> None:
        values.append(value)
        if len(values) == 2:  # after all other hooks of the module
            raise _Stopped

    with attached(keep, point), suppress(_Stopped):
        model(pixel_values=pixels)
    return values[-1] if values else None


@dataclass(frozen=True)
class Heads:
    """What attention computes by head, (rows, heads, tokens, head width) each.

    ``pattern`` (rows, heads, query tokens, key tokens) and ``z`` where they have been computed. ``head`` is the one
    head that all are of, or ``ALL_HEADS``. Queries and keys are those before a rotary embedding.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Tensor | None = None
    z: Tensor | None = None
    head: int = ALL_HEADS

    def select(self, head: int) -> Heads:
        """The same of one head, its axis kept, or of all."""
        at = slice(None) if head == ALL_HEADS else slice(head, head + 1)
        return Heads(*(None if x is None else x[:, at] for x in (self.q, self.k, self.v, self.pattern, self.z)), head)

    def at_queries(self, queries: slice) -> Heads:
        """The same at some query tokens; keys and values stay those of all tokens."""
        q, pattern, z = (None if x is None else x[:, :, queries] for x in (self.q, self.pattern, self.z))
        return Heads(q, self.k, self.v, pattern, z, self.head)

    def rows(self, rows: slice) -> Heads:
        """The same of some rows."""
        every = (self.q, self.k, self.v, self.pattern, self.z)
        return Heads(*(None if x is None else x[rows] for x in every), self.head)


@dataclass(frozen=True)
class CallArguments:
    """What a block's attention module is called with, the same for every image but for the stream.

    ``args`` and ``kwargs`` are those of a recorded call. ``bias`` (1, heads, tokens, tokens) is added to the attention
    scores; ``rotary`` is (cos, sin), (patches, head width) each.
    """

    args: tuple
    kwargs: dict[str, Any]
    bias: Tensor | None
    rotary: tuple[Tensor, Tensor] | None


class Block:
    """A transformer block of a ``family``, run by its parts. Raises ``AttributeError`` where it lacks some.

    ``by_heads`` says whether its attention follows the formula, which is then computed here head by head:
    softmax(q · k × scaling + bias) · v, all heads through the output projection. What attention and MLP add to the
    stream is taken after a fixed layer scale.
    """

    call: CallArguments
    """Set when the model's calls are recorded."""

    def __init__(self, module: nn.Module, family: Family, heads: int) -> None:
        self.module, self.family, self._heads = module, family, heads
        paths = (family.norm1, family.attention, family.norm2)
        self._norm1, self._attention, self._norm2 = map(module.get_submodule, paths)
        self._mlp = [module.get_submodule(path) for path in family.mlp]
        self.by_heads = self.has(Site.Z) and self.has(Site.Q)

    def _in_attention(self, name: str) -> nn.Module:
        return self._attention.get_submodule(name)

    def has(self, site: Site) -> bool:
        """Whether the module of a site is there."""
        try:
            self.hook_point(site)
        except AttributeError:
            return False
        return True

    def hook_point(self, site: Site) -> HookPoint:
        """Where the values of a site pass. Raises ``AttributeError`` where the block has no such module."""
        family = self.family
        if family.qkv is not None and site in (Site.Q, Site.K, Site.V):
            return HookPoint(self._in_attention(family.qkv), False, (Site.Q, Site.K, Site.V).index(site))
        if site.by_head:
            name = {Site.Z: family.output, Site.Q: family.query, Site.K: family.key, Site.V: family.value}[site]
            return HookPoint(self._in_attention(name), is_input=site is Site.Z)
        return {
            Site.RESID_PRE: HookPoint(self.module, is_input=True),
            Site.ATTN_OUT: HookPoint(self._attention, is_input=False),
            Site.RESID_MID: HookPoint(self._norm2, is_input=True),
            Site.MLP_OUT: HookPoint(self._mlp[-1], is_input=False),
            Site.RESID_POST: HookPoint(self.module, is_input=False),
        }[site]

    def scaled(self, site: Site, value: Tensor) -> Tensor:
        """A value of ``attn_out`` or ``mlp_out`` times its fixed layer scale, if any, as it is added to the stream.

        Values of other sites are returned as they are.
        """
        path = {Site.ATTN_OUT: self.family.scale1, Site.MLP_OUT: self.family.scale2}.get(site)
        scale = None if path is None else getattr(self.module, path, None)
        if isinstance(scale, Tensor):
            return value * scale
        return scale(value) if isinstance(scale, nn.Module) else value

    def attention(self, stream: Tensor, queries: int | None = None) -> Tensor:
        """What attention adds to a ``stream`` (rows, tokens, width), at the first ``queries`` tokens."""
        if queries is not None and self.by_heads:
            return self.project(self.z(self.heads(stream, queries)))
        args, kwargs = replace_first_argument(self.call.args, self.call.kwargs, self._norm1(stream))
        out = self._attention(*args, **kwargs)
        return self.scaled(Site.ATTN_OUT, out if isinstance(out, Tensor) else out[0])[:, :queries]

    def heads(self, stream: Tensor, queries: int | None = None, pattern: bool = False) -> Heads:
        """Queries, keys and values by head, and the pattern where it is asked for."""
        normed, family = self._norm1(stream), self.family

        def split(projected: Tensor) -> Tensor:  # (rows, tokens, width) → (rows, heads, tokens, head width)
            return projected.unflatten(-1, (self._heads, -1)).transpose(1, 2)

        if family.qkv is not None:
            q, k, v = map(split, self._in_attention(family.qkv)(normed).chunk(3, -1))
            heads = Heads(q[:, :, :queries], k, v)
        else:
            q = split(self._in_attention(family.query)(normed[:, :queries]))
            heads = Heads(q, *(split(self._in_attention(name)(normed)) for name in (family.key, family.value)))
        return Heads(heads.q, heads.k, heads.v, self.pattern(heads)) if pattern else heads

    def _scaling(self, heads: Heads) -> float:
        default = getattr(self._attention, "scale", heads.q.shape[-1] ** -0.5)
        return float(getattr(self._attention, "scaling", default))

    def _queries_and_keys(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Queries and keys after the rotary embedding, which leaves the special tokens as they are."""
        if self.call.rotary is None:
            return heads.q, heads.k
        cos, sin = self.call.rotary
        special = heads.k.shape[2] - len(cos)
        return _rotate(heads.q, cos, sin, special), _rotate(heads.k, cos, sin, special)

    def _bias(self, heads: Heads) -> Tensor | None:
        bias = self.call.bias
        if bias is None:
            return None
        bias = bias[:, :, : heads.q.shape[2]].to(heads.q.dtype)
        return bias if heads.head == ALL_HEADS else bias[:, heads.head][:, None]

    def pattern(self, heads: Heads) -> Tensor:
        """Attention probabilities (rows, heads, query tokens, key tokens), by the formula, in float32 inside."""
        q, k = self._queries_and_keys(heads)
        scores = q @ k.transpose(-1, -2) * self._scaling(heads)
        bias = self._bias(heads)
        scores = scores if bias is None else scores + bias
        return scores.softmax(-1, dtype=torch.float32).to(heads.v.dtype)

    def z(self, heads: Heads) -> Tensor:
        """What attention hands to the output projection, (rows, heads, query tokens, head width)."""
        if heads.pattern is not None:
            return heads.pattern @ heads.v
        q, k = self._queries_and_keys(heads)
        return F.scaled_dot_product_attention(q, k, heads.v, attn_mask=self._bias(heads), scale=self._scaling(heads))

    def project(self, z: Tensor) -> Tensor:
        """What all heads' ``z`` adds to the stream through the output projection: (rows, tokens, width)."""
        out = self._in_attention(self.family.output)(z.transpose(1, 2).flatten(2))
        return self.scaled(Site.ATTN_OUT, out)

    def project_change(self, change: Tensor, head: int) -> Tensor:
        """What a ``change`` of ``z`` (rows, heads or 1, tokens, head width) adds to the stream, (rows, tokens, width).

        Of one head only its own columns of the projection are needed.
        """
        weight = self._in_attention(self.family.output).weight  # (width, heads · head width)
        if head != ALL_HEADS:
            weight = weight.unflatten(1, (self._heads, -1))[:, head]
        return self.scaled(Site.ATTN_OUT, F.linear(change.to(weight.dtype).transpose(1, 2).flatten(2), weight))

    def mlp_parameters(self) -> list[Tensor]:
        """All weights of the MLP."""
        return [weight for module in self._mlp for weight in module.parameters()]

    def mlp(self, stream: Tensor) -> Tensor:
        """What the MLP adds to a ``stream`` (rows, tokens, width), token by token."""
        value = self._norm2(stream)
        for module in self._mlp:
            value = module(value)
        return self.scaled(Site.MLP_OUT, value)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, special: int) -> Tensor:
    """The rotary embedding of patches, (rows, heads, tokens, head width), by halves of the width (Su et al. 2021)."""
    patches = x[:, :, special:]
    number = patches.shape[2]
    first, second = patches.chunk(2, -1)
    rotated = patches * cos[:number] + torch.cat([-second, first], -1) * sin[:number]
    return torch.cat([x[:, :, :special], rotated.to(x.dtype)], 2)


@dataclass(frozen=True)
class Change:
    """What is added to the stream of each row at some ``tokens``, (n,) int64: ``values`` (rows, n, width)."""

    tokens: Tensor
    values: Tensor


class Reader:
    """Runs a ``Readout`` on the modules of a model that has so many ``tokens``, the ``special`` ones first."""

    def __init__(self, model: nn.Module, readout: Readout, special: tuple[str, ...], tokens: int) -> None:
        self.readout, self._special = readout, special
        self._norm, self._pool, self._pooled_norm = (
            nn.Identity() if path is None else model.get_submodule(path)
            for path in (readout.norm, readout.pool, readout.pooled_norm)
        )
        self._heads = {head: model.get_submodule(head) for head in readout.heads}
        pooled = readout.parts & {PATCHES, EVERYTHING, POOLED}
        self.reads = tokens if pooled else max(map(special.index, readout.parts)) + 1
        """The classifier reads this many tokens, the first ones."""

    def __call__(self, stream: Tensor) -> Tensor:
        """The last stream at the tokens that are read, (rows, reads, width) → logits (rows, classes)."""
        normed = self._norm(stream)
        return self._logits({head: self._pooled_norm(self._parts(normed, head)) for head in self._heads})

    def _parts(self, normed: Tensor, head: str) -> Tensor:
        """What a head reads of (rows, reads, width): its parts side by side."""
        return torch.cat([self._part(normed, part) for part in self.readout.heads[head]], -1)

    def _part(self, normed: Tensor, part: str) -> Tensor:
        if part == POOLED:
            return self._pool(normed)
        if part in (PATCHES, EVERYTHING):
            return normed[:, len(self._special) if part == PATCHES else 0 :].mean(1)
        return normed[:, self._special.index(part)]

    def _logits(self, by_head: dict[str, Tensor]) -> Tensor:
        logits = [self._heads[head](parts) for head, parts in by_head.items()]
        return logits[0] if len(logits) == 1 else sum(logits) / len(logits)

    def direct(self, stream: Tensor, changes: Iterable[Change]) -> Tensor:
        """Logits (changes, rows, classes) of the last ``stream`` (rows, reads, width) with each change added to it.

        The scale of the norms stays that of ``stream``, so that the way is linear up to the classifier (the direct
        effect of Elhage et al. 2021, with a frozen layer norm). NaN where a norm is of an unknown kind.
        """
        normed = self._norm(stream)
        before = {head: self._parts(normed, head) for head in self._heads}
        carry = frozen_norm(self._norm, stream)
        carry_pooled = {head: frozen_norm(self._pooled_norm, parts) for head, parts in before.items()}
        logits = []
        for change in changes:
            moved = carry(change.values, change.tokens)
            by_head = {}
            for head, parts in before.items():
                added = carry_pooled[head](self._change_of_parts(normed, change.tokens, moved, head), slice(None))
                by_head[head] = (self._pooled_norm(parts) + added).to(stream.dtype)
            logits.append(self._logits(by_head))
        return torch.stack(logits)

    def _change_of_parts(self, normed: Tensor, tokens: Tensor, moved: Tensor, head: str) -> Tensor:
        """What a head's parts change by where the normed stream is ``moved`` (rows, n, width) at these ``tokens``."""
        parts = []
        for part in self.readout.heads[head]:
            if part == POOLED:
                new = normed.to(moved.dtype).index_add(1, tokens, moved).to(normed.dtype)
                parts.append((self._part(new, part) - self._part(normed, part)).to(moved.dtype))
                continue
            if part in (PATCHES, EVERYTHING):
                first = len(self._special) if part == PATCHES else 0
                weight = (tokens >= first).to(moved.dtype) / (self.reads - first)
            else:
                weight = (tokens == self._special.index(part)).to(moved.dtype)
            parts.append(torch.einsum("rnw,n->rw", moved, weight))
        return torch.cat(parts, -1)


def frozen_norm(norm: nn.Module, at: Tensor) -> Callable[[Tensor, Tensor | slice], Tensor]:
    """A norm as a linear map of changes of its input at some tokens, its scale fixed as it is for ``at``.

    ``at`` is (rows, tokens, width) or (rows, width). The map is computed in float32 or wider, and gives NaN for a norm
    of an unknown kind.
    """
    wide = torch.promote_types(at.dtype, torch.float32)
    if isinstance(norm, nn.Identity):
        return lambda change, tokens: change.to(wide)
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return lambda change, tokens: torch.full_like(change, torch.nan, dtype=wide)
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
