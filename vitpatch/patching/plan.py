"""Which patches a run makes, and which distinct states they need: decided from numbers alone, without a tensor.

A network of L blocks is 2 L **halves**, the attention of block 0, its MLP, the attention of block 1, …; each adds to
the residual stream. A patch is a set of *edits*: inside a half (``attn_out``, ``mlp_out``, head sites) or on the stream
that enters it (``resid_pre`` and ``resid_post`` of the block before are the same). Two patched runs whose edits up to
some point are equal are one **state** there. The plan says for each half which states it is computed for and where
states split, so that none is computed twice:

- before its first edit a run is the recipient's own, and costs nothing;
- the whole stream replaced makes it the donor's, which costs nothing from there on;
- inside a half whose output is wholly replaced nothing is computed, nor where the entering state is the recipient's
  and a token group or a head is replaced: both base runs' values are known there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product

import numpy as np

from vitpatch.study import check_target, registers_of, token_names
from vitpatch.types import (
    ALL_HEADS,
    EVERY_HEAD,
    JOINT,
    SUFFIX,
    BaseRun,
    Direction,
    Donor,
    Patch,
    Run,
    Site,
    Sizes,
    Target,
    TokenGroup,
    base_run_of,
    token_position,
    window_layers,
)

RECIPIENT, DONOR = -1, -2
"""States that are base runs: ``DONOR`` and below those of the plan's donors (``run_state``). Other states are numbered
from 0 in the order in which they split off."""


def run_state(donor: int) -> int:
    """The state that is the run of the plan's donor of this number."""
    return DONOR - donor


@dataclass(frozen=True, order=True)
class Edit:
    """A donor's values at a site and a token group; the edit's position in the plan is the half or stream.

    ``donor`` is its number in the plan.
    """

    site: Site
    tokens: str
    head: int = ALL_HEADS
    donor: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all tokens and heads are replaced."""
        return self.tokens == "all" and self.head == ALL_HEADS


@dataclass(frozen=True)
class Branch:
    """A state that splits off from another by an edit; it has the other's own number where that one ends here."""

    edit: Edit
    state: int


@dataclass(frozen=True)
class Step:
    """A state in a half, and the states that split off from it there; ``goes_on``: some run has no edit here."""

    state: int
    branches: tuple[Branch, ...]
    goes_on: bool

    @property
    def computes(self) -> bool:
        """Whether the half is computed for the unedited state."""
        mixes = any(not b.edit.is_whole and b.edit.site not in RECOMPUTED for b in self.branches)
        return self.state != RECIPIENT and (self.goes_on or mixes)

    @property
    def recomputed(self) -> tuple[Branch, ...]:
        """Branches for which the half is computed once more, with the edit inside."""
        return tuple(b for b in self.branches if self.state != RECIPIENT and b.edit.site in RECOMPUTED)


MASK_GROUPS = (TokenGroup.OBJECT, TokenGroup.BACKGROUND, TokenGroup.RANDOM_OBJECT)
"""Groups that differ between images: they need the data's object masks."""
STREAM_HALF = {Site.RESID_PRE: 0, Site.RESID_MID: 1, Site.RESID_POST: 2}
"""Which half, counted from the layer's first, a site of the stream enters."""
RECOMPUTED = (Site.Q, Site.K, Site.V, Site.PATTERN)
"""Sites whose replacement changes what attention computes, not only what it hands on."""


@dataclass(frozen=True)
class Half:
    """One half: ``mixes`` split states on the stream that enters it, ``steps`` are what it is then computed for."""

    mixes: tuple[Step, ...]
    steps: tuple[Step, ...]

    @property
    def evaluations(self) -> int:
        """For how many patched states the half is computed."""
        return sum(step.computes + len(step.recomputed) for step in self.steps)


@dataclass(frozen=True)
class Comparison:
    """Where donor and recipient are compared: a site of a layer, at a token group and a head."""

    site: Site
    layer: int
    tokens: str
    head: int


