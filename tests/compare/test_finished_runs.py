"""Runs that earlier versions finished are still read: ``finished_runs/`` holds four, made before this version.

They were made on the shipped data and model, six images (``unlabelled``: four) and window 1: ``gray``, ``noise``,
``chain`` (gray, then blur) and ``unlabelled`` (gray, labels predicted). Their pictures are left out.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from vitpatch.compare import compare

RUNS = Path(__file__).parent / "finished_runs"


@pytest.fixture
def earlier(tmp_path):
    return shutil.copytree(RUNS, tmp_path / "earlier")


def test_they_are_compared(earlier):
    found = compare.compare([earlier])
    assert not found.problems and not found.comparison.left_out
    overview = pd.read_csv(earlier / "comparison" / "overview.csv").set_index("run")
    assert overview["corruption"].to_dict() == {
        "chain": "gray then blur (sigma=3)", "gray": "gray", "noise": "noise", "unlabelled": "gray",
    }  # fmt: skip
    assert (earlier / "comparison" / "index.html").stat().st_size > 1e5


def test_their_pictures_are_drawn_again(earlier, capsys):
    compare.main(["--redraw", str(earlier / "unlabelled")])
    assert (earlier / "unlabelled" / "figures" / "layer_profile.png").stat().st_size > 1e4


def test_a_class_of_this_package_is_the_same_wherever_it_stood(earlier):

    from vitpatch.compare.load import found_below, read
    from vitpatch.compare.settings import aspects

    old = read(found_below([earlier / "gray"])[0])
    manifest = json.loads(json.dumps(old.manifest).replace("vitpatch.corruptions.Gray", "vitpatch.another_place.Gray"))
    assert manifest != old.manifest
    (earlier / "noise" / "manifest.json").write_text(json.dumps(manifest))
    moved = read(found_below([earlier / "noise"])[0])
    assert aspects(old)["corruption"].value == aspects(moved)["corruption"].value
