"""What corruptions are: the base classes, those of all pixels alike, the chain, and the random draws of one image.

A corruption turns a batch of images into corrupted ones: ``(ImageBatch, seed) → images``, float32 of the same shape
(batch, 3, height, width), still on the [0, 1] scale, on the device the batch is on. Its fields are the keys of its
file in ``conf/corruption/``; their types say what the keys may be. What is random in it must be a function of the seed
and the image's id alone – ``normal_like`` and ``uniform`` are – so that a result does not depend on the batch, the
order or the device.

A class of your own needs no base class: anything that can be called with a batch and a seed is taken. It may declare
the class attributes of ``Corruption``: ``strength_key``, ``strongest``, ``needs_masks``, ``partner``.

A corruption of this package is a dataclass, most often a ``Blend`` with one method, ``_other`` (``Gray`` is the
shortest). To add one: the class; its name in ``corruptions/__init__.py`` and in ``formatting.OWN_CORRUPTIONS``; a file
in ``conf/corruption/`` (a weaker or stronger option is a file ``NAME_low``, ``NAME_half`` or ``NAME_high`` with
``defaults: [NAME, _self_]``; ``_half`` is ``amount: 0.5``) and its row in the README's table; a row of ``MAKERS`` in
``tests/helpers/corruption_makers.py``, by which the tests check what holds of every corruption; and a test of what is
its own in ``tests/corruptions/``.
"""

from __future__ import annotations

import copy
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitpatch.checks import Interval, Share, check_fields
from vitpatch.errors import VitPatchError
from vitpatch.formatting import as_option
from vitpatch.types import BT601_LUMA, ImageBatch, Partner

LARGEST_PIXEL = 30.0
"""A user's class whose pixels are larger is taken to have returned them on the scale to 255."""
Strength = Annotated[float, Interval(ge=0, le=1000)]
"""The limit only keeps numbers from overflowing."""
Amount = Annotated[Share, "the share of the corrupted image"]
USE_ALONE = "corruption.steps: {} is added inside the model, after all pixels; use it alone"


class Corruption:
    """The base of all corruptions: by default a corruption of pixels that changes nothing.

    ``strength_key`` is the parameter that makes it stronger, 0 = the identity, and ``strongest`` its largest value;
    ``needs_masks``: the images need object masks; ``partner``: which other image it asks for in ``ImageBatch.others``.

    ``is_inside_model``: it leaves pixels alone and adds ``embedding_noise`` inside the model, of which each image has
    ``draws`` independent draws, whose probabilities are averaged. ``needs_training``: it needs statistics of training
    images. ``n_steps``: how many steps a chain counts it as, those of a chain in the chain.
    """

    strength_key: str | None = None
    strongest: float = 1.0
    needs_masks: bool = False
    partner: Partner | None = None
    is_inside_model: bool = False
    needs_training: bool = False
    draws: int = 1
    n_steps: int = 1

    def __post_init__(self) -> None:
        check_fields(self, "corruption")

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape: what the class does to pixels; here nothing."""
        return batch.images

    def pixels(self, batch: ImageBatch, seed: int) -> Tensor:
        """The corrupted images, (batch, 3, height, width), checked.

        Raises ``VitPatchError`` where a user's own class raises an error, or returns something other than pixels.
        """
        if self.partner is not None and batch.partners is not None:
            batch = replace(batch, others=batch.partners[self.partner])
        try:
            pixels = self(batch, seed)
        except VitPatchError:
            raise
        except Exception as error:  # a user's class may raise anything: where it did is what they look for
            last = traceback.extract_tb(error.__traceback__)[-1]
            raised = f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
            raise VitPatchError(f"corruption {self.class_name} raised {raised}") from error
        if wrong := self._wrong_pixels(pixels, batch):
            raise VitPatchError(f"corruption {self.class_name} gave {wrong}")
        return pixels

    def embedding_noise(self, ids: Tensor, seed: int, embedding_shape: tuple[int, int], draw: int = 0) -> Tensor | None:
        """What is added to patch embeddings, float32 (batch, patches, width), on the CPU; ``None`` = nothing.

        ``ids`` (batch,); ``embedding_shape`` is the model's (patches, width).
        """
        return None

    def with_statistics(self, moments: Any) -> Self:
        """A copy that knows the ``Moments`` of the training images' patch embeddings; itself where it needs none."""
        return self

    def describe_statistics(self) -> dict[str, Any]:
        """What it uses of the statistics, as entries of the manifest."""
        return {}

    def masks_of(self, batch: ImageBatch) -> Tensor:
        """The batch's masks. Raises ``VitPatchError`` where there are none."""
        if batch.masks is None:
            raise missing_masks(self)
        return batch.masks

    @property
    def class_name(self) -> str:
        """The name of its class."""
        return type(self).__name__

    @property
    def option_name(self) -> str:
        """The name of its class as an option is written."""
        return as_option(self.class_name)

    def _wrong_pixels(self, pixels: Any, batch: ImageBatch) -> str:
        """What is wrong with what a class returned; "" = nothing. Pixels may leave [0, 1] a little, as noise does."""
        if not isinstance(pixels, Tensor) or pixels.shape != batch.images.shape:
            got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            return f"{got}; expected {tuple(batch.images.shape)}"
        expected = "expected floating-point pixels on the [0, 1] scale"
        if not pixels.is_floating_point():
            return f"{str(pixels.dtype).removeprefix('torch.')}; {expected}"
        finite = pixels.isfinite().flatten(1).all(1)
        if not finite.all():
            return f"pixels that are not finite, of image {batch.ids[(~finite).nonzero()[0, 0]]}; {expected}"
        largest = float(pixels.abs().max())
        is_own = type(self).__module__.startswith("vitpatch.") and not isinstance(self, UsersCorruption)
        return f"pixels up to {largest:.3g}; {expected}" if largest > LARGEST_PIXEL and not is_own else ""


