"""A classifier's classes: those of its config, and how the labels of images are matched to them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitpatch.data.images import LabelledImages
from vitpatch.data.labels import (
    are_numbers,
    fold_name,
    mapped_class_names,
    mapped_labels,
    match_labels,
    matched_by_place,
    place_note,
)
from vitpatch.errors import VitPatchError
from vitpatch.formatting import first_few
from vitpatch.types import MULTI_LABEL

NOT_EXCLUSIVE = (
    f"problem_type {MULTI_LABEL}: the model's classes do not exclude each other, and its own probability of each is a "
    "sigmoid; prob, log_odds and kl here are of the softmax over all classes; metric=logit takes the label's own logit "
    "alone"
)


@dataclass(frozen=True)
class Classes:
    """A classifier's classes: how many, and their ``names`` by index.

    ``names`` is ``None`` where they are not known; ``doubt`` is then why, if the config contradicts itself.
    """

    number: int
    names: tuple[str, ...] | None
    doubt: str | None = None

    @classmethod
    def of(cls, config: Any) -> Classes:
        """The classes of a model's config.

        The name of a class is that of ``id2label``, or else of ``label2id``; LABEL_0, LABEL_1, … and blanks are no
        names. Names are not used where the two contradict each other, or name classes that the model does not have.
        """
        number = config.num_labels
        by_id = _names_by_index((config.id2label or {}).items())
        by_name = _names_by_index((index, name) for name, index in (config.label2id or {}).items())
        names: list[str] = []
        for index in range(number):
            name, others = by_id.get(index, [None])[0], by_name.get(index, [])
            folded = {fold_name(other) for other in others}
            if name is None or (_is_generic(name) and others and not _is_generic(others[0])):
                name = ", ".join(others) or f"LABEL_{index}"
            elif others and _is_generic(name) == _is_generic(others[0]) and fold_name(name) not in folded:
                return cls(number, None, f"id2label calls class {index} {name!r}, label2id {others[0]!r}")
            names.append(name)
        for key, names_by_index in (("id2label", by_id), ("label2id", by_name)):
            if beyond := sorted(set(names_by_index) - set(range(number))):
                name, last = names_by_index[beyond[0]][0], number - 1
                doubt = f"{key} names a class {beyond[0]} ({name!r}), the model has classes 0 to {last}"
                return cls(number, None, doubt)
        return cls(number, None if names == [f"LABEL_{index}" for index in range(number)] else tuple(names))


# --- the labels of images ---


def label_by_classes(
    images: LabelledImages,
    classes: Classes,
    label_map: Sequence[tuple[Any, Any]] | None,
    other_split: LabelledImages | None = None,
) -> LabelledImages:
    """The images with these classes for labels, matched by name where both have names.

    ``label_map`` is ``data.label_map``; it may also name labels that only the images of ``other_split`` have. Raises
    ``VitPatchError`` for a label that is none of the classes.
    """
    if not images.has_labels:
        return images
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0:
        raise VitPatchError(f"the data have label {low}; expected whole numbers from 0 on")
    own_map = _map_for_split(label_map, images, other_split)
    used = set(images.labels.tolist())
    matched = match_labels(images.label_names, classes.names, classes.number, own_map, used, classes.doubt)
    if matched is not None:
        return images.label_by_classes(matched, classes.names, classes.number)
    if high >= classes.number:
        raise VitPatchError(
            f"the data have labels from {low} to {high}; the model's {classes.number} go from 0 to {classes.number - 1}"
        )
    return images


def label_notes(
    images: LabelledImages, classes: Classes, label_map: Sequence[tuple[Any, Any]] | None
) -> tuple[str, ...]:
    """Lines on classes without sure names, and on labels that come to them by their place alone.

    ``images`` have their labels as the data have them.
    """
    if classes.doubt is not None:
        return (f"classes are called by their numbers, they have no sure names: {classes.doubt}",)
    names = images.label_names
    is_mapped = len(mapped_labels(dict(label_map or ()), names or ())) == len(names or ())
    if images.has_labels and not is_mapped and matched_by_place(names, classes.names):
        return (place_note(names),)
    return ()


def classes_of_training(
    train: LabelledImages, label_map: Sequence[tuple[Any, Any]] | None, own: Classes | None, test: LabelledImages
) -> tuple[Classes, str | None]:
    """The classes of a training; and why a checkpoint with the classes ``own`` needs a new head for them, if it does.

    The classes are the labels of ``train`` as ``label_map`` changes them; where these are, by name, just the classes
    ``own``, they are in the order of ``own``. Raises ``VitPatchError`` where there are fewer than two, or images
    without labels.
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
    own_map = _map_for_split(label_map, train, test)
    names = mapped_class_names(_label_texts(train), own_map)
    if train.label_names is None and not own_map:
        names = [f"LABEL_{name}" for name in names]
    if len(names) < 2:
        raise VitPatchError(f"the training images have one class, {', '.join(names)}; a classifier needs two or more")
    reason = None if own is None else _why_other_classes(own, names)
    if own is not None and own.names and reason is None:
        names = own.names
    return Classes(len(names), tuple(names)), reason


def _map_for_split(
    label_map: Sequence[tuple[Any, Any]] | None, images: LabelledImages, other_split: LabelledImages | None
) -> dict[Any, Any]:
    """The map without labels that only the other split has."""
    whole = dict(label_map or ())
    if other_split is None or not whole:
        return whole
    own, others = (mapped_labels(whole, _label_texts(split)) for split in (images, other_split))
    return {key: value for key, value in whole.items() if key in own or key not in others}


