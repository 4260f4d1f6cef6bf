"""Checks of values: against declared types, and for secrets. What is wrong becomes one line: key, got, expected.

A class says what its fields may be by their types: ``float``, ``int``, ``bool``, ``str``, a ``StrEnum``, ``Literal``,
``tuple[T, ...]`` (a list of at least one), unions of these, and ``Annotated`` with bounds (``annotated_types``) and a
text for the error, such as a unit. Other types are not checked. Light: no torch.

Pydantic would do the part of ``has_type`` alone: its strict mode refuses Hydra's lists and the names of enumerations,
its lax mode takes ``"1"`` for a number. Its texts ("Input should be greater than 0") say neither the unit nor what null
stands for, so that ``describe`` would stay; and it takes 0.15 s to import and to build its validators.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from vitpatch.errors import ArgumentError, VitPatchError
from vitpatch.formatting import first_few
from vitpatch.types import WINDOW_WORDS, Include, Inclusion

E = TypeVar("E", bound=StrEnum)

LARGEST_INT = 2**63 - 1

Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Ge(1)]
Index = Annotated[int, Ge(0)]
FigureFormat = Literal["png", "svg", "pdf"]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|_PAT$|(^|_)(API)?_?KEY$", re.IGNORECASE)
"""Names of environment variables whose values are secrets."""
SHORTEST = 8
"""Characters; a shorter value would be found by chance."""
SECRET_KEY = re.compile(r"(^|[._])(token|secret|passw(or)?d|api_?key|credentials?)$", re.IGNORECASE)
"""Names of a config's keys whose values are secrets; ``target.tokens`` is none."""
TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|wandb_v\d_\w{30,})"
)
"""What the keys of common services look like; ``hf_cifar10_test_images`` is a name."""
WITH_PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]+@|://(hf_|gh[pousr]_|github_pat_|glpat-)\w+@")
"""An address with a password or a token in it."""


@dataclass(frozen=True)
class Expected:
    """In ``Annotated``: what an error says is expected, instead of a description of the type."""

    words: str


def check(key: str, value: Any, declared: Any) -> Any:
    """``value`` where it is of the ``declared`` type. Raises ``VitPatchError`` where it is not."""
    if not has_type(value, declared):
        text = repr(value)
        text = text if len(text) <= 80 else text[:79] + "…"
        raise VitPatchError(f"{key} {text}: expected {describe(declared)}")
    return value


