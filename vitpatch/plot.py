"""What runs draw, for notebooks: each function draws on one matplotlib ``Axes`` and returns it.

``table`` is what ``vitpatch.patch`` returned, or a finished run, or what ``vitpatch.show`` returned of them, or
``vitpatch.summarize``, which does not say what its effects are on. ``ax=None`` makes a figure of the usual size with
pyplot. All raise ``VitPatchError`` for a table that has not the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from vitpatch.errors import VitPatchError
from vitpatch.formatting import first_few
from vitpatch.plots import layout
from vitpatch.plots.examples import draw_page
from vitpatch.plots.handover import draw_handover
from vitpatch.plots.heatmaps import draw_heads
from vitpatch.plots.maps import draw_maps, rows_over_image
from vitpatch.plots.peak import draw_strength
from vitpatch.plots.profile import References, draw_profile, draw_windows
from vitpatch.plots.run_figures import profile_references, run_caption
from vitpatch.schema import PATCH_COLUMNS
from vitpatch.stats.result import is_handover, series_names
from vitpatch.stats.summary import single_rows
from vitpatch.stats.table import result_of
from vitpatch.types import Estimate

EFFECT = "mean effect"


@dataclass(frozen=True)
class Numbers:
    """What is drawn: a summary with a column ``series``, what its effects are compared with, and what they are."""

    summary: pd.DataFrame
    references: References
    label: str = EFFECT


def profile(table: Any, ax: Axes | None = None) -> Axes:
    """Mean effect by layer with its intervals, and the total effect."""
    numbers = _read("profile", table)
    ax = _make_axes(ax, layout.figure_width(numbers.summary["layer"].nunique()), 4.4)
    draw_profile(ax, numbers.summary, numbers.references, numbers.label)
    ax.legend(frameon=False, fontsize=8)
    return ax


def heads(table: Any, ax: Axes | None = None) -> Axes:
    """Mean effect, layer × head, of one token group and window."""
    numbers = _read("heads", table)
    rows = numbers.summary
    if not (rows["head"] >= 0).all():
        raise VitPatchError("heads: the table has no single heads; patch with target=z, for instance")
    _check_one("heads", rows, "tokens", "window")
    ax = _make_axes(ax, 2.6 + 0.5 * rows["head"].nunique(), 1.6 + 0.32 * rows["layer"].nunique())
    layout.add_colour_bar(draw_heads(ax, rows), ax, None, numbers.label.replace("\n", " "))
    return ax


def handover(table: Any, ax: Axes | None = None) -> Axes:
    """Share of the total effect recovered at CLS and at the image patches, by layer."""
    rows = _read("handover", table).summary
    if not is_handover(rows):
        raise VitPatchError("handover: is of resid_post at CLS and at patches; patch with tokens=['cls', 'patches']")
    _check_one("handover", rows, "window")
    if rows["recovered"].isna().any():
        raise VitPatchError("handover: recovered is empty: the interval of the total effect holds 0, or it is none")
    ax = _make_axes(ax, 8, 4.8)
    draw_handover(ax, rows)
    ax.legend(frameon=False, fontsize=8)
    return ax


def maps(table: Any, ax: Axes | None = None) -> Axes:
    """Mean effect over the image, a map a layer; a dot where the 95 % interval leaves 0 out."""
    numbers = _read("maps", table)
    at = rows_over_image(numbers.summary)
    if at is None:
        raise VitPatchError("maps: the table has no places over the image; patch with tokens=each, or grid")
    ax = _make_axes(ax, 2.2 * min(4, len(at)) + 1.2, 2.3 * -(-len(at) // 4) + 0.9)
    layout.add_colour_bar(draw_maps(ax, numbers.summary, at), ax, None, numbers.label.replace("\n", " "))
    return ax


def windows(table: Any, ax: Axes | None = None) -> Axes:
    """Mean effect of windows of each size, and the sums of the effects of their layers where these are known."""
    numbers = _read("windows", table)
    rows = numbers.summary
    if rows["window"].nunique() < 2:
        raise VitPatchError("windows: the table has one window; patch with window=[1,3], for instance")
    _check_one("windows", rows, "tokens", "head")
    ax = _make_axes(ax, layout.figure_width(rows["layer"].nunique()), 4.4)
    sums = {row: rows["effect"].iloc[alone].sum() for row, alone in single_rows(rows).items()}
    draw_windows(ax, rows, pd.DataFrame({"sum": sums}), numbers.references.total, numbers.label)
    ax.legend(frameon=False, fontsize=8)
    return ax


def examples(run: Any, ax: Axes | None = None, page: str | None = None) -> Axes:
    """Images of a finished run and what patching does to each; ``page``: ``largest``, ``sorted`` or ``random``."""
    result = _result("examples", run)
    pages = {one.name: one for one in run.pages}
    if page is not None and page not in pages:
        raise VitPatchError(f"page {page!r}: unknown; use {' or '.join(pages)}")
    chosen = pages[page] if page else pages.get("sorted", list(pages.values())[-1])
    summary = result.summary.assign(series=series_names(result.summary))
    ax = _make_axes(ax, 10, 8)
    parts = [ax]
    if rows_over_image(summary) is None:
        ax.set_axis_off()
        parts = [ax.inset_axes((0, 0.32, 1, 0.68)), ax.inset_axes((0, 0, 1, 0.26))]
    draw_page(parts, result, chosen, summary)
    return ax


def strength(run: Any, ax: Axes | None = None) -> Axes:
    """The damage by strength of the corruption of a finished run that was calibrated."""
    _result("strength", run)
    if not run.manifest.get("calibration"):
        raise VitPatchError("strength: the run was not calibrated; one with calibrate=prob_drop:0.2 is, for instance")
    ax = _make_axes(ax, 7.5, 4.6)
    draw_strength(ax, run.manifest["calibration"])
    ax.legend(frameon=False, fontsize=8)
    return ax


def _make_axes(ax: Axes | None, width: float, height: float) -> Axes:
    return pyplot.figure(figsize=(width, height), layout=layout.FitOnce()).add_subplot() if ax is None else ax


def _result(name: str, run: Any) -> Any:
    """The result of a finished run."""
    if not hasattr(run, "pages"):
        raise VitPatchError(f"{name}: got {type(run).__name__}; expected a finished run")
    return run.result


def _read(name: str, table: Any) -> Numbers:
    """What is drawn of a run, of what ``patch`` returned, or of what ``summarize`` returned."""
    if hasattr(table, "result") or (isinstance(table, pd.DataFrame) and "example_id" in table):
        result = result_of(name, table)
        summary = result.summary.assign(series=series_names(result.summary))
        return Numbers(summary, profile_references(result), run_caption(result, "").effect)
    if not isinstance(table, pd.DataFrame) or table.empty:
        raise VitPatchError(
            f"{name}: got {type(table).__name__}; give what vitpatch.patch or vitpatch.summarize returned"
        )
    needed = (*PATCH_COLUMNS, "effect", "effect_low", "effect_high", "effect_sim_low", "effect_sim_high", "recovered")
    if missing := [column for column in needed if column not in table]:
        raise VitPatchError(f"{name}: the table lacks {first_few(missing, 3)}; give what vitpatch.summarize returned")
    table = table.reset_index(drop=True)
    return Numbers(table.assign(series=series_names(table)), References(_total_of(table)))


def _total_of(summary: pd.DataFrame) -> Estimate:
    """The mean total effect as far as a summary tells it: where it has a share of it."""
    known = summary[summary["recovered"].abs() > 0]
    rows = known.loc[known["effect"].abs().nlargest(1).index]
    return Estimate(float((rows["effect"] / rows["recovered"]).mean()), np.nan, np.nan, np.nan)


def _check_one(name: str, rows: pd.DataFrame, *columns: str) -> None:
    """Raises ``VitPatchError`` where rows have several values of a column."""
    for column in columns:
        if len(values := rows[column].unique()) > 1:
            found = first_few([str(value) for value in values], 4)
            raise VitPatchError(f"{name}: {column} {found}; give the rows of one, as table[table.{column} == ...]")
