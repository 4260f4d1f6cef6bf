"""Which images a run's means are over, from the columns of ``examples.parquet``. Pure, numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vitpatch.types import Include, Inclusion, Metric


def included(rule: Inclusion, examples: Mapping[str, NDArray], metric: Metric) -> NDArray[np.bool_]:
    """Whether each image is included: (images,)."""
    label = np.asarray(examples["label"])
    if rule.rule is Include.ALL:
        return np.ones(len(label), dtype=bool)
    if rule.rule is Include.MIN_TOTAL_EFFECT:
        return damage(examples, metric) >= rule.least
    right = np.asarray(examples["pred_clean"]) == label
    return right if rule.rule is Include.CLEAN_CORRECT else right & (np.asarray(examples["pred_corrupt"]) != label)


def damage(examples: Mapping[str, NDArray], metric: Metric) -> NDArray[np.floating]:
    """What the corruption costs each image: clean − corrupt; of ``kl``, which is 0 in the clean run, what it adds."""
    if metric is Metric.KL:
        return np.asarray(examples["kl_corrupt"])
    return np.asarray(examples[f"{metric}_clean"]) - np.asarray(examples[f"{metric}_corrupt"])
