"""A plan on a batch → the logits of both base runs and of every patch, each distinct state computed once.

Halves of the network are taken one after the other; within one, the base runs go first, then all live states, in chunks
of rows. States are kept in one tensor and changed in place. In the last block only the tokens that the classifier reads
go on. Where a model's parts do not give its own logits, ``vitpatch.forwards`` does the same by full forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitpatch.block import Heads
from vitpatch.cost import Room
from vitpatch.forwards import full_forwards
from vitpatch.model import PatchableViT
from vitpatch.plan import DONOR, RECIPIENT, RECOMPUTED, Branch, Half, Plan, Step
from vitpatch.readings import Readings, edited_heads
from vitpatch.spec import BaseRun, Site


@dataclass(frozen=True)
class Outputs:
    """What a plan gives on a batch, in the plan's order of patches.

    ``base`` logits (batch, classes) of each base run; ``patched`` and ``direct`` logits (patches, batch, classes),
    ``direct`` of the change carried straight to the readout; ``delta_norm`` (patches, batch).
    """

    base: Mapping[BaseRun, Tensor]
    patched: Tensor
    direct: Tensor
    delta_norm: Tensor

    def cpu(self) -> Outputs:
        """The same in the CPU's memory: metrics are in float64, which not every device has."""
        base = {run: logits.cpu() for run, logits in self.base.items()}
        return Outputs(base, self.patched.cpu(), self.direct.cpu(), self.delta_norm.cpu())


@torch.no_grad()
def execute(plan: Plan, model: PatchableViT, pixels: Mapping[BaseRun, Tensor], masks: Tensor, room: Room) -> Outputs:
    """Runs the plan on ``pixels``, normalised, (images, 3, height, width) of each base run.

    ``masks`` bool (groups, images, tokens), one of ``plan.token_groups`` each; ``room.rows`` bounds the rows (an image
    in a state each) that are computed in one call.
    """
    of_group = dict(zip(plan.token_groups, masks.to(pixels[BaseRun.CLEAN].device), strict=True))
    readings = Readings(plan, model, of_group)
    if model.goes_by_parts(plan.target.site):
        walk = _Walk(plan, model, pixels, of_group, readings, room)
        base, patched = walk.logits()
        direct = model.reader.direct(walk.base[0], readings.changes())
    else:
        base, patched, direct = full_forwards(plan, model, pixels, of_group, readings)
    return Outputs(base, patched, direct, readings.delta_norms())


