"""Every key of every option of both commands, with values of every kind: taken where they mean something, or one line.

``LEGAL`` says by hand what each key may be; a key without a row fails the test, as does a value that is taken and does
not stand there. It is written apart from the types that classes declare, which do the checking.
"""

import math

import pytest
from composed import composed, option, option_names
from hydra.utils import get_object
from omegaconf import OmegaConf, open_dict

from vitpatch.checks import read_inclusion
from vitpatch.errors import VitPatchError
from vitpatch.runs import config, setup
from vitpatch.runs.calibration import read_wanted_damage
from vitpatch.runs.trainer import trainer_factory
from vitpatch.study import read_target, read_windows
from vitpatch.training import fit

LISTS = {f"[{word}]": OmegaConf.create(of) for word, of in {"": [], "1": [1], "[1]": [[1]], "x": ["x"]}.items()}
PROBES = {
    "true": True, "0": 0, "1": 1, "-1": -1, "2": 2, "0.5": 0.5, "1e30": 1e30, "10**30": 10**30, "nan": math.nan,
    "inf": math.inf, "x": "x", "''": "", "null": None, **LISTS, "{}": OmegaConf.create({}),
    "{1:1}": OmegaConf.create({1: 1}),
}  # fmt: skip
SHARE, PART, STRENGTH, ABOVE_0 = "0 1 0.5", "0 0.5", "0 1 2 0.5", "1 2 0.5"
COUNT, INDEX, FLAG, NAME, CHOICE, NULL = "1 2", "0 1 2", "true", "x", "", " null"
LEGAL = {
    "amount gray erase jitter scale@augment shear shift": SHARE,
    "warmup label_smoothing average validation drop_path_rate": PART,
    "std@corruption sigma width rotate learning_rate weight_decay initializer_range": STRENGTH,
    "cutoff finish_timeout timeout": ABOVE_0,
    "crop_share": "1 0.5" + NULL,
    "memory_gb wanted_width": ABOVE_0 + " 1e30 10**30" + NULL,
    "draws epochs batch_size num_nodes image_size@architecture patch_size hidden_size num_hidden_layers "
    "num_attention_heads intermediate_size": COUNT,
    "per_class limit train_limit patience image_size@model": COUNT + NULL,
    "grid@corruption": "2",
    "dpi": COUNT,
    "seed num_workers": INDEX,
    "shuffle_seed": INDEX + NULL,
    "layer_scale_init_value": STRENGTH,
    "clip balanced streaming random_init allow_bin overwrite dry_run synergy": FLAG,
    "use_mean_pooling use_absolute_position_embeddings": FLAG,
    "controls": FLAG + NULL,
    "project image_column strategy accelerator": NAME,
    "split mask_column cluster_column pair_column label_column entity config_name revision readout head_path anatomy "
    "train_split save_to name": NAME + NULL,
    "path": "x 0 1 -1 2 10**30",  # a folder may be called 2024
    "sweep": "x 0 1 -1 2 0.5 1e30 10**30",
    "precision": "x 0 1 -1 2",  # the rest is Lightning's to say
    "devices": "1 2 [1]",
    "on_error fill bg kind scale@corruption attention mode dtype direction donor interval test metric rival "
    "matmul_precision site tokens prompts steps include figures format": CHOICE,
    "resample mean std@model grid@target calibrate": NULL,
    "classes": "x 0 1 -1 2 [1] [x]" + NULL,
    "label_map": "{} {1:1}" + NULL,
    "layers": INDEX + " [1]",
    "heads": INDEX + " [1]" + NULL,
    "window": COUNT + " [1] 10**30",  # the most is the model's to say
    "corruptions": "[]" + NULL,
}
LEGAL_OF = {name: probes.split() for names, probes in LEGAL.items() for name in names.split()}


def read_calibrate(value):
    return None if value is None else read_wanted_damage(value)


