"""Corruptions: ``(ImageBatch, seed) → images``, batched, on the device the batch is on.

A corruption is a class whose constructor's parameters are the keys of its file in ``conf/corruption/``. Called with
a batch and the run's seed it returns float32 images of the same shape, (batch, 3, height, width), still on the
[0, 1] scale. What is random in it must be a function of the seed and the image's id alone – ``normal_like`` and
``uniform`` are – so that a result does not depend on the batch, the order or the device.

What a class says of itself, in class attributes that are all optional (``traits``): ``strength_key``, the parameter
that makes it stronger, 0 = the identity, and ``strongest``, where that ends; ``needs_masks``; ``partner``, which
other image it asks for in ``ImageBatch.others``.

Here: the protocol, colour, noise, blur, and the chain. Others: ``frequencies``, ``shapes``, ``regions`` (by the mask),
``counterfactuals`` (another image).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitpatch.checks import Interval, Share, check_arguments
from vitpatch.errors import VitPatchError
from vitpatch.types import BT601_LUMA, ImageBatch, Partner, as_option

Corruption = Callable[[ImageBatch, int], Tensor]
FAR_OUT = 30.0
"""Pixels of a user's class beyond this are on a scale to 255."""
Strength = Annotated[float, Interval(ge=0, le=1000)]
"""Far more than does anything, and far less than overflows."""

USE_ALONE = "corruption.steps: {} is added inside the model, after all pixels; use it alone"


@dataclass(frozen=True)
class Traits:
    """What a corruption says of itself; of a user's own class that says nothing, the defaults."""

    strength_key: str | None = None
    strongest: float = 1.0
    needs_masks: bool = False
    partner: Partner | None = None


@runtime_checkable
class OnEmbeddings(Protocol):
    """A corruption that adds noise to patch embeddings and leaves the pixels alone; ``EmbeddingNoise`` says how."""

    scale: str
    draws: int

    def with_spread(self, spread: float | NDArray[np.floating]) -> OnEmbeddings:
        """A copy that knows the embeddings' standard deviation, () or (width,) as ``scale`` says."""

    def noise(self, ids: Tensor, seed: int, patches: int, width: int, draw: int = 0) -> Tensor:
        """What is added to the embeddings of these images, float32 (batch, patches, width)."""


def traits(corruption: Corruption) -> Traits:
    """The traits of a corruption, from its attributes."""
    said = {field.name: getattr(corruption, field.name, field.default) for field in fields(Traits)}
    return Traits(**said)


def corrupted(corruption: Corruption, images: ImageBatch, seed: int) -> Tensor:
    """The corruption's images, checked: a user's own class can be anything."""
    name, kind = _name(corruption), traits(corruption).partner
    if kind is not None and images.partners is not None:
        images = replace(images, others=images.partners[kind])
    try:
        result = corruption(images, seed)
    except VitPatchError:
        raise
    except Exception as error:  # a user's class may raise anything: where it did is what they look for
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
        raise VitPatchError(f"corruption {name} raised {type(error).__name__}: {error} ({where})") from error
    if not isinstance(result, Tensor) or result.shape != images.images.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise VitPatchError(f"corruption {name} gave {got}; expected {tuple(images.images.shape)}")
    if wrong := _wrong_pixels(result, images, is_own=type(corruption).__module__.startswith("vitpatch.")):
        raise VitPatchError(f"corruption {name} gave {wrong}; expected floating-point pixels on the [0, 1] scale")
    return result


def _wrong_pixels(pixels: Tensor, images: ImageBatch, is_own: bool) -> str:
    """What pixels are, where they cannot be meant; "" = nothing. Noise may leave [0, 1], but not by far."""
    if not pixels.is_floating_point():
        return str(pixels.dtype).removeprefix("torch.")
    finite = pixels.isfinite().flatten(1).all(1)
    if not finite.all():
        return f"pixels that are not finite, of image {images.ids[(~finite).nonzero()[0, 0]]}"
    largest = float(pixels.abs().max())
    return f"pixels up to {largest:.3g}" if largest > FAR_OUT and not is_own else ""


def _generators(batch: ImageBatch, seed: int) -> Iterator[torch.Generator]:
    """One generator an image, on the CPU."""
    for example_id in batch.ids.tolist():
        state = int(np.random.SeedSequence([seed, example_id]).generate_state(1, np.uint64)[0] >> 1)
        yield torch.Generator().manual_seed(state)


def normal_like(batch: ImageBatch, seed: int) -> Tensor:
    """Standard normal draws of the images' shape, a function of (seed, id) alone; drawn on the CPU."""
    draws = torch.empty(batch.images.shape, dtype=torch.float32)
    for row, generator in zip(draws, _generators(batch, seed), strict=True):
        row.normal_(generator=generator)
    return draws.to(batch.images.device)


def uniform(batch: ImageBatch, seed: int, *shape: int) -> Tensor:
    """(batch, …shape) draws in [0, 1), a function of (seed, id) alone; on the CPU."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in _generators(batch, seed)])


def called(corruption: Corruption) -> str:
    """A corruption's class or function as its option is written."""
    return as_option(_name(corruption))


def _name(corruption: Corruption) -> str:
    """The name of a corruption's class; of a function, or of one with some arguments given, the function's."""
    of = getattr(corruption, "func", corruption)  # functools.partial's
    return getattr(of, "__name__", type(of).__name__)


