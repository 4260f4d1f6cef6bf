import numpy as np
import pandas as pd
import pytest
from clustered import sample
from scipy.stats import bootstrap

from vitpatch.errors import VitPatchError
from vitpatch.stats import inference
from vitpatch.stats import recovered as shares
from vitpatch.stats import summary as stats
from vitpatch.types import Estimate, Interval


def scipys(values, of, method):
    """scipy's bootstrap of the ratio of cluster sums, clusters resampled."""
    sums, counts = inference.cluster_sums(values, of)

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
    (ours,) = inference.Resamples(of, seed=0, number=20_000).spread(values, method=method).estimates
    assert ours.mean == pytest.approx(values.mean(), rel=1e-12)
    assert ours.se == pytest.approx(theirs.standard_error, rel=0.03)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.15 * ours.se)
    (other,) = stats.estimates(values, of, seed=0, method={"percentile": "bca", "bca": "percentile"}[method])
    assert abs(other.high - ours.high) > 0.3 * ours.se


@pytest.mark.parametrize("ties", [False, True])
def test_bca_of_scipys_resamples_is_scipys(ties):
    values, of = sample()
    values = np.exp(values[:, :1])
    if ties:  # of 20 images right or wrong many resamples have the mean itself
        values, of = (values[:20] > 2).astype(float), np.arange(20)
    theirs, left_out = scipys(values, of, "BCa"), inference.left_out(*inference.cluster_sums(values, of))
    ours = inference.bca_interval(values.mean(0), theirs.bootstrap_distribution[:, None], left_out)
    assert np.ravel(ours) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-9)


def test_bca_of_what_has_no_interval():
    flat, one = stats.estimates(np.full((30, 1), 0.1), np.arange(30), 0, "bca")[0], np.zeros(2, dtype=int)
    assert (flat.low, flat.high) == (flat.mean, flat.mean)
    assert not stats.estimates(np.array([[1.0], [2.0]]), one, 0, "bca")[0].known
    on_one_side = inference.bca_interval(np.zeros(1), np.arange(1.0, 9)[:, None], np.arange(8.0)[:, None])
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


@pytest.mark.parametrize("at_once", [700, 1000])  # 11 or 16 resamples of 60 clusters at a time, drawn anew or kept
def test_a_resample_does_not_depend_on_how_many_fit_in_memory(at_once, monkeypatch):
    values, of = sample()
    whole = inference.Resamples(of, seed=4, number=100).means(values)
    monkeypatch.setattr(inference, "WEIGHTS_AT_ONCE", at_once)
    assert np.allclose(whole, inference.Resamples(of, seed=4, number=100).means(values), rtol=0, atol=1e-12)


def macro_loop(values, labels, of, weights):
    """The macro-average of one resample, image by image."""
    times = weights[np.unique(of, return_inverse=True)[1]]
    classes = [label for label in np.unique(labels) if times[labels == label].sum()]
    return np.mean([np.average(values[labels == c], axis=0, weights=times[labels == c]) for c in classes], axis=0)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("at_once", [4_000_000, 700])
def test_macro_averages_agree_with_a_plain_loop(nested, at_once, monkeypatch):
    monkeypatch.setattr(inference, "WEIGHTS_AT_ONCE", at_once)
    values, of = sample()
    labels = np.array([7, 1, 7, 3, 7])[of % 5] if nested else np.random.default_rng(3).integers(0, 6, len(of))
    labels[of == 4] = 9  # a class of one cluster: not in every resample
    draw = inference.Resamples(of, seed=2, number=100)
    spread = draw.macro_spread(values, labels, method="bca")
    weights = np.vstack([weights for _, weights in draw.weights()])
    assert (weights[:, 4] == 0).any()
    assert spread.mean == pytest.approx(macro_loop(values, labels, of, np.ones(60)), abs=1e-12)
    want = np.stack([macro_loop(values, labels, of, row) for row in weights])
    assert np.allclose(spread.resampled, want, rtol=0, atol=1e-12)
    want = np.stack([macro_loop(values, labels, of, 1 - row) for row in np.eye(60)])
    assert np.allclose(spread.left_out, want, rtol=0, atol=1e-12)


