"""The experiments on local stand-ins with the exact layout of the hub's files."""

import json
import shutil

import pandas as pd
import pytest
import torch
from conftest import ROOT, pictures
from families import save_family
from hydra import compose, initialize_config_dir

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
README = """---
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/train-*
  - split: test
    path: plain_text/test-*
  default: true
---
"""


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A copy of uoft-cs/cifar10's layout: columns img and label, parquet by split in plain_text."""
    from datasets import ClassLabel, Dataset, Features, Image

    folder = tmp_path_factory.mktemp("cifar10")
    (folder / "plain_text").mkdir()
    (folder / "README.md").write_text(README)
    features = Features({"img": Image(), "label": ClassLabel(names=CIFAR10)})
    for split, number in (("train", 2), ("test", 12)):
        data = Dataset.from_dict({"img": pictures(number), "label": [i % 10 for i in range(number)]}, features=features)
        data.to_parquet(str(folder / "plain_text" / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder as the study's model has it: names of transformers 4, only pytorch_model.bin."""
    from safetensors.torch import load_file

    folder = save_family(tmp_path_factory.mktemp("models") / "vit", "vit", CIFAR10)
    weights = load_file(folder / "model.safetensors")
    assert any(".attention.attention.query." in name for name in weights)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_the_study_in_one_command(cli, cifar10, classifier, tmp_path):
    local = [f"model.path={classifier}", f"data.path={cifar10}", "data.num_workers=0", "logger=none", "trainer=cpu"]
    said = ["-m", "experiment=cifar10_color", *local, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    code, out = cli(*said)
    assert code == 0, out
    runs = sorted(path.parent for path in (tmp_path / "sweep").glob("*/manifest.json"))
    manifests = [json.loads((run / "manifest.json").read_text()) for run in runs]
    assert sorted(m["config"]["window"] for m in manifests) == [1, 3]
    for run, manifest in zip(runs, manifests, strict=True):
        config = manifest["config"]
        assert config["sweep"] == "cifar10_color" and config["data"]["limit"] == 1000
        assert config["corruption"]["_target_"].endswith("Gray") and config["target"]["site"] == "attn_out"
        examples = pd.read_parquet(run / "examples.parquet")
        assert examples["label_name"].tolist() == [CIFAR10[i % 10] for i in range(12)]
    refused = [*said[1:-1], "model.allow_bin=false", f"hydra.run.dir={tmp_path / 'no'}"]
    code, out = cli(*refused)
    assert code and out.strip().count("\n") == 0 and "model.allow_bin=true" in out and "vitpatch.cli.convert" in out
    code, out = cli(*said[1:-1], f"hydra.run.dir={tmp_path / 'one'}")  # without -m both windows in one run
    assert code == 0, out
    assert set(pd.read_parquet(tmp_path / "one" / "effects.parquet")["window"]) == {1, 3}


def test_without_a_network_it_says_so_in_a_line(cli, tmp_path):
    code, out = cli("experiment=cifar10_color", "logger=none", f"hydra.run.dir={tmp_path}")
    assert code and out.strip().count("\n") == 0
    for needed in ("hub cannot be reached", "HF_HOME", "HF_HUB_OFFLINE", "model.path=FOLDER"):
        assert needed in out


def composed(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("patch", overrides=[f"experiment={name}"], return_hydra_config=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_says_what_it_answers_and_costs_and_its_options_exist(name):
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert "?" in comment and "Costs" in comment and "GPU memory" in comment and f"experiment={name}" in comment
    cfg = composed(name)
    assert cfg.sweep == name
    for group, options in cfg.hydra.sweeper.params.items():
        for option in str(options).split(","):
            if group in ("model", "corruption"):
                assert (ROOT / "conf" / group / f"{option}.yaml").exists()
    assert set(cfg.hydra.sweeper.params) <= {"window", "model", "corruption"}


@pytest.mark.long
def test_the_other_experiments_run_on_stand_ins(cli, cifar10, classifier, tmp_path):
    local = [f"model.path={classifier}", f"data.path={cifar10}", "data.num_workers=0", "logger=none", "trainer=cpu"]
    one = ["experiment=cifar10_windows", "window=[1,3,prefix,suffix]", "data.limit=3"]
    code, out = cli(*one, *local, f"hydra.run.dir={tmp_path / 'w'}")
    assert code == 0, out
    two = ["-m", "experiment=cifar10_corruptions", "corruption=noise_low,blur_high", "data.limit=3", "window=1"]
    code, out = cli(*two, *local, f"hydra.sweep.dir={tmp_path / 'c'}")
    assert code == 0 and len(list((tmp_path / "c").glob("*/manifest.json"))) == 2, out
    shutil.rmtree(tmp_path)
