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

from vitpatch.corruptions.embedding_noise import Moments, moments, noise_of
from vitpatch.corruptions.pixels import Corruption, OnEmbeddings, corrupted, traits
from vitpatch.data.datamodule import Decoded, Positions, batches_of
from vitpatch.data.images import UNKNOWN
from vitpatch.formatting import counted
from vitpatch.io import write_json
from vitpatch.runs.adjustable import Adjustable
from vitpatch.runs.calibration import Calibration, Curve, Damage, common_drop, grid, largest, search, tolerance_of
from vitpatch.runs.controls import check_all, found_of
from vitpatch.runs.setup import Setup
from vitpatch.runs.trainer import on_device
from vitpatch.stats.summary import estimates
from vitpatch.types import Estimate, ImageBatch, digest

log = logging.getLogger(__name__)

MOST_IMAGES = 64
"""Images of a forward pass at most: ``batch_size`` may be meant for a loop that cuts it to what the memory holds."""


def informed(setup: Setup, calibrations: Path | None = None) -> Setup:
    """The setup with what it takes from training images: a corruption of the strength asked for, that knows its spread.

    Curves are kept in the folder ``calibrations``, where there is one. Raises ``VitPatchError`` where a drop is not
    reached.
    """
    if setup.training is None:
        return setup
    with on_device(setup.model, setup.trainer, setup.cfg.matmul_precision):
        seen = Seen(setup)
        if setup.asked is not None:
            setup = _calibrated(setup, seen, calibrations)
        if isinstance(setup.corruption, OnEmbeddings):
            spread = seen.spread(setup.corruption.scale)
            setup = replace(setup, corruption=setup.corruption.with_spread(spread), spread=spread)
    return setup


def roughly(setup: Setup) -> Setup:
    """The setup for a plan: nothing is taken from training images, which would not change what it costs."""
    unscaled = isinstance(setup.corruption, OnEmbeddings)
    return replace(setup, corruption=setup.corruption.with_spread(1.0)) if unscaled else setup


def about(setup: Setup) -> dict[str, Any]:
    """What was taken from training images, in the manifest's words."""
    if setup.training is None:
        return {}
    cfg = setup.cfg
    images = {"split": cfg.train_split, "limit": cfg.train_limit, "images": len(setup.training)}
    said: dict[str, Any] = {"training": images | {"digest": setup.training.digest}}
    if setup.calibration is not None:
        said["calibration"] = setup.calibration.described()
    if setup.spread is not None:
        said["embedding_std"] = _summary(setup.spread)
    return said


def _summary(spread: np.ndarray) -> float | dict[str, float]:
    """One number, or of the channels' how many, their mean, the smallest and the largest."""
    if spread.ndim == 0:
        return float(spread)
    return {"channels": len(spread), "mean": spread.mean(), "smallest": spread.min(), "largest": spread.max()}


def _calibrated(setup: Setup, seen: Seen, folder: Path | None) -> Setup:
    """The setup with the strength that was asked for, in the corruption and in its config."""
    started, asked, own = time.monotonic(), setup.asked, setup.adjustables[0]
    curves = [Drops(one, asked.damage, seen, folder) for one in setup.adjustables]  # the run's own is the first
    matched = None
    if (wanted := asked.drop) is None:
        names = _told_apart(setup.adjustables)
        on_grid = {name: drops.on_grid() for name, drops in zip(names, curves, strict=True)}
        wanted, matched = common_drop(on_grid), {name: largest(curve)[0] for name, curve in on_grid.items()}
    tolerance = tolerance_of(asked.damage, len(setup.training))
    drops, what = curves[0], f"corruption.{own.key}"
    strength, curve = search(drops, wanted, own.strongest, what, tolerance)
    found = Calibration(
        asked, wanted, own.key, strength, own.strongest, curve, drops.images, drops.clusters,
        predicted=not setup.training.has_labels, matched=matched,
    )  # fmt: skip
    log.info("calibrated: %s, %.0f s", found, time.monotonic() - started)
    cfg = setup.cfg.copy()
    OmegaConf.update(cfg, f"corruption.{own.key}", strength, force_add=True)
    return replace(setup, cfg=cfg, corruption=own.at(strength), calibration=found)


def _told_apart(corruptions: Sequence[Adjustable]) -> list[str]:
    """Their names, no two the same: classes of two modules may be called alike."""
    names = [str(one) for one in corruptions]
    return names if len(set(names)) == len(names) else [str(one.config) for one in corruptions]


