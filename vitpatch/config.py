"""The composed config → nouns, with the checks that need no model; and the names of runs. Light: no torch."""

from __future__ import annotations

import math
import operator
import os
import re
import shlex
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

from vitpatch.run_names import run_name
from vitpatch.spec import (
    EVERY_HEAD,
    EVERYONE,
    JOINT,
    WINDOW_WORDS,
    BaseRun,
    Direction,
    Donor,
    Include,
    Inclusion,
    Interval,
    Metric,
    Site,
    Target,
    Tested,
    TokenGroup,
    VitPatchError,
)

E = TypeVar("E", bound=StrEnum)

SWEEP_VARIABLE = "VITPATCH_SWEEP"
"""Hands the sweep's time stamp down to the processes of a sweep."""


class MatmulPrecision(StrEnum):
    """How float32 matrix products are rounded inside (``torch.set_float32_matmul_precision``)."""

    HIGHEST = "highest"
    HIGH = "high"
    MEDIUM = "medium"


@dataclass(frozen=True)
class Study:
    """What a run measures, beside its model, data and corruption.

    ``controls``: other images as donors too, ``None`` = where window is 1. ``synergy``: single layers, and windows
    without each of their layers, too. ``interval``: ``percentile`` or ``bca``; ``wanted_width`` of an interval at the
    peak, ``None`` = a tenth of the total effect.
    """

    target: Target
    windows: tuple[int, ...]
    direction: Direction
    metric: Metric
    rival: BaseRun
    seed: int
    donor: Donor = Donor.PAIR
    controls: bool | None = None
    include: Inclusion = EVERYONE
    synergy: bool = False
    interval: str = "percentile"
    test: Tested = Tested.LOG_ODDS
    wanted_width: float | None = None

    @property
    def depends_on_corruption(self) -> bool:
        """Whether the corrupted run plays a part in the effects."""
        return depends_on_corruption(self.donor, self.direction, self.metric, self.rival, self.include)


def depends_on_corruption(
    donor: Donor, direction: Direction, metric: Metric, rival: BaseRun, include: Inclusion
) -> bool:
    """Whether effects are of the corrupted run: it is recipient or donor, chooses images, or names the rival."""
    is_patched = donor is Donor.PAIR or direction is Direction.DENOISE
    names_the_rival = metric is Metric.LOGIT_DIFF and rival is BaseRun.CORRUPT
    return is_patched or names_the_rival or include.selects_on_the_outcome


def read_study(cfg: DictConfig) -> Study:
    """The nouns of a composed config. Raises ``VitPatchError`` for a value that no model could make right."""
    layers = cfg.target.layers
    if layers != "all":
        if isinstance(layers, str):
            raise VitPatchError(f"target.layers {layers!r}: expected all, a layer, or a list of layers such as [0,3]")
        layers = tuple(whole_number("target.layers", layer, least=0) for layer in _listed("target.layers", layers))
    target = Target(
        site=one_of("target.site", cfg.target.site, Site),
        layers=None if layers == "all" else tuple(dict.fromkeys(layers)),
        tokens=tuple(one_of("target.tokens", g, TokenGroup) for g in _listed("target.tokens", cfg.target.tokens)),
        heads=_heads(cfg.target.heads),
        grid=_grid(cfg.target.grid),
    )
    target.check_grid()
    for key in ("overwrite", "dry_run", "synergy"):
        if not isinstance(cfg[key], bool):
            raise VitPatchError(f"{key} {cfg[key]!r}: expected true or false")
    one_of("matmul_precision", cfg.matmul_precision, MatmulPrecision)
    study = Study(
        target=target,
        windows=tuple(dict.fromkeys(window_of(window) for window in _listed("window", cfg.window))),
        direction=one_of("direction", cfg.direction, Direction),
        metric=one_of("metric", cfg.metric, Metric),
        rival=one_of("rival", cfg.rival, BaseRun),
        seed=whole_number("seed", cfg.seed, least=0),
        donor=one_of("donor", cfg.donor, Donor),
        controls=_true_false_or_null("controls", cfg.controls),
        include=read_inclusion(cfg.include),
        synergy=cfg.synergy,
        interval=one_of("interval", cfg.interval, Interval),
        test=one_of("test", cfg.test, Tested),
        wanted_width=_width(cfg.wanted_width),
    )
    _check_donor(study)
    return study


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


def _width(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise VitPatchError(f"wanted_width {value!r}: expected a number above 0, in the metric's unit, or null")
    return value


def read_inclusion(value: Any) -> Inclusion:
    """The rule that ``include`` asks for. Raises ``VitPatchError``."""
    rule, colon, least = str(value).partition(":")
    try:
        number = float(least) if colon else None
        if rule not in list(Include) or (number is not None) != (rule == Include.MIN_TOTAL_EFFECT):
            raise ValueError
        if number is not None and not math.isfinite(number):
            raise ValueError
    except ValueError as error:
        known = ", ".join(rule for rule in Include if rule != Include.MIN_TOTAL_EFFECT)
        raise VitPatchError(f"include {value!r}: expected {known} or min_total_effect:x, x a number") from error
    return Inclusion(Include(rule), number)


def _true_false_or_null(key: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise VitPatchError(f"{key} {value!r}: expected true, false or null")
    return value


def _listed(key: str, value: Any) -> list[Any]:
    if OmegaConf.is_list(value) and not value:
        raise VitPatchError(f"{key}: an empty list; expected at least one")
    return list(value) if OmegaConf.is_list(value) else [value]


def window_of(value: Any) -> int:
    """A window as ``Patch.window`` has it, from a number of layers or a word."""
    if isinstance(value, str) and value in WINDOW_WORDS:
        return WINDOW_WORDS[value]
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise VitPatchError(f"window {value!r}: expected a whole number, 1 or more, prefix, suffix, or a list of these")
    return operator.index(value)


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


def whole_number(key: str, value: Any, least: int) -> int:
    """``value`` where it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise VitPatchError(f"{key} {value!r}: expected a whole number, {least} or more")
    return value


def one_of(key: str, value: Any, kind: type[E]) -> E:
    """``value`` as a member of ``kind``."""
    if not isinstance(value, str) or value not in list(kind):
        raise VitPatchError(f"{key} {value!r}: expected one of {', '.join(kind)}")
    return kind(value)


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
        raise VitPatchError(f"{cfg.get('_target_')}: {' '.join(str(cause or error).split())[:300]}") from error


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
    return str(Path(__file__).parent / "assets" / name)


def register_resolvers() -> None:
    """Makes the functions that ``conf/`` calls as ``${name:…}`` known to OmegaConf."""
    for function in (asset, sweep_stamp, run_name, default_window, default_direction):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
