"""What the start of a sweep leaves in its folder: ``sweep.json``, and the corruptions to match. Light: no torch.

``sweep.json`` has what runs differ in, what they share, and how each is called. A job knows its own overrides only, and
may run on another machine; what all share is the sweep's folder.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from vitpatch.errors import VitPatchError
from vitpatch.formatting import is_unnamed, override_key
from vitpatch.io import write_json
from vitpatch.names import SWEEP_FILE, name_parts, name_runs, plain_name
from vitpatch.runs.config import resolve_steps
from vitpatch.study import VIEW_KEYS

DECIDES_CORRUPTION = re.compile(r"(corruption|experiment|calibrate)\b")
"""Keys that say which corruption a job has, and whether it is matched with others."""


@dataclass(frozen=True)
class SweepRecord:
    """What the runs of a sweep differ in and what they share, over all of its starts.

    ``swept``: the keys that runs are named by, in order. ``fixed``: the overrides that all runs share. ``command``:
    that of the last start. ``runs``: the overrides that a run's name is made of, by its name.
    """

    swept: Sequence[str]
    fixed: Sequence[str]
    command: str = ""
    runs: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> SweepRecord | None:
        """The record in a sweep's folder; ``None`` where there is none, or none of its runs has begun to compute."""
        try:
            known = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
            record = cls(**{key: known[key] for key in ("swept", "fixed", "command", "runs")})
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        has_begun = any(True for what in ("manifest.json", "shards") for _ in folder.rglob(what))
        return record if has_begun else None

    def write(self, folder: Path) -> None:
        """Writes the file."""
        write_json(folder / SWEEP_FILE, asdict(self))

    def naming(self) -> dict[str, Any]:
        """What ``run_name`` needs to know of the sweep."""
        alike = [name for name, parts in self.runs.items() if name != plain_name(parts)] if self.runs else None
        return {"swept": list(self.swept), "fixed": list(map(override_key, self.fixed)), "alike": alike}


def make_record(
    overrides: Sequence[Override], jobs: Sequence[Sequence[str]] | None, before: SweepRecord | None
) -> SweepRecord:
    """The record of a sweep with these overrides, which adds its runs to those of the record ``before``.

    ``jobs``: the overrides of each run, ``None`` = not known. Where nothing is swept, runs are named by all keys.
    """
    by_key = {override.get_key_element().lstrip("+~"): override for override in overrides}
    swept = list(before.swept) if before else []
    swept += [key for key, override in by_key.items() if override.is_sweep_override() and key not in swept]
    swept = swept or [key for key in by_key if not is_unnamed(key)]
    fixed = {
        key: f"{override.get_key_element()}={override.get_value_element_as_str()}"
        for key, override in by_key.items()
        if not override.is_sweep_override() and key not in swept
    }
    named = [name_parts(job, swept, fixed) for job in jobs or ()]
    runs = {name: parts for parts, name in name_runs(named, before.runs if before else {}).items()} if named else {}
    return SweepRecord(swept, list(fixed.values()), _command(), runs)


def _command() -> str:
    """What was typed: ``python patch.py …``, or the console command."""
    program = Path(sys.argv[0])
    return shlex.join(["python", *sys.argv] if program.suffix == ".py" else [program.name, *sys.argv[1:]])


def check_same_settings(folder: Path, before: SweepRecord, now: SweepRecord) -> None:
    """Raises ``VitPatchError`` where the runs of earlier starts share other settings than those of this one do."""
    was, new = (
        {key: override for override in record.fixed if not is_unnamed(key := override_key(override))}
        for record in (before, now)
    )
    differ = [key for key in {**was, **new} if was.get(key) != new.get(key)]
    if not differ:
        return
    there, here = (
        " and ".join(fixed.get(key, f"several {key}" if key in now.swept else f"no {key}") for key in differ)
        for fixed in (was, new)
    )
    remedy = "choose another name (sweep=…)"
    if set(differ) <= {*VIEW_KEYS} & {*new}:
        view = " ".join(f"--{new[key].replace('=', ' ', 1)}" for key in differ)
        remedy = f"vitpatch-compare {folder} {view} reads them so; to compute again {remedy}"
    raise VitPatchError(
        f"sweep {folder}: its runs have {there}, this command {here}; runs are named by what is swept "
        f"({', '.join(before.swept)}) alone: {remedy}"
    )


def sweep_overrides(config: DictConfig) -> list[Override]:
    """The sweep's overrides in the order of Hydra's own sweeper: the config's, then the command's."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    texts = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(texts)


def split_into_jobs(overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each job that Hydra's own sweeper makes of a sweep's, in order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return [job for chunk in BasicSweeper.split_arguments(overrides, None) for job in chunk]


def write_matched_corruptions(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Writes the corruptions of the jobs that ask for ``calibrate=match``, each once; no file where no job can ask.

    Of the jobs that are alike in the keys of ``DECIDES_CORRUPTION`` one is composed. One that cannot be composed is
    skipped: Hydra reports that when it starts the job.
    """
    values = [str(config.get("calibrate")), *(str(o.input_line) for o in overrides if o.key_or_group == "calibrate")]
    sweeps_experiments = any(o.key_or_group == "experiment" and o.is_sweep_override() for o in overrides)
    if not sweeps_experiments and not any("match" in value for value in values):
        return
    from vitpatch.runs import calibration

    known = [o for o in overrides if not o.is_sweep_override() or o.is_discrete_sweep()]  # else another sweeper's
    jobs: dict[tuple[str, ...], list[str]] = {}
    for job in split_into_jobs(known):
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
    folder = Path(str(config.hydra.sweep.dir)) / calibration.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / calibration.FILE, corruptions)


def as_value(value: Any) -> str:
    """A mapping, a list or a text as the value of an override, which Hydra reads as just this."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(as_value, value))}]"
    return "null" if value is None else QuotedString(value, Quote.single).with_quotes()
