import numpy as np
import pytest
from scipy.stats import ttest_1samp

from vitpatch.errors import VitPatchError
from vitpatch.stats import inference
from vitpatch.stats import summary as stats
from vitpatch.stats.inference import Resamples
from vitpatch.types import Direction, Metric


def sample(n=120, columns=4, clusters=15, seed=0):
    """Null values with a strong share of their cluster, clusters of different size."""
    rng = np.random.default_rng(seed)
    of = np.concatenate([np.arange(clusters), rng.integers(0, clusters, n - clusters)])
    return rng.normal(size=(clusters, columns))[of] + 0.5 * rng.normal(size=(n, columns)), of


def loop_of_p(values, of, seed, flips):
    """The same test as a plain loop: every image is flipped with its cluster, the mean is over images."""
    clusters, rng = np.unique(of), np.random.default_rng(seed)

    def statistic(flipped):
        sums = np.stack([flipped[of == cluster].sum(0) for cluster in clusters])
        return flipped.mean(0) / np.sqrt((sums**2).sum(0))

    signs = np.where(rng.random((flips, len(clusters))) < 0.5, -1, 1)[:, np.searchsorted(clusters, of)]
    largest = np.array([np.abs(statistic(row[:, None] * values)).max() for row in signs])
    return [(1 + (largest >= abs(each) - 1e-12).sum()) / (flips + 1) for each in statistic(values)]


@pytest.mark.parametrize("seed", range(3))
def test_sign_flips_agree_with_a_plain_loop(seed):
    values, of = sample(seed=seed)
    values[:, 1] += 1.0
    want = loop_of_p(values, of, seed=7, flips=400)
    assert inference.sign_flip_p(values, of, seed=7, flips=400).tolist() == want
    assert want[1] < 0.05 < want[0]


def test_the_p_is_of_the_mean_over_images_that_the_interval_is_of():
    """One cluster of 300 images below 0, 29 of one image above: the mean over images is below 0 and not shown to be."""
    of = np.array([0] * 300 + list(range(1, 30)))
    values = np.where(of == 0, -0.1, 1.0)[:, None] + 0.05 * np.random.default_rng(0).normal(size=(329, 1))
    (estimate,) = stats.estimates(values, of, seed=0)
    assert estimate.mean < 0.01 and estimate.low < 0 < estimate.high
    assert inference.sign_flip_p(values, of, seed=0, flips=999)[0] > 0.5  # of the mean of cluster means: 0.001


def test_p_of_single_images_is_that_of_their_t():
    """Where clusters are of one size, sums and means of clusters say the same."""
    values = np.random.default_rng(3).normal(0.4, 1, (30, 1))
    by_image = inference.sign_flip_p(values, np.arange(30), seed=0)
    assert by_image[0] == pytest.approx(ttest_1samp(values[:, 0], 0).pvalue, rel=0.1)
    twice = inference.sign_flip_p(np.repeat(values, 2, axis=0), np.arange(60) // 2, seed=0)
    assert twice == by_image


@pytest.mark.parametrize("sizes", [[1] * 29 + [300], [1, 2, 4, 8] * 8, [1] * 40])
def test_nulls_of_clusters_of_any_size_are_called_at_the_level(sizes):
    """Clusters as likely above 0 as below, with effects of their own: exact whatever their sizes are."""
    calls, draws, of = 0, 300, np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(len(sizes), 3))[of] + 0.5 * rng.normal(size=(len(of), 3))
        calls += inference.sign_flip_p(values, of, seed, flips=199).min() <= 0.05
    assert 1 <= calls <= 30  # 5 % of 300, within four standard errors


def test_p_does_not_depend_on_how_many_flips_fit_in_memory(monkeypatch):
    values, of = sample()
    whole = inference.sign_flip_p(values, of, seed=1, flips=300)
    monkeypatch.setattr("vitpatch.stats.inference.WEIGHTS_AT_ONCE", 200)  # 13 flips of 15 clusters at a time
    assert (inference.sign_flip_p(values, of, seed=1, flips=300) == whole).all()


