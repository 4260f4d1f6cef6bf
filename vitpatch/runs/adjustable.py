"""A corruption whose strength is still open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from vitpatch.corruptions.pixels import Corruption, Identity, traits
from vitpatch.errors import VitPatchError
from vitpatch.runs.config import construct
from vitpatch.titles import corruption_words


@dataclass(frozen=True)
class Adjustable:
    """The config of a corruption without its strength, ``key``, which goes from 0 to ``strongest``."""

    config: dict[str, Any]
    key: str
    strongest: float

    def at(self, strength: float) -> Corruption:
        """The corruption of this strength."""
        return construct(OmegaConf.create(self.config | {self.key: strength}))

    def __str__(self) -> str:
        return corruption_words(self.config)


def adjustable(config: dict[str, Any]) -> Adjustable:
    """A corruption's resolved config with its strength left open. ``VitPatchError`` where its class has no strength."""
    made = construct(OmegaConf.create(config))
    of_class = traits(made)
    if of_class.strength_key is None:
        name = "corruption none" if type(made) is Identity else corruption_words(config)
        raise VitPatchError(f"calibrate: {name} has no strength; choose a corruption that has, or calibrate=null")
    rest = {key: value for key, value in config.items() if key != of_class.strength_key}
    return Adjustable(rest, of_class.strength_key, of_class.strongest)
