"""How do time and peak memory grow with images, layers, patches and tokens?

    python benchmarks/scaling.py                     # CPU; each case in a process of its own, for its peak memory

``peak`` is what a case takes beyond model and libraries, ``budget`` what it was given (``memory_gb``), ``planned`` what
the engine meant to take: on a CPU resident memory, looked at every 5 ms, on a GPU torch's own count. Only the first
images are kept: the others are drawn batch by batch, as a data loader does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

BASE = {"images": 32, "layers": 12, "size": 96, "width": 192, "tokens": "all", "windows": [1], "memory_gb": 0.3}
CASES: list[dict[str, Any]] = [
    *({"images": n} for n in (10, 100, 1000, 10000)),
    *({"layers": n} for n in (6, 24)),
    *({"windows": windows} for windows in ([3], [1, 3, 5])),
    *({"tokens": tokens} for tokens in ("cls", "each")),
    *({"size": size} for size in (32, 224)),
    *({"memory_gb": gb, "size": 224} for gb in (0.15, 0.6)),
]
BATCH = 32


@contextmanager
def peak_of_process(found: dict[str, float], device: Any) -> Iterator[None]:
    """The most memory taken inside the block beyond what there was before, in bytes."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found["peak"] = torch.cuda.max_memory_allocated() - before
        return
    done, before = threading.Event(), resident()
    found["peak"] = 0.0

    def watch() -> None:
        while not done.is_set():
            found["peak"] = max(found["peak"], resident() - before)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def resident() -> float:
    """Resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096.0


def run(options: dict[str, Any], device_name: str) -> dict[str, Any]:
    """One case, in this process."""
    import torch
    from measure import pixels, vit_b16

    from vitpatch.patching.cost import estimate_cost
    from vitpatch.patching.executor import execute, token_masks
    from vitpatch.patching.plan import make_plan
    from vitpatch.types import BaseRun, Direction, Site, Target, TokenGroup

    device = torch.device(device_name)
    shape = {"hidden_size": options["width"], "num_attention_heads": 3, "intermediate_size": 4 * options["width"]}
    model = vit_b16(options["size"], num_hidden_layers=options["layers"], **shape).to(device)
    target = Target(Site.ATTN_OUT, tokens=(TokenGroup(options["tokens"]),))
    plan = make_plan(target, tuple(options["windows"]), Direction.DENOISE, model.sizes)
    cost, batch, found = estimate_cost(plan, model), min(BATCH, options["images"]), {}
    limits = cost.limits(batch, options["memory_gb"] * 1e9, plan.sizes.tokens, device)
    model(pixels(2, options["size"], device)[BaseRun.CLEAN])  # loads the libraries' kernels
    started = time.perf_counter()
    with torch.no_grad(), peak_of_process(found, device):
        for first in range(0, options["images"], batch):
            images = pixels(min(batch, options["images"] - first), options["size"], device)
            masks = token_masks(plan.token_groups, plan.sizes, None, None, range(len(images[BaseRun.CLEAN])), 0)
            for start in range(0, len(images[BaseRun.CLEAN]), limits.images):
                here = slice(start, start + limits.images)
                execute(plan, model, {name: x[here] for name, x in images.items()}, masks[:, here], limits).cpu()
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {
        **options,
        "patches": len(plan.patches),
        "ms an image": 1000 * seconds / options["images"],
        "GFLOP an image": cost.flops / 1e9,
        "images at once": limits.images,
        "planned, GB": limits.bytes / 1e9,
        "peak, GB": found["peak"] / 1e9,
        "peak ÷ budget": found["peak"] / 1e9 / options["memory_gb"],
    }


def main() -> None:
    """Runs every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON; default results/scaling_DEVICE.json beside this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(json.loads(options.case), options.device)))
        return
    rows = []
    for change in CASES:
        command = [sys.executable, __file__, "--device", options.device, "--case", json.dumps(BASE | change)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            rows.append({**BASE, **change, "ms an image": last[:120]})
        else:
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr, flush=True)
    from measure import RESULTS, report

    report("scaling", rows, options.output or RESULTS / f"scaling_{options.device}.json")


if __name__ == "__main__":
    main()
