"""What the benchmarks share: models, alternating timings, tables, JSON."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the package is not installed

import torch
import transformers

from vitpatch.models.families import FAMILIES
from vitpatch.models.vit import PatchableViT
from vitpatch.types import BaseRun

RESULTS = Path(__file__).parent / "results"


def vit_b16(size: int, classes: int = 10, **config: Any) -> PatchableViT:
    """A ViT-B/16 classifier with random weights (seed 0) for ``size`` pixels, its effects large enough to compare."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=size, num_labels=classes, **config)
    )
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    return PatchableViT(model.eval(), FAMILIES["vit"])


def synchronize(device: torch.device) -> Callable[[], None]:
    """What waits until a device is done."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def pixels(images: int, size: int, device: torch.device | str = "cpu") -> dict[BaseRun, torch.Tensor]:
    """Normal draws (seed 1) and their gray: what a clean and a corrupted image are here."""
    clean = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    return {BaseRun.CLEAN: clean, BaseRun.CORRUPT: clean.mean(1, keepdim=True).expand_as(clean).contiguous()}


def in_turn(sides: Mapping[str, Callable[[], Any]], repeats: int, sync: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of each side, alternating, after one turn that is not counted: {side: [seconds]}."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            sync()
            started = time.perf_counter()
            side()
            sync()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def about() -> dict[str, Any]:
    """What a table must say of where it was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.machine()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, columns in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_shown(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(name: str, rows: Sequence[Mapping[str, Any]], output: Path, **more: Any) -> None:
    """Prints the table and writes it as JSON, with where it was measured."""
    print(f"{name}: {about()}\n\n{table(rows)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"benchmark": name, **about(), **more, "rows": list(rows)}, indent=2) + "\n")
