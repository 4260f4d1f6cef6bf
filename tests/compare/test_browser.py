"""The page in a real browser, where there is one: chromium, from the system."""

import shutil
from urllib.parse import unquote

import pytest
from compared_by_hand import effects, example_pages, hostile
from hand_made import save_run

from vitpatch.compare.compare import compare_runs
from vitpatch.compare.figures import make_figures
from vitpatch.compare.load import find_runs
from vitpatch.compare.page import write_page
from vitpatch.runs.reading import load_run, write_pages

pytestmark = pytest.mark.long
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    comparison = hostile(folder)
    write_page(comparison, make_figures(comparison), folder / "comparison" / "index.html")
    return folder / "comparison" / "index.html"


@pytest.fixture(scope="module")
def in_log_odds(tmp_path_factory):
    """A page of effects in log odds, to both sides of 0, of which images have no scale given."""
    folder = tmp_path_factory.mktemp("log_odds")
    for name, sign in (("direction=denoise,data.limit=12", 1), ("direction=noise,data.limit=12", -1)):
        run = save_run(folder / name, sign * effects(6), depth=6, metric="log_odds", seed=sign)
        write_pages(run / "pages.parquet", example_pages(6))
    comparison = compare_runs([load_run(run) for run in find_runs([folder])], folder / "comparison")
    (folder / "comparison").mkdir()
    write_page(comparison, make_figures(comparison), folder / "comparison" / "index.html")
    return folder / "comparison" / "index.html"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as tools:
        # in a container the browser's own sandbox has no rights; the page is ours
        started = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, file):
    """Opens the page with a context's options; ``said`` is all that it complained of or asked for."""
    contexts = []

    def open_page(file=file, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: said.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        return page, [line for line in said if not line.startswith(("data:", file.as_uri()))]

    yield open_page
    for context in contexts:
        context.close()


def test_charts_are_drawn_without_a_complaint_or_a_request(opened):
    page, said = opened()
    assert said == []
    charts, drawn = page.locator(".chart").count(), page.locator(".chart svg").count()
    assert charts == drawn > 10
    assert page.locator(".chart summary").count() == 0  # no menu that leads elsewhere


def test_nothing_is_warned_of_where_no_scale_is_given(opened, in_log_odds):
    page, said = opened(file=in_log_odds)
    assert said == [] and page.locator("#gallery .chart svg").count() == 2


def test_an_axis_of_both_signs_numbers_0(opened, in_log_odds):
    for width in (390, 700, 1280):
        page, _ = opened(file=in_log_odds, viewport={"width": width, "height": 800})
        ticks = page.locator("#peaks .chart svg .role-axis-label text").all_text_contents()
        assert {"0", "0.0", "0.00"} & set(ticks) and (width < 700 or any(tick.startswith("−") for tick in ticks)), (
            width,
            ticks,
        )


@pytest.mark.parametrize("of", ["#heatmap .layer_0_marks", "#rank .layer_0_marks", "#peaks .layer_3_marks"])
def test_a_click_on_a_mark_leads_to_its_run(opened, in_log_odds, of):
    page, _ = opened(file=in_log_odds)
    # a dot lies on the cell's middle, and leads there too
    page.locator(f"{of} path").first.click(force=True)
    folder = in_log_odds.parents[1] / "direction=denoise,data.limit=12"
    page.wait_for_url(lambda url: unquote(url) == f"file://{folder}/")


def test_a_click_sorts_by_the_true_value(opened):
    page, _ = opened()
    table = page.locator("#peaks table")
    names = table.locator("thead th").all_inner_texts()
    column = next(i for i, name in enumerate(names) if name.startswith("effect"))

    def order():
        cells = table.locator("tbody tr").evaluate_all(
            "(rows, at) => rows.map((row) => row.cells[at].dataset.sort)", column
        )
        return [float(cell) for cell in cells]

    before = order()
    table.locator("thead th").nth(column).click()
    page.wait_for_timeout(50)
    assert order() == sorted(before, reverse=True) != before
    table.locator("thead th").nth(column).press("Enter")
    page.wait_for_timeout(50)
    assert order() == sorted(before)


def test_hover_says_layer_and_value(opened):
    page, _ = opened(viewport={"width": 1200, "height": 900})
    chart = page.locator("#grid .chart svg").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    words = tooltip.inner_text()
    assert "layer" in words and "effect [95 %]" in words and "[" in words


def test_dark_differs_and_follows_the_system(opened):
    light, _ = opened(color_scheme="light")
    dark, said = opened(color_scheme="dark")
    assert said == []

    def colours(page):
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return paper, page.locator("#grid .chart svg text").first.get_attribute("fill")

    assert colours(light)[0] != colours(dark)[0] and colours(light)[1] != colours(dark)[1]
    dark.emulate_media(color_scheme="light")
    dark.wait_for_selector("html[data-drawn=light]", state="attached")
    assert colours(light) == colours(dark)


def test_a_phone_scrolls_boxes_not_the_page(opened):
    page, _ = opened(viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#peaks .scroll").evaluate_all("(all) => all.some((e) => e.scrollWidth > e.clientWidth)")


def test_a_phone_has_names_and_peaks_whole(opened):
    page, _ = opened(viewport={"width": 390, "height": 844})
    ends = "(all) => all.map((e) => e.getBoundingClientRect().right)"
    assert max(page.locator("#peaks .chart svg").evaluate_all(ends)) <= 390
    assert max(page.locator("caption span").evaluate_all(ends)) <= 390
    broken = """(all) => all.flatMap((cell) => [...cell.childNodes].filter((e) => e.nodeType === 3 && e.data.trim()))
        .filter((text) => {
          const range = document.createRange();
          range.selectNodeContents(text);
          return text.data.trim().length <= 18 && range.getClientRects().length > 1;
        }).map((text) => text.data)"""
    assert page.locator("#peaks tbody th").evaluate_all(broken) == []


def test_a_pair_is_picked(opened):
    page, _ = opened()
    select = page.locator("#differences select").first
    options = select.locator("option").all_inner_texts()
    drawing = page.locator("#differences .chart svg").first
    before = drawing.inner_html()
    select.select_option(options[-1])
    page.wait_for_timeout(200)
    assert len(options) > 1 and drawing.inner_html() != before
