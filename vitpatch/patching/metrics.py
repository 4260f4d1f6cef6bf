"""Logits → the metrics of each image, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vitpatch.types import BaseRun, Direction, Metric


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


def total_effect(clean: Tensor, corrupt: Tensor, direction: Direction) -> Tensor:
    """A metric of the donor's base run minus that of the recipient's, any shape."""
    runs = {BaseRun.CLEAN: clean, BaseRun.CORRUPT: corrupt}
    return runs[direction.donor] - runs[direction.recipient]
