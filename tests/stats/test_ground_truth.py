"""What was planted is found, nothing else is, and in its size: models of which the effects are known (``planted``)."""

import numpy as np
import pandas as pd
import planted
import pytest
import repeated
import torch
from planted import DEPTH, GAIN, LINEAR, PLANTED_HEAD, PLANTED_LAYER
from repeated import INERT, LEVEL, NULL, REAL, binomial_band

import vitpatch
from vitpatch.stats import summary as stats

K = PLANTED_LAYER
IMAGES = 8
ROUNDINGS = 64 * float(torch.finfo(torch.float32).eps)
"""Of logits, where a patched run is not computed as a base run is: as many as ``vitpatch.models.verify`` allows."""

both_ways = pytest.mark.parametrize("direction", ["denoise", "noise"])


@pytest.fixture(scope="module", params=["prob", "log_odds"])
def patched(request):
    """``vitpatch.patch`` on the same random images, effects in both metrics."""
    clean, corrupt = planted.pair_of_images(IMAGES)

    def run(model, target, *windows, **how) -> pd.DataFrame:
        labels = torch.arange(IMAGES) % 5
        table = vitpatch.patch(model, clean, corrupt, labels, target, list(windows) or 1, metric=request.param, **how)
        assert table["total_effect"].abs().min() > 100 * ROUNDINGS  # of every image there is something to find
        return table

    return run


def carried(table: pd.DataFrame, where: pd.Series) -> np.ndarray:
    """The total effect where the way from the patches to CLS is replaced, else 0, as effects are stored."""
    return np.where(where, table["total_effect"], 0).astype(np.float32)


def assert_exact(table: pd.DataFrame, where: pd.Series) -> None:
    """To the last bit: on one thread a state's rows are rounded alike, whoever else is in the call."""
    assert where.any() and not where.all()
    np.testing.assert_array_equal(table["effect"], carried(table, where))


def has_k(table: pd.DataFrame) -> pd.Series:
    return (table["first_layer"] <= K) & (K <= table["last_layer"])


@both_ways
@pytest.mark.parametrize("head", [None, PLANTED_HEAD])
def test_a_planted_layer_has_the_total_effect_and_no_other_has_any(patched, direction, head):
    model = planted.planted_layer(head)
    table = patched(model, "attn_out", 1, 2, 3, 5, tokens=["all", "cls", "patches"], direction=direction)
    assert_exact(table, has_k(table) & (table["tokens"] != "patches"))
    single = table[(table["window"] == 1) & (table["tokens"] == "all")]
    assert sorted(single.loc[single["effect"] != 0, "layer"].unique()) == [K]
    inside = {  # the windows' centres, by hand: c − w // 2 to c + (w − 1) // 2 holds layer 3
        1: [3], 2: [3, 4], 3: [2, 3, 4], 5: [1, 2, 3, 4, 5],
    }  # fmt: skip
    moved = table[table["effect"] != 0].groupby("window")["layer"].unique()
    assert {window: sorted(layers) for window, layers in moved.items()} == inside


@both_ways
def test_the_stream_hands_over_from_the_patches_to_cls_at_the_planted_layer(patched, direction):
    table = patched(planted.planted_layer(), "resid_post", tokens=["cls", "patches"], direction=direction)
    at_cls, from_k = table["tokens"] == "cls", table["layer"] >= K
    assert_exact(table, at_cls == from_k)


@both_ways
def test_a_planted_head_has_the_total_effect_and_no_other_has_any(patched, direction):
    model = planted.planted_layer(PLANTED_HEAD)
    table = patched(model, "z", direction=direction)
    where = (table["layer"] == K) & (table["head"] == PLANTED_HEAD)
    assert len(table) == IMAGES * DEPTH * planted.HEADS
    assert (table["effect"][~where] == 0).all()
    logits = table[["logit_clean", "logit_corrupt"]].abs().to_numpy().max()
    # the change of z goes through the projection by itself, and is then rounded in another order
    np.testing.assert_allclose(table["effect"], carried(table, where), rtol=0, atol=ROUNDINGS * logits)
    joint = patched(model, "z", 1, 3, heads="joint", direction=direction)
    assert_exact(joint, has_k(joint))


@both_ways
def test_the_planted_heads_queries_carry_nothing(patched, direction):
    """At CLS they are equal in both runs; at the patches they change what CLS no longer sees."""
    model = planted.planted_layer(PLANTED_HEAD)
    for heads in ("all", "joint"):
        assert (patched(model, "q", heads=heads, direction=direction)["effect"] == 0).all()


@both_ways
@pytest.mark.parametrize("head", [None, PLANTED_HEAD])
def test_where_attention_looks_evenly_its_values_carry_all(patched, direction, head):
    model = planted.planted_layer(head, looks_evenly=True)
    for site in ("q", "k"):
        assert (patched(model, site, heads="all", direction=direction)["effect"] == 0).all()
    table = patched(model, "v", heads="joint", direction=direction)
    where = table["layer"] == K
    if head is not None:
        single = patched(model, "v", direction=direction)
        of_head = (single["layer"] == K) & (single["head"] == head)
        assert (single["effect"][~of_head] == 0).all()
        table, where = pd.concat([table, single]), pd.concat([where, of_head])
    assert (table["effect"][~where] == 0).all()
    logits = table[["logit_clean", "logit_corrupt"]].abs().to_numpy().max()
    np.testing.assert_allclose(table["effect"], carried(table, where), rtol=0, atol=ROUNDINGS * logits)


