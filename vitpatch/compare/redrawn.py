"""The pictures of finished runs again, from their files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitpatch.compare.load import Found
from vitpatch.errors import VitPatchError
from vitpatch.plots.run_figures import draw
from vitpatch.runs.config import read_study
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.results import measure, read_pages
from vitpatch.stats.result import Outcome
from vitpatch.types import Donor


def places(found: Sequence[Found], output: Path | None) -> list[tuple[RunFolder, Path]]:
    """Finished runs, and where the pictures of each go: below ``output`` by name; ``None`` = to the run itself."""
    return [(one.folder, one.folder.path if output is None else output / one.name) for one in found]


def outcome_of(run: RunFolder) -> tuple[Outcome, dict[str, Any]]:
    """What a finished run found, and its manifest."""
    manifest = run.finished()
    study = read_study(OmegaConf.create(manifest["config"]))
    return measure(run, study, tuple(map(Donor, manifest["donors"]))), manifest


def redraw(run: RunFolder, into: Path) -> list[Path]:
    """Draws the pictures of a run from its files into a folder's ``figures/``; their files.

    Raises ``VitPatchError`` where its files are those of another version, or broken.
    """
    try:
        outcome, manifest = outcome_of(run)
        drawn = draw(outcome, read_pages(run.pages), manifest)
    except (OmegaConfBaseException, pa.ArrowException, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise VitPatchError(
            f"{run.path}: of another version, or a file is broken ({reason}); run it again (overwrite=true)"
        ) from error
    into.mkdir(parents=True, exist_ok=True)
    return [file for of_name in RunFolder(into).save(drawn).values() for file in of_name]
