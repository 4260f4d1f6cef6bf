"""The vocabulary: frozen values that all other modules share. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Site(StrEnum):
    """Where in a block an activation is replaced, by the field's names.

    The residual stream ``resid_pre`` → + ``attn_out`` → ``resid_mid`` → + ``mlp_out`` → ``resid_post``: all
    (batch, tokens, width); ``attn_out`` and ``mlp_out`` are what attention and MLP add. By head, (batch, tokens, heads,
    head width): ``q``, ``k``, ``v``, the outputs of their projections, and ``z``, the input of the output projection;
    ``pattern`` (batch, heads, tokens, tokens) are the attention probabilities, whole query rows.
    """

    RESID_PRE = "resid_pre"
    ATTN_OUT = "attn_out"
    RESID_MID = "resid_mid"
    MLP_OUT = "mlp_out"
    RESID_POST = "resid_post"
    Z = "z"
    Q = "q"
    K = "k"
    V = "v"
    PATTERN = "pattern"

    @property
    def by_head(self) -> bool:
        """Whether the site is split by attention head."""
        return self in (Site.Z, Site.Q, Site.K, Site.V, Site.PATTERN)

    @property
    def is_stream(self) -> bool:
        """Whether the site is the residual stream itself: replaced at all tokens, the run is the donor's from there."""
        return self in (Site.RESID_PRE, Site.RESID_MID, Site.RESID_POST)


class TokenGroup(StrEnum):
    """Which tokens of a site are replaced. ``vitpatch.patching.plan.possible_tokens`` has the definitions.

    ``each`` and ``grid`` stand for many patches: one a token, one a block of image patches.
    """

    ALL = "all"
    CLS = "cls"
    REGISTERS = "registers"
    PATCHES = "patches"
    OBJECT = "object"
    BACKGROUND = "background"
    RANDOM_OBJECT = "random_object"
    EACH = "each"
    GRID = "grid"


class BaseRun(StrEnum):
    """The two runs of an image that patches are made from: without and with the corruption."""

    CLEAN = "clean"
    CORRUPT = "corrupt"

    @property
    def other(self) -> BaseRun:
        """The other one."""
        return BaseRun.CORRUPT if self is BaseRun.CLEAN else BaseRun.CLEAN


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


class Partner(StrEnum):
    """Which other image is paired with an image, always of another cluster; ``vitpatch.data.partners`` chooses it.

    ``nearest_luminance``: of another class, the one whose mean luminance is nearest. ``pair``: the data's own
    ``pair_column``.
    """

    SAME_CLASS = "same_class"
    OTHER_CLASS = "other_class"
    NEAREST_LUMINANCE = "nearest_luminance"
    PAIR = "pair"


class Donor(StrEnum):
    """Where activations are taken from.

    ``pair``: the other base run of the same image. ``same_class``, ``other_class``: another image's clean run.
    ``zero`` and ``mean`` (of the training split, by position) are no run: they are put into the clean run.
    """

    PAIR = "pair"
    SAME_CLASS = "same_class"
    OTHER_CLASS = "other_class"
    ZERO = "zero"
    MEAN = "mean"

    @property
    def is_constant(self) -> bool:
        """Whether the values are the same for all images."""
        return self in (Donor.ZERO, Donor.MEAN)

    @property
    def partner(self) -> Partner | None:
        """Which other image's clean run it is, if it is one."""
        return {Donor.SAME_CLASS: Partner.SAME_CLASS, Donor.OTHER_CLASS: Partner.OTHER_CLASS}.get(self)


class Metric(StrEnum):
    """What is read off the logits of an image; ``vitpatch.patching.metrics`` has the definitions."""

    PROB = "prob"
    LOG_ODDS = "log_odds"
    LOGIT = "logit"
    LOGIT_DIFF = "logit_diff"
    KL = "kl"


class Tested(StrEnum):
    """Which effects are tested: those on the log odds, or on the headline metric."""

    LOG_ODDS = "log_odds"
    HEADLINE = "headline"


class Interval(StrEnum):
    """How intervals come from resamples (``vitpatch.stats.inference``)."""

    PERCENTILE = "percentile"
    BCA = "bca"


class Include(StrEnum):
    """Which images the means are over.

    ``clean_correct``: the clean run is right. ``flipped``: it is, and the corrupted run is not. ``min_total_effect``:
    the corruption costs at least so much of the headline metric (of ``kl``: adds as much).
    """

    ALL = "all"
    CLEAN_CORRECT = "clean_correct"
    FLIPPED = "flipped"
    MIN_TOTAL_EFFECT = "min_total_effect"


@dataclass(frozen=True)
class Inclusion:
    """Which images the means are over; ``least``: the bound of ``min_total_effect``, in the headline metric's unit."""

    rule: Include = Include.ALL
    least: float | None = None

    def __str__(self) -> str:
        return str(self.rule) if self.least is None else f"{self.rule}:{self.least:g}"

    @property
    def selects_on_the_outcome(self) -> bool:
        """Whether images are chosen by what the corruption did to them, which biases every mean away from 0."""
        return self.rule in (Include.FLIPPED, Include.MIN_TOTAL_EFFECT)


ALL_IMAGES = Inclusion()
"""The means are over all images."""

ALL_HEADS = -1
"""``Patch.head`` of a patch of all heads together, or of a site that has none."""
EVERY_HEAD, JOINT = "all", "joint"
"""``Target.heads``: every head by itself, or all heads together."""
PREFIX, SUFFIX = -1, -2
"""``Patch.window`` of the layers 0 … l, and of l … depth − 1."""
WINDOW_WORDS = {"prefix": PREFIX, "suffix": SUFFIX}
"""The words for windows that are no number of layers."""


