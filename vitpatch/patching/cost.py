"""What a plan costs on a model: floating-point operations, bytes, and how many images fit into memory at once.

Free memory is a GPU's, or the machine's within the limits of the process's control groups (containers, SLURM jobs).
psutil knows no control groups: it reports the whole machine's. Page cache counts as used in a control group, but the
kernel gives it back when memory is needed, so it is counted as free here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from vitpatch.checks import Positive, check
from vitpatch.errors import VitPatchError
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.plan import RECIPIENT, Plan
from vitpatch.types import Site

GB = 1e9
MARGIN = 0.8
"""The share of the free memory that is used where ``memory_gb`` is not given."""
LIBRARIES = 30_000_000
"""Bytes that torch and its kernels take for themselves once a model runs."""
KEPT = 2
"""A call's memory is taken this many times: an allocator does not give all of it back between calls."""
TOKENS_A_CALL = {"cpu": 4096, "other": 131072}
"""More in one call is not faster."""
NOT_LINUX = 4e9
"""Bytes assumed to be free where the system has no ``/proc/meminfo``."""


@dataclass(frozen=True)
class ComputeLimits:
    """How much is computed at once: ``images`` go through the network together, at most ``rows`` in one call.

    A row is an image in one state; ``rows`` ≥ ``images``. ``bytes`` is what that takes at most.
    """

    images: int
    rows: int
    bytes: int = 0


@dataclass(frozen=True)
class Cost:
    """What a plan costs on a model, an image; FLOPs are of matrix products, multiply and add counted as two.

    ``full_flops``: the same with a full forward pass a patch. Memory: ``image_bytes`` of an image and its states while
    they are computed, ``row_bytes`` of one row inside a call, ``batch_bytes`` of one image of a batch that waits.
    """

    flops: float
    full_flops: float
    block_evaluations: int
    image_bytes: int
    row_bytes: int
    batch_bytes: int

    def limits(
        self,
        batch: int,
        limit: float,
        tokens: int,
        device: torch.device,
        waiting: int | None = None,
        before: tuple[int, int] | None = None,
    ) -> ComputeLimits:
        """How much of a batch to compute at once: what fits ``limit`` bytes, and no more than makes a call faster.

        ``waiting``: how many of its images stay in memory meanwhile (default: all). ``before``: the (images, rows) that
        the run began with, kept where they still fit. Raises ``VitPatchError`` where one image does not fit.
        """
        waiting = batch if waiting is None else waiting

        def taken(images: int, rows: int) -> int:
            return LIBRARIES + waiting * self.batch_bytes + images * self.image_bytes + rows * self.row_bytes

        if taken(1, 1) > limit:
            least = f"{math.ceil(taken(1, 1) / GB * 1000) / 1000:.3f} GB"
            wait, smaller = (f" and {waiting} that wait", "a smaller batch_size, ") if waiting else ("", "")
            raise VitPatchError(
                f"memory_gb {limit / GB:.3g}: one image of this plan{wait} need{'s' * (not waiting)} {least}; "
                f"give as much, {smaller}or fewer layers, heads or tokens at once"
            )
        if before is not None and taken(*before) <= limit:
            return ComputeLimits(*before, taken(*before))
        most = max(1, TOKENS_A_CALL["cpu" if device.type == "cpu" else "other"] // tokens)
        images = max(n for n in range(1, min(batch, most) + 1) if n == 1 or taken(n, n) <= limit)
        images = math.ceil(batch / math.ceil(batch / images))  # parts of a batch of one size
        rows = max(n for n in range(images, most + 1) if n == images or taken(images, n) <= limit)
        return ComputeLimits(images, rows, taken(images, rows))


def estimate_cost(plan: Plan, model: PatchableViT, partners: int = 0) -> Cost:
    """FLOPs and bytes of a plan on a model, from their sizes; ``partners`` more images wait with each."""
    sizes, width = plan.sizes, model.width
    tokens, reads = sizes.tokens, sizes.reads
    attention = 8 * tokens * width**2 + 4 * tokens**2 * width
    read_attention = 4 * (tokens + reads) * width**2 + 4 * reads * tokens * width
    mlp = 2 * sum(weight.numel() for weight in _mlp_weights(model))  # a token
    embedding = 2 * width * 3 * model.input_size[0] * model.input_size[1]
    block = attention + tokens * mlp
    flops = len(plan.base_runs) * (embedding + sizes.depth * block)
    for number, half in enumerate(plan.halves):
        last = number >= 2 * (sizes.depth - 1)
        if number % 2:
            flops += half.evaluations * mlp * (reads if last else tokens)
        else:
            flops += half.evaluations * (read_attention if last else attention)
            flops += _edits(plan, half.steps, width)
    full = (len(plan.base_runs) + len(plan.runs)) * (embedding + sizes.depth * block)
    if not model.runs_by_parts(plan.target.site):
        return Cost(full, full, plan.full_evaluations, *_bytes(plan, model, partners))
    return Cost(flops, full, plan.block_evaluations, *_bytes(plan, model, partners))


def _mlp_weights(model: PatchableViT) -> list[torch.Tensor]:
    return [weight for weight in model.blocks[0].mlp_parameters() if weight.dim() == 2]


def _edits(plan: Plan, steps: tuple, width: int) -> float:
    """FLOPs of edits of the recipient's heads: their attention again, and their part of the projection."""
    sizes, total = plan.sizes, 0.0
    for branch in (b for step in steps if step.state == RECIPIENT for b in step.branches):
        if branch.edit.site.by_head:
            channels = width if branch.edit.head < 0 else width // sizes.heads
            again = 0 if branch.edit.site is Site.Z else 4 * sizes.tokens**2 * channels
            total += again + 2 * sizes.tokens * channels * width
    return total


def _bytes(plan: Plan, model: PatchableViT, partners: int) -> tuple[int, int, int]:
    """``image_bytes``, ``row_bytes`` and ``batch_bytes`` of ``Cost``: upper bounds."""
    sizes, width, size = plan.sizes, model.width, torch.finfo(model.dtype).bits // 8
    stream = sizes.tokens * width * size
    read = sizes.reads * width
    pixels = 3 * model.input_size[0] * model.input_size[1] * 4
    runs = len(plan.base_runs)
    image = runs * pixels + plan.whole * stream
    image += 5 * runs * stream  # base runs before a half, what it adds, after it; and what is put together of them
    image += plan.states * read * size + 4 * len(plan.patches) * width * 4 + 6 * read * 4
    image += 2 * sum(len(plan.tokens_changed(comparison)) for comparison in plan.comparisons) * width * 4
    image += 2 * (len(plan.patches) + len(plan.runs)) * model.classes * 4 + len(plan.token_groups) * sizes.tokens
    if plan.target.site.by_head:
        image += 6 * runs * stream
    if not model.runs_by_parts(plan.target.site):  # the values of all base runs, of all layers
        image += runs * len(plan.places) * stream
    if plan.target.site is Site.PATTERN:
        image += 3 * runs * sizes.heads * sizes.tokens**2 * size
    elif plan.target.site in (Site.Q, Site.K):
        image += stream
    inside_mlp = max((max(weight.shape) for weight in _mlp_weights(model)), default=width)  # channels
    row = max(8 * stream, 3 * stream + 2 * sizes.tokens * inside_mlp * size)
    row += sizes.heads * sizes.tokens**2 * size * model.has_bias  # a bias may keep attention from going in parts
    return image, KEPT * row, (5 + 3 * partners) * pixels


def memory_limit(memory_gb: float | None, device: torch.device) -> float:
    """Bytes that may be used: ``memory_gb``, or without it what is free less a margin."""
    if memory_gb is None:
        return MARGIN * free_bytes(device)
    return check("memory_gb", memory_gb, Annotated[Positive | None, "for what is free"]) * GB


def describe_cost(plan: Plan, cost: Cost, limits: ComputeLimits) -> str:
    """The plan and its cost in one line."""
    share = cost.flops / cost.full_flops
    controls = f" of {len(plan.donors)} donors" if len(plan.donors) > 1 else ""
    also = f" and {len(plan.leave_outs)} of windows without a layer" if plan.leave_outs else ""
    return (
        f"{len(plan.patches)} patches{controls}{also} by {cost.block_evaluations} block evaluations an image "
        f"({plan.full_evaluations} by full forwards), {_flops(cost.flops)} an image ({share:.0%} of full forwards), "
        f"up to {limits.bytes / GB:.2g} GB ({limits.images} image{'s' * (limits.images > 1)} at once)"
    )


def _flops(flops: float) -> str:
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} MFLOP"


