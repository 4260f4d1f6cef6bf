"""From Python: two pixel tensors → the table of effects, without Hydra, Lightning or Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vitpatch import stats
from vitpatch.anatomy import family_of
from vitpatch.config import one_of
from vitpatch.cost import cost_of, memory_limit
from vitpatch.effects import total_effect
from vitpatch.execute import execute
from vitpatch.model import PatchableViT
from vitpatch.plan import Plan, make_plan
from vitpatch.rows import Columns, columns, joined
from vitpatch.spec import (
    EVERY_HEAD,
    WINDOW_WORDS,
    BaseRun,
    Direction,
    Metric,
    Site,
    Target,
    TokenGroup,
    VitPatchError,
)
from vitpatch.store import EFFECTS_SCHEMA, EXAMPLES_SCHEMA, PATCH_COLUMNS
from vitpatch.tokens import token_masks

Window = int | str


def patch(
    model: nn.Module,
    clean: Tensor,
    corrupt: Tensor,
    labels: Tensor | Sequence[int],
    target: str = "attn_out",
    window: Window | Sequence[Window] | None = None,
    tokens: str | Sequence[str] = "all",
    direction: str = "denoise",
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | str | None = None,
    grid: tuple[int, int] | None = None,
    metric: str = "prob",
    rival: str = "corrupt",
    masks: Tensor | None = None,
    ids: Sequence[int] | None = None,
    clusters: Sequence[int] | None = None,
    seed: int = 0,
    memory_gb: float | None = None,
) -> pd.DataFrame:
    """Patches a loaded Hugging Face image classifier; a row an image and patch.

    ``clean`` and ``corrupt`` (images, 3, height, width) are ``pixel_values`` as the model takes them, normalised;
    ``labels`` (images,) class indices. ``window`` (3, or 1 where single heads are patched) counts layers, or is
    ``"prefix"``, ``"suffix"`` or a list; ``heads``, of the sites ``z``, ``q``, ``k``, ``v``, ``pattern``, is ``"all"``,
    ``"joint"`` or a list. ``masks`` (images, 1, height, width), 1 = object, are for the token groups ``object``,
    ``background``, ``random_object``. ``ids`` (default: the row) seed what is drawn by image; images of one of
    ``clusters`` (default: ``ids``) are not independent. The model is left as it was, on its device, in its mode.

    Returns the columns of ``effects.parquet`` (its docstring is ``vitpatch.store.EFFECTS_SCHEMA``'s), after
    ``example_id`` also ``label``, ``cluster``, ``total_effect`` and the base runs' metrics (``prob_clean``, …).
    Raises ``VitPatchError`` for what does not fit the model. ``vitpatch.summarize`` has the means.
    """
    labels = torch.as_tensor(labels, dtype=torch.int64).cpu()
    ids = torch.as_tensor(range(len(labels)) if ids is None else ids, dtype=torch.int64)
    if not isinstance(model, nn.Module):
        raise VitPatchError(f"model: got {type(model).__name__}; expected a Hugging Face image classifier")
    metric, rival = one_of("metric", metric, Metric), one_of("rival", rival, BaseRun)
    was_training = {module: module.training for module in model.modules()}
    try:
        patchable = _patchable(model)
        _check_images(patchable, clean, corrupt, labels, ids)
        plan = make_plan(
            _target(target, tokens, layers, heads, grid),
            _windows(window, target, heads),
            one_of("direction", direction, Direction),
            patchable.sizes,
        )
        if masks is not None and len(masks) != len(labels):
            raise VitPatchError(f"masks: {len(masks)} of them, {len(labels)} images")
        group_masks = token_masks(plan.token_groups, plan.sizes, grid, masks, ids.tolist(), seed)
        room = cost_of(plan, patchable).room(
            len(labels), memory_limit(memory_gb, patchable.device), plan.sizes.tokens, patchable.device
        )
        parts = []
        for first in range(0, len(labels), room.images):
            here = slice(first, first + room.images)
            pixels = {
                run: images[here].to(patchable.device, patchable.dtype)
                for run, images in ((BaseRun.CLEAN, clean), (BaseRun.CORRUPT, corrupt))
            }
            of_part = group_masks[:, here]
            outputs = execute(plan, patchable, pixels, of_part, room).cpu()
            parts.append(columns(outputs, plan, labels[here], ids[here], of_part, metric, rival))
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return _table(parts, plan, metric, ids if clusters is None else clusters)


def summarize(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means of ``patch``'s table over images, with 95 % intervals by resampling clusters: ``summary.csv``'s columns."""
    needed = {"example_id", "cluster", "label", "total_effect", "log_odds_recipient", *PATCH_COLUMNS}
    if missing := sorted(needed - set(table.columns)):
        raise VitPatchError(f"summarize: the table lacks {', '.join(missing)}; give what vitpatch.patch returned")
    patches = table[list(PATCH_COLUMNS)].drop_duplicates(ignore_index=True)
    images = table.drop_duplicates("example_id")

    def matrix(values: pd.Series) -> np.ndarray:
        return values.to_numpy().reshape(len(images), len(patches))

    measured = stats.Measured(
        effects=matrix(table["effect"]),
        correct=matrix(table["pred"] == table["label"]),
        log_odds=matrix(table["log_odds"] - table["log_odds_recipient"]),
        direct=matrix(table["direct_log_odds"]),
        delta_norm=matrix(table["delta_norm"]),
    )
    return stats.summarize(patches, measured, images[["cluster", "total_effect"]], seed)


_PROVEN: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
"""Of models proven before: their number of hooks then, and whether they can be run by their parts."""


def _patchable(model: nn.Module) -> PatchableViT:
    """The model with named sites; proven once, and again where hooks have come or gone."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise VitPatchError(f"model: got {type(model).__name__}; expected a Hugging Face image classifier")
    patchable = PatchableViT(model, family_of(config.model_type, type(model).__name__))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    proven_with, patchable.stepwise = _PROVEN.get(model, (-1, True))
    if proven_with != hooks:
        patchable.prove()
        _PROVEN[model] = (hooks, patchable.stepwise)
    return patchable


def _check_images(model: PatchableViT, clean: Tensor, corrupt: Tensor, labels: Tensor, ids: Tensor) -> None:
    want = (len(labels), 3, *model.input_size)
    for name, images in (("clean", clean), ("corrupt", corrupt)):
        if tuple(images.shape) != want:
            raise VitPatchError(f"{name}: shape {tuple(images.shape)}; expected {want} for {len(labels)} labels")
    if len(labels) == 0:
        raise VitPatchError("labels: none; expected one an image")
    if not 0 <= int(labels.min()) <= int(labels.max()) < model.classes:
        raise VitPatchError(f"labels {int(labels.min())} to {int(labels.max())}: the model has {model.classes} classes")
    if len(ids) != len(labels) or len(ids.unique()) != len(ids):
        raise VitPatchError(f"ids: expected {len(labels)} different numbers, one an image")


def _target(
    site: str,
    tokens: str | Sequence[str],
    layers: Sequence[int] | None,
    heads: Sequence[int] | str | None,
    grid: tuple[int, int] | None,
) -> Target:
    site = one_of("target", site, Site)
    groups = [tokens] if isinstance(tokens, str) else tokens
    for name, values in (("tokens", groups), ("layers", layers), ("heads", heads)):
        if values is not None and len(values) == 0:
            raise VitPatchError(f"{name}: empty; expected at least one")
    if heads is None and site.by_head:
        heads = EVERY_HEAD
    return Target(
        site=site,
        layers=None if layers is None else tuple(layers),
        tokens=tuple(one_of("tokens", group, TokenGroup) for group in groups),
        heads=heads if isinstance(heads, str) or heads is None else tuple(heads),
        grid=None if grid is None else (int(grid[0]), int(grid[1])),
    )


def _windows(window: Any, site: str, heads: Any) -> tuple[int, ...]:
    if window is None:
        window = 1 if Site(site).by_head and heads != "joint" else 3
    windows = [window] if isinstance(window, int | str) else list(window)
    if not windows:
        raise VitPatchError("window: empty; expected at least one")
    for w in windows:
        if w not in WINDOW_WORDS and (isinstance(w, bool) or not isinstance(w, int) or w < 1):
            raise VitPatchError(f"window {w!r}: expected a whole number, 1 or more, prefix, suffix, or a list of these")
    return tuple(dict.fromkeys(WINDOW_WORDS.get(w, w) for w in windows))


def _table(parts: list[Columns], plan: Plan, metric: Metric, clusters: Sequence[int]) -> pd.DataFrame:
    """The rows of ``effects.parquet`` beside what is known of each image."""
    measured, number = joined(parts), len(plan.patches)
    table = pd.DataFrame(
        {field.name: measured.effects[field.name].astype(field.type.to_pandas_dtype()) for field in EFFECTS_SCHEMA}
    )
    base = {name: measured.examples[name] for name in EXAMPLES_SCHEMA.names if name in measured.examples}
    clean, corrupt = (
        base.get(f"{metric}_{run}", np.zeros(len(clusters)))  # the clean run's KL from itself is 0 and not stored
        for run in (BaseRun.CLEAN, BaseRun.CORRUPT)
    )
    of_image = base | {
        "cluster": np.asarray(clusters),
        "total_effect": total_effect(clean, corrupt, plan.direction),
        "log_odds_recipient": base[f"log_odds_{plan.direction.recipient}"],
    }
    of_image.pop("example_id")
    repeated = pd.DataFrame({name: np.repeat(values, number) for name, values in of_image.items()})
    first = ["label", "cluster", "total_effect"]
    parts_of_table = [table[["example_id"]], repeated[first], table.drop(columns="example_id")]
    return pd.concat([*parts_of_table, repeated.drop(columns=first)], axis=1)
