"""A sweep's comparison: on the disk, and as a run of the sweep's group in the tracker."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from vitpatch.compare.compare import Compared, compare
from vitpatch.runs.tracking import Compared as Shown
from vitpatch.runs.tracking import RunInfo, tracker_of

log = logging.getLogger(__name__)

PAGE = "index.html"


def report(root: Path, cfg: DictConfig, track: bool) -> None:
    """Compares the finished runs in the folder of a sweep, of whose runs ``cfg`` is the config; says where it is.

    ``track``: also logs it where the runs are logged. Raises ``VitPatchError`` where nothing can be compared.
    """
    compared = compare([root])
    for warning in (*compared.comparison.warnings, *compared.problems):
        log.warning("comparison: %s", warning)
    log.info("comparison: %s", compared.folder / PAGE)
    if not track:
        return
    info = RunInfo(compared.folder, str(cfg.sweep), _config(compared, cfg), job_type="compare")
    with tracker_of(cfg).run(info) as tracked:
        tracked.log_comparison(_shown(compared))
    if tracked.sync_command:
        log.info("  W&B offline   %s", tracked.sync_command)


def _config(compared: Compared, cfg: DictConfig) -> dict[str, object]:
    """What the tracker knows the comparison by."""
    return {"sweep": str(cfg.sweep), "runs": [run.name for run in compared.comparison.runs]}


def _shown(compared: Compared) -> Shown:
    """What the tracker shows of a comparison."""
    files = {path.name: path for path in sorted(compared.folder.iterdir()) if path.is_file()}
    kept = {name: path for name, path in files.items() if path.suffix in (".csv", ".png", ".svg", ".html")}
    pictures = {path.stem: path for path in kept.values() if path.suffix == ".png"}
    return Shown(compared.comparison.tables, pictures, kept, compared.folder / PAGE)
