import itertools
import logging

import numpy as np
import pytest

from vitpatch.data.labels import is_sorted_by_class, order_in_rounds
from vitpatch.data.sources import ParquetImages, select_rows


def select(labels, **keys):
    """The rows of images with these labels, which have no names, that the keys take."""
    return select_rows(ParquetImages(path="birds", **keys), labels, None)


SORTED = np.repeat(np.arange(10), 20)
RANDOM = np.random.default_rng(0).permutation(SORTED)


@pytest.mark.parametrize(
    ("labels", "sorted_"),
    [
        (SORTED, True),
        (SORTED[::-1], True),
        (np.repeat([5, 2, 9, 0], 7), True),
        (np.tile(np.repeat([0, 1, 2], 5), 4), True),  # four shards, each sorted
        (np.r_[SORTED, SORTED[::-1]], True),
        (
            np.repeat(np.random.default_rng(1).permutation(np.repeat(np.arange(5), 40)), 5),
            True,
        ),  # five views of an object
        (RANDOM, False),
        (np.tile(np.arange(10), 20), False),  # one of each class, again and again
        (np.arange(10), False),  # a single image of each class
        (np.zeros(10, int), False),
        (np.zeros(0, int), False),
        (np.r_[0, 0, 1, 1], True),
        (np.r_[0, 1, 0, 1], False),
        (np.random.default_rng(2).permutation(np.r_[np.zeros(990, int), np.ones(10, int)]), False),
        (np.r_[np.zeros(990, int), np.ones(10, int)], True),
        (np.r_[-1, -1, 0, 0], True),
    ],
)
def test_rows_are_sorted_where_those_of_a_class_lie_together(labels, sorted_):
    assert is_sorted_by_class(labels) == sorted_


def test_random_orders_are_hardly_ever_taken_for_sorted():
    rng = np.random.default_rng(3)
    found = [is_sorted_by_class(rng.permutation(np.arange(60) % classes)) for classes in (2, 3, 10) for _ in range(200)]
    assert sum(found) == 0


def test_a_limit_of_sorted_rows_takes_rounds_over_the_classes_and_says_so(caplog):
    caplog.set_level(logging.INFO)
    rows = select(SORTED, limit=25, seed=4)
    (line,) = caplog.messages
    assert line == (
        "data birds: rows are sorted by class; 25 of 200 are taken in rounds over the classes by seed 4 "
        "(data.shuffle_seed=null: the first)"
    )
    assert np.array_equal(rows, np.sort(rows)) and set(np.bincount(SORTED[rows])) == {2, 3}
    assert np.array_equal(rows, select(SORTED, limit=25, seed=4))
    assert not np.array_equal(rows, select(SORTED, limit=25, seed=5))


def test_fewer_are_among_more_and_come_in_no_special_order():
    taken = [set(select(SORTED, limit=limit, seed=2)) for limit in range(1, 201)]
    assert all(fewer < more for fewer, more in itertools.pairwise(taken))
    first = [SORTED[order_in_rounds(SORTED, seed)[0]] for seed in range(40)]
    assert len(set(first)) > 5  # not always the class of lowest number
    uneven = np.repeat([0, 1, 2], [1, 3, 50])
    assert np.bincount(uneven[order_in_rounds(uneven, 0)[:12]]).tolist() == [1, 3, 8]


@pytest.mark.parametrize(
    ("labels", "keys"),
    [
        (RANDOM, {}),
        (SORTED, {"shuffle_seed": None}),
        (np.full(200, -1), {}),  # no labels
        (np.tile(np.arange(10), 20), {"seed": 9}),
    ],
)
def test_else_the_first_rows_are_taken_whatever_the_seed(labels, keys, caplog):
    caplog.set_level(logging.INFO)
    assert select(labels, limit=16, **keys).tolist() == list(range(16)) and not caplog.messages


def test_a_seed_shuffles_and_no_limit_takes_all():
    assert select(SORTED, limit=16, shuffle_seed=1).tolist() == sorted(np.random.default_rng(1).permutation(200)[:16])
    for limit in (None, 200, 999):
        assert len(select(SORTED, limit=limit)) == 200


def test_rounds_are_over_the_classes_that_are_asked_for():
    rows = select(SORTED, limit=4, classes=[7, 3])
    assert np.bincount(SORTED[rows])[[3, 7]].tolist() == [2, 2]
    rows = select(SORTED, limit=10, per_class=2)
    assert np.bincount(SORTED[rows]).tolist() == [1] * 10 and set(rows % 20) <= {0, 1}  # of the first two of each


def test_labels_that_are_left_out_take_no_place_of_a_limit():
    for labels in (SORTED, RANDOM):
        rows = select(labels, limit=8, label_map=dict.fromkeys(range(1, 10)))
        assert len(rows) == 8 and set(labels[rows]) == {0}
    assert len(select(SORTED, label_map={0: None})) == 200  # without a limit they are counted when they are dropped
