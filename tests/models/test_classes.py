"""How images come to classes: what a config calls them, a map, two splits; what a training makes of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import NAMES, save_model
from families import checkpoint_of
from safetensors.torch import save_file
from transformers import AutoConfig

from vitpatch import VitPatchError, api
from vitpatch.data.images import ColumnNames, LabelledImages
from vitpatch.models.checkpoint import Checkpoint, _load, pretrained_classifier
from vitpatch.models.classes import (
    Classes,
    classes_of_training,
    label_by_classes,
    label_notes,
    name_classes,
)

ABC = {"0": "a", "1": "b", "2": "c"}
GENERIC = {str(i): f"LABEL_{i}" for i in range(3)}


def images(labels, names=None):
    rows = np.arange(len(labels))
    columns = ColumnNames("image", "label")
    return LabelledImages([], columns, rows, np.array(labels), names and tuple(names), rows, "here", fingerprint="x")


@pytest.fixture
def config_of(tmp_path):
    """A checkpoint's config.json with these labels, as it is read."""

    def make(**labels):
        content = {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 1} | labels
        (tmp_path / "config.json").write_text(json.dumps(content))
        return Checkpoint(str(tmp_path)).config()

    return make


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (dict(id2label=ABC), "abc"),
        (dict(id2label={"2": "c", "0": "a", "1": "b"}), "abc"),
        (dict(id2label=ABC, label2id={"a": 0, "b": 1, "c": 2}), "abc"),
        (dict(id2label=ABC, label2id={"a": "0", "b": "1", "c": "2"}), "abc"),
        (dict(id2label=ABC, label2id={"a": 0}), "abc"),
        (dict(id2label=ABC, label2id={"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}), "abc"),  # only one of them was set
        (dict(id2label=GENERIC, label2id={"c": 0, "a": 1, "b": 2}), "cab"),
        (dict(label2id={"c": 0, "a": 1, "b": 2}), "cab"),  # transformers has two classes here, LABEL_0 and LABEL_1
        (dict(label2id={"c": "0", "a": "1", "b": "2"}, num_labels=3), "cab"),
        (dict(id2label=None, label2id={"c": 0, "a": 1, "b": 2}), "cab"),
        (dict(id2label=GENERIC), None),
        (dict(num_labels=3), None),
        (dict(), None),
        (dict(id2label={"0": "a", "1": None, "2": " "}), ["a", "LABEL_1", "LABEL_2"]),
        (dict(id2label={"0": None, "1": "b"}, label2id={"a": 0, "b": 1}), "ab"),
        (dict(id2label=ABC, num_labels=5), [*"abc", "LABEL_3", "LABEL_4"]),  # transformers drops all of them
        (dict(label2id={"cat": 0, "kitty": 0, "dog": 1}), ["cat, kitty", "dog"]),
        (dict(id2label={"0": 7, "1": 3}), ["7", "3"]),
        (dict(id2label={"0": "LABEL_1", "1": "LABEL_0"}), ["LABEL_1", "LABEL_0"]),
        (dict(id2label={"0": "crane", "1": "crane"}, label2id={"crane": 1}), ["crane", "crane"]),
        (dict(id2label={"0": "Big cat", "1": "dog"}, label2id={"big_cat": 0, "dog": 1}), ["Big cat", "dog"]),
        (dict(model_type="timm_wrapper", num_classes=2, label_names=["b", "a"], pretrained_cfg={}), "ba"),
        (dict(model_type="timm_wrapper", num_classes=3, label_names=["b", "a"]), ["b", "a", "LABEL_2"]),
    ],
)
def test_names_are_what_either_map_of_a_config_says(config_of, labels, names):
    classes = Classes.of(config_of(**labels))
    assert (classes.names, classes.doubt) == (names and tuple(names), None)


@pytest.mark.parametrize(
    ("labels", "doubt"),
    [
        (dict(id2label=ABC, label2id={"c": 0, "a": 1, "b": 2}), "id2label calls class 0 'a', label2id 'c'"),
        (dict(id2label=ABC, label2id={"a": 1}), "id2label calls class 1 'b', label2id 'a'"),
        (dict(id2label={"1": "a", "2": "b", "3": "c"}), "names a class 3 ('c'), the model has classes 0 to 2"),
        (dict(label2id={"a": 1, "b": 2}, num_labels=2), "label2id names a class 2 ('b'), the model has classes 0 to 1"),
        (dict(id2label={"0": "a", "1": "b"}, label2id={"x": 7}), "label2id names a class 7 ('x')"),
        (dict(id2label=GENERIC, label2id={"LABEL_1": 0, "LABEL_0": 1}), "class 0 'LABEL_0', label2id 'LABEL_1'"),
    ],
)
def test_maps_that_contradict_name_nothing_and_a_label_needs_the_users_map(config_of, labels, doubt):
    classes = Classes.of(config_of(**labels))
    assert classes.names is None and doubt in classes.doubt
    data = images([0, 1, 1], ["a", "b"])
    with pytest.raises(VitPatchError, match=r"no sure names: .*data.label_map=\{label: number\}.*'a', 'b'") as error:
        label_by_classes(data, classes, None)
    assert doubt in str(error.value) and "\n" not in str(error.value)
    assert label_by_classes(data, classes, [("a", 1), ("b", 0)]).labels.tolist() == [1, 0, 0]
    with pytest.raises(VitPatchError, match="no sure names"):
        label_by_classes(data, classes, [("a", None)])
    assert label_by_classes(images([0, 1]), classes, None).labels.tolist() == [0, 1]  # numbers need no names
    assert doubt in label_notes(images([0, 1]), classes, None)[0]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (dict(id2label=["a", "b"]), "id2label in its config.json is a list"),
        (dict(id2label={"a": 0, "b": 1}), "id2label in its config.json: 'a' for 0 is no number of a class"),
        (dict(id2label=ABC, label2id={"a": None}), "label2id in its config.json: None for 'a'"),
        (dict(id2label=ABC, label2id={"a": "x"}), "label2id in its config.json: 'x' for 'a'"),
        (dict(label2id={"a": 0.5}), "label2id in its config.json: 0.5 for 'a'"),
    ],
)
def test_maps_of_another_form_are_one_line(config_of, labels, says):
    with pytest.raises(VitPatchError, match=r"^model /.*cannot be loaded: ") as error:
        config_of(**labels)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_is_loaded_with_the_names_that_only_label2id_has(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made / "vit", folder)
    content = json.loads((folder / "config.json").read_text())
    del content["id2label"]
    content["label2id"] = {name: (index + 2) % 5 for index, name in enumerate(NAMES)}
    (folder / "config.json").write_text(json.dumps(content))
    model = Checkpoint(str(folder)).load()
    assert model.label_names == tuple(NAMES[3:] + NAMES[:3]) and model.classes == 5
    data = label_by_classes(images(range(5), NAMES), Classes.of(model.model.config), None)
    assert data.labels.tolist() == [2, 3, 4, 0, 1]


