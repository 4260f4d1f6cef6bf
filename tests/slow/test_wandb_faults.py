"""Weights & Biases away, slow, killed or without room, for real: runs finish, their files complete, with one warning.

The short forms are of one tracker; the long ones are whole runs and sweeps from the command line.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from wandb_server import services, serving

from vitpatch.runs import tracking
from vitpatch.runs.tracking import Results, RunInfo, WandbTracker, history

KEY = "a" * 40
FILES = ("manifest.json", "examples.parquet", "effects.parquet", "summary.csv")
LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    monkeypatch.setattr(WandbTracker, "unreachable", False)
    wandb.teardown()  # the settings, with the server's address, are read once a process
    yield
    assert not services(os.getpid())  # none outlives its run


def info(folder):
    folder.mkdir()
    return RunInfo(folder, "group", {"window": 3})


def results(folder):
    row = {"layer": 0, "effect": 0.1, "effect_low": 0.0, "effect_high": 0.2, "recovered": float("nan")}
    (folder / "a.txt").write_text("a file to keep")
    summary, scalars = pd.DataFrame([row]), {"total_effect": 0.5}
    files = {"a.txt": folder / "a.txt"}
    return Results("effects", {"effects": summary}, {}, files, history(summary, [""]), scalars)


def said(caplog) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if r.name == "vitpatch.runs.tracking" and r.levelno >= logging.WARNING
    ]


@LINUX
def test_killed_within_a_run_it_warns_once_and_the_next_run_is_tracked_anew(tmp_path, caplog):
    with WandbTracker("offline").run(info(tmp_path / "a")) as run:
        (service,) = services(os.getpid())
        os.kill(service, signal.SIGKILL)
        run.log(results(tmp_path))
        run.log(results(tmp_path))
    assert not services(os.getpid())
    (warning,) = said(caplog)
    assert "the results are complete on disk; later: wandb sync " in warning and str(tmp_path / "a") in warning
    with WandbTracker("offline").run(info(tmp_path / "b")) as run:
        run.log(results(tmp_path))
        assert services(os.getpid()) not in ([], [service])
    assert run.details["mode"] == "offline" and len(said(caplog)) == 1
    assert list(tmp_path.glob("b/wandb/offline-run-*/files/media/table/*"))


@LINUX
def test_a_run_leaves_no_process_and_the_next_is_tracked_anew(tmp_path, caplog):
    with WandbTracker("offline").run(info(tmp_path / "a")):
        (first,) = services(os.getpid())
    assert not services(os.getpid())
    with WandbTracker("offline").run(info(tmp_path / "b")) as run:
        assert services(os.getpid()) not in ([], [first])
        run.log(results(tmp_path))
    assert run.details["mode"] == "offline" and not said(caplog)


@LINUX
def test_after_the_last_run_nothing_is_left_and_nothing_is_said_at_the_programs_end(tmp_path):
    """Of a run whose service lives, and of one whose service is killed."""
    code = f"""
import os, signal, time
from pathlib import Path
from wandb_server import services
from vitpatch.runs.tracking import RunInfo, WandbTracker
for name in ("lives", "killed"):
    folder = Path({str(tmp_path)!r}, name)
    folder.mkdir()
    with WandbTracker("offline").run(RunInfo(folder, "group", {{}})):
        (service,) = services(os.getpid())
        if name == "killed":
            os.kill(service, signal.SIGKILL)
            time.sleep(0.5)  # the connection is seen to be lost
    assert not services(os.getpid())
