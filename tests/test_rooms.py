"""The rooms: who may import whom, asserted from the source; and nothing heavy on the --help path."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

LEVELS = {
    "sweep": 13,
    "job": 12,
    "report": 12,
    "fit": 10,
    "run": 10,
    "api": 8,
    "compare": 11,
    "compared": 9,
    "page": 10,
    "page_sections": 9,
    "page_charts": 8,
    "page_gallery": 7,
    "page_tables": 4,
    "comparison_figures": 9,
    "profile_figures": 8,
    "figure_words": 7,
    "facets": 6,
    "charts": 2,
    "cells": 1,
    "run_labels": 0,
    "run_names": 0,
    "name_overrides": 1,
    "sweep_record": 2,
    "thumbnails": 0,
    "redrawn": 8,
    "differences": 8,
    "sides": 7,
    "ranks": 7,
    "overview": 6,
    "counterparts": 6,
    "aspects": 5,
    "agreement": 5,
    "finished": 4,
    "pairs": 4,
    "titles": 4,
    "comparison": 3,
    "pictures": 7,
    "examples": 9,
    "shown": 2,
    "predict": 9,
    "patching": 8,
    "rows": 7,
    "execute": 6,
    "forwards": 5,
    "given": 4,
    "constants": 5,
    "controls": 3,
    "outcome": 5,
    "measure": 6,
    "setup": 6,
    "calibrate": 7,
    "training_images": 5,
    "adjustable": 5,
    "calibration": 2,
    "peers": 3,
    "trainers": 2,
    "checkpoint": 5,
    "convert": 6,
    "pretrained": 3,
    "proof": 4,
    "cost": 4,
    "readings": 4,
    "training": 4,
    "data": 2,
    "preprocessing": 1,
    "labels": 1,
    "folders": 1,
    "hub_folders": 2,
    "selection": 1,
    "metadata": 2,
    "classes": 3,
    "columns": 3,
    "sources": 4,
    "files": 5,
    "scenes": 6,
    "gallery": 7,
    "classifiers": 3,
    "readout": 2,
    "hooks": 1,
    "configs": 2,
    "block": 2,
    "model": 3,
    "pages": 2,
    "profiles": 2,
    "panels": 3,
    "evidence": 2,
    "maps": 6,
    "plan": 2,
    "anatomy": 1,
    "config": 1,
    "corruptions": 1,
    "embedding_noise": 2,
    "patch_embedding": 2,
    "counterfactuals": 3,
    "frequencies": 2,
    "regions": 2,
    "shapes": 2,
    "effects": 1,
    "options": 2,
    "hub": 1,
    "inclusion": 1,
    "partners": 1,
    "plots": 1,
    "resamples": 1,
    "stats": 2,
    "inference": 3,
    "states": 2,
    "store": 1,
    "tokens": 1,
    "tracking": 2,
    "launch": 0,
    "progress": 1,
    "devices": 3,
    "crew": 4,
    "worker": 10,
    "interrupt": 0,
    "memory": 0,
    "shards": 2,
    "workspace": 3,
    "secrets": 1,
    "checks": 0,
    "model_formats": 0,
    "spec": -1,
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vitpatch":
            rest = node.module.split(".")[1:]
            yield from (rest[:1] or [alias.name for alias in node.names])


def test_every_room_has_a_level():
    rooms = {path.stem for path in (ROOT / "vitpatch").glob("*.py")} - {"__init__"}
    assert rooms == set(LEVELS)


@pytest.mark.parametrize("room", LEVELS)
def test_imports_go_strictly_downward(room):
    for other in imports_of(ROOT / "vitpatch" / f"{room}.py"):
        if other in LEVELS:
            assert LEVELS[other] < LEVELS[room], f"{room} imports {other}"


def test_entries_are_thin():
    for entry in ("patch.py", "train_eval.py"):
        assert len((ROOT / entry).read_text().splitlines()) <= 40
        assert set(imports_of(ROOT / entry)) <= {"config", "job", "sweep"}


@pytest.mark.parametrize("entry", ["patch", "train_eval"])
def test_help_imports_nothing_heavy(entry):
    code = f"""
import runpy, sys
sys.argv = ["{entry}.py", "--help"]
try:
    runpy.run_path("{entry}.py", run_name="__main__")
except SystemExit as error:
    assert not error.code, error.code
heavy = {{"torch", "numpy", "transformers", "lightning", "datasets", "wandb", "pandas", "matplotlib"}}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "HEAVY []" in out.stdout, out.stdout[-500:] + out.stderr[-500:]
    assert "window" in out.stdout or entry != "patch"


PICKLE = r"import pickle|pickle\.|(read|to)_pickle|allow_pickle=True|joblib|import (shelve|marshal)|torch\.save"


def test_no_pickle_and_no_remote_code():
    for path in [*(ROOT / "vitpatch").glob("*.py"), ROOT / "patch.py", ROOT / "train_eval.py"]:
        text = path.read_text()
        assert not re.search(rf"{PICKLE}|trust_remote_code|weights_only=False|yaml\.unsafe", text), path
        assert text.count("torch.load(") == text.count("weights_only=True, map_location"), path
