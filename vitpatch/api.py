"""From Python: two pixel tensors → the table of effects, without Hydra, Lightning or Weights & Biases."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vitpatch.checks import one_of, whole_number, window_of
from vitpatch.errors import VitPatchError
from vitpatch.models.families import family_of
from vitpatch.models.formats import check_bare
from vitpatch.models.verify import is_itself, prove
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.cost import cost_of, memory_limit
from vitpatch.patching.executor import execute
from vitpatch.patching.metrics import total_effect
from vitpatch.patching.plan import Plan, make_plan
from vitpatch.patching.table import Columns, columns, joined
from vitpatch.patching.tokens import token_masks
from vitpatch.schema import EFFECTS_SCHEMA, EXAMPLES_SCHEMA, PATCH_COLUMNS
from vitpatch.stats import summary as stats
from vitpatch.stats.bootstrap import Resamples
from vitpatch.stats.measure import Read, summarized
from vitpatch.types import EVERY_HEAD, JOINT, BaseRun, Direction, Metric, Site, Target, TokenGroup

log = logging.getLogger(__name__)

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

    Parameters:
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
    ``example_id`` also ``label``, ``cluster``, ``total_effect`` and the base runs' metrics (``prob_clean``, …).
    Raises ``VitPatchError`` for what does not fit the model. ``vitpatch.summarize`` has the means.
    """
    if not isinstance(model, nn.Module):
        raise VitPatchError(f"model: got {type(model).__name__}; expected a Hugging Face image classifier")
    labels = torch.tensor(_integers("labels", labels), dtype=torch.int64)
    ids = torch.tensor(_integers("ids", range(len(labels)) if ids is None else ids), dtype=torch.int64)
    clusters = ids.tolist() if clusters is None else _integers("clusters", clusters)
    metric, rival = one_of("metric", metric, Metric), one_of("rival", rival, BaseRun)
    was_training = {module: module.training for module in model.modules()}
    try:
        patchable = _patchable(model, clean)
        _check_images(patchable, clean, corrupt, labels, masks)
        _check_ids(labels, ids, clusters, seed)
        target_ = _target(target, tokens, layers, heads, grid)
        target_.check_grid()
        patchable.require(target_.site)
        plan = make_plan(
            target_,
            _windows(window, target_, patchable.sizes.depth),
            one_of("direction", direction, Direction),
            patchable.sizes,
        )
        seen = patchable.covered(masks)
        group_masks = token_masks(plan.token_groups, plan.sizes, target_.grid, seen, ids.tolist(), seed)
        limit = memory_limit(memory_gb, patchable.device)
        room = cost_of(plan, patchable).room(len(labels), limit, plan.sizes.tokens, patchable.device, waiting=0)
        parts = []
        for first in range(0, len(labels), room.images):
            here = slice(first, first + room.images)
            images = {BaseRun.CLEAN: clean[here], BaseRun.CORRUPT: corrupt[here]}
            pixels = {run: x.to(patchable.device, patchable.dtype) for run, x in images.items()}
            outputs = execute(plan, patchable, pixels, group_masks[:, here], room)
            may_differ = first == 0 and patchable.goes_by_parts(target_.site) and _is_hooked(model)
            if may_differ and not is_itself(patchable, pixels, outputs.base):
                _PROVEN.pop(model, None)
                patchable.stepwise = False
                outputs = execute(plan, patchable, pixels, group_masks[:, here], room)
            outputs = outputs.cpu()
            parts.append(columns(outputs, plan, labels[here], ids[here], group_masks[:, here], metric, rival))
    finally:
        for module, mode in was_training.items():
            module.training = mode
    for line in filter(None, (patchable.caveat(target_.site), *patchable.notes)):
        log.warning("%s", line)
    return _table(parts, plan, metric, clusters)


def summarize(table: pd.DataFrame, seed: int = 0, method: str = "percentile") -> pd.DataFrame:
    """Means of ``patch``'s table over images, with 95 % intervals by resampling clusters: ``summary.csv``'s columns.

    ``method`` of the intervals: ``percentile`` or ``bca``.
    """
    if not isinstance(table, pd.DataFrame) or table.empty:
        raise VitPatchError(f"summarize: got {type(table).__name__} without rows; give what vitpatch.patch returned")
    needed = {"example_id", "cluster", "label", "total_effect", "log_odds_recipient", "prob_recipient", *PATCH_COLUMNS}
    if missing := sorted(needed - set(table.columns)):
        raise VitPatchError(f"summarize: the table lacks {', '.join(missing)}; give what vitpatch.patch returned")
    key = ["example_id", *PATCH_COLUMNS]
    if table.duplicated(key).any():
        row = table[table.duplicated(key)].iloc[0]
        raise VitPatchError(
            f"summarize: two rows of example_id {row['example_id']}, layer {row['layer']}; where tables of several "
            "calls are joined, give each its own ids"
        )
    patches = table[list(PATCH_COLUMNS)].drop_duplicates(ignore_index=True)
    in_order = patches.assign(_patch=range(len(patches)))
    table = table.merge(in_order, on=list(PATCH_COLUMNS)).sort_values(["example_id", "_patch"], ignore_index=True)
    images = table.drop_duplicates("example_id")
    if len(table) != len(images) * len(patches):
        raise VitPatchError(
            f"summarize: {len(table)} rows for {len(images)} images and {len(patches)} patches; expected one of each"
        )

    def matrix(values: pd.Series) -> np.ndarray:
        return values.to_numpy().reshape(len(images), len(patches))

    measured = stats.Measured(
        effects=matrix(table["effect"]),
        correct=matrix(table["pred"] == table["label"]),
        log_odds=matrix(table["log_odds"] - table["log_odds_recipient"]),
        direct=matrix(table["direct_log_odds"]),
        delta_norm=matrix(table["delta_norm"]),
    )
    prob = matrix(table["prob"] - table["prob_recipient"])
    read = Read(measured, prob, {}, np.zeros(len(images), dtype=bool))
    towards = float(np.sign(images["total_effect"].mean()))
    resamples = Resamples(images["cluster"].to_numpy(), seed)
    return summarized(patches, read, images[["cluster", "label", "total_effect"]], resamples, method, towards)[0]


