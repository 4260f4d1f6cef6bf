"""Corruptions: a batch of images → a corrupted one. Their classes are public as ``vitpatch.corruptions.<Class>``."""

from vitpatch.corruptions.counterfactual import BackgroundSwap, OtherImage
from vitpatch.corruptions.embedding_noise import EmbeddingNoise, Moments
from vitpatch.corruptions.frequency import LowPass, PhaseScramble
from vitpatch.corruptions.masked import (
    BackgroundOnly,
    DesaturateBackground,
    DesaturateObject,
    ObjectOnly,
    Occlude,
    Silhouette,
)
from vitpatch.corruptions.pixels import Blur, Chain, Gray, Identity, Noise, OnEmbeddings, Traits
from vitpatch.corruptions.shape import Edges, PatchShuffle

__all__ = [
    "BackgroundOnly",
    "BackgroundSwap",
    "Blur",
    "Chain",
    "DesaturateBackground",
    "DesaturateObject",
    "Edges",
    "EmbeddingNoise",
    "Gray",
    "Identity",
    "LowPass",
    "Moments",
    "Noise",
    "ObjectOnly",
    "Occlude",
    "OnEmbeddings",
    "OtherImage",
    "PatchShuffle",
    "PhaseScramble",
    "Silhouette",
    "Traits",
]
