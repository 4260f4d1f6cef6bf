"""Finished runs → their comparison, from their files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitpatch.compare.agreement import disagreements
from vitpatch.compare.comparison import Comparison, FinishedRun
from vitpatch.compare.differences import MOST_RUNS, chosen, subtracted
from vitpatch.compare.groups import counterparts, matched
from vitpatch.compare.overview import overview, profiles
from vitpatch.compare.ranks import rank_correlation
from vitpatch.compare.settings import aspects, settings


def compared(runs: Sequence[FinishedRun], place: Path, left_out: Sequence[str] = ()) -> Comparison:
    """The comparison of runs, whose names differ; ``place`` is the folder that its paths are relative to.

    ``left_out``: what is said of runs that are not compared.
    """
    of_run = {run.name: aspects(run) for run in runs}
    pairs = counterparts(runs, of_run)
    differences, not_subtracted = subtracted(chosen(runs, of_run, pairs), of_run)
    table = overview(runs, place)
    return Comparison(
        runs=tuple(runs),
        warnings=(*disagreements(runs), *_bounded(runs)),
        overview=table,
        profiles=profiles(runs),
        differences=differences,
        not_subtracted=not_subtracted,
        settings=settings(runs),
        rank_correlation=rank_correlation(runs),
        matched=matched(runs, pairs, of_run, table, differences, not_subtracted),
        left_out=tuple(left_out),
    )


def _bounded(runs: Sequence[FinishedRun]) -> list[str]:
    if len(runs) <= MOST_RUNS:
        return []
    return [f"{len(runs)} runs: of more than {MOST_RUNS} only pairs that differ in one setting are subtracted"]
