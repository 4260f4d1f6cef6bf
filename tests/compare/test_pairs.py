"""Paired differences against plain loops over images; what is joined, and what is not subtracted."""

import numpy as np
import pandas as pd
import pytest
from hand_made import NOISE, rows, save_run

from vitpatch.compare.compare import compare
from vitpatch.compare.pairs import common_patches, same_clusters
from vitpatch.stats.inference import RESAMPLES, sign_flip_p

pytestmark = pytest.mark.usefixtures("tables_only")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def compared(tmp_path):
    """The comparison of the runs below ``tmp_path / "sweep"``."""
    return lambda: compare([tmp_path / "sweep"], tmp_path / "out").comparison


@pytest.fixture
def save(tmp_path):
    return lambda name, effects, **more: save_run(tmp_path / "sweep" / name, effects, **more)


def resampled_by_hand(of_image, clusters, seed):
    """A statistic of images in each resample of clusters; ``of_image`` takes how often each image is in it."""
    names = sorted(set(clusters))
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return [of_image([often[names.index(cluster)] for cluster in clusters]) for often in drawn]


def mean_of(values, weights):
    total = count = 0.0
    for value, weight in zip(values, weights, strict=True):
        total, count = total + value * weight, count + weight
    return total / count


def reason(comparison):
    assert not len(comparison.differences)
    return comparison.not_subtracted["reason"].item()