def read_alone(entry):
    """The keys of a command that stand in no group, and how each is read."""
    cfg = composed(entry)
    own = {"window": read_windows, "include": read_inclusion, "calibrate": read_calibrate}
    own |= {"figures": config.read_figures}
    own |= {"corruptions": fit.read_corruptions}
    declared, groups = (
        (config.PatchKeys, config.PATCH_GROUPS) if entry == "patch" else (config.TrainKeys, config.TRAIN_GROUPS)
    )
    values = {key: cfg[key] for key in cfg if key not in groups}
    for key in cfg.get("figures", ()):
        yield "figures", key, lambda value, key=key: config.read_figures({**cfg.figures, key: value})
    for key in values:
        yield "", key, own.get(key, lambda value, key=key: config.check_keys(values | {key: value}, declared, groups))


def read_grouped(group):
    """The keys of every class that an option of the group names, and how each is read."""
    seen = set()
    nodes = [option(group, name) for name in option_names(group)]
    for node in nodes or [composed("train_eval")[group]]:
        for key in node.keys() if node else ():
            field = getattr(get_object(node._target_), "__dataclass_fields__", {}).get(key)
            place = (key, node._target_ if field is None or group == "architecture" else str(field.type))
            if not key.startswith("_") and place not in seen:
                seen.add(place)
                yield group, key, reader(group, node, key)


def reader(group, node, key):
    stored = OmegaConf.to_container(node, resolve=False)
    values = {name: {"???": "x", "${seed}": 0}.get(str(value), value) for name, value in stored.items()}

    def read(value):
        new = OmegaConf.create(values)
        if group == "target":
            return read_target(OmegaConf.merge(new, {key: value}))
        if group == "trainer":
            new[key] = value
            return trainer_factory(OmegaConf.create({group: new}))
        given = {name: new[name] for name in new if not name.startswith("_")} | {key: value}
        if key != "steps" and "steps" in given:
            given["steps"] = [len]
        if group == "architecture":
            return fit.check_architecture(given)
        return get_object(node._target_)(**given)

    return read


GROUPS = ("model", "data", "corruption", "target", "trainer", "logger", "architecture", "recipe", "augment")


@pytest.mark.parametrize("where", ["patch", "train_eval", *GROUPS])
def test_a_key_takes_what_it_can_be_and_says_so_of_all_else(where):
    wrong = {}
    for group, key, read in read_grouped(where) if where in GROUPS else read_alone(where):
        called, legal = f"{group}.{key}".strip("."), LEGAL_OF[f"{key}@{group}" if f"{key}@{group}" in LEGAL_OF else key]
        for name, value in PROBES.items():
            try:
                read(value)
                said = None
            except VitPatchError as error:
                said = str(error)
            if (said is None) != (name in legal) or (
                said and not (said.startswith(called) and len(said) < 600 and "\n" not in said)
            ):
                wrong[f"{called}={name}"] = said
    assert not wrong


CHECKS = {"patch": setup.check_config, "train_eval": fit.check_config}


@pytest.fixture(scope="module")
def whole():
    return {"patch": composed("patch", "logger=none"), "train_eval": composed("train_eval", "corruptions=[]")}


def refused(entry, cfg):
    with pytest.raises(VitPatchError) as error:
        CHECKS[entry](cfg)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


WRONG_GROUPS = {
    "missing": None,
    "has no _target_": {},
    "'x'": "x",
    "cannot be imported": {"_target_": "no.Where"},
    "'os.getcwd': expected": {"_target_": "os.getcwd"},
    "'fractions.Fraction': expected": {"_target_": "fractions.Fraction"},
    "_target_ 5": {"_target_": 5},
}


