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
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

from vitpatch.checks import Interval, check_values, is_list
from vitpatch.corruptions import Corruption
from vitpatch.corruptions.base import as_corruption, no_masks
from vitpatch.data.images import BadImage, Decoded, Item, LabelledImages, Positions, collate
from vitpatch.data.sources import ImageSource
from vitpatch.errors import VitPatchError
from vitpatch.io import write_json, written_beside
from vitpatch.models.checkpoint import Checkpoint, new_classifier, pretrained_classifier
from vitpatch.models.classes import Classes, as_classes, classes_of_training
from vitpatch.models.preprocessing import Preprocessing, pair
from vitpatch.models.vit import PatchableViT
from vitpatch.runs.config import (
    TRAIN_GROUPS,
    TrainKeys,
    check_keys,
    check_option,
    construct,
    construct_option,
    corruption_option,
    typed,
    with_defaults,
)
from vitpatch.runs.devices import devices_of
from vitpatch.runs.name_overrides import check_names
from vitpatch.runs.setup import check_all_have_partners, find_partners
from vitpatch.runs.trainer import make_trainer_of, quiet, trainer_of
from vitpatch.training.module import Augment, ClassifierTraining, Recipe
from vitpatch.types import ImageBatch

log = logging.getLogger(__name__)

Size = Annotated[int, Interval(ge=1, le=100_000)]


def run(cfg: DictConfig, folder: Path, options: Mapping[str, str] | None = None) -> None:
    """Trains what ``cfg`` describes, saves it in ``folder/model`` (or ``save_to``) and evaluates it.

    Started again on the same folder it goes on from its last checkpoint.
    """
    check_names(cfg)
    checked = check_config(cfg)
    recipe, augment, source, cfg = checked.recipe, checked.augment, checked.source, checked.cfg
    settings = _settings(cfg)
    train, test = replace(source, split=cfg.train_split, limit=cfg.train_limit).open(), source.open()
    _check_masks(checked.corruptions, test)
    checkpoint = checked.checkpoint
    own = None if checkpoint is None else Classes.of(checkpoint.config())
    classes, why = classes_of_training(train, source.label_map, own, test)
    settings["classes"] = list(classes.names)
    _check_same_training(folder, settings)
    for earlier in ("manifest.json", "failed.json"):
        (folder / earlier).unlink(missing_ok=True)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    train, test = (
        as_classes(images, classes, source.label_map, beside) for images, beside in ((train, test), (test, train))
    )
    if checkpoint is None:
        model, preprocessing = new_classifier(checked.architecture, classes.names)
    else:
        model, preprocessing, kept = pretrained_classifier(checkpoint, classes.names, keeps_head=why is None)
        log.info("%s", _about_head(kept, classes.names, why))
    _partners(checked.corruptions, test, preprocessing, cfg.seed)  # what is missing is said before the training
    trained, device = fit(model, preprocessing, train, folder, checked.make_trainer, recipe, augment)
    target = Path(cfg.save_to) if cfg.save_to else folder / "model"
    trained.save_pretrained(target)
    preprocessing.processor.save_pretrained(target)
    table = evaluate(Checkpoint(str(target)).load().to(device), test, checked.corruptions, cfg.seed, recipe.batch_size)
    text = f"{len(test)} images of {Path(cfg.data.path).name}, split {cfg.data.split}. {as_markdown(table)}\n"
    for path in (folder, target):
        with written_beside(path / "evaluation.csv") as beside:
            table.to_csv(beside, index=False)
        with written_beside(path / "evaluation.md") as beside:
            beside.write_text(text, encoding="utf-8")
    log.info("%s", text)
    write_json(folder / "manifest.json", {"job": "train", "settings": settings, "saved": str(target)})
    log.info("saved: python patch.py model=hf %s", typed("model.path", str(target)))


@dataclass(frozen=True)
class Checked:
    """What a config says; either ``architecture`` or ``checkpoint`` is given. Nothing of it is loaded."""

    cfg: DictConfig
    recipe: Recipe
    augment: Augment
    source: ImageSource
    architecture: Any
    checkpoint: Checkpoint | None
    corruptions: Mapping[str, Corruption]
    make_trainer: Any


