"""The nouns: frozen values that everything else is written in. No torch here at import."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class VitPatchError(Exception):
    """What a user did wrong, in one line: what was got, what is expected, what to do."""


class Site(StrEnum):
    """Where in a block an activation is replaced, by the field's names.

    ``attn_out`` and ``mlp_out`` are what the block's attention and MLP hand to the residual stream,
    ``resid_post`` is the residual stream after the block; all (batch, tokens, width).
    """

    ATTN_OUT = "attn_out"
    MLP_OUT = "mlp_out"
    RESID_POST = "resid_post"


class TokenGroup(StrEnum):
    """Which tokens of a site are replaced: every one, the CLS token, or the image patches (no special token)."""

    ALL = "all"
    CLS = "cls"
    PATCHES = "patches"


class BaseRun(StrEnum):
    """The two runs every patch is made of."""

    CLEAN = "clean"
    CORRUPT = "corrupt"


class Direction(StrEnum):
    """``denoise`` puts clean activations into the corrupted run, ``noise`` the reverse (Heimersheim & Nanda 2024)."""

    DENOISE = "denoise"
    NOISE = "noise"

    @property
    def donor(self) -> BaseRun:
        """The base run that activations are taken from."""
        return BaseRun.CLEAN if self is Direction.DENOISE else BaseRun.CORRUPT

    @property
    def recipient(self) -> BaseRun:
        """The base run that activations are put into, and that effects are counted against."""
        return BaseRun.CORRUPT if self is Direction.DENOISE else BaseRun.CLEAN


class Metric(StrEnum):
    """What is read off the logits of an image; ``vitpatch.effects`` has the definitions."""

    PROB = "prob"
    LOG_ODDS = "log_odds"
    LOGIT = "logit"
    LOGIT_DIFF = "logit_diff"
    KL = "kl"


@dataclass(frozen=True)
class Target:
    """What is patched, as asked for: a site, its layers (``None`` = all; the windows' centres) and tokens."""

    site: Site
    layers: tuple[int, ...] | None = None
    tokens: TokenGroup = TokenGroup.ALL


ALL_HEADS = -1
"""``Patch.head`` of a patch that is not of one attention head."""


@dataclass(frozen=True)
class Patch:
    """One replacement: the donor's values at ``site`` of ``layers``, at ``tokens``, put into the recipient.

    ``layer`` is the centre of the window and names the patch; ``layers`` are what is left of the window after
    clipping to the network (0-based, ascending).
    """

    site: Site
    layer: int
    window: int
    layers: tuple[int, ...]
    tokens: TokenGroup = TokenGroup.ALL
    head: int = ALL_HEADS

    @property
    def clipped(self) -> bool:
        """Whether the window reaches over an end of the network, so that fewer layers are patched."""
        return len(self.layers) < self.window


def window_layers(centre: int, window: int, depth: int) -> tuple[int, ...]:
    """Layers ``centre - window // 2 … centre + (window - 1) // 2``, clipped to ``0 … depth - 1``."""
    first, last = centre - window // 2, centre + (window - 1) // 2
    return tuple(range(max(first, 0), min(last, depth - 1) + 1))


@dataclass(frozen=True)
class ImageBatch:
    """Images on their way to a corruption and a model, still on the [0, 1] scale.

    ``images`` float32 (batch, 3, height, width) at the model's input size; ``ids`` int64 (batch,), the row in the
    split; ``labels`` int64 (batch,); ``masks`` float32 (batch, 1, height, width) in [0, 1], 1 = object, where the
    data have them.
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: Any) -> ImageBatch:
        """The same batch on another device."""
        masks = None if self.masks is None else self.masks.to(device)
        return ImageBatch(self.images.to(device), self.ids.to(device), self.labels.to(device), masks)


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error and percentile interval, all by resampling clusters.

    ``se``, ``low`` and ``high`` are NaN where there is one cluster: nothing is known of its spread.
    """

    mean: float
    se: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return self.low == self.low  # not NaN

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is inside the interval: no effect is shown. Of an unknown interval it is not said."""
        return self.low <= 0 <= self.high


def digest(value: Any) -> str:
    """Sixteen hex digits that are equal exactly when the JSON of ``value`` (keys sorted) is."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
