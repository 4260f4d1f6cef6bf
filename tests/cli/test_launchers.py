"""A sweep by other processes: Hydra's launchers, and what a W&B agent would start."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml
from conftest import ROOT


def overrides(made, folder, *more):
    where = [f"model.path={made / 'vit'}", "data=parquet", f"data.path={made / 'images.parquet'}", "trainer=cpu"]
    return ["-m", "model=hf", *where, "logger=none", f"hydra.sweep.dir={folder}", *more]


def launched(launcher, *arguments):
    if importlib.util.find_spec(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher") is None:
        pytest.skip(f"hydra/launcher={launcher}: its extra is not installed")
    return [sys.executable, "patch.py", *arguments, f"hydra/launcher={launcher}"]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_sweep_by_a_launcher_ends_in_the_table_and_the_exit_code(made, tmp_path, launcher):
    command = launched(launcher, *overrides(made, tmp_path, "window=1,9,2"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert f"2 of 3 runs finished in {tmp_path}" in said
    assert said[-1].startswith("failed: window=9: window 9: the model has 4 layers"), done.stdout
    states = pd.read_csv(tmp_path / "states.csv").set_index("run")
    assert dict(states["state"]) == {"window=1": "finished", "window=2": "finished", "window=9": "failed"}
    for run in ("window=1", "window=2"):
        manifest = json.loads((tmp_path / run / "manifest.json").read_text())
        assert states.loc[run, "effect"] == pytest.approx(manifest["peak_effect"])
    again = subprocess.run(
        launched(launcher, *overrides(made, tmp_path, "window=1,2")), cwd=ROOT, capture_output=True, text=True
    )
    assert again.returncode == 0 and "2 of 2 runs finished" in again.stdout
    assert set(pd.read_csv(tmp_path / "states.csv")["state"]) == {"finished before"}


@pytest.mark.long
def test_ctrl_c_ends_a_sweep_by_joblib_and_it_goes_on(made, tmp_path):
    arguments = overrides(made, tmp_path, "window=1,2,3,4", "batch_size=1", "hydra.launcher.n_jobs=2")
    command = launched("joblib", *arguments)
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        while not list(tmp_path.glob("window=*/.hydra/holder.json")):  # until the first run is under way
            time.sleep(0.1)
            assert process.poll() is None, log.read_text()
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=120)
    said = log.read_text()
    assert code == 130 and "Traceback" not in said and " runs finished in " in said, said
    assert not list(tmp_path.glob("window=*/manifest.json"))
    begun = pd.read_csv(tmp_path / "states.csv").set_index("run")["state"]
    # one that was loading left no word
    assert len(begun) == 4 and set(begun) <= {"interrupted", "unfinished", "not started"}, said
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "4 of 4 runs finished" in again.stdout, again.stdout + again.stderr


@pytest.mark.long
def test_a_launcher_whose_workers_are_killed_ends_in_the_table(made, tmp_path):
    arguments = overrides(made, tmp_path, "window=1,2,3", "batch_size=1", "hydra.launcher.n_jobs=2")
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(launched("joblib", *arguments), cwd=ROOT, stdout=out, stderr=out)
        while not list(tmp_path.glob("window=*/.hydra/holder.json")):
            time.sleep(0.1)
            assert process.poll() is None, log.read_text()
        holders = [json.loads(file.read_text()) for file in tmp_path.glob("window=*/.hydra/holder.json")]
        for holder in holders:
            os.kill(holder["process"], signal.SIGKILL)
        code = process.wait(timeout=120)
    said = log.read_text()
    assert code == 1 and "unfinished: window=" in said and "0 of 3 runs finished in" in said, said
    assert len(pd.read_csv(tmp_path / "states.csv")) == 3


def test_what_an_agent_starts(cli, made, tmp_path, monkeypatch):
    """The command that a W&B agent builds of ``conf/sweep.yaml``, by its own functions, on small images."""
    from wandb.sdk.launch.sweeps import utils

    sweep = yaml.safe_load((ROOT / "conf" / "sweep.yaml").read_text())
    parameters = {name: {"value": of["values"][1]} for name, of in sweep["parameters"].items()}
    macros = utils.create_sweep_command_args({"args": parameters}) | {
        "env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]],
    }  # fmt: skip
    command = [
        part
        for chunk in utils.create_sweep_command(list(sweep["command"]))
        for part in (macros[chunk[2:-1]] if chunk.startswith("${") else [chunk])
    ]
    assert command[:3] == ["/usr/bin/env", "python", "patch.py"]
    monkeypatch.chdir(tmp_path)
    tiny = ["model=hf", f"model.path={made / 'vit'}", "data=parquet", f"data.path={made / 'images.parquet'}"]
    code, printed = cli(*command[3:], *tiny, "logger=none", "trainer=cpu")
    assert code == 0, printed
    (run,) = (tmp_path / "multirun" / "agents").iterdir()
    assert run.name.startswith("corruption=noise,window=3,model=hf,model.path=")
    config = json.loads((run / "manifest.json").read_text())["config"]
    assert (config["sweep"], config["window"], config["options"]["corruption"]) == ("agents", 3, "noise")
