"""A run's result: its numbers, from the effects of its images. Pure: numpy and pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vitpatch.errors import VitPatchError
from vitpatch.schema import PATCH_COLUMNS
from vitpatch.stats.inference import Array, Resamples, clusters_needed
from vitpatch.stats.summary import GroupPeak, Measured, join_differing, marginal, peak, summary_table, window_names
from vitpatch.study import Study
from vitpatch.types import (
    BaseRun,
    Direction,
    Donor,
    Estimate,
    Include,
    Inclusion,
    Metric,
    Run,
    Site,
    base_run_of,
)

SHARE_OF_TOTAL = 0.1
"""The width that an interval is wanted to have where none is asked for, in shares of the total effect."""


@dataclass(frozen=True)
class Unselected:
    """Means over all images of a run that selects images by what the corruption did to them.

    ``effects`` (patches,) are mean effects.
    """

    images: int
    total: Estimate
    effects: Array
    peak_layer: int | None


@dataclass(frozen=True)
class RunResult:
    """The result of a run: means over the included images, with intervals, tests and the peak.

    ``examples`` has a row an included image, with ``total_effect`` (NaN where the donor is no run) and
    ``has_empty_group`` (whether one of its token groups has no token), ``summary`` a row a patch; ``effects`` (included
    images, patches) are on the headline metric. ``total`` is the
    total effect, ``all_layers`` the mean effect of all layers at once. ``without_partner`` counts the images that are
    left out because they have no partner for the run's donor. ``marginals`` has a row a window and layer that is left
    out of it.
    """

    study: Study
    donors: tuple[Donor, ...]
    examples: pd.DataFrame
    effects: Array
    summary: pd.DataFrame
    peaks: Sequence[GroupPeak]
    total: Estimate
    all_layers: Estimate | None
    unselected: Unselected | None
    marginals: pd.DataFrame | None
    without_partner: int

    @property
    def controls(self) -> tuple[Donor, ...]:
        """The donors after the run's own."""
        return self.donors[1:]

    @property
    def clusters(self) -> int:
        """The number of clusters of the included images."""
        return int(self.examples["cluster"].nunique())

    @property
    def labels_are_predicted(self) -> bool:
        """Whether images have no labels, so that the clean run's predictions are used as labels."""
        return bool(self.examples["label_is_predicted"].any())

    @property
    def total_sign(self) -> float:
        """The sign of the total effect, 0 = no effect; of a donor that is no run, that of an effect that does harm."""
        return total_effect_sign(self.total.mean, self.study)

    @cached_property
    def peak(self) -> pd.Series | None:
        """The row of ``summary`` that goes furthest; its ``name`` is its number, which is its column of ``effects``.

        ``None`` where the total effect has no direction.
        """
        row = peak_row(self.summary["layer"], self.summary["effect"].to_numpy(), self.total_sign)
        return None if row is None else self.summary.iloc[row]

    @property
    def peak_layer(self) -> int | None:
        """The layer of the peak."""
        return None if self.peak is None else int(self.peak["layer"])

    @property
    def peak_series(self) -> str:
        """The peak's series, ``""`` where there is one series or no peak."""
        return "" if self.peak is None else series_names(self.summary)[self.summary.index.get_loc(self.peak.name)]

    @property
    def peak_group(self) -> GroupPeak | None:
        """The group that the peak is in."""
        return next((g for g in self.peaks if self.peak is not None and self.peak.name in g.rows), None)

    @cached_property
    def needed(self) -> tuple[float, int] | None:
        """(wanted width, clusters) for the interval at the peak; ``None`` where nothing is known of it."""
        width = self.study.wanted_width or SHARE_OF_TOTAL * abs(self.total.mean)
        if self.peak is None or not width > 0 or self.clusters < 2:
            return None
        values, clusters = self.effects[:, self.peak.name], self.examples["cluster"].to_numpy()
        return width, clusters_needed(values, clusters, width)


