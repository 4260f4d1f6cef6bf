import datetime
import math

import numpy as np
import pytest
from datasets import ClassLabel, Image, List, Value

from vitpatch.data.images import ColumnNames, LabelledImages
from vitpatch.data.labels import cluster_values, number_labels, number_names
from vitpatch.data.sources import ParquetImages, resolve_columns
from vitpatch.errors import VitPatchError

NAN = math.nan
ACUTE = ("caf\u00e9", "cafe\u0301")
"""One word, written in two ways."""


@pytest.mark.parametrize(
    ("kind", "values", "numbers", "names"),
    [
        ("string", ["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        ("large_string", ["dog", "cat", None], [1, 0, -1], ("cat", "dog")),
        ("string", ["dog ", " dog", "cat"], [1, 1, 0], ("cat", "dog")),
        ("string", [*ACUTE, "tea"], [0, 0, 1], ("caf\u00e9", "tea")),
        ("string", ["a", "", "  "], [0, -1, -1], ("a",)),
        ("string", ["A", "a", "a"], [0, 1, 1], ("A", "a")),  # letters are classes too
        ("string", ["NA", "None", "nan"], [0, 1, 2], ("NA", "None", "nan")),
        ("string", ["10", "2", "1"], [2, 1, 0], ("1", "2", "10")),
        ("string", ["002", "010", "001"], [1, 2, 0], ("001", "002", "010")),
        ("string", ["10.0", "2.0", "-1"], [1, 0, -1], ("2", "10")),
        ("string", ["10", "2", "x"], [0, 1, 2], ("10", "2", "x")),
        ("string", [None, None], [-1, -1], ()),
        ("bool", [True, False, None], [1, 0, -1], ("False", "True")),
        ("bool", [True, True], [1, 1], ("False", "True")),
        ("int8", [3, 0, -1], [3, 0, -1], None),
        ("uint64", [3, 0, None], [3, 0, -1], None),
        ("float64", [1.0, 0.0, 2.0], [1, 0, 2], None),
        ("float32", [1.0, NAN, None], [1, -1, -1], None),
        (ClassLabel(names=["dog", "cat"]), [0, 1, None], [0, 1, -1], ("dog", "cat")),
        (ClassLabel(names=["10", "2"]), [0, 1, -1], [0, 1, -1], ("10", "2")),
    ],
)
def test_each_kind_of_label_is_its_class_or_none(kind, values, numbers, names):
    got, got_names = number_labels(values, Value(kind) if isinstance(kind, str) else kind, "y")
    assert got.tolist() == numbers and got.dtype == np.int64 and got_names == names


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (Value("float64"), [0.5, 1.0], "label 0.5; expected whole numbers"),
        (Value("float64"), [math.inf], "label inf"),
        (Value("int64"), [-2, 0], "label -2"),
        (Value("uint64"), [2**63 + 1], "label 9223372036854775809"),
        (Value("int64"), [20240101], "label 20240101; expected whole numbers from 0 to 999999"),
        (ClassLabel(names=["a", "b"]), [0, 2], "label 2; expected whole numbers from 0 to 1"),
    ],
)
def test_what_is_no_class_is_one_line(kind, values, says):
    with pytest.raises(VitPatchError, match=f"data.label_column 'y': {says}"):
        number_labels(values, kind, "y")


def test_classes_without_images_keep_their_places():
    numbers, names = number_names(["c", "a"], ["b"])
    assert names == ("a", "b", "c") and numbers.tolist() == [2, 0]
    assert number_names(["10", "1"], ["2"])[1] == ("1", "2", "10")


@pytest.mark.parametrize(
    "kind",
    [List(Value("int64")), List(ClassLabel(names=["a"])), {"a": Value("string")}, Value("timestamp[us]"),
     Value("date32"), Value("binary"), Value("null"), Image()],
)  # fmt: skip
def test_a_label_is_one_name_or_number(kind):
    with pytest.raises(VitPatchError, match=r"data.label_column 'y' holds .*a name, a whole number or a ClassLabel"):
        resolve_columns(ParquetImages(path="x", label_column="y"), {"image": Image(), "y": kind})


@pytest.mark.parametrize("kind", [List(Value("int64")), {"a": Value("string")}, Image()])
def test_a_cluster_is_one_value(kind):
    with pytest.raises(VitPatchError, match=r"data.cluster_column 'c' holds .*expected one value for each image"):
        resolve_columns(
            ParquetImages(path="x", image_column="image", cluster_column="c"),
            {"image": Image(), "c": kind, "label": Value("int64")},
        )


DAY = datetime.date(2024, 1, 2)


def clusters_of(values):
    found = cluster_values(values)
    ids = np.arange(len(values))
    images = LabelledImages([], ColumnNames("image"), ids, ids, None, found, "here", fingerprint="x")
    return images.clusters.tolist(), found.count(None)


@pytest.mark.parametrize(
    ("values", "clusters", "without"),
    [
        ([None, None, None], [0, 1, 2], 3),
        (["b", None, "b", None, ""], [0, 1, 0, 2, 3], 3),
        (["nan", "NaN", "None", "NaT", "<NA>", "null", " "], [0, 1, 2, 3, 4, 5, 6], 7),
        ([*ACUTE, "tea ", "tea"], [0, 0, 1, 1], 0),
        ([NAN, 1.0, NAN, 1.0, None], [0, 1, 2, 1, 3], 3),
        ([0.5, 0.25, 0.5], [0, 1, 0], 0),
        ([7, None, 7, -1, -1], [0, 1, 0, 2, 3], 3),  # -1 is what clustering calls noise
        ([-1.0, math.inf, -math.inf, math.inf, 2.0], [0, 1, 2, 3, 4], 4),
        (["N/A", "NA", "#N/A", "n/a", "-1"], [0, 1, 2, 3, 4], 4),
        ([1, 0, None, None], [0, 1, 2, 3], 2),  # a missing value is never the number of its row
        ([True, None, True, False], [0, 1, 0, 2], 1),
        ([DAY, None, DAY, None], [0, 1, 0, 2], 2),
        ([datetime.datetime(2024, 1, 2), None, datetime.datetime(2024, 1, 2)], [0, 1, 0], 1),
        ([b"a", None, b"a"], [0, 1, 0], 1),
        ([1, -1, 1, -1, None], [0, 1, 0, 2, 3], 3),
    ],
)
def test_images_without_a_value_are_clusters_of_their_own(values, clusters, without):
    assert clusters_of(values) == (clusters, without)


def test_one_nan_in_all_rows_is_no_common_cluster():
    """Numbers of a column may be one object each, or one and the same."""
    assert clusters_of([NAN] * 3) == ([0, 1, 2], 3)
    assert clusters_of([float("nan") for _ in range(3)]) == ([0, 1, 2], 3)


def test_clusters_are_numbered_again_where_images_are_left_out():
    ids, labels = np.arange(5), np.array([0, 1, 1, 0, 1])
    images = LabelledImages([], ColumnNames("image", "y"), ids, labels, ("a", "b"), list("pqrqr"), "here", "x")
    mapped = images.label_by_classes([-1, 0], ["b", "c"], 2)
    assert images.clusters.tolist() == [0, 1, 2, 1, 2]
    assert mapped.clusters.tolist() == [0, 1, 1] and mapped.ids.tolist() == [1, 2, 4]
