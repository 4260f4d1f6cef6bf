"""The tables of a comparison's page: columns that show rounded values and sort by the true ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import pandas as pd

from vitpatch.compare.load import Comparison
from vitpatch.titles import run_labels

NONE = "–"
"""What is shown for an unknown value."""
MAX_ROWS = 300
"""Rows of a table; the csv files have all."""
RUN_COLUMNS = {
    name: name for name in "model data corruption strength site tokens heads windows direction donor metric".split()
} | {
    "include": "images included",
    "n": "images",
    "n_clusters": "clusters",
    "depth": "blocks",
    "weights": "weights",
    "data_digest": "data digest",
    "code": "code",
}
"""Columns of ``overview`` with what was run, and their headings."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Link:
    """A word that leads to an address, and what it is in full."""

    word: str
    address: str
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """``text`` as displayed; ``sort`` what it sorts by, ``None`` = the text, "" = last; ``links`` after the text."""

    text: str
    sort: str | None = None
    links: tuple[Link, ...] = ()
    is_number: bool = False


@dataclass(frozen=True)
class Column:
    """A column's heading, and how its cell is made of a row."""

    heading: str
    cell: Callable[[Row], Cell]


@dataclass(frozen=True)
class Table:
    """``caption`` says what the rows are; ``headings`` stand over the columns; ``more`` what is left out, in words."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    more: str = ""


def make_table(
    caption: str, columns: Sequence[Column], rows: Sequence[Row], file: str = "", keep_empty: bool = False
) -> Table:
    """The first ``MAX_ROWS`` rows, ``file`` having all; without columns that are empty throughout."""
    cells = [[column.cell(row) for row in rows[:MAX_ROWS]] for column in columns]
    kept = [i for i, of_column in enumerate(cells) if keep_empty or any(cell.text != NONE for cell in of_column)]
    more = f"{MAX_ROWS} of {len(rows)} rows; all are in {file}" if len(rows) > MAX_ROWS else ""
    shown = tuple(zip(*(cells[i] for i in kept), strict=True))
    return Table(caption, tuple(columns[i].heading for i in kept), shown, more)


def words(heading: str, key: str) -> Column:
    """A column of words."""
    return Column(heading, lambda row: text_cell(row[key]))


def numbers(heading: str, key: str, form: str = ".3f") -> Column:
    """A column of numbers in a format of ``format``."""
    return Column(heading, lambda row: number_cell(row[key], form))


def estimates(heading: str, key: str, form: str = "+.3f") -> Column:
    """A column of means with their intervals, from the keys ``key``, ``key_low`` and ``key_high``."""
    return Column(heading, lambda row: estimate_cell(*estimate_of(row, key), form))


def p_values(heading: str, key: str) -> Column:
    """A column of p-values."""
    return Column(heading, lambda row: p_cell(row[key]))


def is_known(value: Any) -> bool:
    """Whether there is a value: not ``None``, NaN, ``pd.NA`` or ""."""
    return not (value is None or str(value) in ("", "nan", "<NA>", "NaT"))


def text_cell(value: Any) -> Cell:
    """Words, or a dash."""
    return Cell(str(value), None) if is_known(value) else Cell(NONE, "")


def number_cell(value: Any, form: str = ".3f") -> Cell:
    """A number, or a dash."""
    return Cell(format_number(value, form), repr(float(value)) if is_known(value) else "", is_number=True)


def estimate_cell(mean: Any, low: Any, high: Any, form: str = "+.3f") -> Cell:
    """A mean with its interval, where there is one; sorts by the mean."""
    return replace(number_cell(mean), text=format_estimate(mean, low, high, form))


def p_cell(value: Any) -> Cell:
    """A p-value; one too small for the number of sign flips is a bound."""
    cell = number_cell(value)
    return replace(cell, text="< 0.001") if is_known(value) and value < 0.001 else cell


def format_number(value: Any, form: str) -> str:
    """A number with a true minus sign, ∞ where it is infinite; a dash where it is not known."""
    if not is_known(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return format(value, form).replace("-", "−")


def format_estimate(mean: Any, low: Any, high: Any, form: str = "+.3f") -> str:
    """``+0.123 [+0.100, +0.150]``, as far as it is known."""
    is_interval = is_known(mean) and is_known(low) and is_known(high)
    interval = f" [{format_number(low, form)}, {format_number(high, form)}]" if is_interval else ""
    return format_number(mean, form) + interval


def estimate_of(row: Row, key: str) -> tuple[Any, Any, Any]:
    """Mean and interval of a row, from the keys ``key``, ``key_low`` and ``key_high``."""
    return row[key], row.get(f"{key}_low"), row.get(f"{key}_high")


def difference_format(quantity: str) -> str:
    """The format of differences and of what is subtracted. Shares are no percentages here, which could be read as of
    one another."""
    return "+.2f" if quantity == "recovered" else "+.3f"


def run_links(row: Row) -> tuple[Link, ...]:
    """The links of a run, from its row of ``overview``: folder, config, W&B; a W&B address that is no web page's is
    left out."""
    links = [Link("folder", relative_address(f"{row['folder']}/"), "folder of the run")]
    if is_known(row["config"]):
        links.append(Link("config", relative_address(row["config"]), "composed config of the run"))
    url = str(row["wandb_url"])
    if urlsplit(url).scheme in ("http", "https"):
        links.append(Link("W&B", url, "run in Weights & Biases"))
    return tuple(links)


def relative_address(path: str) -> str:
    """A relative path as an address; one that could be read as a scheme or a host begins with ``./``."""
    quoted = quote(path, safe="/=,@+~")
    return quoted if PurePosixPath(path).parts[:1] == ("..",) else f"./{quoted.lstrip('/')}"


def run_column(comparison: Comparison, heading: str = "run", key: str = "run") -> Column:
    """A column that names a run by its short name, with its links; a dash where there is no run."""
    overview = comparison.overview
    labels = run_labels(list(overview["run"]))
    cells = {row["run"]: Cell(labels[row["run"]], None, run_links(row)) for row in overview.to_dict("records")}
    return Column(heading, lambda row: cells.get(row[key]) or text_cell(None))


def shared_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What is the same in all runs, (name, value) each."""
    overview = comparison.overview
    same = [column for column in RUN_COLUMNS if overview[column].astype(str).nunique() == 1]
    values = [(RUN_COLUMNS[column], overview[column].iloc[0]) for column in same]
    return [(name, str(value)) for name, value in values if is_known(value)]


