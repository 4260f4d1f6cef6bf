"""Noise on embeddings and other images as corruptions, in whole runs, against hooks of this test's own."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, DEPTH, pictures, write_parquet

from vitpatch.corruptions.embedding_noise import EmbeddingNoise
from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.runs.reading import load_run, read_pages
from vitpatch.types import BaseRun

PATCHES, WIDTH, LABELS = 16, 32, [i % CLASSES for i in range(13)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    write_parquet(folder / "test.parquet", pictures(13), LABELS)
    write_parquet(folder / "train.parquet", pictures(9, seed=1), [i % CLASSES for i in range(9)])
    return f"data.path={folder}", "data.split=test"


def brute(made, spread, draw=0, std=3.0):
    """Probabilities of the label: clean, corrupt, and with each layer's attention output restored (layer first)."""
    model = Checkpoint(str(made / "vit")).load().model
    pixels = np.stack([np.asarray(image) for image in pictures(13)])
    pixels = (torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    noise = EmbeddingNoise(std).with_spread(spread).embedding_noise(torch.arange(13), 0, (PATCHES, WIDTH), draw)
    as_map = noise.transpose(1, 2).unflatten(2, (4, 4))
    values = {}

    def run(noisy, restored=None, seen=False):
        handles = []
        if noisy:
            projection = model.vit.embeddings.patch_embeddings.projection
            handles.append(projection.register_forward_hook(lambda m, a, out: out + as_map))
        for i, layer in enumerate(model.vit.layers):

            def hook(m, a, out, i=i):
                first = out[0] if isinstance(out, tuple) else out
                if seen:
                    values[i] = first
                if i == restored:
                    return (values[i], *out[1:]) if isinstance(out, tuple) else values[i]
                return None

            handles.append(layer.attention.register_forward_hook(hook))
        try:
            with torch.no_grad():
                probs = model(pixel_values=pixels).logits.double().softmax(-1)
        finally:
            for handle in handles:
                handle.remove()
        return probs[range(13), LABELS].numpy()

    clean = run(False, seen=True)
    return clean, run(True), np.stack([run(True, layer) for layer in range(DEPTH)])


def read(folder):
    effects = pd.read_parquet(folder / "effects.parquet")
    prob = effects.pivot_table(index="layer", columns="example_id", values="prob").to_numpy()
    return pd.read_parquet(folder / "examples.parquet"), prob, json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("by_parts", [True, False])
def test_noise_on_embeddings_is_patched_like_any_corruption(made, patched, data, monkeypatch, by_parts):
    if not by_parts:
        monkeypatch.setattr("vitpatch.models.vit.PatchableViT.runs_by_parts", lambda self, site: False)
    folder = patched("corruption=embedding_noise", "window=1", *data)
    examples, prob, manifest = read(folder)
    clean, corrupt, restored = brute(made, manifest["embedding_std"])
    assert np.abs(clean - corrupt).max() > 0.05
    assert np.allclose(examples["prob_clean"], clean, rtol=0, atol=1e-5)
    assert np.allclose(examples["prob_corrupt"], corrupt, rtol=0, atol=1e-5)
    assert np.allclose(prob, restored, rtol=0, atol=1e-5)


def test_several_draws_average_probabilities(made, patched, data):
    examples, prob, manifest = read(patched("corruption=embedding_noise", "corruption.draws=3", "window=1", *data))
    runs = [brute(made, manifest["embedding_std"], draw) for draw in range(3)]
    _, corrupt, restored = (np.mean([run[i] for run in runs], 0) for i in range(3))
    assert np.allclose(examples["prob_corrupt"], corrupt, rtol=0, atol=1e-5)
    assert np.allclose(prob, restored, rtol=0, atol=1e-5)
    odds = np.log(corrupt / (1 - corrupt))
    assert np.allclose(examples["log_odds_corrupt"], odds, rtol=0, atol=1e-3)


def test_a_single_image_is_shown_by_ten_draws(made, patched, data):
    folder = patched("corruption=embedding_noise", "window=1", "controls=false", *data, kept=6)
    manifest = read(folder)[2]
    runs = [brute(made, manifest["embedding_std"], draw) for draw in range(10)]
    _, corrupt, restored = (np.mean([run[i] for run in runs], 0) for i in range(3))
    for page in read_pages(folder / "pages.parquet"):
        assert "means of 10 draws" in page.chosen
        for image in page.images:
            assert image.base[BaseRun.CORRUPT] == pytest.approx(corrupt[image.example_id], abs=1e-5)
            assert np.allclose(image.patched, restored[:, image.example_id], rtol=0, atol=1e-5)
    run = load_run(folder).read(metric="log_odds")  # for which there are the draws of the run alone
    odds = run.effects["log_odds"].to_numpy().reshape(-1, len(run.summary))
    for page in run.pages:
        assert page.chosen.startswith("chosen on prob: ") and "draws" not in page.chosen
        for image in page.images:
            assert np.allclose(image.patched, odds[image.example_id], rtol=0, atol=1e-5)


def test_noise_on_embeddings_is_no_step_of_a_chain(patched, data):
    with pytest.raises(VitPatchError, match="embedding_noise is added inside the model"):
        patched("corruption=chain", "corruption.steps=[gray,embedding_noise]", *data)


@pytest.mark.parametrize("kind", ["same_class", "other_class", "nearest_luminance"])
def test_another_image_as_the_corruption(patched, data, kind):
    examples, _, _ = read(patched("corruption=other_image", f"corruption.kind={kind}", "window=2", *data))
    clean, corrupt = examples["pred_clean"].to_numpy(), examples["pred_corrupt"].to_numpy()
    light = np.array([np.asarray(image).mean((0, 1)) @ [0.299, 0.587, 0.114] for image in pictures(13)])
    if kind == "nearest_luminance":
        labels = np.array(LABELS)
        apart = np.abs(light[:, None] - light) + 1e9 * (labels[:, None] == labels)
        assert (clean[apart.argmin(1)] == corrupt).all()
        return
    found = pd.read_parquet(patched("window=1", *data, folder="controls") / "examples.parquet")
    partner = found[f"partner_{kind}"].to_numpy()  # the same derangement as that of controls
    assert (clean[partner] == corrupt).all() and len(set(corrupt)) > 1


def test_the_datas_own_pairs(patched, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image

    other = pictures(13, seed=5)
    names = [f"class_{c}" for c in range(CLASSES)]
    features = Features({"image": Image(), "twin": Image(), "label": ClassLabel(names=names)})
    rows = {"image": pictures(13), "twin": other, "label": LABELS}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "pairs.parquet"))
    Dataset.from_dict(rows | {"image": other}, features=features).to_parquet(str(tmp_path / "twins.parquet"))
    how = ("corruption=other_image", "corruption.kind=pair", "data.image_column=image", "window=2")
    examples = read(patched(*how, f"data.path={tmp_path / 'pairs.parquet'}", "data.pair_column=twin"))[0]
    twins = read(patched(f"data.path={tmp_path / 'twins.parquet'}", "data.image_column=image", folder="twins"))[0]
    assert np.allclose(examples["prob_corrupt"], twins["prob_clean"], rtol=0, atol=1e-6)
    rows["twin"] = pictures(13, seed=6)  # other counterparts are other data
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "others.parquet"))
    how_too = (*how, f"data.path={tmp_path / 'others.parquet'}", "data.pair_column=twin")
    digests = [json.loads((tmp_path / name / "manifest.json").read_text())["data"]["digest"] for name in ("run",)]
    digests.append(read(patched(*how_too, folder="others"))[2]["data"]["digest"])
    assert len(set(digests)) == 2
    with pytest.raises(VitPatchError, match=r"data\.pair_column"):
        patched(*how, f"data.path={tmp_path / 'pairs.parquet'}", folder="none")
    with pytest.raises(VitPatchError, match=r"data\.pair_column 'twain'"):
        patched(*how, f"data.path={tmp_path / 'pairs.parquet'}", "data.pair_column=twain", folder="wrong")


