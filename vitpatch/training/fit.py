"""One training, from the composed config to a saved model and its evaluation table."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

import lightning
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from vitpatch.checks import Interval, check_values, is_list
from vitpatch.corruptions import Corruption
from vitpatch.corruptions.base import as_corruption, missing_masks
from vitpatch.data.datamodule import BadImage, DecodedImages, PartnerPositions, collate
from vitpatch.data.images import LabelledImages
from vitpatch.data.sources import ImageSource
from vitpatch.errors import VitPatchError
from vitpatch.formatting import first_few, one_line, option_identity, override_key
from vitpatch.io import atomic_write, write_csv, write_json
from vitpatch.models.checkpoint import Checkpoint, new_classifier, pretrained_classifier
from vitpatch.models.classes import Classes, classes_of_training, label_by_classes
from vitpatch.models.preprocessing import Preprocessing, pair
from vitpatch.models.vit import PatchableViT
from vitpatch.runs.config import (
    TRAIN_GROUPS,
    TrainKeys,
    check_keys,
    check_names_are_text,
    check_option,
    construct,
    construct_option,
    corruption_option,
    with_defaults,
)
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.results import run_command
from vitpatch.runs.setup import find_partners
from vitpatch.runs.trainer import QUIETLY, build_trainer, trainer_factory
from vitpatch.training.module import Augment, ClassifierTraining, Recipe

log = logging.getLogger(__name__)

Size = Annotated[int, Interval(ge=1, le=100_000)]


def run(cfg: DictConfig, folder: Path, options: Mapping[str, str] | None = None) -> None:
    """Trains what ``cfg`` describes, saves it in ``folder/model`` (or ``save_to``) and evaluates it.

    Started again on the same folder it goes on from its last checkpoint.
    """
    check_names_are_text(cfg)
    checked = check_config(cfg)
    source, cfg = checked.source, checked.cfg
    typed = {group: _typed(folder, group) for group in ("model", "data")}
    if checked.checkpoint is None and typed["model"]:
        reason = "no model is fine-tuned, since architecture is trained from scratch; give architecture=none"
        raise VitPatchError(f"{typed['model'][0]}: {reason}")
    train, test = replace(source, split=cfg.train_split, limit=cfg.train_limit).open(), source.open()
    for corruption in checked.corruptions.values():
        if corruption.needs_masks and test.columns.mask is None:
            raise missing_masks(corruption)
    checkpoint = checked.checkpoint
    own = None if checkpoint is None else Classes.of(checkpoint.config())
    classes, why_new_head = classes_of_training(train, source.label_map, own, test)
    settings = _settings(cfg) | {"classes": list(classes.names)}
    _check_same_training(folder, settings)
    for earlier in ("manifest.json", "failed.json"):
        (folder / earlier).unlink(missing_ok=True)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    train, test = (
        label_by_classes(images, classes, source.label_map, others) for images, others in ((train, test), (test, train))
    )
    if checkpoint is None:
        model, preprocessing = new_classifier(checked.architecture, classes.names)
    else:
        model, preprocessing, is_kept = pretrained_classifier(checkpoint, classes.names, why_new_head is None)
        if is_kept:
            log.info("the checkpoint's head is kept, its classes are %s", first_few(classes.names))
        else:
            reason = why_new_head or "has none of this size"
            log.info("the head is a new one, for %s: the checkpoint %s", first_few(classes.names), reason)
    _partners(checked.corruptions, test, preprocessing, cfg.seed)  # what is missing is reported before the training
    trained, device = fit(model, preprocessing, train, folder, checked)
    target = Path(cfg.save_to) if cfg.save_to else folder / "model"
    trained.save_pretrained(target)
    preprocessing.processor.save_pretrained(target)
    saved, batch_size = Checkpoint(str(target)).load().to(device), checked.recipe.batch_size
    table = evaluate(saved, test, checked.corruptions, cfg.seed, batch_size)
    text = f"{table['n'].max()} images of {Path(cfg.data.path).name}, split {cfg.data.split}. {as_markdown(table)}\n"
    for path in (folder, target):
        write_csv(path / "evaluation.csv", table)
        with atomic_write(path / "evaluation.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    log.info("%s", text)
    write_json(folder / "manifest.json", {"job": "train", "settings": settings, "saved": str(target)})
    log.info("saved: %s", run_command(typed["data"], {"model": "hf", "model.path": str(target)}))


def _typed(folder: Path, group: str) -> list[str]:
    """What was typed of an option and its keys."""
    arguments = RunFolder(folder).typed_arguments() or ()
    return [argument for argument in arguments if override_key(argument).partition(".")[0] == group]


@dataclass(frozen=True)
class CheckedConfig:
    """A config as objects, nothing loaded yet; it has either a new ``architecture`` or a ``checkpoint``."""

    cfg: DictConfig
    recipe: Recipe
    augment: Augment
    source: ImageSource
    architecture: Any
    checkpoint: Checkpoint | None
    corruptions: Mapping[str, Corruption]
    make_trainer: Any


def check_config(cfg: DictConfig) -> CheckedConfig:
    """A composed config as objects. Raises ``VitPatchError`` for what is wrong with it, whatever the data are."""
    check_keys(cfg, TrainKeys, TRAIN_GROUPS)
    recipe, augment = construct_option(cfg, "recipe", Recipe), construct_option(cfg, "augment", Augment)
    source = construct_option(cfg, "data", ImageSource)
    is_new = cfg.get("architecture") not in (None, {})  # the option none is empty
    architecture = _architecture(cfg) if is_new else None
    checkpoint = None if is_new else construct_option(cfg, "model", Checkpoint)
    corruptions = read_corruptions(cfg.corruptions)
    make_trainer = trainer_factory(cfg)
    build_trainer(make_trainer, **QUIETLY)
    cfg = with_defaults(cfg, ("data", "recipe"))
    return CheckedConfig(cfg, recipe, augment, source, architecture, checkpoint, corruptions, make_trainer)


class ArchitectureKeys(TypedDict, total=False):
    """Sizes that all families have; other keys are checked by the class of ``transformers``."""

    image_size: Size | tuple[Size, Size]
    patch_size: Size | tuple[Size, Size]
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    initializer_range: Annotated[float, Interval(ge=0, le=100)]
    layer_scale_init_value: Annotated[float, Interval(ge=0, le=100)]
    drop_path_rate: Annotated[float, Interval(ge=0, lt=1)]
    use_mean_pooling: bool
    use_absolute_position_embeddings: bool


def check_architecture(sizes: Mapping[str, Any]) -> None:
    """Raises ``VitPatchError`` for a size that no model can have."""
    check_values("architecture.", sizes, get_type_hints(ArchitectureKeys, include_extras=True))


def _architecture(cfg: DictConfig) -> Any:
    """The config of a new model. Raises ``VitPatchError`` where such a model cannot be built and run.

    That is tried on torch's device ``meta``, which takes no memory.
    """
    from transformers import AutoModelForImageClassification, PreTrainedConfig

    check_option(cfg, "architecture", PreTrainedConfig)
    check_architecture(cfg.architecture)
    try:
        config = construct(cfg.architecture)
        for key in cfg.architecture:
            if not key.startswith("_") and not hasattr(type(config)(), key):
                raise VitPatchError(f"{key}: {type(config).__name__} has no such key")
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
            model(pixel_values=torch.zeros(1, 3, *pair(config.image_size)))
    except Exception as error:  # of transformers and torch, of any class
        raise VitPatchError(f"architecture: {one_line(error)}") from error
    return config


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings that tell one training from another; its number of epochs and when it stops are none of them."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    own_keys = ("architecture", "model", "data", "train_split", "train_limit", "recipe", "augment", "seed")
    settings = {key: settings.get(key) for key in own_keys}
    data, recipe = settings["data"], settings["recipe"]
    settings["recipe"] = {key: value for key, value in recipe.items() if key not in ("epochs", "patience")}
    other_keys = ["split", "limit", "num_workers", "on_error"] + ["seed"] * (data.get("seed") == settings["seed"])
    settings["data"] = {key: value for key, value in data.items() if key not in other_keys}
    if settings["architecture"]:
        settings.pop("model")  # it is built, not loaded
    return settings


def _check_same_training(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ``VitPatchError`` where the folder's checkpoints are of a training with other settings."""
    file, last = (folder / "checkpoints" / name for name in ("settings.json", "last.ckpt"))
    if last.exists() and file.exists():
        earlier, now = option_identity(json.loads(file.read_text(encoding="utf-8"))), option_identity(settings)
        earlier.setdefault("classes", now["classes"])  # older ones do not have their classes
        if now != earlier:
            other = ", ".join(key for key in now if now[key] != earlier.get(key)) or "model"
            raise VitPatchError(
                f"{folder} holds a training with other settings ({other}); choose another hydra.run.dir"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def read_corruptions(names: Any) -> dict[str, Corruption]:
    """The corruptions of pixels that ``patch.py corruption=NAME`` takes, of one name, several, or none."""
    corruptions = {}
    for name in [] if names is None else list(names) if is_list(names) else [names]:
        corruptions[name] = as_corruption(construct(corruption_option(name, "corruptions")))
        if corruptions[name].is_inside_model:
            raise VitPatchError(f"corruptions: {name} leaves the pixels alone; only patch.py takes it")
    return corruptions


def _partners(
    corruptions: Mapping[str, Corruption], images: LabelledImages, preprocessing: Preprocessing, seed: int
) -> PartnerPositions:
    """Where the partners are that corruptions ask for. Raises ``VitPatchError`` where an image has none."""
    positions = {}
    for name, corruption in corruptions.items():
        if (kind := corruption.partner) is not None:
            positions[kind] = find_partners(kind, images, seed, preprocessing, needed_by=name)
    return positions


def fit(
    model: torch.nn.Module, preprocessing: Preprocessing, images: LabelledImages, folder: Path, checked: CheckedConfig
) -> tuple[torch.nn.Module, torch.device]:
    """Trains a model; returns it, and the device that it was trained on.

    Its weights are those of the best epoch where images are held back, else of the last.
    """
    recipe = checked.recipe
    training, validation = _loaders(images, preprocessing, recipe)
    model.train()  # from_pretrained leaves dropout off
    model.set_attn_implementation(recipe.attention)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    module = ClassifierTraining(model, mean, std, recipe, checked.augment)
    at, monitored = folder / "checkpoints", {"monitor": "balanced_accuracy", "mode": "max"}
    last = ModelCheckpoint(at, filename="last", enable_version_counter=False)
    kept = last
    callbacks = [TQDMProgressBar(refresh_rate=5)]
    if validation is not None:
        kept = ModelCheckpoint(at, filename="best", enable_version_counter=False, **monitored)
        callbacks.append(kept)
        if recipe.patience is not None:
            callbacks.append(EarlyStopping(patience=recipe.patience, **monitored))
    if recipe.average:
        callbacks.append(EMAWeightAveraging(decay=recipe.average, use_buffers=False))
    callbacks.append(last)  # after the best, whose state it stores
    trainer = build_trainer(
        checked.make_trainer,
        max_epochs=recipe.epochs, callbacks=callbacks, logger=False, gradient_clip_val=1.0,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    if trainer.world_size > 1:
        raise VitPatchError(f"trainer: {trainer.world_size} processes; training uses one device: trainer.devices=1")
    earlier = at / "last.ckpt"
    trainer.fit(module, training, validation, ckpt_path=earlier if earlier.exists() else None, weights_only=True)
    weights = torch.load(kept.best_model_path, weights_only=True, map_location="cpu")["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    return model.eval(), trainer.strategy.root_device


def _loaders(
    images: LabelledImages, preprocessing: Preprocessing, recipe: Recipe
) -> tuple[DataLoader, DataLoader | None]:
    """Batches to train on, in random order, and batches held back, if any: bytes (batch, 3, height, width), labels.

    All images are decoded once; one that cannot be read stops the training or is left out, as ``on_error`` says. Where
    the recipe is balanced, each class is drawn equally often.
    """
    rows, validation_rows = _split(images, recipe.validation)
    decoded = DecodedImages(images, preprocessing.to_input, masks=False)
    pixels, is_readable = [], np.ones(len(decoded), dtype=bool)
    for row, image in enumerate(map(decoded.__getitem__, range(len(decoded)))):
        if isinstance(image, BadImage):
            _leave_out(images, image)
            is_readable[row] = False
        else:
            pixels.append((image.images[0] * 255).round().byte())
    rows, validation_rows = rows[is_readable[rows]], validation_rows[is_readable[validation_rows]]
    if not len(rows):
        raise VitPatchError("training images: none of them can be read")
    dataset = TensorDataset(torch.stack(pixels), torch.tensor(images.labels[is_readable]))
    labels, position = images.labels[rows], np.cumsum(is_readable) - 1
    weights = 1 / np.bincount(labels)[labels] if recipe.balanced else np.ones(len(rows))
    training = DataLoader(
        Subset(dataset, position[rows].tolist()),
        batch_size=recipe.batch_size,
        sampler=WeightedRandomSampler(torch.from_numpy(weights), len(rows), replacement=recipe.balanced),
        drop_last=len(rows) > recipe.batch_size,
    )
    held_back = Subset(dataset, position[validation_rows].tolist())
    return training, DataLoader(held_back, batch_size=recipe.batch_size) if len(held_back) else None


def _leave_out(images: LabelledImages, bad: BadImage) -> None:
    """Says that an image is left out; raises ``VitPatchError`` where none is to be."""
    if images.on_error == "raise":
        raise VitPatchError(bad.reason)
    log.warning("left out: %s", bad.reason.removesuffix("; data.on_error=skip leaves it out"))


def _split(images: LabelledImages, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held back, in whole clusters; the same in every training on the same data."""
    is_held_back = np.random.default_rng(0).random(int(images.clusters.max()) + 1) < share
    return np.flatnonzero(~is_held_back[images.clusters]), np.flatnonzero(is_held_back[images.clusters])


@torch.no_grad()
def evaluate(
    model: PatchableViT, images: LabelledImages, corruptions: Mapping[str, Corruption], seed: int, batch_size: int
) -> pd.DataFrame:
    """Accuracy and mean true-class probability, clean and under each corruption, for each class and over all.

    Columns: run, class, n, accuracy, prob (mean softmax probability of the true class), predicted (the share of all
    images whose prediction is this class). Class ``balanced`` is the mean over classes, ``all`` the mean over images.
    """
    partners = _partners(corruptions, images, model.preprocessing, seed)
    decoded = DecodedImages(images, model.preprocessing.to_input, partners=partners, needed=tuple(partners))
    loader = DataLoader(decoded, batch_size=batch_size, collate_fn=collate)
    run_probs: dict[str, list[Tensor]] = {run: [] for run in ("clean", *corruptions)}
    labels = []
    for batch, bad in loader:
        for image in bad:
            _leave_out(images, image)
        if batch is None:
            continue
        labels.append(batch.labels)
        batch = batch.to(model.device)
        for run, probs in run_probs.items():
            pixels = batch.images if run == "clean" else corruptions[run].pixels(batch, seed)
            probs.append(model(model.normalize(pixels)).cpu().double().softmax(-1))
    if not labels:
        raise VitPatchError("images to evaluate: none of them can be read")
    truth = torch.cat(labels)
    names = model.label_names or images.label_names or tuple(map(str, range(model.classes)))
    tables = [_table(run, torch.cat(probs), truth, names) for run, probs in run_probs.items()]
    return pd.concat(tables, ignore_index=True)


def _table(run: str, probs: Tensor, truth: Tensor, names: Sequence[str]) -> pd.DataFrame:
    """The rows of one run: ``probs`` (images, classes), ``truth`` (images,)."""
    predicted = probs.argmax(-1)
    shares = np.bincount(predicted.numpy(), minlength=len(names)) / len(predicted)
    images = pd.DataFrame(
        {"label": truth, "accuracy": (predicted == truth).double(), "prob": probs[range(len(truth)), truth]}
    )
    by_class = images.groupby("label").agg(n=("label", "size"), accuracy=("accuracy", "mean"), prob=("prob", "mean"))
    by_class["predicted"] = shares[by_class.index]
    by_class.insert(0, "class", [names[label] for label in by_class.index])
    total = {"n": len(images), "predicted": shares.max()}  # the largest share: is one class predicted for all?
    totals = [
        {"class": name, **rows[["accuracy", "prob"]].mean().to_dict(), **total}
        for name, rows in (("balanced", by_class), ("all", images))
    ]
    table = pd.concat([by_class, pd.DataFrame(totals)], ignore_index=True)
    table.insert(0, "run", run)
    return table


def as_markdown(table: pd.DataFrame) -> str:
    """The evaluation as a table: a row a class, of each run accuracy / mean probability / share of predictions."""
    runs = table["run"].unique()
    lines = [
        "Each cell: accuracy / mean probability of the true class / share of predictions (last two rows: the largest).",
        "",
        f"| class | n | {' | '.join(runs)} |",
        f"|---|---:|{'---:|' * len(runs)}",
    ]
    for (name, n), rows in table.groupby(["class", "n"], sort=False):
        cells = [f"{row.accuracy:.3f} / {row.prob:.3f} / {row.predicted:.3f}" for row in rows.itertuples()]
        lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)
