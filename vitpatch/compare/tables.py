"""The tables of a comparison's page: columns that show rounded values and sort by the true ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import pandas as pd

from vitpatch.compare.load import Comparison
from vitpatch.compare.pairs import largest_differences
from vitpatch.formatting import UNKNOWN, format_interval, run_labels

MAX_ROWS = 300  # rows of a table; the csv files have all
RUN_COLUMNS = {name: name for name in "model data corruption strength site tokens heads windows metric".split()} | {
    "transfer": "what is put into what",
    "include": "images included",
    "n": "images",
    "n_clusters": "clusters",
    "depth": "blocks",
    "weights": "weights",
    "data_digest": "data digest",
    "code": "code",
}
"""Columns of ``overview`` with what was run, and their headings."""
P_VALUE = "p"  # the format of a p-value, beside those of ``format``
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Link:
    """A word that links to an address; ``title`` says what is there."""

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
class Table:
    """``caption`` says what the rows are, ``truncation`` which of them are shown where not all are."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    truncation: str = ""


Column = tuple[str, Callable[[Row], Cell]]
"""A heading, and how a cell is made of a row."""


def make_table(
    caption: str, columns: Sequence[Column], rows: pd.DataFrame, file: str = "", keep_empty: bool = False
) -> Table:
    """A table of the first ``MAX_ROWS`` rows (``file`` has all), without columns that are empty in every row."""
    records = rows[:MAX_ROWS].to_dict("records")
    cells = [(heading, [make(row) for row in records]) for heading, make in columns]
    kept = [one for one in cells if keep_empty or any(cell.text != UNKNOWN for cell in one[1])]
    truncation = f"{MAX_ROWS} of {len(rows)} rows; all are in {file}" if len(rows) > MAX_ROWS else ""
    headings, by_column = [heading for heading, _ in kept], [cells for _, cells in kept]
    return Table(caption, tuple(headings), tuple(zip(*by_column, strict=True)), truncation)


def column(heading: str, key: str, spec: str | None = None) -> Column:
    """The column of a row's ``key``, as ``make_cell`` makes its cells."""
    return heading, lambda row: make_cell(row, key, spec)


def make_cell(row: Row, key: str, spec: str | None = None) -> Cell:
    """The value at ``key``, with its interval where the row has ``key_low`` and ``key_high``; a dash if unknown.

    ``spec`` is the format of a number; without one, the value is a word or a setting.
    """
    value = row[key]
    if not is_known(value):
        return Cell(UNKNOWN, "", is_number=spec is not None)
    if isinstance(value, str | bool):
        return Cell(str(value))
    return Cell(format_value(row, key, spec or "g"), repr(float(value)), is_number=True)


def is_known(value: Any) -> bool:
    """Whether there is a value: not ``None``, NaN, ``pd.NA`` or ""."""
    return not (pd.isna(value) or value == "")


def format_value(row: Row, key: str, spec: str = "+.3f") -> str:
    """The number at ``key`` of a row, with its interval as far as the row has one: ``+0.123 [+0.100, +0.150]``."""
    return format_interval(row[key], row.get(f"{key}_low"), row.get(f"{key}_high"), spec, format_number)


