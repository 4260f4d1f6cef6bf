"""Wrong input through the command line: one clear line, exit code 1, nothing that looks finished."""

import json
import os
import shlex
import subprocess

import pytest
from conftest import pictures, save_model, write_parquet

from vitpatch.cli.commands import STOPPED
from vitpatch.cli.compare import main as compare_main
from vitpatch.runs import run
from vitpatch.runs.results import _python


@pytest.fixture
def tiny(made, tmp_path):
    where = [f"model.path={made / 'vit'}", "data=parquet", f"data.path={made / 'images.parquet'}"]
    return ["model=hf", *where, "trainer=cpu", "logger=none", "batch_size=5", f"hydra.run.dir={tmp_path / 'run'}"]


def assert_one_line(code, printed, says, folder=None):
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and says in errors[0], printed
    assert "Traceback" not in printed
    if folder is not None:
        assert not (folder / "manifest.json").exists() and (folder / "failed.json").exists()
        assert not (folder / "shards").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("window=three", "window 'three': expected a whole number"),
        ("window=0", "window 0"),
        ("window=5", "window 5: the model has 4 layers; use 1 to 4"),
        ("target.layers=[7]", "target.layers 7: the model has 4 layers; use 0 to 3"),
        ("model.path=/nowhere", "model.path /nowhere: no such folder"),
        ("model.path=null", "model.path is missing"),
        ("model.path=owner/name", "hub cannot be reached"),
        ("data.path=/nowhere", "data.path /nowhere: no such file or folder"),
        ("data.label_column=y", "data.label_column 'y': the data have the columns image, label"),
        ("data.limit=0", "data.limit 0"),
        ("batch_size=0", "batch_size 0"),
        ("corruption=noise corruption.std=-1", "corruption.std -1"),
        ("logger=wandb logger.mode=sometimes", "logger.mode 'sometimes': expected one of auto, offline, online"),
        ("logger=wandb logger.mode=online", "no Weights & Biases key"),
        ("trainer=gpu", "trainer: No supported gpu backend found"),
        ("trainer.accelerator=abacus", "trainer: "),
        ("trainer=ddp trainer.accelerator=cpu trainer.num_nodes=2", "trainer.num_nodes 2: every machine's processes"),
        ("corruption=noise corruption.std=abc", "corruption.std 'abc'"),
        ("data.limit=true", "data.limit True"),
        ("data.num_workers=two", "data.num_workers 'two'"),
        ("model=emoji_vit", "5 of the data's 5 labels are none of the model's 9 classes"),
    ],
)
def test_a_wrong_value_ends_in_one_line(cli, tiny, tmp_path, monkeypatch, override, says):
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs the tests
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    overrides = override.split()
    kept = [o for o in tiny if not (override == "model=emoji_vit" and o.startswith("model"))]
    kept = [o for o in kept if not (overrides[0] == "logger=wandb" and o == "logger=none")]
    kept = [o for o in kept if not (overrides[0].startswith("trainer=") and o == "trainer=cpu")]
    assert_one_line(*cli(*kept, *overrides), says, tmp_path / "run")


@pytest.mark.parametrize("override", ["corruption=sepia", "windows=3", "corruption.std=0.1", "target=everything"])
def test_an_unknown_option_or_key_is_hydras_to_name(cli, tiny, override):
    code, printed = cli(*tiny, override)
    assert code == 1 and override.split("=")[0].rpartition(".")[2] in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(("option", "key"), [("model=hf", "model.path"), ("data=imagefolder", "data.path")])
def test_a_path_that_was_not_given_is_asked_for(cli, tmp_path, option, key):
    printed = cli(option, "logger=none", "trainer=cpu", f"hydra.run.dir={tmp_path / 'run'}")
    assert_one_line(*printed, f"{key} is missing: add {key}=…", tmp_path / "run")


def test_labels_that_are_not_the_models(cli, tiny, tmp_path):
    names = ["cat", "dog", "bird", "ship", "frog"]
    other = write_parquet(tmp_path / "other.parquet", pictures(3), [0, 1, 2], names=names)
    printed = cli(*tiny, f"data.path={other}")
    says = "3 of the data's 5 labels are none of the model's 5 classes: 'cat', 'dog', 'bird'"
    assert_one_line(*printed, says, tmp_path / "run")


def test_an_output_folder_that_cannot_be_written(cli, tiny):
    code, printed = cli(*tiny, "hydra.run.dir=/proc/vitpatch/run")
    assert_one_line(code, printed, "output folder /proc/vitpatch/run")


def test_a_sweep_folder_that_cannot_be_written(cli, tiny):
    code, printed = cli("-m", *tiny, "hydra.sweep.dir=/proc/vitpatch/sweep")
    assert_one_line(code, printed, "output folder /proc/vitpatch/sweep")


def test_a_full_disk_ends_in_one_line(cli, tiny, tmp_path, monkeypatch):
    from vitpatch.runs.folder import Shards

    def full(*args):
        raise OSError(28, "No space left on device", str(tmp_path / "run" / "shards"))

    monkeypatch.setattr(Shards, "write", full)
    assert_one_line(*cli(*tiny), "No space left on device", tmp_path / "run")


