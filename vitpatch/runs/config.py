"""The composed config → nouns, with the checks that need no model; and the names of runs. Light: no torch."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf, open_dict

from vitpatch.checks import Count, Expected, Positive, Seed, among, check, one_of, whole_number, window_of
from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.runs.run_names import run_name
from vitpatch.types import (
    EVERY_HEAD,
    JOINT,
    BaseRun,
    Direction,
    Donor,
    Interval,
    Metric,
    Site,
    Study,
    Target,
    Tested,
    TokenGroup,
    read_inclusion,
)

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""The folder of options: a wheel has it inside the package, a checkout beside it."""
SWEEP_VARIABLE = "VITPATCH_SWEEP"
"""Hands the sweep's time stamp down to the processes of a sweep."""


Name = Annotated[str | int | float, Expected("a name")]
"""A name that may look like a number."""
PATCH_GROUPS = ("model", "data", "corruption", "target", "trainer", "logger")
TRAIN_GROUPS = ("model", "architecture", "data", "trainer", "recipe", "augment")


class MatmulPrecision(StrEnum):
    """How float32 matrix products are rounded inside (``torch.set_float32_matmul_precision``)."""

    HIGHEST = "highest"
    HIGH = "high"
    MEDIUM = "medium"


class PatchKeys(TypedDict):
    """The keys of ``conf/patch.yaml``; of type ``Any`` those that a function of their own reads."""

    window: Any
    direction: Direction
    donor: Donor
    controls: bool | None
    include: Any
    synergy: bool
    interval: Interval
    test: Tested
    wanted_width: Annotated[Positive, "in the metric's unit"] | None
    metric: Metric
    rival: BaseRun
    calibrate: Any
    train_split: str | None
    train_limit: Annotated[Count | None, "for all"]
    batch_size: Count
    seed: Seed
    sweep: Name
    overwrite: bool
    dry_run: bool
    memory_gb: Annotated[Positive | None, "for what is free"]
    matmul_precision: MatmulPrecision


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
    types = get_type_hints(declared, include_extras=True)
    for key in cfg:
        if key not in types and key not in groups:
            raise VitPatchError(f"{key}: there is no such key; {among(key, [*types, *groups])}")
    for key in types:
        if key not in cfg:
            raise VitPatchError(f"{key} is missing: add {key}=… to the command")
    check_types(cfg, declared)


def check_types(cfg: Mapping[str, Any], declared: type) -> None:
    """Raises ``VitPatchError`` for a value that is not of the type that ``declared`` has for its key."""
    for key, kind in get_type_hints(declared, include_extras=True).items():
        if key in cfg:
            check(key, cfg[key], kind)


def read_study(cfg: DictConfig) -> Study:
    """The nouns of a composed config. Raises ``VitPatchError`` for a value that no model could make right."""
    check_types(cfg, PatchKeys)
    study = Study(
        target=read_target(cfg.target),
        windows=read_windows(cfg.window),
        direction=Direction(cfg.direction),
        metric=Metric(cfg.metric),
        rival=BaseRun(cfg.rival),
        seed=cfg.seed,
        donor=Donor(cfg.donor),
        controls=cfg.controls,
        include=read_inclusion(cfg.include),
        synergy=cfg.synergy,
        interval=Interval(cfg.interval),
        test=Tested(cfg.test),
        wanted_width=cfg.wanted_width,
    )
    _check_donor(study)
    return study


def read_target(target: DictConfig) -> Target:
    """What ``target`` asks for. Raises ``VitPatchError``."""
    layers = target.layers
    if layers != "all":
        if isinstance(layers, str):
            raise VitPatchError(f"target.layers {layers!r}: expected all, a layer, or a list of layers such as [0,3]")
        layers = tuple(whole_number("target.layers", layer, least=0) for layer in _listed("target.layers", layers))
    found = Target(
        site=one_of("target.site", target.site, Site),
        layers=None if layers == "all" else tuple(dict.fromkeys(layers)),
        tokens=tuple(one_of("target.tokens", group, TokenGroup) for group in _listed("target.tokens", target.tokens)),
        heads=_heads(target.heads),
        grid=_grid(target.grid),
    )
    found.check_grid()
    return found


def read_windows(value: Any) -> tuple[int, ...]:
    """What ``window`` asks for, each once. Raises ``VitPatchError``."""
    return tuple(dict.fromkeys(window_of(window) for window in _listed("window", value)))


