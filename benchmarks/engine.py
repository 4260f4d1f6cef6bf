"""How much faster is the engine than full forward passes, and is it right?

    python benchmarks/engine.py --size 224            # ViT-B/16, random weights, float32, CPU, 2 threads

Four ways, on the same model, images and threads, in turn:

- ``ours``: the engine;
- ``batched``: one full forward pass with hooks a patch, over the whole batch: what effects are compared with;
- ``per image``: the loop of published scripts: image by image, layer by layer, clean and corrupted in a batch of two;
- ``plain``: forward passes without hooks, for the rate of matrix products that the machine gives this model.

Rows of blocks are counted at the modules and compared with the plan.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from measure import RESULTS, in_turn, medians, pixels, report, synchronize, vit_b16

from vitpatch.models.vit import PatchableViT
from vitpatch.patching.cost import estimate_cost, memory_limit
from vitpatch.patching.executor import execute, token_masks
from vitpatch.patching.plan import Plan, make_plan
from vitpatch.types import BaseRun, Direction, Site, Target

CLEAN, CORRUPT = BaseRun.CLEAN, BaseRun.CORRUPT
CASES = {
    "1": ("attn_out", (1,)),
    "3": ("attn_out", (3,)),
    "5": ("attn_out", (5,)),
    "1,3,5": ("attn_out", (1, 3, 5)),
    "by head": ("z", (1,)),
}


def plan_of(model: PatchableViT, site: str, windows: tuple[int, ...]) -> Plan:
    """All layers of a site, by head where it has heads."""
    target = Target(Site(site), heads="all" if Site(site).by_head else None)
    return make_plan(target, windows, Direction.DENOISE, model.sizes)


def engine(plan: Plan, model: PatchableViT, images: dict[BaseRun, Tensor]) -> Callable[[], Tensor]:
    """A run of the engine → logits (patches, images, classes)."""
    number = len(images[CLEAN])
    masks = token_masks(plan.token_groups, plan.sizes, None, None, range(number), 0)
    device = images[CLEAN].device
    limits = estimate_cost(plan, model).limits(number, memory_limit(None, device), plan.sizes.tokens, device)

    def run() -> Tensor:
        parts = []
        for first in range(0, number, limits.images):
            here = slice(first, first + limits.images)
            part = {name: x[here] for name, x in images.items()}
            parts.append(execute(plan, model, part, masks[:, here], limits).patched)
        return torch.cat(parts, 1)

    return run


@contextmanager
def hooks(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Removes hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_of(model: PatchableViT, layer: int) -> torch.nn.Module:
    """The attention of a layer."""
    return model.model.vit.layers[layer].attention


@torch.no_grad()
def batched(plan: Plan, model: PatchableViT, images: dict[BaseRun, Tensor]) -> Tensor:
    """Every patch a full forward pass of the batch; the clean values are kept once."""
    values: dict[int, Tensor] = {}
    by_head = plan.target.site is Site.Z

    def keep(layer: int) -> Callable:
        if by_head:
            return lambda module, args: values.__setitem__(layer, args[0])
        return lambda module, args, output: values.__setitem__(layer, output[0])

    def put(layer: int, head: int) -> Callable:
        def z(module: torch.nn.Module, args: tuple) -> tuple:
            new = args[0].clone()
            width = new.shape[-1] // plan.sizes.heads
            at = slice(head * width, (head + 1) * width)
            new[..., at] = values[layer][..., at]
            return (new,)

        return z if by_head else lambda module, args, output: (values[layer], *output[1:])

    def hook(layer: int, act: Callable) -> torch.utils.hooks.RemovableHandle:
        part = part_of(model, layer)
        return part.o_proj.register_forward_pre_hook(act) if by_head else part.register_forward_hook(act)

    with hooks(*(hook(layer, keep(layer)) for layer in range(plan.sizes.depth))):
        model(images[CLEAN])
    model(images[CORRUPT])
    patched = []
    for patch in plan.patches:
        with hooks(*(hook(layer, put(layer, patch.head)) for layer in patch.layers)):
            patched.append(model(images[CORRUPT]))
    return torch.stack(patched)


@torch.no_grad()
def per_image(plan: Plan, model: PatchableViT, images: dict[BaseRun, Tensor]) -> Tensor:
    """Image by image, patch by patch, (clean, corrupted) in one pass, the corrupted row patched from the clean one."""

    def put(module: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        return (output[0][:1].expand_as(output[0]), *output[1:])

    patched = []
    for clean, corrupt in zip(images[CLEAN], images[CORRUPT], strict=True):
        both = torch.stack([clean, corrupt])
        model(both)
        for patch in plan.patches:
            with hooks(*(part_of(model, layer).register_forward_hook(put) for layer in patch.layers)):
                patched.append(model(both)[1])
    return torch.stack(patched).unflatten(0, (len(images[CLEAN]), -1)).transpose(0, 1)


class RowsCounted:
    """Rows that reach the attention's keys and the MLP, in all layers."""

    def __init__(self, model: PatchableViT) -> None:
        self.model, self.attention, self.mlp = model, 0, 0

    def count(self, run: Callable[[], Tensor]) -> None:
        """Counts during one run."""

        def note(kind: str) -> Callable:
            return lambda module, args, output: setattr(self, kind, getattr(self, kind) + len(output))

        blocks = self.model.model.vit.layers
        attention = (block.attention.k_proj.register_forward_hook(note("attention")) for block in blocks)
        mlp = (block.mlp.register_forward_hook(note("mlp")) for block in blocks)
        with hooks(*attention, *mlp):
            run()


