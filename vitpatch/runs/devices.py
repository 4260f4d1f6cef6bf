"""The devices that a trainer's config asks for, and how a run's batches are divided among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from vitpatch.errors import VitPatchError
from vitpatch.formatting import counted
from vitpatch.runs.launch import place
from vitpatch.runs.trainer import QUIETLY, quiet, trainer_of

STARTS = "torchrun --nnodes=… --nproc-per-node=… patch.py, or srun python patch.py"


@dataclass(frozen=True)
class Devices:
    """``processes`` in all, a device each, on ``nodes`` machines."""

    accelerator: str
    processes: int
    nodes: int = 1

    @property
    def local(self) -> int:
        """Processes on a machine."""
        return self.processes // self.nodes

    def batch_size(self, asked: int, images: int) -> int:
        """Images of a batch, so few that every device has one, where there are as many images."""
        return min(asked, math.ceil(images / self.processes)) if self.processes > 1 else asked

    def check(self) -> None:
        """Raises ``VitPatchError`` where the processes that were started from outside are not as many."""
        at = place()
        if at is None and self.nodes > 1:
            raise VitPatchError(f"trainer.num_nodes {self.nodes}: every machine's processes are started by {STARTS}")
        if at is not None and at.world != self.processes:
            raise VitPatchError(
                f"trainer: {counted(self.nodes, 'machine')} with {counted(self.local, 'device')} each, but {at.world} "
                f"processes were started; use trainer=ddp with trainer.devices × trainer.num_nodes = {at.world}"
            )


def devices_of(make_trainer: Callable[..., lightning.Trainer]) -> Devices:
    """What the trainer would use. Raises ``VitPatchError`` for several devices by another strategy than ddp."""
    quiet()
    trainer = trainer_of(make_trainer, plugins=[LightningEnvironment()], **QUIETLY)
    name = trainer.accelerator.name()
    if trainer.world_size == 1:
        return Devices(name, 1)
    if not isinstance(trainer.strategy, DDPStrategy):
        kind = type(trainer.strategy).__name__
        raise VitPatchError(f"trainer: {trainer.world_size} processes by {kind}; several devices: trainer=ddp")
    return Devices(name, trainer.world_size, trainer.num_nodes)


def share(numbers: Sequence[int], rank: int, processes: int) -> Sequence[int]:
    """The batches of one process: every ``processes``-th."""
    return numbers[rank::processes]
