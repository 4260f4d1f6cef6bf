"""What ships with the package is what the README says of it."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from composed import composed
from conftest import ROOT
from omegaconf import OmegaConf

from vitpatch.runs import run as room
from vitpatch.training.fit import as_markdown

EMOJI, MODEL = ROOT / "vitpatch" / "assets" / "emoji", ROOT / "vitpatch" / "assets" / "emoji_vit"
SCENES = ROOT / "vitpatch" / "assets" / "emoji_scenes_vit"


@pytest.fixture(scope="module")
def splits():
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return {name: Dataset.from_parquet(str(EMOJI / f"{name}.parquet")) for name in ("train", "test")}


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*"))


def test_it_is_small_without_scripts_and_has_its_licences():
    assert not [*EMOJI.parent.rglob("*.py")]
    assert size(EMOJI) <= 10e6 and size(MODEL) <= 6e6 and size(SCENES) <= 6e6
    for name in ("LICENSE-Apache-2.0.txt", "LICENSE-CC-BY-4.0.txt", "LICENSE-MIT.txt", "README.md"):
        assert (EMOJI / name).stat().st_size > 1000


def test_columns_and_classes(splits):
    from datasets import ClassLabel, Image, Value

    text = Value("string")
    for split in splits.values():
        features = split.features
        assert isinstance(features["image"], Image) and isinstance(features["mask"], Image)
        assert isinstance(features["label"], ClassLabel) and 8 <= features["label"].num_classes <= 10
        assert [features[name] for name in ("name", "vendor", "base")] == [text] * 3
    assert splits["train"].features == splits["test"].features


def test_images_are_32_pixel_rgb_on_white_where_the_mask_is_empty(splits):
    for row in splits["test"].select(range(0, 900, 45)):
        image, mask = np.asarray(row["image"]), np.asarray(row["mask"])
        assert row["image"].mode == "RGB" and image.shape == (32, 32, 3) and mask.shape == (32, 32)
        assert (image[mask == 0] == 255).all() and (mask > 0).any()


def test_test_drawings_are_in_no_way_in_training(splits):
    drawn = {name: set(zip(s["base"], s["vendor"], strict=True)) for name, s in splits.items()}
    assert drawn["test"].isdisjoint(drawn["train"])
    raw = {name: pq.read_table(EMOJI / f"{name}.parquet")["image"].to_pylist() for name in splits}
    pixels = {name: {row["bytes"] for row in rows} for name, rows in raw.items()}
    assert pixels["test"].isdisjoint(pixels["train"])
    bases = [set(split["base"]) for split in splits.values()]
    everything = bases[0] | bases[1]
    assert len(bases[1]) == pytest.approx(len(everything) / 2, rel=0.02)
    vendors = pd.DataFrame({"base": splits["test"]["base"], "vendor": splits["test"]["vendor"]})
    assert vendors.groupby("base")["vendor"].nunique().max() == 1


def test_there_are_enough_test_images_in_balanced_rounds(splits):
    test = splits["test"]
    assert len(test) >= 900 and max(Counter(test["base"]).values()) <= 2
    labels = np.array(test["label"])
    total = np.bincount(labels)
    for n in (9, 50, 100, 256, 500):
        counts = np.bincount(labels[:n], minlength=len(total))
        fair = min(k for k in range(n + 1) if np.minimum(total, k).sum() >= n)
        assert (np.minimum(total, fair - 1) <= counts).all() and (counts <= np.minimum(total, fair)).all(), n


def test_the_table_of_the_model_says_that_it_can_be_studied():
    config = json.loads((MODEL / "config.json").read_text())
    assert config["num_hidden_layers"] == 12 and not config["use_mean_pooling"]  # so that the classifier reads CLS
    table = pd.read_csv(MODEL / "evaluation.csv")
    of = {run: rows.set_index("class") for run, rows in table.groupby("run")}
    classes = of["clean"].index.difference(["balanced", "all"])
    assert of["clean"].loc["balanced", "accuracy"] >= 0.80 and of["clean"].loc[classes, "accuracy"].min() >= 0.60
    assert of["clean"].loc["all", "prob"] - of["gray"].loc["all", "prob"] >= 0.12
    assert of["gray"].loc[classes, "predicted"].max() <= 0.5


def test_it_is_the_model_of_the_training_without_overrides():
    """And the README prints its evaluation."""
    saved = json.loads((MODEL / "config.json").read_text())
    described = OmegaConf.to_container(composed("train_eval").architecture)
    assert described.pop("_target_") == "transformers.BeitConfig" and saved["model_type"] == "beit"
    assert {key: saved[key] for key in described} == described
    evaluation = (MODEL / "evaluation.md").read_text()
    assert evaluation in (ROOT / "README.md").read_text()
    assert as_markdown(pd.read_csv(MODEL / "evaluation.csv")) in evaluation


@pytest.mark.long
def test_colour_is_not_restored_where_sharpness_is(tmp_path, monkeypatch):
    """What the README says of the demo: its model is one on which a profile has something to show."""
    monkeypatch.setattr(room, "draw", lambda *everything: {})
    recovered, total = {}, {}
    for corruption in ("gray", "noise"):
        overrides = [f"corruption={corruption}", "window=[1,3]", "controls=false", "trainer=cpu", "logger=none"]
        room.run(composed("patch", *overrides), tmp_path / corruption)
        summary = pd.read_csv(tmp_path / corruption / "summary.csv")
        total[corruption] = json.loads((tmp_path / corruption / "manifest.json").read_text())["total_effect"]["mean"]
        for window, rows in summary.groupby("window"):
            recovered[corruption, window] = rows.set_index("layer")["recovered"]
    assert total["gray"] >= 0.12 and total["noise"] >= 0.12
    assert recovered["gray", 1].max() <= 0.60
    for window in (1, 3):
        gray, noise = recovered["gray", window], recovered["noise", window]
        assert gray.idxmax() > noise.idxmax() and gray[0] < 0 < noise[0] and noise[0] - gray[0] >= 0.2


@pytest.mark.long
def test_the_model_is_as_good_as_its_table_says():
    """The clean row of the evaluation, made again."""
    from vitpatch.data.sources import ParquetImages
    from vitpatch.models.checkpoint import Checkpoint
    from vitpatch.training.fit import evaluate

    table = pd.read_csv(MODEL / "evaluation.csv")
    clean = table[table["run"] == "clean"].set_index("class")
    images = ParquetImages(path=str(EMOJI), split="test").open()
    again = evaluate(Checkpoint(str(MODEL)).load(), images, {}, seed=0, batch_size=128).set_index("class")
    for column in ("accuracy", "prob"):
        assert again[column].to_numpy() == pytest.approx(clean.loc[again.index, column].to_numpy(), abs=0.005)


@pytest.mark.long
def test_the_model_of_scenes_is_as_good_as_its_table_says():
    from vitpatch.data.scenes import TexturedScenes
    from vitpatch.models.checkpoint import Checkpoint
    from vitpatch.training.fit import evaluate

    table = pd.read_csv(SCENES / "evaluation.csv")
    clean = table[table["run"] == "clean"].set_index("class")
    images = TexturedScenes(path=str(EMOJI), split="test", mask_column="mask").open()
    again = evaluate(Checkpoint(str(SCENES)).load(), images, {}, seed=0, batch_size=128).set_index("class")
    for column in ("accuracy", "prob"):
        assert again[column].to_numpy() == pytest.approx(clean.loc[again.index, column].to_numpy(), abs=0.005)
