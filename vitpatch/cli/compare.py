"""``vitpatch-compare DIR [DIR ...]``: figures, tables and a page over all finished runs below folders."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpatch.formatting import format_interval

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vitpatch.compare.compare import SavedComparison
    from vitpatch.runs.folder import RunFolder
    from vitpatch.stats.result import RunResult

log = logging.getLogger(__name__)

MAX_PAIRS = 20
"""Matched runs of groups that are printed; ``matched.csv`` has all."""


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
    options = parser.parse_args(arguments)
    from vitpatch.errors import VitPatchError

    try:
        problems = (_redraw_and_print if options.redraw else _compare_and_print)(options.folders, options.output)
    except (VitPatchError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def _compare_and_print(folders: Sequence[Path], output: Path | None) -> Sequence[str]:
    """The errors of runs that could not be compared."""
    from vitpatch.compare.compare import compare

    result = compare(folders, output)
    print("\n".join(summary_lines(result)))
    return result.problems


def _redraw_and_print(folders: Sequence[Path], output: Path | None) -> Sequence[str]:
    """The errors of runs that could not be drawn, after which the others go on; below ``output`` by the run's name."""
    from vitpatch.compare.load import find_runs
    from vitpatch.errors import VitPatchError

    problems = []
    for location in find_runs(folders):
        try:
            pictures = redraw(location.folder, location.folder.path if output is None else output / location.name)
        except VitPatchError as error:
            problems.append(str(error))
            continue
        print(f"{pictures[0].parent}: {', '.join(sorted(path.name for path in pictures))}")
    return problems


def summary_lines(compared: SavedComparison) -> list[str]:
    """The lines that end a comparison: warnings, runs, matched runs of groups, and where the files are."""
    from vitpatch.formatting import format_count

    comparison = compared.comparison
    rows = [["run", "peak", "effect (95 % interval)", "recovered"]]
    rows += [_run_cells(row) for row in comparison.overview.to_dict("records")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"warning: {warning}" for warning in comparison.warnings]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += _matched_lines(comparison.matched.to_dict("records"))
    if len(comparison.runs) > 1:
        pairs = format_count(len(comparison.differences[["a", "b"]].drop_duplicates()), "pair")
        lines.append(f"{pairs} subtracted, {len(comparison.not_subtracted)} not (not_subtracted.csv says why)")
    lines += [f"left out: {line}" for line in comparison.left_out[len(compared.problems) :]]
    files = sorted(path.name for path in compared.folder.iterdir() if not path.name.startswith("."))
    return [*lines, f"{compared.folder}: {', '.join(files)}"]


def _run_cells(row: dict[str, Any]) -> list[str]:
    if row["peak_layer"] != row["peak_layer"]:  # NaN
        return [row["run"], "none", "", ""]
    effect = format_interval(row["peak_effect"], row["peak_effect_low"], row["peak_effect_high"])
    share = f"{row['peak_recovered']:.0%}"
    if row["peak_recovered"] != row["peak_recovered"]:
        no_total = row["total_effect"] != row["total_effect"]
        share = f"(donor {row['donor']}: no total effect)" if no_total else "(the total effect's interval holds 0)"
    return [row["run"], row["peak_place"], effect, share]


def _matched_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What matched runs of two groups differ in."""
    lines = []
    for row in rows[:MAX_PAIRS]:
        if not (row["a"] and row["b"]):
            lines.append(f"{row['a'] or row['b']}: {row['reason']}")
            continue
        lines.append(f"{row['a']} - {row['b']} ({row['differing'] or 'the same settings'}):")
        if isinstance(row["reason"], str):
            lines.append(f"  not subtracted: {row['reason']}")
        elif row["largest_difference"] == 0:
            lines.append(f"  the same {row['quantity']} on the images of both")
        else:
            estimate = format_interval(row["largest_difference"], row["largest_low"], row["largest_high"])
            p = f", p = {row['largest_p']:.3f}" if row["largest_p"] == row["largest_p"] else ""
            where = f"{row['quantity']} differs most, of all layers, at layer {row['largest_layer']}"
            lines.append(f"  {where}: {estimate}{p}")
    if len(rows) > MAX_PAIRS:
        lines.append(f"… and {len(rows) - MAX_PAIRS} more pairs: matched.csv")
    return lines


def report_sweep(root: Path, cfg: DictConfig, track: bool) -> None:
    """Compares the finished runs in a sweep's folder and logs where the page is; ``cfg`` is the config of one of them.

    ``track``: also logs the comparison to the tracker, as a run of the sweep's group. Raises ``VitPatchError`` where
    nothing can be compared.
    """
    from vitpatch.compare.compare import PAGE, compare
    from vitpatch.runs.tracking import Results, RunInfo, make_tracker

    compared = compare([root])
    for warning in (*compared.comparison.warnings, *compared.problems):
        log.warning("comparison: %s", warning)
    log.info("comparison: %s", compared.folder / PAGE)
    if not track:
        return
    config = {"sweep": str(cfg.sweep), "runs": [run.name for run in compared.comparison.runs]}
    with make_tracker(cfg).run(RunInfo(compared.folder, str(cfg.sweep), config, job_type="compare")) as tracked:
        kinds = (".csv", ".png", ".svg", ".html")
        files = {path.name: path for path in sorted(compared.folder.iterdir()) if path.suffix in kinds}
        pictures = {f"figure/{path.stem}": [path] for path in files.values() if path.suffix == ".png"}
        tables = {f"table/{name}": table for name, table in compared.comparison.tables.items()}
        tracked.log(Results("comparison", tables, pictures, files, page=compared.folder / PAGE))
    if tracked.sync_command:
        log.info("  W&B offline   %s", tracked.sync_command)


def read_result(run: RunFolder) -> tuple[RunResult, dict[str, Any]]:
    """The results of a finished run as they were drawn from, and its manifest."""
    from vitpatch.runs.results import analyze_files
    from vitpatch.study import read_study
    from vitpatch.types import Donor

    manifest = run.read_manifest()
    return analyze_files(run, read_study(manifest["config"]), tuple(map(Donor, manifest["donors"]))), manifest


def redraw(run: RunFolder, folder: Path) -> list[Path]:
    """Draws the pictures of a run from its files into a folder's ``figures/``; the paths of the pictures.

    Raises ``VitPatchError`` where the run's files are of another version, or broken.
    """
    import pyarrow as pa
    from omegaconf.errors import OmegaConfBaseException

    from vitpatch.compare.load import broken_run
    from vitpatch.plots.run_figures import draw
    from vitpatch.runs.folder import RunFolder
    from vitpatch.runs.results import read_pages

    try:
        result, manifest = read_result(run)
        figures = draw(result, read_pages(run.pages), manifest)
    except (OmegaConfBaseException, pa.ArrowException, KeyError, ValueError) as error:
        raise broken_run(run, "of another version, or a file is broken", error) from error
    folder.mkdir(parents=True, exist_ok=True)
    return [file for files in RunFolder(folder).save_figures(figures).values() for file in files]


if __name__ == "__main__":
    main()
