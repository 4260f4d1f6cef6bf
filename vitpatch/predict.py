"""The Lightning loop: batches of images → rows, streamed to the run's folder."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from tqdm import tqdm

from vitpatch.cost import cost_of, described
from vitpatch.data import PREDICTED, BadImage, ImageDataModule
from vitpatch.inclusion import included as included_by
from vitpatch.interrupt import Interrupted, waiting
from vitpatch.patching import Patching, parts
from vitpatch.rows import Columns, joined
from vitpatch.setup import Setup
from vitpatch.shards import BatchDone, Shards
from vitpatch.spec import ImageBatch, VitPatchError, counted
from vitpatch.store import (
    EFFECTS_SCHEMA,
    EXAMPLES_SCHEMA,
    LEAVE_OUTS_SCHEMA,
    OF_CORRUPTION,
    of_controls,
    of_partners,
    with_fields,
)
from vitpatch.trainers import matmul_precision, quiet, trainer_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What a batch leaves: rows of each table by its name, and the images that could not be read."""

    tables: Mapping[str, pa.Table]
    bad: Sequence[BadImage]


class PatchingModule(lightning.LightningModule):
    """Corrupts a batch, runs the plan on it, some images at a time, and reads the metrics off.

    ``line`` says what the plan costs, once the first images have been timed; ``precision_error`` how far the effects of
    the first batch are from float32, of a run at reduced precision. Calls are of the sizes that the run in ``shards``
    began with; without shards it is a dry run, and nothing but the first images is computed.
    """

    def __init__(self, setup: Setup, batch_size: int, shards: Shards | None = None) -> None:
        super().__init__()
        self.model, self.setup, self.batch_size = setup.model, setup, batch_size
        self._shards = shards
        self.line: str | None = None
        self.precision_error: dict[str, float] | None = None
        self._patching: Patching | None = None

    def on_predict_start(self) -> None:
        """Looks at the device. Raises ``VitPatchError`` where one image does not fit."""
        if self._shards is None:
            self._patching = Patching(self.setup, self.batch_size)
            return
        begun = self._shards.begun()
        before = None if begun.images is None else (begun.images, begun.rows)
        self._patching = Patching(self.setup, self.batch_size, before=before)
        room = self._patching.room
        if before is None:
            self._shards.keep(replace(begun, images=room.images, rows=room.rows))
        elif before != (room.images, room.rows):
            log.warning("less memory is free than when the run began: calls are smaller, and numbers the same to 1e-6")

    def predict_step(self, batch: tuple[ImageBatch | None, list[BadImage]], batch_idx: int = 0) -> Rows:
        """One batch of ``ImageDataModule`` → its rows. Raises ``VitPatchError`` where a logit is not finite."""
        images, bad = batch
        if images is None:
            return Rows({}, bad)
        patching, measured = self._patching, []
        for part in parts(images, patching.room):
            started = time.perf_counter()
            measured.append(patching.part(part, self.model, patching.room))
            if self.line is None:
                self._say(len(part), time.perf_counter() - started)
            if self._shards is None:
                return Rows({}, bad)
        measured = joined(measured)
        if self.setup.is_reduced and self.precision_error is None:
            known = replace(images, labels=torch.from_numpy(measured.examples["label"]))
            self._compare_with_float32(known, measured.effects["effect"])
        return Rows(self._tables(measured), bad)

    def _say(self, images: int, seconds: float) -> None:
        time_left = seconds / images * len(self.setup.images)
        first = f"first {images} images in {seconds:.2g} s" if images > 1 else f"first image in {seconds:.2g} s"
        about = f"about {_duration(time_left)} for {counted(len(self.setup.images), 'image')} ({first})"
        self.line = f"{described(self.setup.plan, self._patching.cost, self._patching.room)}, {about}"
        if self._patching.draws > 1:
            self.line += f", {self._patching.draws} draws of noise each"
        log.info("plan: %s", self.line)
        if (caveat := self.model.caveat(self.setup.plan.target.site)) is not None:
            log.warning("%s", caveat)

    def _compare_with_float32(self, images: ImageBatch, effects: np.ndarray) -> None:
        """Runs the batch again in float32, and keeps how far the effects differ."""
        model = self.setup.float32_model().to(self.device)
        room = self._patching.room_for(cost_of(self.setup.plan, model, len(self.setup.partners)))
        with torch.autocast(self.device.type, enabled=False), matmul_precision("highest"):
            exact = joined([self._patching.part(part, model, room) for part in parts(images, room)]).effects["effect"]
        if model is not self.model:  # whose place on the device is needed
            model.to("cpu")
        known = ~np.isnan(exact)  # of images that have a partner, where another image is the donor
        if not known.any():
            return
        error = np.abs(effects - exact)[known]
        self.precision_error = {
            "largest": float(error.max()),
            "mean": float(error.mean()),
            "largest_effect": float(np.abs(exact[known]).max()),
            "images": len(images),
        }
        log.info(
            "precision: effects of the first %d images differ from float32 by %.2g at most, %.2g on average "
            "(largest effect %.2g)",
            len(images), error.max(), error.mean(), self.precision_error["largest_effect"],
        )  # fmt: skip

    def _tables(self, measured: Columns) -> dict[str, pa.Table]:
        ids, names, known = measured.examples["example_id"], self.setup.label_names, self.setup.images.has_labels
        included = included_by(self.setup.study.include, measured.examples, self.setup.study.metric)
        if self.setup.study.donor.partner is not None:
            included &= measured.examples[f"partner_{self.setup.study.donor}"] >= 0
        examples = measured.examples | {
            "label_name": [
                (names[i] if names else str(i)) + ("" if known else PREDICTED)
                for i in measured.examples["label"].tolist()
            ],
            "included": included,
            "cluster": self.setup.images.clusters[self.setup.images.positions(ids)],
        }
        plan = self.setup.plan
        also = of_partners(plan.donors, bool(plan.together))
        also += [pa.field(OF_CORRUPTION, pa.int64())] * (OF_CORRUPTION in examples)
        tables = {
            "examples": _table(examples, with_fields(EXAMPLES_SCHEMA, also)),
            "effects": _table(measured.effects, with_fields(EFFECTS_SCHEMA, of_controls(plan.donors))),
        }
        if plan.leave_outs:
            tables["leave_outs"] = _table(measured.leave_outs, LEAVE_OUTS_SCHEMA)
        return tables