@dataclass(frozen=True)
class Plan:
    """The patches of a run, in the order of the rows of ``effects.parquet``, and the states that give them.

    ``donors`` are the run's donor, then controls, of which every patch is made too; ``leave_outs`` are windows without
    one of their layers, ``all_layers`` the patch of all layers at once (or nothing), both of the run's donor alone.
    ``runs`` are all of these, (patch, number of its donor): the patches of each donor in turn, ``leave_outs``,
    ``all_layers``. ``halves`` are 2 · depth; ``last`` split states on the stream that leaves the last block. ``final``
    are the states that the classifier reads, one for each of ``runs``. States 0 … ``whole`` − 1 exist before the last
    block's attention and need all tokens; the other ``states`` − ``whole`` arise inside the last block.
    """

    patches: tuple[Patch, ...]
    donors: tuple[Donor, ...]
    leave_outs: tuple[Patch, ...]
    all_layers: tuple[Patch, ...]
    direction: Direction
    target: Target
    sizes: Sizes
    runs: tuple[tuple[Patch, int], ...]
    halves: tuple[Half, ...]
    last: tuple[Step, ...]
    final: tuple[int, ...]
    states: int
    whole: int

    @property
    def recipient(self) -> BaseRun:
        """The base run that activations are put into, and that effects are counted against."""
        return self.direction.recipient

    def base_run_of(self, donor: int) -> Run | None:
        """The base run that a donor's values are of; ``None`` where they are constants."""
        return base_run_of(self.donors[donor], self.direction)

    @cached_property
    def base_runs(self) -> tuple[Run, ...]:
        """The runs without a patch, each once: the recipient, the donors', and of clean and corrupt what is left."""
        donors = [run for i in range(len(self.donors)) if (run := self.base_run_of(i)) is not None]
        return tuple(dict.fromkeys((self.recipient, *donors, *BaseRun)))

    @property
    def restores_everything(self) -> bool:
        """Whether every patch hands over the whole residual stream: the effect is then the total effect everywhere."""
        return set(self.final[: len(self.patches)]) == {DONOR}

    @cached_property
    def comparisons(self) -> dict[Comparison, int]:
        """Where donor and recipient are compared, each once, with its number."""
        distinct = dict.fromkeys(comparison for patch in self.patches for comparison in comparisons_of(patch))
        return {comparison: number for number, comparison in enumerate(distinct)}

    @cached_property
    def comparisons_at(self) -> dict[tuple[Site, int], list[Comparison]]:
        """The comparisons at a site of a layer."""
        by_place: dict[tuple[Site, int], list[Comparison]] = defaultdict(list)
        for comparison in self.comparisons:
            by_place[comparison.site, comparison.layer].append(comparison)
        return by_place

    @cached_property
    def places(self) -> tuple[tuple[Site, int], ...]:
        """Where the values of donors are needed: a site of a layer, each once."""
        return tuple(dict.fromkeys((patch.site, layer) for patch, _ in self.runs for layer in patch.layers))

    def tokens_changed(self, comparison: Comparison) -> np.ndarray:
        """Which of the tokens that the classifier reads a replacement there can change directly, int64 (n,)."""
        if comparison.site in (Site.K, Site.V):  # of a source token; the change is at those that attend to it
            return np.arange(self.sizes.reads)
        return self._tokens_read[comparison.tokens]

    @cached_property
    def _tokens_read(self) -> dict[str, np.ndarray]:
        """By token group which of the tokens that the classifier reads it may hold, int64 (n,) each."""
        reads, grid = self.sizes.reads, self.target.grid
        return {name: np.flatnonzero(possible_tokens(name, self.sizes, grid)[:reads]) for name in self.token_groups}

    @property
    def token_groups(self) -> tuple[str, ...]:
        """The names of the token groups, each once, in the order of the patches."""
        return tuple(dict.fromkeys(patch.tokens for patch in self.patches))

    @property
    def block_evaluations(self) -> int:
        """Blocks computed an image: patched states by block, where attention or MLP are, and the base runs."""
        halves = zip(self.halves[::2], self.halves[1::2], strict=True)
        patched = sum(max(attention.evaluations, mlp.evaluations) for attention, mlp in halves)
        return len(self.base_runs) * self.sizes.depth + patched

    @property
    def full_evaluations(self) -> int:
        """Blocks computed an image where each patch is a full forward pass."""
        return (len(self.base_runs) + len(self.runs)) * self.sizes.depth


@lru_cache(maxsize=32)
def make_plan(
    target: Target,
    windows: tuple[int, ...],
    direction: Direction,
    sizes: Sizes,
    donors: tuple[Donor, ...] = (Donor.PAIR,),
    synergy: bool = False,
) -> Plan:
    """The plan for a model of these ``sizes``; ``windows`` count layers or are ``PREFIX``, ``SUFFIX``.

    ``donors`` are the run's and its controls; with controls all layers are patched at once, too. With ``synergy``
    single layers are patched too where they are not asked for, and each window of several layers without each of them.
    Raises ``VitPatchError`` where a window, a layer, a head or a token group does not fit the model.
    """
    check_target(target, windows, sizes)
    every_layer = tuple(range(sizes.depth))
    layers = every_layer if target.layers is None else target.layers
    groups = token_names(target, sizes)
    heads = {None: (ALL_HEADS,), JOINT: (ALL_HEADS,), EVERY_HEAD: range(sizes.heads)}.get(target.heads, target.heads)

    def of(windows: Iterable[int], layers: Iterable[int]) -> tuple[Patch, ...]:
        return tuple(
            Patch(target.site, centre, window, window_layers(centre, window, sizes.depth), tokens, head)
            for window, tokens, centre, head in product(windows, groups, layers, heads)
        )

    patches, leave_outs, all_layers = of(windows, layers), (), ()
    if synergy:
        patched = set(layers) if 1 in windows else set()
        patches += of((1,), sorted({layer for patch in patches for layer in patch.layers} - patched))
        leave_outs = tuple(
            replace(whole, layers=tuple(other for other in whole.layers if other != layer), without=layer)
            for whole in patches
            if len(whole.layers) > 1
            for layer in whole.layers
        )
    if len(donors) > 1 and len(groups) == 1:
        all_layers = (Patch(target.site, 0, SUFFIX, every_layer, groups[0]),)
    runs = (
        *((patch, donor) for donor in range(len(donors)) for patch in patches),
        *((patch, 0) for patch in (*leave_outs, *all_layers)),
    )
    states = _plan_states([patch_edits(*run) for run in runs], donors, sizes.depth)
    return Plan(patches, donors, leave_outs, all_layers, direction, target, sizes, runs, *states)


