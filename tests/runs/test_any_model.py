"""Any model on any data, from the config to the files: families, labels by name, images without labels."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import NAMES, ROOT, pictures, write_parquet
from families import NAMES as FAMILY_NAMES
from families import ZERO_SHOT, Brute, checkpoint_of

from vitpatch.errors import VitPatchError
from vitpatch.runs.reading import load_run, read_pages


def options_of(folder, family):
    if family in ZERO_SHOT:
        return ["model=clip_zero_shot", f"model.path={folder}", "model.prompts=['a photo of a {}.','{}']"]
    head = [f"model.head_path={folder}/head.safetensors"] if family == "dinov3" else []
    return ["model=hf", f"model.path={folder}", *head]


def check(run, folder, family, made):
    """The effects of a run on the 13 images are those of full forwards, gray from its formula."""
    model = checkpoint_of(folder, family).load(NAMES)
    brute = Brute(model.model, FAMILY_NAMES[family])
    import numpy as np

    clean = torch.stack([torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) / 255 for p in pictures(13)])
    gray = (clean * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    clean, gray = ((x - 0.5) / 0.5 for x in (clean, gray))
    labels = torch.arange(13) % 5
    logits = brute.patched(clean, gray, "attn_out", window=3).double()
    rows, gray_probs = torch.arange(13), brute.run(gray).double().softmax(-1)
    want = logits.softmax(-1)[:, rows, labels] - gray_probs[rows, labels]
    table = pd.read_parquet(run / "effects.parquet")
    got = torch.tensor(table["effect"].to_numpy()).view(13, -1).T
    assert want.abs().max() > 0.02 and (got - want).abs().max() < 1e-5
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["plan"]["stepwise"] and manifest["counts"]["included"] == 13


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_end_to_end(family, saved, patched, made):
    folder = saved(family)
    check(patched(*options_of(folder, family), "window=3"), folder, family, made)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_by_the_command(family, saved, made, tmp_path):
    folder = saved(family)
    options = [*options_of(folder, family), "data=parquet", f"data.path={made / 'images.parquet'}", "logger=none"]
    command = [sys.executable, "patch.py", *options, "trainer=cpu", "window=3", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-800:]
    check(tmp_path / "run", folder, family, made)


def tables(run):
    return (pd.read_parquet(run / f"{name}.parquet") for name in ("examples", "effects"))


def test_labels_in_another_order_are_the_same_measurement(patched, made, tmp_path):
    order = [3, 0, 4, 1, 2]
    labels = [order.index(i % 5) for i in range(13)]
    path = write_parquet(tmp_path / "shuffled.parquet", pictures(13), labels, names=[NAMES[i].upper() for i in order])
    straight, shuffled = patched(folder="a"), patched(f"data.path={path}", folder="b")
    (examples, effects), (other, moved) = tables(straight), tables(shuffled)
    assert other["label"].tolist() == examples["label"].tolist()
    assert other["label_name"].tolist() == [name.upper() for name in examples["label_name"]]
    assert moved["effect"].tolist() == effects["effect"].tolist()
    ids = [json.loads((run / "manifest.json").read_text())["run_id"] for run in (straight, shuffled)]
    assert ids[0] != ids[1]


def test_a_part_of_the_models_classes_and_a_map(patched, made, tmp_path):
    names = ["Class 4", "second"]
    path = write_parquet(tmp_path / "two.parquet", pictures(13), [i % 2 for i in range(13)], names=names)
    with pytest.raises(VitPatchError, match=r"1 of the data's 2 labels are none.*'second'"):
        patched(f"data.path={path}")
    examples, _ = tables(patched(f"data.path={path}", "data.label_map={second: class_1}"))
    assert set(zip(examples["label"], examples["label_name"], strict=True)) == {(4, "Class 4"), (1, "second")}
    merged = patched(f"data.path={path}", "data.label_map={second: 'Class 4'}", folder="merged")
    assert set(next(tables(merged))["label_name"]) == {"class_4"}  # the model's name: neither one for the other
    left = patched(f"data.path={path}", "data.label_map={second: null}", folder="left")
    counts = json.loads((left / "manifest.json").read_text())["counts"]
    assert (counts["images"], counts["read"], counts["dropped"]) == (13, 7, {"left out by label_map": 6})
    examples, _ = tables(left)
    assert examples["example_id"].tolist() == list(range(0, 13, 2)) and set(examples["label"]) == {4}


def test_rows_keep_their_numbers_when_some_are_chosen(patched):
    examples, effects = tables(patched("data.shuffle_seed=1", "data.classes=[class_1,class_3]", "data.per_class=2"))
    assert len(examples) == 4 and set(examples["label"]) == {1, 3}
    assert (examples["example_id"] % 5 == examples["label"]).all() and examples["example_id"].is_monotonic_increasing
    _, all_effects = tables(patched(folder="whole"))
    same = all_effects[all_effects["example_id"].isin(examples["example_id"])]["effect"]
    assert (same.to_numpy() - effects["effect"].to_numpy()).max() < 1e-6


@pytest.mark.usefixtures("small_pictures")
def test_without_labels_the_clean_prediction_stands_in(patched, tmp_path, made):
    run = patched("data.label_column=null")
    examples, _ = tables(run)
    assert examples["label"].tolist() == examples["pred_clean"].tolist()
    assert examples["label_name"].tolist() == [f"class_{i}" for i in examples["pred_clean"]]
    manifest = json.loads((run / "manifest.json").read_text())
    assert examples["label_is_predicted"].all() and manifest["label_is_predicted"] is True
    assert any("no labels" in note for note in manifest["notes"])
    (page, *_) = read_pages(run / "pages.parquet")
    assert all(image.name.endswith("(predicted)") for image in page.images)  # what a person reads
    pictures(1)[0].save(tmp_path / "cat.jpg")
    alone = ["data=imagefolder", f"data.path={tmp_path / 'cat.jpg'}", "data.num_workers=0"]
    run = patched(*alone, folder="one", pictures=True)
    examples, _ = tables(run)
    assert len(examples) == 1 and examples["label_is_predicted"].tolist() == [True]


def test_a_label_that_ends_in_predicted_is_a_label(patched, made, tmp_path):
    """Whether labels are predicted is a column, and no name is read for it; earlier runs have none."""
    names = [f"{name} (predicted)" for name in NAMES]
    folder = shutil.copytree(made / "vit", tmp_path / "named")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    path = write_parquet(tmp_path / "named.parquet", pictures(13), [i % 5 for i in range(13)], names=names)
    run = patched(f"model.path={folder}", f"data.path={path}", "window=3")
    examples, _ = tables(run)
    manifest = json.loads((run / "manifest.json").read_text())
    assert examples["label_name"].tolist() == [names[i % 5] for i in range(13)]
    assert not examples["label_is_predicted"].any() and manifest["label_is_predicted"] is False
    assert not any("no labels" in note for note in manifest["notes"])
    examples.drop(columns="label_is_predicted").to_parquet(run / "examples.parquet")
    again = load_run(run)
    assert not again.result.labels_are_predicted and len(again.result.examples) == 13
    assert again.examples["label_name"].tolist() == examples["label_name"].tolist()


def test_a_stream_gives_the_same_files(patched, made, tmp_path):
    write_parquet(tmp_path / "test-0.parquet", pictures(13), [i % 5 for i in range(13)])
    hub = ["data=hub", f"data.path={tmp_path}", "data.num_workers=0"]
    stream, whole = patched(*hub, "data.streaming=true", folder="s"), patched(*hub, folder="w")
    for a, b in zip(tables(stream), tables(whole), strict=True):
        pd.testing.assert_frame_equal(a, b)


def test_run_id_knows_what_changes_a_number(config, saved, made, tmp_path):
    from vitpatch.runs.setup import prepare

    def run_id(folder, *overrides):
        return prepare(config(f"model.path={folder}", *overrides)).run_id

    plain = run_id(made / "vit")
    assert plain == run_id(made / "vit", "batch_size=3", "data.num_workers=1", "memory_gb=0.5", "sweep=x")
    others = [run_id(made / "vit", "model.random_init=true"), run_id(made / "vit", "data.limit=12")]
    for number, change in enumerate(({"hidden_act": "relu"}, {"num_attention_heads": 2}, {"layer_norm_eps": 0.1})):
        folder = tmp_path / str(number)
        shutil.copytree(made / "vit", folder)
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | change))
        others.append(run_id(folder))
    teacher = saved("deit_with_teacher")
    heads = ("null", "cls_classifier", "distillation_classifier")
    others += [run_id(teacher, f"model.readout={head}") for head in heads]
    assert len({plain, *others}) == 1 + len(others)
    renamed = shutil.copytree(made / "vit", tmp_path / "renamed")
    assert run_id(renamed) == plain  # whatever the folder is called


def test_an_untrained_model_and_a_head_are_in_the_title(config, saved):
    from vitpatch.runs.setup import prepare

    cfg = config(f"model.path={saved('deit_with_teacher')}", "model.random_init=true", "model.readout=cls_classifier")
    assert prepare(cfg).title.startswith("deit_with_teacher (untrained, cls_classifier) on images · gray · attn_out")
