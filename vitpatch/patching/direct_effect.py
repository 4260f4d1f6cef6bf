"""Beside the patches: how far donor and recipient differ at a site, and what of that goes straight to the readout.

Both come from the two base runs alone, layer by layer as the executor (or a hooked forward) has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vitpatch.models.block import Heads
from vitpatch.models.readout import Change
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.plan import Plan, Reading, readings_of
from vitpatch.types import ALL_HEADS, Site


class Readings:
    """Collects, for the images of a batch, what is compared at each ``Reading`` of a plan.

    ``masks`` bool (batch, tokens) by token group. Stored a reading: the squared norms of donor − recipient and of
    the recipient over the patched tokens, (batch,), and the change of the stream at those of the tokens that the
    classifier reads where the patch can change it, (batch, tokens, width).
    """

    def __init__(self, plan: Plan, model: PatchableViT, masks: dict[str, Tensor]) -> None:
        self.plan, self.model, self.masks = plan, model, masks
        first = next(iter(masks.values()))
        batch, device = len(first), first.device
        number = len(plan.readings)
        self._squares = torch.zeros(2, number, batch, device=device)
        self._changes: dict[int, Change] = {}
        one_a_group = {reading.tokens: reading for reading in plan.readings}.values()
        at = {reading.tokens: torch.from_numpy(plan.reached(reading)).to(device) for reading in one_a_group}
        self._reached = {reading: at[reading.tokens] for reading in plan.readings}

    def stream(self, site: Site, layer: int, donor: Tensor, recipient: Tensor) -> None:
        """Values (batch, tokens, width) that are, or are added to, the residual stream."""
        readings = self.plan.readings_at.get((site, layer), [])
        if not readings:
            return
        change, squares = _squares(donor, recipient)
        for reading in readings:
            mask, tokens = self.masks[reading.tokens], self._reached[reading]
            self._note(reading, squares, mask, change[:, tokens] * mask[:, tokens, None])

    def heads(self, layer: int, donor: Heads, recipient: Heads) -> None:
        """Queries, keys, values, patterns and ``z`` of both base runs in a layer."""
        site = self.plan.target.site
        readings = self.plan.readings_at.get((site, layer), [])
        if not (readings and site.by_head):
            return
        change, squares = _squares(_value(donor, site), _value(recipient, site))  # (2, batch, heads, tokens)
        for reading in readings:
            mask = self.masks[reading.tokens]
            moved = self._straight(reading, change, donor, recipient, mask)
            self._note(reading, _of_head(squares, reading.head), mask, moved[:, self._reached[reading]])

    def norms(self, site: Site, layer: int, donor: Tensor, recipient: Tensor) -> None:
        """Values (batch, tokens, channels) as hooks have them; nothing is known of the straight way."""
        if site.by_head:
            number = self.plan.sizes.heads
            donor, recipient = (x.unflatten(-1, (number, -1)).transpose(1, 2) for x in (donor, recipient))
        squares = _squares(donor, recipient)[1]
        for reading in self.plan.readings_at.get((site, layer), []):
            of_head = _of_head(squares, reading.head) if site.by_head else squares
            self._note(reading, of_head, self.masks[reading.tokens], None)

    @property
    def _reads(self) -> int:
        return self.plan.sizes.reads

    def _straight(self, reading: Reading, change: Tensor, donor: Heads, recipient: Heads, mask: Tensor) -> Tensor:
        """The change of the attention output at the tokens that are read."""
        if reading.site is Site.Z:
            moved = change if reading.head == ALL_HEADS else change[:, reading.head][:, None]
            moved = moved[:, :, : self._reads] * mask[:, None, : self._reads, None]
        else:
            donor, recipient = donor.select(reading.head), recipient.select(reading.head).at(slice(0, self._reads))
            edited = edited_heads(reading.site, mask, donor, recipient)
            moved = self.model.blocks[reading.layer].z(edited) - recipient.z
        return self.model.blocks[reading.layer].project_change(moved, reading.head)

    def _note(self, reading: Reading, squares: Tensor, mask: Tensor, change: Tensor | None) -> None:
        number = self.plan.readings[reading]
        self._squares[:, number] = (squares * mask).sum(-1)
        if change is not None:
            self._changes[number] = Change(self._reached[reading], change)

    def delta_norms(self) -> Tensor:
        """(patches, batch): the norm of donor − recipient over that of the recipient; NaN where that is 0."""
        numbers = [[self.plan.readings[reading] for reading in readings_of(patch)] for patch in self.plan.patches]
        difference, recipient = _summed(self._squares.transpose(0, 1), numbers).unbind(1)
        return (difference / recipient.where(recipient > 0, torch.nan)).sqrt()

    def changes(self) -> Iterator[Change]:
        """Of each patch what it adds to the stream at the tokens read, by the straight way.

        A patch of the stream itself in several layers: that of the last one, which the others are overwritten by.
        """
        first = -1 if self.plan.target.site.is_stream else 0
        for patch in self.plan.patches:
            of_layers = [self._changes[self.plan.readings[reading]] for reading in readings_of(patch)[first:]]
            yield Change(of_layers[0].tokens, sum(change.values for change in of_layers[1:]) + of_layers[0].values)


def _summed(values: Tensor, numbers: list[list[int]]) -> Tensor:
    """For each list of numbers the sum of these ``values`` (readings, …)."""
    owner = [patch for patch, of_patch in enumerate(numbers) for _ in of_patch]
    flat = [number for of_patch in numbers for number in of_patch]
    total = torch.zeros(len(numbers), *values.shape[1:], device=values.device)
    return total.index_add_(0, torch.tensor(owner, device=values.device), values[flat])


def _squares(donor: Tensor, recipient: Tensor) -> tuple[Tensor, Tensor]:
    """donor − recipient, and the squared norms of it and of the recipient over the last axis, float32."""
    change, recipient = donor.float() - recipient.float(), recipient.float()
    return change, torch.stack([change.square().sum(-1), recipient.square().sum(-1)])


def _value(heads: Heads, site: Site) -> Tensor:
    return getattr(heads, str(site))


def _of_head(squares: Tensor, head: int) -> Tensor:
    """(2, batch, heads, tokens) → (2, batch, tokens), of one head or summed."""
    return squares.sum(2) if head == ALL_HEADS else squares[:, :, head]


def edited_heads(site: Site, mask: Tensor, donor: Heads, recipient: Heads) -> Heads:
    """The recipient's heads with the donor's values at a site, at the tokens of ``mask`` (batch, tokens).

    A token is a query for ``q`` and ``pattern`` (its whole row), a key for ``k`` and ``v``.
    """
    own = _value(recipient, site)
    tokens = slice(0, own.shape[2])  # of queries perhaps only those that are read
    new = torch.where(mask[:, None, tokens, None], _value(donor, site)[:, :, tokens], own)
    q, k, v, pattern = (new if site == name else getattr(recipient, name) for name in ("q", "k", "v", "pattern"))
    return Heads(q, k, v, pattern, head=recipient.head)
