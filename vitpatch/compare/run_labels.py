"""Short names of runs: what their names do not share."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

LONGEST = 46
"""Letters of a name at an axis or in a legend."""


def run_labels(names: Sequence[str]) -> dict[str, str]:
    """By run's name a short one: without the overrides and folders that are in every name.

    ``corruption=gray,data.limit=48`` beside ``corruption=noise,data.limit=48`` is ``corruption=gray``. Where
    short names would be empty or the same, the whole ones.
    """
    parts = {name: re.split("[,/]", name) for name in names}
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    short = {name: _without(name, shared) for name in names}
    if len(set(short.values())) < len(short) or not all(short.values()):
        return {name: name for name in names}
    return short


def short_labels(names: Sequence[str]) -> dict[str, str]:
    """By run's name what stands at an axis or in a legend, no two the same."""
    labels = run_labels(names)
    short = elided(list(labels.values()), LONGEST)
    return {name: short[label] for name, label in labels.items()}


def _without(name: str, shared: Container[str]) -> str:
    """A name without some of its parts; a slash stays where a folder's name ends."""
    said = between = ""
    for part, end in re.findall("([^,/]*)([,/]?)", name):
        if part and part not in shared:
            said += (("/" if "/" in between else ",") if said else "") + part
            between = ""
        between += end
    return said


def elided(names: Sequence[str], longest: int) -> dict[str, str]:
    """By name one of about so many letters at most, shortened in the middle where all are told apart then; else
    elsewhere, or by less."""
    if max(map(len, names), default=0) <= longest:
        return {name: name for name in names}
    for most in range(longest, max(map(len, names)), 8):
        for head in sorted(range(1, most - 1), key=lambda head: abs(head + 1 - most // 2)):
            short = {name: _cut(name, head, most) for name in names}
            if len(set(short.values())) == len(short):
                return short
    return {name: name for name in names}


def _cut(name: str, head: int, most: int) -> str:
    return name if len(name) <= most else f"{name[:head]}…{name[head + 1 - most :]}"
