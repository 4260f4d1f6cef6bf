"""A corruption whose strength is still open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from vitpatch.config import construct
from vitpatch.corruptions import Corruption, traits
from vitpatch.spec import VitPatchError


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
        said = ", ".join(f"{key}={value}" for key, value in self.config.items() if key != "_target_")
        return _name(self.config) + (f" ({said})" if said else "")


def adjustable(config: dict[str, Any]) -> Adjustable:
    """A corruption's resolved config with its strength left open. ``VitPatchError`` where its class has no strength."""
    of_class = traits(construct(OmegaConf.create(config)))
    if of_class.strength_key is None:
        raise VitPatchError(
            f"calibrate: {_name(config)} has no strength; choose a corruption that has, or calibrate=null"
        )
    rest = {key: value for key, value in config.items() if key != of_class.strength_key}
    return Adjustable(rest, of_class.strength_key, of_class.strongest)


def _name(config: dict[str, Any]) -> str:
    name = str(config["_target_"]).rpartition(".")[2].lower()
    return "corruption none" if name == "identity" else name
