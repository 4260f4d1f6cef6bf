"""How fast and how exact is vitpatch beside the libraries that can do the same measurement?

Every peer runs in its own environment on the same model (a random ViT-B/16), images, labels, dtype (float32) and
threads. One measurement is: keep the clean run's attention outputs, then for each layer put them into the corrupted
run and take the label's probability. The effects of both sides are compared with those of plain forward hooks; only a
side within the tolerance is timed, the two sides in turn. A peer's way of working that fails is listed with its reason.

    python benchmarks/peers.py --images 32 --size 224
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from environments import PeerError, Worker, environment
from task import make_task, reference

PEERS = ["transformer_lens", "nnsight", "pyvene", "vit_prisma", "captum"]
TOLERANCE = 1e-5


def difference(worker: Worker, expected: torch.Tensor) -> float:
    """The largest difference of the worker's effects from the expected ones; PeerError above the tolerance."""
    effects = load_file(worker.ask("effects")["path"])["effects"]
    if effects.shape != expected.shape:
        raise PeerError(f"effects of shape {tuple(effects.shape)} instead of {tuple(expected.shape)}")
    by_layer = (effects - expected).abs().amax(1)
    largest = by_layer.max().item()
    if not largest <= TOLERANCE:  # also when it is not a number
        raise PeerError(f"differs by {largest:.0e} at layer {by_layer.argmax().item()} (attn_out)")
    return largest


def first_working(worker: Worker, expected: torch.Tensor, failing: dict[str, str]) -> tuple[str, float]:
    """Open the worker's first case with the right numbers; those before it go into failing with their reasons."""
    for case in worker.about["cases"]:
        try:
            worker.ask("open", case=case)
            return case, difference(worker, expected)
        except PeerError as error:
            failing[case] = str(error)
    last, reason = failing.popitem()
    raise PeerError(f"{last}: {reason}")


def in_turn(ours: Worker, peer: Worker, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides, measured alternately after one run of each that is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for worker, seconds in zip((ours, peer), times, strict=True):
            seconds.append(worker.ask("run")["seconds"])
    return times[0][1:], times[1][1:]


def compare(peer: str, folder: Path, expected: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: versions, differences, times, and what failed."""
    row: dict[str, Any] = {"peer": peer, "failing": {}}
    with Worker(sys.executable, "vitpatch_worker", folder, options.threads) as ours:
        try:
            _, row["ours_difference"] = first_working(ours, expected, {})
        except PeerError as error:
            sys.exit(f"vitpatch: {error}")
        row["ours_versions"] = ours.about["versions"]
        try:
            python = environment(peer, options.envs.resolve())
            with Worker(python, f"{peer}_worker", folder, options.threads) as other:
                row.update(versions=other.about["versions"])
                row["case"], row["difference"] = first_working(other, expected, row["failing"])
                row["ours_seconds"], row["seconds"] = in_turn(ours, other, options.repeats)
        except PeerError as error:
            row["reason"] = str(error)
    if "seconds" in row:
        row["ours_median"], row["median"] = (statistics.median(row[key]) for key in ("ours_seconds", "seconds"))
        row["ratio"] = row["median"] / row["ours_median"]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text; a failing case stands under its peer."""
    lines = [f"{'peer':<26} {'vitpatch s':>10} {'peer s':>8} {'ratio':>6} {'difference':>10}  case"]
    for row in rows:
        name = row["peer"]
        name += " " + next(iter(row["versions"].values())) if "versions" in row else ""
        if "median" in row:
            times = f"{row['ours_median']:>10.2f} {row['median']:>8.2f} {row['ratio']:>6.2f}"
            lines.append(f"{name:<26} {times} {row['difference']:>10.0e}  {row['case']}")
        else:
            lines.append(f"{name:<26} {'-':>10} {'-':>8} {'-':>6} {'-':>10}  {row['reason']}")
        lines += [f"{'':<26} fails: {case}: {reason}" for case, reason in row["failing"].items()]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, choices=[224, 96], default=224, help="pixels of an image's side")
    parser.add_argument("--small", action="store_true", help="a ViT of 4 layers on 32 pixels, to check the numbers")
    parser.add_argument("--repeats", type=int, default=5, help="timed measurements of each side (medians are shown)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=PEERS, action="append", help="only this peer (may be repeated)")
    parser.add_argument("--envs", type=Path, default=Path(__file__).parent / ".envs", help="the peers' environments")
    parser.add_argument("--output", type=Path, help="JSON; default results/peers_SIZE.json beside this file")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error("--repeats must be at least 5")
    return options


def main() -> None:
    """Make the task, compare every peer, print the table and write the JSON, after each: a peer takes minutes."""
    options = arguments()
    torch.set_num_threads(options.threads)
    name = "small" if options.small else options.size
    output = options.output or Path(__file__).parent / "results" / f"peers_{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        expected = reference(make_task(Path(folder), options.size, options.images, options.small))
        settings, rows = about(options, expected), []
        for peer in options.peer or PEERS:
            rows.append(compare(peer, Path(folder), expected, options))
            print(table(rows[-1:]), file=sys.stderr, flush=True)
            output.write_text(json.dumps({"settings": settings, "peers": rows}, indent=2) + "\n")
    print(table(rows))


def about(options: argparse.Namespace, expected: torch.Tensor) -> dict[str, Any]:
    """What was compared, and where."""
    return {
        "model": "4-layer ViT" if options.small else "ViT-B/16",
        "size": 32 if options.small else options.size,
        "images": options.images,
        "threads": options.threads,
        "repeats": options.repeats,
        "dtype": "float32",
        "attention": "sdpa unless the case says otherwise",
        "tolerance": TOLERANCE,
        "largest_effect": expected.abs().max().item(),
        "mean_effect": expected.abs().mean().item(),
        "processor": platform.processor() or platform.machine(),
    }


if __name__ == "__main__":
    main()
