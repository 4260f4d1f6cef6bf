"""Tiny models and images, and configs drawn at random over all that a run can be asked for."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from conftest import pictures, save_model, write_parquet
from PIL import Image

SIZE, IMAGES, NAMES = 16, 12, ["cat", "dog", "bird"]
DEPTHS = (1, 2, 3, 4)
STREAM = ("resid_pre", "resid_mid", "resid_post")
BY_HEAD = ("z", "q", "k", "v", "pattern")
LABELS = {
    "even": [i % 3 for i in range(IMAGES)],
    "lone": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2],  # a class with one image
    "single": [1] * IMAGES,  # a single class
}


def make_inputs(folder: Path) -> Path:
    """Models of each depth, of 4 image patches, and a file of images for each way that classes are spread."""
    for depth in DEPTHS:
        heads = 1 if depth == 1 else 2
        sizes = dict(num_hidden_layers=depth, num_attention_heads=heads, hidden_size=16, intermediate_size=32)
        save_model(folder / f"depth_{depth}", "vit", NAMES, size=SIZE, seed=depth, **sizes)
    masks = np.zeros((IMAGES, SIZE, SIZE), dtype=np.uint8)
    for i, mask in enumerate(masks):  # of 0 to 4 of the 4 patches
        for patch in range(i % 5):
            row, column = divmod(patch, 2)
            mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
    columns = {
        "mask": [Image.fromarray(mask) for mask in masks],
        "few": [f"group {i % 3}" for i in range(IMAGES)],
        "one": ["the same"] * IMAGES,
    }
    for name, labels in LABELS.items():
        write_parquet(folder / f"{name}.parquet", pictures(IMAGES, SIZE), labels, NAMES, **columns)
    return folder


def random_overrides(seed: int, inputs: Path) -> list[str]:
    """A config as overrides of ``patch.yaml``, the same for the same ``seed``; most of them are plans that run."""
    rng = random.Random(seed)
    depth = rng.choice(DEPTHS)
    overrides = ["model=hf", f"model.path={inputs / f'depth_{depth}'}", *_data(rng, inputs)]
    target, one_head = _target(rng, depth)
    window = _window(rng, depth, one_head)
    metric = rng.choice(("prob", "prob", "log_odds", "logit", "logit_diff", "kl"))
    overrides += [*target, *window, *_donor(rng), f"metric={metric}"]
    if not one_head and window != ["window=1"] and rng.random() < 0.5:
        overrides.append("synergy=true")
    least = rng.choice(("-1", "0", "0.01", "0.2"))
    rules = ("all", "all", "all", "clean_correct", "flipped", f"min_total_effect:{least}")
    overrides.append(f"include={rng.choice(rules)}")
    corruptions = ("gray", "gray", "noise", "blur", "none", "embedding_noise", "occlude")
    for key, choices in {
        "corruption": corruptions,
        "interval": ("percentile", "bca"),
        "test": ("log_odds", "log_odds", "headline") if metric != "kl" else ("log_odds",) * 9 + ("headline",),
        "rival": ("corrupt", "clean"),
        "wanted_width": ("null", "null", "0.1"),
        "seed": ("0", "1"),
    }.items():
        overrides.append(f"{key}={rng.choice(choices)}")
    return overrides


def _data(rng: random.Random, inputs: Path) -> list[str]:
    labels = rng.choice(("even", "even", "even", "lone", "single"))
    cluster = rng.choice(("null", "null", "null", "few", "few", "one"))
    limit = rng.choice(("1", "2", "6", *["null"] * 7))
    overrides = ["data=parquet", f"data.path={inputs / labels}.parquet", "data.mask_column=mask"]
    overrides += [f"data.cluster_column={cluster}", f"data.limit={limit}"]
    return overrides + ["data.label_column=null"] * (rng.random() < 0.1)


def _target(rng: random.Random, depth: int) -> tuple[list[str], bool]:
    """What is patched, and whether it is single heads."""
    if rng.random() < 0.1:
        return ["target=handover"], False
    site = rng.choice(rng.choice((("attn_out", "mlp_out"), STREAM, BY_HEAD)))
    groups = ["all", "cls", "patches", "each", "grid", "object", "background", "random_object"]
    number = rng.choice((1, 1, 1, 2, 3))
    tokens = ["all"] if rng.random() < 0.3 else rng.sample(groups, number)
    overrides = [f"target={site}", f"target.tokens=[{','.join(tokens)}]"]
    if "grid" in tokens:
        overrides.append(f"target.grid={rng.choice(('[1,2]', '[2,1]', '[2,2]', '[1,1]'))}")
    if rng.random() < 0.6:
        layers = rng.sample(range(depth), rng.randint(1, depth))
        overrides.append(f"target.layers=[{','.join(map(str, layers))}]")
    heads = rng.choice(("all", "joint", "joint", "[0]", "[0]" if depth == 1 else "[1,0]"))
    if site in BY_HEAD:
        overrides.append(f"target.heads={heads}")
    return overrides, site in BY_HEAD and heads != "joint"


def _window(rng: random.Random, depth: int, one_head: bool) -> list[str]:
    if one_head:
        return ["window=1"] * (rng.random() < 0.5)
    sizes = [*map(str, range(1, depth + 1)), "prefix", "suffix"]
    several = ",".join(rng.sample(sizes, rng.choice((2, 3))))
    return [f"window={rng.choice((*sizes, f'[{several}]', f'[{several}]'))}"]


def _donor(rng: random.Random) -> list[str]:
    donor = rng.choice(("pair", "pair", "pair", "pair", "same_class", "other_class", "zero", "mean"))
    overrides = [f"donor={donor}"]
    if donor == "pair":
        overrides.append(f"controls={rng.choice(('null', 'true', 'false'))}")
    if donor not in ("zero", "mean"):
        overrides.append(f"direction={rng.choice(('denoise', 'noise'))}")
    return overrides
