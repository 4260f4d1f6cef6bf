"""What only a GPU can show; skipped where there is none. Run them with ``pytest -m gpu``."""

import pytest
import torch
from corruption_makers import MAKERS, batch

from vitpatch.models.checkpoint import Checkpoint
from vitpatch.patching.cost import ComputeLimits, estimate_cost
from vitpatch.patching.executor import execute, mean_values, token_masks, zero_values
from vitpatch.patching.plan import make_plan
from vitpatch.types import BaseRun, Direction, Donor, Site, Target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def outputs(model, plan, pixels, limits):
    masks = token_masks(plan.token_groups, plan.sizes, None, None, range(len(pixels[BaseRun.CLEAN])), seed=0)
    return execute(plan, model, pixels, masks, limits).cpu()


SITES = [("attn_out", None), ("resid_mid", None), ("z", "all"), ("pattern", "joint")]


@pytest.mark.parametrize("donors", [(Donor.PAIR, Donor.SAME_CLASS, Donor.OTHER_CLASS), (Donor.MEAN,), (Donor.ZERO,)])
@pytest.mark.parametrize(("site", "heads"), SITES)
def test_donors_and_noise_on_embeddings_too(made, site, heads, donors):
    model = Checkpoint(str(made / "vit")).load()
    plan = make_plan(Target(Site(site), heads=heads), (1,), Direction.NOISE, model.sizes, donors)
    draws = torch.randn(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = dict(zip((*BaseRun, Donor.SAME_CLASS, Donor.OTHER_CLASS), draws, strict=True))
    noise = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(1))
    masks = token_masks(plan.token_groups, model.sizes, None, None, range(4), seed=0)
    found = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        constants = mean_values(model, Site(site), [draws[3].to(device)]) if donors[0] is Donor.MEAN else None
        constants = zero_values(model, Site(site)) if donors[0] is Donor.ZERO else constants
        there = {run: pixels[run].to(device) for run in plan.base_runs}
        found.append(execute(plan, model, there, masks, ComputeLimits(4, 9), constants, noise.to(device)).cpu())
    model.to("cpu")
    torch.testing.assert_close(found[1].patched, found[0].patched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("site", "heads"), SITES)
def test_a_gpu_gives_the_cpus_numbers(made, site, heads):
    model = Checkpoint(str(made / "vit")).load()
    plan = make_plan(Target(Site(site), heads=heads), (1,), Direction.DENOISE, model.sizes)
    draws = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = dict(zip(BaseRun, draws, strict=True))
    limits = estimate_cost(plan, model).limits(4, 1e9, plan.sizes.tokens, torch.device("cpu"))
    on_cpu = outputs(model, plan, pixels, limits)
    try:
        on_gpu = outputs(model.to("cuda"), plan, {run: x.cuda() for run, x in pixels.items()}, limits)
    finally:
        model.to("cpu")
    for name in ("patched", "direct", "delta_norm"):
        torch.testing.assert_close(getattr(on_gpu, name), getattr(on_cpu, name), rtol=1e-4, atol=1e-4)


def test_the_budget_holds_on_the_gpu(made):
    model = Checkpoint(str(made / "vit")).load().to("cuda")
    plan = make_plan(Target(Site.ATTN_OUT), (1, 3), Direction.DENOISE, model.sizes)
    pixels = {run: torch.randn(512, 3, 32, 32, device="cuda") for run in BaseRun}
    limit, found = 2e7, 0
    try:
        limits = estimate_cost(plan, model).limits(64, limit, plan.sizes.tokens, torch.device("cuda"))
        outputs(model, plan, {run: x[: limits.images] for run, x in pixels.items()}, limits)  # workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs(model, plan, {run: x[: limits.images] for run, x in pixels.items()}, limits)
        found = torch.cuda.max_memory_allocated() - before
    finally:
        model.to("cpu")
    assert 0 < found <= 1.1 * limit


@pytest.mark.parametrize("kind", MAKERS, ids=lambda kind: kind.__name__)
def test_a_corruption_is_the_same_on_the_gpu(kind):
    corruption, images = MAKERS[kind](0.7), batch(size=32)
    on_gpu = corruption(images.to("cuda"), seed=0)
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), corruption(images, seed=0), rtol=0, atol=1e-5)
