"""Drawings on white, put on textured backgrounds when they are read: images with a background and an outline."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpatch.data.sources import AUTO, ParquetImages
from vitpatch.errors import VitPatchError

if TYPE_CHECKING:
    import datasets

Field = NDArray[np.float64]
"""(height, width) in [0, 1]: how much of the second colour is where."""


@dataclass(frozen=True, kw_only=True)
class TexturedScenes(ParquetImages):
    """Drawings on white with their alpha as ``mask_column``, each on a texture that depends on row and split alone.

    Four kinds of texture – cloud (1/f noise), stripes, checks, gradient with grain – between two random colours; kind,
    colours and grain do not depend on the label. Scenes are stored as uncompressed pixels, which the data's digest is
    of.
    """

    def rows(self) -> datasets.Dataset:
        """The rows of the file or files, each image on its texture."""
        from datasets import Dataset
        from datasets import Image as ImageFeature

        drawings = super().rows()
        image, mask = "image" if self.image_column == AUTO else self.image_column, self.mask_column
        if mask is None or not {image, mask} <= set(drawings.features):
            raise VitPatchError(
                f"data.image_column {image!r}, data.mask_column {mask!r}: scenes need drawings and their masks; "
                f"the data have the columns {', '.join(drawings.features)}"
            )
        for column in (image, mask):
            drawings = drawings.cast_column(column, ImageFeature(decode=False))
        columns = {name: drawings[name][:] for name in drawings.features}
        pairs = zip(columns[image], columns[mask], strict=True)
        columns[image] = [self._scene(row, *pair) for row, pair in enumerate(pairs)]
        return Dataset.from_dict(columns, features=drawings.features)

    def _scene(self, row: int, drawing: dict[str, Any], mask: dict[str, Any]) -> dict[str, Any]:
        pixels, alpha = (
            np.asarray(Image.open(io.BytesIO(stored["bytes"])).convert(mode), dtype=np.float64)
            for stored, mode in ((drawing, "RGB"), (mask, "L"))
        )
        rng = np.random.default_rng([zlib.crc32(str(self.split).encode()), row])
        scene = on_background(pixels, alpha[..., None] / 255, 255 * texture(rng, *alpha.shape))
        stream = io.BytesIO()
        Image.fromarray(scene).save(stream, "PPM")
        return {"bytes": stream.getvalue(), "path": None}


def on_background(on_white: Field, alpha: Field, ground: Field) -> NDArray[np.uint8]:
    """A drawing on white with ``alpha`` (height, width, 1) in [0, 1] on another ground; pixels from 0 to 255."""
    return (on_white + (1 - alpha) * (ground - 255)).round().clip(0, 255).astype(np.uint8)


def texture(rng: np.random.Generator, height: int, width: int) -> Field:
    """(height, width, 3) in [0, 1]: a texture of a random kind between two colours that differ."""
    field = TEXTURES[rng.integers(len(TEXTURES))](rng, height, width)
    first, *others = rng.random((4, 3))
    second = max(others, key=lambda colour: np.abs(colour - first).sum())
    return first + field[..., None] * (second - first)


def cloud(rng: np.random.Generator, height: int, width: int) -> Field:
    """Noise with amplitudes that fall as 1/f, as in natural images (Field 1987)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = np.inf
    waves = np.fft.ifft2(np.exp(2j * np.pi * rng.random((height, width))) / frequency).real
    return (waves - waves.min()) / np.ptp(waves)


def stripes(rng: np.random.Generator, height: int, width: int) -> Field:
    """A sine grating in a random direction, 3 to 8 cycles per image."""
    cycles = rng.uniform(3, 8)
    return 0.5 + 0.5 * np.sin(2 * np.pi * (cycles * _along(rng, height, width) + rng.random()))


def checks(rng: np.random.Generator, height: int, width: int) -> Field:
    """A checkerboard of 4 to 10 cells a side, begun anywhere."""
    cells, (top, left) = rng.integers(4, 11), rng.random(2)
    down, across = np.arange(height)[:, None] / height, np.arange(width) / width
    return ((np.floor(cells * down + top) + np.floor(cells * across + left)) % 2).astype(np.float64)


def gradient(rng: np.random.Generator, height: int, width: int) -> Field:
    """A ramp in a random direction with grain of ±0.15."""
    ramp = _along(rng, height, width)
    ramp = (ramp - ramp.min()) / np.ptp(ramp)
    return (ramp + rng.uniform(-0.15, 0.15, (height, width))).clip(0, 1)


TEXTURES: tuple[Callable[[np.random.Generator, int, int], Field], ...] = (cloud, stripes, checks, gradient)


def _along(rng: np.random.Generator, height: int, width: int) -> Field:
    """How far each pixel is in a random direction, in image sides."""
    angle = 2 * np.pi * rng.random()
    return np.cos(angle) * np.arange(width) / width + np.sin(angle) * np.arange(height)[:, None] / height