def test_labels_taken_by_their_place_are_said():
    nameless = Classes(3, None)
    data = images([0, 1, 2], "abc")
    (note,) = label_notes(data, nameless, None)
    assert "that of the alphabet: 0 = 'a', 1 = 'b', 2 = 'c'; data.label_map" in note
    assert label_by_classes(data, nameless, None).labels.tolist() == [0, 1, 2]
    (note,) = label_notes(images([0, 1, 2], "cab"), nameless, None)
    assert "alphabet" not in note and "0 = 'c'" in note
    for quiet in (
        label_notes(images([0, 1, 2]), nameless, None),
        label_notes(images([0, 1, 2], ["0", "1", "2"]), nameless, None),
        label_notes(data, Classes(3, tuple("cab")), None),
        label_notes(data, nameless, [("a", 2), ("b", 0), ("c", None)]),
    ):
        assert quiet == ()


def test_a_map_may_name_a_label_that_only_the_other_split_has():
    train, test, classes = images([0, 1, 2], "abc"), images([0, 1], "ab"), Classes(2, tuple("ba"))
    labelled = label_by_classes(test, classes, [("c", None)], other_split=train)
    assert labelled.labels.tolist() == [1, 0]
    assert label_by_classes(train, classes, [("c", None)], other_split=test).ids.tolist() == [0, 1]
    with pytest.raises(VitPatchError, match=r"data.label_map 'x': none of the data's labels"):
        label_by_classes(test, classes, [("x", None)], other_split=train)


def of_training(train, label_map=None, own=None, test=None):
    return classes_of_training(train, label_map, own, test or train)


