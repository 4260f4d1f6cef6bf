"""Vision transformers whose effects are known, because what carries them was planted.

All have 6 layers, width 32, 4 heads, 16 pixels and patches of 4: 16 patch tokens after CLS, which is what the
classifier reads.

``planted_layer`` is random but for one way from the patches to CLS: attention writes nothing in every layer but one (or
one head of it), so that nothing else can carry an effect.

The others are ``Circuit``s, zero but for what is written into them. A *signal* is a number of an image. It stands in
``PIXELS`` different pixels of each patch, and in the stream in a pair of channels as (+, −), so that the mean over
channels is 0; a layer norm with eps 1e6 and weight 1e3 then multiplies by 1 − var / 2e6, which is 1 to ``LINEAR``.
Queries and keys are 0: a head looks evenly at all tokens, and hands on the mean over the patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

DEPTH, WIDTH, HEADS, SIZE, PATCH = 6, 32, 4, 16, 4
HEAD_WIDTH = WIDTH // HEADS
PATCHES = (SIZE // PATCH) ** 2
PIXELS = 3 * PATCH**2
"""Numbers of a patch, and so the most signals that an image can hold."""
GAIN = 2.0
"""Log odds of class 1 by the signal ``ANSWER``: half of it on that class's logit, minus half on the other's."""
LINEAR = 2e-5
"""Bounds what norms and float32 take from an effect of up to 3: three norms at a variance of up to 4, 2e-6 each."""

PLANTED_LAYER, PLANTED_HEAD = 3, 2
RESULT, ANSWER = 14, 15
"""Signals that the model makes; those before are the image's."""
TWICE = (1, 3)
"""The layers that write the same signal in ``logic``."""
NULL_SITES = tuple((layer, head) for layer in (0, 2, 5) for head in range(HEADS))
"""(layer, head) of ``carriers``, whose mean effect is 0."""
REAL_SITE = (3, 1)
"""(layer, head) of ``carriers``, whose mean effect is not."""


def _vit(classes: int, **config: object) -> ViTForImageClassification:
    shape = dict(image_size=SIZE, patch_size=PATCH, hidden_size=WIDTH, num_hidden_layers=DEPTH)
    both = shape | dict(num_attention_heads=HEADS, intermediate_size=2 * WIDTH, num_labels=classes)
    return ViTForImageClassification(ViTConfig(**both, **config)).eval()


@torch.no_grad()
def planted_layer(head: int | None = None, looks_evenly: bool = False, seed: int = 0) -> ViTForImageClassification:
    """Random weights and MLPs; attention adds its bias alone, but in ``PLANTED_LAYER``, or in one ``head`` of it.

    ``looks_evenly``: queries and keys of that layer are 0, so that only its values can differ between two images.
    """
    torch.manual_seed(seed)
    model = _vit(classes=5, initializer_range=0.25)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.1)
    for layer, block in enumerate(model.vit.layers):
        attention = block.attention
        columns = attention.o_proj.weight.unflatten(1, (HEADS, HEAD_WIDTH))
        for other in range(HEADS):
            if layer != PLANTED_LAYER or head not in (None, other):
                columns[:, other] = 0
        if layer == PLANTED_LAYER and looks_evenly:
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.zero_()
                projection.bias.zero_()
    return model


