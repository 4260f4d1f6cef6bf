"""A comparison of runs written by hand, with names, labels and paths that try to break out of a page."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from hand_made import NOISE, rows, save_run

from vitpatch.compare.compare import compare_runs
from vitpatch.compare.load import Comparison, find_runs
from vitpatch.plots.examples import ExampleImage, ExamplePage
from vitpatch.runs.reading import load_run, write_pages
from vitpatch.types import BaseRun

EVIL = "</script><script>alert(1)</script>&\"'$x$<img src=x>"
IN_A_FOLDER = "a&b<script>\"'$x$ %41#?,window=1"
"""The same as far as a folder can be called so."""


def example_pages(patches: int) -> list[ExamplePage]:
    """A page with one image, its name and prediction evil."""
    values = {BaseRun.CLEAN: 0.9, BaseRun.CORRUPT: 0.1}
    pictures = {run: np.full((8, 8, 3), 255 * value, np.uint8) for run, value in values.items()}
    image = ExampleImage(0, EVIL, pictures, dict.fromkeys(values, EVIL), values, np.linspace(0.1, 0.9, patches))
    return [ExamplePage("random", f"drawn by lot {EVIL}", [image])]


def effects(patches: int, seed: int = 0, images: int = 12):
    """(images, patches): a peak at the second patch."""
    mean = np.exp(-np.abs(np.arange(patches) - 1))
    return 0.4 * mean + 0.05 * np.random.default_rng(seed).standard_normal((images, patches))


def hostile(folder: Path) -> Comparison:
    """Runs of one and several windows, of heads, of depth 24, of two corruptions, directions and groups."""
    several = pd.concat([rows(range(6), window=w, depth=6) for w in (1, 3)], ignore_index=True)
    heads = pd.concat([rows(range(6), head=h, site="z", depth=6) for h in range(9)], ignore_index=True)
    a, b = folder / "A", folder / "B"
    made = [
        save_run(a / IN_A_FOLDER, effects(6), depth=6),
        save_run(a / "noise,window=1", effects(6, 1), depth=6, corruption=NOISE),
        save_run(a / "windows", effects(12, 2), several, depth=6, window=[1, 3]),
        save_run(b / "noise,window=1", effects(6, 4), depth=6, corruption=NOISE, seed=1),
        save_run(
            b / "heads",
            effects(54, 3),
            heads,
            depth=6,
            target=dict(site="z", layers=None, tokens=["all"], heads="all", grid=None),
        ),
        save_run(b / "deep", effects(24, 5), depth=24, path="some/deep", weights="w1"),
    ]
    write_pages(made[0] / "pages.parquet", example_pages(6))
    comparison = compare_runs([load_run(run) for run in find_runs([a, b])], folder / "comparison")
    (folder / "comparison").mkdir()
    overview = comparison.overview.copy()
    overview["wandb_url"] = ["javascript:alert(1)", "https://wandb.ai/a?b=1&c=<2>", *[""] * (len(overview) - 2)]
    overview["finding"] = [EVIL, *[""] * (len(overview) - 1)]
    overview["notes"] = [EVIL, *[""] * (len(overview) - 1)]
    overview.loc[1, ["total_effect", "peak_p", "peak_recovered"]] = np.nan
    synergy = np.where(comparison.profiles["window"] == 3, 0.1, np.nan)
    profiles = comparison.profiles.assign(synergy_prob=synergy, effect_other_class=-0.2)
    return replace(comparison, warnings=(f"weights differ: {EVIL}",), overview=overview, profiles=profiles)


def single(folder: Path) -> Comparison:
    """One run."""
    run = save_run(folder / "run", effects(6), depth=6)
    return compare_runs([load_run(run) for run in find_runs([run])], folder / "comparison")
