"""The composed config: checks that need no model, and options of ``conf/``. Light: no torch."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vitpatch import ASSETS
from vitpatch.checks import (
    Count,
    Expected,
    Positive,
    Seed,
    check,
    check_types,
    nearest,
    read_formats,
    suggest,
    types_of,
)
from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.names import run_name
from vitpatch.study import StudyKeys
from vitpatch.types import JOINT

CHAIN = "vitpatch.corruptions.Chain"
PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""The folder of options: a wheel has it inside the package, a checkout beside it."""
SWEEP_VARIABLE = "VITPATCH_SWEEP"
"""Hands the sweep's time stamp down to the processes of a sweep."""
FIGURE_KEYS = ("format", "dpi")
Name = Annotated[str | int | float, Expected("a name")]
"""A name that may look like a number."""
PATCH_GROUPS = ("model", "data", "corruption", "target", "trainer", "logger")
TRAIN_GROUPS = ("model", "architecture", "data", "trainer", "recipe", "augment")
NAMES = (
    *("sweep", "train_split", "save_to"),
    *(f"model.{key}" for key in ("path", "revision", "readout", "head_path", "anatomy", "name")),
    *(f"data.{key}" for key in ("path", "split", "config_name", "revision", "name")),
    *(f"data.{what}_column" for what in ("image", "label", "mask", "cluster", "pair")),
    *("logger.project", "logger.entity"),
)
"""Keys whose values are names."""


class PatchKeys(StudyKeys):
    """The keys of ``conf/patch.yaml``; of type ``Any`` those that a function of their own reads."""

    figures: Any
    calibrate: Any
    train_split: str | None
    train_limit: Annotated[Count | None, "for all"]
    batch_size: Count
    sweep: Name
    overwrite: bool
    dry_run: bool
    memory_gb: Annotated[Positive | None, "for what is free"]
    matmul_precision: Literal["highest", "high", "medium"]


class TrainKeys(TypedDict):
    """The keys of ``conf/train_eval.yaml``."""

    corruptions: Any
    train_split: str | None
    train_limit: Annotated[Count | None, "for all"]
    save_to: str | None
    seed: Seed
    sweep: Name


def check_keys(cfg: Mapping[str, Any], declared: type, groups: Sequence[str]) -> None:
    """Raises ``VitPatchError`` for a key that is missing or not known, or a value that is not of the declared type."""
    types = types_of(declared)
    for key in cfg:
        if key not in types and key not in groups:
            raise VitPatchError(f"{key}: there is no such key; {suggest(key, [*types, *groups])}")
    for key in types:
        if key not in cfg:
            raise VitPatchError(f"{key} is missing: add {key}=… to the command")
    check_types(cfg, declared)


def read_figures(figures: Any) -> tuple[tuple[str, ...], int]:
    """The formats of figures, each once, and the dots an inch. Raises ``VitPatchError``."""
    if not isinstance(figures, Mapping):
        raise VitPatchError(f"figures {figures!r}: expected figures.format=[png,pdf] and figures.dpi=150")
    for key in figures:
        if key not in FIGURE_KEYS:
            raise VitPatchError(f"figures.{key}: there is no such key; {suggest(key, FIGURE_KEYS)}")
    for key in FIGURE_KEYS:
        if key not in figures:
            raise VitPatchError(f"figures.{key} is missing: add figures.{key}=… to the command")
    return read_formats("figures.format", figures["format"]), check("figures.dpi", figures["dpi"], Count)


def check_names_are_text(config: DictConfig) -> None:
    """Raises ``VitPatchError`` where a value that is a name is a number or a boolean: YAML read it so in a file."""
    for key in NAMES:
        value = OmegaConf.select(config, key)
        if isinstance(value, bool | int | float):
            last = key.rpartition(".")[2]
            raise VitPatchError(
                f"{key} {value!r}: a name is expected, and this is what is read where it has no quotes (2024_11_28 is "
                f"a number in YAML, yes a boolean); write {last}: '…'"
            )


def construct_option(cfg: DictConfig, group: str, kind: type) -> Any:
    """The object that the option of a group stands for. Raises ``VitPatchError`` as ``check_option`` does."""
    check_option(cfg, group, kind)
    return construct(cfg[group])