def test_macro_average_of_one_class_or_one_cluster():
    values, of = sample()
    assert inference.Resamples(of, 0).macro_spread(values, np.zeros(300)).estimates[0].low == pytest.approx(
        stats.estimates(values, of, 0)[0].low, abs=1e-12
    )
    one = inference.Resamples(np.zeros(3, dtype=int), 0)
    (estimate,) = one.macro_spread(np.array([[1.0], [2], [6]]), np.array([0, 0, 1])).estimates
    assert estimate.mean == 3.75 and not estimate.known


def test_leaving_a_cluster_out_is_the_mean_without_it():
    values, of = sample()
    want = np.stack([values[of != cluster].mean(0) for cluster in np.unique(of)])
    assert np.allclose(inference.left_out(*inference.cluster_sums(values, of)), want, rtol=0, atol=1e-12)


def test_simultaneous_intervals_hold_all_means_at_once_where_single_ones_do_not():
    together, alone, draws = 0, 0, 200
    for seed in range(draws):
        values, of = sample(columns=10, seed=seed)
        spread = inference.Resamples(of, seed, number=500).spread(values)
        (low, high), (single_low, single_high) = spread.simultaneous, spread.interval
        together += bool(((low <= 0.3) & (high >= 0.3)).all())
        alone += bool(((single_low <= 0.3) & (single_high >= 0.3)).all())
    assert 174 <= together <= 199  # 94 % is what 500 resamples of 60 clusters are good for
    assert alone < 150  # 0.95 ** 10 is 60 %


def test_simultaneous_intervals_agree_with_a_plain_loop():
    values, of = sample()
    values[:, 1] = 0.1  # without variance
    spread = inference.Resamples(of, 0).spread(values)
    se = spread.resampled.std(0, ddof=1)
    furthest = sorted(max(abs(row[j] - spread.mean[j]) / se[j] for j in (0, 2)) for row in spread.resampled)
    low, high = spread.simultaneous
    assert low[1] == high[1] == spread.mean[1]
    for j in (0, 2):
        assert (high[j] - low[j]) / (2 * se[j]) == pytest.approx(np.quantile(furthest, 0.95), rel=1e-9)
        assert spread.mean[j] - low[j] == pytest.approx(high[j] - spread.mean[j], rel=1e-9)
    assert np.isnan(inference.Resamples(np.zeros(300), 0).spread(values).simultaneous).all()
    flat = inference.Resamples(of, 0).spread(values[:, 1:2])
    assert flat.simultaneous == (flat.mean, flat.mean)


def test_one_cluster_has_a_mean_and_no_interval():
    (estimate,) = stats.estimates(np.array([[1.0], [2.0]]), np.array([0, 0]), seed=0)
    assert estimate.mean == 1.5 and np.isnan([estimate.se, estimate.low, estimate.high]).all()
    assert not estimate.known and not estimate.holds_zero


def test_equal_values_have_an_interval_around_their_mean():
    (estimate,) = stats.estimates(np.full((30, 1), 0.1), np.arange(30), seed=0)
    assert estimate.low <= estimate.mean <= estimate.high and estimate.high - estimate.low < 1e-12


def recovered(effects, total, of, seed, method="percentile"):
    """The columns of ``recovered`` in the summary, (3, columns)."""
    measured = stats.Measured(effects, effects > 0, effects, effects, effects)
    examples = pd.DataFrame({"cluster": of, "total_effect": total})
    patches = pd.DataFrame({"layer": range(effects.shape[1])})
    summary = stats.summarize(patches, measured, examples, inference.Resamples(of, seed), method)
    return summary[["recovered", "recovered_low", "recovered_high"]].to_numpy().T


