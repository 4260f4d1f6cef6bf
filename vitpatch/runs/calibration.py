"""Calibration: the strength of a corruption that does a wanted damage. What can be asked, the search, its result.

Damage need not rise with strength, so that bisection alone could end anywhere: a grid shows the whole curve, the first
step of it that crosses the wanted drop is the bracket, and only that is halved. Measuring: ``calibrate``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from vitpatch.checks import one_of
from vitpatch.corruptions import Corruption, Identity
from vitpatch.corruptions.base import as_corruption
from vitpatch.errors import VitPatchError
from vitpatch.formatting import corruption_words, format_interval
from vitpatch.io import write_json
from vitpatch.runs.config import construct
from vitpatch.types import Estimate

POINTS = 9
"""Strengths of the grid, from 0 to the strongest."""
TOLERANCE = 1e-3
"""Of a drop: a tenth of the standard error of a mean over 1000 images whose drops spread by 0.3."""
HALVINGS = 12
"""Of the bracket at most, to 1/32 768 of the strongest: a drop that jumps is not met more closely by more."""
MATCH, SHARE = "match", 0.8
"""``calibrate=match``: this share of the smallest of a sweep's corruptions' largest drops."""


FOLDER, FILE = "calibration", "corruptions.json"
"""In a sweep's folder: the curves that its runs measured, and the corruptions that they are matched with."""


class Damage(StrEnum):
    """A mean over images, clean minus corrupt: of the label's probability, or of being right."""

    PROB_DROP = "prob_drop"
    ACCURACY_DROP = "accuracy_drop"


@dataclass(frozen=True)
class WantedDamage:
    """What ``calibrate`` asks for; ``drop`` ``None`` = what all corruptions of a sweep can do."""

    damage: Damage
    drop: float | None

    def __str__(self) -> str:
        return MATCH if self.drop is None else f"{self.damage}:{self.drop:g}"


def read_wanted_damage(value: Any) -> WantedDamage | None:
    """The value of ``calibrate``: null, ``prob_drop:0.2``, ``accuracy_drop:0.1``, or ``match`` (a drop of probability).

    Raises ``VitPatchError`` for anything else.
    """
    if value is None:
        return None
    if value == MATCH:
        return WantedDamage(Damage.PROB_DROP, None)
    kind, _, number = str(value).partition(":")
    try:
        drop = float(number)
    except ValueError:
        drop = np.nan
    if not 0 < drop <= 1:
        expected = "null, match, or a drop above 0, at most 1, such as prob_drop:0.2"
        raise VitPatchError(f"calibrate {value!r}: expected {expected}")
    return WantedDamage(one_of("calibrate", kind, Damage), drop)


@dataclass(frozen=True)
class Adjustable:
    """The config of a corruption without its strength, ``key``, which goes from 0 to ``strongest``."""

    config: dict[str, Any]
    key: str
    strongest: float

    def at(self, strength: float) -> Corruption:
        """The corruption of this strength."""
        return as_corruption(construct(OmegaConf.create(self.config | {self.key: strength})))

    def __str__(self) -> str:
        return corruption_words(self.config)


def adjustable(config: Mapping[str, Any]) -> Adjustable:
    """A corruption's resolved config with its strength left open. ``VitPatchError`` where its class has no strength."""
    corruption = as_corruption(construct(OmegaConf.create(config)))
    if (strength := corruption.strength_key) is None:
        name = "corruption none" if type(corruption) is Identity else corruption_words(config)
        raise VitPatchError(f"calibrate: {name} has no strength; choose a corruption that has, or calibrate=null")
    rest = {key: value for key, value in config.items() if key != strength}
    return Adjustable(rest, strength, corruption.strongest)


def adjustables_of_run(
    config: dict[str, Any], wanted: WantedDamage | None, folder: Path | None
) -> tuple[Adjustable, ...]:
    """A run's corruption, then those of its sweep where it is matched with them, each once; none of a plain run.

    ``folder`` is the sweep's of calibrations.
    """
    configs = [config] if wanted is not None else []
    if wanted is not None and wanted.drop is None and folder is not None:
        configs += read_sweep_corruptions(folder)
    different: list[Adjustable] = []
    for one in map(adjustable, configs):
        if one not in different:
            different.append(one)
    return tuple(different)


