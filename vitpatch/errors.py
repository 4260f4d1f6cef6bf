"""The one error that a user sees."""


class VitPatchError(Exception):
    """What a user did wrong, in one line: what was got, what is expected, what to do."""
