"""Comparison → its page: one HTML file with all that it needs, which asks nothing of any server."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from vitpatch.compare.comparison import Comparison
from vitpatch.compare.page_sections import sections
from vitpatch.io import written_beside

ASSETS = Path(__file__).parents[1] / "assets" / "page"
LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js", "sortable.auto.min.js")
MOST_BYTES = 4_900_000
"""Of a page."""
MOST_LEFT_OUT = 12
"""Runs that are not compared, named at the top."""
LEFT_OUT = (
    (),
    ("gallery",),
    ("gallery", "overlay", "controls", "synergy"),
    ("gallery", "overlay", "controls", "synergy", "grid"),
)
"""The sections that a page goes without, more and more, until it is small enough."""


def write_page(comparison: Comparison, file: Path) -> None:
    """Writes the page of a comparison, by rename; its links are relative to the file's folder."""
    for without in LEFT_OUT:
        text = page(comparison, without)
        if len(text.encode()) <= MOST_BYTES:
            break
    with written_beside(file) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def page(comparison: Comparison, without: Sequence[str] = ()) -> str:
    """The page's text, ``without`` some sections.

    All that is shown is escaped, and only the page's own scripts may run in it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"embedded": embedded, "breakable": breakable}
    scripts = [_asset(name) for name in (*LIBRARIES, "page.js")]
    number = len(comparison.runs)
    return environment.get_template("page.html.jinja").render(
        title=f"Comparison of {number} runs" if number > 1 else comparison.overview["title"].iloc[0],
        warnings=comparison.warnings,
        left_out=_some(comparison.left_out),
        sections=list(sections(comparison, without)),
        without=", ".join(without),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        css=Markup(_asset("page.css")),
    )


def _some(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MOST_LEFT_OUT
    return [*lines[:MOST_LEFT_OUT], *([f"… and {more} more"] if more > 0 else [])]


def embedded(value: Any) -> Markup:
    """A value as JSON that no text in it can end the script element of."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def breakable(text: str) -> Markup:
    """A run's name, escaped, that may be broken after its commas and slashes."""
    return Markup(re.sub("([,/])", r"\1<wbr>", str(escape(text))))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
