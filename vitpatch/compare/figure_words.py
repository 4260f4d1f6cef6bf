"""What stands around a comparison's figures: titles, axes, names, in letters that matplotlib takes as they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pandas as pd
from matplotlib.font_manager import FontProperties, findfont, get_font

from vitpatch.compare.comparison import Comparison
from vitpatch.compare.layout import least_to_most
from vitpatch.compare.run_labels import short_labels
from vitpatch.plots.style import METRIC_NAMES, cut
from vitpatch.types import Metric

INTERVALS = "95 % bootstrap intervals over clusters"


def sample(runs: pd.DataFrame) -> str:
    """Images and clusters of some rows of ``overview``, in words; where they differ, from the least to the most."""
    images, clusters = (list(runs[name]) for name in ("n", "n_clusters"))
    words = [f"{word}{'s' * (max(of) != 1)}" for word, of in (("image", images), ("cluster", clusters))]
    return f"n = {least_to_most(images)} {words[0]} in {least_to_most(clusters)} {words[1]}"


def title_of(comparison: Comparison, words: str, *lines: str) -> Sequence[str]:
    """A figure's title: what it shows, of what, and ``lines``."""
    overview = comparison.overview
    alike = [
        str(overview[name].iloc[0]) for name in ("model", "data", "site", "direction") if overview[name].nunique() == 1
    ]
    return [plain(words), *([plain(", ".join(alike))] if alike else []), *lines]


def labels_of(comparison: Comparison) -> dict[str, str]:
    """By run's name what stands at an axis."""
    return {run: plain(label) for run, label in short_labels(list(comparison.overview["run"])).items()}


def plain(words: str, longest: int = 400) -> str:
    """Words of a user's, of so many letters at most, as matplotlib shows them in titles, at axes and in legends.

    A dollar sign is one, letters that no font has are their code points (boxes would all be the same), and words that
    begin with ``_``, which a legend leaves out, have a space before.
    """
    shown = "".join(letter if _is_drawn(letter) else f"\\u{ord(letter):04x}" for letter in cut(words, longest))
    return f"{' ' * shown.startswith('_')}{shown}".replace("$", r"\$")


@cache
def _is_drawn(letter: str) -> bool:
    """Whether one of matplotlib's fonts has a letter."""
    families = FontProperties().get_family()
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    return not letter.isprintable() or any(font.get_char_index(ord(letter)) for font in fonts)


def axis_words(metric: str) -> str:
    """The title of an axis of effects on a metric, in two lines."""
    return f"effect on the\n{METRIC_NAMES[Metric(metric)]}"
