"""Sweeps in this process, in which runs fail."""

import pandas as pd
import pytest


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


@pytest.mark.usefixtures("tables_only")
def test_an_old_failure_in_the_folder_is_not_this_sweeps(cli, tiny):
    assert cli(*tiny, "window=9,1", "hydra.sweep.subdir=w${window}")[0] == 1
    code, printed = cli(*tiny, "window=1,2", "hydra.sweep.subdir=w${window}")
    assert code == 0 and "2 of 2 runs finished" in printed and "finished before" in printed


@pytest.mark.usefixtures("tables_only")
def test_model_and_data_are_loaded_once_per_process(cli, tiny, monkeypatch):
    from vitpatch.data import sources
    from vitpatch.models import checkpoint

    sources._open.cache_clear(), checkpoint._load.cache_clear()
    assert cli(*tiny, "window=1,2,3")[0] == 0
    assert (sources._open.cache_info().misses, checkpoint._load.cache_info().misses) == (1, 1)
