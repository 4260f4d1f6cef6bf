"""Which class of a model a label is: by name, by synset, by number, by the user's map."""

import pytest

from vitpatch.data.labels import _synsets, label_numbers, match_labels
from vitpatch.errors import VitPatchError

PETS = ["tabby, tabby cat", "Egyptian cat", "golden retriever", "tiger_cat"]


def test_names_in_order_need_no_map():
    assert match_labels(PETS, PETS, 4) is None
    assert match_labels([n.upper().replace(" ", "_") for n in PETS], PETS, 4) is None
    assert match_labels(["crane", "crane"], ["crane", "Crane"], 2) is None  # one name twice, in order
    assert match_labels(["crane", "crane2", "n01440764"], ["crane", "crane, lifter", "tench"], 3) is None
    assert match_labels(["crane", "crane, lifter"], ["crane, lifter", "crane"], 2) == [1, 0]  # whole names come first
    with pytest.raises(VitPatchError, match=r"'crane2'"):
        match_labels(["crane", "crane2"], ["crane", "heron"], 2)


def test_names_in_another_order_are_found():
    assert match_labels(["Golden-Retriever", "egyptian_cat"], PETS, 4) == [2, 1]
    assert match_labels(["tabby", "tigercat"], PETS, 4) == [0, 3]  # one of several words
    assert match_labels(["tabby, tabby cat", "golden retriever"], ["Golden Retriever", "tabby"], 2) == [1, 0]


def test_labels_without_an_image_need_no_class():
    assert match_labels(["poodle", "egyptian cat"], PETS, 4, used={1}) == [-1, 1]
    assert match_labels(["poodle", "egyptian cat", "dog"], PETS, 4, {"dog": 2}, used={1, 2}) == [-1, 1, 2]
    with pytest.raises(VitPatchError, match=r"1 of the data's 2 labels are none.*'poodle'"):
        match_labels(["poodle", "egyptian cat"], PETS, 4, used={0, 1})


def test_numbers_without_names_can_be_mapped():
    assert match_labels(None, PETS, 4, {7: 1, 2: None}, used={0, 2, 7})[:8:7] == [0, 1]
    with pytest.raises(VitPatchError, match=r"1 of the data's 10 labels are none.*'9'"):
        match_labels(None, PETS, 4, {7: 1}, used={0, 7, 9})


def test_names_that_are_numbers_are_the_classes_they_say():
    assert match_labels(["0", "1", "2", "3"], PETS, 4) is None
    in_order, sorted_ = [str(i) for i in range(12)], sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, …
    assert match_labels(sorted_, in_order, 12) == match_labels(sorted_, None, 12) == [int(name) for name in sorted_]
    assert (
        match_labels(in_order, sorted_, 12)
        == match_labels(None, sorted_, 12, used=range(12))
        == [sorted_.index(name) for name in in_order]
    )
    assert match_labels(sorted_, sorted_, 12) is None
    assert match_labels(["3", "7", "9"], in_order, 12) == match_labels(["3", "7", "9"], None, 12) == [3, 7, 9]
    with pytest.raises(VitPatchError, match=r"1 of the data's 2 labels are none.*'12'"):
        match_labels(["3", "12"], None, 12)


def test_a_number_that_is_a_name_is_the_name():
    assert label_numbers([1], ["1", "2", "3"], 3) == [0] and label_numbers([0], ["1", "2", "3"], 3) == [0]
    assert match_labels(["1", "2"], PETS, 4, {1: None, "2": 3}) == [-1, 3]
    assert match_labels(["café"], ["cafe\u0301"], 1) is None  # one letter or two


def test_without_names_the_numbers_hold():
    assert match_labels(None, PETS, 4) is None and match_labels(PETS, None, 4) is None
    with pytest.raises(VitPatchError, match=r"4 classes, the model 7 without names"):
        match_labels(PETS, None, 7)


def test_synsets_are_their_words():
    names = list(_synsets().values())
    assert len(names) == 1000 and names[0].startswith("tench") and len(_synsets()) == 1000
    assert match_labels(list(_synsets()), names, 1000) is None
    assert match_labels(["n03126707", "n02012849", "n01440764"], names, 1000) == [517, 134, 0]  # both cranes
    assert match_labels(["tench", "English springer", "cassette player"], names, 1000) == [0, 217, 482]
    assert match_labels(["n01440764", "n02102040"], ["English springer", "tench"], 2) == [1, 0]


@pytest.mark.parametrize(
    ("data", "model", "says"),
    [
        (["golden retriever", "poodle"], PETS, r"1 of the data's 2 labels are none.*'poodle'.*data.label_map"),
        ([f"x{i}" for i in range(9)], PETS, r"9 of the data's 9 .*'x0', 'x1', 'x2', 'x3', 'x4', …"),
        (["crane"], ["tench", "crane", "crane"], r"'crane'"),  # which of the two is not known
        (["tabby", "tabby cat"], PETS, r"'tabby' and 'tabby cat' are both the model's 'tabby, tabby cat'"),
    ],
)
def test_a_partial_match_stops_and_lists_the_first(data, model, says):
    with pytest.raises(VitPatchError, match=says) as error:
        match_labels(data, model, len(model))
    assert "\n" not in str(error.value)


