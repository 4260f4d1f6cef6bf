"""train_eval.py: trains, resumes, evaluates, and leaves a model that patch.py takes."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, NAMES, pictures, save_model, write_parquet

from vitpatch.data.sources import ParquetImages
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.training.fit import _split, evaluate
from vitpatch.training.module import Augment


@pytest.fixture
def splits(tmp_path):
    """A folder with train and test images whose class is the colour of a square: soon learned."""
    from PIL import Image

    colors = ["red", "green", "blue", "yellow", "black"]
    for split, n in (("train", 40), ("test", 10)):
        images = pictures(n, size=16, seed=n)
        for i, image in enumerate(images):
            image.paste(Image.new("RGB", (12, 12), colors[i % CLASSES]), (2, 2))
        write_parquet(tmp_path / f"{split}.parquet", images, [i % CLASSES for i in range(n)])
    return tmp_path


@pytest.fixture
def arguments(splits, tmp_path):
    small = ["image_size=16", "patch_size=8", "hidden_size=16", "num_hidden_layers=2", "intermediate_size=32"]
    data = ["data=parquet", f"data.path={splits}", "data.split=test", "trainer=cpu", "trainer.precision=32-true"]
    recipe = [
        "recipe.epochs=20",
        "recipe.batch_size=8",
        "recipe.learning_rate=0.01",
        "recipe.average=0.0",
        "corruptions=[gray]",
    ]
    return [*data, *recipe, *(f"architecture.{key}" for key in small), f"hydra.run.dir={tmp_path / 'out'}"]


def test_it_trains_evaluates_and_leaves_a_model_that_patch_takes(cli, arguments, splits, tmp_path):
    code, printed = cli(*arguments, script="train_eval")
    assert code == 0, printed
    model, out = tmp_path / "out" / "model", tmp_path / "out"
    assert {"model.safetensors", "config.json", "preprocessor_config.json"} <= {p.name for p in model.iterdir()}
    assert not list(model.glob("*.bin"))
    table = pd.read_csv(out / "evaluation.csv")
    assert table["run"].unique().tolist() == ["clean", "gray"]
    clean = table[table["run"] == "clean"].set_index("class")
    assert clean.loc["balanced", "accuracy"] > 0.6  # chance is 0.2
    assert clean.loc["balanced", "accuracy"] == pytest.approx(clean.loc[NAMES, "accuracy"].mean())
    assert "| balanced |" in printed and "| class_0 | 2 |" in (out / "evaluation.md").read_text()
    where = ["data=parquet", f"data.path={splits}", "data.split=test", "trainer=cpu", "logger=none"]
    code, printed = cli("model=hf", f"model.path={model}", *where, "window=1", f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 0, printed
    examples = pd.read_parquet(tmp_path / "run" / "examples.parquet")
    assert (examples.pred_clean == examples.label).mean() == pytest.approx(clean.loc["all", "accuracy"])
    assert examples.prob_corrupt.mean() == pytest.approx(
        table[table["run"] == "gray"].set_index("class").loc["all", "prob"], abs=1e-6
    )


def test_images_that_cannot_be_read_are_left_out_where_that_is_asked_for(cli, arguments, splits, tmp_path):
    for split in ("train", "test"):
        table = pd.read_parquet(splits / f"{split}.parquet")
        table.at[3, "image"] = {"bytes": b"no image", "path": None}
        table.to_parquet(splits / f"{split}.parquet")
    code, printed = cli(*arguments, "recipe.epochs=1", "recipe.validation=0.2", script="train_eval")
    assert code == 1 and "data.on_error=skip leaves it out" in printed
    code, printed = cli(
        *arguments, "recipe.epochs=1", "recipe.validation=0.2", "data.on_error=skip", script="train_eval"
    )
    assert code == 0 and printed.count("left out: ") == 2 and "9 images of" in printed, printed
    (saved,) = [line for line in printed.splitlines() if "saved: " in line]
    assert f"data.path={splits} data.split=test data.on_error=skip model=hf" in saved


def test_a_model_that_would_not_be_fine_tuned_is_refused(cli, arguments):
    code, printed = cli(*arguments, "model=emoji_vit", script="train_eval")
    assert code == 1 and "error: model=emoji_vit: no model is fine-tuned" in printed


def test_it_goes_on_where_it_was_stopped(cli, arguments, tmp_path):
    extra = ["recipe.validation=0.25", "recipe.average=0.5", "recipe.learning_rate=0.0"]  # no epoch is a better one
    assert cli(*arguments, *extra, "recipe.epochs=2", script="train_eval")[0] == 0
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    first = torch.load(last, weights_only=True)
    assert (first["epoch"], first["global_step"]) == (1, 8)
    code, printed = cli(*arguments, *extra, "recipe.epochs=3", script="train_eval")
    assert code == 0, printed
    resumed = torch.load(last, weights_only=True)
    assert resumed["global_step"] == 12  # 4 batches in each of 3 epochs, the first two not again


def test_another_training_in_the_same_folder_is_refused(cli, arguments, tmp_path):
    assert cli(*arguments, "recipe.epochs=1", script="train_eval")[0] == 0
    assert (tmp_path / "out" / "manifest.json").exists()
    code, printed = cli(*arguments, "recipe.epochs=1", "seed=5", script="train_eval")
    assert code == 1 and "holds a training with other settings (seed)" in printed and "Traceback" not in printed


def test_a_mistyped_start_does_not_hold_the_folder(cli, arguments):
    assert cli(*arguments, "recipe.learning_rate=-1", script="train_eval")[0] == 1
    code, printed = cli(*arguments, "recipe.epochs=1", script="train_eval")
    assert code == 0, printed


def test_a_sweep_of_trainings_saves_no_model_over_another(cli, arguments, tmp_path):
    where = ["seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    code, printed = cli("-m", *arguments, *where, f"save_to={tmp_path / 'model'}", script="train_eval")
    assert code == 1 and "2 runs would save their models there, each over the one before" in printed, printed
    assert not (tmp_path / "sweep").exists() and not (tmp_path / "model").exists()
    apart = ["recipe.epochs=1", f"save_to={tmp_path}/of_${{seed}}"]
    code, printed = cli("-m", *arguments, *where, *apart, script="train_eval")
    assert code == 0 and "2 of 2 runs finished" in printed, printed
    assert (tmp_path / "of_0").exists() and (tmp_path / "of_1").exists()


def test_it_stops_early_when_it_gets_no_better(cli, arguments, tmp_path):
    extra = ["recipe.validation=0.25", "recipe.patience=1", "recipe.learning_rate=0.0", "recipe.epochs=9"]
    assert cli(*arguments, *extra, script="train_eval")[0] == 0
    assert torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] < 3


def test_a_kept_head_keeps_its_names_and_a_map_is_read_as_in_patching(cli, arguments, splits, tmp_path):
    names = NAMES[3::-1]  # as many as are left, in another order
    base = save_model(tmp_path / "base", "vit", names=names, size=16)
    rest = [a for a in arguments if not a.startswith("architecture")]
    chosen = ["architecture=none", "model=hf", f"model.path={base}", "data.label_map={class_4: null}"]
    code, printed = cli(*rest, *chosen, "recipe.epochs=1", "recipe.learning_rate=0.0", script="train_eval")
    assert code == 0 and "the checkpoint's head is kept, its classes are class_3, class_2" in printed, printed
    saved = Checkpoint(str(tmp_path / "out" / "model")).load()
    assert saved.label_names == tuple(names) and saved.weights_digest == Checkpoint(str(base)).load().weights_digest
    table = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    clean = table[table["run"] == "clean"].set_index("class")
    assert clean.index.tolist() == [*names, "balanced", "all"] and clean.loc["all", "n"] == 8  # of 10
    images = ParquetImages(path=str(splits), split="test").open()
    pixels = torch.stack([saved.preprocessing.to_input(images.image(row)) for row in range(10)])
    probs = saved(saved.normalize(pixels)).softmax(-1)
    for name in names:
        rows = np.flatnonzero(images.labels == NAMES.index(name))
        assert clean.loc[name, "prob"] == pytest.approx(float(probs[rows, names.index(name)].mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("corruptions=[sepia]", "corruptions: no option 'sepia'"),
        ("train_split=dev", "no file dev*.parquet"),
        ("recipe.epochs=0", "recipe.epochs 0"),
        ("recipe.epochs=x", "recipe.epochs 'x'"),
        ("recipe.learning_rate=-1", "recipe.learning_rate -1"),
        ("corruptions=sepia", "no option 'sepia'"),
    ],
)
def test_wrong_input_is_one_line(cli, arguments, override, says):
    code, printed = cli(*arguments, override, script="train_eval")
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and says in errors[0] and "Traceback" not in printed, printed


def test_held_back_clusters_are_held_back_whole():
    class Images:
        clusters = np.repeat(np.arange(100), 3)

    kept, held = _split(Images, 0.2)
    assert set(Images.clusters[kept]).isdisjoint(Images.clusters[held])
    assert len(kept) + len(held) == 300 and 30 < len(held) < 90
    assert len(_split(Images, 0.0)[1]) == 0


def test_augmentation_of_nothing_changes_nothing_and_of_all_stays_in_range():
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Augment()(images), images)
    changed = Augment(rotate=20, scale=0.2, shear=0.1, shift=0.1, jitter=0.2, gray=0.5, erase=0.5)(images)
    assert changed.shape == images.shape and 0 <= float(changed.min()) and float(changed.max()) <= 1 + 1e-6
    assert (changed - images).abs().mean((1, 2, 3)).min() > 0.01
    gray = Augment(gray=0.5)(images)
    share = ((gray.amax(1) - gray.amin(1)).amax((1, 2)) < 1e-6).double().mean()
    assert 0.25 < float(share) < 0.75
    white = Augment(shift=0.4)(torch.ones(8, 3, 16, 16))
    assert torch.allclose(white, torch.ones_like(white), atol=1e-6)  # what comes in is white


def test_the_evaluation_table_counts(made):
    from vitpatch.corruptions.base import Identity

    images = ParquetImages(path=str(made / "images.parquet")).open()
    table = evaluate(Checkpoint(str(made / "vit")).load(), images, {"none": Identity()}, seed=0, batch_size=4)
    clean, none = (table[table["run"] == run].drop(columns="run").reset_index(drop=True) for run in ("clean", "none"))
    pd.testing.assert_frame_equal(clean, none)
    assert clean["class"].tolist() == [*NAMES, "balanced", "all"] and clean["n"].tolist() == [3, 3, 3, 2, 2, 13, 13]
    by_class = clean.iloc[:CLASSES]
    assert (by_class.accuracy * by_class.n).sum() / 13 == pytest.approx(clean.accuracy.iloc[-1])
    assert clean.predicted.iloc[-1] == pytest.approx(by_class.predicted.max())
