"""The figures of a run, from its outcome and the few images that were kept of it; no model, no data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitpatch.plots import peak as evidence
from vitpatch.plots import profile as profiles
from vitpatch.plots import small_multiples as panels
from vitpatch.plots import style as plots
from vitpatch.plots.examples import Page
from vitpatch.plots.heatmaps import also, image_pages, mean_maps, over_the_image
from vitpatch.stats import summary as stats
from vitpatch.stats.bootstrap import Resamples
from vitpatch.stats.result import Outcome, is_handover, series_of
from vitpatch.stats.summary import GroupPeak, in_layer_order, single_rows
from vitpatch.types import Direction, Donor, Estimate, counted

Drawn = dict[str, dict[str, Figure]]
"""Figures by the name that they have in the tracker, and by their files'."""
MOST_GROUPS = 4
"""Token groups side by side in the heatmap of heads, and with windows."""
CONTROL_WORDS = {
    Donor.SAME_CLASS: "donor: another image of its class, clean",
    Donor.OTHER_CLASS: "donor: an image of another class, clean",
}


@matplotlib.rc_context({"text.parse_math": False})  # a label may hold a dollar
def draw(outcome: Outcome, shown: Sequence[Page], manifest: Mapping[str, Any]) -> Drawn:
    """Draws a run's figures, by the names that they have in the tracker, each with the names of its files.

    All is drawn from what the run's files hold; of the ``manifest`` ``title``, the run in a line, and ``calibration``,
    where there is one.
    """
    study, run = outcome.study, manifest["title"]
    doubt = plots.doubt_words(outcome.total, study.donor, study.direction)
    title = f"{run}\n{doubt}" if doubt else run
    cause = f"{study.donor} ablation" if study.donor.is_constant else ""
    caption = plots.Caption(
        title, study.metric, len(outcome.examples), outcome.clusters, interval=study.interval, cause=cause
    )
    summary = outcome.summary.assign(series=series_of(outcome.summary))
    drawn = {
        "layer_profile": profiles.layer_profile(summary, _beside(outcome), caption),
        **_by_class(outcome, summary, caption),
        **_figures_of_target(outcome, summary, caption),
        **_figures_of_run(outcome, summary, caption),
    }
    if manifest.get("calibration"):
        drawn["strength"] = evidence.strength_curve(manifest["calibration"], run)
    examples = image_pages(outcome, shown, caption, summary)
    return {name: {name: figure} for name, figure in drawn.items()} | {
        "examples": {f"examples_{name}": page for name, page in examples.items()}
    }


def _beside(outcome: Outcome) -> profiles.Beside:
    """What the profile is drawn beside, in words; without controls that no included image has a partner for."""
    run = "clean" if outcome.study.direction is Direction.DENOISE else "corrupted"
    known = [donor for donor in outcome.controls if outcome.summary[f"effect_{donor}"].notna().any()]
    own = f"donor: the image itself, {run} (mean effect)" if known else "mean effect"
    controls = {f"effect_{donor}": _said_control(outcome, donor) for donor in known}
    everyone = ""
    if outcome.unselected is not None:
        images = counted(outcome.unselected.images, "image")
        total = outcome.unselected.total.mean
        everyone = f"all {images}, not selected" + ("" if np.isnan(total) else f"; their total effect {total:+.3f}")
    return profiles.Beside(outcome.total, outcome.together, own, controls, everyone)


def _said_control(outcome: Outcome, donor: Donor) -> str:
    """A control in words, with the number of its images where some have no partner."""
    images = int(outcome.summary[f"n_{donor}"].iloc[0])
    return CONTROL_WORDS[donor] + (f" (n = {images})" if images < len(outcome.examples) else "")


def _figures_of_target(outcome: Outcome, summary: pd.DataFrame, caption: plots.Caption) -> dict[str, Figure]:
    """What some targets have beside the profile."""
    target, drawn = outcome.study.target, {}
    if target.one_head_at_a_time and summary["tokens"].nunique() <= MOST_GROUPS:
        drawn["heads"] = plots.head_heatmap(summary, caption)
    if is_handover(summary) and summary["window"].nunique() == 1 and summary["recovered"].notna().all():
        drawn["handover"] = plots.handover(summary, caption)
    if summary["direct_log_odds"].notna().all():
        drawn["direct"] = plots.direct_effects(summary, caption)
    if (at := over_the_image(summary)) is not None:
        drawn["maps"] = mean_maps(summary, at, caption)
    return drawn


