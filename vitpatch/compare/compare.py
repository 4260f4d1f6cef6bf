"""``python -m vitpatch.compare DIR [DIR ...]``: figures, tables and a page over all finished runs below folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpatch.formatting import counted

if TYPE_CHECKING:
    from vitpatch.compare.comparison import Comparison


MOST_PAIRS = 20
"""Matched runs of groups that are said in lines; ``matched.csv`` has all."""


@dataclass(frozen=True)
class Compared:
    """A comparison, the folder that its files are in, and what could not be compared, a line each."""

    comparison: Comparison
    folder: Path
    problems: tuple[str, ...]


def compare(folders: Sequence[Path], output: Path | None = None) -> Compared:
    """Compares all finished runs in and below folders and writes tables, figures and page.

    They go to ``output``; without one, to ``comparison/`` in the one folder given, of several in the working folder. A
    run that is broken or of another version is left out and is one of ``problems``. Raises ``VitPatchError`` where no
    run can be compared. Says nothing.
    """
    from vitpatch.compare.compared import compared
    from vitpatch.compare.comparison_figures import draw, save
    from vitpatch.compare.load import COMPARISON, found_below, read, unfinished_below
    from vitpatch.compare.page import write_page
    from vitpatch.errors import VitPatchError
    from vitpatch.io import write_csv

    runs, problems, left_out = [], [], []
    for found in found_below(folders):
        try:
            runs.append(read(found))
        except VitPatchError as error:
            problems.append(str(error))
            left_out.append(str(error).replace(str(found.folder.path), found.name))  # a page may be sent around
    if not runs:
        raise VitPatchError("; ".join(problems))
    place = output or (folders[0] / COMPARISON if len(folders) == 1 else Path(COMPARISON))
    comparison = compared(runs, place, [*left_out, *unfinished_below(folders)])
    place.mkdir(parents=True, exist_ok=True)
    _clear(place)
    for name, table in comparison.tables.items():
        write_csv(place / f"{name}.csv", table)
    for name, figure in draw(comparison).items():
        save(figure, place / name)
    write_page(comparison, place / "index.html")
    return Compared(comparison, place, tuple(problems))


def _clear(place: Path) -> None:
    """Removes the figures of an earlier comparison, of which this one may have fewer."""
    from vitpatch.compare.comparison_figures import FIGURES

    for file in place.iterdir():
        if FIGURES.fullmatch(file.name):
            file.unlink()


def lines(compared: Compared) -> list[str]:
    """The few lines that end a comparison: warnings, runs, matched runs of groups, and where the files are."""

    comparison = compared.comparison
    said = [f"warning: {warning}" for warning in comparison.warnings]
    heads = ["run", "peak", "effect (95 % interval)", "recovered"]
    said += _columns([heads, *map(_of_run, comparison.overview.to_dict("records"))])
    said += _of_groups(comparison.matched.to_dict("records"))
    if len(comparison.runs) > 1:
        pairs = counted(len(comparison.differences[["a", "b"]].drop_duplicates()), "pair")
        said.append(f"{pairs} subtracted, {len(comparison.not_subtracted)} not (not_subtracted.csv says why)")
    said += [f"left out: {line}" for line in comparison.left_out[len(compared.problems) :]]
    files = sorted(path.name for path in compared.folder.iterdir() if not path.name.startswith("."))
    return [*said, f"{compared.folder}: {', '.join(files)}"]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with cells under one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _of_run(row: dict[str, Any]) -> list[str]:
    if row["peak_layer"] != row["peak_layer"]:  # NaN
        return [row["run"], "none", "", ""]
    effect = _estimate(row["peak_effect"], row["peak_effect_low"], row["peak_effect_high"])
    share = "" if row["peak_recovered"] != row["peak_recovered"] else f"{row['peak_recovered']:.0%}"
    return [row["run"], row["peak_place"], effect, share]


def _estimate(mean: float, low: float, high: float) -> str:
    return f"{mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low == low else "")


def _of_groups(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What matched runs of two groups differ in."""
    said = []
    for row in rows[:MOST_PAIRS]:
        if not (row["a"] and row["b"]):
            said.append(f"{row['a'] or row['b']}: {row['reason']}")
            continue
        said.append(f"{row['a']} - {row['b']} ({row['differing'] or 'the same settings'}):")
        if isinstance(row["reason"], str):
            said.append(f"  not subtracted: {row['reason']}")
        elif row["largest_difference"] == 0:
            said.append(f"  the same {row['quantity']} on the images of both")
        else:
            apart = _estimate(row["largest_difference"], row["largest_low"], row["largest_high"])
            p = f", p = {row['largest_p']:.3f}" if row["largest_p"] == row["largest_p"] else ""
            said.append(f"  {row['quantity']} differs most, of all layers, at layer {row['largest_layer']}: {apart}{p}")
    if len(rows) > MOST_PAIRS:
        said.append(f"… and {len(rows) - MOST_PAIRS} more pairs: matched.csv")
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="vitpatch-compare", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's folder, or a sweep's")
    parser.add_argument(
        "--output", type=Path, help="where all goes (default: comparison/ in DIR; of several DIRs: here)"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="draw each run's own pictures again instead, into the run or --output"
    )
    given = parser.parse_args(arguments)
    from vitpatch.errors import VitPatchError

    try:
        problems = (_redrawn if given.redraw else _compared)(given.folders, given.output)
    except (VitPatchError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def _compared(folders: Sequence[Path], output: Path | None) -> Sequence[str]:
    """Compares and prints; what could not be compared."""
    result = compare(folders, output)
    print("\n".join(lines(result)))
    return result.problems


def _redrawn(folders: Sequence[Path], output: Path | None) -> Sequence[str]:
    """Draws runs' own pictures; what could not be drawn, after which the others go on."""
    from vitpatch.compare.load import found_below
    from vitpatch.compare.redrawn import places, redraw
    from vitpatch.errors import VitPatchError

    problems = []
    for run, into in places(found_below(folders), output):
        try:
            pictures = redraw(run, into)
        except VitPatchError as error:
            problems.append(str(error))
            continue
        print(f"{pictures[0].parent}: {', '.join(sorted(path.name for path in pictures))}")
    return problems


if __name__ == "__main__":
    main()
