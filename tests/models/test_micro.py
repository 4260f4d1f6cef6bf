"""A model whose every activation is a small whole number, worked out by hand.

Two tokens, CLS and one patch, of width 4; two blocks; attention looks evenly at both tokens and adds twice their mean,
that is their sum; MLPs are zero. Signals go in pairs of channels (+, −), so their mean is 0, and layer norm is linear
(eps 1e6, weight 1e3). The patch starts at d = red − green, CLS at 0:

    block 0 adds d to both:      CLS d,  patch 2d
    block 1 adds 3d to both:     CLS 4d, patch 5d      log odds of class 0 = CLS's first channel = 4d

A red image has d = 1, its gray d = 0.
"""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitpatch.corruptions.base import Gray
from vitpatch.models.families import FAMILIES
from vitpatch.models.preprocessing import Preprocessing
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.cost import ComputeLimits
from vitpatch.patching.executor import execute, token_masks
from vitpatch.patching.metrics import metrics, runner_up
from vitpatch.patching.plan import make_plan
from vitpatch.types import BaseRun, Direction, ImageBatch, Site, Target, TokenGroup

LINEAR = 1e-4  # layer norm with eps 1e6 is linear to about 1e-6


@pytest.fixture(scope="module")
def micro() -> PatchableViT:
    shape = dict(image_size=2, patch_size=2, hidden_size=4, num_hidden_layers=2, num_attention_heads=1)
    model = ViTForImageClassification(ViTConfig(**shape, intermediate_size=4, num_labels=2, layer_norm_eps=1e6))
    pair = torch.tensor([1.0, -1.0, 0.0, 0.0])
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.vit.embeddings.patch_embeddings.projection.weight[:, 0] = pair.view(4, 1, 1) / 4  # mean of 2 × 2 pixels
        model.vit.embeddings.patch_embeddings.projection.weight[:, 1] = -pair.view(4, 1, 1) / 4
        for block in model.vit.layers:
            block.layernorm_before.weight.fill_(1e3)
            block.attention.v_proj.weight.copy_(torch.eye(4))
            block.attention.o_proj.weight.copy_(2 * torch.eye(4))
        model.vit.layernorm.weight.fill_(1e3)
        model.classifier.weight[0, 0] = 1.0
    processor = ViTImageProcessorPil(size={"height": 2, "width": 2}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    return PatchableViT(model, FAMILIES["vit"], Preprocessing(processor, (0.0,) * 3, (1.0,) * 3))


def log_odds(model, site, window, direction, tokens="all"):
    """(clean, corrupt, [patched run of each layer])."""
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    batch = ImageBatch(red, torch.tensor([0]), torch.tensor([0]))
    pixels = {BaseRun.CLEAN: model.normalize(red), BaseRun.CORRUPT: model.normalize(Gray()(batch, seed=0))}
    plan = make_plan(Target(Site(site), None, (TokenGroup(tokens),)), (window,), Direction(direction), model.sizes)
    masks = token_masks(plan.token_groups, model.sizes, None, None, [0], seed=0)
    logits = execute(plan, model, pixels, masks, ComputeLimits(1, 1))
    clean = logits.base[BaseRun.CLEAN]
    rivals = runner_up(logits.base[BaseRun.CORRUPT], batch.labels)
    read = lambda x: metrics(x, batch.labels, rivals, rivals, clean)["log_odds"]  # noqa: E731
    base = [float(read(logits.base[run])) for run in (BaseRun.CLEAN, BaseRun.CORRUPT)]
    return *base, read(logits.patched).flatten().tolist()


@pytest.mark.parametrize(
    ("site", "window", "direction", "tokens", "want"),
    [
        # block 0's sum d comes in: CLS 1, patch 0 + 1, and block 1 adds 2. Block 1's 3d comes in: CLS 0 + 3
        ("attn_out", 1, "denoise", "all", [3, 3]),
        ("attn_out", 2, "denoise", "all", [3, 4]),  # centre 0 is clipped to layer 0; centre 1 has both: 1 + 3
        # d is taken out of block 0: CLS 0, patch 1, block 1 adds 1. Out of block 1: CLS stays at 1
        ("attn_out", 1, "noise", "all", [1, 1]),
        ("attn_out", 2, "noise", "all", [1, 0]),
        ("attn_out", 1, "denoise", "cls", [2, 3]),  # only CLS gets d, and block 1 adds it once more
        ("attn_out", 1, "denoise", "patches", [1, 0]),  # only the patch gets d, CLS has it from block 1
        ("resid_post", 1, "denoise", "all", [4, 4]),
        ("resid_post", 1, "denoise", "cls", [2, 4]),
        ("resid_post", 1, "denoise", "patches", [2, 0]),  # the patch is at 2d, block 1 adds it to CLS
        ("mlp_out", 1, "denoise", "all", [0, 0]),
    ],
)
def test_by_hand(micro, site, window, direction, tokens, want):
    clean, corrupt, patched = log_odds(micro, site, window, direction, tokens)
    assert (clean, corrupt) == pytest.approx((4, 0), abs=LINEAR)
    assert patched == pytest.approx(want, abs=LINEAR)
