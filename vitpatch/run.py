"""One run, from the composed config to the sealed folder."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from vitpatch import NUMBERS_VERSION, __version__, plots, stats
from vitpatch.config import Study, construct, read_study, whole_number
from vitpatch.data import ImageDataModule, LabelledImages, check_labels
from vitpatch.effects import total_effect
from vitpatch.model import Checkpoint, PatchableViT
from vitpatch.plan import Plan, make_plan
from vitpatch.predict import Corruption, PatchingModule, corrupted, patch_columns, predict
from vitpatch.spec import BaseRun, Metric, VitPatchError, digest
from vitpatch.stats import Estimate
from vitpatch.store import RunFolder
from vitpatch.tracking import Results, RunInfo

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "lightning", "datasets", "hydra-core", "wandb", "numpy")
IMAGES_A_PAGE = 6


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, loaded and checked against each other."""

    cfg: DictConfig
    study: Study
    model: PatchableViT
    corruption: Corruption
    images: LabelledImages
    plan: Plan

    @property
    def title(self) -> str:
        """The run in a line: model, data, corruption, target, window, direction."""
        target, study = self.study.target, self.study
        at = "" if target.tokens == "all" else f" at {target.tokens}"
        first = (
            f"{_short(self.cfg.model.path)} on {_short(self.cfg.data.path)}, {corruption_label(self.cfg.corruption)}"
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
                "precision": cfg["model"]["dtype"],
            }
        )


@dataclass(frozen=True)
class Outcome:
    """What is known once all images are through, over the included ones.

    ``effects`` (images, patches) of the headline metric; ``summary`` has a row a patch.
    """

    examples: pd.DataFrame
    effects: np.ndarray
    summary: pd.DataFrame
    total: Estimate
    peak: int | None


def run(cfg: DictConfig, path: Path, options: dict[str, str] | None = None) -> None:
    """Makes the run that ``cfg`` describes in the folder ``path``; ``options`` are the names of the chosen options.

    A finished run of the same ``run_id`` is left as it is. Raises ``VitPatchError`` for what the user can mend.
    """
    started = time.monotonic()
    tracker, make_trainer = construct(cfg.logger), construct(cfg.trainer)
    setup = prepare(cfg)
    folder = RunFolder(path)
    if _already_there(folder, setup.run_id, cfg.overwrite):
        log.info("%s: finished before, nothing to do (overwrite=true runs it again)", path)
        return
    folder.begin()
    config = OmegaConf.to_container(cfg, resolve=True) | {"options": options or {}, "run_id": setup.run_id}
    with tracker.run(RunInfo(path, str(cfg.sweep), config)) as tracked:
        data = ImageDataModule(setup.images, setup.model.preprocessing.to_input, cfg.batch_size)
        module = PatchingModule(setup.model, setup.corruption, setup.plan, setup.study, setup.images)
        patching_started = time.monotonic()
        skipped = predict(module, data, make_trainer, folder)
        patching_seconds = time.monotonic() - patching_started
        if len(skipped) == len(setup.images):
            raise VitPatchError(f"data {cfg.data.path}: none of the {len(skipped)} images can be read")
        folder.merge()
        outcome = measure(folder, setup)
        pictures = draw(folder, setup, outcome, data)
        manifest = {
            "run_id": setup.run_id,
            "config": config,
            "versions": _versions(),
            "model": {"path": cfg.model.path, "revision": cfg.model.revision, "weights": setup.model.weights_digest},
            "data": {"digest": setup.images.digest},
            "counts": {
                "images": len(setup.images),
                "read": len(setup.images) - len(skipped),
                "included": len(outcome.examples),
                "dropped": {"unreadable": len(skipped)} if skipped else {},
                "clusters": int(outcome.examples["cluster"].nunique()),
                "patches": len(setup.plan.patches),
            },
            **described(outcome),
            "tracking": tracked.about,
            "seconds": round(time.monotonic() - started, 3),
            "images_per_second": round(len(outcome.examples) / patching_seconds, 3),
        }
        with folder.sealing(manifest) as manifest_file:
            files = {f.name: f for f in (folder.examples, folder.effects, folder.summary)}
            files[folder.manifest.name] = manifest_file
            tracked.log(Results(outcome.summary, scalars(outcome), pictures, files))
    report(folder, setup, outcome, tracked.sync_command)


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


def _already_there(folder: RunFolder, run_id: str, overwrite: bool) -> bool:
    manifest = folder.finished()
    if manifest is None or overwrite:
        return False
    if manifest["run_id"] != run_id:
        raise VitPatchError(
            f"{folder.path} holds a finished run with other settings, weights or data (run_id {manifest['run_id']}, "
            f"this one {run_id}); choose another folder or sweep name, or overwrite=true"
        )
    return True


