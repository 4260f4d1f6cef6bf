"""The Lightning loop: batches of images → rows, streamed to the run's folder."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import pyarrow as pa
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from omegaconf import OmegaConf
from tqdm import tqdm

from vitpatch.corruptions.base import Corruption
from vitpatch.data.datamodule import BadImage, DecodedImages, ImageDataModule
from vitpatch.errors import VitPatchError
from vitpatch.formatting import counted
from vitpatch.patching.cost import GB, memory_limit
from vitpatch.patching.metrics import join_columns
from vitpatch.runs.batches import BatchPatcher, parts, tables_of
from vitpatch.runs.calibration import calibration_folder
from vitpatch.runs.distributed import SIGNALS, STOP, Group, Interrupted, SharedFailure, StopAfterBatch, processes
from vitpatch.runs.setup import Setup, prepare
from vitpatch.runs.shards import BatchDone, Shards
from vitpatch.runs.trainer import matmul_precision, on_device, on_threads
from vitpatch.types import ImageBatch

log = logging.getLogger(__name__)

SHARED_DISK_S = 120.0
"""What a shared disk may take to show a file on another machine."""
TIMEOUT_S = 1800.0
"""``trainer.timeout`` where an option has none."""


@dataclass(frozen=True)
class Rows:
    """The result of a batch: rows of each table by its name, and the images that could not be read."""

    tables: Mapping[str, pa.Table]
    bad: Sequence[BadImage]


class PatchingModule(lightning.LightningModule):
    """Corrupts a batch, runs the plan on it, some images at a time, and reads the metrics off.

    In rank 0 ``line`` says what the plan costs, once the first images have been timed, and ``precision_error`` how far
    the effects of the first batch are from float32, of a run at reduced precision.
    """

    def __init__(self, setup: Setup, patching: BatchPatcher, group: Group, stop: StopAfterBatch) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer batches than processes
        self.model, self.setup = setup.model, setup
        self.group, self._patching, self._stop = group, patching, stop
        self.line: str | None = None
        self.precision_error: dict[str, float] | None = None

    def on_predict_start(self) -> None:
        """Takes the signals back from Lightning."""
        self._stop.install()

    def meet(self) -> None:
        """Waits for the other processes. Raises what ends the run in all of them, as ``Group.share`` does."""
        self.group.share(problem=STOP if self._stop.asked else None)

    def predict_step(self, batch: tuple[ImageBatch | None, list[BadImage]], batch_idx: int = 0) -> Rows:
        """One batch of ``ImageDataModule`` → its rows. Raises ``VitPatchError`` where a logit is not finite."""
        images, bad = batch
        if images is None:
            return Rows({}, bad)
        patching, measured = self._patching, []
        for part in parts(images, patching.limits):
            started = time.perf_counter()
            measured.append(patching.part(part, self.model, patching.limits))
            if self.line is None and not self.group.rank:
                self.line = patching.log_cost(len(part), time.perf_counter() - started)
        measured = join_columns(measured)
        if self.setup.is_reduced and self.precision_error is None and not self.group.rank:
            known = replace(images, labels=torch.from_numpy(measured.examples["label"]))
            self.precision_error = patching.compare_with_float32(known, measured.effects["effect"])
        return Rows(tables_of(self.setup, measured), bad)


class ShardWriter(BasePredictionWriter):
    """Streams the rows of each batch to the run's folder; an unreadable image is counted, or stops the run.

    ``numbers`` are the batches' own, in the order in which they come. After each batch all processes meet.
    """

    def __init__(self, shards: Shards, numbers: Sequence[int]) -> None:
        super().__init__(write_interval="batch")
        self.shards, self.numbers = shards, numbers

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

        Once the shard is on the disk it raises what ends the run: ``Interrupted``, or another process's failure.
        """
        setup = pl_module.setup
        if prediction.bad and setup.images.on_error == "raise":
            raise VitPatchError(prediction.bad[0].reason)
        for bad in prediction.bad:
            log.warning("skipped: %s", bad.reason.partition(";")[0])
        bad = [(image.row, image.reason) for image in prediction.bad]
        begun = self.shards.begun()
        if pl_module.group.rank and (begun is None or begun.run_id != setup.run_id):  # only rank 0 has locked it
            raise VitPatchError(f"{self.shards.path.parent} was given to another run")
        about_run = {"line": pl_module.line, "precision_error": pl_module.precision_error}
        self.shards.write(self.numbers[batch_idx], prediction.tables, bad, about_run)
        pl_module.meet()


