"""How a sweep's runs are called: by what is swept, no two the same, whatever is swept and however it is typed."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from vitpatch.cli.commands import quote_names
from vitpatch.cli.sweep_record import SweepRecord, as_value, check_same_settings, make_record
from vitpatch.errors import VitPatchError
from vitpatch.names import LONGEST_NAME, SWEEP_FILE, name_runs, run_name
from vitpatch.runs import run
from vitpatch.runs.config import check_names_are_text

CLEAN = re.compile(r"[A-Za-z0-9=,._-]{1,120}")
LONG = "a_very_long_name_of_a_folder/" * 8


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["window=3", "corruption=gray", "data.limit=4"], "corruption=gray,window=3"),  # in the sweep's order
        (["corruption=gray", "+window=3"], "corruption=gray,window=3"),
        (["corruption=gray"], "corruption=gray"),
        (["window=[1,3]"], "window=1_3"),  # a comma is between keys only
        (["window='a b/c'"], "window=a_b_c"),
        (["window={a:1}"], "window=a_1"),
        (["data.limit=4"], "default"),
        (["window=3", "corruption.x=1"], "window=3,corruption.x=1"),  # a sweeper's own
    ],
)
def test_a_name_is_what_is_swept(overrides, name):
    assert run_name(overrides, {"swept": ["corruption", "window"], "fixed": ["data.limit"], "alike": []}) == name


def test_where_nobody_knows_the_other_runs_what_is_replaced_has_a_digest():
    overrides = ["window=1", "corruption=gray", "logger=none", "trainer.devices=1", "batch_size=8", "sweep=x"]
    assert run_name(overrides) == "window=1,corruption=gray"
    assert run_name([]) == "default"
    odd = [run_name([f"data.path={path}"]) for path in ("a/b", "a b", "a_b", "ü", "é", "[a]", "a", LONG, f"{LONG}x")]
    assert len(set(odd)) == len(odd) and all(CLEAN.fullmatch(name) for name in odd)
    assert odd[2] == "data.path=a_b"


@pytest.mark.parametrize(
    "values",
    [
        ["a/b", "a_b"],
        ["a b", "'a_b'", "a/b", "a\\\\b"],
        ["数据", "图像"],
        ["Данные", "Снимки", "_"],
        ["Cat", "cat", "CAT"],
        ["é", "e\u0301", "_"],
        ["[1,3]", "[1_3]", "{1:3}", "1_3"],
        ["3", "[3]", "'3'"],
        ["a.", "a"],
        [f"{LONG}1", f"{LONG}2", f"x{LONG}1"],
        [f"1{LONG}", f"2{LONG}"],
        ["''", "' '"],
    ],
)
def test_no_two_names_are_alike_on_any_disk(values):
    jobs = [[f"model.path={value}"] for value in values]
    names = list(name_runs(jobs, {}).values())
    assert len({name.casefold().rstrip(".") for name in names}) == len(values), names
    assert all(CLEAN.fullmatch(name) and not name.endswith(".") for name in names)
    record = SweepRecord(["model.path"], [], "", dict(zip(names, jobs, strict=True)))
    naming = OverridesParser.create().parse_override(f"x={as_value(record.naming())}").value()
    assert [run_name(job, naming) for job in jobs] == names  # in a job, by what its config holds


def test_what_is_alike_has_digests_and_others_do_not():
    names = list(name_runs([["a=x/y"], ["a=x_y"], ["a=z/z"]], {}).values())
    assert [re.sub("-[0-9a-f]{8}$", "-#", name) for name in names] == ["a=x_y-#", "a=x_y-#", "a=z_z"]


def test_a_name_that_is_too_long_keeps_what_is_short_and_ends():
    (name,) = name_runs([[f"model.path=/{LONG}epoch_3", "window=3", "data.split=test"]], {}).values()
    assert len(name) == LONGEST_NAME and name.endswith("epoch_3,window=3,data.split=test"), name


def test_a_name_of_many_keys_has_values_for_those_that_it_has(tmp_path):
    many = ["corruption=gray", "window=3", "model=hf", f"model.path={LONG}", "data=imagefolder", f"data.path={LONG}x"]
    many += ["data.limit=100", "data.label_column=label", "target=attn_out", "target.layers=[0,3]", "seed=3"]
    record, (name,) = start(tmp_path, *many)
    assert CLEAN.fullmatch(name) and name.startswith("corruption=gray,window=3,model=hf,model.path="), name
    parts = [part.partition("=") for part in name.split(",")]
    assert len(parts) >= 6 and all(len(value) >= 8 or f"{key}={value}" in many for key, _, value in parts), name
    _, (other,) = start(tmp_path, *many[:-1], "seed=4", before=record)  # differs in a key that is left out
    assert CLEAN.fullmatch(other) and other != name and other.startswith("corruption=gray,window=3,"), other


def start(folder, *overrides, before=None):
    """A start of a sweep: its record, and its runs' names; runs that were there before have begun."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    jobs = [job for chunk in BasicSweeper.split_arguments(parsed, None) for job in chunk]
    record = make_record(parsed, jobs, before)
    return record, [run_name(job, record.naming()) for job in jobs]


