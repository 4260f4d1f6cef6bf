"""What was planted is what a run's finding says, and of nothing it says nothing."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import planted
import pytest
from hand_made import rows
from measured import result_of
from repeated import binomial_band

import vitpatch
from vitpatch.formatting import format_layers
from vitpatch.plots.finding import _control_clause, finding_sentences
from vitpatch.plots.style import describe_place
from vitpatch.stats.finding import Control, find, shown_signs
from vitpatch.stats.inference import Resamples, sign_flip_p
from vitpatch.types import PREFIX, SUFFIX, Direction, Donor, Estimate, Include, Inclusion, Metric

IMAGES, LAYERS = 80, 8


@pytest.fixture
def rng():
    return np.random.default_rng(4)


@pytest.fixture
def total(rng):
    apart = 0.1 * rng.normal(size=IMAGES)
    return 0.3 + apart - apart.mean()


@pytest.fixture
def planted_at(rng, total):
    """Effects that are noise, but for layers with a share of each image's total effect."""

    def make(shares, layers=LAYERS, spread=0.03):
        effects = spread * rng.normal(size=(IMAGES, layers))
        for layer, share in shares.items():
            effects[:, layer] += share * total
        return effects

    return make


def said(result, corruption="gray"):
    return finding_sentences(result, find(result), corruption)


def test_layers_are_written_as_ranges():
    assert [format_layers(layers) for layers in ([3], [0, 1], [9, 4, 5, 6], [1, 3])] == [
        "layer 3", "layers 0–1", "layers 4–6, 9", "layers 1, 3",
    ]  # fmt: skip


def test_a_planted_layer(planted_at, total):
    first, where = said(result_of(planted_at({3: 0.8}), total))
    assert first.startswith("Under gray the probability of the true class falls by 0.3") and "(80 images)" in first
    assert where.startswith("Clean attention outputs restore most at layer 3: +0.2")
    assert "of the total effect; it is told apart from every other layer." in where and "80%" in where


def test_a_place_that_is_shown_is_named_where_the_furthest_is_not(rng, total):
    """The furthest varies most."""
    effects = np.outer(total, np.zeros(4)) + rng.normal(size=(IMAGES, 4)) * [0.01, 0.01, 0.6, 0.01]
    effects += np.array([0, 0.02, 0.1, 0.02]) - effects.mean(0)
    sentences = said(result_of(effects, total))
    assert sentences[1].startswith(
        "Clean attention outputs are shown to restore at layers 1, 3: the furthest is layer 2"
    )
    assert ", +0.100 [-0." in sentences[1] and ", which is not shown; about " in sentences[1]


def test_the_interval_at_a_place_is_simultaneous(planted_at, total):
    result = result_of(planted_at({3: 0.8}), total)
    row = result.summary.iloc[3]
    assert row["effect_sim_low"] < row["effect_low"]
    assert f"{row['effect']:+.3f} [{row['effect_sim_low']:+.3f}, {row['effect_sim_high']:+.3f}]" in said(result)[1]


def test_what_is_not_told_apart_is_named_and_where_it_is_shown(planted_at, total):
    _, where, in_all = said(result_of(planted_at({2: 0.5, 3: 0.5, 4: 0.49, 6: 0.3}, spread=0.1), total))
    assert "; not told apart from layers " in where
    assert set(find(result_of(planted_at({2: 0.5, 3: 0.5}), total)).places[0].alike) == {2, 3}
    assert in_all == "They are shown to restore at layers 2–4, 6."


def test_everywhere_alike(planted_at, total):
    _, where = said(result_of(planted_at(dict.fromkeys(range(LAYERS), 0.5), spread=0.2), total))
    assert where.startswith("Clean attention outputs restore at every layer, and no layer is told apart from the f")


def test_a_planted_and():
    """Single layers restore nothing; the window that holds both layers restores all."""
    clean, corrupt = (planted.images_with(np.full((8, 1), s), seed=s) for s in (1, 0))
    table = vitpatch.patch(planted.logic(is_and=True), clean, corrupt, [1] * 8, window=[1, 3], metric="log_odds")
    patches = pd.concat([rows(range(planted.DEPTH)), rows(range(planted.DEPTH), window=3)], ignore_index=True)
    effects = table["effect"].to_numpy().reshape(8, -1)
    _, where, single = said(result_of(effects, table["total_effect"].to_numpy()[:: len(patches)], patches))
    assert where.startswith("Clean attention outputs restore most at layer 2 (window 3): ")
    assert where.endswith("100% [100%, 100%] of the total effect; it is told apart from every other layer.")
    assert single == "With window 1 nowhere shown."


def test_nothing_is_shown_where_nothing_is(planted_at, total):
    _, where = said(result_of(planted_at({}), total))
    assert where.startswith("Clean attention outputs are not shown to restore at any layer: the furthest is layer ")
    assert "of the total effect" not in where


@pytest.mark.parametrize("share", [0.015, 0.0001])
def test_how_many_clusters_would_show_a_place(planted_at, total, share):
    result = result_of(planted_at({3: share}, spread=0.06), total)
    (places,) = find(result).places
    row, is_said = result.summary.iloc[places.best], "would show it, if it stays as large" in said(result)[1]
    assert not places.best_is_shown and is_said == (places.clusters is not None)
    if is_said:
        assert places.clusters == int(np.ceil(IMAGES * ((row["effect"] - row["effect_sim_low"]) / row["effect"]) ** 2))


def test_what_an_interval_shows_and_a_test_does_not_has_its_p():
    """Of three clusters no effect has a p below 1 / 4."""
    effects = np.outer([0.2, 0.21, 0.19], [0, 1, 0])
    _, where = said(result_of(effects, [0.3, 0.31, 0.29]))
    assert where.startswith("Clean attention outputs are not shown to restore at any layer: the furthest is layer 1")
    assert re.search(r"\], but p = 0.2\d\.$", where)


@pytest.mark.parametrize(("window", "words"), [(1, ""), (3, " (window 3)")])
def test_harmful_layers(planted_at, total, window, words):
    shares = {0: -0.4, 1: -0.6, 2: -0.9, 6: 0.5}
    where, worse = said(result_of(planted_at(shares), total, rows(range(LAYERS), window)))[1:]
    assert where.startswith(f"Clean attention outputs restore most at layer 6{words}: ")
    assert worse.startswith(f"Clean attention outputs make it worse at layers 0–2{words}, most at layer 2: -0.2")
    assert f", against a total effect of {total.mean():+.3f}." in worse


@pytest.mark.parametrize(
    ("same", "other", "claim"),
    [
        (1.0, 0.0, "goes with the class, and nothing beyond the class is shown"),
        (0.4, 0.0, "is more than the class"),
        (1.0, 1.0, "is not shown to be the image's own"),
        (1.5, 1.0, "is not shown to be the image's own"),
    ],
)
def test_what_a_layer_carries(rng, planted_at, total, same, other, claim):
    effects = planted_at({3: 0.8})
    donors = {Donor.SAME_CLASS: same, Donor.OTHER_CLASS: other}
    controls = {donor: 4 * share * effects + 0.1 * rng.normal(size=effects.shape) for donor, share in donors.items()}
    carried = said(result_of(effects, total, controls=controls))[-1]
    assert carried.startswith(f"What is restored there {claim}: as donor there, another image of its class ")
    assert ("its class is not told apart" in carried) == (same == 1)
    assert ("its class does more" in carried) == (same > 1)
    assert ("another class does less" in carried) == (other == 0)


def test_a_control_that_no_image_has_is_not_said(planted_at, total):
    effects = planted_at({3: 0.8})
    controls = {Donor.SAME_CLASS: np.full_like(effects, np.nan), Donor.OTHER_CLASS: 0 * effects}
    carried = said(result_of(effects, total, controls=controls))[-1]
    assert "of its class" not in carried and "an image of another class does less" in carried


