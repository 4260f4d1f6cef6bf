"""Names: of a sweep's runs, and the values of keys that are names. Light: no torch.

A run's name says what is swept, clean for any disk, no two the same in a sweep. Where the value of a key is a name,
what was typed is used, although Hydra's grammar reads a number or a boolean: ``data.path=2024_11_28`` is the number
20241128 to Hydra, ``model.revision=1e5`` is 100000.0.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig, OmegaConf

from vitpatch.errors import VitPatchError

UNNAMED = ("sweep", "logger", "trainer", "batch_size", "memory_gb", "data.num_workers", "overwrite", "dry_run")
"""Keys that do not change what is measured (``logger`` covers ``logger.mode``); in a name only where they are swept."""
LONGEST_NAME = 120
SHORTEST_VALUE = 8
"""Letters that a value keeps where a name is too long."""
DIGEST = 8
"""Hex digits that tell runs apart whose names would be alike."""


def run_name(overrides: Iterable[str], naming: Mapping[str, Any] | None = None) -> str:
    """The folder name of a sweep's run, from its overrides: readable, stable, at most 120 characters.

    ``naming`` is what the sweep's start knows: ``swept``, the keys that names are made of, in order; ``fixed``, the
    keys that are in no name; ``alike``, the names that have a digest because without it two runs' would be alike. Where
    nobody knows the other runs (``None``: a W&B agent's run, another sweeper's) all keys but ``UNNAMED`` are in the
    name, and a digest wherever a letter was replaced or cut.
    """
    naming = naming or {}
    parts = name_parts(overrides, naming.get("swept") or (), naming.get("fixed") or ())
    alike = naming.get("alike")
    if alike is None:
        is_whole = plain_name(parts) == (",".join(parts) or "default")
        return plain_name(parts) if is_whole else with_digest(parts)
    return with_digest(parts) if with_digest(parts) in alike else plain_name(parts)


def override_key(override: str) -> str:
    """The key of an override, with its package, without ``+`` and ``~``."""
    return override.partition("=")[0].lstrip("+~")


def is_unnamed(key: str) -> bool:
    """Whether a key does not change what is measured."""
    key = key.partition("@")[0]
    return any(key == word or key.startswith(f"{word}.") for word in UNNAMED)


def name_parts(overrides: Iterable[str], swept: Sequence[str], fixed: Iterable[str] = ()) -> list[str]:
    """The overrides that a name is made of: those of ``swept`` in that order, then others that are not ``fixed``."""
    by_key = {override_key(override): override for override in overrides}
    others = [key for key in by_key if key not in (*swept, *fixed) and not is_unnamed(key)]
    return [by_key[key] for key in (*(key for key in swept if key in by_key), *others)]


def plain_name(parts: Sequence[str]) -> str:
    """A name of letters, digits and ``=,._-``, shortened where it is too long."""
    return _cut(parts, LONGEST_NAME)


def with_digest(parts: Sequence[str]) -> str:
    """The name and a digest of what it was made of."""
    digest = hashlib.sha256(",".join(parts).encode()).hexdigest()[:DIGEST]
    return f"{_cut(parts, LONGEST_NAME - DIGEST - 1)}-{digest}"


def name_runs(jobs: Iterable[Sequence[str]], before: Mapping[str, Sequence[str]]) -> dict[tuple[str, ...], str]:
    """By the parts of each run of a sweep its name, like no other's, also where a disk takes no note of case.

    ``before``: by name the parts of the runs that the sweep had at earlier starts, whose names stay.
    """
    known = {tuple(parts): name for name, parts in before.items()}
    new = [parts for parts in dict.fromkeys(map(tuple, jobs)) if parts not in known]
    taken = Counter(name.casefold() for name in (*before, *map(plain_name, new)))
    for parts in new:
        is_alike = taken[plain_name(parts).casefold()] > 1
        known[parts] = with_digest(parts) if is_alike else plain_name(parts)
    return known


def _cut(parts: Sequence[str], longest: int) -> str:
    """The parts as a name of at most ``longest`` letters. First the longest values lose their beginnings, down to
    ``SHORTEST_VALUE``; if that is not enough, the last parts are left out."""
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


NAMES = (
    *("sweep", "train_split", "save_to"),
    *(f"model.{key}" for key in ("path", "revision", "readout", "head_path", "anatomy", "name")),
    *(f"data.{key}" for key in ("path", "split", "config_name", "revision", "name")),
    *(f"data.{what}_column" for what in ("image", "label", "mask", "cluster", "pair")),
    *("logger.project", "logger.entity"),
)
"""Keys whose values are names."""
NAMES_OR_NUMBERS = ("data.classes", "data.label_map")
"""Keys whose values may be numbers too: what is typed as Python writes a number (``3``) is one, ``1_000`` is a name."""
READERS = {OverrideLexer.INT: int, OverrideLexer.FLOAT: float, OverrideLexer.BOOL: lambda text: text.lower() == "true"}
"""Tokens of Hydra's grammar that are no text, and how it reads them."""


