"""``python docs/make_tutorial.py``: makes tutorial.ipynb of tutorial.py, executed; it takes about two minutes."""

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

SCRIPT = Path(__file__).with_name("tutorial.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
CELL_TIMEOUT_S = 600


def execute(script: Path = SCRIPT) -> nbformat.NotebookNode:
    """The notebook of a script in percent format, executed in an empty folder.

    Kept is what the cells show, but for bars and warnings (stderr); not when and by which Python that was.
    """
    notebook = jupytext.read(script)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of the command vitpatch
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=CELL_TIMEOUT_S, resources={"metadata": {"path": folder}}).execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    nbformat.write(execute(), NOTEBOOK)
