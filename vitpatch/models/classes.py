"""Images labelled by classes, a model's or a training's: what patching, training and evaluation all read labels by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitpatch.data.images import LabelledImages
from vitpatch.data.labels import are_numbers, by_place, class_names_of, indices_of, matched, takes_place
from vitpatch.errors import VitPatchError
from vitpatch.models.configs import class_names


@dataclass(frozen=True)
class Classes:
    """A classifier's classes: how many, their ``names`` by index, or ``None``, and then perhaps why: ``doubt``."""

    number: int
    names: tuple[str, ...] | None
    doubt: str | None = None

    @classmethod
    def of(cls, config: Any) -> Classes:
        """The classes of a model's config."""
        return cls(config.num_labels, *class_names(config))


def as_classes(
    images: LabelledImages,
    classes: Classes,
    label_map: Sequence[tuple[Any, Any]] | None,
    beside: LabelledImages | None = None,
) -> LabelledImages:
    """The images with these classes for labels, matched by name where both have names; ``matched`` says how.

    ``label_map`` may also name labels that only the images of another split, ``beside``, have. Raises
    ``VitPatchError`` for a label that is none of the classes.
    """
    if not images.has_labels:
        return images
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0:
        raise VitPatchError(f"the data have label {low}; expected whole numbers from 0 on")
    given = _of_split(dict(label_map or ()), images, beside)
    used = set(images.labels.tolist())
    found = matched(images.label_names, classes.names, classes.number, given, used, classes.doubt)
    if found is not None:
        return images.as_classes(found, classes.names, classes.number)
    if high >= classes.number:
        raise VitPatchError(
            f"the data have labels from {low} to {high}; the model's {classes.number} go from 0 to {classes.number - 1}"
        )
    return images


def notes_on(images: LabelledImages, classes: Classes, label_map: Sequence[tuple[Any, Any]] | None) -> tuple[str, ...]:
    """What a reader must know of how these images, labelled as the data have it, came to their classes."""
    if classes.doubt is not None:
        return (f"classes are called by their numbers, they have no sure names: {classes.doubt}",)
    all_given = len(indices_of(dict(label_map or ()), images.label_names or ())) == len(images.label_names or ())
    if not images.has_labels or all_given or not takes_place(images.label_names, classes.names):
        return ()
    return (by_place(images.label_names),)


def _of_split(label_map: Mapping[Any, Any], images: LabelledImages, beside: LabelledImages | None) -> dict[Any, Any]:
    """The map without labels that only the other split has."""
    if beside is None or not label_map:
        return dict(label_map)
    here, there = (indices_of(label_map, labels_of(each)) for each in (images, beside))
    return {key: value for key, value in label_map.items() if key in here or key not in there}


def labels_of(images: LabelledImages) -> list[str]:
    """The names of all labels, their numbers where they have no names."""
    if images.label_names is not None:
        return list(images.label_names)
    return list(map(str, range(1 + int(images.labels.max()))))


def classes_of_training(
    train: LabelledImages, label_map: Sequence[tuple[Any, Any]] | None, own: Classes | None, test: LabelledImages
) -> tuple[Classes, str | None]:
    """The classes of a training, and why its checkpoint's head, of the classes ``own``, is none for them.

    They are ``own`` where the labels of ``train``, with ``label_map`` what that makes of them, are just these by name;
    else those labels, and the reason is said (``None``: there is none). Raises ``VitPatchError`` where there are fewer
    than two, or images without labels.
    """
    if not (train.has_labels and test.has_labels):
        raise VitPatchError("data.label_column=null: training needs labels")
    named = [split.label_names is not None and not are_numbers(split.label_names) for split in (train, test)]
    if named[0] != named[1]:
        with_names = "training" if named[0] else "test"
        raise VitPatchError(
            f"data: the {with_names} split's labels have names, the other's are numbers; give both the same kind of "
            "labels (data.label_column), for which number is which name is not known"
        )
    given = _of_split(dict(label_map or ()), train, test)
    names = class_names_of(labels_of(train), given)
    if train.label_names is None and not given:
        names = [f"LABEL_{name}" for name in names]
    if len(names) < 2:
        raise VitPatchError(f"the training images have one class, {', '.join(names)}; a classifier needs two or more")
    why = None if own is None else _other_classes(own, names)
    names = own.names if own is not None and own.names and why is None else tuple(names)
    return Classes(len(names), names), why


def _other_classes(own: Classes, names: Sequence[str]) -> str | None:
    """Why a training has other classes than its checkpoint; ``None`` where they are the same."""
    if own.doubt is not None and not are_numbers(names):
        return f"has no sure names for its classes ({own.doubt})"
    theirs = "has no names for its classes" if own.names is None else f"has the classes {_some(own.names)}"
    if own.number != len(names) or are_numbers(names) != (own.names is None or are_numbers(own.names)):
        return f"{theirs}, {own.number} of them"
    try:
        found = matched(names, own.names, own.number)
    except VitPatchError:
        found = [0]
    return None if found is None or sorted(found) == list(range(own.number)) else theirs


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)
