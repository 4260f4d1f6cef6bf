"""Figures and their layout: a title above, a legend below, and between them axes, whose labels are measured once.

Axes and their ticks take longest to draw. Where many small panels stand beside each other, they are on one axes, as
a ``Strip`` of curves or a mosaic of pictures.
"""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import LayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

logging.getLogger("fontTools").setLevel(logging.WARNING)  # of a PDF's fonts it says each table that it cuts

PRINT_SCALE = 0.75  # of words in figures for print: a title has 7.5 points, most words 6
LEAST_CELL = 0.4  # inches a column, with what stands beside the cells, in which a number has room for print
PAD = 0.08  # inches round the figure, and between its title, axes and legend
LARGEST_MARGINS = 0.8  # of the width, or of the height
LEAST_WIDTH, LEAST_HEIGHT = 5.5, 3.2  # inches of a heatmap that a title and a colour bar have room in
CHARACTERS_AN_INCH = 13.0  # of a title
BETWEEN_PARTS = " · "  # of a title
TITLE_LINES, TITLE_LINE = 3, 0.17  # lines of a title that a figure has room for; inches of one more
LEGEND_ROW = 0.21  # inches
BAR = 0.05  # how wide a colour bar may be, of what it shares with its axes
COLOUR_BAR_STEPS = 6  # at most, whatever its height, so that the width of its labels stays as it is measured
LABEL_CHARACTERS_AN_INCH = 15  # of a colour bar's label
COMPRESSION = 3  # of a PNG, which takes half as long as zlib's own 6 and is 6 % larger
LEGEND_CHARACTERS_AN_INCH, LEGEND_HANDLE = 14.5, 8  # of a legend's label; characters that a handle takes the room of


class FitOnce(LayoutEngine):
    """Fits the axes between a figure's title and its legend, so that no label is cut off.

    How far labels reach beyond the axes is measured once; matplotlib's engines do so two to four times, which takes as
    long as to draw. Gaps between axes are the figure-maker's.
    """

    _adjust_compatible = True
    _colorbar_gridspec = True

    def execute(self, fig: Figure) -> None:
        """Sets the margins."""
        size, pad = fig.bbox.size, PAD * fig.dpi
        cells = np.array([axes.get_position(original=True).extents * [*size, *size] for axes in fig.axes])
        drawn = np.array([axes.get_tightbbox(bbox_extra_artists=_beyond(axes)).extents for axes in fig.axes])
        before = np.maximum(cells.min(0) - drawn.min(0), 0)[:2] + pad  # left, below
        after = np.maximum(drawn.max(0) - cells.max(0), 0)[2:] + pad  # right, above
        before[1] += sum(legend.get_window_extent().height for legend in fig.legends)
        for title in fig.texts:
            title.set_y(1 - pad / size[1])
            after[1] += title.get_window_extent(fig._get_renderer()).height + pad  # else that of the last format
        shares = np.array([before, after]) / size
        shares *= np.minimum(1, LARGEST_MARGINS / shares.sum(0))
        (left, bottom), (right, top) = shares
        fig.subplots_adjust(left=left, right=1 - right, bottom=bottom, top=1 - top)


def _beyond(axes: Axes) -> list[Artist]:
    """What of axes may reach beyond them, but for ticks and titles: words and second scales; all else ends there."""
    return [*axes.child_axes, *(text for text in axes.texts if text.get_in_layout())]


@dataclass(frozen=True)
class FigureOptions:
    """How figures are drawn and written: ``formats`` (png, svg, pdf), and of PNG the dots an inch.

    ``width`` in inches is for print, with words and marks of ``PRINT_SCALE``; ``None`` = as wide as the content asks
    for. ``font`` is a family, ``None`` = matplotlib's own.
    """

    formats: tuple[str, ...] = ("png",)
    dpi: int = 150
    width: float | None = None
    font: str | None = None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside the block figures are made so; those for print are then to be shrunk (``shrink_for_print``)."""
        settings: dict[str, Any] = {"text.parse_math": False}  # a label may hold a dollar
        if self.font is not None:
            settings["font.family"] = [self.font, "DejaVu Sans"]  # the second has letters that the first may lack
        before = _PRINT_WIDTH.set(self.width)
        try:
            with matplotlib.rc_context(settings):
                yield
        finally:
            _PRINT_WIDTH.reset(before)


AS_WIDE_AS_NEEDED = FigureOptions()
_PRINT_WIDTH: ContextVar[float | None] = ContextVar("width for print", default=None)


def is_for_print() -> bool:
    """Whether figures that are made here and now have a width that was asked for."""
    return _PRINT_WIDTH.get() is not None


def make_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches; for print it is as wide as asked for, and lower by less than narrower."""
    asked = _PRINT_WIDTH.get()
    if asked is not None:
        width, height = asked, height * sqrt(asked / width)
    return Figure(figsize=(width, height), layout=FitOnce())


