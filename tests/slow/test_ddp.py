"""One run over several processes: the numbers of one, each image once, and nobody left behind, however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from conftest import ROOT, pictures, save_model, write_parquet
from omegaconf import OmegaConf

from vitpatch.errors import VitPatchError
from vitpatch.runs import predict
from vitpatch.runs.folder import Begun, Shards
from vitpatch.runs.run import batch_size_for
from vitpatch.runs.trainer import Group, SharedFailure, build_trainer, check_processes, trainer_factory

DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
SLOW = '''
import os, time
from pathlib import Path

class Slow:
    """Gray, half as fast as anyone could wish; leaves a word of who is at it."""

    def __init__(self, seconds, at):
        self.seconds, self.at = seconds, at

    def __call__(self, batch, seed):
        Path(self.at, f"{os.getpid()}-{int(batch.ids[0])}").touch()
        time.sleep(self.seconds)
        return batch.images.mean(1, keepdim=True).expand_as(batch.images)
'''


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_each_batch_is_one_processs_own(processes):
    left = [0, 2, 3, 5, 6, 9, 10]  # of a run that was stopped
    shares = [Group(rank, processes).part(left) for rank in range(processes)]
    assert sorted(number for numbers in shares for number in numbers) == left
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and shares[0]


@pytest.mark.parametrize(
    ("asked", "images", "processes", "size"), [(64, 7, 2, 4), (2, 7, 2, 2), (64, 1, 2, 1), (64, 7, 1, 64), (5, 9, 4, 3)]
)
def test_batches_are_so_small_that_every_device_has_one(asked, images, processes, size):
    assert batch_size_for(asked, images, processes) == size


def trainer(**keys):
    option = {"_target_": "lightning.Trainer", "_partial_": True, "accelerator": "cpu", "strategy": "ddp"}
    return build_trainer(trainer_factory(OmegaConf.create({"trainer": option | keys})), logger=False)


def test_machines_are_started_by_a_launcher_and_as_many_as_the_trainer_says(monkeypatch):
    check_processes(trainer(devices=2))
    with pytest.raises(VitPatchError, match="num_nodes 2: every machine's processes are started by torchrun"):
        check_processes(trainer(devices=2, num_nodes=2))
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    check_processes(trainer(devices=1, num_nodes=2))
    with pytest.raises(VitPatchError, match="1 machine with 1 device each, but 2 processes were started"):
        check_processes(trainer(devices=1))


def test_a_process_computes_by_the_threads_that_the_run_began_with(monkeypatch, tmp_path):
    before, seen = torch.get_num_threads(), []
    Shards(tmp_path / "shards").begin(Begun("id", {}, 1, threads=before + 1))
    order = predict.Order(tmp_path, {}, [0, 1], corruption=None, calibrations=None)
    group = Mock(rank=1, begin=Mock(side_effect=[order, SharedFailure]), sharing_failures=nullcontext)
    monkeypatch.setattr(predict, "prepare", lambda *config: Mock(run_id="id"))
    monkeypatch.setattr(predict, "data_module", Mock())
    monkeypatch.setattr(predict, "_predict_share", lambda *arguments: seen.append(torch.get_num_threads()))
    predict.assist(group)
    assert seen == [before + 1] and torch.get_num_threads() == before


class Started:
    """``python patch.py`` in a process group of its own."""

    def __init__(self, tmp_path: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> None:
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        self.at = tmp_path / "at"
        command = [sys.executable, *launcher, "patch.py", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait_for(self, processes: int) -> list[int]:
        """Until so many processes are in a batch; their ids."""
        until = time.monotonic() + 120
        while len(there := {int(p.name.partition("-")[0]) for p in self.at.iterdir()}) < processes:
            assert self.process.poll() is None and time.monotonic() < until, self.process.communicate()[0]
            time.sleep(0.05)
        return sorted(there)

    def end(self) -> tuple[int, str]:
        """Exit code and what it printed; nobody of its group is left."""
        printed, _ = self.process.communicate(timeout=180)
        until = time.monotonic() + 10
        while (left := members(self.process.pid)) and time.monotonic() < until:
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, printed
        return self.process.returncode, printed


def members(group: int) -> list[int]:
    """The processes of a group that are not mere corpses."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def seven(tmp_path):
    """Seven images and a model, as overrides; the module ``slow`` beside them."""
    data = write_parquet(tmp_path / "seven.parquet", pictures(7), [i % 5 for i in range(7)])
    save_model(tmp_path / "vit", "vit")
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "at").mkdir()
    model = ["model=hf", f"model.path={tmp_path / 'vit'}", "data=parquet", f"data.path={data}"]
    return [*model, "logger=none"]


