"""Everything a run needs, loaded and checked against each other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from vitpatch import NUMBERS_VERSION
from vitpatch.checks import Seed, argument_keys, check
from vitpatch.corruptions import Corruption
from vitpatch.corruptions.base import as_corruption, missing_masks
from vitpatch.data.datamodule import PartnerPositions, mean_luminance, training_images
from vitpatch.data.images import LabelledImages
from vitpatch.data.partners import check_partners, choose_partners
from vitpatch.data.sources import ImageSource
from vitpatch.errors import VitPatchError
from vitpatch.formatting import (
    digest,
    format_count,
    option_identity,
    users_code,
)
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.models.classes import Classes, label_by_classes, label_notes
from vitpatch.models.preprocessing import Preprocessing
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.plan import Plan, make_plan, needs_masks
from vitpatch.runs.calibration import (
    Adjustable,
    Calibration,
    TrainingRuns,
    WantedDamage,
    adjustables_of_run,
    calibrate,
    read_wanted_damage,
)
from vitpatch.runs.config import (
    PATCH_GROUPS,
    PatchKeys,
    check_keys,
    check_option,
    construct_option,
    read_figures,
    resolve_steps,
    with_defaults,
)
from vitpatch.runs.tracking import make_tracker
from vitpatch.runs.trainer import QUIETLY, build_trainer, on_device, trainer_factory
from vitpatch.stats.inference import check_signed
from vitpatch.study import Study, check_target, read_study, run_title
from vitpatch.types import Donor, Partner, Target, Tested

log = logging.getLogger(__name__)

CONTROLS = (Donor.SAME_CLASS, Donor.OTHER_CLASS)
"""Donors that are patched too, as controls for the image's own other run."""
MOST_TRAINING_IMAGES = 64
"""Of a forward pass at most: ``batch_size`` may be meant for a loop that cuts it to what the memory holds."""


@dataclass(frozen=True, kw_only=True)
class CheckedConfig:
    """A checked config with all its defaults; nothing is loaded. ``wanted``: the damage that ``calibrate`` asks for."""

    cfg: DictConfig
    study: Study
    corruption: Corruption
    wanted: WantedDamage | None
    checkpoint: Checkpoint
    source: ImageSource
    trainer: lightning.Trainer


@dataclass(frozen=True, kw_only=True)
class Setup(CheckedConfig):
    """All that a run needs. What is in it can change a number, but for batch size, devices, tracker and folders.

    ``partners`` are those that donors and the corruption ask for. ``training`` are the training images, where something
    is taken from them. ``adjustables``: of a run that is calibrated its corruption with the strength left open, then
    the others that it is matched with; ``calibrations`` the folder of its sweep's calibrations. ``notes`` are what a
    reader must know of labels and probabilities.

    Before ``take_from_training`` there is no ``calibration``, and corruption and ``cfg`` are as the config has them.
    """

    model: PatchableViT
    images: LabelledImages
    plan: Plan
    partners: PartnerPositions
    training: LabelledImages | None
    adjustables: tuple[Adjustable, ...]
    calibrations: Path | None
    notes: tuple[str, ...]
    calibration: Calibration | None = None

    @property
    def is_reduced(self) -> bool:
        """Whether anything is computed below float32."""
        rounded = _precision(self.cfg) != "32" or self.cfg.matmul_precision != "highest"
        return rounded or self.checkpoint.dtype != "float32"

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names by label, the data's or else the model's."""
        return self.images.label_names or self.model.label_names

    @property
    def title(self) -> str:
        """The run in a line: model, data, corruption, site, window, and what is put into what."""
        kind = self.model.model.config.problem_type
        calibrated = None if self.calibration is None else str(self.wanted)
        config = OmegaConf.to_container(self.cfg, resolve=True)
        return run_title(config, self.study, readout=self.model.head, problem_type=kind, calibrated=calibrated)

    @property
    def run_id(self) -> str:
        """The digest of all that can change what is computed."""
        return digest(self.identity)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that can change what is computed, by name; how it is read is the study's view."""
        cfg = OmegaConf.to_container(self.cfg, resolve=True)
        return {
            **self.model_identity,
            "data": self.images.digest,
            "selection": {"on_error": cfg["data"]["on_error"]},
            "corruption": option_identity(self.adjustables[0].config if self.wanted else cfg["corruption"]),
            **users_code(cfg["corruption"]),
            "target": asdict(self.study.target),
            "window": self.study.windows,
            "direction": cfg["direction"],
            "seed": cfg["seed"],
            "donors": self.plan.donors,
            "leave_outs": len(self.plan.leave_outs),
            **self._training_identity(),
        }

    @property
    def model_identity(self) -> dict[str, Any]:
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

    def _training_identity(self) -> dict[str, Any]:
        """What of training images can change a number: nothing, of most runs. A calibrated strength follows from it."""
        if self.training is None:
            return {}
        if self.wanted is None:
            return {"training": self.training.digest}
        matched = sorted(digest(option_identity(one.config)) for one in self.adjustables)
        return {"training": self.training.digest, "calibrate": str(self.wanted), "matched": matched}

    def describe_training(self) -> dict[str, Any]:
        """What was taken from training images, as the manifest has it."""
        if self.training is None:
            return {}
        cfg, images = self.cfg, self.training
        taken = {"split": cfg.train_split, "limit": cfg.train_limit, "images": len(images), "digest": images.digest}
        entries: dict[str, Any] = {"training": taken}
        if self.calibration is not None:
            entries["calibration"] = self.calibration.as_manifest()
        return entries | self.corruption.describe_statistics()


