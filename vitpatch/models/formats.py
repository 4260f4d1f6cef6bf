"""Models in forms that are not taken as they are, such as adapters and pickles: what to do with each; conversion."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitpatch.errors import VitPatchError
from vitpatch.hub import explain_failure
from vitpatch.io import natural_sort

PICKLE = (
    "model {path}: it has only pytorch_model.bin, a pickle, and no safetensors; model.allow_bin=true reads its weights "
    "and nothing else (weights_only), or convert it once: python -m vitpatch.cli.convert {path} FOLDER, then "
    "model.path=FOLDER"
)
EXPECTED = "expected a folder written by save_pretrained"
LIGHTNING = (
    "of a Lightning checkpoint load it in Python and save its Hugging Face model and image processor: "
    "module.model.save_pretrained(FOLDER)"
)
LIGHTNING_SUFFIXES = {".ckpt", ".pt", ".pth"}
WEIGHTS_SUFFIXES = {".safetensors", ".bin"}
OTHER_SUFFIXES = {
    ".onnx": "ONNX",
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".tflite": "TensorFlow Lite",
}
PREFIXES = {
    "_orig_mod.": "saved from a model that torch.compile wraps: save model._orig_mod instead",
    "module.": "saved from DataParallel or DistributedDataParallel: save model.module instead",
    "base_model.model.": "saved from a model that peft wraps: save model.merge_and_unload() instead",
    "": "saved from a module that holds the model: save the Hugging Face model in it instead",
}


def describe_failure(error: Exception, path: str) -> str:
    """What the Hugging Face libraries raised on loading the model at ``path``, in a line that says what to do."""
    if "custom code" in str(error):
        return (
            f"model {path}: it is run by code from its own repository, and vitpatch runs none; only families that "
            "transformers itself has can be loaded (README: your model)"
        )
    if "weights_only" in str(error):
        return f"model {path}: its pytorch_model.bin holds more than weights, or is damaged, and is not read"
    return describe_path(path) or f"model {path} cannot be loaded: {explain_failure(error, path, 'model.path', '')}"


def describe_path(path: str) -> str | None:
    """What to do with a local file, or a folder that is no model's as ``save_pretrained`` writes it.

    ``None`` where the folder may be one, and for what does not exist, such as an id of the hub.
    """
    local, problem = Path(path).expanduser(), None
    if local.is_file():
        problem = f"is a file; {EXPECTED}"
        if local.suffix in LIGHTNING_SUFFIXES:
            problem += f"; {LIGHTNING}"
        elif (local.parent / "config.json").exists():
            problem += f": model.path={Path(path).parent}"
    elif local.is_dir():
        problem = _problem_of_folder(local)
    return problem and f"model.path {path}: {problem}"


def _problem_of_folder(folder: Path) -> str | None:
    names = {file.name for file in folder.iterdir()}
    if "adapter_config.json" in names:
        base = "its base"
        with suppress(ValueError, KeyError, TypeError):
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        return (
            f"is an adapter (adapter_config.json) of {base}: merge it into its base first, in Python: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(FOLDER)"
        )
    suffixes = {Path(name).suffix for name in names}
    others = " and ".join(name for suffix, name in OTHER_SUFFIXES.items() if suffix in suffixes)
    if "config.json" in names:
        if others and not suffixes & WEIGHTS_SUFFIXES:
            return f"has weights of {others} only; export the model as safetensors (save_pretrained)"
        return _problem_of_shards(folder)
    if not names:
        return f"is an empty folder; {EXPECTED}"
    if below := natural_sort(file.parent for file in folder.glob("*/config.json")):
        return f"has no config.json; {below[-1].name} in it has one: model.path={below[-1]}"
    if others:
        return f"holds a model of {others}; {EXPECTED}"
    if suffixes & LIGHTNING_SUFFIXES:
        return f"has no config.json; {EXPECTED}; {LIGHTNING}"
    return f"has {'weights but no' if suffixes & WEIGHTS_SUFFIXES else 'no'} config.json; {EXPECTED}"


def _problem_of_shards(folder: Path) -> str | None:
    """What is wrong with weights in several files."""
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
        if missing := sorted(name for name in shards if not (folder / name).exists()):
            return f"lacks {', '.join(missing[:3])} of the {len(shards)} files of {index.name}; copy all of them"
    return None


def describe_quantised(quantisation: Any, path: str) -> str:
    """What to do with a model whose weights are quantised, which is not taken: their sums are not those of floats."""
    values = quantisation if isinstance(quantisation, dict) else vars(quantisation)
    return (
        f"model {path}: its weights are quantised ({values.get('quant_method') or 'quantization_config'}); give it in "
        "float32 or below: model.dequantize().save_pretrained(FOLDER) in Python, or the model it was made from"
    )


def check_names(missing: Sequence[str], unexpected: Sequence[str], path: str) -> None:
    """Raises ``VitPatchError`` where weights have a prefix before the names that the model has, or layers have none."""
    for name in unexpected:
        prefixes = [name.removesuffix(key) for key in missing if name.endswith(f".{key}")]
        if prefix := min(prefixes, key=len, default=""):
            reason = next(text for known, text in PREFIXES.items() if prefix.startswith(known))
            raise VitPatchError(f"model {path}: its weights are called {prefix}…, such as {name}: {reason}")
    if layers := [name for name in missing if re.search(r"\.layers?\.\d+\.", name)]:
        raise VitPatchError(f"model {path}: no weights for {', '.join(layers[:3])}, …: not a checkpoint of this model")


def save_copy(checkpoint: Any, folder: Path) -> list[str]:
    """Writes a ``Checkpoint`` into a new folder as ``save_pretrained`` does, in safetensors; names what it wrote."""
    config = checkpoint.config()
    parts = {"model": _whole_model(checkpoint, config), "image processor": _or_none(checkpoint.processor)}
    if hasattr(config, "text_config"):
        parts["tokenizer"] = _or_none(checkpoint.tokenizer)
    unfinished = folder.with_name(f"{folder.name}.part")
    try:
        with checkpoint.errors_in_one_line():
            for part in filter(None, parts.values()):
                part.save_pretrained(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [name for name, part in parts.items() if part is not None]


def _whole_model(checkpoint: Any, config: Any) -> Any:
    """The model with its classifier, of the class that its config names, or else of one that has all its weights."""
    import transformers

    known = [name for name in config.architectures or () if hasattr(transformers, name)]
    if known:
        return checkpoint.model(config, known[0])
    try:
        return checkpoint.model(config, "AutoModelForImageClassification")
    except VitPatchError:
        return checkpoint.model(config, "AutoModel")


def _or_none(load: Callable[[], Any]) -> Any:
    """What is loaded, or ``None`` where it is not there."""
    try:
        return load()
    except Exception:  # of transformers, which has no class for it
        return None
