"""A chain's steps by the names of options: what the config holds, and what is said of a wrong name."""

import functools
import json
import shutil

import pytest
import torch
import yaml
from composed import option, option_names
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vitpatch.corruptions.base import Blur, Chain, Gray, Noise, as_corruption
from vitpatch.corruptions.counterfactual import OtherImage
from vitpatch.corruptions.embedding_noise import EmbeddingNoise
from vitpatch.corruptions.masked import Silhouette
from vitpatch.errors import VitPatchError
from vitpatch.formatting import OWN_CORRUPTIONS, corruption_words
from vitpatch.runs.calibration import adjustable
from vitpatch.runs.config import construct, corruption_option, corruption_options, register_resolvers, resolve_steps
from vitpatch.runs.folder import RunFolder
from vitpatch.training import fit
from vitpatch.types import ImageBatch


def composed(*overrides):
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("patch", overrides=list(overrides))


def chain(steps):
    return composed("corruption=chain", f"corruption.steps={steps}")


def test_names_become_the_options_that_they_stand_for():
    cfg = chain("[gray,blur_low,{_target_:vitpatch.corruptions.Noise,std:0.3}]")
    before = OmegaConf.to_container(cfg)
    steps = OmegaConf.to_container(resolve_steps(cfg).corruption.steps)
    options = [OmegaConf.to_container(composed(f"corruption={name}").corruption) for name in ("gray", "blur_low")]
    assert steps == [*options, {"_target_": "vitpatch.corruptions.Noise", "std": 0.3}]
    assert OmegaConf.to_container(cfg) == before  # a copy
    assert resolve_steps(resolve_steps(cfg)) == resolve_steps(cfg)
    made = construct(resolve_steps(cfg).corruption)
    assert isinstance(made, Chain) and [type(step) for step in made.steps] == [Gray, Blur, Noise]


def test_other_corruptions_stay_as_they_are():
    for name in ("noise", "none"):
        cfg = composed(f"corruption={name}")
        assert resolve_steps(cfg) == cfg


def test_chains_stand_in_chains_and_values_from_elsewhere_are_those_of_the_run():
    cfg = composed(
        "corruption=chain", "corruption.steps=[chain,{_target_:vitpatch.corruptions.Blur,sigma:${window}}]", "window=2"
    )
    made = construct(resolve_steps(cfg).corruption)
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
        construct(resolve_steps(chain(steps)).corruption)
    assert "\n" not in str(error.value)


def test_an_option_that_nobody_has_is_named_where_it_was_asked_for():
    with pytest.raises(VitPatchError, match="corruptions: no option 'sepia'"):
        corruption_option("sepia", "corruptions")
    assert corruption_options() == option_names("corruption")


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["corruption=gray"], "gray"),
        (["corruption=gray", "corruption.amount=0.5"], "gray (amount=0.5)"),
        (["corruption=none"], "no corruption"),
        (["corruption=patch_shuffle"], "patch shuffle (grid=4)"),
        (["corruption=chain", "corruption.steps=[gray,noise_low]"], "gray then noise (std=0.1)"),
        (["corruption=chain", "corruption.amount=0.5"], "gray then blur (sigma=3) (amount=0.5)"),
    ],
)
def test_a_corruption_in_words(overrides, label):
    assert corruption_words(resolve_steps(composed(*overrides)).corruption) == label


CHAIN_OF = "_target_: vitpatch.corruptions.Chain, steps: "
NOISE_CLASS = "_target_: vitpatch.corruptions.EmbeddingNoise"


class OwnNoise(EmbeddingNoise):
    """Somebody's own noise on embeddings."""


class OwnChain(Chain):
    """Somebody's own chain."""


IS_INSIDE = r"^corruption\.steps: (embedding|own)_noise is added inside the model, after all pixels; use it alone$"


def of_steps(steps):
    """What a config holds of a chain of these steps, in YAML."""
    flat = {"_target_": "vitpatch.corruptions.Chain", "steps": yaml.safe_load(steps), "amount": 1.0}
    return OmegaConf.create({"corruption": flat})


