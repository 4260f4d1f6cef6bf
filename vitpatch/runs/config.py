"""The composed config → a study, with the checks that need no model; options of ``conf/``. Light: no torch."""

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
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vitpatch.checks import (
    Count,
    Expected,
    Ge,
    Positive,
    Seed,
    check,
    one_of,
    parse_window,
    read_inclusion,
    suggest,
)
from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.runs.names import run_name
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
)

CHAIN = "vitpatch.corruptions.Chain"
PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""The folder of options: a wheel has it inside the package, a checkout beside it."""
SWEEP_VARIABLE = "VITPATCH_SWEEP"
"""Hands the sweep's time stamp down to the processes of a sweep."""
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
    types = get_type_hints(declared, include_extras=True)
    for key in cfg:
        if key not in types and key not in groups:
            raise VitPatchError(f"{key}: there is no such key; {suggest(key, [*types, *groups])}")
    for key in types:
        if key not in cfg:
            raise VitPatchError(f"{key} is missing: add {key}=… to the command")
    check_types(cfg, declared)


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


def check_types(cfg: Mapping[str, Any], declared: type) -> None:
    """Raises ``VitPatchError`` for a value that is not of the type that ``declared`` has for its key."""
    for key, kind in get_type_hints(declared, include_extras=True).items():
        if key in cfg:
            check(key, cfg[key], kind)


def read_study(cfg: DictConfig) -> Study:
    """What a composed config asks for. Raises ``VitPatchError`` for a value that is wrong whatever the model is."""
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


Layer = Annotated[int, Ge(0), Expected("all, a layer, or a list of layers such as [0,3]")]
Head = Annotated[int, Ge(0), Expected("all, joint, a head, or a list of heads such as [0,3]")]


def read_target(target: DictConfig) -> Target:
    """The site, layers, tokens and heads of the group ``target``. Raises ``VitPatchError``."""
    layers, heads, grid = target.layers, target.heads, target.grid
    if heads not in (None, EVERY_HEAD, JOINT):
        heads = tuple(dict.fromkeys(_as_list("target.heads", heads, Head)))
    if grid is not None and not (OmegaConf.is_list(grid) and len(grid) == 2):
        raise VitPatchError(f"target.grid {grid!r}: expected [rows,columns], for instance [4,4]")
    result = Target(
        site=one_of("target.site", target.site, Site),
        layers=None if layers == "all" else tuple(dict.fromkeys(_as_list("target.layers", layers, Layer))),
        tokens=tuple(map(TokenGroup, _as_list("target.tokens", target.tokens, TokenGroup))),
        heads=heads,
        grid=grid if grid is None else tuple(_as_list("target.grid", grid, Count)),
    )
    if TokenGroup.GRID in result.tokens and grid is None:
        raise VitPatchError("target.tokens grid: say its blocks too, for instance target.grid=[4,4]")
    return result


def read_windows(value: Any) -> tuple[int, ...]:
    """The windows, each once, as ``Patch.window`` has them. Raises ``VitPatchError``."""
    return tuple(dict.fromkeys(map(parse_window, _as_list("window", value))))


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


def _as_list(key: str, value: Any, declared: Any = Any) -> list[Any]:
    """A list's values, or the one value, each of the ``declared`` type."""
    if OmegaConf.is_list(value) and not value:
        raise VitPatchError(f"{key}: an empty list; expected at least one")
    return [check(key, one, declared) for one in (value if OmegaConf.is_list(value) else [value])]


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
    """A copy of a whole config in which the options that steps of ``corruption`` name stand in their place.

    Raises ``VitPatchError`` for a name that is no option, and for a chain that holds itself.
    """
    new = cfg.copy()
    if OmegaConf.is_dict(new.get("corruption")):
        new.corruption = _resolve_steps(new.corruption, ())
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


def corruption_options() -> list[str]:
    """The names of all options of conf/corruption, in alphabetical order."""
    with _hydra() as searched:
        loader = GlobalHydra.instance().config_loader()
        return loader.get_group_options("corruption", config_name="patch", overrides=searched)


def _compose_with(name: str, key: str) -> DictConfig:
    """The whole config with one option of conf/corruption."""
    options = corruption_options()
    if name not in options:
        raise VitPatchError(f"{key}: no option {name!r} in conf/corruption; there are {', '.join(options)}")
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
    return str(PACKAGE / "assets" / name)


def register_resolvers() -> None:
    """Makes the functions that ``conf/`` calls as ``${name:…}`` known to OmegaConf."""
    for function in (asset, sweep_stamp, run_name, default_window, default_direction):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
