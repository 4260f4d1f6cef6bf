"""Configs drawn at random, each through the whole run: what is not refused before any image ends with its pictures."""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from composed import option
from conftest import ROOT
from drawn import NO_NUMBER, chart_problems, cut_off, problems_of, reaches_the_edge
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from random_configs import make_inputs, random_overrides

from vitpatch.cli.compare import summary_lines
from vitpatch.compare import compare as compare_module
from vitpatch.compare.charts import save_figure, spec_of
from vitpatch.compare.compare import compare
from vitpatch.compare.figures import make_figures
from vitpatch.compare.page import make_sections
from vitpatch.errors import VitPatchError
from vitpatch.plots.profile import STRETCH
from vitpatch.plots.style import MOST_LINES
from vitpatch.runs import batches, run
from vitpatch.runs.batches import BatchPatcher
from vitpatch.runs.config import register_resolvers
from vitpatch.runs.folder import RunFolder
from vitpatch.stats.result import series_names

OF_SUITE, OF_LONG, ONE_IN = 4, 220, 4
APART = (
    ("seed=2",),
    ("corruption=blur",),
    ("corruption=none",),
    ("data.limit=5",),
    ("include=min_total_effect:-1",),
    ("interval=bca", "test=log_odds"),
    ("metric=prob", "test=log_odds"),
)
"""What a run beside another differs from it in."""

FLAT = 1.1 * 0.1
"""How long matplotlib's axis of nothing but 0 is: from -0.05 to 0.05, and its margins."""


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
        is_option = (ROOT / "conf" / key / f"{value}.yaml").exists()
        value = option(key, value) if is_option else yaml.safe_load(value)
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


class Seen:
    """What a run does: the images it computes, and what is wrong with its figures, by the names of their files."""

    def __init__(self, is_long: bool) -> None:
        self.is_long, self.images = is_long, 0
        self.problems: dict[str, list[str]] = {}
        self.limits: list[tuple[float, float]] = []
        """Of the y axes of the layer profile."""


@pytest.fixture
def seen(monkeypatch, request):
    """Looks at all figures. Writing them takes longest: in the suite one in ``ONE_IN`` is, small and not laid out."""
    is_long = request.node.get_closest_marker("long") is not None
    found, save, part = Seen(is_long), RunFolder._save, BatchPatcher.part
    turn = request.node.callspec.params["seed"]

    def saved(folder, figure, name, kind, dpi):
        path = folder.figures / f"{name}.{kind}"
        if is_long or (turn + len(found.problems)) % ONE_IN == 0:
            if not is_long:
                figure.set_layout_engine("none")
            save(folder, figure, name, kind, 30)
        found.problems[name] = problems_of(figure, name) + (cut_off(figure) if is_long else [])
        if name == "layer_profile":
            found.limits = [axes.get_ylim() for axes in figure.axes]
        return path

    def computed(patching, images, *rest):
        found.images += len(images)
        return part(patching, images, *rest)

    monkeypatch.setattr(RunFolder, "_save", saved)
    monkeypatch.setattr(BatchPatcher, "part", computed)
    monkeypatch.setattr(batches, "IMAGES_A_PAGE", 2 if is_long else 1)
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
    summary = pd.read_csv(folder / "summary.csv")
    examples = pd.read_parquet(folder / "examples.parquet")
    assert set(seen.problems) == set(pictures_of(summary, examples, manifest))
    assert not any(seen.problems.values()), {name: what for name, what in seen.problems.items() if what}
    check_scale(folder, manifest, seen.limits)
    for file in (folder / "figures").iterdir():
        with Image.open(file) as image:
            assert np.asarray(image.convert("L")).std() > 5, file.name
    return True


