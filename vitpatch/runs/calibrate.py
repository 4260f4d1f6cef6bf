"""What a run takes from training images: the strength that does a wanted damage, the spread of patch embeddings."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from vitpatch.corruptions import Corruption, Moments
from vitpatch.corruptions.embedding_noise import measure_moments
from vitpatch.data.datamodule import DecodedImages, PartnerPositions, training_batches
from vitpatch.data.labels import UNKNOWN
from vitpatch.formatting import counted, digest
from vitpatch.io import write_json
from vitpatch.runs.calibration import (
    Adjustable,
    Calibration,
    Curve,
    Damage,
    common_drop,
    grid,
    largest,
    search,
    tolerance_for,
)
from vitpatch.runs.setup import Setup, check_all_have_partners, find_partners
from vitpatch.runs.trainer import on_device
from vitpatch.stats.summary import estimates
from vitpatch.types import Estimate, ImageBatch

log = logging.getLogger(__name__)

MOST_IMAGES = 64
"""Images of a forward pass at most: ``batch_size`` may be meant for a loop that cuts it to what the memory holds."""


def resolve(setup: Setup, batch_size: int, folder: Path | None = None) -> Setup:
    """The setup with all that was open: its batch size, and what is taken from training images.

    That is the strength asked for, in the corruption and in its config, and the statistics that the corruption wants.
    Curves are kept in the folder of a sweep's calibrations, where there is one. Raises ``VitPatchError`` where a drop
    is not reached.
    """
    cfg, corruption, calibration = setup.cfg.copy(), setup.corruption, None
    cfg.batch_size = batch_size
    if setup.wanted is not None or corruption.needs_training:
        with on_device(setup.model, setup.trainer, setup.cfg.matmul_precision):
            training = TrainingRuns(setup, min(batch_size, MOST_IMAGES))
            if setup.wanted is not None:
                calibration = _calibrate(training, folder)
                corruption = setup.adjustables[0].at(calibration.strength)
                OmegaConf.update(cfg, f"corruption.{calibration.key}", calibration.strength, force_add=True)
            if corruption.needs_training:
                corruption = corruption.with_statistics(training.moments)
    return replace(setup, cfg=cfg, corruption=corruption, calibration=calibration)


def without_training(setup: Setup) -> Setup:
    """The setup for a plan: nothing is taken from training images, which would not change what it costs."""
    unit = Moments(2, np.zeros(1), np.ones(1))  # of spread 1
    return replace(setup, corruption=setup.corruption.with_statistics(unit))


def describe_training(setup: Setup) -> dict[str, Any]:
    """What was taken from training images, as the manifest has it."""
    if setup.training is None:
        return {}
    cfg = setup.cfg
    images = {"split": cfg.train_split, "limit": cfg.train_limit, "images": len(setup.training)}
    entries: dict[str, Any] = {"training": images | {"digest": setup.training.digest}}
    if setup.calibration is not None:
        entries["calibration"] = setup.calibration.as_manifest()
    return entries | setup.corruption.describe_statistics()


def _calibrate(training: TrainingRuns, folder: Path | None) -> Calibration:
    """The strength of the run's own corruption, the first of the adjustable ones, that does the wanted damage."""
    started, setup = time.monotonic(), training.setup
    wanted, corruption = setup.wanted, setup.adjustables[0]
    curves = [DropCurve(one, wanted.damage, training, folder) for one in setup.adjustables]
    drop, largest_drops = wanted.drop, None
    if drop is None:
        names = [str(one) for one in setup.adjustables]
        if len(set(names)) < len(names):  # classes of two modules may be called alike
            names = [str(one.config) for one in setup.adjustables]
        on_grid = {name: curve.on_grid() for name, curve in zip(names, curves, strict=True)}
        drop, largest_drops = common_drop(on_grid), {name: largest(curve)[0] for name, curve in on_grid.items()}
    tolerance = tolerance_for(wanted.damage, len(setup.training))
    strength, curve = search(curves[0], drop, corruption.strongest, f"corruption.{corruption.key}", tolerance)
    calibration = Calibration(
        wanted, drop, corruption.key, strength, corruption.strongest, curve, curves[0].images, curves[0].clusters,
        predicted=not setup.training.has_labels, largest_drops=largest_drops,
    )  # fmt: skip
    log.info("calibrated: %s, %.0f s", calibration, time.monotonic() - started)
    return calibration


