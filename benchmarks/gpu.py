"""How fast is a study on a GPU, in float32, TF32 and bf16, and what does lower precision cost?

    python benchmarks/gpu.py

Needs torch and transformers only. The study is ViT-B/16 at 224 pixels (random weights), 1000 images, attn_out of
windows 1 and 3. ``share of matmul`` is the rate of the engine's matrix products over that of one large product in the
same precision on the same card; ``largest difference`` is of the effects from float32. Then come the cases of
``engine.py`` on the card; ``scaling.py --device cuda`` has the memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from engine import CLEAN, case, engine, plan_of
from measure import RESULTS, pixels, report, synchronize, table, vit_b16

from vitpatch.models.vit import PatchableViT
from vitpatch.patching.cost import estimate_cost

PRECISIONS = ("float32", "tf32", "bf16")
BATCH = 250


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Matrix products in float32, in TF32, or under autocast to bfloat16."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOP a second of one large matrix product, in the precision that is set."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 / fastest(lambda: a @ b, device)


def fastest(act: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """The median of some runs after one that is not counted, in seconds."""
    sync, seconds = synchronize(device), []
    for turn in range(times + 1):
        sync()
        started = time.perf_counter()
        act()
        sync()
        if turn:
            seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]


def study(model: PatchableViT, window: int, images: int, repeats: int, size: int) -> list[dict[str, Any]]:
    """A row a precision."""
    device, plan = model.device, plan_of(model, "attn_out", (window,))
    batch = pixels(min(BATCH, images), size, device)
    batches = -(-images // BATCH)
    run, flops = engine(plan, model, batch), estimate_cost(plan, model).flops
    with precision("float32", device):
        label = model(batch[CLEAN]).argmax(-1)[None, :, None].expand(len(plan.patches), -1, 1)
        exact = run().softmax(-1).gather(-1, label)
    rows = []
    for name in PRECISIONS:
        with precision(name, device):
            effects = run().float().softmax(-1).gather(-1, label)
            seconds = fastest(lambda: [run() for _ in range(batches)], device, repeats)
            rate = flops * len(batch[CLEAN]) * batches / seconds
            rows.append(
                {
                    "window": window,
                    "precision": name,
                    "images": len(batch[CLEAN]) * batches,
                    "seconds": seconds,
                    "images a second": len(batch[CLEAN]) * batches / seconds,
                    "TFLOP/s": rate / 1e12,
                    "share of matmul": rate / matmul_rate(device, 8192 if device.type == "cuda" else 1024),
                    "largest difference": float((effects - exact).abs().max()),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """The study in all precisions, then the engine's cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--engine-images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU here; --device cpu --images 4 --size 96 tries the program out")
    model = vit_b16(options.size).to(options.device)
    with torch.no_grad():
        rows = [row for w in (1, 3) for row in study(model, w, options.images, options.repeats, options.size)]
        cases = [
            case(model, "attn_out", windows, options.engine_images, options.repeats)
            for windows in ((1,), (3,), (5,), (1, 3, 5))
        ]
        cases.append(case(model, "z", (1,), max(1, options.engine_images // 8), options.repeats))
    print(table(rows), end="\n\n")
    report("gpu", cases, options.output, study=rows)


if __name__ == "__main__":
    main()
