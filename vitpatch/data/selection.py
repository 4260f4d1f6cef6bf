"""Which rows of a data set are taken: by class, by number of each class, and by number in all. Pure, numpy only."""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

AUTO = "auto"
"""A key that the data answer: which column it is, or whether rows are sorted by class."""

Numbers = NDArray[np.int64]


def is_sorted_by_class(labels: Numbers) -> bool:
    """Whether rows of one class lie together, whatever the order of the classes, in one block each or in several.

    Two neighbours are of different classes at most half as often as they would be in random order, in which that is
    expected (n² − Σ nₖ²) / n times, of n rows, nₖ of them of class k.
    """
    n, counts = len(labels), np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or counts.max() == 1:
        return False
    changes = np.count_nonzero(labels[1:] != labels[:-1])
    return changes == len(counts) - 1 or 2 * changes * n <= n**2 - int((counts.astype(np.int64) ** 2).sum())


def in_rounds(labels: Numbers, seed: int) -> Numbers:
    """Positions in rounds over the classes: one of each class, then the next of each, … (images,) int64.

    The order of the classes, and of the images of a class, is random by the seed, and knows nothing of how many are
    taken: the first 16 are among the first 32.
    """
    rng = np.random.default_rng([seed, 3])  # 3: apart from other draws of the seed
    order = rng.permutation(len(labels))
    classes, which = np.unique(labels, return_inverse=True)
    place = rng.permutation(len(classes))[which]
    return order[np.lexsort((place[order], number_in_class(labels[order])))]


def number_in_class(labels: Numbers) -> Numbers:
    """How many of its class stand before each, (images,) int64."""
    found = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = labels == label
        found[of_class] = np.arange(np.count_nonzero(of_class))
    return found


def rows_taken(
    labels: Numbers,
    *,
    merged: Numbers | None = None,
    classes: Collection[int] | None = None,
    left_out: Collection[int] = (),
    per_class: int | None = None,
    limit: int | None = None,
    shuffle_seed: int | str | None = AUTO,
    seed: int = 0,
    where: str = "data",
) -> Numbers:
    """The rows that are taken, ascending, (rows,) int64.

    In this order: shuffled by ``shuffle_seed``, of ``classes``, the first ``per_class`` of each, the first ``limit``,
    for which labels that are ``left_out`` do not count. With ``shuffle_seed`` ``AUTO`` rows stay as they come, but
    where ``limit`` takes a part of rows that are sorted by class, it takes them in rounds over the classes by
    ``seed``, which is logged. Classes are there what is ``merged`` of the labels, (images,). ``where`` names the data.
    """
    rows = np.arange(len(labels))
    if shuffle_seed not in (None, AUTO):
        rows = np.random.default_rng(shuffle_seed).permutation(rows)
    if classes is not None:
        rows = rows[np.isin(labels[rows], list(classes))]
    if per_class is not None:
        rows = rows[number_in_class(labels[rows]) < per_class]
    if limit is None:
        return np.sort(rows)
    rows = rows[~np.isin(labels[rows], list(left_out))]
    of_rows = (labels if merged is None else merged)[rows]
    if shuffle_seed == AUTO and limit < len(rows) and is_sorted_by_class(of_rows):
        log.info(
            "%s: rows are sorted by class; %d of %d are taken in rounds over the classes by seed %d "
            "(data.shuffle_seed=null: the first)",
            where, limit, len(rows), seed,
        )  # fmt: skip
        rows = rows[in_rounds(of_rows, seed)]
    return np.sort(rows[:limit])
