"""How values are written: numbers, counts, errors and titles for a reader; options and digests for a run's identity.

Titles are made from a run's config alone. Light: neither a comparison nor ``--help`` needs torch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any

UNKNOWN = "–"
LONGEST = 46
"""Letters of a name at an axis or in a legend."""
OWN_CORRUPTIONS = (
    *("BackgroundOnly", "BackgroundSwap", "Blur", "Chain", "DesaturateBackground", "DesaturateObject", "Edges"),
    *("EmbeddingNoise", "Gray", "Identity", "LowPass", "Noise", "ObjectOnly", "Occlude", "OtherImage"),
    *("PatchShuffle", "PhaseScramble", "Silhouette"),
)
"""The classes of ``vitpatch.corruptions``, named here so that a title needs no torch."""

UNSAID = {"amount": 1, "clip": True}
"""Parameters of a corruption that are said only where they have another value."""
SAVED_MODEL = "model"
"""The folder of a training's run that its model is saved in."""
SPLITS = ("train", "training", "val", "valid", "validation", "test")
"""Names of files and folders that say nothing without the folder they are in."""
DONOR_IMAGES = {"same_class": "another image of its class", "other_class": "an image of another class"}
"""Donors that are other images, in words."""
UNNAMED = (
    *("sweep", "logger", "trainer", "batch_size", "memory_gb", "data.num_workers", "overwrite", "dry_run", "figures"),
)
"""Keys that do not change what is measured (``logger`` covers ``logger.mode``); in a name only where they are swept."""
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
"""Keys of a config that say how an object is made, not what it is given."""
MOST_SETTINGS, LONGEST_VALUE = 3, 40
"""Of settings in which two runs differ: so many are named in a line, with so many letters of a value."""
MOST_LISTED = 8
"""Of a longer list as many are shown, and how many there are."""


def format_interval(
    mean: float | None,
    low: float | None,
    high: float | None,
    spec: str = "+.3f",
    format_number: Callable[[float, str], str] = format,
) -> str:
    """A mean with its interval, ``+0.123 [+0.100, +0.150]``; the mean alone where an end is not known.

    ``None`` and NaN are not known; where the mean is not, the text is a dash. An interval that holds every number is
    ``[unbounded]``. ``spec`` is a format as ``format`` takes it, ``format_number(value, spec)`` another function than
    ``format``.
    """
    if not _is_known(mean):
        return UNKNOWN
    if not (_is_known(low) and _is_known(high)):
        return format_number(mean, spec)
    if low == -inf and high == inf:
        return f"{format_number(mean, spec)} [unbounded]"
    return f"{format_number(mean, spec)} [{format_number(low, spec)}, {format_number(high, spec)}]"


def format_effect(mean: float, low: float, high: float) -> str:
    """An effect with its interval: three digits behind the point, of a small one the first two that count."""
    largest = max((abs(value) for value in (mean, low, high) if _is_known(value)), default=0.0)
    return format_interval(mean, low, high, "+.3f" if largest >= 0.01 or largest == 0 else "+.2g")


def _is_known(value: float | None) -> bool:
    return value is not None and value == value  # NaN is not equal to itself


def one_line(error: object, most: int = 300) -> str:
    """The text of an error in one line of at most ``most`` characters; of one without text, the name of its class."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_few(words: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """The first few of a list, ``a, b, …``."""
    return between.join([*words[:most], *["…"] * (len(words) > most)])


def format_layers(layers: Iterable[int]) -> str:
    """Layers in words, neighbours as a range: ``layer 3``, ``layers 4–6, 9``."""
    layers = sorted(layers)
    runs = [list(run) for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    parts = [(run[0][1], run[-1][1]) for run in runs]
    words = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in parts)
    return f"layer{'s' * (len(layers) > 1)} {words}"


def format_count(number: int, noun: str) -> str:
    """A number of things in words: 1 image, 2 images."""
    return f"{number} {noun}{'s' * (number != 1)}"


def format_duration(seconds: float) -> str:
    """Seconds in words: 90 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def class_name(target: str) -> str:
    """How a ``_target_`` is named: by the bare name of a class of this package, by the full path of a user's own."""
    return target.rpartition(".")[2] if target.startswith("vitpatch.") else target


