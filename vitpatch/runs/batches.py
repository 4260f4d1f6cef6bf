"""Batches of images, corrupted and patched as a run's setup says: the rows of its tables, and its example pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpatch.data.datamodule import DecodedImages, ImageDataModule, training_batches
from vitpatch.data.labels import UNKNOWN
from vitpatch.errors import VitPatchError
from vitpatch.formatting import format_count, format_duration
from vitpatch.patching.cost import describe_cost, estimate_cost, memory_limit
from vitpatch.patching.executor import execute, mean_values, random_object_overlap, token_masks, zero_values
from vitpatch.patching.metrics import AblationValues, Columns, Outputs, average_draws, join_columns, to_columns
from vitpatch.plots.examples import MEANS_OF_DRAWS, ExampleImage, ExamplePage, in_even_steps
from vitpatch.plots.style import label_words, place_words
from vitpatch.runs.setup import Setup
from vitpatch.runs.trainer import on_device, use_matmul_precision
from vitpatch.schema import (
    CONTROL_METRICS,
    EFFECTS_SCHEMA,
    EXAMPLES_SCHEMA,
    LEAVE_OUTS_SCHEMA,
    OBJECT_OVERLAP,
    OF_CORRUPTION,
    STORED_METRICS,
)
from vitpatch.stats.result import RunResult, base_metric, is_included
from vitpatch.stats.view import depends_on_view, effects_in_view, examples_in_view, stored_columns
from vitpatch.study import Study, View
from vitpatch.types import BaseRun, Donor, ImageBatch, Run, TokenGroup

log = logging.getLogger(__name__)

IMAGES_A_PAGE = 6
"""Of an example page."""
EXAMPLE_DRAWS = 10
"""Of noise on embeddings, for an image that is looked at by itself (Meng et al. 2022)."""


class BatchPatcher:
    """Patches batches by a run's plan, some images at a time, where its model is now.

    ``draws`` of noise on embeddings an image, whose probabilities are averaged; ``None`` = as the corruption says.
    ``before``: images and rows of a call of an earlier start, used again where they fit. ``ablation_values`` of a donor
    that is no run, where they are known. ``cost_line`` says what the plan costs, once that was logged. Raises
    ``VitPatchError`` where one image does not fit the memory.
    """

    def __init__(
        self,
        setup: Setup,
        batch_size: int,
        draws: int | None = None,
        before: tuple[int, int] | None = None,
        ablation_values: AblationValues | None = None,
    ) -> None:
        self.setup, self.plan, self.model = setup, setup.plan, setup.model
        self._batch_size = min(batch_size, len(setup.images))
        self.draws = setup.corruption.draws if draws is None else draws
        self.cost = estimate_cost(self.plan, self.model, len(setup.partners))
        device = self.model.device
        limit = memory_limit(setup.cfg.memory_gb, device)
        self.limits = self.cost.limits(self._batch_size, limit, self.plan.sizes.tokens, device, before=before)
        self._ablation_values = self._make_ablation_values() if ablation_values is None else ablation_values
        self.cost_line: str | None = None

    def _make_ablation_values(self) -> AblationValues | None:
        """The values of a donor that is no run; ``None`` for one that is."""
        site, training = self.plan.target.site, self.setup.training
        if self.plan.donors[0] is Donor.ZERO:
            return zero_values(self.model, site)
        if self.plan.donors[0] is not Donor.MEAN:
            return None
        log.info("mean of %s over %s", site, format_count(len(training), "training image"))
        return mean_values(self.model, site, self._training_pixels())

    def _training_pixels(self) -> Iterator[Tensor]:
        decoded = DecodedImages(self.setup.training, self.model.preprocessing.to_input, masks=False)
        for batch, _ in training_batches(decoded, self._batch_size):
            for part in self.parts(batch) if batch is not None else ():
                yield self.model.normalize(part.images.to(self.model.device))

    def parts(self, images: ImageBatch) -> Iterator[ImageBatch]:
        """A batch in parts of as many images as are computed at once."""
        for first in range(0, len(images), self.limits.images):
            yield images.part(slice(first, first + self.limits.images))

    def columns(self, images: ImageBatch, logs_cost: bool = False) -> Columns:
        """The columns of a batch; the first part of the first batch is timed for ``cost_line``, if ``logs_cost``.

        Raises ``VitPatchError`` where a logit is not finite.
        """
        measured = []
        for part in self.parts(images):
            started = time.perf_counter()
            measured.append(self.part(part))
            if logs_cost and self.cost_line is None:
                self.cost_line = self._log_cost(len(part), time.perf_counter() - started)
        return join_columns(measured)

    def part(self, images: ImageBatch) -> Columns:
        """The columns of as many images as are computed at once."""
        setup, plan, model, seed = self.setup, self.plan, self.model, self.setup.study.seed
        others = {d: images.partners[d.partner] for d in plan.base_runs if isinstance(d, Donor)}
        pixels: dict[Run, Tensor] = {
            BaseRun.CLEAN: model.normalize(images.images),
            BaseRun.CORRUPT: model.normalize(setup.corruption.pixels(images, seed)),
            **{donor: model.normalize(other.images) for donor, other in others.items()},
        }
        images = images.to("cpu")
        blocks, ids, objects = plan.target.grid, images.ids.tolist(), model.crop_to_patches(images.masks)
        masks = token_masks(plan.token_groups, plan.sizes, blocks, objects, ids, seed)
        outputs = average_draws(self._draws(pixels, masks, images.ids))
        self._check_finite(outputs, pixels, images)
        predicted = outputs.base[BaseRun.CLEAN].argmax(1)
        labels = images.labels.where(images.labels != UNKNOWN, predicted)
        ids_of = {donor: other.ids.cpu() for donor, other in others.items()}
        measured = to_columns(outputs, plan, labels, images.ids, masks, setup.study.metric, setup.study.rival, ids_of)
        if (kind := setup.corruption.partner) is not None:
            measured.examples[OF_CORRUPTION] = images.partners[kind].ids.numpy()
        if TokenGroup.RANDOM_OBJECT in plan.token_groups:
            measured.examples[OBJECT_OVERLAP] = random_object_overlap(plan.sizes, objects, ids, seed)
        return measured

    def _draws(self, pixels: Mapping[Run, Tensor], masks: Tensor, ids: Tensor) -> Iterator[Outputs]:
        """What the plan gives, once for each draw of noise on embeddings."""
        corruption, model = self.setup.corruption, self.model
        for draw in range(self.draws):
            noise = None
            if corruption.is_inside_model:
                noise = corruption.embedding_noise(ids, self.setup.study.seed, model.embedding_shape, draw)
                noise = noise.to(model.device, model.dtype)
            yield execute(self.plan, model, pixels, masks, self.limits, self._ablation_values, noise).cpu()

    def _check_finite(self, outputs: Outputs, pixels: dict[BaseRun, Tensor], images: ImageBatch) -> None:
        for run in self.plan.base_runs:
            for row in _rows_not_finite(outputs.base[run]):
                layer = self.model.first_bad_layer(pixels[run][row : row + 1])
                where = "in the classifier" if layer is None else f"from layer {layer} on"
                raise VitPatchError(
                    f"image {images.ids[row]}: the {run} run is not finite {where}; check the weights and dtype"
                )
        for (patch, _), patched in zip(self.plan.runs, outputs.patched, strict=True):
            for row in _rows_not_finite(patched):
                what = f"{patch.site} of layers {patch.layers[0]} to {patch.layers[-1]}"
                raise VitPatchError(f"image {images.ids[row]}: with {what} patched the logits are not finite")

    def _log_cost(self, images: int, seconds: float) -> str:
        """Logs what the run costs, and that its first ``images`` took so many seconds; the line."""
        setup = self.setup
        time_left = seconds / images * len(setup.images) / setup.trainer.world_size
        first = f"first {images} images in {seconds:.2g} s" if images > 1 else f"first image in {seconds:.2g} s"
        about = f"about {format_duration(time_left)} for {format_count(len(setup.images), 'image')} ({first})"
        line = f"{describe_cost(self.plan, self.cost, self.limits)}, {about}"
        if self.draws > 1:
            line += f", {self.draws} draws of noise each"
        log.info("plan: %s", line)
        if (caveat := self.model.caveat(self.plan.target.site)) is not None:
            log.warning("%s", caveat)
        return line

    def compare_with_float32(self, images: ImageBatch, effects: np.ndarray) -> dict[str, float] | None:
        """How far the ``effects`` of a batch are from those in float32; ``None`` where it has none.

        ``largest`` and ``mean`` distance, ``largest_effect`` in float32, and how many ``images``.
        """
        device = self.model.device
        checkpoint = replace(self.setup.checkpoint, dtype="float32")
        model = checkpoint.load(self.model.label_names).to(device)
        setup = replace(self.setup, model=model)
        patcher = BatchPatcher(setup, self._batch_size, self.draws, ablation_values=self._ablation_values)
        with torch.autocast(device.type, enabled=False), use_matmul_precision("highest"):
            exact = patcher.columns(images).effects["effect"]
        if model is not self.model:  # whose place on the device is needed
            model.to("cpu")
        known = ~np.isnan(exact)  # of images that have a partner, where another image is the donor
        if not known.any():
            return None
        error, largest = np.abs(effects - exact)[known], float(np.abs(exact[known]).max())
        log.info(
            "precision: effects on %s of the first %d images differ from float32 by %.2g at most, %.2g on average "
            "(largest effect %.2g)",
            self.setup.study.metric, len(images), error.max(), error.mean(), largest,
        )  # fmt: skip
        distance = {"largest": float(error.max()), "mean": float(error.mean())}
        return distance | {"largest_effect": largest, "images": len(images)}


def _rows_not_finite(logits: Tensor) -> list[int]:
    return (~logits.isfinite().all(-1)).nonzero().flatten().tolist()


def tables_of(setup: Setup, measured: Columns) -> dict[str, pa.Table]:
    """The columns of a batch as tables, by the names of a run's files."""
    images, names = setup.images, setup.label_names
    at = images.positions(measured.examples["example_id"])
    included = is_included(setup.study.include, measured.examples, setup.study.metric)
    if setup.study.donor.partner is not None:
        included &= measured.examples[f"partner_{setup.study.donor}"] >= 0
    examples = measured.examples | {
        "label_name": [names[i] if names else str(i) for i in measured.examples["label"].tolist()],
        "label_is_predicted": images.labels[at] == UNKNOWN,
        "included": included,
        "cluster": images.clusters[at],
    }
    plan = setup.plan
    also = _partner_fields(plan.donors, bool(plan.all_layers))
    also += [pa.field(OF_CORRUPTION, pa.int64())] * (OF_CORRUPTION in examples)
    also += [pa.field(OBJECT_OVERLAP, pa.float32())] * (OBJECT_OVERLAP in examples)
    tables = {
        "examples": _table(examples, pa.schema([*EXAMPLES_SCHEMA, *also])),
        "effects": _table(measured.effects, pa.schema([*EFFECTS_SCHEMA, *_control_fields(plan.donors)])),
    }
    if plan.leave_outs:
        tables["leave_outs"] = _table(measured.leave_outs, LEAVE_OUTS_SCHEMA)
    return tables