def panels_a_row(number: int, least: float) -> int:
    """How many panels stand side by side: ``number``, for print as many as have ``least`` inches each."""
    asked = _PRINT_WIDTH.get()
    return number if asked is None else max(1, min(number, int((asked - 0.7) / least)))


def room_for(inches: float, characters_an_inch: float) -> int:
    """How many characters have room, of so many an inch in the usual size."""
    return int(inches * characters_an_inch / (PRINT_SCALE if is_for_print() else 1))


def numbers_stand(columns: int) -> bool:
    """Whether numbers in so many columns of cells are written upwards: for print, where cells are narrow."""
    asked = _PRINT_WIDTH.get()
    return asked is not None and asked < LEAST_CELL * columns


def shrink_for_print(figure: Figure) -> None:
    """Makes words, lines and markers smaller by ``PRINT_SCALE``, as there was room left for; breaks labels of axes."""
    room = room_for(figure.get_figheight() - 1.6, LABEL_CHARACTERS_AN_INCH)
    for axes in figure.findobj(Axes):
        words = [line for part in axes.get_ylabel().split("\n") for line in textwrap.wrap(part, max(room, 12))]
        axes.yaxis.label.set_text("\n".join(words))
        width = room_for(axes.get_position().width * figure.get_figwidth(), CHARACTERS_AN_INCH)
        axes.xaxis.label.set_text(textwrap.fill(axes.get_xlabel(), max(width, 12)))
    each_axis = [axis for axes in figure.findobj(Axes) for axis in (axes.xaxis, axes.yaxis)]
    for axis in each_axis:
        sizes = [label.get_fontsize() for label in axis.get_ticklabels()]
        axis.set_tick_params(labelsize=PRINT_SCALE * max(sizes, default=10))
    texts = figure.findobj(Text)  # this makes the ticks that smaller labels leave room for
    ticks = [tick for axis in each_axis for tick in (*axis.majorTicks, *axis.minorTicks)]
    labels = {label for tick in ticks for label in (tick.label1, tick.label2)}
    for text in texts:
        if text not in labels:
            text.set_fontsize(PRINT_SCALE * text.get_fontsize())
    for line in figure.findobj(Line2D):
        line.set(linewidth=PRINT_SCALE * line.get_linewidth(), markersize=PRINT_SCALE * line.get_markersize())


def save_figure(figure: Figure, path: Path | BinaryIO, kind: str, dpi: int) -> None:
    """Writes a figure as ``png``, ``svg`` or ``pdf``; the last two have their text as text, and no date."""
    if kind == "png":  # which ``savefig`` would draw twice
        figure.set_dpi(dpi)
        with matplotlib.rc_context({"text.hinting": "no_hinting"}):  # which is worked out anew for every letter
            FigureCanvasAgg(figure).print_png(path, pil_kwargs={"compress_level": COMPRESSION})
        return
    no_date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitpatch", "pdf.fonttype": 42}):
        figure.savefig(path, format=kind, dpi=72, metadata=no_date)  # in which both measure words


def figure_width(layers: int) -> float:
    """The width in inches of a profile of so many layers."""
    return float(np.clip(2.5 + 0.28 * layers, 8, 16))


def set_headline(figure: Figure, *lines: str) -> None:
    """Sets the figure's title, each line broken at the figure's width, where it can be between parts (`` · ``).

    For more lines than ``TITLE_LINES`` the figure grows.
    """
    width = room_for(figure.get_figwidth(), CHARACTERS_AN_INCH)
    title: list[str] = []
    lines = [re.sub(r" (\S{1,2})$", "\u00a0\\1", line) for line in "\n".join(lines).split("\n")]  # not by itself
    for line in lines:
        first = len(title)
        for part in line.split(BETWEEN_PARTS):
            if len(title) > first and len(title[-1] + BETWEEN_PARTS + part) <= width:
                title[-1] += BETWEEN_PARTS + part
            else:
                title += textwrap.wrap(part, width)
    more = TITLE_LINE * max(0, len(title) - TITLE_LINES) * (PRINT_SCALE if is_for_print() else 1)
    figure.set_figheight(figure.get_figheight() + more)
    figure.suptitle("\n".join(title).replace("\u00a0", " "), fontsize=10, va="top")


