"""A finished run read in another view is the run as it had been made in it: every table, to the bit."""

import json
import logging
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import DEPTH, ROOT
from run_files import results

import vitpatch
from vitpatch.compare.load import find_runs
from vitpatch.errors import VitPatchError
from vitpatch.runs.reading import FinishedRun, load_run

EARLIER = ROOT / "tests" / "compare" / "finished_runs"


def assert_equal(read, made):
    """Two tables, to the bit."""
    pd.testing.assert_frame_equal(read, made, check_exact=True)


def as_csv(table):
    return table.to_csv(index=False)


VIEWS = [
    ((), {"metric": "log_odds"}),
    ((), {"metric": "kl", "include": "clean_correct"}),
    (("direction=noise",), {"metric": "kl"}),
    (("direction=noise", "synergy=true", "window=3"), {"metric": "logit", "interval": "bca"}),
    ((), {"metric": "logit_diff", "rival": "clean", "test": "headline"}),
    (("rival=clean", "metric=logit_diff", "donor=same_class", "window=2"), {"rival": "corrupt"}),
    (("metric=log_odds", "include=flipped"), {"metric": "prob", "include": "min_total_effect:0.01"}),
    (("donor=zero", "metric=logit"), {"metric": "log_odds"}),
]


def check_by_hand(run):
    """Effects are a metric less the recipient's, and who is included follows from the rule, by plain formulas."""
    view, examples, effects = run.view, run.examples, run.effects
    recipient = {"denoise": "corrupt", "noise": "clean"}[run.config["direction"]]
    of_image = examples.assign(kl_clean=np.float32(0)).set_index("example_id")
    base = of_image.loc[effects["example_id"], f"{view.metric}_{recipient}"].to_numpy()
    donors = [f"_{donor}" for donor in run.donors[1:]]
    for end in ("", *donors):
        np.testing.assert_array_equal(effects[f"effect{end}"], effects[f"{view.metric}{end}"] - base)
    if donors:
        every = examples[f"{view.metric}_all_layers"].to_numpy() - of_image[f"{view.metric}_{recipient}"].to_numpy()
        np.testing.assert_array_equal(examples["effect_all_layers"], every)
    right = examples["pred_clean"] == examples["label"]
    damage = of_image[f"{view.metric}_clean"] - of_image[f"{view.metric}_corrupt"]
    rules = {"all": True, "clean_correct": right, "flipped": right & (examples["pred_corrupt"] != examples["label"])}
    rules["min_total_effect"] = damage.to_numpy() >= (view.include.least or 0)
    has_partner = examples.get(f"partner_{run.donor}", 0) >= 0 if run.donor.partner else True
    assert (examples["included"] == (rules[view.include.rule] & has_partner)).all()


@pytest.mark.parametrize(("overrides", "changes"), VIEWS)
def test_what_is_read_is_what_would_have_been_made(patched, overrides, changes):
    """Runs are with controls, at window 1, where they have any."""
    overrides = ["window=1", "data.limit=8", *overrides]
    asked = [f"{key}={value}" for key, value in changes.items()]
    made = load_run(patched(*overrides, *asked, folder="made"))
    folder = patched(*overrides)
    before = results(folder)
    read = load_run(folder).read(**changes)
    assert as_csv(read.summary) == (made.folder.summary).read_text()
    assert_equal(read.examples, made.examples)
    assert_equal(read.effects, made.effects)
    check_by_hand(read)
    if made.result.marginals is not None:
        assert_equal(read.result.marginals, made.result.marginals)
    ours, theirs = (dict(json.loads(json.dumps(run.manifest))) for run in (read, made))
    for own in ("files", "seconds", "images_per_second", "plan"):  # of the folder
        ours.pop(own), theirs.pop(own)
    assert ours == theirs
    assert results(folder) == before


def test_the_images_of_its_pages_stay_and_their_curves_are_read(patched):
    run = load_run(patched("window=1"))
    read = run.read(metric="log_odds", include="clean_correct")
    effects, examples = read.effects, read.examples.set_index("example_id")
    right = examples["pred_clean"] == examples["label"]
    assert len(read.pages) == sum(any(right[image.example_id] for image in page.images) for page in run.pages) > 0
    before_of = {page.name: page for page in run.pages}
    for page, before in ((page, before_of[page.name]) for page in read.pages):
        kept = [image for image in before.images if right[image.example_id]]
        here = f", {len(kept)} of them here" * (len(kept) < len(before.images))
        assert page.chosen == f"chosen on prob of all images: {before.chosen}{here}"
        for image, old in zip(page.images, kept, strict=True):
            assert (image.example_id, image.name, image.predicted) == (old.example_id, old.name, old.predicted)
            assert all(np.array_equal(image.pictures[base], old.pictures[base]) for base in image.pictures)
            assert image.base == {base: examples[f"log_odds_{base}"][image.example_id] for base in image.base}
            patched_runs = effects.loc[effects["example_id"] == image.example_id, "log_odds"]
            assert image.patched == pytest.approx(patched_runs.to_numpy(), abs=1e-5) and len(image.patched) == DEPTH


