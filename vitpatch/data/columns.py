"""Which columns of a data set are used, which labels and clusters they give, and which of its rows are taken."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitpatch.data.images import UNKNOWN, ColumnNames
from vitpatch.errors import VitPatchError

log = logging.getLogger(__name__)

AUTO = "auto"
"""A key that the data answer: which column it is, or whether rows are sorted by class."""

Numbers = NDArray[np.int64]
TEXT = ("string", "large_string", "string_view")
MOST_CLASSES = 1_000_000
"""Larger whole numbers are not a class's."""
NO_VALUE = frozenset({"", "nan", "nat", "none", "null", "<na>", "na", "n/a", "#n/a"})
"""What is written, in any case, where a column of text has no value."""


def resolve_columns(features: Mapping[str, Any], asked: ColumnNames) -> ColumnNames:
    """The ``asked`` columns, ``AUTO`` found; ``features`` are those of ``datasets`` by column name.

    Raises ``VitPatchError`` for a column that is missing or of another kind, or where several could be it.
    """
    import datasets

    for key in ("image", "label", "mask", "cluster", "pair"):
        column = getattr(asked, key)
        if column not in (None, AUTO) and column not in features:
            raise VitPatchError(f"data.{key}_column {column!r}: the data have the columns {', '.join(features)}")
    rest = [name for name in features if name not in (asked.mask, asked.cluster, asked.pair)]
    image, label = asked.image, asked.label
    if image == AUTO:
        image = _the_one([name for name in rest if isinstance(features[name], datasets.Image)], rest, "image")
    if label == AUTO:
        classes = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
        label = _the_one([name for name in classes if name in rest] or classes, rest, "label")
    for column in filter(None, (image, asked.mask, asked.pair)):
        kind = features[column]
        is_stored = isinstance(kind, dict) and set(kind) >= {"bytes", "path"}  # as an Image without its feature
        if not (isinstance(kind, datasets.Image) or is_stored or getattr(kind, "dtype", None) == "binary"):
            raise VitPatchError(f"data column {column!r} holds {kind}; expected images (encoded bytes)")
    dtype = str(getattr(features.get(label), "dtype", ""))
    can_name = hasattr(features.get(label), "names") or dtype.startswith(("int", "uint", "float", "bool", *TEXT))
    if label is not None and not can_name:
        raise VitPatchError(
            f"data.label_column {label!r} holds {features[label]}; expected a name, a whole number or a ClassLabel for "
            "each image (null: the images have no labels)"
        )
    if asked.cluster is not None and not isinstance(features[asked.cluster], datasets.Value | datasets.ClassLabel):
        raise VitPatchError(
            f"data.cluster_column {asked.cluster!r} holds {features[asked.cluster]}; expected one value for each "
            "image: text, a number, a date, or true and false"
        )
    name = "name" if "name" in features else None
    return ColumnNames(image, label, asked.mask, asked.cluster, name, asked.pair)


def _the_one(candidates: list[str], names: list[str], usual: str) -> str:
    """The one column of a kind, or of several, or none, the one with the usual name."""
    if len(candidates) == 1:
        return candidates[0]
    if usual in (candidates or names):
        return usual
    what = (
        f"several could be it: {', '.join(candidates)}"
        if candidates
        else f"none of its columns is one: {', '.join(names)}"
    )
    without = "; images without labels: data.label_column=null" if usual == "label" else ""
    raise VitPatchError(f"data.{usual}_column is missing: {what}; name it{without}")


def is_text(kind: Any) -> bool:
    """Whether a column holds text."""
    return getattr(kind, "dtype", None) in TEXT


@dataclass(frozen=True)
class Labels:
    """``numbers`` (images,) int64, ``UNKNOWN`` of an image without a label; ``names`` by number, or ``None``.

    ``alphabetical``: numbers are only the places of names in alphabetical order; no source of the data says them.
    """

    numbers: NDArray[np.int64]
    names: tuple[str, ...] | None
    alphabetical: bool = False


def number_labels(values: Sequence[Any], kind: Any, column: str, more: Sequence[str] = ()) -> Labels:
    """A column of labels as numbers, and their names where they have some.

    Names in a column of text, and ``more`` that no image has, are numbered by the numbers that they are, else in
    alphabetical order; spaces around them, and how their accents are written, make no difference. True and false are
    names. No value, an empty name, and −1 are no label. Raises ``VitPatchError`` for what is no class's number.
    """
    if is_text(kind):
        return _number_names(values, more)
    if getattr(kind, "dtype", None) == "bool":
        return Labels(np.array([UNKNOWN if v is None else int(v) for v in values], np.int64), ("False", "True"))
    names = getattr(kind, "names", None)
    end = MOST_CLASSES if names is None else len(names)
    numbers = [UNKNOWN if value is None or value != value else value for value in values]
    wrong = next((n for n in numbers if n != UNKNOWN and not (0 <= n < end and n == int(n))), None)
    if wrong is not None:
        raise VitPatchError(
            f"data.label_column {column!r}: label {wrong}; expected whole numbers from 0 to {end - 1}, or -1 for none"
        )
    return Labels(np.array(numbers, dtype=np.int64), None if names is None else tuple(names))


def _number_names(values: Sequence[Any], more: Sequence[str]) -> Labels:
    named = ["" if value is None else plain(value) for value in values]
    names = {name: name for name in (*named, *map(plain, more)) if name}
    are_numbers = all(re.fullmatch(r"-?\d+(\.0*)?", name) for name in names)
    if are_numbers and not all(name.isdecimal() for name in names):  # 1.0, or -1
        names = {name: str(int(float(name))) for name in names}
    classes = {*names.values()} - ({str(UNKNOWN)} if are_numbers else set())
    ordered = sorted(classes, key=lambda name: (int(name), name) if are_numbers else name)
    at = {name: number for number, name in enumerate(ordered)}
    numbers = np.array([at.get(names.get(name), UNKNOWN) for name in named], dtype=np.int64)
    return Labels(numbers, tuple(ordered), alphabetical=not are_numbers)


def plain(name: str) -> str:
    """A name without spaces around it, its accents written in one way."""
    return unicodedata.normalize("NFC", str(name)).strip()


def cluster_values(values: Sequence[Any]) -> tuple[list[Hashable], list[bool]]:
    """What is equal of images that are one cluster, of each image; and which images have no value: each is its own.

    No value: null, NaN, infinity, no date, −1 (of a ClassLabel, and what clustering calls noise), text that is empty or
    one of ``NO_VALUE``.
    """
    without = [_is_none(value) for value in values]
    plain_values = (plain(value) if isinstance(value, str) else value for value in values)
    return [("row", row) if without[row] else ("value", value) for row, value in enumerate(plain_values)], without


def _is_none(value: Any) -> bool:
    if isinstance(value, str):
        return plain(value).lower() in NO_VALUE
    return value is None or value != value or value in (UNKNOWN, math.inf, -math.inf)


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
    numbers = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = labels == label
        numbers[of_class] = np.arange(np.count_nonzero(of_class))
    return numbers


def select_rows(
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