class DropCurve:
    """Mean drops under a corruption by strength, each measured once; kept in a file of ``folder``, where there is one.

    ``images`` and ``clusters`` that were read, once something was measured.
    """

    def __init__(self, corruption: Adjustable, damage: Damage, training: TrainingRuns, folder: Path | None) -> None:
        self.corruption, self._damage, self._training = corruption, damage, training
        self._points: dict[float, Estimate] = {}
        self.images = self.clusters = 0
        self._file = None if folder is None else folder / f"{self._digest}.json"
        if self._file is not None and self._file.exists():
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self.images, self.clusters = kept["images"], kept["clusters"]
            self._points = {strength: Estimate(**estimate) for strength, estimate in kept["points"]}

    @property
    def _digest(self) -> str:
        setup, one = self._training.setup, self.corruption
        identity = {"corruption": one.config, "key": one.key, "damage": self._damage}
        return digest(setup.model_identity | identity | {"training": setup.training.digest, "seed": setup.study.seed})

    def on_grid(self) -> Curve:
        """The curve on the grid."""
        strengths = grid(self.corruption.strongest)
        return dict(zip(strengths, self(strengths), strict=True))

    def __call__(self, strengths: Sequence[float]) -> list[Estimate]:
        """The mean drops at these strengths."""
        if missing := [strength for strength in strengths if strength not in self._points]:
            drops, clusters = self._training.drops(self.corruption, missing, self._damage)
            self.images, self.clusters = len(clusters), len(np.unique(clusters))
            self._points |= zip(missing, estimates(drops, clusters, self._training.setup.study.seed), strict=True)
            self._write()
        return [self._points[strength] for strength in strengths]

    def _write(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            points = [(strength, asdict(self._points[strength])) for strength in sorted(self._points)]
            kept = {"corruption": str(self.corruption), "images": self.images, "clusters": self.clusters}
            write_json(self._file, kept | {"points": points})


@dataclass
class TrainingRuns:
    """Clean and corrupt runs of the training images by the run's model, where it is now.

    ``batch_size`` images at a time. The clean pass is made once.
    """

    setup: Setup
    batch_size: int
    _clean: list[dict[Damage, Tensor]] = field(default_factory=list)
    _labels: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def drops(self, one: Adjustable, strengths: Sequence[float], damage: Damage) -> tuple[np.ndarray, np.ndarray]:
        """Drops of each image at each strength, float64 (images, strengths), and the images' clusters (images,)."""
        corruptions = [one.at(strength) for strength in strengths]
        if corruptions[0].needs_training:
            corruptions = [corruption.with_statistics(self.moments) for corruption in corruptions]
        drops, ids = [], []
        for number, batch in enumerate(self._batches(f"{one}, {counted(len(strengths), 'strength')}")):
            labels, clean = self._clean_run(number, batch)
            runs = [self._corrupt_run(batch, corruption, labels)[damage] for corruption in corruptions]
            drops.append(clean[damage][:, None] - torch.stack(runs, 1))
            ids += batch.ids.tolist()
        images = self.setup.training
        return torch.cat(drops).numpy(), images.clusters[images.positions(ids)]

    @cached_property
    @torch.no_grad()
    def moments(self) -> Moments:
        """The moments of the images' patch embeddings."""
        model = self.setup.model
        return measure_moments(
            model.patch_embeddings(model.normalize(b.images)) for b in self._batches("patch embeddings")
        )

    def _clean_run(self, number: int, batch: ImageBatch) -> tuple[Tensor, dict[Damage, Tensor]]:
        """Labels of a batch, the clean run's prediction where there is none, and what the clean run makes of them."""
        if number == len(self._clean):
            probs = self._probs(batch.images)
            self._labels.append(batch.labels.where(batch.labels != UNKNOWN, probs.argmax(1)))
            self._clean.append(_scores(probs, self._labels[-1]))
        return self._labels[number], self._clean[number]

    def _corrupt_run(self, batch: ImageBatch, corruption: Corruption, labels: Tensor) -> dict[Damage, Tensor]:
        """What a corrupted batch is measured by, (batch,) float64 each, the mean over its draws."""
        seed, model = self.setup.study.seed, self.setup.model
        pixels, runs = corruption.pixels(batch, seed), []
        for draw in range(corruption.draws):
            inside = corruption.is_inside_model
            noise = corruption.embedding_noise(batch.ids, seed, model.embedding_shape, draw) if inside else None
            runs.append(_scores(self._probs(pixels, noise), labels))
        return {damage: torch.stack([run[damage] for run in runs]).mean(0) for damage in Damage}

    def _probs(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Softmax probabilities (batch, classes), float64, on the CPU."""
        model = self.setup.model
        return model(model.normalize(images), noise).cpu().double().softmax(-1)

    @cached_property
    def _partners(self) -> PartnerPositions:
        """Where the training images' partners are, of the kinds that the corruptions ask for."""
        setup, positions = self.setup, {}
        for one in setup.adjustables:
            kind = one.at(0.0).partner
            if kind is not None and kind not in positions:
                positions[kind] = find_partners(kind, setup.training, setup.study.seed, setup.model.preprocessing)
                check_all_have_partners(f"{one} on training images", kind, positions[kind], setup.training)
        return positions

    def _batches(self, what: str) -> Iterator[ImageBatch]:
        """The images on the model's device; what cannot be read is left out or ends the run, as ``on_error`` says."""
        images, model = self.setup.training, self.setup.model
        kinds = self._partners
        decoded = DecodedImages(images, model.preprocessing.to_input, partners=kinds, needed=tuple(kinds))
        often = 0.2 if sys.stderr.isatty() else 10.0
        with tqdm(total=len(images), desc=what, unit=" images", mininterval=often, delay=often, leave=False) as bar:
            for batch, bad in training_batches(decoded, self.batch_size):
                if batch is not None:
                    yield batch.to(model.device)
                bar.update((0 if batch is None else len(batch)) + len(bad))


def _scores(probs: Tensor, labels: Tensor) -> dict[Damage, Tensor]:
    """The label's probability, and whether it is predicted, (batch,) float64 each."""
    labels = labels.to(probs.device)
    right = (probs.argmax(1) == labels).double()
    return {Damage.PROB_DROP: probs.gather(1, labels[:, None])[:, 0], Damage.ACCURACY_DROP: right}
