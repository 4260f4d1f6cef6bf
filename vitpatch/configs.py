"""What a loaded model's config and weights say: sizes, label names, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from vitpatch.preprocessing import pair
from vitpatch.spec import VitPatchError, digest

NOT_OF_THE_ARCHITECTURE = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
    "id2label", "label2id", "label_names",
)  # fmt: skip
"""Keys of a config that change no number of a run."""


def vision_config(config: Any) -> Any:
    """The part of a config that is the vision transformer's."""
    return getattr(config, "vision_config", None) or config


def geometry(model: nn.Module) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """(height, width) of the pixels where the model says it, and of a patch."""
    embedding = getattr(getattr(model, "timm_model", None), "patch_embed", None)
    size = said(model, "image_size") or getattr(embedding, "img_size", None)
    patch = said(model, "patch_size") or getattr(embedding, "patch_size", None)
    if patch is None:
        raise VitPatchError(f"{type(model).__name__}: neither its config nor timm's patch_embed says its patch size")
    return None if size is None else pair(size), pair(patch)


def said(model: nn.Module, name: str) -> Any:
    """What the config says, of its vision part, or timm's model."""
    owners = (vision_config(model.config), getattr(model, "timm_model", None))
    return next((getattr(owner, name) for owner in owners if hasattr(owner, name)), None)


def label_names(config: Any) -> tuple[str, ...] | None:
    """By class index; ``None`` where the checkpoint has none."""
    unnamed = tuple(f"LABEL_{i}" for i in range(config.num_labels))
    names = tuple(str(config.id2label.get(i, unnamed[i])) for i in range(config.num_labels))
    return None if names == unnamed else names


def digest_of_weights(model: nn.Module, without: Collection[str] = ()) -> str:
    """Sixteen hex digits of all weights by name, type, shape and value; ``without`` those of some names."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name in without:
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def digest_of_checkpoint(model: nn.Module) -> str:
    """Sixteen hex digits of what a model has of its files, whatever the labels of the data are.

    ``digest_of_weights``, but for a model some of whose weights are ``made_of_labels``: without these, and with those
    that made them.
    """
    if (made := getattr(model, "made_of_labels", None)) is None:
        return digest_of_weights(model)
    return digest([digest_of_weights(model, without=made), model.text_digest])


def digest_of_config(config: Any) -> str:
    """Sixteen hex digits of what a config says of the architecture."""
    return digest({key: value for key, value in config.to_diff_dict().items() if key not in NOT_OF_THE_ARCHITECTURE})