_PROVEN: WeakKeyDictionary[nn.Module, tuple[Any, tuple[bool, bool, int, set[Site]]]] = WeakKeyDictionary()
"""Of models proven before: what they were made of then, and what was shown: by parts, by heads, readout, missing."""


def _patchable(model: nn.Module, images: Any) -> PatchableViT:
    """The model with named sites; proven once, and again where modules or hooks are other ones."""
    check_bare(model)
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise VitPatchError(f"model: got {type(model).__name__}; expected a Hugging Face image classifier")
    size = tuple(images.shape[2:]) if isinstance(images, Tensor) and images.dim() == 4 else None
    family = family_of(config.model_type, type(model).__name__)
    if family.blocks.startswith("backbone.") and not hasattr(model, "backbone"):
        raise VitPatchError(f"model: {type(model).__name__} is a backbone; patch.py takes it with model.head_path")
    patchable = PatchableViT(model, family, input_size=size)
    made_of, proven = (_made_of(model), patchable.input_size), _PROVEN.get(model)
    if made_of[0] is None or proven is None or made_of != proven[0]:
        prove(patchable)
        reader = patchable.readers.index(patchable.reader)
        shown = (patchable.stepwise, patchable.by_heads, reader, patchable.missing)
        _PROVEN[model] = (made_of, shown)
    else:
        patchable.stepwise, patchable.by_heads, reader, patchable.missing = proven[1]
        patchable.reader = patchable.readers[reader]
    return patchable


def _made_of(model: nn.Module) -> Any:
    """Modules, weights' types and places, and the numbers of hooks (each given once); ``None`` where it cannot tell.

    It cannot where a forward is the instance's own, or a linear layer's is not torch's: an adapter may be on or off.
    """
    for module in model.modules():
        is_adapted = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        if "forward" in vars(module) or is_adapted:
            return None
    modules = tuple(
        (name, type(module), type(module).forward, tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
        for name, module in model.named_modules()
    )
    weights = tuple((name, weight.dtype, weight.device) for name, weight in model.named_parameters())
    return modules, weights, torch.is_autocast_enabled(next(model.parameters()).device.type)


def _is_hooked(model: nn.Module) -> bool:
    """Whether a hook, which can do something else from one call to the next, is on a module or on all of them."""
    of_all = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return any(of_all) or any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


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
    channels = {"clean": 3, "corrupt": 3} | ({} if masks is None else {"masks": 1})
    for name, images in (("clean", clean), ("corrupt", corrupt), ("masks", masks)):
        if name not in channels:
            continue
        if not isinstance(images, Tensor):
            raise VitPatchError(f"{name}: got {type(images).__name__}; expected a tensor")
        if not images.is_floating_point():
            raise VitPatchError(f"{name}: got {images.dtype}; expected normalised pixels, floating-point numbers")
        want = (number, channels[name], *model.input_size)
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


def _check_ids(labels: Tensor, ids: Tensor, clusters: Sequence[int], seed: int) -> None:
    if len(ids) != len(labels) or len(ids.unique()) != len(ids) or int(ids.min()) < 0:
        raise VitPatchError(f"ids: expected {len(labels)} different numbers, 0 or more, one an image")
    if len(clusters) != len(labels):
        raise VitPatchError(f"clusters: {len(clusters)} of them, {len(labels)} images")
    whole_number("seed", seed, least=0)


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
    return tuple(dict.fromkeys(map(window_of, windows)))


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
        "log_odds_recipient": base[f"log_odds_{plan.recipient}"],
        "prob_recipient": base[f"prob_{plan.recipient}"],
    }
    of_image.pop("example_id")
    repeated = pd.DataFrame({name: np.repeat(values, number) for name, values in of_image.items()})
    first = ["label", "cluster", "total_effect"]
    parts_of_table = [table[["example_id"]], repeated[first], table.drop(columns="example_id")]
    return pd.concat([*parts_of_table, repeated.drop(columns=first)], axis=1)
