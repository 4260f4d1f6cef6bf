"""What a run found: its numbers, and the words for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vitpatch.runs.folder import RunFolder
from vitpatch.stats.bootstrap import RESAMPLES
from vitpatch.stats.inference import FLIPS
from vitpatch.types import (
    BaseRun,
    Direction,
    Donor,
    Estimate,
    Metric,
    Run,
    Site,
    Study,
    Tested,
    TokenGroup,
    counted,
    window_word,
)

EMPTY = "images in which a token group has no token: {}; their effect there is 0, and they are in the means"
NOT_RECOVERED = "recovered is empty: the mean total effect is within 3 standard errors of 0, or has none"
NO_HANDOVER = "there is no picture of the handover: nothing is known of what is recovered"
ONE_WINDOW = "there is no picture of the handover: it is drawn where there is one window"
NO_LABELS = "the images have no labels: each one's is what the clean run predicts, so the clean accuracy is 1"
DOES_NOT_MOVE = "the total effect's interval holds 0: this corruption is not shown to move the model"


SELECTED = (
    "include={}: images are chosen by what the corruption did to them, which biases every mean away from 0; "
    "of all {}: {}{}"
)
DOES_NOT_DIFFER = (
    "the total effect's interval holds 0: on average another image says as much for a label as the image itself, as a "
    "derangement within a class must"
)
NO_MORE_THAN = (
    "the total effect's interval holds 0: another image's clean run is not shown to say more or less for a label than "
    "the run that it is put into"
)
WHOLE_STREAM = (
    "the whole residual stream is replaced, so the run is the donor's from there: every layer's effect is the total "
    "effect, and the peak says nothing; target.tokens=[cls,patches] says where it lies"
)
UNLIKE = "controls take clean activations of other images, the own donor is the corrupted run: they are not compared"
NEUTRAL = "p is of effects on {}: a patch that is neutral in log odds has a mean there that is not 0, and may be called"
NO_RUN = "donor={}: is no run, so there is no total effect and recovered is empty; the peak is what does most harm"


@dataclass(frozen=True)
class PeakOfGroup:
    """Where the peak of a group of rows may be, the rows that layers are compared in (a window, a kind of tokens).

    ``rows`` of the summary in order of layer, ``stability`` how often each is the peak of a resample; ``members`` the
    rows that are not shown to be below ``best``; ``size`` the peak's effect from split halves.
    """

    name: str
    best: int
    members: NDArray[np.intp]
    rows: NDArray[np.intp]
    stability: NDArray[np.floating]
    size: float


@dataclass(frozen=True)
class Unselected:
    """The same over all images, where those of a run were chosen by what the corruption did to them."""

    images: int
    total: Estimate
    effects: NDArray[np.floating]
    peak_layer: int | None


@dataclass(frozen=True)
class Outcome:
    """What is known once all images are through, over the included ones.

    ``summary`` has a row a patch; ``effects`` and those of ``controls`` (images, patches) are of the headline metric,
    NaN where an image has no such partner; ``together`` is the mean effect of all layers at once; ``towards`` is the
    sign of the total effect; ``peak`` is the row of ``summary`` that goes furthest, ``None`` where the total effect has
    no direction; ``empty`` counts the images in which a token group has no token, ``alone`` those that are left out
    because they have no partner for a donor; ``needed`` (width, clusters) for an interval so wide at the peak.
    """

    study: Study
    donors: tuple[Donor, ...]
    examples: pd.DataFrame
    effects: NDArray[np.floating]
    controls: Mapping[Donor, NDArray[np.floating]]
    summary: pd.DataFrame
    total: Estimate
    together: Estimate | None
    towards: float
    peak: pd.Series | None
    peaks: Sequence[PeakOfGroup]
    empty: int
    alone: int
    marginals: pd.DataFrame | None
    unselected: Unselected | None
    needed: tuple[float, int] | None

    @property
    def clusters(self) -> int:
        """How many clusters the included images are in."""
        return int(self.examples["cluster"].nunique())

    @property
    def labels_are_predicted(self) -> bool:
        """Whether images have no labels, and what the clean run predicts stands in for them."""
        return bool(self.examples["label_is_predicted"].any())

    @property
    def peak_layer(self) -> int | None:
        """The layer of the peak."""
        return None if self.peak is None else int(self.peak["layer"])

    @property
    def doubt(self) -> str:
        """What to say where the total effect's interval holds 0; else nothing."""
        if not self.total.holds_zero:
            return ""
        if self.study.donor is Donor.PAIR:
            return DOES_NOT_MOVE
        same = self.study.donor is Donor.SAME_CLASS and self.study.direction is Direction.NOISE
        return DOES_NOT_DIFFER if same else NO_MORE_THAN

    @property
    def peak_place(self) -> str:
        """The peak's layer, and its series where there are several, in words."""
        assert self.peak is not None, "there is no peak"
        series = series_of(self.summary)[self.summary.index.get_loc(self.peak.name)]
        return f"layer {self.peak_layer}{f', {series}' if series else ''}"

    @property
    def peak_group(self) -> PeakOfGroup | None:
        """The group that the peak is in."""
        return next((g for g in self.peaks if self.peak is not None and self.peak.name in g.rows), None)


