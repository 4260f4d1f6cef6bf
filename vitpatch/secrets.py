"""Secrets that came into a config: refused, before anything is written. Light: no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vitpatch.errors import VitPatchError

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
