"""Runs that earlier versions finished are still read: ``finished_runs/`` holds four, made before this version.

They were made on the shipped data and model, six images (``unlabelled``: four) and window 1: ``gray``, ``noise``,
``chain`` (gray, then blur) and ``unlabelled`` (gray, labels predicted). Their pictures are left out.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from vitpatch.cli.compare import main
from vitpatch.compare.compare import compare
from vitpatch.compare.load import find_runs, load_run
from vitpatch.compare.settings import run_settings

RUNS = Path(__file__).parent / "finished_runs"


@pytest.fixture
def earlier(tmp_path):
    return shutil.copytree(RUNS, tmp_path / "earlier")


def test_they_are_compared(earlier):
    found = compare([earlier])
    assert not found.problems and not found.comparison.left_out
    overview = pd.read_csv(earlier / "comparison" / "overview.csv").set_index("run")
    assert overview["corruption"].to_dict() == {
        "chain": "gray then blur (sigma=3)", "gray": "gray", "noise": "noise", "unlabelled": "gray",
    }  # fmt: skip
    assert (earlier / "comparison" / "index.html").stat().st_size > 1e5


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


ENTERED = """
import sys
from inspect import CO_OPTIMIZED  # what the body of a module or class has not

entered = set()

def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_flags & CO_OPTIMIZED and not code.co_name.startswith("<"):
        entered.add(code.co_filename)

sys.setprofile(note)
from vitpatch.cli.compare import main
main(sys.argv[1:])
sys.setprofile(None)
heavy = {"torch", "lightning", "hydra"} & set(sys.modules)
print("HEAVY", sorted(heavy))
print("ENTERED", *sorted(file for file in entered if file.startswith(sys.path[0])), sep="\\n")
"""


def test_a_comparison_needs_few_files_and_no_torch(earlier, tmp_path):
    command = [sys.executable, "-c", ENTERED.replace("sys.path[0]", repr(str(ROOT / "vitpatch"))), str(earlier)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    files = done.stdout.partition("ENTERED\n")[2].split()
    assert str(ROOT / "vitpatch" / "compare" / "page.py") in files and len(files) <= 25, files