def check_config(cfg: DictConfig) -> CheckedConfig:
    """Raises ``VitPatchError`` for what is wrong with a composed config of ``patch.py`` whatever model and data are."""
    cfg = resolve_steps(cfg)
    if "seed" in cfg:
        check("seed", cfg.seed, Seed)  # before data.seed, which is the same
    make_trainer = trainer_factory(cfg)
    make_tracker(cfg)
    check_option(cfg, "target", Target)
    corruption = as_corruption(construct_option(cfg, "corruption", Callable))
    checkpoint, source = construct_option(cfg, "model", Checkpoint), construct_option(cfg, "data", ImageSource)
    cfg = with_defaults(cfg, ("model", "data", "corruption", "target"))
    check_keys(cfg, PatchKeys, PATCH_GROUPS)
    OmegaConf.resolve(cfg)  # once: each reading of an interpolation runs a parser
    study = read_study(cfg)
    read_figures(cfg.figures)
    if study.test is Tested.HEADLINE:
        check_signed(study.metric, study.direction)
    wanted = None if cfg.calibrate is None else read_wanted_damage(cfg.calibrate)
    if corruption.needs_masks and not cfg.data.mask_column:
        raise missing_masks(corruption)
    _check_precision(cfg, checkpoint)
    return CheckedConfig(
        cfg=cfg,
        study=study,
        corruption=corruption,
        wanted=wanted,
        checkpoint=checkpoint,
        source=source,
        trainer=build_trainer(make_trainer, **QUIETLY),
    )


def prepare(cfg: DictConfig, calibrations: Path | None = None) -> Setup:
    """Loads and checks model, data and corruption, cheapest first; ``calibrations`` is the folder of a sweep's."""
    checked = check_config(cfg)
    cfg, study, corruption, source = checked.cfg, checked.study, checked.corruption, checked.source
    adjustables = ()
    if checked.wanted is not None:
        corruption_config = OmegaConf.to_container(cfg.corruption, resolve=True)
        adjustables = adjustables_of_run(corruption_config, checked.wanted, calibrations)
    names = source.open().label_names if checked.checkpoint.needs_names else None
    model = checked.checkpoint.load(names)
    model.require(study.target.site)
    with argument_keys("target."):
        check_target(study.target, study.windows, model.sizes)  # before data are read
    opened, classes = source.open(), Classes.of(model.model.config)
    images = label_by_classes(opened, classes, source.label_map)
    donors, partners = _find_donors(study, corruption, images, model.preprocessing)
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
    if checked.wanted is not None or corruption.needs_training or study.donor is Donor.MEAN:
        training = training_images(source, cfg.train_split, cfg.train_limit)
        training = label_by_classes(training, classes, source.label_map, other_split=opened)
    return Setup(
        **vars(checked),
        model=model,
        images=images,
        plan=plan,
        partners=partners,
        training=training,
        adjustables=adjustables,
        calibrations=calibrations,
        notes=(*model.notes, *label_notes(opened, classes, source.label_map)),
    )


def take_from_training(setup: Setup) -> Setup:
    """The setup with what it takes from training images: the strength that does the damage asked for, and statistics.

    The strength is in the corruption and in its config, the statistics in the corruption. Raises ``VitPatchError``
    where no strength does the damage.
    """
    cfg, corruption, wanted, calibration = setup.cfg, setup.corruption, setup.wanted, None
    if wanted is None and not corruption.needs_training:
        return setup
    images, seed, partners = setup.training, setup.study.seed, {}
    for one in setup.adjustables:
        kind = one.at(0.0).partner
        if kind is not None and kind not in partners:
            partners[kind] = find_partners(kind, images, seed, setup.model.preprocessing, f"{one} on training images")
    training = TrainingRuns(
        model=setup.model,
        model_identity=setup.model_identity,
        images=images,
        partners=partners,
        damage=None if wanted is None else wanted.damage,
        seed=seed,
        batch_size=min(cfg.batch_size, MOST_TRAINING_IMAGES),
    )
    with on_device(setup.model, setup.trainer, cfg.matmul_precision):
        if wanted is not None:
            calibration = calibrate(wanted, setup.adjustables, training, setup.calibrations)
            corruption = setup.adjustables[0].at(calibration.strength)
            cfg = cfg.copy()
            OmegaConf.update(cfg, f"corruption.{calibration.key}", calibration.strength, force_add=True)
        if corruption.needs_training:
            corruption = corruption.with_statistics(training.moments)
    return replace(setup, cfg=cfg, corruption=corruption, calibration=calibration)


