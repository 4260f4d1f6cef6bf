"""How much memory is free: of a GPU, or of the machine within the limits of the control groups that a process is in.

Linux' page cache counts as used in a control group, but is given back when memory is asked for: files that were read
would otherwise fill a container. What psutil calls available is the machine's, whatever the group's limit is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

NOT_LINUX = 4e9
"""Bytes that are taken for free where nothing says how many are."""


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
    if not meminfo.exists():
        return NOT_LINUX
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return float(lines["MemAvailable"].split()[0]) * 1024


@dataclass(frozen=True)
class Version:
    """Where a version of control groups has its files, and how it calls what is in them.

    ``mount`` below the root; ``controller`` as ``/proc/self/cgroup`` has it; in ``memory.stat`` keys begin with
    ``prefix``, which are of the group and all below it, and ``mapped`` is page cache that processes have mapped.
    """

    mount: str
    controller: str
    limits: tuple[str, ...]
    used: str
    prefix: str
    mapped: str


VERSIONS = (
    Version(".", "", ("memory.max", "memory.high"), "memory.current", "", "file_mapped"),
    Version("memory", "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_", "mapped_file"),
)


def left_in_groups(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the tightest limit leaves, of the process's control group and all above it; infinite without one.

    Both versions of control groups. What cannot be read sets no limit.
    """
    left = [_left(folder, version) for version in VERSIONS for folder in _groups(process, root, version)]
    return max(0.0, min(left, default=math.inf))


def _groups(process: Path, root: Path, version: Version) -> Iterator[Path]:
    """The folders of the process's group and those above it, as far as they are there.

    In a container the mount's top may be the process's own group, whatever its name is outside.
    """
    top = root / version.mount
    named = (line.split(":", 2) for line in _text(process).splitlines() if line.count(":") >= 2)
    paths = [path for _, controllers, path in named if version.controller in controllers.split(",")]
    below = Path(paths[0].lstrip("/")) if paths else Path()
    if ".." not in below.parts:
        yield from (top / part for part in (below, *below.parents) if part != Path())
    yield top


def _left(folder: Path, version: Version) -> float:
    """What a group's limit leaves: limit − used, page cache that nobody has mapped not counted as used."""
    stat = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    limits = [_number(_text(folder / name)) for name in version.limits]
    limits.append(_number(stat.get("hierarchical_memory_limit", "")))  # of version 1: the tightest of those above
    used = _number(_text(folder / version.used))
    if math.isinf(used):
        return math.inf
    inactive, active, mapped = (
        _number(stat.get(f"{version.prefix}{name}", ""), otherwise=0.0)
        for name in ("inactive_file", "active_file", version.mapped)
    )
    cache = max(inactive, inactive + active - mapped)
    return min(limits) - max(0.0, used - cache)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


def _number(text: str, otherwise: float = math.inf) -> float:
    """Bytes; ``otherwise`` where a file says ``max``, is not there, or says something else."""
    try:
        return float(int(text))
    except ValueError:
        return otherwise
