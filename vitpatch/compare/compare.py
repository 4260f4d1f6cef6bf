"""Finished runs below folders → their comparison: tables, figures and a page, from the runs' files alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vitpatch.compare.charts import FORMATS, save_figure
from vitpatch.compare.figures import FILES, make_figures
from vitpatch.compare.load import (
    COMPARISON,
    Comparison,
    find_runs,
    fixed_overrides,
    list_unfinished,
)
from vitpatch.compare.overview import overview_table, profiles_table, rank_correlation_table
from vitpatch.compare.page import write_page
from vitpatch.compare.pairs import MAX_RUNS, choose_pairs, matched_table, subtract_pairs
from vitpatch.compare.settings import consistency_warnings, match_groups, run_settings, settings_table
from vitpatch.errors import VitPatchError
from vitpatch.formatting import digest
from vitpatch.io import write_csv
from vitpatch.plots.layout import FigureOptions
from vitpatch.runs.folder import VIEWS
from vitpatch.runs.reading import FinishedRun, RunLocation, load_run
from vitpatch.study import View, read_view

PAGE = "index.html"


@dataclass(frozen=True)
class SavedComparison:
    """A comparison with the folder that its files are in, and the errors of runs that are left out, a line each."""

    comparison: Comparison
    folder: Path
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """How finished runs are read again: with what ``changes`` of their views, by key, and how figures are drawn.

    ``title`` is that of the page and, of one run, of its figures; ``None`` = those of the runs.
    """

    changes: Mapping[str, str]
    figures: FigureOptions
    title: str | None = None

    def read(self, location: RunLocation) -> FinishedRun:
        """A run in the view that is asked for. Raises ``VitPatchError`` where it cannot be read so."""
        run = load_run(location)
        try:
            return run.read(**self.changes)
        except VitPatchError as error:
            path = str(location.folder.path)
            raise VitPatchError(str(error) if path in str(error) else f"{path}: {error}") from error


def compare(
    folders: Sequence[Path],
    output: Path | None = None,
    reading: Reading | None = None,
    formats: Iterable[str] = FORMATS,
) -> SavedComparison:
    """Compares all finished runs in and below folders and writes tables, figures in the ``formats``, and page.

    They go to ``output``; without it to ``comparison/``, in the folder if it is one, else in the working folder. With a
    ``reading`` they go to ``views/<view_id>/`` there, with the summary and the figures of each run, below its name
    where there are several; of one run there is the page without the tables and charts of comparisons.

    A run that is broken, of another version, or cannot be read so is left out and is one of ``problems``. Raises
    ``VitPatchError`` where no run can be compared. Prints nothing.
    """
    if reading is not None:
        read_view(View().as_config() | reading.changes)  # what is wrong for every run is said once
    runs, problems, left_out = [], [], []
    for location in find_runs(folders):
        try:
            runs.append(load_run(location) if reading is None else reading.read(location))
        except VitPatchError as error:
            problems.append(str(error))
            left_out.append(str(error).replace(str(location.folder.path), location.name))  # a page may be sent around
    if not runs:
        raise VitPatchError("; ".join(problems))
    if reading is not None and reading.title is not None and len(runs) == 1:
        runs = [replace(runs[0], manifest=runs[0].manifest | {"title": reading.title})]
    where = COMPARISON if reading is None else f"{VIEWS}/{_view_id(runs)}"
    folder = output or (folders[0] / where if len(folders) == 1 else Path(where))
    comparison = compare_runs(runs, folder, [*left_out, *list_unfinished(folders)], fixed_overrides(folders))
    if reading is None:
        _save(comparison, folder, formats)
    else:
        _save_reading(replace(comparison, title=reading.title or ""), folder, reading.figures)
    return SavedComparison(comparison, folder, tuple(problems))


def _view_id(runs: Sequence[FinishedRun]) -> str:
    """That of the view of all runs; of several views their digest."""
    views = sorted({run.view.view_id for run in runs})
    return views[0] if len(views) == 1 else digest(views)


def _save(comparison: Comparison, folder: Path, formats: Iterable[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if FILES.fullmatch(file.name):  # of an earlier comparison, of which this one may have fewer
            file.unlink()
    for name, table in comparison.tables.items():
        write_csv(folder / f"{name}.csv", table)
    figures = make_figures(comparison)
    for figure in figures:
        if figure.in_file:
            save_figure(figure.draw(comparison), folder / figure.name, formats)
    write_page(comparison, figures, folder / PAGE)


def _save_reading(comparison: Comparison, folder: Path, options: FigureOptions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if len(comparison.runs) == 1:
        comparison.runs[0].save(folder, options)
        write_page(comparison, make_figures(comparison), folder / PAGE)
        return
    for run in comparison.runs:
        run.save(folder / run.name, options)
    _save(comparison, folder, options.formats)


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
