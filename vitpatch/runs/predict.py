"""The Lightning loop: batches of images → rows, streamed to the run's folder by all of its processes."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from vitpatch.corruptions import Corruption, Moments
from vitpatch.data.datamodule import BadImage, DecodedImages, ImageDataModule
from vitpatch.errors import SIGNALS, Interrupted, VitPatchError
from vitpatch.formatting import format_count
from vitpatch.patching.cost import GB, memory_limit
from vitpatch.runs.batches import BatchPatcher, tables_of
from vitpatch.runs.folder import BatchDone, Shards
from vitpatch.runs.setup import Setup, prepare
from vitpatch.runs.trainer import (
    STOP,
    Group,
    SharedFailure,
    StopAfterBatch,
    on_device,
    processes,
    use_matmul_precision,
    use_threads,
)
from vitpatch.study import View
from vitpatch.types import ImageBatch

log = logging.getLogger(__name__)

SHARED_DISK_S = 120.0
"""What a shared disk may take to show a file on another machine."""
TIMEOUT_S = 1800.0
"""``trainer.timeout`` where an option has none."""

Rows = tuple[Mapping[str, pa.Table], Sequence[BadImage]]
"""The result of a batch: rows of each table by its name, and the images that could not be read."""


class PatchingModule(lightning.LightningModule):
    """Corrupts and patches batches, and writes each one's rows to the run's folder; after each all processes meet.

    ``numbers`` are the batches of all processes, which compute one each at a time; rank 0 shows a bar of their images.
    """

    def __init__(
        self,
        patcher: BatchPatcher,
        data: ImageDataModule,
        shards: Shards,
        numbers: Sequence[int],
        group: Group,
        stop: StopAfterBatch,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer batches than processes
        self.model, self.setup = patcher.model, patcher.setup
        self._patcher, self._data, self._shards, self._group, self._stop = patcher, data, shards, group, stop
        self._images = [len(data.positions_of([number])) for number in numbers]
        self._bar: tqdm | None = None
        self._precision_error: dict[str, float] | None = None

    def on_predict_start(self) -> None:
        """Takes the signals back from Lightning, and notes the time."""
        self._stop.install()
        self._started = time.time()

    def meet(self) -> None:
        """Waits for the other processes. Raises what ends the run in all of them, as ``Group.share`` does."""
        self._group.share(problem=STOP if self._stop.asked else None)

    def predict_step(self, batch: tuple[ImageBatch | None, list[BadImage]], batch_idx: int = 0) -> Rows:
        """One batch of ``ImageDataModule`` → its rows. Raises ``VitPatchError`` where a logit is not finite."""
        images, bad = batch
        if images is None:
            return {}, bad
        reports = self._group.rank == 0
        columns = self._patcher.columns(images, logs_cost=reports)
        if reports and self.setup.is_reduced and self._precision_error is None:
            images = replace(images, labels=torch.from_numpy(columns.examples["label"]))
            self._precision_error = self._patcher.compare_with_float32(images, columns.effects["effect"])
        return tables_of(self.setup, columns), bad

    def on_predict_batch_end(self, outputs: Rows, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Moves the bar, and writes the batch's shard.

        Raises ``VitPatchError`` for an unreadable image unless these are skipped; after the shard is written, raises
        what ends the run: ``Interrupted``, or another process's failure.
        """
        self._move_bar(batch_idx)
        tables, bad = outputs
        if bad and self.setup.images.on_error == "raise":
            raise VitPatchError(bad[0].reason)
        for image in bad:
            log.warning("skipped: %s", image.reason.partition(";")[0])
        begun = self._shards.begun()
        if self._group.rank and (begun is None or begun.run_id != self.setup.run_id):  # only rank 0 has locked it
            raise VitPatchError(f"{self._shards.path.parent} was given to another run")
        about_run = {"line": self._patcher.cost_line, "precision_error": self._precision_error}
        rows = [(image.row, image.reason) for image in bad]
        self._shards.write(self._data.numbers[batch_idx], tables, rows, about_run)
        self.meet()

    def _move_bar(self, batch: int) -> None:
        """Shows how many images are done by all processes: every 1 s in a terminal, else every 10 s."""
        if self._bar is None:  # from the first batch on, so that the time left is known
            often = 1.0 if sys.stderr.isatty() else 10.0
            name, total = self._shards.path.parent.name, len(self._data.images)
            self._bar = tqdm(
                total=total, initial=total - sum(self._images), desc=name, unit=" images", mininterval=often,
                dynamic_ncols=True, disable=self._group.rank > 0,
            )  # fmt: skip
            self._bar.start_t = self._started
        size = self._group.size
        self._bar.update(sum(self._images[batch * size : (batch + 1) * size]))

    def close_bar(self) -> None:
        """Ends the bar's line, so that what follows stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()


@dataclass(frozen=True)
class PredictionResult:
    """What predicting gives in addition to shards: how many ``images`` this start read, how many any start skipped.

    ``line`` says what the plan costs; ``precision_error`` how far effects are from float32, of a run below it.
    """

    images: int
    skipped: int
    line: str | None
    precision_error: dict[str, float] | None


@dataclass(frozen=True)
class Order:
    """What rank 0 sends the other processes of a run: its folder and config, and the batches that are to be done.

    ``numbers`` are those of the batches; ``corruption`` is the one that was fitted to training images, where there are
    any; ``calibrations`` the folder of the sweep's calibrations.
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


