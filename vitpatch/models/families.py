"""One row a model family: where its blocks, attention, MLP, tokens and readout are. No torch at import."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vitpatch.errors import VitPatchError
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


@dataclass(frozen=True)
class Family:
    """The module names of a vision transformer with pre-norm blocks.

    Paths are dotted. ``blocks`` and ``readouts`` start at the model; ``norm1``, ``attention``, ``scale1``, ``norm2``,
    ``mlp`` (modules in a row), ``scale2`` at a block; ``query``, ``key``, ``value`` – or ``qkv``, one projection to all
    three – and ``output`` at the attention. ``scale1`` and ``scale2`` are fixed layer scales: modules, parameters,
    numbers, or absent. ``bias`` is a module of the block, ``shared_bias`` one of the model, whose output is added to
    the attention scores; ``rotary`` the attention's argument (cos, sin) for the patches' queries and keys.

    ``special`` names the tokens before the image patches, ``registers`` what counts more of them: a key of the config,
    or an attribute of timm's model.
    ``readouts`` are the ways to classify that models of the family have. ``any_size`` says that positions are
    interpolated, so that images need not have the config's size. ``versions`` are names of the same modules in other
    versions of transformers, {field: name} each.

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


def _vit(name: str, backbone: str) -> Family:
    readout = Readout({"classifier": ("cls",)}, norm=f"{backbone}.layernorm")
    return Family(name, f"{backbone}.layers", ("cls",), (readout,))


def _beit(name: str, backbone: str, **rest: Any) -> Family:
    """BEiT's readouts: the patches' mean through a norm of its own, or CLS."""
    mean = Readout({"classifier": (PATCHES,)}, pooled_norm=f"{backbone}.pooler.layernorm")
    cls = Readout({"classifier": ("cls",)}, norm=f"{backbone}.layernorm")
    shared = f"{backbone}.{rest.pop('shared_bias')}"
    scales = {"scale1": "lambda_1", "scale2": "lambda_2"}
    blocks = f"{backbone}.{rest.pop('blocks')}"
    return Family(name, blocks, ("cls",), (mean, cls), shared_bias=shared, **scales, **rest)


def _dinov2(name: str, backbone: str, registers: str | None = None) -> Family:
    readout = Readout({"classifier": ("cls", PATCHES)}, norm=f"{backbone}.layernorm")
    scales = {"scale1": "layer_scale1", "scale2": "layer_scale2"}
    norms = {"norm1": "norm1", "norm2": "norm2", "registers": registers, "any_size": True}
    projections = {name: f"attention.{name}" for name in ("query", "key", "value")}
    versions = ({**projections, "output": "output.dense"},)
    return Family(name, f"{backbone}.encoder.layer", ("cls",), (readout,), versions=versions, **scales, **norms)


_TOWER = {
    "blocks": "vision_model.encoder.layers",
    "norm1": "layer_norm1",
    "attention": "self_attn",
    "output": "out_proj",
    "norm2": "layer_norm2",
}
"""The vision side of a model of images and texts."""


def _siglip(name: str, any_size: bool = False) -> Family:
    norm = "vision_model.post_layernorm"
    mean = Readout({"classifier": (EVERYTHING,)}, norm=norm)
    zero_shot = Readout({"similarity": (POOLED,)}, norm=norm, pool="vision_model.head")
    return Family(name, special=(), readouts=(zero_shot, mean), any_size=any_size, **_TOWER)


def _timm() -> Family:
    """timm's VisionTransformer; whether it reads CLS or a mean, before or after its last norm, shows in its logits."""
    head, norm, after = "timm_model.head", "timm_model.norm", "timm_model.fc_norm"
    parts = (("cls",), (PATCHES,), (EVERYTHING,))
    readouts = tuple(Readout({head: part}, norm=norm, pooled_norm=after) for part in parts)
    pooled = Readout({head: (POOLED,)}, norm=norm, pool="timm_model.attn_pool", pooled_norm=after)
    both = {"timm_model.head": ("cls",), "timm_model.head_dist": ("distillation",)}
    return Family(
        name="timm",
        blocks="timm_model.blocks",
        special=("cls", "distillation"),
        readouts=(Readout(both, norm=norm), pooled, *readouts),
        norm1="norm1",
        attention="attn",
        qkv="qkv",
        output="proj",
        scale1="ls1",
        norm2="norm2",
        scale2="ls2",
        registers="num_reg_tokens",
    )


