"""What transformers loads by a path: config, weights, image processor, tokenizer; what is wrong with one, in a line.

Models in forms that are not taken as they are – wrapped, prefixed, adapters, files – are refused with what to do.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from vitpatch.checks import check_fields
from vitpatch.errors import VitPatchError
from vitpatch.hub import commit_of, explain, model_files, resolve
from vitpatch.models.classes import config_labels, keep_labels
from vitpatch.models.preprocessing import pillow_processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNTRAINED_SEED = 0
"""Of the weights of ``random_init``: the control for a profile is one model, the same in every run."""
IMAGE_TEXT_TYPES = ("clip", "siglip", "siglip2")
"""Model types that also come as a pair of towers, without a classifier."""


@dataclass(frozen=True)
class Pretrained:
    """``path`` is a hub id or a folder written by ``save_pretrained``, ``revision`` one of a hub id.

    - ``dtype``: type of the weights, float32, bfloat16 or float16.
    - ``random_init``: the same architecture untrained, its weights drawn anew.
    - ``allow_bin``: where there are no safetensors, ``pytorch_model.bin`` may be read (``weights_only``).

    All methods raise ``VitPatchError``.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    random_init: bool = False
    allow_bin: bool = False

    def __post_init__(self) -> None:
        if type(self.path) is int:  # a folder called 2024
            object.__setattr__(self, "path", str(self.path))
        if self.path in (None, ""):
            raise VitPatchError("model.path is missing: give a hub id or a folder written by save_pretrained")
        check_fields(self, "model")

    def check_path(self) -> None:
        """Raises ``VitPatchError`` where the path cannot be what the other keys take it for."""
        if self.revision is not None and Path(self._where).is_dir():
            raise VitPatchError(
                f"model.revision {self.revision}: model.path {self.path} is a local folder; leave it null"
            )

    @cached_property
    def _where(self) -> str:
        check_path(self.path)
        return resolve(self.path, "model.path")

    @cached_property
    def commit(self) -> str | None:
        """The commit on the hub that all files are taken from; ``None`` of a local folder, or where it is not known."""
        return None if Path(self._where).is_dir() else commit_of(self._where, self.revision, "model")

    @property
    def _arguments(self) -> dict[str, str]:
        revision = self.commit or self.revision
        return {"revision": revision} if revision else {}

    def config(self) -> Any:
        """The model's config."""
        from huggingface_hub.utils import enable_progress_bars
        from transformers import AutoConfig, PretrainedConfig, dynamic_module_utils
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()  # of reading what is here
        enable_progress_bars()  # of downloading
        hf_logging.set_verbosity_error()  # what is missing in a checkpoint is ours to say
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # it would ask on the terminal whether to run a repository's code
        where, asked = self._where, {"revision": self.revision} if self.revision else {}
        with one_line(self.path):
            file, _ = PretrainedConfig.get_config_dict(where, **asked)  # by its name: the cache then knows it
            config_labels(file)  # says what is wrong with them
            config = AutoConfig.from_pretrained(where, **asked)
        check_not_quantised(config, self.path)
        keep_labels(config, file)
        return config

    def model(self, config: Any, kind: str) -> Any:
        """The model of a kind of ``Auto`` class with all its weights, or untrained."""
        import transformers

        if self.random_init:
            with torch.random.fork_rng(devices=[]), one_line(self.path):
                torch.manual_seed(UNTRAINED_SEED)
                return getattr(transformers, kind).from_config(config).to(DTYPES[self.dtype])
        model, info = self.load_with_info(kind, config)
        if missing := sorted(key for key in info["missing_keys"] if not key.endswith(_UNUSED)):
            hint = (
                "; by its texts it classifies without: model=clip_zero_shot"
                if config.model_type in IMAGE_TEXT_TYPES
                else ""
            )
            some = ", ".join(missing[:3])
            raise VitPatchError(f"model {self.path}: no weights for {some}: not a fine-tuned image classifier{hint}")
        if info["mismatched_keys"]:
            some = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])[0]
            raise VitPatchError(f"model {self.path}: its weights {some} have another shape than its config says")
        spare = sorted(key for key in info["unexpected_keys"] if ".layer" in key and ".layernorm." not in key)
        if spare := [key for key in spare if not key.endswith(_UNUSED)]:
            raise VitPatchError(f"model {self.path}: its config has no place for the weights {', '.join(spare[:3])}")
        return model

    def load_with_info(self, kind: str, config: Any) -> tuple[Any, Mapping[str, Any]]:
        """Model of a config, and what transformers says of the weights."""
        import transformers

        is_pickle = self._has_only_pickle()
        if is_pickle and not self.allow_bin:
            raise VitPatchError(_PICKLE.format(path=self.path))
        with one_line(self.path):
            model, info = getattr(transformers, kind).from_pretrained(
                self._where,
                config=config,
                dtype=DTYPES[self.dtype],
                use_safetensors=not is_pickle,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the info
                **self._arguments,
            )
        check_names(info["missing_keys"], info["unexpected_keys"], self.path)
        return model, info

    def processor(self) -> Any:
        """The image processor; an ``OSError`` and others of transformers where there is none.

        Of one that only torchvision has (DINOv3) what it says, done by Pillow.
        """
        from transformers import ImageProcessingMixin
        from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it w/o torchvision

        try:
            return AutoImageProcessor.from_pretrained(self._where, **self._arguments)
        except (ImportError, ValueError) as error:
            if "custom code" in str(error):
                raise VitPatchError(_CODE.format(path=self.path)) from error
            if "torchvision" not in str(error):
                raise
            config, _ = ImageProcessingMixin.get_image_processor_dict(self._where, **self._arguments)
            return pillow_processor(config)

    def tokenizer(self) -> Any:
        """The tokenizer of a model of images and texts."""
        from transformers import AutoTokenizer

        with one_line(self.path):
            return AutoTokenizer.from_pretrained(self._where, **self._arguments)

    def save_copy(self, folder: Path) -> list[str]:
        """Writes the checkpoint into a new folder as ``save_pretrained`` does, in safetensors; what was written."""
        import transformers

        config = self.config()
        known = [name for name in config.architectures or () if hasattr(transformers, name)]
        kinds = known[:1] or ["AutoModelForImageClassification", "AutoModel"]
        model = next(filter(None, (_or_none(lambda kind=kind: self.model(config, kind)) for kind in kinds)), None)
        model = model or self.model(config, kinds[0])  # says what is wrong
        part = folder.with_name(f"{folder.name}.part")
        written = {"model": model, "image processor": _or_none(self.processor), "tokenizer": _or_none(self.tokenizer)}
        if config.model_type not in IMAGE_TEXT_TYPES:
            del written["tokenizer"]
        try:
            with one_line(self.path):
                for each in filter(None, written.values()):
                    each.save_pretrained(part)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return [name for name, each in written.items() if each is not None]

    def _has_only_pickle(self) -> bool:
        """Whether a folder or repository has weights as pickle and none as safetensors."""
        if Path(self._where).is_dir():
            files = [file.name for file in Path(self._where).iterdir()]
        else:
            files = model_files(self._where, self.commit or self.revision)
        kinds = {".safetensors": "model", ".bin": "pytorch_model"}
        has = {kind: any(name.startswith(first) and kind in name for name in files) for kind, first in kinds.items()}
        return has[".bin"] and not has[".safetensors"]