def test_a_control_whose_interval_leaves_0_out_and_whose_p_is_large_has_its_p():
    """Of three clusters no difference has a p below 1 / 4."""
    control = Control(Donor.SAME_CLASS, Estimate(0.3, 0.1, 0.1, 0.5), 0.25)
    assert not control.is_shown and _control_clause(control, False).endswith(
        "is not told apart from the image itself, +0.300 [+0.100, +0.500], but p = 0.25"
    )
    assert replace(control, p=0.04).is_shown


@pytest.mark.parametrize(
    ("tokens", "head", "words"),
    [
        ("all", -1, "layer 3"),
        ("all", 2, "head 2 of layer 3"),
        ("each:cls", -1, "layer 3 at CLS"),
        ("each:0x4", -1, "layer 3, token in row 0, column 4"),
        ("grid:1x2", -1, "layer 3, block in row 1, column 2"),
        ("patches", -1, "layer 3"),
    ],
)
def test_a_place_in_words(tokens, head, words):
    assert describe_place({"layer": 3, "tokens": tokens, "head": head}) == words


def test_controls_are_not_read_where_nothing_is_shown(planted_at, total):
    effects = planted_at({})
    result = result_of(effects, total, controls={Donor.SAME_CLASS: effects, Donor.OTHER_CLASS: effects - 1})
    assert len(said(result)) == 2 and not find(result).controls


def handed_over(rng, total, at, spread=0.02):
    """Effects of the stream at CLS and at the patches, where CLS gets all at a layer of each image."""
    from_layer = np.arange(LAYERS) >= np.asarray(at).reshape(-1, 1)
    noise = spread * rng.normal(size=(IMAGES, 2 * LAYERS))
    patches = [rows(range(LAYERS), tokens=tokens, site="resid_post") for tokens in ("cls", "patches")]
    effects = np.hstack([from_layer * total[:, None], ~from_layer * total[:, None]]) + noise
    return effects, pd.concat(patches, ignore_index=True)


def test_a_handover_has_a_layer_and_no_peak(rng, total):
    effects, patches = handed_over(rng, total, 5)
    _, taken = said(result_of(effects, total, patches))
    assert taken.startswith(
        "CLS takes over from the image patches at layer 5 [5, 5], the first at which it has more of the"
    )


def test_the_interval_of_a_takeover_is_that_of_its_resamples(rng, total):
    """A plain loop over the resamples: the first layer at which the mean at CLS is above that at the patches."""
    effects, patches = handed_over(rng, total, rng.integers(2, 7, IMAGES), spread=0.3)
    result = result_of(effects, total, patches)
    taken = find(result).takeover
    drawn = np.random.default_rng(0).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=2000) @ effects
    firsts = sorted(next((i for i in range(LAYERS) if row[i] > row[LAYERS + i]), LAYERS) for row in drawn)
    assert (taken.low, taken.high) == (firsts[49], firsts[1950]) and taken.low < taken.high
    assert f"at layer {taken.at} [{taken.low}, {taken.high}]" in said(result)[1]


def test_without_a_takeover_it_says_so(rng, total):
    effects, patches = handed_over(rng, total, LAYERS)
    last = said(result_of(effects, total, patches))[-1]
    assert last.startswith(
        "CLS has more of the total effect than the image patches at no layer [none, none]: at layer 7 "
    )


@pytest.mark.parametrize("window", [PREFIX, SUFFIX])
def test_growing_windows_have_no_peak(planted_at, total, window):
    share = {layer: (layer + 1) / LAYERS for layer in range(LAYERS)}
    patches = rows(range(LAYERS), window=1).assign(window=window, n_layers=3)
    layers = np.arange(LAYERS)
    if window == PREFIX:
        patches = patches.assign(first_layer=0, last_layer=layers)
        want = "The smallest prefix whose mean is half of the total effect is layers 0–3, 50%"
    else:
        share = {LAYERS - 1 - layer: value for layer, value in share.items()}
        patches = patches.assign(first_layer=layers, last_layer=LAYERS - 1)
        want = "The smallest suffix whose mean is half of the total effect is layers 4–7, 50%"
    effects = np.outer(total, [share[layer] for layer in range(LAYERS)]) + 1e-9
    sentences = said(result_of(effects, total, patches))
    assert len(sentences) == 2 and sentences[1].startswith(want)
    assert sentences[1].endswith("; only the longest has 90%, layers 0–7, 100% [100%, 100%].")


