"""Between groups: which runs are each other's counterparts, and what is said of them."""

import numpy as np
import pytest
from hand_made import NOISE, rows, save_run

from vitpatch.cli.compare import summary_lines
from vitpatch.compare.compare import compare

pytestmark = pytest.mark.usefixtures("tables_only")


@pytest.fixture
def rng():
    return np.random.default_rng(9)


@pytest.fixture
def between(tmp_path):
    """Compares the groups given by name."""
    return lambda *groups: compare([tmp_path / group for group in groups], tmp_path / "out")


@pytest.fixture
def save(tmp_path, rng):
    def make(name, effects=None, **more):
        effects = rng.normal(0.2, 0.05, (8, 4)).astype(np.float32) if effects is None else effects
        save_run(tmp_path / name, effects, **more)
        return effects

    return make


def pairs(table):
    return list(zip(table["a"], table["b"], strict=True))


def test_runs_meet_that_are_equal_but_for_what_the_groups_differ_in(save, between):
    """Whatever their folders are called: a has one model, b another, both two windows and corruptions."""
    values = {}
    for group, model in (("a", {}), ("b", {"weights": "w1", "path": "an/other"})):
        for name, more in {"gray-1": {}, "noise-1": {"corruption": NOISE}, "gray-3": {"window": [3]}}.items():
            patches = rows(range(4), window=more.get("window", [1])[0])
            values[group, name] = save(f"{group}/{group}-{name}", patches=patches, **model, **more)
    save("b/more", weights="w1", path="an/other", window=[5])
    table = between("a", "b").comparison.matched
    names = ("gray-1", "gray-3", "noise-1")
    assert pairs(table) == [(f"a/a-{name}", f"b/b-{name}") for name in names] + [("", "b/more")]
    assert list(table["differing"]) == ["model: vit / other"] * 3 + [""]
    assert table["reason"].iloc[-1] == "no counterpart in a" and table["reason"].iloc[:3].isna().all()
    for row, name in zip(table.to_dict("records"), names, strict=False):
        apart = (values["a", name] - values["b", name]).mean(0, dtype=float)
        assert row["largest_layer"] == np.abs(apart).argmax()
        assert row["largest_difference"] == pytest.approx(apart[np.abs(apart).argmax()], abs=1e-6)
        assert row["largest_low"] < row["largest_difference"] < row["largest_high"]
        assert row["peak_layer_a"] == values["a", name].mean(0).argmax()
        assert row["peak_effect_b"] == pytest.approx(values["b", name].mean(0).max())


def test_of_several_the_one_of_the_same_name(save, between):
    for group, seeds in (("a", [0]), ("b", [1, 2])):
        for seed in seeds:
            save(f"{group}/seed={seed}", seed=seed)
    assert pairs(between("a", "b").comparison.matched) == [("a/seed=0", "b/seed=1"), ("a/seed=0", "b/seed=2")]
    save("b/seed=0", seed=3)
    table = between("a", "b").comparison.matched
    assert pairs(table) == [("a/seed=0", "b/seed=0"), ("", "b/seed=1"), ("", "b/seed=2")]


def test_the_same_name_is_a_counterpart_where_settings_find_none(save, between):
    save("a/one"), save("a/two", seed=1), save("a/alone", seed=1, metric="kl")
    save("b/one", include="flipped"), save("b/other", seed=1)
    table = between("a", "b").comparison.matched
    assert pairs(table) == [("a/two", "b/other"), ("a/one", "b/one"), ("a/alone", "")]
    assert list(table["differing"]) == ["", "include: all / flipped", ""]


def test_runs_given_themselves_are_two_groups(save, between):
    save("x/one"), save("x/two", corruption=NOISE, window=[3])
    result = between("x/one", "x/two")
    row = result.comparison.matched.iloc[0]
    assert (row["a"], row["b"], row["quantity"]) == ("one", "two", "recovered")
    assert row["differing"] == "corruption: gray / noise (std=0.2); window: 1 / 3"
    said = "\n".join(summary_lines(result))
    assert "one - two (corruption: gray / noise (std=0.2); window: 1 / 3):\n  recovered differs most" in said


def test_where_nothing_is_recovered_a_cell_says_why(save, between):
    save("x/none", total=np.zeros(8))
    assert any("(the total effect's interval holds 0)" in line for line in summary_lines(between("x")))


def test_what_cannot_be_subtracted_says_why_and_numbers_are_still_there(save, between):
    save("a/x"), save("b/x", depth=6)
    result = between("a", "b")
    row = result.comparison.matched.iloc[0]
    assert row["reason"].startswith("the models have 4 and 6 layers") and np.isnan(row["largest_difference"])
    assert row[["peak_layer_a", "peak_layer_b", "total_effect_a"]].notna().all()
    assert "  not subtracted: the models have 4 and 6 layers: compare them by relative depth" in summary_lines(result)


def test_one_group_has_no_counterparts_and_three_have_three_pairs(save, between):
    for group in "abc":
        save(f"{group}/x", weights=group, path=group)
    assert between("a").comparison.matched.empty
    assert pairs(between(*"abc").comparison.matched) == [("a/x", "b/x"), ("a/x", "c/x"), ("b/x", "c/x")]


def test_the_same_effects_are_said_to_be(save, between):
    values = save("a/x", seed=0)
    save("b/x", values, seed=1)
    assert "  the same effect on the images of both" in summary_lines(between("a", "b"))


def test_controls_add_to_a_run_and_do_not_set_it_apart(save, between):
    save("a/x", donors=["pair", "same_class"]), save("b/x")
    assert list(between("a", "b").comparison.matched["differing"]) == [""]
