"""What transformers loads by a path: config, weights, image processor, tokenizer; what is wrong with one, in a line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from vitpatch.checks import check_fields
from vitpatch.errors import VitPatchError
from vitpatch.hub import commit_of, explain, files_of_model, resolve
from vitpatch.models.configs import keep_labels, labels_of
from vitpatch.models.formats import check_names, check_not_quantised, check_path
from vitpatch.models.preprocessing import by_pillow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNTRAINED_SEED = 0
"""Of the weights of ``random_init``: the control for a profile is one model, the same in every run."""
OF_TEXTS = ("clip", "siglip", "siglip2")
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
            labels_of(file)  # says what is wrong with them
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
        model, info = self.loaded(kind, config)
        if missing := sorted(key for key in info["missing_keys"] if not key.endswith(_UNUSED)):
            hint = "; by its texts it classifies without: model=clip_zero_shot" if config.model_type in OF_TEXTS else ""
            some = ", ".join(missing[:3])
            raise VitPatchError(f"model {self.path}: no weights for {some}: not a fine-tuned image classifier{hint}")
        if info["mismatched_keys"]:
            some = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])[0]
            raise VitPatchError(f"model {self.path}: its weights {some} have another shape than its config says")
        spare = sorted(key for key in info["unexpected_keys"] if ".layer" in key and ".layernorm." not in key)
        if spare := [key for key in spare if not key.endswith(_UNUSED)]:
            raise VitPatchError(f"model {self.path}: its config has no place for the weights {', '.join(spare[:3])}")
        return model

    def loaded(self, kind: str, config: Any) -> tuple[Any, Mapping[str, Any]]:
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
            said, _ = ImageProcessingMixin.get_image_processor_dict(self._where, **self._arguments)
            return by_pillow(said)

    def tokenizer(self) -> Any:
        """The tokenizer of a model of images and texts."""
        from transformers import AutoTokenizer

        with one_line(self.path):
            return AutoTokenizer.from_pretrained(self._where, **self._arguments)

    def saved_again(self, folder: Path) -> list[str]:
        """Writes the checkpoint into a new folder as ``save_pretrained`` does, in safetensors; what was written."""
        import transformers

        config = self.config()
        known = [name for name in config.architectures or () if hasattr(transformers, name)]
        kinds = known[:1] or ["AutoModelForImageClassification", "AutoModel"]
        model = next(filter(None, (_or_none(lambda kind=kind: self.model(config, kind)) for kind in kinds)), None)
        model = model or self.model(config, kinds[0])  # says what is wrong
        part = folder.with_name(f"{folder.name}.part")
        written = {"model": model, "image processor": _or_none(self.processor), "tokenizer": _or_none(self.tokenizer)}
        if config.model_type not in OF_TEXTS:
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
            files = files_of_model(self._where, self.commit or self.revision)
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
