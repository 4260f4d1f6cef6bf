"""Model, data and corruption of a run in words, from their config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vitpatch import corruptions
from vitpatch.types import as_option, class_name

HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
"""Keys of a config that say how an object is made, not what it is given."""
MOST_LISTED = 8
"""Of a longer list as many are shown, and how many there are."""


def short(path: str) -> str:
    """The last part of a path; of a folder in the hub's cache the repository's name."""
    at = Path(str(path))
    if at.parent.name == "snapshots":
        return at.parent.parent.name.rpartition("--")[2]
    return at.stem if at.suffix == ".parquet" else at.name


def data_words(data: Mapping[str, Any]) -> str:
    """The data by the last part of their path, and what is made of them."""
    return short(data["path"]) + " scenes" * (class_name(data["_target_"]) == "TexturedScenes")


def corruption_words(corruption: Mapping[str, Any]) -> str:
    """The corruption in words: its name and its strengths; of a chain step by step."""
    name, keys = corruption_name(corruption), strength_words(corruption)
    return f"{name} ({keys})" if keys else name


def corruption_name(corruption: Mapping[str, Any]) -> str:
    """The corruption's class or function in words; of a chain its steps with their strengths.

    A class of somebody's own that is called as one of vitpatch's is named with its module.
    """
    target = str(corruption["_target_"])
    if class_name(target) == "Chain":
        return " then ".join(map(_step_words, corruption["steps"]))
    if class_name(target) == "Identity":
        return "no corruption"
    name = target.rpartition(".")[2]
    if not target.startswith("vitpatch.") and name.lower() in _own_names():
        return target
    return as_option(name).replace("_", " ")


def _step_words(step: Mapping[str, Any]) -> str:
    """A step of a chain; a chain with a strength of its own in brackets, so that it is seen whose strength that is."""
    if class_name(step["_target_"]) == "Chain" and strength_words(step):
        return f"[{corruption_name(step)}] ({strength_words(step)})"
    return corruption_words(step)


@cache
def _own_names() -> frozenset[str]:
    """The names of vitpatch's own corruptions, in small letters."""
    classes = (of for of in vars(corruptions).values() if isinstance(of, type))
    return frozenset(of.__name__.lower() for of in classes if issubclass(of, corruptions.Corruption))


def strength_words(corruption: Mapping[str, Any]) -> str:
    """The corruption's parameters, ``key=value``; an ``amount`` of 1 is unsaid."""
    unsaid = {*HYDRA_KEYS, *(["amount"] if corruption.get("amount") == 1 else [])}
    unsaid |= {"steps"} if class_name(corruption["_target_"]) == "Chain" else set()
    return ", ".join(f"{key}={_value_words(value)}" for key, value in corruption.items() if key not in unsaid)


def _value_words(value: Any) -> str:
    """A parameter's value: a number to four digits, a long list by its first values and its length."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        if "_target_" in value:
            return corruption_words(value)
        return f"{{{', '.join(f'{key}: {_value_words(of)}' for key, of in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        some = [_value_words(of) for of in value[:MOST_LISTED]]
        return f"[{', '.join(some)}{f', … {len(value)} values' if len(value) > MOST_LISTED else ''}]"
    return str(value)
