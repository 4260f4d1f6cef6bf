"""A plan on a batch → the logits of both base runs and of every patch, each distinct state computed once.

Halves of the network are taken one after the other; within one, the base runs go first, then all live states, in chunks
of rows. States are kept in one tensor and changed in place. In the last block only the tokens that the classifier reads
go on. Where a model's parts do not give its own logits, ``vitpatch.patching.full_forward`` does the same by full
forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitpatch.errors import ArgumentError
from vitpatch.models.parts import Heads
from vitpatch.models.vit import PatchableViT, Place
from vitpatch.patching.cost import ComputeLimits
from vitpatch.patching.full_forward import full_forwards
from vitpatch.patching.metrics import AblationValues, DirectEffects, Inputs, Outputs, edited_heads
from vitpatch.patching.plan import (
    MASK_GROUPS,
    RECIPIENT,
    RECOMPUTED,
    STREAM_HALF,
    Branch,
    Half,
    Plan,
    Step,
    needs_masks,
    possible_tokens,
    run_state,
)
from vitpatch.types import BaseRun, Run, Site, Sizes, TokenGroup

OBJECT_SHARE = 0.5
"""An image patch is part of the object when at least this share of its pixels is."""


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


def random_object_overlap(sizes: Sizes, masks: Tensor | None, ids: Sequence[int], seed: int) -> np.ndarray:
    """The share of each image's object patches that ``random_object`` has too, (batch,); NaN where there is no object.

    Arguments as of ``token_masks``.
    """
    names = (TokenGroup.OBJECT, TokenGroup.RANDOM_OBJECT)
    is_object, is_drawn = token_masks(names, sizes, None, masks, ids, seed).numpy()
    number = is_object.sum(1)
    return np.divide((is_object & is_drawn).sum(1), number, out=np.full(len(ids), np.nan), where=number > 0)


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


@torch.no_grad()
def execute(
    plan: Plan,
    model: PatchableViT,
    pixels: Mapping[Run, Tensor],
    masks: Tensor,
    limits: ComputeLimits,
    constants: AblationValues | None = None,
    noise: Tensor | None = None,
) -> Outputs:
    """Runs the plan on ``pixels``, normalised, (images, 3, height, width) of each of its ``base_runs``.

    ``masks`` bool (groups, images, tokens), one of ``plan.token_groups`` each; ``limits.rows`` bounds the rows (an
    image in a state each) that are computed in one call. ``constants`` are the values of a donor that is no run;
    ``noise`` (images, image patches, width) is added to the corrupted run's patch embeddings.
    """
    masks_by_group = dict(zip(plan.token_groups, masks.to(pixels[BaseRun.CLEAN].device), strict=True))
    direct_effects = DirectEffects(plan, model, masks_by_group)
    noise_by_run = {} if noise is None else {BaseRun.CORRUPT: noise}
    inputs = Inputs(pixels, noise_by_run, masks_by_group, constants)
    if model.runs_by_parts(plan.target.site):
        walk = _Walk(plan, model, inputs, direct_effects, limits)
        base, patched = walk.logits()
        direct = model.reader.direct(walk.base[0], direct_effects.changes())
    else:
        base, patched, direct = full_forwards(plan, model, inputs, direct_effects)
    return Outputs(base, patched, direct, direct_effects.delta_norms())


class _Walk:
    """Runs some images through the network, half by half.

    ``base`` (base runs, images, tokens, width), the recipient first; ``states`` (states, images, tokens, width) the
    patched ones. From the last block's attention on ``states`` have only the tokens that are read, and so has ``base``
    where nothing more of it is compared.
    """

    def __init__(
        self, plan: Plan, model: PatchableViT, inputs: Inputs, direct_effects: DirectEffects, limits: ComputeLimits
    ) -> None:
        self.plan, self.model, self.inputs, self.direct_effects = plan, model, inputs, direct_effects
        self.masks = inputs.masks
        self.images, self.runs = len(inputs.pixels[plan.recipient]), len(plan.base_runs)
        self.base = self._embed().unflatten(0, (self.runs, self.images))
        self.states = self.base.new_empty(plan.whole, *self.base.shape[1:])
        self._rows = limits.rows
        self._at_once = max(1, limits.rows // self.images)  # states
        self._heads: list[Heads] = []

    def _embed(self) -> Tensor:
        """The streams of the base runs that enter the first block, (runs · images, tokens, width)."""
        runs, noise = self.plan.base_runs, self.inputs.noise
        pixels = torch.cat([self.inputs.pixels[run] for run in runs])
        if not noise:
            return self.model.embed(pixels)
        quiet = torch.zeros_like(next(iter(noise.values())))
        return self.model.embed(pixels, torch.cat([noise.get(run, quiet) for run in runs]))

    def logits(self) -> tuple[dict[Run, Tensor], Tensor]:
        """Of the base runs, (images, classes) each, and of every patched run, (runs, images, classes)."""
        for number, half in enumerate(self.plan.halves):
            layer, is_mlp = divmod(number, 2)
            self._mix(half.mixes, number)
            self._mlp(layer, half) if is_mlp else self._attention(layer, half)
        self._mix(self.plan.last, len(self.plan.halves))
        base = self.model.reader(self._cut(self.base.flatten(0, 1))).unflatten(0, (self.runs, -1))
        patched = base.new_empty(self.plan.states, *base.shape[1:])
        for states in self._chunks(range(self.plan.states)):
            patched[states] = self.model.reader(self.states[states].flatten(0, 1)).unflatten(0, (-1, self.images))
        by_run = dict(zip(self.plan.base_runs, base, strict=True))
        whole = {run_state(i): by_run.get(self.plan.base_run_of(i)) for i in range(len(self.plan.donors))}
        whole[RECIPIENT] = base[0]
        final = [whole[state] if state in whole else patched[state] for state in self.plan.final]
        self.base = self._cut(self.base)
        return by_run, torch.stack(final)

    def _donor_values(self, donor: int, values: Tensor, site: Site, layer: int) -> Tensor:
        """A donor's values (images, tokens, width) at a site of a layer, where the base runs have ``values``."""
        run = self.plan.base_run_of(donor)
        if run is not None:
            return values[self.plan.base_runs.index(run)]
        constant, block = self.inputs.constants[self.plan.target.site, layer].to(values.dtype), self.model.blocks[layer]
        if self.plan.target.site is Site.Z:  # of all heads together, which is what attention adds
            constant = block.project(constant[None])[0]
        else:
            constant = block.scaled(site, constant)
        return constant[: values.shape[2]].expand_as(values[0])

    def _cut(self, tokens: Tensor) -> Tensor:
        """The tokens that the states still have, of (…, tokens, width)."""
        return tokens[..., : self.states.shape[2], :]

    def _chunks(self, states: Sequence[int]) -> Iterator[slice]:
        """Neighbouring states, a call's worth at a time."""
        first = 0
        for last in range(1, len(states) + 1):
            full = last - first == self._at_once
            if last == len(states) or full or states[last] != states[last - 1] + 1:
                yield slice(states[first], states[last - 1] + 1)
                first = last

    def _by_rows(self, compute: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
        """``compute(stream)`` in calls of at most ``limits.rows`` rows."""
        if len(stream) <= self._rows:
            return compute(stream)
        return torch.cat([compute(rows) for rows in stream.split(self._rows)])

    def _mixed(self, branch: Branch, own: Tensor, donor: Tensor) -> Tensor:
        """The donor's values at the branch's tokens, the others' own; all (images, tokens, width)."""
        if branch.edit.is_whole:
            return donor
        return torch.where(self.masks[branch.edit.tokens][:, : own.shape[1], None], donor, own)

    def _mix(self, steps: Sequence[Step], half: int) -> None:
        """Makes the states that split off on the stream that enters a half: the donor's stream at a token group."""
        if not steps:
            return
        layer, base = (half - STREAM_HALF[self.plan.target.site]) // 2, self._cut(self.base)
        for step in steps:
            for b in step.branches:
                own = base[0] if step.state == RECIPIENT else self.states[step.state]
                self.states[b.state] = self._mixed(
                    b, own, self._donor_values(b.edit.donor, base, self.plan.target.site, layer)
                )

    def _mlp(self, layer: int, half: Half) -> None:
        self._compare(Site.RESID_MID, layer, self.base)
        wide = layer < self.plan.sizes.depth - 1 or self._is_compared(layer, Site.MLP_OUT, Site.RESID_POST)
        before = self.base if wide else self._cut(self.base)
        mlp = self.model.blocks[layer].mlp
        added = self._by_rows(mlp, before.flatten(0, 1)).unflatten(0, (self.runs, -1))
        self._compare(Site.MLP_OUT, layer, added)
        known = self._cut(added)
        for b in self._branches_of_recipient(half):
            donor = self._donor_values(b.edit.donor, known, Site.MLP_OUT, layer)
            self.states[b.state] = self._cut(before[0]) + self._mixed(b, known[0], donor)
        self._advance(half, mlp, known, (Site.MLP_OUT, layer), self.states)
        self.base = before + added
        self._compare(Site.RESID_POST, layer, self.base)

    def _attention(self, layer: int, half: Half) -> None:
        self._compare(Site.RESID_PRE, layer, self.base)
        last, reads = layer == self.plan.sizes.depth - 1, self.plan.sizes.reads
        queries = reads if last and reads < self.plan.sizes.tokens else None
        wide = not last or self._is_compared(layer, *Site)
        added = self._base_attention(layer, queries=None if wide else queries)
        out = self.states
        if last:  # only the tokens that are read go on
            out = self.base.new_empty(self.plan.states, self.images, reads, self.base.shape[-1])
        cut = slice(0, out.shape[2])
        known = added[:, :, cut]
        for b in self._branches_of_recipient(half):
            out[b.state] = self.base[0][:, cut] + self._patched_attention(layer, b, known)
        for step in half.steps:
            for b in step.recomputed:
                out[b.state] = self.states[step.state][:, cut] + self._recomputed(layer, step, b, queries)
        self._advance(
            half, lambda states: self.model.blocks[layer].attention(states, queries), known, (Site.ATTN_OUT, layer), out
        )
        self.base = self.base[..., : added.shape[2], :] + added
        self.states = out
        self._heads = []

    def _branches_of_recipient(self, half: Half) -> list[Branch]:
        """Branches of a half that split off from the recipient itself."""
        return [b for step in half.steps if step.state == RECIPIENT for b in step.branches]

    def _advance(
        self, half: Half, compute: Callable[[Tensor], Tensor], known: Tensor, place: tuple[Site, int], out: Tensor
    ) -> None:
        """Moves patched states on by what the half adds: computed, a donor's, or a mixture of both.

        ``known`` (base runs, images, tokens, width) is what the half adds to the base runs.
        """
        cut = slice(0, out.shape[2])
        by_state = {step.state: step for step in half.steps if step.state != RECIPIENT}
        for states in self._chunks([state for state, step in sorted(by_state.items()) if step.computes]):
            before = self.states[states]
            added = compute(before.flatten(0, 1)).unflatten(0, (-1, self.images))
            steps = [by_state[state] for state in range(states.start, states.stop)]
            for step, state_before, state_added in zip(steps, before, added, strict=True):
                for b in self._handed_on(step):
                    donor = self._donor_values(b.edit.donor, known, *place)
                    out[b.state] = state_before[:, cut] + self._mixed(b, state_added, donor)
                if step.goes_on:  # after the others, which start from what it was
                    torch.add(state_before[:, cut], state_added, out=out[step.state])
        for step in by_state.values():
            if not step.computes:
                for b in self._handed_on(step):
                    out[b.state] = self.states[step.state][:, cut] + self._donor_values(b.edit.donor, known, *place)

    def _handed_on(self, step: Step) -> list[Branch]:
        """Branches that differ in what the half hands on, not in what it computes."""
        return [b for b in step.branches if b.edit.site not in RECOMPUTED]

    def _is_compared(self, layer: int, *sites: Site) -> bool:
        return any((site, layer) in self.plan.comparisons_at for site in sites)

    def _compare(self, site: Site, layer: int, values: Tensor) -> None:
        if self._is_compared(layer, site):
            self.direct_effects.add_stream(site, layer, self._donor_values(0, values, site, layer), values[0])

    def _base_attention(self, layer: int, queries: int | None) -> Tensor:
        """What attention adds to the base runs, (runs, images, tokens, width); by head where heads are asked for."""
        every = self.base.flatten(0, 1)
        site, block = self.plan.target.site, self.model.blocks[layer]
        if site.by_head and (site, layer) in self.plan.places:
            heads = block.heads(every, pattern=site is Site.PATTERN)
            heads = replace(heads, z=block.z(heads))
            self._heads = [heads.rows(slice(i * self.images, (i + 1) * self.images)) for i in range(self.runs)]
            self.direct_effects.add_heads(layer, self._donor_heads(0, layer), self._heads[0])
            added = block.project(heads.z)
        else:
            added = self._by_rows(lambda rows: block.attention(rows, queries), every)
        added = added.unflatten(0, (self.runs, -1))
        self._compare(Site.ATTN_OUT, layer, added)
        return added

    def _donor_heads(self, donor: int, layer: int) -> Heads:
        """A donor's heads in a layer; of constants those of the recipient with the site's values in place."""
        run, site = self.plan.base_run_of(donor), self.plan.target.site
        if run is not None:
            return self._heads[self.plan.base_runs.index(run)]
        own = self._heads[0]
        values = getattr(own, site)
        return replace(own, **{str(site): self.inputs.constants[site, layer].to(values.dtype).expand_as(values)})

    def _patched_attention(self, layer: int, branch: Branch, known: Tensor) -> Tensor:
        """The recipient's attention output with an edit, from what is ``known`` of the base runs."""
        edit = branch.edit
        if edit.site is Site.ATTN_OUT:
            return self._mixed(branch, known[0], self._donor_values(edit.donor, known, Site.ATTN_OUT, layer))
        block, mask, tokens = self.model.blocks[layer], self.masks[edit.tokens], slice(0, known.shape[2])
        both = (self._heads[0], self._donor_heads(edit.donor, layer))
        own, other = (heads.select(edit.head).at_queries(tokens) for heads in both)
        if edit.site is Site.Z:
            change = (other.z - own.z) * mask[:, None, tokens, None]
        else:
            change = block.z(edited_heads(edit.site, mask, other, own)) - own.z
        return known[0] + block.project_change(change, edit.head)

    def _recomputed(self, layer: int, step: Step, branch: Branch, queries: int | None) -> Tensor:
        """The attention of a patched state with all heads' ``q``, ``k``, ``v`` or ``pattern`` the donor's."""
        site = branch.edit.site
        block = self.model.blocks[layer]
        own = block.heads(self.states[step.state], queries, pattern=site is Site.PATTERN)
        donor = self._donor_heads(branch.edit.donor, layer)
        edited = edited_heads(site, self.masks[branch.edit.tokens], donor, own)
        return block.project(block.z(edited))