def test_a_single_layer_has_no_peak(planted_at, total):
    effects = planted_at({0: 0.5}, layers=1)
    sentences = said(result_of(effects, total, rows([5], window=3, depth=LAYERS)))
    assert (
        sentences[1].startswith("Clean attention outputs restore at layer 5 (window 3): +0.1") and len(sentences) == 2
    )
    effects = planted_at({0: -0.5}, layers=1)
    sentences = said(result_of(effects, total, rows([5])))
    assert sentences[1].startswith("Clean attention outputs make it worse at layer 5: -0.1") and len(sentences) == 2


def test_the_whole_stream_is_the_total_effect_by_construction(total):
    effects = np.repeat(total[:, None], LAYERS, axis=1)
    _, what = said(result_of(effects, total, rows(range(LAYERS), site="resid_post")))
    assert what.startswith("Every layer has the total effect by construction")


def test_heads_are_named_by_layer_and_number(planted_at, total):
    patches = pd.concat([rows(range(4), head=head, site="z") for head in (0, 1)], ignore_index=True)
    _, where, worse = said(result_of(planted_at({5: 0.8, 2: -0.3}), total, patches))
    assert where.startswith("Clean head outputs restore most at head 1 of layer 1: ") and "every other head" in where
    assert worse.startswith("Clean head outputs make it worse at head 0 of layer 2: ")


def test_many_heads_are_counted(planted_at, total):
    patches = pd.concat([rows(range(4), head=head, site="z") for head in (0, 1)], ignore_index=True)
    shares = dict.fromkeys([0, 1, 2, 4, 5, 6], 0.5)  # both heads of layers 0 to 2
    _, where, in_all = said(result_of(planted_at(shares, spread=0.1), total, patches))
    assert where.endswith("; not told apart from 5 of 8 heads, in layers 0–2.")
    assert in_all == "They are shown to restore at 6 of 8 heads, in layers 0–2."


def test_the_other_direction_has_other_words(planted_at, total):
    result = result_of(-planted_at({3: 0.8, 5: -0.5}), -total, direction=Direction.NOISE)
    first, where, worse = said(result)
    assert first.startswith("Under gray the probability of the true class falls by 0.3")
    assert where.startswith("Corrupted attention outputs do most damage at layer 3: -0.2")
    assert worse.startswith("Corrupted attention outputs make it better at layer 5: +0.1")


def test_a_corruption_that_helps_is_not_restored(planted_at, total):
    first, where = said(result_of(-planted_at({3: 0.8}), -total))
    assert first.startswith("Under gray the probability of the true class rises by 0.3")
    assert where.startswith("Clean attention outputs move the run furthest towards the donor's at layer 3: -0.2")


def test_kl_falls_where_it_is_restored(planted_at, total):
    first, where = said(result_of(-0.1 * planted_at({3: 0.8}), total, metric=Metric.KL))
    assert first.startswith("Under gray the KL(clean ‖ run) (nats) is 0.100 [0.100, 0.100]")
    assert where.startswith("Clean attention outputs restore most at layer 3: -0.0")


@pytest.mark.parametrize(("donor", "set_to"), [(Donor.ZERO, "zero"), (Donor.MEAN, "their mean")])
def test_a_constant_donor_does_harm(planted_at, total, donor, set_to):
    result = result_of(-planted_at({3: 0.8, 5: -0.3}), total, donor=donor, direction=Direction.NOISE)
    where, better = said(result)
    assert where.startswith(f"Attention outputs set to {set_to} do most harm at layer 3: -0.2")
    assert better.startswith(f"Attention outputs set to {set_to} make it better at layer 5: +0.0")
    assert "total effect" not in where + better


def test_one_image_is_said_of_itself(total):
    effects = np.array([[0.05, 0.2, -0.1]])
    first, where = said(result_of(effects, total[:1]))
    assert "1 image, without intervals, so of these alone" in first
    assert where.startswith("Clean attention outputs restore most at layer 1: +0.200, ")


