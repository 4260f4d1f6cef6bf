"""When runs of one path are said to have several weights."""

import copy
from pathlib import Path

import pandas as pd
import pytest
import torch
from families import save_family

from vitpatch.compare.settings import ZERO_SHOT, consistency_warnings
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.models.vit import digest_of_weights
from vitpatch.models.zero_shot import ZeroShot, ZeroShotCheckpoint
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.reading import FinishedRun

MODEL = {
    "_target_": "vitpatch.models.checkpoint.Checkpoint",
    "path": "some/model",
    "dtype": "float32",
    "head_path": None,
}


def run(run_id, weights, data="d0", checkpoint=None, **model):
    """A finished run's manifest, as far as it is read; without ``checkpoint`` of a version that did not write it."""
    of_model = {"weights": weights} | ({} if checkpoint is None else {"checkpoint": checkpoint})
    identity = {"data": data, "numbers_version": 3, "readout": model.get("readout")}
    data_config = {"_target_": "vitpatch.data.sources.ImageSource", "path": data, "split": "test"}
    manifest = {"config": {"model": MODEL | model, "data": data_config}, "model": of_model, "identity": identity}
    manifest |= {"versions": {"vitpatch": "0.1.0"}, "run_id": run_id}
    return FinishedRun(run_id, "", RunFolder(Path(run_id)), manifest, pd.DataFrame())


ZERO = {"_target_": f"vitpatch.models.zero_shot.{ZERO_SHOT}", "prompts": ["a photo of a {}."]}


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([run("a", "w0"), run("b", "w0")], False),
        ([run("a", "w0"), run("b", "w1")], True),
        ([run("a", "w0", data="d0"), run("b", "w1", data="d1")], True),
        ([run("a", "w0"), run("b", "w0", checkpoint="w0")], False),  # before and after the digest was written
        ([run("a", "w0"), run("b", "w1", checkpoint="w1")], True),
        # one checkpoint, the labels of two data sets; another checkpoint under its path
        ([run("a", "w0", "pets", "c0", **ZERO), run("b", "w1", "cars", "c0", **ZERO)], False),
        ([run("a", "w0", "pets", "c0", **ZERO), run("b", "w1", "cars", "c1", **ZERO)], True),
        ([run("a", "w0", "pets", "c0", **ZERO), run("b", "w1", "pets", "c1", **ZERO)], True),
        ([run("a", "w0", "pets", "c0", **ZERO), run("b", "w1", "pets", "c0", **ZERO | {"prompts": ["{}"]})], False),
        # of before: nothing can be said where labels may differ
        ([run("a", "w0", "pets", **ZERO), run("b", "w1", "cars", **ZERO)], False),
        ([run("a", "w0", "pets", **ZERO), run("b", "w1", "pets", **ZERO)], True),
        ([run("a", "w0", "pets", **ZERO), run("b", "w1", "cars", "c0", **ZERO)], False),
        ([run("a", "w0", "pets", **ZERO), run("b", "w1", "pets", **ZERO | {"prompts": ["{}"]})], False),
        # other weights are asked for
        ([run("a", "w0"), run("b", "w1", random_init=True)], False),
        ([run("a", "w0"), run("b", "w1", dtype="bfloat16")], False),
        ([run("a", "w0"), run("b", "w1", head_path="head.safetensors")], False),
        ([run("a", "w0"), run("b", "w1", revision="abc")], False),
        # the same weights are
        ([run("a", "w0", random_init=True), run("b", "w1", random_init=True)], True),
        ([run("a", "w0", head_path="head.st"), run("b", "w1", head_path="head.st")], True),
        ([run("a", "w0", readout="cls"), run("b", "w1", readout="distillation")], True),
        ([run("a", "w0", "pets", readout="cls"), run("b", "w1", "cars", readout="cls")], True),
        ([run("a", "w0"), run("b", "w1", allow_bin=True)], True),
        ([run("a", "w0"), run("b", "w1", image_size=32, mean=[0.5] * 3, std=[0.5] * 3, crop_share=0.9)], True),
        ([run("a", "w0"), run("b", "w1", name="mine")], True),
    ],
)
def test_one_path_and_several_weights(runs, says):
    assert any("one path, several weights" in line for line in consistency_warnings(runs)) == says


def test_the_digest_of_a_checkpoint_does_not_depend_on_labels_and_sees_all_its_weights(tmp_path):
    save_family(tmp_path / "clip", "clip_zero_shot", ["cat", "dog", "car"], pixels=16, patch=8)
    checkpoint = ZeroShotCheckpoint(str(tmp_path / "clip"))
    pets, cars = (checkpoint.load(names) for names in (["cat", "dog"], ["car", "dog"]))
    assert pets.weights_digest != cars.weights_digest and pets.checkpoint_digest == cars.checkpoint_digest
    model = pets.model
    before = model.checkpoint_digest
    for name in ("vision_model", "similarity.projection", "text_digest"):
        other = copy.deepcopy(model)
        if name == "text_digest":
            other.text_digest = "0" * 16
        else:
            with torch.no_grad():
                next(other.get_submodule(name).parameters()).add_(1.0)
        assert other.checkpoint_digest != before, name


def test_the_text_tower_is_part_of_it(tmp_path):
    from transformers import CLIPModel

    save_family(tmp_path / "clip", "clip_zero_shot", ["cat", "dog"], pixels=16, patch=8)
    towers = CLIPModel.from_pretrained(tmp_path / "clip")
    first = ZeroShot(towers, torch.eye(2, towers.config.projection_dim), ["cat", "dog"])
    with torch.no_grad():
        towers.text_projection.weight.add_(1.0)
    again = ZeroShot(towers, torch.eye(2, towers.config.projection_dim), ["cat", "dog"])
    assert digest_of_weights(first) == digest_of_weights(again)
    assert first.checkpoint_digest != again.checkpoint_digest


def test_of_other_models_it_is_that_of_all_weights(made):
    model = Checkpoint(str(made / "vit")).load()
    assert model.checkpoint_digest == model.weights_digest == digest_of_weights(model.model)
