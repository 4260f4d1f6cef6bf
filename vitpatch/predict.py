"""The Lightning loop: batches of images → rows, streamed to the run's folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from tqdm import tqdm

from vitpatch.corruptions import corrupted
from vitpatch.data import BadImage, ImageDataModule
from vitpatch.effects import metrics, runner_up
from vitpatch.execute import Logits, execute
from vitpatch.setup import Setup
from vitpatch.spec import BaseRun, ImageBatch, VitPatchError
from vitpatch.store import EFFECTS_SCHEMA, EXAMPLES_SCHEMA, RunFolder, patch_columns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What a batch leaves: rows of both tables, and the images that could not be read."""

    examples: pa.Table | None
    effects: pa.Table | None
    bad: Sequence[BadImage]


class PatchingModule(lightning.LightningModule):
    """Corrupts a batch, runs the plan on it and reads the metrics off."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.model, self.corruption, self.plan, self.study = setup.model, setup.corruption, setup.plan, setup.study
        self._clusters = setup.images.clusters
        self._names = setup.label_names

    def predict_step(self, batch: tuple[ImageBatch | None, list[BadImage]], batch_idx: int = 0) -> Rows:
        """One batch of ``ImageDataModule`` → its rows. Raises ``VitPatchError`` where a logit is not finite."""
        images, bad = batch
        if images is None:
            return Rows(None, None, bad)
        pixels = {
            BaseRun.CLEAN: self.model.normalize(images.images),
            BaseRun.CORRUPT: self.model.normalize(corrupted(self.corruption, images, self.study.seed)),
        }
        logits = execute(self.plan, self.model, pixels).cpu()
        self._check_finite(logits, pixels, images)
        return Rows(*self._tables(logits, images.to("cpu")), bad)

    def _tables(self, logits: Logits, images: ImageBatch) -> tuple[pa.Table, pa.Table]:
        labels, clean = images.labels, logits.base[BaseRun.CLEAN]
        rivals = runner_up(logits.base[self.study.rival], labels)
        base = {run: _numpy(metrics(logits.base[run], labels, rivals, clean)) for run in BaseRun}
        patched = _numpy(metrics(logits.patched, labels, rivals, clean))  # (patches, batch) each
        recipient = base[self.plan.direction.recipient][self.study.metric]
        patched["effect"] = patched[self.study.metric] - recipient
        ids = images.ids.cpu().numpy()
        examples = {f"{name}_{run}": values for run in BaseRun for name, values in base[run].items()}
        examples |= {
            "example_id": ids,
            "label": labels.cpu().numpy(),
            "label_name": [self._names[i] if self._names else str(i) for i in labels.tolist()],
            "rival": rivals.cpu().numpy(),
            "included": np.ones(len(ids), dtype=bool),
            "cluster": self._clusters[ids],
        }
        columns = {name: np.tile(values, len(ids)) for name, values in patch_columns(self.plan).items()}
        columns |= {name: values.T.ravel() for name, values in patched.items()}
        columns["example_id"] = np.repeat(ids, len(self.plan.patches))
        return _table(examples, EXAMPLES_SCHEMA), _table(columns, EFFECTS_SCHEMA)

    def _check_finite(self, logits: Logits, pixels: dict[BaseRun, Tensor], images: ImageBatch) -> None:
        for run in BaseRun:
            for row in _rows_not_finite(logits.base[run]):
                layer = self.model.first_bad_layer(pixels[run][row : row + 1])
                where = "in the classifier" if layer is None else f"from layer {layer} on"
                raise VitPatchError(
                    f"image {images.ids[row]}: the {run} run is not finite {where}; check the weights and dtype"
                )
        for patch, patched in zip(self.plan.patches, logits.patched, strict=True):
            for row in _rows_not_finite(patched):
                what = f"{patch.site} of layers {patch.layers[0]} to {patch.layers[-1]}"
                raise VitPatchError(f"image {images.ids[row]}: with {what} patched the logits are not finite")


def _rows_not_finite(logits: Tensor) -> list[int]:
    return (~logits.isfinite().all(-1)).nonzero().flatten().tolist()


def _numpy(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {str(name): value.cpu().numpy() for name, value in values.items()}


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(columns[f.name]).cast(f.type, safe=False) for f in schema], schema=schema)


class ShardWriter(BasePredictionWriter):
    """Streams the rows of each batch to the run's folder; an unreadable image is counted, or stops the run."""

    def __init__(self, folder: RunFolder, on_error: str) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.on_error = folder, on_error
        self.skipped: list[BadImage] = []

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: Rows,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes one shard. Raises ``VitPatchError`` for an unreadable image unless they are skipped."""
        if prediction.bad and self.on_error == "raise":
            raise VitPatchError(prediction.bad[0].reason)
        for bad in prediction.bad:
            log.warning("skipped: %s", bad.reason.partition(";")[0])
        self.skipped += prediction.bad
        if prediction.examples is not None:
            self.folder.write_shard(batch_idx, prediction.examples, prediction.effects)


class ImageProgress(ProgressBar):
    """A bar that counts images, and so shows images per second and the time left."""

    def __init__(self, images: int, name: str) -> None:
        super().__init__()
        self._total, self._name = images, name

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Opens the bar; where nobody watches it is renewed every 10 s only."""
        often = 0.2 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(total=self._total, desc=self._name, unit=" images", mininterval=often, dynamic_ncols=True)

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: tuple,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves on by the images of the batch, unreadable ones too."""
        images, bad = batch
        self._bar.update((0 if images is None else len(images)) + len(bad))

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Closes the bar."""
        self._bar.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar, so that the error stands on a line of its own."""
        if hasattr(self, "_bar"):
            self._bar.close()

    def disable(self) -> None:
        """Lightning's call for all processes but the first."""
        self._total = 0


def quiet() -> None:
    """Turns off what Lightning says of itself on each run; warnings that concern the user stay."""
    import warnings

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # we resume from it


def predict(
    setup: Setup, data: ImageDataModule, make_trainer: Callable[..., lightning.Trainer], folder: RunFolder
) -> list[BadImage]:
    """Patches all images of ``data`` into ``folder``; the images that were skipped."""
    quiet()
    writer = ShardWriter(folder, data.images.source.on_error)
    progress = ImageProgress(len(data.images), folder.path.name)
    quietly = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = trainer_of(make_trainer, callbacks=[writer, progress], **quietly)
    if trainer.world_size > 1:
        raise VitPatchError(f"trainer: {trainer.world_size} processes; a run uses one device so far: trainer.devices=1")
    trainer.predict(PatchingModule(setup), datamodule=data, return_predictions=False)
    return writer.skipped


def trainer_of(make_trainer: Callable[..., lightning.Trainer], **arguments: Any) -> lightning.Trainer:
    """A trainer with our arguments beside the config's. Raises ``VitPatchError`` for a device that is not there."""
    try:
        return make_trainer(**arguments)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise VitPatchError(f"trainer: {' '.join(str(error).split())[:300]}") from error
