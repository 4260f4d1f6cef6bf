"""Trains or fine-tunes a Hugging Face image classifier with Lightning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitpatch.checks import Count, Interval, Share, check_fields
from vitpatch.corruptions.base import luma

Rate = Annotated[float, Interval(ge=0, le=100)]
Part = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: AdamW, linear warm-up, cosine decay to 0, averaged weights.

    - ``learning_rate``: at its highest. ``weight_decay``: of matrices only. ``warmup``: as a share of all steps.
    - ``label_smoothing``: in [0, 1).
    - ``average``: decay of the exponential moving average of the weights, which is what is kept; 0: none.
    - ``balanced``: every class is drawn equally often.
    - ``validation``: share of the training clusters that is held back to choose the best epoch; 0: the last is kept.
    - ``patience``: epochs without a better one after which the training stops; ``None``: it does not.
    - ``attention``: how Hugging Face computes attention in training: ``sdpa``, or ``eager``, which is twice as fast in
      bfloat16 on a CPU.
    """

    epochs: Count
    batch_size: Count
    learning_rate: Rate
    weight_decay: Rate = 0.05
    warmup: Part = 0.1
    label_smoothing: Part = 0.0
    average: Part = 0.0
    balanced: bool = True
    validation: Part = 0.0
    patience: Count | None = None
    attention: Literal["eager", "sdpa"] = "sdpa"

    def __post_init__(self) -> None:
        check_fields(self, "recipe")


@dataclass(frozen=True)
class Augment:
    """Random changes of training images, each image by itself; all zeros change nothing.

    - ``rotate`` in degrees, ``scale`` and ``shear`` as shares, ``shift`` in shares of the image's size: each drawn
      evenly from −x to x. What comes in from outside the image is white.
    - ``jitter``: brightness and contrast as shares, saturation twice that.
    - ``gray``, ``erase``: probabilities; the edges of an erased rectangle are an eighth to a half of the image's.
    """

    rotate: Annotated[float, Interval(ge=0, le=180), "in degrees"] = 0.0
    scale: Share = 0.0
    shear: Share = 0.0
    shift: Share = 0.0
    jitter: Share = 0.0
    gray: Share = 0.0
    erase: Share = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "augment")

    def __call__(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] → the same shape and range; draws from torch's own generator."""
        images = self._moved(images)
        if self.jitter:
            images = self._jittered(images)
        images = torch.where(_flips(images, self.gray), _gray(images), images)
        return self._erased(images) if self.erase else images

    def _moved(self, images: Tensor) -> Tensor:
        if not any((self.rotate, self.scale, self.shear, self.shift)):
            return images
        angle = _uniform(images, self.rotate) * math.pi / 180
        size, shear = torch.exp(_uniform(images, self.scale)), _uniform(images, self.shear)
        cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
        right, down = _uniform(images, 2 * self.shift), _uniform(images, 2 * self.shift)  # the grid goes from -1 to 1
        rows = [torch.stack([cos, shear * cos - sin, right], 1), torch.stack([sin, cos + shear * sin, down], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return 1 - F.grid_sample(1 - images, grid, align_corners=False, padding_mode="zeros")

    def _jittered(self, images: Tensor) -> Tensor:
        images = images * _column(1 + _uniform(images, self.jitter))
        mean = _gray(images).mean((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * _column(1 + _uniform(images, self.jitter))
        gray = _gray(images)
        return (gray + (images - gray) * _column(1 + _uniform(images, 2 * self.jitter))).clamp(0, 1)

    def _erased(self, images: Tensor) -> Tensor:
        inside = []
        for length in images.shape[2:]:
            side, centre = 0.3125 + _uniform(images, 0.1875), 0.5 + _uniform(images, 0.5)
            at = (torch.arange(length, device=images.device) + 0.5) / length
            inside.append((at - centre[:, None]).abs() < side[:, None] / 2)
        rectangle = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        colour = torch.rand(len(images), 3, 1, 1, device=images.device)
        return torch.where(rectangle & _flips(images, self.erase), colour, images)


def _uniform(images: Tensor, reach: float) -> Tensor:
    """(batch,) drawn uniformly from ``-reach`` to ``reach``."""
    return (torch.rand(len(images), device=images.device) * 2 - 1) * reach


def _flips(images: Tensor, probability: float) -> Tensor:
    return _column(torch.rand(len(images), device=images.device) < probability)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _gray(images: Tensor) -> Tensor:
    return luma(images).expand_as(images)


class ClassifierTraining(lightning.LightningModule):
    """The training of one Hugging Face image classifier on batches of images as bytes, and labels."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor, recipe: Recipe, augment: Augment) -> None:
        super().__init__()
        self.model, self.recipe, self.augment = model, recipe, augment
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] → logits (batch, classes)."""
        return self.model(pixel_values=(images - self.mean) / self.std).logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the augmented batch, in nats."""
        images, labels = batch
        logits = self(self.augment(images.float() / 255)).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.log("loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Starts counting; not in buffers, which weight averaging would swap away."""
        self._right, self._seen = torch.zeros(2, int(self.model.config.num_labels), device=self.device)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Counts what is right by class."""
        images, labels = batch
        right = (self(images.float() / 255).argmax(-1) == labels).float()
        self._right.index_add_(0, labels, right)
        self._seen.index_add_(0, labels, torch.ones_like(right))

    def on_validation_epoch_end(self) -> None:
        """Logs the mean over classes of the share that is right."""
        seen = self._seen > 0
        self.log("balanced_accuracy", (self._right[seen] / self._seen[seen]).mean(), prog_bar=True)

    def configure_optimizers(self) -> dict:
        """AdamW with a warm-up and a cosine by step; biases, norms, tokens and positions are not decayed."""
        decayed, undecayed = [], []
        for name, parameter in self.model.named_parameters():
            is_decayed = parameter.ndim >= 2 and "token" not in name and "position" not in name
            (decayed if is_decayed else undecayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.recipe.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.recipe.learning_rate, betas=(0.9, 0.99))
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = max(1, round(self.recipe.warmup * steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
