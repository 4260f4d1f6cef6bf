"""Sweeps in this process, in which runs fail; and a run where there is no key, network or terminal."""

import os
import subprocess
import sys

import matplotlib
import pandas as pd
import pytest
from conftest import ROOT


@pytest.fixture
def tiny(made, tmp_path):
    where = [f"model.path={made / 'vit'}", "data=parquet", f"data.path={made / 'images.parquet'}", "data.limit=4"]
    return ["-m", "model=hf", *where, "trainer=cpu", "logger=none", f"hydra.sweep.dir={tmp_path / 'sweep'}"]


def test_a_failing_run_does_not_stop_the_others_and_is_told_at_the_end(cli, tiny, tmp_path):
    code, printed = cli(*tiny, "window=1,9,2", "hydra.sweep.subdir=w${window}")
    assert code == 1
    states = {p.name: (p / "manifest.json").exists() for p in (tmp_path / "sweep").iterdir() if p.is_dir()}
    assert states == {"w1": True, "w9": False, "w2": True, "comparison": False}
    assert set(pd.read_csv(tmp_path / "sweep" / "comparison" / "overview.csv")["run"]) == {"w1", "w2"}
    page = (tmp_path / "sweep" / "comparison" / "index.html").read_text()
    assert "All runs: model=hf" in page and "all runs: model=hf" in printed and "data.limit=4" in printed
    said = [line for line in printed.splitlines() if line and "images/s" not in line]
    assert "2 of 3 runs finished" in said[-2], printed
    assert said[-1].startswith("failed: w9: window 9: the model has 4 layers"), printed


def test_an_old_failure_in_the_folder_is_not_this_sweeps(cli, tiny):
    assert cli(*tiny, "window=9,1", "hydra.sweep.subdir=w${window}")[0] == 1
    code, printed = cli(*tiny, "window=1,2", "hydra.sweep.subdir=w${window}")
    assert code == 0 and "2 of 2 runs finished" in printed and "finished before" in printed


def test_model_and_data_are_loaded_once_per_process(cli, tiny, monkeypatch):
    from vitpatch.data import sources
    from vitpatch.models import checkpoint

    sources._open.cache_clear(), checkpoint._load.cache_clear()
    assert cli(*tiny, "window=1,2,3")[0] == 0
    assert (sources._open.cache_info().misses, checkpoint._load.cache_info().misses) == (1, 1)


def test_no_key_no_network_no_terminal_never_asks(made, tmp_path):
    """``logger.mode=auto`` without anything: offline, at once, nobody asked."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment = keep | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"}
    environment["MPLCONFIGDIR"] = matplotlib.get_configdir()  # where it knows the fonts, which are long to find
    command = [sys.executable, "patch.py", "model=hf", f"model.path={made / 'vit'}", "data=parquet"]
    command += [f"data.path={made / 'images.parquet'}", "trainer=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert "wandb sync " in done.stdout and (tmp_path / "run" / "manifest.json").exists()