def test_a_sweep_goes_on_with_more_or_fewer_values_in_any_order(tmp_path):
    first, names = start(tmp_path, "model.path=a/b,c", "window=1,3", "data.limit=4", "batch_size=8")
    assert names == [f"model.path={m},window={w}" for m in ("a_b", "c") for w in (1, 3)]
    for again in (
        ["window=1,3,5", "model.path=a/b,a_b,c", "data.limit=4", "batch_size=16", "logger=none"],
        ["data.limit=4", "window=3", "model.path=c"],
        ["data.limit=4", "model.path=choice(a/b)", "window=range(1,4)"],
    ):
        record, more = start(tmp_path, *again, before=first)
        check_same_settings(tmp_path, first, record)
        assert record.swept == ["model.path", "window"] and len(set(more)) == len(more)
        assert set(more) & set(names), more  # what is finished is found
        assert all(CLEAN.fullmatch(name) for name in more)
    record, more = start(tmp_path, "model.path=a_b", "window=1", "data.limit=4", before=first)
    assert re.fullmatch("model.path=a_b,window=1-[0-9a-f]{8}", *more)  # not the folder of a/b


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["window=1,3", "data.limit=5"], "its runs have data.limit=4, this command data.limit=5"),
        (["window=1,3"], "its runs have data.limit=4, this command no data.limit"),
        (["window=1", "data.limit=4", "seed=1"], "its runs have no seed, this command seed=1"),
        (["window=1", "data.limit=4,8"], "its runs have data.limit=4, this command several data.limit"),
        (["window=1", "data.limit=4", "++corruption=blur"], "its runs have no corruption, this command ++corruption"),
        (["window=1", "data.limit=4", "metric=kl"], "--metric kl reads them so; to compute again choose another name"),
    ],
)
def test_a_start_with_other_fixed_settings_is_refused_in_a_line(tmp_path, overrides, says):
    first, _ = start(tmp_path, "window=1,3", "data.limit=4", "overwrite=true", "trainer.devices=2")
    with pytest.raises(VitPatchError, match=re.escape(says)):
        check_same_settings(tmp_path, first, start(tmp_path, *overrides, before=first)[0])


def test_keys_that_are_swept_are_in_the_name_and_where_none_is_all_are(tmp_path):
    assert start(tmp_path, "batch_size=8,16", "window=3")[1] == ["batch_size=8", "batch_size=16"]
    assert start(tmp_path, "window=3", "data.limit=4", "logger=none")[1] == ["window=3,data.limit=4"]
    assert start(tmp_path)[1] == ["default"]
    first, _ = start(tmp_path, "window=3", "data.limit=4")
    assert start(tmp_path, "window=5", "data.limit=4", before=first)[1] == ["window=5,data.limit=4"]


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("data.path=2024_11_28", "2024_11_28"),
        ("sweep=2024_11_28", "2024_11_28"),
        ("model.path=1_1_1", "1_1_1"),
        ("model.revision=1e5", "1e5"),
        ("model.revision=0x10", "0x10"),
        ("data.split=007", "007"),
        ("data.split=2024", "2024"),
        ("data.split=-1", "-1"),
        ("data.name=nan", "nan"),
        ("data.path=inf", "inf"),
        ("data.path=true", "true"),
        ("data.path=on", "on"),
        ("data.path=null", None),  # nothing, as conf writes it
        ("data.path='1_0'", "1_0"),
        ("data.path= 1_0 ", "1_0"),
        ("data.label_column=1", "1"),
        ("data.path=multirun/s/window=3/x", "multirun/s/window=3/x"),
        ("data.classes=[1_000,3,cat,true]", ["1_000", 3, "cat", "true"]),
        ("data.classes=3", 3),
        ("data.label_map={cat:1_0,dog:3,cow:null}", {"cat": "1_0", "dog": 3, "cow": None}),
        ("data.label_map={1:2}", {1: 2}),
        ("window=1_0", 10),
        ("data.path=${x}", "${x}"),
        ("data.path=/数据/Снимки é", "/数据/Снимки é"),
    ],
)
def test_a_name_is_what_was_typed(override, read):
    value = OverridesParser.create().parse_override(quote_names(override)).value()
    assert value == read and type(value) is type(read)


@pytest.mark.parametrize(
    ("override", "jobs"),
    [
        ("data.path=2024_11_28,1e5,x", ["2024_11_28", "1e5", "x"]),
        ("data.path=choice(1_0,true)", ["1_0", "true"]),
        ("data.path=a=1,b", ["a=1", "b"]),
        ("data.path=数据,图像,x", ["数据", "图像", "x"]),
        ("model.path=w=1/x,w=3/x", ["w=1/x", "w=3/x"]),
    ],
)
def test_names_that_are_swept_are_what_was_typed(override, jobs):
    parser = OverridesParser.create()
    override = parser.parse_override(quote_names(override))
    key = override.get_key_element()
    assert [parser.parse_override(f"{key}={one}").value() for one in override.sweep_string_iterator()] == jobs