def free_bytes(device: torch.device) -> float:
    """What a device has free: of the GPU's memory, or of the machine's within the limits of its control groups."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(available(), left_in_groups())


def available(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes of the machine's that can be had without swapping, as the kernel estimates."""
    kilobytes = re.search(r"^MemAvailable: +(\d+) kB", _text(meminfo), re.MULTILINE)
    return float(kilobytes[1]) * 1024 if kilobytes else NOT_LINUX


CACHE = ("inactive_file", "active_file", "file_mapped")
CONTROL_GROUPS = (
    ("", ".", ("memory.max", "memory.high"), "memory.current", CACHE),
    (
        *("memory", "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes"),
        ("total_inactive_file", "total_active_file", "total_mapped_file"),
    ),
)
"""Of versions 2 and 1 of control groups: the controller's name in ``/proc/self/cgroup`` and the folder of its groups; a
group's files of limits and of use; keys of its ``memory.stat``, over all below it: page cache that is not in use, that
is, and that processes have mapped."""


def left_in_groups(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the tightest limit leaves, of the process's control group and all above it; infinite without one.

    In a container the top may be the process's own group, whatever its name is outside. What cannot be read sets no
    limit.
    """
    lines = [line.split(":", 2) for line in _text(process).splitlines() if line.count(":") >= 2]
    left = []
    for controller, folder, *names in CONTROL_GROUPS:
        own = next((path for _, controllers, path in lines if controller in controllers.split(",")), "/")
        group = Path(own.lstrip("/"))
        groups = {Path()} if ".." in group.parts else {Path(), group, *group.parents}
        left += [_left_in_group(root / folder / each, *names) for each in groups]
    return max(0.0, min(left))


def _left_in_group(group: Path, limits: tuple[str, ...], used: str, cache: tuple[str, ...]) -> float:
    """What a group's limit leaves: limit − used, page cache that nobody has mapped not counted as used."""
    stat = dict(re.findall(r"^(\w+) (\d+)$", _text(group / "memory.stat"), re.MULTILINE))
    limit = min(
        _number(text) for text in (stat.get("hierarchical_memory_limit"), *(_text(group / of) for of in limits))
    )
    taken = _number(_text(group / used))
    if math.isinf(taken):
        return math.inf
    inactive, active, mapped = (float(stat.get(key, 0)) for key in cache)
    return limit - max(0.0, taken - max(inactive, inactive + active - mapped))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


def _number(text: str | None) -> float:
    """Bytes; infinite where a file says ``max``, is not there, or says something else."""
    return float(text) if text and text.strip().isdigit() else math.inf
