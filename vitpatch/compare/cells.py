"""Tables of a page: cells that show a rounded value and sort by the true one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

NONE = "–"
"""What is not known."""


@dataclass(frozen=True)
class Link:
    """A word that leads to an address, and what it is in full."""

    word: str
    address: str
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """``text`` as shown; ``sort`` what it sorts by, ``None`` = the text, "" = last; ``links`` after the text."""

    text: str
    sort: str | None = None
    links: tuple[Link, ...] = ()
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    """``caption`` says what the rows are; ``headings`` stand over the columns; ``more`` what is left out, in words."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    more: str = ""


def is_known(value: Any) -> bool:
    """Whether there is a value: not ``None``, NaN, ``pd.NA`` or ""."""
    return not (value is None or str(value) in ("", "nan", "<NA>", "NaT"))


def text(value: Any) -> Cell:
    """Words, or a dash."""
    return Cell(str(value), None) if is_known(value) else Cell(NONE, "")


def number(value: Any, form: str = ".3f") -> Cell:
    """A number in a format of ``format``."""
    if not is_known(value):
        return Cell(NONE, "", is_number=True)
    return Cell(said(value, form), repr(float(value)), is_number=True)


def estimate(mean: Any, low: Any, high: Any, form: str = "+.3f") -> Cell:
    """A mean with its interval, where there is one; sorts by the mean."""
    return Cell(estimate_words(mean, low, high, form), number(mean).sort, is_number=True)


def p_value(value: Any) -> Cell:
    """A p-value; what is too small for the number of flips is said as a bound."""
    if not is_known(value):
        return number(value)
    shown = "< 0.001" if value < 0.001 else said(value, ".3f")
    return Cell(shown, repr(float(value)), is_number=True)


def said(value: float, form: str) -> str:
    """A number with a true minus sign; infinite ones as a sign."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return format(value, form).replace("-", "−")


def estimate_words(mean: Any, low: Any, high: Any, form: str = "+.3f") -> str:
    """``+0.123 [+0.100, +0.150]``, as far as it is known."""
    if not is_known(mean):
        return NONE
    interval = f" [{said(low, form)}, {said(high, form)}]" if is_known(low) and is_known(high) else ""
    return said(mean, form) + interval


def run_links(row: Any) -> tuple[Link, ...]:
    """The links of a run, from its row of ``overview``: folder, config, W&B; a W&B address that is no web page's is
    left out."""
    links = [Link("folder", address(f"{row['folder']}/"), "folder of the run")]
    if is_known(row["config"]):
        links.append(Link("config", address(row["config"]), "composed config of the run"))
    url = str(row["wandb_url"])
    if urlsplit(url).scheme in ("http", "https"):
        links.append(Link("W&B", url, "run in Weights & Biases"))
    return tuple(links)


def address(path: str) -> str:
    """A relative path as an address; one that could be read as a scheme or a host begins with ``./``."""
    quoted = quote(path, safe="/=,@+~")
    return quoted if PurePosixPath(path).parts[:1] == ("..",) else f"./{quoted.lstrip('/')}"


def bounded(rows: Sequence[tuple[Cell, ...]], most: int, file: str) -> tuple[tuple[tuple[Cell, ...], ...], str]:
    """At most so many rows, and in words where the rest is."""
    more = f"{most} of {len(rows)} rows; all are in {file}" if len(rows) > most else ""
    return tuple(rows[:most]), more


def without_empty(table: Table) -> Table:
    """The table without columns that are dashes throughout."""
    kept = [i for i in range(len(table.headings)) if any(row[i].text != NONE for row in table.rows)]

    def of(items: Iterable[Any]) -> tuple[Any, ...]:
        listed = tuple(items)
        return tuple(listed[i] for i in kept)

    return Table(table.caption, of(table.headings), tuple(of(row) for row in table.rows), table.more)
