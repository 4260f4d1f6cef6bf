"""What a plan gave on a few images → the columns of ``examples.parquet`` and ``effects.parquet``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpatch.effects import log_odds, metrics, runner_up
from vitpatch.execute import Outputs
from vitpatch.plan import Plan
from vitpatch.spec import BaseRun, Metric
from vitpatch.store import patch_columns

LOGITS_AT_ONCE = 4_000_000
"""Bounds what the metrics take in memory: logits in float64 times a few."""


@dataclass(frozen=True)
class Columns:
    """``examples`` have a value an image; ``effects`` one an image and patch, image by image."""

    examples: dict[str, NDArray]
    effects: dict[str, NDArray]


def columns(
    outputs: Outputs, plan: Plan, labels: Tensor, ids: Tensor, masks: Tensor, metric: Metric, rival: BaseRun
) -> Columns:
    """The columns of a few images; all tensors on the CPU.

    ``labels``, ``ids`` int64 (images,); ``masks`` bool (groups, images, tokens) as given to the executor; ``metric``
    is that of ``effect``, ``rival`` the base run whose runner-up ``logit_diff`` is taken against.
    """
    clean = outputs.base[BaseRun.CLEAN]
    rivals = runner_up(outputs.base[rival], labels)
    base = {run: _numpy(metrics(outputs.base[run], labels, rivals, clean)) for run in BaseRun}
    examples = {f"{name}_{run}": values for run in BaseRun for name, values in base[run].items()}
    examples |= {"example_id": ids.numpy(), "label": labels.numpy(), "rival": rivals.numpy()}
    recipient = base[plan.direction.recipient]
    patched = _patched(outputs, labels, rivals, clean)  # (patches, images) each
    patched["effect"] = patched[metric] - recipient[metric]
    patched["direct_log_odds"] -= recipient[Metric.LOG_ODDS]
    patched["delta_norm"] = outputs.delta_norm.numpy()
    group = [plan.token_groups.index(patch.tokens) for patch in plan.patches]
    patched["n_tokens"] = masks.sum(-1).numpy()[group]
    effects = {name: np.tile(values, len(ids)) for name, values in patch_columns(plan.patches).items()}
    effects |= {name: values.T.ravel() for name, values in patched.items()}
    effects["example_id"] = np.repeat(ids.numpy(), len(plan.patches))
    return Columns(examples, effects)


def joined(parts: Sequence[Columns]) -> Columns:
    """The columns of several parts of a batch, in their order."""

    def all_of(kind: str) -> dict[str, NDArray]:
        tables = [getattr(part, kind) for part in parts]
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    return Columns(all_of("examples"), all_of("effects"))


def _patched(outputs: Outputs, labels: Tensor, rivals: Tensor, clean: Tensor) -> dict[str, NDArray]:
    """Metrics of the patched runs and the log odds of the direct ones, some patches at a time."""
    at_once = max(1, LOGITS_AT_ONCE // clean.numel())
    parts = [
        metrics(patched, labels, rivals, clean) | {"direct_log_odds": log_odds(direct, labels)}
        for patched, direct in zip(outputs.patched.split(at_once), outputs.direct.split(at_once), strict=True)
    ]
    return _numpy({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _numpy(values: dict[str, Tensor]) -> dict[str, NDArray]:
    return {str(name): value.numpy() for name, value in values.items()}
