"""Models in forms that are not taken as they are: one line each that says what it is and what to do."""

import json
import shutil

import pytest
import torch
from conftest import SIZE
from safetensors.torch import load_file, save_file

import vitpatch
from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint, pretrained_classifier


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the tiny ViT's folder, to be changed."""
    return shutil.copytree(saved("vit"), tmp_path / "model")


def renamed(folder, prefix):
    weights = load_file(folder / "model.safetensors")
    save_file({prefix + name: w for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def rewritten(file, **new):
    file.write_text(json.dumps(json.loads(file.read_text()) | new))


def adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))


def with_checkpoints(folder):
    inner = [shutil.copytree(folder, folder.parent / f"checkpoint-{n}") for n in (500, 1000)]
    shutil.rmtree(folder)
    folder.mkdir()
    for one in inner:
        one.rename(folder / one.name)


def without(*names, **instead):
    def change(folder):
        for name in names:
            (folder / name).unlink()
        for name in instead.values():
            (folder / name).write_bytes(b"x")

    return change


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def lacking_a_shard(folder):
    (folder / "model.safetensors").unlink()
    name = {"weight_map": {"classifier.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(name))


FORMS = {
    "adapter": (adapter, "is an adapter (adapter_config.json) of owner/base: merge it into its base first"),
    "Trainer's folder": (with_checkpoints, "has no config.json; checkpoint-1000 in it has one: model.path="),
    "empty": (empty, "is an empty folder; expected a folder written by save_pretrained"),
    "no config": (without("config.json"), "has weights but no config.json"),
    "neither": (without("config.json", "model.safetensors"), "has no config.json"),
    "onnx": (without("config.json", "model.safetensors", a="m.onnx"), "holds a model of ONNX; expected a folder"),
    "onnx and config": (without("model.safetensors", a="m.onnx"), "has weights of ONNX only; export the model as"),
    "gguf": (without("config.json", "model.safetensors", a="m.gguf"), "holds a model of GGUF"),
    "lightning": (without("config.json", "model.safetensors", a="last.ckpt"), "of a Lightning checkpoint load it"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "shard": (lacking_a_shard, "lacks model-00002-of-00002.safetensors of the 1 files of model.safetensors.index.json"),
    "damaged index": (
        without("model.safetensors", a="model.safetensors.index.json"),
        "model.safetensors.index.json is damaged",
    ),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded: "),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be loaded: "),
    "quantised": (
        lambda f: rewritten(f / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "its weights are quantised (bitsandbytes); give it in float32",
    ),
    "compiled": (lambda f: renamed(f, "_orig_mod."), "its weights are called _orig_mod.…, such as _orig_mod.class"),
    "parallel": (lambda f: renamed(f, "module."), "saved from DataParallel or DistributedDataParallel"),
    "compiled in parallel": (lambda f: renamed(f, "module._orig_mod."), "weights are called module._orig_mod.…"),
    "held": (lambda f: renamed(f, "model."), "saved from a module that holds the model"),
    "held by another name": (lambda f: renamed(f, "net."), "its weights are called net.…"),
    "peft": (lambda f: renamed(f, "base_model.model."), "save model.merge_and_unload() instead"),
    "two sizes": (
        lambda f: rewritten(f / "preprocessor_config.json", size={"height": 48, "width": 48}),
        "its image processor gives (48, 48) pixels, the model takes (32, 32); to resize images to that: "
        "model.image_size=[32,32] model.mean=[0.5,0.5,0.5] model.std=[0.5,0.5,0.5]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), FORMS.values(), ids=FORMS)
def test_another_form_of_a_checkpoint_is_one_line(copied, change, says):
    change(copied)
    with pytest.raises(VitPatchError) as error:
        Checkpoint(str(copied)).load()
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("epoch.ckpt", "is a file; expected a folder written by save_pretrained; of a Lightning checkpoint load it"),
        ("model.safetensors", "is a file; expected a folder written by save_pretrained: model.path="),
        ("config.json", "is a file; expected a folder written by save_pretrained: model.path="),
    ],
)
def test_a_file_is_no_folder(copied, name, says):
    (copied / name).touch()
    with pytest.raises(VitPatchError, match=r"^model.path .*is a file") as error:
        Checkpoint(str(copied / name)).load()
    assert says in str(error.value)


def test_the_two_sizes_remedy_works(copied):
    rewritten(copied / "preprocessor_config.json", size={"height": 48, "width": 48})
    keys = dict(image_size=[SIZE, SIZE], mean=[0.5] * 3, std=[0.5] * 3)
    assert Checkpoint(str(copied), **keys).load().input_size == (SIZE, SIZE)


def test_fine_tuning_does_not_begin_from_layers_without_weights(copied):
    """transformers draws anew what it does not find; of the layers that would be a training from nothing."""
    pretrained_classifier(Checkpoint(str(copied)), ["cat", "dog"], keeps_head=False)
    weights = load_file(copied / "model.safetensors")
    kept = {name: w for name, w in weights.items() if ".layer.1." not in name}
    assert len(kept) < len(weights)
    save_file(kept, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(VitPatchError, match=r"no weights for vit.layers.1"):
        pretrained_classifier(Checkpoint(str(copied)), ["cat", "dog"], keeps_head=False)
    renamed(copied, "_orig_mod.")
    with pytest.raises(VitPatchError, match=r"weights are called _orig_mod"):
        pretrained_classifier(Checkpoint(str(copied)), ["cat", "dog"], keeps_head=False)


class Held(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


class Compiled(torch.nn.Module):
    """What torch.compile returns has this attribute, and all others of the model."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod, self.config = model, model.config


class OfPeft(torch.nn.Module):
    __module__ = "peft.peft_model"


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (Compiled, r"before torch.compile \(model._orig_mod\)"),
        (torch.nn.DataParallel, r"got DataParallel; give the Hugging Face model that it holds \(model.module\)"),
        (Held, r"got Held; give the Hugging Face model that it holds \(model.model\)"),
        (lambda m: OfPeft(), r"is peft's; give model.merge_and_unload\(\)"),
        (lambda m: torch.nn.Linear(2, 2), "got Linear; expected a Hugging Face image classifier"),
        (lambda m: m.vit, "ViTModel"),
        (lambda m: m.state_dict(), "got OrderedDict; expected a Hugging Face image classifier"),
        (lambda m: "owner/name", "got str; expected a Hugging Face image classifier"),
    ],
)
def test_a_wrapped_model_is_named(saved, wrap, says):
    from transformers import AutoModelForImageClassification

    model, images = AutoModelForImageClassification.from_pretrained(saved("vit")), torch.rand(2, 3, SIZE, SIZE)
    with pytest.raises(VitPatchError, match=says):
        vitpatch.patch(wrap(model), images, images.flip(0), [0, 1])
