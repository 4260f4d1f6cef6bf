"""What a run found: from the merged files to means, intervals and words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from vitpatch import stats
from vitpatch.config import Study
from vitpatch.effects import total_effect
from vitpatch.plan import Plan
from vitpatch.spec import BaseRun, Estimate, Metric
from vitpatch.store import RunFolder, patch_columns

DOES_NOT_MOVE = "the total effect's interval holds 0: this corruption does not move the model"


@dataclass(frozen=True)
class Outcome:
    """What is known once all images are through, over the included ones.

    ``effects`` (images, patches) of the headline metric; ``summary`` has a row a patch.
    """

    examples: pd.DataFrame
    effects: np.ndarray
    summary: pd.DataFrame
    total: Estimate
    peak: int | None

    @property
    def clusters(self) -> int:
        """How many clusters the included images are in."""
        return int(self.examples["cluster"].nunique())


def measure(folder: RunFolder, plan: Plan, study: Study) -> Outcome:
    """Means, intervals and the peak, from the merged files; writes ``summary.csv``."""
    examples = pd.read_parquet(folder.examples)
    patches = pd.DataFrame(patch_columns(plan))
    effects, correct = _matrices(folder, examples, len(patches))
    included = examples["included"].to_numpy()
    examples, effects, correct = examples[included].reset_index(drop=True), effects[included], correct[included]
    clean, corrupt = (metric_of(examples, run, study.metric) for run in (BaseRun.CLEAN, BaseRun.CORRUPT))
    examples["total_effect"] = total_effect(clean, corrupt, study.direction)
    seed = study.seed
    summary = stats.summarize(patches, effects, correct, examples, seed)
    clusters = examples["cluster"].to_numpy()
    (total,) = stats.estimates(examples[["total_effect"]].to_numpy(float), clusters, seed)
    by_layer = summary.sort_values("layer", kind="stable")
    at = stats.peak(by_layer["effect"].to_numpy(), total.mean)
    folder.write_summary(summary)
    return Outcome(examples, effects, summary, total, None if at is None else int(by_layer["layer"].iloc[at]))


def _matrices(folder: RunFolder, examples: pd.DataFrame, patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Effects float32 and correctness bool of all images, (images, patches), read a row group at a time."""
    effects = np.empty((len(examples), patches), dtype=np.float32)
    correct = np.empty((len(examples), patches), dtype=bool)
    labels, row = examples["label"].to_numpy(), 0
    with pq.ParquetFile(folder.effects) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["effect", "pred"])
            of_group = slice(row, row + table.num_rows // patches)
            effects[of_group] = table["effect"].to_numpy().reshape(-1, patches)
            correct[of_group] = table["pred"].to_numpy().reshape(-1, patches) == labels[of_group, None]
            row = of_group.stop
    assert row == len(examples), f"{row} images have effects, {len(examples)} have base runs"
    return effects, correct


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
    result = {"total_effect": known, "peak_layer": outcome.peak, "peak_effect": _peak_row(outcome).get("effect")}
    notes = []
    if total.holds_zero:
        notes.append(DOES_NOT_MOVE)
    if not total.known:
        notes.append("no interval: all images are of one cluster")
    if outcome.summary["recovered"].isna().all():
        notes.append("recovered is empty: the mean total effect is within 3 standard errors of 0, or has none")
    if outcome.peak is None:
        notes.append("peak_layer is null: the mean total effect is 0 and has no direction")
    return result | {"notes": notes}


def scalars(outcome: Outcome) -> dict[str, Any]:
    """The tracker's summary values."""
    examples = outcome.examples
    values = {"total_effect": outcome.total.mean, "peak_layer": outcome.peak}
    values["peak_effect"] = _peak_row(outcome).get("effect")
    for base_run in BaseRun:
        values[f"prob_{base_run}"] = float(examples[f"prob_{base_run}"].mean())
        values[f"accuracy_{base_run}"] = float((examples[f"pred_{base_run}"] == examples["label"]).mean())
    return values


def _peak_row(outcome: Outcome) -> dict[str, Any]:
    if outcome.peak is None:
        return {}
    return outcome.summary[outcome.summary["layer"] == outcome.peak].iloc[0].to_dict()


def lines(outcome: Outcome, study: Study, folder: RunFolder, title: str) -> list[str]:
    """The few lines that end a run."""
    total, peak, values = outcome.total, _peak_row(outcome), scalars(outcome)
    said = [
        f"{folder.path}",
        f"  run           {title}",
        f"  accuracy      clean {values['accuracy_clean']:.3f}, corrupt {values['accuracy_corrupt']:.3f}",
        f"  total effect  {_with_interval(total)} on {study.metric}, n = {len(outcome.examples)} images",
    ]
    if total.holds_zero:
        said.append(f"  note          {DOES_NOT_MOVE}")
    if peak:
        estimate = Estimate(peak["effect"], peak["effect_se"], peak["effect_low"], peak["effect_high"])
        share = "" if np.isnan(peak["recovered"]) else f", {peak['recovered']:.0%} of the total effect"
        said.append(f"  peak layer    {outcome.peak}: {_with_interval(estimate)}{share}")
    else:
        said.append("  peak layer    none: the mean total effect is 0")
    pictures = ", ".join(sorted(path.name for path in folder.figures.iterdir()))
    return [*said, f"  pictures      {pictures} in figures/"]


def _with_interval(estimate: Estimate) -> str:
    if not estimate.known:
        return f"{estimate.mean:+.3f} (one cluster: no interval)"
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
