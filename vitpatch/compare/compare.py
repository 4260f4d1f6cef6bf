"""Finished runs below folders → their comparison: tables, figures and a page, from the runs' files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitpatch.compare.charts import save_figure
from vitpatch.compare.figures import FILES, make_figures
from vitpatch.compare.load import (
    COMPARISON,
    Comparison,
    FinishedRun,
    find_runs,
    fixed_overrides,
    list_unfinished,
    load_run,
)
from vitpatch.compare.overview import overview_table, profiles_table, rank_correlation_table
from vitpatch.compare.page import write_page
from vitpatch.compare.pairs import MAX_RUNS, choose_pairs, matched_table, subtract_pairs
from vitpatch.compare.settings import consistency_warnings, match_groups, run_settings, settings_table
from vitpatch.errors import VitPatchError
from vitpatch.io import write_csv

PAGE = "index.html"


@dataclass(frozen=True)
class SavedComparison:
    """A comparison with the folder that its files are in, and the errors of runs that are left out, a line each."""

    comparison: Comparison
    folder: Path
    problems: tuple[str, ...]


def compare(folders: Sequence[Path], output: Path | None = None) -> SavedComparison:
    """Compares all finished runs in and below folders and writes tables, figures and page.

    They go to ``output``; without it to ``comparison/``, in the folder if it is one, else in the working folder.
    A run that is broken or of another version is left out and is one of ``problems``. Raises ``VitPatchError`` where no
    run can be compared. Prints nothing.
    """
    runs, problems, left_out = [], [], []
    for location in find_runs(folders):
        try:
            runs.append(load_run(location))
        except VitPatchError as error:
            problems.append(str(error))
            left_out.append(str(error).replace(str(location.folder.path), location.name))  # a page may be sent around
    if not runs:
        raise VitPatchError("; ".join(problems))
    folder = output or (folders[0] / COMPARISON if len(folders) == 1 else Path(COMPARISON))
    comparison = compare_runs(runs, folder, [*left_out, *list_unfinished(folders)], fixed_overrides(folders))
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if FILES.fullmatch(file.name):  # of an earlier comparison, of which this one may have fewer
            file.unlink()
    for name, table in comparison.tables.items():
        write_csv(folder / f"{name}.csv", table)
    figures = make_figures(comparison)
    for figure in figures:
        if figure.in_file:
            save_figure(figure.draw(comparison), folder / figure.name)
    write_page(comparison, figures, folder / PAGE)
    return SavedComparison(comparison, folder, tuple(problems))


def compare_runs(
    runs: Sequence[FinishedRun], folder: Path, left_out: Sequence[str] = (), fixed: Mapping[str, str] | None = None
) -> Comparison:
    """The comparison of runs, whose names differ; ``folder`` is the folder that its paths are relative to.

    ``left_out``: a line for each run that is not compared; ``fixed`` as in ``Comparison``.
    """
    settings = {run.name: run_settings(run) for run in runs}
    matches = match_groups(runs, settings)
    differences, not_subtracted = subtract_pairs(choose_pairs(runs, settings, matches), settings)
    overview, warnings = overview_table(runs, folder), consistency_warnings(runs)
    if len(runs) > MAX_RUNS:
        bounded = f"{len(runs)} runs: of more than {MAX_RUNS} only pairs that differ in one setting are subtracted"
        warnings = (*warnings, bounded)
    return Comparison(
        runs=tuple(runs),
        warnings=warnings,
        overview=overview,
        profiles=profiles_table(runs),
        differences=differences,
        not_subtracted=not_subtracted,
        settings=settings_table(runs),
        rank_correlation=rank_correlation_table(runs),
        matched=matched_table(runs, matches, settings, overview, differences, not_subtracted),
        left_out=tuple(left_out),
        fixed=fixed or {},
    )
