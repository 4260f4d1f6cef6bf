"""Configs drawn at random, each through the whole run: what is not refused before any image ends with its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from drawn import problems_of
from hydra import compose, initialize_config_dir
from PIL import Image
from random_configs import make_inputs, random_overrides

from vitpatch import examples, run, store
from vitpatch.compare import compare
from vitpatch.config import register_resolvers
from vitpatch.patching import Patching
from vitpatch.spec import VitPatchError
from vitpatch.store import RunFolder

ALWAYS = {"layer_profile", "heatmap", "classes", "examples_random"}
"""Pictures of every run."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def drawn(monkeypatch):
    """What is wrong with the figures that are saved, by the names of their files; they are small, to be quick."""
    found, save = {}, RunFolder._save

    def looked_at(folder, figure, name):
        path = save(folder, figure, name)
        found[name] = problems_of(figure)
        return path

    monkeypatch.setattr(RunFolder, "_save", looked_at)
    monkeypatch.setattr(store, "DPI", 30)
    monkeypatch.setattr(examples, "IMAGES_A_PAGE", 2)
    return found


@pytest.fixture
def computed(monkeypatch):
    """Grows by one with each batch of images that is computed."""
    batches, part = [], Patching.part

    def counted(self, images, *rest):
        batches.append(len(images))
        return part(self, images, *rest)

    monkeypatch.setattr(Patching, "part", counted)
    return batches


def composed(overrides):
    register_resolvers()
    rest = ["trainer=cpu", "logger=none", "batch_size=5", "train_split=null"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("patch", overrides=[*overrides, *rest])


def make_run(overrides: list[str], folder: Path, drawn: dict, computed: list) -> bool:
    """Makes a run and looks at what it leaves; ``False`` where it was refused."""
    try:
        run.run(composed(overrides), folder)
    except VitPatchError as error:
        assert "\n" not in str(error)
        is_empty = str(error).startswith("include ") and "none of" in str(error)
        assert not computed or is_empty, f"refused after {sum(computed)} images: {error}"
        return False
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["included"] > 0 and (folder / "summary.csv").exists()
    assert ALWAYS <= set(drawn) and not (wrong := {name: what for name, what in drawn.items() if what}), wrong
    for file in (folder / "figures").iterdir():
        with Image.open(file) as image:
            assert np.asarray(image.convert("L")).std() > 5, file.name
    return True


def seeds(number: int, of_suite: int):
    return [seed if seed < of_suite else pytest.param(seed, marks=pytest.mark.long) for seed in range(number)]


@pytest.mark.parametrize("seed", seeds(220, of_suite=20))
def test_a_run_ends_with_its_pictures_or_is_refused_at_once(inputs, drawn, computed, tmp_path, seed):
    overrides = random_overrides(seed, inputs)
    try:
        make_run(overrides, tmp_path / "run", drawn, computed)
    except Exception as error:
        error.add_note(f"the run was: {' '.join(overrides)}")
        raise
