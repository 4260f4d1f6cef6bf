"""What the name of an option of conf/corruption stands for, and a chain with its steps' options in their place."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.runs.config import CONF, register_resolvers

CHAIN = "vitpatch.corruptions.Chain"


def resolved(cfg: DictConfig) -> DictConfig:
    """A copy of a whole config in which no step of ``corruption`` is a name: what it depends on is all in it."""
    new = cfg.copy()
    if OmegaConf.is_dict(new.get("corruption")) and new.corruption.get("_target_") == CHAIN:
        new.corruption = _with_steps(new.corruption, ())
    return new


def code_identity(corruption: Any) -> dict[str, dict[str, str]]:
    """``corruption_code``: of a user's own classes in a corruption's config the digests of the files they are in.

    Empty where all are this package's, whose code ``NUMBERS_VERSION`` stands for.
    """
    digests = {}
    for target in _targets(corruption):
        with suppress(TypeError, OSError):  # no Python file has it
            file = inspect.getsourcefile(hydra.utils.get_object(target))
            digests[target] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return {"corruption_code": digests} if digests else {}


def _targets(config: Any) -> Iterator[str]:
    """What a config names that is not this package's, at any depth."""
    if isinstance(config, Mapping):
        if not str(config.get("_target_", "vitpatch.")).startswith("vitpatch."):
            yield config["_target_"]
        config = list(config.values())
    for each in config if isinstance(config, list | tuple) else ():
        yield from _targets(each)


def corruption_option(name: str, key: str) -> DictConfig:
    """What ``patch.py corruption=NAME`` takes, steps resolved; ``key`` is where it is named, for errors."""
    return resolved(_composed(name, key)).corruption


def corruption_options() -> list[str]:
    """The names of all options of conf/corruption, in alphabetical order."""
    with _hydra() as searched:
        loader = GlobalHydra.instance().config_loader()
        return loader.get_group_options("corruption", config_name="patch", overrides=searched)


def _with_steps(chain: DictConfig, inside: tuple[str, ...]) -> DictConfig:
    """A chain with the options that its steps name in their place; chains among them likewise."""
    raw = OmegaConf.to_container(chain, resolve=False)
    if raw.get("steps") in (None, "???"):
        return chain
    steps = raw["steps"] if isinstance(raw["steps"], list) else [raw["steps"]]
    return OmegaConf.create(raw | {"steps": [_step(step, inside) for step in steps]})


def _step(step: Any, inside: tuple[str, ...]) -> DictConfig:
    if isinstance(step, str):
        if step in inside:
            raise VitPatchError(f"corruption.steps {step!r}: is a chain that holds itself")
        step, inside = _composed(step, "corruption.steps").corruption, (*inside, step)
        step = OmegaConf.to_container(step, resolve=False)
    if not isinstance(step, dict) or "_target_" not in step:
        raise VitPatchError(
            f"corruption.steps {step!r}: expected names of options of conf/corruption, or mappings with _target_"
        )
    node = OmegaConf.create(step)
    return _with_steps(node, inside) if step["_target_"] == CHAIN else node


def _composed(name: str, key: str) -> DictConfig:
    options = corruption_options()
    if name not in options:
        raise VitPatchError(f"{key}: no option {name!r} in conf/corruption; there are {', '.join(options)}")
    with _hydra() as searched:
        try:
            return compose("patch", overrides=[f"corruption={name}", *searched])
        except (HydraException, OmegaConfBaseException) as error:
            raise VitPatchError(f"{key}: option {name!r}: {one_line(error)}") from error


@contextmanager
def _hydra() -> Iterator[list[str]]:
    """Hydra, as the program started it or here on ``CONF``; and the override that makes it search where that does."""
    if GlobalHydra.instance().is_initialized():
        where = HydraConfig.get().searchpath if HydraConfig.initialized() else None
        yield [f"hydra.searchpath=[{','.join(where)}]"] if where else []
        return
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield []
