"""The Lightning loop: batches of images → rows, streamed to the run's folder."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vitpatch.constants import means, zeros
from vitpatch.corruptions import corrupted
from vitpatch.cost import Cost, Room, cost_of, described, memory_limit
from vitpatch.data import PREDICTED, UNKNOWN, BadImage, Decoded, ImageDataModule, collate
from vitpatch.execute import Outputs, execute
from vitpatch.given import Constants
from vitpatch.inclusion import included as included_by
from vitpatch.model import PatchableViT
from vitpatch.rows import Columns, columns, joined
from vitpatch.setup import Setup
from vitpatch.spec import BaseRun, Donor, ImageBatch, VitPatchError, counted
from vitpatch.store import (
    EFFECTS_SCHEMA,
    EXAMPLES_SCHEMA,
    LEAVE_OUTS_SCHEMA,
    RunFolder,
    of_controls,
    of_partners,
    with_fields,
)
from vitpatch.tokens import token_masks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What a batch leaves: rows of each table by its name, and the images that could not be read."""

    tables: Mapping[str, pa.Table]
    bad: Sequence[BadImage]


class PatchingModule(lightning.LightningModule):
    """Corrupts a batch, runs the plan on it, some images at a time, and reads the metrics off.

    ``line`` says what the plan costs, once the first images have been timed; ``precision_error`` how far the effects of
    the first batch are from float32, of a run at reduced precision. With ``dry_run`` nothing but these first images is
    computed.
    """

    def __init__(self, setup: Setup, batch_size: int, dry_run: bool = False) -> None:
        super().__init__()
        self.model, self.corruption, self.plan, self.study = setup.model, setup.corruption, setup.plan, setup.study
        self.setup, self.batch_size, self.dry_run = setup, min(batch_size, len(setup.images)), dry_run
        self.cost = cost_of(self.plan, self.model, len(setup.partners))
        self.line: str | None = None
        self.precision_error: dict[str, float] | None = None
        self._room: Room | None = None
        self._constants: Constants | None = None

    def on_predict_start(self) -> None:
        """Finds how much fits the device, and the values of donors that are no run.

        Raises ``VitPatchError`` where one image does not fit.
        """
        self._room = self._room_for(self.cost)
        if self.study.donor is Donor.ZERO:
            self._constants = zeros(self.model, self.plan.target.site)
        elif self.study.donor is Donor.MEAN:
            log.info("mean of %s over %s", self.plan.target.site, counted(len(self.setup.training), "training image"))
            self._constants = means(self.model, self.plan.target.site, self._training_pixels())

    def _training_pixels(self) -> Iterator[Tensor]:
        decoded = Decoded(self.setup.training, self.model.preprocessing.to_input, masks=False)
        workers = self.setup.training.num_workers
        for images, bad in DataLoader(decoded, self.batch_size, num_workers=workers, collate_fn=collate):
            if bad and self.setup.training.on_error == "raise":
                raise VitPatchError(bad[0].reason)
            for part in _parts(images, self._room) if images is not None else ():
                yield self.model.normalize(part.images.to(self.device))

    def _room_for(self, cost: Cost) -> Room:
        limit = memory_limit(self.setup.cfg.memory_gb, self.device)
        return cost.room(self.batch_size, limit, self.plan.sizes.tokens, self.device)

    def predict_step(self, batch: tuple[ImageBatch | None, list[BadImage]], batch_idx: int = 0) -> Rows:
        """One batch of ``ImageDataModule`` → its rows. Raises ``VitPatchError`` where a logit is not finite."""
        images, bad = batch
        if images is None:
            return Rows({}, bad)
        parts = []
        for part in _parts(images, self._room):
            started = time.perf_counter()
            parts.append(self._columns(part, self.model, self._room))
            if self.line is None:
                self._say(len(part), time.perf_counter() - started)
            if self.dry_run:
                return Rows({}, bad)
        measured = joined(parts)
        if self.setup.is_reduced and self.precision_error is None:
            known = replace(images, labels=torch.from_numpy(measured.examples["label"]))
            self._compare_with_float32(known, measured.effects["effect"])
        return Rows(self._tables(measured), bad)

    def _columns(self, images: ImageBatch, model: PatchableViT, room: Room) -> Columns:
        pixels = {
            BaseRun.CLEAN: model.normalize(images.images),
            BaseRun.CORRUPT: model.normalize(corrupted(self.corruption, images, self.study.seed)),
        }
        others = {d: images.partners[d.partner] for d in self.plan.base_runs if isinstance(d, Donor)}
        pixels |= {donor: model.normalize(other.images) for donor, other in others.items()}
        plan, images = self.plan, images.to("cpu")
        blocks, ids = plan.target.grid, images.ids.tolist()
        masks = token_masks(plan.token_groups, plan.sizes, blocks, model.covered(images.masks), ids, self.study.seed)
        outputs = execute(plan, model, pixels, masks, room, self._constants).cpu()
        self._check_finite(outputs, pixels, images)
        predicted = outputs.base[BaseRun.CLEAN].argmax(1)
        labels = images.labels.where(images.labels != UNKNOWN, predicted)
        ids_of = {donor: other.ids.cpu() for donor, other in others.items()}
        return columns(outputs, plan, labels, images.ids, masks, self.study.metric, self.study.rival, ids_of)

    def _say(self, images: int, seconds: float) -> None:
        time_left = seconds / images * len(self.setup.images)
        first = f"first {images} images in {seconds:.2g} s" if images > 1 else f"first image in {seconds:.2g} s"
        about = f"about {_duration(time_left)} for {counted(len(self.setup.images), 'image')} ({first})"
        self.line = f"{described(self.plan, self.cost, self._room)}, {about}"
        log.info("plan: %s", self.line)
        if (caveat := self.model.caveat(self.plan.target.site)) is not None:
            log.warning("%s", caveat)

    def _compare_with_float32(self, images: ImageBatch, effects: np.ndarray) -> None:
        """Runs the batch again in float32, and keeps how far the effects differ."""
        model = self.setup.float32_model().to(self.device)
        room = self._room_for(cost_of(self.plan, model))
        with torch.autocast(self.device.type, enabled=False), matmul_precision("highest"):
            exact = joined([self._columns(part, model, room) for part in _parts(images, room)]).effects["effect"]
        if model is not self.model:  # whose place on the device is needed
            model.to("cpu")
        error = np.abs(effects - exact)
        self.precision_error = {
            "largest": float(error.max()),
            "mean": float(error.mean()),
            "largest_effect": float(np.abs(exact).max()),
            "images": len(images),
        }
        log.info(
            "precision: effects of the first %d images differ from float32 by %.2g at most, %.2g on average "
            "(largest effect %.2g)",
            len(images), error.max(), error.mean(), self.precision_error["largest_effect"],
        )  # fmt: skip

    def _tables(self, measured: Columns) -> dict[str, pa.Table]:
        ids, names, known = measured.examples["example_id"], self.setup.label_names, self.setup.images.has_labels
        included = included_by(self.study.include, measured.examples, self.study.metric)
        if self.study.donor.partner is not None:
            included &= measured.examples[f"partner_{self.study.donor}"] >= 0
        examples = measured.examples | {
            "label_name": [
                (names[i] if names else str(i)) + ("" if known else PREDICTED)
                for i in measured.examples["label"].tolist()
            ],
            "included": included,
            "cluster": self.setup.images.clusters[self.setup.images.positions(ids)],
        }
        donors = self.plan.donors
        tables = {
            "examples": _table(examples, with_fields(EXAMPLES_SCHEMA, of_partners(donors, bool(self.plan.together)))),
            "effects": _table(measured.effects, with_fields(EFFECTS_SCHEMA, of_controls(donors))),
        }
        if self.plan.leave_outs:
            tables["leave_outs"] = _table(measured.leave_outs, LEAVE_OUTS_SCHEMA)
        return tables

    def _check_finite(self, outputs: Outputs, pixels: dict[BaseRun, Tensor], images: ImageBatch) -> None:
        for run in self.plan.base_runs:
            for row in _rows_not_finite(outputs.base[run]):
                layer = self.model.first_bad_layer(pixels[run][row : row + 1])
                where = "in the classifier" if layer is None else f"from layer {layer} on"
                raise VitPatchError(
                    f"image {images.ids[row]}: the {run} run is not finite {where}; check the weights and dtype"
                )
        for (patch, _), patched in zip(self.plan.runs, outputs.patched, strict=True):
            for row in _rows_not_finite(patched):
                what = f"{patch.site} of layers {patch.layers[0]} to {patch.layers[-1]}"
                raise VitPatchError(f"image {images.ids[row]}: with {what} patched the logits are not finite")


