"""A run that was stopped goes on from its batches, and ends in the same bytes; numbers of two runs are never mixed."""

import dataclasses
import json
import logging
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, pictures, save_model, write_parquet
from run_files import results

from vitpatch.errors import VitPatchError
from vitpatch.runs import batches as batches_module
from vitpatch.runs import calibration, setup
from vitpatch.runs.folder import Shards
from vitpatch.runs.predict import PatchingModule


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


class Stopped(Exception):
    """What stops a run in these tests."""


@pytest.fixture
def batches(monkeypatch):
    """The batches that are computed, a list of their images' ids each; ``batches.stop(k)``: the run stops after k."""

    class Batches(list):
        left = None

        def stop(self, after):
            self.clear()
            self.left = after

        def go_on(self):
            self.clear()
            self.left = None

    seen = Batches()
    step, write = PatchingModule.predict_step, PatchingModule.on_predict_batch_end

    def counted(self, batch, *rest):
        seen.append([] if batch[0] is None else batch[0].ids.tolist())
        return step(self, batch, *rest)

    def stops(self, *everything):
        if seen.left is not None and len(seen) > seen.left:
            raise Stopped
        return write(self, *everything)

    monkeypatch.setattr(PatchingModule, "predict_step", counted)
    monkeypatch.setattr(PatchingModule, "on_predict_batch_end", stops)
    return seen


@pytest.fixture
def stopped(patched, batches, tmp_path):
    """Makes a run that stops after some batches; then ``patched`` goes on with it. Its folder."""

    def make(*overrides, after=1, folder="run"):
        batches.stop(after)
        with pytest.raises(Stopped):
            patched(*overrides, folder=folder)
        batches.go_on()
        return tmp_path / folder

    return make


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder for what is made once of the run without overrides: ``whole``, and ``stopped`` after two batches."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def whole(patched, batches, kept):
    """The files of the undisturbed run without overrides."""
    if not (kept / "whole").exists():
        shutil.copytree(patched(folder="whole"), kept / "whole")
        batches.clear()
    return results(kept / "whole")


@pytest.fixture
def finished(whole, kept, tmp_path):
    """The folder of the undisturbed run without overrides; its files are ``whole``."""
    return shutil.copytree(kept / "whole", tmp_path / "run")


