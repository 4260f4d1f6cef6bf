"""Finished runs written by hand: just what is compared, with effects of one's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

IDENTITY = {
    "numbers_version": 2,
    "weights": "w0",
    "architecture": "a0",
    "readout": None,
    "row": None,
    "preprocessing": {"size": 32},
    "precision": ["float32", "32", "highest"],
    "data": "d0",
    "corruption": {"_target_": "vitpatch.corruptions.Gray", "amount": 1.0},
    "target": {"site": "attn_out", "layers": None, "tokens": ["all"], "heads": None, "grid": None},
    "window": [1],
    "direction": "denoise",
    "metric": "prob",
    "rival": "corrupt",
    "seed": 0,
    "donors": ["pair"],
    "include": "all",
}
NOISE = {"_target_": "vitpatch.corruptions.Noise", "std": 0.2, "clip": True}


def rows(layers, window=1, tokens="all", head=-1, site="attn_out", depth=None):
    """Patches of one series, as in summary.csv."""
    depth = depth or max(layers) + 1
    named = []
    for layer in layers:
        first, last = max(layer - window // 2, 0), min(layer + (window - 1) // 2, depth - 1)
        named.append((site, layer, head, tokens, window, first, last, last - first + 1))
    columns = ["site", "layer", "head", "tokens", "window", "first_layer", "last_layer", "n_layers"]
    return pd.DataFrame(named, columns=columns)


def save_run(
    folder: Path,
    effects,
    patches=None,
    ids=None,
    included=None,
    clusters=None,
    total=None,
    depth=None,
    path="some/vit",
    data=None,
    run_id=None,
    version="0.1.0",
    images_a_group=3,
    calibration=None,
    **identity,
) -> Path:
    """A finished run whose ``effects`` are (images, patches), its ``total`` effects (images,) in prob, denoise."""
    effects = np.asarray(effects, dtype=np.float32)
    images, columns = effects.shape
    patches = rows(range(columns)) if patches is None else patches
    ids = np.arange(images) if ids is None else np.asarray(ids)
    included = np.ones(images, bool) if included is None else np.asarray(included)
    clusters = np.arange(images) if clusters is None else np.asarray(clusters)
    total = np.full(images, 0.5) if total is None else np.asarray(total)
    of_run = copy.deepcopy(IDENTITY) | identity
    folder.mkdir(parents=True)
    corrupt = np.full(images, 0.25, np.float32)
    examples = {"example_id": ids, "label": np.zeros(images, int), "included": included, "cluster": clusters}
    examples |= {"prob_corrupt": corrupt, "prob_clean": (corrupt + total).astype(np.float32)}
    examples |= {"pred_clean": np.zeros(images, int), "pred_corrupt": np.ones(images, int)}
    examples |= {f"log_odds_{run}": examples[f"prob_{run}"] for run in ("clean", "corrupt")}
    examples |= {"kl_corrupt": examples["prob_corrupt"]}
    examples |= {f"prob_{donor}": examples["prob_clean"] for donor in of_run["donors"] if donor.endswith("class")}
    pq.write_table(pa.table(examples), folder / "examples.parquet")
    named = {name: np.tile(patches[name].to_numpy(), images) for name in patches}
    table = pa.table({"example_id": np.repeat(ids, columns), **named, "effect": effects.ravel()})
    pq.write_table(table, folder / "effects.parquet", row_group_size=columns * images_a_group)
    kept, mean_total = effects[included], float(total[included].mean())
    mean = kept.mean(0, dtype=float)
    beside = {"n": len(kept), "n_clusters": len(np.unique(clusters[included])), "effect": mean}
    for name, value in (("effect", mean), ("recovered", mean / mean_total if mean_total else np.nan)):
        beside |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
    patches.assign(**beside, p=0.5).to_csv(folder / "summary.csv", index=False)
    peak = patches.iloc[int(np.argmax(mean * np.sign(mean_total)))]
    known = {name: peak[name].item() if name != "tokens" else peak[name] for name in ("layer", "head", "window")}
    config = {name: of_run[name] for name in ("direction", "metric", "rival", "seed", "window", "corruption")}
    data = {"_target_": "vitpatch.data.sources.ParquetImages", "path": "some/data.parquet", "split": "test"} | (
        data or {}
    )
    manifest = {
        "title": folder.name,
        "run_id": run_id or f"id of {folder}",
        "identity": of_run,
        "donors": of_run["donors"],
        "config": config | {"interval": "percentile", "model": {"path": path, "revision": None}, "data": data},
        "versions": {"vitpatch": version},
        "model": {"layers": depth or int(patches["last_layer"].max()) + 1, "weights": of_run["weights"]},
        "counts": {"images": images},
        "total_effect": {"mean": mean_total, "low": mean_total - 0.1, "high": mean_total + 0.1},
        "peak": {**known, "tokens": peak["tokens"]},
        "notes": [],
        "seconds": 1.0,
    }
    if calibration is not None:  # a corruption of the identity has then no strength, that of the config what was found
        manifest["calibration"] = calibration.as_manifest()
        manifest["config"]["corruption"] = of_run["corruption"] | {calibration.key: calibration.strength}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
