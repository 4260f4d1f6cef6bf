import inspect
import shlex
from pathlib import Path

import pytest
from composed import composed, option, option_names
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import OmegaConf

from vitpatch.errors import VitPatchError
from vitpatch.runs.config import (
    PATCH_GROUPS,
    SWEEP_VARIABLE,
    PatchKeys,
    asset,
    check_keys,
    construct,
    sweep_stamp,
    typed,
)
from vitpatch.study import read_study

GROUPS = ("model", "data", "corruption", "target", "trainer", "logger", "architecture")
OPTIONS = [(group, name) for group in GROUPS for name in option_names(group)]
HYDRAS = {"_target_", "_partial_"}


@pytest.mark.parametrize("value", ["/a/b-1.0", "/a/x=1,y=2/m", "/a/it's (1)/m", "/a b/$x", "a\\b", "ü;&"])
def test_what_is_to_be_typed_is_read_as_it_was(value):
    (word,) = shlex.split(typed("model.path", value))
    assert OverridesParser.create().parse_override(word).value() == value


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_and_has_the_keys_of_its_class(group, name):
    keys = option(group, name)
    if name == "none" and group == "architecture":
        assert not keys
        return
    target = get_object(keys._target_)
    parameters = inspect.signature(target).parameters
    ours = keys._target_.startswith("vitpatch.")
    if ours:
        assert set(keys) - HYDRAS == set(parameters), keys._target_
    elif not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        own = {"timeout"} if group == "trainer" else set()  # taken by vitpatch.runs.trainer, not by Lightning
        assert set(keys) - HYDRAS - own <= set(parameters), keys._target_


def test_an_option_repeats_nothing_of_the_one_that_it_starts_from():
    files = {(group, name): OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml") for group, name in OPTIONS}
    starts = {(group, name): file.pop("defaults")[0] for (group, name), file in files.items() if "defaults" in file}
    assert len(starts) > 40
    for (group, name), base in starts.items():
        values, own = (OmegaConf.to_container(cfg, resolve=False) for cfg in (option(group, base), files[group, name]))
        assert not [key for key in own if key in values and own[key] == values[key]], f"{group}={name}"


def test_an_option_of_ones_own_starts_from_another_in_any_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [hf, _self_]\npath: a/b\n")
    hf, mine = (composed("patch", f"model={name}", f"hydra.searchpath=[file://{tmp_path}]") for name in ("hf", "mine"))
    assert dict(mine.model) == dict(OmegaConf.merge(hf.model, {"path": "a/b"}))
    assert list(mine.model) == list(hf.model)


@pytest.mark.parametrize("key", ["recipe", "augment"])
def test_training_keys_are_those_of_their_class(key):
    keys = composed("train_eval")[key]
    assert set(keys) - HYDRAS == set(inspect.signature(get_object(keys._target_)).parameters)


@pytest.mark.parametrize("entry", ["patch", "train_eval"])
def test_the_runs_seed_is_the_datas(entry):
    data = composed(entry, "seed=7").data
    assert (data.seed, data.shuffle_seed) == (7, "auto")


def test_defaults_are_the_contracts():
    cfg = composed("patch")
    assert (cfg.window, cfg.direction, cfg.metric, cfg.rival) == (3, "denoise", "prob", "corrupt")
    assert (cfg.batch_size, cfg.seed, cfg.overwrite, cfg.data.limit) == (64, 0, False, 256)
    study = read_study(cfg)
    assert study.target.layers is None and study.target.site == "attn_out" and study.target.tokens == ("all",)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("window=three", "window 'three'.*whole number"),
        ("window=0", "window 0.*1 or more"),
        ("window=-1", "window -1"),
        ("window=2.5", "window 2.5"),
        ("window=true", "window True"),
        ("direction=up", "direction 'up'.*denoise or noise"),
        ("metric=loss", "metric 'loss'.*prob, log_odds"),
        ("rival=both", "rival 'both'"),
        ("seed=-1", "seed -1"),
        ("window=[]", "window: an empty list"),
        ("overwrite=no", "overwrite 'no': expected true or false"),
        ("dry_run=1", "dry_run 1: expected true or false"),
        ("window=[1,x]", "window 'x'"),
        ("target.tokens=[]", "target.tokens: an empty list"),
        ("target.heads=some", "target.heads 'some'.*all, joint"),
        ("target.heads=[-1]", "target.heads -1"),
        ("target.grid=3", "target.grid 3.*rows,columns"),
        ("target.grid=[0,2]", "target.grid 0"),
        ("matmul_precision=low", "matmul_precision 'low'.*highest, high, medium"),
        ("target.layers=x", "target.layers 'x'.*list of layers"),
        ("target.layers=-1", "target.layers -1"),
        ("target.layers=[]", "target.layers"),
        ("target.layers=[0,x]", "target.layers 'x'"),
        ("target.layers=[-1]", "target.layers -1"),
        ("target.tokens=dog", "target.tokens 'dog'.*all, cls, registers, patches"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(config, override, says):
    with pytest.raises(VitPatchError, match=says):
        cfg = config(override)
        check_keys(cfg, PatchKeys, PATCH_GROUPS)
        read_study(cfg)


def test_one_layer_needs_no_list(config):
    assert read_study(config("target.layers=3")).target.layers == (3,)


def test_every_process_of_a_sweep_has_one_time_stamp(monkeypatch):
    monkeypatch.delenv(SWEEP_VARIABLE, raising=False)
    first = sweep_stamp()
    monkeypatch.setattr("vitpatch.runs.config.time.strftime", lambda _: "later")
    assert sweep_stamp() == first


def test_what_a_constructor_objects_to_comes_out_as_one_line():
    with pytest.raises(VitPatchError, match=r"corruption.std -1.0: expected"):
        construct(OmegaConf.create({"_target_": "vitpatch.corruptions.Noise", "std": -1.0}))
    with pytest.raises(VitPatchError, match="no_such") as error:
        construct(OmegaConf.create({"_target_": "no_such.Thing"}))
    assert "\n" not in str(error.value)


def test_assets_are_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert (Path(asset("emoji")) / "test.parquet").exists()