def as_option(name: str) -> str:
    """The name of a class as its option is written: ``PatchShuffle`` → ``patch_shuffle``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def option_identity(config: Any) -> Any:
    """The config of an option as it enters ``run_id``: the class by its name, wherever in this package it stands.

    ``_target_`` becomes ``class``: the bare name of a class of this package, the full path of a user's own; likewise in
    the options that a list holds (the steps of a chain).
    """
    if isinstance(config, Mapping):
        named = {key: option_identity(value) for key, value in config.items() if key != "_target_"}
        target = config.get("_target_")
        return named if target is None else {"class": class_name(str(target))} | named
    return [option_identity(value) for value in config] if isinstance(config, list | tuple) else config


def users_code(config: Any) -> dict[str, dict[str, str]]:
    """``corruption_code``: of a user's own classes in a corruption's config the digests of the files they are in.

    Empty where all are this package's, whose code ``NUMBERS_VERSION`` stands for.
    """
    digests = {}
    for target in _users_targets(config):
        with suppress(TypeError, OSError):  # no Python file has it
            file = inspect.getsourcefile(pkgutil.resolve_name(target))
            digests[target] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return {"corruption_code": digests} if digests else {}


def _users_targets(config: Any) -> Iterator[str]:
    """What a config names that is not this package's, at any depth."""
    if isinstance(config, Mapping):
        if not str(config.get("_target_", "vitpatch.")).startswith("vitpatch."):
            yield config["_target_"]
        config = list(config.values())
    for each in config if isinstance(config, list | tuple) else ():
        yield from _users_targets(each)


def digest(value: Any) -> str:
    """Sixteen hex digits that are equal exactly when the JSON of ``value`` (keys sorted) is."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_name(model: Mapping[str, Any]) -> str:
    """How a model is named: by ``model.name``, else by its hub id or folder.

    A model that a training saved, ``RUN/model``, is called by the training's folder.
    """
    path = Path(str(model["path"]))
    is_saved = path.name == SAVED_MODEL and path.parent.name not in ("", "..")
    return str(model.get("name") or path_title(path.parent if is_saved else path))


def data_name(data: Mapping[str, Any]) -> str:
    """How data are named: by ``data.name``, else by their hub id, folder or file, and what is made of them.

    A file or folder that is called as a split is named with the folder that it is in; several files by their folder.
    """
    path = Path(str(data["path"]))
    path = path.parent if "*" in path.name else path
    name = path_title(path)
    if name in SPLITS and path.parent.name not in ("", ".."):
        name = f"{path.parent.name}/{name}"
    return str(data.get("name") or name + " scenes" * (class_name(data["_target_"]) == "TexturedScenes"))


def path_title(path: str | Path) -> str:
    """The last part of a path, without ``.parquet``; of a folder in the hub's cache the repository's name."""
    at = Path(str(path))
    if at.parent.name == "snapshots":
        return at.parent.parent.name.rpartition("--")[2]
    return at.stem if at.suffix == ".parquet" else at.name


def transfer_words(donor: str, direction: str) -> str:
    """What a patch takes from where to where: ``clean into corrupted``."""
    from_to = {"denoise": ("clean", "corrupted"), "noise": ("corrupted", "clean")}
    own, recipient = from_to[direction]
    donors = {"pair": own, "zero": "zeros", "mean": "means"}
    return f"{donors.get(donor) or f'{DONOR_IMAGES[donor]}, clean,'} into {recipient}"


def corruption_words(corruption: Mapping[str, Any]) -> str:
    """The corruption in words: its name and its strengths; of a chain step by step."""
    name, keys = corruption_name(corruption), strength_words(corruption)
    return f"{name} ({keys})" if keys else name


def corruption_name(corruption: Mapping[str, Any]) -> str:
    """The corruption's class or function in words; of a chain its steps with their strengths.

    A class of somebody's own that is called as one of vitpatch's is named with its module.
    """
    target = str(corruption["_target_"])
    if class_name(target) == "Chain":
        return " then ".join(map(_step_words, corruption["steps"]))
    if class_name(target) == "Identity":
        return "no corruption"
    name = target.rpartition(".")[2]
    if not target.startswith("vitpatch.") and name.lower() in map(str.lower, OWN_CORRUPTIONS):
        return target
    return as_option(name).replace("_", " ")


def _step_words(step: Mapping[str, Any]) -> str:
    """A step of a chain; a chain with a strength of its own in brackets, so that it is seen whose strength that is."""
    if class_name(step["_target_"]) == "Chain" and strength_words(step):
        return f"[{corruption_name(step)}] ({strength_words(step)})"
    return corruption_words(step)


def strength_words(corruption: Mapping[str, Any]) -> str:
    """The corruption's parameters, ``key=value``, without those of ``UNSAID`` values."""
    target = str(corruption["_target_"])
    unsaid = {*HYDRA_KEYS, *(key for key, value in UNSAID.items() if corruption.get(key) == value)}
    if not target.startswith("vitpatch."):  # whose default may be another
        unsaid -= {"clip"}
    unsaid |= {"steps"} if class_name(target) == "Chain" else set()
    return ", ".join(f"{key}={_value_words(value)}" for key, value in corruption.items() if key not in unsaid)