class ImageProgress(Callback):
    """One bar for all processes, in images, and so in images per second, with the time left; from the first batch on.

    Of ``numbers``, the batches that are left, the processes compute one each at a time; rank 0 shows it.
    """

    def __init__(self, data: ImageDataModule, numbers: Sequence[int], group: Group, name: str) -> None:
        total, self._size, self._disable = len(data.images), group.size, group.rank > 0
        self._images = [len(data.positions_of([number])) for number in numbers]
        self._bar: tqdm | None = None
        self._options = {"total": total, "initial": total - sum(self._images), "desc": name, "unit": " images"}

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Notes the time."""
        self._started = time.time()

    def on_predict_batch_end(self, *arguments: Any) -> None:
        """Moves on; where nobody watches, every 10 s only."""
        if self._bar is None:
            often = 1.0 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(**self._options, mininterval=often, dynamic_ncols=True, disable=self._disable)
            self._bar.start_t = self._started
        batch = arguments[4]  # its number among this process's
        self._bar.update(sum(self._images[batch * self._size : (batch + 1) * self._size]))

    def close(self) -> None:
        """Ends the bar's line, so that what follows stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()


@dataclass(frozen=True)
class Done:
    """What predicting gives in addition to shards: ``images`` read by this start, those ``skipped`` by any."""

    images: int
    skipped: int
    line: str | None
    precision_error: dict[str, float] | None


@dataclass(frozen=True)
class Order:
    """What rank 0 found for the other processes of a run: the batches ``numbers`` are to be done.

    ``corruption`` is the one that was fitted to training images, where there are any; ``calibrations`` the sweep's
    folder of these.
    """

    folder: Path
    config: Mapping[str, Any]
    numbers: Sequence[int]
    corruption: Corruption | None
    calibrations: Path | None


def data_module(setup: Setup, batch_size: int) -> ImageDataModule:
    """The run's images in batches of this size, with the partners that they need."""
    needed = {setup.corruption.partner} - {None}
    decoded = DecodedImages(setup.images, setup.model.preprocessing.to_input, partners=setup.partners, needed=needed)
    return ImageDataModule(decoded, batch_size)


def predict(setup: Setup, data: ImageDataModule, shards: Shards) -> Done:
    """Patches the images of ``data`` that are not done yet into ``shards``.

    By all processes of the trainer, each its share of the batches. Raises ``Interrupted`` after the batches in which
    the run was asked to stop.
    """
    done = shards.done()
    numbers = [number for number in range(data.batches) if number not in done]
    left = len(data.positions_of(numbers))
    if done:
        before = len(data.images) - left
        log.info("goes on: %d of %s were done before", before, counted(len(data.images), "image"))
    if numbers:
        setup = _within_memory(setup)
        timeout_s = setup.cfg.trainer.get("timeout", TIMEOUT_S)
        order = Order(
            folder=shards.path.parent.resolve(),
            config=OmegaConf.to_container(setup.cfg, resolve=True),
            numbers=numbers,
            corruption=None if setup.training is None else setup.corruption,
            calibrations=calibration_folder(shards.path.parent),
        )
        try:
            with (
                StopAfterBatch(announce=True) as stop,
                processes(setup.trainer.world_size, shards.begun().threads, stop) as group,
            ):
                group.begin(order, timeout_s)
                with group.sharing_failures():
                    _predict_share(setup, data, shards, numbers, group, stop)
        except Interrupted as error:
            raise Interrupted(f"{len(shards.numbers())} of {data.batches} batches are done") from error
    return _done(shards.records().values(), left)


def _within_memory(setup: Setup) -> Setup:
    """The setup with a process's part of what is free, where several share a machine's memory."""
    local = setup.trainer.num_devices
    if local == 1 or setup.trainer.strategy.root_device.type != "cpu" or setup.cfg.memory_gb is not None:
        return setup
    free = memory_limit(None, torch.device("cpu")) / GB
    return replace(setup, cfg=OmegaConf.merge(setup.cfg, {"memory_gb": free / local}))


