"""The plan by counting: by hand for small depths, and against an enumeration that knows nothing of it."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitpatch.errors import VitPatchError
from vitpatch.patching.plan import DONOR, RECIPIENT, make_plan, patch_edits
from vitpatch.types import Direction, Site, Sizes, Target, TokenGroup, window_layers


def sizes(depth=4, heads=2):
    return Sizes(depth, heads, ("cls",), (2, 2), reads=1)


def plan(site="attn_out", windows=(1,), tokens=("all",), depth=4, layers=None, heads=None, direction="denoise"):
    groups = tuple(TokenGroup(group) for group in tokens)
    target = Target(Site(site), layers, groups, heads, grid=(2, 1) if "grid" in tokens else None)
    return make_plan(target, windows, Direction(direction), sizes(depth))


@pytest.mark.parametrize(
    ("centre", "window", "layers"),
    [
        (5, 1, (5,)),
        (5, 2, (4, 5)),
        (5, 3, (4, 5, 6)),
        (5, 4, (3, 4, 5, 6)),
        (0, 3, (0, 1)),
        (11, 3, (10, 11)),
        (0, 2, (0,)),
        (6, 12, tuple(range(12))),
        (0, 12, tuple(range(6))),
        (2, -1, (0, 1, 2)),
        (9, -2, (9, 10, 11)),
    ],
)
def test_window_is_centred_and_clipped(centre, window, layers):
    assert window_layers(centre, window, depth=12) == layers


def test_the_plan_lists_the_patches_window_by_window_in_the_order_asked_for():
    made = plan("mlp_out", (3, 1), ("cls", "patches"), layers=(3, 1), direction="noise")
    assert [(p.window, p.tokens, p.layer, p.layers) for p in made.patches] == [
        (3, "cls", 3, (2, 3)),
        (3, "cls", 1, (0, 1, 2)),
        (3, "patches", 3, (2, 3)),
        (3, "patches", 1, (0, 1, 2)),
        (1, "cls", 3, (3,)),
        (1, "cls", 1, (1,)),
        (1, "patches", 3, (3,)),
        (1, "patches", 1, (1,)),
    ]
    assert (made.direction.donor, made.direction.recipient) == ("corrupt", "clean")


# --- counted by hand: two blocks, four halves (attention 0, MLP 0, attention 1, MLP 1) ---


@pytest.mark.parametrize(
    ("site", "windows", "tokens", "evaluations", "why"),
    [
        ("attn_out", (1,), "all", [0, 1, 1, 2], "layer 0's run needs all after it, layer 1's its MLP"),
        ("attn_out", (1,), "cls", [0, 1, 1, 2], "a token group mixes what is known of both base runs"),
        ("attn_out", (2,), "all", [0, 1, 1, 2], "(0,) goes on; of (0, 1) the attention is replaced"),
        ("mlp_out", (1,), "all", [0, 0, 1, 1], "layer 1's run is the recipient's up to its end"),
        ("resid_post", (1,), "all", [0, 0, 0, 0], "the whole stream is the donor's run"),
        ("resid_post", (1,), "cls", [0, 0, 1, 1], "layer 0's goes through block 1, layer 1's is mixed at the end"),
        ("resid_pre", (1,), "cls", [1, 1, 2, 2], "mixed at the entry of each block"),
        ("resid_mid", (1,), "patches", [0, 1, 1, 2], "mixed before the MLP"),
        ("k", (1,), "all", [0, 1, 1, 2], "all heads' attention again, from known parts"),
        ("k", (2,), "all", [0, 1, 2, 2], "in block 1 (0,) goes on, and (0, 1) has the donor's keys inside"),
        ("z", (2,), "all", [0, 1, 1, 2], "all heads' z is attn_out"),
    ],
)
def test_evaluations_by_hand(site, windows, tokens, evaluations, why):
    joint = "joint" if Site(site).by_head else None
    made = plan(site, windows, (tokens,), depth=2, heads=joint)
    assert [half.evaluations for half in made.halves] == evaluations, why


def test_twelve_layers_cost_what_the_arithmetic_says():
    """Beside 24 of both base runs: 78 of 144, 87, 92, and 207 of 432 for the three windows together."""
    full = Sizes(12, 12, ("cls",), (14, 14), 1)
    counted = [
        make_plan(Target(Site.ATTN_OUT), windows, Direction.DENOISE, full).block_evaluations - 24
        for windows in ((1,), (3,), (5,), (1, 3, 5))
    ]
    assert counted == [78, 87, 92, 207]


def test_the_whole_stream_is_the_donors_run():
    assert plan("resid_post").restores_everything and plan("resid_mid", (3,)).restores_everything
    assert not plan("resid_post", tokens=("patches",)).restores_everything
    assert not plan("attn_out").restores_everything
    assert set(plan("resid_pre", (1, 3)).final) == {DONOR}


def test_prefix_and_suffix_meet_in_the_window_of_all():
    made = plan("attn_out", (-1, -2))
    last_prefix, first_suffix = made.patches[3], made.patches[4]
    assert last_prefix.layers == first_suffix.layers == (0, 1, 2, 3)
    assert made.final[3] == made.final[4]


# --- against enumeration: states are the distinct sequences of edits ---

SITES = st.sampled_from(["attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "q", "v", "z"])
WINDOWS = st.lists(st.sampled_from([1, 2, 3, 4, -1, -2]), min_size=1, max_size=4, unique=True).map(tuple)
TOKENS = st.lists(st.sampled_from(["all", "cls", "patches", "each", "grid"]), min_size=1, max_size=3, unique=True)


@settings(max_examples=150, deadline=None)
@given(SITES, WINDOWS, TOKENS, st.integers(1, 5), st.booleans())
def test_every_distinct_state_is_computed_once_and_none_else(site, windows, tokens, depth, single_heads):
    windows = tuple(w for w in windows if w <= depth) or (1,)
    by_head = Site(site).by_head
    heads = ("all" if single_heads else "joint") if by_head else None
    made = plan(site, (1,) if heads == "all" else windows, tokens, depth, heads=heads)
    runs = [sequence(p, depth) for p in made.patches]
    wanted = [set() for _ in range(2 * depth)]
    for run in runs:
        for half in range(2 * depth):
            if work := computed(run, half):
                wanted[half].add(work)
    assert [half.evaluations for half in made.halves] == [len(states) for states in wanted]
    ends = [state(run, 4 * depth + 1) for run in runs]
    same = {(a == b) == (x == y) for (a, x), (b, y) in product(zip(ends, made.final, strict=True), repeat=2)}
    assert same == {True}
    assert made.states == len(set(made.final) - {DONOR, RECIPIENT})  # no room is kept for a state that has ended
    assert all((end == "donor") == (f == DONOR) for end, f in zip(ends, made.final, strict=True))
    assert all((end == ()) == (f == RECIPIENT) for end, f in zip(ends, made.final, strict=True))


def sequence(patch, depth):
    """The patch's edits by position, from the definition of the sites: (position, (kind, tokens, head))."""
    edits = {}
    for layer in patch.layers:
        site = str(patch.site)
        position = 4 * layer + {"resid_pre": 0, "resid_mid": 2, "mlp_out": 3, "resid_post": 4}.get(site, 1)
        kind = "stream" if site.startswith("resid") else site
        if kind == "z" and patch.head == -1:
            kind = "attn_out"
        edits[position] = (kind, patch.tokens, patch.head)
    return edits