def check_config(cfg: DictConfig) -> Checked:
    """Raises ``VitPatchError`` for what is wrong with a composed config whatever the data are."""
    check_keys(cfg, TrainKeys, TRAIN_GROUPS)
    recipe, augment = construct_option(cfg, "recipe", Recipe), construct_option(cfg, "augment", Augment)
    source = construct_option(cfg, "data", ImageSource)
    is_new = cfg.get("architecture") not in (None, {})  # the option none is empty
    architecture = _architecture(cfg) if is_new else None
    checkpoint = None if is_new else construct_option(cfg, "model", Checkpoint)
    corruptions = read_corruptions(cfg.corruptions)
    make_trainer = make_trainer_of(cfg)
    devices_of(make_trainer)
    cfg = with_defaults(cfg, ("data", "recipe"))
    return Checked(cfg, recipe, augment, source, architecture, checkpoint, corruptions, make_trainer)


class ArchitectureKeys(TypedDict, total=False):
    """Sizes that all families have; other keys are for the class of ``transformers`` to check."""

    image_size: Size | tuple[Size, Size]
    patch_size: Size | tuple[Size, Size]
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    initializer_range: Annotated[float, Interval(ge=0, le=100)]


def check_architecture(sizes: Mapping[str, Any]) -> None:
    """Raises ``VitPatchError`` for a size that no model can have."""
    check_values("architecture.", sizes, get_type_hints(ArchitectureKeys, include_extras=True))


def _architecture(cfg: DictConfig) -> Any:
    """The config of a new model, of which it is tried here, without memory, that a model can be built and run."""
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
        raise VitPatchError(f"architecture: {' '.join(str(error).split())[:300]}") from error
    return config


def _about_head(kept: bool, names: Sequence[str], why: str | None) -> str:
    """Whether a checkpoint's head is kept."""
    some = ", ".join(names[:5]) + ", …" * (len(names) > 5)
    if kept:
        return f"the checkpoint's head is kept, its classes are {some}"
    return f"the head is a new one, for {some}: the checkpoint {why or 'has none of this size'}"


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """What makes a training another one; how many epochs it has and when it stops do not."""
    kept = ("architecture", "model", "data", "train_split", "train_limit", "recipe", "augment", "seed")
    settings = {key: OmegaConf.to_container(cfg, resolve=True).get(key) for key in kept}
    settings["recipe"] = {k: v for k, v in settings["recipe"].items() if k not in ("epochs", "patience")}
    unsaid = ["split", "limit", "num_workers"] + ["seed"] * (settings["data"].get("seed") == settings["seed"])
    settings["data"] = {k: v for k, v in settings["data"].items() if k not in unsaid}
    if settings["architecture"]:
        settings.pop("model")  # it is built, not loaded
    return settings


