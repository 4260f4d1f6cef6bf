"""Model, data and corruption of a run in words, from their config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitpatch.corruptions import as_option
from vitpatch.options import CHAIN


def short(path: str) -> str:
    """The last part of a path; of a folder in the hub's cache the repository's name."""
    at = Path(str(path))
    if at.parent.name == "snapshots":
        return at.parent.parent.name.rpartition("--")[2]
    return at.stem if at.suffix == ".parquet" else at.name


def data_words(data: Mapping[str, Any]) -> str:
    """The data by the last part of their path, and what is made of them."""
    return short(data["path"]) + " scenes" * str(data["_target_"]).endswith(".TexturedScenes")


def corruption_words(corruption: Mapping[str, Any]) -> str:
    """The corruption in words: its name and its strengths; of a chain step by step."""
    name, keys = corruption_name(corruption), strength_words(corruption)
    return f"{name} ({keys})" if keys else name


def corruption_name(corruption: Mapping[str, Any]) -> str:
    """The corruption's class in words; of a chain its steps with their strengths."""
    if corruption["_target_"] == CHAIN:
        return " then ".join(map(corruption_words, corruption["steps"]))
    name = as_option(str(corruption["_target_"]).rpartition(".")[2]).replace("_", " ")
    return name.replace("identity", "no corruption")


def strength_words(corruption: Mapping[str, Any]) -> str:
    """The corruption's strengths, ``key=value``; an ``amount`` of 1 is unsaid."""
    unsaid = {"_target_", *(["amount"] if corruption.get("amount") == 1 else [])}
    unsaid |= {"steps"} if corruption["_target_"] == CHAIN else set()
    said = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in corruption.items()}
    return ", ".join(f"{key}={value}" for key, value in said.items() if key not in unsaid)
