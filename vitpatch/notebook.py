"""``vitpatch.show``: what a table or a finished run says, in sentences, a picture and numbers; no model is needed."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from matplotlib.figure import Figure

from vitpatch.checks import Count, Positive, check, read_formats
from vitpatch.errors import VitPatchError
from vitpatch.formatting import corruption_name, first_few, format_interval
from vitpatch.plots.finding import finding_sentences
from vitpatch.plots.layout import FigureOptions, save_figure
from vitpatch.plots.run_figures import draw_main
from vitpatch.plots.style import METRIC_NAMES
from vitpatch.runs.results import notes
from vitpatch.stats.finding import find
from vitpatch.stats.result import RunResult
from vitpatch.stats.table import result_of
from vitpatch.study import study_title
from vitpatch.types import Metric, Tested, format_window

MOST_ROWS = 24
"""Of the summary so many are shown, those with the largest effects; all are in ``Shown.summary``."""
PLACE = ("layer", "head", "tokens", "window")
INTERVALS = (
    "Intervals in the table are of each place alone, those of effects in the sentences hold for all places at once; "
    "p is family-wise, of {tested}."
)
DPI, CHARACTERS = 80, 100
"""Dots an inch of the picture; characters a line in a terminal."""


@dataclass(frozen=True, repr=False)
class Shown:
    """What a table or a run says. A notebook shows it all; ``print`` and a terminal all but the picture.

    ``title`` says what was patched, ``finding`` in sentences what the numbers say, ``notes`` what a reader must know
    beside it; ``result`` has the numbers. It may be given to the functions of ``vitpatch.plot``.
    """

    title: str
    finding: tuple[str, ...]
    notes: tuple[str, ...]
    result: RunResult

    @property
    def summary(self) -> pd.DataFrame:
        """The means, with the columns of ``summary.csv``."""
        return self.result.summary

    @property
    def figure(self) -> Figure:
        """The picture, as runs draw it."""
        return draw_main(self.result, self.title)

    def save(self, path: str | Path, *, width: float | None = None, title: str | None = None, dpi: int = 150) -> None:
        """Writes the picture as PNG, SVG or PDF, by the ending of ``path``.

        With a ``width`` in inches it is for print, its words and marks small enough for that; ``title``: another one,
        "" = none. Raises ``VitPatchError`` for another ending, or a width that is none.
        """
        path = Path(path)
        (kind,) = read_formats(f"{path}: its ending", path.suffix.removeprefix("."))
        check("width", width, Annotated[Positive | None, "for as wide as its content"])
        figure = draw_main(self.result, self.title if title is None else title, FigureOptions(width=width))
        save_figure(figure, path, kind, check("dpi", dpi, Count))

    def __str__(self) -> str:
        lines = [self.title]
        for words in (*self.finding, *(f"Note: {note}" for note in self.notes)):
            lines += textwrap.wrap(words, CHARACTERS, initial_indent="  ", subsequent_indent="    ")
        rows = self._rows.to_string(index=False)
        return "\n".join(
            [*lines, "", rows, *[line for words in self._below for line in textwrap.wrap(words, CHARACTERS)]]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        png = io.BytesIO()
        save_figure(self.figure, png, "png", DPI)
        sentences = "".join(f"<li>{escape(words)}</li>" for words in self.finding)
        sentences += "".join(f"<li><em>{escape(note)}</em></li>" for note in self.notes)
        picture = base64.b64encode(png.getvalue()).decode("ascii")
        parts = [f"<h4>{escape(self.title)}</h4>", f"<ul>{sentences}</ul>"]
        parts.append(f'<img alt="{escape(self.title)}" src="data:image/png;base64,{picture}">')
        return "\n".join(
            [*parts, self._rows.to_html(index=False, border=0), *(f"<p>{escape(words)}</p>" for words in self._below)]
        )

    @property
    def _rows(self) -> pd.DataFrame:
        """The rows that are shown, as words: what names a place as far as places differ, and its numbers."""
        largest = self.summary["effect"].abs().nlargest(MOST_ROWS).index
        rows = self.summary.loc[sorted(largest)]
        named = [name for name in PLACE if self.summary[name].nunique() > 1] or ["layer"]
        words = rows.assign(window=rows["window"].map(format_window))[named]
        for name, digits in (("effect", "+.3f"), ("recovered", ".0%")):
            intervals = zip(rows[name], rows[f"{name}_low"], rows[f"{name}_high"], strict=True)
            words[name] = [format_interval(*interval, digits) for interval in intervals]
        return words.assign(p=rows["p"].map("{:.4f}".format))

    @property
    def _below(self) -> list[str]:
        """What is said below the table."""
        number, study = len(self.summary), self.result.study
        left_out = [f"The {MOST_ROWS} largest of {number} effects; .summary has all."] * (number > MOST_ROWS)
        metric = study.metric if study.test is Tested.HEADLINE else Metric.LOG_ODDS
        return [*left_out, INTERVALS.format(tested=f"effects on the {METRIC_NAMES[metric]}")]


def show(table: Any) -> Shown:
    """What ``vitpatch.patch`` returned, or a finished run of ``vitpatch.load_run``, in words, a picture and numbers.

    The finding is made by the rules of a run's. Raises ``VitPatchError`` for anything else, and for a table of several
    sites.
    """
    result = result_of("show", table)
    sites = result.summary["site"].unique()
    if len(sites) > 1:
        raise VitPatchError(f"show: site {first_few(sorted(sites))}; give the rows of one, as table[table.site == ...]")
    manifest: Mapping[str, Any] = getattr(table, "manifest", {})
    corruption = [corruption_name(manifest["config"]["corruption"])] if manifest else []
    title = manifest["title"] if manifest else study_title(result.study)
    return Shown(
        title=title,
        finding=tuple(finding_sentences(result, find(result), *corruption)),
        notes=tuple(manifest["notes"] if manifest else notes(result)),
        result=result,
    )