def _check_same_training(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ``VitPatchError`` where the folder's checkpoints are of a training with other settings."""
    file, last = (folder / "checkpoints" / name for name in ("settings.json", "last.ckpt"))
    earlier = json.loads(file.read_text(encoding="utf-8")) if last.exists() and file.exists() else settings
    if settings != (earlier := {"classes": settings["classes"]} | earlier):  # older ones do not say their classes
        other = ", ".join(key for key in settings if settings[key] != earlier.get(key)) or "model"
        raise VitPatchError(f"{folder} holds a training with other settings ({other}); choose another hydra.run.dir")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def read_corruptions(names: Any) -> dict[str, Corruption]:
    """What ``corruptions`` asks for: one name, several, or none."""
    listed = [] if names is None else list(names) if is_list(names) else [names]
    return {name: _of_pixels(name) for name in listed}


def _of_pixels(name: str) -> Corruption:
    """The corruption of pixels that ``patch.py corruption=NAME`` takes."""
    corruption = as_corruption(construct(corruption_option(name, "corruptions")))
    if corruption.is_inside_model:
        raise VitPatchError(f"corruptions: {name} leaves the pixels alone; only patch.py takes it")
    return corruption


def _check_masks(corruptions: Mapping[str, Corruption], images: LabelledImages) -> None:
    for corruption in corruptions.values():
        if corruption.needs_masks and images.columns.mask is None:
            raise no_masks(corruption)


def _partners(
    corruptions: Mapping[str, Corruption], images: LabelledImages, preprocessing: Preprocessing, seed: int
) -> Positions:
    """Where the partners are that corruptions ask for."""
    found = {}
    for name, corruption in corruptions.items():
        if (kind := corruption.partner) is not None:
            found[kind] = find_partners(kind, images, seed, preprocessing)
            check_all_have_partners(name, kind, found[kind], images)
    return found


class TrainingImages(torch.utils.data.Dataset):
    """All images of a split as bytes in memory, decoded once; an unreadable one stops the training."""

    def __init__(self, images: LabelledImages, preprocessing: Preprocessing) -> None:
        decoded = Decoded(images, preprocessing.to_input, masks=False)
        self._pixels, self._labels = [], images.labels
        for row in range(len(decoded)):
            item = decoded[row]
            if isinstance(item, BadImage):
                raise VitPatchError(item.reason)
            self._pixels.append((item.image * 255).round().byte())

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, row: int) -> Item:
        """The image at a row, without a mask."""
        return Item(self._pixels[row].float() / 255, None, row, int(self._labels[row]))