def test_recovered_is_a_ratio_of_means_with_both_resampled():
    rng = np.random.default_rng(0)
    total = 0.4 + 0.1 * rng.normal(size=200)
    effects = np.column_stack([total, 0.5 * total, np.zeros(200)])
    mean, low, high = recovered(effects, total, np.arange(200), seed=0)
    assert mean == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)
    assert low == pytest.approx([1.0, 0.5, 0.0], abs=1e-12) and high == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


def test_recovered_by_bca_is_scipys_of_the_same_resamples():
    values, of = sample(columns=2)
    effects, total = np.exp(values[:, :1]), 1 + np.exp(values[:, 1])
    sums, _ = inference.cluster_sums(np.column_stack([effects, total]), of)
    clusters = (np.arange(len(sums)),)

    def ratio(index, axis=-1):
        index = index.astype(int)
        return sums[index, 0].sum(axis) / sums[index, 1].sum(axis)

    drawn = inference.Resamples(of, seed=5).means(np.column_stack([effects, total]))
    theirs = bootstrap(clusters, ratio, n_resamples=100, method="percentile", rng=np.random.default_rng(0))
    theirs.bootstrap_distribution = drawn[:, 0] / drawn[:, 1]
    theirs = bootstrap(clusters, ratio, n_resamples=0, bootstrap_result=theirs, method="BCa")
    mean, *ends = recovered(effects, total, of, seed=5, method="bca")[:, 0]
    assert mean == pytest.approx(effects.mean() / total.mean(), rel=1e-12)
    assert ends == pytest.approx(list(theirs.confidence_interval), rel=1e-9)


def test_recovered_is_empty_where_the_interval_of_the_total_effect_holds_0():
    total = np.random.default_rng(0).normal(size=200)
    assert np.isnan(recovered(total[:, None], total, np.arange(200), seed=0)).all()
    moved = total + 2.5 * total.std() / np.sqrt(200) - total.mean()  # 2.5 standard errors from 0
    assert not np.isnan(recovered(moved[:, None], moved, np.arange(200), seed=0)).any()


def test_of_one_cluster_recovered_is_exact_and_has_no_interval():
    effects, total, of = np.array([[0.1], [0.4]]), np.array([0.5, 0.5]), np.zeros(2, dtype=int)
    assert recovered(effects, total, of, seed=0)[:, 0] == pytest.approx([0.5, np.nan, np.nan], nan_ok=True)
    assert np.isnan(recovered(effects, np.array([0.5, -0.5]), of, seed=0)).all()


def near_zero(seed=0, n=40, columns=3, away=2.3):
    """Effects and total effects of which some resampled means have the other sign."""
    rng = np.random.default_rng(seed)
    total = rng.normal(size=n)
    total += away / np.sqrt(n) - total.mean()
    return 0.5 * total[:, None] + rng.normal(size=(n, columns)), total


def scanned(effects, totals):
    """The same interval of one column by trying every ratio: where the percentile interval of e − ρ · t holds 0."""
    ratios = np.unique(effects / totals)
    tries = np.sort(np.concatenate([ratios, (ratios[1:] + ratios[:-1]) / 2, [ratios[0] - 1, ratios[-1] + 1]]))
    ends = [np.quantile(effects - ratio * totals, [0.025, 0.975]) for ratio in tries]
    held = tries[[low <= 0 <= high for low, high in ends]]
    return held[0], held[-1], tries


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_of_ratios_is_what_trying_every_ratio_says(sign):
    effects, total = near_zero()
    means = inference.Resamples(np.arange(40), 0, number=400).means(sign * effects, sign * total[:, None])
    assert 0 < (sign * means[:, 3] <= 0).mean() < 0.025
    low, high = shares.fieller_interval(means[:, :3], means[:, 3])
    naive = np.quantile(means[:, :3] / means[:, 3:], [0.025, 0.975], axis=0)
    for column in range(3):
        first, last, tries = scanned(means[:, column], means[:, 3])
        places = np.searchsorted(tries, [[low[column], first], [high[column], last]])
        assert np.abs(np.diff(places)).max() <= 2  # a ratio further, as quantiles are between two
        assert low[column] < naive[0, column] or high[column] > naive[1, column]


