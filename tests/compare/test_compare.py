"""``python -m vitpatch.compare``: what it writes and where, what it says, and what cannot be compared."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import DEPTH, ROOT, save_model
from hand_made import NOISE, rows, save_run
from scipy.stats import spearmanr

from vitpatch.cli.compare import main
from vitpatch.compare.compare import compare
from vitpatch.plots import run_figures
from vitpatch.runs.calibration import Calibration, grid, read_wanted_damage
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.reading import FinishedRun
from vitpatch.types import Estimate

TABLES = ("overview", "profiles", "differences", "not_subtracted", "settings", "rank_correlation", "matched")


@pytest.fixture
def call(capsys):
    def make(*arguments):
        try:
            main([str(a) for a in arguments])
            code = 0
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return make


ONLY_TABLES = pytest.mark.usefixtures("tables_only")
"""Of tests that look at nothing but tables and what is printed."""


@pytest.fixture(autouse=True)
def nothing_drawn(monkeypatch):
    """Charts are composed and their files written, but not drawn, which takes longest: ``test_page`` looks at them."""
    monkeypatch.setattr("vl_convert.vegalite_to_svg", lambda *arguments, **options: "<svg/>")
    monkeypatch.setattr("vl_convert.vegalite_to_png", lambda *arguments, **options: b"")


@pytest.fixture
def finished(patched):
    return patched("window=2", "data.limit=4", kept=1)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_one_run_alone_is_compared_in_its_own_folder(finished, call):
    code, said = call(finished)
    assert code == 0 and said.splitlines()[-1].startswith(f"{finished / 'comparison'}: ")
    tables = {name: pd.read_csv(finished / "comparison" / f"{name}.csv") for name in TABLES}
    row, manifest = tables["overview"].iloc[0], json.loads((finished / "manifest.json").read_text())
    assert (row["run"], row["folder"], row["group"]) == ("run", "..", "run")
    assert row["peak_layer"] == manifest["peak_layer"] and row["peak_effect"] == manifest["peak_effect"]
    assert row["total_effect_low"] == manifest["total_effect"]["low"] and row["n"] == 4
    summary = pd.read_csv(finished / "summary.csv")
    assert row["peak_p"] == summary["p"][manifest["peak_layer"]]
    assert tables["profiles"][list(summary)].equals(summary)
    assert list(tables["profiles"]["relative_depth"]) == [(layer + 0.5) / DEPTH for layer in range(DEPTH)]
    examples = pd.read_parquet(finished / "examples.parquet")
    assert row["accuracy_corrupt"] == (examples["pred_corrupt"] == examples["label"]).mean()
    assert row["prob_clean"] == pytest.approx(examples["prob_clean"].mean())
    assert not any(len(tables[name]) for name in ("differences", "not_subtracted", "settings", "matched"))
    again = call(finished)
    assert again == (code, said)  # what is in comparison/ is no run


@ONLY_TABLES
def test_runs_of_heads_windows_tokens_and_controls_are_rows(patched):
    """And the two are put under one another, though one has columns that the other has not."""
    folder = patched("target=z", "target.heads=[1,2]", "data.limit=6", "controls=true", folder="x/heads")
    patched("window=[1,3]", "target.tokens=[cls,patches]", "data.limit=6", folder="x/several")
    comparison = compare([folder.parent]).comparison
    for row, series in zip(comparison.overview.to_dict("records"), ("h{head}", "w{window}-{tokens}"), strict=True):
        manifest = json.loads((folder.parent / row["run"] / "manifest.json").read_text())
        peak = manifest["peak"]
        assert row["peak_place"] == f"layer {peak['layer']}, {series.format(**peak)}"
        assert row["peak_effect"] == manifest["peak_effect"] and row["donor"] == "pair"
    assert list(comparison.overview["heads"]) == ["1, 2", ""] and list(comparison.overview["windows"]) == ["1", "1, 3"]
    series = {"h1", "h2", "w1-cls", "w1-patches", "w3-cls", "w3-patches"}
    assert set(comparison.profiles["series"]) == series and len(comparison.profiles) == 6 * DEPTH
    said = "no patch in common: sites z and attn_out, tokens all and cls, patches"
    assert comparison.not_subtracted["reason"].item().startswith(said)


@ONLY_TABLES
def test_models_of_two_depths_meet_by_relative_depth(patched, tmp_path):
    save_model(tmp_path / "deep", "vit", num_hidden_layers=7)
    patched("window=1", "controls=false", folder="sweep/shallow")
    patched("window=1", "controls=false", f"model.path={tmp_path / 'deep'}", folder="sweep/deep")
    comparison = compare([tmp_path / "sweep"]).comparison
    said = comparison.not_subtracted["reason"].item()
    assert said == "the models have 7 and 4 layers: compare them by relative depth" and not comparison.warnings
    deep, shallow = (comparison.profiles[comparison.profiles["run"] == name] for name in ("deep", "shallow"))
    between = np.interp(shallow["relative_depth"], deep["relative_depth"], deep["effect"])
    signs = np.sign(comparison.overview.set_index("run")["total_effect"])
    expected = spearmanr(between * signs["deep"], shallow["effect"] * signs["shallow"]).statistic
    assert comparison.rank_correlation.loc["deep", "shallow"] == pytest.approx(expected)
    assert comparison.rank_correlation.loc["deep", "deep"] == 1


@ONLY_TABLES
def test_accuracy_and_probability_are_of_the_included_images(tmp_path, rng):
    total = [0.5, 0.25, 0.5, 0.75]
    folder = save_run(tmp_path / "x", rng.random((4, 3)), total=total, included=[True, False, False, True])
    examples = pd.read_parquet(folder / "examples.parquet")
    examples.assign(pred_clean=[0, 1, 1, 1]).to_parquet(folder / "examples.parquet")
    row = compare([folder]).comparison.overview.iloc[0]
    assert row["prob_clean"] == 0.25 + 0.625 and row["accuracy_clean"] == 0.5 and row["n"] == 2


@ONLY_TABLES
def test_ranks_are_of_the_series_of_the_peak_towards_the_total_effect(tmp_path, rng):
    two = pd.concat([rows(range(4), tokens=tokens) for tokens in ("cls", "patches")], ignore_index=True)
    effects = [0.1, 0.2, 0.3, 0.25, 0.5, 0.9, 0.7, 0.6]
    save_run(tmp_path / "x" / "groups", np.tile(effects, (5, 1)), patches=two)
    save_run(tmp_path / "x" / "down", np.tile([-0.1, -0.4, -0.3, -0.2], (5, 1)), total=np.full(5, -0.5))
    save_run(tmp_path / "x" / "few", np.tile([0.1, 0.2], (5, 1)))
    save_run(tmp_path / "x" / "flat", np.full((5, 4), 0.25))
    table = compare([tmp_path / "x"]).comparison.rank_correlation
    assert table.loc["groups", "down"] == 1 and table.loc["down", "groups"] == 1
    assert table["few"].isna().all() and table["flat"].isna().all() and list(table.index) == list(table.columns)


def test_a_run_without_a_peak_is_a_row(tmp_path, rng, call):
    folder = save_run(tmp_path / "x" / "none", rng.random((4, 3)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"peak": dict.fromkeys(manifest["peak"]), "total_effect": dict.fromkeys(manifest["total_effect"])}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    save_run(tmp_path / "x" / "some", rng.random((4, 3)), metric="log_odds")
    code, said = call(tmp_path / "x")
    assert code == 0 and said.splitlines()[1] == "none  none", said
    row = pd.read_csv(tmp_path / "x" / "comparison" / "overview.csv").iloc[0]
    assert row[["total_effect", "peak_layer", "peak_effect", "peak_p"]].isna().all()


@ONLY_TABLES
def test_several_folders_are_compared_here_and_named_apart(tmp_path, rng, call, monkeypatch):
    for at in ("one/x", "two/x", "deeper/one/x"):
        save_run(tmp_path / at, rng.random((4, 3)), weights=at)
    monkeypatch.chdir(tmp_path)
    code, said = call("one", tmp_path / "two", "deeper/one", tmp_path / "one/x")
    assert code == 0 and said.splitlines()[-1].startswith("comparison: ")
    table = pd.read_csv(tmp_path / "comparison" / "overview.csv")
    assert list(table["run"]) == ["one (1)/x", "two/x", "one (2)/x"]
    assert list(table["folder"]) == ["../one/x", "../two/x", "../deeper/one/x"]


def test_a_run_called_as_a_column_is_compared(tmp_path, rng):
    for name in ("run", "key"):
        save_run(tmp_path / "x" / name, rng.random((4, 3)), seed=len(name), weights=name)
    tables = compare([tmp_path / "x"]).comparison.tables
    assert list(tables["rank_correlation"]) == ["run", "key", "run"] and next(iter(tables["settings"])) == "key"


@ONLY_TABLES
def test_a_strength_that_was_found_is_compared_as_one_that_was_given(tmp_path, rng):
    without = {"_target_": "vitpatch.corruptions.Noise", "clip": True}
    asked = read_wanted_damage("prob_drop:0.2")
    for name, std in (("a", 0.3), ("b", 0.2)):
        curve = dict.fromkeys([*grid(1.0), std], Estimate(0.201, 0.01, 0.18, 0.22))
        found = Calibration(asked, 0.2, "std", std, 1.0, curve, 100, 98, predicted=False)
        more = {"calibrate": "prob_drop:0.2", "matched": [], "weights": name, "path": name}
        save_run(tmp_path / "x" / name, rng.random((4, 3)), corruption=without, calibration=found, **more)
    save_run(tmp_path / "x" / "given", rng.random((4, 3)), corruption=without | {"std": 0.2})
    comparison = compare([tmp_path / "x"]).comparison
    assert list(comparison.overview["calibrated"]) == [
        *(f"prob_drop:0.2: std={s}, prob_drop 0.201" for s in (0.3, 0.2)),
        "",
    ]
    assert list(comparison.settings.loc["corruption.std"]) == ["0.3", "0.2", "0.2"]
    pairs = comparison.differences.groupby(["a", "b"])["quantity"].first().to_dict()
    assert pairs == {("a", "b"): "recovered", ("a", "given"): "recovered", ("b", "given"): "effect"}


@ONLY_TABLES
def test_settings_that_differ_are_a_row_each(tmp_path, rng):
    save_run(tmp_path / "x" / "a", rng.random((4, 3)), window=[1, -1], include="all")
    other = {"_target_": "vitpatch.corruptions.Noise", "std": 0.25, "clip": False}
    save_run(tmp_path / "x" / "b", rng.random((4, 3)), window=[3], corruption=other, path="other/model")
    table = compare([tmp_path / "x"]).comparison.settings
    assert table.T.to_dict("list") == {
        "model.path": ["some/vit", "other/model"],
        "window": ["1, prefix", "3"],
        "corruption._target_": ["vitpatch.corruptions.Gray", "vitpatch.corruptions.Noise"],
        "corruption.amount": ["1", ""],
        "corruption.std": ["", "0.25"],
        "corruption.clip": ["", "false"],
    }


@ONLY_TABLES
def test_what_should_be_one_and_is_not_is_said_at_the_top(tmp_path, rng, call):
    for name, more in {
        "a": {},
        "b": {"weights": "w1"},
        "c": {"weights": "w2", "path": "another/vit", "version": "0.2.0"},
        "d": {"numbers_version": 1},
        "e": {"data": {"limit": 2}},
    }.items():
        folder = save_run(tmp_path / "x" / name, rng.random((4, 3)), **more)
        if name in "de":  # other images; those of e were asked for
            file = folder / "manifest.json"
            file.write_text(file.read_text().replace('"data": "d0"', f'"data": "{name}1"'))
    code, said = call(tmp_path / "x")
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert code == 0 and said.startswith("warning: ")
    assert [line.removeprefix("warning: ") for line in warnings] == [
        "model vit: one path, several weights: w0 of a, d, e; w1 of b",
        "data data, split test: one path, several contents: d0 of a, b; d1 of d",
        "several numbers versions of vitpatch: 2 of a, b, c, e; 1 of d",
        "several versions of vitpatch: 0.1.0 of a, b, d, e; 0.2.0 of c",
    ]


@ONLY_TABLES
def test_a_broken_run_does_not_stop_the_others(tmp_path, rng, call):
    good = save_run(tmp_path / "x" / "good", rng.random((4, 3)))
    for name in ("identity", "config", "json", "summary", "effects", "examples", "pages", "peak", "missing"):
        folder = tmp_path / "x" / name
        shutil.copytree(good, folder)
        file = folder / "manifest.json"
        manifest = json.loads(file.read_text())
        if name == "identity":
            del manifest["identity"]
        elif name == "config":
            del manifest["config"]["interval"]
        elif name == "peak":
            manifest["peak"]["layer"] = 7
        file.write_text("{" if name == "json" else json.dumps(manifest))
        if name in ("effects", "examples", "pages"):
            (folder / f"{name}.parquet").write_bytes((good / "effects.parquet").read_bytes()[:60])
        elif name == "summary":
            (folder / "summary.csv").write_text("site,layer\n")
        elif name == "missing":
            (folder / "effects.parquet").unlink()
    (tmp_path / "x" / "train").mkdir()
    (tmp_path / "x" / "train" / "manifest.json").write_text('{"job": "train", "saved": "there"}')
    for inside in ("comparison", "good/wandb"):
        shutil.copytree(good, tmp_path / "x" / inside / "copy")
    code, said = call(tmp_path / "x")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 9 and all("another version, or a file is broken" in line for line in errors)
    assert list(pd.read_csv(tmp_path / "x" / "comparison" / "overview.csv")["run"]) == ["good"]


def test_runs_that_are_not_compared_are_named_at_the_top(tmp_path, rng, call):
    save_run(tmp_path / "x" / "good", rng.random((4, 3)))
    shutil.copytree(tmp_path / "x" / "good", tmp_path / "x" / "broken")
    (tmp_path / "x" / "broken" / "manifest.json").write_text("{")
    for name, job in (("failed", "patch"), ("killed", "patch"), ("training", "train_eval")):
        (tmp_path / "x" / name / ".hydra").mkdir(parents=True)
        (tmp_path / "x" / name / ".hydra" / "hydra.yaml").write_text(f"hydra: {{job: {{name: {job}}}}}")
    (tmp_path / "x" / "failed" / "failed.json").write_text('{"state": "failed", "reason": "window <b>9</b>"}')
    code, said = call(tmp_path / "x")
    page = (tmp_path / "x" / "comparison" / "index.html").read_text()
    (listed,) = re.findall(r"Not compared:</strong>\s*<ul>(.*?)</ul>", page, re.DOTALL)
    lines = re.findall("<li>(.*?)</li>", listed)
    assert lines[0].startswith("broken: of another version, or a file is broken")
    assert lines[1] == "failed: failed: window &lt;b&gt;9&lt;/b&gt;" and lines[2].startswith("killed: unfinished: ")
    assert (
        len(lines) == 3
        and str(tmp_path) not in listed
        and "left out: failed: failed: window <b>9</b>" in said.splitlines()
    )
    assert code == 1 and said.count("error: ") == 1


def test_what_is_left_out_of_several_folders_is_said_once(tmp_path, rng, call):
    """A folder that is a run's own, another that is above it, a start that was cut off, and one that is under way."""
    good = save_run(tmp_path / "x" / "good", rng.random((4, 3)))
    broken = tmp_path / "x" / "broken"
    shutil.copytree(good, broken)
    (broken / "manifest.json").write_text("{")
    for name in ("half", "failed", "running"):
        (tmp_path / "x" / name / ".hydra").mkdir(parents=True)
        (tmp_path / "x" / name / ".hydra" / "hydra.yaml").write_text("hydra: {job: {name: patch}}")
    (tmp_path / "x" / "half" / ".hydra" / "hydra.yaml").write_text("hydra: {job")
    (tmp_path / "x" / "failed" / "failed.json").write_text("[")
    with RunFolder(tmp_path / "x" / "running").locked():
        code, said = call(broken, tmp_path / "x", tmp_path / "x", "--output", tmp_path / "out")
    left = [line.removeprefix("left out: ") for line in said.splitlines() if line.startswith("left out: ")]
    assert len(left) == 2 and left[0].startswith("x (1)/failed: failed: its files cannot be read (")
    assert left[1].startswith("x (1)/running: running: process ") and code == 1 and said.count("error: ") == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<li>broken: of another version") == 1 and page.count("<li>x (1)/") == 2


