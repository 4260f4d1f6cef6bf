"""Which of a model's classes each of the data's labels is: by name where both have names, else by number."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vitpatch.spec import VitPatchError

SYNSETS = Path(__file__).parent / "assets" / "imagenet_synsets.tsv"
SHOWN = 5
"""Names that an error lists."""
LEFT_OUT = -1
"""The class of a label whose images are left out."""


def matched(
    data_names: Sequence[str] | None,
    model_names: Sequence[str] | None,
    classes: int,
    label_map: Mapping[Any, Any] | None = None,
    used: Collection[int] | None = None,
) -> list[int] | None:
    """The model's class of each of the data's labels, in their order; ``None`` where both have the same numbers.

    Names that are numbers say which class is meant; where one side has no names, numbers hold. Names are compared
    without case, spaces, underscores and hyphens; an ImageNet synset (n01440764) is its words; of several words with
    commas, one that no other class has will do. ``label_map`` says it for some labels, by name or number: {label:
    class}, ``None`` = its images are left out. Raises ``VitPatchError`` for what has no class, of the labels that are
    ``used`` (default: all).
    """
    if data_names is None and not label_map and not _are_numbers(model_names):
        return None
    numbers = [-1, *(used or ()), *(key for key in label_map or () if type(key) is int)]
    labels = list(map(str, range(1 + max(numbers)))) if data_names is None else list(data_names)
    has_words = [names is not None and not _are_numbers(names) for names in (data_names, model_names)]
    if has_words[0] and not has_words[1] and not label_map and len(labels) != classes:
        raise VitPatchError(
            f"the data have {len(labels)} classes, the model {classes} without names: not the same labels; "
            "data.label_map={name: number} says which is which"
        )
    found = _by_name(labels, model_names) if all(has_words) else _by_number(labels, model_names, classes)
    for key, value in (label_map or {}).items():
        at = _index("data.label_map", key, labels, len(labels), "the data's labels")
        found[at] = LEFT_OUT if value is None else _index("data.label_map", value, model_names, classes, "the classes")
    found = _all_found(found, labels, model_names or list(map(str, range(classes))), used)
    if not label_map:
        _check_once(found, labels, model_names or ())
    return None if found == list(range(classes)) else found


def _are_numbers(names: Sequence[str] | None) -> bool:
    """Whether names are whole numbers, and so say which class is meant by its number."""
    return names is not None and all(name.isdecimal() for name in names)


def _by_number(labels: Sequence[str], model_names: Sequence[str] | None, classes: int) -> list[int | None]:
    """By the number that a label is called, or else has; and a class."""
    at = {int(n): i for i, n in enumerate(model_names)} if _are_numbers(model_names) else {i: i for i in range(classes)}
    return [at.get(number) for number in (map(int, labels) if _are_numbers(labels) else range(len(labels)))]


def _all_found(
    found: Sequence[int | None], data_names: Sequence[str], model_names: Sequence[str], used: Collection[int] | None
) -> list[int]:
    """What was found; a label without a class is one of which there is no image."""
    missing = [data_names[at] for at, index in enumerate(found) if index is None and (used is None or at in used)]
    if missing:
        raise VitPatchError(_no_class(missing, data_names, model_names))
    return [LEFT_OUT if index is None else index for index in found]


def _no_class(missing: Sequence[str], data_names: Sequence[str], model_names: Sequence[str]) -> str:
    some = ", ".join(repr(name) for name in missing[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
    near = difflib.get_close_matches(missing[0], model_names, n=1, cutoff=0)
    like = f" (nearest to the first: {near[0]!r})" if near else ""
    if [fold(part) for name in model_names for part in _parts(name)].count(fold(missing[0])) > 1:
        like = " (several classes have the first one's name)"
    return (
        f"{len(missing)} of the data's {len(data_names)} labels are none of the model's {len(model_names)} classes: "
        f"{some}{like}; data.label_map={{label: class}} says which they are, or null to leave their images out"
    )


def _check_once(found: Sequence[int], data_names: Sequence[str], model_names: Sequence[str]) -> None:
    twice = [index for index, number in Counter(i for i in found if i != LEFT_OUT).items() if number > 1]
    if twice:
        which = [name for name, index in zip(data_names, found, strict=True) if index == twice[0]]
        raise VitPatchError(
            f"the data's labels {' and '.join(map(repr, which[:2]))} are both the model's {model_names[twice[0]]!r}; "
            "data.label_map={label: class} says which is which"
        )


def _index(key: str, said: Any, names: Sequence[str] | None, number: int, whose: str) -> int:
    """A label by its name, which may be a number, or else by its number."""
    folded = [fold(name) for name in names or ()]
    if type(said) in (int, str) and folded.count(fold(str(said))) == 1:
        return folded.index(fold(str(said)))
    if type(said) is int and 0 <= said < number:
        return said
    near = difflib.get_close_matches(str(said), list(map(str, names or ())), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"names, or numbers from 0 to {number - 1}"
    raise VitPatchError(f"{key} {said!r}: none of {whose}; {hint}")


def chosen(said: Any, names: Sequence[str] | None, number: int, key: str = "data.classes") -> list[int]:
    """What a key (``data.classes``) says of the data's labels, as their numbers."""
    classes = [said] if isinstance(said, str | int) else list(said)
    if not classes:
        raise VitPatchError(f"{key}: empty; give names or numbers of labels, or null for all")
    return [_index(key, one, names, number, "the data's labels") for one in classes]


