"""``vitpatch.show``: a run and its table say the same, by the run's own rules; what is shown is text, not markup."""

import base64
import io
import re
from dataclasses import replace

import pytest
from measured import table_of
from PIL import Image

import vitpatch
from vitpatch import VitPatchError


def places(words):
    """Layer and head of each row that is printed."""
    return [line.split()[:2] for line in words.partition("\n\n")[2].splitlines() if re.match(r" +\d", line)]


def test_a_run_and_its_table_say_what_the_run_said(patched):
    run = vitpatch.load_run(patched("target=z", "target.layers=[0,2]", "controls=false", "direction=noise"))
    shown, of_table = vitpatch.show(run), vitpatch.show(table_of(run))
    assert list(shown.finding) == run.finding and shown.title == run.manifest["title"]
    assert list(of_table.finding) == [
        words.replace("Gray", "The corruption").replace("gray", "the corruption") for words in run.finding
    ]
    assert shown.title.endswith(of_table.title) and of_table.title == "z by head · window 1 · corrupted into clean"
    assert of_table.summary.equals(shown.summary) and shown.notes == tuple(run.manifest["notes"])
    printed = str(of_table)
    assert printed.startswith(f"{of_table.title}\n  {of_table.finding[0][:40]}") and places(printed)[5] == ["2", "1"]
    assert max(map(len, printed.splitlines())) <= 100 and len(places(printed)) == 8
    rows = shown.summary.loc[shown.summary.index.repeat(4)].reset_index(drop=True)
    four = replace(shown, result=replace(shown.result, summary=rows))
    weakest = shown.summary.loc[shown.summary["effect"].abs().idxmin(), ["layer", "head"]]
    assert "The 24 largest of 32 effects; .summary has all." in str(four) and len(places(str(four))) == 24
    assert [str(number) for number in weakest] not in places(str(four))


def test_a_notebook_is_given_text_and_a_picture(patched, tmp_path):
    run = vitpatch.load_run(patched("controls=false"))
    shown = vitpatch.show(run)
    shown.save(tmp_path / "profile.pdf", width=3.3)
    page = re.search(rb"/MediaBox *\[ *0 0 ([\d.]+) ", (tmp_path / "profile.pdf").read_bytes())
    assert float(page[1]) == pytest.approx(3.3 * 72, abs=0.1)
    shown.save(tmp_path / "profile.png", dpi=40)
    with Image.open(tmp_path / "profile.png") as picture:
        assert picture.width == round(40 * shown.figure.get_figwidth())
    with pytest.raises(VitPatchError, match=r"profile.gif: its ending 'gif': expected one of png, svg, pdf"):
        shown.save("profile.gif")
    html = vitpatch.show(replace(run, manifest=run.manifest | {"title": "a<b>", "notes": ["<script>"]}))._repr_html_()
    assert "<h4>a&lt;b&gt;</h4>" in html and "&lt;script&gt;" in html and "<script>" not in html and "<b>" not in html
    png = base64.b64decode(re.search(r"base64,([^\"]+)\"", html)[1])
    assert Image.open(io.BytesIO(png)).width > 300 and html.count("<tr") == 5 and len(html) < 2e5
    table = table_of(run)
    for given, words in (
        ([1], "show: got list"),
        (vitpatch.summarize(table), "show: the table lacks direction; give what vitpatch.patch returned"),
        (table.assign(site=["attn_out", "mlp_out"] * (len(table) // 2)), "show: site attn_out, mlp_out; give the rows"),
    ):
        with pytest.raises(VitPatchError, match=words):
            vitpatch.show(given)