def test_figures_of_an_earlier_comparison_go(tmp_path, rng, call):
    for name in ("a", "b"):
        save_run(tmp_path / "x" / name, rng.random((4, 3)), weights=name)
    assert call(tmp_path / "x")[0] == 0
    place = tmp_path / "x" / "comparison"
    (place / "mine.png").write_bytes(b"")
    assert (place / "differences_effect.png").exists()
    shutil.rmtree(tmp_path / "x" / "b")
    code, said = call(tmp_path / "x")
    assert code == 0 and not list(place.glob("differences*.[ps]?g")) and (place / "mine.png").exists()
    assert "differences_effect" not in said


@ONLY_TABLES
def test_cautions(tmp_path, rng):
    """Images that a corruption's outcome chose are not as good as any; few clusters have too narrow an interval."""
    values, total = rng.random((30, 3)), rng.uniform(0.4, 0.6, 30)
    half = np.arange(30) < 15
    save_run(tmp_path / "x" / "all", values, total=total)
    save_run(tmp_path / "x" / "correct", values, total=total, include="clean_correct")
    save_run(tmp_path / "x" / "flipped", values, total=total, corruption=NOISE, include="flipped", included=half)
    save_run(tmp_path / "x" / "flipped-seed", values, total=total, corruption=NOISE, include="flipped", seed=1)
    comparison = compare([tmp_path / "x"]).comparison
    found = comparison.differences.groupby(["a", "b"])["caution"].agg(set)
    chosen = "the images are chosen by what the corruption does to them in flipped"
    assert found["all", "flipped"] == {f"{chosen}; the interval of 15 clusters is too narrow"}
    assert found["all", "flipped-seed"] == {f"{chosen}-seed"}
    assert found["flipped", "flipped-seed"] == {"the interval of 15 clusters is too narrow"}
    reasons = comparison.not_subtracted.set_index(["a", "b"])["reason"]
    assert reasons["all", "correct"] == "the same patches: on the images that both include the effects are equal"