def test_selected_and_unlabelled_images_are_not_hidden(planted_at, total):
    rule = Inclusion(Include.FLIPPED)
    first = said(result_of(planted_at({3: 0.8}), total, predicted=True, include=rule))[0]
    assert "(80 images chosen by what the corruption did to them, include=flipped, labelled by the clean run)" in first


# --- a total effect that is not shown ---


def test_of_a_total_effect_that_is_not_shown_no_place_is_said(rng, planted_at):
    none = 0.1 * rng.normal(size=IMAGES)
    none -= none.mean() - 0.005
    first, ways = said(result_of(planted_at({3: 0.8}), none, log_odds=none + 0.5))
    assert first.startswith("Gray is not shown to change the probability of the true class, which falls by 0.005 [-0.0")
    assert first.endswith(" (80 images). Nothing is said of places.")
    assert ways.startswith("On the log odds of the true class (nats) it is +0.505 [")


def test_the_clearest_metric_is_taken_and_kl_only_where_there_is_no_other(rng, planted_at):
    none = 0.1 * rng.normal(size=IMAGES)
    none -= none.mean()
    assert find(result_of(planted_at({}), none, log_odds=none + 0.5)).remedies.metric[0] is Metric.LOG_ODDS
    only_kl = result_of(planted_at({}), none, log_odds=none)
    assert find(only_kl).remedies.metric[0] is Metric.KL
    assert said(only_kl)[1].startswith("The KL(clean ‖ run) (nats), which any change raises, is 0.")
    _, estimate = find(result_of(planted_at({}), none, log_odds=none - 0.5)).remedies.metric
    assert estimate.mean == pytest.approx(-0.5) and estimate.high < 0


def test_images_that_the_clean_run_gets_right_are_a_way(planted_at):
    total = np.where(np.arange(IMAGES) % 4, 0.1, -0.3) + 0.01 * np.arange(IMAGES) / IMAGES
    result = result_of(planted_at({}), total, log_odds=0 * total)
    assert find(result).remedies.clean_correct.low > 0
    assert "over the images that the clean run gets right it is +0.10" in said(result)[1]


def test_so_many_clusters_would_be_enough(rng, planted_at):
    total = 0.3 * rng.normal(size=IMAGES)
    total += 0.04 - total.mean()
    remedies = find(result_of(planted_at({}), total)).remedies
    assert IMAGES < remedies.clusters < 5 * IMAGES
    more = np.tile(total, 2 * remedies.clusters // IMAGES)
    assert find(result_of(np.zeros((len(more), 2)), more)).remedies is None


# --- nulls ---

NULLS = 200


def null_effects(seed):
    """Effects of places as likely above 0 as below, by clusters: (60, 6), and the clusters."""
    rng, of = np.random.default_rng(seed), np.repeat(np.arange(30), 2)
    return (rng.normal(size=(30, 6))[of] + 0.5 * rng.normal(size=(60, 6))) * rng.uniform(0.01, 0.1, 6), of


def test_of_nulls_places_are_shown_in_at_most_the_nominal_share():
    """The rule alone, by few flips and resamples; the next test has whole findings."""
    often = 0
    for seed in range(NULLS):
        effects, of = null_effects(seed)
        low, high = Resamples(of, seed, number=300).spread(effects).simultaneous
        p = sign_flip_p(4 * effects, of, seed, flips=199)
        often += shown_signs(pd.DataFrame({"p": p, "effect_sim_low": low, "effect_sim_high": high})).any()
    assert 0 < often / NULLS <= binomial_band(0.05, NULLS)[1]


@pytest.mark.long
def test_of_nulls_findings_say_so_as_often():
    often = 0
    for seed in range(NULLS):
        effects, of = null_effects(seed)
        total = 0.3 + 0.1 * np.random.default_rng(NULLS + seed).normal(size=60)
        sentences = said(result_of(effects, total, clusters=of))
        often += len(sentences) > 2 or "are not shown to restore at any layer" not in sentences[1]
    assert often / NULLS <= binomial_band(0.05, NULLS)[1]