def _duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(columns[f.name]).cast(f.type, safe=False) for f in schema], schema=schema)


class ShardWriter(BasePredictionWriter):
    """Streams the rows of each batch to the run's folder; an unreadable image is counted, or stops the run.

    ``numbers`` are the batches' own, in the order in which they come. Once ``stopped`` says so the run ends.
    """

    def __init__(self, shards: Shards, numbers: Sequence[int], on_error: str, stopped: Callable[[], bool]) -> None:
        super().__init__(write_interval="batch")
        self.shards, self.numbers, self.on_error, self.stopped = shards, numbers, on_error, stopped

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: PatchingModule,
        prediction: Rows,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes one shard. Raises ``VitPatchError`` for an unreadable image unless they are skipped.

        Raises ``Interrupted`` once the shard is on the disk, where the run was asked to stop.
        """
        if prediction.bad and self.on_error == "raise":
            raise VitPatchError(prediction.bad[0].reason)
        for bad in prediction.bad:
            log.warning("skipped: %s", bad.reason.partition(";")[0])
        bad = [(image.row, image.reason) for image in prediction.bad]
        said = {"line": pl_module.line, "precision_error": pl_module.precision_error}
        self.shards.write(self.numbers[batch_idx], prediction.tables, bad, said)
        if self.stopped():
            raise Interrupted(f"{batch_idx + 1} of {len(self.numbers)} batches are done")


class ImageProgress(ProgressBar):
    """A bar that counts images, and so shows images per second and the time left; from the first batch on."""

    def __init__(self, images: int, name: str, done: int = 0) -> None:
        super().__init__()
        self._total, self._name, self._done = images, name, done

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
            self._bar = tqdm(
                total=self._total,
                initial=self._done,
                desc=self._name,
                unit=" images",
                mininterval=often,
                dynamic_ncols=True,
            )
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


@dataclass(frozen=True)
class Done:
    """What predicting leaves beside the shards: ``images`` that this start has been through, those ``skipped`` ever."""

    images: int
    skipped: int
    line: str | None
    precision_error: dict[str, float] | None


def predict(
    setup: Setup, data: ImageDataModule, make_trainer: Callable[..., lightning.Trainer], shards: Shards, name: str
) -> Done:
    """Patches the images of ``data`` that are not done yet into ``shards``; ``name`` stands before the bar.

    Raises ``Interrupted`` after the batch in which the run was asked to stop.
    """
    done = shards.done()
    data.numbers = [number for number in range(data.batches) if number not in done]
    before = len(data.images) - len(data.positions)
    if done:
        log.info("goes on: %d of %s were done before", before, counted(len(data.images), "image"))
    if data.numbers:
        module = PatchingModule(setup, data.batch_size, shards)
        with waiting(_say_stopping) as stopped:
            writer = ShardWriter(shards, data.numbers, data.images.on_error, stopped)
            bar = ImageProgress(len(data.images), name, before)
            try:
                _predict(module, data, make_trainer, callbacks=[writer, bar])
            except RuntimeError as error:
                if not stopped():
                    raise
                raise Interrupted("worker processes were stopped too") from error  # a cluster signals every process
            if stopped():  # after the last batch
                raise Interrupted("all batches are done")
    return _done(shards.records().values(), len(data.positions))


def foretell(setup: Setup, data: ImageDataModule, make_trainer: Callable[..., lightning.Trainer]) -> str | None:
    """What the run would cost, in a line, from its first images; ``None`` where none of these can be read."""
    module = PatchingModule(setup, data.batch_size)
    _predict(module, data, make_trainer, callbacks=[], limit_predict_batches=1, enable_progress_bar=False)
    return module.line


def _predict(
    module: PatchingModule, data: ImageDataModule, make_trainer: Callable[..., lightning.Trainer], **arguments: Any
) -> None:
    quiet()
    quietly = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = trainer_of(make_trainer, **arguments, **quietly)
    if trainer.world_size > 1:
        raise VitPatchError(f"trainer: {trainer.world_size} processes; a run uses one device so far: trainer.devices=1")
    with matmul_precision(module.setup.cfg.matmul_precision):
        trainer.predict(module, datamodule=data, return_predictions=False)


def _say_stopping() -> None:
    log.warning("stopping after this batch; CTRL-C again stops at once")


def _done(batches: Iterable[BatchDone], images: int) -> Done:
    """What all batches say together, of lines and errors the first."""
    batches = list(batches)

    def first(name: str) -> Any:
        return next((batch.said[name] for batch in batches if batch.said.get(name)), None)

    skipped = sum(len(batch.bad) for batch in batches)
    return Done(images, skipped, first("line"), first("precision_error"))