@ONLY_TABLES
def test_effects_that_are_not_those_of_the_summary_are_said(tmp_path, rng):
    save_run(tmp_path / "x" / "a", rng.random((4, 3)))
    save_run(tmp_path / "x" / "b", rng.random((4, 3)), weights="w1", path="other")
    summary = tmp_path / "x" / "b" / "summary.csv"
    pd.read_csv(summary).iloc[::-1].to_csv(summary, index=False)
    reason = compare([tmp_path / "x"]).comparison.not_subtracted["reason"].item()
    assert "summary.csv and effects.parquet are not of the same patches" in reason


def test_without_runs_it_is_one_line(tmp_path, call):
    for where, why in ((tmp_path, "no finished run"), (tmp_path / "nowhere", "no such folder")):
        code, said = call(where)
        assert code == 1 and why in said and len(said.splitlines()) == 1 and not (where / "comparison").exists()


def test_help_and_the_import_take_nothing_heavy():
    call = "try: c.main(['--help'])\nexcept SystemExit: pass"
    code = f"import sys, vitpatch.cli.compare as c\n{call}\nprint(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert "--redraw" in said and not {"torch", "numpy", "pandas", "matplotlib"} & set(said.split())


# a run's own pictures


@pytest.fixture
def one_figure(monkeypatch):
    """Of a run's pictures the layer profile only: ``test_finished_runs`` and ``test_pictures`` draw them all."""
    monkeypatch.setattr(run_figures, "_class_figures", lambda *everything: {})
    monkeypatch.setattr(run_figures, "_target_figures", lambda *everything: {})
    monkeypatch.setattr(FinishedRun, "pages", [])