def calibration_folder(run: Path) -> Path | None:
    """The folder of calibrations in the sweep that the run ``run`` is a job of; ``None`` where it is of none."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    is_its_job = hydra.mode == RunMode.MULTIRUN and Path(hydra.runtime.output_dir).resolve() == run.resolve()
    return Path(hydra.sweep.dir).resolve() / FOLDER if is_its_job else None


def write_sweep_corruptions(sweep: Path, corruptions: Sequence[Mapping[str, Any]]) -> None:
    """Leaves the corruptions of a sweep in its folder for its jobs, each of which is calibrated against all.

    A job knows its own overrides only, and may run on another machine; what all share is the sweep's folder.
    """
    (sweep / FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(sweep / FOLDER / FILE, corruptions)


def read_sweep_corruptions(folder: Path) -> list[dict[str, Any]]:
    """What ``write_sweep_corruptions`` wrote. Raises ``VitPatchError`` where it has not."""
    file = folder / FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VitPatchError(
            f"calibrate=match: {file} does not say which corruptions the sweep has; start the sweep anew, with Hydra's "
            "own sweeper"
        ) from error


Curve = Mapping[float, Estimate]
"""Mean drops by strength."""
Measure = Callable[[Sequence[float]], Sequence[Estimate]]
"""Mean drops at some strengths."""


def grid(strongest: float) -> list[float]:
    """``POINTS`` strengths from 0 to the strongest, equally far apart."""
    return np.linspace(0, strongest, POINTS).tolist()


def largest(curve: Curve) -> tuple[float, float]:
    """The largest mean drop of a curve, and the lowest strength that has it."""
    strength = max(sorted(curve), key=lambda s: curve[s].mean)
    return curve[strength].mean, strength


def is_monotone(curve: Curve, strongest: float) -> bool:
    """Whether drops on the grid never fall by more than ``TOLERANCE`` from one strength to the next."""
    means = [curve[strength].mean for strength in grid(strongest)]
    return bool((np.diff(means) >= -TOLERANCE).all())


def search(measure: Measure, wanted: float, strongest: float, what: str, tolerance: float) -> tuple[float, Curve]:
    """The strength whose mean drop is ``wanted``, and all that was measured on the way.

    Of the bracket's ends the one nearer to ``wanted`` is taken, once it is within ``tolerance`` or after ``HALVINGS``.
    ``what`` names the strength in errors. Raises ``VitPatchError`` where no strength of the grid reaches the drop.
    """
    curve = dict(zip(grid(strongest), measure(grid(strongest)), strict=True))
    low, high = _bracket(curve, wanted, what)
    for _ in range(HALVINGS):
        if min(abs(curve[strength].mean - wanted) for strength in (low, high)) <= tolerance:
            break
        middle = (low + high) / 2
        (curve[middle],) = measure([middle])
        low, high = (middle, high) if curve[middle].mean < wanted else (low, middle)
    return min((low, high), key=lambda s: abs(curve[s].mean - wanted)), curve


def _bracket(curve: Curve, wanted: float, what: str) -> tuple[float, float]:
    """The first step of the grid from a drop below ``wanted`` to one that is not."""
    strengths = sorted(curve)
    if curve[strengths[0]].mean >= wanted:
        raise VitPatchError(
            f"calibrate: {what}=0 has a drop of {curve[strengths[0]].mean:.3g} already; at strength 0 a corruption "
            "must leave the image as it is"
        )
    for low, high in pairwise(strengths):
        if curve[high].mean >= wanted:
            return low, high
    most, at = largest(curve)
    raise VitPatchError(
        f"calibrate: a drop of {wanted:.3g} is not reached; the largest on the training images is {most:.3g}, at "
        f"{what}={at:g}; ask for less"
    )


def tolerance_for(damage: Damage, images: int) -> float:
    """How near a drop is to come: ``TOLERANCE``, but of an accuracy, which moves by whole images, half an image."""
    return max(TOLERANCE, 0.5 / images) if damage is Damage.ACCURACY_DROP else TOLERANCE


def common_drop(curves: Mapping[str, Curve]) -> float:
    """``SHARE`` of the smallest of the curves' largest drops. ``VitPatchError`` where one corruption does nothing."""
    most = {name: largest(curve)[0] for name, curve in curves.items()}
    name = min(most, key=lambda n: most[n])
    if SHARE * most[name] <= TOLERANCE:
        raise VitPatchError(
            f"calibrate=match: the largest drop under {name} is {most[name]:.3g}; there is no damage to match, leave "
            "it out of the sweep"
        )
    return SHARE * most[name]


@dataclass(frozen=True)
class Calibration:
    """A strength, the drop it does on training images, and the curve that the search measured.

    ``largest_drops`` by corruption, of ``calibrate=match``; ``predicted`` whether images had no labels, so that drops
    are those of the clean run's predictions.
    """

    wanted: WantedDamage
    wanted_drop: float
    key: str
    strength: float
    strongest: float
    curve: Curve
    images: int
    clusters: int
    predicted: bool = False
    largest_drops: Mapping[str, float] | None = None

    @property
    def drop(self) -> Estimate:
        """The mean drop at the strength, with its interval over clusters."""
        return self.curve[self.strength]

    @property
    def monotone(self) -> bool:
        """Whether damage rises with strength all along the grid."""
        return is_monotone(self.curve, self.strongest)

    def as_manifest(self) -> dict[str, Any]:
        """The calibration as the manifest has it; what is not known is null."""
        entries = {
            "asked": str(self.wanted),
            "damage": str(self.wanted.damage),
            "wanted": self.wanted_drop,
            "key": self.key,
            "strength": self.strength,
            "drop": _known(self.drop),
            "monotone": self.monotone,
            "images": self.images,
            "clusters": self.clusters,
            "labels": "of the clean run's predictions" if self.predicted else "of the data",
            "curve": [{"strength": s} | _known(self.curve[s]) for s in sorted(self.curve)],
        }
        return entries | ({} if self.largest_drops is None else {"largest_drops": dict(self.largest_drops)})

    def __str__(self) -> str:
        """In a line."""
        drop = format_interval(self.drop.mean, self.drop.low, self.drop.high, ".3f")
        labels = "the predicted labels' " if self.predicted else ""
        shape = "" if self.monotone else ", damage does not rise all along the grid"
        return (
            f"corruption.{self.key}={self.strength:g}: {labels}{self.wanted.damage} {drop} on "
            f"{self.images} training images (asked {self.wanted}, {self.wanted_drop:.3g}; {len(self.curve)} "
            f"strengths{shape})"
        )


def _known(estimate: Estimate) -> dict[str, float | None]:
    numbers = asdict(estimate)
    return {("drop" if k == "mean" else k): None if np.isnan(v) else v for k, v in numbers.items()}