def test_a_training_has_the_classes_that_its_labels_make():
    abc = images([0, 1, 2], "abc")
    assert of_training(abc)[0].names == ("a", "b", "c")
    assert of_training(abc, [("c", None)])[0].names == ("a", "b")
    assert of_training(abc, [("a", "letter"), ("b", "letter")])[0].names == ("letter", "c")
    assert of_training(abc, [("a", "C")])[0].names == ("c", "b")  # a label's own spelling
    assert of_training(abc, [("a", 10), ("b", 9), ("c", 9)])[0].names == ("9", "10")
    assert of_training(images([0, 2, 1]))[0].names == ("LABEL_0", "LABEL_1", "LABEL_2")
    numbered = of_training(images([0, 2, 1]), [(0, None)])[0]
    assert numbered.names == ("1", "2")
    assert label_by_classes(images([2, 0, 1]), numbered, [(0, None)]).labels.tolist() == [1, 0]
    with pytest.raises(VitPatchError, match="one class, a; a classifier needs two"):
        of_training(abc, [("b", None), ("c", None)])
    for train, test in ((abc, images([0, 1, 2])), (images([0, 1, 2]), abc)):
        with pytest.raises(VitPatchError, match="split's labels have names, the other's are numbers"):
            of_training(train, test=test)
    assert of_training(images([0, 1], "01"), test=images([0, 1]))[0].names == ("0", "1")
    with pytest.raises(VitPatchError, match="training needs labels"):
        of_training(LabelledImages([], ColumnNames("image"), np.arange(1), np.array([-1]), None, [0], "", "x"))


@pytest.mark.parametrize(
    ("own", "train", "label_map", "names", "kept"),
    [
        (Classes(3, tuple("abc")), images([0, 1, 2], "abc"), None, "abc", True),
        (Classes(3, tuple("cab")), images([0, 1, 2], "abc"), None, "cab", True),  # the checkpoint's order
        (Classes(3, ("C", "a_1", "b")), images([0, 1, 2], ["a 1", "b", "c"]), None, ["C", "a_1", "b"], True),
        (Classes(3, tuple("abd")), images([0, 1, 2], "abc"), None, "abc", False),  # as many, but others
        (Classes(3, tuple("abc")), images([0, 1, 2], "abc"), [("c", None)], "ab", False),
        (Classes(2, tuple("ba")), images([0, 1, 2], "abc"), [("c", None)], "ba", True),
        (Classes(2, ("cat", "dog")), images([0, 1, 2], "abc"), dict(a="dog", b="cat", c="cat"), ["cat", "dog"], True),
        (Classes(3, None), images([0, 1, 2], "abc"), None, "abc", False),
        (Classes(3, None), images([0, 1, 2]), None, ["LABEL_0", "LABEL_1", "LABEL_2"], True),
        (Classes(3, tuple("abc")), images([0, 1, 2]), None, ["LABEL_0", "LABEL_1", "LABEL_2"], False),
        (Classes(3, None), images([0, 1, 2], "abc"), dict(a=2, b=0, c=1), "012", True),
        (Classes(3, tuple("210")), images([0, 1, 2], "021"), None, "210", True),
        (Classes(3, None, "id2label calls …"), images([0, 1, 2], "abc"), None, "abc", False),
        (Classes(3, ("a", "a", "b")), images([0, 1, 2], "abc"), None, "abc", False),
    ],
)
def test_a_head_is_kept_for_its_own_classes_only(own, train, label_map, names, kept):
    label_map = list(label_map.items()) if isinstance(label_map, dict) else label_map
    classes, why = of_training(train, label_map, own)
    assert classes.names == tuple(names) and (why is None) == kept
    labelled = label_by_classes(train, classes, label_map)
    wanted = [dict(label_map or ()).get(name, name) for name in train.label_names or names]
    asked = [name for name in wanted if name is not None]
    got = [classes.names[label] for label in labelled.labels]
    assert [str(name).casefold().replace(" ", "_") for name in asked] == [name.casefold() for name in got]


@pytest.mark.parametrize("family", ["vit", "deit_with_teacher"])
def test_a_new_head_of_the_same_size_is_new_and_a_kept_one_the_old(made, family):
    checkpoint = Checkpoint(str(made / family))
    torch.manual_seed(0)
    (kept, _, is_kept), (new, _, is_new) = (pretrained_classifier(checkpoint, NAMES, keeps) for keeps in (True, False))
    assert (is_kept, is_new) == (True, False)
    for name, weight in checkpoint.load().model.named_parameters():
        assert torch.equal(kept.get_parameter(name), weight)
        if name.endswith("weight"):  # biases begin as 0
            assert torch.equal(new.get_parameter(name), weight) == ("classifier" not in name), name
    assert not pretrained_classifier(checkpoint, NAMES[:3], True)[2]  # of another size