def test_where_all_totals_have_one_sign_the_interval_is_the_ratios_percentiles():
    rng = np.random.default_rng(1)
    effects, totals = rng.normal(size=(2000, 3)), 1 + rng.random(2000)
    want = np.quantile(effects / totals[:, None], [0.025, 0.975], axis=0)
    np.testing.assert_allclose(shares.fieller_interval(effects, totals), want, rtol=1e-12)
    np.testing.assert_allclose(shares.fieller_interval(-effects, -totals), want, rtol=1e-12)


def test_where_totals_are_on_both_sides_of_0_every_ratio_is_possible():
    rng = np.random.default_rng(1)
    low, high = shares.fieller_interval(rng.normal(size=(2000, 1)), 1 + rng.normal(size=2000))
    assert (low, high) == (-np.inf, np.inf)
    skewed = np.exp(rng.normal(size=40))
    (percentile,), (bca,) = (stats.estimates(skewed[:, None], np.arange(40), 0, method) for method in Interval)
    total = skewed - (percentile.low + bca.low) / 2  # so that one interval holds 0 and the other does not
    assert np.isnan(recovered(skewed[:, None], total, np.arange(40), 0)).all()
    mean, *ends = recovered(skewed[:, None], total, np.arange(40), 0, method="bca")[:, 0]
    assert mean == pytest.approx(skewed.mean() / total.mean()) and ends == [-np.inf, np.inf]


def test_intervals_hold_a_planted_ratio_near_a_total_of_0():
    """The total effect is 2.5 standard errors from 0 on average, and ratios are only given where it is shown."""
    held = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        total = 0.5 + rng.normal(size=(40, 1)) * 0.5 * np.sqrt(40) / 2.5
        effects = 0.6 * total + 0.3 * rng.normal(size=(40, 1))
        means = inference.Resamples(np.arange(40), seed, number=400).means(effects, total)
        low, high = shares.fieller_interval(means[:, :1], means[:, 1])
        held.append(low[0] <= 0.6 <= high[0])
    assert 0.91 <= np.mean(held) <= 0.98


def test_differences_of_shares_are_too_wide_rather_than_too_narrow_near_0():
    effects, total = near_zero()
    draw = inference.Resamples(np.arange(40), 0)
    spread = draw.spread(effects, total[:, None], np.full((40, 1), 2.0))
    near, far = spread[3:4], spread[4:]
    mean, low, high = shares.subtract_recovered(spread[:3], near, spread[:3], far)
    assert mean == pytest.approx(effects.mean(0) / total.mean() - effects.mean(0) / 2)
    changes = (near.resampled <= 0)[:, 0]
    assert 0 < changes.sum() < 50
    differences = np.sort(spread.resampled[~changes, :3] * (1 / near.resampled[~changes] - 0.5), axis=0)
    assert low == pytest.approx(differences[49 - changes.sum()], rel=1e-12)
    assert high == pytest.approx(differences[-50 + changes.sum()], rel=1e-12)


