import json

import pytest
import torch
import transformers as hf
from conftest import DEPTH, NAMES, save_model
from oracle import walk

import vitpatch
from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.models.verify import verify_model
from vitpatch.models.vit import HOOKED
from vitpatch.types import Site

ORACLE = ["attn_out", "mlp_out", "resid_post"]
FAMILIES = ["vit", "deit", "deit_with_teacher"]


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_what_the_blocks_add_and_leave(made, family):
    model = Checkpoint(str(made / family)).load()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = {}
    want = walk(model.model, family.split("_")[0], pixels, seen=seen)
    places = tuple((Site(site), layer) for site in ORACLE for layer in range(DEPTH))
    with torch.no_grad(), model.reading(places) as values:
        got = model(pixels)
    assert torch.allclose(got, want, atol=1e-5)
    assert set(values) == set(places)
    for (site, layer), value in values.items():
        assert torch.allclose(value, seen[str(site), layer], atol=1e-5), (site, layer)  # attention by its formula


def test_putting_values_back_changes_nothing_and_leaves_no_hook(made):
    model = Checkpoint(str(made / "vit")).load()
    before, pixels = hooks_of(model), torch.randn(3, 3, 32, 32)
    places = tuple((site, layer) for site in HOOKED for layer in range(DEPTH))
    with torch.no_grad():
        with model.reading(places) as values:
            plain = model(pixels)
        with model.replacing(values):
            assert torch.equal(model(pixels), plain)
    assert hooks_of(model) == before


def test_an_exception_in_the_middle_leaves_no_hook(made):
    model = Checkpoint(str(made / "vit")).load()
    before = hooks_of(model)
    wrong = {(Site.ATTN_OUT, 2): torch.zeros(1, 3, 5)}
    with pytest.raises(RuntimeError), model.replacing(wrong):
        model(torch.zeros(1, 3, 32, 32))
    assert hooks_of(model) == before


def test_a_row_that_is_not_true_of_the_model_is_found_out(made):
    model = Checkpoint(str(made / "vit")).load()
    block = model.model.vit.layers[1]

    def doubled(module, args, output):
        return output * 2

    handle = block.register_forward_hook(doubled, prepend=True)
    try:
        with pytest.raises(VitPatchError, match="block 1 is not input"):
            verify_model(model)
    finally:
        handle.remove()
    verify_model(model)


def test_a_model_is_loaded_once_per_process(made):
    assert Checkpoint(str(made / "vit")).load() is Checkpoint(str(made / "vit")).load()


def test_weights_have_a_digest_of_their_values(made, tmp_path):
    copy = Checkpoint(str(save_model(tmp_path / "copy", "vit"))).load()
    other = Checkpoint(str(save_model(tmp_path / "other", "vit", seed=1))).load()
    original = Checkpoint(str(made / "vit")).load()
    assert copy.weights_digest == original.weights_digest != other.weights_digest


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("./nowhere", "model.path ./nowhere: no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("owner/name", r"cannot be loaded: the hub cannot be reached.*hf download owner/name.*model.path=FOLDER"),
        ("", "model.path is missing"),
    ],
)
def test_a_model_that_is_not_there(path, says):
    with pytest.raises(VitPatchError, match=says) as error:
        Checkpoint(path).load()
    assert "\n" not in str(error.value)


def test_another_family_is_refused_with_the_known_ones(tmp_path):
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=2)
    hf.ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(VitPatchError, match=r"'resnet' is not a known family; nearest known: DeiT \(deit\)"):
        Checkpoint(str(tmp_path)).load()


