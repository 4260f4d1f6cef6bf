"""From Python: two pixel tensors → the table of effects, without Hydra, Lightning or Weights & Biases."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vitpatch.checks import Index, check, one_of, parse_window
from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.models.families import family_of
from vitpatch.models.verify import matches_own_forward, verify_model
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.cost import estimate_cost, memory_limit
from vitpatch.patching.executor import execute, token_masks
from vitpatch.patching.metrics import Columns, Outputs, join_columns, to_columns
from vitpatch.patching.plan import Plan, make_plan
from vitpatch.schema import EFFECTS_SCHEMA, EXAMPLES_SCHEMA
from vitpatch.stats.result import total_effects
from vitpatch.stats.table import result_of
from vitpatch.types import EVERY_HEAD, JOINT, BaseRun, Direction, Donor, Interval, Metric, Site, Target, TokenGroup

log = logging.getLogger(__name__)

Window = int | str


def load(model: nn.Module | str | Path, input_size: tuple[int, int] | None = None) -> PatchableViT:
    """A Hugging Face image classifier with named sites, for any number of calls of ``patch``.

    ``model`` is a loaded one, or a hub id or a folder that ``save_pretrained`` wrote. ``input_size`` (height, width) is
    that of the images, for a loaded model that takes any (default: its config's). That its sites are where they are
    taken to be is verified here, on three random images: load it again after a change of the model, such as a new hook
    or adapter. A loaded model is left as it was. Raises ``VitPatchError`` for what is no vision transformer of a known
    family.
    """
    if isinstance(model, str | Path):
        if input_size is not None:
            raise VitPatchError(f"input_size {input_size}: is of a loaded model; a checkpoint says its own")
        return Checkpoint(str(model)).load_unshared()
    _check_is_classifier(model)
    family = family_of(model.config.model_type, type(model).__name__)
    if family.blocks.startswith("backbone.") and not hasattr(model, "backbone"):
        raise VitPatchError(f"model: {type(model).__name__} is a backbone; patch.py takes it with model.head_path")
    with _in_eval_mode(model):
        vit = PatchableViT(model, family, input_size=input_size)
        verify_model(vit)
    return vit


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
    """Patches an image classifier; a row an image and patch.

    Parameters:
    - ``model``: what ``vitpatch.load`` returned; or a Hugging Face model, which is then verified in each call.
    - ``clean``, ``corrupt`` (images, 3, height, width): ``pixel_values`` as the model takes them, normalised;
      ``labels`` (images,): class indices.
    - ``target``: ``resid_pre``, ``attn_out``, ``resid_mid``, ``mlp_out``, ``resid_post``, or by head ``z``, ``q``,
      ``k``, ``v``, ``pattern`` (``vitpatch.types.Site``); ``heads`` of these: ``"all"``, one at a time (default), a
      list, or ``"joint"``. ``layers``: a list of 0-based indices, the windows' centres (default: all).
    - ``window``: a number of layers (default 3, at most the depth; 1 where single heads are patched), ``"prefix"``,
      ``"suffix"``, or a list of these.
    - ``tokens``: ``all``, ``cls``, ``registers``, ``patches``, ``object``, ``background``, ``random_object``,
      ``each``, ``grid`` (with ``grid=(rows, columns)``), or a list. ``masks`` (images, 1, height, width) in [0, 1],
      1 = object, are for the groups that need them.
    - ``direction``: ``denoise`` (clean into the corrupted run) or ``noise``. ``metric`` of ``effect``: ``prob``,
      ``log_odds``, ``logit``, ``logit_diff`` (against the runner-up of the ``rival`` run), ``kl``.
    - ``ids`` (images,), default the row, and ``seed``: what is drawn by image is a function of both. Images of one of
      ``clusters`` (images,), default ``ids``, are not independent.
    - ``memory_gb``: bound on what states take (default: what is free, less a fifth).

    The model is left as it was, on its device, in its mode.

    Returns the columns of ``effects.parquet`` (its docstring is ``vitpatch.schema.EFFECTS_SCHEMA``'s), after
    ``example_id`` also ``label``, ``cluster``, ``direction``, ``metric`` and ``total_effect``, at the end the base
    runs' metrics (``prob_clean``, …).
    Raises ``VitPatchError`` for what does not fit the model. ``vitpatch.summarize`` has the means.
    """
    if not isinstance(model, nn.Module):
        raise VitPatchError(f"model: got {type(model).__name__}; expected a Hugging Face image classifier")
    labels = torch.tensor(_integers("labels", labels), dtype=torch.int64)
    ids = torch.tensor(_integers("ids", range(len(labels)) if ids is None else ids), dtype=torch.int64)
    clusters = ids.tolist() if clusters is None else _integers("clusters", clusters)
    metric, rival = one_of("metric", metric, Metric), one_of("rival", rival, BaseRun)
    with _in_eval_mode(model):
        vit = model if isinstance(model, PatchableViT) else load(model, _input_size(clean))
        _check_images(vit, clean, corrupt, labels, masks)
        if len(ids) != len(labels) or len(ids.unique()) != len(ids) or int(ids.min()) < 0:
            raise VitPatchError(f"ids: expected {len(labels)} different numbers, 0 or more, one an image")
        if len(clusters) != len(labels):
            raise VitPatchError(f"clusters: {len(clusters)} of them, {len(labels)} images")
        check("seed", seed, Index)
        what = _target(target, tokens, layers, heads, grid)
        vit.require(what.site)
        windows = _windows(window, what, vit.sizes.depth)
        plan = make_plan(what, windows, one_of("direction", direction, Direction), vit.sizes)
        masks = vit.crop_to_patches(masks)
        group_masks = token_masks(plan.token_groups, plan.sizes, what.grid, masks, ids.tolist(), seed)
        images = {BaseRun.CLEAN: clean, BaseRun.CORRUPT: corrupt}
        parts = [
            to_columns(outputs, plan, labels[rows], ids[rows], group_masks[:, rows], metric, rival)
            for rows, outputs in _execute_in_parts(plan, vit, images, group_masks, memory_gb)
        ]
    for note in vit.notes:
        log.warning("%s", note)
    return _table(parts, plan, metric, clusters)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block all modules are in ``eval`` mode; each has its own again after it."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def _execute_in_parts(
    plan: Plan, vit: PatchableViT, images: Mapping[BaseRun, Tensor], group_masks: Tensor, memory_gb: float | None
) -> Iterator[tuple[slice, Outputs]]:
    """Which images are computed at once, as many as memory allows, and what the plan gives on them, on the CPU.

    If the base runs' logits, computed by parts, are not the model's own (a hook that is new, or does something else on
    these images), every patch of this call is a full forward pass, and a warning says so.
    """
    number, stepwise = len(images[BaseRun.CLEAN]), vit.stepwise
    limit = memory_limit(memory_gb, vit.device)
    limits = estimate_cost(plan, vit).limits(number, limit, plan.sizes.tokens, vit.device, waiting=0)
    try:
        for first in range(0, number, limits.images):
            rows = slice(first, first + limits.images)
            pixels = {run: x[rows].to(vit.device, vit.dtype) for run, x in images.items()}
            outputs = execute(plan, vit, pixels, group_masks[:, rows], limits)
            if first == 0:
                by_parts = vit.runs_by_parts(plan.target.site)
                if by_parts and not matches_own_forward(vit, pixels, outputs.base):
                    vit.stepwise = False
                    outputs = execute(plan, vit, pixels, group_masks[:, rows], limits)
                if (caveat := vit.caveat(plan.target.site)) is not None:
                    log.warning("%s", caveat)
            yield rows, outputs.cpu()
    finally:
        vit.stepwise = stepwise


def summarize(table: pd.DataFrame, seed: int = 0, method: str = "percentile") -> pd.DataFrame:
    """Means of ``patch``'s table over images, with 95 % intervals by resampling clusters: ``summary.csv``'s columns.

    ``method`` of the intervals: ``percentile`` or ``bca``.
    """
    return result_of("summarize", table, seed, one_of("method", method, Interval)).summary


def _check_is_classifier(model: Any) -> None:
    """Raises ``VitPatchError`` for what is no Hugging Face model, or wraps one, which then is to be given itself."""
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise VitPatchError("model: is compiled; give the model as it was before torch.compile (model._orig_mod)")
    if type(model).__module__.startswith("peft."):
        raise VitPatchError(f"model: {kind} is peft's; give model.merge_and_unload(), or model.get_base_model()")

    def is_of_hugging_face(module: Any) -> bool:
        return isinstance(module, nn.Module) and hasattr(getattr(module, "config", None), "model_type")

    if not is_of_hugging_face(model):
        parts = model.named_children() if isinstance(model, nn.Module) else ()
        for name, part in parts:
            if is_of_hugging_face(part):
                raise VitPatchError(f"model: got {kind}; give the Hugging Face model that it holds (model.{name})")
        raise VitPatchError(f"model: got {kind}; expected a Hugging Face image classifier")


def _input_size(images: Any) -> tuple[int, int] | None:
    """(height, width) of a batch of images, if it is one."""
    return tuple(images.shape[2:]) if isinstance(images, Tensor) and images.dim() == 4 else None


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """A sequence, array, series or tensor of whole numbers as a tuple; of heads and layers also one by itself."""
    if name in ("heads", "layers") and isinstance(values, int):
        values = [values]
    try:
        numbers = tuple(values.tolist() if hasattr(values, "tolist") else values)
        if any(isinstance(number, bool) for number in numbers):
            raise TypeError
        return tuple(operator.index(number) for number in numbers)
    except TypeError as error:
        raise VitPatchError(f"{name} {str(values)[:60]!r}: expected a list of whole numbers") from error


def _check_images(model: PatchableViT, clean: Tensor, corrupt: Tensor, labels: Tensor, masks: Tensor | None) -> None:
    number = len(labels)
    tensors = {"clean": (clean, 3), "corrupt": (corrupt, 3)} | ({} if masks is None else {"masks": (masks, 1)})
    for name, (images, channels) in tensors.items():
        if not isinstance(images, Tensor):
            raise VitPatchError(f"{name}: got {type(images).__name__}; expected a tensor")
        if not images.is_floating_point():
            raise VitPatchError(f"{name}: got {images.dtype}; expected normalised pixels, floating-point numbers")
        want = (number, channels, *model.input_size)
        if tuple(images.shape) != want:
            raise VitPatchError(f"{name}: shape {tuple(images.shape)}; expected {want} for {number} labels")
        if not images.isfinite().all():
            raise VitPatchError(f"{name}: not finite")
    if number == 0:
        raise VitPatchError("labels: none; expected one an image")
    if not 0 <= int(labels.min()) <= int(labels.max()) < model.classes:
        raise VitPatchError(f"labels {int(labels.min())} to {int(labels.max())}: the model has {model.classes} classes")
    if masks is not None and not 0 <= float(masks.min()) <= float(masks.max()) <= 1:
        raise VitPatchError(f"masks: values {float(masks.min()):g} to {float(masks.max()):g}; expected 0 to 1")


def _target(site: Any, tokens: Any, layers: Any, heads: Any, grid: Any) -> Target:
    site = one_of("target", site, Site)
    groups = [tokens] if isinstance(tokens, str) else list(tokens) if isinstance(tokens, list | tuple) else [tokens]
    if heads is None and site.by_head:
        heads = EVERY_HEAD
    if heads is not None and heads not in (EVERY_HEAD, JOINT):
        heads = tuple(dict.fromkeys(_integers("heads", heads)))
    layers = None if layers is None else tuple(dict.fromkeys(_integers("layers", layers)))
    for name, values in (("tokens", groups), ("layers", layers), ("heads", heads)):
        if values is not None and len(values) == 0:
            raise VitPatchError(f"{name}: empty; expected at least one")
    if grid is not None:
        grid = _integers("grid", grid)
        if len(grid) != 2 or min(grid) < 1:
            raise VitPatchError(f"grid {grid}: expected (rows, columns), 1 or more each")
    return Target(site, layers, tuple(one_of("tokens", group, TokenGroup) for group in groups), heads, grid)


def _windows(window: Any, target: Target, depth: int) -> tuple[int, ...]:
    if window is None:
        window = 1 if target.one_head_at_a_time else min(3, depth)
    windows = list(window) if isinstance(window, list | tuple) else [window]
    if not windows:
        raise VitPatchError("window: empty; expected at least one")
    return tuple(dict.fromkeys(map(parse_window, windows)))


def _table(parts: list[Columns], plan: Plan, metric: Metric, clusters: Sequence[int]) -> pd.DataFrame:
    """The rows of ``effects.parquet`` with what is known of each image."""
    measured, number = join_columns(parts), len(plan.patches)
    table = pd.DataFrame(
        {field.name: measured.effects[field.name].astype(field.type.to_pandas_dtype()) for field in EFFECTS_SCHEMA}
    )
    base = {name: measured.examples[name] for name in EXAMPLES_SCHEMA.names if name in measured.examples}
    of_image = base | {
        "cluster": np.asarray(clusters),
        "total_effect": total_effects(pd.DataFrame(base), Donor.PAIR, plan.direction, metric),
    }
    of_image.pop("example_id")
    repeated = pd.DataFrame({name: np.repeat(values, number) for name, values in of_image.items()})
    repeated = repeated.assign(direction=str(plan.direction), metric=str(metric))
    first = ["label", "cluster", "direction", "metric", "total_effect"]
    parts_of_table = [table[["example_id"]], repeated[first], table.drop(columns="example_id")]
    return pd.concat([*parts_of_table, repeated.drop(columns=first)], axis=1)