def fit(
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    images: LabelledImages,
    folder: Path,
    make_trainer: Any,
    recipe: Recipe,
    augment: Augment,
) -> tuple[torch.nn.Module, torch.device]:
    """The trained model and where it was trained; of the best epoch where images are held back, else of the last."""
    kept, held = _split(images, recipe.validation)
    data = TrainingImages(images, preprocessing)
    loaders = [
        _training_loader(data, images.labels, kept, recipe),
        _loader(Subset(data, held.tolist()), recipe) if len(held) else None,
    ]
    model.train()  # from_pretrained leaves dropout off
    model.set_attn_implementation(recipe.attention)
    shape = (1, 3, 1, 1)
    module = ClassifierTraining(
        model,
        torch.tensor(preprocessing.mean).view(shape),
        torch.tensor(preprocessing.std).view(shape),
        recipe,
        augment,
    )
    best = {"monitor": "balanced_accuracy", "mode": "max"} if len(held) else {}
    keeper = ModelCheckpoint(
        folder / "checkpoints", filename="best", save_last=True, enable_version_counter=False, **best
    )
    callbacks = [keeper, TQDMProgressBar(refresh_rate=5)]
    if recipe.average:
        callbacks.append(EMAWeightAveraging(decay=recipe.average, use_buffers=False))
    if recipe.patience is not None and best:
        callbacks.append(EarlyStopping(patience=recipe.patience, **best))
    quiet()
    trainer = trainer_of(
        make_trainer,
        max_epochs=recipe.epochs, callbacks=callbacks, logger=False, gradient_clip_val=1.0,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    if trainer.world_size > 1:
        raise VitPatchError(f"trainer: {trainer.world_size} processes; training uses one device: trainer.devices=1")
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, *loaders, ckpt_path=last if last.exists() else None, weights_only=True)
    weights = torch.load(keeper.best_model_path, weights_only=True, map_location="cpu")["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    return model.eval(), trainer.strategy.root_device


def _split(images: LabelledImages, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held back, whole clusters each; fixed by the data alone."""
    rng = np.random.default_rng(0)
    chosen = rng.random(int(images.clusters.max()) + 1) < share
    held = chosen[images.clusters]
    return np.flatnonzero(~held), np.flatnonzero(held)


def _only_images(items: Sequence[Item]) -> ImageBatch:
    batch, bad = collate(items)
    assert batch is not None and not bad, "training images are decoded before"
    return batch


def _loader(data: torch.utils.data.Dataset, recipe: Recipe, **options: Any) -> DataLoader:
    return DataLoader(data, batch_size=recipe.batch_size, collate_fn=_only_images, **options)


def _training_loader(data: TrainingImages, labels: np.ndarray, rows: np.ndarray, recipe: Recipe) -> DataLoader:
    """Batches in random order; balanced, a class is drawn as often as any other."""
    of_rows = labels[rows]
    weights = 1 / np.bincount(of_rows)[of_rows] if recipe.balanced else np.ones(len(of_rows))
    sampler = WeightedRandomSampler(torch.from_numpy(weights), len(rows), replacement=recipe.balanced)
    return _loader(Subset(data, rows.tolist()), recipe, sampler=sampler, drop_last=len(rows) > recipe.batch_size)


@torch.no_grad()
def evaluate(
    model: PatchableViT, images: LabelledImages, corruptions: Mapping[str, Corruption], seed: int, batch_size: int
) -> pd.DataFrame:
    """Accuracy and mean true-class probability, clean and under each corruption, for each class and over all.

    Columns: run, class, n, accuracy, prob (mean softmax probability of the true class), predicted (the share of all
    images that are called this class). Class ``balanced`` is the mean over classes, ``all`` the mean over images.
    """
    partners = _partners(corruptions, images, model.preprocessing, seed)
    decoded = Decoded(images, model.preprocessing.to_input, partners=partners, needed=tuple(partners))
    loader = DataLoader(decoded, batch_size=batch_size, collate_fn=collate)
    predictions: dict[str, list[Tensor]] = {run: [] for run in ("clean", *corruptions)}
    labels = []
    for batch, bad in loader:
        if bad:
            raise VitPatchError(bad[0].reason)
        labels.append(batch.labels)
        batch = batch.to(model.device)
        for run, found in predictions.items():
            pixels = batch.images if run == "clean" else corruptions[run].pixels(batch, seed)
            found.append(model(model.normalize(pixels)).cpu().double().softmax(-1))
    truth = torch.cat(labels)
    names = model.label_names or images.label_names or tuple(map(str, range(model.classes)))
    return pd.concat(
        [_table(run, torch.cat(found), truth, names) for run, found in predictions.items()], ignore_index=True
    )


def _table(run: str, probs: Tensor, truth: Tensor, names: Sequence[str]) -> pd.DataFrame:
    called = probs.argmax(-1)
    frame = pd.DataFrame(
        {"label": truth, "accuracy": (called == truth).double(), "prob": probs[range(len(truth)), truth]}
    )
    by_class = frame.groupby("label").agg(n=("label", "size"), accuracy=("accuracy", "mean"), prob=("prob", "mean"))
    shares = np.bincount(called.numpy(), minlength=len(names)) / len(called)
    by_class["predicted"] = shares[by_class.index]
    by_class.insert(0, "class", [names[label] for label in by_class.index])
    over = {"n": len(frame), "predicted": shares.max()}  # the largest share: is one class called for everything?
    rows = [
        {"class": "balanced", **by_class[["accuracy", "prob"]].mean().to_dict(), **over},
        {"class": "all", **frame[["accuracy", "prob"]].mean().to_dict(), **over},
    ]
    table = pd.concat([by_class, pd.DataFrame(rows)], ignore_index=True)
    table.insert(0, "run", run)
    return table


def as_markdown(table: pd.DataFrame) -> str:
    """The evaluation as a table: a row a class, of each run accuracy / mean probability / share of predictions."""
    runs = list(dict.fromkeys(table["run"]))
    lines = ["| class | n | " + " | ".join(runs) + " |", "|---|---:|" + "---:|" * len(runs)]
    for name, rows in table.groupby("class", sort=False):
        cells = [f"{r.accuracy:.3f} / {r.prob:.3f} / {r.predicted:.3f}" for r in rows.itertuples()]
        lines.append(f"| {name} | {rows['n'].iloc[0]} | " + " | ".join(cells) + " |")
    legend = (
        "Each cell: accuracy / mean probability of the true class / share of predictions (last two rows: the largest)."
    )
    return "\n".join([legend, "", *lines])