def check_values(prefix: str, values: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
    """Checks each value whose name has a declared type; keys in errors are ``prefix`` and the name."""
    for name, value in values.items():
        if name in declared:
            check(prefix + name, value, declared[name])


def check_types(values: Mapping[str, Any], declared: type) -> None:
    """Raises ``VitPatchError`` for a value that is not of the type that ``declared`` has for its key."""
    for key, kind in types_of(declared).items():
        if key in values:
            check(key, values[key], kind)


def check_fields(instance: Any, group: str) -> None:
    """Checks the fields of a dataclass: the keys of ``conf/<group>``."""
    check_values(f"{group}.", vars(instance), types_of(type(instance)))


@cache
def types_of(declaring: Any) -> dict[str, Any]:
    """The declared types of a class's fields; none where some cannot be resolved."""
    try:
        return get_type_hints(declaring, include_extras=True)
    except NameError:  # a user's class whose types are imported for type checkers only
        return {}


def one_of(key: str, value: Any, kind: type[E]) -> E:
    """``value`` as a member of ``kind``."""
    return kind(check(key, value, kind))


def nearest(key: Any, known: Collection[str]) -> list[str]:
    """The known name that an unknown one is most like; none where it is like none."""
    return difflib.get_close_matches(str(key), list(known), n=1)


def suggest(key: Any, known: Collection[str]) -> str:
    """The hint in an error about an unknown key: the nearest known one, or some of them."""
    near = nearest(key, known)
    return f"did you mean {near[0]}?" if near else f"there are {first_few([*known], 12) or 'none'}"


def has_type(value: Any, declared: Any) -> bool:
    """Whether a value is of a type; ``true`` is no number, and a number is finite and fits 64 bits."""
    origin, args = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return has_type(value, args[0]) and all(_within(value, bound) for bound in args[1:])
    if origin in (Union, UnionType):
        return any(has_type(value, one) for one in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        kinds = [args[0]] * len(value) if is_list(value) and args[-1] is ... else args
        return is_list(value) and 0 < len(kinds) == len(value) and all(map(has_type, value, kinds))
    if declared is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INT
    if declared is str:
        return isinstance(value, str) and bool(value.strip())
    if isinstance(declared, type) and issubclass(declared, StrEnum):
        return isinstance(value, str) and value in list(declared)
    return isinstance(value, declared) if declared in (bool, NoneType) else True


def is_list(value: Any) -> bool:
    """Whether a value is a list, a tuple, or Hydra's own kind of list."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _within(value: Any, bound: Any) -> bool:
    if isinstance(bound, Interval):
        return all(_within(value, one) for one in bound)
    if isinstance(bound, _BOUNDS):
        name = type(bound).__name__.lower()
        return getattr(operator, name)(value, getattr(bound, name))
    return True


def describe(declared: Any) -> str:
    """A type in words, as they follow "expected"."""
    origin, args = get_origin(declared), get_args(declared)
    if origin is Annotated:
        instead = [one.words for one in args[1:] if isinstance(one, Expected)]
        notes = [one for one in args[1:] if isinstance(one, str)]
        if NoneType in get_args(args[0]):  # a note on what may be null says what null is
            return instead[0] if instead else " ".join([describe(args[0]), *notes])
        words = instead[0] if instead else describe(args[0]) + _bounds(args[0], args[1:])
        return ", ".join([words, *notes])
    if origin in (Union, UnionType):
        return _alternatives([describe(one) for one in args])
    if origin is Literal or (isinstance(declared, type) and issubclass(declared, StrEnum)):
        words = list(args or declared)
        return " or ".join(words) if len(words) == 2 else f"one of {', '.join(words)}"
    if origin is tuple:
        return f"a list ({describe(args[0])} each)"
    return {float: "a number", int: "a whole number", bool: "true or false", str: "a name", NoneType: "null"}[declared]


def _alternatives(words: list[str]) -> str:
    *others, last = words
    if others == ["true or false"]:
        return f"true, false or {last}"
    return ", ".join(others) + f", or {last}"


def _bounds(kind: type, metadata: Sequence[Any]) -> str:
    """The bounds of a number in words."""
    bounds = [one for bound in metadata for one in (bound if isinstance(bound, Interval) else [bound])]
    at = {type(bound): getattr(bound, type(bound).__name__.lower()) for bound in bounds if isinstance(bound, _BOUNDS)}
    if Ge in at and Le in at:
        return f" from {at[Ge]:g} to {at[Le]:,g}" if kind is float else f" from {at[Ge]} to {at[Le]}"
    if kind is int:
        return f", {at[Ge]} or more" if Ge in at else ""
    low = f" ≥ {at[Ge]:g}" if Ge in at else f" above {at[Gt]:g}" if Gt in at else ""
    high = f"< {at[Lt]:g}" if Lt in at else f"at most {at[Le]:g}" if Le in at else ""
    return low + (f" and {high}" if high else "")


_BOUNDS = (Ge, Gt, Le, Lt)


def parse_window(value: Any) -> int:
    """A window as ``Patch.window`` has it, from a number of layers or a word."""
    if isinstance(value, str) and value in WINDOW_WORDS:
        return WINDOW_WORDS[value]
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise VitPatchError(f"window {value!r}: expected a whole number, 1 or more, prefix, suffix, or a list of these")
    return operator.index(value)


def whole_numbers(key: str, values: Any) -> tuple[int, ...]:
    """A sequence, array, series or tensor of whole numbers as a tuple; of heads and layers also one by itself."""
    if key in ("heads", "layers") and isinstance(values, int):
        values = [values]
    try:
        numbers = tuple(values.tolist() if hasattr(values, "tolist") else values)
        if any(isinstance(number, bool) for number in numbers):
            raise TypeError
        return tuple(operator.index(number) for number in numbers)
    except TypeError as error:
        raise VitPatchError(f"{key} {str(values)[:60]!r}: expected a list of whole numbers") from error


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


def read_formats(key: str, value: Any) -> tuple[str, ...]:
    """Formats of figures, each once, from one or a list of them. Raises ``VitPatchError``."""
    formats = [check(key, one, FigureFormat) for one in (value if is_list(value) else [value])]
    if not formats:
        raise VitPatchError(f"{key}: an empty list; expected {describe(FigureFormat)}")
    return tuple(dict.fromkeys(formats))


@contextmanager
def argument_keys(prefix: str) -> Iterator[None]:
    """Names the config's key where an ``ArgumentError`` names an argument: ``layers 9`` → ``target.layers 9``."""
    try:
        yield
    except ArgumentError as error:
        raise VitPatchError(f"{prefix}{error}") from error


def check_no_secret(config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
    """Raises ``VitPatchError`` where a value of a resolved config holds a secret; the error names its key, not it.

    A secret is the value of an environment variable whose name says so (``HF_TOKEN``, ``WANDB_API_KEY``), typed or by
    ``${oc.env:…}``, an address with a password, what looks like a token, or what a key's name says is one. Configs go
    into run folders and trackers.
    """
    environment = os.environ if environment is None else environment
    secrets = {
        value: name for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST
    }
    for key, text in _texts(config, ""):
        for value, name in secrets.items():
            if value in text:
                raise VitPatchError(
                    f"{key}: it holds the value of the environment variable {name}, and configs are written into run "
                    f"folders; leave it out: Hugging Face and Weights & Biases read their keys from the environment"
                )
        if WITH_PASSWORD.search(text):
            raise VitPatchError(
                f"{key}: an address with a password in it, and configs are written into run folders; "
                f"give it without, and the password by the environment or a netrc file"
            )
        if text and (SECRET_KEY.search(key) or TOKEN.search(text)):
            raise VitPatchError(
                f"{key}: it holds a key or token, and configs are written into run folders; leave it out, and give it "
                "by the environment (HF_TOKEN, WANDB_API_KEY)"
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested mappings and lists, keys included."""
    if isinstance(value, Mapping):
        for name, of in value.items():
            yield f"{key} (a key)".strip(), str(name)
            yield from _texts(of, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for place, of in enumerate(value):
            yield from _texts(of, f"{key}[{place}]")
    elif isinstance(value, str):
        yield key, value
