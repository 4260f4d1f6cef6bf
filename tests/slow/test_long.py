"""What takes minutes: ``make test-long``. Each has a short form in the suite."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from clustered import sample
from conftest import ROOT

from vitpatch.stats import summary as stats

pytestmark = pytest.mark.long


def test_the_demo_as_the_readme_has_it(tmp_path):
    """Six runs on 256 images; the clean runs are one, and wider windows restore no less at their peak."""
    command = [sys.executable, "patch.py", "-m", "corruption=gray,noise", "window=1,3,5", f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run([*command, "logger.mode=offline"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "6 of 6 runs finished" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    for corruption in ("gray", "noise"):
        folders = [tmp_path / f"corruption={corruption},window={w}" for w in (1, 3, 5)]
        manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
        totals = [m["total_effect"]["mean"] for m in manifests]  # window 1 has its controls' runs in the same calls
        assert max(totals) - min(totals) < 1e-6 and manifests[0]["total_effect"]["low"] > 0
        peaks = [m["peak_effect"] for m in manifests]
        assert peaks == sorted(peaks) and peaks[-1] <= 1.1 * manifests[0]["total_effect"]["mean"]
        sizes = [len(pd.read_parquet(folder / "effects.parquet")) for folder in folders]
        assert sizes == [256 * 12] * 3


def test_intervals_cover_the_true_mean_95_times_in_100():
    hits = 0
    for seed in range(2000):
        values, of = sample(n=200, columns=1, clusters=50, seed=seed)
        (estimate,) = stats.estimates(values, of, seed)
        hits += estimate.low <= 0.3 <= estimate.high
    assert 0.92 <= hits / 2000 <= 0.97  # 50 clusters: the percentile interval is a little narrow
