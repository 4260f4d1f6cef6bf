"""Lightning's trainer: built from the config, its devices checked, quieter; and the rounding of matrix products."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from vitpatch.checks import Count, Expected, Index, Interval, check_values
from vitpatch.errors import VitPatchError
from vitpatch.formatting import counted, one_line
from vitpatch.runs.config import check_option, construct
from vitpatch.runs.distributed import launched

QUIETLY = {
    "logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False
}  # fmt: skip
"""Arguments of a trainer that only computes."""
STARTS = "torchrun --nnodes=… --nproc-per-node=… patch.py, or srun python patch.py"


class TrainerKeys(TypedDict):
    """The keys of ``conf/trainer``; others are Lightning's to check."""

    accelerator: str
    strategy: str
    devices: Annotated[Count | Literal["auto"] | tuple[Index, ...], Expected("how many, their numbers, or auto")]
    num_nodes: Count
    timeout: Annotated[float, Interval(gt=0, le=1e6)]
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


def trainer_factory(cfg: DictConfig) -> Callable[..., lightning.Trainer]:
    """The trainer that a config asks for, still without our arguments. Raises ``VitPatchError`` for its keys."""
    option = cfg.get("trainer")
    if OmegaConf.is_dict(option):
        option = OmegaConf.masked_copy(option, [key for key in option if key != "timeout"])
    check_option({"trainer": option}, "trainer", lightning.Trainer)
    if cfg.trainer.get("_partial_") is not True:
        raise VitPatchError(f"trainer._partial_ {cfg.trainer.get('_partial_')!r}: expected true")
    types = get_type_hints(TrainerKeys, include_extras=True)
    check_values("trainer.", {key: cfg.trainer[key] for key in types if key in cfg.trainer}, types)
    return construct(option)


class StartedProcesses(LightningEnvironment):
    """Processes that ``vitpatch.runs.distributed`` starts: Lightning starts none."""

    creates_processes_externally = True


def build_trainer(make_trainer: Callable[..., lightning.Trainer], **arguments: Any) -> lightning.Trainer:
    """A trainer by the config and our ``arguments``. Raises ``VitPatchError`` for devices that it cannot use.

    Several processes need the strategy ``ddp``.
    """
    quiet()
    environment = StartedProcesses()
    if launched() is not None:
        by_torchrun = TorchElasticEnvironment.detect()
        environment = TorchElasticEnvironment() if by_torchrun else SLURMEnvironment(auto_requeue=False)
    try:
        trainer = make_trainer(**{"plugins": [environment], "use_distributed_sampler": False} | arguments)
    except Exception as error:  # Lightning's, of any class: what the user said is not checked before it is used
        raise VitPatchError(f"trainer: {one_line(error)}") from error
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        kind = type(trainer.strategy).__name__
        raise VitPatchError(f"trainer: {trainer.world_size} processes by {kind}; several devices: trainer=ddp")
    return trainer


def check_processes(trainer: lightning.Trainer) -> None:
    """Raises ``VitPatchError`` where a launcher did not start as many processes as the trainer has devices."""
    nodes, local = trainer.num_nodes, trainer.num_devices
    _, size = launched() or (0, 0)
    if not size and nodes > 1:
        raise VitPatchError(f"trainer.num_nodes {nodes}: every machine's processes are started by {STARTS}")
    if size not in (0, nodes * local):
        raise VitPatchError(
            f"trainer: {counted(nodes, 'machine')} with {counted(local, 'device')} each, but {size} processes "
            f"were started; use trainer=ddp with trainer.devices × trainer.num_nodes = {size}"
        )


@contextmanager
def on_device(model: torch.nn.Module, trainer: lightning.Trainer, precision: str) -> Iterator[torch.device]:
    """A model on the trainer's device, at its precision and this rounding of products, for the length of the block."""
    before, device = next(model.parameters()).device, trainer.strategy.root_device
    try:
        model.to(device)
        with matmul_precision(precision), trainer.precision_plugin.predict_step_context():
            yield device
    finally:
        model.to(before)
