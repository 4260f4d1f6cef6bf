"""A plan on a batch → the logits of both base runs and of every patch.

This is the seam behind which the way of computing may change: here a patch is one full forward pass with hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitpatch.model import PatchableViT
from vitpatch.plan import Plan
from vitpatch.spec import BaseRun


@dataclass(frozen=True)
class Logits:
    """``base`` (batch, classes) of each base run; ``patched`` (patches, batch, classes) in the plan's order."""

    base: Mapping[BaseRun, Tensor]
    patched: Tensor

    def cpu(self) -> Logits:
        """The same in the CPU's memory: metrics are in float64, which not every device has."""
        return Logits({run: logits.cpu() for run, logits in self.base.items()}, self.patched.cpu())


@torch.no_grad()
def execute(plan: Plan, model: PatchableViT, pixels: Mapping[BaseRun, Tensor]) -> Logits:
    """Runs both base runs, then every patch; ``pixels`` are normalised, (batch, 3, height, width) each."""
    donor, recipient = plan.direction.donor, plan.direction.recipient
    with model.reading(plan.recorded) as donated:
        base = {donor: model(pixels[donor])}
    base[recipient] = model(pixels[recipient])
    patched = []
    for patch in plan.patches:
        values = {(patch.site, layer): donated[patch.site, layer] for layer in patch.layers}
        with model.replacing(values, patch.tokens):
            patched.append(model(pixels[recipient]))
    return Logits(base, torch.stack(patched))
