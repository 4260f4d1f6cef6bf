"""What an option is known by in a run's identity, and digests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from vitpatch.formatting import class_name


def as_option(name: str) -> str:
    """The name of a class as its option is written: ``PatchShuffle`` → ``patch_shuffle``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def option_identity(config: Any) -> Any:
    """The config of an option as it enters ``run_id``: the class by its name, wherever in this package it stands.

    ``_target_`` becomes ``class``: the bare name of a class of this package, the full path of a user's own; likewise in
    the options that a list holds (the steps of a chain).
    """
    if isinstance(config, Mapping):
        named = {key: option_identity(value) for key, value in config.items() if key != "_target_"}
        target = config.get("_target_")
        return named if target is None else {"class": class_name(str(target))} | named
    return [option_identity(value) for value in config] if isinstance(config, list | tuple) else config


def digest(value: Any) -> str:
    """Sixteen hex digits that are equal exactly when the JSON of ``value`` (keys sorted) is."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
