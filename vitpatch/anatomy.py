"""One row a model family: where its blocks, attention, MLP, tokens and readout are. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vitpatch.spec import VitPatchError


@dataclass(frozen=True)
class Family:
    """The module names of a Hugging Face vision transformer with pre-norm blocks.

    Paths are dotted; ``embeddings``, ``blocks``, ``norm`` (the last one) and the readouts' heads start at the model,
    ``norm1``, ``attention``, ``norm2``, ``mlp`` at a block, ``query``, ``key``, ``value``, ``output`` at the attention.
    ``special`` names the tokens before the image patches. ``readouts`` are the ways to classify that models of the
    family have, each {head: token it reads}, its logits the mean over its heads; a model's way is the first whose
    heads it has. ``Family`` is data: that it is true of a model is shown when the model is loaded
    (``vitpatch.proof``).
    """

    name: str
    embeddings: str
    blocks: str
    norm: str
    special: tuple[str, ...]
    readouts: tuple[Mapping[str, int], ...]
    norm1: str = "layernorm_before"
    attention: str = "attention"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    norm2: str = "layernorm_after"
    mlp: str = "mlp"


FAMILIES = {
    "vit": Family(
        name="ViT",
        embeddings="vit.embeddings",
        blocks="vit.layers",
        norm="vit.layernorm",
        special=("cls",),
        readouts=({"classifier": 0},),
    ),
    "deit": Family(
        name="DeiT",
        embeddings="deit.embeddings",
        blocks="deit.layers",
        norm="deit.layernorm",
        special=("cls", "distillation"),
        readouts=({"classifier": 0}, {"cls_classifier": 0, "distillation_classifier": 1}),
    ),
}
"""By ``config.model_type``."""


def family_of(model_type: str, where: str) -> Family:
    """The family of a model whose config says ``model_type``; ``where`` names the model in the error."""
    if model_type not in FAMILIES:
        known = ", ".join(f"{family.name} ({key})" for key, family in sorted(FAMILIES.items()))
        raise VitPatchError(f"model {where}: model_type {model_type!r} is not a known family; known: {known}")
    return FAMILIES[model_type]
