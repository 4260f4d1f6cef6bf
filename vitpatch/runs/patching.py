"""A batch of images, corrupted and patched as a run's setup says → the columns of its files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from torch import Tensor

from vitpatch.data.images import UNKNOWN, Decoded
from vitpatch.data.training import batches_of
from vitpatch.errors import VitPatchError
from vitpatch.models.vit import PatchableViT
from vitpatch.patching.ablations import means, zeros
from vitpatch.patching.cost import Cost, Room, cost_of, memory_limit
from vitpatch.patching.executor import Outputs, averaged, execute
from vitpatch.patching.inputs import Constants
from vitpatch.patching.table import Columns, columns, joined
from vitpatch.patching.tokens import token_masks
from vitpatch.runs.setup import Setup
from vitpatch.schema import OF_CORRUPTION
from vitpatch.types import BaseRun, Donor, ImageBatch, Run, counted

log = logging.getLogger(__name__)


class Patching:
    """Patches batches by a run's plan, some images at a time, where its model is now.

    ``draws`` of noise on embeddings an image, whose probabilities are averaged; ``None`` = as the corruption says.
    ``before``: images and rows of a call of an earlier start, kept to where they fit. Raises ``VitPatchError`` where
    one image does not fit the memory.
    """

    def __init__(
        self, setup: Setup, batch_size: int, draws: int | None = None, before: tuple[int, int] | None = None
    ) -> None:
        self.setup, self.plan, self.model = setup, setup.plan, setup.model
        self._batch = min(batch_size, len(setup.images))
        self.draws = setup.corruption.draws if draws is None else draws
        self.cost = cost_of(self.plan, self.model, len(setup.partners))
        self.room = self.room_for(self.cost, before)
        self._constants = self._found_constants()

    def room_for(self, cost: Cost, before: tuple[int, int] | None = None) -> Room:
        """How much of a plan of this cost fits the model's device."""
        device = self.model.device
        limit = memory_limit(self.setup.cfg.memory_gb, device)
        return cost.room(self._batch, limit, self.plan.sizes.tokens, device, before=before)

    def _found_constants(self) -> Constants | None:
        """The values of a donor that is no run."""
        site, training = self.plan.target.site, self.setup.training
        if self.plan.donors[0] is Donor.ZERO:
            return zeros(self.model, site)
        if self.plan.donors[0] is not Donor.MEAN:
            return None
        log.info("mean of %s over %s", site, counted(len(training), "training image"))
        return means(self.model, site, self._training_pixels())

    def _training_pixels(self) -> Iterator[Tensor]:
        decoded = Decoded(self.setup.training, self.model.preprocessing.to_input, masks=False)
        for batch, _ in batches_of(decoded, self._batch):
            for part in parts(batch, self.room) if batch is not None else ():
                yield self.model.normalize(part.images.to(self.model.device))

    def columns(self, images: ImageBatch) -> Columns:
        """The columns of a batch. Raises ``VitPatchError`` where a logit is not finite."""
        return joined([self.part(part, self.model, self.room) for part in parts(images, self.room)])

    def part(self, images: ImageBatch, model: PatchableViT, room: Room) -> Columns:
        """The columns of as many images as there is room for."""
        setup, plan, seed = self.setup, self.plan, self.setup.study.seed
        others = {d: images.partners[d.partner] for d in plan.base_runs if isinstance(d, Donor)}
        pixels: dict[Run, Tensor] = {
            BaseRun.CLEAN: model.normalize(images.images),
            BaseRun.CORRUPT: model.normalize(setup.corruption.pixels(images, seed)),
            **{donor: model.normalize(other.images) for donor, other in others.items()},
        }
        images = images.to("cpu")
        blocks, ids = plan.target.grid, images.ids.tolist()
        masks = token_masks(plan.token_groups, plan.sizes, blocks, model.covered(images.masks), ids, seed)
        outputs = averaged(self._draws(model, pixels, masks, room, images.ids))
        self._check_finite(outputs, pixels, images)
        predicted = outputs.base[BaseRun.CLEAN].argmax(1)
        labels = images.labels.where(images.labels != UNKNOWN, predicted)
        ids_of = {donor: other.ids.cpu() for donor, other in others.items()}
        found = columns(outputs, plan, labels, images.ids, masks, setup.study.metric, setup.study.rival, ids_of)
        if (kind := setup.corruption.partner) is not None:
            found.examples[OF_CORRUPTION] = images.partners[kind].ids.numpy()
        return found

    def _draws(
        self, model: PatchableViT, pixels: Mapping[Run, Tensor], masks: Tensor, room: Room, ids: Tensor
    ) -> Iterator[Outputs]:
        """What the plan gives, once for each draw of noise on embeddings."""
        corruption, device = self.setup.corruption, model.device
        for draw in range(self.draws):
            noise = None
            if corruption.is_inside_model:
                noise = corruption.embedding_noise(ids, self.setup.study.seed, model.embedded, draw)
                noise = noise.to(device, model.dtype)
            yield execute(self.plan, model, pixels, masks, room, self._constants, noise).cpu()

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


def parts(images: ImageBatch, room: Room) -> Iterator[ImageBatch]:
    """As many images at a time as there is room for."""
    for first in range(0, len(images), room.images):
        yield images.part(slice(first, first + room.images))


def _rows_not_finite(logits: Tensor) -> list[int]:
    return (~logits.isfinite().all(-1)).nonzero().flatten().tolist()
