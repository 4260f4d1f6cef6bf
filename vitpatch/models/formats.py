"""Models in forms that are not taken as they are – wrapped, prefixed, adapters, files –: what each is, what to do.

No torch here at import.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from vitpatch.errors import VitPatchError

_SAVE = "load it in Python and save its Hugging Face model and image processor: {}.save_pretrained(FOLDER)"
_EXPECTED = "expected a folder written by save_pretrained"
_WEIGHTS = (".safetensors", ".bin")
_LIGHTNING = (".ckpt", ".pt", ".pth")
_OTHERS = {".onnx": "ONNX", ".gguf": "GGUF", ".h5": "TensorFlow", ".msgpack": "Flax", ".tflite": "TensorFlow Lite"}
_PREFIXES = {
    "_orig_mod.": "saved from a model that torch.compile wraps: save model._orig_mod instead",
    "module.": "saved from DataParallel or DistributedDataParallel: save model.module instead",
    "base_model.model.": "saved from a model that peft wraps: save model.merge_and_unload() instead",
}
_HELD = "saved from a module that holds the model: save the Hugging Face model in it instead"


def check_path(path: str) -> None:
    """Raises ``VitPatchError`` where a local path is no folder of a model in the form that ``save_pretrained`` writes.

    What does not exist, such as an id of the hub, is not looked at.
    """
    local = Path(path).expanduser()
    if local.is_file():
        raise VitPatchError(f"model.path {path}: is a file; {_EXPECTED}{_hint_of_file(local, path)}")
    if local.is_dir():
        reason = _of_adapter(local) or _of_files(local) or _of_shards(local)
        if reason is not None:
            raise VitPatchError(f"model.path {path}: {reason}")


def _hint_of_file(file: Path, path: str) -> str:
    if file.suffix in _LIGHTNING:
        return f"; of a Lightning checkpoint {_SAVE.format('module.model')}"
    if (file.parent / "config.json").exists():
        return f": model.path={Path(path).parent}"
    return ""


def _of_adapter(folder: Path) -> str | None:
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


def _of_files(folder: Path) -> str | None:
    """What is missing of config and weights."""
    names = sorted(file.name for file in folder.iterdir())
    suffixes = {Path(name).suffix for name in names}
    other = [name for suffix, name in _OTHERS.items() if suffix in suffixes]
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
    found = re.search(r"(\d+)$", folder.name)
    return int(found[1]) if found else -1, folder.name


def _of_shards(folder: Path) -> str | None:
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
    said = getattr(config, "quantization_config", None)
    if said is not None:
        method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
        raise VitPatchError(
            f"model {path}: its weights are quantised ({method or 'quantization_config'}); give it in float32 "
            "or below: model.dequantize().save_pretrained(FOLDER) in Python, or the model it was made from"
        )


def check_names(missing: Collection[str], unexpected: Iterable[str], path: str) -> None:
    """Raises ``VitPatchError`` where weights have a prefix before the names that the model has, or layers have none."""
    for name in sorted(unexpected):
        at = [name.removesuffix(key) for key in missing if name.endswith(f".{key}")]
        if prefix := min(at, key=len, default=""):
            why = next((words for known, words in _PREFIXES.items() if prefix.startswith(known)), _HELD)
            raise VitPatchError(f"model {path}: its weights are called {prefix}…, such as {name}: {why}")
    if lost := sorted(name for name in missing if re.search(r"\.layers?\.\d+\.", name)):
        raise VitPatchError(f"model {path}: no weights for {', '.join(lost[:3])}, …: not a checkpoint of this model")


def check_bare(model: Any) -> None:
    """Raises ``VitPatchError`` where something wraps a Hugging Face model, which then is to be given itself."""
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise VitPatchError("model: is compiled; give the model as it was before torch.compile (model._orig_mod)")
    if type(model).__module__.startswith("peft."):
        raise VitPatchError(f"model: {kind} is peft's; give model.merge_and_unload(), or model.get_base_model()")
    if not hasattr(getattr(model, "config", None), "model_type"):
        held = [name for name, of in model.named_children() if hasattr(getattr(of, "config", None), "model_type")]
        if held:
            raise VitPatchError(f"model: got {kind}; give the Hugging Face model that it holds (model.{held[0]})")
