"""The project's own options as Hydra composes them: a composition takes longer than many a test."""

from functools import cache

from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from vitpatch.runs.config import PATCH_GROUPS, register_resolvers


def composed(command: str, *overrides: str, **also) -> DictConfig:
    """The config of ``patch`` or ``train_eval``."""
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(command, overrides=list(overrides), **also)


@cache
def composed_once(command: str, *overrides: str) -> DictConfig:
    """The same, composed once: for those who copy it."""
    return composed(command, *overrides)


@cache
def parsed_once(override: str) -> Override:
    """An override as Hydra reads it."""
    return OverridesParser.create().parse_override(override)


def option_names(group: str) -> list[str]:
    """The options of a group, in alphabetical order."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@cache
def _containers(command: str, *groups: str) -> dict[tuple[str, str], dict | None]:
    """All options of the groups, by group and name, in as few compositions as the largest group has options."""
    names = {group: option_names(group) for group in groups}
    found = {}
    for number in range(max(map(len, names.values()))):
        chosen = {group: of[number] for group, of in names.items() if number < len(of)}
        whole = composed(command, *(f"{group}={name}" for group, name in chosen.items()))
        held = OmegaConf.to_container(whole, resolve=False)
        found |= {(group, name): held[group] for group, name in chosen.items()}
    return found


def option(group: str, name: str) -> DictConfig | None:
    """What an option holds together with those that it starts from; interpolations as they are."""
    of_training = group == "architecture"
    options = _containers("train_eval", group) if of_training else _containers("patch", *PATCH_GROUPS)
    held = options[group, name]
    return None if held is None else OmegaConf.create(held)
