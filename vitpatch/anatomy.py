"""One row a model family: where its blocks, attention, MLP and special tokens are. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass

from vitpatch.spec import VitPatchError


@dataclass(frozen=True)
class Family:
    """The module names of a Hugging Face vision transformer; paths are dotted, those of parts start at a block.

    ``special_tokens`` stand before the image patches, the CLS token first. ``Family`` is data: that it is true of a
    model is shown when the model is loaded (``vitpatch.model.PatchableViT.prove``).
    """

    name: str
    blocks: str
    attention: str
    mlp: str
    special_tokens: int


FAMILIES = {
    "vit": Family("ViT", blocks="vit.layers", attention="attention", mlp="mlp", special_tokens=1),
    "deit": Family("DeiT", blocks="deit.layers", attention="attention", mlp="mlp", special_tokens=2),
}
"""By ``config.model_type``."""


def family_of(model_type: str, where: str) -> Family:
    """The family of a model whose config says ``model_type``; ``where`` names the model in the error."""
    if model_type not in FAMILIES:
        known = ", ".join(f"{family.name} ({key})" for key, family in sorted(FAMILIES.items()))
        raise VitPatchError(f"model {where}: model_type {model_type!r} is not a known family; known: {known}")
    return FAMILIES[model_type]