def analyze(
    study: Study,
    donors: Sequence[Donor],
    examples: pd.DataFrame,
    patches: pd.DataFrame,
    measured: Measured,
    leave_outs: pd.DataFrame | None = None,
) -> RunResult:
    """Means, intervals, tests and the peak of what was measured of all images, in the order of ``examples``.

    ``examples``, with a column ``has_empty_group``, and ``leave_outs`` as in the parquet files; ``patches`` has a row a
    patch. Raises ``VitPatchError`` where no image is included.
    """
    examples = examples.assign(total_effect=total_effects(examples, study.donor, study.direction, study.metric))
    kept = examples["included"].to_numpy()
    if not kept.any():
        raise VitPatchError(f"include {study.include}: none of {len(examples)} images is; use another rule or images")
    has_partner = np.ones(len(examples), dtype=bool)
    if study.donor.partner is not None:
        has_partner = examples[f"partner_{study.donor}"].to_numpy() >= 0
    unselected = None
    if study.include.selects_on_the_outcome:
        unselected = _unselected(study, examples[has_partner], patches, measured.effects[has_partner])
    leave_outs = None if leave_outs is None else leave_outs[np.repeat(kept, len(leave_outs) // len(kept))]
    examples, measured = examples[kept].reset_index(drop=True), measured.select(kept)
    resamples = Resamples(examples["cluster"].to_numpy(), study.seed)

    def estimate(column: str) -> Estimate:
        return resamples.spread(examples[[column]].to_numpy(float), method=study.interval).estimates[0]

    total = estimate("total_effect")
    summary, peaks = summary_table(
        patches,
        measured,
        examples,
        resamples,
        total_effect_sign(total.mean, study),
        method=study.interval,
        tested=study.test,
        compare_controls=study.direction is Direction.DENOISE,  # else the own donor is corrupt, the controls' clean
    )
    if unselected is not None:
        summary["effect_unselected"] = unselected.effects
    return RunResult(
        study=study,
        donors=tuple(donors),
        examples=examples,
        effects=measured.effects,
        summary=summary,
        peaks=peaks,
        total=total,
        all_layers=estimate("effect_all_layers") if "effect_all_layers" in examples else None,
        unselected=unselected,
        marginals=None if leave_outs is None else _marginals(study, leave_outs, examples, summary, measured, resamples),
        without_partner=int((~has_partner).sum()),
    )


def _unselected(study: Study, examples: pd.DataFrame, patches: pd.DataFrame, effects: Array) -> Unselected:
    """The total effect, mean effects and the peak of all images."""
    resamples = Resamples(examples["cluster"].to_numpy(), study.seed)
    total = resamples.spread(examples[["total_effect"]].to_numpy(float), method=study.interval).estimates[0]
    means = effects.mean(0, dtype=float)
    row = peak_row(patches["layer"], means, total_effect_sign(total.mean, study))
    return Unselected(len(examples), total, means, None if row is None else int(patches["layer"].iloc[row]))


def _marginals(
    study: Study,
    leave_outs: pd.DataFrame,
    examples: pd.DataFrame,
    summary: pd.DataFrame,
    measured: Measured,
    resamples: Resamples,
) -> pd.DataFrame:
    """What each layer adds to the rest of its window, a row each."""
    is_first = leave_outs["example_id"] == leave_outs["example_id"].iloc[0]
    names = leave_outs.loc[is_first, [*PATCH_COLUMNS, "without"]].reset_index(drop=True)
    rows = {tuple(row): i for i, row in enumerate(summary[list(PATCH_COLUMNS)].itertuples(index=False))}
    whole = [rows[tuple(row)] for row in names[list(PATCH_COLUMNS)].itertuples(index=False)]
    columns: dict[str, Array] = {}
    for metric, effects in ((Metric.PROB, measured.prob), (Metric.LOG_ODDS, measured.log_odds)):
        rest = leave_outs[str(metric)].to_numpy().reshape(len(examples), -1)
        rest = rest - base_metric(examples, study.direction.recipient, metric)[:, None]
        values = marginal(np.hstack([effects, rest]), [(at, effects.shape[1] + i) for i, at in enumerate(whole)])
        columns |= resamples.spread(values, method=study.interval).columns(f"marginal_{metric}")
    return names.assign(**columns)


def is_included(rule: Inclusion, examples: Mapping[str, NDArray], metric: Metric) -> NDArray[np.bool_]:
    """Whether each image is one that means are over, (images,), from columns of ``examples.parquet``.

    ``min_total_effect`` is of clean − corrupt; of ``kl``, which is 0 in the clean run, of what the corruption adds.
    """
    label = examples["label"]
    if rule.rule is Include.ALL:
        return np.ones(len(label), dtype=bool)
    if rule.rule is Include.MIN_TOTAL_EFFECT:
        if metric is Metric.KL:
            return examples["kl_corrupt"] >= rule.least
        return examples[f"{metric}_clean"] - examples[f"{metric}_corrupt"] >= rule.least
    right = examples["pred_clean"] == label
    return right if rule.rule is Include.CLEAN_CORRECT else right & (examples["pred_corrupt"] != label)


def total_effects(examples: pd.DataFrame, donor: Donor, direction: Direction, metric: Metric) -> NDArray[np.floating]:
    """The donor's base run minus the recipient's, by image; NaN of a donor that is no run."""
    run = base_run_of(donor, direction)
    if run is None:
        return np.full(len(examples), np.nan)
    return base_metric(examples, run, metric) - base_metric(examples, direction.recipient, metric)


def base_metric(examples: pd.DataFrame, base_run: Run, metric: Metric) -> np.ndarray:
    """A base run's metric by image; the clean run's KL from itself is 0."""
    if metric is Metric.KL and base_run is BaseRun.CLEAN:
        return np.zeros(len(examples))
    return examples[f"{metric}_{base_run}"].to_numpy(float)


def total_effect_sign(total: float, study: Study) -> float:
    """The sign of a mean total effect; of a donor that is no run, the sign of an effect that does harm."""
    if study.donor.is_constant:
        return 1.0 if study.metric is Metric.KL else -1.0
    return float(np.sign(total))


def peak_row(layers: pd.Series, effects: Array, total_sign: float) -> int | None:
    """The position of the mean effect, (patches,) each, that goes furthest, of the lowest layer on a tie."""
    order = np.argsort(np.asarray(layers), kind="stable")
    at = peak(effects[order], total_sign)
    return None if at is None else int(order[at])


def series_names(summary: pd.DataFrame) -> list[str]:
    """What tells apart patches of one layer, by row: window, head, tokens, as far as they differ; ``""`` = nothing."""
    return join_differing(window_names(summary), [f"h{head}" for head in summary["head"]], list(summary["tokens"]))


def is_handover(summary: pd.DataFrame) -> bool:
    """Whether the rows are of the residual stream at CLS and at the patches."""
    return Site(summary["site"].iloc[0]).is_stream and {"cls", "patches"} <= set(summary["tokens"])