def add_legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 1, more: Sequence[Artist] = ()) -> None:
    """Adds the legend of some axes, each label once, and ``more`` entries below the figure, which grows by as much.

    It has as many columns as there is room for, ``columns`` at most; labels wider than the figure are broken.
    """
    entries = [pair for one in axes for pair in zip(*one.get_legend_handles_labels(), strict=True)]
    by_label = {label: handle for handle, label in entries} | {str(one.get_label()): one for one in more}
    if not by_label:
        return
    room = room_for(figure.get_figwidth(), LEGEND_CHARACTERS_AN_INCH)
    columns = max(1, min(columns, room // (max(map(len, by_label)) + LEGEND_HANDLE)))
    labels = ["\n".join(textwrap.wrap(label, room - LEGEND_HANDLE)) for label in by_label]
    rows = max(len(by_label), sum(label.count("\n") + 1 for label in labels))
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-rows // columns))
    place = {"loc": "lower center", "ncols": columns, "frameon": False, "fontsize": 8.5}
    figure.legend(by_label.values(), labels, **place)


def add_colour_bar(image: AxesImage, axes: Axes, bar_axes: Axes | None, label: str) -> None:
    """Adds the colour bar of an image, into axes of its own or beside ``axes``; its label is broken at the height."""
    where = {"ax": axes, "pad": 0.02, "fraction": BAR, "aspect": 30} if bar_axes is None else {"cax": bar_axes}
    bar = axes.figure.colorbar(image, ticks=MaxNLocator(COLOUR_BAR_STEPS), **where)
    room = max(room_for(axes.figure.get_figheight() - 1, LABEL_CHARACTERS_AN_INCH), 12)
    bar.set_label("\n".join(textwrap.wrap(label, room)), fontsize=8)


@dataclass(frozen=True)
class Strip:
    """Panels side by side on one axes, on each of which x goes from ``first`` to ``last``."""

    panels: int
    first: float
    last: float

    @property
    def width(self) -> float:
        """Of a panel, in x."""
        return self.last - self.first

    @property
    def gap(self) -> float:
        """Between panels, in x: more than a line joins (``style.LARGEST_STEP``)."""
        return max(0.08 * self.width, 0.6)

    @property
    def starts(self) -> NDArray[np.floating]:
        """Where the panels begin on the axes, (panels,)."""
        return np.arange(self.panels) * (self.width + self.gap)

    def place(self, panel: int, x: NDArray | Sequence[float]) -> NDArray[np.floating]:
        """Values of x in a panel, on the axes."""
        return np.asarray(x, dtype=float) - self.first + self.starts[panel]

    def draw_frames(self, axes: Axes, number: int, ticks: Sequence[float], labels: Sequence[str], most: int) -> None:
        """Draws the frames of the first ``number`` panels, with ``most`` ticks at most on each, evenly chosen."""
        every, starts = -(-len(ticks) // most), self.starts[:number]
        ends, right = starts + self.width, self.starts[-1] + self.width
        of_axes = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        line = of_axes | {"color": "black", "linewidth": 0.8}
        axes.vlines([*starts, *ends], 0, 1, **line)
        axes.hlines([0, 1] * number, np.repeat(starts, 2), np.repeat(ends, 2), **line)
        gaps = zip(ends, [*(starts[1:] - ends[:-1]), right - ends[-1]], strict=True)
        axes.broken_barh([*gaps], (0, 1), facecolor="white", linewidth=0, zorder=1.9, **of_axes)
        for panel in range(number):
            for x, label in zip(self.place(panel, ticks[::every]), labels[::every], strict=True):
                axes.text(x, -0.03, label, fontsize=7, ha="center", va="top", **of_axes)
        axes.set_xticks([])
        axes.xaxis.labelpad = 14
        axes.set_xlim(0, right)
        axes.spines[:].set_visible(False)
        axes.set_axisbelow(True)


def mosaic(tiles: Sequence[Sequence[NDArray[np.uint8]]], gap: tuple[float, float]) -> NDArray[np.uint8]:
    """Rows of pictures, all of one shape (height, width, 3), as one, with white between them.

    ``gap`` is the height of what is between rows and the width of what is between columns, in heights and widths of a
    picture.
    """
    height, width = tiles[0][0].shape[:2]
    steps = [round((1 + share) * length) for share, length in zip(gap, (height, width), strict=True)]
    rows, columns = len(tiles), len(tiles[0])
    canvas = np.full((steps[0] * (rows - 1) + height, steps[1] * (columns - 1) + width, 3), 255, np.uint8)
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            canvas[i * steps[0] : i * steps[0] + height, j * steps[1] : j * steps[1] + width] = tile
    return canvas
