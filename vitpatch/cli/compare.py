"""``vitpatch-compare DIR [DIR ...]``: figures, tables and a page over all finished runs below folders."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpatch.formatting import format_interval

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vitpatch.compare.compare import SavedComparison
    from vitpatch.plots.layout import FigureOptions
    from vitpatch.runs.reading import FinishedRun

log = logging.getLogger(__name__)

MAX_PAIRS = 20
"""Matched runs of groups that are printed; ``matched.csv`` has all."""


VIEW = {
    "metric": "the headline metric: prob, log_odds, logit, logit_diff, kl",
    "rival": "whose runner-up logit_diff is taken against: corrupt, clean",
    "include": "the images that means are over: all, clean_correct, flipped, min_total_effect:x",
    "interval": "of resamples: percentile, bca",
    "test": "which effects are tested: log_odds, headline",
}
"""The options that say how runs are read, as the keys of ``patch.py`` do."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = _make_parser().parse_args(arguments)
    from vitpatch.errors import VitPatchError

    try:
        problems = (_redraw_and_print if options.redraw else _compare_and_print)(options)
    except (VitPatchError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitpatch-compare", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's folder, or a sweep's")
    parser.add_argument(
        "--output", type=Path, help="where all goes (default: comparison/ in DIR; of several DIRs: here)"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="draw each run's own pictures again instead, into the run or --output"
    )
    view = parser.add_argument_group(
        "read again",
        "With any of these runs are read again from their files, without a model, into views/<view_id>/ in DIR or "
        "--output: tables, figures and page. The runs stay as they are; what is not given is each run's own.",
    )
    for key, words in VIEW.items():
        view.add_argument(f"--{key}", metavar=key[0].upper(), help=words)
    view.add_argument("--format", metavar="F,F", help="of figures: png, svg, pdf, or several of them")
    view.add_argument("--width", type=float, metavar="INCHES", help="of a run's figures, for print")
    view.add_argument("--font", metavar="NAME", help="the family of a run's figures' letters")
    view.add_argument("--title", metavar="T", help="of the page and, of one run, of its figures; '' = none")
    return parser


def _compare_and_print(options: argparse.Namespace) -> Sequence[str]:
    """The errors of runs that could not be compared."""
    from vitpatch.compare.compare import Reading, compare

    changes = {key: value for key in VIEW if (value := getattr(options, key)) is not None}
    reading = None
    if changes or any(getattr(options, name) is not None for name in ("format", "width", "font", "title")):
        reading = Reading(changes, _figure_options(options, ("png",), None), options.title)
    result = compare(options.folders, options.output, reading)
    print("\n".join(summary_lines(result)))
    return result.problems


def _figure_options(options: argparse.Namespace, formats: Sequence[str], dpi: int | None) -> FigureOptions:
    """How figures are drawn; ``formats`` and ``dpi`` are those of the run, where the command has none.

    Raises ``VitPatchError`` for what is no format, width or installed font.
    """
    from matplotlib import font_manager

    from vitpatch.checks import Positive, check, read_formats, suggest
    from vitpatch.errors import VitPatchError
    from vitpatch.plots.layout import FigureOptions

    if options.format is not None:
        formats = read_formats("--format", options.format.split(","))
    if options.width is not None:
        check("--width", options.width, Positive)
    if options.font is not None:
        known = {font.name for font in font_manager.fontManager.ttflist} | set(font_manager.font_family_aliases)
        if options.font not in known:
            near = suggest(options.font, sorted(known))
            raise VitPatchError(f"--font {options.font!r}: matplotlib finds no such font; {near}")
    return FigureOptions(tuple(formats), dpi or FigureOptions.dpi, options.width, options.font)


def _redraw_and_print(options: argparse.Namespace) -> Sequence[str]:
    """The errors of runs that could not be drawn, after which the others go on; below an output by the run's name."""
    from vitpatch.compare.load import find_runs
    from vitpatch.errors import VitPatchError
    from vitpatch.runs.reading import load_run

    for key in VIEW:
        if getattr(options, key) is not None:
            raise VitPatchError(f"--{key} with --redraw: which draws runs as they are; leave one of them out")
    problems = []
    for location in find_runs(options.folders):
        folder = location.folder.path if options.output is None else options.output / location.name
        try:
            run = load_run(location)
            own = run.config.get("figures", {})
            drawing = _figure_options(options, own.get("format", ("png",)), own.get("dpi"))
            if options.title is not None:
                run = replace(run, manifest=run.manifest | {"title": options.title})
            pictures = redraw(run, folder, drawing)
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
    from vitpatch.compare.charts import FORMATS
    from vitpatch.compare.compare import PAGE, compare
    from vitpatch.runs.config import read_figures
    from vitpatch.runs.tracking import Results, RunInfo, make_tracker

    compared = compare([root], formats=dict.fromkeys((*FORMATS, *read_figures(cfg.figures)[0])))
    for warning in (*compared.comparison.warnings, *compared.problems):
        log.warning("comparison: %s", warning)
    log.info("comparison: %s", compared.folder / PAGE)
    if not track:
        return
    config = {"sweep": str(cfg.sweep), "runs": [run.name for run in compared.comparison.runs]}
    with make_tracker(cfg).run(RunInfo(compared.folder, str(cfg.sweep), config, job_type="compare")) as tracked:
        kinds = (".csv", ".png", ".svg", ".pdf", ".html")
        files = {path.name: path for path in sorted(compared.folder.iterdir()) if path.suffix in kinds}
        pictures = {f"figure/{path.stem}": [path] for path in files.values() if path.suffix == ".png"}
        tables = {f"table/{name}": table for name, table in compared.comparison.tables.items()}
        tracked.log(Results("comparison", tables, pictures, files, page=compared.folder / PAGE))
    if tracked.sync_command:
        log.info("  W&B offline   %s", tracked.sync_command)


def redraw(run: FinishedRun, folder: Path, options: FigureOptions) -> list[Path]:
    """Draws the pictures of a run from its files into a folder's ``figures/``; the paths of the pictures.

    Raises ``VitPatchError`` where the run's files are of another version, or broken.
    """
    import pyarrow as pa

    from vitpatch.plots.run_figures import draw
    from vitpatch.runs.folder import RunFolder
    from vitpatch.runs.reading import broken_run

    try:
        figures = draw(run.result, run.pages, run.manifest, options)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise broken_run(run.folder, "of another version, or a file is broken", error) from error
    folder.mkdir(parents=True, exist_ok=True)
    return [file for files in RunFolder(folder).save_figures(figures, options).values() for file in files]


if __name__ == "__main__":
    main()
