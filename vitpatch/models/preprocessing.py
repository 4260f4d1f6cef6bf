"""How images reach a model: its input and patch size; picture → pixels in [0, 1], and the normalisation after that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vitpatch.errors import VitPatchError

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Ways to resize, by the names of Pillow."""


@dataclass(frozen=True)
class Preprocessing:
    """A model's own image processor, its normalisation taken apart.

    ``mean`` and ``std`` (3,) are applied later than ``to_input``, on the device, after the corruption.
    """

    processor: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_input(self, image: Any) -> Tensor:
        """One PIL RGB image → float32 (3, height, width) in [0, 1], after resize and crop."""
        pixels = self.processor(images=image, do_normalize=False, do_rescale=True, return_tensors="pt")["pixel_values"]
        return pixels[0].float()

    @cached_property
    def input_size(self) -> tuple[int, int]:
        """(height, width) that all images are brought to. Raises ``VitPatchError`` where they keep their own."""
        from PIL import Image

        sizes = {tuple(self.to_input(Image.new("RGB", size)).shape[1:]) for size in ((61, 47), (47, 61))}
        if len(sizes) > 1:
            raise VitPatchError(
                f"the image processor keeps the images' shapes ({' and '.join(map(str, sorted(sizes)))}); say "
                "model.image_size, model.mean and model.std instead"
            )
        return sizes.pop()


def from_processor(processor: Any) -> Preprocessing:
    """The preprocessing of a checkpoint's image processor.

    Raises ``VitPatchError`` where it does not bring pixels to the [0, 1] scale.
    """
    factor = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1.0
    if abs(255 * factor - 1) > 1e-3:
        raise VitPatchError(
            f"the model's image processor multiplies pixels by {factor:g}, not 1/255; "
            "say model.mean and model.std on the [0, 1] scale instead"
        )
    if not getattr(processor, "do_normalize", True):
        return Preprocessing(processor, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Preprocessing(processor, *(_per_colour(x) for x in (processor.image_mean, processor.image_std)))


def _per_colour(value: Any) -> tuple[float, ...]:
    """One number a colour, from a list or from one number for all."""
    values = tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),)
    return values * 3 if len(values) == 1 else values


def explicit_preprocessing(
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    resample: str = "bicubic",
    crop_share: float | None = None,
) -> Preprocessing:
    """Images are resized to ``size`` (height, width); with ``crop_share`` they are resized to more, and cropped to it.

    The shorter edge then becomes the shorter of ``size`` ÷ ``crop_share``. ``mean`` and ``std`` are of red, green and
    blue on the [0, 1] scale.
    """
    if resample not in RESAMPLE:
        raise VitPatchError(f"model.resample {resample!r}: expected one of {', '.join(RESAMPLE)}")
    if crop_share is None:
        resized: dict[str, int] = {"height": size[0], "width": size[1]}
    else:
        resized = {"shortest_edge": math.floor(min(size) / crop_share)}
    config = {
        "size": resized,
        "resample": RESAMPLE[resample],
        "do_center_crop": crop_share is not None,
        "crop_size": {"height": size[0], "width": size[1]},
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return from_processor(pillow_processor(config))


def pillow_processor(config: Mapping[str, Any]) -> Any:
    """An image processor of Pillow from a ``preprocessor_config.json``: resize, crop, rescale, normalise."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    keys = ("size", "resample", "crop_size", "rescale_factor", "image_mean", "image_std")
    steps = {"do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True}
    values = {key: config[key] for key in keys if config.get(key) is not None}
    return CLIPImageProcessorPil(**values, **{step: config.get(step, default) for step, default in steps.items()})


def from_timm(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing of timm's ``pretrained_cfg``: input size, share of the crop, interpolation, mean and std."""
    size = tuple(config.get("input_size") or (3, 224, 224))[1:]
    share = None if config.get("crop_mode") == "squash" else float(config.get("crop_pct") or 0.875)
    mean, std = (config.get(key) or [0.5] * 3 for key in ("mean", "std"))
    return explicit_preprocessing(size, mean, std, config.get("interpolation") or "bilinear", share)


def accept_pixels(model: nn.Module) -> None:
    """Gives a model whose vision tower takes rows of patches (SigLIP 2, NaFlex) a hook that makes them of pixels."""
    if model.config.model_type != "siglip2":
        return
    tower = model.vision_model

    def to_patches(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        pixels = args[0] if args else kwargs["pixel_values"]
        if pixels.dim() != 4:
            return None
        patch, (batch, colours, height, width) = tower.config.patch_size, pixels.shape
        rows, columns = height // patch, width // patch
        cut = pixels.reshape(batch, colours, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        arguments = {
            "pixel_values": cut.reshape(batch, rows * columns, patch * patch * colours),
            "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.int64, device=pixels.device),
            "spatial_shapes": torch.tensor([[rows, columns]], device=pixels.device).expand(batch, -1),
        }
        return (), kwargs | arguments

    tower.register_forward_pre_hook(to_patches, with_kwargs=True)


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def vision_config(config: Any) -> Any:
    """The part of a config that is the vision transformer's."""
    return getattr(config, "vision_config", None) or config


def image_and_patch_size(model: nn.Module) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """(height, width) of images in pixels, where the model says it, and of a patch."""
    embedding = getattr(getattr(model, "timm_model", None), "patch_embed", None)
    size = config_value(model, "image_size") or getattr(embedding, "img_size", None)
    patch = config_value(model, "patch_size") or getattr(embedding, "patch_size", None)
    if patch is None:
        raise VitPatchError(f"{type(model).__name__}: neither its config nor timm's patch_embed says its patch size")
    return None if size is None else pair(size), pair(patch)


def config_value(model: nn.Module, name: str) -> Any:
    """A value of the config's vision part, or of timm's model; ``None`` where neither has it."""
    owners = (vision_config(model.config), getattr(model, "timm_model", None))
    return next((getattr(owner, name) for owner in owners if hasattr(owner, name)), None)