def _check_donor(study: Study) -> None:
    donor = study.donor
    if donor.is_constant and study.direction is not Direction.NOISE:
        raise VitPatchError(f"direction {study.direction} with donor={donor}: goes into the clean run; leave it out")
    if study.controls and donor is not Donor.PAIR:
        raise VitPatchError(f"controls true with donor={donor}: controls stand beside donor=pair; leave one out")
    if study.synergy and study.target.one_head_at_a_time:
        raise VitPatchError("synergy true with single heads: these have no windows; use target.heads=joint")
    if study.synergy and set(study.windows) == {1}:
        raise VitPatchError("synergy true with window 1: is of windows of several layers; use window=3 or [1,3]")


def _listed(key: str, value: Any) -> list[Any]:
    if OmegaConf.is_list(value) and not value:
        raise VitPatchError(f"{key}: an empty list; expected at least one")
    return list(value) if OmegaConf.is_list(value) else [value]


def _heads(value: Any) -> tuple[int, ...] | str | None:
    if value in (None, EVERY_HEAD, JOINT):
        return value
    if isinstance(value, str):
        raise VitPatchError(f"target.heads {value!r}: expected all, joint, a head, or a list of heads such as [0,3]")
    return tuple(dict.fromkeys(whole_number("target.heads", head, least=0) for head in _listed("target.heads", value)))


def _grid(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not OmegaConf.is_list(value) or len(value) != 2:
        raise VitPatchError(f"target.grid {value!r}: expected [rows,columns], for instance [4,4]")
    rows, columns = (whole_number("target.grid", number, least=1) for number in value)
    return rows, columns


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
    found = _class_of(option, group, kind)
    parameters = inspect.signature(found).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        for key in option:
            if key not in parameters and not key.startswith("_"):
                raise VitPatchError(f"{group}.{key}: {found.__name__} has no such key; {among(key, parameters)}")
    if not option.get("_partial_"):
        for key, one in parameters.items():
            if one.default is one.empty and one.kind in _NAMED and key not in option:
                raise VitPatchError(f"{group}.{key} is missing: add {group}.{key}=… to the command")


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
"""Kinds of parameters that a key can be."""


def _class_of(option: DictConfig, group: str, kind: type) -> type:
    """The class that ``_target_`` names; nothing of another kind is called."""
    target = option._target_
    try:
        found = pkgutil.resolve_name(target)
    except Exception as error:  # whatever the user's module raises when it is imported
        reason = one_line(error, 200)
        raise VitPatchError(f"{group}._target_ {target!r}: cannot be imported ({reason})") from error
    if not isinstance(found, type) or not issubclass(found, kind):
        what = "a class whose objects can be called" if kind is Callable else f"{kind.__name__} or a class of its kind"
        raise VitPatchError(f"{group}._target_ {target!r}: expected {what}")
    return found


def with_defaults(cfg: DictConfig, groups: Iterable[str]) -> DictConfig:
    """A copy in which keys that an option leaves out have the defaults of its class: what depends on them is in it."""
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
    """The object a config names, what its constructor objects to said in one line."""
    try:
        return instantiate(cfg)
    except MissingMandatoryValue as error:
        raise VitPatchError(f"{error.full_key} is missing: add {error.full_key}=… to the command") from error
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, VitPatchError):
            raise cause from error
        raise VitPatchError(f"{cfg.get('_target_')}: {one_line(cause or error)}") from error


def typed(key: str, value: str) -> str:
    """``key=value`` as it is typed in a shell, so that Hydra reads just this value."""
    if re.fullmatch(r"[\w./:@+-]*", value):
        return f"{key}={value}"
    quoted = value.replace("'", "\\'")
    return shlex.quote(f"{key}='{quoted}'")


def sweep_stamp() -> str:
    """The time stamp that names a sweep, the same in every process below the first that asks."""
    return os.environ.setdefault(SWEEP_VARIABLE, time.strftime("%Y-%m-%d_%H-%M-%S"))


def default_window(heads: Any) -> int:
    """The window where none is given: 1 where single heads are patched, else 3."""
    return 3 if heads in (None, JOINT) else 1


def default_direction(donor: Any) -> str:
    """The direction where none is given: zeros and means, which are no run, go into the clean run."""
    return "noise" if donor in ("zero", "mean") else "denoise"


def asset(name: str) -> str:
    """The folder of data or a model that ships with the package."""
    return str(PACKAGE / "assets" / name)


def register_resolvers() -> None:
    """Makes the functions that ``conf/`` calls as ``${name:…}`` known to OmegaConf."""
    for function in (asset, sweep_stamp, run_name, default_window, default_direction):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
