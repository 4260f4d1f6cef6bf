"""A chain's steps by the names of options: what the config holds, and what is said of a wrong name."""

import json

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vitpatch.config import construct, register_resolvers
from vitpatch.corruptions import Blur, Chain, Gray, Noise
from vitpatch.options import corruption_option, corruption_options, resolved
from vitpatch.spec import VitPatchError
from vitpatch.titles import corruption_words


def composed(*overrides):
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("patch", overrides=list(overrides))


def chain(steps):
    return composed("corruption=chain", f"corruption.steps={steps}")


def test_names_become_the_options_that_they_stand_for():
    cfg = chain("[gray,blur_low,{_target_:vitpatch.corruptions.Noise,std:0.3}]")
    before = OmegaConf.to_container(cfg)
    steps = OmegaConf.to_container(resolved(cfg).corruption.steps)
    options = [OmegaConf.to_container(composed(f"corruption={name}").corruption) for name in ("gray", "blur_low")]
    assert steps == [*options, {"_target_": "vitpatch.corruptions.Noise", "std": 0.3}]
    assert OmegaConf.to_container(cfg) == before  # a copy
    assert resolved(resolved(cfg)) == resolved(cfg)
    made = construct(resolved(cfg).corruption)
    assert isinstance(made, Chain) and [type(step) for step in made.steps] == [Gray, Blur, Noise]


def test_other_corruptions_stay_as_they_are():
    for name in ("noise", "none"):
        cfg = composed(f"corruption={name}")
        assert resolved(cfg) == cfg


def test_chains_stand_in_chains_and_values_from_elsewhere_are_those_of_the_run():
    cfg = composed(
        "corruption=chain", "corruption.steps=[chain,{_target_:vitpatch.corruptions.Blur,sigma:${window}}]", "window=2"
    )
    made = construct(resolved(cfg).corruption)
    assert [type(step) for step in made.steps] == [Chain, Blur] and made.steps[1].sigma == 2
    assert [type(step) for step in made.steps[0].steps] == [Gray, Blur]


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("[gray,sepia]", r"corruption.steps: no option 'sepia' in conf/corruption; there are background_only, .*gray"),
        ("[3]", r"corruption.steps 3: expected names of options of conf/corruption, or mappings with _target_"),
        ("[{std:3}]", r"corruption.steps {'std': 3}: expected names"),
        ("[]", r"corruption.steps \[\]: expected a list of corruptions"),
        ("[{_target_:vitpatch.corruptions.Noise,std:-1}]", r"corruption.std -1: expected a number"),
    ],
)
def test_a_wrong_step_is_one_line(steps, says):
    with pytest.raises(VitPatchError, match=says) as error:
        construct(resolved(chain(steps)).corruption)
    assert "\n" not in str(error.value)


def test_an_option_that_nobody_has_is_named_where_it_was_asked_for():
    with pytest.raises(VitPatchError, match="corruptions: no option 'sepia'"):
        corruption_option("sepia", "corruptions")
    assert corruption_options() == sorted(path.stem for path in (ROOT / "conf" / "corruption").glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["corruption=gray"], "gray"),
        (["corruption=gray", "corruption.amount=0.5"], "gray (amount=0.5)"),
        (["corruption=none"], "no corruption"),
        (["corruption=patch_shuffle"], "patch shuffle (grid=4)"),
        (["corruption=chain", "corruption.steps=[gray,noise_low]"], "gray then noise (std=0.1, clip=True)"),
        (["corruption=chain", "corruption.amount=0.5"], "gray then blur (sigma=3) (amount=0.5)"),
    ],
)
def test_a_corruption_in_words(overrides, label):
    assert corruption_words(resolved(composed(*overrides)).corruption) == label


OWN = "_target_: vitpatch.corruptions.Noise\nstd: 0.35\nclip: false\n"
LOOP = "_target_: vitpatch.corruptions.Chain\nsteps: [gray, loop]\namount: 1.0\n"


@pytest.mark.parametrize("way", ["--config-dir", "hydra.searchpath"])
def test_a_users_own_option_is_found_and_its_values_are_the_runs(cli, made, tmp_path, way):
    (tmp_path / "own" / "corruption").mkdir(parents=True)
    (tmp_path / "own" / "corruption" / "grain.yaml").write_text(OWN)
    (tmp_path / "own" / "corruption" / "loop.yaml").write_text(LOOP)
    where = ["--config-dir", str(tmp_path / "own")]
    if way == "hydra.searchpath":
        where = [f"hydra.searchpath=[file://{tmp_path / 'own'}]"]
    tiny = ["model=hf", f"model.path={made / 'vit'}", "data=parquet", f"data.path={made / 'images.parquet'}"]
    rest = ["data.limit=3", "window=1", "logger=none", "trainer=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    code, out = cli(*where, "corruption=chain", "corruption.steps=[gray,grain]", *tiny, *rest)
    assert code == 0 and "gray then noise (std=0.35, clip=False)" in out, out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    steps = manifest["config"]["corruption"]["steps"]
    assert [step.get("std") for step in steps] == [None, 0.35]
    (tmp_path / "own" / "corruption" / "grain.yaml").write_text(OWN.replace("0.35", "0.25"))  # another run by value
    code, out = cli(*where, "corruption=chain", "corruption.steps=[gray,grain]", *tiny, *rest)
    assert code == 1 and "holds a finished run with other corruption.steps (" in out, out
    code, out = cli(*where, "corruption=loop", *tiny, *rest[:-1], f"hydra.run.dir={tmp_path / 'loop'}")
    assert code == 1 and "corruption.steps 'loop': is a chain that holds itself" in out, out


def test_masks_are_asked_for_before_a_model_is_loaded(cli, made, tmp_path):
    tiny = ["model=hf", f"model.path={made / 'vit'}", "data=parquet", f"data.path={made / 'images.parquet'}"]
    rest = ["logger=none", "trainer=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    code, out = cli("corruption=chain", "corruption.steps=[gray,silhouette]", *tiny, *rest)
    assert code == 1 and "error: corruption chain needs object masks and the data have none: name their column" in out
