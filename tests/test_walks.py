"""Three walks through the package, each short: what a reader who follows it must open."""

import shutil

from conftest import ROOT
from walk import walk

EARLIER = ROOT / "tests" / "compare" / "finished_runs"
RUN = """
import runpy
sys.argv[0] = "patch.py"
runpy.run_path("patch.py", run_name="__main__")
"""
COMPARISON = """
from vitpatch.cli.compare import main
main(sys.argv[1:])
"""
CALL = """
import vitpatch
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
clean = torch.rand(3, 3, 32, 32)
table = vitpatch.patch(model, clean, clean.mean(1, keepdim=True).expand_as(clean), [0, 1, 2])
assert len(table) == 3 * 4
"""


def test_from_the_command_to_the_summary(tmp_path):
    overrides = ["corruption=gray", "window=3", "data.limit=4", "trainer=cpu", "logger=none"]
    run = tmp_path / "run"
    end = ("write_csv", "path", "summary.csv")
    files, _ = walk(
        RUN, *overrides, f"hydra.run.dir={run}", imports="import datasets, lightning, transformers", last=end
    )
    assert (run / "effects.parquet").exists() and "patching/executor.py" in files
    assert not {"runs/calibration.py", "names.py", "plots/run_figures.py"} & set(files)
    assert len(files) <= 35, files


def test_from_a_finished_sweep_to_its_page(tmp_path):
    earlier = shutil.copytree(EARLIER, tmp_path / "earlier")
    files, loaded = walk(COMPARISON, str(earlier), imports="import altair, pandas, pyarrow.parquet")
    assert (earlier / "comparison" / "index.html").stat().st_size > 1e5 and "compare/page.py" in files
    assert not loaded & {"torch", "lightning", "hydra"}
    assert len(files) <= 25, files


def test_from_python(made):
    files, loaded = walk(
        CALL, str(made / "vit"), imports="import torch\nfrom transformers import AutoModelForImageClassification"
    )
    assert "patching/executor.py" in files and not loaded & {"hydra", "lightning", "matplotlib", "wandb"}
    assert len(files) <= 20, files
