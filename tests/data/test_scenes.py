"""Emoji on textured backgrounds: the same drawings, labels and masks; other grounds, the same for ever."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vitpatch.data.scenes import TEXTURES, TexturedScenes, on_background, texture
from vitpatch.data.sources import ParquetImages
from vitpatch.errors import VitPatchError
from vitpatch.runs.config import asset

KEYS = dict(
    path=asset("emoji"), image_column="image", label_column="label", mask_column="mask", cluster_column="base", limit=40
)


@pytest.fixture(scope="module")
def opened():
    return {
        (kind, split): kind(split=split, **KEYS).open()
        for kind in (ParquetImages, TexturedScenes)
        for split in ("test", "train")
    }


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_drawing_is_the_same_and_the_ground_is_not(opened, split):
    plain, scenes = opened[ParquetImages, split], opened[TexturedScenes, split]
    assert scenes.labels.tolist() == plain.labels.tolist() and scenes.clusters.tolist() == plain.clusters.tolist()
    assert scenes.label_names == plain.label_names and scenes.name(3) == plain.name(3)
    grounds = []
    for i in range(len(plain)):
        alpha = np.asarray(plain.mask(i))
        assert np.array_equal(alpha, np.asarray(scenes.mask(i)))
        drawn, scene = np.asarray(plain.image(i)), np.asarray(scenes.image(i))
        assert np.array_equal(drawn[alpha == 255], scene[alpha == 255])
        grounds.append(scene[alpha == 0])  # empty where a drawing fills the image
    assert (np.concatenate(grounds) != 255).any(-1).mean() > 0.99 and sum(map(len, grounds)) > 5000


def test_a_drawing_on_white_is_laid_on_another_ground_as_pillow_lays_it():
    rng = np.random.default_rng(0)
    drawing, ground = (Image.fromarray(rng.integers(0, 256, (16, 16, n), dtype=np.uint8)) for n in (4, 3))
    want = Image.alpha_composite(ground.convert("RGBA"), drawing).convert("RGB")
    white = Image.alpha_composite(Image.new("RGBA", (16, 16), "white"), drawing).convert("RGB")
    alpha = np.asarray(drawing)[..., 3:] / 255
    got = on_background(np.asarray(white, dtype=float), alpha, np.asarray(ground, dtype=float))
    assert np.abs(got.astype(int) - np.asarray(want)).max() <= 1


def test_a_scene_is_of_its_row_and_split_alone(opened):
    scenes = opened[TexturedScenes, "test"]
    few = TexturedScenes(split="test", **KEYS | dict(limit=None, classes=["flag"], per_class=2)).open()
    for position, row in enumerate(few.ids.tolist()):
        if row < len(scenes):
            assert few.image(position).tobytes() == scenes.image(row).tobytes()
    again = TexturedScenes(split="test", **KEYS | dict(limit=39)).open()
    assert all(again.image(i).tobytes() == scenes.image(i).tobytes() for i in range(39))
    train = opened[TexturedScenes, "train"]
    corner = [np.asarray(images.image(i))[0, 0].tolist() for images in (scenes, train) for i in range(40)]
    assert len({tuple(pixel) for pixel in corner}) > 70


def test_the_digest_is_of_the_scenes_pixels(opened):
    digests = {images.digest for images in opened.values()}
    assert len(digests) == 4
    assert TexturedScenes(split="test", num_workers=1, **KEYS).open().digest == opened[TexturedScenes, "test"].digest


@pytest.mark.parametrize("kind", TEXTURES)
def test_a_texture_is_between_0_and_1_varied_and_of_any_shape(kind):
    for seed, shape in enumerate([(32, 32), (20, 48), (33, 17)]):
        field = kind(np.random.default_rng(seed), *shape)
        assert field.shape == shape and field.min() >= 0 and field.max() <= 1 and field.std() > 0.1


def test_colours_and_kinds_are_spread_and_two_colours_differ():
    many = np.stack([texture(np.random.default_rng(i), 16, 16) for i in range(400)])
    assert many.min() >= 0 and many.max() <= 1
    assert np.abs(many.mean((0, 1, 2)) - 0.5).max() < 0.04
    assert (np.ptp(many, axis=(1, 2)).sum(-1) > 0.35).mean() > 0.98


def test_data_without_masks_cannot_become_scenes():
    for wrong in (dict(mask_column=None), dict(mask_column="alpha"), dict(image_column="picture")):
        with pytest.raises(
            VitPatchError, match=r"scenes need drawings and their masks; the data have the columns image"
        ):
            replace(TexturedScenes(split="test", **KEYS), **wrong).open()
