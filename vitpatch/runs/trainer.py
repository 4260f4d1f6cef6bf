"""Lightning's trainer, and the processes of a run: how they start, what they exchange, how a signal ends them.

Rank 0 runs the command. The others only assist it (``vitpatch.runs.predict.assist``): they compose no config, and write
nothing but shards. So Lightning's ``ddp`` gives each its device, but its launcher is not used: that would run the
command again, of a sweep all of it, and kill the run without a reason where a process dies.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypedDict, get_type_hints

import lightning
import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from vitpatch.checks import Count, Expected, Index, Interval, check_values
from vitpatch.errors import SIGNALS, Interrupted, VitPatchError
from vitpatch.formatting import format_count, one_line
from vitpatch.runs.config import check_option, construct, launched

log = logging.getLogger(__name__)

QUIETLY = {
    "logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False
}  # fmt: skip
"""Arguments of a trainer that only computes."""
SAME_SIGNAL_S = 2.0
"""Signals so near each other are one: a terminal and the launcher of several processes both pass CTRL-C on."""
START_TIMEOUT = timedelta(minutes=5)
"""Until all processes that were started must be there."""
NO_TIMEOUT = timedelta(days=100)
"""For those who wait until rank 0 begins a run; that it has died they notice without a time limit."""
EXIT_S = 10.0
"""What another process has to exit, once its work is done or its connection was closed."""
STOP = "stop"
"""The problem of a process that was asked to stop."""


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
    for message in (".*does not have many workers", ".*LeafSpec", ".*have no `val_dataloader`"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # we resume from it


@contextmanager
def use_matmul_precision(precision: str) -> Iterator[None]:
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
def use_threads(number: int | None) -> Iterator[None]:
    """Computes by so many threads for the length of the block; ``None`` = as many as now. Sums are rounded by them."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trainer_factory(cfg: DictConfig) -> Callable[..., lightning.Trainer]:
    """What makes the trainer that a config asks for, given our arguments. Raises ``VitPatchError`` for its keys."""
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
    """Processes that ``processes`` starts: Lightning starts none."""

    creates_processes_externally = True


def _find_environment() -> ClusterEnvironment:
    """Who started the processes: torchrun, SLURM, or we."""
    if launched() is None:
        return StartedProcesses()
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment(auto_requeue=False)


def build_trainer(make_trainer: Callable[..., lightning.Trainer], **arguments: Any) -> lightning.Trainer:
    """The trainer with our ``arguments``. Raises ``VitPatchError`` for devices that it cannot use.

    Several processes need the strategy ``ddp``.
    """
    quiet()
    try:
        trainer = make_trainer(**{"plugins": [_find_environment()], "use_distributed_sampler": False} | arguments)
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
        raise VitPatchError(
            f"trainer.num_nodes {nodes}: every machine's processes are started by torchrun --nnodes=… "
            "--nproc-per-node=… patch.py, or srun python patch.py"
        )
    if size not in (0, nodes * local):
        raise VitPatchError(
            f"trainer: {format_count(nodes, 'machine')} with {format_count(local, 'device')} each, but {size} "
            f"processes were started; use trainer=ddp with trainer.devices × trainer.num_nodes = {size}"
        )


@contextmanager
def on_device(model: torch.nn.Module, trainer: lightning.Trainer, precision: str) -> Iterator[torch.device]:
    """A model on the trainer's device, at its precision and this rounding of products, for the length of the block."""
    before, device = next(model.parameters()).device, trainer.strategy.root_device
    try:
        model.to(device)
        with use_matmul_precision(precision), trainer.precision_plugin.predict_step_context():
            yield device
    finally:
        model.to(before)


class SharedFailure(VitPatchError):
    """A failure that all processes of the run know of."""


class ProcessLost(SharedFailure):
    """A process of the run is gone, or does not answer."""


