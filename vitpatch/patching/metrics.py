"""What is measured of a plan's runs: metrics of their logits, in float64, and how far donor and recipient differ.

Both become columns of ``examples.parquet`` and ``effects.parquet``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpatch.models.parts import Change, Heads
from vitpatch.models.vit import PatchableViT, Place
from vitpatch.patching.plan import Comparison, Plan, comparisons_of
from vitpatch.schema import CONTROL_METRICS, LOGIT_DIFF_OTHER_RIVAL, PATCH_COLUMNS, STORED_METRICS
from vitpatch.types import ALL_HEADS, BaseRun, Donor, Metric, Patch, Run, Site

LOGITS_AT_ONCE = 4_000_000
"""Bounds what the metrics take in memory: logits in float64 times a few."""


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


@dataclass(frozen=True)
class Outputs:
    """What a plan gives on a batch, in the plan's order of patches.

    ``base`` logits (batch, classes) of each base run; ``patched`` (runs, batch, classes) of the plan's ``runs``;
    ``direct`` logits (patches, batch, classes) of the change added to what the classifier reads;
    ``delta_norm`` (patches, batch).
    """

    base: Mapping[Run, Tensor]
    patched: Tensor
    direct: Tensor
    delta_norm: Tensor

    def cpu(self) -> Outputs:
        """The same in the CPU's memory: metrics are in float64, which not every device has."""
        base = {run: logits.cpu() for run, logits in self.base.items()}
        return Outputs(base, self.patched.cpu(), self.direct.cpu(), self.delta_norm.cpu())


