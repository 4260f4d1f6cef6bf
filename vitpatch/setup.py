"""Everything a run needs, loaded and checked against each other."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vitpatch import NUMBERS_VERSION
from vitpatch.config import Study, construct, read_study, whole_number
from vitpatch.corruptions import Corruption
from vitpatch.data import LabelledImages, check_labels
from vitpatch.model import Checkpoint, PatchableViT
from vitpatch.plan import Plan, make_plan
from vitpatch.spec import digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """The nouns of a run. What is in it can change a number, but for batch size, devices, tracker and folders."""

    cfg: DictConfig
    study: Study
    model: PatchableViT
    corruption: Corruption
    images: LabelledImages
    plan: Plan

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names by label, the data's or else the model's."""
        return self.images.label_names or self.model.label_names

    @property
    def title(self) -> str:
        """The run in a line: model, data, corruption, target, window, direction."""
        target, study = self.study.target, self.study
        at = "" if target.tokens == "all" else f" at {target.tokens}"
        first = (
            f"{_short(self.cfg.model.path)} on {_short(self.cfg.data.path)}, {_corruption_label(self.cfg.corruption)}"
        )
        return f"{first}, {target.site}{at}, window {study.window}, {study.direction}"

    @property
    def run_id(self) -> str:
        """The digest of all that can change a number."""
        cfg = OmegaConf.to_container(self.cfg, resolve=True)
        return digest(
            {
                "numbers_version": NUMBERS_VERSION,
                "weights": self.model.weights_digest,
                "preprocessing": json.loads(self.model.preprocessing.processor.to_json_string()),
                "data": self.images.digest,
                "selection": {"on_error": cfg["data"]["on_error"]},
                **{key: cfg[key] for key in ("corruption", "target", "window", "direction", "metric", "rival", "seed")},
                "precision": [cfg["model"]["dtype"], cfg["trainer"].get("precision")],
            }
        )


def prepare(cfg: DictConfig) -> Setup:
    """Loads and checks model, data and corruption, cheapest first."""
    study = read_study(cfg)
    whole_number("batch_size", cfg.batch_size, least=1)
    corruption = construct(cfg.corruption)
    checkpoint: Checkpoint = construct(cfg.model)
    source = construct(cfg.data)
    model = checkpoint.load()
    plan = make_plan(study.target, study.window, study.direction, model.depth)
    images = source.open()
    check_labels(images, model.classes, model.label_names)
    if plan.restores_everything:
        log.info(
            "note: resid_post at all tokens hands the whole state over; the effect is the total effect by construction"
        )
    return Setup(cfg, study, model, corruption, images, plan)


def _corruption_label(cfg: DictConfig) -> str:
    """The corruption in words: its class and its strengths."""
    keys = ", ".join(f"{key}={value}" for key, value in cfg.items() if key != "_target_")
    name = str(cfg._target_).rpartition(".")[2].lower().replace("identity", "no corruption")
    return f"{name} ({keys})" if keys else name


def _short(path: str) -> str:
    return Path(str(path)).stem if str(path).endswith(".parquet") else Path(str(path)).name
