"""What the pages of single images say on their axes, and labels that look like formulas."""

import numpy as np
import pytest
from conftest import pictures, write_parquet

from vitpatch.pages import MapAxes, Trace, map_page
from vitpatch.plots import Caption, layer_words
from vitpatch.spec import PREFIX, SUFFIX, BaseRun, Metric


def trace(maps, beside=()):
    images = {run: np.zeros((4, 4, 3), np.uint8) for run in BaseRun}
    return Trace("cat", images, dict.fromkeys(BaseRun, "cat"), dict.fromkeys(BaseRun, 0.5), {}, maps, beside)


def texts(ticks):
    return [tick.get_text() for tick in ticks]


def test_heads_and_layers_keep_their_numbers():
    maps = np.arange(6.0).reshape(1, 2, 3)
    figure = map_page([trace(maps)], ["x"], MapAxes([3, 1, 0], [7, 2]), "", Caption("t", Metric.PROB, 1, 1))
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


def test_labels_are_no_formulas(patched, made, tmp_path):
    names = ["$\\frac$", "cash $5 to $10", "<b>", "a" * 99, "_"]
    path = write_parquet(tmp_path / "odd.parquet", pictures(13), [i % 5 for i in range(13)], names=names)
    said = "data.label_map={0: class_0, 1: class_1, 2: class_2, 3: class_3, 4: class_4}"
    run = patched(f"data.path={path}", said, pictures=True)
    assert (run / "figures" / "heatmap.png").exists()
