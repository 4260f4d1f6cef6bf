"""The strength of a corruption that does a wanted damage: what can be asked, the search, what was found. Pure.

Damage need not rise with strength, so that bisection alone could end anywhere: a grid shows the whole curve, the first
step of it that crosses the wanted drop is the bracket, and only that is halved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np

from vitpatch.checks import one_of
from vitpatch.errors import VitPatchError
from vitpatch.formatting import format_interval
from vitpatch.types import Estimate

POINTS = 9
"""Strengths of the grid, from 0 to the strongest."""
TOLERANCE = 1e-3
"""Of a drop: a tenth of the standard error of a mean over 1000 images whose drops spread by 0.3."""
HALVINGS = 12
"""Of the bracket at most, to 1/32 768 of the strongest: a drop that jumps is not met more closely by more."""
MATCH, SHARE = "match", 0.8
"""``calibrate=match``: this share of the smallest of a sweep's corruptions' largest drops."""


class Damage(StrEnum):
    """A mean over images, clean minus corrupt: of the label's probability, or of being right."""

    PROB_DROP = "prob_drop"
    ACCURACY_DROP = "accuracy_drop"


@dataclass(frozen=True)
class Asked:
    """What ``calibrate`` says; ``drop`` ``None`` = what all corruptions of a sweep can do."""

    damage: Damage
    drop: float | None

    def __str__(self) -> str:
        return MATCH if self.drop is None else f"{self.damage}:{self.drop:g}"


def read_asked(value: Any) -> Asked | None:
    """``calibrate`` as a noun: null, ``prob_drop:0.2``, ``accuracy_drop:0.1``, or ``match`` (a drop of probability)."""
    if value is None:
        return None
    if value == MATCH:
        return Asked(Damage.PROB_DROP, None)
    kind, colon, number = str(value).partition(":")
    if not colon:
        raise VitPatchError(f"calibrate {value!r}: expected null, match, or a drop such as prob_drop:0.2")
    try:
        drop = float(number)
    except ValueError:
        drop = np.nan
    if not 0 < drop <= 1:
        raise VitPatchError(f"calibrate {value!r}: expected a drop above 0, at most 1, such as prob_drop:0.2")
    return Asked(one_of("calibrate", kind, Damage), drop)


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
        if _miss(curve, wanted, low, high) <= tolerance:
            break
        middle = (low + high) / 2
        (curve[middle],) = measure([middle])
        low, high = (middle, high) if curve[middle].mean < wanted else (low, middle)
    return min((low, high), key=lambda s: abs(curve[s].mean - wanted)), curve


def _miss(curve: Curve, wanted: float, *strengths: float) -> float:
    return min(abs(curve[strength].mean - wanted) for strength in strengths)


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


def tolerance_of(damage: Damage, images: int) -> float:
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
    """A strength, the drop it does on training images, and the curve on which it was found.

    ``matched`` are the largest drops by corruption, of ``calibrate=match``; ``predicted`` whether images had no labels,
    so that drops are those of the clean run's predictions.
    """

    asked: Asked
    wanted: float
    key: str
    strength: float
    strongest: float
    curve: Curve
    images: int
    clusters: int
    predicted: bool = False
    matched: Mapping[str, float] | None = None

    @property
    def drop(self) -> Estimate:
        """The mean drop at the strength, with its interval over clusters."""
        return self.curve[self.strength]

    @property
    def monotone(self) -> bool:
        """Whether damage rises with strength all along the grid."""
        return is_monotone(self.curve, self.strongest)

    def described(self) -> dict[str, Any]:
        """The calibration in the manifest's words; what is not known is null."""
        found = {
            "asked": str(self.asked),
            "damage": str(self.asked.damage),
            "wanted": self.wanted,
            "key": self.key,
            "strength": self.strength,
            "drop": _known(self.drop),
            "monotone": self.monotone,
            "images": self.images,
            "clusters": self.clusters,
            "labels": "of the clean run's predictions" if self.predicted else "of the data",
            "curve": [{"strength": s} | _known(self.curve[s]) for s in sorted(self.curve)],
        }
        return found | ({} if self.matched is None else {"largest_drops": dict(self.matched)})

    def __str__(self) -> str:
        """In a line."""
        drop = format_interval(self.drop.mean, self.drop.low, self.drop.high, ".3f")
        of_what = "the predicted labels' " if self.predicted else ""
        shape = "" if self.monotone else ", damage does not rise all along the grid"
        return (
            f"corruption.{self.key}={self.strength:g}: {of_what}{self.asked.damage} {drop} on "
            f"{self.images} training images (asked {self.asked}, {self.wanted:.3g}; {len(self.curve)} strengths{shape})"
        )


def _known(estimate: Estimate) -> dict[str, float | None]:
    numbers = asdict(estimate)
    return {("drop" if k == "mean" else k): None if np.isnan(v) else v for k, v in numbers.items()}