def _partner_fields(donors: Sequence[Donor], all_layers: bool) -> list[pa.Field]:
    """Columns of ``examples.parquet`` for donors that are other images, and for all layers patched at once.

    ``partner_*`` is the other image's ``example_id`` (−1: it has none); ``prob_*`` and so on what its clean run says of
    this image's label.
    """
    others = [donor for donor in donors if donor.partner is not None]
    fields = [
        pa.field(f"{name}_{donor}", pa.int64() if name == "partner" else pa.float32())
        for donor in others
        for name in ("partner", *STORED_METRICS)
    ]
    return fields + [pa.field(f"{name}_all_layers", pa.float32()) for name in CONTROL_METRICS if all_layers]


def _control_fields(donors: Sequence[Donor]) -> list[pa.Field]:
    """Columns of ``effects.parquet`` for the donors after the first: the same patch with their activations."""
    return [pa.field(f"{name}_{donor}", pa.float32()) for donor in donors[1:] for name in CONTROL_METRICS]


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(columns[f.name]).cast(f.type, safe=False) for f in schema], schema=schema)


def tables_in_view(tables: Mapping[str, pa.Table], study: Study) -> Mapping[str, pa.Table]:
    """The tables of some images, by the names of their files, from those of the default view."""
    written = View().rival
    examples = examples_in_view(tables["examples"].to_pandas(), study, written)
    changed = {"examples": examples}
    for kind, table in tables.items():
        if kind != "examples":
            names = [name for name in table.column_names if depends_on_view(name)]
            stored = table.select(stored_columns(names, study, written)).to_pandas()
            changed[kind] = effects_in_view(stored, examples, study, written, names)
    return {kind: _replace_columns(table, changed[kind]) for kind, table in tables.items()}