def test_of_one_corruption_effects_are_subtracted_image_by_image(save, compared, rng):
    """Images left out in one of the runs, in another order of clusters' numbers, some read in neither."""
    ids_a, ids_b = [0, 1, 2, 3, 5, 6, 8, 9, 10, 11], [0, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    cluster_of = {image: image // 2 for image in range(12)}
    values = {run: rng.normal(0.2, 0.1, (10, 3)).astype(np.float32) for run in "ab"}
    keep = {"a": [image != 3 for image in ids_a], "b": [image not in (8, 9) for image in ids_b]}
    numbers_b = [7, 3, 5, 9, 1, 0]  # the same clusters, numbered otherwise
    save("a", values["a"], ids=ids_a, included=keep["a"], clusters=[cluster_of[i] for i in ids_a], seed=4)
    other = [numbers_b[cluster_of[i]] for i in ids_b]
    save("b", values["b"], ids=ids_b, included=keep["b"], clusters=other, seed=4, weights="w1", path="other")
    table = compared().differences
    both = [image for image in ids_a if image in ids_b and image not in (3, 8, 9)]
    assert both == [0, 2, 5, 6, 11]
    clusters = [cluster_of[image] for image in both]
    assert set(table["n"]) == {5} and set(table["n_clusters"]) == {len(set(clusters))}
    assert list(table["quantity"]) == ["effect"] * 3 and list(table["layer"]) == [0, 1, 2]
    apart = np.array(
        [[values["a"][ids_a.index(i), c] - values["b"][ids_b.index(i), c] for c in range(3)] for i in both], float
    )
    for column, row in table.iterrows():
        ends = np.quantile(resampled_by_hand(lambda w, c=column: mean_of(apart[:, c], w), clusters, 4), [0.025, 0.975])
        assert row["difference"] == pytest.approx(mean_of(apart[:, column], [1] * 5), abs=1e-7)
        assert row["value_a"] - row["value_b"] == pytest.approx(row["difference"], abs=1e-7)
        assert [row["low"], row["high"]] == pytest.approx(list(ends), abs=1e-7)
    assert list(table["p"]) == pytest.approx(sign_flip_p(apart, np.array(clusters), 4))


def test_whole_clusters_are_resampled(save, compared, rng):
    clusters = [0, 0, 0, 1, 1, 2, 2, 3]
    values = rng.normal(0.2, 0.1, (2, 8, 2)).astype(np.float32)
    for name, of_run in zip("ab", values, strict=True):
        save(name, of_run, clusters=clusters, seed=1, rival={"a": "corrupt", "b": "clean"}[name])
    row = compared().differences.iloc[1]
    apart = (values[0] - values[1])[:, 1].astype(float)
    ends = np.quantile(resampled_by_hand(lambda w: mean_of(apart, w), clusters, 1), [0.025, 0.975])
    assert [row["low"], row["high"]] == pytest.approx(list(ends), abs=1e-7) and row["n_clusters"] == 4


def test_across_corruptions_both_ratios_are_of_one_resample(save, compared, rng):
    clusters, images = [0, 0, 1, 2, 3, 4, 5, 5, 6], 9
    totals = {"a": rng.uniform(0.3, 0.5, images), "b": rng.uniform(0.1, 0.2, images)}
    values = {run: (totals[run][:, None] * rng.uniform(0, 1, (images, 2))).astype(np.float32) for run in "ab"}
    save("a", values["a"], total=totals["a"], clusters=clusters, seed=2)
    save("b", values["b"], total=totals["b"], clusters=clusters, seed=5, corruption=NOISE)
    table = compared().differences
    assert list(table["quantity"]) == ["recovered"] * 2 and table["p"].isna().all()

    def apart(column, weights):
        of = {r: mean_of(values[r][:, column].astype(float), weights) / mean_of(totals[r], weights) for r in "ab"}
        return of["a"] - of["b"]

    for column, row in table.iterrows():
        assert row["difference"] == pytest.approx(apart(column, [1] * images), abs=1e-6)
        ends = np.quantile(resampled_by_hand(lambda w, c=column: apart(c, w), clusters, 0), [0.025, 0.975])
        assert [row["low"], row["high"]] == pytest.approx(list(ends), abs=1e-6)  # seeds differ: 0


@pytest.mark.parametrize("more", [["metric=kl", "direction=noise"], ["metric=kl", "interval=bca"]])
def test_of_runs_on_all_images_ratios_are_those_of_their_summaries(patched, more):
    common = ["window=[1,3]", "controls=false", *more]
    folders = [patched(f"corruption={name}", *common, folder=f"x/{name}") for name in ("gray", "noise")]
    summaries = [pd.read_csv(folder / "summary.csv") for folder in folders]
    table = compare([folders[0].parent]).comparison.differences
    assert len(table) == len(summaries[0]) and set(table["quantity"]) == {"recovered"}
    for row in table.itertuples():
        values = [s[(s["window"] == row.window_a) & (s["layer"] == row.layer)]["recovered"].item() for s in summaries]
        assert [row.value_a, row.value_b] == pytest.approx(values, rel=1e-5)
        assert (
            row.difference == pytest.approx(values[0] - values[1], abs=1e-5) and row.low <= row.difference <= row.high
        )


def test_without_a_total_effect_ratios_are_not_known(save, compared, rng):
    """On the images of both, not those of each run."""
    total = np.full(12, 0.5)
    total[:6] = [0.1, -0.1] * 3
    save("a", rng.random((12, 2)), total=total)
    save("b", rng.random((12, 2)), corruption=NOISE, included=[True] * 6 + [False] * 6)
    assert reason(compared()) == "recovered is not known: on 6 images the interval of the total effect of a holds 0"


def test_the_same_run_twice_is_0_and_said(save, compared, rng):
    values = rng.random((6, 2))
    save("a", values, run_id="one"), save("b", values, run_id="one")
    comparison = compared()
    table = comparison.differences
    assert (table[["difference", "low", "high"]] == 0).all(axis=None) and (table["p"] == 1).all()
    assert comparison.warnings == ("a and b are the same run (run_id one): their differences are 0",)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({}, {"data": "other"}, "the data differ"),
        ({}, {"direction": "noise"}, "the direction differs: clean into corrupted and corrupted into clean"),
        ({}, {"metric": "log_odds"}, "the metric differs: prob and log_odds"),
        ({"metric": "logit_diff"}, {"metric": "logit_diff", "weights": "w1"}, "logit_diff regresses"),
        ({}, {"depth": 6}, "the models have 3 and 6 layers: compare them by relative depth"),
        ({}, {"patches": rows(range(3), window=5, depth=9), "depth": 3}, "no patch in common: windows 1 and 5"),
        ({}, {"patches": rows(range(3), tokens="cls")}, "no patch in common: tokens all and cls"),
        ({}, {"patches": rows(range(3), site="mlp_out")}, "no patch in common: sites attn_out and mlp_out"),
        ({}, {"patches": rows(range(3), head=1)}, "no patch in common: heads all and 1"),
        ({"depth": 9}, {"patches": rows([3, 4, 5]), "depth": 9}, "no patch in common: other layers"),
        ({}, {"ids": range(10, 16)}, "no image is included in both"),
        ({"included": [0, 1] * 3}, {"included": [1, 0] * 3}, "no image is included in both"),
        ({}, {"clusters": [0, 0, 1, 2, 3, 4]}, "the images are in other clusters"),
        ({}, {"corruption": NOISE, "donors": ["other_class"]}, "corruption and donor differ"),
        ({"donors": ["zero"]}, {"donors": ["zero"], "corruption": NOISE}, "recovered has no meaning: donor zero"),
    ],
)
def test_what_is_not_subtracted_says_why(save, compared, rng, a, b, said):
    for name, more in (("a", a), ("b", b)):
        data = {"identity_data": more["data"]} if "data" in more else {}
        more = {key: value for key, value in more.items() if key != "data"}
        if "included" in more:
            more["included"] = np.array(more["included"], bool)
        folder = save(name, rng.random((6, 3)), **more)
        if data:
            file = folder / "manifest.json"
            file.write_text(file.read_text().replace('"data": "d0"', '"data": "d1"'))
    assert reason(compared()).startswith(said)


