"""Comparison → the tables of its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from vitpatch.compare.cells import (
    NONE,
    Cell,
    Table,
    bounded,
    estimate,
    is_known,
    number,
    p_value,
    run_links,
    said,
    text,
    without_empty,
)
from vitpatch.compare.comparison import Comparison
from vitpatch.compare.run_labels import run_labels

MOST_ROWS = 300
"""Rows of a table; the csv files have all."""
WHAT = {
    "model": "model",
    "data": "data",
    "corruption": "corruption",
    "strength": "strength",
    "site": "site",
    "tokens": "tokens",
    "heads": "heads",
    "windows": "windows",
    "direction": "direction",
    "donor": "donor",
    "metric": "metric",
    "include": "images included",
    "n": "images",
    "n_clusters": "clusters",
    "depth": "blocks",
    "weights": "weights",
    "data_digest": "data digest",
    "code": "code",
}
"""Columns of ``overview`` that say what was run, and their names."""
Rows = Sequence[dict[str, Any]]


def common(comparison: Comparison) -> list[tuple[str, str]]:
    """What all runs have in common, (name, value) each."""
    overview = comparison.overview
    alike = [column for column in WHAT if overview[column].astype(str).nunique() == 1]
    pairs = [(WHAT[column], overview[column].iloc[0]) for column in alike]
    return [(name, str(value)) for name, value in pairs if is_known(value)]


def run_cells(comparison: Comparison) -> dict[str, Cell]:
    """By run's name the cell that names it, with its links."""
    overview = comparison.overview
    labels = run_labels(list(overview["run"]))
    return {row["run"]: Cell(labels[row["run"]], None, run_links(row)) for row in overview.to_dict("records")}


def what_was_run(comparison: Comparison) -> Table:
    """A row a run: what is not the same in all, and its base runs."""
    overview, cells = comparison.overview, run_cells(comparison)
    apart = [column for column in WHAT if overview[column].astype(str).nunique() > 1]
    rows = [
        (
            cells[row["run"]],
            *(_plain(row[column]) for column in apart),
            *(number(row[f"{what}_{base}"]) for what in ("accuracy", "prob") for base in ("clean", "corrupt")),
            estimate(*(row[f"total_effect{end}"] for end in ("", "_low", "_high"))),
            text(row["calibrated"]),
            number(row["seconds"], ".1f"),
            text(row["notes"]),
        )
        for row in overview.to_dict("records")
    ]
    bases = ("accuracy, clean", "accuracy, corrupt", "probability, clean", "probability, corrupt")
    headings = ("run", *(WHAT[column] for column in apart), *bases)
    headings += ("total effect [95 %]", "calibrated strength", "seconds", "notes")
    return without_empty(Table("The runs, and their clean and corrupted base runs", headings, tuple(rows)))


def _plain(value: Any) -> Cell:
    """A setting: words, or a number that sorts as one."""
    if isinstance(value, bool | str) or not is_known(value):
        return text(value)
    return replace(number(value, "g"), text=f"{value:g}")


def settings(comparison: Comparison) -> Table:
    """A row a run, a column a setting that is not the same in all."""
    table, cells = comparison.settings, run_cells(comparison)
    rows = [(cell, *(text(value) for value in table[run])) for run, cell in cells.items()]
    return without_empty(Table("Settings that are not the same in all runs", ("run", *table.index), tuple(rows)))


def peaks(comparison: Comparison) -> Table:
    """A row a run: where its effect is largest, and how sure that is."""
    cells = run_cells(comparison)
    rows = tuple(_peak(row, cells[row["run"]]) for row in comparison.overview.to_dict("records"))
    tested = {run.manifest.get("statistics", {}).get("tests") for run in comparison.runs} - {None}
    of = f" of {tested.pop().replace('_', ' ')}" if len(tested) == 1 else ""
    headings = ("run", "peak", "relative depth", "effect [95 %]", "share recovered [95 %]", f"p{of}, corrected")
    headings += ("95 % peak set", "stability", "effect, split halves", "calibrated strength")
    return without_empty(Table("The peak of each run", headings, rows))


def _peak(row: dict[str, Any], run: Cell) -> tuple[Cell, ...]:
    has_one = is_known(row["peak_layer"])
    place = Cell(row["peak_place"], f"{row['peak_layer']:g}", is_number=True) if has_one else text(None)
    return (
        run,
        place,
        number(row["peak_relative_depth"], ".2f"),
        estimate(*(row[f"peak_effect{end}"] for end in ("", "_low", "_high"))),
        estimate(*(row[f"peak_recovered{end}"] for end in ("", "_low", "_high")), ".0%"),
        p_value(row["peak_p"]),
        text(row["peak_set"].removeprefix("layers ").removeprefix("layer ") if is_known(row["peak_set"]) else None),
        number(row["peak_stability"], ".0%"),
        number(row["peak_effect_split_halves"], "+.3f"),
        text(row["calibrated"]),
    )


def differences(comparison: Comparison) -> Table:
    """A row a pair that is subtracted: the patch where the two differ most."""
    cells = run_cells(comparison)
    rows = [_pair(row, cells) for row in largest(comparison.differences)]
    shown, more = bounded(rows, MOST_ROWS, "differences.csv")
    headings = ("run a", "run b", "of", "where they differ most", "a", "b", "a − b [95 %]", "p, corrected")
    headings += ("images", "clusters", "caution")
    return without_empty(Table("Paired differences, on images included in both", headings, shown, more))


