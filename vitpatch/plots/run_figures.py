"""The figures of a finished run, from its result and the few images that were kept of it; no model, no data.

To add one: write a function that returns a ``Figure`` in the file of its subject (``profile``, ``heatmaps``, …), and
give it a name in ``draw`` – only where the run has its numbers: a constant donor has no total effect (NaN).
``python -m vitpatch.compare RUN --redraw`` then draws it as ``figures/NAME.png``. The name also goes into the README's
row ``figures/*.png`` and into the lists in ``tests/runs/test_run.py`` (``test_pictures_are_pictures``) and
``tests/slow/test_random_runs.py`` (``pictures_of``); its test into ``tests/plots/test_pictures.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitpatch.formatting import format_count
from vitpatch.plots import style
from vitpatch.plots.classes import class_effects, class_heatmap
from vitpatch.plots.examples import ExamplePage, image_page
from vitpatch.plots.handover import direct_effects, direct_rows, handover
from vitpatch.plots.heatmaps import head_heatmap
from vitpatch.plots.layout import AS_WIDE_AS_NEEDED, FigureOptions, shrink_for_print
from vitpatch.plots.maps import effect_maps, rows_over_image
from vitpatch.plots.peak import peak_stability, strength_curve
from vitpatch.plots.profile import References, has_peak, layer_profile, windows
from vitpatch.plots.style import Caption
from vitpatch.stats.finding import find_takeover
from vitpatch.stats.inference import Resamples
from vitpatch.stats.result import RunResult, is_handover, series_names
from vitpatch.stats.summary import single_rows, synergy
from vitpatch.types import Direction, Donor

PAGE = "sorted"
"""Of the pages of examples the one that is drawn, where there is a peak; else the last, drawn by lot."""
MAIN = ("handover", "heads", "maps")
"""Figures that say more than the profile."""
MOST_GROUPS = 4  # token groups side by side in the heatmap of heads, and with windows
CONTROL_WORDS = {
    Donor.SAME_CLASS: "donor: another image of its class, clean",
    Donor.OTHER_CLASS: "donor: an image of another class, clean",
}


def draw(
    result: RunResult,
    pages: Sequence[ExamplePage],
    manifest: Mapping[str, Any],
    options: FigureOptions = AS_WIDE_AS_NEEDED,
) -> dict[str, Figure]:
    """Draws the figures of a run that say something, by name.

    All is drawn from what the run's files hold; of the ``manifest`` are read ``title``, the run in a line, and
    ``calibration``, where there is one.
    """
    with options.drawing():
        drawn = _draw(result, pages, manifest)
        if options.width is not None:
            for figure in drawn.values():
                shrink_for_print(figure)
        return drawn


def _draw(result: RunResult, pages: Sequence[ExamplePage], manifest: Mapping[str, Any]) -> dict[str, Figure]:
    caption, run = run_caption(result, manifest["title"]), manifest["title"]
    summary = result.summary.assign(series=series_names(result.summary))
    drawn = {
        "layer_profile": layer_profile(summary, profile_references(result), caption),
        **_class_figures(result, summary, caption),
        **_target_figures(result, summary, caption),
    }
    few_groups = summary["tokens"].nunique() <= MOST_GROUPS
    if summary["window"].nunique() > 1 and summary["head"].nunique() == 1 and few_groups:
        drawn["windows"] = windows(summary, _window_sums(result, summary), result.total, caption)
    peaks = [] if is_handover(summary) else [peak for peak in result.peaks if has_peak(summary.iloc[peak.rows]).all()]
    if result.clusters > 1 and any(max(peak.stability) < 1 for peak in peaks):
        drawn["peak"] = peak_stability(peaks, summary, caption)
    if manifest.get("calibration"):
        drawn["strength"] = strength_curve(manifest["calibration"], run)
    for page in [page for page in pages if page.name == PAGE] or pages[-1:]:
        drawn["examples"] = image_page(result, page, caption, summary)
    return drawn


def draw_main(result: RunResult, title: str, options: FigureOptions = AS_WIDE_AS_NEEDED) -> Figure:
    """The figure that says most of a run, which ``title`` names: of the handover, heads or places over the image where
    these are asked for, else the profile."""
    with options.drawing():
        caption, summary = run_caption(result, title), result.summary.assign(series=series_names(result.summary))
        drawn = _target_figures(result, summary, caption)
        chosen = next((drawn[name] for name in MAIN if name in drawn), None)
        chosen = chosen or layer_profile(summary, profile_references(result), caption)
        if options.width is not None:
            shrink_for_print(chosen)
        return chosen


def run_caption(result: RunResult, run: str) -> Caption:
    """The words on the figures of a run, which ``run`` names in a line."""
    study = result.study
    doubt = style.doubt_words(result.total, study.donor, study.direction)
    cause = f"{study.donor} ablation" if study.donor.is_constant else ""
    title = f"{run}\n{doubt}" if doubt else run
    return Caption(title, study.metric, len(result.examples), result.clusters, interval=study.interval, cause=cause)


def profile_references(result: RunResult) -> References:
    """What the profile is compared with; without controls for which no included image has a partner."""
    run = "clean" if result.study.direction is Direction.DENOISE else "corrupted"
    controls, unselected = {}, ""
    for donor in result.controls:
        if result.summary[f"effect_{donor}"].notna().any():
            images = int(result.summary[f"n_{donor}"].iloc[0])
            number = f" (n = {images})" if images < len(result.examples) else ""
            controls[f"effect_{donor}"] = CONTROL_WORDS[donor] + number
    own = f"donor: the image itself, {run} (mean effect)" if controls else "mean effect"
    if result.unselected is not None:
        total = result.unselected.total.mean
        unselected = f"all {format_count(result.unselected.images, 'image')}, not selected"
        unselected += "" if np.isnan(total) else f"; their total effect {total:+.3f}"
    return References(result.total, result.all_layers, own, controls, unselected)


def _class_figures(result: RunResult, summary: pd.DataFrame, caption: Caption) -> dict[str, Figure]:
    """The heatmap of class × layer; none of a single class, whose effects are those of all images."""
    if result.examples["label"].nunique() < 2:
        return {}
    return {"heatmap": class_heatmap(*class_effects(result, summary), caption)}


def _target_figures(result: RunResult, summary: pd.DataFrame, caption: Caption) -> dict[str, Figure]:
    """The figures that only some targets have."""
    drawn = {}
    if result.study.target.one_head_at_a_time and summary["tokens"].nunique() <= MOST_GROUPS:
        drawn["heads"] = head_heatmap(summary, caption)
    if is_handover(summary) and summary["window"].nunique() == 1 and summary["recovered"].notna().all():
        drawn["handover"] = handover(summary, caption, find_takeover(result))
    if len(direct := direct_rows(summary)):
        drawn["direct"] = direct_effects(direct, caption)
    if (at := rows_over_image(summary)) is not None:
        drawn["maps"] = effect_maps(summary, at, caption)
    return drawn


def _window_sums(result: RunResult, summary: pd.DataFrame) -> pd.DataFrame:
    """For each window of several layers the sum of its layers' mean effects, and the effect beyond it with interval."""
    columns = ["sum", "synergy", "synergy_low", "synergy_high"]
    parts = single_rows(summary)
    if not parts:
        return pd.DataFrame(columns=columns, dtype=float)
    alone = summary.index[(summary["window"] != 1) & (summary["n_layers"] == 1)]
    parts |= {row: [row] for row in alone}
    rows, study = list(parts), result.study
    beyond = synergy(result.effects, rows, list(parts.values()))
    resamples = Resamples(result.examples["cluster"].to_numpy(), study.seed)
    spread = resamples.spread(beyond, method=study.interval)
    added = summary["effect"].to_numpy()[rows] - spread.mean
    return pd.DataFrame(np.stack([added, spread.mean, *spread.interval], axis=1), index=rows, columns=columns)