def no_masks(corruption: Corruption) -> VitPatchError:
    """What to say where the data have no object masks."""
    return VitPatchError(
        f"corruption {called(corruption)} needs object masks and the data have none: name their column with "
        "data.mask_column (emoji on textured backgrounds: data=emoji_scenes)"
    )


def luma(images: Tensor) -> Tensor:
    """(batch, 3, height, width) → (batch, 1, height, width): ITU-R BT.601-7, 2.5.1, of the stored (gamma) values."""
    return (images * images.new_tensor(BT601_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def gaussian_blur(images: Tensor, sigma: float, reach: float = 4.0) -> Tensor:
    """Each channel of (batch, channels, height, width) blurred, ``sigma`` in pixels; the border is repeated outward."""
    radius, channels = int(reach * sigma + 0.5), images.shape[1]
    if radius == 0:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    kernel = kernel.expand(channels, 1, 1, -1)  # (channels, 1, 1, 2 radius + 1): each channel by itself
    wide = F.pad(images, (radius,) * 4, mode="replicate")
    rows = F.conv2d(wide, kernel, groups=channels)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=channels)


class Identity:
    """Leaves the image as it is: the null, under which every effect is 0."""

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same."""
        return batch.images


class Gray:
    """Takes the colour away: BT.601 luma in all three channels (ITU-R BT.601-7, 2.5.1).

    ``amount`` is the share of the way there: 0 the identity, 1 no colour.
    """

    strength_key, strongest = "amount", 1.0

    @check_arguments("corruption")
    def __init__(self, amount: Annotated[Share, "the share of colour taken away"] = 1.0) -> None:
        self.amount = float(amount)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape, at amount 1 three equal channels."""
        return torch.lerp(batch.images, luma(batch.images).expand_as(batch.images), self.amount)


class Noise:
    """Adds Gaussian pixel noise.

    ``std`` is on the [0, 1] scale of the pixels, at the model's input size; the sum is clipped to [0, 1] unless
    ``clip`` is false. ``std`` 0 is the identity.
    """

    strength_key, strongest = "std", 1.0

    @check_arguments("corruption")
    def __init__(self, std: Annotated[Strength, "on the [0, 1] scale of the pixels"], clip: bool = True) -> None:
        self.std, self.clip = float(std), clip

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        noisy = batch.images + self.std * normal_like(batch, seed)
        return noisy.clamp(0, 1) if self.clip else noisy


class Blur:
    """Gaussian blur.

    ``sigma`` is in pixels of the model's input; the kernel reaches 4 σ to each side, as in
    ``scipy.ndimage.gaussian_filter``, and the border pixels are repeated outward. ``sigma`` 0 is the identity; 40 at
    224 pixels is where the widest published series ends (Geirhos et al. 2018, Generalisation in humans and deep
    neural networks).
    """

    strength_key, strongest = "sigma", 40.0

    @check_arguments("corruption")
    def __init__(self, sigma: Annotated[Strength, "in pixels"]) -> None:
        self.sigma = float(sigma)

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        return gaussian_blur(batch.images, self.sigma)


class Chain:
    """One corruption after another, each on what the one before it made; a chain may stand in a chain.

    Masks and partners stay those of the data. The first step draws from the run's seed, as it would alone; every
    later one from a seed of its own, so that two steps of a kind do not share their draws, whichever chain in the chain
    they are in. ``amount`` mixes image and result: 0 the identity, 1 the chain. Noise on embeddings is no step: it is
    added inside the model.
    """

    strength_key, strongest = "amount", 1.0

    @check_arguments("corruption")
    def __init__(
        self,
        steps: Sequence[Corruption],
        amount: Annotated[Share, "the share of the chain's result in the image"] = 1.0,
    ) -> None:
        self.amount = float(amount)
        self.steps = tuple(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else (steps,)
        wrong = [step for step in self.steps if not callable(step)]
        if wrong or not self.steps:
            got = wrong[0] if wrong else []
            raise VitPatchError(f"corruption.steps {got!r}: expected a list of corruptions, such as [gray,blur]")
        if inside := [step for step in self.steps if isinstance(step, OnEmbeddings)]:
            raise VitPatchError(USE_ALONE.format(called(inside[0])))
        self.length = sum(_length(step) for step in self.steps)
        self.needs_masks = any(traits(step).needs_masks for step in self.steps)
        kinds = sorted({traits(step).partner for step in self.steps} - {None})
        if len(kinds) > 1:
            raise VitPatchError(f"corruption.steps: ask for partners of several kinds ({', '.join(kinds)}); take one")
        self.partner = kinds[0] if kinds else None

    def __call__(self, batch: ImageBatch, seed: int) -> Tensor:
        """(batch, 3, height, width) → the same shape."""
        images, number = batch.images, 0
        for step in self.steps:
            images = corrupted(step, replace(batch, images=images), seed_of_step(seed, number))
            number += _length(step)
        return torch.lerp(batch.images, images, self.amount)


def _length(step: Corruption) -> int:
    """How many steps that are no chain there are in a step."""
    return step.length if isinstance(step, Chain) else 1


def seed_of_step(seed: int, number: int) -> int:
    """The seed that a step of a chain draws from; ``number``: how many steps are before it, those of chains too."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1, np.uint64)[0] >> 1)  # 1: no id's own state
