"""What is drawn: lines, whiskers and words against the numbers they are of; and the same pixels from files alone."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from drawn import cut_off
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from PIL import Image

from vitpatch.cli.compare import redraw
from vitpatch.formatting import format_interval
from vitpatch.plots import classes, handover, heatmaps, layout, maps, peak, profile, run_figures, style
from vitpatch.plots.run_figures import draw
from vitpatch.runs.reading import load_run
from vitpatch.stats.finding import Takeover, read_takeover
from vitpatch.stats.summary import GroupPeak
from vitpatch.types import Estimate, Metric

CAPTION = style.Caption("a run", Metric.PROB, 90, 40)
TOTAL, NONE = Estimate(0.3, 0.01, 0.28, 0.32), Estimate(np.nan, np.nan, np.nan, np.nan)
CONTROLS = {"effect_same_class": "of its class", "effect_other_class": "of another"}


def a_summary(layers=5, series=("",), window=1, deep=-0.1, seed=0):
    """Rows as a run's, with controls of which the other class goes down to about ``deep``."""
    rng, rows = np.random.default_rng(seed), []
    for name in series:
        for layer in range(layers):
            first, last = max(0, layer - window // 2), min(layers - 1, layer + (window - 1) // 2)
            row = {"layer": layer, "series": name, "window": window, "n_layers": last - first + 1, "head": -1}
            means = {"effect": rng.uniform(0.1, 0.2), "effect_same_class": 0.1, "effect_other_class": deep}
            for column, mean in means.items():
                row |= {column: mean, f"{column}_low": mean - 0.02, f"{column}_high": mean + 0.03}
            row |= {"effect_sim_low": means["effect"] - 0.05, "effect_sim_high": means["effect"] + 0.05}
            rows.append(row | {"recovered": 0.5, "in_peak_set": layer == 2, "peak_share": 0.2, "tokens": "all"})
    return pd.DataFrame(rows)


def line_of(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return line


def y_of(axes, label):
    return np.asarray(line_of(axes, label).get_ydata())


def whiskers_of(axes, rows, column):
    """Whether the axes have bars from the low to the high ends of a column's intervals."""
    wanted = rows[[f"{column}_low", f"{column}_high"]].to_numpy()
    drawn = [bars.get_segments() for bars in axes.collections if isinstance(bars, LineCollection)]
    bars = [np.array([bar[:, 1] for bar in segments]) for segments in drawn]
    return any(bar.shape == wanted.shape and np.allclose(bar, wanted) for bar in bars)


def words_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_profile_has_the_effect_both_intervals_controls_and_references():
    rows = a_summary()
    references = profile.References(TOTAL, Estimate(0.25, 0, 0.2, 0.3), "own", CONTROLS)
    figure = profile.layer_profile(rows, references, CAPTION)
    axes = figure.axes[0]
    assert np.array_equal(y_of(axes, "own"), rows["effect"])
    for column, words in CONTROLS.items():
        assert np.array_equal(y_of(axes, words), rows[column]) and whiskers_of(axes, rows, column)
    assert whiskers_of(axes, rows, "effect") and whiskers_of(axes, rows, "effect_sim")
    assert set(y_of(axes, "total effect +0.300, 95 % interval")) == {0.3}
    assert set(y_of(axes, "all layers patched at once +0.250")) == {0.25}
    lines = [line_of(axes, words) for words in ("own", *CONTROLS.values())]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    assert all(len(set(part)) == 3 for part in zip(*looks, strict=True))
    assert {"95 % interval", "95 % for all 5 places at once (simultaneous)", "may be the peak (95 % peak set)"} <= set(
        words_of(figure)
    )
    title = figure.get_suptitle()
    assert "a run" in title and "n = 90 images in 40 clusters" in title and "95 % percentile bootstrap" in title


def test_the_ring_is_at_the_peak_set_where_resamples_say_so():
    def rings(rows):
        axes = profile.layer_profile(rows, profile.References(TOTAL), CAPTION).axes[0]
        return [line for line in axes.get_lines() if line.get_markersize() == 13 and len(line.get_xdata())]

    (ring,) = rings(a_summary())
    assert list(ring.get_xdata()) == [2]
    assert not rings(a_summary().assign(peak_share=np.nan))
    assert not rings(a_summary().assign(window=-1))  # a prefix


@pytest.mark.parametrize(("deep", "number"), [(-0.1, 1), (-2.0, 2)])
def test_controls_that_leave_the_axis_are_whole_below(deep, number):
    rows = a_summary(deep=deep)
    figure = profile.layer_profile(rows, profile.References(TOTAL, None, "own", CONTROLS), CAPTION)
    low, high = figure.axes[0].get_ylim()
    assert len(figure.axes) == number and (low < deep < high) == (number == 1)
    whole = figure.axes[-1]
    assert whole.get_ylim()[0] < deep and whiskers_of(whole, rows, "effect_other_class")


@pytest.mark.parametrize("unknown", ["_low", "_high"])
def test_a_control_without_an_interval_is_whole_below(unknown):
    rows = a_summary(deep=-2.0)
    known = profile.layer_profile(rows, profile.References(TOTAL, None, "own", CONTROLS), CAPTION)
    of_one = {f"effect_same_class{end}": np.nan for end in ("_low", "_high")} | {f"effect_other_class{unknown}": np.nan}
    figure = profile.layer_profile(rows.assign(**of_one), profile.References(TOTAL, None, "own", CONTROLS), CAPTION)
    above, below = figure.axes
    assert above.get_ylim() == known.axes[0].get_ylim() and below.get_ylim()[0] < -2 < above.get_ylim()[0]


def test_a_control_that_no_image_has_is_not_said():
    rows = a_summary(series=tuple(f"h{i}" for i in range(20)), layers=1).assign(effect_same_class=np.nan)
    words = words_of(profile.layer_profile(rows, profile.References(TOTAL, None, "own", CONTROLS), CAPTION))
    assert any("other class -0.100" in one for one in words) and not any("same class" in one for one in words)


def test_a_layer_by_itself_is_in_the_middle():
    references = profile.References(TOTAL, None, "own", CONTROLS)
    assert profile.layer_profile(a_summary(layers=1), references, CAPTION).axes[0].get_xlim() == (-0.5, 0.5)


def test_what_rounding_leaves_has_no_colour():
    effects = pd.DataFrame({"effect": [1e-8], "effect_low": np.nan, "effect_high": np.nan})
    tiny = [classes.ClassEffects("cat", 9, 9, effects, 0.0)]
    (image,) = classes.class_heatmap(tiny, a_summary(1), CAPTION).axes[0].images
    assert image.get_clim() == (-style.LEAST_LIMIT, style.LEAST_LIMIT)


def test_donors_of_several_series_have_a_panel_each():
    rows = a_summary(series=("cls", "patches"))
    figure = profile.layer_profile(rows, profile.References(TOTAL, None, "own", CONTROLS), CAPTION)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["", "cls", "patches"]
    for axes, name in zip(figure.axes[1:], ("cls", "patches"), strict=True):
        assert whiskers_of(axes, rows[rows["series"] == name], "effect")
    assert words_of(figure).count("of another") == 1


def test_a_constant_donor_has_no_total_and_says_what_is_done():
    rows = a_summary().assign(recovered=np.nan)
    caption = style.Caption("a run", Metric.PROB, 9, 9, cause="zero ablation")
    figure = profile.layer_profile(rows, profile.References(NONE), caption)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "effect of zero ablation on the\nprobability of the true class"
    assert not axes.child_axes and not any("total" in words for words in words_of(figure))
    assert profile.layer_profile(a_summary(), profile.References(TOTAL), CAPTION).axes[0].child_axes


def test_an_unbounded_interval_has_no_bar_and_is_called_so():
    rows = pd.concat([a_summary().assign(tokens=tokens) for tokens in ("cls", "patches")], ignore_index=True)
    rows = rows.assign(site="resid_post", recovered_low=-np.inf, recovered_high=np.inf)
    rows.loc[0, ["recovered_low", "recovered_high"]] = [0.4, 0.6]
    figure = handover.handover(rows, CAPTION)
    figure.draw_without_rendering()
    assert whiskers_of(figure.axes[0], rows[:1], "recovered") and np.isfinite(figure.axes[0].get_ylim()).all()
    assert format_interval(0.5, -np.inf, np.inf) == "+0.500 [unbounded]"


def test_means_of_all_images_are_dashed_beside_selected_ones():
    rows = a_summary().assign(effect_unselected=0.05)
    axes = profile.layer_profile(rows, profile.References(TOTAL, unselected="all 9 images"), CAPTION).axes[0]
    assert set(y_of(axes, "all 9 images")) == {0.05} and line_of(axes, "all 9 images").is_dashed()


def test_a_window_is_beside_the_sum_of_its_layers():
    one, three = a_summary(), a_summary(window=3, seed=1)
    rows = pd.concat([one, three], ignore_index=True)
    known = {"sum": np.arange(5.0), "synergy": -0.1, "synergy_low": -0.2, "synergy_high": 0.1}
    sums = pd.DataFrame(known, index=range(5, 10))
    figure = profile.windows(rows, sums, TOTAL, CAPTION)
    above, below = figure.axes
    assert np.array_equal(y_of(above, "window 3"), three["effect"]) and whiskers_of(above, three, "effect")
    (dashed,) = [line for line in above.get_lines() if line.get_linestyle() == "--" and line.get_label()[0] == "_"]
    assert np.array_equal(dashed.get_ydata(), sums["sum"])
    assert dashed.get_color() == line_of(above, "window 3").get_color() != line_of(above, "window 1").get_color()
    assert whiskers_of(below, sums, "synergy")
    assert len(profile.windows(rows, sums[:0], TOTAL, CAPTION).axes) == 1  # nothing is known of single layers


def some_classes(number, layers):
    for i in range(number):
        known = i % 2 == 0
        ends = {"effect_low": 0.1 * i - 1, "effect_high": 0.1 * i + 1} if known else {}
        effects = pd.DataFrame({"effect": [0.1 * i] * layers, "effect_low": np.nan, "effect_high": np.nan} | ends)
        yield classes.ClassEffects(f"class {i}", 10 + i, 7 if known else 4, effects, 0.4)


def test_of_many_classes_those_with_most_images_are_drawn():
    figure = classes.class_heatmap(list(some_classes(100, 4)), a_summary(4), CAPTION)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [f"class {i} (n = {10 + i}, total +0.40)" for i in range(60, 100)]
    assert "the 40 of 100 classes" in figure.get_suptitle()


def test_a_number_says_that_its_interval_leaves_zero_out():
    effects = pd.DataFrame(
        {"effect": [0.2, 0.1, -0.2], "effect_low": [0.1, -0.1, -0.3], "effect_high": [0.3, 0.3, -0.1]}
    )
    for table, shown in (
        (effects, [".20", "-.20"]),
        (effects[["effect"]].reindex(columns=list(effects)), [".20", ".10", "-.20"]),
    ):
        figure = classes.class_heatmap([classes.ClassEffects("cat", 9, 9, table, np.nan)], a_summary(3), CAPTION)
        axes = figure.axes[0]
        assert [text.get_text() for text in axes.texts] == shown
        assert [label.get_text() for label in axes.get_yticklabels()] == ["cat (n = 9)"]


def test_a_layout_measures_only_what_may_reach_beyond_its_axes(monkeypatch):
    def fail(artist, *everything):
        raise AssertionError(f"{artist} is measured")

    drawn = [profile.layer_profile(a_summary(), profile.References(TOTAL), CAPTION)]
    effects = pd.DataFrame({"effect": [0.2] * 4, "effect_low": 0.1, "effect_high": 0.3})
    drawn.append(classes.class_heatmap([classes.ClassEffects("cat", 9, 9, effects, 0.3)], a_summary(4), CAPTION))
    for kind in (Line2D, LineCollection):
        monkeypatch.setattr(kind, "get_tightbbox", fail)
    for figure in drawn:
        figure.draw_without_rendering()
    assert drawn[1].axes[0].texts and not any(text.get_in_layout() for text in drawn[1].axes[0].texts)


def test_classes_of_few_images_are_told_apart_in_the_heatmap():
    figure = classes.class_heatmap(list(some_classes(3, 4)), a_summary(4), CAPTION)
    axes = figure.axes[0]
    assert [label.get_color() for label in axes.get_yticklabels()] == ["black", style.GREY, "black"]
    (pale,) = axes.patches
    assert pale.get_alpha() and (pale.get_y(), pale.get_height(), pale.get_width()) == (0.5, 1, 4)
    assert "pale: fewer than 5 clusters" in figure.get_suptitle().replace("\n", " ")


def group_peak(rows, shares, members, name="w1"):
    shares, rows = np.array(shares), np.array(rows)
    return GroupPeak(name, int(rows[np.argmax(shares)]), rows[np.array(members)], rows, shares, 0.15)


def test_bars_are_the_shares_of_resamples():
    summary = pd.concat([a_summary(3, window=window) for window in (1, 3)], ignore_index=True).assign(effect=0.2)
    rows = {"w1": [0, 1, 2], "w3": [3, 4, 5]}
    groups = [group_peak(rows[name], [0.7, 0.3, 0], [True, False, True], name) for name in rows]
    figure = peak.peak_stability(groups, summary, CAPTION)
    for axes, name in zip(figure.axes, ("w1", "w3"), strict=True):
        bars = [p for p in axes.patches if p.get_width() < 1]
        assert [bar.get_height() for bar in bars] == [0.7, 0.3, 0]
        assert bars[0].get_facecolor() != bars[1].get_facecolor()
        assert [p.get_x() for p in axes.patches if p.get_width() == 1] == [-0.5, 1.5]  # grounds of the peak set
        assert axes.get_xlabel() == ("layer" if name == "w1" else "layer (the centre of a window of 3)")
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2"]
        assert axes.get_title() == f"{name}\npeak effect +0.200, from split halves +0.150\npeak set: 2 of 3"


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_that_do_not_fill_a_row_are_drawn(groups):
    summary = pd.concat([a_summary(3)] * groups, ignore_index=True)
    peaks = [group_peak(range(3 * i, 3 * i + 3), [0.8, 0.2, 0], [0, 1]) for i in range(groups)]
    figure = peak.peak_stability(peaks, summary, CAPTION)
    figure.draw_without_rendering()
    assert len(figure.axes) == groups and not cut_off(figure)


def test_of_many_heads_the_most_frequent_are_named():
    shares = np.r_[np.zeros(30), 0.4, 0.6]
    summary = pd.DataFrame({"layer": 0, "head": range(32), "window": 1, "tokens": "all", "effect": 0.2})
    figure = peak.peak_stability([group_peak(range(32), shares, shares > 0)], summary, CAPTION)
    names = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert len(names) == 16 and names[-2:] == ["layer 0, h30", "layer 0, h31"]
    assert figure.axes[0].get_xlabel() == "the 16 of 32 most frequent"


def test_the_strength_curve_marks_what_was_wanted_and_chosen():
    points = [(2.0, 0.4), (0.0, 0.0), (1.0, 0.21)]
    calibration = {
        "asked": "prob_drop:0.2", "damage": "prob_drop", "wanted": 0.2, "key": "sigma", "strength": 1.0,
        "drop": {"drop": 0.21, "se": 0.01, "low": 0.19, "high": 0.23}, "monotone": True, "images": 50, "clusters": 40,
        "curve": [{"strength": s, "drop": d, "se": 0.1, "low": d - 0.1, "high": d + 0.1} for s, d in points],
    }  # fmt: skip
    figure = peak.strength_curve(calibration, "a run")
    (axes,) = figure.axes
    line = line_of(axes, "measured, 95 % interval")
    assert list(line.get_xdata()) == [0, 1, 2] and list(line.get_ydata()) == [0, 0.21, 0.4]
    assert set(y_of(axes, "wanted: 0.2")) == {0.2}
    assert set(line_of(axes, "chosen: corruption.sigma = 1").get_xdata()) == {1.0}
    assert "n = 50 training images in 40 clusters" in figure.get_suptitle().replace("\n", " ")
    unknown = calibration["drop"] | {"low": None, "high": None}
    curve = [point | {"low": None, "high": None} for point in calibration["curve"]]
    (axes,) = peak.strength_curve(calibration | {"drop": unknown, "curve": curve}, "a run").axes
    assert not axes.collections and line_of(axes, "reached: 0.210") and line_of(axes, "measured")


@pytest.mark.parametrize("layers", [1, 3, 40])
@pytest.mark.parametrize("series", [1, 8, 20])
def test_nothing_is_cut_off(layers, series):
    rows = a_summary(layers, tuple(f"h{i}" for i in range(series)) if series > 1 else ("",), deep=-2)
    caption = replace(CAPTION, title="a model with a long name, of some data, " * 4)
    controls = {f"effect_{donor}": run_figures.CONTROL_WORDS[donor] for donor in run_figures.CONTROL_WORDS}
    figure = profile.layer_profile(rows, profile.References(TOTAL, TOTAL, "own", controls), caption)
    figure.draw_without_rendering()
    assert not cut_off(figure)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("metric", [Metric.PROB, Metric.LOG_ODDS])
def test_maps_of_few_layers_have_room_for_their_words(layers, metric):
    tokens = [*(f"grid:{row}x{column}" for row in range(2) for column in range(2)), "all"]
    ends = {"effect": 0.1, "effect_low": -0.1, "effect_high": 0.2}
    rows = [{"layer": layer, "window": window, "head": -1, "tokens": name, **ends}
            for window in (-1, -2, 1) for layer in range(layers) for name in tokens]  # fmt: skip
    summary = pd.DataFrame(rows)
    title = f"depth_1 on even, noise, attn_out each+all, windows prefix+suffix+1\n{style.NO_MORE_THAN}"
    caption = replace(CAPTION, title=title, metric=metric)
    figure = maps.effect_maps(summary, maps.rows_over_image(summary), caption)
    figure.draw_without_rendering()
    assert not cut_off(figure)


def test_maps_for_print_stand_apart():
    rows = pd.DataFrame({"layer": range(3), "tokens": "grid:0x0"}).assign(window=1, head=-1, effect=0.1)
    rows = rows.assign(effect_low=-0.1, effect_high=0.2)
    with layout.FigureOptions(width=3.3).drawing():
        figure = maps.effect_maps(rows, maps.rows_over_image(rows), CAPTION)
    lefts = [image.get_extent()[0] for image in figure.axes[0].images]
    assert lefts[0] == lefts[2] < lefts[1]


RUNS = {
    "controls": ("window=1",),
    "synergy": ("window=[1,3]", "synergy=true"),
    "head": ("target=z", "target.heads=[1]"),
    "zero": ("donor=zero",),
    "selected": ("include=min_total_effect:0.001", "window=1"),
}


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize(
    "name", [name if name == "controls" else pytest.param(name, marks=pytest.mark.long) for name in RUNS]
)
def test_files_alone_give_the_same_pixels(patched, tmp_path, name):
    run = patched(*RUNS[name], pictures=True)
    files = redraw(load_run(run), tmp_path, layout.AS_WIDE_AS_NEEDED)
    assert {file.name for file in files} == {file.name for file in (run / "figures").iterdir()}
    assert ("windows.png" in {file.name for file in files}) == (name == "synergy")
    for file in files:
        first, again = (np.asarray(Image.open(path)) for path in (run / "figures" / file.name, file))
        assert np.array_equal(first, again), file.name


def test_figures_have_the_numbers_of_the_run(patched):
    run = load_run(patched("window=[1,3]", "synergy=true", kept=6))
    result, shown = run.result, run.pages
    drawn = draw(result, shown, run.manifest)
    wide = result.summary[result.summary["window"] == 3]
    above, below = drawn["windows"].axes
    singles = result.summary[result.summary["window"] == 1].set_index("layer")["effect"]
    sums = [singles[row.first_layer : row.last_layer + 1].sum() for row in wide.itertuples()]
    assert any(np.allclose(line.get_ydata(), sums) for line in above.get_lines() if len(line.get_xdata()) == len(sums))
    assert whiskers_of(below, wide.rename(columns=lambda c: c.replace("synergy_prob", "s")), "s")
    for axes, group in zip(drawn["peak"].axes, result.peaks, strict=True):
        assert np.array_equal([p.get_height() for p in axes.patches if p.get_width() < 1], group.stability)
    examples, rows = result.examples, np.flatnonzero(result.summary["window"] == result.peak["window"])
    heatmap, by_label = drawn["heatmap"].axes[0], examples.sort_values("label").groupby("label_name", sort=False)
    means = [result.effects[of_class.index][:, rows].mean(0) for _, of_class in by_label]
    assert np.allclose(heatmap.images[0].get_array(), means, atol=1e-7)
    names = [f"{name} (n = {len(rows)}, total {rows['total_effect'].mean():+.2f})" for name, rows in by_label]
    assert [label.get_text() for label in heatmap.get_yticklabels()] == names
    assert "strength" not in drawn
    check_each_image_has_its_effect_at_the_peak(result, shown, drawn["examples"])


def check_each_image_has_its_effect_at_the_peak(result, shown, page):
    said = [text.get_text() for text in page.axes[0].texts if text.get_text().startswith("effect")]
    (images,) = [page.images for page in shown if page.name == "sorted"]
    row = {i: n for n, i in enumerate(result.examples["example_id"])}
    effects = [result.effects[row[image.example_id], result.peak.name] for image in images]
    place = style.place_words(result.peak_layer, result.peak_series)
    assert result.peak_series in ("w1", "w3") and place == f"layer {result.peak_layer}, {result.peak_series}"
    assert said == [f"effect {effect:+.3f}\nat {place}" for effect in effects]
    assert list(effects) == sorted(effects, key=lambda effect: -result.total_sign * effect)


def joined(line):
    """The pairs of layers that a line joins."""
    x = line.get_xdata()
    return [(round(a), round(b)) for a, b in pairwise(x) if np.isfinite([a, b]).all()]


def test_layers_that_were_not_asked_for_are_not_joined():
    rows = a_summary(6).query("layer in (0, 1, 5)")
    axes = profile.layer_profile(rows, profile.References(TOTAL, None, "own", CONTROLS), CAPTION).axes[0]
    for label in ("own", *CONTROLS.values()):
        assert joined(line_of(axes, label)) == [(0, 1)] and list(axes.get_xticks()) == [0, 1, 5]


@pytest.mark.parametrize("series", [1, 3])
def test_heads_and_places_are_dots(series):
    for what in ({"head": 2}, {"tokens": "each:0x1"}):
        rows = a_summary(5, tuple(f"s{i}" for i in range(series))).assign(**what)
        figure = profile.layer_profile(rows, profile.References(TOTAL), CAPTION)
        lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 2]
        assert lines and all(line.get_linestyle() == "None" for line in lines)
        assert any("layer" in words and "+0." in words for words in words_of(figure)) == (series > 1)


def handover_summary(cls, patches):
    parts = [a_summary(len(cls)).assign(tokens=t, recovered=r) for t, r in (("cls", cls), ("patches", patches))]
    return pd.concat(parts, ignore_index=True).assign(site="resid_post", recovered_low=np.nan, recovered_high=np.nan)


def test_the_handover_marks_where_cls_takes_over():
    axes = handover.handover(handover_summary([0, 0.2, 0.7, 0.6], [1, 0.8, 0.3, 0.7]), CAPTION).axes[0]
    line = line_of(axes, "CLS takes over from the patches at layer 2")
    assert set(line.get_xdata()) == {2}
    assert handover.takeover_layer(Takeover((3, 5), (0, 1), (2, 3), 1, 0, 2)) == "layer 5 [3, none]"
    interval = replace(read_takeover(handover_summary([0, 1], [1, 0])), low=0, high=2)
    (band,) = handover.handover(handover_summary([0, 1], [1, 0]), CAPTION, interval).axes[0].patches
    assert (band.get_x(), band.get_width()) == (0, 1.5)  # to the end of the axis
    axes = handover.handover(handover_summary([0, 0.2], [1, 0.8]), CAPTION).axes[0]
    assert not [line for line in axes.get_lines() if "takes over" in line.get_label()]


def test_maps_mark_the_cells_whose_interval_leaves_0_out():
    tokens = [f"each:{row}x{column}" for row in range(2) for column in range(3)]
    effects = [{"layer": layer, "tokens": name, "effect": 0.1 * i} for layer in (2, 7) for i, name in enumerate(tokens)]
    rows = pd.DataFrame(effects).assign(window=1, head=-1, effect_low=-1.0, effect_high=1.0)
    rows.loc[[4, 6], "effect_low"] = 0.01  # row 1, column 1 of layer 2; row 0, column 0 of layer 7
    axes = maps.effect_maps(rows, maps.rows_over_image(rows), CAPTION).axes[0]
    (dots,) = [line for line in axes.get_lines() if line.get_label() == "95 % interval without 0"]
    for (x, y), image, cell in zip(dots.get_xydata(), axes.images, ((1, 1), (0, 0)), strict=True):
        left, right, below, above = image.get_extent()
        assert (int((y - above) / (below - above) * 2), int((x - left) / (right - left) * 3)) == cell
    assert [text.get_text() for text in axes.texts] == ["layer 2", "layer 7"]
    assert np.allclose(axes.images[0].get_array(), 0.1 * np.arange(6).reshape(2, 3))


def test_series_without_a_direct_effect_are_left_out():
    rows = a_summary(3, ("cls", "patches")).assign(direct_log_odds=0.2, log_odds_effect=0.3)
    rows.loc[rows["series"] == "patches", "direct_log_odds"] = 0
    assert set(handover.direct_rows(rows)["series"]) == {"cls"}
    assert not len(handover.direct_rows(rows.assign(direct_log_odds=0.0)))
    assert not len(handover.direct_rows(rows.assign(direct_log_odds=[0.001] * 5 + [-0.005])))  # next to none
    assert not len(handover.direct_rows(rows.assign(direct_log_odds=[np.nan, *[0.2] * 5])))


def test_small_effects_have_digits_enough_to_be_told_apart():
    rows = a_summary(2).assign(head=0)
    for effects, words in (([0.034, -0.0123], [".034", "-.012"]), ([0.234, -0.004], [".23", "0"])):
        axes = heatmaps.head_heatmap(rows.assign(effect=effects), CAPTION).axes[0]
        assert [text.get_text() for text in axes.texts] == words


def test_a_title_is_broken_between_its_parts():
    figure = layout.make_figure(5, 3)  # 65 letters
    layout.set_headline(figure, "a model on some images · gray (amount=0.5) · window 1 · clean into corrupted\nn = 9")
    first, rest = "a model on some images · gray (amount=0.5) · window 1", "clean into corrupted\nn = 9"
    assert figure.get_suptitle() == f"{first}\n{rest}" and figure.get_figheight() == 3
    layout.set_headline(figure, "a\nb\nc\nd\ne")
    assert figure.get_figheight() == pytest.approx(3 + 2 * layout.TITLE_LINE)


@pytest.mark.parametrize("heads", [3, 12])
def test_the_colour_bar_of_two_layers_of_heads_is_whole(heads):
    rows = pd.concat([a_summary(2).assign(head=head) for head in range(heads)], ignore_index=True)
    for metric in (Metric.PROB, Metric.LOGIT_DIFF):
        figure = heatmaps.head_heatmap(rows, replace(CAPTION, metric=metric, cause="mean ablation"))
        figure.draw_without_rendering()
        label = figure.axes[-1].yaxis.label.get_window_extent()
        assert not cut_off(figure) and 0 <= label.y0 and label.y1 <= figure.bbox.height


def test_what_says_nothing_is_not_drawn(patched):
    run = load_run(patched("window=1"))
    result, pages, manifest = run.result, run.pages, run.manifest
    assert {"heatmap", "peak"} <= set(draw(result, pages, manifest))
    sure = [replace(group, stability=np.eye(len(group.rows))[0]) for group in result.peaks]
    one_class = replace(result, examples=result.examples.assign(label=0), peaks=sure)
    prefixes = replace(one_class, summary=result.summary.assign(window=-1), peaks=result.peaks)
    for nothing in (one_class, prefixes):
        assert not {"heatmap", "peak"} & set(draw(nothing, pages, manifest))
