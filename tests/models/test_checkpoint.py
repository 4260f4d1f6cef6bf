"""Ways to name a model: its heads, untrained, from a pickle, without an image processor, of an unknown family."""

import json
import shutil

import pytest
import torch
from conftest import CLASSES, NAMES, SIZE, save_model
from families import NAMES as FAMILY_NAMES
from families import Brute, checkpoint_of
from PIL import Image
from safetensors.torch import load_file, save_file

import vitpatch
from vitpatch import VitPatchError
from vitpatch.data.labels import readable_name
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.models.formats import save_copy
from vitpatch.models.zero_shot import ZeroShotCheckpoint
from vitpatch.types import Site


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def test_a_model_that_is_saved_over_another_is_loaded_anew(tmp_path):
    loaded = []
    for seed in (0, 1, 1):
        if len(loaded) < 2:
            save_model(tmp_path / "model", "vit", seed=seed)
        loaded.append(Checkpoint(str(tmp_path / "model")).load())
    assert loaded[0].weights_digest != loaded[1].weights_digest and loaded[1] is loaded[2]


def test_each_head_of_a_distilled_model_by_itself(saved, pixels):
    folder = str(saved("deit_with_teacher"))
    whole = Checkpoint(folder).load()
    heads = {name: Checkpoint(folder, readout=f"{name}_classifier").load() for name in ("cls", "distillation")}
    out = whole.model(pixel_values=pixels)
    assert (whole(pixels) - out.logits).abs().max() == 0
    for name, model in heads.items():
        assert model.stepwise and (model(pixels) - out[f"{name}_logits"]).abs().max() < 1e-5
    assert [whole.sizes.reads, heads["cls"].sizes.reads, heads["distillation"].sizes.reads] == [2, 1, 2]
    assert (heads["cls"](pixels) - heads["distillation"](pixels)).abs().max() > 0.1
    with pytest.raises(VitPatchError, match=r"model.readout 'both': the model has cls_classifier, distillation_class"):
        Checkpoint(folder, readout="both").load()


def test_reads_are_those_that_the_classifier_uses(saved):
    reads = {"vit": 1, "deit": 1, "beit": 17, "beit_cls": 1, "data2vec": 17, "ijepa": 16, "dinov2_registers": 19}
    reads |= {"clip": 17, "siglip": 16, "dinov3": 19, "clip_zero_shot": 1, "siglip_zero_shot": 16}
    for family, expected in reads.items():
        model = checkpoint_of(saved(family), family).load(NAMES)
        assert model.sizes.reads == expected, family
    assert model.sizes.special == ()
    special = checkpoint_of(saved("dinov2_registers"), "dinov2_registers").load().sizes.special
    assert special == ("cls", "register0", "register1")


def test_untrained_is_the_same_architecture_and_the_same_each_time(saved, pixels):
    trained = Checkpoint(str(saved("dinov2"))).load()
    first, again = (
        Checkpoint(str(saved("dinov2")), random_init=True, readout=head).load() for head in (None, "classifier")
    )
    assert first.weights_digest == again.weights_digest != trained.weights_digest
    assert first.label_names == trained.label_names and first.sizes == trained.sizes
    assert {k: v.shape for k, v in first.model.state_dict().items()} == {
        k: v.shape for k, v in trained.model.state_dict().items()
    }
    for family in ("dinov3", "clip_zero_shot"):
        model = checkpoint_of(saved(family), family)
        drawn = type(model)(**{**vars(model), "random_init": True}).load(NAMES)
        assert drawn.weights_digest != model.load(NAMES).weights_digest and drawn.classes == CLASSES


