"""What a run takes from training images: the strength that does a wanted damage, the moments of patch embeddings.

Damage need not rise with strength, so that bisection alone could end anywhere: a grid shows the whole curve, the first
step of it that crosses the wanted drop is the bracket, and only that is halved.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from vitpatch.checks import one_of
from vitpatch.corruptions import Corruption, Identity, Moments
from vitpatch.corruptions.base import as_corruption
from vitpatch.corruptions.embedding_noise import measure_moments
from vitpatch.data.datamodule import DecodedImages, PartnerPositions, training_batches
from vitpatch.data.images import LabelledImages
from vitpatch.data.labels import UNKNOWN
from vitpatch.errors import VitPatchError
from vitpatch.formatting import corruption_words, digest, format_count, format_interval
from vitpatch.io import write_json
from vitpatch.models.vit import PatchableViT
from vitpatch.runs.config import construct
from vitpatch.stats.summary import estimates
from vitpatch.types import Estimate, ImageBatch

log = logging.getLogger(__name__)

POINTS = 9
"""Strengths of the grid, from 0 to the strongest."""
TOLERANCE = 1e-3
"""Of a drop: a tenth of the standard error of a mean over 1000 images whose drops spread by 0.3."""
HALVINGS = 12
"""Of the bracket at most, to 1/32 768 of the strongest: a drop that jumps is not met more closely by more."""
MATCH, SHARE = "match", 0.8
"""``calibrate=match``: this share of the smallest of a sweep's corruptions' largest drops."""
FOLDER, FILE = "calibration", "corruptions.json"
"""In a sweep's folder: the folder of the curves that its runs measured, and in it the file of the corruptions that are
matched."""


class Damage(StrEnum):
    """A mean over images, clean minus corrupt: of the label's probability, or of being right."""

    PROB_DROP = "prob_drop"
    ACCURACY_DROP = "accuracy_drop"


@dataclass(frozen=True)
class WantedDamage:
    """What ``calibrate`` asks for; ``drop`` is ``None`` where it is to be one that all corruptions of a sweep reach."""

    damage: Damage
    drop: float | None

    def __str__(self) -> str:
        return MATCH if self.drop is None else f"{self.damage}:{self.drop:g}"


def read_wanted_damage(value: Any) -> WantedDamage:
    """The value of ``calibrate``: ``prob_drop:0.2``, ``accuracy_drop:0.1``, or ``match`` (a drop of probability).

    Raises ``VitPatchError`` for anything else.
    """
    if value == MATCH:
        return WantedDamage(Damage.PROB_DROP, None)
    kind, _, number = str(value).partition(":")
    try:
        drop = float(number)
    except ValueError:
        drop = np.nan
    if not 0 < drop <= 1:
        expected = "null, match, or a drop above 0, at most 1, such as prob_drop:0.2"
        raise VitPatchError(f"calibrate {value!r}: expected {expected}")
    return WantedDamage(one_of("calibrate", kind, Damage), drop)


@dataclass(frozen=True)
class Adjustable:
    """The config of a corruption without its strength, ``key``, which goes from 0 to ``strongest``."""

    config: dict[str, Any]
    key: str
    strongest: float

    def at(self, strength: float) -> Corruption:
        """The corruption of this strength."""
        return as_corruption(construct(OmegaConf.create(self.config | {self.key: strength})))

    def __str__(self) -> str:
        return corruption_words(self.config)


def adjustable(config: Mapping[str, Any]) -> Adjustable:
    """A corruption's resolved config with its strength left open. ``VitPatchError`` where its class has no strength."""
    corruption = as_corruption(construct(OmegaConf.create(config)))
    if (strength := corruption.strength_key) is None:
        name = "corruption none" if type(corruption) is Identity else corruption_words(config)
        raise VitPatchError(f"calibrate: {name} has no strength; choose a corruption that has, or calibrate=null")
    rest = {key: value for key, value in config.items() if key != strength}
    return Adjustable(rest, strength, corruption.strongest)


