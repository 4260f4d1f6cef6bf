"""What a run found: from the merged files to means, intervals and words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from vitpatch import stats
from vitpatch.config import Study
from vitpatch.data import PREDICTED
from vitpatch.effects import total_effect
from vitpatch.plan import Plan
from vitpatch.spec import BaseRun, Estimate, Metric, Site, counted, window_word
from vitpatch.store import RunFolder, patch_columns

EMPTY = "images in which a token group has no token: {}; their effect there is 0, and they are in the means"
NOT_RECOVERED = "recovered is empty: the mean total effect is within 3 standard errors of 0, or has none"
NO_HANDOVER = "there is no picture of the handover: nothing is known of what is recovered"
ONE_WINDOW = "there is no picture of the handover: it is drawn where there is one window"
NO_LABELS = "the images have no labels: each one's is what the clean run predicts, so the clean accuracy is 1"
DOES_NOT_MOVE = "the total effect's interval holds 0: this corruption is not shown to move the model"


@dataclass(frozen=True)
class Outcome:
    """What is known once all images are through, over the included ones.

    ``summary`` has a row a patch, ``effects`` (images, patches) are of the headline metric; ``peak`` is the row of
    ``summary`` that goes furthest, ``None`` where the total effect has no direction; ``empty`` counts the images in
    which a token group has no token.
    """

    examples: pd.DataFrame
    effects: np.ndarray
    summary: pd.DataFrame
    total: Estimate
    peak: pd.Series | None
    empty: int

    @property
    def clusters(self) -> int:
        """How many clusters the included images are in."""
        return int(self.examples["cluster"].nunique())

    @property
    def peak_layer(self) -> int | None:
        """The layer of the peak."""
        return None if self.peak is None else int(self.peak["layer"])


def measure(folder: RunFolder, plan: Plan, study: Study) -> Outcome:
    """Means, intervals and the peak, from the merged files; writes ``summary.csv``."""
    examples = pd.read_parquet(folder.examples)
    recipient = metric_of(examples, plan.direction.recipient, Metric.LOG_ODDS)
    measured, is_empty = _measured(folder, examples, len(plan.patches), recipient)
    included = examples["included"].to_numpy()
    examples, measured = examples[included].reset_index(drop=True), measured.of(included)
    clean, corrupt = (metric_of(examples, run, study.metric) for run in (BaseRun.CLEAN, BaseRun.CORRUPT))
    examples["total_effect"] = total_effect(clean, corrupt, study.direction)
    summary = stats.summarize(pd.DataFrame(patch_columns(plan.patches)), measured, examples, study.seed)
    (total,) = stats.estimates(examples[["total_effect"]].to_numpy(float), examples["cluster"].to_numpy(), study.seed)
    by_layer = summary.sort_values("layer", kind="stable")
    at = stats.peak(by_layer["effect"].to_numpy(), total.mean)
    folder.write_summary(summary)
    peak = None if at is None else by_layer.iloc[at]
    return Outcome(examples, measured.effects, summary, total, peak, int(is_empty[included].sum()))


def _measured(
    folder: RunFolder, examples: pd.DataFrame, patches: int, recipient: np.ndarray
) -> tuple[stats.Measured, np.ndarray]:
    """What was measured of all images, read a row group at a time; and whether an image has an empty token group.

    ``recipient`` are the log odds of the recipient's base run.
    """
    floats = {
        name: np.empty((len(examples), patches), dtype=np.float32)
        for name in ("effect", "log_odds", "direct_log_odds", "delta_norm")
    }
    correct = np.empty((len(examples), patches), dtype=bool)
    is_empty = np.zeros(len(examples), dtype=bool)
    labels, row = examples["label"].to_numpy(), 0
    with pq.ParquetFile(folder.effects) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[*floats, "pred", "n_tokens"])
            here = slice(row, row + table.num_rows // patches)
            for name, values in floats.items():
                values[here] = table[name].to_numpy().reshape(-1, patches)
            floats["log_odds"][here] -= recipient[here, None]
            correct[here] = table["pred"].to_numpy().reshape(-1, patches) == labels[here, None]
            is_empty[here] = (table["n_tokens"].to_numpy().reshape(-1, patches) == 0).any(1)
            row = here.stop
    assert row == len(examples), f"{row} images have effects, {len(examples)} have base runs"
    direct, delta = floats["direct_log_odds"], floats["delta_norm"]
    return stats.Measured(floats["effect"], correct, floats["log_odds"], direct, delta), is_empty


def series_of(summary: pd.DataFrame) -> list[str]:
    """What tells apart patches of one layer, by row: window, head, tokens, as far as they differ; ``""`` = nothing."""
    named = {
        "window": [window_word(w) if w < 1 else f"w{w}" for w in summary["window"]],
        "head": [f"h{head}" for head in summary["head"]],
        "tokens": list(summary["tokens"]),
    }
    differ = [values for values in named.values() if len(set(values)) > 1]
    return ["-".join(parts) for parts in zip(*differ, strict=True)] if differ else [""] * len(summary)


def metric_of(examples: pd.DataFrame, base_run: BaseRun, metric: Metric) -> np.ndarray:
    """A base run's metric by image; the clean run's KL from itself is 0."""
    if metric is Metric.KL and base_run is BaseRun.CLEAN:
        return np.zeros(len(examples))
    return examples[f"{metric}_{base_run}"].to_numpy(float)


def described(outcome: Outcome) -> dict[str, Any]:
    """The outcome in the manifest's words; what is not known is null, with the reason."""
    total = outcome.total
    numbers = {"mean": total.mean, "se": total.se, "low": total.low, "high": total.high}
    known = {name: None if np.isnan(value) else value for name, value in numbers.items()}
    result = {"total_effect": known, "peak_layer": outcome.peak_layer, "peak_effect": _of_peak(outcome, "effect")}
    result["peak"] = {name: _of_peak(outcome, name) for name in ("layer", "head", "tokens", "window")}
    notes = _notes(outcome)
    if outcome.peak is None:
        notes.append("peak_layer is null: the mean total effect is 0 and has no direction")
    return result | {"notes": notes}