def check_option(cfg: DictConfig, group: str, kind: type) -> None:
    """Raises ``VitPatchError`` where the option of a group is no class of this ``kind`` with keys that it takes."""
    option = cfg.get(group)
    if not OmegaConf.is_dict(option) or "_target_" not in option:
        in_file = "a mapping with _target_, as in conf/train_eval.yaml"
        expected = in_file if group in ("recipe", "augment") else f"an option of conf/{group}: {group}=NAME"
        got = "is missing" if option is None else "has no _target_" if OmegaConf.is_dict(option) else repr(option)
        raise VitPatchError(f"{group} {got}: expected {expected}")
    option_class = _import_class(option, group, kind)
    parameters = inspect.signature(option_class).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        for key in option:
            if key not in parameters and not key.startswith("_"):
                raise VitPatchError(
                    f"{group}.{key}: {option_class.__name__} has no such key; {suggest(key, parameters)}"
                )
    if not option.get("_partial_"):
        for key, one in parameters.items():
            if one.default is one.empty and one.kind in _NAMED and key not in option:
                raise VitPatchError(f"{group}.{key} is missing: add {group}.{key}=… to the command")


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
"""Kinds of parameters that a key can be."""


def _import_class(option: DictConfig, group: str, kind: type) -> type:
    """The class that ``_target_`` names. Raises ``VitPatchError`` for what is no class of this ``kind``."""
    target = option._target_
    try:
        named = pkgutil.resolve_name(target)
    except Exception as error:  # whatever the user's module raises when it is imported
        reason = one_line(error, 200)
        raise VitPatchError(f"{group}._target_ {target!r}: cannot be imported ({reason})") from error
    if not isinstance(named, type) or not issubclass(named, kind):
        what = "a class whose objects can be called" if kind is Callable else f"{kind.__name__} or a class of its kind"
        raise VitPatchError(f"{group}._target_ {target!r}: expected {what}")
    return named


def with_defaults(cfg: DictConfig, groups: Iterable[str]) -> DictConfig:
    """A copy in which keys that an option leaves out have the defaults of its class."""
    new = cfg.copy()
    with open_dict(new):
        for group in groups:
            parameters = inspect.signature(pkgutil.resolve_name(new[group]._target_)).parameters
            for key, one in parameters.items():
                if key not in new[group] and one.default is not one.empty:
                    default = str(one.default) if isinstance(one.default, StrEnum) else one.default
                    new[group][key] = list(default) if isinstance(default, tuple) else default
    return new


def construct(cfg: DictConfig) -> Any:
    """The object that a config names. Raises ``VitPatchError``, in one line, where its constructor refuses."""
    try:
        return instantiate(cfg, _convert_="partial")  # plain lists: OmegaConf's own take dataclasses for configs
    except MissingMandatoryValue as error:
        raise VitPatchError(f"{error.full_key} is missing: add {error.full_key}=… to the command") from error
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, VitPatchError):
            raise cause from error
        raise VitPatchError(f"{cfg.get('_target_')}: {one_line(cause or error)}") from error


def resolve_steps(cfg: DictConfig) -> DictConfig:
    """A whole config in which the options that steps of ``corruption`` name stand in their place: a copy if it has any.

    Raises ``VitPatchError`` for a name that is no option, and for a chain that holds itself.
    """
    corruption = cfg.get("corruption")
    resolved = _resolve_steps(corruption, ()) if OmegaConf.is_dict(corruption) else corruption
    if resolved is corruption:
        return cfg
    new = cfg.copy()
    new.corruption = resolved
    return new


def _resolve_steps(corruption: DictConfig, around: tuple[str, ...]) -> DictConfig:
    """A corruption; of a chain with the options that its steps name in their place. ``around``: names it stands in."""
    raw = OmegaConf.to_container(corruption, resolve=False)
    if raw.get("_target_") != CHAIN or raw.get("steps") in (None, "???"):
        return corruption
    steps = []
    for step in raw["steps"] if isinstance(raw["steps"], list) else [raw["steps"]]:
        names = around
        if isinstance(step, str):
            if step in around:
                raise VitPatchError(f"corruption.steps {step!r}: is a chain that holds itself")
            names = (*around, step)
            step = OmegaConf.to_container(_compose_with(step, "corruption.steps").corruption, resolve=False)
        if not isinstance(step, dict) or "_target_" not in step:
            raise VitPatchError(
                f"corruption.steps {step!r}: expected names of options of conf/corruption, or mappings with _target_"
            )
        steps.append(_resolve_steps(OmegaConf.create(step), names))
    return OmegaConf.create(raw | {"steps": steps})


