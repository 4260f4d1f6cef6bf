"""The architecture: who may import whom, asserted from the source; and nothing heavy on the --help path."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

FLOORS = {
    "vitpatch": 1,  # the files that lie in no folder, but api.py, plot.py and notebook.py
    "corruptions": 2,
    "data": 2,
    "models": 3,
    "stats": 3,
    "patching": 4,
    "plots": 5,
    "runs": 6,
    "api": 7,
    "plot": 7,
    "notebook": 7,
    "compare": 7,
    "training": 7,
    "cli": 8,
}
"""Who may import whom: only what stands on a lower floor."""
PACKAGE = ROOT / "vitpatch"
MODULES = {path.relative_to(ROOT).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
MODULES = {".".join(parts).removesuffix(".__init__"): path for parts, path in MODULES.items()}


def folder_of(module):
    """The row of ``FLOORS`` that a module stands on."""
    name = [*module.split("."), ""][1]
    return name if name in FLOORS else "vitpatch"


def imports_of(path):
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vitpatch":
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "vitpatch")


def test_every_folder_has_a_floor():
    assert {folder_of(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_go_strictly_downward(folder):
    for module, path in MODULES.items():
        if folder_of(module) == folder and module not in ("vitpatch", "vitpatch.compare.__main__"):  # entries
            others = {other: folder_of(other) for other in imports_of(path)}
            upward = [other for other, of in others.items() if of != folder and FLOORS[of] >= FLOORS[folder]]
            assert not upward, f"{module} imports {upward}"


@pytest.mark.parametrize("folder", FLOORS)
def test_no_cycle_inside_a_folder(folder):
    inside = {module: set(imports_of(path)) for module, path in MODULES.items() if folder_of(module) == folder}
    inside.pop("vitpatch", None)
    graph = {module: others & set(inside) - {module} for module, others in inside.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_folders_files_and_functions_are_small():
    files = {folder: [module for module in MODULES if folder_of(module) == folder] for folder in FLOORS}
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    for folder, modules in files.items():
        number = len(set(modules) - packages)
        assert number <= 11, f"{folder}: {number} files"
    lengths = []
    for module, path in MODULES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, module
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        lengths += [(node.end_lineno - node.lineno + 1, f"{module}.{node.name}") for node in functions]
    longest = sorted(lengths)
    assert longest[-1][0] <= 80, longest[-3:]
    assert longest[int(0.9 * len(longest))][0] <= 40


def test_a_finished_run_is_shown_without_torch():
    reached, todo = set(), ["vitpatch.notebook", "vitpatch.plot", "vitpatch.runs.reading"]
    while todo:
        if (module := todo.pop()) in reached or module not in MODULES:
            continue
        reached.add(module)
        for node in ast.parse(MODULES[module].read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert not {name.partition(".")[0] for name in names} & {"torch", "hydra", "lightning"}, module
            todo += names
    assert "vitpatch.stats.result" in reached


def test_entries_are_thin():
    for entry in ("patch.py", "train_eval.py"):
        assert len((ROOT / entry).read_text().splitlines()) <= 40
        assert set(imports_of(ROOT / entry)) == {"vitpatch.cli.commands"}


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
    for path in [*PACKAGE.rglob("*.py"), ROOT / "patch.py", ROOT / "train_eval.py"]:
        text = path.read_text()
        assert not re.search(rf"{PICKLE}|trust_remote_code|weights_only=False|yaml\.unsafe", text), path
        assert text.count("torch.load(") == text.count("weights_only=True, map_location"), path
