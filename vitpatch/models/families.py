"""Model families as data: where the blocks, attention, MLP, tokens and readouts of each are. Does not import torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml

from vitpatch.checks import argument_keys, describe, has_type, suggest
from vitpatch.errors import ArgumentError, VitPatchError
from vitpatch.formatting import one_line

PATCHES, EVERYTHING, POOLED = "patches", "all", "pooled"
"""What a head may read, or a special token: the mean over patches or all tokens, or what ``Readout.pool`` gives."""


@dataclass(frozen=True)
class Readout:
    """A way to classify the stream that leaves the last block.

    ``norm`` is a layer norm token by token; then for each of ``heads`` the parts that it reads, side by side: names of
    special tokens, ``patches`` or ``all`` (the mean over them), or ``pooled`` (what the module ``pool`` makes of all
    tokens). ``pooled_norm`` comes between parts and heads. The logits are the mean over the heads. Paths start at the
    model.
    """

    heads: Mapping[str, tuple[str, ...]]
    norm: str | None = None
    pool: str | None = None
    pooled_norm: str | None = None

    @property
    def modules(self) -> set[str]:
        """The paths a model must have."""
        return {*self.heads, *filter(None, (self.norm, self.pool, self.pooled_norm))}

    @property
    def parts(self) -> set[str]:
        """What its heads read."""
        return {part for parts in self.heads.values() for part in parts}


@dataclass(frozen=True)
class Family:
    """The module names of a vision transformer with pre-norm blocks.

    Paths are dotted. ``blocks`` and ``readouts`` start at the model; ``norm1``, ``attention``, ``scale1``, ``norm2``,
    ``mlp`` (modules in a row), ``scale2`` at a block; ``query``, ``key``, ``value`` – or ``qkv``, one projection to all
    three – and ``output`` at the attention. ``scale1`` and ``scale2`` are fixed layer scales: modules, parameters,
    numbers, or absent. ``bias`` is a module of the block, ``shared_bias`` one of the model, whose output is added to
    the attention scores; ``rotary`` the attention's argument (cos, sin) for the patches' queries and keys.

    ``special`` names the tokens before the image patches; ``registers`` is the key of the config, or the attribute of
    timm's model, that says how many more there are. ``readouts`` are the ways to classify that models of the family
    have. ``any_size`` says that positions are interpolated, so that images need not have the config's size.
    ``versions`` are names of the same modules in other versions of transformers, {field: name} each.

    ``Family`` is data: that it is true of a model is verified when the model is loaded (``vitpatch.models.verify``).
    """

    name: str
    blocks: str
    special: tuple[str, ...]
    readouts: tuple[Readout, ...]
    norm1: str = "layernorm_before"
    attention: str = "attention"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    qkv: str | None = None
    output: str = "o_proj"
    scale1: str | None = None
    norm2: str = "layernorm_after"
    mlp: tuple[str, ...] = ("mlp",)
    scale2: str | None = None
    bias: str | None = None
    shared_bias: str | None = None
    rotary: str | None = None
    registers: str | None = None
    any_size: bool = False
    versions: tuple[Mapping[str, str], ...] = ()


def family_of(model_type: str, where: str) -> Family:
    """The family of a model whose config says ``model_type``; ``where`` names the model in the error."""
    if model_type not in FAMILIES:
        names = {key: f"{family.name} ({key})" for key, family in FAMILIES.items()}
        near = difflib.get_close_matches(model_type, names, n=3, cutoff=0.3) or sorted(names)
        raise VitPatchError(
            f"model {where}: model_type {model_type!r} is not a known family; nearest known: "
            f"{', '.join(names[key] for key in near)}; where its blocks are pre-norm, "
            "model.anatomy=FILE.yaml adds a row (README: a family of your own)"
        )
    return FAMILIES[model_type]


def is_known_family(family: Family) -> bool:
    """Whether a row is one of ``FAMILIES``, by the names of some version of transformers."""
    return any(family == replace(row, **names) for row in FAMILIES.values() for names in ({}, *row.versions))


def family_from_yaml(path: str) -> Family:
    """A family of the user's own: a file with the keys of a row of ``families.yaml``. Raises ``VitPatchError``."""
    with argument_keys(f"model.anatomy {path}: "):
        try:
            row = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ArgumentError(f"cannot be read ({one_line(error, 120)})") from error
        return _family(row, FAMILIES)


def _family(row: Any, known: Mapping[str, Family]) -> Family:
    """A row of YAML; with ``like: KEY`` fields that it does not have are those of a known family."""
    if not isinstance(row, dict):
        raise ArgumentError(f"holds {type(row).__name__}; expected keys like blocks: …")
    like = row.pop("like", None)
    if like is not None and like not in known:
        raise ArgumentError(f"like {like!r}; expected one of {', '.join(sorted(known))}")
    row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    if "readouts" in row:
        readouts = row["readouts"] if isinstance(row["readouts"], tuple) else (row["readouts"],)
        row["readouts"] = tuple(map(_readout, readouts))
    return _build(Family, row if like is None else vars(known[like]) | row)


def _readout(values: Any) -> Readout:
    heads = values.get("heads") if isinstance(values, dict) else None
    if not isinstance(heads, dict) or not heads:
        raise ArgumentError(f"readouts {values!r}; expected heads: {{classifier: [cls]}} and norm")
    heads = {head: tuple(parts) if isinstance(parts, list) else (parts,) for head, parts in heads.items()}
    return _build(Readout, values | {"heads": heads})


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    """A ``Family`` or ``Readout`` of these values, each checked against the declared type of its field."""
    declared = get_type_hints(kind)
    for key, value in values.items():
        if key not in declared:
            raise ArgumentError(f"unknown key {key}; {suggest(key, declared)}")
        if value != () and not has_type(value, declared[key]):
            expected = "a list" if get_origin(declared[key]) is tuple else describe(declared[key])
            raise ArgumentError(f"{key} {value!r}; expected {expected}")
    if missing := [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]:
        raise ArgumentError(f"lacks {', '.join(missing)}")
    return kind(**values)


FAMILIES: dict[str, Family] = {}
"""By ``config.model_type``: the rows of ``families.yaml``."""
for _key, _row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).items():
    FAMILIES[_key] = _family(_row, FAMILIES)
