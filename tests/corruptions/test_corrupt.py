"""``vitpatch.corrupt``: the pixels that a run makes of the same images, from whatever they are given as."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from composed import composed
from conftest import ROOT, pictures
from PIL import Image

import vitpatch
from vitpatch import VitPatchError
from vitpatch.data.arrays import read_pixels
from vitpatch.runs.predict import data_module
from vitpatch.runs.setup import prepare

EMOJI = ROOT / "vitpatch" / "assets" / "emoji" / "test.parquet"


@pytest.fixture(scope="module")
def vit():
    return vitpatch.load(ROOT / "vitpatch" / "assets" / "emoji_vit")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("occlude_half", {}),
        ("background_swap", {"kind": "nearest_luminance"}),
        ("chain", {"steps": ["noise", "patch_shuffle"], "amount": np.float32(0.5)}),
    ],
)
def test_the_pixels_are_a_runs_own(vit, name, keys):
    words = [f"corruption.{key}={value}".replace("'", "").replace(" ", "") for key, value in keys.items()]
    setup = prepare(composed("patch", "data.limit=8", "seed=3", "logger=none", f"corruption={name}", *words))
    batch = data_module(setup, 8).batch_of(range(8))
    want = setup.model.normalize(setup.corruption.pixels(batch, 3))
    rows = pd.read_parquet(EMOJI)[:8]
    images, masks = ([Image.open(io.BytesIO(one["bytes"])) for one in rows[column]] for column in ("image", "mask"))
    given = {"labels": rows["label"], "clusters": rows["base"], "masks": masks, "seed": 3}
    assert torch.equal(vitpatch.corrupt(name, images, model=vit, **given, **keys), want)
    if name == "occlude_half":  # what is drawn is the image's own
        one, other = (vitpatch.corrupt(name, images[5], model=vit, masks=masks[5], ids=[i], seed=3) for i in (5, 0))
        assert torch.equal(one[0], want[5]) and not torch.equal(other, one)


def test_pictures_bytes_and_numbers_are_the_same_images(vit):
    images = pictures(3)
    images[0].putdata([(value, 255 - value, 7) for value in range(256)] * 4)
    as_bytes = np.stack([np.asarray(image) for image in images])
    numbers = torch.from_numpy(as_bytes).permute(0, 3, 1, 2).float() / 255
    for given in (images, as_bytes, torch.from_numpy(as_bytes), numbers, numbers.numpy().astype(float), iter(images)):
        assert torch.equal(read_pixels("images", given), numbers)
    clean = vitpatch.corrupt("none", as_bytes, model=vit)
    assert torch.equal(clean, vit.normalize(numbers))
    pairs = vitpatch.corrupt("other_image", images, kind="pair", pairs=numbers.flip(0))
    assert torch.equal(pairs, numbers.flip(0))


def test_what_is_wrong_is_said_in_one_line(vit):
    tall = [Image.new("RGB", (8, height)) for height in (8, 9)]
    numbers, bare = torch.zeros(2, 3, 32, 32), vitpatch.load(vit.model)
    for name, given, words in (
        ("grey", {}, "corruption: no option 'grey' in conf/corruption; did you mean gray. there are background_only, "),
        ("noise", {"sdt": 1}, "corruption.sdt: Noise has no such key; did you mean std?"),
        ("noise", {"std": -1.0}, "corruption.std -1.0: expected a number from 0"),
        ("embedding_noise", {}, "no pixels show it; patch with python patch.py corruption=embedding_noise"),
        ("gray", {"model": bare}, "got PatchableViT without an image processor; give what vitpatch.load returned"),
        ("silhouette", {}, "goes by the object; give masks"),
        ("other_image", {}, "takes another image by its class; give labels"),
        ("other_image", {"kind": "pair"}, "takes each image's counterpart; give pairs"),
        ("other_image", {"labels": [0, 1], "clusters": ["a", "a"]}, "2 of 2 images, the first 0, have no other"),
        ("other_image", {"labels": [0, 1], "clusters": ["a"]}, "clusters: 1 of them, 2 images"),
        ("noise", {"ids": [0]}, "ids: 1 of them, 2 images"),
        ("noise", {"seed": -1}, "seed -1: expected"),
        ("gray", {"images": numbers - 1}, "images: values -1 to -1; expected 0 to 1, as before normalisation"),
        ("gray", {"images": numbers[0]}, r"images: got float32 \(3, 32, 32\); expected PIL images, bytes"),
        ("gray", {"images": ["cat.jpg"]}, "images: got a list of str"),
        ("gray", {"images": []}, "images: got nothing"),
        ("gray", {"images": tall}, "of 8 × 8, 9 × 8 pixels; give the model"),
        ("gray", {"images": numbers[..., :8], "model": vit}, "images: 32 × 8 pixels; expected 32 × 32"),
        ("occlude", {"masks": numbers[:1, :1]}, "masks: 1 of them, 2 images"),
        ("occlude", {"masks": numbers}, r"masks: got float32 \(2, 3, 32, 32\); expected .* \(images, 1, height"),
    ):  # fmt: skip
        with pytest.raises(VitPatchError, match=words) as error:
            vitpatch.corrupt(name, **({"images": numbers} | given))
        assert "\n" not in str(error.value)
