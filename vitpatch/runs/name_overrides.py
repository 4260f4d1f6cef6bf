"""Keys whose values are names: what was typed for them is used, where Hydra's grammar reads a number or a boolean.

``data.path=2024_11_28`` is the number 20241128 to Hydra, ``model.revision=1e5`` is 100000.0. Light: no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig, OmegaConf

from vitpatch.errors import VitPatchError

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
