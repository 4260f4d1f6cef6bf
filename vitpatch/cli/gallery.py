"""``vitpatch-gallery OUT.png``: every corruption on the same images: clean, as it is, and at rising strength.

The images are the shipped emoji scenes, or those of --data-path. A row is an option of conf/corruption; _low, _half and
_high ones, which do less or more damage, have none. A cell has three images; above it stands the strength: the option's
own, then a quarter, half, three quarters and all of the class's strongest.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from hydra.utils import get_class
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageOps
from torch import Tensor

from vitpatch.corruptions.base import as_corruption
from vitpatch.data.datamodule import DecodedImages, ImageDataModule, mean_luminance
from vitpatch.data.folders import FolderImages
from vitpatch.data.images import LabelledImages
from vitpatch.data.partners import choose_partners
from vitpatch.data.scenes import TexturedScenes
from vitpatch.data.sources import ParquetImages
from vitpatch.errors import VitPatchError
from vitpatch.formatting import path_title
from vitpatch.runs.config import asset, construct, corruption_option, corruption_options
from vitpatch.types import ImageBatch, Partner

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the strongest."""
STRONGEST_DISPLAYED = {"sigma": 0.25}
"""Where the strongest is for larger images than these, in shares of their side."""
UNITS = {"sigma": " px", "width": "°", "std": " of [0, 1]"}
VARIANTS = ("_low", "_half", "_high")
SUFFIXES = (".png", ".svg", ".pdf")
SCENES, CANDIDATES = (5, 13, 51), 64
"""Rows of the emoji scenes that are drawn; how many of the first rows of all data partners are taken from."""
SIDE = 224
"""Pixels of one's own images, which are cut to squares."""
CELL = (2.4, 0.95)
"""Width and height of a cell in inches."""


def main(arguments: list[str] | None = None) -> None:
    """Draws the sheet; an error is one line."""
    parser = argparse.ArgumentParser(
        prog="vitpatch-gallery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help=f"the file to write: {', '.join(SUFFIXES)}")
    parser.add_argument(
        "--data-path", metavar="PATH", help="a folder with a folder of images a class, a parquet file, or one image"
    )
    parser.add_argument("--mask-column", metavar="NAME", help="of that parquet file, the column of object masks")
    parser.add_argument("--seed", type=int, default=0, help="of noise, scrambles and partners (0)")
    options = parser.parse_args(arguments)
    try:
        write(options.out, options.seed, options.data_path, options.mask_column)
    except VitPatchError as error:
        sys.exit(f"error: {error}")
    print(options.out)


def write(out: Path, seed: int = 0, data_path: str | None = None, mask_column: str | None = None) -> None:
    """Draws the sheet into a file. Raises ``VitPatchError`` where it cannot be written, or images cannot be read."""
    if out.suffix.lower() not in SUFFIXES:
        raise VitPatchError(f"{out}: expected a file name that ends in {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise VitPatchError(f"{out}: there is no folder {out.parent}; make it first")
    if seed < 0:
        raise VitPatchError(f"--seed {seed}: expected a whole number, 0 or more")
    batch = scenes(seed) if data_path is None else own_images(data_path, seed, mask_column)
    images = "emoji scenes" if data_path is None else path_title(data_path)
    figure = sheet(displayed_options(), batch, seed, images)
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise VitPatchError(f"{out}: cannot be written ({error.strerror})") from error


def displayed_options() -> list[str]:
    """The options that have a row: without variants in strength, the null, and what leaves the pixels alone."""
    names = corruption_options()
    variants = {f"{name}{suffix}" for name in names for suffix in VARIANTS}
    rows = [name for name in names if name not in variants | {"none"}]
    classes = [get_class(corruption_option(name, "corruption")._target_) for name in rows]
    return [name for name, one in zip(rows, classes, strict=True) if not getattr(one, "is_inside_model", False)]


def scenes(seed: int) -> ImageBatch:
    """Emoji scenes, with masks and partners of all kinds that need no column."""
    columns = {f"{name}_column": name for name in ("image", "label", "mask")}
    source = TexturedScenes(path=asset("emoji"), split="test", cluster_column="base", limit=CANDIDATES, **columns)
    images = source.open()
    return _batch_of(images, SCENES, seed, _to_tensor, mean_luminance(images, _to_tensor))


def own_images(path: str, seed: int, mask_column: str | None = None) -> ImageBatch:
    """Three images of a folder or parquet file, each cut to a square of ``SIDE`` pixels; of those that can be read.

    Raises ``VitPatchError`` where none can.
    """
    images = _open(path, mask_column)
    light = mean_luminance(images, _to_square)
    readable = images.ids[np.isfinite(light)]
    if not len(readable):
        raise VitPatchError(f"--data-path {path}: none of its first {len(images)} images can be read")
    chosen = np.unique(np.linspace(0, len(readable) - 1, len(SCENES)).round().astype(int))
    return _batch_of(images, readable[chosen].tolist(), seed, _to_square, light)


def _open(path: str, mask_column: str | None) -> LabelledImages:
    """The first images; without labels where these are not found, as of loose images."""
    kind = ParquetImages if Path(path).suffix == ".parquet" else FolderImages
    for labels in ({}, {"label_column": None}):
        try:
            return kind(path=path, limit=CANDIDATES, mask_column=mask_column, **labels).open()
        except VitPatchError as error:
            reason = str(error)
    raise VitPatchError(_with_own_options(reason))


def _with_own_options(reason: str) -> str:
    """An error that names keys of ``patch.py``, with this command's options instead."""
    return reason.replace("data.path", "--data-path").replace("data.mask_column", "--mask-column")


def _batch_of(
    images: LabelledImages,
    ids: Sequence[int],
    seed: int,
    to_input: Callable[[Image.Image], Tensor],
    light: NDArray[np.float64],
) -> ImageBatch:
    """Images by their ids, with the partners that labels give; ``light`` is each image's luminance, (images,)."""
    kinds = [kind for kind in Partner if kind is not Partner.PAIR and images.has_labels]
    positions = {kind: choose_partners(kind, images.labels, images.clusters, seed, light) for kind in kinds}
    return ImageDataModule(DecodedImages(images, to_input, partners=positions), len(ids)).batch_of(ids)


def _to_square(image: Image.Image) -> Tensor:
    return _to_tensor(ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BICUBIC))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def sheet(names: list[str], batch: ImageBatch, seed: int, images: str = "emoji scenes") -> Figure:
    """A row of cells for each option; ``images`` is what the batch is of, in words."""
    columns = len(SHARES) + 3
    figure = Figure(figsize=((columns - 0.3) * CELL[0], len(names) * CELL[1] + 0.5), layout="constrained")
    height, width = batch.images.shape[2:]
    size = f"{width} × {height} pixels"
    figure.suptitle(f"Corruptions as they are and at rising strength, on {images} of {size}", fontsize=12)
    ratios = {"width_ratios": [0.7] + [1] * (columns - 1)}
    axes = figure.subplots(len(names), columns, squeeze=False, gridspec_kw=ratios)
    for name, row in zip(names, axes, strict=True):
        for ax in row:
            ax.axis("off")
        try:
            _draw_row(row, name, batch, seed)
        except VitPatchError as error:
            words = row[2].text(
                0,
                0.5,
                "\n".join(textwrap.wrap(_with_own_options(str(error)), 100, break_on_hyphens=False)),
                va="center",
                fontsize=8,
            )
            words.set_in_layout(False)  # it may go over the empty cells
    return figure


def _draw_row(row: NDArray[np.object_], name: str, batch: ImageBatch, seed: int) -> None:
    option = corruption_option(name, "corruption")
    corruption = as_corruption(construct(option))
    key = corruption.strength_key
    label = _describe_option(name, option, key)
    row[0].text(1, 0.5, label, ha="right", va="center", fontsize=9, transform=row[0].transAxes)
    _draw_images(row[1], batch.images, "clean")
    own = "" if key is None else f": {_describe_strength(key, getattr(corruption, key))}"
    _draw_images(row[2], corruption.pixels(batch, seed), f"{name}{own}")
    if key is None:  # a user's own class without a strength
        return
    side = max(batch.images.shape[2:])
    strongest = min(corruption.strongest, STRONGEST_DISPLAYED.get(key, corruption.strongest) * side)
    for ax, share in zip(row[3:], SHARES, strict=True):
        option[key] = share * strongest
        images = as_corruption(construct(option)).pixels(batch, seed)
        _draw_images(ax, images, _describe_strength(key, option[key]))


def _describe_strength(key: str, value: float) -> str:
    return f"{key} {value:g}{UNITS.get(key, '')}"


def _describe_option(name: str, option: DictConfig, strength_key: str | None) -> str:
    """The name of an option and its other keys, a line each; of the steps of a chain their classes."""
    lines = [name]
    for key, value in option.items():
        if key not in ("_target_", strength_key):
            if OmegaConf.is_list(value):
                value = f"[{', '.join(str(step['_target_']).rpartition('.')[2] for step in value)}]"
            lines.append(f"{key}={value}")
    return "\n".join(lines)


def _draw_images(ax: Axes, images: Tensor, title: str) -> None:
    """The images side by side, a white line between them."""
    side_by_side = torch.cat([torch.nn.functional.pad(image, (1, 1), value=1.0) for image in images], dim=-1)
    ax.imshow(side_by_side.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=8, pad=2)


if __name__ == "__main__":
    main()