FAMILIES = {
    "vit": _vit("ViT", "vit"),
    "vit_msn": _vit("ViT-MSN", "vit"),
    "deit": Family(
        name="DeiT",
        blocks="deit.layers",
        special=("cls", "distillation"),
        readouts=(
            Readout({"classifier": ("cls",)}, norm="deit.layernorm"),
            Readout({"cls_classifier": ("cls",), "distillation_classifier": ("distillation",)}, norm="deit.layernorm"),
        ),
    ),
    "beit": _beit("BEiT", "beit", blocks="layers", bias="relative_position_bias", shared_bias="shared_position_bias"),
    "data2vec-vision": _beit(
        "Data2Vec-Vision",
        "data2vec_vision",
        blocks="encoder.layer",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="output.dense",
        mlp=("intermediate", "output"),
        bias="attention.attention.relative_position_bias",
        shared_bias="encoder.relative_position_bias",
    ),
    "ijepa": Family(
        name="I-JEPA",
        blocks="ijepa.layers",
        special=(),
        readouts=(Readout({"classifier": (EVERYTHING,)}, norm="ijepa.layernorm"),),
    ),
    "dinov2": _dinov2("DINOv2", "dinov2"),
    "dinov2_with_registers": _dinov2("DINOv2 with registers", "dinov2_with_registers", "num_register_tokens"),
    "dinov3_vit": Family(
        name="DINOv3",
        blocks="backbone.model.layer",
        special=("cls",),
        readouts=(
            Readout({"classifier": ("cls", PATCHES)}, norm="backbone.norm"),
            Readout({"classifier": ("cls",)}, norm="backbone.norm"),
        ),
        norm1="norm1",
        scale1="layer_scale1",
        norm2="norm2",
        scale2="layer_scale2",
        rotary="position_embeddings",
        registers="num_register_tokens",
        any_size=True,
    ),
    "clip": Family(
        name="CLIP",
        special=("cls",),
        readouts=(
            Readout({"similarity": ("cls",)}, norm="vision_model.post_layernorm"),
            Readout({"classifier": (PATCHES,)}),
        ),
        **_TOWER,
    ),
    "siglip": _siglip("SigLIP"),
    "siglip2": _siglip("SigLIP 2", any_size=True),
    "timm_wrapper": _timm(),
}
"""By ``config.model_type``."""


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
    """A user's own row: the fields of ``Family`` and of its ``Readout``s; with ``like: KEY``, what differs from one."""
    import yaml

    file = Path(path).expanduser()
    try:
        row = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise VitPatchError(f"model.anatomy {path}: cannot be read ({one_line(error, 120)})") from error
    if not isinstance(row, dict):
        raise VitPatchError(f"model.anatomy {path}: holds {type(row).__name__}; expected keys like blocks: …")
    row = dict(row)
    like = row.pop("like", None)
    if like is not None and like not in FAMILIES:
        raise VitPatchError(f"model.anatomy {path}: like {like!r}; expected one of {', '.join(sorted(FAMILIES))}")
    whole = {} if like is None else {f.name: getattr(FAMILIES[like], f.name) for f in fields(Family)}
    if "readouts" in row:
        readouts = row["readouts"] if isinstance(row["readouts"], list) else [row["readouts"]]
        row["readouts"] = tuple(_readout(readout, path) for readout in readouts)
    return _made(Family, whole | {key: _tupled(value) for key, value in row.items()}, path, "")


def _readout(values: Any, path: str) -> Readout:
    if not isinstance(values, dict) or not isinstance(values.get("heads"), dict) or not values["heads"]:
        raise VitPatchError(
            f"model.anatomy {path}: readouts {values!r}; expected heads: {{classifier: [cls]}} and norm"
        )
    heads = {
        str(head): _tupled(parts if isinstance(parts, list) else [parts]) for head, parts in values["heads"].items()
    }
    return _made(Readout, values | {"heads": heads}, path, "readouts.")


def _made(kind: type, values: dict[str, Any], path: str, prefix: str) -> Any:
    """A row of ``values``, each of the kind that its field says."""
    known = {f.name: str(f.type) for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise VitPatchError(f"model.anatomy {path}: unknown key {prefix}{key}; {hint}")
        kinds = {"str": str, "str | None": (str, type(None)), "bool": bool}.get(known[key], (tuple, Mapping))
        if not isinstance(value, kinds):
            raise VitPatchError(f"model.anatomy {path}: {prefix}{key} {value!r}; expected {_EXPECTED[known[key]]}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if needed:
        raise VitPatchError(f"model.anatomy {path}: lacks {', '.join(needed)}")
    return kind(**values)


_EXPECTED = {
    "str": "a name",
    "str | None": "a name, or null",
    "bool": "true or false",
    "tuple[str, ...]": "a list of names",
    "tuple[Readout, ...]": "a list of readouts",
    "Mapping[str, tuple[str, ...]]": "heads, each with what it reads",
    "tuple[Mapping[str, str], ...]": "a list of {field: name}",
}


def _tupled(value: Any) -> Any:
    return tuple(p if isinstance(p, dict) else str(p) for p in value) if isinstance(value, list) else value