def test_a_pickle_only_by_the_key_that_allows_it(saved, pixels, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(saved("vit"), folder)
    weights = load_file(folder / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in weights  # the names of transformers 4
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        VitPatchError, match=r"only pytorch_model.bin.*model.allow_bin=true.*vitpatch.cli.convert"
    ) as error:
        Checkpoint(str(folder)).load()
    assert "\n" not in str(error.value)
    model, safe = Checkpoint(str(folder), allow_bin=True).load(), Checkpoint(str(saved("vit")), allow_bin=True).load()
    assert model.weights_digest == safe.weights_digest
    save_copy(Checkpoint(str(folder), allow_bin=True), tmp_path / "new")
    assert Checkpoint(str(tmp_path / "new")).load().weights_digest == safe.weights_digest


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a checkpoint was run')",)


def test_a_pickle_with_code_is_refused_in_one_line(saved, tmp_path):
    folder = tmp_path / "evil"
    shutil.copytree(saved("vit"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(VitPatchError, match=r"^model .*holds more than weights.* is not read$") as error:
        Checkpoint(str(folder), allow_bin=True).load()
    assert "\n" not in str(error.value)


def test_convert_says_what_it_did_and_what_is_wrong(saved, tmp_path, capsys):
    from vitpatch.cli.convert import main

    main([str(saved("vit")), str(tmp_path / "out")])
    assert "model.path=" in capsys.readouterr().out
    assert (
        Checkpoint(str(tmp_path / "out")).load().weights_digest == Checkpoint(str(saved("vit"))).load().weights_digest
    )
    with pytest.raises(SystemExit, match=r"error: .*is there already"):
        main([str(saved("vit")), str(tmp_path / "out")])


@pytest.mark.parametrize("family", ["deit_with_teacher", "clip_zero_shot", "vit"])
def test_what_is_converted_is_all_there(saved, tmp_path, family):
    from vitpatch.cli.convert import main

    shutil.copytree(saved(family), tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    if family == "vit":
        (tmp_path / "old" / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if k != "architectures"})
        )
    weights = load_file(tmp_path / "old" / "model.safetensors")
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    main([str(tmp_path / "old"), str(tmp_path / "new")])
    before, after = (checkpoint_of(folder, family).load(NAMES) for folder in (saved(family), tmp_path / "new"))
    assert before.weights_digest == after.weights_digest and before.label_names == after.label_names


def test_what_lacks_its_classifier_is_not_converted(saved, tmp_path):
    from vitpatch.cli.convert import main

    shutil.copytree(saved("vit"), tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    torch.save({k: v for k, v in weights.items() if "classifier" not in k}, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"error: .*no weights for classifier.bias"):
        main([str(tmp_path / "old"), str(tmp_path / "new")])
    assert not list(tmp_path.glob("new*"))


def test_without_an_image_processor_the_keys_say_it(saved, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(saved("vit"), folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(VitPatchError, match=r"no image processor.*model.mean=\[R,G,B\]") as error:
        Checkpoint(str(folder)).load()
    assert "\n" not in str(error.value)
    keys = dict(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    model = Checkpoint(str(folder), **keys).load()
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    import numpy as np

    resized = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 255
    got = model.preprocessing.to_input(picture)
    assert (got - torch.from_numpy(resized).permute(2, 0, 1)).abs().max() < 1e-6
    want = (got - torch.tensor(keys["mean"]).view(3, 1, 1)) / torch.tensor(keys["std"]).view(3, 1, 1)
    assert (model.normalize(got[None])[0] - want).abs().max() < 1e-6
    cropped = (
        Checkpoint(str(folder), crop_share=0.8, resample="bilinear", **keys).load().preprocessing.to_input(picture)
    )
    shorter = int(SIZE / 0.8)
    middle = picture.resize((shorter * 50 // 40, shorter), Image.Resampling.BILINEAR)
    left, top = (middle.width - SIZE) // 2, (middle.height - SIZE) // 2
    middle = np.asarray(middle.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
    assert (cropped - torch.from_numpy(middle).permute(2, 0, 1)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (dict(mean=[0.5] * 3), "model.mean and model.std: both are needed"),
        (dict(image_size=64), "model.mean and model.std: both are needed"),
        (
            dict(mean=[127] * 3, std=[58] * 3),
            r"model.mean \(127, .*one number a colour on the \[0, 1\] scale",
        ),
        (dict(revision="main"), "model.revision main: .* is a local folder"),
        (dict(head_path=5), "model.head_path 5: expected a name"),
        (dict(anatomy=5), "model.anatomy 5: expected a name"),
        (dict(mean=[0.5] * 3, std=[0.5, 0.5, 0]), "model.std.*above 0"),
        (dict(mean=[0.5] * 3, std=[0.5] * 3, image_size=0), "model.image_size 0"),
        (dict(mean=[0.5] * 3, std=[0.5] * 3, image_size=64), r"gives \(64, 64\) pixels, the model takes \(32, 32\)"),
        (dict(mean=[0.5] * 3, std=[0.5] * 3, resample="cubic"), "model.resample 'cubic': expected one of nearest"),
        (dict(mean=[0.5] * 3, std=[0.5] * 3, crop_share=2), "model.crop_share 2"),
        (dict(head_path="x.safetensors"), "model.head_path is for backbones"),
        (dict(random_init="yes"), "model.random_init 'yes': expected true or false"),
        (dict(anatomy="nowhere.yaml"), "model.anatomy nowhere.yaml: cannot be read"),
    ],
)
def test_a_wrong_key_is_one_line(saved, keys, says):
    with pytest.raises(VitPatchError, match=says) as error:
        Checkpoint(str(saved("vit")), **keys).load()
    assert "\n" not in str(error.value)


def test_a_model_that_takes_any_size_takes_the_processors(saved):
    model = checkpoint_of(saved("dinov2"), "dinov2").load()
    assert model.model.config.image_size == 48 and model.input_size == (SIZE, SIZE) and model.sizes.grid == (4, 4)
    bigger = Checkpoint(str(saved("dinov2")), image_size=(40, 24), mean=[0.5] * 3, std=[0.5] * 3).load()
    assert bigger.sizes.grid == (5, 3) and bigger.stepwise


# --- DINOv3's head ---


def test_a_backbone_needs_its_head(saved, tmp_path):
    folder = str(saved("dinov3"))
    with pytest.raises(VitPatchError, match=r"model.head_path is missing"):
        Checkpoint(folder).load()
    with pytest.raises(VitPatchError, match=r"model.head_path .*not a readable safetensors file"):
        Checkpoint(folder, head_path=str(tmp_path / "no.safetensors")).load()
    save_file({"weight": torch.zeros(5, 7)}, tmp_path / "bad.safetensors")
    with pytest.raises(VitPatchError, match=r"expected weight \(classes, 32\) of CLS, or \(classes, 64\)"):
        Checkpoint(folder, head_path=str(tmp_path / "bad.safetensors")).load()
    save_file({"weight": torch.randn(5, 32)}, tmp_path / "cls.safetensors")
    of_cls = Checkpoint(folder, head_path=str(tmp_path / "cls.safetensors")).load()
    assert of_cls.sizes.reads == 1 and of_cls.stepwise and of_cls.label_names is None


# --- images and texts ---


@pytest.mark.parametrize("family", ["clip_zero_shot", "siglip_zero_shot"])
def test_logits_are_those_of_the_model_on_each_text(saved, pixels, family):
    from transformers import AutoModel, AutoTokenizer

    folder = saved(family)
    model = ZeroShotCheckpoint(str(folder), prompts=["a photo of a {}."]).load(NAMES)
    own, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    how = dict(padding="max_length", max_length=77) if family.startswith("siglip") else dict(padding=True)
    tokens = tokenizer(texts, return_tensors="pt", **how)
    given = {"input_ids": tokens["input_ids"]}
    with torch.no_grad():
        want = own(pixel_values=pixels, **given).logits_per_image
    assert (model(pixels) - want).abs().max() < 1e-4
    assert model.label_names == tuple(NAMES)


def test_templates_are_averaged_and_checked(saved, pixels):
    folder = str(saved("clip_zero_shot"))
    one, two = (ZeroShotCheckpoint(folder, prompts=prompts).load(NAMES) for prompts in ("{}", ["{}", "a photo of {}"]))
    assert (one(pixels) - two(pixels)).abs().max() > 1e-3
    assert one.weights_digest != two.weights_digest
    assert (two.model.similarity.texts.norm(dim=-1) - 1).abs().max() < 1e-5
    for prompts in (["a photo"], [], ["{} {}"], [3]):
        with pytest.raises(VitPatchError, match=r"model.prompts"):
            ZeroShotCheckpoint(folder, prompts=prompts).load(NAMES)
    with pytest.raises(VitPatchError, match="the data have none"):
        ZeroShotCheckpoint(folder).load()
    with pytest.raises(VitPatchError, match="model_type 'vit' has no texts"):
        ZeroShotCheckpoint(str(saved("vit"))).load(NAMES)
    with pytest.raises(VitPatchError, match=r"not a fine-tuned image classifier; .*model=clip_zero_shot"):
        Checkpoint(folder).load()


def test_a_tokenizer_that_reads_nothing_and_labels_that_are_no_words_are_refused(saved, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(saved("clip_zero_shot"), folder)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(VitPatchError, match=r"reads the labels 'class_0' and 'class_1' as the same|cannot be loaded"):
        ZeroShotCheckpoint(str(folder)).load(NAMES)
    with pytest.raises(VitPatchError, match=r"they are numbers \(0, 1\); give it words"):
        ZeroShotCheckpoint(str(saved("clip_zero_shot"))).load(["0", "1"])
    assert readable_name("n02123045") == "tabby" and readable_name("tabby, tabby cat") == "tabby"


# --- a family of one's own ---

ROW = """
name: my ViT
blocks: vit.layers
special: [cls]
readouts:
  - heads: {classifier: [cls]}
    norm: vit.layernorm
"""


def renamed(folder, model_type):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))


def test_a_row_of_ones_own_is_verified_the_same_way(saved, pixels, tmp_path):
    (tmp_path / "row.yaml").write_text(ROW)
    model = Checkpoint(str(saved("vit")), anatomy=str(tmp_path / "row.yaml")).load()
    assert model.family.name == "my ViT" and model.stepwise and model.by_heads
    (tmp_path / "like.yaml").write_text("like: vit\nname: like a ViT\n")
    assert Checkpoint(str(saved("vit")), anatomy=str(tmp_path / "like.yaml")).load().stepwise


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("blocks: vit.layers", "blocks: vit.blocks"), "its blocks are not where the row says"),
        (("special: [cls]", "special: []"), "17 tokens are not 16 patches, 0 registers and nothing"),
        (("norm: vit.layernorm", "norm: vit.norm"), "an image classifier of my ViT has classifier"),
        (("name: my ViT", "name: my ViT\nattn: x"), "unknown key attn; did you mean"),
        (("name: my ViT", "nome: my ViT"), "unknown key nome; did you mean name"),
        (("blocks: vit.layers\n", ""), "lacks blocks"),
        (("special: [cls]", "special: cls"), "special .cls.; expected a list"),
        (("heads: {classifier: [cls]}", "head: classifier"), "readouts .*expected heads"),
        (("name: my ViT", "like: vot"), "like 'vot'; expected one of"),
        (("name: my ViT", "name: [my"), "cannot be read"),
        (("blocks: vit.layers", "blocks: vit.layers\nnorm2: layernorm_before"), "what enters norm2 of block 0"),
    ],
)
def test_a_row_that_is_not_true_is_refused(saved, tmp_path, change, says):
    (tmp_path / "row.yaml").write_text(ROW.replace(*change))
    checkpoint = Checkpoint(str(saved("vit")), anatomy=str(tmp_path / "row.yaml"))
    with pytest.raises(VitPatchError, match=says) as error:
        checkpoint.load()
    assert "\n" not in str(error.value)


def test_attention_of_another_kind_is_taken_whole(saved, pixels, tmp_path):
    """A row without the rotary embedding: blocks run by their parts, heads by full forwards."""
    (tmp_path / "row.yaml").write_text("like: dinov3_vit\nrotary: null\n")
    head = str(saved("dinov3") / "head.safetensors")
    model = Checkpoint(str(saved("dinov3")), head_path=head, anatomy=str(tmp_path / "row.yaml")).load()
    assert model.stepwise and not model.by_heads
    assert model.runs_by_parts(Site.ATTN_OUT) and not model.runs_by_parts(Site.Z)
    brute, labels = Brute(model.model, FAMILY_NAMES["dinov3"]), torch.arange(3)
    corrupt = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    for site, head in (("attn_out", None), ("z", 1)):
        table = vitpatch.patch(model, pixels, corrupt, labels, target=site, window=1, heads=head and [head])
        want = brute.patched(pixels, corrupt, site, head=head).double().softmax(-1)[:, torch.arange(3), labels]
        assert (torch.tensor(table["prob"].to_numpy()).view(3, -1).T - want).abs().max() < 1e-5
    for site in ("q", "k", "v"):  # nothing is shown of them
        with pytest.raises(VitPatchError, match=f"target={site}: DINOv3 has no such values"):
            vitpatch.patch(model, pixels, corrupt, labels, target=site)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("query: v_proj\nvalue: q_proj", "target=q: .* has no such values"),
        ("query: k_proj\nkey: q_proj", "target=q: .* has no such values"),
        ("norm1: layernorm_after\nnorm2: layernorm_before", "what enters norm2 of block 0 is not input"),
        ("output: nope", "target=q: .* has no such values"),
        ("mlp: [mlp.fc1]", "mlp_out of layer 0 is"),
    ],
)
def test_a_site_of_ones_own_row_is_what_it_is_called(saved, pixels, tmp_path, change, says):
    (tmp_path / "row.yaml").write_text(f"like: vit\n{change}\n")
    with pytest.raises(VitPatchError, match=says):
        Checkpoint(str(saved("vit")), anatomy=str(tmp_path / "row.yaml")).load().require(Site.Q)


def test_a_row_is_verified_in_float32_also_for_weights_below_it(saved, tmp_path):
    """Read by CLS where the model reads the mean patch: in bfloat16 the two would pass for equal."""
    (tmp_path / "row.yaml").write_text("like: clip\nreadouts: [{heads: {classifier: [cls]}}]\n")
    model = Checkpoint(str(saved("clip")), anatomy=str(tmp_path / "row.yaml"), dtype="bfloat16").load()
    assert not model.stepwise
    right = Checkpoint(str(saved("clip")), dtype="bfloat16").load()
    assert right.stepwise and right.by_heads and right.sizes.reads == 17 and right.dtype is torch.bfloat16


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_of_a_repository_is_never_run_nor_asked_for(saved, tmp_path, monkeypatch, file):
    folder = tmp_path / "own_code"
    shutil.copytree(saved("vit"), folder)
    (folder / "own.py").write_text("raise SystemExit('code of a repository was run')\n")
    content = json.loads((folder / file).read_text())
    if file == "config.json":
        content |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    else:
        content |= {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Processor"}}
    (folder / file).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked"))
    with pytest.raises(VitPatchError, match=r"run by code from its own repository, and vitpatch runs none") as error:
        Checkpoint(str(folder)).load()
    assert "trust_remote_code" not in str(error.value) and "\n" not in str(error.value)
