"""``python -m vitpatch.compare DIR [DIR ...]``: the pictures of finished runs again, from their files alone."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vitpatch.config import read_study
from vitpatch.measure import measure
from vitpatch.outcome import Outcome
from vitpatch.pictures import draw
from vitpatch.shown import Shown
from vitpatch.spec import Donor, VitPatchError
from vitpatch.store import RunFolder

log = logging.getLogger(__name__)


def finished_below(folders: Sequence[Path]) -> list[RunFolder]:
    """The finished patching runs in and below folders, in order of their paths. Raises ``VitPatchError`` for none."""
    for folder in folders:
        if not folder.is_dir():
            raise VitPatchError(f"{folder}: no such folder; give a run's or a sweep's")
    found = sorted({manifest.parent for folder in folders for manifest in folder.rglob("manifest.json")})
    runs = [run for path in found if "donors" in ((run := RunFolder(path)).finished() or {})]
    if not runs:
        raise VitPatchError(f"{' '.join(map(str, folders))}: no finished run of this version is in or below it")
    return runs


def outcome_of(run: RunFolder) -> tuple[Outcome, dict[str, Any]]:
    """What a finished run found, and its manifest."""
    manifest = run.finished()
    study = read_study(OmegaConf.create(manifest["config"]))
    return measure(run, study, tuple(map(Donor, manifest["donors"]))), manifest


def redraw(run: RunFolder, into: Path | None = None) -> list[Path]:
    """Draws the pictures of a run from its files, into its own folder or another; their files."""
    outcome, manifest = outcome_of(run)
    drawn = draw(outcome, Shown.read(run.pages), manifest)
    files = (run if into is None else RunFolder(into)).save(drawn)
    return [file for of_name in files.values() for file in of_name]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m vitpatch.compare", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's folder, or a sweep's")
    parser.add_argument("--output", type=Path, help="where the pictures go (default: each run's own figures/)")
    given = parser.parse_args(arguments)
    try:
        for run in finished_below(given.folders):
            into = None if given.output is None else given.output / run.path.name
            if into is not None:
                into.mkdir(parents=True, exist_ok=True)
            pictures = redraw(run, into)
            print(f"{pictures[0].parent}: {', '.join(sorted(path.name for path in pictures))}")
    except (VitPatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