def test_a_map_says_the_rest():
    assert match_labels(["retriever", "tabby"], PETS, 4, {"retriever": "golden retriever"}) == [2, 0]
    assert match_labels(["retriever", "tabby"], PETS, 4, {"retriever": 2, "tabby": None}) == [2, -1]
    assert match_labels(["a", "b"], None, 4, {"a": 3, 1: 0}) == [3, 0]
    assert match_labels(["cat", "cats"], PETS, 4, {"cat": 0, "cats": 0}) == [0, 0]  # several may be one class
    for label_map, says in (
        ({"dog": 2}, r"data.label_map 'dog': none of the data's labels"),
        ({"retriever": "retriver"}, r"data.label_map 'retriver': none of the classes; did you mean 'golden retriever'"),
        ({"retriever": 4}, r"data.label_map 4: none of the classes"),
        ({"tabby": 1}, r"1 of the data's 2 labels"),
    ):
        with pytest.raises(VitPatchError, match=says):
            match_labels(["retriever", "tabby"], PETS, 4, label_map)


LABELS = [f"LABEL_{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("data", "model", "classes", "label_map", "found"),
    [
        (["Cat", "cat"], ["cat", "Cat"], 2, None, [1, 0]),  # names that differ by case only
        (["cat"], ["Cat", "cat"], 2, None, [1]),
        (["A", "A-"], ["A-", "A"], 2, None, [1, 0]),
        (["-1", "1"], ["1", "-1"], 2, None, [1, 0]),
        (["_", "-"], ["-", "_"], 2, None, [1, 0]),
        (["stage2", "stage1"], ["stage1", "stage2"], 2, None, [1, 0]),
        (sorted(LABELS), None, 12, None, [LABELS.index(name) for name in sorted(LABELS)]),  # LABEL_10 before LABEL_2
        (["LABEL_1", "LABEL_2"], None, 3, None, [1, 2]),
        (["label_2", "label_0"], ["a", "b", "c"], 3, None, [2, 0]),
        (None, ["LABEL_1", "LABEL_0"], 2, None, [1, 0]),
        (["2", "0"], ["LABEL_0", "LABEL_2", "LABEL_1"], 3, None, [1, 0]),
        (["a", "b", "c"], None, 3, {"c": None}, [0, 1, -1]),
        (["a", "b"], None, 7, {"a": 6, "b": 2}, [6, 2]),
        (["tabby cat", "tabby"], ["dog", "tabby, tabby cat"], 2, {"tabby": "dog"}, [1, 0]),
    ],
)
def test_neighbours_of_names_and_numbers(data, model, classes, label_map, found):
    used = None if data else range(classes)
    assert match_labels(data, model, classes, label_map, used) == found


@pytest.mark.parametrize(
    ("data", "model", "label_map", "says"),
    [
        (["1", "01"], None, None, "'1' and '01' are both the model's class 1"),
        (["0", "1"], ["0", "0", "1"], None, "1 of the data's 2 labels are none"),
        (["-1", "0"], ["0", "1"], None, "1 of the data's 2 labels are none.*'-1'"),
        (["cat", "1"], ["0", "1"], None, "1 of the data's 2 labels are none.*'cat'"),
        (["a", "b", "c"], None, {"a": 1}, "data.label_map leaves 'b', 'c' without a class"),
        (["a", "b"], None, {"a": None}, "the data have 2 classes, the model 3 without names"),
        (["a", "b"], None, {"a": "x", "b": 0}, "data.label_map 'x': none of the classes; numbers from 0 to 2"),
        (["a", "b"], ["a", "b", "c"], {"a": 1, 0: 2}, "data.label_map: 0 is the label 'a', which it names twice"),
        (["tabby", "tabby cat", "x"], ["tabby, tabby cat", "x"], {"x": None}, "'tabby' and 'tabby cat' are both"),
        (["stage1", "x"], ["stage", "x"], None, "1 of the data's 2 labels are none.*'stage1'"),
        (["cat"], ["Cat", "CAT"], None, r"'cat' \(several classes have the first one's name\)"),
        (["a", "b"], ["a", "b"], {None: 0}, "data.label_map None: none of the data's labels"),
        (["a", "b"], ["a", "b"], {"a": 0.5}, "data.label_map 0.5: none of the classes"),
        (["a", "b"], ["a", "b"], {"a": True}, "data.label_map True: none of the classes"),
    ],
)
def test_neighbours_that_are_one_line(data, model, label_map, says):
    with pytest.raises(VitPatchError, match=says) as error:
        match_labels(data, model, len(model) if model else 3, label_map)
    assert "\n" not in str(error.value)
