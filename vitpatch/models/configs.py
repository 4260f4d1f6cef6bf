"""What a loaded model's config and weights say: sizes, label names, digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vitpatch.data.labels import fold
from vitpatch.errors import VitPatchError
from vitpatch.models.preprocessing import pair
from vitpatch.types import digest

NOT_OF_THE_ARCHITECTURE = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
    "id2label", "label2id", "label_names",
)  # fmt: skip
"""Keys of a config that change no number of a run."""


def vision_config(config: Any) -> Any:
    """The part of a config that is the vision transformer's."""
    return getattr(config, "vision_config", None) or config


def geometry(model: nn.Module) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """(height, width) of the pixels where the model says it, and of a patch."""
    embedding = getattr(getattr(model, "timm_model", None), "patch_embed", None)
    size = said(model, "image_size") or getattr(embedding, "img_size", None)
    patch = said(model, "patch_size") or getattr(embedding, "patch_size", None)
    if patch is None:
        raise VitPatchError(f"{type(model).__name__}: neither its config nor timm's patch_embed says its patch size")
    return None if size is None else pair(size), pair(patch)


def said(model: nn.Module, name: str) -> Any:
    """What the config says, of its vision part, or timm's model."""
    owners = (vision_config(model.config), getattr(model, "timm_model", None))
    return next((getattr(owner, name) for owner in owners if hasattr(owner, name)), None)


MULTI_LABEL = "multi_label_classification"
NOT_EXCLUSIVE = (
    f"problem_type {MULTI_LABEL}: the model's classes do not exclude each other, and its own probability of each is a "
    "sigmoid; prob, log_odds and kl here are of the softmax over all classes; metric=logit takes the label's own logit "
    "alone"
)
NO_CLASSIFIER = (
    "{}: problem_type regression: its outputs are values, not classes, and have no probabilities; vitpatch takes image "
    "classifiers with one label an image (problem_type single_label_classification)"
)
ONE_OUTPUT = (
    "{}: has {} class; an effect needs two or more; a yes/no model with one logit (a sigmoid) is the same as one with "
    "two outputs, logits 0 and its own"
)
OTHER_HEAD = "{}: its {} has {} outputs, its config {} classes; set num_labels and id2label in its config"
NO_LOGITS = "{}: its {} ends in {}, so its outputs are no logits; take the classifier without it"


def classes_of(model: nn.Module, heads: Collection[str]) -> int:
    """The number of a classifier's classes. Raises ``VitPatchError`` where its outputs are no logits of classes."""
    name, number = type(model).__name__, int(model.config.num_labels)
    if getattr(model.config, "problem_type", None) == "regression":
        raise VitPatchError(NO_CLASSIFIER.format(name))
    if number < 2:
        raise VitPatchError(ONE_OUTPUT.format(name, number))
    for path, module in model.named_modules():
        last = list(module.modules())[-1] if path in heads else None
        if isinstance(last, nn.Sigmoid | nn.Softmax):
            raise VitPatchError(NO_LOGITS.format(name, path, type(last).__name__))
        if isinstance(last, nn.Linear) and last is module and last.out_features != number:
            raise VitPatchError(OTHER_HEAD.format(name, path, last.out_features, number))
    return number


def notes_on(model: nn.Module) -> tuple[str, ...]:
    """What a reader of a model's probabilities must know."""
    is_multi_label = getattr(model.config, "problem_type", None) == MULTI_LABEL
    return (NOT_EXCLUSIVE,) * is_multi_label + tuple(getattr(model, "notes", ()))


def class_names(config: Any) -> tuple[tuple[str, ...] | None, str | None]:
    """The names of a config's classes by index, and what speaks against them; ``None`` where there is none.

    A class is called what ``id2label`` says, or else ``label2id``; LABEL_0, LABEL_1, … and blanks are no names. Where
    the two contradict, or name classes that the model has not, there are no names, and the doubt says why.
    """
    number = config.num_labels
    by_id = {int(index): str(name) for index, name in (config.id2label or {}).items() if _says(name)}
    by_name: dict[int, list[str]] = {}
    for name, index in (config.label2id or {}).items():
        if _says(name):
            by_name.setdefault(int(index), []).append(str(name))
    names: list[str] = []
    for index in range(number):
        name, others = by_id.get(index), by_name.get(index, [])
        if name is None or (_is_generic(name) and others and not _is_generic(others[0])):
            name = ", ".join(others) or f"LABEL_{index}"
        elif others and _is_generic(name) == _is_generic(others[0]) and fold(name) not in map(fold, others):
            return None, f"id2label calls class {index} {name!r}, label2id {others[0]!r}"
        names.append(name)
    for key, said in (("id2label", by_id), ("label2id", by_name)):
        for index in sorted(set(said) - set(range(number))):
            name = said[index] if key == "id2label" else said[index][0]
            return None, f"{key} names a class {index} ({name!r}), the model has classes 0 to {number - 1}"
    return None if names == [f"LABEL_{index}" for index in range(number)] else tuple(names), None


def _says(name: Any) -> bool:
    return name is not None and bool(str(name).strip())


def _is_generic(name: str) -> bool:
    return re.fullmatch(r"LABEL_\d+", name) is not None


def keep_labels(config: Any, file: Mapping[str, Any]) -> None:
    """Gives a config the labels that its ``file`` (config.json, as read) has, where transformers dropped them.

    It keeps ``label2id`` only beside an ``id2label``, and neither where ``num_labels`` is another number. Raises
    ``VitPatchError`` where they are of a form that names no class.
    """
    by_id, by_name = labels_of(file)
    if not by_id and not by_name:
        return
    number = config.num_labels
    if not by_id and file.get("num_labels") is None:
        number = 1 + max(by_name.values())
    beyond = {name: index for index, name in by_id.items() if not 0 <= index < number and _says(name)}
    config.id2label = {index: by_id.get(index, f"LABEL_{index}") for index in range(number)}
    config.label2id = by_name | beyond


def labels_of(file: Mapping[str, Any]) -> tuple[dict[int, Any], dict[str, int]]:
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
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    if config.problem_type is not None:
        config.problem_type = "single_label_classification"
    if hasattr(config, "label_names"):  # timm's, which would be saved instead
        config.label_names = list(names)


def digest_of_weights(model: nn.Module, without: Collection[str] = ()) -> str:
    """Sixteen hex digits of all weights by name, type, shape and value; ``without`` those of some names."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name in without:
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def digest_of_checkpoint(model: nn.Module) -> str:
    """Sixteen hex digits of what a model has of its files, whatever the labels of the data are.

    ``digest_of_weights``, but for a model some of whose weights are ``made_of_labels``: without these, and with those
    that made them.
    """
    if (made := getattr(model, "made_of_labels", None)) is None:
        return digest_of_weights(model)
    return digest([digest_of_weights(model, without=made), model.text_digest])


def digest_of_config(config: Any) -> str:
    """Sixteen hex digits of what a config says of the architecture."""
    return digest({key: value for key, value in config.to_diff_dict().items() if key not in NOT_OF_THE_ARCHITECTURE})