def wrapped(batch, seed, step):
    """Somebody's own function that calls another corruption."""
    return step(batch, seed)


@pytest.mark.parametrize(
    "steps",
    [
        "embedding_noise",
        "[embedding_noise_high]",
        f"[{{{NOISE_CLASS}}}]",
        f"[{{{CHAIN_OF}[embedding_noise]}}]",
        f"[{{{CHAIN_OF}embedding_noise}}]",
        f"[{{{CHAIN_OF}[{{{CHAIN_OF}[{{{NOISE_CLASS},std: 1.0}}]}}]}}]",
        "[{_target_: test_chain.OwnNoise}]",
        "[{_target_: test_chain.OwnChain, steps: [{_target_: test_chain.OwnNoise}]}]",
        "outer",  # somebody's option, a chain whose step is the name of another, which holds it
    ],
)
def test_noise_on_embeddings_is_no_step_of_a_chain(steps, own_options):
    with pytest.raises(VitPatchError, match=IS_INSIDE):
        construct(resolve_steps(of_steps(steps)).corruption)


@pytest.fixture
def own_options(tmp_path, monkeypatch):
    """The project's options, with chains of somebody's own that hold noise on embeddings, and an experiment of one."""
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    for name, steps in {"inner": "[embedding_noise, gray]", "outer": "[blur, inner]"}.items():
        own = f"_target_: vitpatch.corruptions.Chain\nsteps: {steps}\namount: 1.0\n"
        (conf / "corruption" / f"{name}.yaml").write_text(own)
    experiment = "# @package _global_\ndefaults:\n  - override /corruption: outer\n"
    (conf / "experiment" / "own.yaml").write_text(experiment)
    monkeypatch.setattr("vitpatch.runs.config.CONF", conf)
    return conf


def test_nor_is_it_where_an_option_or_an_experiment_file_holds_it(own_options):
    register_resolvers()
    with initialize_config_dir(str(own_options), version_base="1.3"):
        with pytest.raises(VitPatchError, match=IS_INSIDE):
            construct(resolve_steps(compose("patch", overrides=["experiment=own"])).corruption)


def test_nor_for_training_and_calibration(own_options):
    with pytest.raises(VitPatchError, match=IS_INSIDE):
        adjustable(OmegaConf.to_container(corruption_option("inner", "corruption")))
    with pytest.raises(VitPatchError, match=IS_INSIDE):
        fit.read_corruptions(["inner"])
    with pytest.raises(VitPatchError, match=r"embedding_noise leaves the pixels alone; only patch\.py takes it"):
        fit.read_corruptions(["embedding_noise"])


def test_nor_in_python_and_whatever_calls_it_as_a_corruption_of_pixels_is_told():
    for step in (EmbeddingNoise(), EmbeddingNoise().with_spread(1.0)):
        with pytest.raises(VitPatchError, match=IS_INSIDE):
            Chain([Gray(), step])
    with pytest.raises(VitPatchError, match=IS_INSIDE):
        as_corruption(functools.partial(wrapped, step=EmbeddingNoise())).pixels(images(), seed=0)


def images():
    return ImageBatch(torch.rand(3, 3, 4, 4), torch.arange(3), torch.zeros(3, dtype=torch.int64))


def test_what_a_step_asks_for_a_chain_asks_for_at_any_depth():
    for inner in ([Silhouette()], [Chain([Silhouette()])], [Chain([Chain([Gray(), Silhouette()])])]):
        assert Chain([Gray(), *inner]).needs_masks
        assert not Chain([Gray(), Chain([Gray()])]).needs_masks
    deep = Chain([Gray(), Chain([Chain([OtherImage(kind="same_class")])])])
    assert deep.partner == "same_class" and deep.strength_key == "amount"
    with pytest.raises(VitPatchError, match=r"partners of several kinds \(other_class, same_class\)"):
        Chain([OtherImage(kind="other_class"), deep])


