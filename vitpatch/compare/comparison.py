"""What finished runs say beside each other: the nouns that the comparison's tables, figures and page are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vitpatch.plots.examples import Page
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.results import read_pages


@dataclass(frozen=True)
class FinishedRun:
    """A run that is compared: its folder, manifest and ``summary.csv``.

    ``name`` is unique among the runs compared, its path below the folder ``group`` that was given.
    """

    name: str
    group: str
    folder: RunFolder
    manifest: Mapping[str, Any]
    summary: pd.DataFrame

    def examples(self) -> pd.DataFrame:
        """Its ``examples.parquet``."""
        return pd.read_parquet(self.folder.examples)

    def shown(self) -> list[Page]:
        """The images that were kept of it."""
        return read_pages(self.folder.pages)


@dataclass(frozen=True)
class Comparison:
    """Finished runs beside each other.

    ``warnings``: what they disagree in that should be one – weights of one model, data, code version –, a line each,
    to be said at the top. ``left_out``: runs that are not compared, being broken or not finished, a line each. Tables,
    ``run`` being ``FinishedRun.name``:

    ``overview``, a row a run: ``run, group, title, model, data, corruption`` (in words; that there is none, where the
    corrupted run plays no part), ``strength, calibrated`` (in words, "" = not calibrated), ``site, tokens, heads,
    windows, direction, donor, metric, include, n, n_clusters, accuracy_clean, accuracy_corrupt, prob_clean,
    prob_corrupt, total_effect, total_effect_low, total_effect_high, peak_layer, peak_place`` (in words),
    ``peak_relative_depth, peak_effect, peak_effect_low, peak_effect_high, peak_recovered, peak_recovered_low,
    peak_recovered_high, peak_p, peak_set`` (in words), ``peak_stability, peak_effect_split_halves, depth`` (blocks of
    the model), ``seconds, weights, data_digest, code, notes, folder, config`` (paths relative to the comparison's
    folder), ``wandb_url``.

    ``profiles``, a row a run and patch: ``run, series`` (what tells rows of one layer apart, "" = nothing), all columns
    of ``summary.csv``, ``depth, relative_depth`` = (layer + ½) / depth.

    ``differences``, a row a pair of runs and patch that both have: ``a, b, quantity`` (``effect``, or ``recovered``
    across corruptions), ``site, layer, head, tokens, n_layers, window_a, window_b, n, n_clusters, value_a, value_b,
    difference`` = a − b, ``low, high, p`` (family-wise over the pair's patches; of effects), ``caution`` (in words, ""
    = none): what to mind beside the interval.

    ``not_subtracted``, a row a pair that has none: ``a, b, reason``. ``settings``: a row a key of the runs' identity
    that is not the same in all, the index, and a column a run. ``rank_correlation``: Spearman's of the profiles, runs
    (the index) × runs; of a run with several series the peak's; effects count towards the total effect.

    ``matched``, a row a pair of runs of two groups (folders that were given) that are each other's counterpart: ``a, b,
    differing`` (settings, in words), ``total_effect_a, total_effect_b, peak_layer_a, peak_layer_b, peak_effect_a,
    peak_effect_b``, of the patch where they differ most ``quantity, largest_difference, largest_layer, largest_low,
    largest_high, largest_p``, or ``reason``, why they are not subtracted; then the runs without a counterpart, ``a`` or
    ``b`` being "".
    """

    runs: tuple[FinishedRun, ...]
    warnings: tuple[str, ...]
    overview: pd.DataFrame
    profiles: pd.DataFrame
    differences: pd.DataFrame
    not_subtracted: pd.DataFrame
    settings: pd.DataFrame
    rank_correlation: pd.DataFrame
    matched: pd.DataFrame
    left_out: tuple[str, ...] = ()

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the name of their csv files, an index being the first column."""
        return {
            "overview": self.overview,
            "profiles": self.profiles,
            "differences": self.differences,
            "not_subtracted": self.not_subtracted,
            "settings": _with_index(self.settings),
            "rank_correlation": _with_index(self.rank_correlation),
            "matched": self.matched,
        }


def _with_index(table: pd.DataFrame) -> pd.DataFrame:
    """A run may be called as the index is."""
    flat = table.reset_index(drop=True)
    flat.insert(0, table.index.name, table.index, allow_duplicates=True)
    return flat
