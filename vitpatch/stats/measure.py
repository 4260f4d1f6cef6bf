"""From the merged files of a run to what it found; needs no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vitpatch.errors import VitPatchError
from vitpatch.runs.folder import RunFolder
from vitpatch.schema import PATCH_COLUMNS
from vitpatch.stats import inference
from vitpatch.stats import summary as stats
from vitpatch.stats.bootstrap import Array, Resamples, Spread
from vitpatch.stats.result import Outcome, PeakOfGroup, Unselected, groups_of, in_layer_order, metric_of
from vitpatch.stats.summary import with_ends
from vitpatch.types import Direction, Donor, Estimate, Metric, Study, Tested, run_of

SHARE_OF_TOTAL = 0.1
"""The width that an interval is wanted to have where none is asked for, in shares of the total effect."""


@dataclass(frozen=True)
class Read:
    """What is in ``effects.parquet``, (images, patches) each; ``extra`` by name ``effect_*`` and ``log_odds_*``, of
    controls. ``log_odds`` and ``prob`` are effects, against the recipient."""

    measured: stats.Measured
    prob: Array
    extra: dict[str, Array]
    is_empty: NDArray[np.bool_]
    like_own: bool = True

    def of(self, images: NDArray) -> Read:
        """Some of the images."""
        extra = {name: values[images] for name, values in self.extra.items()}
        return Read(self.measured.of(images), self.prob[images], extra, self.is_empty[images], self.like_own)


def measure(folder: RunFolder, study: Study, donors: Sequence[Donor]) -> Outcome:
    """Means, intervals, tests and the peak, from the merged files.

    Raises ``VitPatchError`` where no image is included.
    """
    examples, patches = _examples(folder), patches_in(folder)
    read = _read(folder, examples, len(patches), study, donors)
    examples["total_effect"] = total_by_image(examples, study.donor, study.direction, study.metric)
    everyone = np.ones(len(examples), dtype=bool)
    if study.donor.partner is not None:
        everyone = examples[f"partner_{study.donor}"].to_numpy() >= 0
    kept = examples["included"].to_numpy()
    if not kept.any():
        raise VitPatchError(f"include {study.include}: none of {len(examples)} images is; use another rule or images")
    unselected = None
    if study.include.selects_on_the_outcome:
        unselected = _unselected(patches, read.of(everyone), examples[everyone].reset_index(drop=True), study)
    examples, read = examples[kept].reset_index(drop=True), read.of(kept)
    resamples = Resamples(examples["cluster"].to_numpy(), study.seed)
    total = resamples.spread(examples[["total_effect"]].to_numpy(float), method=study.interval).estimates[0]
    towards = _towards(total.mean, study)
    summary, peaks = summarized(patches, read, examples, resamples, study.interval, towards, study.test)
    if unselected is not None:
        summary["effect_unselected"] = unselected.effects
    marginals = _marginals(folder, kept, summary, read, examples, resamples, study)
    by_layer = summary.sort_values("layer", kind="stable")
    at = stats.peak(by_layer["effect"].to_numpy(), towards)
    peak = None if at is None else by_layer.iloc[at]
    return Outcome(
        study=study,
        donors=tuple(donors),
        examples=examples,
        effects=read.measured.effects,
        controls={donor: read.extra[f"effect_{donor}"] for donor in donors[1:]},
        summary=summary,
        total=total,
        together=_together(examples, resamples, study),
        towards=towards,
        peak=peak,
        peaks=peaks,
        empty=int(read.is_empty.sum()),
        alone=int((~everyone).sum()),
        marginals=marginals,
        unselected=unselected,
        needed=None if peak is None else _needed(read.measured.effects[:, peak.name], total.mean, examples, study),
    )


def summarized(
    patches: pd.DataFrame,
    read: Read,
    examples: pd.DataFrame,
    resamples: Resamples,
    method: str,
    towards: float,
    tested: Tested = Tested.LOG_ODDS,
) -> tuple[pd.DataFrame, list[PeakOfGroup]]:
    """The rows of ``summary.csv`` of the images given, and the peaks of their groups.

    ``patches`` and ``examples`` as in ``stats.summarize``; ``method`` of the intervals; ``towards`` is the sign of the
    total effect, 0 = there is no peak.
    """
    summary = stats.summarize(patches, read.measured, examples, resamples.seed, method)
    summary = summary.assign(
        **_controls(read, resamples, method),
        **_tests(read, resamples, method, tested),
        **_synergies(read, summary, resamples, method),
    )
    peaks = list(_peaks(summary, read.measured.effects, towards, resamples)) if towards else []
    return summary.assign(**_of_peaks(peaks, len(summary))), peaks


def patches_in(folder: RunFolder) -> pd.DataFrame:
    """What names each patch, a row each, from the rows of the first image."""
    with pq.ParquetFile(folder.effects) as file:
        first = file.read_row_group(0, columns=["example_id", *PATCH_COLUMNS]).to_pandas()
    return first[first["example_id"] == first["example_id"].iloc[0]][list(PATCH_COLUMNS)].reset_index(drop=True)


def _examples(folder: RunFolder) -> pd.DataFrame:
    """The run's images. Earlier versions did not say whether labels are predicted, but in their names' words."""
    examples = pd.read_parquet(folder.examples)
    return examples if "label_is_predicted" in examples else examples.assign(label_is_predicted=False)


def _read(folder: RunFolder, examples: pd.DataFrame, patches: int, study: Study, donors: Sequence[Donor]) -> Read:
    """What was measured of all images, read a row group at a time."""
    extra = [f"{name}_{donor}" for donor in donors[1:] for name in ("effect", "log_odds")]
    names = ["effect", "log_odds", "prob", "direct_log_odds", "delta_norm", *extra]
    floats = {name: np.empty((len(examples), patches), dtype=np.float32) for name in names}
    correct = np.empty((len(examples), patches), dtype=bool)
    is_empty = np.zeros(len(examples), dtype=bool)
    labels = examples["label"].to_numpy()
    of_recipient = {name: examples[f"{name}_{study.direction.recipient}"].to_numpy() for name in ("prob", "log_odds")}
    row = 0
    with pq.ParquetFile(folder.effects) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[*names, "pred", "n_tokens"])
            here = slice(row, row + table.num_rows // patches)
            for name, values in floats.items():
                values[here] = table[name].to_numpy().reshape(-1, patches)
                kind = next((kind for kind in of_recipient if name.startswith(kind)), None)
                if kind is not None:
                    values[here] -= of_recipient[kind][here, None]
            correct[here] = table["pred"].to_numpy().reshape(-1, patches) == labels[here, None]
            is_empty[here] = (table["n_tokens"].to_numpy().reshape(-1, patches) == 0).any(1)
            row = here.stop
    assert row == len(examples), f"{row} images have effects, {len(examples)} have base runs"
    like_own = study.direction is Direction.DENOISE  # else the own donor is corrupt, and those of controls clean
    measured = stats.Measured(
        floats["effect"], correct, floats["log_odds"], floats["direct_log_odds"], floats["delta_norm"]
    )
    return Read(measured, floats["prob"], {name: floats[name] for name in extra}, is_empty, like_own)


def total_by_image(examples: pd.DataFrame, donor: Donor, direction: Direction, metric: Metric) -> NDArray[np.floating]:
    """The donor's base run minus the recipient's, by image; NaN of a donor that is no run."""
    run = run_of(donor, direction)
    if run is None:
        return np.full(len(examples), np.nan)
    return metric_of(examples, run, metric) - metric_of(examples, direction.recipient, metric)


def _towards(total: float, study: Study) -> float:
    """The sign of the total effect; of a donor that is no run that of damage."""
    if study.donor.is_constant:
        return 1.0 if study.metric is Metric.KL else -1.0
    return float(np.sign(total))


def _together(examples: pd.DataFrame, resamples: Resamples, study: Study) -> Estimate | None:
    """The mean effect of all layers patched at once, where that was done."""
    if "effect_all_layers" not in examples:
        return None
    values = examples[["effect_all_layers"]].to_numpy(float)
    return resamples.spread(values, method=study.interval).estimates[0]


def _unselected(patches: pd.DataFrame, read: Read, examples: pd.DataFrame, study: Study) -> Unselected:
    """The same of all images, beside those that were chosen by what the corruption did to them."""
    resamples = Resamples(examples["cluster"].to_numpy(), study.seed)
    total = resamples.spread(examples[["total_effect"]].to_numpy(float), method=study.interval).estimates[0]
    effects = read.measured.effects.mean(0, dtype=float)
    order = np.argsort(patches["layer"], kind="stable")
    at = stats.peak(effects[order], _towards(total.mean, study))
    peak = None if at is None else int(patches["layer"].iloc[order[at]])
    return Unselected(len(examples), total, effects, peak)


def _controls(read: Read, resamples: Resamples, method: str) -> dict[str, Array]:
    """Columns of each control: the images that have such a partner, mean effect and interval over these."""
    columns: dict[str, Array] = {}
    for name in (name for name in read.extra if name.startswith("effect_")):
        there = ~np.isnan(read.extra[name][:, 0])
        columns[name.replace("effect", "n", 1)] = np.full(read.extra[name].shape[1], there.sum())
        columns |= _over(name, read.extra[name][there], resamples, there, method)
    return columns


def _tests(read: Read, resamples: Resamples, method: str, tested: Tested) -> dict[str, Array]:
    """Family-wise p over all patches of the run: of the effect, and of own − other-class donor."""
    clusters, seed = resamples.clusters, resamples.seed
    name, own = "log_odds", read.measured.log_odds
    if tested is Tested.HEADLINE:
        name, own = "effect", read.measured.effects
    columns = {"p": inference.sign_flip_p(own, clusters, seed)}
    other = read.extra.get(f"{name}_{Donor.OTHER_CLASS}")
    if other is not None and read.like_own:
        there = ~np.isnan(other[:, 0])
        apart = own[there] - other[there]
        columns |= _over("own_minus_other", apart, resamples, there, method)
        known = there.any()
        columns["p_own_minus_other"] = inference.sign_flip_p(apart, clusters[there], seed) if known else np.nan
    return columns


def _over(name: str, values: Array, resamples: Resamples, there: NDArray[np.bool_], method: str) -> dict[str, Array]:
    """Mean and interval over those of the images that are ``there``; NaN where none is."""
    if not there.any():
        unknown = np.full(values.shape[1], np.nan)
        return with_ends(name, Spread(unknown, None, None))
    same = resamples if there.all() else Resamples(resamples.clusters[there], resamples.seed)
    return with_ends(name, same.spread(values, method=method))


def singles_of(summary: pd.DataFrame) -> dict[int, list[int]]:
    """For each row of several layers the rows of its layers alone, where all of them are there."""
    alone = {(row.tokens, row.head, row.layer): row.Index for row in summary.itertuples() if row.window == 1}
    found = {}
    for row in summary[summary["n_layers"] > 1].itertuples():
        layers = [alone.get((row.tokens, row.head, layer)) for layer in range(row.first_layer, row.last_layer + 1)]
        if None not in layers:
            found[row.Index] = layers
    return found


def _synergies(read: Read, summary: pd.DataFrame, resamples: Resamples, method: str) -> dict[str, Array]:
    """Columns of a window's effect less the sum of its layers', where these are there."""
    singles = singles_of(summary)
    columns: dict[str, Array] = {}
    for name, effects in (("synergy_prob", read.prob), ("synergy_log_odds", read.measured.log_odds)):
        if not singles:
            continue
        values = stats.synergy(effects, list(singles), list(singles.values()))
        for column, known in with_ends(name, resamples.spread(values, method=method)).items():
            columns[column] = np.full(len(summary), np.nan)
            columns[column][list(singles)] = known
    return columns


def _marginals(
    folder: RunFolder,
    kept: NDArray[np.bool_],
    summary: pd.DataFrame,
    read: Read,
    examples: pd.DataFrame,
    resamples: Resamples,
    study: Study,
) -> pd.DataFrame | None:
    """What each layer adds to the rest of its window, a row each, of a run with ``synergy=true``."""
    if not folder.leave_outs.exists():
        return None
    table = pd.read_parquet(folder.leave_outs)
    names = table[table["example_id"] == table["example_id"].iloc[0]][[*PATCH_COLUMNS, "without"]]
    names = names.reset_index(drop=True)
    rows = {tuple(row): i for i, row in enumerate(summary[list(PATCH_COLUMNS)].itertuples(index=False))}
    whole = [rows[tuple(row)] for row in names[list(PATCH_COLUMNS)].itertuples(index=False)]
    recipient, columns = study.direction.recipient, {}
    for metric, effects in ((Metric.PROB, read.prob), (Metric.LOG_ODDS, read.measured.log_odds)):
        rest = table[str(metric)].to_numpy().reshape(len(kept), -1)[kept]
        rest = rest - metric_of(examples, recipient, metric)[:, None]
        both = np.hstack([effects, rest])
        values = stats.marginal(both, [(at, effects.shape[1] + i) for i, at in enumerate(whole)])
        columns |= with_ends(f"marginal_{metric}", resamples.spread(values, method=study.interval))
    return names.assign(**columns)


def _peaks(summary: pd.DataFrame, effects: Array, towards: float, resamples: Resamples) -> Iterator[PeakOfGroup]:
    """Of each group of rows that layers are compared in: the rows that may be its peak, and its size."""
    for name, rows in groups_of(summary).items():
        ordered = in_layer_order(summary, rows)
        values = effects[:, ordered]
        found = inference.peak_set(values, towards, resamples.clusters, resamples.seed)
        size = inference.peak_size(values, towards, resamples.clusters, resamples.seed)
        members = ordered[list(found.members)]
        yield PeakOfGroup(name, int(ordered[found.best]), members, ordered, found.stability, size)


def _of_peaks(peaks: Sequence[PeakOfGroup], rows: int) -> dict[str, Array]:
    """Columns: whether a row may be its group's peak, and how often it is in resamples."""
    member, often = np.zeros(rows, dtype=bool), np.full(rows, np.nan)
    for peak in peaks:
        member[peak.members], often[peak.rows] = True, peak.stability
    return {"in_peak_set": member, "peak_share": often} if peaks else {}


def _needed(values: Array, total: float, examples: pd.DataFrame, study: Study) -> tuple[float, int] | None:
    """(wanted width, clusters) for the interval at the peak; ``None`` where nothing is known of it."""
    width = study.wanted_width or SHARE_OF_TOTAL * abs(total)
    clusters = examples["cluster"].to_numpy()
    if not width > 0 or len(np.unique(clusters)) < 2:
        return None
    return width, inference.clusters_needed(values, clusters, width)
