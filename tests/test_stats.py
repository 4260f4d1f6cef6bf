import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from vitpatch import resamples, stats
from vitpatch.spec import VitPatchError


def sample(n=300, columns=3, clusters=60, seed=0):
    """Values with a strong share of their cluster, and the clusters; clusters differ in size."""
    rng = np.random.default_rng(seed)
    of = rng.integers(0, clusters, n)
    shared = rng.normal(size=(clusters, columns))
    return 0.3 + shared[of] + 0.5 * rng.normal(size=(n, columns)), of


def scipys(values, of, method):
    """scipy's bootstrap of the ratio of cluster sums, clusters resampled."""
    sums, counts = resamples.cluster_sums(values, of)

    def ratio(index, axis=-1):
        index = index.astype(int)
        return sums[index, 0].sum(axis) / counts[index].sum(axis)

    return bootstrap(
        (np.arange(len(counts)),), ratio, n_resamples=20_000, batch=1000, method=method, rng=np.random.default_rng(1)
    )


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_agree_with_scipy_over_clusters(method):
    values, of = sample()
    values = np.exp(0.7 * values[:, :1])  # skewed: the methods differ by more than two draws do
    theirs = scipys(values, of, {"percentile": "percentile", "bca": "BCa"}[method])
    (ours,) = resamples.Resamples(of, seed=0, number=20_000).spread(values, method=method).estimates
    assert ours.mean == pytest.approx(values.mean(), rel=1e-12)
    assert ours.se == pytest.approx(theirs.standard_error, rel=0.03)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.15 * ours.se)
    (other,) = stats.estimates(values, of, seed=0, method={"percentile": "bca", "bca": "percentile"}[method])
    assert abs(other.high - ours.high) > 0.3 * ours.se


def test_bca_of_scipys_resamples_is_scipys():
    values, of = sample()
    values = np.exp(values[:, :1])
    theirs, left_out = scipys(values, of, "BCa"), resamples.left_out(*resamples.cluster_sums(values, of))
    ours = resamples.bca_interval(values.mean(0), theirs.bootstrap_distribution[:, None], left_out)
    assert np.ravel(ours) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-9)


def test_bca_of_what_has_no_interval():
    flat, one = stats.estimates(np.full((30, 1), 0.1), np.arange(30), 0, "bca")[0], np.zeros(2, dtype=int)
    assert (flat.low, flat.high) == (flat.mean, flat.mean)
    assert not stats.estimates(np.array([[1.0], [2.0]]), one, 0, "bca")[0].known
    on_one_side = resamples.bca_interval(np.zeros(1), np.arange(1.0, 9)[:, None], np.arange(8.0)[:, None])
    assert np.isnan(on_one_side).all()  # an infinite bias correction
    with pytest.raises(VitPatchError, match="method=BCa: unknown; use percentile or bca"):
        stats.estimates(np.zeros((2, 1)), np.arange(2), 0, "BCa")


def test_clusters_make_intervals_wider_than_images():
    values, of = sample()
    by_cluster = stats.estimates(values, of, seed=0)[0].se
    by_image = stats.estimates(values, np.arange(len(of)), seed=0)[0].se
    assert by_cluster > 1.5 * by_image


def test_intervals_cover_the_true_mean():
    hits = 0
    for seed in range(200):
        values, of = sample(n=200, columns=1, clusters=50, seed=seed)
        (estimate,) = stats.estimates(values, of, seed)
        hits += estimate.low <= 0.3 <= estimate.high
    assert 175 <= hits <= 199  # 95 % of 200, within four standard errors


def test_a_resample_does_not_depend_on_how_many_fit_in_memory(monkeypatch):
    values, of = sample()
    whole = stats.resampled_means(values, of, seed=4, resamples=100)
    monkeypatch.setattr(resamples, "WEIGHTS_AT_ONCE", 700)  # 11 resamples of 60 clusters at a time
    assert np.allclose(whole, stats.resampled_means(values, of, seed=4, resamples=100), rtol=0, atol=1e-12)