@dataclass(frozen=True)
class Target:
    """What the user asks to patch.

    ``layers`` are the windows' centres, ``None`` = all. ``tokens`` are groups, each patched by itself. ``heads``, of a
    site by head: numbers, or ``all`` – one head at a time – or ``joint`` – all together –; ``None`` of other sites.
    ``grid`` (rows, columns) are the blocks of the group ``grid``.
    """

    site: Site
    layers: tuple[int, ...] | None = None
    tokens: tuple[TokenGroup, ...] = (TokenGroup.ALL,)
    heads: tuple[int, ...] | str | None = None
    grid: tuple[int, int] | None = None

    @property
    def one_head_at_a_time(self) -> bool:
        """Whether single heads are patched."""
        return self.heads is not None and self.heads != JOINT


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model that a plan is made from.

    ``special`` are the names of the tokens before the image patches, ``cls`` first; ``grid`` the (rows, columns) of
    image patches; the classifier reads the first ``reads`` tokens.
    """

    depth: int
    heads: int
    special: tuple[str, ...]
    grid: tuple[int, int]
    reads: int

    @property
    def tokens(self) -> int:
        """The length of the token axis."""
        return len(self.special) + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Patch:
    """One replacement: the donor's values at ``site`` of ``layers``, at ``tokens``, put into the recipient.

    ``layer`` is the centre of the window and names the patch; ``layers`` are what is left of the window after
    clipping to the network (0-based, ascending). ``window`` counts layers, or is ``PREFIX`` or ``SUFFIX``. ``tokens``
    is a group's name, of one token ``each:<row>x<column>`` or ``each:cls``, of a block ``grid:<row>x<column>``.
    ``without`` is a layer of the window that is left out of ``layers``, or −1.
    """

    site: Site
    layer: int
    window: int
    layers: tuple[int, ...]
    tokens: str = "all"
    head: int = ALL_HEADS
    without: int = -1

    @property
    def clipped(self) -> bool:
        """Whether the window reaches over an end of the network, so that fewer layers are patched."""
        return len(self.layers) < self.window


def token_position(group: str) -> tuple[int, int] | None:
    """(row, column) of a token group's name ``each:<row>x<column>`` or ``grid:…``; ``None`` of any other."""
    row, _, column = group.partition(":")[2].partition("x")
    return (int(row), int(column)) if row.isdigit() and column.isdigit() else None


def format_window(window: int) -> str:
    """A window as it is asked for: its number of layers, ``prefix`` or ``suffix``."""
    return {number: word for word, number in WINDOW_WORDS.items()}.get(window, str(window))


def window_layers(centre: int, window: int, depth: int) -> tuple[int, ...]:
    """The layers of a window, clipped to ``0 … depth - 1``.

    ``centre - window // 2 … centre + (window - 1) // 2``; of ``PREFIX`` ``0 … centre``, of ``SUFFIX`` ``centre …``.
    """
    if window in (PREFIX, SUFFIX):
        return tuple(range(centre + 1) if window == PREFIX else range(centre, depth))
    first, last = centre - window // 2, centre + (window - 1) // 2
    return tuple(range(max(first, 0), min(last, depth - 1) + 1))


@dataclass(frozen=True)
class ImageBatch:
    """Images before corruption and normalisation, on the [0, 1] scale.

    ``images`` float32 (batch, 3, height, width) at the model's input size; ``ids`` int64 (batch,), the row in the
    split; ``labels`` int64 (batch,); ``masks`` float32 (batch, 1, height, width) in [0, 1], 1 = object, where the
    data have them; ``others`` the partner of each image, for corruptions that need one; ``partners`` the partners of
    every kind that the run needs. An id of −1 means that an image has no partner.
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    masks: Tensor | None = None
    others: ImageBatch | None = None
    partners: Mapping[Partner, ImageBatch] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: slice | Tensor) -> ImageBatch:
        """Some of the images, by a slice or by their positions."""
        return self._each(lambda tensor: tensor[rows], lambda batch: batch.part(rows))

    def to(self, device: Any) -> ImageBatch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device), lambda batch: batch.to(device))

    def _each(self, of_tensor: Callable[[Tensor], Tensor], of_batch: Callable[[ImageBatch], ImageBatch]) -> ImageBatch:
        masks = None if self.masks is None else of_tensor(self.masks)
        others = None if self.others is None else of_batch(self.others)
        partners = None if self.partners is None else {kind: of_batch(b) for kind, b in self.partners.items()}
        return ImageBatch(of_tensor(self.images), of_tensor(self.ids), of_tensor(self.labels), masks, others, partners)


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error and interval, all by resampling clusters.

    ``se``, ``low`` and ``high`` are NaN where there is one cluster: its spread is unknown.
    """

    mean: float
    se: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the interval is known."""
        return self.low == self.low  # not NaN

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is inside the interval, so that no effect is shown; false where the interval is unknown."""
        return self.low <= 0 <= self.high

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves 0 out, so that an effect is shown; false where the interval is unknown."""
        return self.known and not self.holds_zero


MULTI_LABEL = "multi_label_classification"
"""A model's ``problem_type`` whose classes do not exclude each other."""

BT601_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in ITU-R BT.601 luma."""


Run = BaseRun | Donor
"""A base run: of the image itself, or (``same_class``, ``other_class``) the clean run of a partner."""


def base_run_of(donor: Donor, direction: Direction) -> Run | None:
    """The base run that a donor's values are taken from; ``None`` where they are constants."""
    if donor.is_constant:
        return None
    return direction.donor if donor is Donor.PAIR else donor