def pair_of_images(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two unlike random images each, (number, 3, 16, 16): what is clean and what is corrupt."""
    return torch.randn(2, number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).unbind()


class Circuit:
    """A model that does what is written into it, in signals; two classes, of which 1 is the label."""

    @torch.no_grad()
    def __init__(self, signals: int, bias: float = 0.0) -> None:
        """``signals`` are the image's; ``bias`` is the log odds of class 1 where ``ANSWER`` is 0."""
        self.model = _vit(classes=2, hidden_act="relu", layer_norm_eps=1e6)
        for weight in self.model.parameters():
            weight.zero_()
        for block in self.model.vit.layers:
            block.layernorm_before.weight.fill_(1e3)
            block.layernorm_after.weight.fill_(1e3)
        self.model.vit.layernorm.weight.fill_(1e3)
        embed = self.model.vit.embeddings.patch_embeddings.projection.weight.flatten(1)  # (width, PIXELS), a view
        for signal in range(signals):
            self._write(embed[:, signal], signal)
        for label, sign in ((0, -1), (1, 1)):
            self._read(self.model.classifier.weight[label], ANSWER, sign * GAIN / 2)
            self.model.classifier.bias[label] = sign * bias / 2

    @staticmethod
    def _read(weights: Tensor, signal: int, gain: float = 1.0) -> None:
        weights[2 * signal], weights[2 * signal + 1] = gain / 2, -gain / 2

    @staticmethod
    def _write(weights: Tensor, signal: int, gain: float = 1.0) -> None:
        weights[2 * signal], weights[2 * signal + 1] = gain, -gain

    @torch.no_grad()
    def head(self, layer: int, head: int, source: int, target: int) -> None:
        """A head adds the patches' mean of a signal to another, at every token; CLS itself has none of the image's."""
        attention, channel = self.model.vit.layers[layer].attention, head * HEAD_WIDTH
        self._read(attention.v_proj.weight[channel], source)
        self._write(attention.o_proj.weight[:, channel], target, gain=(PATCHES + 1) / PATCHES)

    @torch.no_grad()
    def unit(self, layer: int, number: int, source: int, threshold: float, target: int, gain: float) -> None:
        """A unit of an MLP adds gain · relu(source − threshold) to a signal."""
        mlp = self.model.vit.layers[layer].mlp
        self._read(mlp.fc1.weight[number], source)
        mlp.fc1.bias[number] = -threshold
        self._write(mlp.fc2.weight[:, number], target, gain)


def images_with(signals: Sequence[Sequence[float]] | np.ndarray, seed: int = 0) -> Tensor:
    """Images (number, 3, 16, 16) with these signals (number, signals ≤ 48), unlike from patch to patch.

    A signal is the mean over the patches of one pixel of each; the other pixels are noise.
    """
    signals = torch.as_tensor(np.asarray(signals, dtype=np.float32))
    number, given = signals.shape
    tiles = torch.randn(number, PIXELS, PATCHES, generator=torch.Generator().manual_seed(seed)) / 2
    tiles[:, :given] += signals[:, :, None] - tiles[:, :given].mean(-1, keepdim=True)
    return torch.nn.functional.fold(tiles, (SIZE, SIZE), PATCH, stride=PATCH)


def logic(is_and: bool) -> ViTForImageClassification:
    """The answer is AND or OR of two layers that say the same.

    Both layers of ``TWICE`` add the image's signal 0, which is 1 or 0, to ``RESULT``; the MLP of layer 4 makes
    relu(a + b − 1) of it, which is AND, or relu(a + b) less that, which is OR. Log odds are −1 without, 1 with it.
    """
    circuit = Circuit(signals=1, bias=-GAIN / 2)
    for layer in TWICE:
        circuit.head(layer, 0, source=0, target=RESULT)
    circuit.unit(4, 0, source=RESULT, threshold=1, target=ANSWER, gain=1 if is_and else -1)
    if not is_and:
        circuit.unit(4, 1, source=RESULT, threshold=0, target=ANSWER, gain=1)
    return circuit.model


def carriers(bias: float = 1.5) -> ViTForImageClassification:
    """Heads that add a signal of their own to the answer, straight: ``NULL_SITES`` in order, then ``REAL_SITE``.

    Replacing such a head's ``z`` is worth ``GAIN`` · signal in log odds, whatever the other heads do.
    """
    sites = (*NULL_SITES, REAL_SITE)
    circuit = Circuit(signals=len(sites), bias=bias)
    for signal, (layer, head) in enumerate(sites):
        circuit.head(layer, head, source=signal, target=ANSWER)
    return circuit.model
