"""Numbers, counts, times, class names and errors as text that a person reads. Imports no other module of ours."""

from __future__ import annotations

from collections.abc import Callable

UNKNOWN = "–"


def format_interval(
    mean: float | None,
    low: float | None,
    high: float | None,
    spec: str = "+.3f",
    format_number: Callable[[float, str], str] = format,
) -> str:
    """A mean with its interval, ``+0.123 [+0.100, +0.150]``; the mean alone where an end is not known.

    ``None`` and NaN are not known; where the mean is not, the text is a dash. ``spec`` is a format as ``format`` takes
    it, ``format_number(value, spec)`` another function than ``format``.
    """
    if not _is_known(mean):
        return UNKNOWN
    if not (_is_known(low) and _is_known(high)):
        return format_number(mean, spec)
    return f"{format_number(mean, spec)} [{format_number(low, spec)}, {format_number(high, spec)}]"


def _is_known(value: float | None) -> bool:
    return value is not None and value == value  # NaN is not equal to itself


def one_line(error: object, most: int = 300) -> str:
    """The text of an error in one line of at most ``most`` characters; of one without text, the name of its class."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 image, 2 images."""
    return f"{number} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Seconds in words: 90 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def class_name(target: str) -> str:
    """What a ``_target_`` is known by: the bare name of a class of this package, the full path of a user's own."""
    return target.rpartition(".")[2] if target.startswith("vitpatch.") else target