def _value_words(value: Any) -> str:
    """A parameter's value: a number to four digits, a long list by its first values and its length."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        if "_target_" in value:
            return corruption_words(value)
        return f"{{{', '.join(f'{key}: {_value_words(of)}' for key, of in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        some = [_value_words(of) for of in value[:MOST_LISTED]]
        return f"[{', '.join(some)}{f', … {len(value)} values' if len(value) > MOST_LISTED else ''}]"
    return str(value)


def override_key(override: str) -> str:
    """The key of an override, with its package, without ``+`` and ``~``."""
    return override.partition("=")[0].lstrip("+~")


def is_unnamed(key: str) -> bool:
    """Whether a key does not change what is measured."""
    key = key.partition("@")[0]
    return any(key == word or key.startswith(f"{word}.") for word in UNNAMED)


def describe_fixed(overrides: Iterable[str]) -> str:
    """What the runs of a sweep share, in one text, of its ``fixed`` overrides those that change what is measured."""
    return " ".join(override for override in overrides if not is_unnamed(override_key(override)))


def run_labels(names: Sequence[str]) -> dict[str, str]:
    """By run's name a short one: without the overrides and folders that are in every name.

    ``corruption=gray,data.limit=48`` beside ``corruption=noise,data.limit=48`` is ``corruption=gray``. Where
    short names would be empty or the same, the whole ones.
    """
    parts = {name: re.split("[,/]", name) for name in names}
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    short = {name: _without(name, shared) for name in names}
    if len(set(short.values())) < len(short) or not all(short.values()):
        return {name: name for name in names}
    return short


def short_labels(names: Sequence[str]) -> dict[str, str]:
    """By run's name its label at an axis or in a legend, no two the same."""
    labels = run_labels(names)
    short = shorten_names(list(labels.values()), LONGEST)
    return {name: short[label] for name, label in labels.items()}


def _without(name: str, shared: Container[str]) -> str:
    """A name without some of its parts; a slash stays where a folder's name ends."""
    kept = between = ""
    for part, end in re.findall("([^,/]*)([,/]?)", name):
        if part and part not in shared:
            kept += (("/" if "/" in between else ",") if kept else "") + part
            between = ""
        between += end
    return kept


def shorten_names(names: Sequence[str], longest: int) -> dict[str, str]:
    """By name a short one of about ``longest`` letters at most, no two the same.

    The middle is left out; where two would then be the same, another part, or less.
    """
    if max(map(len, names), default=0) <= longest:
        return {name: name for name in names}
    for most in range(longest, max(map(len, names)), 8):
        for head in sorted(range(1, most - 1), key=lambda head: abs(head + 1 - most // 2)):
            short = {name: _cut(name, head, most) for name in names}
            if len(set(short.values())) == len(short):
                return short
    return {name: name for name in names}


def _cut(name: str, head: int, most: int) -> str:
    return name if len(name) <= most else f"{name[:head]}…{name[head + 1 - most :]}"


def describe_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What two runs' identities differ in, in words: the first few keys with both values."""
    there, here = flatten(theirs), flatten(ours)
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    values = [f"{key} ({_brief(there.get(key))} there, {_brief(here.get(key))} here)" for key in keys]
    more = f" and {len(keys) - MOST_SETTINGS} more" * (len(keys) > MOST_SETTINGS)
    return ", ".join(values[:MOST_SETTINGS]) + more if keys else "settings"


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; values as JSON has them."""
    if not (isinstance(value, Mapping) and value):
        return {key: json.loads(json.dumps(value, default=str))}
    flat = {}
    for name, inner in value.items():
        flat |= flatten(inner, f"{key}.{name}" if key else str(name))
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
