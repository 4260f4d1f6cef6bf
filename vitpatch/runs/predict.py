"""The Lightning loop: batches of images → rows, streamed to the run's folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from omegaconf import OmegaConf

from vitpatch.data.images import UNKNOWN, BadImage, ImageDataModule
from vitpatch.errors import VitPatchError
from vitpatch.patching.cost import GB, cost_of, described, memory_limit
from vitpatch.patching.table import Columns, joined
from vitpatch.runs.calibration import calibration_folder
from vitpatch.runs.crew import OFTEN_S, Alone, Follower, Leader, Order, led, outside, processes_of
from vitpatch.runs.devices import Devices, share
from vitpatch.runs.interrupt import TOGETHER_S, Interrupted, waiting
from vitpatch.runs.patching import Patching, parts
from vitpatch.runs.progress import ImageProgress
from vitpatch.runs.setup import Setup
from vitpatch.runs.shards import BatchDone, Shards
from vitpatch.runs.trainer import QUIETLY, matmul_precision, one_device, quiet
from vitpatch.schema import (
    EFFECTS_SCHEMA,
    EXAMPLES_SCHEMA,
    LEAVE_OUTS_SCHEMA,
    OF_CORRUPTION,
    of_controls,
    of_partners,
    with_fields,
)
from vitpatch.stats.inclusion import included as included_by
from vitpatch.types import ImageBatch, counted, duration

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
    began with; without shards it is a dry run, and nothing but the first images is computed. Of a ``crew`` the first
    process finds the calls' sizes, times and compares; the others wait for the sizes.
    """

    def __init__(
        self, setup: Setup, batch_size: int, shards: Shards | None = None, crew: Alone | Leader | Follower | None = None
    ) -> None:
        super().__init__()
        self.model, self.setup, self.batch_size = setup.model, setup, batch_size
        self._shards, self._crew = shards, crew or Alone()
        self.line: str | None = None
        self.precision_error: dict[str, float] | None = None
        self._patching: Patching | None = None

    def on_predict_start(self) -> None:
        """Looks at the device. Raises ``VitPatchError`` where one image does not fit."""
        if self._shards is None:
            self._patching = Patching(self.setup, self.batch_size)
            return
        while (begun := self._shards.begun()).images is None and self._crew.rank:
            if self._crew.stopped():
                raise Interrupted
            time.sleep(OFTEN_S)
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
            if self.line is None and not self._crew.rank:
                self._say(len(part), time.perf_counter() - started)
            if self._shards is None:
                return Rows({}, bad)
        measured = joined(measured)
        if self.setup.is_reduced and self.precision_error is None and not self._crew.rank:
            known = replace(images, labels=torch.from_numpy(measured.examples["label"]))
            self._compare_with_float32(known, measured.effects["effect"])
        return Rows(self._tables(measured), bad)

    def _say(self, images: int, seconds: float) -> None:
        time_left = seconds / images * len(self.setup.images) / self._crew.processes
        first = f"first {images} images in {seconds:.2g} s" if images > 1 else f"first image in {seconds:.2g} s"
        about = f"about {duration(time_left)} for {counted(len(self.setup.images), 'image')} ({first})"
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
        images, names = self.setup.images, self.setup.label_names
        at = images.positions(measured.examples["example_id"])
        included = included_by(self.setup.study.include, measured.examples, self.setup.study.metric)
        if self.setup.study.donor.partner is not None:
            included &= measured.examples[f"partner_{self.setup.study.donor}"] >= 0
        examples = measured.examples | {
            "label_name": [names[i] if names else str(i) for i in measured.examples["label"].tolist()],
            "label_is_predicted": images.labels[at] == UNKNOWN,
            "included": included,
            "cluster": images.clusters[at],
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


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(columns[f.name]).cast(f.type, safe=False) for f in schema], schema=schema)