def corruption_option(name: str, key: str) -> DictConfig:
    """What ``patch.py corruption=NAME`` takes, steps resolved; ``key`` is where it is named, for errors."""
    return resolve_steps(_compose_with(name, key)).corruption


def make_corruption(name: str, overrides: Mapping[str, Any]) -> Any:
    """What ``patch.py corruption=NAME`` corrupts by, other values of its keys being ``overrides``.

    Raises ``VitPatchError`` for a name that is no option, and for a key or value that it does not take.
    """
    cfg = _compose_with(name, "corruption")
    with open_dict(cfg):
        for key, value in overrides.items():
            cfg.corruption[key] = value.item() if hasattr(value, "item") else value  # numpy's numbers
    return construct_option(resolve_steps(cfg), "corruption", Callable)


def corruption_options() -> list[str]:
    """The names of all options of conf/corruption, in alphabetical order."""
    with _hydra() as searched:
        return list(_find_options(GlobalHydra.instance().config_loader(), tuple(searched)))


@lru_cache(maxsize=1)
def _find_options(loader: ConfigLoader, searched: tuple[str, ...]) -> tuple[str, ...]:
    """The options of conf/corruption that a loader finds, once for all jobs of a sweep."""
    return tuple(loader.get_group_options("corruption", config_name="patch", overrides=[*searched]))


def _compose_with(name: str, key: str) -> DictConfig:
    """The whole config with one option of conf/corruption."""
    options = corruption_options()
    if name not in options:
        near = [f"did you mean {one}? " for one in nearest(name, options)]
        raise VitPatchError(
            f"{key}: no option {name!r} in conf/corruption; {''.join(near)}there are {', '.join(options)}"
        )
    with _hydra() as searched:
        try:
            return compose("patch", overrides=[f"corruption={name}", *searched])
        except (HydraException, OmegaConfBaseException) as error:
            raise VitPatchError(f"{key}: option {name!r}: {one_line(error)}") from error


@contextmanager
def _hydra() -> Iterator[list[str]]:
    """Hydra, as the program started it or here on ``CONF``; and the override that makes it search where that does."""
    if GlobalHydra.instance().is_initialized():
        where = HydraConfig.get().searchpath if HydraConfig.initialized() else None
        yield [f"hydra.searchpath=[{','.join(where)}]"] if where else []
        return
    if not CONF.is_dir():
        raise VitPatchError(f"{CONF}: no such folder; options of corruptions are files of the project's repository")
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield []


def typed(key: str, value: str) -> str:
    """``key=value`` as it is typed in a shell, so that Hydra reads just this value."""
    if re.fullmatch(r"[\w./:@+-]*", value):
        return f"{key}={value}"
    quoted = value.replace("'", "\\'")
    return shlex.quote(f"{key}='{quoted}'")


def launched() -> tuple[int, int] | None:
    """(rank, size): this process among several that torchrun or srun started; ``None`` where it was started alone."""
    names = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = "RANK", "WORLD_SIZE"
    elif "SLURM_STEP_NUM_TASKS" in os.environ:  # of srun; a batch script that calls python itself has none
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    rank, size = (int(os.environ[name]) for name in names) if names else (0, 1)
    return (rank, size) if size > 1 else None


def sweep_stamp() -> str:
    """The time stamp that names a sweep, the same in every process below the first that asks."""
    return os.environ.setdefault(SWEEP_VARIABLE, time.strftime("%Y-%m-%d_%H-%M-%S"))


def default_window(heads: Any) -> int:
    """The window where the command has none: 1 where single heads are patched, else 3."""
    return 3 if heads in (None, JOINT) else 1


def default_direction(donor: Any) -> str:
    """The direction where the command has none: zeros and means, which are no run, go into the clean run."""
    return "noise" if donor in ("zero", "mean") else "denoise"


def asset(name: str) -> str:
    """The folder of data or a model that ships with the package."""
    return f"{ASSETS}/{name}"


def register_resolvers() -> None:
    """Makes the functions that ``conf/`` calls as ``${name:…}`` known to OmegaConf."""
    for function in (asset, sweep_stamp, run_name, default_window, default_direction):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