def groups_of(summary: pd.DataFrame) -> dict[str, NDArray[np.intp]]:
    """Rows that layers are compared in, by name: those of one window and one kind of tokens; ``""`` = all."""
    kinds = pd.DataFrame(
        {
            "window": [window_word(w) if w < 1 else f"w{w}" for w in summary["window"]],
            "tokens": [name.partition(":")[0] for name in summary["tokens"]],
        }
    )
    differ = [name for name in kinds if kinds[name].nunique() > 1]
    if not differ:
        return {"": np.arange(len(summary))}
    names = kinds[differ].agg("-".join, axis=1)
    return {name: np.flatnonzero(names == name) for name in dict.fromkeys(names)}


def series_of(summary: pd.DataFrame) -> list[str]:
    """What tells apart patches of one layer, by row: window, head, tokens, as far as they differ; ``""`` = nothing."""
    named = {
        "window": [window_word(w) if w < 1 else f"w{w}" for w in summary["window"]],
        "head": [f"h{head}" for head in summary["head"]],
        "tokens": list(summary["tokens"]),
    }
    differ = [values for values in named.values() if len(set(values)) > 1]
    return ["-".join(parts) for parts in zip(*differ, strict=True)] if differ else [""] * len(summary)


def in_layer_order(summary: pd.DataFrame, rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Rows of the summary from the first layer to the last, as they came within one layer."""
    return rows[np.argsort(summary["layer"].to_numpy()[rows], kind="stable")]


def metric_of(examples: pd.DataFrame, base_run: Run, metric: Metric) -> np.ndarray:
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
    result["label_is_predicted"] = outcome.labels_are_predicted
    result["peak"] = {name: _of_peak(outcome, name) for name in ("layer", "head", "tokens", "window")}
    result |= _of_peak_group(outcome)
    if outcome.unselected is not None:
        all_of = outcome.unselected
        estimate = {name: getattr(all_of.total, name) for name in ("mean", "se", "low", "high")}
        result["unselected"] = {"n": all_of.images, "total_effect": estimate, "peak_layer": all_of.peak_layer}
    if outcome.needed is not None:
        width, clusters = outcome.needed
        result["planning"] = {"interval_width": width, "clusters": clusters, "has": outcome.clusters}
    result["statistics"] = {
        "interval": outcome.study.interval,
        "resamples": RESAMPLES,
        "sign_flips": FLIPS,
        "tests": outcome.study.metric if outcome.study.test is Tested.HEADLINE else Metric.LOG_ODDS,
        "images": len(outcome.examples),
        "clusters": outcome.clusters,
    }
    notes = _notes(outcome)
    if outcome.peak is None:
        notes.append("peak_layer is null: the mean total effect is 0 and has no direction")
    return result | {"notes": notes}


def _of_peak_group(outcome: Outcome) -> dict[str, Any]:
    """The layers that may be the peak, how often the peak is it in resamples, its size from split halves."""
    group = outcome.peak_group
    if group is None:
        return {"peak_set": None, "peak_stability": None, "peak_effect_split_halves": None}
    layers = outcome.summary["layer"].to_numpy()[group.members]
    stability = float(outcome.peak["peak_share"])
    return {
        "peak_set": sorted({int(layer) for layer in layers}),
        "peak_stability": None if np.isnan(stability) else stability,
        "peak_effect_split_halves": None if np.isnan(group.size) else group.size,
    }


def _notes(outcome: Outcome) -> list[str]:
    """What a reader of the means must know."""
    notes = []
    if outcome.labels_are_predicted:
        notes.append(NO_LABELS)
    if outcome.empty:
        notes.append(EMPTY.format(outcome.empty))
    if outcome.unselected is not None:
        all_of = outcome.unselected
        notes.append(
            SELECTED.format(
                outcome.study.include,
                counted(all_of.images, "image"),
                "" if np.isnan(all_of.total.mean) else f"total effect {all_of.total.mean:+.3f}, ",
                "no peak layer" if all_of.peak_layer is None else f"peak layer {all_of.peak_layer}",
            )
        )
    if outcome.study.test is Tested.HEADLINE and outcome.study.metric is not Metric.LOG_ODDS:
        notes.append(NEUTRAL.format(outcome.study.metric))
    if outcome.controls and outcome.study.direction is Direction.NOISE:
        notes.append(UNLIKE)
    if outcome.study.donor.is_constant:
        return [*notes, NO_RUN.format(outcome.study.donor)]
    if (outcome.summary["tokens"] == TokenGroup.ALL).all() and Site(outcome.summary["site"].iloc[0]).is_stream:
        notes.append(WHOLE_STREAM)
    if outcome.doubt:
        notes.append(outcome.doubt)
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
    total = None if np.isnan(outcome.total.mean) else outcome.total.mean
    values = {"total_effect": total, "peak_layer": outcome.peak_layer}
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


def lines(outcome: Outcome, folder: RunFolder, title: str, notes: Sequence[str] = ()) -> list[str]:
    """The few lines that end a run; ``notes`` are those on its labels and probabilities."""
    peak, values = outcome.peak, scalars(outcome)
    corrupt = f", corrupt {values['accuracy_corrupt']:.3f}" * outcome.study.depends_on_corruption
    said = [
        f"{folder.path}",
        f"  run           {title}",
        f"  accuracy      clean {values['accuracy_clean']:.3f}{corrupt}",
        f"  total effect  {_said_total(outcome)}, n = {_sample(outcome)}",
    ]
    said += [f"  note          {note}" for note in [*notes, *_notes(outcome)]]
    if peak is None:
        said.append("  peak layer    none: the mean total effect is 0")
    else:
        said += _said_peak(outcome, peak)
    if outcome.needed is not None:
        width, clusters = outcome.needed
        said.append(
            f"  planning      an interval {width:.2g} wide at the peak takes about {counted(clusters, 'cluster')}"
        )
    pictures = ", ".join(sorted(path.name for path in folder.figures.iterdir()))
    return [*said, f"  pictures      {pictures} in figures/"]


def _sample(outcome: Outcome) -> str:
    images = counted(len(outcome.examples), "image")
    return images + (f" in {counted(outcome.clusters, 'cluster')}" if outcome.clusters < len(outcome.examples) else "")


def _said_total(outcome: Outcome) -> str:
    if np.isnan(outcome.total.mean):
        return f"none on {outcome.study.metric} (donor {outcome.study.donor})"
    return f"{_with_interval(outcome.total)} on {outcome.study.metric}"


def _said_peak(outcome: Outcome, peak: pd.Series) -> list[str]:
    estimate = Estimate(peak["effect"], peak["effect_se"], peak["effect_low"], peak["effect_high"])
    share = "" if np.isnan(peak["recovered"]) else f", {peak['recovered']:.0%} of the total effect"
    which = series_of(outcome.summary)[outcome.summary.index.get_loc(peak.name)]
    at = f"{outcome.peak_layer} ({which})" if which else str(outcome.peak_layer)
    said = [f"  peak layer    {at}: {_with_interval(estimate)}{share}"]
    found = _of_peak_group(outcome)
    if found["peak_stability"] is not None:
        group, layers = outcome.peak_group, ", ".join(map(str, found["peak_set"]))
        by_layer = outcome.summary["layer"].iloc[group.rows].is_unique
        which = f"layer{'s' * (',' in layers)} {layers}"
        which = which if by_layer else f"{len(group.members)} of {len(group.rows)} places, in {which}"
        said.append(
            f"  peak set      {which}; in {found['peak_stability']:.0%} of resamples the peak is this one; "
            f"{found['peak_effect_split_halves']:+.3f} from split halves"
        )
    for donor in outcome.controls:
        mean, low, high = (peak[f"effect_{donor}{end}"] for end in ("", "_low", "_high"))
        images = int(peak[f"n_{donor}"])
        some = f", n = {counted(images, 'image')}" * (images < len(outcome.examples))
        said.append(f"  control       {donor} there: {_with_interval(Estimate(mean, np.nan, low, high))}{some}")
    return said


def _with_interval(estimate: Estimate) -> str:
    if np.isnan(estimate.mean):
        return "none: no included image has such a partner"
    if not estimate.known:
        return f"{estimate.mean:+.3f} (one cluster: no interval)"
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