def largest(differences: pd.DataFrame) -> Rows:
    """The patch with the largest difference of each pair; the pairs from the largest on, effects before shares."""
    if not len(differences):
        return []
    size = differences["difference"].abs()
    at = size.groupby([differences["a"], differences["b"]], sort=False).idxmax().dropna()
    found = differences.loc[at].assign(size=size.loc[at])
    return found.sort_values(["quantity", "size"], ascending=[True, False], kind="stable").to_dict("records")


def place_words(row: dict[str, Any]) -> str:
    """The patch of a row of ``differences`` in words."""
    words = [f"layer {row['layer']}"]
    if row["head"] >= 0:
        words.append(f"head {row['head']}")
    if row["tokens"] != "all":
        words.append(str(row["tokens"]))
    return ", ".join(words)


def _pair(row: dict[str, Any], cells: dict[str, Cell]) -> tuple[Cell, ...]:
    form = difference_form(row["quantity"])
    return (
        cells[row["a"]],
        cells[row["b"]],
        text("share recovered" if row["quantity"] == "recovered" else row["quantity"]),
        Cell(place_words(row), f"{row['layer']:g}", is_number=True),
        number(row["value_a"], form),
        number(row["value_b"], form),
        estimate(row["difference"], row["low"], row["high"], form),
        p_value(row["p"]),
        number(row["n"], ".0f"),
        number(row["n_clusters"], ".0f"),
        text(row["caution"]),
    )


def not_subtracted(comparison: Comparison) -> Table:
    """A row a pair that has no difference, and why."""
    cells = run_cells(comparison)
    rows = [
        (_named(row["a"], cells), _named(row["b"], cells), text(row["reason"]))
        for row in comparison.not_subtracted.to_dict("records")
    ]
    shown, more = bounded(rows, MOST_ROWS, "not_subtracted.csv")
    return Table("Pairs that are not subtracted", ("run a", "run b", "why"), shown, more)


def difference_form(quantity: str) -> str:
    """The format of differences and of what is subtracted; shares are no percentages here, which could be read as of
    one another."""
    return "+.2f" if quantity == "recovered" else "+.3f"


def _named(run: str, cells: dict[str, Cell]) -> Cell:
    return cells[run] if run else text(None)


def matched(comparison: Comparison) -> Table:
    """A row a pair of counterparts of two groups, or a run without one."""
    cells = run_cells(comparison)
    rows = []
    for row in comparison.matched.to_dict("records"):
        sides = [number(row[f"{name}_{side}"], form) for name, form in _OF_SIDES.items() for side in "ab"]
        form = difference_form(row["quantity"])
        apart = estimate(*(row[f"largest_{name}"] for name in ("difference", "low", "high")), form)
        where, p = number(row["largest_layer"], ".0f"), p_value(row["largest_p"])
        words = (text(row["quantity"]), apart, where, p, text(row["reason"]))
        rows.append((_named(row["a"], cells), _named(row["b"], cells), text(row["differing"]), *sides, *words))
    names = ("total effect", "peak layer", "peak effect")
    headings = ("run a", "run b", "settings that differ", *(f"{name}, {side}" for name in names for side in "ab"))
    headings += ("of", "largest difference [95 %]", "at layer", "p, corrected", "not subtracted because")
    shown, more = bounded(rows, MOST_ROWS, "matched.csv")
    return without_empty(Table("Counterparts in the groups", headings, shown, more))


_OF_SIDES = {"total_effect": "+.3f", "peak_layer": ".0f", "peak_effect": "+.3f"}


def beside(comparison: Comparison, columns: dict[str, str], caption: str, form: str = "+.3f") -> Table:
    """A row a run and patch that has one of ``columns`` of ``profiles`` (by column its name), with their intervals."""
    there = {column: name for column, name in columns.items() if column in comparison.profiles}
    known = comparison.profiles.dropna(subset=list(there), how="all") if there else comparison.profiles.iloc[:0]
    cells, rows = run_cells(comparison), []
    for row in known.to_dict("records"):
        estimates = [_with_interval(row, column, form) for column in there]
        rows.append((cells[row["run"]], number(row["layer"], ".0f"), text(row["series"]), *estimates))
    headings = ("run", "layer", "series", *(f"{name} [95 %]" for name in there.values()))
    shown, more = bounded(rows, MOST_ROWS, "profiles.csv")
    table = Table(caption, headings, shown, more)
    return without_empty(table) if rows else table


def _with_interval(row: dict[str, Any], column: str, form: str) -> Cell:
    return estimate(row[column], row.get(f"{column}_low"), row.get(f"{column}_high"), form)


def rank_correlation(comparison: Comparison) -> Table:
    """Runs × runs."""
    table, cells = comparison.rank_correlation, run_cells(comparison)
    labels = run_labels(list(table.columns))
    rows = [(cells[run], *(number(value, ".2f") for value in table.loc[run])) for run in table.index]
    return Table("Spearman’s rank correlation of layer profiles", ("run", *labels.values()), tuple(rows))


def said_estimate(row: dict[str, Any], column: str, form: str = "+.3f") -> str:
    """A value of a row with its interval, in words."""
    return _with_interval(row, column, form).text


def said_number(value: Any, form: str) -> str:
    """A number in words, or a dash."""
    return said(value, form) if is_known(value) else NONE