def slow(tmp_path, seconds):
    return [
        "~corruption.amount",
        "corruption._target_=slow.Slow",
        f"+corruption.seconds={seconds}",
        f"+corruption.at={tmp_path / 'at'}",
    ]


def into(sweep):
    return [f"hydra.sweep.dir={sweep}", "hydra.sweep.subdir=w${window}"]


def assert_same(one: Path, other: Path, bits: bool = False) -> None:
    """The same rows in the same order, within 1e-6."""
    for table in ("examples", "effects"):
        ours, theirs = (pd.read_parquet(folder / f"{table}.parquet") for folder in (one, other))
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-6, atol=1e-6)
        if bits:
            assert (one / f"{table}.parquet").read_bytes() == (other / f"{table}.parquet").read_bytes()


def test_two_processes_give_the_numbers_of_one(seven, tmp_path, cli):
    code, printed = cli(*seven, "trainer=cpu", "batch_size=4", f"hydra.run.dir={tmp_path / 'one'}")
    assert code == 0, printed
    code, printed = Started(tmp_path, *seven, *DDP, f"hydra.run.dir={tmp_path / 'two'}").end()
    assert code == 0 and "arn" not in printed.replace("learn", ""), printed
    assert_same(tmp_path / "one", tmp_path / "two", bits=True)
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["devices"] == {"accelerator": "cpu", "processes": 2, "nodes": 1}
    assert manifest["run_id"] == json.loads((tmp_path / "one" / "manifest.json").read_text())["run_id"]
    assert not (tmp_path / "two" / "shards").exists() and printed.count("plan: ") == 1


@pytest.mark.long
def test_small_batches_one_image_and_a_sweep(seven, tmp_path, cli):
    """Two runs in one process, then an image for two devices."""
    assert cli(*seven, "trainer=cpu", "batch_size=4", f"hydra.run.dir={tmp_path / 'one'}")[0] == 0
    sweep = ["-m", *seven, *DDP, "batch_size=2", "window=3,1", "logger=wandb", "logger.mode=offline"]
    code, printed = Started(
        tmp_path, *sweep, f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.sweep.subdir=w${window}"
    ).end()
    assert code == 0 and "2 of 2 runs finished" in printed, printed
    assert_same(tmp_path / "one", tmp_path / "sweep" / "w3")
    for folder in ("w3", "w1"):
        assert len(list((tmp_path / "sweep" / folder / "wandb").glob("offline-run-*"))) == 1
    code, printed = Started(tmp_path, *seven, *DDP, "data.limit=1", f"hydra.run.dir={tmp_path / 'single'}").end()
    assert code == 0 and len(pd.read_parquet(tmp_path / "single" / "examples.parquet")) == 1, printed


