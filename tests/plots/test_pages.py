"""What the pages of single images say on their axes."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from vitpatch.plots.examples import ExampleImage, Trace, example_page, map_page
from vitpatch.plots.heatmaps import rows_over_image
from vitpatch.plots.style import Caption, layer_words
from vitpatch.types import PREFIX, SUFFIX, BaseRun, Metric


def trace(maps, cls=()):
    images = {run: np.zeros((4, 4, 3), np.uint8) for run in BaseRun}
    predicted, base = dict.fromkeys(BaseRun, "cat"), dict.fromkeys(BaseRun, 0.5)
    return Trace(ExampleImage(0, "cat", images, predicted, base, np.zeros(0)), {}, maps, cls)


def test_each_series_of_an_image_is_at_its_own_layers():
    patched = {"w3": (np.array([1]), np.array([0.4])), "w1": (np.array([0, 1, 2]), np.array([0.1, 0.2, 0.3]))}
    figure = example_page([replace(trace(None), curves=patched)], "layer", "", Caption("t", Metric.PROB, 1, 1))
    lines = {line.get_label(): line for line in figure.axes[2].get_lines()}
    for name, (layers, values) in patched.items():
        line = lines[f"patched run, {name}"]
        assert np.array_equal(line.get_xdata(), layers) and np.array_equal(line.get_ydata(), values)
    assert list(figure.axes[2].get_xticks()) == [0, 1, 2]


def test_maps_are_of_the_layers_of_one_window_in_order():
    cells = [f"each:{row}x{column}" for row in range(2) for column in range(2)]
    places = [(PREFIX, layer) for layer in (3, 1)] + [(1, layer) for layer in (1, 3, 0, 2)]
    rows = [{"window": w, "layer": layer, "head": -1, "tokens": name} for w, layer in places for name in cells]
    summary = pd.DataFrame(rows)
    at = rows_over_image(summary)
    assert at.shape == (2, 2, 2) and set(summary["window"][at.ravel()]) == {PREFIX}
    assert summary["layer"][at[:, 0, 0]].tolist() == [1, 3]
    assert summary["tokens"][at[0].ravel()].tolist() == cells


def texts(ticks):
    return [tick.get_text() for tick in ticks]


def test_heads_and_layers_keep_their_numbers():
    maps = np.arange(6.0).reshape(1, 2, 3)
    figure = map_page([trace(maps)], ["x"], ([3, 1, 0], [7, 2]), "", Caption("t", Metric.PROB, 1, 1))
    axes = figure.axes[2]
    assert texts(axes.get_xticklabels()) == ["3", "1", "0"] and texts(axes.get_yticklabels()) == ["7", "2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


def test_cls_stands_beside_a_map_over_the_image():
    figure = map_page(
        [trace(np.ones((2, 2, 2)), ("CLS +0.10", "CLS -0.20"))], ["a", "b"], None, "", Caption("t", Metric.PROB, 1, 1)
    )
    assert [axes.get_xlabel() for axes in figure.axes[2:4]] == ["CLS +0.10", "CLS -0.20"]


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