@pytest.mark.usefixtures("one_figure")
def test_redrawn_runs_of_two_sweeps_keep_their_own_pictures(finished, call, tmp_path):
    for sweep in ("one", "two"):
        shutil.copytree(finished, tmp_path / sweep / "window=2")
    code, said = call("--redraw", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "out")
    assert code == 0 and len(said.splitlines()) == 2
    for sweep in ("one", "two"):
        assert (tmp_path / "out" / sweep / "window=2" / "figures" / "layer_profile.png").exists()
        assert not list((tmp_path / sweep / "window=2" / "figures").glob("*.png"))


@pytest.mark.usefixtures("one_figure")
def test_redrawn_without_an_output_a_run_gets_its_own_pictures_once(finished, call):
    code, said = call("--redraw", finished, finished.parent)
    assert code == 0 and len(said.splitlines()) == 1 and (finished / "figures" / "peak.png").exists()
    assert not (finished / "comparison").exists()


@pytest.mark.parametrize("broken", ["effects", "pages", "key", "nowhere", "unfinished"])
def test_what_cannot_be_redrawn_is_one_line(finished, call, broken):
    where = finished
    if broken == "key":
        manifest = json.loads((finished / "manifest.json").read_text())
        del manifest["config"]["interval"]
        (finished / "manifest.json").write_text(json.dumps(manifest))
    elif broken == "nowhere":
        where = finished / "nowhere"
    elif broken == "unfinished":
        (finished / "manifest.json").unlink()
    else:
        file = finished / f"{broken}.parquet"
        file.write_bytes(file.read_bytes()[:50])
    code, said = call("--redraw", where)
    assert code == 1 and said.startswith("error: ") and len(said.splitlines()) == 1, said


@pytest.mark.usefixtures("one_figure")
def test_a_run_that_cannot_be_redrawn_does_not_stop_the_others(finished, call, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(finished, tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "a" / "effects.parquet").write_bytes(b"PAR1")
    code, said = call("--redraw", tmp_path / "sweep")
    assert code == 1 and "error: " in said and (tmp_path / "sweep" / "b" / "figures" / "peak.png").exists()