def test_where_attention_looks_about_its_keys_carry_some(patched):
    """So that the test above is one of even looks, not of keys that are never replaced."""
    table = patched(planted.planted_layer(), "k", heads="joint")
    assert (table["effect"][table["layer"] != K] == 0).all()
    assert table["effect"][table["layer"] == K].abs().min() > 1e-5


# --- AND and OR ---

BOTH = GAIN  # the effect of the whole answer


def logic_effects(is_and: bool, direction: str) -> pd.DataFrame:
    """Log-odds effects of single layers and windows of 3, one row an image and patch."""
    clean, corrupt = (planted.images_with(np.full((IMAGES, 1), s), seed=s) for s in (1, 0))
    model, labels = planted.logic(is_and), [1] * IMAGES
    table = vitpatch.patch(model, clean, corrupt, labels, window=[1, 3], direction=direction, metric="log_odds")
    sign = 1 if direction == "denoise" else -1
    assert table["total_effect"].to_numpy() == pytest.approx(sign * BOTH, abs=LINEAR)
    return table


CLIPPED = [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5]]
"""The layers of the windows of 3, by hand."""


@pytest.mark.parametrize(
    ("is_and", "direction", "single", "window", "joint"),
    [
        # of AND either is missed; only both together restore it
        (True, "denoise", [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]),
        (True, "noise", [0, -1, 0, -1, 0, 0], [-1, -1, -1, -1, -1, 0], [0, 0, 1, 0, 0, 0]),
        # of OR either restores it; only both together are missed
        (False, "denoise", [0, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, -1, 0, 0, 0]),
        (False, "noise", [0, 0, 0, 0, 0, 0], [0, 0, -1, 0, 0, 0], [0, 0, -1, 0, 0, 0]),
    ],
)
def test_and_and_or(is_and, direction, single, window, joint):
    table = logic_effects(is_and, direction)
    effects = table.pivot(index="example_id", columns=["window", "layer"], values="effect")
    assert effects.columns.tolist() == [(width, layer) for width in (1, 3) for layer in range(DEPTH)]
    assert effects.to_numpy() == pytest.approx(BOTH * np.array([single + window] * IMAGES), abs=LINEAR)
    beyond = stats.synergy(effects.to_numpy(), range(DEPTH, 2 * DEPTH), CLIPPED)
    assert beyond == pytest.approx(BOTH * np.array([joint] * IMAGES), abs=4 * LINEAR)


def test_the_summary_says_what_was_planted():
    means = vitpatch.summarize(logic_effects(is_and=False, direction="denoise"))
    single = means[means["window"] == 1]
    assert single["recovered"].to_numpy() == pytest.approx([0, 1, 0, 1, 0, 0], abs=LINEAR)
    assert single["accuracy"].tolist() == [0, 1, 0, 1, 0, 0]


# --- nulls and coverage ---

DATA_SETS = 400
CLUSTERS = 60
"""Of a data set. Percentiles of so few hold the mean with 0.943, as normal quantiles do of a t with 59 degrees."""


@pytest.fixture(scope="module")
def pool():
    return repeated.make_pool()


@pytest.fixture(scope="module")
def called(pool):
    return repeated.calls(pool, DATA_SETS, CLUSTERS, seed=0)


def test_heads_have_the_effects_that_were_planted(pool):
    """So that what is drawn from the pool is what patching says of the images, and its truth is known."""
    assert pool.log_odds[:, [*NULL, REAL]] == pytest.approx(pool.known[:, [*NULL, REAL]], abs=LINEAR)
    assert (pool.log_odds[:, INERT] == 0).all()
    assert pool.means[NULL] == pytest.approx(0, abs=1e-12) and pool.means[REAL] > 0.8
    assert np.abs(pool.known[:, NULL]).min() > 0.9


def test_the_summary_is_of_the_planted_effects_and_their_clusters():
    table, known = repeated.patched(clusters=20, seed=1)
    means = vitpatch.summarize(table, seed=3)
    want = stats.estimates(known, table["cluster"].to_numpy()[:: known.shape[1]], seed=3)
    for column, values in {
        "effect": [w.mean for w in want],
        "effect_low": [w.low for w in want],
        "effect_high": [w.high for w in want],
    }.items():
        assert means[column].to_numpy() == pytest.approx(values, abs=LINEAR)
    assert (means["n_clusters"] == 40).all()
    assert want[REAL].low > 0  # a true mean of about 1


def test_a_family_of_nulls_is_called_as_often_as_the_level_says(called):
    low, high = binomial_band(LEVEL, DATA_SETS)
    assert low <= called["nulls"] <= high
    assert called["nulls of all"] <= high  # the real site is in the family, too: at most the level


def test_the_real_head_is_called(called):
    assert called["real"] > 0.99


def test_flips_of_images_call_nulls_far_too_often(called):
    """Images of a cluster share their signs: they say less than as many clusters."""
    assert called["nulls, image flips"] > 10 * LEVEL


def test_what_is_neutral_in_log_odds_is_not_in_prob(pool, called):
    assert (pool.prob[:, NULL].mean(0) < -0.1).all()
    assert called["nulls, prob"] > 10 * LEVEL


def test_intervals_hold_the_true_mean_as_often_as_they_say(pool):
    number = DATA_SETS // 2
    held = repeated.coverage(pool, number, CLUSTERS, seed=1)
    for share, trials in ((held.min(), number), (held.max(), number), (held.mean(), number * len(held))):
        low, high = binomial_band(1 - LEVEL, trials)
        assert low <= share <= high


def test_intervals_by_images_hold_it_too_rarely(pool):
    assert repeated.coverage(pool, DATA_SETS // 20, CLUSTERS, seed=2, by_image=True).mean() < 0.85