def _replace_columns(table: pa.Table, changed: pd.DataFrame) -> pa.Table:
    """A table with those columns of ``changed`` that depend on the view."""
    for number, field in enumerate(table.schema):
        if depends_on_view(field.name):
            table = table.set_column(number, field, pa.array(changed[field.name].to_numpy(), field.type))
    return table


def choose_examples(setup: Setup, result: RunResult, data: ImageDataModule) -> list[ExamplePage]:
    """Pages of the images that the corruption moves most, of images by their effect at the peak, and drawn by lot.

    On the trainer's device where the model is needed again.
    """
    also = MEANS_OF_DRAWS.format(EXAMPLE_DRAWS) if _is_drawn_again(setup) else ""
    pages = list(_choose_rows(result))
    rows = sorted({int(row) for _, _, at in pages for row in at})  # an image may be on several pages
    where = on_device(setup.model, setup.trainer, setup.cfg.matmul_precision) if also else nullcontext()
    with where:
        images = dict(zip(rows, _example_images(setup, result, data, rows), strict=True))
    return [ExamplePage(name, words + also, [images[row] for row in at]) for name, words, at in pages]


def _is_drawn_again(setup: Setup) -> bool:
    """Whether single images are shown by more draws of noise than the run took."""
    return setup.corruption.is_inside_model and setup.corruption.draws < EXAMPLE_DRAWS


