"""What is said of a run is of what ran: its corruption, where that plays a part, and its doubt."""

from itertools import product

import numpy as np
import pytest
from hand_made import NOISE, save_run

from vitpatch.checks import read_inclusion
from vitpatch.compare.load import find_runs
from vitpatch.compare.overview import overview_table
from vitpatch.corruptions.base import Gray, as_corruption
from vitpatch.formatting import data_name, model_name
from vitpatch.plots import style
from vitpatch.runs.reading import load_run
from vitpatch.runs.setup import prepare
from vitpatch.study import View
from vitpatch.types import BaseRun, Direction, Donor, Estimate, Metric, base_run_of


@pytest.mark.parametrize(("donor", "direction"), list(product(Donor, Direction)))
def test_a_corruption_plays_a_part_where_its_run_does(donor, direction):
    def said(metric=Metric.PROB, rival=BaseRun.CORRUPT, include="all"):
        return View(metric=metric, rival=rival, include=read_inclusion(include)).shows_corruption(donor, direction)

    is_patched = BaseRun.CORRUPT in (direction.recipient, base_run_of(donor, direction))
    assert said() == said(include="clean_correct") == said(Metric.LOGIT_DIFF, BaseRun.CLEAN) == is_patched
    for chosen in ("flipped", "min_total_effect:0.1"):
        assert said(include=chosen)
    assert said(Metric.LOGIT_DIFF, BaseRun.CORRUPT)


@pytest.mark.parametrize(
    ("overrides", "corruption"),
    [
        ((), "gray"),
        (("direction=noise",), "gray"),
        (("donor=same_class",), "gray"),
        (("donor=same_class", "direction=noise"), ""),
        (("donor=zero",), ""),
        (("donor=zero", "include=flipped"), "gray"),
        (("donor=other_class", "direction=noise", "metric=logit_diff"), "gray"),
        (("donor=other_class", "direction=noise", "metric=logit_diff", "rival=clean"), ""),
    ],
)
def test_a_title_names_a_corruption_that_plays_a_part(config, overrides, corruption):
    words = prepare(config(*overrides)).title.split(" · ")
    assert words[0] == "vit on images" and words[1] == (corruption or "attn_out")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "clean into corrupted"),
        (("direction=noise",), "corrupted into clean"),
        (("donor=zero",), "zeros into clean"),
        (("donor=same_class",), "another image of its class, clean, into corrupted"),
        (("corruption=noise", "direction=noise"), "corrupted into clean"),
    ],
)
def test_a_title_says_what_is_put_into_what(config, overrides, words):
    """The direction "noise" is not taken for the corruption."""
    assert prepare(config(*overrides)).title.split(" · ")[-1] == words


def test_names_of_models_and_data_are_what_a_reader_knows_them_by():
    folders = {
        "google/vit-base": "vit-base",
        "/home/me/thesis_vit": "thesis_vit",
        "multirun/train/seed=1/model": "seed=1",  # as train_eval.py saves it
        "/cache/models--google--vit-base/snapshots/0ab1": "vit-base",
        "model": "model",
    }
    assert {path: model_name({"path": path}) for path in folders} == folders
    assert model_name({"path": "google/vit-base", "name": "ours"}) == "ours"
    files = {"photos/test.parquet": "photos/test", "photos/birds.parquet": "birds", "photos": "photos"}
    files |= {"photos/*.parquet": "photos", "uoft-cs/cifar10": "cifar10", "/data/birds/train": "birds/train"}
    source = {"_target_": "vitpatch.data.sources.ParquetImages"}
    assert {path: data_name(source | {"path": path}) for path in files} == files
    assert data_name(source | {"path": "photos", "name": "my birds"}) == "my birds"


def test_given_names_are_in_the_title_and_in_no_identity(config):
    plain, named = prepare(config()), prepare(config("model.name=ours", "data.name=birds"))
    assert named.title.startswith("ours on birds · ") and named.run_id == plain.run_id


def test_so_does_the_comparison(tmp_path):
    save_run(tmp_path / "x" / "own", np.full((4, 3), 0.1), corruption=NOISE)
    save_run(tmp_path / "x" / "zero", np.full((4, 3), 0.1), corruption=NOISE, donors=["zero"], direction="noise")
    table = overview_table([load_run(run) for run in find_runs([tmp_path / "x"])], tmp_path).set_index("run")
    assert table.loc["own", ["corruption", "strength"]].tolist() == ["noise", "std=0.2"]
    assert table.loc["zero", ["corruption", "strength"]].tolist() == ["none: zero as donor", ""]


@pytest.mark.parametrize(
    ("donor", "direction", "says"),
    [
        (Donor.PAIR, Direction.DENOISE, style.DOES_NOT_MOVE),
        (Donor.PAIR, Direction.NOISE, style.DOES_NOT_MOVE),
        (Donor.SAME_CLASS, Direction.NOISE, style.DOES_NOT_DIFFER),
        (Donor.SAME_CLASS, Direction.DENOISE, style.NO_MORE_THAN),
        (Donor.OTHER_CLASS, Direction.NOISE, style.NO_MORE_THAN),
    ],
)
def test_doubt_is_of_the_corruption_where_it_is_what_differs(donor, direction, says):
    assert style.doubt_words(Estimate(0.0, 0.1, -0.2, 0.2), donor, direction) == says
    assert style.doubt_words(Estimate(0.5, 0.1, 0.3, 0.7), donor, direction) == ""


def darken(batch, seed, by=0.5):
    return batch.images * by


def test_errors_name_a_function_that_is_a_corruption():
    from functools import partial

    assert [as_corruption(of).option_name for of in (Gray(), darken, partial(darken, by=0.1), partial(Gray))] == [
        *("gray", "darken", "darken", "gray"),
    ]


def test_titles_know_the_corruptions_of_this_package():
    from vitpatch import corruptions, formatting

    classes = {name for name in corruptions.__all__ if issubclass(getattr(corruptions, name), corruptions.Corruption)}
    assert {*formatting.OWN_CORRUPTIONS, "Corruption"} == classes