def patch_edits(patch: Patch, donor: int = 0) -> dict[int, Edit]:
    """A patch as edits by position: 2 h + 1 is inside half h, 2 h on the stream that enters it."""
    half, site = STREAM_HALF.get(patch.site, int(patch.site is Site.MLP_OUT)), patch.site
    if site.is_stream:  # one name for the one stream
        site = Site.RESID_PRE
    elif site is Site.Z and patch.head == ALL_HEADS:  # the output projection goes token by token
        site = Site.ATTN_OUT
    edit = Edit(site, patch.tokens, patch.head, donor)
    return {2 * (2 * layer + half) + (not site.is_stream): edit for layer in patch.layers}


def comparisons_of(patch: Patch) -> tuple[Comparison, ...]:
    """Where a patch's donor and recipient differ: at each of its layers."""
    return tuple(Comparison(patch.site, layer, patch.tokens, patch.head) for layer in patch.layers)


def _plan_states(
    edits: Sequence[Mapping[int, Edit]], donors: Sequence[Donor], depth: int
) -> tuple[tuple[Half, ...], tuple[Step, ...], tuple[int, ...], int, int]:
    """``halves``, ``last``, ``final``, ``states`` and ``whole`` of a plan, from the edits of each run by position."""
    handed_over = {number for number, donor in enumerate(donors) if not donor.is_constant}
    final, states, whole_states = [RECIPIENT] * len(edits), 0, 0
    positions: list[tuple[Step, ...]] = []
    for position in range(4 * depth + 1):
        if position == 4 * (depth - 1) + 1:  # inside the last block's attention
            whole_states = states
        of_stream = handed_over if position % 2 == 0 else set()
        steps, states = _branch_off(final, [e.get(position) for e in edits], states, position % 2 == 0, of_stream)
        positions.append(steps)
    halves = tuple(map(Half, positions[:-1:2], positions[1::2]))
    return halves, positions[-1], tuple(final), states, whole_states


def _branch_off(
    current: list[int], edits: list[Edit | None], states: int, is_stream: bool, handed_over: set[int]
) -> tuple[tuple[Step, ...], int]:
    """Moves each run on from its ``current`` state (in place) by its edit here; the steps, and the states so far.

    ``handed_over`` are the donors whose whole value here makes a run theirs.
    """
    by_state: dict[int, dict[Edit | None, list[int]]] = defaultdict(lambda: defaultdict(list))
    for run, (state, edit) in enumerate(zip(current, edits, strict=True)):
        if state >= RECIPIENT:  # of a run that is its donor's the donor's values change nothing
            by_state[state][edit].append(run)
    steps = []
    for state, runs_of in by_state.items():
        goes_on = state == RECIPIENT or None in runs_of
        of_donor = [edit for edit in runs_of if edit is not None and edit.is_whole and edit.donor in handed_over]
        parting = [edit for edit in runs_of if edit is not None and edit not in of_donor]
        branches = []
        for i, edit in enumerate(parting):
            takes_over = not goes_on and i == len(parting) - 1  # the last: those before still start from it
            branches.append(Branch(edit, state if takes_over else states))
            states += not takes_over
        state_after = {branch.edit: branch.state for branch in branches}
        state_after |= {edit: run_state(edit.donor) for edit in of_donor}
        for edit, new_state in state_after.items():
            for run in runs_of[edit]:
                current[run] = new_state
        if branches or (not is_stream and state != RECIPIENT):
            steps.append(Step(state, tuple(branches), goes_on))
    return tuple(steps), states


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
        mask[registers_of(sizes)] = True
    elif name == TokenGroup.PATCHES or name in MASK_GROUPS:
        patches[:] = True
    elif (position := token_position(name)) is None:
        mask[sizes.special.index(name.partition(":")[2])] = True
    else:
        row, column = position
        height, width = (1, 1) if name.startswith("each") else (rows // blocks[0], columns // blocks[1])
        patches[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
    return mask
