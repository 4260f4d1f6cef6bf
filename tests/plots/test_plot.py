"""``vitpatch.plot``: the numbers of a table on axes, the same as a run's figures have; and what is refused."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from measured import table_of

import vitpatch
from vitpatch import VitPatchError, plot
from vitpatch.plots import run_figures
from vitpatch.runs.reading import load_run


@pytest.fixture(autouse=True)
def closed():
    """Closes the figures of a test."""
    yield
    pyplot.close("all")


@pytest.fixture
def finished(patched):
    """Makes a run and loads it."""

    def make(*overrides):
        return load_run(patched(*overrides))

    return make


def points(axes):
    """The points of all lines of axes, of all series by label."""
    return {line.get_label(): np.nan_to_num(line.get_xydata(), nan=9) for line in axes.get_lines()}


def test_a_run_a_table_and_its_summary_have_the_profile_of_the_figure(finished):
    run = finished("window=1", "controls=false")
    drawn = run_figures.draw(run.result, run.pages, run.manifest)["layer_profile"].axes[0]
    own = plot.profile(run)
    assert own.get_ylabel() == drawn.get_ylabel() and own.get_xlabel() == drawn.get_xlabel()
    assert all(np.array_equal(xy, points(own)[label]) for label, xy in points(drawn).items())
    images = table_of(run).assign(prob_clean=lambda table: table["prob_corrupt"] + 0.5)
    for table in (images, vitpatch.summarize(images)):
        axes = plot.profile(table)
        assert np.allclose(points(axes)["mean effect"], points(drawn)["mean effect"], atol=1e-6)
        (total,) = [xy for label, xy in points(axes).items() if label.startswith("total effect")]
        assert total[0, 1] == pytest.approx(0.5)


def test_axes_of_ones_own_are_drawn_on(finished):
    run, figure = finished("target=z", "target.layers=[0,2]"), Figure()
    axes = figure.add_subplot()
    assert plot.heads(run, axes) is axes and not pyplot.get_fignums()
    means = run.result.summary.pivot(index="layer", columns="head", values="effect").to_numpy()
    assert np.array_equal(axes.images[0].get_array(), means)
    assert np.array_equal(plot.heads(table_of(run)).images[0].get_array(), means)
    assert len(plot.examples(run).child_axes) == 2 and pyplot.get_fignums()


def test_windows_maps_and_handover_have_their_numbers(finished):
    run = finished("window=[1,2]", "controls=false")
    axes, summary = plot.windows(run), run.result.summary
    for window in (1, 2):
        assert np.array_equal(points(axes)[f"window {window}"][:, 1], summary["effect"][summary["window"] == window])
    rows = vitpatch.summarize(table_of(run)).query("window == 1")
    place = rows.assign(tokens=["grid:0x0", "grid:0x1"] * (len(rows) // 2), layer=np.arange(len(rows)) // 2)
    assert np.allclose(np.stack([image.get_array()[0] for image in plot.maps(place).images]).ravel(), rows["effect"])
    cls = rows.assign(tokens="cls", site="resid_post", recovered=[0.1, 0.2, 0.8, 0.9][: len(rows)])
    both = pd.concat([cls, cls.assign(tokens="patches", recovered=1 - cls["recovered"])])
    drawn = points(plot.handover(both))
    assert drawn["resid_post at cls"][:, 1].tolist() == cls["recovered"].tolist()
    assert drawn["CLS takes over from the patches at layer 2"][:, 0].tolist() == [2, 2]


def test_what_a_table_has_not_is_said(finished):
    run = finished("window=1", "controls=false")
    table = vitpatch.summarize(table_of(run))
    two = pd.concat([table.assign(head=0), table.assign(head=0, tokens="cls")])
    for draw, given, words in (
        (plot.heads, table, "no single heads"),
        (plot.heads, two, "tokens all, cls; give the rows of one"),
        (plot.handover, table, "resid_post at CLS and at patches"),
        (plot.maps, table, "no places over the image"),
        (plot.windows, table, "has one window"),
        (plot.examples, table, "got DataFrame; expected a finished run"),
        (plot.strength, run, "was not calibrated"),
        (plot.profile, [1], "got list"),
        (plot.profile, table[["layer"]], "lacks site, head, tokens, …"),
    ):
        with pytest.raises(VitPatchError, match=words) as error:
            draw(given)
        assert "\n" not in str(error.value) and not pyplot.get_fignums()
    with pytest.raises(VitPatchError, match="page 'best': unknown; use largest or sorted or random"):
        plot.examples(run, page="best")
