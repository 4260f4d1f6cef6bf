"""The figures of a run, from its outcome and the few images that were kept of it; no model, no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitpatch.formatting import counted
from vitpatch.plots import style
from vitpatch.plots.classes import class_effects, class_heatmap, class_profiles
from vitpatch.plots.examples import ExamplePage, image_pages
from vitpatch.plots.heatmaps import effect_maps, head_heatmap, rows_over_image
from vitpatch.plots.peak import peak_stability, strength_curve
from vitpatch.plots.profile import References, direct_effects, handover, layer_profile, windows
from vitpatch.plots.style import Caption
from vitpatch.stats.inference import Resamples
from vitpatch.stats.result import RunResult, is_handover, series_names
from vitpatch.stats.summary import in_layer_order, single_rows, synergy
from vitpatch.types import Direction, Donor

Drawn = dict[str, dict[str, Figure]]
"""Figures by the name that they have in the tracker, and by their files'."""
MOST_GROUPS = 4  # token groups side by side in the heatmap of heads, and with windows
CONTROL_WORDS = {
    Donor.SAME_CLASS: "donor: another image of its class, clean",
    Donor.OTHER_CLASS: "donor: an image of another class, clean",
}


@matplotlib.rc_context({"text.parse_math": False})  # a label may hold a dollar
def draw(outcome: RunResult, pages: Sequence[ExamplePage], manifest: Mapping[str, Any]) -> Drawn:
    """Draws a run's figures, by the names that they have in the tracker, each with the names of its files.

    All is drawn from what the run's files hold; of the ``manifest`` ``title``, the run in a line, and ``calibration``,
    where there is one.
    """
    study, run = outcome.study, manifest["title"]
    doubt = style.doubt_words(outcome.total, study.donor, study.direction)
    title = f"{run}\n{doubt}" if doubt else run
    cause = f"{study.donor} ablation" if study.donor.is_constant else ""
    images = len(outcome.examples)
    caption = Caption(title, study.metric, images, outcome.clusters, interval=study.interval, cause=cause)
    summary = outcome.summary.assign(series=series_names(outcome.summary))
    drawn = {
        "layer_profile": layer_profile(summary, profile_references(outcome), caption),
        **_class_figures(outcome, summary, caption),
        **_target_figures(outcome, summary, caption),
    }
    few_groups = summary["tokens"].nunique() <= MOST_GROUPS
    if summary["window"].nunique() > 1 and summary["head"].nunique() == 1 and few_groups:
        drawn["windows"] = windows(summary, _window_sums(outcome, summary), outcome.total, caption)
    if outcome.peaks and outcome.clusters > 1:
        drawn["peak"] = peak_stability(outcome.peaks, summary, caption)
    if manifest.get("calibration"):
        drawn["strength"] = strength_curve(manifest["calibration"], run)
    examples = image_pages(outcome, pages, caption, summary)
    return {name: {name: figure} for name, figure in drawn.items()} | {
        "examples": {f"examples_{name}": page for name, page in examples.items()}
    }


def profile_references(outcome: RunResult) -> References:
    """What the profile is drawn with; without controls that no included image has a partner for."""
    run = "clean" if outcome.study.direction is Direction.DENOISE else "corrupted"
    controls, unselected = {}, ""
    for donor in outcome.controls:
        if outcome.summary[f"effect_{donor}"].notna().any():
            images = int(outcome.summary[f"n_{donor}"].iloc[0])
            some = f" (n = {images})" if images < len(outcome.examples) else ""
            controls[f"effect_{donor}"] = CONTROL_WORDS[donor] + some
    own = f"donor: the image itself, {run} (mean effect)" if controls else "mean effect"
    if outcome.unselected is not None:
        total = outcome.unselected.total.mean
        unselected = f"all {counted(outcome.unselected.images, 'image')}, not selected"
        unselected += "" if np.isnan(total) else f"; their total effect {total:+.3f}"
    return References(outcome.total, outcome.all_layers, own, controls, unselected)


def _target_figures(outcome: RunResult, summary: pd.DataFrame, caption: Caption) -> dict[str, Figure]:
    """What some targets have besides the profile."""
    drawn = {}
    if outcome.study.target.one_head_at_a_time and summary["tokens"].nunique() <= MOST_GROUPS:
        drawn["heads"] = head_heatmap(summary, caption)
    if is_handover(summary) and summary["window"].nunique() == 1 and summary["recovered"].notna().all():
        drawn["handover"] = handover(summary, caption)
    if summary["direct_log_odds"].notna().all():
        drawn["direct"] = direct_effects(summary, caption)
    if (at := rows_over_image(summary)) is not None:
        drawn["maps"] = effect_maps(summary, at, caption)
    return drawn


def _window_sums(outcome: RunResult, summary: pd.DataFrame) -> pd.DataFrame:
    """By window of several layers the sum of their own mean effects, and what it has beyond, with interval."""
    columns = ["sum", "synergy", "synergy_low", "synergy_high"]
    parts = single_rows(summary)
    if not parts:
        return pd.DataFrame(columns=columns, dtype=float)
    alone = summary.index[(summary["window"] != 1) & (summary["n_layers"] == 1)]
    parts |= {row: [row] for row in alone}
    rows, study = list(parts), outcome.study
    beyond = synergy(outcome.effects, rows, list(parts.values()))
    resamples = Resamples(outcome.examples["cluster"].to_numpy(), study.seed)
    spread = resamples.spread(beyond, method=study.interval)
    added = summary["effect"].to_numpy()[rows] - spread.mean
    return pd.DataFrame(np.stack([added, spread.mean, *spread.interval], axis=1), index=rows, columns=columns)


def _class_figures(outcome: RunResult, summary: pd.DataFrame, caption: Caption) -> dict[str, Figure]:
    """Class × layer, and a profile a class, of the series that the peak is in."""
    series = summary["series"].iloc[0] if outcome.peak is None else outcome.peak_series
    rows = in_layer_order(summary, np.flatnonzero(summary["series"] == series))
    effects, means = list(class_effects(outcome, rows)), summary["effect"].iloc[rows].tolist()
    if series:
        caption = caption.extended(f": {series}")
    layers, axis = summary["layer"].iloc[rows].tolist(), style.layer_words(set(summary["window"].iloc[rows]))
    return {
        "heatmap": class_heatmap(effects, layers, axis, caption),
        "classes": class_profiles(effects, layers, means, axis, caption),
    }
