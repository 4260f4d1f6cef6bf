import numpy as np
import pytest
from scipy.stats import ttest_1samp

from vitpatch import inference
from vitpatch.spec import Direction, Metric, VitPatchError


def sample(n=120, columns=4, clusters=15, seed=0):
    """Null values with a strong share of their cluster, clusters of different size."""
    rng = np.random.default_rng(seed)
    of = np.concatenate([np.arange(clusters), rng.integers(0, clusters, n - clusters)])
    return rng.normal(size=(clusters, columns))[of] + 0.5 * rng.normal(size=(n, columns)), of


def cluster_means(values, of):
    return np.stack([values[of == cluster].mean(0) for cluster in np.unique(of)])


def loop_of_p(values, of, seed, flips):
    """The same test as a plain loop, with t in full."""

    def t(means):
        return means.mean(0) / (means.std(0, ddof=1) / np.sqrt(len(means)))

    means, rng = cluster_means(values, of), np.random.default_rng(seed)
    signs = np.where(rng.random((flips, len(means))) < 0.5, -1, 1)
    largest = np.array([np.abs(t(row[:, None] * means)).max() for row in signs])
    return [(1 + (largest >= abs(each)).sum()) / (flips + 1) for each in t(means)]


def test_t_is_that_of_cluster_means():
    values, of = sample()
    assert inference.cluster_t(values, of) == pytest.approx(ttest_1samp(cluster_means(values, of), 0).statistic)


@pytest.mark.parametrize("seed", range(3))
def test_sign_flips_agree_with_a_plain_loop(seed):
    values, of = sample(seed=seed)
    values[:, 1] += 1.0
    want = loop_of_p(values, of, seed=7, flips=400)
    assert inference.sign_flip_p(values, of, seed=7, flips=400).tolist() == want
    assert want[1] < 0.05 < want[0]


def test_p_does_not_depend_on_how_many_flips_fit_in_memory(monkeypatch):
    values, of = sample()
    whole = inference.sign_flip_p(values, of, seed=1, flips=300)
    monkeypatch.setattr("vitpatch.resamples.WEIGHTS_AT_ONCE", 200)  # 13 flips of 15 clusters at a time
    assert (inference.sign_flip_p(values, of, seed=1, flips=300) == whole).all()


def test_patches_without_variance():
    values, of = np.array([[0.0, 0.5, 0.3], [0.0, 0.5, -0.3]] * 10), np.arange(20) // 2
    assert inference.cluster_t(values, of).tolist() == [0, np.inf, 0]
    p = inference.sign_flip_p(values, of, seed=0, flips=999)
    assert p[0] == p[2] == 1  # images that cancel in every cluster leave no rounding behind
    assert 1 / 1000 <= p[1] < 0.02  # equalled by flips that turn all 10 clusters the same way: 1 in 512


def test_of_few_clusters_ties_count_against():
    """Four clusters of one sign: 2 of 16 flips are as far, so that p is about 1/8, never 1/(B + 1)."""
    values = np.array([[0.1], [0.2], [0.3], [0.7]])
    assert inference.sign_flip_p(values, np.arange(4), 0, flips=4000)[0] == pytest.approx(1 / 8, abs=0.02)
    assert inference.sign_flip_p(values, np.zeros(4, dtype=int), 0, flips=99).tolist() == [1]
    assert np.isnan(inference.cluster_t(values, np.zeros(4, dtype=int))).all()


def test_false_positives_are_at_the_level_over_the_family_with_clusters_and_not_with_images():
    by_cluster, by_image, draws = 0, 0, 200
    for seed in range(draws):
        values, of = sample(seed=seed)
        by_cluster += inference.sign_flip_p(values, of, seed, flips=199).min() <= 0.05
        by_image += inference.sign_flip_p(values, np.arange(len(of)), seed, flips=199).min() <= 0.05
    assert 1 <= by_cluster <= 22  # 5 % of 200, within four standard errors
    assert by_image > 100


def test_kl_put_into_the_clean_run_is_refused():
    with pytest.raises(VitPatchError, match=r"metric=kl, direction=noise: .*; test log_odds"):
        inference.check_signed(Metric.KL, Direction.NOISE)
    inference.check_signed(Metric.KL, Direction.DENOISE)
    inference.check_signed(Metric.LOG_ODDS, Direction.NOISE)
