"""How far donor and recipient differ at a site, and the direct effect of that: later layers stay as they were.

Both come from the base runs alone, layer by layer as the executor (or a hooked forward) has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vitpatch.models.parts import Change, Heads
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.plan import Comparison, Plan, comparisons_of
from vitpatch.types import ALL_HEADS, Patch, Site


class DirectEffects:
    """Collects how far donor and recipient differ at each ``Comparison`` of a plan, for the images of a batch.

    ``masks`` bool (batch, tokens) by token group. Stored of each: the squared norms of donor − recipient and of the
    recipient over the patched tokens, (batch,), and the change of the stream at those of the tokens that the
    classifier reads where the patch can change it, (batch, tokens, width).
    """

    def __init__(self, plan: Plan, model: PatchableViT, masks: dict[str, Tensor]) -> None:
        self.plan, self.model, self.masks = plan, model, masks
        first = next(iter(masks.values()))
        batch, device = len(first), first.device
        self._squares = torch.zeros(2, len(plan.comparisons), batch, device=device)
        self._changes: dict[int, Change] = {}
        one_a_group = {c.tokens: c for c in plan.comparisons}.values()
        at = {c.tokens: torch.from_numpy(plan.tokens_changed(c)).to(device) for c in one_a_group}
        self._tokens = {c: at[c.tokens] for c in plan.comparisons}

    def add_stream(self, site: Site, layer: int, donor: Tensor, recipient: Tensor) -> None:
        """Values (batch, tokens, width) that are, or are added to, the residual stream."""
        comparisons = self.plan.comparisons_at.get((site, layer), [])
        if not comparisons:
            return
        change, squares = _squares(donor, recipient)
        for comparison in comparisons:
            mask, tokens = self.masks[comparison.tokens], self._tokens[comparison]
            self._add(comparison, squares, mask, change[:, tokens] * mask[:, tokens, None])

    def add_heads(self, layer: int, donor: Heads, recipient: Heads) -> None:
        """Queries, keys, values, patterns and ``z`` of both base runs in a layer."""
        site = self.plan.target.site
        comparisons = self.plan.comparisons_at.get((site, layer), [])
        if not (comparisons and site.by_head):
            return
        change, squares = _squares(getattr(donor, str(site)), getattr(recipient, str(site)))
        for comparison in comparisons:  # squares (2, batch, heads, tokens)
            mask = self.masks[comparison.tokens]
            moved = self._attention_change(comparison, change, donor, recipient, mask)
            self._add(comparison, _at_head(squares, comparison.head), mask, moved[:, self._tokens[comparison]])

    def add_norms(self, site: Site, layer: int, donor: Tensor, recipient: Tensor) -> None:
        """Values (batch, tokens, channels) as hooks have them; the direct effect is not known."""
        if site.by_head:
            number = self.plan.sizes.heads
            donor, recipient = (x.unflatten(-1, (number, -1)).transpose(1, 2) for x in (donor, recipient))
        squares = _squares(donor, recipient)[1]
        for comparison in self.plan.comparisons_at.get((site, layer), []):
            at_head = _at_head(squares, comparison.head) if site.by_head else squares
            self._add(comparison, at_head, self.masks[comparison.tokens], None)

    def _attention_change(self, at: Comparison, change: Tensor, donor: Heads, recipient: Heads, mask: Tensor) -> Tensor:
        """The change of the attention output at the tokens that are read, (batch, reads, width)."""
        block, reads = self.model.blocks[at.layer], slice(0, self.plan.sizes.reads)
        if at.site is Site.Z:
            moved = change if at.head == ALL_HEADS else change[:, at.head][:, None]
            moved = moved[:, :, reads] * mask[:, None, reads, None]
        else:
            donor, recipient = donor.select(at.head), recipient.select(at.head).at_queries(reads)
            moved = block.z(edited_heads(at.site, mask, donor, recipient)) - recipient.z
        return block.project_change(moved, at.head)

    def _add(self, comparison: Comparison, squares: Tensor, mask: Tensor, change: Tensor | None) -> None:
        number = self.plan.comparisons[comparison]
        self._squares[:, number] = (squares * mask).sum(-1)
        if change is not None:
            self._changes[number] = Change(self._tokens[comparison], change)

    def _numbers(self, patch: Patch) -> list[int]:
        return [self.plan.comparisons[comparison] for comparison in comparisons_of(patch)]

    def delta_norms(self) -> Tensor:
        """(patches, batch): the norm of donor − recipient over that of the recipient; NaN where that is 0."""
        numbers = [(row, n) for row, patch in enumerate(self.plan.patches) for n in self._numbers(patch)]
        rows, comparisons = torch.tensor(numbers, device=self._squares.device).unbind(1)
        summed = self._squares.new_zeros(2, len(self.plan.patches), self._squares.shape[2])
        difference, recipient = summed.index_add_(1, rows, self._squares[:, comparisons])
        return (difference / recipient.where(recipient > 0, torch.nan)).sqrt()

    def changes(self) -> Iterator[Change]:
        """What each patch adds to the stream at the tokens read, with all later layers as they were.

        A patch of the stream itself in several layers: that of the last one, which the others are overwritten by.
        """
        first = -1 if self.plan.target.site.is_stream else 0
        for patch in self.plan.patches:
            first_change, *others = [self._changes[number] for number in self._numbers(patch)[first:]]
            yield Change(first_change.tokens, sum(change.values for change in others) + first_change.values)


def _squares(donor: Tensor, recipient: Tensor) -> tuple[Tensor, Tensor]:
    """donor − recipient, and the squared norms of it and of the recipient over the last axis, float32."""
    change, recipient = donor.float() - recipient.float(), recipient.float()
    return change, torch.stack([change.square().sum(-1), recipient.square().sum(-1)])


def _at_head(squares: Tensor, head: int) -> Tensor:
    """(2, batch, heads, tokens) → (2, batch, tokens), of one head or summed."""
    return squares.sum(2) if head == ALL_HEADS else squares[:, :, head]


def edited_heads(site: Site, mask: Tensor, donor: Heads, recipient: Heads) -> Heads:
    """The recipient's heads with the donor's values at a site, at the tokens of ``mask`` (batch, tokens).

    A token is a query for ``q`` and ``pattern`` (its whole row), a key for ``k`` and ``v``.
    """
    own = getattr(recipient, str(site))
    tokens = slice(0, own.shape[2])  # of queries perhaps only those that are read
    new = torch.where(mask[:, None, tokens, None], getattr(donor, str(site))[:, :, tokens], own)
    q, k, v, pattern = (new if site == name else getattr(recipient, name) for name in ("q", "k", "v", "pattern"))
    return Heads(q, k, v, pattern, head=recipient.head)