def _choose_rows(result: RunResult) -> Iterator[tuple[str, str, NDArray[np.intp]]]:
    """(name of the page, how they were picked, positions among the included images)."""
    total, number = result.examples["total_effect"].to_numpy(), min(IMAGES_A_PAGE, len(result.examples))
    images = format_count(number, "image")
    if not np.isnan(total).any():
        most = np.argsort(-(result.total_sign or 1) * total, kind="stable")[:number]
        yield "largest", f"the {images} with the largest total effect", most
    if result.peak is not None:
        effects = result.total_sign * result.effects[:, result.peak.name]
        place, median = place_words(result.peak_layer, result.peak_series), result.total_sign * np.median(effects)
        words = f"{images} from the largest to the smallest effect at {place}, in even steps (median {median:+.3f})"
        yield "sorted", words, in_even_steps(effects, number)
    lot = np.random.default_rng(result.study.seed).choice(len(total), number, replace=False)
    yield "random", f"{images} drawn by lot", np.sort(lot)


def _example_images(
    setup: Setup, result: RunResult, data: ImageDataModule, rows: Sequence[int]
) -> Iterator[ExampleImage]:
    """The images at ``rows`` of the result: decoding and corruption are functions of the image's id."""
    examples = result.examples.iloc[rows]
    batch = data.batch_of(examples["example_id"].tolist())
    images = {BaseRun.CLEAN: batch.images, BaseRun.CORRUPT: setup.corruption.pixels(batch, setup.study.seed)}
    as_bytes = {
        run: (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for run, x in images.items()
    }
    names = setup.label_names
    base, patched, predictions = _example_values(setup, result, examples, rows, batch)
    for i, example in enumerate(examples.to_dict("records")):
        metric = {run: float(values[i]) for run, values in base.items()}
        predicted = {run: int(predictions[run][i]) for run in BaseRun}
        yield ExampleImage(
            example_id=int(example["example_id"]),
            name=f"{setup.images.name(example['example_id'])} – {label_words(example)}",
            pictures={run: as_bytes[run][i] for run in BaseRun},
            predicted={run: names[p] if names else str(p) for run, p in predicted.items()},
            base=metric,
            patched=patched[i],
        )


def _example_values(
    setup: Setup, result: RunResult, examples: pd.DataFrame, rows: Sequence[int], batch: ImageBatch
) -> tuple[dict[BaseRun, NDArray], NDArray, dict[BaseRun, NDArray]]:
    """The headline metric of the base runs (images,) and of the patched ones (images, patches), and predictions.

    Those of the files; of noise on embeddings the mean over ``EXAMPLE_DRAWS`` draws, by the model again.
    """
    metric, recipient = setup.study.metric, setup.study.direction.recipient
    if _is_drawn_again(setup):
        known = replace(batch, labels=torch.tensor(examples["label"].tolist()))
        measured = BatchPatcher(setup, len(rows), EXAMPLE_DRAWS).columns(known.to(setup.model.device))
        examples = pd.DataFrame({name: values for name, values in measured.examples.items() if values.ndim == 1})
        effects = measured.effects["effect"].reshape(len(rows), -1)
    else:
        effects = result.effects[rows]
    base = {run: base_metric(examples, run, metric) for run in BaseRun}
    predictions = {run: examples[f"pred_{run}"].to_numpy() for run in BaseRun}
    return base, base[recipient][:, None] + effects, predictions
