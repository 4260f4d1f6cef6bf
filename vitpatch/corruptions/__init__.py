"""Corruptions: a batch of images → a corrupted one. Their classes are public as ``vitpatch.corruptions.<Class>``."""

from vitpatch.corruptions.base import Blur, Chain, Corruption, Gray, Identity, Noise
from vitpatch.corruptions.counterfactual import BackgroundSwap, OtherImage
from vitpatch.corruptions.embedding_noise import EmbeddingNoise, Moments
from vitpatch.corruptions.masked import (
    BackgroundOnly,
    DesaturateBackground,
    DesaturateObject,
    ObjectOnly,
    Occlude,
    Silhouette,
)
from vitpatch.corruptions.structure import Edges, LowPass, PatchShuffle, PhaseScramble

__all__ = [
    "BackgroundOnly", "BackgroundSwap", "Blur", "Chain", "Corruption", "DesaturateBackground", "DesaturateObject",
    "Edges", "EmbeddingNoise", "Gray", "Identity", "LowPass", "Moments", "Noise", "ObjectOnly", "Occlude",
    "OtherImage", "PatchShuffle", "PhaseScramble", "Silhouette",
]  # fmt: skip
