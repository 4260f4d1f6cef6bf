"""A run's folder: what is in it, when it counts as finished, and what is said of it."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from composed import composed
from conftest import DEPTH, pictures, save_model, write_parquet
from PIL import Image

from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.runs.run import run
from vitpatch.study import read_study

SUMMARY = (
    "site,layer,head,tokens,window,first_layer,last_layer,n_layers,n,n_clusters,effect,effect_se,effect_low,"
    "effect_high,recovered,recovered_low,recovered_high,accuracy,log_odds_effect,log_odds_effect_low,"
    "log_odds_effect_high,direct_log_odds,direct_log_odds_low,direct_log_odds_high,delta_norm,"
    "effect_macro,effect_macro_low,effect_macro_high,effect_sim_low,effect_sim_high,"
    "p,in_peak_set,peak_share"
).split(",")


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_the_folder_is_the_contracts(patched):
    folder = patched("window=3")
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", "examples.parquet", "effects.parquet", "summary.csv", "pages.parquet", "figures"}
    summary = pd.read_csv(folder / "summary.csv")
    assert summary.columns.tolist() == SUMMARY and len(summary) == DEPTH
    effects = pd.read_parquet(folder / "effects.parquet").groupby("layer")
    assert summary["effect"].to_numpy() == pytest.approx(effects["effect"].mean().to_numpy(), abs=1e-7)
    examples = pd.read_parquet(folder / "examples.parquet").set_index("example_id")
    right = effects.apply(lambda rows: (rows.pred == examples.label.loc[rows.example_id].to_numpy()).mean())
    assert summary["accuracy"].to_numpy() == pytest.approx(right.to_numpy(), abs=1e-12)
    total = (examples.prob_clean - examples.prob_corrupt).mean()
    manifest = manifest_of(folder)
    assert manifest["total_effect"]["mean"] == pytest.approx(total, abs=1e-7)
    assert manifest["peak_layer"] == int((np.sign(total) * summary.effect).idxmax())
    assert manifest["counts"] == {"images": 13, "read": 13, "included": 13, "dropped": {}, "clusters": 13, "patches": 4}
    assert {"run_id", "config", "versions", "model", "seconds", "images_per_second"} <= set(manifest)


def test_pictures_are_pictures(patched, tmp_path, caplog):
    """Also of labels that look like formulas; and the end of a run says where, what and how much."""
    names = ["$\\frac$", "cash $5 to $10", "<b>", "a" * 99, "_"]
    path = write_parquet(tmp_path / "odd.parquet", pictures(13), [i % 5 for i in range(13)], names=names)
    odd = [f"data.path={path}", "data.label_map={0: class_0, 1: class_1, 2: class_2, 3: class_3, 4: class_4}"]
    with caplog.at_level(logging.INFO):
        folder = patched(*odd, "window=3", "metric=log_odds", "synergy=true", "target.layers=[2,0]", pictures=True)
    for part in (str(folder), "total effect", "on log_odds, n = 13 images", "finding", "layer_profile.png"):
        assert part in caplog.text
    found = sorted(path.name for path in (folder / "figures").iterdir())
    names = ["direct", "examples", "heatmap", "layer_profile", "peak", "windows"]
    assert found == [f"{name}.png" for name in names]
    for name in found:
        pixels = np.asarray(Image.open(folder / "figures" / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 300 and pixels.mean() > 100 and pixels.std() > 20, name


def test_a_finished_run_is_left_alone_and_another_is_refused(patched, config, tmp_path, caplog):
    folder = patched("window=1")
    before = (folder / "manifest.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        patched("window=1", "batch_size=3", "sweep=other")  # none of these changes a number
    assert (folder / "manifest.json").stat().st_mtime_ns == before and "finished before" in caplog.text
    with pytest.raises(VitPatchError, match=r"other window \(\[1\] there, \[2\] here\).*overwrite=true"):
        patched("window=2")
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    patched("window=2", "overwrite=true")
    assert manifest_of(folder)["config"]["window"] == 2


VIEWS = ("metric=kl", "rival=clean", "include=clean_correct", "include=min_total_effect:0.1", "interval=bca",
         "test=headline")  # fmt: skip


def test_the_run_id_is_of_what_is_computed(config, tmp_path, made):
    from vitpatch.runs.setup import prepare

    def run_id(*overrides, family="vit"):
        return prepare(config(*overrides, family=family)).run_id

    same = run_id()
    assert same == run_id(
        "batch_size=1",
        "sweep=x",
        "logger=wandb",
        "overwrite=true",
        "trainer=auto",
        "memory_gb=1",
        "trainer.precision=32-true",
        *VIEWS,
    )
    changed = ("window=1", "seed=1", "direction=noise", "target=mlp_out", "data.limit=5",
               "corruption=blur", "target.tokens=cls", "target.layers=[0]", "model.dtype=bfloat16", "window=[1,3]",
               "trainer.precision=bf16-mixed", "matmul_precision=high", "target=z")  # fmt: skip
    ids = [run_id(override) for override in changed] + [run_id(family="deit")]
    assert len({same, *ids}) == len(ids) + 1


def test_the_view_id_is_of_how_it_is_read():
    views = [read_study(composed("patch", *each)).view.view_id for each in ((), *((view,) for view in VIEWS))]
    assert len(set(views)) == len(views)
    others = ("window=1", "seed=1", "direction=noise", "target=mlp_out", "wanted_width=0.1", "batch_size=1")
    assert {read_study(composed("patch", other)).view.view_id for other in others} == {views[0]}


@pytest.fixture
def half_broken(tmp_path):
    rows = pictures(4)
    path = write_parquet(tmp_path / "x.parquet", rows, [0, 1, 2, 3])
    table = pd.read_parquet(path)
    table.at[2, "image"] = {"bytes": b"GIF89a nothing", "path": "cat.gif"}
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    pq.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False), path)
    return path


def test_an_unreadable_image_stops_the_run_or_is_counted(patched, half_broken, tmp_path, caplog):
    with pytest.raises(VitPatchError, match=r"row 2 \(cat.gif\).*not a readable image.*data.on_error=skip"):
        patched(f"data.path={half_broken}", folder="a")
    assert not (tmp_path / "a" / "manifest.json").exists()
    with caplog.at_level(logging.INFO):
        folder = patched(f"data.path={half_broken}", "data.on_error=skip", "batch_size=1", folder="b")
    assert "skipped: data row 2 (cat.gif)" in caplog.text and "1 of 4 images could not be read" in caplog.text
    assert pd.read_parquet(folder / "examples.parquet").example_id.tolist() == [0, 1, 3]
    counts = manifest_of(folder)["counts"]
    assert (counts["images"], counts["read"], counts["dropped"]) == (4, 3, {"unreadable": 1})


def test_a_run_without_a_readable_image_is_no_run(patched, half_broken, tmp_path):
    table = pd.read_parquet(half_broken)
    path = write_parquet(tmp_path / "y.parquet", [table.image[2]], [0])
    with pytest.raises(VitPatchError, match="none of the 1 images can be read"):
        patched(f"data.path={path}", "data.on_error=skip")


def test_a_corruption_that_does_nothing_says_so(patched, caplog):
    with caplog.at_level(logging.INFO):
        folder = patched("corruption=none")
    assert "Both runs have the same probability of the true class: the total effect is 0 (13 images). N" in caplog.text
    manifest = manifest_of(folder)
    assert manifest["total_effect"]["mean"] == 0 and manifest["peak_layer"] is None
    assert any("recovered is empty" in note and note.endswith("the total effect is 0") for note in manifest["notes"])
    assert pd.read_csv(folder / "summary.csv")["recovered"].isna().all()


def test_one_image_has_effects_and_no_interval(patched, caplog):
    with caplog.at_level(logging.INFO):
        folder = patched("data.limit=1")
    assert "one cluster: no interval" in caplog.text and "is not shown to change" not in caplog.text
    assert manifest_of(folder)["total_effect"]["low"] is None
    assert any("without intervals" in sentence for sentence in manifest_of(folder)["finding"])


def test_the_whole_state_is_noted(patched, caplog):
    with caplog.at_level(logging.INFO):
        folder = patched("target=resid_post", "window=1")
    assert "the effect is the total effect by construction" in caplog.text
    assert any("the whole residual stream is replaced" in sentence for sentence in manifest_of(folder)["finding"])
    parts = patched("target=resid_post", "window=1", "target.tokens=[cls,all]", folder="parts")
    assert not any("the whole residual stream is replaced" in sentence for sentence in manifest_of(parts)["finding"])


def test_weights_that_are_not_finite_are_found_when_loaded(patched, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "nan", "vit")
    weights = load_file(folder / "model.safetensors")
    weights["vit.encoder.layer.2.attention.output.dense.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VitPatchError, match="not finite from layer 2 on"):
        patched(f"model.path={folder}")


def test_a_logit_that_is_not_finite_names_image_and_layer(made, patched, tmp_path):
    mlp = Checkpoint(str(made / "vit")).load().model.vit.layers[2].mlp
    passes = []

    def overflows_once(module, args, output):
        passes.append(len(output))
        return output.index_fill(0, torch.tensor([1]), torch.inf) if passes == [10] else output

    with mlp.register_forward_hook(overflows_once):  # the first pass: both base runs, the recipient's rows first
        with pytest.raises(VitPatchError, match=r"image 1: the corrupt run is not finite"):
            patched()


def test_a_patched_run_that_is_not_finite_names_image_and_patch(made, patched):
    mlp = Checkpoint(str(made / "vit")).load().model.vit.layers[2].mlp
    passes = []

    def overflows_once(module, args, output):
        passes.append(len(output))
        return output.index_fill(0, torch.tensor([9]), torch.nan) if passes == [10, 15] else output

    with mlp.register_forward_hook(overflows_once):  # after the base runs the states of layers 0 to 2, 5 rows each
        with pytest.raises(VitPatchError, match=r"image 4: with attn_out of layers 1 to 1 patched.*not finite"):
            patched("window=1", "controls=false")


def test_the_first_bad_layer_is_found(made):
    model = Checkpoint(str(made / "vit")).load()

    def overflows(module, args, output):
        return output * torch.inf

    with model.model.vit.layers[2].register_forward_hook(overflows):
        assert model.first_bad_layer(torch.zeros(1, 3, 32, 32)) == 2
    assert model.first_bad_layer(torch.zeros(1, 3, 32, 32)) is None


class Halver:
    """A user's own corruption."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, batch, seed):
        if self.by < 0:
            raise IndexError("no such channel")
        return batch.images * self.by if self.by else batch.images[:, :1]


def test_a_users_own_corruption_is_one_class_and_one_file(config, tmp_path):
    cfg = config("~corruption", "+corruption._target_=test_run.Halver", "+corruption.by=0.5")
    run(cfg, tmp_path / "own")
    assert manifest_of(tmp_path / "own")["config"]["corruption"] == {"_target_": "test_run.Halver", "by": 0.5}
    cfg.corruption.by = 0.0
    with pytest.raises(VitPatchError, match=r"corruption Halver gave \(5, 1, 32, 32\); expected \(5, 3, 32, 32\)"):
        run(cfg, tmp_path / "wrong")
    cfg.corruption.by = -1.0
    with pytest.raises(
        VitPatchError, match=r"corruption Halver raised IndexError: no such channel \(.*test_run.py, line"
    ):
        run(cfg, tmp_path / "raises")