def test_a_model_of_patches_is_fine_tuned_on_pixels(saved):
    """SigLIP 2 takes rows of patches: training gives it the pixels that a run does."""
    checkpoint, pixels = Checkpoint(str(saved("siglip2"))), torch.rand(2, 3, 32, 32)
    model = pretrained_classifier(checkpoint, NAMES, keeps_head=True)[0].eval()
    assert torch.equal(model(pixel_values=pixels).logits, checkpoint.load()(pixels))


def test_what_is_fine_tuned_says_its_own_labels(tmp_path):
    config = AutoConfig.for_model("vit", problem_type="multi_label_classification", num_labels=3)
    name_classes(config, ["x", "y"])
    assert (config.id2label, config.problem_type) == ({0: "x", 1: "y"}, "single_label_classification")
    content = {"model_type": "timm_wrapper", "num_classes": 2, "label_names": ["a", "b"], "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = Checkpoint(str(tmp_path)).config()
    name_classes(config, ["x", "y", "z"])
    assert config.to_dict()["label_names"] == ["x", "y", "z"]  # timm's are saved under this name


def test_what_probabilities_are_is_said_or_refused(patched, tmp_path):
    save_model(tmp_path / "multi", "vit", problem_type="multi_label_classification")
    run = patched(f"model.path={tmp_path / 'multi'}", "window=1", "data.limit=4")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["model"]["problem_type"] == "multi_label_classification"
    assert "do not exclude each other" in manifest["notes"][0] and "metric=logit" in manifest["notes"][0]
    assert "(multi-label)" in manifest["title"]


def model_of(**config):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    return ViTForImageClassification(ViTConfig(**sizes, intermediate_size=8, **config)).eval()


def test_from_python_too(caplog):
    pixels = torch.rand(2, 3, 16, 16)
    with caplog.at_level("WARNING"):
        api.patch(model_of(problem_type="multi_label_classification", num_labels=3), pixels, pixels, [0, 1], window=1)
    assert "do not exclude each other" in caplog.text
    with_sigmoid = model_of(num_labels=3)
    with_sigmoid.classifier = torch.nn.Sequential(with_sigmoid.classifier, torch.nn.Sigmoid())
    replaced = model_of(num_labels=3)
    replaced.classifier = torch.nn.Linear(8, 7)
    for model, says in (
        (replaced, "its classifier has 7 outputs, its config 3 classes"),
        (model_of(problem_type="regression", num_labels=3), "problem_type regression: its outputs are values"),
        (model_of(problem_type="regression", num_labels=1), "problem_type regression"),
        (model_of(num_labels=1), "has 1 class; an effect needs two or more"),
        (with_sigmoid, "classifier ends in Sigmoid, so its outputs are no logits"),
    ):
        with pytest.raises(VitPatchError, match=says) as error:
            api.patch(model, pixels, pixels, [0, 1], window=1)
        assert "\n" not in str(error.value)


def test_texts_that_are_one_to_the_model_are_said(saved):
    model = checkpoint_of(saved("clip_zero_shot"), "clip_zero_shot").load(["class_0", "class 0", "class_1"])
    (note,) = model.notes
    assert note.startswith("the model cannot tell apart 'class_0' and 'class 0', whose texts")
    pixels = torch.rand(1, 3, *model.input_size)
    first, second, _ = model(pixels)[0]
    assert float((first - second).abs()) < 1e-5
    assert checkpoint_of(saved("clip_zero_shot"), "clip_zero_shot").load(NAMES).notes == ()
    with pytest.raises(VitPatchError, match="they are numbers"):
        checkpoint_of(saved("clip_zero_shot"), "clip_zero_shot").load(["LABEL_0", "LABEL_1"])
    (note,) = checkpoint_of(saved("siglip_zero_shot"), "siglip_zero_shot").load(NAMES).notes
    assert "sigmoid" in note and "softmax over the data's labels" in note


def test_names_of_a_backbone_are_its_heads_only_where_they_are_as_many(saved, tmp_path, caplog):
    folder = shutil.copytree(saved("dinov3"), tmp_path / "backbone")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"id2label": ABC}))
    for classes, names in ((3, ("a", "b", "c")), (5, None)):
        save_file({"weight": torch.randn(classes, 32)}, tmp_path / "head.safetensors")
        model = Checkpoint(str(folder), head_path=str(tmp_path / "head.safetensors")).load()
        assert (model.classes, model.label_names) == (classes, names)
        _load.cache_clear()
    assert "its config names 3 classes, model.head_path has 5" in caplog.text
