"""Checkpoints → models: loading, checking, and new classifiers; what is wrong with one is said in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vitpatch.anatomy import family_of
from vitpatch.hub import explain, resolve
from vitpatch.model import PatchableViT, Preprocessing, pair
from vitpatch.proof import prove
from vitpatch.spec import VitPatchError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """Which weights: ``path`` is a hub id or a folder written by ``save_pretrained``, ``revision`` one of a hub id.

    ``dtype`` is the type of the weights: float32, bfloat16 or float16.
    """

    path: str | None
    revision: str | None = None
    dtype: str = "float32"

    def load(self) -> PatchableViT:
        """The model, loaded once per process. Raises ``VitPatchError`` for whatever is wrong with the path."""
        if not self.path:
            raise VitPatchError("model.path is missing: give a hub id or a folder written by save_pretrained")
        if self.dtype not in DTYPES:
            raise VitPatchError(f"model.dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        return _load(self)


@lru_cache(maxsize=2)
def _load(checkpoint: Checkpoint) -> PatchableViT:
    model, preprocessing, info = _from_pretrained(checkpoint)
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise VitPatchError(f"model {checkpoint.path}: no weights for {some}: not a fine-tuned image classifier")
    if info["mismatched_keys"]:
        some = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])[0]
        raise VitPatchError(f"model {checkpoint.path}: its weights {some} have another shape than its config says")
    if spare := sorted(key for key in info["unexpected_keys"] if ".layer" in key and ".layernorm." not in key):
        raise VitPatchError(f"model {checkpoint.path}: its config has no place for the weights {', '.join(spare[:3])}")
    family = family_of(model.config.model_type, checkpoint.path)
    patchable = PatchableViT(model.requires_grad_(False), family, preprocessing)
    _check_input_size(patchable, checkpoint.path)
    prove(patchable)
    return patchable


def _from_pretrained(checkpoint: Checkpoint, **head: Any) -> tuple[Any, Preprocessing, Mapping[str, Any]]:
    """Model, preprocessing, and what transformers says of the weights; ``head`` changes the labels."""
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it without torchvision
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()  # what is missing in a checkpoint is ours to say
    where = resolve(checkpoint.path, "model.path")
    arguments = {"revision": checkpoint.revision} if checkpoint.revision else {}
    with _one_line(checkpoint.path):
        config = AutoConfig.from_pretrained(where, **arguments)
    family_of(config.model_type, checkpoint.path)
    _refuse_pickle(Path(where))
    with _one_line(checkpoint.path):
        processor = AutoImageProcessor.from_pretrained(where, **arguments)
        model, info = AutoModelForImageClassification.from_pretrained(
            where,
            dtype=DTYPES[checkpoint.dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the info
            **head,
            **arguments,
        )
    return model, _preprocessing(processor), info


def _refuse_pickle(folder: Path) -> None:
    if (folder / "pytorch_model.bin").exists() and not list(folder.glob("model*.safetensors*")):
        raise VitPatchError(
            f"model {folder}: it has only pytorch_model.bin, a pickle, which is not loaded; where you trust it, "
            "load it with transformers and save_pretrained it again: that writes model.safetensors"
        )


def pretrained_classifier(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[Any, Preprocessing]:
    """A checkpoint to fine-tune, its head replaced where its labels are not ``names``."""
    model, preprocessing, _ = _from_pretrained(checkpoint, **_labels(names))
    return model, preprocessing


def new_classifier(config: Any, names: Sequence[str]) -> tuple[Any, Preprocessing]:
    """An untrained classifier of a Hugging Face ``config``; its image processor resizes and maps [0, 1] to [-1, 1]."""
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    family_of(config.model_type, type(config).__name__)
    for key, value in _labels(names).items():
        setattr(config, key, value)
    height, width = pair(config.image_size)
    half = [0.5, 0.5, 0.5]
    processor = ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)
    return AutoModelForImageClassification.from_config(config), _preprocessing(processor)


def _labels(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _check_input_size(model: PatchableViT, path: str) -> None:
    got = tuple(model.preprocessing.to_input(Image.new("RGB", (61, 47))).shape[1:])
    if got != model.input_size:
        raise VitPatchError(f"model {path}: its image processor gives {got} pixels, the model takes {model.input_size}")


@contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Turns what the Hugging Face libraries raise on loading a model into one line."""
    try:
        yield
    except Exception as error:  # of transformers, safetensors, torch and the hub's client, which share no class
        raise VitPatchError(f"model {path} cannot be loaded: {explain(error, path, 'model.path', '')}") from error


def _preprocessing(processor: Any) -> Preprocessing:
    ones = (1.0, 1.0, 1.0)
    if not getattr(processor, "do_normalize", True):
        return Preprocessing(processor, (0.0, 0.0, 0.0), ones)
    return Preprocessing(processor, tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std)))
