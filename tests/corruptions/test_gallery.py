"""The contact sheet: which rows it has, what is drawn in a cell, and what is wrong in a line."""

import numpy as np
import pytest
import torch
from composed import option, option_names
from conftest import pictures

from vitpatch.cli import gallery
from vitpatch.corruptions.base import as_corruption
from vitpatch.errors import VitPatchError
from vitpatch.runs.config import construct, corruption_option


@pytest.fixture(scope="module")
def batch():
    return gallery.scenes(seed=0)


def test_every_class_has_a_row_and_no_strength_two():
    displayed = gallery.displayed_options()
    options = {name: option("corruption", name)._target_ for name in option_names("corruption")}
    unseen = {"vitpatch.corruptions.Identity", "vitpatch.corruptions.EmbeddingNoise"}
    assert {options[name] for name in displayed} == set(options.values()) - unseen
    assert "noise" in displayed and not {"noise_low", "noise_high", "occlude_half", "none"} & set(displayed)


def test_a_row_is_clean_and_rising_and_each_cell_is_what_its_title_says(batch):
    figure = gallery.sheet(["noise", "phase_scramble", "background_swap"], batch, seed=0)
    titles = [ax.get_title() for ax in figure.axes]
    rising = [f"std {share} of [0, 1]" for share in ("0.25", "0.5", "0.75", "1")]
    assert titles[:7] == ["", "clean", "noise: std 0.2 of [0, 1]", *rising]
    assert titles[10:14] == ["width 45°", "width 90°", "width 135°", "width 180°"]
    assert [text.get_text() for text in figure.axes[14].texts] == ["background_swap\nkind=other_class"]
    option = corruption_option("noise", "corruption")
    for cell, strength in ((2, option.std), (4, 0.5)):
        option.std = strength
        want = as_corruption(construct(option)).pixels(batch, 0)
        drawn = torch.from_numpy(np.asarray(figure.axes[cell].images[0].get_array())).permute(2, 0, 1)
        for i in range(len(batch)):
            left = i * 34 + 1
            assert torch.equal(drawn[:, :, left : left + 32], want[i])


def test_a_row_that_cannot_be_drawn_says_why(batch):
    from dataclasses import replace

    figure = gallery.sheet(["silhouette"], replace(batch, masks=None), seed=0)
    said = figure.axes[2].texts[0].get_text().replace("\n", " ")
    assert "silhouette needs object masks" in said and "name their column with --mask-column" in said


def test_the_sheet_is_written(batch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gallery, "displayed_options", lambda: ["gray"])
    gallery.main([str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").stat().st_size > 5000 and capsys.readouterr().out == f"{tmp_path / 'sheet.png'}\n"


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("sheet.gif", r"sheet.gif: expected a file name that ends in .png, .svg, .pdf"),
        ("sheet", r"sheet: expected a file name that .*"),
        ("none/sheet.png", r"sheet.png: there is no folder .*none; make it first"),
        ("folder.png", r"folder.png: cannot be written \(Is a directory\)"),
    ],
)
def test_a_wrong_path_is_one_line(out, says, tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(gallery, "displayed_options", lambda: ["gray"])
    with pytest.raises(SystemExit, match=f"^error: .*{says}$"):
        gallery.main([str(tmp_path / out)])
    with pytest.raises(VitPatchError):
        gallery.write(tmp_path / "sheet.png", seed=-1)


def test_ones_own_images_are_drawn_as_squares(tmp_path):
    for i, picture in enumerate(pictures(4, size=64)):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        picture.resize((90, 64)).save(tmp_path / f"class{i % 2}" / f"{i}.png")
    batch = gallery.own_images(str(tmp_path), seed=0)
    assert batch.images.shape == (3, 3, gallery.SIDE, gallery.SIDE) and batch.masks is None
    figure = gallery.sheet(["blur", "silhouette"], batch, 0, "photos")
    assert figure.get_suptitle().endswith(f"on photos of {gallery.SIDE} × {gallery.SIDE} pixels")
    assert figure.axes[3].get_title().startswith("sigma ") and figure.axes[2].get_title().startswith("blur: sigma ")
    assert "needs object masks" in figure.axes[7 + 2].texts[0].get_text().replace("\n", " ")
    with pytest.raises(SystemExit, match=r"^error: --data-path .*nowhere: no such folder"):
        gallery.main([str(tmp_path / "sheet.png"), "--data-path", str(tmp_path / "nowhere")])


def test_loose_images_are_drawn_and_those_that_cannot_be_read_are_left_out(tmp_path, capsys):
    for i, picture in enumerate(pictures(3, size=24)):
        picture.save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    batch = gallery.own_images(str(tmp_path), seed=0)
    assert batch.ids.tolist() == [0, 2] and not batch.partners
    for i in (0, 2):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"^error: --data-path .*: none of its first 3 images can be read$"):
        gallery.main([str(tmp_path / "sheet.png"), "--data-path", str(tmp_path)])


def test_help_is_short_and_says_what_is_drawn(capsys):
    with pytest.raises(SystemExit):
        gallery.main(["--help"])
    out = capsys.readouterr().out
    assert "OUT.png" in out and "--seed" in out and len(out.splitlines()) < 20