def test_patches_without_variance():
    values, of = np.array([[0.0, 0.5, 0.1], [0.0, 0.5, 0.2], [0.0, 0.5, -0.3]] * 10), np.arange(30) // 3
    p = inference.sign_flip_p(values, of, seed=0, flips=999)
    assert p[0] == p[2] == 1  # images that cancel in every cluster leave no rounding behind
    assert 1 / 1000 <= p[1] < 0.02  # equalled by flips that turn all 10 clusters the same way: 1 in 512


def test_of_few_clusters_ties_count_against():
    """Four clusters of one sign: 2 of 16 flips are as far, so that p is about 1/8, never 1/(B + 1)."""
    values = np.array([[0.1], [0.2], [0.3], [0.7]])
    assert inference.sign_flip_p(values, np.arange(4), 0, flips=4000)[0] == pytest.approx(1 / 8, abs=0.02)
    assert inference.sign_flip_p(values, np.zeros(4, dtype=int), 0, flips=99).tolist() == [1]


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


def layers(means, n=200, seed=0, noise=1.0):
    """Effects of layers with these true means, 50 clusters."""
    rng, of = np.random.default_rng(seed), np.arange(n) % 50
    shared = rng.normal(size=(50, len(means)))
    return np.array(means) + noise * (shared[of] + 0.5 * rng.normal(size=(n, len(means)))), of


@pytest.mark.parametrize("sign", [1, -1])
def test_peak_set_holds_what_is_not_shown_to_be_below(sign):
    effects, of = layers([0, 2.9, 3.0, 1.0])
    peaks = stats.peak_set(sign * effects, sign, of, seed=0)
    assert peaks.members == (1, 2) and peaks.best == stats.peak(sign * effects.mean(0), sign)
    assert peaks.stability.sum() == pytest.approx(1) and peaks.stability[[0, 3]].tolist() == [0, 0]
    assert 0.05 < peaks.stability[1] < 0.95
    opposite = stats.peak_set(sign * effects, -sign, of, seed=0)
    assert opposite.members == (0,) and opposite.stability.tolist() == [1, 0, 0, 0]


def test_peak_set_agrees_with_a_plain_loop():
    effects, of = layers([0.6, 0.9, 0.8, 0.3, 0.85, 0.5], seed=1)
    means, drawn = effects.mean(0), Resamples(of, seed=2).means(effects)
    best = means.argmax()
    gaps, se = means[best] - means, (drawn[:, [best]] - drawn).std(0, ddof=1)
    others = [layer for layer in range(6) if layer != best]
    largest = [max(abs(row[best] - row[j] - gaps[j]) / se[j] for j in others) for row in drawn]
    want = [j for j in range(6) if j == best or gaps[j] <= np.quantile(largest, 0.95) * se[j]]
    peaks = stats.peak_set(effects, 0.5, of, seed=2)
    assert peaks.members == tuple(want) and 1 < len(want) < 6
    assert peaks.stability.tolist() == [(drawn.argmax(1) == j).mean() for j in range(6)]


def test_peak_set_holds_the_true_peak():
    hits = sum(2 in stats.peak_set(*_of(layers([0, 0.2, 0.3, 0.2], seed=seed)), seed).members for seed in range(100))
    assert hits >= 90  # at least 95 %, within three standard errors


def _of(drawn):
    effects, of = drawn
    return effects, 1.0, of


