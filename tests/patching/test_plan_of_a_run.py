"""What a run says of its plan before it goes on: cost, memory, precision; and windows, heads, tokens in its files."""

import json
import logging
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEPTH, ROOT, pictures, write_parquet
from PIL import Image

from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.patching.cost import LIBRARIES, estimate_cost
from vitpatch.patching.plan import make_plan
from vitpatch.types import Direction, Site, Target


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def effects_of(folder):
    return pd.read_parquet(folder / "effects.parquet")


def test_one_line_says_what_the_plan_costs(patched, caplog):
    with caplog.at_level(logging.INFO):
        folder = patched("window=[1,3]")
    lines = [line for line in caplog.messages if line.startswith("plan: ")]
    assert len(lines) == 1
    numbers = re.match(
        r"plan: 8 patches by (\d+) block evaluations an image \(40 by full forwards\), "
        r"[\d.]+ MFLOP an image \((\d+)% of full forwards\), up to [\d.e-]+ GB \(5 images at once\), "
        r"about [\d.]+ s for 13 images \(first 5 images in [\d.]+ s\)",
        lines[0],
    )
    assert numbers and int(numbers[1]) < 40 and int(numbers[2]) < 60, lines
    assert manifest_of(folder)["plan"] == {"line": lines[0].removeprefix("plan: "), "stepwise": True}


def test_a_dry_run_says_its_line_and_touches_nothing(patched, tmp_path, caplog):
    folder = patched("window=1")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with caplog.at_level(logging.INFO):
        patched("window=2", "dry_run=true", folder="dry")
    assert "plan: 4 patches" in caplog.text and "for 13 images (first image in " in caplog.text
    assert [p.name for p in (tmp_path / "dry").rglob("*") if p.is_file()] == ["start.json"]
    with pytest.raises(VitPatchError, match=r"other window \(\[1\] there, \[2\] here\)"):
        patched("window=2")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    caplog.clear()
    with caplog.at_level(logging.INFO):
        patched("window=1", "dry_run=true")  # finished before, and still planned
    assert "plan: 4 patches" in caplog.text
    now = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if ".hydra" not in path.parts}
    assert {p for p, t in now.items() if p != folder and before.get(p) != t} == set()


def test_a_dry_sweep_is_no_failure(cli, made, tmp_path):
    model = ["model=hf", f"model.path={made / 'vit'}", "data=parquet", f"data.path={made / 'images.parquet'}"]
    arguments = ["-m", *model, "trainer=cpu", "logger=none", f"hydra.sweep.dir={tmp_path}", "window=1,2"]
    code, printed = cli(*arguments, "dry_run=true")
    assert code == 0 and "0 of 2 runs finished" in printed and "(2 only planned, dry_run=true)" in printed
    code, printed = cli(*arguments)
    assert code == 0 and "2 of 2 runs finished" in printed


def test_a_tiny_budget_changes_no_number_and_too_little_is_one_line(patched, made, caplog):
    model = Checkpoint(str(made / "vit")).load()
    cost = estimate_cost(make_plan(Target(Site.ATTN_OUT), (3,), Direction.DENOISE, model.sizes), model)
    least = (LIBRARIES + 5 * cost.batch_bytes + cost.image_bytes + cost.row_bytes) / 1e9
    wide = effects_of(patched("memory_gb=1", folder="wide"))
    with caplog.at_level(logging.INFO):
        tight = effects_of(patched(f"memory_gb={least + 1e-6}", folder="tight"))
    assert "(1 image at once)" in caplog.text
    assert tight["effect"].to_numpy() == pytest.approx(wide["effect"].to_numpy(), abs=1e-6)
    with pytest.raises(VitPatchError, match=r"memory_gb 0.0\d+: one image of this plan and 5 that wait need 0.\d+ GB"):
        patched(f"memory_gb={least - 1e-6}", folder="less")
    for wrong in ("0", "-1", "much", "true"):
        with pytest.raises(VitPatchError, match=r"memory_gb .*expected a number above 0, or null"):
            patched(f"memory_gb={wrong}", folder="wrong")


@pytest.mark.parametrize(
    ("override", "worst"),
    [("trainer.precision=bf16-mixed", 0.2), ("model.dtype=bfloat16", 0.4), ("matmul_precision=medium", 0.2)],
)
def test_reduced_precision_measures_its_own_error(patched, caplog, override, worst):
    with caplog.at_level(logging.INFO):
        folder = patched(override, folder="reduced")
    exact, reduced = effects_of(patched(folder="exact")), effects_of(folder)
    error = manifest_of(folder)["precision_error"]
    first = np.abs(exact["effect"] - reduced["effect"])[exact.example_id < 5]  # the first batch
    assert error["images"] == 5 and error["largest"] == pytest.approx(first.max(), abs=2e-6)
    assert error["mean"] == pytest.approx(first.mean(), abs=2e-6) and error["largest"] < worst
    assert "differ from float32 by" in caplog.text
    if "medium" not in override:  # which a CPU may round like float32
        assert error["largest"] > 1e-5
    assert manifest_of(folder.parent / "exact")["precision_error"] is None
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("trainer.precision=64",), "trainer.precision 64: expected one of 32"),
        (("trainer.precision=bf16-true",), r"weights below float32: model.dtype"),
        (("trainer.precision=bf16-mixed", "model.dtype=bfloat16"), "below float32 already"),
        (("trainer.precision=16-mixed",), "16-mixed: a CPU has none"),
        (("target=z", "window=3"), "a head has no identity across layers"),
        (("target=z", "target.heads=[7]"), "target.heads 7: the model has 4 heads"),
        (("target.heads=all",), "of attn_out expected null"),
        (("target=q", "target.heads=null"), "of q expected all, joint"),
        (("target.tokens=registers",), "target.tokens registers: the model has none"),
        (("target.tokens=object",), "data have no object masks; name their column with data.mask_column"),
        (("target.tokens=grid",), "target.grid="),
        (("target.tokens=grid", "target.grid=[3,3]"), r"target.grid \[3, 3\]: does not divide the model's 4 × 4"),
    ],
)
def test_what_does_not_fit_is_one_line(patched, overrides, says):
    with pytest.raises(VitPatchError, match=says) as error:
        patched(*overrides)
    assert "\n" not in str(error.value)