def _by_name(data_names: Sequence[str], model_names: Sequence[str]) -> list[int | None]:
    whole = _once(fold(_words(name)) for name in model_names)
    parts = _once(fold(part) for name in model_names for part in dict.fromkeys(_parts(name)))
    owner = {fold(part): index for index, name in enumerate(model_names) for part in _parts(name)}
    at = {fold(_words(name)): index for index, name in enumerate(model_names)}
    same_order = len(data_names) == len(model_names)
    found: list[int | None] = []
    for index, name in enumerate(data_names):
        folded = fold(_words(name))
        if same_order and folded == fold(_words(model_names[index])):  # also where two classes have one name
            found.append(index)
        elif folded in whole:
            found.append(at[folded])
        elif same_order and _share_a_word(name, model_names[index]):
            found.append(index)
        else:
            candidates = {owner[part] for part in map(fold, _parts(name)) if part in parts}
            found.append(candidates.pop() if len(candidates) == 1 else _by_synset(name, model_names))
    return found


def _share_a_word(name: str, other: str) -> bool:
    """Whether two names in one place have one of their words in common.

    A number after it (the hub's ImageNet has a crane and a crane2) only tells equal names apart.
    """
    words = {fold(re.sub(r"\d+$", "", part)) for part in _parts(name)}
    return bool(words & {fold(part) for part in _parts(other)} - {""})


def _by_synset(name: str, model_names: Sequence[str]) -> int | None:
    """A synset of ImageNet-1k in a model with its classes in their order."""
    order = list(_synsets())
    if name in order and len(model_names) == len(order):
        index = order.index(name)
        if set(map(fold, _parts(name))) & set(map(fold, _parts(model_names[index]))):
            return index
    return None


def _once(values: Any) -> set[str]:
    """Those that occur exactly once."""
    return {value for value, number in Counter(values).items() if number == 1}


def fold(name: str) -> str:
    """A name without case, spaces, underscores and hyphens, its accents written in one way."""
    return re.sub(r"[\s_\-]+", "", unicodedata.normalize("NFKC", name)).casefold()


def spoken(name: str) -> str:
    """A label as one says it: a synset's words, the first of several names, spaces for underscores."""
    return _parts(name)[0].replace("_", " ").strip()


def _words(name: str) -> str:
    """A synset's words, or the name itself."""
    return _synsets().get(name, name) if re.fullmatch(r"n\d{8}", name) else name


def _parts(name: str) -> list[str]:
    return [part.strip() for part in _words(name).split(",")]


@cache
def _synsets() -> dict[str, str]:
    """The words of ImageNet-1k's synsets, in the order of its classes."""
    lines = SYNSETS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines if not line.startswith("#"))
