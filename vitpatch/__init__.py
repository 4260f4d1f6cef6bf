"""Activation patching (causal tracing) for vision transformers.

Nothing heavy is imported here: Hydra imports the package to answer ``--help``.
"""

__version__ = "0.1.0"

NUMBERS_VERSION = 1
"""Raised by hand when a change of the code changes numbers; part of every ``run_id``."""
