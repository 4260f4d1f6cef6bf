"""``python -m vitpatch.cli.gallery OUT.png``: every corruption on the same emoji scenes, clean and at rising strength.

A row is an option of conf/corruption; _low, _half and _high ones, which differ in strength only, have none. A cell has
three images; above it stands the strength, a quarter, half, three quarters and all of the class's strongest.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import hydra.utils
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from vitpatch.corruptions.base import as_corruption
from vitpatch.data.images import ImageDataModule, mean_luminance
from vitpatch.data.partners import partners
from vitpatch.data.scenes import TexturedScenes
from vitpatch.errors import VitPatchError
from vitpatch.runs.config import asset, construct, corruption_option, corruption_options
from vitpatch.types import ImageBatch, Partner

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the strongest."""
SHOWN_UP_TO = {"sigma": 8.0}
"""Where the strongest is for larger images: these are 32 pixels a side."""
UNITS = {"sigma": " px", "width": "°", "std": " of [0, 1]"}
VARIANTS = ("_low", "_half", "_high")
KINDS = (".png", ".svg", ".pdf")
SHOWN, AMONG = (5, 13, 51), 64
"""Rows of the test split that are shown, and how many of its first rows partners are taken from."""
CELL = (2.4, 0.95)
"""Width and height of a cell in inches."""


def main(arguments: list[str] | None = None) -> None:
    """Draws the sheet, or says in one line what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m vitpatch.cli.gallery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help=f"the file to write: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0, help="of noise, scrambles and partners (0)")
    said = parser.parse_args(arguments)
    try:
        write(said.out, said.seed)
    except VitPatchError as error:
        sys.exit(f"error: {error}")
    print(said.out)


def write(out: Path, seed: int = 0) -> None:
    """Draws the sheet into a file. Raises ``VitPatchError`` where it cannot be written."""
    if out.suffix.lower() not in KINDS:
        raise VitPatchError(f"{out}: expected a file name that ends in {', '.join(KINDS)}")
    if not out.parent.is_dir():
        raise VitPatchError(f"{out}: there is no folder {out.parent}; make it first")
    if seed < 0:
        raise VitPatchError(f"--seed {seed}: expected a whole number, 0 or more")
    figure = sheet(shown_options(), scenes(seed), seed)
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise VitPatchError(f"{out}: cannot be written ({error.strerror})") from error


def shown_options() -> list[str]:
    """The options that have a row: without variants in strength, the null, and what leaves the pixels alone."""
    names = corruption_options()
    bases = {name: next((name.removesuffix(v) for v in VARIANTS if name.endswith(v)), None) for name in names}
    shown = [name for name in names if bases[name] not in names and name != "none"]
    return [name for name in shown if not getattr(_class_of(name), "is_inside_model", False)]


def _class_of(name: str) -> type:
    return hydra.utils.get_class(corruption_option(name, "corruption")._target_)


def scenes(seed: int) -> ImageBatch:
    """The images of every cell, with masks and partners of all kinds that need no column."""
    columns = {f"{name}_column": name for name in ("image", "label", "mask")}
    source = TexturedScenes(path=asset("emoji"), split="test", cluster_column="base", limit=AMONG, **columns)
    images = source.open()
    light = mean_luminance(images, _to_input)
    kinds = [kind for kind in Partner if kind is not Partner.PAIR]
    positions = {kind: partners(kind, images.labels, images.clusters, seed, light) for kind in kinds}
    return ImageDataModule(images, _to_input, len(SHOWN), positions).batch_of(SHOWN)


def _to_input(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def sheet(names: list[str], batch: ImageBatch, seed: int) -> Figure:
    """A row of cells for each option."""
    figure = Figure(figsize=((len(SHARES) + 2) * CELL[0], len(names) * CELL[1] + 0.5), layout="constrained")
    figure.suptitle("Corruptions at rising strength, on emoji scenes of 32 × 32 pixels", fontsize=12)
    ratios = {"width_ratios": [0.7] + [1] * (len(SHARES) + 1)}
    axes = figure.subplots(len(names), len(SHARES) + 2, squeeze=False, gridspec_kw=ratios)
    for name, row in zip(names, axes, strict=True):
        for ax in row:
            ax.axis("off")
        try:
            _draw_row(row, name, batch, seed)
        except VitPatchError as error:
            row[2].text(0, 0.5, "\n".join(textwrap.wrap(str(error), 100)), va="center", fontsize=8)
    return figure


def _draw_row(row: NDArray[np.object_], name: str, batch: ImageBatch, seed: int) -> None:
    option = corruption_option(name, "corruption")
    corruption = as_corruption(construct(option))
    key = corruption.strength_key
    row[0].text(1, 0.5, _words(name, option, key), ha="right", va="center", fontsize=9, transform=row[0].transAxes)
    _picture(row[1], batch.images, "clean")
    if key is None:  # a class of somebody's own that does not say what makes it stronger
        _picture(row[2], corruption.pixels(batch, seed), "as it is")
        return
    for ax, share in zip(row[2:], SHARES, strict=True):
        value = share * min(corruption.strongest, SHOWN_UP_TO.get(key, corruption.strongest))
        option[key] = value
        _picture(ax, as_corruption(construct(option)).pixels(batch, seed), f"{key} {value:g}{UNITS.get(key, '')}")


def _words(name: str, option: DictConfig, key: str | None) -> str:
    """The option and what it says beside its strength."""
    rest = [f"{k}={_short(v)}" for k, v in option.items() if k not in ("_target_", key)]
    return "\n".join([name, *rest])


def _short(value: object) -> str:
    """A value; of the steps of a chain their classes."""
    if isinstance(value, str | int | float | None):
        return str(value)
    return "[" + ", ".join(str(step["_target_"]).rpartition(".")[2] for step in value) + "]"


def _picture(ax: Axes, images: Tensor, title: str) -> None:
    """The images side by side, a white line between them."""
    side_by_side = torch.cat([torch.nn.functional.pad(image, (1, 1), value=1.0) for image in images], dim=-1)
    ax.imshow(side_by_side.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=8, pad=2)


if __name__ == "__main__":
    main()
