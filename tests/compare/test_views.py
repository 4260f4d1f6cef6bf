"""``vitpatch-compare … --metric …``: finished runs read again from their files, into a folder of their own."""

import json
import logging
import re

import pandas as pd
import pytest
from drawn import cut_off
from run_files import results

from vitpatch.cli.compare import main
from vitpatch.plots import layout, run_figures
from vitpatch.runs import reading
from vitpatch.runs.reading import load_run


@pytest.fixture
def call(capsys):
    def make(*arguments):
        try:
            main([str(a) for a in arguments])
            code = 0
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return make


def test_one_run_is_read_into_a_folder_of_its_own(patched, call, monkeypatch, caplog):
    """Of its figures only the profile is written: the others take longest."""
    folder = patched("window=1", "data.limit=6")
    monkeypatch.setattr(run_figures, "_class_figures", lambda *everything: {})
    monkeypatch.setattr(reading, "draw", lambda *run: {"layer_profile": run_figures.draw(*run)["layer_profile"]})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    options = "--metric log_odds --include clean_correct --format svg,pdf --width 3.3".split()
    with caplog.at_level(logging.INFO):
        code, said = call(folder, *options, "--font", "DejaVu Serif", "--title", "A figure & its title")
    assert code == 0 and "pruned" not in caplog.text, said  # of the fonts in a PDF
    read = load_run(folder).read(metric="log_odds", include="clean_correct")
    view = folder / "views" / read.view.view_id
    assert f"\n{view}: figures, index.html, summary.csv, view.json\n" in said
    assert {path: path.read_bytes() for path in before} == before
    assert (view / "summary.csv").read_text() == read.summary.to_csv(index=False)
    assert json.loads((view / "view.json").read_text())["view"] == read.view.as_config()
    assert sorted(path.name for path in (view / "figures").iterdir()) == ["layer_profile.pdf", "layer_profile.svg"]
    svg = (view / "figures" / "layer_profile.svg").read_text()
    assert ">A figure &amp; its title</text>" in svg and "DejaVu Serif" in svg and "log odds" in svg
    assert re.search(r'width="237.6\d*pt"', svg)
    pdf = (view / "figures" / "layer_profile.pdf").read_bytes()
    assert re.search(rb"/MediaBox \[ 0 0 237.6\d* ", pdf) and b"/Subtype /Type3" not in pdf
    assert "<title>A figure &amp; its title</title>" in (view / "index.html").read_text()


def test_runs_of_a_sweep_are_compared_in_the_view(patched, call, tables_only, tmp_path):
    """Each run's summary and figures are below the comparison, by its name; one that cannot be read is a line."""
    sweep, changes = tmp_path / "sweep", {"metric": "kl", "include": "min_total_effect:0.01"}
    for corruption in ("gray", "blur", "none"):
        patched(f"corruption={corruption}", "window=1", "data.limit=6", folder=f"sweep/{corruption}")
    before = {name: results(sweep / name) for name in ("gray", "blur")}
    code, said = call(sweep, *(f"--{key}={value}" for key, value in changes.items()))
    assert code == 1 and f"error: {sweep}/none: include min_total_effect:0.01: none of 6 images is" in said
    read = {name: load_run(sweep / name).read(**changes) for name in before}
    (folder,) = (sweep / "views").iterdir()
    assert folder.name == read["gray"].view.view_id
    overview = pd.read_csv(folder / "overview.csv").set_index("run")
    for name, run in read.items():
        assert overview.loc[name, "total_effect"] == run.manifest["total_effect"]["mean"]
        assert overview.loc[name, ["metric", "include"]].tolist() == list(changes.values())
        assert (folder / name / "summary.csv").read_text() == run.summary.to_csv(index=False)
        assert results(sweep / name) == before[name]
    assert call(sweep, "--output", sweep / "again")[0] == 0
    assert sorted(pd.read_csv(sweep / "again" / "overview.csv")["run"]) == ["blur", "gray", "none"]  # views are no runs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--metric", "loss"), "error: metric 'loss': expected one of prob, log_odds, logit, logit_diff, kl"),
        (("--include", "some"), "error: include 'some': expected all, clean_correct, flipped or min_total_effect:x"),
        (("--format", "png,jpg"), "error: --format 'jpg': expected one of png, svg, pdf"),
        (("--width", "0"), "error: --width 0.0: expected a number above 0"),
        (
            ("--font", "DejaVu Sanz"),
            "error: --font 'DejaVu Sanz': matplotlib finds no such font; did you mean",
        ),
        (("--redraw", "--metric", "kl"), "error: --metric with --redraw: "),
    ],
)
def test_what_cannot_be_asked_is_one_line(tmp_path, call, options, says):
    code, said = call(tmp_path, *options)
    assert code == 1 and said.startswith(says) and len(said.splitlines()) == 1, said


def test_a_figure_is_laid_out_alike_in_every_format(tmp_path):
    figure = layout.make_figure(4, 3)
    axes = figure.add_subplot()
    axes.set_ylabel("effect")
    layout.set_headline(figure, "words " * 30)
    places = []
    for kind in ("png", "pdf", "svg"):
        layout.save_figure(figure, tmp_path / f"figure.{kind}", kind, 150)
        places.append(axes.get_position().extents)
    assert places[1] == pytest.approx(places[0], abs=0.01) and places[2] == pytest.approx(places[0], abs=0.01)


def test_figures_for_print_have_the_width_and_no_smaller_words():
    with layout.FigureOptions(width=3.3).drawing():
        figure = layout.make_figure(8, 4.4)
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], label="a line")
        axes.set_xlabel("layer (the centre of a window of 3, the last of a prefix)", fontsize=8)
        axes.set_xlim(0, 0.35)  # with a tick beyond it
        layout.set_headline(figure, "words " * 30)
        layout.add_legend_below(figure, [axes])
        layout.shrink_for_print(figure)
        assert layout.panels_a_row(4, 1.2) == 2
    lines = figure.get_suptitle().split("\n")
    assert axes.get_xlabel().count("\n") == 1
    assert figure.get_figwidth() == 3.3 and 2.5 < figure.get_figheight() < 3.3
    assert max(map(len, lines)) <= 3.3 * layout.CHARACTERS_AN_INCH / 0.75 < len(lines[0]) + 6
    figure.draw_without_rendering()
    sizes = [text.get_fontsize() for text in (figure._suptitle, axes.xaxis.label, axes.get_xticklabels()[0])]
    assert sizes == [7.5, 6, 7.5] and not cut_off(figure)
    assert {text.get_fontsize() for text in axes.get_xticklabels()} == {7.5}
    assert layout.make_figure(8, 4.4).get_figwidth() == 8 and layout.panels_a_row(4, 1.2) == 4
