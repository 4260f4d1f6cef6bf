"""Names of a sweep's runs: each says what is swept, clean for any disk, no two the same in a sweep. Light: no torch."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitpatch.formatting import is_unnamed, override_key

SWEEP_FILE = "sweep.json"
"""In a sweep's folder: what its runs differ in and what they share (``vitpatch.cli.sweep_record``)."""
LONGEST_NAME = 120
SHORTEST_VALUE = 8
"""Letters that a value keeps where a name is too long."""
DIGEST = 8
"""Hex digits that tell runs apart whose names would be alike."""


def run_name(overrides: Iterable[str], naming: Mapping[str, Any] | None = None) -> str:
    """The folder name of a sweep's run, from its overrides: readable, stable, at most 120 characters.

    ``naming`` is what is known from the sweep's start: ``swept``, the keys that names are made of, in order; ``fixed``,
    the keys that are in no name; ``alike``, the names that have a digest, since without it those of two runs would be
    alike. Where the other runs are not known (a W&B agent's run, another sweeper's) ``naming`` or ``alike`` is
    ``None``: then all keys but ``UNNAMED`` are in the name, and a digest where a letter was replaced or cut.
    """
    naming = naming or {}
    parts = name_parts(overrides, naming.get("swept") or (), naming.get("fixed") or ())
    alike = naming.get("alike")
    if alike is None:
        is_whole = plain_name(parts) == (",".join(parts) or "default")
        return plain_name(parts) if is_whole else name_with_digest(parts)
    return name_with_digest(parts) if name_with_digest(parts) in alike else plain_name(parts)


def name_parts(overrides: Iterable[str], swept: Sequence[str], fixed: Iterable[str] = ()) -> list[str]:
    """The overrides that a name is made of: those of the keys ``swept``, in that order, then those not ``fixed``."""
    by_key = {override_key(override): override for override in overrides}
    others = [key for key in by_key if key not in (*swept, *fixed) and not is_unnamed(key)]
    return [by_key[key] for key in (*(key for key in swept if key in by_key), *others)]


def plain_name(parts: Sequence[str]) -> str:
    """A name of letters, digits and ``=,._-``, shortened where it is too long."""
    return _shorten(parts, LONGEST_NAME)


def name_with_digest(parts: Sequence[str]) -> str:
    """The name and a digest of what it was made of."""
    digest = hashlib.sha256(",".join(parts).encode()).hexdigest()[:DIGEST]
    return f"{_shorten(parts, LONGEST_NAME - DIGEST - 1)}-{digest}"


def name_runs(jobs: Iterable[Sequence[str]], before: Mapping[str, Sequence[str]]) -> dict[tuple[str, ...], str]:
    """The name of each run of a sweep, by its parts; no two are alike, also where a disk does not tell a from A.

    ``before``: the parts of the runs that the sweep had at earlier starts, by their names, which stay.
    """
    known = {tuple(parts): name for name, parts in before.items()}
    new = [parts for parts in dict.fromkeys(map(tuple, jobs)) if parts not in known]
    taken = Counter(name.casefold() for name in (*before, *map(plain_name, new)))
    for parts in new:
        is_alike = taken[plain_name(parts).casefold()] > 1
        known[parts] = name_with_digest(parts) if is_alike else plain_name(parts)
    return known


def _shorten(parts: Sequence[str], longest: int) -> str:
    """The parts as a name of at most ``longest`` letters.

    First the longest values lose their beginnings, down to ``SHORTEST_VALUE``; if that is not enough, the last parts
    are left out.
    """
    pairs = [_clean(part) for part in parts]
    name = ""
    while pairs:
        whole = max(SHORTEST_VALUE, *(len(value) for _, value in pairs))
        for most in range(whole, SHORTEST_VALUE - 1, -1):
            name = ",".join(f"{key}{value[-most:]}" for key, value in pairs)
            if len(name) <= longest:
                return name.strip(".")
        pairs.pop()
    return name[:longest].strip(".") or "default"


def _clean(override: str) -> tuple[str, str]:
    """``key=`` and value, without quotes and brackets; other letters become ``_``, also a list's commas."""
    key, equals, value = override.partition("=")
    key = re.sub(r"[^A-Za-z0-9._-]+", "_", key.lstrip("+~"))
    return key + equals, re.sub(r"[^A-Za-z0-9=._-]+", "_", re.sub(r"[\"'\[\]{}]", "", value))
