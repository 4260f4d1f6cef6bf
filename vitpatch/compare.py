"""``python -m vitpatch.compare DIR [DIR ...]``: the pictures of finished runs again, from their files alone."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitpatch.config import read_study
from vitpatch.measure import measure
from vitpatch.outcome import Outcome
from vitpatch.pictures import draw
from vitpatch.shown import Shown
from vitpatch.spec import Donor, VitPatchError
from vitpatch.store import RunFolder

log = logging.getLogger(__name__)


def finished_below(folder: Path) -> list[RunFolder]:
    """The finished patching runs in and below a folder, in order of their paths. Raises ``VitPatchError`` for none."""
    if not folder.is_dir():
        raise VitPatchError(f"{folder}: no such folder; give a run's or a sweep's")
    found = sorted(manifest.parent for manifest in folder.rglob("manifest.json"))
    runs = [run for path in found if "donors" in ((run := RunFolder(path)).finished() or {})]
    if not runs:
        raise VitPatchError(f"{folder}: no finished run of this version is in or below it")
    return runs


def places(folders: Sequence[Path], output: Path | None) -> list[tuple[RunFolder, Path]]:
    """The finished runs below folders, and where the pictures of each go; ``None`` = to the run itself."""
    found = {}
    for folder in folders:
        for run in finished_below(folder):
            own = run.path.resolve()
            into = own if output is None else output / folder.resolve().name / own.relative_to(folder.resolve())
            found.setdefault(own, (run, into))
    into = [place.resolve() for _, place in found.values()]
    if len(set(into)) < len(into):
        raise VitPatchError("--output: two of the folders have the same name; compare them one by one")
    return list(found.values())


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
        drawn = draw(outcome, Shown.read(run.pages), manifest)
    except (OmegaConfBaseException, pa.ArrowException, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise VitPatchError(f"{run.path}: of another version, or a file is broken ({reason}); run it again") from error
    into.mkdir(parents=True, exist_ok=True)
    return [file for of_name in RunFolder(into).save(drawn).values() for file in of_name]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m vitpatch.compare", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's folder, or a sweep's")
    parser.add_argument("--output", type=Path, help="where the pictures go (default: each run's own figures/)")
    given = parser.parse_args(arguments)
    broken = 0
    try:
        for run, into in places(given.folders, given.output):
            broken += not _redrawn(run, into)
    except (VitPatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        broken = 1
    if broken:
        sys.exit(1)


def _redrawn(run: RunFolder, into: Path) -> bool:
    """Whether a run's pictures could be drawn; the others go on where they could not."""
    try:
        pictures = redraw(run, into)
    except VitPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    print(f"{pictures[0].parent}: {', '.join(sorted(path.name for path in pictures))}")
    return True


if __name__ == "__main__":
    main()