@pytest.mark.parametrize("entry", CHECKS)
def test_a_group_is_an_option_of_its_kind(whole, entry):
    names = config.PATCH_GROUPS if entry == "patch" else ("data", "trainer", "recipe", "augment")
    for group in names:
        new = whole[entry].copy()
        for says, value in WRONG_GROUPS.items():
            OmegaConf.update(new, group, value, merge=False)
            if group == "logger" and value is None:
                continue
            said = refused(entry, new)
            assert said.startswith(group) and says in said, said
        new = whole[entry].copy()
        with open_dict(new):
            new[group].odd = 1
        assert f"{group}.odd: " in refused(entry, new)
        with open_dict(new):
            del new[group]
        if group == "logger":
            CHECKS[entry](new)
        else:
            assert f"{group} is missing" in refused(entry, new)


@pytest.mark.parametrize("entry", CHECKS)
def test_a_wrong_seed_is_named_as_it_was_typed(whole, entry):
    new = whole[entry].copy()
    new.seed = -1
    assert refused(entry, new).startswith("seed -1: expected")


@pytest.mark.parametrize(
    ("entry", "key", "says"),
    [
        ("patch", "windows", "windows: there is no such key; did you mean window?"),
        ("patch", "recipe", "recipe: there is no such key"),
        ("patch", "corruptions", "corruptions: there is no such key; did you mean corruption?"),
        ("train_eval", "window", "window: there is no such key"),
        ("train_eval", "corruption", "corruption: there is no such key; did you mean corruptions?"),
    ],
)
def test_a_key_of_another_command_or_mistyped_in_an_experiment_is_named(whole, entry, key, says):
    new = whole[entry].copy()
    with open_dict(new):
        new[key] = 3
    assert says in refused(entry, new)


def test_what_an_option_leaves_out_has_the_default_of_its_class(whole):
    cfg = whole["patch"].copy()
    with open_dict(cfg):
        cfg.data = {"_target_": "vitpatch.data.sources.ParquetImages", "path": "x", "mask_column": "mask"}
        cfg.corruption = {"_target_": "vitpatch.corruptions.BackgroundSwap"}
        cfg.model = {"_target_": "vitpatch.models.checkpoint.Checkpoint", "path": "x"}
    checked = setup.check_config(cfg)
    assert checked.cfg.data.on_error == "raise" and checked.cfg.model.revision is None
    assert dict(checked.cfg.corruption) == {"_target_": cfg.corruption._target_, "kind": "other_class", "amount": 1.0}


@pytest.mark.parametrize("missing", ["data.path", "model.path", "recipe.epochs"])
def test_what_has_no_default_is_asked_for(whole, missing):
    entry, (group, key) = "train_eval" if missing == "recipe.epochs" else "patch", missing.split(".")
    new = whole[entry].copy()
    with open_dict(new):
        del new[group][key]
    assert f"{missing} is missing" in refused(entry, new)


@pytest.mark.parametrize("value", [5, [], "x"])
def test_an_architecture_is_an_option_or_none(whole, value):
    new = whole["train_eval"].copy()
    OmegaConf.update(new, "architecture", value, merge=False)
    assert refused("train_eval", new).startswith("architecture")


@pytest.mark.parametrize(("key", "value"), [("patch_size", 64), ("odd", 1), ("attention_probs_dropout_prob", "x")])
def test_an_architecture_of_which_no_model_can_be_built_is_one_line(whole, key, value):
    new = whole["train_eval"].copy()
    with open_dict(new):
        new.architecture[key] = value
    assert refused("train_eval", new).startswith("architecture")


def test_no_logger_is_the_logger_none(cli, made, tmp_path):
    """Also a key that cannot be resolved is one line."""
    where = [f"model.path={made / 'vit'}", f"data.path={made / 'images.parquet'}", f"hydra.run.dir={tmp_path}"]
    tiny = ["model=hf", "data=parquet", *where, "trainer=cpu", "window=1"]
    code, printed = cli(*tiny, "~logger", "corruption=noise", "corruption.std=${oc.env:NOWHERE_SET}")
    assert code == 1 and "error: corruption.std: " in printed and "Traceback" not in printed, printed
    code, printed = cli(*tiny, "~logger")
    assert code == 0 and (tmp_path / "manifest.json").exists(), printed
