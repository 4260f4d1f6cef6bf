"""The one error that a user sees, and how a run that is asked to stop ends."""

import signal


class VitPatchError(Exception):
    """What a user did wrong, in one line: what was got, what is expected, what to do."""


SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a run to stop: from the keyboard, and from a cluster that takes the machine back."""


class Interrupted(Exception):
    """A run was asked to stop, and did, with what was done kept. Not ``KeyboardInterrupt``, which Lightning takes."""


class ArgumentError(VitPatchError):
    """What is wrong with one argument; the message begins with the argument's name."""
