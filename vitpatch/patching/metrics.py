"""Logits → the metrics of each image, in float64, and the columns of ``examples.parquet`` and ``effects.parquet``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpatch.patching.executor import Outputs
from vitpatch.patching.plan import Plan
from vitpatch.schema import CONTROL_METRICS, patch_columns
from vitpatch.types import BaseRun, Donor, Metric, Patch

LOGITS_AT_ONCE = 4_000_000
"""Bounds what the metrics take in memory: logits in float64 times a few."""


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """The class other than the label with the largest logit: (batch, classes), (batch,) → (batch,) int64."""
    return logits.double().scatter(-1, labels[:, None], -torch.inf).argmax(-1)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the logsumexp of all others: (..., batch, classes), (batch,) → float64 (..., batch)."""
    logits = logits.double()
    index = labels.expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    return logits.gather(-1, index).squeeze(-1) - others


def metrics(logits: Tensor, labels: Tensor, rivals: Tensor, clean_logits: Tensor) -> dict[str, Tensor]:
    """What is stored of a run, by column.

    ``logits`` (..., batch, classes) of the run, ``labels`` and ``rivals`` (batch,) int64, ``clean_logits``
    (batch, classes) of the clean run. Returns float64 (..., batch) under the names of ``Metric`` – the label's
    softmax probability; its log odds against all other classes; its logit; its logit minus the rival's;
    KL(clean ‖ run) in nats – and ``pred``, the class with the largest logit, int64.
    """
    logits, clean = logits.double(), clean_logits.double().log_softmax(-1)
    index = labels.expand(logits.shape[:-1])[..., None]
    rival_index = rivals.expand(logits.shape[:-1])[..., None]
    label_logit = logits.gather(-1, index).squeeze(-1)
    log_probs = logits.log_softmax(-1)
    return {
        Metric.PROB: log_probs.gather(-1, index).squeeze(-1).exp(),
        Metric.LOG_ODDS: log_odds(logits, labels),
        Metric.LOGIT: label_logit,
        Metric.LOGIT_DIFF: label_logit - logits.gather(-1, rival_index).squeeze(-1),
        Metric.KL: (clean.exp() * (clean - log_probs)).sum(-1),
        "pred": logits.argmax(-1),
    }


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
    base = {run: _metrics(logits[None], labels, rivals, clean) for run, logits in outputs.base.items()}
    base = {run: {name: values[0] for name, values in of_run.items()} for run, of_run in base.items()}
    examples = {f"{name}_{run}": values for run in BaseRun for name, values in base[run].items()}
    examples |= {"example_id": ids.numpy(), "label": labels.numpy(), "rival": rivals.numpy()}
    lonely = {donor: (other < 0).numpy() for donor, other in partners.items()}
    for donor, other in partners.items():
        examples[f"partner_{donor}"] = other.numpy()
        examples |= {f"{name}_{donor}": _unknown(base[donor][name], lonely[donor]) for name in Metric}

    runs = _metrics(outputs.patched, labels, rivals, clean)  # (runs, images) each
    runs["effect"] = runs[metric] - base[plan.recipient][metric]
    number, donor = len(plan.patches), plan.donors[0]
    unknown = lonely.get(donor, np.zeros(len(ids), dtype=bool))
    effects = {name: _unknown(values[:number], unknown) for name, values in runs.items()}
    direct = _direct_log_odds(outputs.direct, labels) - base[plan.recipient][Metric.LOG_ODDS]
    effects["direct_log_odds"] = _unknown(direct, unknown)
    effects["delta_norm"] = _unknown(outputs.delta_norm.numpy(), unknown)
    effects["n_tokens"] = masks.sum(-1).numpy()[[plan.token_groups.index(patch.tokens) for patch in plan.patches]]
    for i, control in enumerate(plan.donors[1:], start=1):
        rows = slice(i * number, (i + 1) * number)
        effects |= {f"{name}_{control}": _unknown(runs[name][rows], lonely[control]) for name in CONTROL_METRICS}
    rest = {name: _unknown(runs[name][len(plan.donors) * number :], unknown) for name in CONTROL_METRICS}
    leave_outs = {name: values[: len(plan.leave_outs)] for name, values in rest.items()}
    if plan.all_layers:
        examples |= {f"{name}_all_layers": values[-1] for name, values in rest.items()}
    return Columns(examples, _by_image(plan.patches, effects, ids), _by_image(plan.leave_outs, leave_outs, ids))


def _metrics(logits: Tensor, labels: Tensor, rivals: Tensor, clean: Tensor) -> dict[str, NDArray]:
    """Metrics (runs, images) of runs, some at a time."""
    parts = [metrics(some, labels, rivals, clean) for some in logits.split(max(1, LOGITS_AT_ONCE // clean.numel()))]
    return {str(name): torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def _direct_log_odds(logits: Tensor, labels: Tensor) -> NDArray:
    """Log odds (patches, images) of the direct runs, some at a time."""
    at_once = max(1, LOGITS_AT_ONCE // logits[0].numel())
    return torch.cat([log_odds(some, labels) for some in logits.split(at_once)]).numpy()


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

    def join(tables: Sequence[dict[str, NDArray]]) -> dict[str, NDArray]:
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    return Columns(*(join([getattr(part, kind) for part in parts]) for kind in ("examples", "effects", "leave_outs")))