def measure(folder: RunFolder, setup: Setup) -> Outcome:
    """Means, intervals and the peak, from the merged files; writes ``summary.csv``."""
    examples = pd.read_parquet(folder.examples)
    patches = pd.DataFrame(patch_columns(setup.plan))
    effects, correct = _matrices(folder, examples, len(patches))
    included = examples["included"].to_numpy()
    examples, effects, correct = examples[included].reset_index(drop=True), effects[included], correct[included]
    clean, corrupt = (_metric_of(examples, run, setup.study.metric) for run in (BaseRun.CLEAN, BaseRun.CORRUPT))
    examples["total_effect"] = total_effect(clean, corrupt, setup.study.direction)
    seed = setup.study.seed
    summary = stats.summarize(patches, effects, correct, examples, seed)
    clusters = examples["cluster"].to_numpy()
    (total,) = stats.estimates(examples[["total_effect"]].to_numpy(float), clusters, seed)
    by_layer = summary.sort_values("layer", kind="stable")
    at = stats.peak(by_layer["effect"].to_numpy(), total.mean)
    folder.write_summary(summary)
    return Outcome(examples, effects, summary, total, None if at is None else int(by_layer["layer"].iloc[at]))


def _matrices(folder: RunFolder, examples: pd.DataFrame, patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Effects float32 and correctness bool of all images, (images, patches), read a row group at a time."""
    effects = np.empty((len(examples), patches), dtype=np.float32)
    correct = np.empty((len(examples), patches), dtype=bool)
    labels, row = examples["label"].to_numpy(), 0
    with pq.ParquetFile(folder.effects) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["effect", "pred"])
            of_group = slice(row, row + table.num_rows // patches)
            effects[of_group] = table["effect"].to_numpy().reshape(-1, patches)
            correct[of_group] = table["pred"].to_numpy().reshape(-1, patches) == labels[of_group, None]
            row = of_group.stop
    assert row == len(examples), f"{row} images have effects, {len(examples)} have base runs"
    return effects, correct


def _metric_of(examples: pd.DataFrame, base_run: BaseRun, metric: Metric) -> np.ndarray:
    """A base run's metric by image; the clean run's KL from itself is 0."""
    if metric is Metric.KL and base_run is BaseRun.CLEAN:
        return np.zeros(len(examples))
    return examples[f"{metric}_{base_run}"].to_numpy(float)


def draw(folder: RunFolder, setup: Setup, outcome: Outcome, data: ImageDataModule) -> dict[str, list[Path]]:
    """Draws the run's figures into its folder; their files, by the names they have in the tracker."""
    title = setup.title + ("\nthe total effect's interval holds 0: this corruption does not move the model"
                           if outcome.total.holds_zero else "")  # fmt: skip
    clusters = int(outcome.examples["cluster"].nunique())
    caption = plots.Caption(title, setup.study.metric, len(outcome.examples), clusters)
    layers = [patch.layer for patch in setup.plan.patches]
    labels, names = outcome.examples["label"].to_numpy(), outcome.examples.set_index("label")["label_name"].to_dict()
    of_class = stats.by_class(outcome.effects, labels, outcome.examples["cluster"].to_numpy(), setup.study.seed)
    rows = [(names[label], images, estimates) for label, images, estimates in of_class]
    return {
        "layer_profile": [folder.save(plots.layer_profile(outcome.summary, outcome.total, caption), "layer_profile")],
        "heatmap": [folder.save(plots.class_heatmap(rows, layers, caption), "heatmap")],
        "examples": [
            folder.save(page, f"examples_{name}") for name, page in _pages(setup, outcome, data, caption, layers)
        ],
    }


def _pages(
    setup: Setup, outcome: Outcome, data: ImageDataModule, caption: plots.Caption, layers: Sequence[int]
) -> list[tuple[str, Figure]]:
    """Two example pages: the images that the corruption moves most, and images drawn by lot."""
    total = outcome.examples["total_effect"].to_numpy()
    number = min(IMAGES_A_PAGE, len(total))
    most = np.argsort(-np.sign(outcome.total.mean or 1) * total, kind="stable")[:number]
    lot = np.sort(np.random.default_rng(setup.study.seed).choice(len(total), number, replace=False))
    chosen = {
        "largest": (most, f"the {number} images with the largest total effect"),
        "random": (lot, f"{number} images drawn by lot"),
    }
    return [
        (name, plots.example_page(_traces(setup, outcome, data, rows), layers, words, caption))
        for name, (rows, words) in chosen.items()
    ]


def _traces(setup: Setup, outcome: Outcome, data: ImageDataModule, rows: np.ndarray) -> list[plots.Trace]:
    """The images at ``rows`` of the outcome, drawn again: decoding and corruption are functions of the image's id."""
    examples = outcome.examples.iloc[rows]
    batch = data.batch_of(examples["example_id"].tolist())
    pictures = {BaseRun.CLEAN: batch.images, BaseRun.CORRUPT: corrupted(setup.corruption, batch, setup.study.seed)}
    as_bytes = {
        run: (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy() for run, images in pictures.items()
    }
    names = setup.images.label_names or setup.model.label_names
    recipient = setup.plan.direction.recipient
    traces = []
    for i, (row, example) in enumerate(zip(rows, examples.to_dict("records"), strict=True)):
        frame = examples.iloc[[i]]
        base = {run: float(_metric_of(frame, run, setup.study.metric)[0]) for run in BaseRun}
        predicted = {run: example[f"pred_{run}"] for run in BaseRun}
        traces.append(
            plots.Trace(
                name=f"{setup.images.name(example['example_id'])} – {example['label_name']}",
                pictures={run: as_bytes[run][i] for run in BaseRun},
                predictions={run: names[p] if names else str(p) for run, p in predicted.items()},
                base=base,
                patched=base[recipient] + outcome.effects[row],
            )
        )
    return traces


def described(outcome: Outcome) -> dict[str, Any]:
    """The outcome in the manifest's words; what is not known is null, with the reason."""
    total = outcome.total
    numbers = {"mean": total.mean, "se": total.se, "low": total.low, "high": total.high}
    known = {name: None if np.isnan(value) else value for name, value in numbers.items()}
    result = {"total_effect": known, "peak_layer": outcome.peak, "peak_effect": _peak_row(outcome).get("effect")}
    notes = []
    if total.holds_zero:
        notes.append("the total effect's interval holds 0: this corruption does not move the model")
    if outcome.summary["recovered"].isna().all():
        notes.append("recovered is empty: the mean total effect is within 3 standard errors of 0, or has none")
    if outcome.peak is None:
        notes.append("peak_layer is null: the mean total effect is 0 and has no direction")
    return result | {"notes": notes}


def _versions() -> dict[str, str]:
    own = {"vitpatch": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in PACKAGES}


def scalars(outcome: Outcome) -> dict[str, Any]:
    """The tracker's summary values."""
    examples = outcome.examples
    values = {"total_effect": outcome.total.mean, "peak_layer": outcome.peak}
    values["peak_effect"] = _peak_row(outcome).get("effect")
    for base_run in BaseRun:
        values[f"prob_{base_run}"] = float(examples[f"prob_{base_run}"].mean())
        values[f"accuracy_{base_run}"] = float((examples[f"pred_{base_run}"] == examples["label"]).mean())
    return values


def _peak_row(outcome: Outcome) -> dict[str, Any]:
    if outcome.peak is None:
        return {}
    return outcome.summary[outcome.summary["layer"] == outcome.peak].iloc[0].to_dict()


def report(folder: RunFolder, setup: Setup, outcome: Outcome, sync_command: str | None) -> None:
    """The few lines that end a run."""
    total, peak = outcome.total, _peak_row(outcome)
    values = scalars(outcome)
    log.info("%s", folder.path)
    log.info("  run           %s", setup.title)
    log.info("  accuracy      clean %.3f, corrupt %.3f", values["accuracy_clean"], values["accuracy_corrupt"])
    log.info(
        "  total effect  %s on %s, n = %d images", _with_interval(total), setup.study.metric, len(outcome.examples)
    )
    if total.holds_zero:
        log.warning("  the total effect's interval holds 0: this corruption does not move the model")
    if peak:
        estimate = Estimate(peak["effect"], peak["effect_se"], peak["effect_low"], peak["effect_high"])
        share = "" if np.isnan(peak["recovered"]) else f", {peak['recovered']:.0%} of the total effect"
        log.info("  peak layer    %d: %s%s", outcome.peak, _with_interval(estimate), share)
    else:
        log.info("  peak layer    none: the mean total effect is 0")
    log.info("  pictures      %s", ", ".join(sorted(p.name for p in folder.figures.iterdir())) + " in figures/")
    if sync_command:
        log.info("  W&B offline   %s", sync_command)


def _with_interval(estimate: Estimate) -> str:
    if np.isnan(estimate.low):
        return f"{estimate.mean:+.3f} (one cluster: no interval)"
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def corruption_label(cfg: DictConfig) -> str:
    """The corruption in words: its class and its strengths."""
    keys = ", ".join(f"{key}={value}" for key, value in cfg.items() if key != "_target_")
    name = str(cfg._target_).rpartition(".")[2].lower()
    return f"{name} ({keys})" if keys else name


def _short(path: str) -> str:
    return Path(str(path)).stem if str(path).endswith(".parquet") else Path(str(path)).name
