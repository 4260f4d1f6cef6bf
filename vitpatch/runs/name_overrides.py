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
READ = {OverrideLexer.INT: int, OverrideLexer.FLOAT: float, OverrideLexer.BOOL: lambda text: text.lower() == "true"}
"""Tokens of Hydra's grammar that are no text, and what it reads in them."""


def with_quotes(override: str) -> str:
    """An override with quotes around what is meant as a name; others as they are, and what Hydra cannot read.

    Raises ``VitPatchError`` for a name that cannot have quotes: a mapping's key.
    """
    key, _, value = override.partition("=")
    key = key.lstrip("+")
    if key not in (*NAMES, *NAMES_OR_NUMBERS):
        return override
    try:
        tree, quoted = _parsed(override), override
    except HydraException:
        is_plain = key in NAMES and not set(value) & set("'\"[](){}$\\")
        return _each_quoted(override) if is_plain else override
    for place, token in reversed(list(_no_texts(tree))):
        read = READ[token.type](token.text)
        if key in NAMES_OR_NUMBERS and not isinstance(read, bool) and str(read) == token.text:
            continue
        if isinstance(place, OverrideParser.DictKeyContext):
            raise VitPatchError(
                f"{key}: Hydra reads its key {token.text} as {read!r}; write the mapping into a YAML file, the key in "
                "quotes"
            )
        quoted = f"{quoted[: place.start.start]}'{token.text}'{quoted[place.stop.stop + 1 :]}"
    return re.sub(r"=choice\((.*,.*)\)$", r"=\1", quoted) if quoted != override else override  # choice() drops quotes


def _parsed(override: str) -> Any:
    """The tree of an override by Hydra's grammar. Raises ``HydraException``."""
    lexer = OverrideLexer(InputStream(override))
    parser = OverrideParser(CommonTokenStream(lexer))
    for of in (lexer, parser):
        of.removeErrorListeners()
        of.addErrorListener(HydraErrorListener())
    return parser.override()


def _each_quoted(override: str) -> str:
    """A name with what Hydra has no word for – ``=``, letters beyond ASCII –, or several with commas between."""
    key, _, value = override.partition("=")
    return f"{key}={','.join(as_value(name) for name in value.split(','))}"


def _no_texts(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The places in a parsed override, spaces around included, where Hydra reads a number or a boolean; each with its
    token, in order."""
    if isinstance(tree, OverrideParser.FunctionContext) and tree.ID().getText() != "choice":
        return
    if isinstance(tree, OverrideParser.DictKeyContext | OverrideParser.PrimitiveContext):
        tokens = [node.symbol for node in tree.getChildren() if node.symbol.type != OverrideLexer.WS]
        if len(tokens) == 1 and tokens[0].type in READ:
            yield tree, tokens[0]
        return
    for at in range(tree.getChildCount()):
        yield from _no_texts(tree.getChild(at))


def quote_swept_names(config: DictConfig) -> None:
    """The same in what a config, with Hydra's part, sweeps over."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    for key, value in params.items():
        if isinstance(value, str):
            params[key] = with_quotes(f"{key}={value}").partition("=")[2]


def as_value(value: Any) -> str:
    """Mappings, lists and texts as the value of an override, which Hydra reads as just these."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_value(of)}' for key, of in value.items())}}}"
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