def state(run, position):
    """What a run has undergone before a position: ``"donor"``, or its edits so far."""
    done = [(p, edit) for p, edit in sorted(run.items()) if p < position]
    if any(kind == "stream" and tokens == "all" for _, (kind, tokens, _) in done):
        return "donor"
    return tuple(done)


def computed(run, half):
    """What must be computed of a run in a half: nothing, its own state's output, or that with an edit inside."""
    inside = 2 * half + 1
    before = state(run, inside)
    if before in ("donor", ()):
        return None  # of the base runs all is known
    kind, tokens, _ = run.get(inside, ("", "", 0))
    if kind in ("q", "v"):
        return (before, kind, tokens)
    return None if kind and tokens == "all" else (before, "", "")


def test_edits_of_one_stream_have_one_name():
    before, after = plan("resid_pre").patches[2], plan("resid_post").patches[1]
    assert patch_edits(before) == patch_edits(after)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(windows=(5,)), "window 5: the model has 4 layers; use 1 to 4"),
        (dict(layers=(4,)), "^layers 4.*0 to 3"),
        (dict(site="z", heads="all", windows=(3,)), "window 3 with target=z: a head has no identity.*joint"),
        (dict(site="q", heads=(0,), windows=(-1,)), "window prefix with target=q"),
        (dict(site="z", heads=(2,)), "^heads 2: the model has 2 heads; use 0 to 1"),
        (dict(site="attn_out", heads="all"), "of attn_out expected null"),
        (dict(site="v"), "of v expected all, joint or a list"),
        (dict(tokens=("registers",)), "^tokens registers: the model has none; before its patches: .*cls"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(arguments, says):
    with pytest.raises(VitPatchError, match=says):
        plan(**arguments)


def test_a_grid_must_be_said_and_divide_the_patches():
    for grid, says in ((None, "^tokens grid: .* grid=.4,4."), ((3, 1), "does not divide the model's 2 × 2")):
        with pytest.raises(VitPatchError, match=says):
            make_plan(Target(Site.ATTN_OUT, None, (TokenGroup.GRID,), None, grid), (1,), Direction.DENOISE, sizes())
