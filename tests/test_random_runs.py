"""Configs drawn at random, each through the whole run: what is not refused before any image ends with its pictures."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from drawn import NO_NUMBER, cut_off, problems_of
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from random_configs import make_inputs, random_overrides

from vitpatch import examples, run, store
from vitpatch.compare import compare
from vitpatch.config import register_resolvers
from vitpatch.patching import Patching
from vitpatch.profiles import STRETCH
from vitpatch.spec import VitPatchError
from vitpatch.store import RunFolder

ALWAYS = {"layer_profile", "heatmap", "classes", "examples_random"}
"""Pictures of every run."""
OF_SUITE, OF_LONG = 20, 220


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def base() -> DictConfig:
    """What all runs have in common, composed once: composing takes longer than a tiny run."""
    register_resolvers()
    common = ["model=hf", "data=parquet", "trainer=cpu", "logger=none", "batch_size=5", "train_split=null"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("patch", overrides=common)


def with_overrides(base: DictConfig, overrides: list[str]) -> DictConfig:
    """``base`` with overrides as Hydra would have them: of a group, or of a key."""
    cfg = base.copy()
    for key, _, value in (override.partition("=") for override in overrides):
        option = ROOT / "conf" / key / f"{value}.yaml"
        value = OmegaConf.load(option) if option.exists() else yaml.safe_load(value)
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


class Seen:
    """What a run does: the images it computes, and its figures as they are saved."""

    def __init__(self) -> None:
        self.images = 0
        self.problems: dict[str, list[str]] = {}
        self.limits: list[tuple[float, float]] = []
        """Of the y axes of the layer profile."""


@pytest.fixture
def seen(monkeypatch, request):
    """Small figures, to be quick; laid out, which takes longest, only in ``make test-long``."""
    found, save, part = Seen(), RunFolder._save, Patching.part
    is_long = request.node.get_closest_marker("long") is not None

    def saved(folder, figure, name):
        if not is_long:
            figure.set_layout_engine("none")
        path = save(folder, figure, name)
        found.problems[name] = problems_of(figure, name) + (cut_off(figure) if is_long else [])
        if name == "layer_profile":
            found.limits = [axes.get_ylim() for axes in figure.axes]
        return path

    def computed(patching, images, *rest):
        found.images += len(images)
        return part(patching, images, *rest)

    monkeypatch.setattr(RunFolder, "_save", saved)
    monkeypatch.setattr(Patching, "part", computed)
    monkeypatch.setattr(store, "DPI", 30)
    monkeypatch.setattr(examples, "IMAGES_A_PAGE", 2)
    return found


def make_run(cfg: DictConfig, folder: Path, seen: Seen) -> bool:
    """Makes a run and looks at what it leaves; ``False`` where it was refused."""
    try:
        run.run(cfg, folder)
    except VitPatchError as error:
        assert "\n" not in str(error)
        includes_none = str(error).startswith("include ") and "none of" in str(error)
        assert not seen.images or includes_none, f"refused after {seen.images} images: {error}"
        return False
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["included"] > 0 and not any(map(NO_NUMBER.search, manifest["notes"]))
    assert set(seen.problems) >= ALWAYS
    assert not any(seen.problems.values()), {name: what for name, what in seen.problems.items() if what}
    check_scale(pd.read_csv(folder / "summary.csv"), manifest, seen.limits)
    for file in (folder / "figures").iterdir():
        with Image.open(file) as image:
            assert np.asarray(image.convert("L")).std() > 5, file.name
    return True


def check_scale(summary: pd.DataFrame, manifest: dict, limits: list[tuple[float, float]]) -> None:
    """Effects are on their own scale, and each control is whole on some axis."""
    controls = [f"effect_{donor}" for donor in manifest["donors"][1:]]
    own = [name for name in summary if name.startswith(("effect", "effect_sim")) and not name.startswith("effect_macro")]
    own = [name for name in own if name != "effect_se" and not name.startswith(tuple(controls) or ("-",))]
    total = [manifest["total_effect"][name] or np.nan for name in ("mean", "low", "high")]
    reach = np.ptp([x for x in (0, *summary[own].to_numpy().flat, *total) if np.isfinite(x)])
    together = summary.attrs.get("together", 0)
    low, high = limits[0]
    assert high - low <= max(1.2 * STRETCH * (reach + abs(together)), 0.2), (limits, reach)
    for name in controls:
        ends = summary[name].min(), summary[name].max()
        assert np.isnan(ends[0]) or any(low <= ends[0] and ends[1] <= high for low, high in limits), (name, ends)


def seeds(of_long: int, of_suite: int):
    return [seed if seed < of_suite else pytest.param(seed, marks=pytest.mark.long) for seed in range(of_long)]


@pytest.mark.parametrize("seed", seeds(OF_LONG, OF_SUITE))
def test_a_run_ends_with_its_pictures_or_is_refused_at_once(inputs, base, seen, tmp_path, caplog, seed):
    overrides = random_overrides(seed, inputs)
    try:
        with caplog.at_level(logging.INFO):
            make_run(with_overrides(base, overrides), tmp_path / "run", seen)
        assert not (said := [line for line in caplog.messages if NO_NUMBER.search(line)]), said
    except Exception as error:
        error.add_note(f"the run was: {' '.join(overrides)}")
        raise