def _or_none(load: Callable[[], Any]) -> Any:
    """What is loaded, or ``None`` where it is not there."""
    try:
        return load()
    except Exception:  # of transformers, which has no class for it
        return None


_UNUSED = ("mask_token", "relative_position_index")
"""Ends of weights that no classification takes part of, or that follow from the config."""
_PICKLE = (
    "model {path}: it has only pytorch_model.bin, a pickle, and no safetensors; model.allow_bin=true reads its weights "
    "and nothing else (weights_only), or convert it once: python -m vitpatch.cli.convert {path} FOLDER, then "
    "model.path=FOLDER"
)
_NOT_ONLY_WEIGHTS = "model {path}: its pytorch_model.bin holds more than weights, or is damaged, and is not read"
_CODE = (
    "model {path}: it is run by code from its own repository, and vitpatch runs none; only families that transformers "
    "itself has can be loaded (README: your model)"
)


@contextmanager
def one_line(path: str) -> Iterator[None]:
    """Turns what the Hugging Face libraries raise on loading a model into one line."""
    try:
        yield
    except Exception as error:  # of transformers, safetensors, torch and the hub's client, which share no class
        if "custom code" in str(error):
            raise VitPatchError(_CODE.format(path=path)) from error
        if "weights_only" in str(error):
            raise VitPatchError(_NOT_ONLY_WEIGHTS.format(path=path)) from error
        raise VitPatchError(f"model {path} cannot be loaded: {explain(error, path, 'model.path', '')}") from error


