"""Runs that earlier versions finished are still read: ``finished_runs/`` holds four, made before this version.

They were made on the shipped data and model, six images (``unlabelled``: four) and window 1: ``gray``, ``noise``,
``chain`` (gray, then blur) and ``unlabelled`` (gray, labels predicted). Their pictures are left out.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from vitpatch.cli.compare import main
from vitpatch.compare.compare import compare
from vitpatch.compare.load import find_runs
from vitpatch.compare.settings import run_settings
from vitpatch.runs.reading import load_run

RUNS = Path(__file__).parent / "finished_runs"


@pytest.fixture
def earlier(tmp_path):
    return shutil.copytree(RUNS, tmp_path / "earlier")


def test_they_are_compared(earlier, tables_only):
    found = compare([earlier])
    assert not found.problems and not found.comparison.left_out
    overview = pd.read_csv(earlier / "comparison" / "overview.csv").set_index("run")
    assert overview["corruption"].to_dict() == {
        "chain": "gray then blur (sigma=3)", "gray": "gray", "noise": "noise", "unlabelled": "gray",
    }  # fmt: skip


def test_their_pictures_are_drawn_again(earlier, capsys):
    main(["--redraw", str(earlier / "unlabelled")])
    assert (earlier / "unlabelled" / "figures" / "layer_profile.png").stat().st_size > 1e4


def test_a_class_of_this_package_is_the_same_wherever_it_stood(earlier):
    old = load_run(find_runs([earlier / "gray"])[0])
    manifest = json.loads(json.dumps(old.manifest).replace("vitpatch.corruptions.Gray", "vitpatch.another_place.Gray"))
    assert manifest != old.manifest
    (earlier / "noise" / "manifest.json").write_text(json.dumps(manifest))
    moved = load_run(find_runs([earlier / "noise"])[0])
    assert run_settings(old)["corruption"].value == run_settings(moved)["corruption"].value
