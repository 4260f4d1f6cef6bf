"""Everything a run needs, loaded and checked against each other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from vitpatch import NUMBERS_VERSION
from vitpatch.checks import Seed, check
from vitpatch.corruptions.embedding_noise import OnEmbeddings
from vitpatch.corruptions.pixels import Corruption, no_masks, traits
from vitpatch.data.datamodule import Positions, training_images
from vitpatch.data.images import LabelledImages
from vitpatch.data.sources import ImageSource
from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.models.classes import MULTI_LABEL, Classes, as_classes, notes_on
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.plan import Plan, make_plan
from vitpatch.patching.tokens import needs_masks
from vitpatch.runs.adjustable import Adjustable, adjustable
from vitpatch.runs.calibration import Asked, Calibration, read_asked
from vitpatch.runs.config import (
    PATCH_GROUPS,
    PatchKeys,
    check_keys,
    check_option,
    construct_option,
    read_study,
    with_defaults,
)
from vitpatch.runs.controls import donors_of, partners_of
from vitpatch.runs.devices import devices_of
from vitpatch.runs.options import code_identity, resolved
from vitpatch.runs.peers import read_corruptions
from vitpatch.runs.tracking import tracker_of
from vitpatch.runs.trainer import make_trainer_of
from vitpatch.stats.inference import check_signed
from vitpatch.titles import corruption_words, data_words, short
from vitpatch.types import (
    ALL_IMAGES,
    JOINT,
    Donor,
    Study,
    Target,
    Tested,
    TokenGroup,
    digest,
    option_identity,
    window_word,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """The nouns of a run. What is in it can change a number, but for batch size, devices, tracker and folders.

    ``partners`` are those that donors and the corruption ask for. ``training`` are the training images, where something
    is taken from them. ``adjustables``: the run's corruption, whose strength is ``asked`` of them, then the others it
    is matched with. What was taken: ``calibration``, and ``spread``, the standard deviation of patch embeddings.
    ``notes`` say what a reader must know of labels and probabilities.
    """

    cfg: DictConfig
    study: Study
    model: PatchableViT
    corruption: Corruption
    images: LabelledImages
    plan: Plan
    checkpoint: Checkpoint
    partners: Positions
    training: LabelledImages | None = None
    asked: Asked | None = None
    adjustables: tuple[Adjustable, ...] = ()
    calibration: Calibration | None = None
    spread: NDArray[np.floating] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_reduced(self) -> bool:
        """Whether anything is computed below float32."""
        return not _is_float32(self.cfg) or self.checkpoint.dtype != "float32"

    def float32_model(self) -> PatchableViT:
        """The same weights in float32."""
        return replace(self.checkpoint, dtype="float32").load(self.model.label_names)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names by label, the data's or else the model's."""
        return self.images.label_names or self.model.label_names

    @property
    def title(self) -> str:
        """The run in a line: model, data, corruption, target, window, direction."""
        target, study = self.study.target, self.study
        at = "" if target.tokens == (TokenGroup.ALL,) else f" at {' and '.join(target.tokens)}"
        if target.heads is not None:
            at = f"{' of all heads' if target.heads == JOINT else ' by head'}{at}"
        windows = ", ".join(map(window_word, study.windows))
        first = f"{self._model_words} on {data_words(self.cfg.data)}"
        if study.depends_on_corruption:
            first += f", {corruption_words(self.cfg.corruption)}"
            first += f" calibrated to {self.asked}" * (self.calibration is not None)
        donor = "" if study.donor is Donor.PAIR else f", donor {study.donor}"
        include = "" if study.include == ALL_IMAGES else f", {study.include} images"
        return f"{first}, {target.site}{at}, window {windows}, {study.direction}{donor}{include}"

    @property
    def _model_words(self) -> str:
        """The model's name, and what is not as its checkpoint has it."""
        also = ["untrained"] * self.checkpoint.random_init + [self.model.head] * (self.model.head is not None)
        also += ["multi-label"] * (self.model.model.config.problem_type == MULTI_LABEL)
        return short(self.cfg.model.path) + (f" ({', '.join(also)})" if also else "")

    @property
    def run_id(self) -> str:
        """The digest of all that can change a number."""
        return digest(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """All that can change a number, by name."""
        cfg = OmegaConf.to_container(self.cfg, resolve=True)
        return {
            **self.of_model,
            "data": self.images.digest,
            "selection": {"on_error": cfg["data"]["on_error"]},
            "corruption": option_identity(self.adjustables[0].config if self.asked else cfg["corruption"]),
            **code_identity(cfg["corruption"]),
            "target": asdict(self.study.target),
            "window": self.study.windows,
            **{key: cfg[key] for key in ("direction", "metric", "rival", "seed")},
            "donors": self.plan.donors,
            "include": str(self.study.include),
            "interval": self.study.interval,
            "test": self.study.test,
            "leave_outs": len(self.plan.leave_outs),
            **self._of_training,
        }

    @property
    def of_model(self) -> dict[str, Any]:
        """What can change the logits of an image."""
        cfg = self.cfg
        return {
            "numbers_version": NUMBERS_VERSION,
            "weights": self.model.weights_digest,
            "architecture": self.model.config_digest,
            "readout": self.model.head,
            "row": asdict(self.model.family) if self.checkpoint.anatomy else None,
            "preprocessing": json.loads(self.model.preprocessing.processor.to_json_string()),
            "precision": [cfg.model.dtype, _precision(cfg), cfg.matmul_precision],
        }

    @property
    def _of_training(self) -> dict[str, Any]:
        """What the numbers owe to training images: nothing, of most runs. A strength that is found follows from it."""
        if self.training is None:
            return {}
        matched = sorted(digest(option_identity(one.config)) for one in self.adjustables)
        asked = {} if self.asked is None else {"calibrate": str(self.asked), "matched": matched}
        return {"training": self.training.digest} | asked


@dataclass(frozen=True)
class Checked:
    """What a config says, with all that it leaves out; nothing of it is loaded."""

    cfg: DictConfig
    study: Study
    corruption: Corruption
    asked: Asked | None
    checkpoint: Checkpoint
    source: ImageSource


def check_config(cfg: DictConfig) -> Checked:
    """Raises ``VitPatchError`` for what is wrong with a composed config of ``patch.py`` whatever model and data are."""
    cfg = resolved(cfg)
    if "seed" in cfg:
        check("seed", cfg.seed, Seed)  # before data.seed, which is the same
    make_trainer = make_trainer_of(cfg)
    tracker_of(cfg)
    check_option(cfg, "target", Target)
    corruption = construct_option(cfg, "corruption", Callable)
    checkpoint, source = construct_option(cfg, "model", Checkpoint), construct_option(cfg, "data", ImageSource)
    cfg = with_defaults(cfg, ("model", "data", "corruption", "target"))
    check_keys(cfg, PatchKeys, PATCH_GROUPS)
    study = read_study(cfg)
    if study.test is Tested.HEADLINE:
        check_signed(study.metric, study.direction)
    asked = read_asked(cfg.calibrate)
    if traits(corruption).needs_masks and not cfg.data.mask_column:
        raise no_masks(corruption)
    _check_precision(cfg, checkpoint)
    devices_of(make_trainer)
    return Checked(cfg, study, corruption, asked, checkpoint, source)


def prepare(cfg: DictConfig, calibrations: Path | None = None) -> Setup:
    """Loads and checks model, data and corruption, cheapest first; ``calibrations`` is the folder of a sweep's."""
    checked = check_config(cfg)
    cfg, study, corruption, source = checked.cfg, checked.study, checked.corruption, checked.source
    asked, checkpoint = checked.asked, checked.checkpoint
    adjustables = _adjustables(cfg, asked, calibrations)
    model = checkpoint.load(source.open().label_names if checkpoint.needs_names else None)
    model.require(study.target.site)
    make_plan(study.target, study.windows, study.direction, model.sizes)  # says what is wrong before data are read
    opened, classes = source.open(), Classes.of(model.model.config)
    images = as_classes(opened, classes, source.label_map)
    notes = (*model.notes, *notes_on(opened, classes, source.label_map))
    partners = partners_of(study, corruption, images, model.preprocessing)
    donors = donors_of(study, partners)
    plan = make_plan(study.target, study.windows, study.direction, model.sizes, donors, study.synergy)
    if needs_masks(plan.token_groups) and not cfg.data.get("mask_column"):
        raise VitPatchError(
            f"target.tokens {' and '.join(plan.target.tokens)}: the data have no object masks; "
            "name their column with data.mask_column"
        )
    if plan.restores_everything:
        log.info(
            "note: %s at all tokens hands the whole state over; the effect is the total effect by construction",
            plan.target.site,
        )
    training = None
    if asked is not None or isinstance(corruption, OnEmbeddings) or study.donor is Donor.MEAN:
        training = training_images(source, cfg.train_split, cfg.train_limit)
        training = as_classes(training, classes, source.label_map, beside=opened)
    return Setup(
        cfg, study, model, corruption, images, plan, checkpoint, partners, training, asked, adjustables, notes=notes
    )


def _adjustables(cfg: DictConfig, asked: Asked | None, calibrations: Path | None) -> tuple[Adjustable, ...]:
    """The run's corruption, and those of its sweep where it is matched with them."""
    if asked is None:
        return ()
    configs = [OmegaConf.to_container(cfg.corruption, resolve=True)]
    if asked.drop is None and calibrations is not None:
        configs += read_corruptions(calibrations)
    found: list[Adjustable] = []
    for one in map(adjustable, configs):
        if one not in found:
            found.append(one)
    return tuple(found)


PRECISIONS = {"32": "32", "32-true": "32", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}


def _precision(cfg: DictConfig) -> str:
    """The trainer's precision by one name each."""
    return PRECISIONS[str(cfg.trainer.get("precision") or 32)]


def _is_float32(cfg: DictConfig) -> bool:
    return _precision(cfg) == "32" and cfg.matmul_precision == "highest"


def _check_precision(cfg: DictConfig, checkpoint: Checkpoint) -> None:
    asked = str(cfg.trainer.get("precision") or 32)
    if asked not in PRECISIONS:
        raise VitPatchError(
            f"trainer.precision {asked}: expected one of {', '.join(PRECISIONS)}; weights below float32: model.dtype"
        )
    on_cpu = cfg.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
    if _precision(cfg) == "16-mixed" and on_cpu:
        raise VitPatchError("trainer.precision 16-mixed: a CPU has none; use bf16-mixed or 32")
    if checkpoint.dtype != "float32" and _precision(cfg) != "32":
        raise VitPatchError(
            f"trainer.precision {asked} with model.dtype {checkpoint.dtype}: the weights are below float32 already; "
            "leave trainer.precision at 32"
        )
