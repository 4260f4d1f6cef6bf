"""``Checkpoint``: a hub id or a folder → a verified model with named sites, or a classifier to train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from vitpatch.checks import Count, Expected, Interval, Share, check_fields, has_type, is_list
from vitpatch.errors import VitPatchError
from vitpatch.hub import commit_of, explain_failure, model_files, resolve_path
from vitpatch.models import formats
from vitpatch.models.backbone import BackboneClassifier, load_head
from vitpatch.models.classes import config_labels, keep_labels, name_classes
from vitpatch.models.families import Family, family_from_yaml, family_of
from vitpatch.models.preprocessing import (
    Preprocessing,
    accept_pixels,
    explicit_preprocessing,
    from_processor,
    from_timm,
    pair,
    pillow_processor,
    vision_config,
)
from vitpatch.models.verify import verify_model
from vitpatch.models.vit import PatchableViT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNTRAINED_SEED = 0
"""Of the weights of ``random_init``: the control for a profile is one model, the same in every run."""
IMAGE_TEXT_TYPES = ("clip", "siglip", "siglip2")
"""Model types that also come as a pair of towers, without a classifier."""
UNUSED_WEIGHTS = ("mask_token", "relative_position_index")
"""Ends of the names of weights that no classification uses, or that follow from the config."""
IMAGE_KEYS = ("image_size", "crop_share", "resample", "mean", "std")
"""Keys that replace the checkpoint's image processor."""

CropShare = Annotated[float, Interval(gt=0, le=1), "a share of the shorter edge"]
Deviation = Annotated[float, Interval(gt=0, le=1)]
PerColour = Expected("one number a colour on the [0, 1] scale of the pixels, std above 0, such as [0.5,0.5,0.5]")


