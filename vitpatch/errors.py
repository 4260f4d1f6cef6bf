"""The one error that a user sees."""

from collections.abc import Iterator
from contextlib import contextmanager


class VitPatchError(Exception):
    """What a user did wrong, in one line: what was got, what is expected, what to do."""


class ArgumentError(VitPatchError):
    """What is wrong with one argument; the message begins with the argument's name."""


@contextmanager
def argument_keys(prefix: str) -> Iterator[None]:
    """Names the config's key where an ``ArgumentError`` names an argument: ``layers 9`` → ``target.layers 9``."""
    try:
        yield
    except ArgumentError as error:
        raise VitPatchError(f"{prefix}{error}") from error
