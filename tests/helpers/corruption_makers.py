"""Every corruption class by what makes it of a strength, and a batch to try it on."""

import torch

from vitpatch.corruptions.base import Blur, Chain, Gray, Noise
from vitpatch.corruptions.counterfactual import BackgroundSwap, OtherImage
from vitpatch.corruptions.masked import (
    BackgroundOnly,
    DesaturateBackground,
    DesaturateObject,
    ObjectOnly,
    Occlude,
    Silhouette,
)
from vitpatch.corruptions.structure import Edges, LowPass, PatchShuffle, PhaseScramble
from vitpatch.types import ImageBatch

MAKERS = {  # class: what makes it of a strength
    Gray: Gray,
    Noise: Noise,
    Blur: Blur,
    LowPass: lambda s: LowPass(3.0, s),
    PhaseScramble: PhaseScramble,
    Edges: Edges,
    PatchShuffle: lambda s: PatchShuffle(4, s),
    DesaturateObject: DesaturateObject,
    DesaturateBackground: DesaturateBackground,
    Silhouette: lambda s: Silhouette("black", "keep", s),
    ObjectOnly: lambda s: ObjectOnly("white", s),
    BackgroundOnly: lambda s: BackgroundOnly("gray", s),
    Occlude: lambda s: Occlude("black", s),
    OtherImage: lambda s: OtherImage("same_class", s),
    BackgroundSwap: lambda s: BackgroundSwap("pair", s),
    Chain: lambda s: Chain([Edges(), Noise(0.2)], s),
}


def batch(ids=range(6), size=16):
    """Random images and soft masks – a disc with a rim –, the partner of each the one 50 rows further."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(100, 3, size, size, generator=generator)
    ids = torch.tensor(list(ids))
    along = torch.arange(size) - (size - 1) / 2
    radius = size / 4 + ids[:, None, None, None] % 3
    masks = (radius - along.hypot(along[:, None]) + 0.5).clamp(0, 1)  # (batch, 1, size, size)
    labels = torch.zeros(len(ids), dtype=torch.int64)
    others = ImageBatch(images[ids + 50], ids + 50, labels, masks.flip(0))
    return ImageBatch(images[ids], ids, labels, masks, others)