def test_with_one_corruption_donors_may_differ(save, compared, rng):
    values = rng.random((2, 6, 2)).astype(np.float32)
    save("a", values[0]), save("b", values[1], donors=["other_class"])
    assert list(compared().differences["difference"]) == pytest.approx(list((values[0] - values[1]).mean(0)), abs=1e-6)


def test_patches_are_joined_by_what_they_replace_not_by_the_window_asked_for():
    """Window 2 at layer 0 is clipped to layer 0, as window 1 is; of several windows each meets its own."""
    one, two = rows(range(3), window=1), rows(range(3), window=2)
    joined = common_patches(one, two)
    assert joined[["layer", "window_a", "window_b", "row_a", "row_b"]].values.tolist() == [[0, 1, 2, 0, 0]]
    both = pd.concat([one, two], ignore_index=True)
    joined = common_patches(both, both)
    assert joined["row_a"].tolist() == joined["row_b"].tolist() == [0, 3, 1, 2, 4, 5]
    assert common_patches(both, two)[["row_a", "row_b"]].values.tolist() == [[3, 0], [4, 1], [5, 2]]
    # a suffix from layer 1 has three layers as window 3 has there, and they are others
    suffix = pd.DataFrame([("attn_out", 1, -1, "all", -2, 1, 3, 3)], columns=one.columns)
    assert common_patches(suffix, rows([1], window=3, depth=4)).empty


def test_several_windows_and_heads_are_each_subtracted(save, compared, rng):
    patches = pd.concat([rows(range(3), window=w, head=h) for w in (1, 3) for h in (0, 1)], ignore_index=True)
    fewer = patches[(patches["window"] == 3) & (patches["head"] == 1)].iloc[::-1].reset_index(drop=True)
    values = rng.random((6, 12)).astype(np.float32), rng.random((6, 3)).astype(np.float32)
    save("a", values[0], patches=patches), save("b", values[1], patches=fewer)
    table = compared().differences.sort_values("layer")
    assert table["head"].tolist() == [1] * 3 and table["window_a"].tolist() == [3] * 3
    expected = [np.mean(values[0][:, 9 + layer] - values[1][:, 2 - layer]) for layer in range(3)]
    assert table["difference"].tolist() == pytest.approx(expected, abs=1e-6)


def test_of_many_runs_only_those_that_differ_in_one_setting(save, compared, rng, monkeypatch, tmp_path):
    values = rng.random((6, 2))
    for metric in ("prob", "log_odds"):
        for seed in (0, 1):
            save(f"{metric}-{seed}", values, metric=metric, seed=seed)
    everything = compared()
    assert len(everything.differences) + len(everything.not_subtracted) == 2 * 2 + 4 and not everything.warnings
    monkeypatch.setattr("vitpatch.compare.pairs.MAX_RUNS", 3)
    monkeypatch.setattr("vitpatch.compare.compare.MAX_RUNS", 3)
    some = compared()
    pairs = [*zip(some.differences["a"], some.differences["b"], strict=True)]
    pairs += zip(some.not_subtracted["a"], some.not_subtracted["b"], strict=True)
    assert len(set(pairs)) == 4 and ("log_odds-0", "prob-1") not in pairs and "4 runs: of more" in some.warnings[0]
    for name, metric in (("prob-0", "prob"), ("other-1", "log_odds")):  # counterparts, which differ in two settings
        save_run(tmp_path / "more" / name, values, weights="w1", path="other", metric=metric, seed=5)
    both = compare([tmp_path / "sweep", tmp_path / "more"], tmp_path / "out").comparison
    assert len(both.matched) == 4 and both.matched["largest_difference"].notna().all()


def test_clusters_are_the_same_whatever_their_numbers():
    assert same_clusters(np.array([0, 0, 1]), np.array([5, 5, 2]))
    assert not same_clusters(np.array([0, 0, 1]), np.array([5, 2, 2]))
    assert not same_clusters(np.array([0, 0, 1]), np.array([5, 5, 5]))
    assert not same_clusters(np.array([0, 0, 1]), np.array([0, 1, 2]))
