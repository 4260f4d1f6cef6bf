"""How often do tests call what is not there, and do intervals hold the true mean?

    python benchmarks/calibration_of_tests.py        # CPU, one thread: a few minutes

The long version of the last tests of ``tests/stats/test_ground_truth.py``: the same model, in which 12 heads have a
mean effect of 0 and one has a known one, patched once; data sets are drawn from its images by clusters of 1 to 5
(``tests/helpers/repeated.py``). A rate is given beside the band in which a rate as it should be lies, to four standard
errors of the binomial.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import torch
from measure import RESULTS, report
from repeated import LEVEL, Pool, binomial_band, calls, coverage, make_pool

CLUSTERS = (20, 60, 200)


def row(what: str, clusters: int, trials: int, rate: float, should: float, **more: float) -> dict[str, Any]:
    """A line of the table."""
    low, high = binomial_band(should, trials)
    band = {"should be": should, "from": max(low, 0.0), "to": min(high, 1.0), "inside": low <= rate <= high}
    return {"rate of": what, "clusters": clusters, "trials": trials, "rate": rate, **band, **more}


def rates(pool: Pool, clusters: int, tests: int, intervals: int) -> Iterator[dict[str, Any]]:
    """Calls of family-wise tests in so many data sets, and what intervals hold, 13 heads together."""
    for name, rate in calls(pool, tests, clusters, seed=clusters).items():
        if name == "real":
            yield {"rate of": "calls: real", "clusters": clusters, "trials": tests, "rate": rate}
        else:
            yield row(f"calls: {name}", clusters, tests, rate, LEVEL)
    for name, number, how in (
        ("percentile", intervals, {}),
        ("bca", intervals, {"method": "bca"}),
        ("percentile, images resampled", intervals // 10, {"by_image": True}),
    ):
        held = coverage(pool, number, clusters, seed=clusters, **how)
        more = {"lowest of a head": float(held.min()), "highest of a head": float(held.max())}
        yield row(f"intervals hold: {name}", clusters, number * len(held), float(held.mean()), 1 - LEVEL, **more)


def main() -> None:
    """All rates by number of clusters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=4000, help="data sets that are tested")
    parser.add_argument("--intervals", type=int, default=1000, help="data sets that intervals are of")
    parser.add_argument("--output", type=Path, default=RESULTS / "calibration_of_tests.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool, rows = make_pool(), []
    for clusters in CLUSTERS:
        for line in rates(pool, clusters, options.tests, options.intervals):
            rows.append(line)
            print(line, file=sys.stderr, flush=True)
    sizes = {"images of the pool": len(pool.cluster), "tests": options.tests, "intervals": options.intervals}
    report("calibration_of_tests", rows, options.output, **sizes)


if __name__ == "__main__":
    main()