def _parts(images: ImageBatch, room: Room) -> Iterator[ImageBatch]:
    """As many images at a time as there is room for."""
    for first in range(0, len(images), room.images):
        yield images.part(slice(first, first + room.images))


def _duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _rows_not_finite(logits: Tensor) -> list[int]:
    return (~logits.isfinite().all(-1)).nonzero().flatten().tolist()


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(columns[f.name]).cast(f.type, safe=False) for f in schema], schema=schema)


class ShardWriter(BasePredictionWriter):
    """Streams the rows of each batch to the run's folder; an unreadable image is counted, or stops the run."""

    def __init__(self, folder: RunFolder, on_error: str) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.on_error = folder, on_error
        self.skipped: list[BadImage] = []

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: Rows,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes one shard. Raises ``VitPatchError`` for an unreadable image unless they are skipped."""
        if prediction.bad and self.on_error == "raise":
            raise VitPatchError(prediction.bad[0].reason)
        for bad in prediction.bad:
            log.warning("skipped: %s", bad.reason.partition(";")[0])
        self.skipped += prediction.bad
        if prediction.tables:
            self.folder.write_shard(batch_idx, prediction.tables)


class ImageProgress(ProgressBar):
    """A bar that counts images, and so shows images per second and the time left; from the first batch on."""

    def __init__(self, images: int, name: str) -> None:
        super().__init__()
        self._total, self._name = images, name

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Notes the time."""
        self._started = time.time()

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: tuple,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves on by the images of the batch, unreadable ones too; where nobody watches, every 10 s only."""
        if not hasattr(self, "_bar"):
            often = 0.2 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(total=self._total, desc=self._name, unit=" images", mininterval=often, dynamic_ncols=True)
            self._bar.start_t = self._started
        images, bad = batch
        self._bar.update((0 if images is None else len(images)) + len(bad))

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Closes the bar."""
        if hasattr(self, "_bar"):
            self._bar.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar, so that the error stands on a line of its own."""
        if hasattr(self, "_bar"):
            self._bar.close()

    def disable(self) -> None:
        """Lightning's call for all processes but the first."""
        self._total = 0


