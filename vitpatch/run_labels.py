"""Short names of runs: what their names do not share."""

from __future__ import annotations

import re
from collections.abc import Sequence


def run_labels(names: Sequence[str]) -> dict[str, str]:
    """By run's name a short one: without the overrides and folders that are in every name.

    ``corruption=gray,data.limit=48`` beside ``corruption=noise,data.limit=48`` is ``corruption=gray``. Where
    short names would be empty or the same, the whole ones.
    """
    parts = {name: re.split("[,/]", name) for name in names}
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    short = {name: ",".join(part for part in of if part not in shared) for name, of in parts.items()}
    if len(set(short.values())) < len(short) or not all(short.values()):
        return {name: name for name in names}
    return short


def elided(names: Sequence[str], longest: int) -> dict[str, str]:
    """By name one of so many letters at most, shortened in the middle: runs differ at both ends. Names that would be
    the same then are left whole."""
    head = longest // 2
    short = {name: name if len(name) <= longest else f"{name[: head - 1]}…{name[head - longest :]}" for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}
