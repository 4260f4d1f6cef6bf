"""What is drawn: lines, whiskers and words against the numbers they are of; and the same pixels from files alone."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from drawn import cut_off
from matplotlib.collections import LineCollection
from PIL import Image

from vitpatch.cli.compare import read_result, redraw
from vitpatch.formatting import format_interval
from vitpatch.plots import classes, heatmaps, peak, profile, run_figures, style
from vitpatch.plots.run_figures import draw
from vitpatch.runs.folder import RunFolder
from vitpatch.runs.results import _with_interval, read_pages
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
    assert _with_interval(NONE) == "none: no included image has such a partner"


def test_a_layer_by_itself_is_in_the_middle():
    references = profile.References(TOTAL, None, "own", CONTROLS)
    assert profile.layer_profile(a_summary(layers=1), references, CAPTION).axes[0].get_xlim() == (-0.5, 0.5)


def test_what_rounding_leaves_has_no_colour():
    effects = pd.DataFrame({"effect": [1e-8], "effect_low": np.nan, "effect_high": np.nan})
    tiny = [classes.ClassEffects("cat", 9, 9, effects, 0.0)]
    (image,) = classes.class_heatmap(tiny, [0], "layer", CAPTION).axes[0].images
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
    figure = profile.handover(rows, CAPTION)
    figure.canvas.draw()
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


def test_each_class_has_a_panel_with_its_numbers():
    drawn = list(some_classes(3, 4))
    figure = classes.class_profiles(drawn, range(4), [0.2] * 4, "layer", CAPTION)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [
        "class 0\n10 images in 7 clusters", "class 1\n11 images in 4 clusters", "class 2\n12 images in 7 clusters",
    ]  # fmt: skip
    assert [bool(axes.collections) for axes in shown] == [True, False, True]  # few clusters have no interval
    for one, axes in zip(drawn, shown, strict=True):
        assert np.allclose(y_of(axes, "class"), one.effects["effect"]) and set(y_of(axes, "all images")) == {0.2}
    assert len({axes.get_ylim() for axes in shown}) == 1


def test_of_many_classes_those_with_most_images_are_drawn():
    figure = classes.class_profiles(list(some_classes(100, 40)), range(40), [0.2] * 40, "layer", CAPTION)
    shown = [axes.get_title().split("\n")[0] for axes in figure.axes if axes.get_visible()]
    assert shown == [f"class {i}" for i in range(60, 100)] and "the 40 of 100 classes" in figure.get_suptitle()


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
    figure.canvas.draw()
    assert not cut_off(figure)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("metric", [Metric.PROB, Metric.LOG_ODDS])
def test_maps_of_few_layers_have_room_for_their_words(layers, metric):
    tokens = [*(f"grid:{row}x{column}" for row in range(2) for column in range(2)), "all"]
    rows = [{"layer": layer, "window": window, "head": -1, "tokens": name, "effect": 0.1}
            for window in (-1, -2, 1) for layer in range(layers) for name in tokens]  # fmt: skip
    summary = pd.DataFrame(rows)
    title = f"depth_1 on even, noise, attn_out each+all, windows prefix+suffix+1\n{style.NO_MORE_THAN}"
    caption = replace(CAPTION, title=title, metric=metric)
    figure = heatmaps.effect_maps(summary, heatmaps.rows_over_image(summary), caption)
    figure.canvas.draw()
    assert not cut_off(figure)


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
    files = redraw(RunFolder(run), tmp_path)
    assert {file.name for file in files} == {file.name for file in (run / "figures").iterdir()}
    assert ("windows.png" in {file.name for file in files}) == (name == "synergy")
    for file in files:
        first, again = (np.asarray(Image.open(path)) for path in (run / "figures" / file.name, file))
        assert np.array_equal(first, again), file.name


def test_figures_have_the_numbers_of_the_run(patched):
    run = RunFolder(patched("window=[1,3]", "synergy=true", kept=6))
    result, manifest = read_result(run)
    shown = read_pages(run.pages)
    figures = draw(result, shown, manifest)
    drawn = {name: group.get(name) for name, group in figures.items()}
    wide = result.summary[result.summary["window"] == 3]
    above, below = drawn["windows"].axes
    singles = result.summary[result.summary["window"] == 1].set_index("layer")["effect"]
    sums = [singles[row.first_layer : row.last_layer + 1].sum() for row in wide.itertuples()]
    assert any(np.allclose(line.get_ydata(), sums) for line in above.get_lines() if len(line.get_xdata()) == len(sums))
    assert whiskers_of(below, wide.rename(columns=lambda c: c.replace("synergy_prob", "s")), "s")
    for axes, group in zip(drawn["peak"].axes, result.peaks, strict=True):
        assert np.array_equal([p.get_height() for p in axes.patches if p.get_width() < 1], group.stability)
    examples, rows = result.examples, np.flatnonzero(result.summary["window"] == result.peak["window"])
    for axes in (axes for axes in drawn["classes"].axes if axes.get_visible()):
        of_class = (examples["label_name"] == axes.get_title().split("\n")[0]).to_numpy()
        assert np.allclose(y_of(axes, "class"), result.effects[of_class][:, rows].mean(0), atol=1e-7)
        assert np.allclose(y_of(axes, "total effect of the class"), examples["total_effect"][of_class].mean())
    assert "strength" not in drawn
    check_rows_say_the_images_effect_at_the_peak(result, shown, figures["examples"]["examples_sorted"])


def check_rows_say_the_images_effect_at_the_peak(result, shown, page):
    said = [axes.get_ylabel() for axes in page.axes[::3]]
    (images,) = [page.images for page in shown if page.name == "sorted"]
    row = {i: n for n, i in enumerate(result.examples["example_id"])}
    effects = [result.effects[row[image.example_id], result.peak.name] for image in images]
    place = style.place_words(result.peak_layer, result.peak_series)
    assert result.peak_series in ("w1", "w3") and place == f"layer {result.peak_layer}, {result.peak_series}"
    assert said == [f"effect {effect:+.3f}\nat {place}" for effect in effects]
    assert list(effects) == sorted(effects, key=lambda effect: -result.total_sign * effect)