"""
    there = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | there
    )
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert f"later: wandb sync {tmp_path / 'killed'}" in line


@LINUX
def test_hung_it_is_killed(tmp_path, caplog, monkeypatch):
    with WandbTracker("offline", finish_timeout=0.5).run(info(tmp_path / "a")) as run:
        (service,) = services(os.getpid())
        os.kill(service, signal.SIGSTOP)
        monkeypatch.setattr(tracking, "SERVICE_TIMEOUT_S", 0.5)
        run.log(results(tmp_path))
    monkeypatch.setattr(tracking, "SERVICE_TIMEOUT_S", 60.0)
    assert len(said(caplog)) == 1 and "no answer within" in said(caplog)[0] and not services(os.getpid())
    with WandbTracker("offline").run(info(tmp_path / "b")) as run:
        run.log(results(tmp_path))
    assert run.details["mode"] == "offline" and len(said(caplog)) == 1


def test_a_wrong_key_is_offline_with_a_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving("refusing") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with WandbTracker("auto").run(info(tmp_path / "a")) as run:
            run.log(results(tmp_path))
    assert server.asked and run.details["mode"] == "offline"
    assert said(caplog) == ["Weights & Biases did not answer (user is not logged in); logging offline from here on"]


@pytest.mark.parametrize("manner", ["silent", "closed"])
def test_a_server_that_does_not_answer_delays_a_run_by_no_more_than_the_timeout(tmp_path, caplog, monkeypatch, manner):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 1.0)  # a request has 30 s by itself
    with serving("silent") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url if manner == "silent" else "http://127.0.0.1:9")
        with WandbTracker("auto").run(info(tmp_path / "a")) as run:
            run.log(results(tmp_path))
        assert run.details["mode"] == "offline" and "wandb sync" in run.sync_command
        assert not server.closing.is_set() and len(said(caplog)) == 1 and "did not answer" in said(caplog)[0]


def test_a_server_that_falls_silent_within_a_run_is_one_warning_and_not_asked_again(tmp_path, caplog, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)  # else 19 s
    with serving("fading") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with WandbTracker("auto", finish_timeout=0.5).run(info(tmp_path / "a")) as run:
            assert run.details["mode"] == "online"
            run.log(results(tmp_path))
        (warning,) = said(caplog)
        assert f"later: wandb sync {tmp_path}/a/wandb/run-" in warning
        with WandbTracker("auto").run(info(tmp_path / "b")) as run:
            assert run.details["mode"] == "offline"
    assert len(said(caplog)) == 1


def test_an_upload_that_takes_too_long_is_left_to_wandb_sync(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving("fading") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with WandbTracker("auto", finish_timeout=0.5).run(info(tmp_path / "a")):
            pass
    (warning,) = said(caplog)
    assert warning.startswith("Weights & Biases failed (Timed out finishing run.)") and "wandb sync" in warning


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    where = info(tmp_path / "a")
    (tmp_path / "a" / "wandb").write_text("a file where the folder would be")
    with WandbTracker("offline").run(where) as run:
        run.log(results(tmp_path))
    assert run.details is None and len(said(caplog)) == 1 and "Not a directory" in said(caplog)[0]


def patch(made, *more: str, **environment: str) -> subprocess.Popen:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "patch.py", *more, "model=hf", f"model.path={made / 'vit'}", "data=parquet"]
    command += [f"data.path={made / 'images.parquet'}", "logger=wandb", "trainer=cpu"]
    said = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=keep | environment, **said)


def printed(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "Traceback" not in out, out
    return out


def kill_when_begun(process: subprocess.Popen, folder: Path) -> None:
    """Kills wandb's own process as soon as the run in ``folder`` has patched: before its results are logged."""
    for _ in range(6000):
        if list(folder.rglob("*.parquet")) and (found := services(process.pid)):
            os.kill(found[0], signal.SIGKILL)
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("the run did not begin")


@LINUX
@pytest.mark.long
def test_a_run_whose_tracker_is_killed_finishes(made, tmp_path):
    process = patch(made, f"hydra.run.dir={tmp_path / 'run'}", "logger.mode=offline")
    kill_when_begun(process, tmp_path / "run")
    out = printed(process)
    assert out.count("Weights & Biases failed") == 1 and "wandb sync" in out
    assert all((tmp_path / "run" / name).exists() for name in FILES)


@LINUX
@pytest.mark.long
def test_a_sweep_whose_tracker_is_killed_goes_on(made, tmp_path):
    sweep = [f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.sweep.subdir=w${window}", "logger.mode=offline"]
    process = patch(made, "-m", "window=1,2,3", *sweep)
    kill_when_begun(process, tmp_path / "sweep" / "w2")
    out = printed(process)
    assert out.count("Weights & Biases") == 1 and "3 of 3 runs finished" in out
    assert all((tmp_path / "sweep" / f"w{w}" / name).exists() for w in (1, 2, 3) for name in FILES)
    assert list((tmp_path / "sweep" / "w3").glob("wandb/offline-run-*/files/media/table/*"))


@pytest.mark.long
@pytest.mark.parametrize("manner", ["silent", "refusing", "fading", "closed"])
def test_a_run_with_a_bad_server_finishes(made, tmp_path, manner):
    with serving(manner) as server:
        url = "http://127.0.0.1:9" if manner == "closed" else server.url
        where = [f"hydra.run.dir={tmp_path / 'run'}", "logger.mode=auto", "logger.finish_timeout=5"]
        out = printed(patch(made, *where, WANDB_API_KEY=KEY, WANDB_BASE_URL=url))
    assert out.count("Weights & Biases ") == 1 and "wandb sync" in out
    assert all((tmp_path / "run" / name).exists() for name in FILES)