def test_of_another_interval_tables_stay_as_they_are_written(patched):
    run = load_run(patched("window=1", "data.limit=6"))
    assert run.read() is run and run.read(metric="prob").view == run.view
    read = run.read(interval="bca")
    assert read.tables.is_as_written and read.view.view_id != run.view.view_id
    assert not read.summary["effect_low"].equals(run.summary["effect_low"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "loss"}, "^metric 'loss': expected one of prob, log_odds, logit, logit_diff, kl$"),
        ({"include": "some"}, "^include 'some': expected all, clean_correct, flipped or min_total_effect:x"),
        ({"include": "min_total_effect:2"}, "^include min_total_effect:2: none of 6 images is"),
        ({"rival": "both"}, "^rival 'both': expected clean or corrupt"),
        ({"window": 3}, "^window: is not how a run is read; there are metric, rival, include, interval, test$"),
        ({"metrik": "prob"}, "^metrik: is not how a run is read; did you mean metric"),
    ],
)
def test_what_cannot_be_read_is_said_as_of_a_run(patched, changes, says):
    run = load_run(patched("window=2", "data.limit=6"))
    with pytest.raises(VitPatchError, match=says):
        run.read(**changes)


def test_kl_of_the_noise_direction_is_not_tested(patched):
    run = load_run(patched("window=2", "data.limit=6", "direction=noise"))
    with pytest.raises(VitPatchError, match="metric=kl, direction=noise: effects are ≥ 0 by construction"):
        run.read(metric="kl", test="headline")


def test_a_run_is_loaded_from_python(patched):
    """Without torch: that a comparison, which imports the same, needs none is shown by the walks."""
    folder = patched("window=1", "data.limit=6")
    run = vitpatch.load_run(str(folder))
    assert isinstance(run, FinishedRun) and run.name == "run" and run.finding == run.manifest.get("finding", [])
    assert_equal(run.effects, pd.read_parquet(folder / "effects.parquet"))
    assert_equal(run.examples, pd.read_parquet(folder / "examples.parquet"))
    assert list(run.images) == ["largest", "sorted", "random"] and len(run.summary) == DEPTH
    assert run.images["random"][0].pictures["clean"].shape == (32, 32, 3)


def test_what_is_no_finished_run_is_one_line(patched, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(
            VitPatchError, match=f"^{folder}: no (finished run of this version is in it|such folder); give a run's$"
        ):
            load_run(folder)
    run = patched("data.limit=4")
    (run / "effects.parquet").write_bytes(b"PAR1")
    with pytest.raises(VitPatchError, match="a file is broken"):
        load_run(str(run))


def test_the_same_run_in_another_view_is_read_instead_of_computed(patched, monkeypatch, caplog):
    folder = patched("window=1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    made = load_run(patched("window=1", "metric=log_odds", "include=clean_correct", folder="made"))
    monkeypatch.setattr("vitpatch.runs.run.predict", None)  # nothing is computed
    with caplog.at_level(logging.INFO):
        patched("window=1", "metric=log_odds", "include=clean_correct")
    view = folder / "views" / made.view.view_id
    assert "it is read at metric=log_odds (it is at prob), include=clean_correct (it is at all)" in caplog.text
    assert f"{view}\n" in caplog.text and made.finding[0] in caplog.text
    assert {path: path.read_bytes() for path in before} == before
    assert (view / "summary.csv").read_bytes() == (made.folder.path / "summary.csv").read_bytes()
    assert json.loads((view / "view.json").read_text())["total_effect"] == made.manifest["total_effect"]
    assert list((view / "figures").iterdir()) == []  # which a test of vitpatch-compare looks at
    assert [location.folder.path for location in find_runs([folder])] == [folder]  # a view is no run


def test_what_overwrites_a_run_removes_its_views(patched):
    folder = patched("data.limit=4")
    patched("data.limit=4", "interval=bca")
    assert len(list((folder / "views").iterdir())) == 1
    patched("data.limit=4", "interval=bca", "overwrite=true")
    assert not (folder / "views").exists() and load_run(folder).view.interval == "bca"


def test_a_run_of_an_earlier_version_is_read_as_far_as_it_stored_what_is_needed(tmp_path):
    """It has its controls in prob and log_odds alone, and ``logit_diff`` against one rival."""
    folder = shutil.copytree(EARLIER / "gray", tmp_path / "gray")
    run = load_run(folder)
    read = run.read(metric="log_odds", include="clean_correct")
    effects, examples = read.effects, read.examples
    apart = effects["log_odds"].to_numpy().reshape(6, 12) - examples["log_odds_corrupt"].to_numpy()[:, None]
    kept = (examples["pred_clean"] == examples["label"]).to_numpy()
    assert read.summary["effect"].to_numpy() == pytest.approx(apart[kept].mean(0), abs=1e-6) and 0 < kept.sum() < 6
    assert (read.manifest["view"]["metric"], read.manifest["counts"]["included"]) == ("log_odds", kept.sum())
    for changes, column in (({"metric": "logit"}, "logit_"), ({"rival": "clean"}, "other_rival")):
        with pytest.raises(VitPatchError, match=rf"cannot be read with .*did not store {column}\w*; run it again \(ov"):
            run.read(**changes)
