"""Checkpoints → models with named sites, and new classifiers; what is wrong with one becomes one line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F

from vitpatch.checks import Count, Expected, Interval, Share, has_type, is_list
from vitpatch.data.labels import SHOWN, are_numbers, fold, readable_name
from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.hub import explain
from vitpatch.models.classes import class_names, name_classes
from vitpatch.models.families import Family, family_from_yaml, family_of
from vitpatch.models.preprocessing import (
    Preprocessing,
    explicit_preprocessing,
    from_processor,
    from_timm,
    pair,
    vision_config,
)
from vitpatch.models.pretrained import DTYPES, IMAGE_TEXT_TYPES, UNTRAINED_SEED, Pretrained
from vitpatch.models.verify import verify_model
from vitpatch.models.vit import PatchableViT
from vitpatch.models.wrappers import BackboneClassifier, ZeroShot, take_square_images

log = logging.getLogger(__name__)

CropShare = Annotated[float, Interval(gt=0, le=1), "a share of the shorter edge"]
Deviation = Annotated[float, Interval(gt=0, le=1)]
OneAColour = Expected("one number a colour on the [0, 1] scale of the pixels, std above 0, such as [0.5,0.5,0.5]")


@dataclass(frozen=True)
class Checkpoint(Pretrained):
    """Which model, and how images reach it. Besides what ``Pretrained`` says:

    - ``readout``: one of several heads (DeiT with teacher); ``None`` is all of them, as the model averages them.
    - ``head_path``: a safetensors file with ``weight`` (classes, width or twice it) and ``bias``, for a backbone alone.
    - ``anatomy``: a YAML file with the row of a family of the user's own.
    - ``image_size`` (one edge, or height and width), ``crop_share``, ``resample``, ``mean``, ``std``: instead of the
      checkpoint's image processor, all of it, where one of them is given.
    """

    readout: str | None = None
    head_path: str | None = None
    anatomy: str | None = None
    image_size: Annotated[Count | tuple[Count, Count] | None, Expected("pixels, such as 224 or [224,224]")] = None
    crop_share: CropShare | None = None
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] | None = None
    mean: Annotated[tuple[Share, Share, Share] | None, OneAColour] = None
    std: Annotated[tuple[Deviation, Deviation, Deviation] | None, OneAColour] = None

    def __post_init__(self) -> None:
        for key in ("image_size", "mean", "std", "prompts"):
            if is_list(value := getattr(self, key, None)):
                object.__setattr__(self, key, tuple(value))  # Hydra gives its own kind of list, which has no hash
        super().__post_init__()

    @property
    def needs_names(self) -> bool:
        """Whether the model's classes are the data's labels."""
        return False

    def load(self, names: Sequence[str] | None = None) -> PatchableViT:
        """The model, loaded once per process while its files stay as they are.

        Raises ``VitPatchError`` for whatever is wrong with the path.
        """
        self.check_path()
        return _load(self, tuple(names) if self.needs_names and names else None, self._files())

    def load_unshared(self) -> PatchableViT:
        """As ``load``, but a model that nothing else in the process has, so that its user may change it."""
        self.check_path()
        return _load.__wrapped__(self, None, self._files())

    def _files(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of each local file that the model is read from: a training may save over another."""
        folder = Path(self._where)
        files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
        files += [Path(path).expanduser() for path in (self.head_path, self.anatomy) if path is not None]
        there = [(str(file), file.stat()) for file in sorted(files) if file.exists()]
        return tuple((name, of.st_size, of.st_mtime_ns) for name, of in there)

    def _open(self, names: tuple[str, ...] | None) -> tuple[Any, Preprocessing, Family]:
        """The classifier, its preprocessing and its row."""
        config = self.config()
        family = family_from_yaml(self.anatomy) if self.anatomy else family_of(config.model_type, self.path)
        is_backbone = family.blocks.startswith("backbone.")
        if is_backbone != (self.head_path is not None):
            raise VitPatchError(_HEAD_NEEDED if is_backbone else _HEAD_SPARE.format(family.name))
        preprocessing = _preprocessing_of(self, config)
        kind = "AutoModel" if is_backbone else "AutoModelForImageClassification"
        model = self.model(config, kind)
        if is_backbone:
            model = BackboneClassifier(model, *_head_and_names(self, config))
        if config.model_type == "siglip2":
            take_square_images(model.vision_model)
        return model, preprocessing, family