def with_quotes(override: str) -> str:
    """An override with quotes around values that are names; other overrides, and invalid ones, as they are.

    Raises ``VitPatchError`` for a name that cannot have quotes: a mapping's key.
    """
    key, _, value = override.partition("=")
    key = key.lstrip("+")
    if key not in (*NAMES, *NAMES_OR_NUMBERS):
        return override
    try:
        tree, quoted = _parse(override), override
    except HydraException:  # of "=" or letters beyond ASCII in a name; commas are between several
        is_plain = key in NAMES and not set(value) & set("'\"[](){}$\\")
        start = override.partition("=")[0]
        return f"{start}={','.join(map(as_value, value.split(',')))}" if is_plain else override
    for place, token in reversed(list(_find_non_texts(tree))):
        read = READERS[token.type](token.text)
        if key in NAMES_OR_NUMBERS and not isinstance(read, bool) and str(read) == token.text:
            continue
        if isinstance(place, OverrideParser.DictKeyContext):
            raise VitPatchError(
                f"{key}: Hydra reads its key {token.text} as {read!r}; write the mapping into a YAML file, the key in "
                "quotes"
            )
        quoted = f"{quoted[: place.start.start]}'{token.text}'{quoted[place.stop.stop + 1 :]}"
    return re.sub(r"=choice\((.*,.*)\)$", r"=\1", quoted) if quoted != override else override  # choice() drops quotes


def _parse(override: str) -> Any:
    """The tree of an override by Hydra's grammar. Raises ``HydraException``."""
    lexer = OverrideLexer(InputStream(override))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(HydraErrorListener())
    return parser.override()


def _find_non_texts(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The nodes of a parsed override that Hydra reads as a number or a boolean, in order, each with its token; a node
    includes the spaces around the token."""
    if isinstance(tree, OverrideParser.FunctionContext) and tree.ID().getText() != "choice":
        return
    if isinstance(tree, OverrideParser.DictKeyContext | OverrideParser.PrimitiveContext):
        tokens = [node.symbol for node in tree.getChildren() if node.symbol.type != OverrideLexer.WS]
        if len(tokens) == 1 and tokens[0].type in READERS:
            yield tree, tokens[0]
        return
    for child in getattr(tree, "children", None) or ():
        yield from _find_non_texts(child)


def quote_swept_names(config: DictConfig) -> None:
    """Puts quotes around names in what a config, with Hydra's part, sweeps over."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    for key, value in params.items():
        if isinstance(value, str):
            params[key] = with_quotes(f"{key}={value}").partition("=")[2]


def as_value(value: Any) -> str:
    """A mapping, a list or a text as the value of an override, which Hydra reads as just this."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(as_value, value))}]"
    return "null" if value is None else QuotedString(value, Quote.single).with_quotes()


def check_names_are_text(config: DictConfig) -> None:
    """Raises ``VitPatchError`` where a value that is a name is a number or a boolean: YAML read it so in a file."""
    for key in NAMES:
        value = OmegaConf.select(config, key)
        if isinstance(value, bool | int | float):
            last = key.rpartition(".")[2]
            raise VitPatchError(
                f"{key} {value!r}: a name is expected, and this is what is read where it has no quotes (2024_11_28 is "
                f"a number in YAML, yes a boolean); write {last}: '…'"
            )
