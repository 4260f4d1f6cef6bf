"""The labels of images: their numbers and names, and which of a model's classes each label is."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vitpatch.errors import VitPatchError
from vitpatch.formatting import first_few

SYNSETS = Path(__file__).parents[1] / "assets" / "imagenet_synsets.tsv"
LEFT_OUT = -1
"""The class of a label whose images are left out."""
UNKNOWN = -1
"""The label of an image that has none: the clean run's prediction takes its place."""
TEXT = ("string", "large_string", "string_view")
MOST_CLASSES = 1_000_000
"""Larger whole numbers are not a class's."""
NO_VALUE = frozenset({"", "nan", "nat", "none", "null", "<na>", "na", "n/a", "#n/a"})
"""What is written, in any case, where a column of text has no value."""


def is_text(kind: Any) -> bool:
    """Whether a column holds text."""
    return getattr(kind, "dtype", None) in TEXT


def number_labels(values: Sequence[Any], kind: Any, column: str) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """A column of labels of a ``kind`` (its feature of ``datasets``) as numbers, and their names where they have some.

    (images,) int64, ``UNKNOWN`` of an image without a label: no value, an empty name, or −1. Names in a column of text
    are numbered by ``number_names``; true and false are names. Raises ``VitPatchError`` for what is no class's number.
    """
    if is_text(kind):
        return number_names(values)
    if getattr(kind, "dtype", None) == "bool":
        return np.array([UNKNOWN if value is None else int(value) for value in values], np.int64), ("False", "True")
    names = getattr(kind, "names", None)
    end = MOST_CLASSES if names is None else len(names)
    numbers = [UNKNOWN if value is None or value != value else value for value in values]
    wrong = next((n for n in numbers if n != UNKNOWN and not (0 <= n < end and n == int(n))), None)
    if wrong is not None:
        raise VitPatchError(
            f"data.label_column {column!r}: label {wrong}; expected whole numbers from 0 to {end - 1}, or -1 for none"
        )
    return np.array(numbers, np.int64), None if names is None else tuple(names)