def test_a_backbone_without_a_classifier_is_refused(tmp_path, made):
    model = hf.ViTModel.from_pretrained(made / "vit", add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    for name in ("preprocessor_config.json",):
        (tmp_path / name).write_text((made / "vit" / name).read_text())
    with pytest.raises(VitPatchError, match="no weights for classifier"):
        Checkpoint(str(tmp_path)).load()


@pytest.mark.parametrize("damage", ["truncated", "empty", "reshaped", "fewer layers", "pickle only"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    folder = save_model(tmp_path / "m", "vit")
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if damage in ("truncated", "empty"):
        weights.write_bytes(weights.read_bytes()[: 1000 if damage == "truncated" else 0])
    elif damage == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    else:
        change = {"intermediate_size": 48} if damage == "reshaped" else {"num_hidden_layers": DEPTH - 1}
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(VitPatchError, match=r"^model ") as error:
        Checkpoint(str(folder)).load()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_label_names_are_the_checkpoints(made, tmp_path):
    assert Checkpoint(str(made / "vit")).load().label_names == tuple(NAMES)
    unnamed = save_model(tmp_path / "u", "vit", names=["LABEL_0", "LABEL_1"])
    assert Checkpoint(str(unnamed)).load().label_names is None


def test_reduced_weights_load_as_asked(made):
    model = Checkpoint(str(made / "vit"), dtype="bfloat16").load()
    assert model.model.dtype is torch.bfloat16 and model.normalize(torch.zeros(1, 3, 2, 2)).dtype is torch.bfloat16
    with pytest.raises(VitPatchError, match=r"model.dtype 'int8'"):
        Checkpoint(str(made / "vit"), dtype="int8").load()


class Recording(torch.nn.Module):
    """A ViT whose classifier reads CLS of a layer before the last, as its own hook or the library recorded it."""

    LAYER = 2

    def __init__(self, model, by_library):
        super().__init__()
        self.config, self.vit, self.classifier = model.config, model.vit, model.classifier
        self.by_library, self.recorded = by_library, None
        if not by_library:
            self.vit.layers[self.LAYER].register_forward_hook(self.record)

    def record(self, module, args, output):
        self.recorded = output

    def forward(self, pixel_values):
        output = self.vit(pixel_values=pixel_values, output_hidden_states=self.by_library)
        state = output.hidden_states[self.LAYER + 1] if self.by_library else self.recorded
        return hf.modeling_outputs.ImageClassifierOutput(logits=self.classifier(state[:, 0]))


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out"])
@pytest.mark.parametrize("by_library", [False, True])
def test_a_layer_that_the_model_records_itself_is_patched(made, by_library, site):
    """By brute force: the module's ``forward`` is replaced, which every hook comes after."""
    model = Recording(hf.ViTForImageClassification.from_pretrained(made / "vit"), by_library).eval()
    clean = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    corrupt, labels = clean.mean(1, keepdim=True).expand_as(clean), torch.arange(3)
    vit = vitpatch.load(model)
    assert not vit.stepwise  # the last stream is not what the classifier reads
    table = vitpatch.patch(vit, clean, corrupt, labels, target=site, window=1, tokens=["all", "cls"])

    @torch.no_grad()
    def prob(pixels):
        return model(pixels).logits.double().softmax(-1)[range(3), labels].numpy()

    plain, names = prob(corrupt), {"resid_post": "", "mlp_out": "mlp", "attn_out": "attention"}
    for tokens, cut in (("all", slice(None)), ("cls", slice(0, 1))):
        for layer in range(DEPTH):
            module = model.vit.layers[layer].get_submodule(names[site])
            values = []
            with module.register_forward_hook(lambda m, args, output, values=values: values.append(output)):
                prob(clean)

            def restored(*args, forward=module.forward, values=values, cut=cut, **kwargs):
                own = forward(*args, **kwargs)
                state = (own[0] if isinstance(own, tuple) else own).clone()
                state[:, cut] = (values[0][0] if isinstance(own, tuple) else values[0])[:, cut]
                return (state, *own[1:]) if isinstance(own, tuple) else state

            with pytest.MonkeyPatch.context() as patching:
                patching.setattr(module, "forward", restored)
                want = prob(corrupt) - plain
            got = table[(table["layer"] == layer) & (table["tokens"] == tokens)]["effect"].to_numpy()
            assert got == pytest.approx(want, abs=1e-5), (tokens, layer)
    at_recorded = table[(table["layer"] == Recording.LAYER) & (table["tokens"] == "all")]
    if site == "resid_post":
        assert at_recorded["effect"].to_numpy() == pytest.approx(at_recorded["total_effect"].to_numpy(), abs=1e-5)
        assert at_recorded["effect"].abs().max() > 0.1