def test_what_hydra_cannot_be_told_is_a_line():
    with pytest.raises(VitPatchError, match=r"data.label_map: Hydra reads its key 1_000 as 1000; write"):
        quote_names("data.label_map={1_000:cat}")
    assert quote_names("data.path=[") == "data.path=["  # Hydra says so


@pytest.mark.parametrize("text", ["path: 2024_11_28", "path: yes", "path: 0x10", "path: 1.5", "path: 1:30"])
def test_a_number_in_a_yaml_file_is_a_line(text):
    with pytest.raises(VitPatchError, match=r"data.path .*: a name is expected.* path: '…'"):
        check_names_are_text(OmegaConf.create({"data": OmegaConf.create(text)}))


@pytest.fixture
def sweeps(cli, monkeypatch, tmp_path):
    """A sweep whose runs only write down their configs: exit code, what was printed, config by folder."""
    found = {}

    def make(cfg, path, options):
        found[path.name] = OmegaConf.to_container(cfg, resolve=True) | {"variables": dict(os.environ)}
        (path / "manifest.json").write_text(json.dumps({"seconds": 1.0, "config": {}}))

    monkeypatch.setattr(run, "run", make)
    monkeypatch.chdir(tmp_path)

    def call(*overrides, name="s"):
        found.clear()
        return *cli("-m", f"sweep={name}", *overrides), dict(found)

    return call


def test_every_job_has_the_folder_of_its_name_and_no_variable_of_one_wandb_run(sweeps, tmp_path, monkeypatch):
    left = ["WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"]
    for name in (*left, "WANDB_PROJECT"):
        monkeypatch.setenv(name, "left-over")
    given = ["data.path=a/b,A_b,数据,2024_11_28", "+data.x=choice(1)", "corruption=glob(gray*)"]
    code, printed, found = sweeps(*given, name="2024_11_28")
    assert code == 0 and f"4 of 4 runs finished in {Path('multirun', '2024_11_28')}" in printed, printed
    assert [config["data"]["path"] for config in found.values()] == ["a/b", "A_b", "数据", "2024_11_28"]
    known = json.loads((tmp_path / "multirun" / "2024_11_28" / "sweep.json").read_text())
    assert known["swept"] == ["data.path", "data.x", "corruption"] and set(known["runs"]) == set(found)
    assert known["fixed"] == ["sweep='2024_11_28'"] and "corruption=glob(gray*)" in known["command"]
    assert printed.count("ids of their own") == 1 and "WANDB_RUN_ID" in printed
    for config in found.values():
        assert not {*left} & set(config["variables"]) and "WANDB_PROJECT" in config["variables"]


def test_a_sweep_of_an_experiment_is_named_by_its_parameters(sweeps):
    code, _, found = sweeps("experiment=cifar10_color")
    assert code == 0 and set(found) == {"window=1", "window=3"}
    code, printed, _ = sweeps("experiment=cifar10_windows")
    assert code == 1 and printed.count("error: ") == 1 and "its runs have experiment=cifar10_color" in printed
    code, _, found = sweeps("experiment=cifar10_windows", "window=1,3", "overwrite=true")  # all of its runs
    assert code == 0 and set(found) == {"window=1", "window=3"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=0,1", "hydra.sweep.subdir=w${window}"], "the runs seed=0 and seed=1 would be in one folder, w3"),
        (["sweep=a,b"], "sweep: several names"),
        (["sweep=null"], "sweep 'None': expected the name of a folder"),
    ],
)
def test_a_sweep_that_would_lose_a_run_does_not_start(sweeps, tmp_path, overrides, says):
    code, printed, found = sweeps(*overrides)
    assert code == 1 and not found and printed.count("error: ") == 1 and says in printed, printed
    assert not (tmp_path / "multirun").exists()


def test_folders_of_ones_own_may_be_deep_and_a_value_given_twice_is_one_run(sweeps):
    code, printed, _ = sweeps("window=1,3,1", "hydra.sweep.subdir=w/${window}/x")
    assert code == 0 and "2 of 2 runs finished" in printed, printed
    rows = [line.split()[:2] for line in printed.splitlines() if line.startswith("w/")]
    assert rows == [["w/1/x", "finished"], ["w/3/x", "finished"]]


def test_a_record_of_which_nothing_was_computed_is_none(tmp_path):
    record = SweepRecord(["window"], ["seed=1"], "python patch.py", {"window=1": ["window=1"]})
    record.write(tmp_path)
    assert SweepRecord.read(tmp_path) is None
    (tmp_path / "window=1" / "shards").mkdir(parents=True)
    assert SweepRecord.read(tmp_path) == record
    (tmp_path / SWEEP_FILE).write_text("{")
    assert SweepRecord.read(tmp_path) is None
    assert (ROOT / "conf" / "hydra" / "vitpatch.yaml").read_text().count("${run_name:${hydra.overrides.task},") == 1
