"""Results of runs whose effects are made up, image by image."""

import numpy as np
import pandas as pd
from hand_made import rows

from vitpatch.stats.result import analyze
from vitpatch.stats.summary import Measured
from vitpatch.study import Study
from vitpatch.types import Direction, Metric, Site, Target


def result_of(effects, total, patches=None, clusters=None, controls=None, predicted=False, log_odds=None, **study):
    """The result of ``effects`` (images, patches) in prob, with ``total`` effects (images,) of the donor's base run.

    Log odds are four times as large, or for total effects ``log_odds`` (images,). ``controls`` by donor are effects in
    log odds. All images are of class 0 or 1 in turn, and right in the clean run but for each fourth.
    """
    effects, total = np.asarray(effects, dtype=float), np.asarray(total, dtype=float)
    images, columns = effects.shape
    patches = rows(range(columns)) if patches is None else patches
    direction = study.get("direction", Direction.DENOISE)
    clean_minus_corrupt = total if direction is Direction.DENOISE else -total
    label = np.arange(images) % 2
    examples = {"example_id": range(images), "label": label, "cluster": range(images) if clusters is None else clusters}
    examples |= {"included": True, "has_empty_group": False, "label_is_predicted": predicted}
    scales = {Metric.PROB: clean_minus_corrupt, Metric.LOGIT: np.where(label, 1.0, -1.0)}
    scales[Metric.LOG_ODDS] = 4 * clean_minus_corrupt if log_odds is None else log_odds
    for metric, values in scales.items():
        examples |= {f"{metric}_corrupt": np.zeros(images), f"{metric}_clean": values}
    examples |= {"kl_corrupt": np.full(images, 0.1), "pred_corrupt": 1 - label}
    examples["pred_clean"] = np.where(np.arange(images) % 4, label, 1 - label)
    controls = controls or {}
    measured = Measured(
        effects=effects,
        correct=np.zeros(effects.shape, dtype=bool),
        log_odds=4 * effects,
        direct=np.zeros(effects.shape),
        delta_norm=np.ones(effects.shape),
        prob=effects,
        controls={f"{kind}_{donor}": values for donor, values in controls.items() for kind in ("effect", "log_odds")},
    )
    target = Target(Site(patches["site"].iloc[0]), heads="all" if (patches["head"] >= 0).any() else None)
    defaults = {"target": target, "windows": tuple(dict.fromkeys(patches["window"])), "direction": direction}
    asked = Study(**defaults | {"seed": 0} | study)
    return analyze(asked, (asked.donor, *controls), pd.DataFrame(examples), patches, measured)


def table_of(run):
    """The rows of a run as ``vitpatch.patch`` returns them."""
    study = run.study
    return run.effects.merge(run.examples, on="example_id").assign(direction=study.direction, metric=study.metric)