def test_one_cluster_has_a_mean_and_no_interval():
    (estimate,) = stats.estimates(np.array([[1.0], [2.0]]), np.array([0, 0]), seed=0)
    assert estimate.mean == 1.5 and np.isnan([estimate.se, estimate.low, estimate.high]).all()
    assert not estimate.known and not estimate.holds_zero


def test_equal_values_have_an_interval_around_their_mean():
    (estimate,) = stats.estimates(np.full((30, 1), 0.1), np.arange(30), seed=0)
    assert estimate.low <= estimate.mean <= estimate.high and estimate.high - estimate.low < 1e-12


def test_recovered_is_a_ratio_of_means_with_both_resampled():
    rng = np.random.default_rng(0)
    total = 0.4 + 0.1 * rng.normal(size=200)
    effects = np.column_stack([total, 0.5 * total, np.zeros(200)])
    mean, low, high = stats.recovered(effects, total, np.arange(200), seed=0)
    assert mean == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)
    assert low == pytest.approx([1.0, 0.5, 0.0], abs=1e-12) and high == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


def test_recovered_is_empty_where_the_total_effect_is_no_denominator():
    total = np.random.default_rng(0).normal(size=200)
    assert stats.recovered(total[:, None], total, np.arange(200), seed=0) is None
    assert stats.recovered(np.ones((2, 1)), np.ones(2), np.zeros(2, dtype=int), seed=0) is None


@pytest.mark.parametrize(
    ("effects", "total", "want"),
    [
        ([0.1, 0.3, 0.2], 0.5, 1),
        ([0.1, -0.3, 0.2], -0.5, 1),  # a peak goes the way of the total effect
        ([0.1, 0.3, 0.3 + 5e-7], 0.5, 1),  # the lowest on a tie
        ([-0.3, -0.1, -0.2], 0.5, 1),
        ([0.1, 0.2], 0.0, None),
    ],
)
def test_peak(effects, total, want):
    assert stats.peak(np.array(effects), total) == want


def test_summary_means_are_over_the_images_given():
    effects, correct = np.array([[0.1, 0.2], [0.3, 0.6], [0.2, 0.1]]), np.array([[1, 0], [1, 1], [0, 0]], dtype=bool)
    examples = pd.DataFrame({"cluster": [0, 0, 1], "total_effect": [0.5, 0.7, 0.6]})
    direct, delta = np.array([[1.0, 0], [2, 0], [3, 0]]), np.array([[0.5, np.nan], [0.7, np.nan], [np.nan, np.nan]])
    measured = stats.Measured(effects, correct, 2 * effects, direct, delta)
    summary = stats.summarize(pd.DataFrame({"layer": [0, 1]}), measured, examples, seed=0)
    assert summary["effect"].tolist() == pytest.approx([0.2, 0.3])
    assert summary["accuracy"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert summary[["n", "n_clusters"]].drop_duplicates().to_numpy().tolist() == [[3, 2]]
    assert summary["recovered"].tolist() == pytest.approx([1 / 3, 0.5])
    assert summary["log_odds_effect"].tolist() == pytest.approx([0.4, 0.6])
    assert summary["direct_log_odds"].tolist() == pytest.approx([2, 0])
    assert summary["delta_norm"][0] == pytest.approx(0.6) and np.isnan(summary["delta_norm"][1])
    assert (summary["direct_log_odds_low"] <= summary["direct_log_odds"]).all()


def test_what_is_not_known_of_an_image_has_no_mean():
    effects, examples = np.zeros((2, 1)), pd.DataFrame({"cluster": [0, 1], "total_effect": [0.5, 0.7]})
    measured = stats.Measured(effects, effects > 0, effects, np.full((2, 1), np.nan), effects)
    summary = stats.summarize(pd.DataFrame({"layer": [0]}), measured, examples, seed=0)
    assert summary[["direct_log_odds", "direct_log_odds_low"]].isna().all(axis=None)
