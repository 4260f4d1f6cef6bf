"""How long do the statistics of a run take?

    python benchmarks/cost_of_statistics.py          # 1 thread with OMP_NUM_THREADS=1

``summarize`` is all of ``summary.csv`` at 2000 resamples, ``bca`` the same with BCa intervals, ``flips`` the
family-wise test at 9999 sign flips, ``peaks`` the set of peaks and their size. ``plain`` are the resampled means of the
effect alone, the images of each resample gathered and average_draws: from the same resamples, and compared with ours.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pandas as pd
from measure import RESULTS, in_turn, medians, report

from vitpatch.stats import inference
from vitpatch.stats import summary as stats
from vitpatch.stats.inference import Resamples

CASES = [
    {"images": 1000, "clusters": 1000, "patches": 12},
    {"images": 1000, "clusters": 1000, "patches": 144},
    {"images": 1000, "clusters": 200, "patches": 144},
    {"images": 1000, "clusters": 1000, "patches": 444},
    {"images": 10_000, "clusters": 10_000, "patches": 144},
]
CLASSES = 10


def drawn(images: int, clusters: int, patches: int) -> tuple[stats.Measured, pd.DataFrame]:
    """Normal draws (seed 0) with a share of their cluster, float32 as in the files of a run."""
    rng = np.random.default_rng(0)
    cluster = rng.permutation(np.arange(images) % clusters)
    effects = 0.1 + rng.normal(size=(clusters, patches))[cluster] + rng.normal(size=(images, patches))
    effects = effects.astype(np.float32)
    measured = stats.Measured(effects, effects > 0, 2 * effects, effects / 2, np.abs(effects))
    total = 1 + rng.normal(size=images)
    return measured, pd.DataFrame({"cluster": cluster, "total_effect": total, "label": cluster % CLASSES})


def plain(effects: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Means in every resample, its images drawn one by one: (images, patches) → (resamples, patches)."""
    effects, means = effects.astype(float), []
    for _, weights in resamples.weights():
        for row in weights.astype(int):
            means.append(effects[np.repeat(np.arange(len(effects)), row[resamples.index])].mean(0))
    return np.stack(means)


def run(case: dict[str, int], repeats: int, with_plain: bool) -> dict[str, Any]:
    """One row of the table, medians of ``repeats``."""
    measured, examples = drawn(**case)
    patches, clusters = pd.DataFrame({"layer": range(case["patches"])}), examples["cluster"].to_numpy()
    sides = {
        "summarize": lambda: stats.summarize(patches, measured, examples, Resamples(clusters, 0)),
        "bca": lambda: stats.summarize(patches, measured, examples, Resamples(clusters, 0), "bca"),
        "flips": lambda: inference.sign_flip_p(measured.log_odds, clusters, seed=0),
        "peaks": lambda: (
            stats.peak_set(measured.effects, 1, clusters, seed=0),
            stats.peak_size(measured.effects, 1, clusters, seed=0),
        ),
    }
    if with_plain:
        sides["plain"] = lambda: plain(measured.effects, Resamples(clusters, 0))
    row = {
        **case,
        **{f"{name}, s": seconds for name, seconds in medians(in_turn(sides, repeats, lambda: None)).items()},
    }
    if with_plain:
        resamples = Resamples(clusters, 0)
        apart = plain(measured.effects, resamples) - resamples.means(measured.effects)
        row["largest difference"] = float(np.abs(apart).max())
    return row


def main() -> None:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "statistics_cpu.json")
    options = parser.parse_args()
    rows = [run(case, options.repeats, with_plain=case["images"] <= 1000) for case in CASES]
    report("statistics", rows, options.output)


if __name__ == "__main__":
    main()