class _Walk:
    """A few images on their way through the network, half by half.

    ``base`` (2, images, tokens, width) are recipient and donor; ``states`` (states, images, tokens, width) the patched
    ones. From the last block's attention on ``states`` have only the tokens that are read, and so has ``base`` where
    nothing more of it is compared.
    """

    def __init__(
        self,
        plan: Plan,
        model: PatchableViT,
        pixels: Mapping[BaseRun, Tensor],
        masks: dict[str, Tensor],
        readings: Readings,
        room: Room,
    ) -> None:
        self.plan, self.model, self.masks, self.readings = plan, model, masks, readings
        runs = [pixels[plan.direction.recipient], pixels[plan.direction.donor]]
        self.images = len(runs[0])
        self.base = model.embed(torch.cat(runs)).unflatten(0, (2, self.images))
        self.states = self.base.new_empty(plan.whole, *self.base.shape[1:])
        self._rows = room.rows
        self._at_once = max(1, room.rows // self.images)  # states
        self._heads: tuple[Heads, Heads] | None = None

    def logits(self) -> tuple[dict[BaseRun, Tensor], Tensor]:
        """Of both base runs, (images, classes), and of every patch, (patches, images, classes)."""
        for number, half in enumerate(self.plan.halves):
            layer, is_mlp = divmod(number, 2)
            self._mix(half.mixes)
            self._mlp(layer, half) if is_mlp else self._attention(layer, half)
        self._mix(self.plan.last)
        direction = self.plan.direction
        recipient, donor = self.model.readout(self._cut(self.base.flatten(0, 1))).unflatten(0, (2, -1))
        patched = donor.new_empty(self.plan.states, *donor.shape)
        for states in self._chunks(range(self.plan.states)):
            patched[states] = self.model.readout(self.states[states].flatten(0, 1)).unflatten(0, (-1, self.images))
        of = {RECIPIENT: recipient, DONOR: donor}
        of_patch = [of[state] if state in of else patched[state] for state in self.plan.final]
        self.base = self._cut(self.base)
        return {direction.recipient: recipient, direction.donor: donor}, torch.stack(of_patch)

    def _cut(self, tokens: Tensor) -> Tensor:
        """The tokens that are still on their way, of (…, tokens, width)."""
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
        """The same in calls of at most so many rows as there is room for."""
        if len(stream) <= self._rows:
            return compute(stream)
        return torch.cat([compute(rows) for rows in stream.split(self._rows)])

    def _mixed(self, branch: Branch, own: Tensor, donor: Tensor) -> Tensor:
        """The donor's values at the branch's tokens, the others' own; all (images, tokens, width)."""
        if branch.edit.is_whole:
            return donor
        return torch.where(self.masks[branch.edit.tokens][:, : own.shape[1], None], donor, own)

    def _mix(self, steps: Sequence[Step]) -> None:
        """States that part on the stream: the donor's stream at a token group."""
        recipient, donor = map(self._cut, self.base)
        for step in steps:
            for branch in step.branches:
                own = recipient if step.state == RECIPIENT else self.states[step.state]
                self.states[branch.state] = self._mixed(branch, own, donor)

    def _mlp(self, layer: int, half: Half) -> None:
        self._compare(Site.RESID_MID, layer, self.base)
        wide = layer < self.plan.depth - 1 or self._is_compared(layer, Site.MLP_OUT, Site.RESID_POST)
        before = self.base if wide else self._cut(self.base)
        mlp = self.model.blocks[layer].mlp
        added = self._by_rows(mlp, before.flatten(0, 1)).unflatten(0, (2, -1))
        self._compare(Site.MLP_OUT, layer, added)
        recipient, known, donor = self._cut(before[0]), self._cut(added[0]), self._cut(added[1])
        for step in half.steps:
            if step.state == RECIPIENT:
                for b in step.branches:
                    self.states[b.state] = recipient + self._mixed(b, known, donor)
        self._own(half, mlp, donor, self.states)
        self.base = before + added
        self._compare(Site.RESID_POST, layer, self.base)

    def _attention(self, layer: int, half: Half) -> None:
        self._compare(Site.RESID_PRE, layer, self.base)
        last, reads = layer == self.plan.depth - 1, self.plan.sizes.reads
        queries = reads if last and reads < self.plan.sizes.tokens else None
        wide = not last or self._is_compared(layer, *Site)
        added = self._base_attention(layer, queries=None if wide else queries)
        out = self.states
        if last:  # only the tokens that are read go on
            out = self.base.new_empty(self.plan.states, self.images, reads, self.base.shape[-1])
        cut = slice(0, out.shape[2])
        recipient, known, donor = self.base[0][:, cut], added[0][:, cut], added[1][:, cut]
        for step in half.steps:
            if step.state == RECIPIENT:
                for b in step.branches:
                    out[b.state] = recipient + self._patched_attention(layer, b, known, donor)
            for b in step.recomputed:
                out[b.state] = self.states[step.state][:, cut] + self._recomputed(layer, step, b, queries)
        self._own(half, lambda states: self.model.blocks[layer].attention(states, queries), donor, out)
        self.base = self.base[..., : added.shape[2], :] + added
        self.states = out
        self._heads = None

    def _own(self, half: Half, compute: Callable[[Tensor], Tensor], donor: Tensor, out: Tensor) -> None:
        """Moves patched states on by what the half adds: computed, the donor's, or a mixture of both."""
        cut = slice(0, out.shape[2])
        by_state = {step.state: step for step in half.steps if step.state != RECIPIENT}
        for states in self._chunks([state for state, step in sorted(by_state.items()) if step.computes]):
            before = self.states[states]
            added = compute(before.flatten(0, 1)).unflatten(0, (-1, self.images))
            steps = [by_state[state] for state in range(states.start, states.stop)]
            for step, state_before, state_added in zip(steps, before, added, strict=True):
                for b in self._handed_on(step):
                    out[b.state] = state_before[:, cut] + self._mixed(b, state_added, donor)
                if step.goes_on:  # after the others, which start from what it was
                    torch.add(state_before[:, cut], state_added, out=out[step.state])
        for step in by_state.values():
            if not step.computes:
                for b in self._handed_on(step):
                    out[b.state] = self.states[step.state][:, cut] + donor

    def _handed_on(self, step: Step) -> list[Branch]:
        """Branches that differ in what the half hands on, not in what it computes."""
        return [b for b in step.branches if b.edit.site not in RECOMPUTED]

    def _is_compared(self, layer: int, *sites: Site) -> bool:
        return any((site, layer) in self.plan.readings_at for site in sites)

    def _compare(self, site: Site, layer: int, values: Tensor) -> None:
        recipient, donor = values
        self.readings.stream(site, layer, donor, recipient)

    def _base_attention(self, layer: int, queries: int | None) -> Tensor:
        """What attention adds to both base runs, (2, images, tokens, width); by head where heads are asked for."""
        both = self.base.flatten(0, 1)
        if self.plan.target.site.by_head and self._is_compared(layer, self.plan.target.site):
            block = self.model.blocks[layer]
            heads = block.heads(both, pattern=self.plan.target.site is Site.PATTERN)
            heads = replace(heads, z=block.z(heads))
            self._heads = (heads.rows(slice(0, self.images)), heads.rows(slice(self.images, None)))
            self.readings.heads(layer, self._heads[1], self._heads[0])
            added = block.project(heads.z)
        else:
            added = self._by_rows(lambda rows: self.model.blocks[layer].attention(rows, queries), both)
        added = added.unflatten(0, (2, -1))
        self._compare(Site.ATTN_OUT, layer, added)
        return added

    def _patched_attention(self, layer: int, branch: Branch, recipient: Tensor, donor: Tensor) -> Tensor:
        """The recipient's attention output with an edit, from what is known of both base runs."""
        edit = branch.edit
        if edit.site is Site.ATTN_OUT:
            return self._mixed(branch, recipient, donor)
        block, mask, tokens = self.model.blocks[layer], self.masks[edit.tokens], slice(0, recipient.shape[1])
        own, other = (heads.of(edit.head).at(tokens) for heads in self._heads)
        if edit.site is Site.Z:
            change = (other.z - own.z) * mask[:, None, tokens, None]
        else:
            change = block.z(edited_heads(edit.site, mask, other, own)) - own.z
        return recipient + block.project_change(change, edit.head)

    def _recomputed(self, layer: int, step: Step, branch: Branch, queries: int | None) -> Tensor:
        """The attention of a patched state with all heads' ``q``, ``k``, ``v`` or ``pattern`` the donor's."""
        site = branch.edit.site
        block = self.model.blocks[layer]
        own = block.heads(self.states[step.state], queries, pattern=site is Site.PATTERN)
        edited = edited_heads(site, self.masks[branch.edit.tokens], self._heads[1], own)
        return block.project(block.z(edited))
