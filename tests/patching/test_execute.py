"""The executor against the oracle – every site, token group, direction, window –, its counts, and what it leaves."""

import copy

import pytest
import torch
from conftest import DEPTH
from oracle import BY_HEAD, expected, layers_of, read, run_patches, walk

from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.models.families import FAMILIES
from vitpatch.models.verify import verify_model
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.cost import LIBRARIES, ComputeLimits, estimate_cost
from vitpatch.patching.executor import execute, token_masks
from vitpatch.patching.plan import make_plan, possible_tokens
from vitpatch.types import BaseRun, Direction, Site, Target, TokenGroup

IMAGES = 3
STREAMS = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
CLOSE = dict(rtol=1e-5, atol=2e-5)  # of logits up to 8


@pytest.fixture(scope="module")
def pixels():
    draws = torch.randn(2, IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return {BaseRun.CLEAN: draws[0], BaseRun.CORRUPT: draws[1]}


@pytest.fixture(scope="module")
def object_masks():
    blocks = torch.rand(IMAGES, 1, 4, 4, generator=torch.Generator().manual_seed(4)) > 0.6
    return blocks.float().repeat_interleave(8, 2).repeat_interleave(8, 3)


def load(made, family):
    return Checkpoint(str(made / family)).load()


def run(model, pixels, site, windows=(1,), tokens=("all",), direction="denoise", heads=None, limits=None, masks=None):
    groups = tuple(TokenGroup(group) for group in tokens)
    target = Target(Site(site), None, groups, heads, grid=(2, 2) if "grid" in tokens else None)
    plan = make_plan(target, windows, Direction(direction), model.sizes)
    where = token_masks(plan.token_groups, model.sizes, (2, 2), masks, range(IMAGES), seed=0)
    return plan, where, execute(plan, model, pixels, where, limits or ComputeLimits(IMAGES, 4))


def compare(model, family, pixels, plan, where, outputs, direction):
    """Every patch of a plan with the oracle's."""
    base, site = family.split("_")[0], str(plan.target.site)
    patches = []
    for patch in plan.patches:
        mask, head = where[plan.token_groups.index(patch.tokens)], None if patch.head < 0 else patch.head
        patches.append((layers_of(patch.layer, patch.window, DEPTH), (mask,), head))
    wanted = run_patches(model.model, base, *pixels.values(), patches, site=site, direction=direction)
    clean, corrupt, patched = wanted
    for patch, got, want in zip(plan.patches, outputs.patched, patched, strict=True):
        torch.testing.assert_close(got.double(), want, **CLOSE, msg=lambda m, p=patch: f"{p}: {m}")
    torch.testing.assert_close(outputs.base[BaseRun.CLEAN].double(), clean, **CLOSE)
    torch.testing.assert_close(outputs.base[BaseRun.CORRUPT].double(), corrupt, **CLOSE)
    recipient = outputs.base[plan.direction.recipient]
    assert (outputs.patched - recipient).abs().max() > 0.05  # the random models answer to the patch


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", STREAMS)
@pytest.mark.parametrize("family", ["vit", "deit", "deit_with_teacher"])
def test_sites_of_the_stream(made, pixels, object_masks, family, site, direction):
    """All windows in one run, all kinds of token groups; chunks of one state and one row more than that."""
    model, groups = load(made, family), ["all", "cls", "patches", "object", "background", "grid"]
    small, large, exact = (ComputeLimits(IMAGES, rows) for rows in (4, 100, IMAGES))
    for windows, limits in (((1, 3, -1, -2), small), ((2,), large), ((4,), exact)):
        out = run(model, pixels, site, windows, groups, direction, limits=limits, masks=object_masks)
        compare(model, family, pixels, *out, direction)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", BY_HEAD)
@pytest.mark.parametrize("family", ["vit", "deit_with_teacher"])
def test_sites_by_head(made, pixels, object_masks, family, site, direction):
    model, groups = load(made, family), ["all", "cls", "random_object"]
    out = run(model, pixels, site, (1,), groups, direction, "all", masks=object_masks)
    assert len(out[0].patches) == 3 * DEPTH * model.sizes.heads
    compare(model, family, pixels, *out, direction)
    out = run(model, pixels, site, (1, 3, -2), groups, direction, "joint", masks=object_masks)
    compare(model, family, pixels, *out, direction)


def test_every_token_by_itself(made, pixels):
    model = load(made, "vit")
    plan, where, outputs = run(model, pixels, "resid_mid", (1,), ("each",))
    assert where.sum(-1).unique().tolist() == [1] and len(plan.token_groups) == model.sizes.tokens
    compare(model, "vit", pixels, plan, where, outputs, "denoise")


@pytest.mark.parametrize("site", [*STREAMS, "z", "q", "k", "v"])
def test_full_forwards_give_the_same(made, pixels, object_masks, site):
    """What is run where a model's parts do not give its own logits."""
    model, heads = load(made, "deit"), "joint" if site in BY_HEAD else None
    arguments = (site, (1, 3), ("all", "object"), "noise", heads)
    plan, where, parts = run(model, pixels, *arguments, masks=object_masks)
    model.stepwise = False
    try:
        _, _, full = run(model, pixels, *arguments, masks=object_masks)
    finally:
        model.stepwise = True
    compare(model, "deit", pixels, plan, where, full, "noise")
    torch.testing.assert_close(full.delta_norm, parts.delta_norm, rtol=1e-4, atol=1e-5)
    assert full.direct.isnan().all() and not parts.direct.isnan().any()


def test_a_model_whose_parts_do_not_give_its_logits_is_found_out(made, pixels, caplog):
    model = load(made, "vit")

    def doubled(module, args, output):
        output.logits = output.logits * 2
        return output

    handle = model.model.register_forward_hook(doubled)
    try:
        verify_model(model)
        assert not model.stepwise and "every patch is a full forward pass" in model.caveat(Site.ATTN_OUT)
        _, _, outputs = run(model, pixels, "attn_out", (3,))
        _, _, patched = expected(model.model, "vit", *pixels.values(), window=3)
        torch.testing.assert_close(outputs.patched.double(), 2 * patched, **CLOSE)
        with pytest.raises(VitPatchError, match="pattern"):
            run(model, pixels, "pattern", (1,), heads="joint")
    finally:
        handle.remove()
        verify_model(model)
    assert model.stepwise


# --- identities ---


@pytest.mark.parametrize("site", [*STREAMS, *BY_HEAD])
def test_a_run_patched_with_itself_is_itself(made, pixels, site):
    same = dict.fromkeys(BaseRun, pixels[BaseRun.CLEAN])
    _, _, outputs = run(load(made, "vit"), same, site, (2,), heads="joint" if site in BY_HEAD else None)
    plain = outputs.base[BaseRun.CLEAN].expand_as(outputs.patched)
    torch.testing.assert_close(outputs.patched, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.direct, plain, rtol=0, atol=1e-5)
    assert outputs.delta_norm.max() < 1e-6


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_the_whole_stream_is_the_donors_run_to_the_bit(made, pixels, site):
    _, _, outputs = run(load(made, "deit"), pixels, site, (1, 3), direction="noise")
    assert torch.equal(outputs.patched, outputs.base[BaseRun.CORRUPT].expand_as(outputs.patched))


def test_z_of_all_heads_is_attn_out(made, pixels):
    model = load(made, "vit")
    _, _, z = run(model, pixels, "z", (1, 3), ("all", "patches"), heads="joint")
    _, _, attn_out = run(model, pixels, "attn_out", (1, 3), ("all", "patches"))
    torch.testing.assert_close(z.patched, attn_out.patched, rtol=0, atol=1e-5)
    torch.testing.assert_close(z.direct, attn_out.direct, rtol=0, atol=1e-5)


def test_rows_at_once_change_nothing_but_rounding(made, pixels):
    model = load(made, "vit")
    outputs = [
        run(model, pixels, "attn_out", (1, 3), limits=ComputeLimits(IMAGES, rows))[2] for rows in (3, 5, 7, 1000)
    ]
    for other in outputs[1:]:
        torch.testing.assert_close(other.patched, outputs[0].patched, rtol=0, atol=5e-6)


@pytest.mark.parametrize("site", [*STREAMS, *BY_HEAD])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast", "float64"])
def test_every_site_runs_at_every_precision(made, pixels, site, how):
    heads = ("all", "joint") if site in BY_HEAD else (None,)
    if how == "autocast":
        model, dtype = load(made, "vit"), torch.float32
    elif how == "float64":
        model, dtype = PatchableViT(copy.deepcopy(load(made, "vit").model).double(), FAMILIES["vit"]), torch.float64
    else:
        model = Checkpoint(str(made / "vit"), dtype=how).load()
        dtype = model.dtype
    wanted = [run(load(made, "vit"), pixels, site, heads=h)[2] for h in heads]
    for h, want in zip(heads, wanted, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            got = run(model, {name: x.to(dtype) for name, x in pixels.items()}, site, heads=h)[2]
        worst = 2e-5 if how == "float64" else 0.6  # of logits up to 8, with 8 bits of mantissa
        for name in ("patched", "direct"):
            assert (getattr(got, name).float() - getattr(want, name)).abs().max() < worst, name


# --- beside the patches ---


def by_hand(model, pixels, site, layers, tokens, head=None):
    """delta_norm, and the logits of the straight way, from the oracle's values of both base runs."""
    donor, recipient = {}, {}
    walk(model.model, "vit", pixels[BaseRun.CLEAN], seen=donor)
    walk(model.model, "vit", pixels[BaseRun.CORRUPT], seen=recipient)
    here = torch.from_numpy(possible_tokens(tokens, model.sizes, None))
    squares = []
    change = torch.zeros(IMAGES, 1, model.width)
    for layer in layers:
        theirs, own = donor[site, layer], recipient[site, layer]
        if head is not None:
            theirs, own = theirs[:, :, [head]], own[:, :, [head]]
        difference = (theirs - own)[:, here].flatten(1)
        squares.append([difference.square().sum(1), own[:, here].flatten(1).square().sum(1)])
        seen = {}
        walk(model.model, "vit", pixels[BaseRun.CORRUPT], put=put_at(site, layer, donor, here, head), seen=seen)
        added = ("attn_out", layer) if site in BY_HEAD else (site, layer)
        moved = seen[added] - recipient[added]
        if site not in BY_HEAD:  # the oracle notes a value before it is replaced
            moved = torch.where(here[None, :, None], donor[added] - recipient[added], 0)
        change = moved[:, :1] if site.startswith("resid") else change + moved[:, :1]
    squares = torch.stack([torch.stack(pair) for pair in squares]).sum(0)
    last = recipient["resid_post", DEPTH - 1][:, :1]
    norm = model.model.vit.layernorm
    scale = (last.var(-1, keepdim=True, unbiased=False) + norm.eps) ** -0.5
    normed = norm(last) + (change - change.mean(-1, keepdim=True)) * scale * norm.weight
    return (squares[0] / squares[1]).sqrt(), read(model.model, normed)


def put_at(site, layer, donor, here, head):
    def act(value):
        new = value.clone()
        at = (slice(None), here) if head is None else (slice(None), here, head)
        new[at] = donor[site, layer][at]
        return new

    return {(site, layer): act}


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
@pytest.mark.parametrize("site", [*STREAMS, *BY_HEAD])
def test_delta_norm_and_the_straight_way_by_hand(made, pixels, site, tokens):
    model = load(made, "vit")
    by_head = site in BY_HEAD
    plan, _, outputs = run(model, pixels, site, (1,), (tokens,), heads="all" if by_head else None)
    for number, patch in enumerate(plan.patches):
        head = patch.head if by_head else None
        delta_norm, direct = by_hand(model, pixels, site, patch.layers, tokens, head)
        torch.testing.assert_close(outputs.delta_norm[number], delta_norm, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(outputs.direct[number], direct, rtol=1e-4, atol=5e-5)
    plan, _, outputs = run(model, pixels, site, (3,), (tokens,), heads="joint" if by_head else None)
    for number, patch in enumerate(plan.patches):
        delta_norm, direct = by_hand(model, pixels, site, layers_of(patch.layer, 3, DEPTH), tokens)
        torch.testing.assert_close(outputs.delta_norm[number], delta_norm, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(outputs.direct[number], direct, rtol=1e-4, atol=1e-4)


def test_the_last_layers_attention_at_cls_has_no_other_way_than_through_the_last_mlp(made, pixels):
    """mlp_out of the last layer at CLS goes straight to the readout: only the norm's scale differs."""
    _, _, outputs = run(load(made, "vit"), pixels, "mlp_out", (1,))
    whole, direct = outputs.patched[-1], outputs.direct[-1]
    recipient = outputs.base[BaseRun.CORRUPT]
    similar = torch.nn.functional.cosine_similarity(whole - recipient, direct - recipient)
    assert (similar > 0.9).all()


# --- counted ---


class Rows:
    """Counts the rows (an image in a state each) that reach the modules of a model."""

    def __init__(self, model):
        self.model, self.attention, self.mlp = model, 0, 0

    def __enter__(self):
        self.handles = []
        for block in self.model.model.vit.layers:
            self.handles.append(block.attention.k_proj.register_forward_hook(self.note("attention")))
            self.handles.append(block.mlp.register_forward_hook(self.note("mlp")))
        return self

    def note(self, kind):
        return lambda module, args, output: setattr(self, kind, getattr(self, kind) + len(output))

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(
    ("site", "windows", "tokens", "heads"),
    [
        ("attn_out", (1,), ("all",), None),
        ("attn_out", (1, 2, 3), ("all", "cls"), None),
        ("mlp_out", (3,), ("patches",), None),
        ("resid_post", (1,), ("cls", "patches"), None),
        ("resid_pre", (-1,), ("all",), None),
        ("z", (1,), ("all",), "all"),
        ("k", (3,), ("all",), "joint"),
    ],
)
def test_rows_computed_are_rows_planned(made, pixels, site, windows, tokens, heads):
    model = load(made, "vit")
    with Rows(model) as rows:
        plan, _, _ = run(model, pixels, site, windows, tokens, heads=heads)
    assert rows.attention == IMAGES * (2 * DEPTH + sum(half.evaluations for half in plan.halves[::2]))
    assert rows.mlp == IMAGES * (2 * DEPTH + sum(half.evaluations for half in plan.halves[1::2]))


def test_the_last_block_takes_only_what_is_read(made, pixels):
    model, shapes = load(made, "vit"), []
    last = model.model.vit.layers[-1]
    handle = last.mlp.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    try:
        run(model, pixels, "attn_out", (3,))
    finally:
        handle.remove()
    assert set(shapes) == {1}


# --- left behind ---


def left(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks, {name: set(vars(m)) for name, m in model.named_modules()}


@pytest.mark.parametrize("stepwise", [True, False])
def test_nothing_is_left_behind_also_after_an_exception_in_a_block(made, pixels, stepwise, monkeypatch):
    model = load(made, "vit")
    before = left(model.model)
    run(model, pixels, "attn_out", (3,))
    assert left(model.model) == before

    def broken(*args, **kwargs):
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(model, "stepwise", stepwise)
        patch.setattr(model.model.vit.layers[2].mlp, "forward", broken)
        with pytest.raises(RuntimeError, match="in the middle"):
            run(model, pixels, "attn_out", (3,))
    assert left(model.model) == before


# --- memory ---


def test_a_budget_below_one_images_need_is_refused_with_the_least_that_works(made):
    model = load(made, "vit")
    plan = make_plan(Target(Site.ATTN_OUT), (1,), Direction.DENOISE, model.sizes)
    cost, cpu = estimate_cost(plan, model), torch.device("cpu")
    with pytest.raises(VitPatchError, match=r"memory_gb 1e-05: one image .* need 0\.\d+ GB"):
        cost.limits(5, 1e4, plan.sizes.tokens, cpu)
    least = LIBRARIES + 5 * cost.batch_bytes + cost.image_bytes + cost.row_bytes
    assert cost.limits(5, least, plan.sizes.tokens, cpu) == ComputeLimits(1, 1, least)
    with pytest.raises(VitPatchError):
        cost.limits(5, least - 1, plan.sizes.tokens, cpu)
    wide = cost.limits(5, 1e9, plan.sizes.tokens, cpu)
    assert wide.images == 5 and wide.rows >= 5 and wide.bytes <= 1e9