def average_draws(draws: Iterable[Outputs]) -> Outputs:
    """One set of logits from several draws of noise: those of the mean probabilities, log Σ p / n, float64.

    Of a single draw it is what it was. ``delta_norm`` is the mean.
    """
    first, *others = draws
    if not others:
        return first
    n = 1 + len(others)

    def mean(logits: Sequence[Tensor]) -> Tensor:
        log_probs = torch.stack([x.double().log_softmax(-1) for x in logits])
        return log_probs.logsumexp(0) - math.log(n)

    every = [first, *others]
    base = {run: mean([outputs.base[run] for outputs in every]) for run in first.base}
    patched, direct = mean([o.patched for o in every]), mean([o.direct for o in every])
    return Outputs(base, patched, direct, torch.stack([o.delta_norm for o in every]).mean(0))


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """The class other than the label with the largest logit: (batch, classes), (batch,) → (batch,) int64."""
    return logits.double().scatter(-1, labels[:, None], -torch.inf).argmax(-1)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the logsumexp of all others: (..., batch, classes), (batch,) → float64 (..., batch)."""
    logits = logits.double()
    index = labels.expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    return logits.gather(-1, index).squeeze(-1) - others


def metrics(
    logits: Tensor, labels: Tensor, rivals: Tensor, other_rivals: Tensor, clean_logits: Tensor
) -> dict[str, Tensor]:
    """What is stored of a run, by column.

    ``logits`` (..., batch, classes) of the run, ``labels``, ``rivals`` and ``other_rivals`` (batch,) int64,
    ``clean_logits`` (batch, classes) of the clean run. Returns float64 (..., batch) under the names of
    ``STORED_METRICS`` – the label's softmax probability; its log odds against all other classes; its logit; its logit
    minus the rival's; KL(clean ‖ run) in nats; its logit minus the other rival's – and ``pred``, the class with the
    largest logit, int64.
    """
    logits, clean = logits.double(), clean_logits.double().log_softmax(-1)
    index = labels.expand(logits.shape[:-1])[..., None]
    label_logit = logits.gather(-1, index).squeeze(-1)

    def above(others: Tensor) -> Tensor:
        return label_logit - logits.gather(-1, others.expand(logits.shape[:-1])[..., None]).squeeze(-1)

    log_probs = logits.log_softmax(-1)
    return {
        Metric.PROB: log_probs.gather(-1, index).squeeze(-1).exp(),
        Metric.LOG_ODDS: log_odds(logits, labels),
        Metric.LOGIT: label_logit,
        Metric.LOGIT_DIFF: above(rivals),
        Metric.KL: (clean.exp() * (clean - log_probs)).sum(-1),
        LOGIT_DIFF_OTHER_RIVAL: above(other_rivals),
        "pred": logits.argmax(-1),
    }


@dataclass(frozen=True)
class Columns:
    """``examples`` have a value an image; ``effects`` one an image and patch, image by image; ``leave_outs`` too."""

    examples: dict[str, NDArray]
    effects: dict[str, NDArray]
    leave_outs: dict[str, NDArray]


def to_columns(
    outputs: Outputs,
    plan: Plan,
    labels: Tensor,
    ids: Tensor,
    masks: Tensor,
    metric: Metric,
    rival: BaseRun,
    partners: Mapping[Donor, Tensor] | None = None,
) -> Columns:
    """The columns of a few images; all tensors on the CPU.

    ``labels``, ``ids`` int64 (images,); ``masks`` bool (groups, images, tokens) as given to the executor; ``metric``
    is that of ``effect``, ``rival`` the base run whose runner-up ``logit_diff`` is taken against. ``partners`` int64
    (images,), the ids of other images that are donors: what an image has no partner for is NaN. Metrics are rounded to
    float32, as they are stored, before they are subtracted: who reads them again gets the same effects.
    """
    clean, partners = outputs.base[BaseRun.CLEAN], partners or {}
    rivals, other_rivals = (runner_up(outputs.base[run], labels) for run in (rival, rival.other))
    against = labels, rivals, other_rivals, clean
    base = {run: _metrics(logits[None], *against) for run, logits in outputs.base.items()}
    base = {run: {name: values[0] for name, values in of_run.items()} for run, of_run in base.items()}
    examples = {f"{name}_{run}": values for run in BaseRun for name, values in base[run].items()}
    examples |= {"example_id": ids.numpy(), "label": labels.numpy()}
    examples |= {"rival": rivals.numpy(), "other_rival": other_rivals.numpy()}
    lonely = {donor: (other < 0).numpy() for donor, other in partners.items()}
    for donor, other in partners.items():
        examples[f"partner_{donor}"] = other.numpy()
        examples |= {f"{name}_{donor}": _unknown(base[donor][name], lonely[donor]) for name in STORED_METRICS}

    runs = _metrics(outputs.patched, *against)  # (runs, images) each
    runs["effect"] = runs[metric] - base[plan.recipient][metric]
    number, donor = len(plan.patches), plan.donors[0]
    unknown = lonely.get(donor, np.zeros(len(ids), dtype=bool))
    effects = {name: _unknown(values[:number], unknown) for name, values in runs.items()}
    direct = _direct_log_odds(outputs.direct, labels) - base[plan.recipient][Metric.LOG_ODDS]
    effects["direct_log_odds"] = _unknown(direct, unknown)
    effects["delta_norm"] = _unknown(outputs.delta_norm.numpy(), unknown)
    effects["n_tokens"] = masks.sum(-1).numpy()[[plan.token_groups.index(patch.tokens) for patch in plan.patches]]
    for i, control in enumerate(plan.donors[1:], start=1):
        rows = slice(i * number, (i + 1) * number)
        effects |= {f"{name}_{control}": _unknown(runs[name][rows], lonely[control]) for name in CONTROL_METRICS}
    rest = {name: _unknown(runs[name][len(plan.donors) * number :], unknown) for name in CONTROL_METRICS}
    leave_outs = {name: values[: len(plan.leave_outs)] for name, values in rest.items()}
    if plan.all_layers:
        examples |= {f"{name}_all_layers": values[-1] for name, values in rest.items()}
    return Columns(examples, _by_image(plan.patches, effects, ids), _by_image(plan.leave_outs, leave_outs, ids))


def _metrics(logits: Tensor, labels: Tensor, rivals: Tensor, other_rivals: Tensor, clean: Tensor) -> dict[str, NDArray]:
    """Metrics (runs, images) of runs, some at a time: float32, and ``pred`` int64."""
    at_once = logits.split(max(1, LOGITS_AT_ONCE // clean.numel()))
    parts = [metrics(some, labels, rivals, other_rivals, clean) for some in at_once]
    joined = {str(name): torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: (values.float() if values.is_floating_point() else values).numpy() for name, values in joined.items()}


def _direct_log_odds(logits: Tensor, labels: Tensor) -> NDArray:
    """Log odds (patches, images) of the direct runs, some at a time."""
    at_once = max(1, LOGITS_AT_ONCE // logits[0].numel())
    return torch.cat([log_odds(some, labels) for some in logits.split(at_once)]).numpy()


def _unknown(values: NDArray, where: NDArray[np.bool_]) -> NDArray:
    """(…, images) with NaN at some images; whole numbers (``pred``) become −1 there."""
    return np.where(where, -1 if values.dtype.kind == "i" else np.nan, values)


def _by_image(patches: Sequence[Patch], values: dict[str, NDArray], ids: Tensor) -> dict[str, NDArray]:
    """Rows of images and patches from (patches, images) each, with the columns that name the patches."""
    if not patches:
        return {}
    named = _patch_columns(patches) | {"without": np.array([patch.without for patch in patches])}
    rows = {name: np.tile(column, len(ids)) for name, column in named.items()}
    rows |= {name: column.T.ravel() for name, column in values.items()}
    return rows | {"example_id": np.repeat(ids.numpy(), len(patches))}


def join_columns(parts: Sequence[Columns]) -> Columns:
    """The columns of several parts of a batch, in their order."""

    def join(tables: Sequence[dict[str, NDArray]]) -> dict[str, NDArray]:
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    return Columns(*(join([getattr(part, kind) for part in parts]) for kind in ("examples", "effects", "leave_outs")))


def _patch_columns(patches: Sequence[Patch]) -> dict[str, np.ndarray]:
    """``PATCH_COLUMNS`` of patches, (patches,) each; those of a window without a layer are the whole window's."""
    rows = [(str(p.site), p.layer, p.head, str(p.tokens), p.window, *_ends(p)) for p in patches]
    return {name: np.array(values) for name, values in zip(PATCH_COLUMNS, zip(*rows, strict=True), strict=True)}


def _ends(patch: Patch) -> tuple[int, int, int]:
    layers = sorted({*patch.layers, *((patch.without,) if patch.without >= 0 else ())})
    return layers[0], layers[-1], len(layers)


class DirectEffects:
    """Collects how far donor and recipient differ at each ``Comparison`` of a plan, for the images of a batch.

    Both come from the base runs alone, layer by layer as the executor (or a hooked forward) has them. The direct effect
    of a difference is that with all later layers as they were.

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