_SAVE = "load it in Python and save its Hugging Face model and image processor: {}.save_pretrained(FOLDER)"
_EXPECTED = "expected a folder written by save_pretrained"
_WEIGHTS = (".safetensors", ".bin")
_LIGHTNING = (".ckpt", ".pt", ".pth")
_OTHER_FORMATS = {
    ".onnx": "ONNX",
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".tflite": "TensorFlow Lite",
}
_PREFIXES = {
    "_orig_mod.": "saved from a model that torch.compile wraps: save model._orig_mod instead",
    "module.": "saved from DataParallel or DistributedDataParallel: save model.module instead",
    "base_model.model.": "saved from a model that peft wraps: save model.merge_and_unload() instead",
}
_INSIDE_A_MODULE = "saved from a module that holds the model: save the Hugging Face model in it instead"


def check_path(path: str) -> None:
    """Raises ``VitPatchError`` where a local path is no folder of a model in the form that ``save_pretrained`` writes.

    What does not exist, such as an id of the hub, is not looked at.
    """
    local = Path(path).expanduser()
    if local.is_file():
        raise VitPatchError(f"model.path {path}: is a file; {_EXPECTED}{_file_hint(local, path)}")
    if local.is_dir():
        reason = _adapter_problem(local) or _files_problem(local) or _shards_problem(local)
        if reason is not None:
            raise VitPatchError(f"model.path {path}: {reason}")


def _file_hint(file: Path, path: str) -> str:
    if file.suffix in _LIGHTNING:
        return f"; of a Lightning checkpoint {_SAVE.format('module.model')}"
    if (file.parent / "config.json").exists():
        return f": model.path={Path(path).parent}"
    return ""


def _adapter_problem(folder: Path) -> str | None:
    file = folder / "adapter_config.json"
    if not file.exists():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = "its base"
    return (
        f"is an adapter (adapter_config.json) of {base}: merge it into its base first, in Python: "
        "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(FOLDER)"
    )


def _files_problem(folder: Path) -> str | None:
    """What is missing of config and weights."""
    names = sorted(file.name for file in folder.iterdir())
    suffixes = {Path(name).suffix for name in names}
    other = [name for suffix, name in _OTHER_FORMATS.items() if suffix in suffixes]
    if "config.json" in names:
        if other and not suffixes & set(_WEIGHTS):
            return f"has weights of {' and '.join(other)} only; export the model as safetensors (save_pretrained)"
        return None
    if not names:
        return f"is an empty folder; {_EXPECTED}"
    below = sorted((file.parent for file in folder.glob("*/config.json")), key=_number)
    if below:
        return f"has no config.json; {below[-1].name} in it has one: model.path={below[-1]}"
    if other:
        return f"holds a model of {' and '.join(other)}; {_EXPECTED}"
    if suffixes & set(_LIGHTNING):
        return f"has no config.json; {_EXPECTED}; of a Lightning checkpoint {_SAVE.format('module.model')}"
    has = "weights but no" if suffixes & set(_WEIGHTS) else "no"
    return f"has {has} config.json; {_EXPECTED}"


def _number(folder: Path) -> tuple[int, str]:
    """Sorts checkpoint-500 before checkpoint-1000."""
    digits = re.search(r"(\d+)$", folder.name)
    return int(digits[1]) if digits else -1, folder.name


def _shards_problem(folder: Path) -> str | None:
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
        if missing := sorted(name for name in shards if not (folder / name).exists()):
            return f"lacks {', '.join(missing[:3])} of the {len(shards)} files of {index.name}; copy all of them"
    return None


def check_not_quantised(config: Any, path: str) -> None:
    """Raises ``VitPatchError`` where weights are quantised: their sums are not those of floats."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = (
            quantisation.get("quant_method")
            if isinstance(quantisation, dict)
            else getattr(quantisation, "quant_method", None)
        )
        raise VitPatchError(
            f"model {path}: its weights are quantised ({method or 'quantization_config'}); give it in float32 "
            "or below: model.dequantize().save_pretrained(FOLDER) in Python, or the model it was made from"
        )


def check_names(missing: Collection[str], unexpected: Iterable[str], path: str) -> None:
    """Raises ``VitPatchError`` where weights have a prefix before the names that the model has, or layers have none."""
    for name in sorted(unexpected):
        at = [name.removesuffix(key) for key in missing if name.endswith(f".{key}")]
        if prefix := min(at, key=len, default=""):
            why = next((words for known, words in _PREFIXES.items() if prefix.startswith(known)), _INSIDE_A_MODULE)
            raise VitPatchError(f"model {path}: its weights are called {prefix}…, such as {name}: {why}")
    if lost := sorted(name for name in missing if re.search(r"\.layers?\.\d+\.", name)):
        raise VitPatchError(f"model {path}: no weights for {', '.join(lost[:3])}, …: not a checkpoint of this model")
