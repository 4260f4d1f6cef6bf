"""From Python: images → corrupted ones; two pixel tensors → the table of effects, without Lightning or a tracker."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vitpatch.checks import Index, Seed, check, one_of, parse_window, whole_numbers
from vitpatch.corruptions.base import as_corruption
from vitpatch.data.arrays import GivenImages, choose_others
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
from vitpatch.types import (
    EVERY_HEAD,
    JOINT,
    BaseRun,
    Direction,
    Donor,
    Interval,
    Metric,
    Partner,
    Site,
    Target,
    TokenGroup,
)

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


def corrupt(
    name: str,
    images: Any,
    *,
    model: PatchableViT | None = None,
    masks: Any = None,
    labels: Sequence[int] | None = None,
    clusters: Sequence[Any] | None = None,
    pairs: Any = None,
    ids: Sequence[int] | None = None,
    seed: int = 0,
    **keys: Any,
) -> Tensor:
    """Corrupts images by an option of ``conf/corruption``, as ``patch.py corruption=NAME`` does: ``gray``, for one.

    Parameters:
    - ``images``: PIL images (one or several), bytes (images, height, width, 3), or numbers in [0, 1] (images, 3,
      height, width), not normalised.
    - ``model``: what ``vitpatch.load`` returned of a hub id or folder. Images are resized and cropped as it wants them
      (numbers must have that size), and what is returned is normalised: what ``vitpatch.patch`` takes. So the clean
      images are those of ``none``.
    - ``keys``: the option's own, such as ``std=0.4`` of ``noise`` or ``steps=["gray", "blur"]`` of ``chain``.
    - ``masks``, for what goes by the object, 1 = object: PIL images, bytes (images, height, width), or numbers in
      [0, 1] (images, 1, height, width).
    - ``labels`` (images,), for what takes another image: partners are chosen by them as in a run, never within one of
      ``clusters`` (images,), default ``ids``. With ``kind="pair"`` ``pairs`` are each image's partner.
    - ``ids`` (images,), default the row, and ``seed``: what is drawn for an image is a function of both.

    Returns float32 (images, 3, height, width) on the [0, 1] scale, with ``model`` normalised, in its type: of a run's
    images, ids and seed the run's own values. Raises ``VitPatchError`` for a name that is no option, and for what the
    option does not take or lacks.
    """
    from vitpatch.runs.config import make_corruption  # with Hydra, which patching does without

    check("seed", seed, Seed)
    if model is not None and getattr(model, "preprocessing", None) is None:
        raise VitPatchError(
            f"model: got {type(model).__name__} without an image processor; give what vitpatch.load returned of a hub "
            "id or folder, or give no model and normalise yourself"
        )
    given = GivenImages(*((None, None) if model is None else (model.preprocessing.to_input, model.input_size)))
    batch = given.batch(images, masks, ids, labels)
    corruption = as_corruption(make_corruption(name, keys))
    if corruption.is_inside_model:
        raise VitPatchError(
            f"corruption {name}: is added inside the model, no pixels show it; patch with python patch.py "
            f"corruption={name}, and read the run with vitpatch.load_run(folder)"
        )
    if corruption.needs_masks and masks is None:
        raise VitPatchError(f"corruption {name}: goes by the object; give masks of the images, 1 = object")
    if corruption.partner is Partner.PAIR:
        if pairs is None:
            raise VitPatchError(f"corruption {name}: takes each image's counterpart; give pairs, as many as images")
        batch = replace(batch, others=given.pairs(pairs, batch))
    elif corruption.partner is not None:
        if labels is None:
            raise VitPatchError(f"corruption {name}: takes another image by its class; give labels of the images")
        batch = replace(batch, others=choose_others(batch, corruption.partner, clusters, seed, name))
    corrupted = corruption.pixels(batch, seed)
    return corrupted if model is None else model.normalize(corrupted.to(model.device)).cpu()


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
    progress: bool = True,
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
    - ``progress``: whether a bar shows how many images are done, in a notebook or terminal.

    The model is left as it was, on its device, in its mode.

    Returns the columns of ``effects.parquet`` (its docstring is ``vitpatch.schema.EFFECTS_SCHEMA``'s), after
    ``example_id`` also ``label``, ``cluster``, ``direction``, ``metric`` and ``total_effect``, at the end the base
    runs' metrics (``prob_clean``, …).
    Raises ``VitPatchError`` for what does not fit the model. ``vitpatch.summarize`` has the means.
    """
    if not isinstance(model, nn.Module):
        raise VitPatchError(f"model: got {type(model).__name__}; expected a Hugging Face image classifier")
    labels = torch.tensor(whole_numbers("labels", labels), dtype=torch.int64)
    ids = torch.tensor(whole_numbers("ids", range(len(labels)) if ids is None else ids), dtype=torch.int64)
    clusters = ids.tolist() if clusters is None else whole_numbers("clusters", clusters)
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
        parts = []
        with _bar(len(labels), progress) as bar:
            for rows, outputs in _execute_in_parts(plan, vit, images, group_masks, memory_gb):
                parts.append(to_columns(outputs, plan, labels[rows], ids[rows], group_masks[:, rows], metric, rival))
                bar.update(len(labels[rows]))
    for note in vit.notes:
        log.warning("%s", note)
    return _table(parts, plan, metric, clusters)


def _bar(images: int, is_wanted: bool) -> tqdm:
    """A bar of images, gone when they are done; where nobody watches, neither a notebook nor a terminal, none."""
    is_watched = "ipykernel" in sys.modules or sys.stderr.isatty()
    return tqdm(total=images, desc="patching", unit=" images", leave=False, disable=not (is_wanted and is_watched))


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
        heads = tuple(dict.fromkeys(whole_numbers("heads", heads)))
    layers = None if layers is None else tuple(dict.fromkeys(whole_numbers("layers", layers)))
    for name, values in (("tokens", groups), ("layers", layers), ("heads", heads)):
        if values is not None and len(values) == 0:
            raise VitPatchError(f"{name}: empty; expected at least one")
    if grid is not None:
        grid = whole_numbers("grid", grid)
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