class StopAfterBatch:
    """In a ``with`` block the first of ``SIGNALS`` only sets ``asked``; a second one is a ``KeyboardInterrupt``.

    ``announce``: the first is answered by a line. Outside the main thread, where signals do not arrive, nothing is
    changed.
    """

    def __init__(self, announce: bool = False) -> None:
        self.asked, self._announce, self._until = False, announce, 0.0

    def install(self) -> None:
        """Handles the signals, also after Lightning has put a handler of its own in place, which would broadcast."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.asked and time.monotonic() >= self._until:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._until = True, time.monotonic() + (SAME_SIGNAL_S if launched() else 0.0)
            if self._announce:
                log.warning("stopping after this batch; CTRL-C again stops at once")

    def __enter__(self) -> StopAfterBatch:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)


@dataclass
class Group:
    """The processes of a run, as the one with this ``rank``, from 0, of ``size`` sees them; it started ``children``.

    All that is exchanged goes through ``share``, so a process that fails is never waited for in another call.
    """

    rank: int = 0
    size: int = 1
    children: Sequence[subprocess.Popen] = ()
    _channel: Any = None

    def begin(self, order: Any = None, timeout_s: float = 0.0) -> Any:
        """The ``order`` that rank 0 gives, for which the others wait without a limit; from then on ``timeout_s``."""
        if self.size == 1:
            return order
        before, self._channel = self._channel, None
        if before is not None:
            torch.distributed.destroy_process_group(before)
        order, timeout_s = self.share((order, timeout_s))
        self._channel = torch.distributed.new_group(timeout=timedelta(seconds=timeout_s))
        return order

    def share(self, value: Any = None, problem: str | None = None) -> Any:
        """The ``value`` that rank 0 gives, once all processes have called this.

        Where one of them gives a ``problem``, all raise: ``Interrupted`` for ``STOP``, else ``SharedFailure`` with the
        problem as its text. Raises ``ProcessLost`` where a process is gone.
        """
        shared = [(value, problem)] * self.size
        if self.size > 1:
            try:
                torch.distributed.all_gather_object(shared, (value, problem), self._channel)
            except RuntimeError as error:
                self.raise_lost(error)
        problems = [problem for _, problem in shared if problem is not None]
        if reasons := [problem for problem in problems if problem != STOP]:
            raise SharedFailure(reasons[0])
        if problems:
            raise Interrupted
        return shared[0][0]

    def part(self, numbers: Sequence[int]) -> Sequence[int]:
        """This process's share of the batches: every ``size``-th."""
        return numbers[self.rank :: self.size]

    @contextmanager
    def sharing_failures(self) -> Iterator[None]:
        """An error that is raised in the block is raised in the other processes too, at their next ``share``.

        A second CTRL-C is not shared: it ends this process, and the others because the connection is closed.
        """
        try:
            yield
        except (Interrupted, SharedFailure):
            raise
        except Exception as error:
            is_bug = self.rank > 0 and not isinstance(error, VitPatchError | OSError)
            reason = one_line(error, 500)
            if is_bug:
                reason = f"process {self.rank}: {type(error).__name__}: {reason} (a bug in vitpatch; please report it)"
            try:
                self.share(problem=reason)
            except ProcessLost:
                if isinstance(error, RuntimeError):  # of a call of Lightning's, from which that process is missing
                    raise
            except (Interrupted, SharedFailure):
                if is_bug:
                    traceback.print_exception(error)
            raise

    def raise_lost(self, error: RuntimeError | None = None) -> NoReturn:
        """Raises ``ProcessLost`` that says which, and how it ended where that is known."""
        until = time.monotonic() + EXIT_S / 2
        while self.children and not any(child.poll() for child in self.children) and time.monotonic() < until:
            time.sleep(0.1)
        ended = {child.poll(): rank for rank, child in enumerate(self.children, 1) if child.poll()}
        reason = f"a process is gone, or hangs (trainer.timeout): {one_line(error, 200)}"
        if ended:
            code = min(ended)  # of a killed one, which the others followed
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            reason = f"process {ended[code]} of {self.size} {how} before its batches were done"
        raise ProcessLost(reason) from error


@contextmanager
def processes(size: int, threads: int | None, stop: StopAfterBatch) -> Iterator[Group]:
    """The group of ``size`` processes with this one as rank 0; the others are a launcher's, or started here.

    Those that are started here compute by ``threads`` each, and have ended at the end of the block.
    """
    if size > 1 and launched() is not None:
        yield launched_group()
        return
    children, grace_s = [], 0.0
    try:
        if size == 1:
            yield Group()
            return
        store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=START_TIMEOUT
        )
        for rank in range(1, size):
            children.append(_start(rank, size, store.port, threads))
        while store.add("arrived", 0) < size - 1:
            if stop.asked:
                raise Interrupted
            if any(child.poll() is not None for child in children):
                Group(0, size, children).raise_lost()
            time.sleep(0.1)
        group, grace_s = _connect(store, 0, size, children), EXIT_S
        yield group
    except (KeyboardInterrupt, SystemExit):
        grace_s = 0.0
        raise
    finally:
        if torch.distributed.is_initialized():  # which Lightning does for one process
            torch.distributed.destroy_process_group()
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(grace_s)
            child.kill()
            child.wait()


def _start(rank: int, size: int, port: int, threads: int | None) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path),
        "LOCAL_RANK": str(rank),
    }
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    code = f"from vitpatch.runs import predict, trainer; predict.assist(trainer.join({rank}, {size}, {port}))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it can handle them
    try:
        return subprocess.Popen([sys.executable, "-P", "-c", code], env=environment, stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def join(rank: int, size: int, port: int) -> Group:
    """Joins the group of the process of this machine that started this one."""
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=START_TIMEOUT)
    store.add("arrived", 1)
    return _connect(store, rank, size)


def _connect(store: torch.distributed.Store, rank: int, size: int, children: Sequence[subprocess.Popen] = ()) -> Group:
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=NO_TIMEOUT)
    return Group(rank, size, children)


@cache
def launched_group() -> Group:
    """The processes that a launcher started with this one; waits until all are there."""
    rank, size = launched()
    try:
        environment = _find_environment()
        os.environ |= {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
        url = f"env://?rank={rank}&world_size={size}"
        store, _, _ = next(torch.distributed.rendezvous(url, timeout=START_TIMEOUT))
    except (RuntimeError, ValueError) as error:
        reason = one_line(error, 200)
        raise VitPatchError(f"process {rank} of {size} did not meet the others: {reason}") from error
    return _connect(store, rank, size)
