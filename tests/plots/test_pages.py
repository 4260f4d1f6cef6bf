"""What the pages of single images show and say."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from vitpatch.plots.examples import (
    ExampleImage,
    Trace,
    draw_curves,
    draw_head_maps,
    draw_map_rows,
    draw_pictures,
    in_even_steps,
)
from vitpatch.plots.layout import Strip, mosaic
from vitpatch.plots.maps import lay_over, rows_over_image
from vitpatch.plots.style import layer_words
from vitpatch.types import PREFIX, SUFFIX, BaseRun, Metric


def trace(maps, cls=(), shade=0):
    images = {run: np.full((4, 4, 3), shade + 100 * i, np.uint8) for i, run in enumerate(BaseRun)}
    predicted, base = dict.fromkeys(BaseRun, "cat"), {BaseRun.CLEAN: 0.7, BaseRun.CORRUPT: 0.2}
    return Trace(ExampleImage(0, "cat", images, predicted, base, np.zeros(0)), {}, maps, cls)


def words_of(axes):
    return [text.get_text() for text in axes.texts]


def test_examples_are_far_apart_also_where_most_images_have_no_effect():
    effects = np.array([0.01, 0.9, 0.0, -0.6, 0.002, 0.31, 0.28, 0.001, -0.003])
    assert effects[in_even_steps(effects, 4)].tolist() == [0.9, 0.31, -0.003, -0.6]  # steps 0.9, 0.4, -0.1, -0.6
    assert in_even_steps(effects, 1).tolist() == [1] and sorted(in_even_steps(effects, 9)) == list(range(9))


def test_each_series_of_an_image_is_at_its_own_layers():
    patched = {"w3": (np.array([1]), np.array([0.4])), "w1": (np.array([0, 1, 2]), np.array([0.1, 0.2, 0.3]))}
    other = {name: (layers, values + 0.5) for name, (layers, values) in patched.items()}
    axes = Figure().add_subplot()
    strip = draw_curves(axes, [replace(trace(None), curves=curves) for curves in (patched, other)], Metric.PROB)
    assert strip == Strip(2, -0.5, 2.5)
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    for name, (layers, values) in patched.items():
        line = lines[f"patched run, {name}"]
        x, y = line[np.isfinite(line).all(1)].T
        assert np.allclose(x, [*strip.place(0, layers), *strip.place(1, layers)])
        assert np.allclose(y, [*values, *values + 0.5])
        assert np.isnan(line[len(layers)]).all()  # one image is not joined to the next
    assert words_of(axes) == ["0", "1", "2"] * 2
    base = {lines.get_label(): lines for lines in axes.collections}
    for label, value in (("clean run", 0.7), ("corrupted run", 0.2)):
        assert [line[:, 1].tolist() for line in base[label].get_segments()] == [[value] * 2] * 2


def test_pictures_stand_side_by_side_the_clean_above_the_corrupted():
    axes, strip = Figure().add_subplot(), Strip(2, -0.5, 2.5)
    draw_pictures(axes, [trace(None, shade=shade) for shade in (0, 50)], strip)
    (image,) = axes.images
    pixels = np.asarray(image.get_array())
    left, right = image.get_extent()[:2]
    for panel, shade in enumerate((0, 50)):
        middle = strip.starts[panel] + strip.width / 2
        column = int((middle - left) / (right - left) * pixels.shape[1])
        assert (pixels[0, column] == shade).all() and (pixels[-1, column] == shade + 100).all()
    assert (pixels[pixels.shape[0] // 2] == 255).all()  # what stands between them


def test_a_mosaic_has_its_tiles_in_place():
    tiles = [[np.full((4, 8, 3), 10 * row + column, np.uint8) for column in range(3)] for row in range(2)]
    whole = mosaic(tiles, (0.5, 0.25))
    assert whole.shape == (4 + 2 + 4, 3 * 8 + 2 * 2, 3)
    assert (whole[6:, 10:18] == 11).all() and (whole[4:6] == 255).all() and (whole[:, 8:10] == 255).all()


def test_a_map_lies_over_its_picture_where_there_is_an_effect():
    picture = np.zeros((6, 6, 3), np.uint8)
    picture[:3] = [200, 10, 30]
    over = lay_over(picture, np.array([[0, 0.5], [-0.5, 0]]), 0.5).astype(int)
    assert np.ptp(over[:3, :3], axis=2).max() == 0 and np.ptp(over[3:, 3:], axis=2).max() == 0  # of no effect: grey
    assert over[0, 0, 0] > over[5, 5, 0]  # the picture, pale
    red, blue = over[0, 5], over[5, 0]
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50


def test_maps_are_of_the_layers_of_one_window_in_order():
    cells = [f"each:{row}x{column}" for row in range(2) for column in range(2)]
    places = [(PREFIX, layer) for layer in (3, 1)] + [(1, layer) for layer in (1, 3, 0, 2)]
    rows = [{"window": w, "layer": layer, "head": -1, "tokens": name} for w, layer in places for name in cells]
    summary = pd.DataFrame(rows)
    at = rows_over_image(summary)
    assert at.shape == (2, 2, 2) and set(summary["window"][at.ravel()]) == {PREFIX}
    assert summary["layer"][at[:, 0, 0]].tolist() == [1, 3]
    assert summary["tokens"][at[0].ravel()].tolist() == cells


def test_heads_and_layers_keep_their_numbers_and_effects():
    maps = [np.arange(6.0).reshape(1, 2, 3), -np.ones((1, 2, 3))]
    axes = Figure().add_subplot()
    draw_head_maps(axes, [trace(one) for one in maps], [3, 1, 0], [7, 2])
    assert [word for word in words_of(axes) if "±" not in word] == ["3", "1", "0"] * 2
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["7", "2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert [word for word in words_of(axes) if "±" in word] == ["± 5.000", "± 1.000"]
    for image, values in zip(axes.images, maps, strict=True):
        assert np.array_equal(image.get_array(), values[0]) and image.get_clim()[1] == np.abs(values).max()


def test_cls_stands_below_a_map_over_the_image():
    axes = Figure().add_subplot()
    draw_map_rows(axes, [trace(np.ones((2, 2, 2)), ("CLS +0.10", "CLS -0.20"))], [4, 9])
    assert {"layer 4", "layer 9", "CLS +0.10", "CLS -0.20"} <= set(words_of(axes))
    x = {text.get_text(): text.get_position()[0] for text in axes.texts}
    assert x["layer 4"] == x["CLS +0.10"] < x["layer 9"] == x["CLS -0.20"]


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ({1}, "layer"),
        ({1, 3}, "layer (the centre of a window of 3)"),
        ({3, 5}, "layer (a window's centre)"),
        ({PREFIX}, "layer (the last of a prefix)"),
        ({3, SUFFIX}, "layer (the centre of a window of 3, the first of a suffix)"),
    ],
)
def test_what_the_layer_of_an_axis_is(windows, words):
    assert layer_words(windows) == words
