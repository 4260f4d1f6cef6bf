"""A real ``-m`` sweep on the shipped model and data, its W&B log read back; and sweeps in which a run fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

RUNS = [f"corruption={c},window={w}" for c in ("gray", "noise") for w in (1, 3)]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder of a finished sweep of four runs, W&B offline, and what was printed."""
    folder = tmp_path_factory.mktemp("multirun") / "demo"
    command = [sys.executable, "patch.py", "-m", "corruption=gray,noise", "window=1,3", "data.limit=24"]
    command += ["trainer=cpu", "logger.mode=offline", "sweep=demo", f"hydra.sweep.dir={folder}", "batch_size=20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, done.stdout + done.stderr


def logged(run: Path) -> list[dict]:
    """W&B's own reading of what a run logged."""
    (log,) = (run / "wandb").glob("offline-run-*")
    wandb = [shutil.which("wandb", path=Path(sys.executable).parent) or "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(wandb, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_folder_a_run_by_what_is_swept(sweep):
    folder, printed = sweep
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["comparison", *RUNS]
    assert "4 of 4 runs finished" in printed and "Traceback" not in printed
    assert printed.count("wandb sync ") == 5 and printed.count("  total effect  ") == 4
    for run in RUNS:
        names = {path.name for path in (folder / run).iterdir()}
        assert names >= {
            ".hydra",
            "manifest.json",
            "examples.parquet",
            "effects.parquet",
            "summary.csv",
            "figures",
            "wandb",
        }
        assert names <= {*names, "patch.log"} - {"shards", "failed.json", "artifacts"}


def test_runs_share_images_and_differ_in_what_was_asked(sweep):
    folder, _ = sweep
    examples = {run: pd.read_parquet(folder / run / "examples.parquet") for run in RUNS}
    for run in RUNS:
        assert (examples[run].prob_clean == examples[RUNS[0]].prob_clean).all()
        assert set(pd.read_csv(folder / run / "summary.csv")["window"]) == {int(run[-1])}
    assert (examples[RUNS[0]].prob_corrupt == examples[RUNS[1]].prob_corrupt).all()
    assert (examples[RUNS[0]].prob_corrupt != examples[RUNS[2]].prob_corrupt).any()


@pytest.mark.parametrize("run", RUNS)
def test_what_wandb_logged_is_the_summary(sweep, run):
    folder, _ = sweep
    rows = logged(folder / run)
    summary = pd.read_csv(folder / run / "summary.csv").set_index("layer")
    items = [row["history"]["item"] for row in rows if row["type"] == "history"]
    history = {item["layer"]: item for item in items if "effect/mean" in item}
    assert set(history) == set(summary.index)
    for layer, values in history.items():
        for key, column in (
            ("mean", "effect"),
            ("low", "effect_low"),
            ("high", "effect_high"),
            ("recovered", "recovered"),
        ):
            if not np.isnan(summary.loc[layer, column]):
                assert values[f"effect/{key}"] == pytest.approx(summary.loc[layer, column], rel=1e-6), (layer, key)
    updates = {}
    for row in rows:
        if row["type"] == "summary":
            updates |= row["summary"]["update"]
    manifest = json.loads((folder / run / "manifest.json").read_text())
    examples = pd.read_parquet(folder / run / "examples.parquet")
    assert updates["total_effect"] == pytest.approx(manifest["total_effect"]["mean"])
    assert updates["peak_layer"] == manifest["peak_layer"]
    assert updates["peak_effect"] == pytest.approx(summary.loc[manifest["peak_layer"], "effect"])
    for base in ("clean", "corrupt"):
        assert updates[f"prob_{base}"] == pytest.approx(examples[f"prob_{base}"].mean())
        assert updates[f"accuracy_{base}"] == pytest.approx((examples[f"pred_{base}"] == examples.label).mean())
    (started,) = [row["run"] for row in rows if row["type"] == "run"]
    assert (started["project"], started["run_group"], started["job_type"]) == ("vitpatch", "demo", "patch")
    assert started["display_name"] == run
    metrics = {m.get("glob_name"): m.get("step_metric") for m in (r["metric"] for r in rows if r["type"] == "metric")}
    assert metrics["effect/*"] == "layer"
    artifacts = [row["artifact"] for row in rows if row["type"] == "artifact"]
    (kept,) = [artifact for artifact in artifacts if artifact["type"] == "effects"]
    contents = {entry["path"] for entry in kept["manifest"]["contents"]}
    assert contents == {"examples.parquet", "effects.parquet", "pages.parquet", "summary.csv", "manifest.json"}


def test_media_are_there_and_not_black(sweep):
    folder, _ = sweep
    for run in RUNS:
        found = {
            path.name.split("_")[0] for path in (folder / run).glob("wandb/offline-run-*/files/media/images/*.png")
        }
        assert found >= {"heatmap", "layer", "examples"}, found
        for path in [
            *(folder / run).glob("wandb/*/files/media/images/*.png"),
            *(folder / run / "figures").glob("*.png"),
        ]:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            assert pixels.mean() > 100 and pixels.std() > 20, path


def test_the_sweep_ends_in_its_comparison_here_and_in_wandb(sweep):
    folder, printed = sweep
    comparison = folder / "comparison"
    assert f"comparison: {comparison / 'index.html'}" in printed
    here = {path.name for path in comparison.iterdir() if path.is_file()}
    assert here >= {"index.html", "overview.csv", "differences.csv", "grid.png", "grid.svg", "heatmap.png"}
    rows = logged(comparison)
    (started,) = [row["run"] for row in rows if row["type"] == "run"]
    assert (started["run_group"], started["job_type"], started["display_name"]) == ("demo", "compare", "comparison")
    (kept,) = [row["artifact"] for row in rows if row["type"] == "artifact" and row["artifact"]["type"] == "comparison"]
    assert {entry["path"] for entry in kept["manifest"]["contents"]} == here
    keys = {key for row in rows if row["type"] == "history" for key in row["history"]["item"]}
    shown = {key.partition(".")[0] for key in keys}  # what is no number is logged in parts: figure/grid.path
    assert shown >= {"table/overview", "table/differences", "figure/grid", "figure/heatmap", "page"}


@pytest.fixture
def tiny(made, tmp_path):
    where = [f"model.path={made / 'vit'}", "data=parquet", f"data.path={made / 'images.parquet'}", "data.limit=4"]
    return ["-m", "model=hf", *where, "trainer=cpu", "logger=none", f"hydra.sweep.dir={tmp_path / 'sweep'}"]


def test_a_failing_run_does_not_stop_the_others_and_is_told_at_the_end(cli, tiny, tmp_path):
    code, printed = cli(*tiny, "window=1,9,2", "hydra.sweep.subdir=w${window}")
    assert code == 1
    states = {p.name: (p / "manifest.json").exists() for p in (tmp_path / "sweep").iterdir() if p.is_dir()}
    assert states == {"w1": True, "w9": False, "w2": True, "comparison": False}
    assert set(pd.read_csv(tmp_path / "sweep" / "comparison" / "overview.csv")["run"]) == {"w1", "w2"}
    said = [line for line in printed.splitlines() if line and "images/s" not in line]
    assert "2 of 3 runs finished" in said[-2], printed
    assert said[-1].startswith("failed: w9: window 9: the model has 4 layers"), printed


def test_an_old_failure_in_the_folder_is_not_this_sweeps(cli, tiny):
    assert cli(*tiny, "window=9,1", "hydra.sweep.subdir=w${window}")[0] == 1
    code, printed = cli(*tiny, "window=1,2", "hydra.sweep.subdir=w${window}")
    assert code == 0 and "2 of 2 runs finished" in printed and "finished before" in printed


def test_model_and_data_are_loaded_once_per_process(cli, tiny, monkeypatch):
    from vitpatch.data import sources
    from vitpatch.models import checkpoint

    sources._open.cache_clear(), checkpoint._load.cache_clear()
    assert cli(*tiny, "window=1,2,3")[0] == 0
    assert (sources._open.cache_info().misses, checkpoint._load.cache_info().misses) == (1, 1)


def test_no_key_no_network_no_terminal_never_asks(made, tmp_path):
    """``logger.mode=auto`` without anything: offline, at once, nobody asked."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment = keep | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "patch.py", "model=hf", f"model.path={made / 'vit'}", "data=parquet"]
    command += [f"data.path={made / 'images.parquet'}", "trainer=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert "wandb sync " in done.stdout and (tmp_path / "run" / "manifest.json").exists()
