"""Donors beside the image's own: another image's clean run, zeros, means; and windows without one of their layers."""

import copy

import pytest
import torch
from conftest import DEPTH
from oracle import BY_HEAD, at_tokens, expected, layers_of, run_patches, walk

from vitpatch.models.checkpoint import Checkpoint
from vitpatch.patching.cost import ComputeLimits, estimate_cost
from vitpatch.patching.executor import execute, token_masks
from vitpatch.patching.plan import make_plan
from vitpatch.types import BaseRun, Direction, Donor, Site, Target, TokenGroup

IMAGES = 3
CLOSE = dict(rtol=1e-5, atol=2e-5)  # of logits up to 8
CONTROLS = (Donor.PAIR, Donor.SAME_CLASS, Donor.OTHER_CLASS)


@pytest.fixture(scope="module")
def pixels():
    draws = torch.randn(4, IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return dict(zip((*BaseRun, Donor.SAME_CLASS, Donor.OTHER_CLASS), draws, strict=True))


def load(made, family, by_parts=True):
    model = copy.copy(Checkpoint(str(made / family)).load())
    model.stepwise = model.stepwise and by_parts
    return model


def run(model, pixels, site, donors, windows=(1,), tokens=("all",), direction="denoise", heads=None, **more):
    target = Target(Site(site), None, tuple(map(TokenGroup, tokens)), heads)
    synergy = more.pop("synergy", False)
    plan = make_plan(target, windows, Direction(direction), model.sizes, donors, synergy)
    where = token_masks(plan.token_groups, model.sizes, None, None, range(IMAGES), seed=0)
    given = {name: pixels[name] for name in plan.base_runs}
    return plan, execute(plan, model, given, where, ComputeLimits(IMAGES, 4), **more)


def heads_of(site):
    return "all" if site in BY_HEAD else None


def patch_of(patch, family):
    """A patch as the oracle takes it."""
    layers = layers_of(patch.layer, patch.window, DEPTH)
    return layers, at_tokens(family, patch.tokens), None if patch.head < 0 else patch.head


@pytest.mark.parametrize("by_parts", [True, False])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z", "q", "v"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_controls_are_patched_as_if_the_other_image_were_the_donor(made, pixels, site, direction, by_parts):
    model, heads = load(made, "deit", by_parts), heads_of(site)
    windows = (1,) if heads else (1, 3)
    plan, outputs = run(model, pixels, site, CONTROLS, windows, ("all", "patches"), direction, heads)
    assert len(outputs.direct) == len(plan.patches) and not plan.all_layers
    of_donor = outputs.patched.unflatten(0, (3, -1))
    own = pixels[plan.direction.donor]
    for donor, got in zip((own, pixels[Donor.SAME_CLASS], pixels[Donor.OTHER_CLASS]), of_donor, strict=True):
        as_pair = {plan.direction.donor: donor, plan.recipient: pixels[plan.recipient]}
        pair = as_pair[BaseRun.CLEAN], as_pair[BaseRun.CORRUPT]
        chosen = [i for i, patch in enumerate(plan.patches) if patch.layer == 2 and patch.head in (-1, 1)]
        patches = [patch_of(plan.patches[i], "deit") for i in chosen]
        *_, want = run_patches(model.model, "deit", *pair, patches, site=site, direction=direction)
        torch.testing.assert_close(got[chosen].double(), want, **CLOSE)
    assert (of_donor[0] - of_donor[1]).abs().max() > 0.05 and (of_donor[1] - of_donor[2]).abs().max() > 0.05
    alone = run(model, pixels, site, (Donor.PAIR,), windows, ("all", "patches"), direction, heads)[1]
    torch.testing.assert_close(of_donor[0], alone.patched, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.delta_norm, alone.delta_norm, rtol=1e-5, atol=1e-6)


def constants_of(model, site, kind, seed=5):
    """Zeros, or numbers that stand for a mean, by place."""
    sizes, width = model.sizes, model.width
    shapes = {"pattern": (sizes.heads, sizes.tokens, sizes.tokens)}
    by_head = (sizes.heads, sizes.tokens, width // sizes.heads)
    shape = shapes.get(site, by_head if site in BY_HEAD else (sizes.tokens, width))
    generator = torch.Generator().manual_seed(seed)
    draws = {(Site(site), layer): torch.rand(shape, generator=generator) for layer in range(DEPTH)}
    return {place: draw * (kind is Donor.MEAN) for place, draw in draws.items()}


def walked(model, family, pixels, constants, patch):
    """The oracle's logits with the constants put in."""
    _, rows = at_tokens(family, patch.tokens)

    def put(layer):
        def act(value):
            new, theirs = value.clone(), constants[patch.site, layer]
            theirs = theirs.transpose(0, 1) if patch.site.by_head else theirs  # tokens first, as the oracle has them
            heads = (slice(None),) if patch.head < 0 else (patch.head,)
            where = (rows, *heads) if patch.site.by_head else (rows,)
            new[:, *where] = theirs[where]
            return new

        return act

    acts = {(str(patch.site), layer): put(layer) for layer in layers_of(patch.layer, patch.window, DEPTH)}
    return walk(model.model, family, pixels, put=acts).double()


@pytest.mark.parametrize("by_parts", [True, False])
@pytest.mark.parametrize("kind", [Donor.ZERO, Donor.MEAN])
@pytest.mark.parametrize(
    ("site", "heads"),
    [(site, None) for site in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]
    + [(site, heads) for site in BY_HEAD for heads in ("all", "joint")],
)
def test_constants_are_put_into_the_clean_run(made, pixels, site, heads, kind, by_parts):
    if site == "pattern" and not by_parts:
        pytest.skip("no module hands over the pattern")
    model = load(made, "vit", by_parts)
    constants, windows = constants_of(model, site, kind), (1,) if heads == "all" else (1, 3)
    groups = ("all", "cls") if site in ("k", "v", "pattern") else ("all", "patches", "cls")
    out = run(model, pixels, site, (kind,), windows, groups, "noise", heads, constants=constants)
    plan, outputs = out
    assert plan.base_runs == (BaseRun.CLEAN, BaseRun.CORRUPT)
    for patch, logits in zip(plan.patches, outputs.patched, strict=True):
        if patch.layer in (0, DEPTH - 1) and patch.head in (-1, 2):
            want = walked(model, "vit", pixels[BaseRun.CLEAN], constants, patch)
            torch.testing.assert_close(logits.double(), want, **CLOSE, msg=lambda m, p=patch: f"{p}: {m}")


def test_a_control_costs_no_more_than_the_donor_itself(made):
    sizes = load(made, "vit").sizes
    one, three = (
        make_plan(Target(Site.ATTN_OUT), (1,), Direction.DENOISE, sizes, donors) for donors in ((Donor.PAIR,), CONTROLS)
    )
    base = sizes.depth
    together = sizes.depth - 1  # all layers at once: their MLPs, but for the first
    assert one.block_evaluations - 2 * base == (three.block_evaluations - 4 * base - together) / 3
    model = load(made, "vit")
    assert estimate_cost(three, model).flops < 3 * estimate_cost(one, model).flops
    assert three.base_runs == (BaseRun.CORRUPT, BaseRun.CLEAN, Donor.SAME_CLASS, Donor.OTHER_CLASS)


def test_all_layers_are_patched_at_once_beside_controls(made, pixels):
    model = load(made, "vit")
    plan, outputs = run(model, pixels, "mlp_out", CONTROLS)
    (patch,) = plan.all_layers
    every = expected(model.model, "vit", pixels[BaseRun.CLEAN], pixels[BaseRun.CORRUPT], site="mlp_out", window=-2)[2]
    assert patch.layers == tuple(range(DEPTH))
    torch.testing.assert_close(outputs.patched[-1].double(), every[0], **CLOSE)
    assert run(model, pixels, "mlp_out", CONTROLS, tokens=("cls", "patches"))[0].all_layers == ()
    assert run(model, pixels, "mlp_out", CONTROLS[:1])[0].all_layers == ()


@pytest.mark.parametrize(
    ("site", "by_parts"), [(s, True) for s in BY_HEAD] + [(s, False) for s in ("attn_out", "z", "v")]
)
def test_all_layers_at_once_also_where_few_are_asked_for(made, pixels, site, by_parts):
    model = load(made, "vit", by_parts)
    target = Target(Site(site), (2,), heads="all" if site in BY_HEAD else None)
    plan = make_plan(target, (1,), Direction.DENOISE, model.sizes, CONTROLS)
    where = token_masks(plan.token_groups, model.sizes, None, None, range(IMAGES), seed=0)
    outputs = execute(plan, model, pixels, where, ComputeLimits(IMAGES, 4))
    every = expected(model.model, "vit", pixels[BaseRun.CLEAN], pixels[BaseRun.CORRUPT], site=site, window=-2)[2]
    torch.testing.assert_close(outputs.patched[-1].double(), every[0], **CLOSE)


def test_the_stream_of_another_image_at_all_tokens_is_that_image(made, pixels):
    model = load(made, "vit")
    plan, outputs = run(model, pixels, "resid_post", CONTROLS, (1, 3))
    assert plan.states == 0
    for donor, got in zip((BaseRun.CLEAN, *CONTROLS[1:]), outputs.patched[:-1].unflatten(0, (3, -1)), strict=True):
        assert (got == outputs.base[donor]).all()


@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_post"])
def test_synergy_asks_for_single_layers_and_windows_without_a_layer(made, pixels, site):
    model = load(made, "vit")
    tokens = ("cls",) if site == "resid_post" else ("all",)
    plan, outputs = run(model, pixels, site, (Donor.PAIR,), (3,), tokens, synergy=True)
    assert [(p.window, p.layer) for p in plan.patches] == [(3, c) for c in range(DEPTH)] + [
        (1, c) for c in range(DEPTH)
    ]
    assert [(p.layer, p.without, p.layers) for p in plan.leave_outs[:5]] == [
        (0, 0, (1,)), (0, 1, (0,)), (1, 0, (1, 2)), (1, 1, (0, 2)), (1, 2, (0, 1)),
    ]  # fmt: skip
    values = {}
    walk(model.model, "vit", pixels[BaseRun.CLEAN], seen=values)
    for patch, got in zip(plan.leave_outs, outputs.patched[len(plan.patches) :], strict=True):

        def put(layer, patch=patch):
            def act(value):
                new = value.clone()
                rows = slice(0, 1) if patch.tokens == "cls" else slice(None)
                new[:, rows] = values[site, layer][:, rows]
                return new

            return act

        want = walk(model.model, "vit", pixels[BaseRun.CORRUPT], put={(site, x): put(x) for x in patch.layers})
        torch.testing.assert_close(got.double(), want.double(), **CLOSE)


def test_single_layers_that_are_there_are_not_made_twice(made):
    sizes = load(made, "vit").sizes
    plan = make_plan(Target(Site.ATTN_OUT), (1, 3), Direction.DENOISE, sizes, synergy=True)
    assert [p.window for p in plan.patches] == [1] * DEPTH + [3] * DEPTH
    some = make_plan(Target(Site.ATTN_OUT, (1,)), (1, 3), Direction.DENOISE, sizes, synergy=True)
    assert [(p.window, p.layer) for p in some.patches] == [(1, 1), (3, 1), (1, 0), (1, 2)]