def test_an_image_without_a_partner_stops_a_corruption_that_asks_for_one(patched, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", pictures(3), [0, 0, 1])
    with pytest.raises(VitPatchError, match=r"1 of 3 images, the first 2, have no same_class partner"):
        patched("corruption=other_image", "corruption.kind=same_class", f"data.path={path}")


def test_a_corruption_with_partners_is_calibrated_on_partners_of_training_images(patched, data):
    folder = patched(
        "corruption=other_image", "corruption.kind=nearest_luminance", "calibrate=prob_drop:0.02", "window=2", *data
    )
    found = json.loads((folder / "manifest.json").read_text())["calibration"]
    assert found["key"] == "amount" and 0 < found["strength"] < 1
    assert found["drop"]["drop"] == pytest.approx(0.02, abs=0.002)


def with_a_bad_row(path, bad, **columns):
    """Six images of three classes in parquet, one of which (or whose twin) is no image."""
    import io

    from datasets import ClassLabel, Dataset, Features, Image

    def encoded(image):
        out = io.BytesIO()
        image.save(out, "PNG")
        return {"bytes": out.getvalue(), "path": None}

    broken = {"bytes": b"no image", "path": None}
    rows = {"image": [encoded(x) for x in pictures(6)], "twin": [encoded(x) for x in pictures(6, seed=9)]}
    column, row = bad
    rows[column][row] = broken
    names = [f"class_{c}" for c in range(CLASSES)]
    features = Features({"image": Image(), "twin": Image(), "label": ClassLabel(names=names)})
    rows["label"] = [0, 0, 1, 1, 2, 2]
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return f"data.path={path}", "data.image_column=image", "data.on_error=skip"


@pytest.mark.parametrize("kind", ["same_class", "nearest_luminance", "pair"])
def test_an_image_whose_counterpart_cannot_be_read_is_left_out_and_counted(patched, tmp_path, kind):
    data = with_a_bad_row(tmp_path / "x.parquet", ("twin" if kind == "pair" else "image", 3))
    pair = ["data.pair_column=twin"] * (kind == "pair")
    folder = patched("corruption=other_image", f"corruption.kind={kind}", "window=2", *data, *pair)
    examples, _, manifest = read(folder)
    lost = {"same_class": {2, 3}, "nearest_luminance": {3}, "pair": {3}}[kind]
    assert set(range(6)) - set(examples["example_id"]) == lost
    assert manifest["counts"]["dropped"] == {"unreadable": len(lost)} and manifest["counts"]["read"] == 6 - len(lost)
    assert 3 not in set(examples["partner_corruption"])
    with pytest.raises(VitPatchError, match="not a readable image"):
        patched("corruption=other_image", f"corruption.kind={kind}", *data, *pair, "data.on_error=raise", folder="no")


def test_an_image_whose_control_cannot_be_read_has_none(patched, tmp_path):
    data = with_a_bad_row(tmp_path / "x.parquet", ("image", 3))
    examples = read(patched("window=1", *data))[0].set_index("example_id")
    assert examples.loc[2, "partner_same_class"] == -1 and len(examples) == 5
    assert examples.drop(2)["partner_same_class"].isin([0, 1, 4, 5]).all()


@pytest.mark.parametrize("how", ["donor=mean", "calibrate=prob_drop:0.01", "corruption=embedding_noise"])
def test_training_images_none_of_which_can_be_read_are_one_line(patched, tmp_path, how):
    from datasets import Dataset

    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "test.parquet", pictures(5), range(5))
    train = Dataset.from_parquet(str(write_parquet(folder / "train.parquet", pictures(2), [0, 1])))
    train = train.cast_column("image", __import__("datasets").Image(decode=False))
    train.map(lambda row: {"image": {"bytes": b"no", "path": None}}).to_parquet(str(folder / "train.parquet"))
    noise = [] if how.startswith(("donor", "corruption")) else ["corruption=noise"]
    with pytest.raises(VitPatchError, match="none of the 2 can be read"):
        patched(how, *noise, "window=2", f"data.path={folder}", "data.split=test", "data.on_error=skip")