_HEAD_NEEDED = (
    "model.head_path is missing: this model is a backbone without a classifier; give a safetensors file with weight "
    "(classes, width or twice it) and bias"
)
_HEAD_SPARE = "model.head_path is for backbones without a classifier, such as DINOv3; {} models bring their own"


SIGMOID_NOTE = (
    "SigLIP is trained to answer each text by itself, with a sigmoid; prob, log_odds and kl here are of the softmax "
    "over the data's labels; metric=logit takes the label's own logit alone"
)
SAME_TEXT = (
    "the model cannot tell apart {}, whose texts are the same to it: each has its share of one probability; "
    "other names in the data tell them apart"
)


@dataclass(frozen=True)
class ZeroShotCheckpoint(Checkpoint):
    """A model of images and texts (CLIP, SigLIP) as a classifier of the data's labels.

    ``prompts`` are templates, ``{}`` standing for a label's name; a class is the mean of its texts' directions.
    """

    prompts: Annotated[str | tuple[str, ...], Expected("templates such as 'a photo of a {}.'")] = ("a photo of a {}.",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(prompt.count("{}") == 1 for prompt in self._prompts):
            raise VitPatchError(f"model.prompts {list(self._prompts)}: expected templates such as 'a photo of a {{}}.'")

    @property
    def _prompts(self) -> tuple[str, ...]:
        return self.prompts if isinstance(self.prompts, tuple) else (self.prompts,)

    @property
    def needs_names(self) -> bool:
        """The classes are the data's labels."""
        return True

    def _open(self, names: tuple[str, ...] | None) -> tuple[Any, Preprocessing, Family]:
        if names is None:
            raise VitPatchError("this model takes its classes from the data's label names; the data have none")
        if are_numbers(names):
            raise VitPatchError(
                f"this model reads the data's label names, and they are numbers ({', '.join(names[:3])}); give it words"
            )
        config = self.config()
        if config.model_type not in IMAGE_TEXT_TYPES:
            raise VitPatchError(
                f"model {self.path}: model_type {config.model_type!r} has no texts; CLIP and SigLIP have"
            )
        if self.head_path or self.readout:
            raise VitPatchError("model.head_path and model.readout: a zero-shot model has one head, its texts")
        family = family_from_yaml(self.anatomy) if self.anatomy else family_of(config.model_type, self.path)
        preprocessing = _preprocessing_of(self, config)
        model = self.model(config, "AutoModel")
        texts = _embed_texts(self, model, names, self._prompts)
        notes = (SIGMOID_NOTE,) * config.model_type.startswith("siglip") + _same_text_notes(names, texts)
        if config.model_type == "siglip2":
            take_square_images(model.vision_model)
        return ZeroShot(model, texts, names, notes), preprocessing, family


@lru_cache(maxsize=2)
def _load(checkpoint: Checkpoint, names: tuple[str, ...] | None, files: tuple[Any, ...]) -> PatchableViT:
    """``files`` tells apart what lies at one path at different times."""
    model, preprocessing, family = checkpoint._open(names)
    try:
        size = preprocessing.input_size
        patchable = PatchableViT(model.requires_grad_(False), family, preprocessing, checkpoint.readout, size)
    except VitPatchError as error:
        raise VitPatchError(f"model {checkpoint.path}: {error}") from error
    if size != patchable.input_size:
        raise VitPatchError(
            f"model {checkpoint.path}: its image processor gives {size} pixels, the model takes {patchable.input_size}"
            f"{_resize_keys(patchable.input_size, preprocessing)}"
        )
    verify_model(patchable)
    return patchable


def _resize_keys(size: tuple[int, int], preprocessing: Preprocessing) -> str:
    """What to type so that images are resized to the model's size, normalised as before."""
    values = {"image_size": size, "mean": preprocessing.mean, "std": preprocessing.std}
    keys = [f"model.{key}=[{','.join(f'{number:g}' for number in numbers)}]" for key, numbers in values.items()]
    return f"; to resize images to that: {' '.join(keys)}"


def _head(checkpoint: Checkpoint, config: Any) -> torch.nn.Linear:
    """The linear head of ``head_path``; with ``random_init`` only its shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(checkpoint.head_path).expanduser()
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = one_line(error, 120)
        raise VitPatchError(f"model.head_path {path}: not a readable safetensors file ({reason})") from error
    weight, bias = weights.get("weight"), weights.get("bias")
    width = config.hidden_size
    fits = weight is not None and weight.dim() == 2 and weight.shape[1] in (width, 2 * width)
    if not fits or set(weights) - {"weight", "bias"} or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        raise VitPatchError(
            f"model.head_path {path}: has {shapes}; expected weight (classes, {width}) of CLS, or "
            f"(classes, {2 * width}) of CLS and the mean patch, and bias (classes,)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    if not checkpoint.random_init:
        head.load_state_dict(weights)
    return head.to(DTYPES[checkpoint.dtype])


def _head_and_names(checkpoint: Checkpoint, config: Any) -> tuple[torch.nn.Linear, Sequence[str] | None]:
    """The head of ``head_path`` and the names that the backbone's config has for as many classes, if it has them."""
    head = _head(checkpoint, config)
    names, doubt = class_names(config)
    if names is not None and len(names) != head.out_features:
        doubt = f"its config names {len(names)} classes, model.head_path has {head.out_features}"
    if doubt is not None:
        log.warning("model %s: the classes of model.head_path have no names: %s", checkpoint.path, doubt)
    return head, None if doubt else names


@torch.no_grad()
def _embed_texts(checkpoint: Checkpoint, model: Any, names: tuple[str, ...], prompts: tuple[str, ...]) -> torch.Tensor:
    """Of each class the mean direction of its texts, (classes, width), in float32 and of length 1."""
    tokenizer = checkpoint.tokenizer()
    model.eval()
    longest = model.config.text_config.max_position_embeddings
    padding = "max_length" if model.config.model_type.startswith("siglip") else True  # as it was trained
    directions: list[torch.Tensor] = []
    read: dict[tuple, str] = {}
    for name in names:
        texts = [prompt.replace("{}", readable_name(name)) for prompt in prompts]
        tokens = tokenizer(texts, padding=padding, max_length=longest, truncation=True, return_tensors="pt")
        _check_texts_differ(checkpoint, read.setdefault(tuple(tokens["input_ids"].flatten().tolist()), name), name)
        arguments = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
        if padding == "max_length":
            arguments.pop("attention_mask", None)
        features = model.get_text_features(**arguments)
        features = features if isinstance(features, torch.Tensor) else features.pooler_output
        directions.append(F.normalize(F.normalize(features.float(), dim=-1).mean(0), dim=-1))
    return torch.stack(directions).to(DTYPES[checkpoint.dtype])


def _same_text_notes(names: Sequence[str], texts: torch.Tensor) -> tuple[str, ...]:
    """A line on the labels that have the same direction; ``texts`` (classes, width)."""
    groups: dict[bytes, list[str]] = {}
    for name, direction in zip(names, texts, strict=True):
        groups.setdefault(direction.float().numpy().tobytes(), []).append(name)
    several = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    some = "; ".join(several[:SHOWN]) + "; …" * (len(several) > SHOWN)
    return (SAME_TEXT.format(some),) if several else ()


def _check_texts_differ(checkpoint: Checkpoint, other: str, name: str) -> None:
    """Raises ``VitPatchError`` where the tokenizer reads two labels as the same text."""
    if fold(readable_name(other)) != fold(readable_name(name)):  # ImageNet has a Cardigan, the dog, and a cardigan
        raise VitPatchError(
            f"model {checkpoint.path}: its tokenizer reads the labels {other!r} and {name!r} as the same text; are its "
            "files (tokenizer.json, or vocab.json and merges.txt) there?"
        )


def _preprocessing_of(checkpoint: Checkpoint, config: Any) -> Preprocessing:
    """The explicit keys' where one is given, else the checkpoint's own."""
    vision = vision_config(config)
    keys = ("image_size", "crop_share", "resample", "mean", "std")
    if any(getattr(checkpoint, key) is not None for key in keys):
        return explicit_preprocessing(*_explicit_keys(checkpoint, getattr(vision, "image_size", None)))
    if config.model_type == "timm_wrapper":
        return from_timm(getattr(config, "pretrained_cfg", None) or {})
    try:
        processor = checkpoint.processor()
    except VitPatchError:
        raise
    except Exception as error:  # of transformers and the hub's client, which share no class
        raise VitPatchError(
            f"model {checkpoint.path}: no image processor ({explain(error, checkpoint.path, 'model.path', '')}); say "
            "how images reach it: model.mean=[R,G,B] model.std=[R,G,B] on the [0, 1] scale, and where they differ from "
            "the model's size and bicubic, model.image_size, model.crop_share, model.resample"
        ) from error
    own = from_processor(processor)
    if config.model_type == "siglip2":  # of any shape; here all images have the shape that positions were trained at
        edge = round(vision.num_patches**0.5) * vision.patch_size
        return explicit_preprocessing((edge, edge), own.mean, own.std, "bilinear")
    return own


def _explicit_keys(checkpoint: Checkpoint, size: Any) -> tuple[Any, ...]:
    size = checkpoint.image_size if checkpoint.image_size is not None else size
    pixels = (size, size) if isinstance(size, int) else size
    if not has_type(pixels, tuple[Count, Count]):
        raise VitPatchError(f"model.image_size {size!r}: expected pixels, such as 224 or [224,224]")
    if checkpoint.mean is None or checkpoint.std is None:
        raise VitPatchError("model.mean and model.std: both are needed where one of these or of model.image_size, "
                            "model.crop_share and model.resample is given; such as [0.5,0.5,0.5]")  # fmt: skip
    return tuple(pixels), checkpoint.mean, checkpoint.std, checkpoint.resample or "bicubic", checkpoint.crop_share


def pretrained_classifier(
    checkpoint: Checkpoint, names: Sequence[str], keeps_head: bool
) -> tuple[Any, Preprocessing, bool]:
    """A checkpoint to fine-tune to the classes ``names``, and whether its head is the checkpoint's own or a new one.

    ``keeps_head``: its own classes are these, in this order; the head is kept where the checkpoint has one.
    """
    from transformers import AutoModelForImageClassification

    config = checkpoint.config()
    family = family_of(config.model_type, checkpoint.path)
    preprocessing = _preprocessing_of(checkpoint, config)
    name_classes(config, names)
    model, info = checkpoint.load_with_info("AutoModelForImageClassification", config)
    drawn = {key if isinstance(key, str) else key[0] for key in (*info["missing_keys"], *info["mismatched_keys"])}
    modules = dict(model.named_modules())
    heads = {head for readout in family.readouts for head in readout.heads} & set(modules)
    has_own = not any(f"{head}.{name}" in drawn for head in heads for name, _ in modules[head].named_parameters())
    if has_own and not keeps_head:
        fresh = AutoModelForImageClassification.from_config(config)
        for head in heads:
            modules[head].load_state_dict(fresh.get_submodule(head).state_dict())
    return model, preprocessing, has_own and keeps_head


def new_classifier(config: Any, names: Sequence[str]) -> tuple[Any, Preprocessing]:
    """An untrained classifier of a Hugging Face ``config``; its image processor resizes and maps [0, 1] to [-1, 1]."""
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    family_of(config.model_type, type(config).__name__)
    name_classes(config, names)
    height, width = pair(config.image_size)
    half = [0.5, 0.5, 0.5]
    processor = ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)
    return AutoModelForImageClassification.from_config(config), from_processor(processor)