@pytest.mark.long
@pytest.mark.parametrize("to", ["group", "leader"])
def test_asked_once_every_process_ends_its_batch_and_the_run_goes_on_by_other_numbers(seven, tmp_path, to):
    run = [*seven, *DDP, "batch_size=1", f"hydra.run.dir={tmp_path / 'run'}"]
    started = Started(tmp_path, *run, *slow(tmp_path, 1.0))
    started.wait_for(2)
    if to == "group":
        os.killpg(started.process.pid, signal.SIGINT)
    else:
        os.kill(started.process.pid, signal.SIGTERM)
    code, printed = started.end()
    assert code == 130 and "interrupted: " in printed and "Traceback" not in printed, printed
    assert json.loads((tmp_path / "run" / "failed.json").read_text())["state"] == "interrupted"
    done = len(list((tmp_path / "run" / "shards").glob("batch-*.json")))
    begun = len(list((tmp_path / "at").iterdir()))
    assert done == begun and 2 <= done < 7, printed  # what was begun was kept
    for folder, trainer in (
        ("run", ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=3"]),
        ("one", ["trainer=cpu"]),
    ):
        where = [*seven, *trainer, "batch_size=1", f"hydra.run.dir={tmp_path / folder}"]
        code, printed = Started(tmp_path, *where, *slow(tmp_path, 1.0)).end()
        assert code == 0 and (folder == "one" or f"{done} of 7 images were done before" in printed), printed
    assert_same(tmp_path / "one", tmp_path / "run", bits=True)


@pytest.mark.long
def test_asked_twice_all_stop_at_once(seven, tmp_path):
    started = Started(tmp_path, *seven, *DDP, f"hydra.run.dir={tmp_path / 'run'}", *slow(tmp_path, 600.0))
    started.wait_for(2)
    for _ in range(2):
        os.killpg(started.process.pid, signal.SIGINT)
        time.sleep(0.5)
    code, printed = started.end()
    assert code == 130 and printed.count("interrupted: ") == 1 and "Traceback" not in printed, printed


@pytest.mark.long
def test_a_killed_leader_takes_the_others_with_it(seven, tmp_path):
    run = [*seven, *DDP, "batch_size=1", f"hydra.run.dir={tmp_path / 'run'}", *slow(tmp_path, 3.0)]
    started = Started(tmp_path, *run)
    (other,) = set(started.wait_for(2)) - {started.process.pid}
    os.kill(started.process.pid, signal.SIGKILL)
    assert started.end()[0] == -signal.SIGKILL
    assert len(list(started.at.glob(f"{other}-*"))) == 1  # it did not even begin another batch
    code, printed = Started(tmp_path, *run).end()
    assert code == 0 and len(pd.read_parquet(tmp_path / "run" / "examples.parquet")) == 7, printed


@pytest.mark.long
def test_a_process_that_fails_or_dies_ends_the_run_in_one_line(seven, tmp_path):
    broken = pd.read_parquet(tmp_path / "seven.parquet")
    broken.at[5, "image"] = {"bytes": b"no image", "path": None}  # in the other's share
    broken.to_parquet(tmp_path / "seven.parquet")
    code, printed = Started(tmp_path, *seven, *DDP, f"hydra.run.dir={tmp_path / 'run'}").end()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "data row 5" in errors[0] and "Traceback" not in printed, printed
    assert "data row 5" in json.loads((tmp_path / "run" / "failed.json").read_text())["reason"]
    run = [*seven, *DDP, "batch_size=1", "data.on_error=skip", f"hydra.run.dir={tmp_path / 'dies'}"]
    started = Started(tmp_path, *run, *slow(tmp_path, 1.0))
    (other,) = set(started.wait_for(2)) - {started.process.pid}
    os.kill(other, signal.SIGKILL)
    code, printed = started.end()
    assert code == 1 and printed.count("error: ") == 1 and "process 1 of 2 was ended by signal 9" in printed, printed
    code, printed = Started(tmp_path, *run, *slow(tmp_path, 1.0)).end()
    assert code == 0 and "1 of 7 images could not be read" in printed, printed


def of_torchrun(*nodes):
    return ("-m", "torch.distributed.run", *nodes)


@pytest.mark.long
def test_processes_that_torchrun_started(seven, tmp_path, cli):
    """A sweep by two; two machines (both this one); a folder that is not the same for all."""
    assert cli(*seven, "trainer=cpu", "batch_size=4", f"hydra.run.dir={tmp_path / 'one'}")[0] == 0
    here = of_torchrun("--nproc-per-node=2")
    sweep = [
        "-m",
        *seven,
        *DDP,
        "window=3,9,1",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        "hydra.sweep.subdir=w${window}",
    ]
    code, printed = Started(tmp_path, *sweep, launcher=here).end()
    assert code == 1 and "2 of 3 runs finished" in printed and printed.count("failed: w9") == 1, printed
    assert_same(tmp_path / "one", tmp_path / "sweep" / "w3", bits=True)

    run = [*seven, *DDP[:2], "trainer.devices=1", "trainer.num_nodes=2", f"hydra.run.dir={tmp_path / 'run'}"]
    both = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", "--master-port=29612")
    machines = [Started(tmp_path, *run, launcher=of_torchrun(*both, f"--node-rank={n}")) for n in range(2)]
    for code, printed in [machine.end() for machine in machines]:
        assert code == 0, printed
    assert_same(tmp_path / "one", tmp_path / "run", bits=True)

    slowly = [*seven, *DDP, "batch_size=1", f"hydra.run.dir={tmp_path / 'slowly'}", *slow(tmp_path, 1.0)]
    started = Started(tmp_path, *slowly, launcher=here)
    started.wait_for(2)
    os.killpg(started.process.pid, signal.SIGINT)  # to all three; and torchrun passes it on
    code, printed = started.end()
    done = list((tmp_path / "slowly" / "shards").glob("batch-*.json"))
    assert code != 0 and len(done) == len(list(started.at.iterdir())) < 7, printed
    assert json.loads((tmp_path / "slowly" / "failed.json").read_text())["state"] == "interrupted"

    stamped = f"hydra.run.dir={tmp_path}/${{oc.env:RANK}}"  # rank 0's folder is that of all
    code, printed = Started(tmp_path, *seven, *DDP, stamped, launcher=here).end()
    assert code == 0 and not (tmp_path / "1").exists(), printed
    assert_same(tmp_path / "one", tmp_path / "0", bits=True)


@pytest.mark.long
def test_processes_that_srun_started(seven, tmp_path, cli, monkeypatch):
    """As a sweep, without Slurm, by what it puts into the environment."""
    assert cli(*seven, "trainer=cpu", "batch_size=4", f"hydra.run.dir={tmp_path / 'one'}")[0] == 0
    tasks = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "STEP_NUM_TASKS": "2"}
    slurm = {"JOB_ID": "29871", "JOB_NAME": "run", "NODELIST": "127.0.0.1", "NODEID": "0", **tasks}
    started = []
    for rank in ("0", "1"):
        for name, value in {**slurm, "PROCID": rank, "LOCALID": rank}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        where = [f"hydra.sweep.dir={tmp_path / 'sweep'}{rank}", "hydra.sweep.subdir=w${window}"]
        started.append(Started(tmp_path, "-m", *seven, *DDP, "window=9,3", *where))
    (code, printed), (helpers_code, by_helper) = (process.end() for process in started)
    assert code == 1 and "1 of 2 runs finished" in printed and printed.count("failed: w9") == 1, printed
    assert helpers_code == 0 and not by_helper and not (tmp_path / "sweep1").exists()
    assert_same(tmp_path / "one", tmp_path / "sweep0" / "w3", bits=True)


@pytest.mark.long
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_run_ends_while_its_processes_are_loading(seven, tmp_path, how):
    started = Started(tmp_path, *seven, *DDP, f"hydra.run.dir={tmp_path / 'run'}")
    until = time.monotonic() + 120
    while not (others := set(members(started.process.pid)) - {started.process.pid}):
        assert started.process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    if how == "killed":
        os.kill(*others, signal.SIGKILL)
        says = "error: process 1 of 2 was ended by signal 9"
    else:
        os.killpg(started.process.pid, signal.SIGINT)
        says = f"interrupted: {tmp_path / 'run'}: 0 of 2 batches are done"
    code, printed = started.end()
    assert code == {"killed": 1, "interrupted": 130}[how] and printed.count(says) == 1, printed
    assert "Traceback" not in printed and not (tmp_path / "run" / "manifest.json").exists(), printed


@pytest.mark.long
def test_a_process_that_does_not_answer_is_given_up_after_the_timeout(seven, tmp_path):
    run = [*seven, *DDP, "batch_size=1", "trainer.timeout=4", f"hydra.run.dir={tmp_path / 'run'}"]
    started = Started(tmp_path, *run, *slow(tmp_path, 1.0))
    (other,) = set(started.wait_for(2)) - {started.process.pid}
    os.kill(other, signal.SIGSTOP)
    code, printed = started.end()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "(trainer.timeout)" in errors[0], printed