def quiet() -> None:
    """Turns off what Lightning says of itself on each run; warnings that concern the user stay."""
    import warnings

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # we resume from it


@dataclass(frozen=True)
class Done:
    """What predicting leaves beside the shards."""

    skipped: list[BadImage]
    line: str | None
    precision_error: dict[str, float] | None


def predict(
    setup: Setup,
    data: ImageDataModule,
    make_trainer: Callable[..., lightning.Trainer],
    folder: RunFolder,
    dry_run: bool = False,
) -> Done:
    """Patches all images of ``data`` into ``folder``; with ``dry_run`` only a few, and nothing is written."""
    quiet()
    writer = ShardWriter(folder, data.images.on_error)
    callbacks = [] if dry_run else [writer, ImageProgress(len(data.images), folder.path.name)]
    quietly = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    if dry_run:
        quietly |= {"limit_predict_batches": 1, "enable_progress_bar": False}
    trainer = trainer_of(make_trainer, callbacks=callbacks, **quietly)
    if trainer.world_size > 1:
        raise VitPatchError(f"trainer: {trainer.world_size} processes; a run uses one device so far: trainer.devices=1")
    module = PatchingModule(setup, data.batch_size, dry_run)
    with matmul_precision(setup.cfg.matmul_precision):
        trainer.predict(module, datamodule=data, return_predictions=False)
    return Done(writer.skipped, module.line, module.precision_error)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets the rounding inside float32 matrix products, on a GPU of convolutions too, for the length of the block."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def trainer_of(make_trainer: Callable[..., lightning.Trainer], **arguments: Any) -> lightning.Trainer:
    """A trainer with our arguments beside the config's. Raises ``VitPatchError`` for a device that is not there."""
    try:
        return make_trainer(**arguments)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise VitPatchError(f"trainer: {' '.join(str(error).split())[:300]}") from error