class UsersCorruption(Corruption):
    """A user's own callable that has no base class, with the attributes that it declares."""

    def __init__(self, function: Callable[[ImageBatch, int], Tensor]) -> None:
        self.function = function
        for attribute in ("strength_key", "strongest", "needs_masks", "partner"):
            setattr(self, attribute, getattr(function, attribute, getattr(Corruption, attribute)))

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """What the callable makes of the batch."""
        return self.function(batch, seed)

    @property
    def class_name(self) -> str:
        """The name of its class; of a function, or of one with some arguments set, the function's."""
        named = getattr(self.function, "func", self.function)  # functools.partial's
        return getattr(named, "__name__", type(named).__name__)


def as_corruption(function: Callable[[ImageBatch, int], Tensor]) -> Corruption:
    """A corruption as it is, and anything else that can be called with a batch and a seed as one."""
    return function if isinstance(function, Corruption) else UsersCorruption(function)


class Blend(Corruption, ABC):
    """A corruption that blends each image with another one, ``amount`` of it: 0 the identity, 1 all.

    A subclass is a dataclass with a field ``amount: Amount`` and says in ``_other`` what the other image is.
    ``region``: only the object or only the background is blended, by the soft mask; ``None`` = the whole image.
    """

    strength_key = "amount"
    amount: float
    region: Literal["object", "background"] | None = None

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        return torch.lerp(batch.images, self._other(batch, seed), self._weight(batch, seed))

    @abstractmethod
    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3 or 1, height, width): the image at amount 1."""

    def _weight(self, batch: ImageBatch, seed: int) -> float | Tensor:
        """The share of the other image, a number or (batch, 1, height, width)."""
        if self.region is None:
            return self.amount
        masks = self.masks_of(batch)
        return self.amount * (masks if self.region == "object" else 1 - masks)


class Identity(Corruption):
    """Leaves the image as it is: the null, under which every effect is 0."""


@dataclass(eq=False)
class Gray(Blend):
    """Takes the colour away: BT.601 luma in all three channels (ITU-R BT.601-7, 2.5.1).

    ``amount`` is the share of colour that is taken away: 0 the identity, 1 no colour.
    """

    amount: Amount = 1.0

    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        return luma(batch.images)


@dataclass(eq=False)
class Noise(Corruption):
    """Adds Gaussian pixel noise.

    ``std`` is on the [0, 1] scale of the pixels, at the model's input size; the sum is clipped to [0, 1] unless
    ``clip`` is false. ``std`` 0 is the identity.
    """

    std: Annotated[Strength, "on the [0, 1] scale of the pixels"]
    clip: bool = True
    strength_key = "std"

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        noisy = batch.images + self.std * normal_like(batch, seed)
        return noisy.clamp(0, 1) if self.clip else noisy


@dataclass(eq=False)
class Blur(Corruption):
    """Gaussian blur.

    ``sigma`` is in pixels of the model's input; the kernel reaches 4 σ to each side, as in
    ``scipy.ndimage.gaussian_filter``, and the border pixels are repeated outward. ``sigma`` 0 is the identity; 40 at
    224 pixels is where the widest published series ends (Geirhos et al. 2018, Generalisation in humans and deep
    neural networks).
    """

    sigma: Annotated[Strength, "in pixels"]
    strength_key, strongest = "sigma", 40.0

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        return gaussian_blur(batch.images, self.sigma)


@dataclass(eq=False)
class Chain(Blend):
    """One corruption after another, each on what the one before it made; a chain may stand in a chain.

    Masks and partners stay those of the data. The first step draws from the run's seed, as it would alone; every
    later one has a seed of its own, so that two steps of the same class do not share their draws, also in a chain in
    the chain. ``amount`` mixes image and result: 0 the identity, 1 the chain. Noise on embeddings cannot be a step: it
    is added inside the model.
    """

    steps: Sequence[Callable[[ImageBatch, int], Tensor]]
    amount: Amount = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        is_list = isinstance(self.steps, Sequence) and not isinstance(self.steps, str)
        steps = tuple(self.steps) if is_list else (self.steps,)
        wrong = [step for step in steps if not callable(step)]
        if wrong or not steps:
            got = wrong[0] if wrong else []
            raise VitPatchError(f"corruption.steps {got!r}: expected a list of corruptions, such as [gray,blur]")
        self.steps = tuple(map(as_corruption, steps))
        if inside := [step for step in self.steps if step.is_inside_model]:
            raise VitPatchError(USE_ALONE.format(inside[0].option_name))
        self.n_steps = sum(step.n_steps for step in self.steps)
        self.needs_masks = any(step.needs_masks for step in self.steps)
        self.needs_training = any(step.needs_training for step in self.steps)
        kinds = sorted({step.partner for step in self.steps} - {None})
        if len(kinds) > 1:
            raise VitPatchError(f"corruption.steps: ask for partners of several kinds ({', '.join(kinds)}); take one")
        self.partner = kinds[0] if kinds else None

    def _other(self, batch: ImageBatch, seed: int) -> Tensor:
        images, number = batch.images, 0
        for step in self.steps:
            images = step.pixels(replace(batch, images=images), seed_of_step(seed, number))
            number += step.n_steps
        return images

    def with_statistics(self, moments: Any) -> Chain:
        """A copy each of whose steps knows the moments."""
        new = copy.copy(self)
        new.steps = tuple(step.with_statistics(moments) for step in self.steps)
        return new


def seed_of_step(seed: int, number: int) -> int:
    """The seed that a step of a chain draws from; ``number``: steps before it, counting those of chains."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1, np.uint64)[0] >> 1)  # 1: no id's own state