def largest_difference(plan: Plan, ours: Tensor, oracle: Tensor, base: Tensor) -> tuple[float, float]:
    """Of the effects on the probability of the clean run's answer; and the largest effect."""
    label = base.argmax(-1)[None, :, None].expand(len(ours), -1, 1)
    probabilities = [x.softmax(-1).gather(-1, label) for x in (ours, oracle)]
    spread = (probabilities[1] - probabilities[1].mean(0)).abs().max()
    return float((probabilities[0] - probabilities[1]).abs().max()), float(spread)


def case(model: PatchableViT, site: str, windows: tuple[int, ...], number: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    size, device = model.input_size[0], model.device
    plan, images = plan_of(model, site, windows), pixels(number, size, device)
    ours, cost, rows = engine(plan, model, images), estimate_cost(plan, model), RowsCounted(model)
    rows.count(ours)
    planned = [number * (2 * plan.sizes.depth + sum(h.evaluations for h in plan.halves[i::2])) for i in (0, 1)]
    oracle = batched(plan, model, images)
    difference, spread = largest_difference(plan, ours(), oracle, model(images[CLEAN]))
    sides = {"ours": ours, "batched": lambda: batched(plan, model, images)}
    if windows == (1,) and site == "attn_out":
        sides["per image"] = lambda: per_image(plan, model, images)
    if len(windows) > 1:
        single = [engine(plan_of(model, site, (window,)), model, images) for window in windows]
        sides["one by one"] = lambda: [run() for run in single]
    sides["plain"] = lambda: model(images[CLEAN])
    seconds = medians(in_turn(sides, repeats, synchronize(device)))
    rate = cost.full_flops / (2 + len(plan.patches)) / seconds["plain"]
    row = {
        "case": f"{site} w={','.join(map(str, windows))}",
        "px": size,
        "images": number,
        "patches": len(plan.patches),
        "rows counted = planned": [rows.attention, rows.mlp] == planned,
        "largest difference": difference,
        "largest effect": spread,
        "FLOP ratio": cost.full_flops / cost.flops,
        "ours, s": seconds["ours"],
        "batched ÷ ours": seconds["batched"] / seconds["ours"],
    }
    for name in ("per image", "one by one"):
        if name in seconds:
            row[f"{name} ÷ ours"] = seconds[name] / seconds["ours"]
    row["rate ÷ plain forward's"] = cost.flops / seconds["ours"] / rate
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Measures all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="pixels: 224 or 96")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--head-images", type=int, default=2, help="images of the case by head, which has 144 patches")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this case (may be repeated)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON; default results/engine_SIZE.json beside this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = vit_b16(options.size)
    output = options.output or RESULTS / f"engine_{options.size}.json"
    rows = []
    for name in options.case or CASES:
        site, windows = CASES[name]
        number = options.head_images if site == "z" else options.images
        with torch.no_grad():
            rows.append(case(model, site, windows, number, options.repeats))
        report("engine", rows, output, repeats=options.repeats)  # after each: some take minutes


if __name__ == "__main__":
    main()