def test_peak_set_without_variance_or_clusters():
    effects = np.tile([0.1, 0.3, 0.3 - 5e-7, 0.2], (20, 1))
    peaks = stats.peak_set(effects, 1, np.arange(20), seed=0)
    assert (peaks.best, peaks.members, peaks.stability.tolist()) == (1, (1, 2), [0, 1, 0, 0])
    peaks = stats.peak_set(effects, 1, np.zeros(20, dtype=int), seed=0)
    assert (peaks.best, peaks.members) == (1, (0, 1, 2, 3)) and np.isnan(peaks.stability).all()
    assert np.isnan(stats.peak_size(effects, 1, np.zeros(20, dtype=int), seed=0))
    assert stats.peak_size(effects, 1, np.arange(20), seed=0) == pytest.approx(0.3)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_size_of_the_peak_is_not_biased_up_as_the_largest_mean_is(sign):
    """Twelve layers of one true mean: every choice has it, so that 0.3 is the truth."""
    largest, halves = [], []
    for seed in range(100):
        effects, of = layers([0.3 * sign] * 12, n=100, seed=seed)
        largest.append((sign * effects.mean(0)).max())
        halves.append(sign * stats.peak_size(effects, sign, of, seed, splits=50))
    se = np.std(halves, ddof=1) / 10
    assert np.mean(halves) == pytest.approx(0.3, abs=3 * se) and se < 0.02
    assert np.mean(largest) > 0.3 + 10 * se


def test_the_size_of_the_peak_agrees_with_a_plain_loop(monkeypatch):
    effects, of = layers([0.3, 0.5, 0.4], n=101)
    of[:5] = 50  # 51 clusters, of different size
    rng, sizes = np.random.default_rng(6), []
    for _ in range(20):
        half = rng.permuted(np.arange(51) < 25)[of]
        for chosen, measured in ((half, ~half), (~half, half)):
            sizes.append(effects[measured].mean(0)[effects[chosen].mean(0).argmax()])
    assert stats.peak_size(effects, 1, of, 6, splits=20) == pytest.approx(np.mean(sizes), abs=1e-12)
    monkeypatch.setattr("vitpatch.stats.inference.WEIGHTS_AT_ONCE", 200)  # three splits at a time
    assert stats.peak_size(effects, 1, of, 6, splits=20) == pytest.approx(np.mean(sizes), abs=1e-12)


def test_an_interval_of_as_many_clusters_as_needed_is_about_as_wide():
    values, of = sample(n=400, columns=1, clusters=100)
    wanted = inference.clusters_needed(values[:, 0], of, width=0.25)
    assert 100 < wanted < 1000
    rng, widths = np.random.default_rng(1), []
    for seed in range(10):
        draw = rng.integers(0, 100, wanted)  # clusters such as these
        images = [np.flatnonzero(of == cluster) for cluster in draw]
        (estimate,) = stats.estimates(
            values[np.concatenate(images)], np.repeat(np.arange(wanted), [len(i) for i in images]), seed
        )
        widths.append(estimate.high - estimate.low)
    assert np.mean(widths) == pytest.approx(0.25, rel=0.05)


def test_clusters_needed_of_what_has_no_answer():
    assert inference.clusters_needed(np.full(10, 0.5), np.arange(10), 0.1) == 2
    with pytest.raises(VitPatchError, match="width 0: "):
        inference.clusters_needed(np.arange(10.0), np.arange(10), 0)
    with pytest.raises(VitPatchError, match="one cluster says nothing"):
        inference.clusters_needed(np.arange(10.0), np.zeros(10), 0.1)


def test_a_patch_that_changes_nothing_but_the_last_digits_is_not_in_the_family():
    """Rounding differs with threads and devices: it has p 1 and takes no power from the others."""
    values, of = np.random.default_rng(0).normal(0.3, 1, (60, 1)), np.arange(60)
    rounding = 1e-7 * np.random.default_rng(1).normal(size=(60, 9))
    alone = inference.sign_flip_p(values, of, seed=0)
    family = inference.sign_flip_p(np.hstack([values, rounding]), of, seed=0)
    assert family[0] == alone[0] < 0.2 and (family[1:] == 1).all()


def test_what_counts_as_rounding_does_not_depend_on_the_size_of_clusters():
    """A thousand images of 1e-7 each sum to 1e-4 and are rounding all the same; 1e-5 each is an effect."""
    of = np.repeat(np.arange(20), 1000)
    values = np.tile([[1e-7, 1e-5]], (20_000, 1))
    assert (inference.sign_flip_p(values, of, seed=0) <= 0.05).tolist() == [False, True]
