"""What ``conf/`` names on the hub, by its own ids, from a cache as ``hf download`` leaves it."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from composed import composed
from conftest import ROOT
from fake_hub import serving
from hub import DATA, MODELS, commit_of, data_module, names_of, put_data, put_model

from vitpatch.data.labels import match_labels
from vitpatch.errors import VitPatchError
from vitpatch.runs.config import construct

LIKE_ANOTHER = ("clip_l14", "vit_l16_imagenet", "deit_b16", "dinov2_b14")
"""Options whose files have the form of another's."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub in the place of the user's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_every_named_model_and_data_set_of_the_hub_has_a_stand_in():
    on_disk = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    assert on_disk - set(MODELS) == {"hf", "emoji_vit", "emoji_scenes_vit", "clip_zero_shot"} and set(MODELS) <= on_disk
    for option, (name, *_) in MODELS.items():
        assert composed("patch", f"model={option}").model.path == name
    for option, (name, *_) in DATA.items():
        assert composed("patch", f"data={option}").data.path == name


@pytest.mark.parametrize(
    "option",
    [pytest.param(option, marks=pytest.mark.long if option in LIKE_ANOTHER else ()) for option in MODELS],
)
def test_a_named_model_is_loaded_as_its_files_say(cache, option):
    name = put_model(cache, option)
    names, processor = names_of(data_module(option)), MODELS[option][3]
    bin_too = ["model.allow_bin=true"] if option == "vit_b16_cifar10" else []
    checkpoint = construct(composed("patch", f"model={option}", *bin_too).model)
    model = checkpoint.load(names if checkpoint.needs_names else None)
    assert model.stepwise and model.by_heads and model.input_size == (224, 224)
    assert checkpoint.commit == commit_of(name)
    assert match_labels(names, model.label_names, model.classes) is None and model.classes == len(names)
    assert model.mean.flatten().tolist() == pytest.approx(processor["image_mean"])
    assert model.std.flatten().tolist() == pytest.approx(processor["image_std"])
    pixels = torch.rand(2, 3, 224, 224)
    assert model(model.normalize(pixels)).shape == (2, len(names))


def test_a_text_is_said_as_siglip_was_trained(cache):
    """Small letters, no punctuation, padded to 64: the model's own tokenizer, and so sentencepiece."""
    put_model(cache, "siglip_b16")
    checkpoint = construct(composed("patch", "model=siglip_b16").model)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer("This is a photo of Cats.")["input_ids"] == tokenizer("this is a photo of cats")["input_ids"]


@pytest.mark.parametrize("option", DATA)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_named_data_set_is_read_from_what_hf_download_left(cache, option, streaming):
    name = put_data(cache, option)
    keys = ["data.num_workers=0", f"data.streaming={streaming}"]
    images = construct(composed("patch", f"data={option}", *keys).data).open()
    assert images.labels.tolist() == list(range(6)) and images.label_names == tuple(names_of(option))
    assert images.image(3).mode == "RGB"
    if streaming:  # known by its commit, not by the place of its copy
        source = construct(composed("patch", f"data={option}", *keys).data)
        assert commit_of(name) in source.fingerprint()


def test_a_copy_without_the_split_says_what_it_has(cache):
    put_data(cache, "cifar10")
    with pytest.raises(VitPatchError, match=r"^data uoft-cs/cifar10: .*test") as error:
        construct(composed("patch", "data=cifar10", "data.split=validation").data).open()
    assert "cannot be reached" not in str(error.value)


@pytest.mark.long
def test_models_of_imagenet_in_one_command(tmp_path):
    home = tmp_path / "home"
    put_data(home / "hub", "imagenet")
    wanted = [option for option in MODELS if "cifar" not in option]
    for option in wanted:
        put_model(home / "hub", option)
    command = [sys.executable, "patch.py", "-m", "experiment=imagenet_models", "logger=none", "trainer=cpu"]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command.append(f"hydra.sweep.dir={tmp_path / 'sweep'}")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    runs = sorted((tmp_path / "sweep").glob("*/manifest.json"))
    assert len(runs) == 9 and "9 of 9 runs finished" in done.stdout
    for run in runs:
        model = json.loads(run.read_text())["model"]
        assert model["commit"] == commit_of(model["path"]) and model["revision"] is None
        examples = pd.read_parquet(run.parent / "examples.parquet")
        assert examples["label_name"].tolist() == names_of("imagenet")[:6]


@pytest.mark.long
def test_the_study_at_its_own_size(tmp_path):
    """A ViT-B/16 of 86 million weights in pytorch_model.bin, on images in CIFAR-10's layout, by the hub's own ids."""
    import transformers as hf
    from hub import OLD, only_pickle, repository

    home, (name, *_) = tmp_path / "home", MODELS["vit_b16_cifar10"]
    put_data(home / "hub", "cifar10", number=2)
    folder, names = repository(home / "hub", "model", name), names_of("cifar10")
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model = hf.ViTForImageClassification(hf.ViTConfig(**labels))
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(OLD))
    only_pickle(folder)
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "patch.py", "-m", "experiment=cifar10_color", "logger=none", "trainer=cpu"]
    command.append(f"hydra.sweep.dir={tmp_path / 'sweep'}")
    refused = subprocess.run(
        [*command, "model.allow_bin=false"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert refused.returncode and "model.allow_bin=true" in refused.stdout
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    runs = sorted((tmp_path / "sweep").glob("*/manifest.json"))
    assert [json.loads(run.read_text())["config"]["window"] for run in runs] == [1, 3]
    for run in runs:
        effects = pd.read_parquet(run.parent / "effects.parquet")
        assert len(effects) == 24 and effects["effect"].abs().max() > 1e-4


@pytest.mark.long
def test_a_hub_that_answers(tmp_path):
    """The same by HTTP: files are downloaded once, all of one commit; what is not there is one line."""
    there, name = tmp_path / "there", MODELS["deit_b16_distilled"][0]
    put_model(there, "deit_b16_distilled"), put_data(there, "imagenet")
    command = [sys.executable, "patch.py", "data=imagenet", "data.limit=4", "logger=none", "trainer=cpu"]

    def patch(folder, *overrides):
        everything = [*command, *overrides, f"hydra.run.dir={tmp_path / folder}"]
        done = subprocess.run(everything, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    with serving(there) as (address, asked):
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        code, out = patch("streamed", "model=deit_b16_distilled")
        assert code == 0, out
        weights = [path for path in asked if path.endswith("model.safetensors")]
        assert weights and all(f"/resolve/{commit_of(name)}/" in path for path in weights)
        code, out = patch("whole", "model=deit_b16_distilled", "data.streaming=false")
        assert code == 0, out
        code, out = patch("none", "model=hf", "model.path=nobody/nothing")
        assert code == 1 and out.strip().count("\n") == 0 and "nobody/nothing" in out
        code, out = patch("no_split", "model=deit_b16_distilled", "data.split=valid")
        assert code == 1 and "Traceback" not in out and "HTTP Request" not in out and "validation" in out
    code, out = patch("after", "model=deit_b16_distilled", "data.streaming=false")  # the hub is gone: its cache is not
    assert code == 0, out
    manifests = [json.loads((tmp_path / f / "manifest.json").read_text()) for f in ("streamed", "whole", "after")]
    assert {m["model"]["commit"] for m in manifests} == {commit_of(name)}
    assert manifests[1]["run_id"] == manifests[2]["run_id"]
    effects = [pd.read_parquet(tmp_path / f / "effects.parquet") for f in ("streamed", "whole", "after")]
    assert all(effects[0].equals(other) for other in effects[1:])
