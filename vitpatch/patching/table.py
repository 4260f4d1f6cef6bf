"""What a plan gave on a few images → the columns of ``examples.parquet`` and ``effects.parquet``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpatch.patching.executor import Outputs
from vitpatch.patching.metrics import log_odds, metrics, runner_up
from vitpatch.patching.plan import Plan
from vitpatch.schema import CONTROLLED, patch_columns
from vitpatch.types import BaseRun, Donor, Metric, Patch

LOGITS_AT_ONCE = 4_000_000
"""Bounds what the metrics take in memory: logits in float64 times a few."""


@dataclass(frozen=True)
class Columns:
    """``examples`` have a value an image; ``effects`` one an image and patch, image by image; ``leave_outs`` too."""

    examples: dict[str, NDArray]
    effects: dict[str, NDArray]
    leave_outs: dict[str, NDArray]


def to_columns(
    outputs: Outputs,
    plan: Plan,
    labels: Tensor,
    ids: Tensor,
    masks: Tensor,
    metric: Metric,
    rival: BaseRun,
    partners: Mapping[Donor, Tensor] | None = None,
) -> Columns:
    """The columns of a few images; all tensors on the CPU.

    ``labels``, ``ids`` int64 (images,); ``masks`` bool (groups, images, tokens) as given to the executor; ``metric``
    is that of ``effect``, ``rival`` the base run whose runner-up ``logit_diff`` is taken against. ``partners`` int64
    (images,), the ids of other images that are donors: what an image has no partner for is NaN.
    """
    clean, partners = outputs.base[BaseRun.CLEAN], partners or {}
    rivals = runner_up(outputs.base[rival], labels)
    base = {run: _numpy(metrics(logits, labels, rivals, clean)) for run, logits in outputs.base.items()}
    lonely = {donor: (other < 0).numpy() for donor, other in partners.items()}
    examples = {f"{name}_{run}": values for run in BaseRun for name, values in base[run].items()}
    examples |= {"example_id": ids.numpy(), "label": labels.numpy(), "rival": rivals.numpy()}
    for donor, other in partners.items():
        examples[f"partner_{donor}"] = other.numpy()
        examples |= {f"{name}_{donor}": _unknown(base[donor][name], lonely[donor]) for name in Metric}
    number, recipient = len(plan.patches), base[plan.recipient]

    def against(patched: dict[str, NDArray]) -> dict[str, NDArray]:
        return patched | {"effect": patched[metric] - recipient[metric]}

    patched = against(_metrics(outputs.patched[:number], labels, rivals, clean))  # (patches, images) each
    patched["direct_log_odds"] = _direct(outputs.direct, labels) - recipient[Metric.LOG_ODDS]
    patched["delta_norm"] = outputs.delta_norm.numpy()
    group = [plan.token_groups.index(patch.tokens) for patch in plan.patches]
    if plan.donors[0] in lonely:
        patched = {name: _unknown(values, lonely[plan.donors[0]]) for name, values in patched.items()}
    patched["n_tokens"] = masks.sum(-1).numpy()[group]
    for i, donor in enumerate(plan.donors[1:], start=1):
        of_donor = against(_metrics(outputs.patched[i * number : (i + 1) * number], labels, rivals, clean))
        patched |= {f"{name}_{donor}": _unknown(of_donor[name], lonely[donor]) for name in CONTROLLED}
    rest = against(_metrics(outputs.patched[len(plan.donors) * number :], labels, rivals, clean))
    if plan.donors[0] in lonely:
        rest = {name: _unknown(values, lonely[plan.donors[0]]) for name, values in rest.items()}
    kept = {name: rest[name][: len(plan.leave_outs)] for name in CONTROLLED}
    for i, _ in enumerate(plan.all_layers, start=len(plan.leave_outs)):
        examples |= {f"{name}_all_layers": rest[name][i] for name in CONTROLLED}
    return Columns(examples, _by_image(plan.patches, patched, ids), _by_image(plan.leave_outs, kept, ids))


def _unknown(values: NDArray, where: NDArray[np.bool_]) -> NDArray:
    """(…, images) with NaN at some images; whole numbers (``pred``) become −1 there."""
    return np.where(where, -1 if values.dtype.kind == "i" else np.nan, values)


def _by_image(patches: Sequence[Patch], values: dict[str, NDArray], ids: Tensor) -> dict[str, NDArray]:
    """Rows of images and patches from (patches, images) each, with the columns that name the patches."""
    if not patches:
        return {}
    named = patch_columns(patches) | {"without": np.array([patch.without for patch in patches])}
    rows = {name: np.tile(column, len(ids)) for name, column in named.items()}
    rows |= {name: column.T.ravel() for name, column in values.items()}
    return rows | {"example_id": np.repeat(ids.numpy(), len(patches))}


def join_columns(parts: Sequence[Columns]) -> Columns:
    """The columns of several parts of a batch, in their order."""

    def all_of(kind: str) -> dict[str, NDArray]:
        tables = [getattr(part, kind) for part in parts]
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    return Columns(all_of("examples"), all_of("effects"), all_of("leave_outs"))


def _metrics(logits: Tensor, labels: Tensor, rivals: Tensor, clean: Tensor) -> dict[str, NDArray]:
    """Metrics (runs, images) of patched runs, some at a time."""
    at_once = max(1, LOGITS_AT_ONCE // clean.numel())  # where there is no run, one empty part
    parts = [metrics(patched, labels, rivals, clean) for patched in logits.split(at_once)]
    return _numpy({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _direct(logits: Tensor, labels: Tensor) -> NDArray:
    """Log odds (patches, images) of the direct runs, some at a time."""
    at_once = max(1, LOGITS_AT_ONCE // logits[0].numel())
    return torch.cat([log_odds(direct, labels) for direct in logits.split(at_once)]).numpy()


def _numpy(values: dict[str, Tensor]) -> dict[str, NDArray]:
    return {str(name): value.numpy() for name, value in values.items()}
