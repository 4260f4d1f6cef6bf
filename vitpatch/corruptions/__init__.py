"""Corruptions: a batch of images → a corrupted one. Their classes are public as ``vitpatch.corruptions.<Class>``."""

from vitpatch.corruptions.base import Chain, Corruption
from vitpatch.corruptions.counterfactual import BackgroundSwap, OtherImage
from vitpatch.corruptions.embedding_noise import EmbeddingNoise
from vitpatch.corruptions.frequency import LowPass, PhaseScramble
from vitpatch.corruptions.masked import (
    BackgroundOnly,
    DesaturateBackground,
    DesaturateObject,
    ObjectOnly,
    Occlude,
    Silhouette,
)
from vitpatch.corruptions.moments import Moments
from vitpatch.corruptions.pixels import Blur, Gray, Identity, Noise
from vitpatch.corruptions.shape import Edges, PatchShuffle

__all__ = [
    "BackgroundOnly", "BackgroundSwap", "Blur", "Chain", "Corruption", "DesaturateBackground", "DesaturateObject",
    "Edges", "EmbeddingNoise", "Gray", "Identity", "LowPass", "Moments", "Noise", "ObjectOnly", "Occlude",
    "OtherImage", "PatchShuffle", "PhaseScramble", "Silhouette",
]  # fmt: skip
