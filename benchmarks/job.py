"""What does a job of a sweep cost beside loading its model and patching?

    python benchmarks/job.py                 # the shipped model, 256 images, gray, window 3
    python benchmarks/job.py --images 4      # what is left where patching takes no time

Seconds by part, of the CPU in all threads and of the clock: the least of ``--repeats`` jobs in one process after one
that is not counted, as the jobs of a sweep follow each other. The least is what other programs disturb least.
``figures: writing`` is to lay out, draw and encode them; ``other`` what no row is of.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from hydra import compose, initialize_config_dir
from measure import RESULTS, report
from numpy.typing import NDArray
from omegaconf import DictConfig

from vitpatch.plots import run_figures
from vitpatch.runs import run, setup
from vitpatch.runs.config import register_resolvers
from vitpatch.runs.folder import RunFolder, Shards
from vitpatch.runs.reading import RunTables

ROOT = Path(__file__).parents[1]
PARTS = {
    "compose the config": [(sys.modules[__name__], "compose_config")],
    "check the config": [(setup, "check_config")],
    "load the model, read the images' names": [(run, "prepare")],
    "patch": [(run, "predict")],
    "join the shards": [(Shards, "merge")],
    "statistics": [(RunTables, "analyze")],
    "tables": [(run, "write_csv")],
    "example images": [(run, "choose_examples"), (run, "write_pages")],
    "figures: statistics of windows, words": [(run, "draw")],
    "figures: layer_profile": [(run_figures, "layer_profile")],
    "figures: heatmap": [(run_figures, "_class_figures")],
    "figures: by target": [(run_figures, "_target_figures")],
    "figures: peak": [(run_figures, "peak_stability")],
    "figures: examples": [(run_figures, "image_page")],
    "figures: writing": [(RunFolder, "save_figures")],
    "finding, what to run next": [(run, "next_runs"), (run, "_possible"), (run, "manifest_entries")],
    "manifest": [(run, "_manifest"), (RunFolder, "checksums")],
}
BESIDE = ("load the model, read the images' names", "patch")


class Clock:
    """(CPU, wall) seconds of this process by part; a part within another is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, NDArray[np.floating]] = defaultdict(lambda: np.zeros(2))
        self._open: list[NDArray[np.floating]] = []

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Counts the block to a part."""
        started = now()
        self._open.append(np.zeros(2))
        try:
            yield
        finally:
            took = now() - started
            self.seconds[part] += took - self._open.pop()
            if self._open:
                self._open[-1] += took

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls counted to a part."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.measuring(part):
                return function(*args, **kwargs)

        return counted


def now() -> NDArray[np.floating]:
    """Seconds of the CPU and of the clock."""
    return np.array([time.process_time(), time.perf_counter()])


def compose_config(overrides: list[str]) -> DictConfig:
    """What Hydra composes for each job."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("patch", overrides=["logger=none", *overrides])


def measure(overrides: list[str], repeats: int) -> list[dict[str, Any]]:
    """A row a part: its seconds, the least of the jobs."""
    originals = {(owner, name): getattr(owner, name) for places in PARTS.values() for owner, name in places}
    jobs: list[Clock] = []
    for _ in range(repeats + 1):
        clock = Clock()
        for part, places in PARTS.items():
            for owner, name in places:
                setattr(owner, name, clock.wrap(part, originals[owner, name]))
        with tempfile.TemporaryDirectory() as folder, clock.measuring("other"):
            run.run(compose_config(overrides), Path(folder) / "run")
        jobs.append(clock)
    parts = [*PARTS, "other"]
    seconds = {part: [job.seconds[part] for job in jobs[1:]] for part in parts}
    beside = [part for part in parts if part not in BESIDE]
    seconds["beside loading and patching"] = list(np.sum([seconds[part] for part in beside], axis=0))
    return [
        {"part": part, "CPU s": min(s[0] for s in of), "wall s": min(s[1] for s in of)} for part, of in seconds.items()
    ]


def main() -> None:
    """One job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULTS / "job_cpu.json")
    parser.add_argument("overrides", nargs="*", default=["corruption=gray", "window=3"])
    options = parser.parse_args()
    register_resolvers()
    rows = measure([f"data.limit={options.images}", *options.overrides], options.repeats)
    report("job", rows, options.output, images=options.images, overrides=options.overrides)


if __name__ == "__main__":
    main()
