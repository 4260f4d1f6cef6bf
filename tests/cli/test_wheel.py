"""The wheel: its commands work in an empty folder, with the options and assets that it brings along.

A sweep is made there on the shipped model and data, where there is no key, network or terminal: ``logger.mode=auto`` is
offline then, at once, and nobody is asked. Its files and its W&B log are read.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from PIL import Image

RUNS = ["corruption=gray", "corruption=noise"]
OVERRIDES = ["corruption=gray,noise", "window=3", "data.limit=24", "batch_size=20", "trainer=cpu"]
OVERRIDES += ["sweep=demo"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which the wheel is installed; what it depends on is that of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    subprocess.run([*pip, "wheel", "--no-deps", *here, "--wheel-dir", folder, ROOT], check=True, timeout=300)
    (wheel,) = folder.glob("vitpatch-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, timeout=300)
    return folder / "site"


@pytest.fixture(scope="module")
def command(site, tmp_path_factory):
    """Runs a command of the wheel in a folder: exit code and what was printed."""
    home = tmp_path_factory.mktemp("home")
    there = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "VITPATCH"))}
    there |= {"HOME": str(home), "NETRC": str(home / "none"), "HF_HUB_OFFLINE": "1"}
    there["MPLCONFIGDIR"] = matplotlib.get_configdir()  # where it knows the fonts, which are long to find

    def call(name, *arguments, folder):
        program = [site / "bin" / name] if name.startswith("vitpatch") else [sys.executable, "-c", name]
        environment = there | {"PYTHONPATH": str(site)}
        silent = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
        done = subprocess.run([*program, *arguments], cwd=folder, env=environment, **silent)
        return done.returncode, done.stdout + done.stderr

    return call


@pytest.fixture(scope="module")
def sweep(command, tmp_path_factory):
    """The folder of a finished sweep that was started in an empty folder, and what was printed."""
    here = tmp_path_factory.mktemp("empty")
    code, printed = command("vitpatch", "-m", *OVERRIDES, folder=here)
    assert code == 0, printed[-4000:]
    assert [path.name for path in here.iterdir()] == ["multirun"]
    return here / "multirun" / "demo", printed


def test_the_package_is_the_wheels(command, site, tmp_path):
    code, printed = command(
        "import vitpatch, vitpatch.runs.config as c; print(vitpatch.__file__, c.CONF)", folder=tmp_path
    )
    assert (code, printed.split()) == (0, [str(site / "vitpatch" / name) for name in ("__init__.py", "conf")])


def test_options_are_those_of_the_wheel(sweep, site):
    folder, _ = sweep
    for run in RUNS:
        sources = yaml.safe_load((folder / run / ".hydra" / "hydra.yaml").read_text())["hydra"]["runtime"][
            "config_sources"
        ]
        assert str(site / "vitpatch" / "conf") in [source["path"] for source in sources]
    assert json.loads((folder / "sweep.json").read_text())["command"] == " ".join(["vitpatch", "-m", *OVERRIDES])


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
    assert "2 of 2 runs finished in multirun" in printed and "Traceback" not in printed
    assert printed.count("wandb sync ") == 3 and printed.count("  total effect  ") == 2
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
        assert set(pd.read_csv(folder / run / "summary.csv")["window"]) == {3}
    assert (examples[RUNS[0]].prob_corrupt != examples[RUNS[1]].prob_corrupt).any()


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
    told = [row["run"] for row in rows if row["type"] == "run"]  # once at the start, once more with what was found
    assert {(row["project"], row["run_group"], row["job_type"]) for row in told} == {("vitpatch", "demo", "patch")}
    assert {row["display_name"] for row in told} == {run} and len({row["run_id"] for row in told}) == 1
    assert told[-1]["notes"].startswith("\n".join(manifest["finding"]))
    assert manifest["next"] and all(command in told[-1]["notes"] for command in manifest["next"])
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
    assert "comparison: multirun/demo/comparison/index.html" in printed
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


@pytest.mark.parametrize(("name", "entry"), [("vitpatch", "patch"), ("vitpatch-train", "train_eval")])
def test_a_command_has_the_options_of_the_checkout(command, name, entry, tmp_path):
    here = subprocess.run([sys.executable, f"{entry}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert here.returncode == 0 and command(name, "--help", folder=tmp_path) == (0, here.stdout)
    assert here.stdout.startswith(f"{entry} is powered by Hydra")


@pytest.mark.long
def test_the_gallery_finds_its_options_and_images(command, tmp_path):
    code, printed = command("vitpatch-gallery", "sheet.png", folder=tmp_path)
    assert (code, printed) == (0, "sheet.png\n") and (tmp_path / "sheet.png").stat().st_size > 50_000


HELP = """
import sys
from importlib.metadata import distribution
for entry in distribution("vitpatch").entry_points:
    if entry.name not in ("vitpatch", "vitpatch-train"):
        print(entry.name)
        sys.argv = [entry.name, "--help"]
        try:
            entry.load()()
        except SystemExit as error:
            assert not error.code
"""


def test_every_command_has_help(command, site, tmp_path):
    code, printed = command(HELP, folder=tmp_path)
    assert code == 0, printed
    for name in ("compare", "gallery", "convert", "workspace"):
        assert (site / "bin" / f"vitpatch-{name}").exists()
        assert f"vitpatch-{name}\nusage: vitpatch-{name} " in printed, printed
