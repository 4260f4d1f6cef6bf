"""Activation patching (causal tracing) for vision transformers.

``vitpatch.load``, ``vitpatch.corrupt``, ``vitpatch.patch``, ``vitpatch.show``, ``vitpatch.summarize``,
``vitpatch.load_run`` and ``vitpatch.plot`` are for notebooks. Nothing heavy is imported here: Hydra imports the package
to answer ``--help``.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitpatch import plot
    from vitpatch.api import corrupt, load, patch, summarize
    from vitpatch.errors import VitPatchError
    from vitpatch.notebook import show
    from vitpatch.runs.reading import load_run

__version__ = "0.1.0"

ASSETS = str(Path(__file__).parent / "assets")
"""The folder of the data and models that ship with the package."""

NUMBERS_VERSION = 3
"""Raised by hand when a change of the code changes numbers; part of every ``run_id``."""

__all__ = [
    "ASSETS", "NUMBERS_VERSION", "VitPatchError", "__version__", "corrupt", "load", "load_run", "patch", "plot",
    "show", "summarize",
]  # fmt: skip

_MODULES = {
    "corrupt": "vitpatch.api",
    "load": "vitpatch.api",
    "patch": "vitpatch.api",
    "summarize": "vitpatch.api",
    "load_run": "vitpatch.runs.reading",  # which needs no torch, as show does not
    "show": "vitpatch.notebook",
    "VitPatchError": "vitpatch.errors",
}


def __getattr__(name: str) -> Any:
    if name == "plot":
        return import_module("vitpatch.plot")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'vitpatch' has no attribute {name!r}")
