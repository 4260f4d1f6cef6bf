"""Values of images in clusters."""

import numpy as np


def sample(n=300, columns=3, clusters=60, seed=0):
    """Values with a strong share of their cluster, and the clusters; clusters differ in size."""
    rng = np.random.default_rng(seed)
    of = rng.integers(0, clusters, n)
    shared = rng.normal(size=(clusters, columns))
    return 0.3 + shared[of] + 0.5 * rng.normal(size=(n, columns)), of
