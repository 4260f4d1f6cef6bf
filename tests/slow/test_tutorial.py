"""docs/tutorial.ipynb is its script's, and the script's cells still run and say what the notebook has."""

import re
import runpy

import jupytext
import nbformat
import pytest
from conftest import ROOT

MAKER = ROOT / "docs" / "make_tutorial.py"


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def words(notebook):
    """What cells print or show as text, without the addresses of objects."""
    texts = [
        output.get("text") or output["data"].get("text/plain", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    ]
    return "\n".join(texts)


@pytest.mark.long
def test_the_tutorial_is_what_its_script_gives(monkeypatch):
    made = runpy.run_path(str(MAKER))
    stored = nbformat.read(made["NOTEBOOK"], nbformat.NO_CONVERT)
    assert cells(stored) == cells(jupytext.read(made["SCRIPT"])), "run python docs/make_tutorial.py"
    text = made["NOTEBOOK"].read_text()
    assert len(text) < 1e6 and not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|opt|Users|var)/", text)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    new = words(made["execute"]())
    assert new.splitlines()[0] == words(stored).splitlines()[0] and "CLS takes over" in new and "Error" not in new