def test_as_many_clusters_as_are_said_make_recovered_known():
    total = np.random.default_rng(4).normal(size=20)
    total += 0.3 - total.mean()
    (estimate,) = stats.estimates(total[:, None], np.arange(20), seed=0)
    needed = shares.clusters_to_exclude_zero(estimate, 20)
    assert 30 < needed < 90

    def is_known(times):
        many = np.tile(total, times)
        return not np.isnan(recovered(many[:, None], many, np.arange(len(many)), seed=0)).any()

    assert not is_known(int(0.7 * needed / 20)) and is_known(int(1.5 * needed / 20) + 1)
    assert shares.clusters_to_exclude_zero(Estimate(1e-3, 1.0, -2.0, 2.0), 20) is None
    assert shares.clusters_to_exclude_zero(Estimate(0.0, 0.0, 0.0, 0.0), 20) is None


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
    examples = pd.DataFrame({"cluster": [0, 0, 1], "total_effect": [0.5, 0.7, 0.6], "label": [4, 4, 2]})
    direct, delta = np.array([[1.0, 0], [2, 0], [3, 0]]), np.array([[0.5, np.nan], [0.7, np.nan], [np.nan, np.nan]])
    measured, draw = stats.Measured(effects, correct, 2 * effects, direct, delta), inference.Resamples([0, 0, 1], 0)
    summary = stats.summarize(pd.DataFrame({"layer": [0, 1]}), measured, examples, draw)
    assert summary["effect"].tolist() == pytest.approx([0.2, 0.3])
    assert summary["accuracy"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert summary[["n", "n_clusters"]].drop_duplicates().to_numpy().tolist() == [[3, 2]]
    assert summary["recovered"].tolist() == pytest.approx([1 / 3, 0.5])
    assert summary["log_odds_effect"].tolist() == pytest.approx([0.4, 0.6])
    assert summary["direct_log_odds"].tolist() == pytest.approx([2, 0])
    assert summary["delta_norm"][0] == pytest.approx(0.6) and np.isnan(summary["delta_norm"][1])
    assert (summary["direct_log_odds_low"] <= summary["direct_log_odds"]).all()
    assert summary["effect_macro"].tolist() == pytest.approx([0.2, 0.25])
    assert summary["effect_sim_low"][0] == summary["effect"][0]  # both clusters have this mean
    assert summary["effect_sim_low"][1] < 0.3 < summary["effect_sim_high"][1]
    unlabelled = stats.summarize(pd.DataFrame({"layer": [0, 1]}), measured, examples.drop(columns="label"), draw)
    assert unlabelled.equals(summary.drop(columns=["effect_macro", "effect_macro_low", "effect_macro_high"]))


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_summary_says_what_its_parts_say(method):
    values, of = sample()
    total, labels = 2 + values[:, 0], of % 3
    measured = stats.Measured(values, values > 0, values**2, np.exp(values), values)
    examples = pd.DataFrame({"cluster": of, "total_effect": total, "label": labels})
    draw = inference.Resamples(of, 3)
    summary = stats.summarize(pd.DataFrame({"layer": range(3)}), measured, examples, draw, method)
    parts = {
        "effect": stats.estimates(values, of, 3, method),
        "log_odds_effect": stats.estimates(values**2, of, 3, method),
        "direct_log_odds": stats.estimates(np.exp(values), of, 3, method),
        "effect_macro": draw.macro_spread(values, labels, method).estimates,
    }
    for name, rows in parts.items():
        want = np.array([[row.mean, row.low, row.high] for row in rows])
        assert np.allclose(summary[[name, f"{name}_low", f"{name}_high"]], want, rtol=0, atol=1e-12)
    both = draw.spread(values, total[:, None], method=method)
    ratio = both[:3].ratio_to(both[3:])
    want = np.stack([ratio.mean, *ratio.interval], axis=1)
    assert np.allclose(summary[["recovered", "recovered_low", "recovered_high"]], want, rtol=0, atol=1e-12)


def test_synergy_and_marginals_by_image():
    effects = np.array([[1.0, 2, 4, 10, 3], [0.5, 0, -1, 2, 0]])  # layers 0, 1, 2; windows (0, 1, 2), (0, 1)
    assert stats.synergy(effects, [3, 4, 1], [[0, 1, 2], [0, 1], [1]]).tolist() == [[3, 0, 0], [2.5, -0.5, 0]]
    assert stats.marginal(effects, [(3, 4), (4, 0), (1, None)]).tolist() == [[7, 2, 2], [2, -0.5, 0]]


def test_what_is_not_known_of_an_image_has_no_mean():
    effects, examples = np.zeros((2, 1)), pd.DataFrame({"cluster": [0, 1], "total_effect": [0.5, 0.7]})
    measured = stats.Measured(effects, effects > 0, effects, np.full((2, 1), np.nan), effects)
    summary = stats.summarize(pd.DataFrame({"layer": [0]}), measured, examples, inference.Resamples([0, 1], 0))
    assert summary[["direct_log_odds", "direct_log_odds_low"]].isna().all(axis=None)
