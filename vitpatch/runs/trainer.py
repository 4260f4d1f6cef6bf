"""Lightning's trainer with our arguments, said less, and the rounding of matrix products."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from omegaconf import DictConfig

from vitpatch.checks import Count, Expected, Index, check_values
from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.runs.config import check_option, construct

QUIETLY = {
    "logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False
}  # fmt: skip
"""Arguments of a trainer that only computes."""


class TrainerKeys(TypedDict):
    """The keys of ``conf/trainer``; others are Lightning's to check."""

    accelerator: str
    strategy: str
    devices: Annotated[Count | Literal["auto"] | tuple[Index, ...], Expected("how many, their numbers, or auto")]
    num_nodes: Count
    precision: Annotated[str | int, Expected("32, bf16-mixed or 16-mixed")]


def quiet() -> None:
    """Turns off what Lightning says of itself on each run; warnings that concern the user stay."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # we resume from it


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


@contextmanager
def on_threads(number: int | None) -> Iterator[None]:
    """Computes by so many threads for the length of the block; ``None`` = as many as now. Sums are rounded by them."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_trainer_of(cfg: DictConfig) -> Callable[..., lightning.Trainer]:
    """The trainer that a config asks for, still without our arguments. Raises ``VitPatchError`` for its keys."""
    check_option(cfg, "trainer", lightning.Trainer)
    if cfg.trainer.get("_partial_") is not True:
        raise VitPatchError(f"trainer._partial_ {cfg.trainer.get('_partial_')!r}: expected true")
    types = get_type_hints(TrainerKeys, include_extras=True)
    check_values("trainer.", {key: cfg.trainer[key] for key in types if key in cfg.trainer}, types)
    return construct(cfg.trainer)


def trainer_of(make_trainer: Callable[..., lightning.Trainer], **arguments: Any) -> lightning.Trainer:
    """A trainer with our arguments beside the config's. Raises ``VitPatchError`` for a device that is not there."""
    try:
        return make_trainer(**arguments)
    except Exception as error:  # Lightning's, of any class: what the user said is not checked before it is used
        raise VitPatchError(f"trainer: {one_line(error)}") from error


def one_device(
    make_trainer: Callable[..., lightning.Trainer], local_rank: int = 0, **arguments: Any
) -> lightning.Trainer:
    """A trainer on one device alone, where the config asks for several the ``local_rank``-th of a machine.

    Of several processes each has one of these: in predicting nothing goes between them, so there is no process group,
    with its time limits and its locks, to wait for.
    """
    plugins = [LightningEnvironment()]  # torchrun's and SLURM's would count all processes
    trainer = trainer_of(make_trainer, plugins=plugins, **arguments)
    if trainer.world_size == 1 and not isinstance(trainer.strategy, ParallelStrategy):
        return trainer
    on_cpu = trainer.strategy.root_device.type == "cpu"
    devices = 1 if on_cpu else [trainer.device_ids[local_rank]]
    return trainer_of(make_trainer, strategy="auto", devices=devices, num_nodes=1, plugins=plugins, **arguments)


@contextmanager
def on_device(
    model: torch.nn.Module, make_trainer: Callable[..., lightning.Trainer], precision: str
) -> Iterator[torch.device]:
    """A model on the trainer's device, at its precision and this rounding of products, for the length of the block."""
    quiet()
    trainer = one_device(make_trainer, **QUIETLY)
    before, device = next(model.parameters()).device, trainer.strategy.root_device
    try:
        model.to(device)
        with matmul_precision(precision), trainer.precision_plugin.predict_step_context():
            yield device
    finally:
        model.to(before)