@dataclass(frozen=True)
class Checkpoint:
    """Which model, and how images reach it. All methods raise ``VitPatchError``.

    - ``path``: a hub id, or a folder written by ``save_pretrained``; ``revision``: a branch, tag or commit of a hub id.
    - ``dtype``: the type of the weights.
    - ``random_init``: the same architecture untrained, its weights drawn anew.
    - ``allow_bin``: where there are no safetensors, ``pytorch_model.bin`` may be read (``weights_only``).
    - ``readout``: one of several heads (DeiT with teacher); ``None`` is all of them, as the model combines them.
    - ``head_path``: a safetensors file with ``weight`` (classes, width or twice it) and ``bias``, for a backbone alone.
    - ``anatomy``: a YAML file that describes a family of the user's own.
    - ``image_size`` (one edge, or height and width), ``crop_share``, ``resample``, ``mean``, ``std``: where one of them
      is given, they replace the checkpoint's image processor.
    - ``name``: what the model is called in titles, instead of the last part of ``path``.
    """

    needs_names: ClassVar[bool] = False
    """Whether the model's classes are the data's labels."""

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    random_init: bool = False
    allow_bin: bool = False
    readout: str | None = None
    head_path: str | None = None
    anatomy: str | None = None
    image_size: Annotated[Count | tuple[Count, Count] | None, Expected("pixels, such as 224 or [224,224]")] = None
    crop_share: CropShare | None = None
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] | None = None
    mean: Annotated[tuple[Share, Share, Share] | None, PerColour] = None
    std: Annotated[tuple[Deviation, Deviation, Deviation] | None, PerColour] = None
    name: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if type(self.path) is int:  # a folder called 2024
            object.__setattr__(self, "path", str(self.path))
        if self.path in (None, ""):
            raise VitPatchError("model.path is missing: give a hub id or a folder written by save_pretrained")
        for key, value in vars(self).items():
            if is_list(value):
                object.__setattr__(self, key, tuple(value))  # Hydra gives its own kind of list, which has no hash
        check_fields(self, "model")

    def load(self, names: Sequence[str] | None = None) -> PatchableViT:
        """The verified model, loaded once per process while its files stay as they are.

        ``names`` are the data's labels, for a model that ``needs_names``.
        """
        return _load(self, tuple(names) if self.needs_names and names else None, self._file_states())

    def load_unshared(self) -> PatchableViT:
        """As ``load``, but a model that nothing else in the process has, so that its user may change it."""
        return _load.__wrapped__(self, None, ())

    def _file_states(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of each local file that the model is read from: a training may save over another."""
        folder = Path(self.location)
        files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
        files += [Path(path).expanduser() for path in (self.head_path, self.anatomy) if path is not None]
        stats = {str(file): file.stat() for file in sorted(files) if file.exists()}
        return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())

    @cached_property
    def location(self) -> str:
        """The folder or the hub id that files are read from."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir() or (folder / "adapter_config.json").exists():  # which would be loaded with its base
            if (problem := formats.describe_path(self.path)) is not None:
                raise VitPatchError(problem)
            return resolve_path(self.path, "model.path")
        if self.revision is not None:
            raise VitPatchError(
                f"model.revision {self.revision}: model.path {self.path} is a local folder; leave it null"
            )
        return str(folder)

    @cached_property
    def commit(self) -> str | None:
        """The commit on the hub that all files are taken from; ``None`` for a local folder, and if it is not known."""
        return None if Path(self.location).is_dir() else commit_of(self.location, self.revision, "model")

    @property
    def _at_commit(self) -> dict[str, str]:
        revision = self.commit or self.revision
        return {"revision": revision} if revision else {}

    @contextmanager
    def errors_in_one_line(self) -> Iterator[None]:
        """Turns what the Hugging Face libraries raise on loading the model into a ``VitPatchError``."""
        try:
            yield
        except Exception as error:  # of transformers, safetensors, torch and the hub's client, which share no class
            raise VitPatchError(formats.describe_failure(error, self.path)) from error

    def config(self) -> Any:
        """The model's config, with the labels that its file has."""
        from huggingface_hub.utils import enable_progress_bars
        from transformers import AutoConfig, PretrainedConfig, dynamic_module_utils
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()  # of reading what is here
        enable_progress_bars()  # of downloading
        hf_logging.set_verbosity_error()  # what is missing in a checkpoint is ours to say
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # it would ask on the terminal whether to run a repository's code
        revision = {"revision": self.revision} if self.revision else {}  # by its name: the cache then knows it
        with self.errors_in_one_line():
            file, _ = PretrainedConfig.get_config_dict(self.location, **revision)
            config_labels(file)  # raises where transformers would say less
            config = AutoConfig.from_pretrained(self.location, **revision)
        if (quantisation := getattr(config, "quantization_config", None)) is not None:
            raise VitPatchError(formats.describe_quantised(quantisation, self.path))
        keep_labels(config, file)
        return config

    def model(self, config: Any, kind: str) -> Any:
        """The model with all its weights, or untrained; ``kind`` names a class of transformers that loads it."""
        import transformers

        if self.random_init:
            with torch.random.fork_rng(devices=[]), self.errors_in_one_line():
                torch.manual_seed(UNTRAINED_SEED)
                return getattr(transformers, kind).from_config(config).to(DTYPES[self.dtype])
        model, missing, mismatched, unexpected = self.load_with_names(kind, config)
        if missing := [name for name in missing if not name.endswith(UNUSED_WEIGHTS)]:
            zero_shot = "; by its texts it classifies without: model=clip_zero_shot"
            raise VitPatchError(
                f"model {self.path}: no weights for {', '.join(missing[:3])}: not a fine-tuned image classifier"
                f"{zero_shot if config.model_type in IMAGE_TEXT_TYPES else ''}"
            )
        if mismatched:
            raise VitPatchError(
                f"model {self.path}: its weights {mismatched[0]} have another shape than its config says"
            )
        spare = [name for name in unexpected if ".layer" in name and ".layernorm." not in name]
        if spare := [name for name in spare if not name.endswith(UNUSED_WEIGHTS)]:
            raise VitPatchError(f"model {self.path}: its config has no place for the weights {', '.join(spare[:3])}")
        return model

    def load_with_names(self, kind: str, config: Any) -> tuple[Any, list[str], list[str], list[str]]:
        """The model, and the sorted names of weights that are missing, of another shape, and not expected.

        Weights that the files lack, or have in another shape, are drawn at random.
        """
        import transformers

        is_pickle = self._has_only_pickle()
        if is_pickle and not self.allow_bin:
            raise VitPatchError(formats.PICKLE.format(path=self.path))
        with self.errors_in_one_line():
            model, info = getattr(transformers, kind).from_pretrained(
                self.location,
                config=config,
                dtype=DTYPES[self.dtype],
                use_safetensors=not is_pickle,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the info
                **self._at_commit,
            )
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing:
            formats.check_names(missing, unexpected, self.path)
        mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
        return model, missing, sorted(mismatched), unexpected

    def _has_only_pickle(self) -> bool:
        """Whether a folder or repository has weights as pickle and none as safetensors."""
        if Path(self.location).is_dir():
            files = [file.name for file in Path(self.location).iterdir()]
        else:
            files = model_files(self.location, self.commit or self.revision)
        is_safe = any(name.startswith("model") and ".safetensors" in name for name in files)
        return not is_safe and any(name.startswith("pytorch_model") and ".bin" in name for name in files)

    def processor(self) -> Any:
        """The image processor. Raises ``OSError`` and other errors of transformers where there is none.

        One that only torchvision has (DINOv3) is replaced by one of Pillow with the same values.
        """
        from transformers import ImageProcessingMixin
        from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it w/o torchvision

        try:
            return AutoImageProcessor.from_pretrained(self.location, **self._at_commit)
        except (ImportError, ValueError) as error:
            if "torchvision" not in str(error):
                raise
            config, _ = ImageProcessingMixin.get_image_processor_dict(self.location, **self._at_commit)
            return pillow_processor(config)

    def tokenizer(self) -> Any:
        """The tokenizer of a model of images and texts."""
        from transformers import AutoTokenizer

        with self.errors_in_one_line():
            return AutoTokenizer.from_pretrained(self.location, **self._at_commit)

    def preprocessing(self, config: Any) -> Preprocessing:
        """That of the keys ``IMAGE_KEYS`` where one is given, else that of the checkpoint's own image processor."""
        vision = vision_config(config)
        if any(getattr(self, key) is not None for key in IMAGE_KEYS):
            return self._explicit_preprocessing(getattr(vision, "image_size", None))
        if config.model_type == "timm_wrapper":
            return from_timm(getattr(config, "pretrained_cfg", None) or {})
        try:
            own = self.processor()
        except Exception as error:  # of transformers and the hub's client, which share no class
            if "custom code" in str(error):
                raise VitPatchError(formats.describe_failure(error, self.path)) from error
            raise VitPatchError(
                f"model {self.path}: no image processor ({explain_failure(error, self.path, 'model.path', '')}); say "
                "how images reach it: model.mean=[R,G,B] model.std=[R,G,B] on the [0, 1] scale, and where they differ "
                "from the model's size and bicubic, model.image_size, model.crop_share, model.resample"
            ) from error
        own = from_processor(own)
        if config.model_type == "siglip2":  # takes any shape; all images get the one that positions were trained at
            edge = round(vision.num_patches**0.5) * vision.patch_size
            return explicit_preprocessing((edge, edge), own.mean, own.std, "bilinear")
        return own

    def _explicit_preprocessing(self, config_size: Any) -> Preprocessing:
        size = self.image_size if self.image_size is not None else config_size
        pixels = (size, size) if isinstance(size, int) else size
        if not has_type(pixels, tuple[Count, Count]):
            raise VitPatchError(f"model.image_size {size!r}: expected pixels, such as 224 or [224,224]")
        if self.mean is None or self.std is None:
            raise VitPatchError(
                "model.mean and model.std: both are needed where one of these or of model.image_size, "
                "model.crop_share and model.resample is given; such as [0.5,0.5,0.5]"
            )
        return explicit_preprocessing(tuple(pixels), self.mean, self.std, self.resample or "bicubic", self.crop_share)

    def _classifier(self, config: Any, family: Family, names: tuple[str, ...] | None) -> Any:
        """The Hugging Face model, or one that answers as it does."""
        is_backbone = family.blocks.startswith("backbone.")
        if is_backbone and self.head_path is None:
            raise VitPatchError(
                "model.head_path is missing: this model is a backbone without a classifier; give a safetensors file "
                "with weight (classes, width or twice it) and bias"
            )
        if not is_backbone and self.head_path is not None:
            raise VitPatchError(
                f"model.head_path is for backbones without a classifier, such as DINOv3; {family.name} models bring "
                "their own"
            )
        if not is_backbone:
            return self.model(config, "AutoModelForImageClassification")
        backbone = self.model(config, "AutoModel")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            head = load_head(self.head_path, config.hidden_size, random_init=self.random_init)
        return BackboneClassifier(backbone, head.to(DTYPES[self.dtype]), self.path)


@lru_cache(maxsize=2)
def _load(checkpoint: Checkpoint, names: tuple[str, ...] | None, file_states: tuple[Any, ...]) -> PatchableViT:
    """What ``Checkpoint.load`` keeps; by ``file_states`` too, since a path may have other files later."""
    config = checkpoint.config()
    if checkpoint.anatomy:
        family = family_from_yaml(checkpoint.anatomy)
    else:
        family = family_of(config.model_type, checkpoint.path)
    preprocessing = checkpoint.preprocessing(config)
    model = checkpoint._classifier(config, family, names)
    accept_pixels(model)
    try:
        size = preprocessing.input_size
        vit = PatchableViT(model.requires_grad_(False), family, preprocessing, checkpoint.readout, size)
    except VitPatchError as error:
        raise VitPatchError(f"model {checkpoint.path}: {error}") from error
    if size != vit.input_size:
        values = {"image_size": vit.input_size, "mean": preprocessing.mean, "std": preprocessing.std}
        keys = [f"model.{key}=[{','.join(f'{number:g}' for number in numbers)}]" for key, numbers in values.items()]
        raise VitPatchError(
            f"model {checkpoint.path}: its image processor gives {size} pixels, the model takes {vit.input_size}; "
            f"to resize images to that: {' '.join(keys)}"
        )
    verify_model(vit)
    return vit


def pretrained_classifier(
    checkpoint: Checkpoint, names: Sequence[str], keeps_head: bool
) -> tuple[Any, Preprocessing, bool]:
    """A checkpoint to fine-tune to the classes ``names``, and whether its head is the checkpoint's own, or a new one.

    ``keeps_head``: its own classes are these, in this order, so that the head is kept where the checkpoint has one.
    """
    from transformers import AutoModelForImageClassification

    config = checkpoint.config()
    family = family_of(config.model_type, checkpoint.path)
    preprocessing = checkpoint.preprocessing(config)
    name_classes(config, names)
    model, missing, mismatched, _ = checkpoint.load_with_names("AutoModelForImageClassification", config)
    modules = dict(model.named_modules())
    heads = {head for readout in family.readouts for head in readout.heads} & set(modules)
    weights = {f"{head}.{name}" for head in heads for name, _ in modules[head].named_parameters()}
    accept_pixels(model)
    has_own = weights.isdisjoint({*missing, *mismatched})
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
