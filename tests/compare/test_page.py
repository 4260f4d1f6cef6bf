import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from xml.etree import ElementTree

import altair as alt
import numpy as np
import pandas as pd
import pytest
import vl_convert
from altair.utils.schemapi import validate_jsonschema
from compared_by_hand import EVIL, IN_A_FOLDER, effects, hostile, single
from drawn import layers_of, reaches_the_edge, views_of
from hand_made import NOISE, rows, save_run
from jsonschema import ValidationError
from PIL import Image

from vitpatch.compare import charts, layout, tables
from vitpatch.compare import page as page_module
from vitpatch.compare.charts import save_figure, spec_of
from vitpatch.compare.compare import compare_runs
from vitpatch.compare.figures import FILES, make_figures
from vitpatch.compare.layout import make_grids
from vitpatch.compare.load import find_runs
from vitpatch.compare.page import (
    ASSETS,
    data_url,
    make_albums,
    make_sections,
    page_scripts,
    render_page,
    script_json,
    vega_bundle,
    write_page,
)
from vitpatch.compare.tables import P_VALUE, make_cell, relative_address
from vitpatch.formatting import UNKNOWN, run_labels, shorten_names
from vitpatch.plots.examples import ExamplePage
from vitpatch.runs.reading import FinishedRun, load_run

SORTABLE = "8ccfb076f8831d1f4f5e7863c0b8960eb642e6bfdc2690115810daf273623e77"
SECTIONS = "found what grid overlay heatmap peaks differences matched rank depth synergy controls gallery".split()


def page(comparison):
    return render_page(comparison, make_sections(comparison, make_figures(comparison)))


def file_figures(comparison):
    """The figures in files, by name, as altair charts."""
    return {figure.name: figure.draw(comparison) for figure in make_figures(comparison) if figure.in_file}


def specs_of(comparison):
    """The specifications of the figures in files, by name."""
    return {name: spec_of(figure) for name, figure in file_figures(comparison).items()}


