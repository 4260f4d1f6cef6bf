"""The corruptions of a sweep, handed to its jobs by a file: each calibrates against all (``calibrate=match``).

A job knows its own overrides only, and may run on another machine; what all launchers share is the sweep's folder.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vitpatch.errors import VitPatchError
from vitpatch.runs.options import resolved

FOLDER, FILE = "calibration", "corruptions.json"
SAY = ("corruption", "experiment", "calibrate")
"""Keys that say which corruption a job has, and whether it is matched."""


def folder_of(run: Path) -> Path | None:
    """The folder of calibrations in the sweep that the run ``run`` is a job of; ``None`` where it is of none."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    is_its_job = hydra.mode == RunMode.MULTIRUN and Path(hydra.runtime.output_dir).resolve() == run.resolve()
    return Path(hydra.sweep.dir).resolve() / FOLDER if is_its_job else None


def write_corruptions(config: DictConfig, config_name: str | None) -> None:
    """Writes the corruptions of the sweep that ``config`` (with Hydra's part) starts, where one job asks for ``match``.

    What cannot be composed is left to Hydra, which says so for the job.
    """
    from vitpatch.io import write_json

    overrides = sweep_overrides(config)
    if not _may_match(config, overrides):
        return
    found: list[Any] = []
    for job in _jobs(overrides):
        try:
            composed = resolved(compose(config_name, overrides=job))
        except Exception:  # Hydra's own, of many classes
            continue
        corruption = OmegaConf.to_container(composed.corruption, resolve=True)
        if composed.get("calibrate") == "match" and corruption not in found:
            found.append(corruption)
    folder = Path(str(config.hydra.sweep.dir)) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, found)


def read_corruptions(folder: Path) -> list[dict[str, Any]]:
    """What ``write_corruptions`` wrote. Raises ``VitPatchError`` where it has not."""
    file = folder / FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VitPatchError(
            f"calibrate=match: {file} does not say which corruptions the sweep has; start the sweep anew, with Hydra's "
            "own sweeper"
        ) from error


def sweep_overrides(config: DictConfig) -> list[Override]:
    """The sweep's overrides as Hydra's own sweeper has them: the config's, then the command's."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    given = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(given)


def _says(override: Override) -> bool:
    key = override.key_or_group
    return any(key == word or key.startswith((f"{word}.", f"{word}@")) for word in SAY)


def _may_match(config: DictConfig, overrides: list[Override]) -> bool:
    swept = [o for o in overrides if o.is_sweep_override() and o.key_or_group == "experiment"]
    asked = [str(o.input_line) for o in overrides if o.key_or_group == "calibrate"]
    return bool(swept) or "match" in str(config.get("calibrate")) or any("match" in line for line in asked)


def _jobs(overrides: list[Override]) -> Iterator[list[str]]:
    """The overrides of jobs that differ in what ``SAY`` names; of other keys the first value stands for all."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            continue  # another sweeper's
        key, swept = override.get_key_element(), override.is_sweep_override()
        texts = list(override.sweep_string_iterator()) if swept else [override.get_value_element_as_str()]
        values[key] = [f"{key}={text}" for text in (texts if _says(override) else texts[:1])]
    for job in itertools.product(*values.values()):
        yield list(job)
