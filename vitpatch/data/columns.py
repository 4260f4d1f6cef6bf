"""Which columns of a data set hold images, labels, masks and clusters, and what labels and clusters they tell."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitpatch.data.images import UNKNOWN, ColumnNames
from vitpatch.data.selection import AUTO
from vitpatch.errors import VitPatchError

TEXT = ("string", "large_string", "string_view")
MOST_CLASSES = 1_000_000
"""Larger whole numbers are not a class's."""
NO_VALUE = frozenset({"", "nan", "nat", "none", "null", "<na>", "na", "n/a", "#n/a"})
"""What is written, in any case, where a column of text has no value."""


def found_in(features: Mapping[str, Any], asked: ColumnNames) -> ColumnNames:
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
        if not isinstance(kind, datasets.Image) and not _stores_images(kind):
            raise VitPatchError(f"data column {column!r} holds {kind}; expected images (encoded bytes)")
    if label is not None and not _names_classes(features[label]):
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


def _the_one(found: list[str], names: list[str], usual: str) -> str:
    """The one column of a kind, or of several, or none, the one with the usual name."""
    if len(found) == 1:
        return found[0]
    if usual in (found or names):
        return usual
    what = f"several could be it: {', '.join(found)}" if found else f"none of its columns is one: {', '.join(names)}"
    without = "; images without labels: data.label_column=null" if usual == "label" else ""
    raise VitPatchError(f"data.{usual}_column is missing: {what}; name it{without}")


def _stores_images(kind: Any) -> bool:
    """Whether a column without an Image feature holds what one is stored as: a struct of bytes and path, or bytes."""
    return (isinstance(kind, dict) and set(kind) >= {"bytes", "path"}) or getattr(kind, "dtype", None) == "binary"


def _names_classes(kind: Any) -> bool:
    """Whether a column holds ClassLabel, numbers, true and false, or text."""
    return hasattr(kind, "names") or str(getattr(kind, "dtype", "")).startswith(("int", "uint", "float", "bool", *TEXT))


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


def numbered(values: Sequence[Any], kind: Any, column: str, more: Sequence[str] = ()) -> Labels:
    """A column of labels as numbers, and their names where they have some.

    Names in a column of text, and ``more`` that no image has, are numbered by the numbers that they are, else in
    alphabetical order; spaces around them, and how their accents are written, make no difference. True and false are
    names. No value, an empty name, and −1 are no label. Raises ``VitPatchError`` for what is no class's number.
    """
    if is_text(kind):
        return _of_names(values, more)
    if getattr(kind, "dtype", None) == "bool":
        return Labels(np.array([UNKNOWN if v is None else int(v) for v in values], np.int64), ("False", "True"))
    names = getattr(kind, "names", None)
    end = MOST_CLASSES if names is None else len(names)
    numbers = [UNKNOWN if value is None or value != value else value for value in values]
    wrong = next((number for number in numbers if number != UNKNOWN and not _is_class(number, end)), None)
    if wrong is not None:
        raise VitPatchError(
            f"data.label_column {column!r}: label {wrong}; expected whole numbers from 0 to {end - 1}, or -1 for none"
        )
    return Labels(np.array(numbers, dtype=np.int64), None if names is None else tuple(names))


def _is_class(number: float, end: int) -> bool:
    return 0 <= number < end and number == int(number)


def _of_names(values: Sequence[Any], more: Sequence[str]) -> Labels:
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
    found = (plain(value) if isinstance(value, str) else value for value in values)
    return [("row", row) if without[row] else ("value", value) for row, value in enumerate(found)], without


def _is_none(value: Any) -> bool:
    if isinstance(value, str):
        return plain(value).lower() in NO_VALUE
    return value is None or value != value or value in (UNKNOWN, math.inf, -math.inf)