def predict(setup: Setup, data: ImageDataModule, shards: Shards) -> PredictionResult:
    """Patches the images of ``data`` that are not done yet into ``shards``.

    By all processes of the trainer, each its share of the batches. Raises ``Interrupted`` after the batches in which
    the run was asked to stop.
    """
    done = shards.done()
    numbers = [number for number in range(data.batches) if number not in done]
    left = len(data.positions_of(numbers))
    if done:
        before = len(data.images) - left
        log.info("goes on: %d of %s were done before", before, format_count(len(data.images), "image"))
    if numbers:
        try:
            _predict_by_all(_within_memory(setup), data, shards, numbers)
        except Interrupted as error:
            raise Interrupted(f"{len(shards.numbers())} of {data.batches} batches are done") from error
    return _result(list(shards.records().values()), left)


def _predict_by_all(setup: Setup, data: ImageDataModule, shards: Shards, numbers: Sequence[int]) -> None:
    order = Order(
        folder=shards.path.parent.resolve(),
        config=OmegaConf.to_container(setup.cfg, resolve=True),
        numbers=numbers,
        corruption=None if setup.training is None else setup.corruption,
        calibrations=setup.calibrations,
    )
    with (
        StopAfterBatch(announce=True) as stop,
        processes(setup.trainer.world_size, shards.begun().threads, stop) as group,
    ):
        group.begin(order, setup.cfg.trainer.get("timeout", TIMEOUT_S))
        with group.sharing_failures():
            _predict_share(setup, data, shards, numbers, group, stop)


def _within_memory(setup: Setup) -> Setup:
    """The setup with a process's part of what is free, where several share a machine's memory."""
    local = setup.trainer.num_devices
    if local == 1 or setup.trainer.strategy.root_device.type != "cpu" or setup.cfg.memory_gb is not None:
        return setup
    free = memory_limit(None, torch.device("cpu")) / GB
    return replace(setup, cfg=OmegaConf.merge(setup.cfg, {"memory_gb": free / local}))


def _result(batches: Sequence[BatchDone], images: int) -> PredictionResult:
    """The images that were skipped in any batch, and of what is about the whole run the first that is known."""
    known = [
        next((batch.about_run[name] for batch in batches if batch.about_run.get(name)), None)
        for name in ("line", "precision_error")
    ]
    return PredictionResult(images, sum(len(batch.bad) for batch in batches), *known)


def assist(group: Group) -> None:
    """Computes this process's share of each run that rank 0 begins, until rank 0 ends."""
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
    with use_threads(begun.threads):
        _predict_share(setup, data_module(setup, begun.batch_size), shards, order.numbers, group, stop)


def _predict_share(
    setup: Setup, data: ImageDataModule, shards: Shards, numbers: Sequence[int], group: Group, stop: StopAfterBatch
) -> None:
    """Computes this process's share of the batches ``numbers``; returns when all processes are done.

    In whatever view the run is asked for, its shards are in the default one: it may go on in another view.
    """
    setup = replace(setup, study=setup.study.read_as(View()))
    data.numbers = group.part(numbers)
    with use_matmul_precision(setup.cfg.matmul_precision):
        patcher = _make_patcher(setup, data, shards, group)
        module = PatchingModule(patcher, data, shards, numbers, group, stop)
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else Lightning sets fewer
        try:
            setup.trainer.predict(module, datamodule=data, return_predictions=False)
            for _ in range(len(data.numbers), math.ceil(len(numbers) / group.size) + 1):
                module.meet()
        except RuntimeError:  # a cluster signals every process, those that load images too
            if not stop.asked:
                raise
            module.meet()
        finally:
            module.close_bar()


def _make_patcher(setup: Setup, data: ImageDataModule, shards: Shards, group: Group) -> BatchPatcher:
    """The patcher on the trainer's device, in calls of the sizes that the run began with: rank 0's, in all processes.

    Raises ``VitPatchError`` where one image does not fit.
    """
    setup.model.to(setup.trainer.strategy.root_device)
    begun = shards.begun()
    sizes = patcher = None
    if group.rank == 0:
        sizes = None if begun.images is None else (begun.images, begun.rows)
        patcher = BatchPatcher(setup, data.batch_size, before=sizes)
        if sizes is None:
            sizes = patcher.limits.images, patcher.limits.rows
            shards.write_begun(replace(begun, images=sizes[0], rows=sizes[1]))
    sizes = group.share(sizes)
    patcher = patcher or BatchPatcher(setup, data.batch_size, before=sizes)
    if sizes != (patcher.limits.images, patcher.limits.rows):
        log.warning("less memory is free than when the run began: calls are smaller, and numbers the same to 1e-6")
    group.share()
    return patcher


def estimate_run(setup: Setup, data: ImageDataModule) -> str | None:
    """What the run would cost, in a line, by the time of one image; ``None`` where none of the first can be read.

    Nothing is taken from training images, which would not change what it costs.
    """
    of_spread_1 = Moments(2, np.zeros(1), np.ones(1))
    setup = replace(setup, corruption=setup.corruption.with_statistics(of_spread_1))
    with on_device(setup.model, setup.trainer, setup.cfg.matmul_precision) as device, torch.inference_mode():
        patcher = BatchPatcher(setup, data.batch_size)
        images, _ = next(iter(data.predict_dataloader()))
        if images is not None:
            patcher.columns(images.part(slice(1)).to(device), logs_cost=True)
        return patcher.cost_line