def pictures_of(summary: pd.DataFrame, examples: pd.DataFrame, manifest: dict) -> Iterator[str]:
    """The pictures that a run of this summary has."""
    yield from ("layer_profile", "examples")
    groups, heads = set(summary["tokens"]), manifest["identity"]["target"]["heads"]
    several_windows = summary["window"].nunique() > 1
    is_handover = summary["site"].iloc[0].startswith("resid") and {"cls", "patches"} <= groups
    several_classes = examples.loc[examples["included"], "label"].nunique() > 1
    shares = summary[summary["window"] > 0].get("peak_share", pd.Series(dtype=float))
    least_direct = max(1e-6, 0.02 * summary["log_odds_effect"].abs().max())
    found = {
        "heatmap": several_classes,
        "peak": manifest["peak_layer"] is not None and ((shares > 0) & (shares < 1)).any() and not is_handover,
        "heads": heads not in (None, "joint") and len(groups) <= 4,
        "windows": several_windows and summary["head"].nunique() == 1 and len(groups) <= 4,
        "maps": any(re.search(r":\d+x\d+$", group) for group in groups),
        "direct": summary["direct_log_odds"].notna().all() and (summary["direct_log_odds"].abs() > least_direct).any(),
        "handover": is_handover and not several_windows and summary["recovered"].notna().all(),
    }
    yield from (name for name, is_there in found.items() if is_there)


def check_scale(folder: Path, manifest: dict, limits: list[tuple[float, float]]) -> None:
    """Effects are on their own scale, and each control is whole on some axis."""
    summary, examples = pd.read_csv(folder / "summary.csv"), pd.read_parquet(folder / "examples.parquet")
    own = summary.filter(regex="^effect(_sim)?(_low|_high|_unselected)?$").to_numpy().ravel()
    total = [manifest["total_effect"][name] for name in ("mean", "low", "high")]
    together = examples[examples["included"]].filter(regex="^effect_all_layers$").mean()
    ends = np.array([0, *own, *total, *together], dtype=float)
    low, high = limits[0]
    reach = np.ptp(ends[np.isfinite(ends)])
    widest = 1.2 * STRETCH * max(reach, 0.05) if reach else FLAT
    assert high - low <= widest + 1e-9, (limits, ends)
    series, is_joined = len(set(series_names(summary))), not (summary["head"] >= 0).any()
    is_joined &= not summary["tokens"].str.contains(r":\d+x\d+$").any()
    is_dots = series > (MOST_LINES if is_joined else 1)  # whose controls are said in the legend
    for donor in () if is_dots else manifest["donors"][1:]:
        control = summary[f"effect_{donor}"].dropna()
        assert any(control.between(*axis).all() for axis in limits), (donor, limits, control)


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


@pytest.fixture
def compared(monkeypatch, seen):
    """Compares the runs below a folder; what is wrong with the figures and the page."""
    found = {}

    def saved(figure, path, formats):
        found[path.name] = chart_problems(spec_of(figure))
        if seen.is_long:
            save_figure(figure, path, formats)
            found[path.name] += ["reaches its edge"] * reaches_the_edge(path.with_name(f"{path.name}.png"))

    monkeypatch.setattr(compare_module, "save_figure", saved)

    def make(folder):
        result = compare([folder])
        found["lines"] = [line for line in summary_lines(result) if NO_NUMBER.search(line)]
        for name, section in make_sections(result.comparison, make_figures(result.comparison)).items():
            charts = [chart for figure in section.figures for chart in figure.charts if chart]
            charts += [card.chart for album in section.albums for card in album.cards]
            found[name] = [problem for chart in charts for problem in chart_problems(chart.spec)]
        found["problems"] = list(result.problems)
        assert (folder / "comparison" / "index.html").stat().st_size > 10_000
        return {name: what for name, what in found.items() if what}

    return make


@pytest.mark.parametrize("seed", seeds(40, of_suite=0))
def test_runs_beside_each_other_end_in_a_page(inputs, base, seen, compared, tmp_path, monkeypatch, seed):
    """Two runs on the same images that differ in something, and one that differs in everything."""
    monkeypatch.setattr(run, "draw", lambda *everything: {})
    made, rng = {}, random.Random(seed)
    for number in itertools.count(100 * seed):
        overrides = random_overrides(number, inputs)
        if len(made) == 1:
            overrides = [*next(iter(made.values())), *rng.choice(APART)]
        try:
            run.run(with_overrides(base, overrides), tmp_path / f"run={number}")
        except VitPatchError:
            continue
        made[number] = overrides
        if len(made) == 3:
            break
    try:
        assert not (problems := compared(tmp_path)), problems
    except Exception as error:
        error.add_note("the runs were:\n" + "\n".join(map(" ".join, made.values())))
        raise
