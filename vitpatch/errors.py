"""The one error that a user sees."""


class VitPatchError(Exception):
    """What a user did wrong, in one line: what was got, what is expected, what to do."""


class ArgumentError(VitPatchError):
    """What is wrong with one argument; the message begins with the argument's name."""