def runs_table(comparison: Comparison) -> Table:
    """A row a run: what differs between runs, and the base runs."""
    overview = comparison.overview
    differing = [column for column in RUN_COLUMNS if overview[column].astype(str).nunique() > 1]
    columns = [
        run_column(comparison),
        *(Column(RUN_COLUMNS[column], lambda row, key=column: _setting_cell(row[key])) for column in differing),
        numbers("accuracy, clean", "accuracy_clean"),
        numbers("accuracy, corrupt", "accuracy_corrupt"),
        numbers("probability, clean", "prob_clean"),
        numbers("probability, corrupt", "prob_corrupt"),
        estimates("total effect [95 %]", "total_effect"),
        words("calibrated strength", "calibrated"),
        numbers("seconds", "seconds", ".1f"),
        words("notes", "notes"),
    ]
    return make_table("The runs, and their clean and corrupted base runs", columns, overview.to_dict("records"))


def _setting_cell(value: Any) -> Cell:
    """A setting: words, or a number that sorts as one."""
    if isinstance(value, bool | str) or not is_known(value):
        return text_cell(value)
    return replace(number_cell(value), text=f"{value:g}")


def settings_table(comparison: Comparison) -> Table:
    """A row a run, a column a setting that differs between runs."""
    settings = comparison.settings
    columns = [
        run_column(comparison),
        *(Column(key, lambda row, key=key: text_cell(row[key])) for key in settings.index),
    ]
    rows = [{**settings[run].to_dict(), "run": run} for run in settings.columns]
    return make_table("Settings that are not the same in all runs", columns, rows)


def peaks_table(comparison: Comparison) -> Table:
    """A row a run: where its effect is largest, and how sure that is."""
    tests = {run.manifest.get("statistics", {}).get("tests") for run in comparison.runs} - {None}
    tested = f" of {tests.pop().replace('_', ' ')}" if len(tests) == 1 else ""
    columns = [
        run_column(comparison),
        Column("peak", _peak_cell),
        numbers("relative depth", "peak_relative_depth", ".2f"),
        estimates("effect [95 %]", "peak_effect"),
        estimates("share recovered [95 %]", "peak_recovered", ".0%"),
        p_values(f"p{tested}, corrected", "peak_p"),
        Column("95 % peak set", lambda row: text_cell(str(row["peak_set"]).partition(" ")[2])),
        numbers("stability", "peak_stability", ".0%"),
        numbers("effect, split halves", "peak_effect_split_halves", "+.3f"),
        words("calibrated strength", "calibrated"),
    ]
    return make_table("The peak of each run", columns, comparison.overview.to_dict("records"))


def _peak_cell(row: Row) -> Cell:
    if not is_known(row["peak_layer"]):
        return text_cell(None)
    return Cell(row["peak_place"], f"{row['peak_layer']:g}", is_number=True)