def number_names(
    values: Sequence[str | None], without_images: Sequence[str] = ()
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Names of classes as numbers, (images,) int64, and the names in their order, also those ``without_images``.

    Where all names are whole numbers these are the order, else the alphabet. Spaces around names, and how their accents
    are written, make no difference.
    """
    named = ["" if value is None else normalize_name(value) for value in values]
    names = {name: name for name in (*named, *map(normalize_name, without_images)) if name}
    are_numbers = all(re.fullmatch(r"-?\d+(\.0*)?", name) for name in names)
    if are_numbers and not all(name.isdecimal() for name in names):  # 1.0, or -1
        names = {name: str(int(float(name))) for name in names}
    classes = {*names.values()} - ({str(UNKNOWN)} if are_numbers else set())
    ordered = sorted(classes, key=lambda name: (int(name), name) if are_numbers else name)
    at = {name: number for number, name in enumerate(ordered)}
    return np.array([at.get(names.get(name), UNKNOWN) for name in named], np.int64), tuple(ordered)


def normalize_name(name: str) -> str:
    """A name without spaces around it, its accents written in one way."""
    return unicodedata.normalize("NFC", str(name)).strip()


def cluster_values(values: Sequence[Any]) -> list[Hashable | None]:
    """The value of each image, equal for images of one cluster; ``None`` where it has none.

    No value: null, NaN, infinity, no date, −1 (of a ClassLabel, and what clustering calls noise), text that is empty or
    one of ``NO_VALUE``.
    """
    values = [normalize_name(value) if isinstance(value, str) else value for value in values]
    return [None if _is_missing(value) else value for value in values]


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() in NO_VALUE
    return value is None or value != value or value in (UNKNOWN, math.inf, -math.inf)


def match_labels(
    data_names: Sequence[str] | None,
    model_names: Sequence[str] | None,
    classes: int,
    label_map: Mapping[Any, Any] | None = None,
    used: Collection[int] | None = None,
    doubt: str | None = None,
) -> list[int] | None:
    """The model's class of each of the data's labels, in their order; ``None`` where both have the same numbers.

    Names that are numbers (also ``LABEL_7``) say which class is meant; where one side has no names, numbers hold. Names
    are compared as they are, then without case, spaces, underscores and hyphens; an ImageNet synset (n01440764) is its
    words; of several words with commas, one that no other class has is enough. ``label_map`` gives the class of some
    labels, by name or number: {label: class}, ``None`` = its images are left out. ``doubt`` is the reason why the
    model's names are not known; they are ``None`` then. Raises ``VitPatchError`` for a label without a class, of the
    labels that are ``used`` (default: all).
    """
    label_map = label_map or {}
    if data_names is None and not label_map and not are_numbers(model_names):
        return None
    numbers = [-1, *(used or ()), *(key for key in label_map if type(key) is int)]
    labels = list(map(str, range(1 + max(numbers)))) if data_names is None else list(data_names)
    mapped = _classes_by_map(label_map, labels, model_names, classes)
    used = range(len(labels)) if used is None else used
    unmapped = [at for at in range(len(labels)) if at in used and at not in mapped]
    if matched_by_place(data_names, model_names) and unmapped:
        _check_places([labels[at] for at in unmapped], len(labels), classes, mapped, doubt)
    by_name = _have_words(data_names, model_names)
    matched = _by_name(labels, model_names) if by_name else _by_number(labels, model_names, classes)
    matched = [mapped.get(at, index) for at, index in enumerate(matched)]
    if missing := [labels[at] for at, index in enumerate(matched) if index is None and at in used]:
        raise VitPatchError(_no_class(missing, labels, model_names or list(map(str, range(classes)))))
    matched = [LEFT_OUT if index is None else index for index in matched]  # of these there is no image
    _check_once({at: matched[at] for at in unmapped}, labels, model_names)
    return None if matched == list(range(classes)) else matched


def matched_by_place(data_names: Sequence[str] | None, model_names: Sequence[str] | None) -> bool:
    """Whether labels have names and the model's classes have none, so that labels are matched by their order alone."""
    return data_names is not None and not are_numbers(data_names) and not _have_words(data_names, model_names)


def place_note(names: Sequence[str]) -> str:
    """The note for a reader where labels are matched to classes by their order."""
    order = ", which is that of the alphabet" if list(names) == sorted(names) else ""
    some = first_few([f"{at} = {name!r}" for at, name in enumerate(names)])
    return (
        f"the model has no names for its classes: the data's labels are taken in their order{order}: {some}; "
        "data.label_map={label: number} says otherwise"
    )


def are_numbers(names: Sequence[str] | None) -> bool:
    """Whether all names are whole numbers (7, LABEL_7), which are then the numbers of classes."""
    return names is not None and all(_number(name) is not None for name in names)


def _have_words(data_names: Sequence[str] | None, model_names: Sequence[str] | None) -> bool:
    """Whether names can be compared: both the data and the model have some that are words."""
    if data_names is None or model_names is None or are_numbers(data_names):
        return False
    return not are_numbers(model_names) or any(_number(name) is not None for name in data_names)


def _number(name: str) -> int | None:
    """The number in a name such as 7 or LABEL_7; ``None`` of other names."""
    match = re.fullmatch(r"(?:LABEL_)?(\d+)", name, re.IGNORECASE)
    return int(match[1]) if match else None


def _by_number(labels: Sequence[str], model_names: Sequence[str] | None, classes: int) -> list[int | None]:
    """The class whose number is the label's name where labels are called by numbers, else the label's own number."""
    numbers = map(_number, model_names) if are_numbers(model_names) else range(classes)
    index_of = _unique((number, index) for index, number in enumerate(numbers))
    return [index_of.get(number) for number in (map(_number, labels) if are_numbers(labels) else range(len(labels)))]


def _classes_by_map(
    label_map: Mapping[Any, Any], labels: Sequence[str], model_names: Sequence[str] | None, classes: int
) -> dict[int, int]:
    """The classes that ``data.label_map`` gives to labels, by number; ``LEFT_OUT`` where it leaves them out."""
    mapped: dict[int, int] = {}
    for key, value in label_map.items():
        at = _require_label("data.label_map", key, labels, len(labels), "the data's labels")
        if at in mapped:
            raise VitPatchError(f"data.label_map: {key!r} is the label {labels[at]!r}, which it names twice")
        mapped[at] = (
            LEFT_OUT if value is None else _require_label("data.label_map", value, model_names, classes, "the classes")
        )
    return mapped


def _check_places(
    unmapped: Sequence[str], labels: int, classes: int, mapped: Mapping[int, int], doubt: str | None
) -> None:
    """Raises ``VitPatchError`` where the order of labels is not enough to tell the classes of those ``unmapped``."""
    remedy = "data.label_map={label: number} says which is which"
    some = first_few([*map(repr, unmapped)])
    if doubt is not None:
        raise VitPatchError(f"the model's classes have no sure names: {doubt}; {remedy}, of each of {some}")
    if any(index != LEFT_OUT for index in mapped.values()):
        raise VitPatchError(
            f"data.label_map leaves {some} without a class, and the model has no names to find them by; say all of "
            "them, {label: number}, or null to leave a label's images out"
        )
    if labels != classes:
        raise VitPatchError(
            f"the data have {labels} classes, the model {classes} without names: not the same labels; {remedy}"
        )


def _no_class(missing: Sequence[str], data_names: Sequence[str], model_names: Sequence[str]) -> str:
    some = first_few([*map(repr, missing)])
    near = difflib.get_close_matches(missing[0], model_names, n=1, cutoff=0)
    like = f" (nearest to the first: {near[0]!r})" if near else ""
    if sum(fold_name(missing[0]) in _folded_parts(name) for name in model_names) > 1:
        like = " (several classes have the first one's name)"
    return (
        f"{len(missing)} of the data's {len(data_names)} labels are none of the model's {len(model_names)} classes: "
        f"{some}{like}; data.label_map={{label: class}} says which they are, or null to leave their images out"
    )


def _check_once(matched: Mapping[int, int], data_names: Sequence[str], model_names: Sequence[str] | None) -> None:
    """Raises ``VitPatchError`` where two labels are one class without a ``label_map``; ``matched`` by label."""
    twice = [index for index, number in Counter(i for i in matched.values() if i != LEFT_OUT).items() if number > 1]
    if twice:
        which = [data_names[at] for at, index in matched.items() if index == twice[0]]
        name = f"{model_names[twice[0]]!r}" if model_names else f"class {twice[0]}"
        raise VitPatchError(
            f"the data's labels {' and '.join(map(repr, which[:2]))} are both the model's {name}; "
            "data.label_map={label: class} says which is which"
        )


def _require_label(key: str, value: Any, names: Sequence[str] | None, number: int, whose: str) -> int:
    """The number of a label or class that is given by its name or number. Raises ``VitPatchError`` where it is none."""
    if (index := _find_label(value, names, number)) is not None:
        return index
    near = difflib.get_close_matches(str(value), list(map(str, names or ())), n=3, cutoff=0.4)
    numbers = f"numbers from 0 to {number - 1}"
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"names, or {numbers}" if names else numbers
    raise VitPatchError(f"{key} {value!r}: none of {whose}; {hint}")


def _find_label(value: Any, names: Sequence[str] | None, number: int) -> int | None:
    for form in (str, fold_name):
        forms = [form(name) for name in names or ()]
        if type(value) in (int, str) and forms.count(form(str(value))) == 1:
            return forms.index(form(str(value)))
    return value if type(value) is int and 0 <= value < number else None


def mapped_labels(label_map: Mapping[Any, Any], names: Sequence[str]) -> dict[Any, int]:
    """The label's number by key of a ``data.label_map``; keys that are none of these labels are left out."""
    indices = {key: _find_label(key, names, len(names)) for key in label_map}
    return {key: index for key, index in indices.items() if index is not None}


def mapped_class_names(names: Sequence[str], label_map: Mapping[Any, Any]) -> list[str]:
    """The names of the classes that ``data.label_map`` makes of labels, by first appearance; numbers in their order."""
    values: dict[int, Any] = dict(enumerate(names))
    for key, value in label_map.items():
        values[_require_label("data.label_map", key, names, len(names), "the data's labels")] = value
    made: list[str] = []
    for value in values.values():
        if value is None:
            continue
        if type(value) not in (int, str):
            raise VitPatchError(f"data.label_map {value!r}: expected the name or number of a class, or null")
        known = _find_label(str(value), names, 0)
        made.append(str(value) if known is None else names[known])  # a label's own spelling
    made = list(dict.fromkeys(made))
    return sorted(made, key=_number) if label_map and are_numbers(made) else made


def label_numbers(value: str | int | Sequence[str | int], names: Sequence[str] | None, number: int) -> list[int]:
    """The numbers of the labels that ``data.classes`` names, by name or number."""
    classes = [value] if isinstance(value, str | int) else value
    return [_require_label("data.classes", one, names, number, "the data's labels") for one in classes]


def _by_name(data_names: Sequence[str], model_names: Sequence[str]) -> list[int | None]:
    """The class of each label's name: as written, whole, or by one of its words, each only where that is one class."""
    as_written = _unique((name, index) for index, name in enumerate(model_names))
    whole = _unique((fold_name(_words(name)), index) for index, name in enumerate(model_names))
    parts = _unique((part, index) for index, name in enumerate(model_names) for part in _folded_parts(name))
    own_parts = {part for name in data_names for part in _folded_parts(name)}
    times_written, synsets = Counter(data_names), list(_synsets())
    matched: list[int | None] = []
    for at, name in enumerate(data_names):
        folded = fold_name(_words(name))
        same_place = model_names[at] if len(data_names) == len(model_names) else None
        if name in as_written and times_written[name] == 1:  # before Cat and cat are one
            index = as_written[name]
        elif same_place is not None and folded == fold_name(_words(same_place)):  # also where two classes have one name
            index = at
        elif folded in whole:
            index = whole[folded]
        elif same_place is not None and _share_a_word(name, same_place, own_parts):
            index = at
        else:
            candidates = {parts[part] for part in _folded_parts(name) if part in parts}
            if len(candidates) != 1 and name in synsets and len(model_names) == len(synsets):
                in_order = synsets.index(name)  # the model may have the classes of ImageNet-1k in their order
                candidates = {in_order} if _share_a_word(name, model_names[in_order], ()) else {}
            index = candidates.pop() if len(candidates) == 1 else None
        matched.append(index)
    return matched


def _share_a_word(name: str, other: str, own_parts: Collection[str]) -> bool:
    """Whether two names in one place have one of their words in common; ``own_parts``: all words of the data's names.

    A number after a word that another label has without it (the hub's ImageNet has a crane and a crane2) only tells
    equal names apart.
    """
    words = _folded_parts(name) | {fold_name(re.sub(r"\d+$", "", part)) for part in _parts(name)} & {*own_parts}
    return bool(words & _folded_parts(other) - {""})


def _unique(pairs: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    """The value of each key that occurs once."""
    pairs = list(pairs)
    times = Counter(key for key, _ in pairs)
    return {key: value for key, value in pairs if times[key] == 1}


def fold_name(name: str) -> str:
    """A name without case, spaces, underscores and hyphens (but a minus), its accents written in one way."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_]+|(?<!^)-|^-(?!\d)", "", folded) or folded


def readable_name(name: str) -> str:
    """A label as it is said aloud: a synset's words, the first of several names, spaces for underscores."""
    return _parts(name)[0].replace("_", " ").strip()


def _words(name: str) -> str:
    """A synset's words, or the name itself."""
    return _synsets().get(name, name) if re.fullmatch(r"n\d{8}", name) else name


def _parts(name: str) -> list[str]:
    return [part.strip() for part in _words(name).split(",")]


def _folded_parts(name: str) -> set[str]:
    return set(map(fold_name, _parts(name)))


@cache
def _synsets() -> dict[str, str]:
    """The words of ImageNet-1k's synsets, in the order of its classes."""
    lines = SYNSETS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines if not line.startswith("#"))


def is_sorted_by_class(labels: NDArray[np.int64]) -> bool:
    """Whether rows of one class stand together, in one block a class or in several, in any order of the classes.

    Two neighbours are of different classes at most half as often as they would be in random order, in which that is
    expected (n² − Σ nₖ²) / n times, of n rows, nₖ of them of class k.
    """
    n, counts = len(labels), np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or counts.max() == 1:
        return False
    changes = np.count_nonzero(labels[1:] != labels[:-1])
    return changes == len(counts) - 1 or 2 * changes * n <= n**2 - int((counts.astype(np.int64) ** 2).sum())


def order_in_rounds(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Positions in rounds over the classes: one of each class, then the next of each, … (images,) int64.

    The order of the classes, and of the images of a class, is random by the seed and does not depend on how many are
    taken: the first 16 are among the first 32.
    """
    rng = np.random.default_rng([seed, 3])  # 3: apart from other draws of the seed
    order = rng.permutation(len(labels))
    classes, which = np.unique(labels, return_inverse=True)
    place = rng.permutation(len(classes))[which]
    return order[np.lexsort((place[order], rank_in_class(labels[order])))]


def rank_in_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of its class stand before each, (images,) int64."""
    return pd.Series(labels).groupby(labels).cumcount().to_numpy()
