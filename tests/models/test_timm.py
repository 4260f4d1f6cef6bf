"""timm's vision transformers through transformers' wrapper (the optional extra): rows verified, effects as by hooks."""

import pytest
import torch
from conftest import CLASSES, NAMES, SIZE
from families import Brute, Names

import vitpatch
from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.types import Site

pytest.importorskip("timm")

MODULES = Names("timm_model.blocks", 0, (), attention="attn", z="attn.proj")
SMALL = dict(img_size=SIZE, patch_size=8, embed_dim=32, depth=3, num_heads=4)
VARIANTS = {  # architecture, arguments, special tokens, how many tokens are read
    "cls": ("vit_tiny_patch16_224", {}, ("cls",), 1),
    "mean": ("vit_tiny_patch16_224", dict(global_pool="avg"), ("cls",), 17),
    "mean_before_norm": ("vit_tiny_patch16_224", dict(global_pool="avg", fc_norm=True), ("cls",), 17),
    "no_cls": ("vit_tiny_patch16_224", dict(global_pool="avg", class_token=False), (), 16),
    "attention_pool": ("vit_base_patch16_siglip_224", {}, (), 16),
    "layer_scale": ("deit3_small_patch16_224", {}, ("cls",), 1),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, ("cls", *(f"register{i}" for i in range(4))), 1),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, ("cls", "distillation"), 2),
    "normed_queries": ("vit_tiny_patch16_224", dict(qk_norm=True), ("cls",), 1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    folder, made = tmp_path_factory.mktemp("timm"), {}

    def get(variant):
        if variant not in made:
            architecture, arguments, *_ = VARIANTS[variant]
            values = {"architecture": architecture, "num_classes": CLASSES, "label_names": NAMES}
            values["pretrained_cfg"] = {
                "input_size": [3, SIZE, SIZE],
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
                "interpolation": "bicubic",
                "crop_pct": 0.9,
            }
            torch.manual_seed(0)
            config = TimmWrapperConfig.from_dict(values | {"model_args": SMALL | arguments})
            model = TimmWrapperForImageClassification(config).eval()
            for name, weight in model.named_parameters():
                if weight.dim() == 2:
                    torch.nn.init.normal_(weight, std=0.25)
                elif name.endswith("gamma"):
                    torch.nn.init.constant_(weight, 0.5)
            model.save_pretrained(folder / variant)
            made[variant] = folder / variant
        return made[variant]

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_effects_are_those_of_full_forwards(variant, saved):
    model = Checkpoint(str(saved(variant))).load()
    *_, special, reads = VARIANTS[variant]
    assert model.stepwise and model.by_heads == (variant != "normed_queries")
    assert (model.sizes.special, model.sizes.reads, model.label_names) == (special, reads, tuple(NAMES))
    clean = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    corrupt, labels = clean.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous(), torch.arange(3)
    brute = Brute(model.model, MODULES)
    before = brute.run(corrupt).double().softmax(-1)[torch.arange(3), labels]
    largest = 0.0
    for site, window, head in (("attn_out", 1, None), ("attn_out", 3, None), ("mlp_out", 1, None), ("z", 1, 2)):
        table = vitpatch.patch(model, clean, corrupt, labels, target=site, window=window, heads=head and [head])
        got = torch.tensor(table["prob"].to_numpy()).view(3, -1).T
        logits = brute.patched(clean, corrupt, site, window, head=head)
        want = logits.double().softmax(-1)[:, torch.arange(3), labels]
        assert (got - want).abs().max() < 1e-5, site
        largest = max(largest, (want - before).abs().max().item())
    assert largest > 0.01


def test_one_projection_to_three_is_patched_third_by_third(saved):
    """With a head's q, k and v all the donor's its z is; its q and k alone are its pattern."""
    model = Checkpoint(str(saved("cls"))).load()
    clean = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    corrupt, labels = clean.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous(), torch.arange(3)
    places = {name: [(Site(name), layer) for layer in range(3)] for name in ("q", "k", "v")}
    with model.reading(tuple(place for sites in places.values() for place in sites)) as donor:
        model(clean)
    donor = {place: value.clone() for place, value in donor.items()}

    def put(new):
        return lambda own: torch.cat([own[..., :8], new[..., 8:16], own[..., 16:]], -1)  # head 1 of 8 channels

    for target, sites in (("z", "qkv"), ("pattern", "qk"), ("q", "q"), ("k", "k"), ("v", "v")):
        table = vitpatch.patch(model, clean, corrupt, labels, target=target, window=1, heads=[1])
        for layer in range(3):
            with model.hooked({(Site(s), layer): put(donor[Site(s), layer]) for s in sites}):
                want = model(corrupt).double().softmax(-1)[torch.arange(3), labels]
            got = table[table["layer"] == layer]["prob"].to_numpy()
            assert (torch.tensor(got) - want).abs().max() < 1e-5, (target, layer)


def test_end_to_end_by_the_checkpoints_own_preprocessing(saved, patched):
    folder = saved("layer_scale")
    assert (patched("model=hf", f"model.path={folder}", "window=3") / "manifest.json").exists()
    processor = Checkpoint(str(folder)).load().preprocessing.processor
    assert processor.size["shortest_edge"] == int(SIZE / 0.9) and processor.crop_size["height"] == SIZE


def test_what_is_no_vision_transformer_is_refused_in_one_line(tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig.from_dict({"architecture": "resnet10t", "num_classes": CLASSES, "label_names": NAMES})
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(VitPatchError, match=r"model .* as timm: its blocks are not where the row says") as error:
        Checkpoint(str(tmp_path)).load()
    assert "\n" not in str(error.value)