def test_windows_of_one_run_are_those_of_three(patched):
    together = effects_of(patched("window=[1,3,suffix]", folder="together"))
    assert together["window"].unique().tolist() == [1, 3, -2]
    for window, word in ((1, "1"), (3, "3"), (-2, "suffix")):
        alone = effects_of(patched(f"window={word}", folder=word))
        rows = together[together["window"] == window].reset_index(drop=True)
        assert (rows[["example_id", "layer", "first_layer", "last_layer"]].equals(
            alone[["example_id", "layer", "first_layer", "last_layer"]]))  # fmt: skip
        assert rows["effect"].to_numpy() == pytest.approx(alone["effect"].to_numpy(), abs=1e-6)


def test_prefix_and_suffix_are_told_apart_by_window(patched):
    folder = patched("window=[prefix,suffix]")
    effects = effects_of(folder).drop_duplicates(["window", "layer"]).set_index(["window", "layer"])
    assert effects.loc[-1, "first_layer"].tolist() == [0] * DEPTH
    assert effects.loc[-1, "last_layer"].tolist() == effects.loc[-2, "first_layer"].tolist() == list(range(DEPTH))
    summary = pd.read_csv(folder / "summary.csv")
    assert len(summary) == 2 * DEPTH and manifest_of(folder)["peak"]["window"] in (-1, -2)


def test_heads_have_rows_and_a_default_window_of_one(patched):
    effects = effects_of(patched("target=v", "target.heads=[2,0]"))
    assert set(effects["window"]) == {1} and effects["head"].tolist()[:4] == [2, 0, 2, 0]
    joint = effects_of(patched("target=v", "target.heads=joint", folder="joint"))
    assert set(joint["window"]) == {3} and set(joint["head"]) == {-1}


def test_object_and_its_control_come_from_the_datas_mask(patched, tmp_path):
    shapes = np.zeros((4, 32, 32), dtype=np.uint8)
    shapes[0, :16, :16] = shapes[1, :, 16:] = 255  # 4 and 8 of 16 patches; image 2 none; image 3 all
    shapes[3] = 255
    masks = [Image.fromarray(shape) for shape in shapes]
    path = write_parquet(tmp_path / "masked.parquet", pictures(4), [0, 1, 2, 3], mask=masks)
    tokens = "target.tokens=[object,background,random_object,each]"
    folder = patched(f"data.path={path}", "data.mask_column=mask", tokens, "window=1")
    effects = effects_of(folder)
    once = effects.drop_duplicates(["example_id", "tokens"])
    number = once.pivot(index="example_id", columns="tokens", values="n_tokens")
    assert number["object"].tolist() == number["random_object"].tolist() == [4, 8, 0, 16]
    assert number["background"].tolist() == [12, 8, 16, 0] and set(number["each:cls"]) == {1}
    empty = effects[effects["n_tokens"] == 0]
    assert (empty["effect"].abs() < 1e-6).all() and empty["delta_norm"].isna().all()
    notes = manifest_of(folder)["notes"]
    assert "a token group has no token: 2" in notes[0]
    overlap = pd.read_parquet(folder / "examples.parquet")["random_object_overlap"].to_numpy()
    in_corner = [np.random.default_rng([0, 0, 1]).permutation(16)[:4].tolist()]  # the draw of image 0
    drawn = np.isin(in_corner, [0, 1, 4, 5]).mean()
    assert overlap[[0, 3]].tolist() == [drawn, 1] and 0 <= overlap[1] <= 1 and np.isnan(overlap[2])
    mean = np.nanmean(overlap)
    assert f"of random_object's patches {mean:.0%} are the object's, on average" in notes[1]
    assert ("warning" in notes[1]) == (mean > 0.5)


def test_a_model_that_can_only_be_run_whole_says_so(patched, made, caplog):
    caplog.set_level(logging.INFO)
    model = Checkpoint(str(made / "vit")).load()
    wanted = effects_of(patched(folder="parts"))
    model.stepwise = False
    try:
        folder = patched(folder="whole")
    finally:
        model.stepwise = True
    assert "every patch is a full forward pass" in caplog.text and "by 24 block evaluations" in caplog.text
    assert manifest_of(folder)["plan"]["stepwise"] is False
    effects = effects_of(folder)
    assert effects["effect"].to_numpy() == pytest.approx(wanted["effect"].to_numpy(), abs=1e-5)
    assert effects["direct_log_odds"].isna().all()
    assert pd.read_csv(folder / "summary.csv")["direct_log_odds"].isna().all()
    assert not (folder / "figures" / "direct.png").exists()


def test_the_readmes_python_runs(monkeypatch, capsys):
    text = (ROOT / "README.md").read_text().partition("The shortest way:\n\n")[2].partition("\n\n`corrupt` takes")[0]
    code = "\n".join(line[4:] for line in text.splitlines())
    assert code.count("\n") <= 11
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("attn_out · window 3 · clean into corrupted\n  Under the corruption ")
    table = printed.partition("\n\n")[2].partition("\nIntervals ")[0]
    assert "recovered" in table and len(table.splitlines()) == 13
