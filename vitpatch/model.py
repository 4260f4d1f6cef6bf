"""``PatchableViT``: a Hugging Face vision transformer with named sites, run by its own modules.

Nothing of the model is re-implemented or converted: sites are read and replaced by hooks that live inside a
``with`` and go by name, never by firing order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vitpatch.anatomy import Family, family_of
from vitpatch.hub import explain, resolve
from vitpatch.spec import Site, TokenGroup, VitPatchError

Place = tuple[Site, int]
"""A site of a layer."""

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


@dataclass(frozen=True)
class Preprocessing:
    """How images reach the model: the checkpoint's own image processor, its normalisation taken apart.

    ``to_input`` maps PIL RGB images to float32 (images, 3, height, width) in [0, 1]; ``mean`` and ``std`` (3,) are
    applied later, on the device, after the corruption.
    """

    processor: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_input(self, image: Any) -> Tensor:
        """One PIL RGB image → float32 (3, height, width) in [0, 1], after resize and crop."""
        pixels = self.processor(images=image, do_normalize=False, do_rescale=True, return_tensors="pt")["pixel_values"]
        return pixels[0].float()


class PatchableViT(nn.Module):
    """A vision transformer classifier whose sites can be recorded and replaced.

    ``depth`` blocks; ``label_names`` by class index, or ``None`` where the checkpoint has none; ``weights_digest``
    identifies the weights.
    """

    def __init__(self, model: nn.Module, family: Family, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family, self.preprocessing = family, preprocessing
        self.depth = len(self._blocks)
        self.classes = int(model.config.num_labels)
        self.label_names = _label_names(model.config)
        self.input_size = _pair(model.config.image_size)  # (height, width) in pixels
        self.weights_digest = _digest_of_weights(model)
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(shape), persistent=False)

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.family.blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def normalize(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] → what the model takes, in its own type."""
        return ((images - self.mean) / self.std).to(self.model.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, height, width) → logits (batch, classes)."""
        return self.model(pixel_values=pixels).logits

    def module_at(self, place: Place) -> nn.Module:
        """The module whose output is the site's value."""
        site, layer = place
        block = self._blocks[layer]
        inside = {Site.ATTN_OUT: self.family.attention, Site.MLP_OUT: self.family.mlp, Site.RESID_POST: ""}
        return block.get_submodule(inside[site])

    def tokens(self, group: TokenGroup) -> slice:
        """The positions of a token group along the token axis."""
        special = self.family.special_tokens
        return {TokenGroup.ALL: slice(None), TokenGroup.CLS: slice(0, 1), TokenGroup.PATCHES: slice(special, None)}[
            group
        ]

    @contextmanager
    def reading(self, places: tuple[Place, ...]) -> Iterator[dict[Place, Tensor]]:
        """Collects the value (batch, tokens, width) of each place in the forward passes made inside the block."""
        values: dict[Place, Tensor] = {}

        def keep(place: Place) -> Callable[[Tensor], None]:
            return lambda value: values.__setitem__(place, value.detach())

        with self._hooked({place: keep(place) for place in places}):
            yield values

    @contextmanager
    def replacing(self, values: Mapping[Place, Tensor], group: TokenGroup = TokenGroup.ALL) -> Iterator[None]:
        """Puts ``values`` (batch, tokens, width) at their places, for a token group, inside the block."""
        at = self.tokens(group)

        def put(new: Tensor) -> Callable[[Tensor], Tensor]:
            def act(value: Tensor) -> Tensor:
                if group is TokenGroup.ALL:
                    return new
                mixed = value.clone()
                mixed[:, at] = new[:, at]
                return mixed

            return act

        with self._hooked({place: put(new) for place, new in values.items()}):
            yield

    @contextmanager
    def _hooked(self, acts: Mapping[Place, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        handles = []
        try:
            for place, act in acts.items():
                handles.append(self.module_at(place).register_forward_hook(_on_output(act)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def prove(self) -> None:
        """Shows on a small random batch that the family's row is true of this model, or raises ``VitPatchError``.

        Checked: every site is met once a pass, as (batch, tokens, width); a block's output is its input plus
        attention plus MLP; putting a run's own values back changes no logit; values put in are what goes on.
        """
        pixels = torch.rand(3, 3, *self.input_size, generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(self.device, self.model.dtype)
        places = tuple((site, layer) for site in Site for layer in range(self.depth))
        with self.reading(places) as values:
            plain = self(pixels)
        if missed := [place for place in places if place not in values]:
            raise VitPatchError(f"{self.family.name}: {missed[0][0]} of layer {missed[0][1]} is never computed")
        if not plain.isfinite().all():
            layer = self.first_bad_layer(pixels)
            where = "in the classifier" if layer is None else f"from layer {layer} on"
            raise VitPatchError(
                f"the model's values are not finite {where}, on random pixels; check its weights and dtype"
            )

        def equal(got: Tensor, want: Tensor) -> bool:
            rounding = 64 * torch.finfo(self.model.dtype).eps * float(want.float().abs().max())
            return torch.allclose(got, want, rtol=0, atol=rounding)

        for layer in range(1, self.depth):
            before, after = values[Site.RESID_POST, layer - 1], values[Site.RESID_POST, layer]
            sum_of_parts = before + values[Site.ATTN_OUT, layer] + values[Site.MLP_OUT, layer]
            if not equal(sum_of_parts, after):
                raise VitPatchError(f"{self.family.name}: block {layer} is not input + attention + MLP; not supported")
        with self.replacing(values):
            same = self(pixels)
        with self.replacing({(Site.RESID_POST, 0): values[Site.RESID_POST, 0].flip(0)}):
            flipped = self(pixels)
        for name, got, want in (("its own values", same, plain), ("another run's values", flipped, plain.flip(0))):
            if not equal(got, want):
                raise VitPatchError(f"{self.family.name}: a run patched with {name} has the wrong logits")

    @torch.no_grad()
    def first_bad_layer(self, pixels: Tensor) -> int | None:
        """The first layer after which a value of this run is not finite, or ``None``."""
        places = tuple((Site.RESID_POST, layer) for layer in range(self.depth))
        with self.reading(places) as values:
            self(pixels)
        return next((layer for (_, layer), value in values.items() if not value.isfinite().all()), None)


def _on_output(act: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """A forward hook that shows ``act`` the output's tensor and puts back what it returns; attention gives a tuple."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = act(output[0] if is_tuple else output)
        if new is None:
            return output
        return (new, *output[1:]) if is_tuple else new

    return hook


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
    patchable = PatchableViT(model, family_of(model.config.model_type, checkpoint.path), preprocessing)
    _check_input_size(patchable, checkpoint.path)
    patchable.prove()
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
    height, width = _pair(config.image_size)
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


def _label_names(config: Any) -> tuple[str, ...] | None:
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    unnamed = tuple(f"LABEL_{i}" for i in range(config.num_labels))
    return None if names == unnamed else names


def _digest_of_weights(model: nn.Module) -> str:
    """Sixteen hex digits of all weights by name, type, shape and value."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