def adjustables_of_run(config: dict[str, Any], wanted: WantedDamage, folder: Path | None) -> tuple[Adjustable, ...]:
    """A run's corruption, then those of its sweep where it is matched with them, each once.

    ``folder`` is that of the sweep's calibrations. Raises ``VitPatchError`` where it does not hold the sweep's
    corruptions.
    """
    configs = [config]
    if wanted.drop is None and folder is not None:
        if not (folder / FILE).exists():
            raise VitPatchError(
                f"calibrate=match: {folder / FILE} does not say which corruptions the sweep has; start the sweep anew, "
                "with Hydra's own sweeper"
            )
        configs += json.loads((folder / FILE).read_text(encoding="utf-8"))
    adjustables = list(map(adjustable, configs))
    return tuple(one for number, one in enumerate(adjustables) if one not in adjustables[:number])


def calibration_folder(run: Path) -> Path | None:
    """The folder of calibrations in the sweep that the run ``run`` is a job of; ``None`` where it is of none."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    is_its_job = hydra.mode == RunMode.MULTIRUN and Path(hydra.runtime.output_dir).resolve() == run.resolve()
    return Path(hydra.sweep.dir).resolve() / FOLDER if is_its_job else None


def grid(strongest: float) -> list[float]:
    """``POINTS`` strengths from 0 to the strongest, equally far apart."""
    return np.linspace(0, strongest, POINTS).tolist()


def search(
    measure: Callable[[Sequence[float]], Sequence[Estimate]],
    wanted: float,
    strongest: float,
    what: str,
    tolerance: float,
) -> tuple[float, dict[float, Estimate]]:
    """The strength whose mean drop is ``wanted``, and all that was measured on the way.

    ``measure`` gives the mean drops at some strengths. Of the bracket's ends the one nearer to ``wanted`` is taken,
    once it is within ``tolerance`` or after ``HALVINGS``. ``what`` names the strength in errors. Raises
    ``VitPatchError`` where no strength of the grid reaches the drop.
    """
    strengths = grid(strongest)
    curve = dict(zip(strengths, measure(strengths), strict=True))
    if curve[0.0].mean >= wanted:
        raise VitPatchError(
            f"calibrate: {what}=0 has a drop of {curve[0.0].mean:.3g} already; at strength 0 a corruption must leave "
            "the image as it is"
        )
    low, high = next(((a, b) for a, b in pairwise(strengths) if curve[b].mean >= wanted), (None, None))
    if high is None:
        best = max(strengths, key=lambda strength: curve[strength].mean)  # the lowest of several
        raise VitPatchError(
            f"calibrate: a drop of {wanted:.3g} is not reached; the largest on the training images is "
            f"{curve[best].mean:.3g}, at {what}={best:g}; ask for less"
        )
    for _ in range(HALVINGS):
        if min(abs(curve[strength].mean - wanted) for strength in (low, high)) <= tolerance:
            break
        middle = (low + high) / 2
        (curve[middle],) = measure([middle])
        low, high = (middle, high) if curve[middle].mean < wanted else (low, middle)
    return min((low, high), key=lambda strength: abs(curve[strength].mean - wanted)), curve


def tolerance_for(damage: Damage, images: int) -> float:
    """How near a drop is to come: ``TOLERANCE``, but of an accuracy, which moves by whole images, half an image."""
    return max(TOLERANCE, 0.5 / images) if damage is Damage.ACCURACY_DROP else TOLERANCE


def common_drop(largest_drops: Mapping[str, float]) -> float:
    """``SHARE`` of the smallest of the largest drops by corruption. ``VitPatchError`` where one does nothing."""
    name = min(largest_drops, key=largest_drops.get)
    if SHARE * largest_drops[name] <= TOLERANCE:
        raise VitPatchError(
            f"calibrate=match: the largest drop under {name} is {largest_drops[name]:.3g}; there is no damage to "
            "match, leave it out of the sweep"
        )
    return SHARE * largest_drops[name]


@dataclass(frozen=True)
class Calibration:
    """A strength, the drop it does on training images, and the curve that the search measured.

    ``largest_drops`` by corruption, of ``calibrate=match``; ``predicted`` whether images had no labels, so that drops
    are those of the clean run's predictions.
    """

    wanted: WantedDamage
    wanted_drop: float
    key: str
    strength: float
    strongest: float
    curve: Mapping[float, Estimate]
    images: int
    clusters: int
    predicted: bool = False
    largest_drops: Mapping[str, float] | None = None

    @property
    def is_monotone(self) -> bool:
        """Whether drops on the grid never fall by more than ``TOLERANCE`` from one strength to the next."""
        means = [self.curve[strength].mean for strength in grid(self.strongest)]
        return bool((np.diff(means) >= -TOLERANCE).all())

    def as_manifest(self) -> dict[str, Any]:
        """The calibration as the manifest has it."""
        entries = {
            "asked": str(self.wanted),
            "damage": str(self.wanted.damage),
            "wanted": self.wanted_drop,
            "key": self.key,
            "strength": self.strength,
            "drop": _describe_drop(self.curve[self.strength]),
            "monotone": self.is_monotone,
            "images": self.images,
            "clusters": self.clusters,
            "labels": "of the clean run's predictions" if self.predicted else "of the data",
            "curve": [{"strength": s} | _describe_drop(self.curve[s]) for s in sorted(self.curve)],
        }
        return entries if self.largest_drops is None else entries | {"largest_drops": dict(self.largest_drops)}

    def __str__(self) -> str:
        drop = self.curve[self.strength]
        labels = "the predicted labels' " if self.predicted else ""
        shape = "" if self.is_monotone else ", damage does not rise all along the grid"
        return (
            f"corruption.{self.key}={self.strength:g}: {labels}{self.wanted.damage} "
            f"{format_interval(drop.mean, drop.low, drop.high, '.3f')} on {self.images} training images "
            f"(asked {self.wanted}, {self.wanted_drop:.3g}; {len(self.curve)} strengths{shape})"
        )


def _describe_drop(drop: Estimate) -> dict[str, float]:
    return {"drop": drop.mean, "se": drop.se, "low": drop.low, "high": drop.high}


@dataclass
class TrainingRuns:
    """Clean and corrupt runs of training images by the run's model, where it is now; the clean pass is made once.

    ``damage`` is what is measured, if anything. ``partners``: where each image's are, of the kinds that the corruptions
    ask for. ``model_identity``: what the model's logits depend on, by name. ``batch_size`` images at a time.
    """

    model: PatchableViT
    model_identity: Mapping[str, Any]
    images: LabelledImages
    partners: PartnerPositions
    damage: Damage | None
    seed: int
    batch_size: int
    _clean: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each batch the labels, the clean run's predictions where there are none, and the clean run's scores."""

    @torch.no_grad()
    def drops(self, one: Adjustable, strengths: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Drops of each image at each strength, float64 (images, strengths), and the images' clusters (images,)."""
        corruptions = [one.at(strength) for strength in strengths]
        if corruptions[0].needs_training:
            corruptions = [corruption.with_statistics(self.moments) for corruption in corruptions]
        drops, ids = [], []
        for number, batch in enumerate(self._batches(f"{one}, {format_count(len(strengths), 'strength')}")):
            if number == len(self._clean):
                probs, labels = self._probs(batch.images), batch.labels.cpu()
                labels = labels.where(labels != UNKNOWN, probs.argmax(1))
                self._clean.append((labels, self._scores(probs, labels)))
            labels, clean = self._clean[number]
            corrupt = [self._corrupt_scores(batch, corruption, labels) for corruption in corruptions]
            drops.append(clean[:, None] - torch.stack(corrupt, 1))
            ids += batch.ids.tolist()
        return torch.cat(drops).numpy(), self.images.clusters[self.images.positions(ids)]

    @cached_property
    @torch.no_grad()
    def moments(self) -> Moments:
        """The moments of the images' patch embeddings."""
        batches = self._batches("patch embeddings")
        return measure_moments(self.model.patch_embeddings(self.model.normalize(batch.images)) for batch in batches)

    def _corrupt_scores(self, batch: ImageBatch, corruption: Corruption, labels: Tensor) -> Tensor:
        """The scores of a corrupted batch, (batch,) float64, the mean over the corruption's draws."""
        pixels, scores = corruption.pixels(batch, self.seed), []
        for draw in range(corruption.draws):
            noise = None
            if corruption.is_inside_model:
                noise = corruption.embedding_noise(batch.ids, self.seed, self.model.embedding_shape, draw)
            scores.append(self._scores(self._probs(pixels, noise), labels))
        return torch.stack(scores).mean(0)

    def _probs(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Softmax probabilities (batch, classes), float64, on the CPU."""
        return self.model(self.model.normalize(images), noise).cpu().double().softmax(-1)

    def _scores(self, probs: Tensor, labels: Tensor) -> Tensor:
        """The labels' probabilities, or whether they are predicted, (batch,) float64."""
        if self.damage is Damage.ACCURACY_DROP:
            return (probs.argmax(1) == labels).double()
        return probs.gather(1, labels[:, None])[:, 0]

    def _batches(self, title: str) -> Iterator[ImageBatch]:
        """The images on the model's device; what cannot be read is left out or ends the run, as ``on_error`` says."""
        to_input = self.model.preprocessing.to_input
        decoded = DecodedImages(self.images, to_input, partners=self.partners, needed=tuple(self.partners))
        often = 0.2 if sys.stderr.isatty() else 10.0
        options = {"unit": " images", "mininterval": often, "delay": often, "leave": False}
        with tqdm(total=len(self.images), desc=title, **options) as bar:
            for batch, bad in training_batches(decoded, self.batch_size):
                if batch is not None:
                    yield batch.to(self.model.device)
                bar.update((0 if batch is None else len(batch)) + len(bad))


class DropCurve:
    """Mean drops under a corruption by strength, each measured once; kept in a file of ``folder``, where there is one.

    ``images`` and ``clusters`` that were read, once something was measured.
    """

    def __init__(self, corruption: Adjustable, training: TrainingRuns, folder: Path | None) -> None:
        self.corruption, self._training = corruption, training
        self._drops: dict[float, Estimate] = {}
        self.images = self.clusters = 0
        identity = {"corruption": corruption.config, "key": corruption.key, "damage": training.damage}
        identity |= {**training.model_identity, "training": training.images.digest, "seed": training.seed}
        self._file = None if folder is None else folder / f"{digest(identity)}.json"
        if self._file is not None and self._file.exists():
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self.images, self.clusters = kept["images"], kept["clusters"]
            self._drops = {strength: Estimate(**estimate) for strength, estimate in kept["points"]}

    def __call__(self, strengths: Sequence[float]) -> list[Estimate]:
        """The mean drops at these strengths."""
        if missing := [strength for strength in strengths if strength not in self._drops]:
            drops, clusters = self._training.drops(self.corruption, missing)
            self.images, self.clusters = len(clusters), len(np.unique(clusters))
            self._drops |= zip(missing, estimates(drops, clusters, self._training.seed), strict=True)
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                points = [(strength, asdict(self._drops[strength])) for strength in sorted(self._drops)]
                kept = {"corruption": str(self.corruption), "images": self.images, "clusters": self.clusters}
                write_json(self._file, kept | {"points": points})
        return [self._drops[strength] for strength in strengths]


def calibrate(
    wanted: WantedDamage, adjustables: Sequence[Adjustable], training: TrainingRuns, folder: Path | None
) -> Calibration:
    """The strength of a run's own corruption, the first of the adjustable ones, that does the wanted damage.

    Curves are kept in the folder of a sweep's calibrations, where there is one. Raises ``VitPatchError`` where a drop
    is not reached.
    """
    started, own = time.monotonic(), adjustables[0]
    curves = [DropCurve(one, training, folder) for one in adjustables]
    drop, largest_drops = wanted.drop, None
    if drop is None:
        names = [str(one) for one in adjustables]
        if len(set(names)) < len(names):  # classes of two modules may be called alike
            names = [str(one.config) for one in adjustables]
        largest_drops = {
            name: max(estimate.mean for estimate in curve(grid(one.strongest)))
            for name, one, curve in zip(names, adjustables, curves, strict=True)
        }
        drop = common_drop(largest_drops)
    tolerance = tolerance_for(wanted.damage, len(training.images))
    strength, curve = search(curves[0], drop, own.strongest, f"corruption.{own.key}", tolerance)
    calibration = Calibration(
        wanted, drop, own.key, strength, own.strongest, curve, curves[0].images, curves[0].clusters,
        predicted=not training.images.has_labels, largest_drops=largest_drops,
    )  # fmt: skip
    log.info("calibrated: %s, %.0f s", calibration, time.monotonic() - started)
    return calibration