class ShardWriter(BasePredictionWriter):
    """Streams the rows of each batch to the run's folder; an unreadable image is counted, or stops the run.

    ``numbers`` are the batches' own, in the order in which they come. Once ``stopped`` says so the run ends. A process
    that follows does not hold the folder: it writes only while the folder is its run's, ``run_id``.
    """

    def __init__(
        self,
        shards: Shards,
        numbers: Sequence[int],
        on_error: str,
        stopped: Callable[[], bool],
        run_id: str | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        self.shards, self.numbers, self.on_error, self.stopped = shards, numbers, on_error, stopped
        self._run_id = run_id

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
        if self._run_id is not None and ((begun := self.shards.begun()) is None or begun.run_id != self._run_id):
            raise VitPatchError(f"{self.shards.path.parent} was given to another run")
        said = {"line": pl_module.line, "precision_error": pl_module.precision_error}
        self.shards.write(self.numbers[batch_idx], prediction.tables, bad, said)
        if self.stopped():
            raise Interrupted


@dataclass(frozen=True)
class Done:
    """What predicting leaves beside the shards: ``images`` that this start has been through, those ``skipped`` ever."""

    images: int
    skipped: int
    line: str | None
    precision_error: dict[str, float] | None


def data_of(setup: Setup, batch_size: int) -> ImageDataModule:
    """The run's images in batches of this size, with the partners that they need."""
    to_input = setup.model.preprocessing.to_input
    needed = {setup.corruption.partner} - {None}
    return ImageDataModule(setup.images, to_input, batch_size, setup.partners, tuple(needed))


def predict(
    setup: Setup,
    data: ImageDataModule,
    make_trainer: Callable[..., lightning.Trainer],
    shards: Shards,
    name: str,
    devices: Devices,
) -> Done:
    """Patches the images of ``data`` that are not done yet into ``shards``; ``name`` stands before the bar.

    By as many processes as there are ``devices``, each its share of the batches. Raises ``Interrupted`` after the
    batches in which the run was asked to stop.
    """
    done = shards.done()
    numbers = [number for number in range(data.batches) if number not in done]
    left = len(data.positions_of(numbers))
    if done:
        before = len(data.images) - left
        log.info("goes on: %d of %s were done before", before, counted(len(data.images), "image"))
    if numbers:
        setup = _within_memory(setup, devices)
        order = _order(setup, data, shards, numbers, processes_of(devices, numbers))
        bar = ImageProgress(len(data.images), name, lambda: len(data.positions_of(shards.numbers())))
        data.numbers = share(numbers, 0, order.processes)
        together_s = 0.0 if outside() is None else TOGETHER_S
        try:
            with (
                led(order, shards.path) as crew,
                waiting(lambda: _say_stopping(crew), together_s) as asked,
                closing(bar),
            ):
                try:
                    _predict_share(setup, data, make_trainer, shards, crew, lambda: asked() or crew.stopped(), bar)
                except RuntimeError as error:  # a cluster signals every process, those that load images too
                    if not asked():
                        raise
                    raise Interrupted from error
                _follow_the_others(crew, bar, asked)
        except Interrupted as error:
            raise Interrupted(f"{len(shards.numbers())} of {data.batches} batches are done") from error
    return _done(shards.records().values(), left)


def _within_memory(setup: Setup, devices: Devices) -> Setup:
    """The setup with a process's part of what is free, where several share a machine's memory."""
    if devices.local == 1 or devices.accelerator != "cpu" or setup.cfg.memory_gb is not None:
        return setup
    free = memory_limit(None, torch.device("cpu")) / GB
    return replace(setup, cfg=OmegaConf.merge(setup.cfg, {"memory_gb": free / devices.local}))


def follow(
    setup: Setup,
    data: ImageDataModule,
    make_trainer: Callable[..., lightning.Trainer],
    shards: Shards,
    follower: Follower,
    local_rank: int,
) -> None:
    """Patches the batches of ``data`` that are this process's; raises as ``predict`` does."""
    _predict_share(setup, data, make_trainer, shards, follower, follower.stopped, local_rank=local_rank)


def _order(setup: Setup, data: ImageDataModule, shards: Shards, numbers: list[int], processes: int) -> Order:
    calibrations = calibration_folder(shards.path.parent)
    return Order(
        run_id=setup.run_id,
        config=OmegaConf.to_container(setup.cfg, resolve=True),
        batch_size=data.batch_size,
        numbers=numbers,
        processes=processes,
        calibrations=None if calibrations is None else str(calibrations),
        statistics=setup.statistics and {k: np.asarray(v).tolist() for k, v in vars(setup.statistics).items()},
        threads=shards.begun().threads,
    )


def _predict_share(
    setup: Setup,
    data: ImageDataModule,
    make_trainer: Callable[..., lightning.Trainer],
    shards: Shards,
    crew: Alone | Leader | Follower,
    stopped: Callable[[], bool],
    bar: ImageProgress | None = None,
    local_rank: int = 0,
) -> None:
    """The batches of ``data`` that are this process's."""
    module = PatchingModule(setup, data.batch_size, shards, crew)
    run_id = setup.run_id if crew.rank else None
    writer = ShardWriter(shards, data.numbers, data.images.on_error, stopped, run_id)
    shown = {"callbacks": [writer]} | ({"enable_progress_bar": False} if bar is None else {"callbacks": [writer, bar]})
    _predict(module, data, make_trainer, local_rank, **shown)


def _follow_the_others(crew: Alone | Leader, bar: ImageProgress, asked: Callable[[], bool]) -> None:
    """Until their shares are done too. Raises ``Interrupted`` where they were asked to stop."""
    while not crew.ended():
        crew.stopped()  # raises where one failed
        bar.move()
        time.sleep(OFTEN_S)
    if crew.stopped() or asked():
        raise Interrupted


def foretell(setup: Setup, data: ImageDataModule, make_trainer: Callable[..., lightning.Trainer]) -> str | None:
    """What the run would cost, in a line, from its first images; ``None`` where none of these can be read."""
    module = PatchingModule(setup, data.batch_size)
    _predict(module, data, make_trainer, limit_predict_batches=1, enable_progress_bar=False)
    return module.line


def _predict(
    module: PatchingModule,
    data: ImageDataModule,
    make_trainer: Callable[..., lightning.Trainer],
    local_rank: int = 0,
    **arguments: Any,
) -> None:
    quiet()
    trainer = one_device(make_trainer, local_rank, **(QUIETLY | {"enable_progress_bar": True} | arguments))
    with matmul_precision(module.setup.cfg.matmul_precision):
        trainer.predict(module, datamodule=data, return_predictions=False)


def _say_stopping(crew: Alone | Leader) -> None:
    log.warning("stopping after this batch; CTRL-C again stops at once")
    crew.stop()


def _done(batches: Iterable[BatchDone], images: int) -> Done:
    """What all batches say together, of lines and errors the first."""
    batches = list(batches)

    def first(name: str) -> Any:
        return next((batch.said[name] for batch in batches if batch.said.get(name)), None)

    skipped = sum(len(batch.bad) for batch in batches)
    return Done(images, skipped, first("line"), first("precision_error"))