class Reader(HTMLParser):
    """What a browser would find: elements with attributes, words, specifications, scripts and tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.scripts, self.specs, self.inside = [], [], [], [], []
        self.rows = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "wbr"):
            self.inside.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append((dict(attrs).get("data-sort"), ""))

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_data(self, data):
        tag, attrs = self.inside[-1] if self.inside else ("", {})
        if tag == "script":
            (self.specs if attrs.get("type") == "application/json" else self.scripts).append(data)
        elif tag != "style":
            self.words.append(data)
            if self.rows and any(name in ("td", "th") for name, _ in self.inside):
                sort, words = self.rows[-1][-1]
                self.rows[-1][-1] = sort, words + data

    def attributes(self, tag, name):
        return [attrs[name] for of, attrs in self.tags if of == tag and name in attrs]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return hostile(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def read_page(comparison):
    return Reader(page(comparison))


def test_nothing_breaks_out_of_the_page(read_page):
    assert len(read_page.scripts) == len(page_scripts()) == 3
    assert not any("alert(1)" in script for script in read_page.scripts)
    assert not any(attrs.get("src") == "x" for _, attrs in read_page.tags)
    assert not [name for _, attrs in read_page.tags for name in attrs if name.startswith("on")]
    words = "".join(read_page.words)
    assert f"weights differ: {EVIL}" in words and f"drawn by lot {EVIL}" in words
    assert IN_A_FOLDER.split(",")[0] in words


def test_only_its_own_scripts_may_run_and_nothing_is_fetched(read_page):
    (policy,) = [a["content"] for t, a in read_page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe-eval" not in policy
    script = re.search("script-src ([^;]*);", policy)[1]
    assert "unsafe-inline" not in script and script.count("sha256-") == len(read_page.scripts)
    for attribute, of in (("src", "img script"), ("href", "link")):
        for tag in of.split():
            assert all(value.startswith("data:") for value in read_page.attributes(tag, attribute))
    urls = [value for value in read_page.attributes("a", "href") if not value.startswith(("#", "../", "./"))]
    assert set(urls) == {"https://wandb.ai/a?b=1&c=<2>"}


def test_links_lead_to_files_that_are_there(comparison, tmp_path_factory, read_page):
    from urllib.parse import unquote

    folders = [value for value in read_page.attributes("a", "href") if value.startswith("../")]
    place = comparison.runs[0].folder.path.parents[1] / "comparison"
    assert folders and all((place / unquote(value)).exists() for value in folders)
    named = [value for value in folders if "script" in value]
    assert named and not any(letter in value for value in named for letter in "<>\"'?#&")


def test_sections_contents_and_charts(comparison, read_page):
    ids = read_page.attributes("section", "id")
    assert ids == SECTIONS
    assert [value[1:] for value in read_page.attributes("a", "href") if value.startswith("#")] == ids
    specs = [json.loads(text) for text in read_page.specs]
    assert len(specs) == len([a for _, a in read_page.tags if a.get("class") == "chart"]) > 10
    assert all("vega-lite/v6" in spec["$schema"] and spec["width"] == "container" for spec in specs)
    assert all(label for label in read_page.attributes("div", "aria-label"))


def with_a_value_each(of):
    return of | {"values": of["values"][:1]} if isinstance(of.get("values"), list) else of


def test_every_chart_is_as_vega_lites_schema_has_it(comparison, read_page):
    """Which is not checked when a page is made."""
    texts = [*read_page.specs, *(json.dumps(spec) for spec in specs_of(comparison).values())]
    for text in texts:
        validate_jsonschema(json.loads(text, object_hook=with_a_value_each), alt.load_schema())
    with pytest.raises(ValidationError):
        validate_jsonschema(json.loads(texts[0].replace('"axis"', '"axes"')), alt.load_schema())


def test_cells_show_rounded_and_sort_by_the_true_value(comparison, read_page):
    row = comparison.overview.iloc[0]
    shown = make_cell(row, "peak_effect", "+.3f")
    assert (shown.sort, shown.text) in [cell for cells in read_page.rows for cell in cells]
    assert float(shown.sort) == row["peak_effect"] != float(shown.text.split()[0])
    assert ("", UNKNOWN) in [cell for cells in read_page.rows for cell in cells]


@pytest.mark.parametrize(
    ("tests", "heading"), [(["prob"] * 2, "p of prob, corrected"), (["prob", "log_odds"], "p, corrected")]
)
def test_a_p_says_what_it_is_of(tmp_path, tests, heading):
    for name, tested in zip("ab", tests, strict=True):
        manifest = save_run(tmp_path / name, effects(6), weights=name) / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"statistics": {"tests": tested}}))
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path])], tmp_path)
    assert heading in tables.peaks_table(comparison).headings


def test_cells():
    row = {"below": -0.25, "unknown": np.nan, "mean": 0.5, "mean_low": np.nan, "mean_high": np.nan, "p": 0.00004}
    assert make_cell(row, "below", "+.1f").text == "−0.2" and make_cell(row, "unknown", ".3f").sort == ""
    assert make_cell(row, "mean", "+.3f").text == "+0.500"
    p = make_cell(row, "p", P_VALUE)
    assert p.text == "< 0.001" and float(p.sort) == 0.00004
    assert relative_address("javascript:alert(1)") == "./javascript%3Aalert%281%29"
    assert relative_address("//host/x") == "./host/x" and relative_address("../a b") == "../a%20b"


def test_labels():
    names = ["A/gray,limit=4,window=1", "A/gray,limit=4,window=3"]
    assert list(run_labels(names).values()) == ["window=1", "window=3"]
    assert run_labels(["a,b", "a"]) == {"a,b": "a,b", "a": "a"}
    assert run_labels(["x"]) == {"x": "x"}
    assert shorten_names(["a" * 30 + "1", "a" * 30 + "2"], 10) == {"a" * 30 + n: f"aaaa…aaaa{n}" for n in "12"}


def test_labels_are_the_names_with_their_slashes():
    names = ["s1/gray,limit=4,window=1", "s2/gray,limit=4,window=1", "s2/noise,limit=4,window=1"]
    assert list(run_labels(names).values()) == ["s1/gray", "s2/gray", "s2/noise"]
    assert run_labels(["a/b,c", "a/d,c", "a/d/e,c"])["a/d/e,c"] == "d/e"
    assert run_labels(["a/b,c=1", "d/b,c=2"]) == {"a/b,c=1": "a/c=1", "d/b,c=2": "d/c=2"}


@pytest.mark.parametrize("at", [0, 20, 40, 60, 99])
def test_shortened_names_keep_what_differs(at):
    names = [f"{'a' * at}{n}{'b' * (100 - at)}" for n in range(10)]
    short = list(shorten_names(names, 12).values())
    assert len(set(short)) == 10 and all(len(name) < 60 for name in short)
    assert shorten_names(["x" * 30, "y"], 12)["y"] == "y"


def test_every_run_is_an_entry_of_its_own_in_a_legend(tmp_path, monkeypatch):
    """Also where a PNG would have boxes for its letters."""
    groups = ["_a", "$a$", "a", "数据", "图像", "Данные"]
    for name in groups:
        save_run(tmp_path / name / "window=3", effects(6, 1), corruption=NOISE)
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path])], tmp_path)
    drawn = file_figures(comparison)
    (points,) = (layer for layer in layers_of(spec_of(drawn["grid"])) if layer.get("name") == "points")
    assert set(points["encoding"]["color"]["scale"]["domain"]) == set(groups)
    assert points["encoding"]["color"]["legend"]["labelLimit"] == 0
    monkeypatch.setattr(charts, "_has_glyph", lambda letter: letter < "\u2e80")
    save_figure(drawn["grid"], tmp_path / "grid")
    texts = {"".join(text.itertext()) for text in ElementTree.parse(tmp_path / "grid.svg").iter() if "text" in text.tag}
    assert texts >= set(groups)
    drawable = json.loads(charts._drawable(json.dumps(groups, ensure_ascii=False)))
    assert drawable == ["_a", "$a$", "a", r"\u6570\u636e", r"\u56fe\u50cf", "Данные"]
    (peaks,) = views_of(spec_of(drawn["peaks"]))
    assert len({row["row"] for row in peaks["data"]["values"]}) == len(groups)


def test_a_letter_that_no_font_has_is_known():
    assert charts._has_glyph("−") and not charts._has_glyph("\ue001")


def test_folders_of_one_name_are_groups_of_their_own(tmp_path):
    places = [tmp_path / place for place in ("a/x", "b/x", "c/x (1)")]
    for place in places:
        save_run(place / "run", effects(2, 1))
    assert len({found.name for found in find_runs(places)}) == 3


def _far(folder):
    """Runs of two depths, corruptions and windows in three folders, whose long names differ at both ends."""
    for group, depth in (("shallow", 6), ("deep", 12), ("again", 12)):
        for window in (1, 3) if group != "again" else (3,):
            for word, corruption in (("gray", {}), ("noise", {"corruption": NOISE})):
                name = f"corruption={word},model.path={'x' * 40}{group},window={window}"
                patches, images = rows(range(depth), window=window, depth=depth), 12 - 2 * (word == "noise")
                seed = len(group) * window
                save_run(
                    folder / group / name,
                    effects(depth, seed, images),
                    patches,
                    total=np.full(images, 0.3 + seed / 50),
                    depth=depth,
                    path=f"some/{depth}",
                    weights=f"w{depth}",
                    window=[window],
                    seed=seed,
                    **corruption,
                )
    groups = [folder / name for name in ("shallow", "deep", "again")]
    return compare_runs([load_run(run) for run in find_runs(groups)], folder)


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    return _far(tmp_path_factory.mktemp("far"))


@pytest.mark.long
def test_every_line_of_a_figure_is_in_its_legend(far, tmp_path):
    drawn = file_figures(far)
    for name, figure in drawn.items():
        assert FILES.fullmatch(f"{name}.svg")  # so that a later comparison removes it
        save_figure(figure, tmp_path / name)
        assert not reaches_the_edge(tmp_path / f"{name}.png"), name
    for name in ("relative_depth", "overlay_1", "overlay_2", "grid_2"):
        legends = set()
        for view in views_of(spec_of(drawn[name])):
            lines = {row["line"] for row in view["data"]["values"]}
            for layer in view["layer"]:
                for channel in ("color", "shape"):
                    encoding = layer["encoding"].get(channel, {})
                    if "scale" in encoding:
                        domain = encoding["scale"]["domain"]
                        assert lines <= set(domain) and len(set(domain)) == len(domain), name
                        assert encoding["legend"]["labelLimit"] == 0 and encoding["legend"]["symbolLimit"] > len(domain)
                        legends.add(tuple(domain))
                        assert encoding["legend"].get("values", domain) == [line for line in domain if line]
        assert len(legends) == 1 or name.startswith("overlay")


def test_lines_of_an_overlay_say_their_images(far):
    lines = [row["line"] for view in views_of(specs_of(far)["overlay_1"]) for row in view["data"]["values"]]
    assert all(("gray" in words) == words.endswith("(n = 12)") for words in lines)
    assert all(("noise" in words) == words.endswith("(n = 10)") for words in lines)


def test_total_effects_of_several_runs_have_their_colours(far):
    dashed = [
        layer
        for view in views_of(specs_of(far)["grid_2"])
        for layer in view["layer"]
        if layer["mark"].get("strokeDash")
    ]
    assert [len(layer["data"]["values"]) for layer in dashed] == [1, 2, 1, 2]
    for layer in dashed:
        colour = layer["encoding"]["color"]
        assert ("value" in colour) if len(layer["data"]["values"]) == 1 else colour["field"] == "line"


def test_a_legend_is_bounded_and_says_so(far, monkeypatch):
    monkeypatch.setattr(layout, "MAX_LINES", 3)
    specs = specs_of(far)

    def lines(view):
        return {row["line"] for row in view["data"]["values"]}

    (depth,) = views_of(specs["relative_depth"])
    assert len(lines(depth)) == 3 and "first 3 of 10" in " ".join(depth["title"]["subtitle"])
    assert [len(lines(view)) for view in views_of(specs["overlay_2"])] == [2, 3]
    assert "the first 3 of 4 lines" in " ".join(views_of(specs["overlay_2"])[1]["title"]["text"])


def test_figures_say_what_they_show_of_how_many_images(far):
    for name, spec in specs_of(far).items():
        title = spec["title"]
        assert title["text"] and any("n = 1" in line or "Spearman" in line for line in title["subtitle"]), name


def test_every_patch_is_in_one_panel(comparison):
    found = make_grids(comparison)
    rows = [row for grid in found for panel in grid.panels.values() for row in panel.index]
    assert sorted(rows) == list(comparison.profiles.index)
    assert len(found) == 3  # of two models, and of heads
    for grid in found:
        for panel in grid.panels.values():
            assert not panel.duplicated(["line", "layer"]).any()


def test_one_scale_and_hollow_markers(read_page):
    specs = [json.loads(text) for text in read_page.specs]
    profiles = [spec for spec in specs if spec["height"] == 170]
    scales = {
        json.dumps(layer["encoding"]["y"]["scale"]) for s in profiles for layer in s["layer"] if "near" in str(layer)
    }
    assert len(scales) == 1 and "domain" in scales.pop()
    clipped = [row for spec in profiles for row in spec["data"]["values"] if row["clipped"]]
    assert {row["layers"] for row in clipped} == {"0–1", "4–5"}


def test_a_single_run_has_no_empty_sections(tmp_path):
    one = Reader(page(single(tmp_path)))
    assert one.attributes("section", "id") == ["what", "grid", "heatmap", "peaks"]
    assert "relative_depth" not in file_figures(single(tmp_path / "again"))


def test_shares_of_both_directions_stand_on_one_axis(tmp_path):
    """Their effects have opposite signs, so they are in no common panel; one without a known share is left out."""
    effects = np.random.default_rng(0).random((6, 4))
    for name, direction, total in (("there", "denoise", 0.5), ("back", "noise", -0.5), ("none", "denoise", 0.0)):
        save_run(tmp_path / "x" / name, np.sign(total) * effects, total=np.full(6, total), direction=direction)
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path / "x"])], tmp_path)
    (shares,) = (figure for figure in make_figures(comparison) if figure.name == "shares")
    rows = shares.charts[0].drawing.rows
    expected = comparison.profiles.set_index(["run", "layer"])["recovered"]
    names = {"there": "gray, clean into corrupted (n = 6)", "back": "gray, corrupted into clean (n = 6)"}
    assert set(rows["line"]) == set(names.values())
    for run, line in names.items():
        values = rows[rows["line"] == line].set_index("layer")["value"]
        assert values.to_dict() == pytest.approx(expected[run].to_dict()) and values.mean() > 0
    grids = make_grids(comparison)
    assert {grid.title for grid in grids} == {"clean into corrupted", "corrupted into clean"}


def test_intervals_of_shares_beyond_the_scale_are_cut_and_have_arrows(tmp_path):
    for name, direction, sign in (("there", "denoise", 1), ("back", "noise", -1)):
        file = save_run(tmp_path / name, sign * effects(4), total=np.full(12, sign * 0.5), direction=direction)
        summary = pd.read_csv(file / "summary.csv")
        summary.loc[[0, 1], ["recovered_low", "recovered_high"]] = [[-np.inf, np.inf], [-0.2, 9]]
        summary.to_csv(file / "summary.csv", index=False)
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path])], tmp_path)
    (shares,) = (figure for figure in make_figures(comparison) if figure.name == "shares")
    drawing = shares.charts[0].drawing
    of_layer, (low, high) = drawing.rows.groupby("layer"), drawing.domain
    assert of_layer["low_beyond"].agg("all").tolist() == [True, False, False, False]
    assert of_layer["high_beyond"].agg("all").tolist() == [True, True, False, False]
    assert drawing.rows["low"].min() == low > -2 and drawing.rows["high"].max() == high < 3
    assert shares.charts[0].caption == "window 1; arrow: an interval goes on beyond the scale"
    assert [str(layer).count("'shape': 'arrow'") for layer in drawing.chart(300).to_dict()["layer"]].count(1) == 2


def test_of_a_run_with_many_series_the_largest_has_its_share(tmp_path):
    heads = pd.concat([rows(range(2), head=head, site="z") for head in range(30)], ignore_index=True)
    for name, direction, sign in (("there", "denoise", 1), ("back", "noise", -1)):
        values = 0.01 * np.ones((12, 60)) + 0.3 * (np.arange(60) == 15)  # head 7 of layer 1
        save_run(tmp_path / name, sign * values, heads, total=np.full(12, sign * 0.5), direction=direction)
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path])], tmp_path)
    (shares,) = (figure for figure in make_figures(comparison) if figure.name == "shares")
    words = ["gray, clean into corrupted h7 (n = 12)", "gray, corrupted into clean h7 (n = 12)"]
    assert sorted(shares.charts[0].drawing.lines) == words


def test_a_line_of_shares_keeps_its_words_where_there_are_several_windows(tmp_path):
    """Runs that differ only in their window are in no common chart, so they need no names of runs."""
    for window in (1, 3):
        for direction, sign in (("denoise", 1), ("noise", -1)):
            name = tmp_path / "x" / f"direction={direction},window={window}"
            options = {"patches": rows(range(4), window), "direction": direction, "window": [window]}
            save_run(name, sign * effects(4), total=np.full(12, sign * 0.5), **options)
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path / "x"])], tmp_path)
    (shares,) = (figure for figure in make_figures(comparison) if figure.name == "shares")
    assert [chart.caption for chart in shares.charts] == ["window 1", "window 3"]
    for chart in shares.charts:
        words = ["gray, clean into corrupted (n = 12)", "gray, corrupted into clean (n = 12)"]
        assert sorted(chart.drawing.lines) == words


@pytest.mark.parametrize(
    ("profiles", "domain"),
    [
        (([1, 2, 3, 4, 5], [1, 2, 3, 5, 4], [1, 2, 4, 3, 5]), [0.7, 1]),  # 0.9, 0.9 and 0.7
        (([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [1, 2, 3, 5, 4]), [-1, 0, 1]),
    ],
)
def test_ranks_are_on_a_scale_on_which_they_differ(tmp_path, profiles, domain):
    for name, profile in zip("abc", profiles, strict=True):
        save_run(tmp_path / "x" / name, np.tile(profile, (4, 1)) / 10)
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path / "x"])], tmp_path)
    cells_layer = specs_of(comparison)["rank_correlation"]["layer"][0]
    assert cells_layer["encoding"]["color"]["scale"]["domain"] == domain
    (figure,) = (figure for figure in make_figures(comparison) if figure.section == "rank")
    cells = figure.charts[0].drawing.rows
    assert cells.loc[cells["row"] == cells["column"], "value"].isna().all()
    assert [layer["mark"]["type"] for layer in figure.charts[0].spec["layer"]] == ["rect", "text"]


def test_a_peak_is_shown_with_the_layers_that_may_be_it(tmp_path):
    folder = save_run(tmp_path / "x" / "a", [[0.1, 0.2, 0.3, 0.2, 0.3]] * 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"peak_set": [0, 1, 2, 4]}))
    save_run(tmp_path / "x" / "b", [[0.1, 0.2, 0.3]] * 4)
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path / "x"])], tmp_path)
    (figure,) = (figure for figure in make_figures(comparison) if figure.section == "peaks")
    first, second = figure.charts[0].drawing.rows["row"]
    assert first.endswith(" (peak set: layers 0–2, 4)") and "peak set" not in second


def test_a_finding_is_read_first(tmp_path):
    manifest = save_run(tmp_path / "a", effects(6)) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"finding": ["One.", "Two < three."]}))
    read = Reader(page(compare_runs([load_run(run) for run in find_runs([tmp_path])], tmp_path)))
    assert read.attributes("section", "id")[0] == "found"
    assert "One. Two < three." in [text for cells in read.rows for _, text in cells]


def test_ranks_of_too_few_layers_are_no_figure(tmp_path):
    for name in "ab":
        save_run(tmp_path / name, effects(2), weights=name)
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path])], tmp_path)
    assert comparison.rank_correlation.isna().all(axis=None) and "rank_correlation" not in file_figures(comparison)


def test_images_within_the_budget(comparison, monkeypatch):
    made, _ = make_albums(comparison)
    assert len(made) == 1 and made[0].cards[0].name == EVIL
    monkeypatch.setattr(page_module, "IMAGE_BUDGET", 10)
    made, _ = make_albums(comparison)
    assert not made


def test_thumbnails_are_small():
    big = data_url(np.random.default_rng(0).integers(0, 255, (400, 300, 3)).astype(np.uint8))
    assert big.startswith("data:image/jpeg") and len(big) < 40_000
    assert data_url(np.zeros((32, 32, 3), np.uint8)).startswith("data:image/png")


def test_figures_of_hostile_runs(comparison, tmp_path):
    drawn = file_figures(comparison)
    wanted = {"grid_1", "grid_2", "grid_3", "overlay_1", "heatmap", "peaks", "rank_correlation", "relative_depth"}
    assert wanted | {"differences_recovered"} <= set(drawn)
    for name in ("grid_1", "heatmap", "relative_depth"):
        save_figure(drawn[name], tmp_path / name)
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(tmp_path / f"{name}.svg").iter()}
        assert "text" in tags and not {"script", "a"} & tags
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 400
        assert not reaches_the_edge(tmp_path / f"{name}.png")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png"] * 3 + [".svg"] * 3


def _specs(text, section):
    part = text[text.index(f'<section id="{section}"') :]
    return [json.loads(one) for one in Reader(part[: part.index("</section>")]).specs]


@pytest.fixture(scope="module")
def far_page(far):
    return page(far)


def test_every_line_of_a_chart_is_in_its_legend_by_a_name_of_its_own(far, far_page):
    for section, numbers in (("overlay", [2, 2, 2, 4] * 2), ("depth", [10])):
        specs = _specs(far_page, section)
        assert [len({row["line"] for row in spec["data"]["values"]}) for spec in specs] == numbers
        for spec in specs:
            colour = next(layer["encoding"]["color"] for layer in spec["layer"] if layer.get("name") == "points")
            lines = {row["line"] for row in spec["data"]["values"]}
            assert set(colour["scale"]["domain"]) == lines and colour["legend"]["labelLimit"] == 0
            assert all(re.search(r"[( ]n = 1[02]\)$", line) for line in lines)
    for section in ("heatmap", "rank"):
        (spec,) = _specs(far_page, section)
        axes = [spec["layer"][0]["encoding"][name] for name in "xy"]
        assert all(axis["axis"]["labelLimit"] == 0 for axis in axes) and len(set(axes[1]["sort"])) == len(far.runs)


def test_a_chart_of_many_lines_says_what_it_leaves_out(far, monkeypatch):
    monkeypatch.setattr(layout, "MAX_LINES", 3)
    text = page(far)
    assert "the first 3 of 10 lines" in text and "window 3; the first 3 of 4 lines" in text
    assert {len({row["line"] for row in spec["data"]["values"]}) for spec in _specs(text, "depth")} == {3}


def test_names_are_those_of_the_tables_with_their_slashes(far, far_page):
    words = "".join(Reader(far_page).words)
    assert far.runs[0].name.startswith("shallow/corruption=gray,")
    assert "shallow/corruption=gray" in words and "shallow,corruption" not in far_page


def test_total_effects_of_several_runs_are_in_their_lines_colours(far_page):
    found = {}
    for spec in _specs(far_page, "grid"):
        (dashed,) = (layer for layer in spec["layer"] if layer["mark"].get("strokeDash"))
        lines = [row["line"] for row in dashed["data"]["values"]]
        found.setdefault(len(lines), []).append(dashed["encoding"]["color"])
        assert set(lines) == {row["line"] for row in spec["data"]["values"]}
    assert set(found) == {1, 2} and all("value" in colour for colour in found[1])
    assert all(colour["field"] == "line" and len(colour["scale"]["domain"]) == 2 for colour in found[2])


def test_no_scale_is_of_nothing(read_page):
    """Vega warns of it, and numbers such an axis at random."""
    for spec in map(json.loads, read_page.specs):
        for layer in spec["layer"]:
            rows = (layer.get("data") or spec["data"])["values"]
            channels = [one for name, one in layer["encoding"].items() if name != "tooltip"]
            for channel in channels:
                if channel.get("type") == "quantitative" and "field" in channel:
                    assert any(row[channel["field"]] is not None for row in rows), channel


def test_a_cell_without_an_interval_has_no_dot(comparison):
    unknown = comparison.profiles.assign(effect_low=np.nan, effect_high=np.nan)
    for profiles, some in ((comparison.profiles.assign(effect_low=0.1, effect_high=0.2), True), (unknown, False)):
        drawn = make_figures(replace(comparison, profiles=profiles))
        (chart,) = next(figure.charts for figure in drawn if figure.section == "heatmap")
        assert any(row["sure"] for row in chart.spec["data"]["values"]) is some


def test_cells_of_heatmaps_lead_to_their_runs(far, far_page):
    folders = set(far.overview["folder"].map(lambda folder: relative_address(f"{folder}/")))
    for section in ("heatmap", "rank"):
        (spec,) = _specs(far_page, section)
        (found,) = (step["from"] for step in spec["transform"] if step.get("lookup") == "row")
        leads = {row["row"]: row["href"] for row in found["data"]["values"]}
        assert {row["row"] for row in spec["data"]["values"]} == set(leads)
        assert set(leads.values()) == folders and len(leads) == len(folders)
        assert all(layer["encoding"]["href"]["field"] == "href" for layer in spec["layer"])
    (spec,) = _specs(far_page, "peaks")
    leads = {row["run"]: row["href"] for row in spec["data"]["values"]}
    assert leads == {row["run"]: relative_address(f"{row['folder']}/") for row in far.overview.to_dict("records")}


def test_an_album_says_how_many_images_it_shows(comparison, monkeypatch):
    (run,) = (run for run in comparison.runs if run.folder.pages.exists())
    (image,) = run.pages[0].images
    chosen = [replace(image, example_id=i, name=f"image {i}") for i in range(6)]
    pages = ExamplePage("sorted", "6 images from the largest to the smallest effect", chosen)
    monkeypatch.setattr(FinishedRun, "pages", property(lambda of: [pages] if of is run else []))
    (album,), _ = make_albums(comparison)
    assert album.chosen == "4 of 6 images from the largest to the smallest effect"
    assert [card.name for card in album.cards] == ["image 0", "image 2", "image 3", "image 5"]
    monkeypatch.setattr(page_module, "IMAGES_A_RUN", 6)
    (album,), _ = make_albums(comparison)
    assert len(album.cards) == 6 and album.chosen == pages.chosen


@pytest.mark.long
def test_forty_runs_fit(tmp_path):
    for i in range(40):
        corruption = NOISE | {"std": i // 4 / 10 + 0.1}
        save_run(tmp_path / f"std={i // 4},seed={i % 4}", effects(12, i), depth=12, seed=i % 4, corruption=corruption)
    comparison = compare_runs([load_run(run) for run in find_runs([tmp_path])], tmp_path)
    write_page(comparison, make_figures(comparison), tmp_path / "index.html")
    assert (tmp_path / "index.html").stat().st_size < 5_000_000
    assert not list(tmp_path.glob(".*"))
    words = "".join(Reader((tmp_path / "index.html").read_text()).words)
    assert "300 of 780 rows; all are in differences.csv" in words


@pytest.mark.long
def test_a_page_too_large_says_what_it_leaves_out(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_BYTES", len(page(comparison).encode()) - 1)
    write_page(comparison, make_figures(comparison), tmp_path / "index.html")
    smaller = Reader((tmp_path / "index.html").read_text())
    assert smaller.attributes("section", "id") == SECTIONS[:-1]
    assert "so that the page stays small: gallery." in "".join(smaller.words)


def test_heads_are_dots_of_one_colour(read_page):
    specs = [json.loads(text) for text in read_page.specs]
    dots = [spec for spec in specs if len({row.get("line") for row in spec["data"]["values"]}) > 8]
    points = [layer["encoding"] for spec in dots for layer in spec["layer"] if "shape" in layer["encoding"]]
    assert points and all("value" in encoding["color"] for encoding in points)


def test_json_cannot_end_its_element():
    assert "<" not in script_json(EVIL) and json.loads(script_json(EVIL)) == EVIL


def test_vega_is_made_once_and_wherever_nothing_can_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda: "made")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert vega_bundle() == "made"
    (kept,) = (tmp_path / "cache" / "vitpatch").iterdir()
    assert kept.name == f"vega-{version('vl-convert-python')}.js"
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda: "made again")
    assert vega_bundle() == "made"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert vega_bundle() == "made again"


def test_scripts_are_as_published():
    vega, sortable, own = page_scripts()
    assert vega == vl_convert.javascript_bundle() and "expressionInterpreter" in vega
    assert sortable.encode() == (ASSETS / "sortable.auto.min.js").read_bytes()
    assert hashlib.sha256(sortable.encode()).hexdigest() == SORTABLE, "change README.md and this digest with it"
    assert not any("</script" in script.lower() or "<!--" in script for script in (vega, sortable, own))
