"""Which other image is the partner of an image: fixed by the selected images and the seed. Pure, numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitpatch.errors import VitPatchError
from vitpatch.formatting import format_count
from vitpatch.types import Partner

NO_PARTNER = -1
"""The position of the partner of an image that has none: no other cluster has an image of the kind."""
ROWS_AT_ONCE = 512
"""Rows compared with all images at once: bounds the memory."""

Numbers = NDArray[np.integer]


def choose_partners(
    kind: Partner, labels: Numbers, clusters: Numbers, seed: int, luminance: NDArray[np.floating] | None = None
) -> NDArray[np.int64]:
    """The position of each image's partner, (images,) int64, of another cluster; ``NO_PARTNER`` where there is none.

    ``same_class`` and ``other_class`` are a derangement, drawn from the seed: each image is the partner of one, except
    where clusters or classes are so uneven that there is none; the rest are then drawn freely. ``nearest_luminance``
    (the mean BT.601 luma of each image, (images,)) is of another class; the first of equally near ones. An image of
    unknown luminance (NaN: it cannot be read) is nobody's partner and has none.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if kind is Partner.NEAREST_LUMINANCE:
        return _nearest(np.asarray(luminance), labels, clusters)
    rng = np.random.default_rng([seed, list(Partner).index(kind), 2])  # 2: apart from other draws of the seed
    if kind is Partner.OTHER_CLASS:
        return _deranged(np.arange(len(labels)), labels, clusters, False, rng)
    partner = np.full(len(labels), NO_PARTNER, dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        partner[rows] = _deranged(rows, labels, clusters, True, rng)
    return partner


def check_partners(kind: Partner, positions: Numbers, ids: Numbers, corruption: str) -> None:
    """Raises ``VitPatchError`` where an image has no partner and a corruption asks for one of every image."""
    if (alone := np.flatnonzero(positions < 0)).size:
        raise VitPatchError(
            f"corruption {corruption}: {len(alone)} of {format_count(len(ids), 'image')}, the first {ids[alone[0]]}, "
            f"have no {kind} partner in another cluster; choose another kind or more images"
        )


def _deranged(
    rows: Numbers, labels: Numbers, clusters: Numbers, same: bool, rng: np.random.Generator
) -> NDArray[np.int64]:
    """A partner among ``rows`` for each of them: a permutation, repaired by swaps where two do not fit."""
    partner = rng.permutation(rows)

    def fits(a: Numbers, b: Numbers) -> NDArray[np.bool_]:
        return ((labels[a] == labels[b]) == same) & (clusters[a] != clusters[b])

    for i in np.flatnonzero(~fits(rows, partner)):
        swaps = np.flatnonzero(fits(rows[i], partner) & fits(rows, partner[i]))
        if len(swaps):
            j = rng.choice(swaps)
            partner[i], partner[j] = partner[j], partner[i]
    for i in np.flatnonzero(~fits(rows, partner)):
        free = rows[fits(rows[i], rows)]
        partner[i] = rng.choice(free) if len(free) else NO_PARTNER
    return partner


def _nearest(luminance: NDArray[np.floating], labels: Numbers, clusters: Numbers) -> NDArray[np.int64]:
    partner = np.empty(len(labels), dtype=np.int64)
    for first in range(0, len(labels), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        apart = np.nan_to_num(np.abs(luminance[rows, None] - luminance), nan=np.inf)
        apart[(labels[rows, None] == labels) | (clusters[rows, None] == clusters)] = np.inf
        partner[rows] = np.where(np.isfinite(apart.min(1)), apart.argmin(1), NO_PARTNER)
    return partner
