"""Many data sets from one pool of images, patched once: how often tests call and intervals hold what is known.

The pool is the population: data sets are drawn from it by whole clusters, independently and with replacement, so its
own means are the true ones. Each cluster of the pool has a mirror image, the same but for the signs of the signals of
``NULL_SITES``: their true means are 0, and all of them together are as likely positive as negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import planted
from numpy.typing import NDArray

import vitpatch
from vitpatch.stats import inference
from vitpatch.stats import summary as stats

Array = NDArray[np.floating]

LEVEL = 0.05
FLIPS = 199
"""(FLIPS + 1) · LEVEL is whole: p ≤ LEVEL has probability LEVEL under the null, exactly."""
MOST_IMAGES = 5
STANDARD_ERRORS = 4


@dataclass(frozen=True)
class Pool:
    """What patching said of images whose effects are known.

    ``log_odds`` and ``prob`` effects (images, sites) of every head, in the order of the patches; ``known`` are the
    effects on the log odds that were planted; ``cluster`` (images,) is counted from 0.
    """

    log_odds: Array
    prob: Array
    known: Array
    cluster: NDArray[np.integer]

    @property
    def means(self) -> Array:
        """The true mean effects on the log odds over images, (sites,)."""
        return self.known.mean(0)


def site(layer: int, head: int) -> int:
    """The column of a head."""
    return layer * planted.HEADS + head


NULL = [site(*null) for null in planted.NULL_SITES]
REAL = site(*planted.REAL_SITE)
INERT = sorted(set(range(planted.DEPTH * planted.HEADS)) - {*NULL, REAL})


def signals(clusters: int, seed: int) -> tuple[Array, NDArray[np.integer]]:
    """Of the images of a pool: (images, signals) and the cluster of each; clusters of 1 to ``MOST_IMAGES`` images.

    A null signal's sign is the cluster's, its size the image's, 0.5 to 1.5. The real one is the cluster's alone, −0.5
    to 1.5.
    """
    rng, nulls = np.random.default_rng(seed), len(planted.NULL_SITES)
    cluster = np.repeat(np.arange(clusters), rng.integers(1, MOST_IMAGES + 1, clusters))
    null = rng.choice([-1, 1], (clusters, nulls))[cluster] * rng.uniform(0.5, 1.5, (len(cluster), nulls))
    real = rng.uniform(-0.5, 1.5, (clusters, 1))[cluster]
    both = np.vstack([np.hstack([null, real]), np.hstack([-null, real])])
    return both, np.concatenate([cluster, clusters + cluster])


def patched(clusters: int, seed: int) -> tuple[pd.DataFrame, Array]:
    """``vitpatch.patch``'s table, head by head, and the known effects (images, sites).

    Clean images have the ``signals``, corrupt ones have none: the total effect is the sum of all heads'.
    """
    of_images, cluster = signals(clusters, seed)
    clean = planted.images_with(of_images, seed)
    corrupt = planted.images_with(np.zeros_like(of_images), seed + 1)
    how = dict(target="z", metric="log_odds", clusters=cluster)
    table = vitpatch.patch(planted.carriers(), clean, corrupt, [1] * len(cluster), **how)
    known = np.zeros((len(cluster), planted.DEPTH * planted.HEADS))
    known[:, [*NULL, REAL]] = planted.GAIN * of_images
    return table, known


def make_pool(clusters: int = 150, seed: int = 0) -> Pool:
    """A pool of twice as many clusters: with each its mirror image."""
    table, known = patched(clusters, seed)
    columns = (table["effect"], table["prob"] - table["prob_corrupt"], table["cluster"])
    log_odds, prob, cluster = (column.to_numpy().reshape(known.shape) for column in columns)
    return Pool(log_odds.astype(float), prob.astype(float), known, cluster[:, 0])


def data_sets(pool: Pool, number: int, clusters: int, seed: int) -> Iterator[tuple[NDArray, NDArray]]:
    """Rows of the pool, and of each which draw it came with, for every one of ``number`` data sets."""
    rng, rows = np.random.default_rng(seed), np.arange(len(pool.cluster))
    of_cluster = np.split(rows, np.flatnonzero(np.diff(pool.cluster)) + 1)
    for _ in range(number):
        drawn = [of_cluster[cluster] for cluster in rng.integers(0, len(of_cluster), clusters)]
        yield np.concatenate(drawn), np.repeat(np.arange(clusters), [len(images) for images in drawn])


def calls(pool: Pool, number: int, clusters: int, seed: int) -> dict[str, float]:
    """In which share of data sets a family-wise test at ``LEVEL`` calls a site, by what is tested.

    ``nulls``: any null site, where they are the family. Of the family of all heads ``nulls of all`` any null or inert
    site, ``real`` the real one. The same as ``nulls`` with signs of images flipped, not clusters, and of effects on
    ``prob``.
    """
    called = dict.fromkeys(("nulls", "nulls of all", "real", "nulls, image flips", "nulls, prob"), 0)
    for i, (rows, unit) in enumerate(data_sets(pool, number, clusters, seed)):
        null, images = pool.log_odds[rows][:, NULL], np.arange(len(rows))
        found = inference.sign_flip_p(pool.log_odds[rows], unit, i, FLIPS) <= LEVEL
        called["nulls of all"] += found[[*NULL, *INERT]].any()
        called["real"] += found[REAL]
        for name, values, of in (
            ("nulls", null, unit),
            ("nulls, image flips", null, images),
            ("nulls, prob", pool.prob[rows][:, NULL], unit),
        ):
            called[name] += (inference.sign_flip_p(values, of, i, FLIPS) <= LEVEL).any()
    return {name: float(times / number) for name, times in called.items()}


def coverage(
    pool: Pool, number: int, clusters: int, seed: int, method: str = "percentile", by_image: bool = False
) -> Array:
    """In which share of data sets the interval of ``stats.estimates`` holds the true mean: nulls, then the real site.

    ``by_image`` takes every image for a cluster of its own.
    """
    sites = [*NULL, REAL]
    true, held = pool.means[sites], np.zeros(len(sites))
    for i, (rows, unit) in enumerate(data_sets(pool, number, clusters, seed)):
        unit = np.arange(len(rows)) if by_image else unit
        found = stats.estimates(pool.log_odds[rows][:, sites], unit, i, method)
        held += [estimate.low <= mean <= estimate.high for estimate, mean in zip(found, true, strict=True)]
    return held / number


def binomial_band(rate: float, number: int) -> tuple[float, float]:
    """Between which shares of ``number`` trials one of this rate lies, to ``STANDARD_ERRORS``."""
    reach = STANDARD_ERRORS * (rate * (1 - rate) / number) ** 0.5
    return rate - reach, rate + reach