def differences_table(comparison: Comparison) -> Table:
    """A row a pair that is subtracted: the patch where the two differ most."""

    def value(heading: str, key: str) -> Column:
        return Column(heading, lambda row: number_cell(row[key], difference_format(row["quantity"])))

    columns = [
        run_column(comparison, "run a", "a"),
        run_column(comparison, "run b", "b"),
        Column("of", lambda row: text_cell(row["quantity"].replace("recovered", "share recovered"))),
        Column("where they differ most", lambda row: Cell(describe_patch(row), f"{row['layer']:g}", is_number=True)),
        value("a", "value_a"),
        value("b", "value_b"),
        Column("a − b [95 %]", lambda row: difference_cell(row, "difference", "low", "high")),
        p_values("p, corrected", "p"),
        numbers("images", "n", ".0f"),
        numbers("clusters", "n_clusters", ".0f"),
        words("caution", "caution"),
    ]
    rows = largest_differences(comparison.differences)
    return make_table("Paired differences, on images included in both", columns, rows, "differences.csv")


def difference_cell(row: Row, *keys: str) -> Cell:
    """A difference with its interval, from the keys of mean, low and high."""
    return estimate_cell(*(row[key] for key in keys), difference_format(row["quantity"]))


def largest_differences(differences: pd.DataFrame) -> list[dict[str, Any]]:
    """The patch with the largest difference of each pair; the pairs from the largest on, effects before shares."""
    if not len(differences):
        return []
    size = differences["difference"].abs()
    at = size.groupby([differences["a"], differences["b"]], sort=False).idxmax().dropna()
    rows = differences.loc[at].assign(size=size.loc[at])
    return rows.sort_values(["quantity", "size"], ascending=[True, False], kind="stable").to_dict("records")


def describe_patch(row: Row) -> str:
    """The patch of a row of ``differences`` in words."""
    parts = [f"layer {row['layer']}"]
    if row["head"] >= 0:
        parts.append(f"head {row['head']}")
    if row["tokens"] != "all":
        parts.append(str(row["tokens"]))
    return ", ".join(parts)


def not_subtracted_table(comparison: Comparison) -> Table:
    """A row a pair without a difference, and why."""
    columns = [run_column(comparison, "run a", "a"), run_column(comparison, "run b", "b"), words("why", "reason")]
    rows = comparison.not_subtracted.to_dict("records")
    return make_table("Pairs that are not subtracted", columns, rows, "not_subtracted.csv")


def matched_table(comparison: Comparison) -> Table:
    """A row a pair of matching runs of two groups, or a run without a match."""
    quantities = {"total_effect": "+.3f", "peak_layer": ".0f", "peak_effect": "+.3f"}
    columns = [
        run_column(comparison, "run a", "a"),
        run_column(comparison, "run b", "b"),
        words("settings that differ", "differing"),
        *(
            numbers(f"{name.replace('_', ' ')}, {side}", f"{name}_{side}", form)
            for name, form in quantities.items()
            for side in "ab"
        ),
        words("of", "quantity"),
        Column(
            "largest difference [95 %]",
            lambda row: difference_cell(row, "largest_difference", "largest_low", "largest_high"),
        ),
        numbers("at layer", "largest_layer", ".0f"),
        p_values("p, corrected", "largest_p"),
        words("not subtracted because", "reason"),
    ]
    rows = comparison.matched.to_dict("records")
    return make_table("Counterparts in the groups", columns, rows, "matched.csv")


def profiles_table(comparison: Comparison, columns: Mapping[str, str], caption: str) -> Table:
    """A row a run and patch that has one of ``columns`` of ``profiles`` (by column its name), with their intervals."""
    present = {column: name for column, name in columns.items() if column in comparison.profiles}
    rows = comparison.profiles.dropna(subset=list(present), how="all").to_dict("records") if present else []
    declared = [
        run_column(comparison),
        numbers("layer", "layer", ".0f"),
        words("series", "series"),
        *(estimates(f"{name} [95 %]", column) for column, name in present.items()),
    ]
    return make_table(caption, declared, rows, "profiles.csv")


def rank_correlation_table(comparison: Comparison) -> Table:
    """Runs × runs."""
    table = comparison.rank_correlation
    labels = run_labels(list(table.columns))
    columns = [
        Column(labels[run], lambda row, run=run: number_cell(table.loc[row["run"], run], ".2f"))
        for run in table.columns
    ]
    rows = [{"run": run} for run in table.index]
    caption = "Spearman’s rank correlation of layer profiles"
    return make_table(caption, [run_column(comparison), *columns], rows, keep_empty=True)