def test_no_two_steps_share_their_draws_at_any_depth():
    """Each of four steps of noise adds its own draws, in whatever way they are put into chains."""
    noise, batch = Noise(1.0, clip=False), images()
    nested = [
        Chain([noise] * 4),
        Chain([Chain([noise, noise]), noise, noise]),
        Chain([noise, Chain([noise, Chain([noise, noise])])]),
        Chain([Chain([noise, noise]), Chain([noise, noise])]),
        Chain([Chain([Chain([noise, noise]), noise]), noise]),
    ]
    for corruption in nested:
        draws, step = [], noise.__class__.__call__

        def spy(self, batch, seed, draws=draws, step=step):
            draws.append(seed)
            return step(self, batch, seed)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Noise, "__call__", spy)
            corruption(batch, 7)
        assert len(draws) == len(set(draws)) == 4 and draws[0] == 7
    assert torch.equal(nested[0](batch, 7), nested[1](batch, 7))  # chains at the head are the flat chain
    assert torch.equal(Chain([noise])(batch, 7), noise(batch, 7))
    half = Chain([Gray(), Chain([Gray()], amount=0.5)])
    assert torch.allclose(half(batch, 0), Gray()(batch, 0), atol=1e-6)


def test_a_chain_in_a_chain_with_an_unknown_step_is_one_line():
    with pytest.raises(VitPatchError, match=r"^corruption.steps: no option 'sepia' in conf/corruption; there are"):
        resolve_steps(of_steps(f"[{{{CHAIN_OF}[{{{CHAIN_OF}[sepia]}}]}}]"))


@pytest.mark.parametrize(
    ("corruption", "says"),
    [
        ({"_target_": "vitpatch.corruptions.Identity"}, "no corruption"),
        ({"_target_": "shifty.IdentityShift", "amount": 0.5}, "identity shift (amount=0.5)"),
        ({"_target_": "mine.NotTheIdentity"}, "not the identity"),
        ({"_target_": "mine.Identity"}, "mine.Identity"),
        ({"_target_": "mine.Gray"}, "mine.Gray"),
        ({"_target_": "mine.gray", "_partial_": True}, "mine.gray"),
        ({"_target_": "mine.Silhouette", "colour": None}, "mine.Silhouette (colour=None)"),
        ({"_target_": "mine.Chain", "steps": [{"_target_": "mine.Sepia"}]}, "mine.Chain (steps=[sepia])"),
        ({"_target_": "mine.darken", "_partial_": True, "by": 0.25}, "darken (by=0.25)"),
        ({"_target_": "mine.HSVJitter2D"}, "hsvjitter2 d"),
        ({"_target_": "mine.Bands", "at": list(range(100))}, "bands (at=[0, 1, 2, 3, 4, 5, 6, 7, … 100 values])"),
        ({"_target_": "mine.Bands", "at": [1 / 3, None], "of": {"a": 1}}, "bands (at=[0.3333, None], of={a: 1})"),
    ],
)
def test_only_vitpatchs_own_classes_have_their_names(corruption, says):
    assert corruption_words(corruption) == says


def test_whose_strength_a_chain_in_a_chain_has_is_seen():
    inner = {"_target_": Chain.__module__ + ".Chain", "steps": [{"_target_": "vitpatch.corruptions.Gray"}]}
    blur = {"_target_": "vitpatch.corruptions.Blur", "sigma": 3.0}
    assert (
        corruption_words(inner | {"steps": [inner | {"amount": 0.5}, blur]})
        == "[gray] (amount=0.5) then blur (sigma=3)"
    )
    assert corruption_words(inner | {"steps": [inner | {"amount": 1.0}, blur]}) == "gray then blur (sigma=3)"


def test_every_class_of_an_option_is_vitpatchs_own_by_name():
    for name in option_names("corruption"):
        target = option("corruption", name)._target_
        assert target.rpartition(".")[2].lower() in map(str.lower, OWN_CORRUPTIONS), target


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
    typed = [f"--config-dir={where[1]}" if way == "--config-dir" else where[0], "corruption=chain"]
    assert RunFolder(tmp_path / "run").typed_arguments()[:2] == typed  # a command to run next finds it too
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
