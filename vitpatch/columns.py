"""Which columns of a data set hold images, labels, masks and clusters, and what its labels are as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitpatch.data import ColumnNames
from vitpatch.spec import VitPatchError

AUTO = "auto"
"""A column that is found from the features."""
TEXT = ("string", "large_string")


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
            f"data.label_column {label!r} holds {features[label]}; expected names, whole numbers or ClassLabel "
            "(null: the images have no labels)"
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
    """Whether a column holds ClassLabel, whole numbers or text."""
    return hasattr(kind, "names") or str(getattr(kind, "dtype", "")).startswith(("int", "uint", *TEXT))


def is_text(kind: Any) -> bool:
    """Whether a column holds text."""
    return getattr(kind, "dtype", None) in TEXT


def numbered(values: Sequence[Any], kind: Any, column: str) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """A column of labels → (images,) int64, and their names where they have some.

    Names in a column of text are numbered in alphabetical order. Raises ``VitPatchError`` for a row without a label.
    """
    if any(value is None for value in values):
        raise VitPatchError(f"data.label_column {column!r}: some rows have no label")
    if is_text(kind):
        names, labels = np.unique(np.array(values, dtype=str), return_inverse=True)
        return labels.astype(np.int64), tuple(names.tolist())
    labels, names = np.array(values, dtype=np.int64), getattr(kind, "names", None)
    if names is not None and (labels < 0).any():
        raise VitPatchError(f"data.label_column {column!r}: some rows have label -1, which is none")
    return labels, None if names is None else tuple(names)
