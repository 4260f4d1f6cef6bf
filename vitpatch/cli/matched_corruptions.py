"""The corruptions of a sweep, left in its folder for its jobs, where one asks for ``calibrate=match``. Light: no torch.

A job knows its own overrides only, and may run on another machine; what all share is the sweep's folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from vitpatch.runs.config import resolve_steps
from vitpatch.runs.names import override_key

DECIDES_CORRUPTION = re.compile(r"(corruption|experiment|calibrate)\b")
"""Keys that say which corruption a job has, and whether it is matched with others."""


def sweep_overrides(config: DictConfig) -> list[Override]:
    """The sweep's overrides as Hydra's own sweeper has them: the config's, then the command's."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    texts = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(texts)


def write_matched_corruptions(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Writes the corruptions of the jobs that ask for ``calibrate=match``, each once; nothing where none can ask.

    Only jobs that differ in ``DECIDES_CORRUPTION`` are composed. What cannot be composed is left to Hydra, which says
    so for the job.
    """
    values = [str(config.get("calibrate")), *(str(o.input_line) for o in overrides if o.key_or_group == "calibrate")]
    sweeps_experiments = any(o.key_or_group == "experiment" and o.is_sweep_override() for o in overrides)
    if not sweeps_experiments and not any("match" in value for value in values):
        return
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from vitpatch.runs.calibration import write_sweep_corruptions

    known = [o for o in overrides if not o.is_sweep_override() or o.is_discrete_sweep()]  # else another sweeper's
    jobs: dict[tuple[str, ...], list[str]] = {}
    for job in (job for chunk in BasicSweeper.split_arguments(known, None) for job in chunk):
        jobs.setdefault(tuple(override for override in job if DECIDES_CORRUPTION.match(override_key(override))), job)
    corruptions: list[Any] = []
    for job in jobs.values():
        try:
            composed = resolve_steps(GlobalHydra.instance().config_loader().load_sweep_config(config, job))
        except Exception:  # Hydra's own, of many classes
            continue
        corruption = OmegaConf.to_container(composed.corruption, resolve=True)
        if composed.get("calibrate") == "match" and corruption not in corruptions:
            corruptions.append(corruption)
    write_sweep_corruptions(Path(str(config.hydra.sweep.dir)), corruptions)
