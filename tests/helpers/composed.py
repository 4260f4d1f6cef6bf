"""The project's own options as Hydra composes them."""

from functools import cache

from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from vitpatch.runs.config import register_resolvers


def composed(command: str, *overrides: str, **also) -> DictConfig:
    """The config of ``patch`` or ``train_eval``."""
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(command, overrides=list(overrides), **also)


@cache
def composed_once(command: str, *overrides: str) -> DictConfig:
    """The same, composed once: for those who copy it."""
    return composed(command, *overrides)


def option_names(group: str) -> list[str]:
    """The options of a group, in alphabetical order."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@cache
def _container(group: str, name: str) -> dict:
    return OmegaConf.to_container(composed(f"{group}/{name}"), resolve=False)[group]


def option(group: str, name: str) -> DictConfig:
    """What an option holds together with those that it starts from; interpolations as they are."""
    return OmegaConf.create(_container(group, name))