def test_a_bug_of_ours_is_a_failure_too(cli, tiny, tmp_path, monkeypatch):
    import vitpatch.runs.run

    def broken(*args):
        raise RuntimeError("the frobnicator is off")

    monkeypatch.setattr(vitpatch.runs.run.RunTables, "analyze", broken)
    code, printed = cli(*tiny)
    assert code == 1 and "error: RuntimeError: the frobnicator is off (a bug in vitpatch" in printed
    assert (tmp_path / "run" / "failed.json").exists() and not (tmp_path / "run" / "manifest.json").exists()


def test_ctrl_c_is_no_success(cli, tiny, tmp_path, monkeypatch):
    import vitpatch.runs.run

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(vitpatch.runs.run.RunTables, "analyze", interrupted)
    code, printed = cli(*tiny)
    assert code == 130 and "interrupted: " in printed
    assert "interrupted" in (tmp_path / "run" / "failed.json").read_text()


def test_sigterm_stops_a_run(cli, tiny, tmp_path, monkeypatch):
    import signal

    from vitpatch.runs.predict import PatchingModule

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(PatchingModule, "on_predict_batch_end", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        code, printed = cli(*tiny)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 130 and "interrupted: " in printed and not (tmp_path / "run" / "manifest.json").exists()


def test_a_good_run_exits_with_zero_after_a_failed_one(cli, tiny, tmp_path):
    assert cli(*tiny, "window=9")[0] == 1
    code, printed = cli(*tiny)
    assert code == 0 and (tmp_path / "run" / "manifest.json").exists(), printed
    assert not (tmp_path / "run" / "failed.json").exists()


@pytest.mark.usefixtures("tables_only")
def test_what_a_run_says_to_run_next_can_be_typed(cli, tiny, tmp_path, monkeypatch):
    assert cli(*tiny, "corruption=noise", "data.limit=13", "window=3")[0] == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    stronger, read_again = map(shlex.split, manifest["next"])
    assert manifest["finding"] and read_again[:4] == [_python(), "-m", "vitpatch.compare", str(tmp_path / "run")]
    monkeypatch.setattr("vitpatch.runs.reading.draw", lambda *everything: {})
    compare_main(read_again[3:])
    assert len(list((tmp_path / "run" / "views").iterdir())) == 1
    assert stronger[0] == _python() and stronger[1].endswith("patch.py") and "hydra" not in str(stronger)
    code, printed = cli(*stronger[2:], "dry_run=true", f"hydra.run.dir={tmp_path / 'next'}")
    assert stronger[-1] == "corruption=noise_high" and code == 0 and "plan: " in printed, printed


@pytest.mark.parametrize(
    "override", ["window=2", *(pytest.param(of, marks=pytest.mark.long) for of in ("window=9", "model.path=/nowhere"))]
)
def test_a_refused_start_leaves_the_finished_run_as_it_is(cli, tiny, tmp_path, override):
    assert cli(*tiny, "window=1")[0] == 0
    files = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*.*") if p.suffix in (".json", ".csv", ".parquet")
    }
    assert_one_line(
        *cli(*tiny, "window=1", override), override.split("=")[0] if "=2" not in override else "overwrite=true"
    )
    after = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*.*") if p.suffix in (".json", ".csv", ".parquet")
    }
    assert after == files and len(files) == 5


@pytest.mark.parametrize("name", ["../up", "''", "/tmp/x"])
def test_a_sweep_is_a_folder_of_its_own(cli, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = cli("-m", f"sweep={name}", "window=1,2")
    assert_one_line(code, printed, "expected the name of a folder below multirun/")
    assert not list(tmp_path.iterdir())


def test_after_an_interruption_no_other_job_begins_in_the_process(cli, tiny, tmp_path, monkeypatch):
    """A launcher hands its workers the next one while the launching process still ends the sweep."""
    begun = []
    monkeypatch.setattr(run, "run", lambda cfg, path, options: begun.append(path.name) or STOPPED.set())
    sweep = ["-m", *tiny, f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=w${window}", "window=1,2"]
    code, printed = cli(*sweep)
    assert code == 130 and begun == ["w1"], printed
    said = {"state": "interrupted", "reason": "stopped from outside before it began"}
    assert json.loads((tmp_path / "w2" / "failed.json").read_text()) == said
    assert "interrupted: w2: stopped from outside before it began" in printed.splitlines(), printed


@pytest.mark.usefixtures("tables_only")
def test_a_sweep_tells_of_a_refused_start(cli, tiny, tmp_path):
    sweep = ["-m", *tiny, f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.sweep.subdir=s${seed}"]
    assert cli(*sweep, "seed=0,1")[0] == 0
    (tmp_path / "sweep" / "sweep.json").unlink()  # else the start itself is refused
    code, printed = cli(*sweep, "seed=0,1", "window=2")
    assert code == 1 and "0 of 2 runs finished" in printed and printed.count("overwrite=true") == 4


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of a given size can be mounted by root only")
def test_a_disk_that_is_really_full(cli, tiny, tmp_path):
    """A file system of 256 KiB: too small for the figures."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount")
    try:
        code, printed = cli(*tiny, f"hydra.run.dir={small / 'run'}", pictures=True)
        assert_one_line(code, printed, "No space left on device")
        assert not (small / "run" / "manifest.json").exists()
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_model_of_another_depth_is_judged_by_its_own(cli, tiny, tmp_path):
    deeper = save_model(tmp_path / "deep", "vit", num_hidden_layers=6)
    code, printed = cli(*tiny, f"model.path={deeper}", "window=5", "data.limit=2")
    assert code == 0, printed