def assist(group: Group) -> None:
    """This process's shares of the runs that rank 0 begins and reports on, until that process ends."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    with StopAfterBatch() as stop, suppress(KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while True:
            try:
                order = group.begin()
            except SharedFailure:  # rank 0 has ended
                return
            with suppress(Exception), group.sharing_failures():
                _assist(order, group, stop)


def _assist(order: Order, group: Group, stop: StopAfterBatch) -> None:
    shards = Shards(order.folder / "shards")
    until = time.monotonic() + SHARED_DISK_S
    while (begun := shards.begun()) is None and time.monotonic() < until:
        time.sleep(0.2)
    if begun is None:
        raise VitPatchError(f"process {group.rank} does not see {shards.path}; give a folder of a disk that all share")
    setup = prepare(OmegaConf.create(order.config), order.calibrations)
    if setup.run_id != begun.run_id:
        raise VitPatchError(
            f"process {group.rank}: its weights, data or code differ from the first one's; make them the same on all "
            "machines"
        )
    if order.corruption is not None:
        setup = replace(setup, corruption=order.corruption)
    with on_threads(begun.threads):
        _predict_share(setup, data_module(setup, begun.batch_size), shards, order.numbers, group, stop)


def _predict_share(
    setup: Setup, data: ImageDataModule, shards: Shards, numbers: Sequence[int], group: Group, stop: StopAfterBatch
) -> None:
    """This process's part of the batches ``numbers``; ends when all are done."""
    trainer = setup.trainer
    data.numbers = group.part(numbers)
    with matmul_precision(setup.cfg.matmul_precision):
        patching = _prepare_patching(setup, data, shards, group)
        module = PatchingModule(setup, patching, group, stop)
        writer = ShardWriter(shards, data.numbers)
        bar = ImageProgress(data, numbers, group, name=shards.path.parent.name)
        trainer.callbacks += [bar, writer]
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else Lightning sets fewer
        try:
            trainer.predict(module, datamodule=data, return_predictions=False)
            for _ in range(len(data.numbers), math.ceil(len(numbers) / group.size) + 1):
                module.meet()
        except RuntimeError:  # a cluster signals every process, those that load images too
            if not stop.asked:
                raise
            module.meet()
        finally:
            bar.close()


def _prepare_patching(setup: Setup, data: ImageDataModule, shards: Shards, group: Group) -> BatchPatcher:
    """The patching on the trainer's device, in calls of the sizes that the run began with: rank 0's, in all processes.

    Raises ``VitPatchError`` where one image does not fit.
    """
    setup.model.to(setup.trainer.strategy.root_device)
    begun = shards.begun()
    sizes = patching = None
    if group.rank == 0:
        sizes = None if begun.images is None else (begun.images, begun.rows)
        patching = BatchPatcher(setup, data.batch_size, before=sizes)
        if sizes is None:
            sizes = patching.limits.images, patching.limits.rows
            shards.keep(replace(begun, images=sizes[0], rows=sizes[1]))
    sizes = group.share(sizes)
    patching = patching or BatchPatcher(setup, data.batch_size, before=sizes)
    if sizes != (patching.limits.images, patching.limits.rows):
        log.warning("less memory is free than when the run began: calls are smaller, and numbers the same to 1e-6")
    group.share()
    return patching


def estimate_run(setup: Setup, data: ImageDataModule) -> str | None:
    """What the run would cost, in a line, from its first images; ``None`` where none of these can be read."""
    with on_device(setup.model, setup.trainer, setup.cfg.matmul_precision) as device, torch.inference_mode():
        patching = BatchPatcher(setup, data.batch_size)
        images, _ = next(iter(data.predict_dataloader()))
        if images is None:
            return None
        part = next(parts(images.to(device), patching.limits))
        started = time.perf_counter()
        patching.part(part, setup.model, patching.limits)
        return patching.log_cost(len(part), time.perf_counter() - started)


def _done(batches: Iterable[BatchDone], images: int) -> Done:
    """What all batches say together, of lines and errors the first."""
    batches = list(batches)

    def first(name: str) -> Any:
        return next((batch.said[name] for batch in batches if batch.said.get(name)), None)

    skipped = sum(len(batch.bad) for batch in batches)
    return Done(images, skipped, first("line"), first("precision_error"))