def normal_like(batch: ImageBatch, seed: int) -> Tensor:
    """Standard normal draws of the images' shape, a function of (seed, id) alone; drawn on the CPU."""
    shape = batch.images.shape[1:]
    draws = [torch.randn(shape, generator=generator) for generator in generators(batch.ids, seed)]
    return torch.stack(draws).to(batch.images.device)


def uniform(batch: ImageBatch, seed: int, *shape: int) -> Tensor:
    """(batch, …shape) draws in [0, 1), a function of (seed, id) alone; on the CPU."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators(batch.ids, seed)])


def generators(ids: Tensor, seed: int, *more: int, spawn_key: tuple[int, ...] = ()) -> Iterator[torch.Generator]:
    """A generator for each image, on the CPU, a function of (seed, id, …more) alone.

    Another ``spawn_key`` gives other draws of the same seed and id.
    """
    for example_id in ids.tolist():
        sequence = np.random.SeedSequence([seed, example_id, *more], spawn_key=spawn_key)
        yield torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def missing_masks(corruption: Corruption) -> VitPatchError:
    """The error where the data have no object masks."""
    return VitPatchError(
        f"corruption {corruption.option_name} needs object masks and the data have none: name their column with "
        "data.mask_column (emoji on textured backgrounds: data=emoji_scenes)"
    )


def luma(images: Tensor) -> Tensor:
    """(batch, 3, height, width) → (batch, 1, height, width): ITU-R BT.601-7, 2.5.1, of the stored (gamma) values."""
    return (images * images.new_tensor(BT601_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Each channel of (batch, channels, height, width) blurred by ``sigma`` pixels; the border is repeated outward."""
    radius, channels = int(4 * sigma + 0.5), images.shape[1]
    if radius == 0:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    kernel = kernel.expand(channels, 1, 1, -1)  # (channels, 1, 1, 2 radius + 1): each channel by itself
    wide = F.pad(images, (radius,) * 4, mode="replicate")
    rows = F.conv2d(wide, kernel, groups=channels)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=channels)
