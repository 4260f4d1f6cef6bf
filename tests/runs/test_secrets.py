"""No secret gets into a run's folder: not from the environment, the command line, or the git remote."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from vitpatch.checks import check_no_secret
from vitpatch.errors import VitPatchError

SECRETS = {
    "HF_TOKEN": "hf_recognizableSecretOfTheHub",
    "WANDB_API_KEY": "f00dfeed" * 5,
    "AWS_SECRET_ACCESS_KEY": "recognizableSecretOfTheCloud",
    "SOME_PASSWORD": "recognizablePassword",
}
REMOTE = "recognizableRemotePassword"


def found(folder: Path, words) -> list[tuple[str, str]]:
    """(file, word) of every file below a folder that holds one of the words, in its bytes or its name."""
    hits = []
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        hits += [(str(path), word) for word in words if word.encode() in data or word in path.name]
    return hits


@pytest.mark.long
def test_a_real_run_leaves_no_secret_in_any_file(made, tmp_path):
    """In a repository whose remote has a password, as a real run from its command line."""
    copy = tmp_path / "repo"
    for part in ("vitpatch", "conf"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "emoji*"))
    shutil.copy(ROOT / "patch.py", copy)
    remote = f"https://somebody:{REMOTE}@example.org/vitpatch.git"
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for command in (
        ["init", "-q"],
        ["remote", "add", "origin", remote],
        [*who, "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], cwd=copy, check=True)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_", "PYTHONPATH"))}
    own = {name: str(tmp_path / name.lower()) for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")}
    there = {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(copy), **own}
    command = [sys.executable, "patch.py", "model=hf", f"model.path={made / 'vit'}", "data=parquet", "trainer=cpu"]
    command += [f"data.path={made / 'images.parquet'}", "logger.mode=offline", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        command,
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=300,
        env=keep | there | SECRETS,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 and (tmp_path / "run" / "manifest.json").exists(), done.stderr
    words = [*SECRETS.values(), REMOTE]
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert not found(tmp_path / "run", words)
    assert not [hit for name in (*own.values(), there["HOME"]) for hit in found(Path(name), words)]
    assert not any(word in done.stdout + done.stderr for word in words)
    assert found(copy / ".git", [REMOTE])  # the search finds what is there


def test_wandbs_files_name_no_secret_no_command_line_and_no_program(tmp_path, monkeypatch):
    import wandb

    from vitpatch.runs.tracking import RunInfo, WandbTracker

    monkeypatch.setattr(sys, "argv", ["patch.py", "+token=recognizableArgument"])
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    with WandbTracker("offline").run(RunInfo(tmp_path, "group", {})):
        pass
    assert list(tmp_path.rglob("*.wandb")) and not found(tmp_path, ["recognizableArgument", *SECRETS.values()])
    assert not list(tmp_path.rglob("wandb-metadata.json")) and not list(tmp_path.rglob("code/*"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"data": {"path": "x/hf_recognizableSecretOfTheHub"}}, r"^data\.path: it holds the value .* HF_TOKEN"),
        (
            {"corruption": {"steps": [{"name": "recognizablePassword"}]}},
            r"^corruption\.steps\[0\]\.name: .*SOME_PASSWORD",
        ),
        ({"model": {"path": "https://somebody:word@example.org/x"}}, r"^model\.path: an address with a password"),
        ({"model": {"path": "https://hf_abcdef@example.org/x"}}, r"^model\.path: an address with a password"),
        ({"logger.api_key": "recognizablePart"}, r"^logger\.api_key: it holds a key or token"),
        (
            {"hydra": {"env_set": {"HF_TOKEN": "recognizablePart"}}},
            r"^hydra\.env_set\.HF_TOKEN: it holds a key or token",
        ),
        ({"data": {"path": "hf_recognizablePart" + "x" * 20}}, r"^data\.path: it holds a key or token"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_repeated(config, said):
    with pytest.raises(VitPatchError, match=said) as refused:
        check_no_secret(config, SECRETS)
    assert not any(
        word in str(refused.value) for word in (*SECRETS.values(), "somebody", "hf_abcdef", "recognizablePart")
    )


def test_what_is_no_secret_is_taken():
    environment = {
        "HF_TOKEN": "short",
        "HOME": "/home/somebody",
        "MONKEY": "/home/somebody/data",
        "KEYBOARD": "qwertyuiop",
    }
    config = {"data": {"path": "/home/somebody/data", "x": "short", "seed": 0, "y": "https://example.org:8080/a@b"}}
    check_no_secret(config | {"z": "qwertyuiop", "target": {"tokens": "all"}, "token": ""}, environment)
    check_no_secret({"path": "data/hf_cifar10_test_images_of_a_kind_that_is_long/x"}, {})


@pytest.mark.parametrize("mode", [[], ["-m"]])
@pytest.mark.parametrize("key", ["+hydra.job.env_set.HF_TOKEN", "hydra.job.name", "+logger.api_key"])
def test_a_secret_in_any_part_of_a_command_is_written_nowhere(cli, tmp_path, monkeypatch, mode, key):
    word = "hf_recognizableSecretOfTheHub"
    folders = [f"hydra.run.dir={tmp_path / 'out'}", f"hydra.sweep.dir={tmp_path / 'out'}"]
    monkeypatch.setenv("HF_TOKEN", word)
    code, printed = cli(*mode, *folders, f"{key}={word}")
    assert code == 1 and printed.startswith(f"error: {key.lstrip('+')}: it holds "), printed
    assert word not in printed and not found(tmp_path, [word])
