"""Every family of models: its row verified on loading, and every site's effects those of full forwards with hooks."""

import copy

import pytest
import torch
from conftest import CLASSES, NAMES
from families import NAMES as FAMILY_NAMES
from families import SIZE, Brute, checkpoint_of

import vitpatch
from vitpatch.patching.cost import ComputeLimits
from vitpatch.patching.executor import execute, mean_values, token_masks, zero_values
from vitpatch.patching.plan import make_plan
from vitpatch.types import BaseRun, Direction, Donor, Site, Target

SITES = [("attn_out", 1), ("attn_out", 3), ("mlp_out", 2), ("resid_pre", 1), ("resid_post", 1)]


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(5, 3, SIZE, SIZE, generator=generator)
    return clean, clean.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()


def probs(logits, labels):
    return logits.double().softmax(-1).gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_site_is_that_of_full_forwards(family, saved, pixels):
    model = checkpoint_of(saved(family), family).load(NAMES)
    assert model.stepwise and model.by_heads
    brute, labels = Brute(model.model, FAMILY_NAMES[family]), torch.arange(5) % CLASSES
    clean, corrupt = pixels
    base = probs(brute.run(corrupt)[None], labels)
    largest = 0.0
    special = FAMILY_NAMES[family].special
    cases = [(site, window, "all", slice(None), None) for site, window in SITES]
    cases += [(site, 1, "patches", slice(special, None), None) for site in ("attn_out", "resid_post")]
    cases += [(site, 1, "all", slice(None), 2) for site in ("z", "q", "k", "v")]
    before = model.sizes.special
    cases += [("mlp_out", 1, "cls", slice(0, 1), None)] * ("cls" in before)
    cases += [("resid_post", 1, "registers", slice(1, 3), None)] * ("register0" in before)
    for site, window, tokens, at, head in cases:
        target = dict(target=site, window=window, tokens=tokens, heads=None if head is None else [head])
        table = vitpatch.patch(model, clean, corrupt, labels, **target)
        got = torch.tensor(table["prob"].to_numpy()).view(5, -1).T
        want = probs(brute.patched(clean, corrupt, site, window, at, head), labels)
        assert (got - want).abs().max() < 1e-5, (site, window, tokens)
        largest = max(largest, (want - base).abs().max().item())
        assert table["direct_log_odds"].notna().all()
    assert largest > 0.05  # the oracle's patches do something


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_pattern_is_queries_and_keys_together(family, saved, pixels):
    """Bias and rotary embedding are the same in both runs, so that with a head's q and k its pattern is the donor's."""
    model = checkpoint_of(saved(family), family).load(NAMES)
    brute, labels = Brute(model.model, FAMILY_NAMES[family]), torch.arange(5) % CLASSES
    table = vitpatch.patch(model, *pixels, labels, target="pattern", window=1, heads=[1])
    got = torch.tensor(table["prob"].to_numpy()).view(5, -1).T
    want = probs(brute.patched(*pixels, ("q", "k"), head=1), labels)
    assert (got - want).abs().max() < 1e-5
    assert (want - probs(brute.run(pixels[1])[None], labels)).abs().max() > 1e-3


def log_odds(logits, labels):
    logits, at = logits.double(), labels.expand(len(logits), -1)[..., None]
    own = logits.gather(-1, at)[..., 0]
    return own - logits.scatter(-1, at, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_straight_way_is_that_of_frozen_norms(family, saved, pixels):
    model = checkpoint_of(saved(family), family).load(NAMES)
    brute, labels = Brute(model.model, FAMILY_NAMES[family]), torch.arange(5) % CLASSES
    before = log_odds(brute.run(pixels[1])[None], labels)
    for site in ("attn_out", "mlp_out", "resid_post"):
        table = vitpatch.patch(model, *pixels, labels, target=site, window=1)
        got = torch.tensor(table["direct_log_odds"].to_numpy()).view(5, -1).T
        want = log_odds(brute.direct(*pixels, site), labels) - before
        assert want.abs().max() > 0.05
        assert (got - want).abs().max() < 1e-4, site


OF_EACH_KIND = ("beit", "dinov2_registers", "dinov3", "siglip", "clip", "vit_msn")


@pytest.mark.parametrize("by_parts", [True, False])
@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_means_and_zeros_of_families_are_those_of_hooks(family, saved, pixels, by_parts):
    """Layer scales, biases, rotary embeddings and pooled readouts: constants go in where modules have them."""
    model = copy.copy(checkpoint_of(saved(family), family).load(NAMES))
    model.stepwise = by_parts
    brute, (clean, corrupt) = Brute(model.model, FAMILY_NAMES[family]), pixels
    depth = model.sizes.depth
    for site, heads, head in (("attn_out", None, None), ("mlp_out", None, None), ("z", "joint", None), ("v", (1,), 1)):
        seen = brute.values(corrupt, [(site, layer) for layer in range(depth)])  # the corrupt images stand for training
        for donor in (Donor.ZERO, Donor.MEAN):
            plan = make_plan(Target(Site(site), heads=heads), (1,), Direction.NOISE, model.sizes, (donor,))
            made = (
                zero_values(model, Site(site))
                if donor is Donor.ZERO
                else mean_values(model, Site(site), corrupt.split(2))
            )
            masks = token_masks(plan.token_groups, model.sizes, None, None, range(5), seed=0)
            images = {BaseRun.CLEAN: clean, BaseRun.CORRUPT: corrupt}
            got = execute(plan, model, images, masks, ComputeLimits(5, 5), made).patched
            for layer in (0, depth - 1):
                constant = seen[site, layer].mean(0) * (donor is Donor.MEAN)

                def act(value, constant=constant, head=head):
                    new, each = value.clone(), value.shape[-1] // model.sizes.heads
                    channels = slice(None) if head is None else slice(head * each, (head + 1) * each)
                    new[..., channels] = constant[..., channels]
                    return new

                want = brute.run(clean, {(site, layer): act})
                torch.testing.assert_close(got[layer].double(), want.double(), rtol=1e-5, atol=2e-5)
                assert (want - brute.run(clean)).abs().max() > 1e-4