def _figures_of_run(outcome: Outcome, summary: pd.DataFrame, caption: plots.Caption) -> dict[str, Figure]:
    """Windows, where there are several, and how stable the peak is, where there is more than one cluster."""
    drawn = {}
    one_head = summary["head"].nunique() == 1
    if summary["window"].nunique() > 1 and one_head and summary["tokens"].nunique() <= MOST_GROUPS:
        drawn["windows"] = panels.windows(summary, _sums(outcome, summary), outcome.total, caption)
    if outcome.peaks and outcome.clusters > 1:
        by_layer = all(summary["layer"].iloc[group.rows].is_unique for group in outcome.peaks)
        groups = [_stability(group, summary, by_layer) for group in outcome.peaks]
        drawn["peak"] = evidence.peak_stability(groups, caption)
    return drawn


def _sums(outcome: Outcome, summary: pd.DataFrame) -> pd.DataFrame:
    """By window of several layers the sum of their own mean effects, and what it has beyond, with interval."""
    alone = summary.index[(summary["window"] != 1) & (summary["n_layers"] == 1)]
    parts = single_rows(summary)
    if parts:
        parts |= {row: [row] for row in alone}
    columns = ["sum", "synergy", "synergy_low", "synergy_high"]
    if not parts:
        return pd.DataFrame(columns=columns, dtype=float)
    whole, study = list(parts), outcome.study
    beyond = stats.synergy(outcome.effects, whole, list(parts.values()))
    resamples = Resamples(outcome.examples["cluster"].to_numpy(), study.seed)
    spread = resamples.spread(beyond, method=study.interval)
    added = summary["effect"].to_numpy()[whole] - spread.mean
    return pd.DataFrame(np.stack([added, spread.mean, *spread.interval], axis=1), index=whole, columns=columns)


def _stability(group: GroupPeak, summary: pd.DataFrame, by_layer: bool) -> evidence.Stability:
    """How stable a group's peak is, its places in words."""
    rows = summary.iloc[group.rows]
    places = [str(layer) for layer in rows["layer"]]
    if not by_layer:
        places = [f"layer {layer}, {name}" for layer, name in zip(places, series_of(rows), strict=True)]
    return evidence.Stability(
        group=group.name,
        axis=plots.layer_words(set(rows["window"])) if by_layer else "",
        places=places,
        shares=group.stability,
        members=np.isin(group.rows, group.members),
        best=int(np.flatnonzero(group.rows == group.best)[0]),
        size=float(summary["effect"].iloc[group.best]),
        halves=group.size,
    )


def _by_class(outcome: Outcome, summary: pd.DataFrame, caption: plots.Caption) -> dict[str, Figure]:
    """Class × layer, and a profile a class, of the series that the peak is in."""
    series = summary["series"].iloc[0] if outcome.peak is None else summary.loc[outcome.peak.name, "series"]
    rows = in_layer_order(summary, np.flatnonzero(summary["series"] == series))
    classes = list(_classes(outcome, rows))
    if series:
        caption = also(caption, f": {series}")
    shown = summary.iloc[rows]
    layers, words = shown["layer"].tolist(), plots.layer_words(set(shown["window"]))
    return {
        "heatmap": plots.class_heatmap(classes, layers, words, caption),
        "classes": panels.classes(classes, layers, shown["effect"].tolist(), words, caption),
    }


def _classes(outcome: Outcome, rows: NDArray[np.intp]) -> Iterator[plots.OfClass]:
    """Effects at some rows of the summary on the images of each class."""
    examples = outcome.examples
    labels, clusters, total = (examples[name].to_numpy() for name in ("label", "cluster", "total_effect"))
    one_of_each = examples.drop_duplicates("label").to_dict("records")
    names, study = {example["label"]: plots.label_words(example) for example in one_of_each}, outcome.study
    for label, images, estimates in stats.by_class(
        outcome.effects[:, rows], labels, clusters, study.seed, study.interval
    ):
        number = len(np.unique(clusters[labels == label]))
        if number < plots.FEW_CLUSTERS:
            estimates = [_without_interval(estimate) for estimate in estimates]
        yield plots.OfClass(names[label], images, number, estimates, float(total[labels == label].mean()))


def _without_interval(estimate: Estimate) -> Estimate:
    """An interval of a few clusters says little."""
    return Estimate(estimate.mean, np.nan, np.nan, np.nan)