class Drops:
    """Mean drops under a corruption by strength, each measured once; kept in a file of ``folder``, where there is one.

    ``images`` and ``clusters`` that were read, once something was measured.
    """

    def __init__(self, corruption: Adjustable, damage: Damage, seen: Seen, folder: Path | None) -> None:
        self.corruption, self._damage, self._seen = corruption, damage, seen
        self._points: dict[float, Estimate] = {}
        self.images = self.clusters = 0
        self._file = None if folder is None else folder / f"{self._digest}.json"
        self._read()

    @property
    def _digest(self) -> str:
        setup, one = self._seen.setup, self.corruption
        of_corruption = {"corruption": one.config, "key": one.key, "damage": self._damage}
        return digest(setup.of_model | of_corruption | {"training": setup.training.digest, "seed": setup.study.seed})

    def on_grid(self) -> Curve:
        """The curve on the grid."""
        strengths = grid(self.corruption.strongest)
        return dict(zip(strengths, self(strengths), strict=True))

    def __call__(self, strengths: Sequence[float]) -> list[Estimate]:
        """The mean drops at these strengths."""
        if missing := [strength for strength in strengths if strength not in self._points]:
            drops, clusters = self._seen.drops(self.corruption, missing, self._damage)
            self.images, self.clusters = len(clusters), len(np.unique(clusters))
            self._points |= zip(missing, estimates(drops, clusters, self._seen.setup.study.seed), strict=True)
            self._write()
        return [self._points[strength] for strength in strengths]

    def _read(self) -> None:
        if self._file is not None and self._file.exists():
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self.images, self.clusters = kept["images"], kept["clusters"]
            self._points = {strength: Estimate(**estimate) for strength, estimate in kept["points"]}

    def _write(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            points = [(strength, asdict(self._points[strength])) for strength in sorted(self._points)]
            kept = {"corruption": str(self.corruption), "images": self.images, "clusters": self.clusters}
            write_json(self._file, kept | {"points": points})


@dataclass
class Seen:
    """The training images, seen by the run's model where it is now. The clean pass is made once."""

    setup: Setup
    _clean: list[dict[Damage, Tensor]] = field(default_factory=list)
    _labels: list[Tensor] = field(default_factory=list)

    @cached_property
    def _partners(self) -> Positions:
        """Where the training images' partners are, of the kinds that the corruptions ask for."""
        setup, found = self.setup, {}
        for one in setup.adjustables:
            kind = traits(one.at(0.0)).partner
            if kind is not None and kind not in found:
                found[kind] = found_of(kind, setup.training, setup.study.seed, setup.model.preprocessing)
                check_all(f"{one} on training images", kind, found[kind], setup.training)
        return found

    @torch.no_grad()
    def drops(self, one: Adjustable, strengths: Sequence[float], damage: Damage) -> tuple[np.ndarray, np.ndarray]:
        """Drops of each image at each strength, float64 (images, strengths), and the images' clusters (images,)."""
        corruptions = [self._scaled(one.at(strength)) for strength in strengths]
        found, ids = [], []
        for number, batch in enumerate(self._batches(f"{one}, {counted(len(strengths), 'strength')}")):
            labels, clean = self._clean_of(number, batch)
            runs = [self._damages(batch, corruption, labels)[damage] for corruption in corruptions]
            found.append(clean[damage][:, None] - torch.stack(runs, 1))
            ids += batch.ids.tolist()
        images = self.setup.training
        return torch.cat(found).numpy(), images.clusters[images.positions(ids)]

    @torch.no_grad()
    def spread(self, scale: str) -> np.ndarray:
        """The standard deviation of patch embeddings, ``global`` () or by ``channel`` (width,), float64."""
        return self._moments.spread(scale)

    @cached_property
    def _moments(self) -> Moments:
        model = self.setup.model
        embedded = (model.patch_embeddings(model.normalize(b.images)) for b in self._batches("patch embeddings"))
        return moments(embedded)

    def _scaled(self, corruption: Corruption) -> Corruption:
        if isinstance(corruption, OnEmbeddings):
            return corruption.with_spread(self.spread(corruption.scale))
        return corruption

    def _clean_of(self, number: int, batch: ImageBatch) -> tuple[Tensor, dict[Damage, Tensor]]:
        """Labels of a batch, the clean run's prediction where there is none, and what the clean run makes of them."""
        if number == len(self._clean):
            probs = self._probs(batch.images)
            self._labels.append(batch.labels.where(batch.labels != UNKNOWN, probs.argmax(1)))
            self._clean.append(_of_label(probs, self._labels[-1]))
        return self._labels[number], self._clean[number]

    def _damages(self, batch: ImageBatch, corruption: Corruption, labels: Tensor) -> dict[Damage, Tensor]:
        """What a corrupted batch is measured by, (batch,) float64 each, the mean over its draws."""
        seed, pixels = self.setup.study.seed, corrupted(corruption, batch, self.setup.study.seed)
        if not isinstance(corruption, OnEmbeddings):
            return _of_label(self._probs(pixels), labels)
        embedded, runs = self.setup.model.embedded, []
        for draw in range(corruption.draws):
            noise = noise_of(corruption, batch.ids, seed, embedded, draw)
            runs.append(_of_label(self._probs(pixels, noise), labels))
        return {damage: torch.stack([run[damage] for run in runs]).mean(0) for damage in Damage}

    def _probs(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Softmax probabilities (batch, classes), float64, on the CPU."""
        model = self.setup.model
        return model(model.normalize(images), noise).cpu().double().softmax(-1)

    def _batches(self, what: str) -> Iterator[ImageBatch]:
        """The images on the model's device; what cannot be read is left out or ends the run, as ``on_error`` says."""
        images, model = self.setup.training, self.setup.model
        kinds = self._partners
        decoded = Decoded(images, model.preprocessing.to_input, partners=kinds, needed=tuple(kinds))
        often = 0.2 if sys.stderr.isatty() else 10.0
        with tqdm(total=len(images), desc=what, unit=" images", mininterval=often, delay=often, leave=False) as bar:
            for batch, bad in batches_of(decoded, min(self.setup.cfg.batch_size, MOST_IMAGES)):
                if batch is not None:
                    yield batch.to(model.device)
                bar.update((0 if batch is None else len(batch)) + len(bad))


def _of_label(probs: Tensor, labels: Tensor) -> dict[Damage, Tensor]:
    """The label's probability, and whether it is predicted, (batch,) float64 each."""
    labels = labels.to(probs.device)
    right = (probs.argmax(1) == labels).double()
    return {Damage.PROB_DROP: probs.gather(1, labels[:, None])[:, 0], Damage.ACCURACY_DROP: right}
