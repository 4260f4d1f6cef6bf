"""The strength that does a wanted damage: the search by itself, then on training images, in runs and in a sweep."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NAMES, ROOT, pictures, write_parquet
from hydra import initialize_config_dir

from vitpatch.cli.sweep_record import sweep_overrides, write_matched_corruptions
from vitpatch.corruptions.base import Noise
from vitpatch.errors import VitPatchError
from vitpatch.io import nan_to_none
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.runs import calibration, setup
from vitpatch.runs.calibration import (
    FILE,
    FOLDER,
    HALVINGS,
    POINTS,
    TOLERANCE,
    Calibration,
    adjustable,
    common_drop,
    grid,
    read_wanted_damage,
    search,
    tolerance_for,
)
from vitpatch.runs.setup import prepare
from vitpatch.types import Estimate, ImageBatch

# --- the search, without a model ---


def exactly(mean):
    return Estimate(float(mean), 0.0, float(mean), float(mean))


class Asking:
    """A curve that notes at which strengths it was looked at."""

    def __init__(self, curve):
        self.curve, self.at = curve, []

    def __call__(self, strengths):
        self.at += strengths
        return [exactly(self.curve(s)) for s in strengths]


def found(curve, wanted, strongest=2.0, tolerance=TOLERANCE):
    asking = Asking(curve)
    return *search(asking, wanted, strongest, "corruption.std", tolerance), asking.at


def of_curve(curve):
    return Calibration(read_wanted_damage("prob_drop:0.3"), 0.3, "std", 1.0, 2.0, curve, 5, 5)


def test_a_rising_curve_is_inverted():
    strength, curve, at = found(lambda s: 0.8 * (s / 2) ** 2, 0.3)
    assert strength == pytest.approx(2 * np.sqrt(0.3 / 0.8), abs=2e-3)
    assert abs(curve[strength].mean - 0.3) <= TOLERANCE
    assert at[:POINTS] == grid(2.0) == [i * 0.25 for i in range(9)]
    assert len(at) == len(set(at)) == len(curve) <= POINTS + HALVINGS
    assert all(1.0 <= s <= 1.25 for s in at[POINTS:])  # inside the bracket


def test_the_first_crossing_is_taken_where_damage_does_not_rise_throughout():
    curve = lambda s: 0.5 * np.sin(np.pi * s)  # noqa: E731 – up to 0.5 at s = 0.5, down to 0 at 1, below 0 after
    strength, points, _ = found(curve, 0.3)
    assert strength == pytest.approx(np.arcsin(0.6) / np.pi, abs=2e-3)
    assert not of_curve(points).is_monotone
    assert of_curve(found(lambda s: s / 2, 0.3)[1]).is_monotone
    within_tolerance = {s: exactly(min(s, 1) - 0.0005 * (s > 1)) for s in grid(2.0)}
    assert of_curve(within_tolerance).is_monotone


def test_a_drop_that_jumps_ends_at_the_jump():
    strength, curve, at = found(lambda s: 0.6 * (s >= 1.1) + 0.01 * s, 0.5)
    assert strength == pytest.approx(1.1, abs=0.25 / 2**HALVINGS) and len(at) == POINTS + HALVINGS
    assert curve[strength].mean == pytest.approx(0.611, abs=1e-3)  # the nearer end of the bracket


def test_a_point_of_the_grid_that_fits_is_the_answer():
    strength, _, at = found(lambda s: s / 2, 0.5)
    assert strength == 1.0 and len(at) == POINTS


def test_a_drop_that_is_not_reached_is_an_error_that_names_the_largest():
    with pytest.raises(VitPatchError, match=r"drop of 0.6 is not reached; the largest .* 0.5, at corruption.std=0.5;"):
        found(lambda s: 0.5 * np.sin(np.pi * s), 0.6)
    with pytest.raises(VitPatchError, match=r"corruption.std=0 has a drop of 0.4 already"):
        found(lambda s: 0.4, 0.3)


def test_an_accuracy_is_met_to_half_an_image():
    prob, accuracy = read_wanted_damage("prob_drop:0.2").damage, read_wanted_damage("accuracy_drop:0.2").damage
    assert tolerance_for(prob, 20) == TOLERANCE
    assert tolerance_for(accuracy, 20) == 0.025 and tolerance_for(accuracy, 10_000) == TOLERANCE


def test_a_common_drop_is_a_share_of_what_the_weakest_can_do():
    assert common_drop({"a": 0.5, "b": 0.2}) == pytest.approx(0.16)
    with pytest.raises(VitPatchError, match=r"largest drop under c is 0.*leave it out"):
        common_drop({"a": 0.5, "b": 0.2, "c": 0.0})


@pytest.mark.parametrize("value", ["prob_drop", "prob_drop:x", "prob_drop:0", "prob_drop:-0.1", "prob_drop:1.5", 0.2])
def test_what_cannot_be_asked(value):
    with pytest.raises(VitPatchError, match=r"calibrate .*such as prob_drop:0.2"):
        read_wanted_damage(value)


def test_what_can_be_asked():
    assert [str(read_wanted_damage(v)) for v in ("match", "accuracy_drop:0.10")] == ["match", "accuracy_drop:0.1"]
    with pytest.raises(VitPatchError, match=r"'logit_drop': expected prob_drop or accuracy_drop"):
        read_wanted_damage("logit_drop:1")


def test_what_is_not_known_is_null_in_the_manifest():
    alone = {0.0: Estimate(0.0, np.nan, np.nan, np.nan), 1.0: Estimate(0.3, np.nan, np.nan, np.nan)}
    curve = {s: alone[1.0 if s else 0.0] for s in grid(1.0)}
    said = Calibration(read_wanted_damage("prob_drop:0.3"), 0.3, "std", 1.0, 1.0, curve, 5, 1).as_manifest()
    said = nan_to_none(said)  # as ``write_json`` has it
    assert said["drop"] == {"drop": 0.3, "se": None, "low": None, "high": None}
    json.dumps(said, allow_nan=False)


# --- on training images ---


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A folder with test.parquet (13 images) and train.parquet (24 images in pairs of one cluster), sorted by class."""
    folder = tmp_path_factory.mktemp("splits")
    write_parquet(folder / "test.parquet", pictures(13), [i % 5 for i in range(13)], pair=[str(i) for i in range(13)])
    labels, pairs = sorted(i % 5 for i in range(24)), [str(i // 2) for i in range(24)]
    write_parquet(folder / "train.parquet", pictures(24, seed=7), labels, pair=pairs)
    return folder


@pytest.fixture
def on_splits(splits):
    """Overrides of a run on the test split; without labels, since a random model knows none."""
    here = [f"data.path={splits}", "data.split=test", "data.cluster_column=pair", "data.label_column=null"]
    return [*here, "corruption=noise"]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def by_hand(made, image_seed, number, corrupt, seed=0):
    """Drops of the predicted label's probability, image by image, with the Hugging Face model alone."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(made / "vit").eval()
    drops = []
    with torch.no_grad():
        for i, image in enumerate(pictures(number, seed=image_seed)):
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
            batch = ImageBatch(pixels, torch.tensor([i]), torch.tensor([0]))
            clean, corrupted = (model((p - 0.5) / 0.5).logits.double().softmax(-1)[0] for p in (pixels, corrupt(batch)))
            drops.append(float(clean.max() - corrupted[clean.argmax()]))
    return np.array(drops)


def test_a_run_has_the_strength_that_does_the_wanted_damage(patched, on_splits, made, caplog):
    with caplog.at_level(logging.INFO):
        folder = patched(*on_splits, "calibrate=prob_drop:0.2", "corruption.std=0.9")
    manifest = manifest_of(folder)
    said, std = manifest["calibration"], manifest["config"]["corruption"]["std"]
    assert said["strength"] == std and 0 < std < 1 and abs(said["drop"]["drop"] - 0.2) <= TOLERANCE
    drops = by_hand(made, 7, 24, lambda batch: Noise(std)(batch, 0))
    assert said["drop"]["drop"] == pytest.approx(drops.mean(), abs=1e-6)
    assert said["drop"]["low"] < 0.2 < said["drop"]["high"]
    assert (said["images"], said["clusters"]) == (24, 12) and said["labels"].endswith("predictions")
    strengths = [point["strength"] for point in said["curve"]]
    assert strengths == sorted(strengths) and set(grid(1.0)) <= set(strengths) and said["curve"][0]["drop"] == 0
    for point in said["curve"][:: len(said["curve"]) - 1]:
        drops = by_hand(made, 7, 24, lambda batch, at=point["strength"]: Noise(at)(batch, 0))
        assert point["drop"] == pytest.approx(drops.mean(), abs=1e-6)
    assert f"noise (std={std:.4g}) calibrated to prob_drop:0.2 · attn_out" in caplog.text  # the run's title
    examples = pd.read_parquet(folder / "examples.parquet")
    drops = by_hand(made, 0, 13, lambda batch: Noise(std)(batch, 0))  # the run itself is of this strength
    assert (examples.prob_clean - examples.prob_corrupt).to_numpy() == pytest.approx(drops, abs=1e-6)


def test_an_accuracy_drop_is_of_being_right(patched, on_splits, made):
    said = manifest_of(patched(*on_splits, "calibrate=accuracy_drop:0.3"))["calibration"]
    assert abs(said["drop"]["drop"] - 0.3) <= 0.5 / 24 + 1e-12
    counts = [point["drop"] * 24 for point in said["curve"]]
    assert counts == pytest.approx(np.round(counts), abs=1e-9) and len(set(counts)) > 3


def test_a_drop_out_of_reach_names_the_largest(patched, on_splits):
    with pytest.raises(VitPatchError, match=r"drop of 1 is not reached; the largest .* at corruption.std="):
        patched(*on_splits, "calibrate=prob_drop:1")


def test_a_finished_run_is_known_without_calibrating(patched, on_splits, monkeypatch, caplog):
    folder = patched(*on_splits, "calibrate=prob_drop:0.2")
    before = (folder / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(calibration, "search", None)
    with caplog.at_level(logging.INFO):
        patched(*on_splits, "calibrate=prob_drop:0.20", "corruption.std=0.7", "batch_size=3")
    assert "finished before" in caplog.text and (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(VitPatchError, match=r'other calibrate \("prob_drop:0.2" there, "prob_drop:0.3" here\)'):
        patched(*on_splits, "calibrate=prob_drop:0.3")


def test_the_strength_does_not_depend_on_the_batch(patched, on_splits):
    strengths = [
        manifest_of(patched(*on_splits, "calibrate=prob_drop:0.2", f"batch_size={n}", folder=f"b{n}"))["calibration"]
        for n in (1, 24)
    ]
    assert strengths[0]["strength"] == strengths[1]["strength"]


def test_the_run_id_knows_what_is_taken_from_training_images(config, on_splits, monkeypatch):
    digested = []
    monkeypatch.setattr(setup, "digest", lambda value: digested.append(value) or json.dumps(value, default=str))

    def run_id(*overrides):
        return prepare(config(*on_splits, *overrides)).run_id

    plain = run_id()
    assert set(digested[-1]) == {
        "numbers_version", "weights", "architecture", "readout", "row", "preprocessing", "data", "selection",
        "corruption", "target", "window", "direction", "seed", "precision", "donors", "leave_outs",
    }  # fmt: skip
    assert plain == run_id("train_limit=5", "train_split=nowhere")  # nothing is taken from them
    one = run_id("calibrate=prob_drop:0.2")
    assert one == run_id("calibrate=prob_drop:0.20", "corruption.std=0.7")
    others = [
        run_id("calibrate=prob_drop:0.3"),
        run_id("calibrate=accuracy_drop:0.2"),
        run_id("calibrate=match"),
        run_id("calibrate=prob_drop:0.2", "train_limit=5"),
        run_id("calibrate=prob_drop:0.2", "train_split=test"),
        run_id("calibrate=prob_drop:0.2", "corruption.clip=false"),
        run_id("corruption=embedding_noise"),
        run_id("corruption=embedding_noise", "train_limit=5"),
        run_id("corruption=embedding_noise", "calibrate=prob_drop:0.2"),
    ]
    assert len({plain, one, *others}) == 2 + len(others)


def test_training_images_are_shuffled_and_matched_to_the_models_classes(config, on_splits, splits, tmp_path):
    labelled = [o for o in on_splits if "label_column" not in o]
    training = prepare(config(*labelled, "calibrate=match", "train_limit=10")).training
    assert len(training) == 10 and training.label_names == tuple(NAMES)
    assert len(set(training.labels.tolist())) > 2  # the split is sorted: the first ten are of two classes
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "test"):
        write_parquet(other / f"{split}.parquet", pictures(5), [0, 1, 2, 3, 4], NAMES[::-1])
    renamed = prepare(config(f"data.path={other}", "data.split=test", "corruption=noise", "calibrate=match")).training
    assert renamed.labels.tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train_split=fit"], r"training images: .*no file fit\*.parquet.*one of test,train"),
        (["train_limit=0"], "train_limit 0: expected a whole number"),
        (
            ["data.path=ONE", "data.split=null", "data.cluster_column=null"],
            r"training images: train_split train: .*is one file; leave it null",
        ),
        (["corruption=none"], "calibrate: corruption none has no strength"),
    ],
)
def test_what_is_missing_is_said_in_a_line(config, on_splits, made, overrides, says):
    given = [o.replace("ONE", str(made / "images.parquet")) for o in overrides]
    with pytest.raises(VitPatchError, match=says):
        prepare(config(*on_splits, "calibrate=prob_drop:0.2", *given))


def test_one_split_for_both_is_said(config, on_splits, caplog):
    prepare(config(*on_splits, "calibrate=match", "train_split=test"))
    assert "train_split test is data.split" in caplog.text


# --- noise on patch embeddings ---


def convolved(made, n=24, seed=7):
    """The model, and what its convolution makes of the training images, (images, width, rows, columns) float64."""
    model = Checkpoint(str(made / "vit")).load(NAMES).model
    convolution = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    pixels = torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1) for i in pictures(n, seed=seed)])
    pixels = (pixels.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        return model, convolution, pixels, convolution(pixels).double()


def test_the_spread_is_that_of_training_images_and_in_the_manifest(patched, on_splits, made):
    *_, embedded = convolved(made)
    run = [*on_splits, "corruption=embedding_noise"]
    manifest = manifest_of(patched(*run, folder="global"))
    assert manifest["embedding_std"] == pytest.approx(float(embedded.std()), rel=1e-6)
    assert manifest["training"]["images"] == 24 and len(manifest["training"]["digest"]) == 16
    by_channel = embedded.transpose(0, 1).flatten(1).std(1).numpy()
    said = manifest_of(patched(*run, "corruption.scale=channel", folder="channel"))["embedding_std"]
    assert said == pytest.approx(
        {"channels": 32, "mean": by_channel.mean(), "smallest": by_channel.min(), "largest": by_channel.max()}, rel=1e-6
    )
    assert "calibration" not in manifest


@pytest.mark.parametrize("draws", [1, 3])
def test_noise_on_embeddings_is_calibrated(patched, on_splits, made, draws):
    run = [*on_splits, "corruption=embedding_noise", f"corruption.draws={draws}", "calibrate=prob_drop:0.15"]
    said = manifest_of(patched(*run))["calibration"]
    assert said["key"] == "std" and abs(said["drop"]["drop"] - 0.15) <= TOLERANCE
    model, convolution, pixels, embedded = convolved(made)
    corruption = adjustable(
        {"_target_": "vitpatch.corruptions.EmbeddingNoise", "std": 0, "scale": "global", "draws": 1}
    ).at(said["strength"])
    corruption = corruption.with_spread(float(embedded.std()))
    with torch.no_grad():
        clean, corrupt = model(pixel_values=pixels).logits.double().softmax(-1), 0
        for draw in range(draws):
            noise = corruption.embedding_noise(torch.arange(24), 0, (16, 32), draw).transpose(1, 2).unflatten(2, (4, 4))
            handle = convolution.register_forward_hook(lambda module, args, output, noise=noise: output + noise)
            corrupt = corrupt + model(pixel_values=pixels).logits.double().softmax(-1) / draws
            handle.remove()
    label = clean.argmax(1, keepdim=True)
    assert said["drop"]["drop"] == pytest.approx(float((clean - corrupt).gather(1, label).mean()), abs=1e-6)


def test_a_dry_run_takes_nothing_from_training_images(patched, on_splits, monkeypatch):
    monkeypatch.setattr(calibration, "search", None)
    monkeypatch.setattr(calibration, "measure_moments", None)
    folder = patched(*on_splits, "corruption=embedding_noise", "calibrate=prob_drop:0.2", "dry_run=true")
    assert not (folder / "manifest.json").exists()


# --- a sweep ---


@pytest.fixture
def sweep(cli, made, on_splits, tmp_path):
    """``python patch.py -m …`` in this process: exit code, what was printed, the sweep's folder."""

    def make(*overrides):
        model = ["model=hf", f"model.path={made / 'vit'}", "data=parquet", "trainer=cpu", "logger=none"]
        rest = [o for o in on_splits if not o.startswith("corruption")]
        folder = tmp_path / "sweep"
        code, printed = cli("-m", *model, *rest, *overrides, f"hydra.sweep.dir={folder}")
        return code, printed, folder

    return make


def test_a_sweep_is_matched_by_the_weakest_and_no_curve_is_computed_twice(sweep, monkeypatch):
    looked, drops = [], calibration.TrainingRuns.drops

    def noted(training, one, strengths):
        looked.extend((str(one), strength) for strength in strengths)
        return drops(training, one, strengths)

    monkeypatch.setattr(calibration.TrainingRuns, "drops", noted)
    monkeypatch.setattr("vitpatch.runs.run.draw", lambda *everything: {})
    code, printed, folder = sweep("corruption=noise,noise_low,embedding_noise", "calibrate=match")
    assert code == 0, printed
    found = [manifest_of(f.parent)["calibration"] for f in sorted(folder.glob("*/manifest.json"))]
    assert len(found) == 3
    most = found[0]["largest_drops"]
    assert len(most) == 2  # noise and noise_low are one corruption at a strength that is still open
    for said in found:
        assert {k: pytest.approx(v) for k, v in said["largest_drops"].items()} == most
        assert said["wanted"] == pytest.approx(0.8 * min(most.values()), abs=1e-12)
        assert abs(said["drop"]["drop"] - said["wanted"]) <= TOLERANCE
    assert len(looked) == len(set(looked)) and len({name for name, _ in looked}) == 2
    assert {file.name for file in (folder / "calibration").iterdir()} > {FILE}
    assert len(list((folder / "calibration").iterdir())) == 3


def test_a_corruption_without_strength_cannot_be_matched(sweep):
    code, printed, _ = sweep("corruption=noise,none", "calibrate=match")
    assert code == 1 and "calibrate: corruption none has no strength" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["corruption=noise,blur"], {"Noise", "Blur"}),
        (["corruption=choice(noise,blur)", "window=1,2", "model.dtype=float32,bfloat16"], {"Noise", "Blur"}),
        (["corruption=glob([noise*,blur],exclude=noise_high)"], {"Noise", "Blur"}),
        (["corruption=blur", "window=1,2"], {"Blur"}),
        (["corruption=noise", "corruption.clip=true,false"], {"Noise"}),
        (["experiment=cifar10_corruptions"], {"Gray", "Noise", "Blur"}),  # its hydra.sweeper.params
        (["experiment=cifar10_corruptions", "corruption=noise"], {"Noise"}),  # the command's comes last
        (["experiment=cifar10_corruptions,imagenet_models", "corruption=noise,blur"], {"Noise", "Blur"}),
    ],
)
def test_jobs_learn_of_all_corruptions_of_the_sweep(tmp_path, overrides, wanted):
    found = corruptions_of(tmp_path, *overrides, "calibrate=match")
    assert {one["_target_"].rpartition(".")[2] for one in found} == wanted
    assert len(found) == len({json.dumps(one) for one in found})


def test_only_matched_jobs_are_listed(tmp_path):
    assert len(corruptions_of(tmp_path / "a", "corruption=noise,blur", "calibrate=match,null")) == 2
    assert corruptions_of(tmp_path / "b", "corruption=noise,blur", "calibrate=null,no_match") == []
    assert corruptions_of(tmp_path / "other", "corruption=noise,blur", "calibrate=prob_drop:0.1") is None


def corruptions_of(folder, *overrides):
    """What the start of a sweep leaves for its jobs."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from vitpatch.runs.config import register_resolvers

    register_resolvers()
    given = [*overrides, f"hydra.sweep.dir={folder}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        config = hydra.compose_config("patch", given, run_mode=RunMode.MULTIRUN, with_log_configuration=False)
        write_matched_corruptions(config, sweep_overrides(config))
    file = folder / FOLDER / FILE
    return json.loads(file.read_text()) if file.exists() else None


def test_a_sweep_that_did_not_say_its_corruptions_is_no_single_run(config, on_splits, tmp_path):
    with pytest.raises(VitPatchError, match=r"calibrate=match: .*does not say which corruptions the sweep has"):
        prepare(config(*on_splits, "calibrate=match"), tmp_path)