def _label_texts(images: LabelledImages) -> list[str]:
    """The names of all labels, their numbers where they have no names."""
    if images.label_names is not None:
        return list(images.label_names)
    return list(map(str, range(1 + int(images.labels.max()))))


def _why_other_classes(own: Classes, names: Sequence[str]) -> str | None:
    """Why the classes ``names`` of a training are not those of its checkpoint; ``None`` where they are the same."""
    if own.doubt is not None and not are_numbers(names):
        return f"has no sure names for its classes ({own.doubt})"
    reason = "has no names for its classes" if own.names is None else f"has the classes {first_few(own.names)}"
    if own.number != len(names) or are_numbers(names) != (own.names is None or are_numbers(own.names)):
        return f"{reason}, {own.number} of them"
    try:
        matched = match_labels(names, own.names, own.number)
    except VitPatchError:
        return reason
    return None if matched is None or sorted(matched) == list(range(own.number)) else reason


# --- what a model and its config say ---


def number_of_classes(model: nn.Module, heads: Collection[str]) -> int:
    """The number of a classifier's classes. Raises ``VitPatchError`` where its outputs are no logits of classes."""
    name, number = type(model).__name__, int(model.config.num_labels)
    if getattr(model.config, "problem_type", None) == "regression":
        raise VitPatchError(
            f"{name}: problem_type regression: its outputs are values, not classes, and have no probabilities; "
            "vitpatch takes image classifiers with one label an image (problem_type single_label_classification)"
        )
    if number < 2:
        raise VitPatchError(
            f"{name}: has {number} class; an effect needs two or more; a yes/no model with one logit (a sigmoid) is "
            "the same as one with two outputs, logits 0 and its own"
        )
    for path, module in model.named_modules():
        last = list(module.modules())[-1] if path in heads else None
        if isinstance(last, nn.Sigmoid | nn.Softmax):
            kind = type(last).__name__
            raise VitPatchError(
                f"{name}: its {path} ends in {kind}, so its outputs are no logits; take the classifier without it"
            )
        if isinstance(last, nn.Linear) and last is module and last.out_features != number:
            raise VitPatchError(
                f"{name}: its {path} has {last.out_features} outputs, its config {number} classes; set num_labels and "
                "id2label in its config"
            )
    return number


def probability_notes(model: nn.Module) -> tuple[str, ...]:
    """Lines on what a model's probabilities are, where they are no softmax over classes that exclude each other."""
    is_multi_label = getattr(model.config, "problem_type", None) == MULTI_LABEL
    return (NOT_EXCLUSIVE,) * is_multi_label + tuple(getattr(model, "notes", ()))


def _names_by_index(pairs: Iterable[tuple[Any, Any]]) -> dict[int, list[str]]:
    """The names of each class, without blanks."""
    names: dict[int, list[str]] = {}
    for index, name in pairs:
        if _is_name(name):
            names.setdefault(int(index), []).append(str(name))
    return names


def _is_name(name: Any) -> bool:
    return name is not None and bool(str(name).strip())


def _is_generic(name: str) -> bool:
    return re.fullmatch(r"LABEL_\d+", name) is not None


def keep_labels(config: Any, file: Mapping[str, Any]) -> None:
    """Gives a config the labels that its ``file`` (config.json, as read) has, where transformers dropped them.

    transformers keeps ``label2id`` only together with ``id2label``, and neither where ``num_labels`` is another number.
    Raises ``VitPatchError`` as ``config_labels`` does.
    """
    by_id, by_name = config_labels(file)
    if not by_id and not by_name:
        return
    number = config.num_labels
    if not by_id and file.get("num_labels") is None:
        number = 1 + max(by_name.values())
    beyond = {name: index for index, name in by_id.items() if not 0 <= index < number and _is_name(name)}
    config.id2label = {index: by_id.get(index, f"LABEL_{index}") for index in range(number)}
    config.label2id = by_name | beyond


def config_labels(file: Mapping[str, Any]) -> tuple[dict[int, Any], dict[str, int]]:
    """``id2label`` and ``label2id`` of a config.json. Raises ``VitPatchError`` where a class has no whole number."""
    by_id, by_name = file.get("id2label"), file.get("label2id")
    if by_id is None and file.get("model_type") == "timm_wrapper":
        by_id = dict(enumerate(file.get("label_names") or ()))
    for key, value in (("id2label", by_id), ("label2id", by_name)):
        if value is not None and not isinstance(value, Mapping):
            raise VitPatchError(f"{key} in its config.json is a {type(value).__name__}; expected names and numbers")
    return (
        {_class_number("id2label", index, name): name for index, name in (by_id or {}).items()},
        {str(name): _class_number("label2id", index, name) for name, index in (by_name or {}).items()},
    )


def _class_number(key: str, index: Any, name: Any) -> int:
    if re.fullmatch(r"\s*\d+\s*", str(index)):
        return int(index)
    raise VitPatchError(f"{key} in its config.json: {index!r} for {name!r} is no number of a class")


def name_classes(config: Any, names: Sequence[str]) -> None:
    """Gives a config these classes, and one label an image."""
    set_labels(config, names)
    if config.problem_type is not None:
        config.problem_type = "single_label_classification"
    if hasattr(config, "label_names"):  # timm's, which would be saved instead
        config.label_names = list(names)


def set_labels(config: Any, names: Sequence[str]) -> None:
    """Gives a config these names of its classes."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