def _notes(outcome: Outcome) -> list[str]:
    """What a reader of the means must know."""
    notes = []
    if outcome.examples["label_name"].str.endswith(PREDICTED).any():
        notes.append(NO_LABELS)
    if outcome.empty:
        notes.append(EMPTY.format(outcome.empty))
    if outcome.total.holds_zero:
        notes.append(DOES_NOT_MOVE)
    if not outcome.total.known:
        notes.append("no interval: all images are of one cluster")
    if outcome.summary["recovered"].isna().all():
        notes.append(NOT_RECOVERED)
        if is_handover(outcome.summary):
            notes.append(NO_HANDOVER)
    if is_handover(outcome.summary) and outcome.summary["window"].nunique() > 1:
        notes.append(ONE_WINDOW)
    return notes


def is_handover(summary: pd.DataFrame) -> bool:
    """Whether the rows are of the stream at CLS and at the patches."""
    return Site(summary["site"].iloc[0]).is_stream and {"cls", "patches"} <= set(summary["tokens"])


def scalars(outcome: Outcome) -> dict[str, Any]:
    """The tracker's summary values."""
    examples = outcome.examples
    values = {"total_effect": outcome.total.mean, "peak_layer": outcome.peak_layer}
    values["peak_effect"] = _of_peak(outcome, "effect")
    for base_run in BaseRun:
        values[f"prob_{base_run}"] = float(examples[f"prob_{base_run}"].mean())
        values[f"accuracy_{base_run}"] = float((examples[f"pred_{base_run}"] == examples["label"]).mean())
    return values


def _of_peak(outcome: Outcome, column: str) -> Any:
    if outcome.peak is None:
        return None
    value = outcome.peak[column]
    return value.item() if hasattr(value, "item") else value


def lines(outcome: Outcome, study: Study, folder: RunFolder, title: str) -> list[str]:
    """The few lines that end a run."""
    total, peak, values = outcome.total, outcome.peak, scalars(outcome)
    said = [
        f"{folder.path}",
        f"  run           {title}",
        f"  accuracy      clean {values['accuracy_clean']:.3f}, corrupt {values['accuracy_corrupt']:.3f}",
        f"  total effect  {_with_interval(total)} on {study.metric}, n = {counted(len(outcome.examples), 'image')}",
    ]
    said += [f"  note          {note}" for note in _notes(outcome)]
    if peak is not None:
        estimate = Estimate(peak["effect"], peak["effect_se"], peak["effect_low"], peak["effect_high"])
        share = "" if np.isnan(peak["recovered"]) else f", {peak['recovered']:.0%} of the total effect"
        which = series_of(outcome.summary)[outcome.summary.index.get_loc(peak.name)]
        at = f"{outcome.peak_layer} ({which})" if which else str(outcome.peak_layer)
        said.append(f"  peak layer    {at}: {_with_interval(estimate)}{share}")
    else:
        said.append("  peak layer    none: the mean total effect is 0")
    pictures = ", ".join(sorted(path.name for path in folder.figures.iterdir()))
    return [*said, f"  pictures      {pictures} in figures/"]


def _with_interval(estimate: Estimate) -> str:
    if not estimate.known:
        return f"{estimate.mean:+.3f} (one cluster: no interval)"
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