@pytest.fixture
def stopped_after_two(stopped, kept, tmp_path):
    """The folder of the run without overrides, stopped after two batches."""
    if not (kept / "stopped").exists():
        shutil.copytree(stopped(after=2, folder="made"), kept / "stopped")
    return shutil.copytree(kept / "stopped", tmp_path / "run")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Overrides of a parquet folder with training images beside the 13 that are patched."""
    folder = tmp_path_factory.mktemp("splits")
    write_parquet(folder / "test.parquet", pictures(13), [i % CLASSES for i in range(13)])
    write_parquet(folder / "train.parquet", pictures(9, seed=1), [i % CLASSES for i in range(9)])
    return f"data.path={folder}", "data.split=test"


@pytest.mark.parametrize(
    ("overrides", "after"),
    [
        ((), 1),
        (("window=1",), 2),  # with its controls
        (("synergy=true",), 1),
        (("donor=mean",), 1),
        (("corruption=embedding_noise", "corruption.draws=2"), 1),
        (("corruption=embedding_noise", "corruption.scale=channel"), 1),
        (("corruption=noise", "calibrate=prob_drop:0.05", "corruption.std=0.9"), 1),
        (("corruption=other_image",), 2),
        (("target=z",), 1),
        (("metric=kl", "include=clean_correct"), 0),
    ],
)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(patched, stopped, batches, splits, overrides, after):
    whole = patched(*splits, *overrides, folder="whole")
    assert len(batches) == 3
    folder = stopped(*splits, *overrides, after=after)
    assert not (folder / "manifest.json").exists()
    patched(*splits, *overrides)
    assert batches == [list(range(13))[n * 5 : n * 5 + 5] for n in range(after, 3)]  # no image twice
    assert results(folder) == results(whole)
    assert ("leave_outs.parquet" in results(whole)) == ("synergy=true" in overrides)
    there, here = manifest_of(whole), manifest_of(folder)
    for passing in ("seconds", "images_per_second", "plan", "calibration"):
        assert (passing in there) == (passing in here)
        there.pop(passing, None), here.pop(passing, None)
    assert there == here


@pytest.mark.parametrize(
    "overrides",
    [
        ("corruption=noise", "calibrate=prob_drop:0.05", "corruption.std=0.9"),
        ("corruption=embedding_noise",),
        ("donor=mean",),
        (),
    ],
)
def test_the_first_starts_batch_size_is_kept(patched, stopped, batches, splits, caplog, monkeypatch, overrides):
    sizes = []
    for module in (calibration, batches_module):
        read = module.training_batches
        monkeypatch.setattr(
            module, "training_batches", lambda of, size, read=read: sizes.append(size) or read(of, size)
        )
    whole = patched(*splits, *overrides, folder="whole")
    folder = stopped(*splits, *overrides)
    with caplog.at_level(logging.INFO):
        patched(*splits, *overrides, "batch_size=2")
    assert [len(ids) for ids in batches] == [5, 3] and set(sizes) <= {5}  # of training images too
    assert "batch_size is 5, as the run began with" in caplog.text
    assert results(folder) == results(whole)


def test_threads_are_kept(patched, stopped, monkeypatch, caplog):
    """Sums are rounded by them."""
    before, seen = torch.get_num_threads(), []
    step = PatchingModule.predict_step
    monkeypatch.setattr(
        PatchingModule, "predict_step", lambda *args: seen.append(torch.get_num_threads()) or step(*args)
    )
    try:
        torch.set_num_threads(3)
        stopped()
        torch.set_num_threads(2)
        with caplog.at_level(logging.INFO):
            patched()
        assert set(seen) == {3} and torch.get_num_threads() == 2
        assert "3 threads a process, as the run began with, not 2" in caplog.text
    finally:
        torch.set_num_threads(before)


def test_sizes_of_calls_are_kept_where_they_fit(patched, stopped, monkeypatch, caplog):
    from vitpatch.patching import cost

    sizes = []
    limits = cost.Cost.limits

    def noted(*arguments, **more):
        sizes.append((lambda r: (r.images, r.rows))(limits(*arguments, **more)))
        return limits(*arguments, **more)

    monkeypatch.setattr(cost.Cost, "limits", noted)
    tight = cost.LIBRARIES / cost.GB + 0.002
    whole = patched(f"memory_gb={tight}", folder="whole")
    folder = stopped(f"memory_gb={tight}")
    patched("memory_gb=4")
    assert len(set(sizes)) == 1 and results(folder) == results(whole), sizes
    sizes.clear()
    stopped("memory_gb=4", folder="other")
    with caplog.at_level(logging.WARNING):
        patched(f"memory_gb={tight}", folder="other")
    assert len(set(sizes)) == 2 and "less memory is free than when the run began" in caplog.text


def test_the_error_of_reduced_precision_is_the_first_batchs(patched, stopped, splits):
    reduced = [*splits, "trainer.precision=bf16-mixed"]
    whole = patched(*reduced, folder="whole")
    folder = stopped(*reduced)
    patched(*reduced)
    assert results(folder) == results(whole)
    assert manifest_of(folder)["precision_error"] == manifest_of(whole)["precision_error"] != None  # noqa: E711


@pytest.fixture
def some_unreadable(tmp_path):
    """13 images, of which 1, 10, 11 and 12 are none: a batch of 5 has one, the last has nothing else."""
    path = write_parquet(tmp_path / "unreadable.parquet", pictures(13), [i % CLASSES for i in range(13)])
    table = pd.read_parquet(path)
    for row in (1, 10, 11, 12):
        table.at[row, "image"] = {"bytes": b"GIF89a nothing", "path": f"cat{row}.gif"}
    schema = pq.read_schema(path)
    pq.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False), path)
    return f"data.path={path}"


@pytest.mark.parametrize("after", [1, 2])
def test_images_that_cannot_be_read_are_counted_once(patched, stopped, some_unreadable, caplog, after):
    skipping = [some_unreadable, "data.on_error=skip"]
    whole = patched(*skipping, folder="whole")
    folder = stopped(*skipping, after=after)
    with caplog.at_level(logging.INFO):
        patched(*skipping)
    assert "4 of 13 images could not be read" in caplog.text
    assert manifest_of(folder)["counts"] == manifest_of(whole)["counts"]
    assert manifest_of(folder)["counts"]["dropped"] == {"unreadable": 4}
    assert results(folder) == results(whole)


def test_after_an_unreadable_image_it_goes_on_without_it(patched, batches, some_unreadable, tmp_path):
    table = pd.read_parquet(some_unreadable.partition("=")[2])
    readable = table["image"][2]
    table.at[1, "image"] = readable  # the first batch is done before the run stops
    path = tmp_path / "late.parquet"
    schema = pq.read_schema(some_unreadable.partition("=")[2])
    pq.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False), path)
    late = f"data.path={path}"
    whole = patched(late, "data.on_error=skip", folder="whole")
    with pytest.raises(VitPatchError, match="on_error=skip leaves it out"):
        patched(late)
    folder = whole.parent / "run"
    assert set(Shards(folder / "shards").done()) == {0, 1}
    batches.clear()
    patched(late, "data.on_error=skip")
    assert len(batches) == 1 and results(folder) == results(whole)
    manifest = manifest_of(folder)
    assert manifest["run_id"] == manifest_of(whole)["run_id"] and manifest["counts"]["dropped"] == {"unreadable": 3}


def test_a_run_that_left_images_out_is_another_than_one_that_would_not(patched, stopped, some_unreadable):
    stopped(some_unreadable, "data.on_error=skip")
    with pytest.raises(VitPatchError, match=r'selection.on_error \("skip" there, "raise" here\)'):
        patched(some_unreadable)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "a bit of a shard": ("effects-00000001.parquet", _flip),
    "half a shard": ("examples-00000001.parquet", _halve),
    "no shard": ("effects-00000001.parquet", lambda path: path.unlink()),
    "an empty record": ("batch-00000001.json", lambda path: path.write_bytes(b"")),
    "half a record": ("batch-00000001.json", _halve),
    "no text": ("batch-00000001.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "another value": ("batch-00000001.json", lambda path: path.write_text("[]")),
    "no files": ("batch-00000001.json", lambda path: path.write_text('{"files": {}}')),
    "other files": ("batch-00000001.json", lambda path: path.write_text('{"files": null}')),
    "one letter of a record": (
        "batch-00000001.json",
        lambda path: path.write_text(path.read_text().replace('"bad": []', '"bad": [[7, ""]]')),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_found_and_computed_again(patched, whole, stopped_after_two, batches, caplog, damage):
    folder = stopped_after_two
    name, harm = DAMAGE[damage]
    harm(folder / "shards" / name)
    with caplog.at_level(logging.WARNING):
        patched()
    said = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert said == ["batch 1: its shard is damaged on the disk; it is computed again"]
    assert [ids[0] for ids in batches] == [5, 10]
    assert results(folder) == whole


@pytest.mark.parametrize(
    "harm",
    [
        _halve,
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.write_text(path.read_text().replace('"batch_size": 5', '"batch_size": 6')),
    ],
)
def test_without_how_it_began_a_run_is_begun_anew(patched, whole, stopped_after_two, batches, caplog, harm):
    folder = stopped_after_two
    harm(folder / "shards" / "begun.json")
    with caplog.at_level(logging.WARNING):
        patched()
    said = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(said) == 1 and "begun.json" in said[0] and "computed again" in said[0], said
    assert len(batches) == 3 and results(folder) == whole


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("effects-00000002.parquet", _flip),
        ("examples-00000002.parquet", lambda path: path.unlink()),
        ("batch-00000002.json", _halve),
        ("batch-00000002.json", lambda path: path.unlink()),  # whose images would be lost
    ],
)
def test_damage_after_the_last_batch_is_an_error_that_the_same_command_mends(
    patched, whole, batches, tmp_path, monkeypatch, name, harm
):
    merge = Shards.merge

    def damaged(self, *arguments):
        harm(self.path / name)
        merge(self, *arguments)

    batches.clear()
    with monkeypatch.context() as once:
        once.setattr(Shards, "merge", damaged)
        with pytest.raises(VitPatchError, match=rf"{name}: damaged on the disk, or gone; the same command"):
            patched()
    folder = tmp_path / "run"
    assert not (folder / "manifest.json").exists()
    batches.clear()
    patched()
    assert [ids[0] for ids in batches] == [10] and results(folder) == whole


@pytest.mark.parametrize(
    ("overrides", "differ"),
    [
        (("seed=1",), r"seed \(0 there, 1 here\)"),
        (("window=[1,3]", "controls=false"), r"window \(\[3\] there, \[1, 3\] here\)"),
        (("data.limit=12",), r"data \("),
        (("seed=1", "window=1", "target=mlp_out", "direction=noise", "metric=kl"), "and 2 more"),
    ],
)
def test_an_unfinished_run_of_other_settings_is_refused_or_replaced(patched, stopped, batches, overrides, differ):
    folder = stopped("window=3", after=2)
    before = {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}
    with pytest.raises(VitPatchError, match=rf"holds an unfinished run with other .*{differ}.*overwrite=true"):
        patched("window=3", *overrides)
    assert not batches and {path.name: path.read_bytes() for path in (folder / "shards").iterdir()} == before
    patched("window=3", *overrides, "overwrite=true")
    assert len(batches) == 3
    assert results(folder) == results(patched("window=3", *overrides, folder="whole"))


def test_a_run_that_was_stopped_may_go_on_in_another_view(patched, stopped, batches):
    """What is computed is the same: its files are those of a run that was asked for in that view from the start."""
    view = "metric=logit_diff", "rival=clean", "include=clean_correct", "interval=bca"
    whole = patched("window=1", *view, folder="whole")
    folder = stopped("window=1", "include=flipped", after=2)
    patched("window=1", *view)
    assert batches == [[10, 11, 12]] and results(folder) == results(whole)


def test_an_unfinished_run_of_an_earlier_version_is_refused_or_replaced(patched, stopped):
    """Its batches lack what a reading in another view needs; the view was then part of its identity."""
    folder = stopped()
    shards = Shards(folder / "shards")
    begun = shards.begun()
    earlier = begun.identity | {"metric": "prob", "rival": "corrupt", "include": "all"}
    shards.write_begun(dataclasses.replace(begun, run_id="earlier", identity=earlier))
    with pytest.raises(VitPatchError, match=r"unfinished run of an earlier version, whose batches lack columns"):
        patched()
    patched("overwrite=true")
    assert (folder / "manifest.json").exists()


def test_a_finished_run_of_an_earlier_version_is_the_same_run(patched, caplog):
    """Where its identity, without the view, is the same."""
    folder = patched()
    manifest = manifest_of(folder)
    view, _ = manifest.pop("view"), manifest.pop("view_id")
    manifest |= {"identity": manifest["identity"] | view, "run_id": "of an earlier version"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.INFO):
        patched()
    assert "finished before" in caplog.text and manifest_of(folder) == manifest
    with pytest.raises(VitPatchError, match=r"finished run with other window \(\[3\] there, \[2\] here\);"):
        patched("window=2")


def test_other_weights_and_another_version_of_the_numbers_are_named(patched, stopped, tmp_path, monkeypatch):
    folder = stopped()
    other = save_model(tmp_path / "other", "vit", seed=1)
    with pytest.raises(VitPatchError, match=r"unfinished run with other weights \("):
        patched(f"model.path={other}")
    monkeypatch.setattr(setup, "NUMBERS_VERSION", setup.NUMBERS_VERSION + 1)
    with pytest.raises(VitPatchError, match=r"unfinished run with other numbers_version \(\d+ there, \d+ here\)"):
        patched()
    monkeypatch.undo()
    assert (folder / "shards" / "batch-00000000.json").exists()


def test_overwrite_goes_on_with_an_unfinished_run_of_the_same_settings(patched, whole, stopped_after_two, batches):
    patched("overwrite=true")
    assert len(batches) == 1 and results(stopped_after_two) == whole


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), _flip])
@pytest.mark.parametrize("name", ["examples.parquet", "effects.parquet", "summary.csv"])
def test_a_finished_run_whose_files_are_not_whole_is_no_finished_run(patched, whole, finished, batches, name, harm):
    folder = finished
    harm(folder / name)
    with pytest.raises(VitPatchError, match=rf"{name} of the finished run: gone, or not as written; overwrite=true"):
        patched()
    assert not batches and (folder / "manifest.json").exists()
    patched("overwrite=true")
    assert results(folder) == whole


def test_overwrite_begins_a_finished_run_anew(patched, whole, finished, batches, stopped):
    folder = finished
    patched("overwrite=true")
    assert len(batches) == 3 and results(folder) == whole
    stopped("overwrite=true", after=2)
    assert not (folder / "manifest.json").exists() and not (folder / "examples.parquet").exists()
    patched("overwrite=true")  # as the same command is given again
    assert len(batches) == 1 and results(folder) == whole
