"""The wheel: its commands work in an empty folder, with the options and the assets that it brings along."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT


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


@pytest.fixture
def command(site, tmp_path):
    """Runs a command of the wheel in an empty folder: exit code and what was printed."""
    there = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "VITPATCH"))}

    def call(name, *arguments):
        program = [site / "bin" / name] if name.startswith("vitpatch") else [sys.executable, "-c", name]
        done = subprocess.run(
            [*program, *arguments], cwd=tmp_path, env=there | {"PYTHONPATH": str(site)}, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return call


def test_a_sweep_in_an_empty_folder(command, site, tmp_path):
    code, printed = command("import vitpatch, vitpatch.runs.config as c; print(vitpatch.__file__, c.CONF)")
    assert (code, printed.split()) == (0, [str(site / "vitpatch" / name) for name in ("__init__.py", "conf")])
    overrides = ["corruption=gray", "window=1,3", "data.limit=32", "logger=none"]
    code, printed = command("vitpatch", "-m", *overrides)
    assert code == 0 and "2 of 2 runs finished in multirun" in printed and "Traceback" not in printed, printed
    assert [path.name for path in tmp_path.iterdir()] == ["multirun"]
    (sweep,) = (tmp_path / "multirun").iterdir()
    for name in ("window=1", "window=3"):
        run = sweep / name
        assert {"manifest.json", "summary.csv", "patch.log"} <= {path.name for path in run.iterdir()}
        sources = yaml.safe_load((run / ".hydra" / "hydra.yaml").read_text())["hydra"]["runtime"]["config_sources"]
        assert str(site / "vitpatch" / "conf") in [source["path"] for source in sources]
    assert (sweep / "comparison" / "index.html").exists()
    assert json.loads((sweep / "sweep.json").read_text())["command"] == " ".join(["vitpatch", "-m", *overrides])


@pytest.mark.parametrize(("name", "entry"), [("vitpatch", "patch"), ("vitpatch-train", "train_eval")])
def test_a_command_has_the_options_of_the_checkout(command, name, entry):
    here = subprocess.run([sys.executable, f"{entry}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert here.returncode == 0 and command(name, "--help") == (0, here.stdout)
    assert here.stdout.startswith(f"{entry} is powered by Hydra")


@pytest.mark.long
def test_the_gallery_finds_its_options_and_images(command, tmp_path):
    code, printed = command("vitpatch-gallery", "sheet.png")
    assert (code, printed) == (0, "sheet.png\n") and (tmp_path / "sheet.png").stat().st_size > 50_000


@pytest.mark.parametrize("name", ["compare", "gallery", "convert", "workspace"])
def test_every_command_has_help(command, name):
    code, printed = command(f"vitpatch-{name}", "--help")
    assert code == 0 and printed.startswith(f"usage: vitpatch-{name} "), printed