def format_number(value: Any, spec: str) -> str:
    """A number with a true minus sign, ∞ where it is infinite; a dash where it is not known.

    A p-value that is too small for the number of sign flips is a bound.
    """
    if not is_known(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if spec == P_VALUE:
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    return format(value, spec).replace("-", "−")


def difference_cell(row: Row, key: str) -> Cell:
    """A cell of a row of ``differences`` or ``matched``, in the format of its quantity.

    Shares are not shown as percentages: a difference of two could be read as a percentage of one of them.
    """
    return make_cell(row, key, "+.2f" if row["quantity"] == "recovered" else "+.3f")


def with_interval_names(differences: pd.DataFrame, name: str = "difference", prefix: str = "") -> pd.DataFrame:
    """The rows with the names that ``make_cell`` reads an interval by: ``name_low``, ``name_high``."""
    return differences.rename(columns={f"{prefix}{end}": f"{name}_{end}" for end in ("low", "high")})


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


def run_columns(comparison: Comparison, *headings: tuple[str, str]) -> list[Column]:
    """A column with the short name of a run and its links for each (heading, key); a dash where there is none."""
    overview = comparison.overview
    labels = run_labels(list(overview["run"]))
    cells = {row["run"]: Cell(labels[row["run"]], None, run_links(row)) for row in overview.to_dict("records")}
    return [
        (heading, lambda row, key=key: cells.get(row[key]) or make_cell(row, key))
        for heading, key in headings or (("run", "run"),)
    ]


PAIR = (("run a", "a"), ("run b", "b"))  # headings and keys of the two runs of a pair


def shared_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What is the same in all runs, (name, value) each."""
    overview = comparison.overview
    same = [name for name in RUN_COLUMNS if overview[name].astype(str).nunique() == 1]
    return [(RUN_COLUMNS[name], str(overview[name].iloc[0])) for name in same if is_known(overview[name].iloc[0])]


def findings_table(comparison: Comparison) -> Table:
    """A row a run that has a finding: in sentences, what its numbers say."""
    rows = comparison.overview[comparison.overview["finding"] != ""]
    return make_table("The finding of each run", [*run_columns(comparison), column("finding", "finding")], rows)


def runs_table(comparison: Comparison) -> Table:
    """A row a run: what differs between runs, and the base runs."""
    overview = comparison.overview
    differing = [name for name in RUN_COLUMNS if overview[name].astype(str).nunique() > 1]
    columns = [
        *run_columns(comparison),
        *(column(RUN_COLUMNS[name], name) for name in differing),
        column("accuracy, clean", "accuracy_clean", ".3f"),
        column("accuracy, corrupt", "accuracy_corrupt", ".3f"),
        column("probability, clean", "prob_clean", ".3f"),
        column("probability, corrupt", "prob_corrupt", ".3f"),
        column("total effect [95 %]", "total_effect", "+.3f"),
        column("calibrated strength", "calibrated"),
        column("seconds", "seconds", ".1f"),
        column("notes", "notes"),
    ]
    return make_table("The runs, and their clean and corrupted base runs", columns, overview)


def settings_table(comparison: Comparison) -> Table:
    """A row a run, a column a setting that differs between runs."""
    settings = comparison.settings
    columns = [*run_columns(comparison), *(column(key, key) for key in settings.index)]
    return make_table("Settings that are not the same in all runs", columns, settings.T.assign(run=settings.columns))


def peaks_table(comparison: Comparison) -> Table:
    """A row a run: where its effect is largest, and how sure that is."""
    tests = {run.manifest.get("statistics", {}).get("tests") for run in comparison.runs} - {None}
    tested = f" of {tests.pop().replace('_', ' ')}" if len(tests) == 1 else ""
    columns = [
        *run_columns(comparison),
        ("peak", lambda row: _place_cell(row["peak_place"], row["peak_layer"])),
        column("relative depth", "peak_relative_depth", ".2f"),
        column("effect [95 %]", "peak_effect", "+.3f"),
        column("share recovered [95 %]", "peak_recovered", ".0%"),
        column(f"p{tested}, corrected", "peak_p", P_VALUE),
        column("95 % peak set", "peak_set"),
        column("stability", "peak_stability", ".0%"),
        column("effect, split halves", "peak_effect_split_halves", "+.3f"),
        column("calibrated strength", "calibrated"),
    ]
    rows = comparison.overview.assign(peak_set=comparison.overview["peak_set"].str.partition(" ")[2])
    return make_table("The peak of each run", columns, rows)


def _place_cell(words: str, layer: Any) -> Cell:
    """A place in words that sorts by its layer."""
    return Cell(words, f"{layer:g}", is_number=True) if is_known(layer) else Cell(UNKNOWN, "")


def differences_table(comparison: Comparison) -> Table:
    """A row a pair that is subtracted: the patch where the two differ most."""
    columns = [
        *run_columns(comparison, *PAIR),
        ("of", lambda row: Cell(row["quantity"].replace("recovered", "share recovered"))),
        ("where they differ most", lambda row: _place_cell(describe_patch(row), row["layer"])),
        ("a", lambda row: difference_cell(row, "value_a")),
        ("b", lambda row: difference_cell(row, "value_b")),
        ("a − b [95 %]", lambda row: difference_cell(row, "difference")),
        column("p, corrected", "p", P_VALUE),
        column("images", "n", ".0f"),
        column("clusters", "n_clusters", ".0f"),
        column("caution", "caution"),
    ]
    rows = with_interval_names(largest_differences(comparison.differences))
    return make_table("Paired differences, on images included in both", columns, rows, "differences.csv")


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
    columns = [*run_columns(comparison, *PAIR), column("why", "reason")]
    return make_table("Pairs that are not subtracted", columns, comparison.not_subtracted, "not_subtracted.csv")


def matched_table(comparison: Comparison) -> Table:
    """A row a pair of matching runs of two groups, or a run without a match."""
    quantities = {"total_effect": "+.3f", "peak_layer": ".0f", "peak_effect": "+.3f"}
    columns = [
        *run_columns(comparison, *PAIR),
        column("settings that differ", "differing"),
        *(
            column(f"{name.replace('_', ' ')}, {side}", f"{name}_{side}", spec)
            for name, spec in quantities.items()
            for side in "ab"
        ),
        column("of", "quantity"),
        ("largest difference [95 %]", lambda row: difference_cell(row, "largest_difference")),
        column("at layer", "largest_layer", ".0f"),
        column("p, corrected", "largest_p", P_VALUE),
        column("not subtracted because", "reason"),
    ]
    rows = with_interval_names(comparison.matched, "largest_difference", "largest_")
    return make_table("Counterparts in the groups", columns, rows, "matched.csv")


def profiles_table(comparison: Comparison, columns: Mapping[str, str], caption: str) -> Table:
    """A row a run and patch that has a value in one of ``columns`` of ``profiles`` other than ``effect``.

    ``columns`` has the heading of each column; they are shown with their intervals."""
    profiles = comparison.profiles
    present = {name: heading for name, heading in columns.items() if name in profiles}
    rows = profiles[profiles[[name for name in present if name != "effect"]].notna().any(axis=1)]
    headed = [column(f"{heading} [95 %]", name, "+.3f") for name, heading in present.items()]
    before = [*run_columns(comparison), column("layer", "layer", ".0f"), column("series", "series")]
    return make_table(caption, [*before, *headed], rows, "profiles.csv")


def rank_correlation_table(comparison: Comparison) -> Table:
    """Runs × runs."""
    table = comparison.rank_correlation
    labels = run_labels(list(table.columns))
    numbers = [
        (labels[run], lambda row, run=run: make_cell({"value": table.loc[row["run"], run]}, "value", ".2f"))
        for run in table.columns
    ]
    caption, rows = "Spearman’s rank correlation of layer profiles", pd.DataFrame({"run": table.index})
    return make_table(caption, [*run_columns(comparison), *numbers], rows, keep_empty=True)