def _find_donors(
    study: Study, corruption: Corruption, images: LabelledImages, preprocessing: Preprocessing
) -> tuple[tuple[Donor, ...], PartnerPositions]:
    """The run's donor, then its controls; and where each image's partners for these and for the corruption are.

    There are controls where they are asked for, or cost little: where window is 1. One that no image has a partner for
    is left out, with a line. Raises ``VitPatchError`` where what is asked for cannot be had.
    """
    wanted, donor, has_controls = corruption.partner, study.donor.partner, study.controls
    if has_controls is None:
        has_controls = study.donor is Donor.PAIR and study.windows == (1,)
    by_label = {wanted, donor} - {None, Partner.PAIR} or ({Partner.OTHER_CLASS} if study.controls else set())
    if by_label and not images.has_labels:
        raise VitPatchError(f"{' and '.join(sorted(by_label))} images: the data have no labels to go by")
    controls = {control.partner for control in CONTROLS} if has_controls and images.has_labels else set()
    positions = {}
    for kind in sorted(({wanted, donor} | controls) - {None}):
        needed_by = corruption.class_name if kind == wanted else None
        positions[kind] = find_partners(kind, images, study.seed, preprocessing, needed_by)
    if donor is not None and (positions[donor] < 0).all():
        raise VitPatchError(f"donor {study.donor}: no image has a {donor} partner in another cluster; use more images")
    donors = [study.donor]
    for control in CONTROLS if has_controls else ():
        if control.partner in positions and (positions[control.partner] >= 0).any():
            donors.append(control)
        elif study.controls:
            raise VitPatchError(f"controls true: no image has a {control} partner in another cluster; use more images")
        else:
            log.info("note: no image has a %s partner in another cluster; the run is without this control", control)
    return tuple(donors), positions


def find_partners(
    kind: Partner, images: LabelledImages, seed: int, preprocessing: Preprocessing, needed_by: str | None = None
) -> NDArray[np.int64]:
    """Where the partners of one kind are, (images,), −1 where an image has none.

    Raises ``VitPatchError`` where the data have no pairs, or where an image has no partner and the corruption
    ``needed_by`` asks for one of every image.
    """
    if kind is Partner.PAIR:
        if images.columns.pair is None:
            raise VitPatchError("partner pair: the data have no pairs; name their column with data.pair_column")
        positions = np.arange(len(images))
    elif kind is Partner.NEAREST_LUMINANCE:
        log.info("looking at the luminance of %s", format_count(len(images), "image"))
        luminance = mean_luminance(images, preprocessing.to_input)
        positions = choose_partners(kind, images.labels, images.clusters, seed, luminance)
        positions = np.where(np.isnan(luminance), np.arange(len(images)), positions)  # what cannot be read needs none
    else:
        positions = choose_partners(kind, images.labels, images.clusters, seed)
    if needed_by is not None:
        check_partners(kind, positions, images.ids, needed_by)
    return positions


PRECISIONS = {"32": "32", "32-true": "32", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}
"""The trainer's precisions by the names that it may have."""


def _precision(cfg: DictConfig) -> str:
    asked = str(cfg.trainer.get("precision") or 32)
    if asked not in PRECISIONS:
        raise VitPatchError(
            f"trainer.precision {asked}: expected one of {', '.join(PRECISIONS)}; weights below float32: model.dtype"
        )
    return PRECISIONS[asked]


def _check_precision(cfg: DictConfig, checkpoint: Checkpoint) -> None:
    precision = _precision(cfg)
    if precision == "16-mixed" and (cfg.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()):
        raise VitPatchError("trainer.precision 16-mixed: a CPU has none; use bf16-mixed or 32")
    if precision != "32" and checkpoint.dtype != "float32":
        raise VitPatchError(
            f"trainer.precision {cfg.trainer.precision} with model.dtype {checkpoint.dtype}: the weights are below "
            "float32 already; leave trainer.precision at 32"
        )
