import io

import numpy as np
import pytest
import torch
from conftest import NAMES, pictures, write_parquet
from PIL import Image

from vitpatch.data import BadImage, FolderImages, HubImages, ImageDataModule, ParquetImages, check_labels
from vitpatch.spec import VitPatchError


def to_input(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def batches(images, batch_size=5):
    return list(ImageDataModule(images, to_input, batch_size).predict_dataloader())


def test_parquet_rows_come_in_order_with_ids_labels_and_names(made):
    images = ParquetImages(path=str(made / "images.parquet")).open()
    assert len(images) == 13 and images.label_names == tuple(NAMES)
    got = [batch for batch, bad in batches(images) if not bad]
    assert torch.cat([b.ids for b in got]).tolist() == list(range(13))
    assert torch.cat([b.labels for b in got]).tolist() == [i % 5 for i in range(13)]
    want = np.stack([np.asarray(p) for p in pictures(13)]) / np.float32(255)
    assert np.abs(torch.cat([b.images for b in got]).permute(0, 2, 3, 1).numpy() - want).max() < 1e-6
    assert images.clusters.tolist() == list(range(13))


def test_limit_takes_the_first_rows(made):
    images = ParquetImages(path=str(made / "images.parquet"), limit=4).open()
    assert len(images) == 4 and images.labels.tolist() == [0, 1, 2, 3]
    assert len(ParquetImages(path=str(made / "images.parquet"), limit=99).open()) == 13


def test_clusters_are_numbered_by_first_appearance_and_masks_follow_their_image(tmp_path):
    masks = [Image.fromarray(np.full((32, 32), 255 * (i % 2), np.uint8)) for i in range(4)]
    path = write_parquet(tmp_path / "m.parquet", pictures(4), [0, 1, 2, 3], mask=masks, base=["b", "a", "b", "c"])
    images = ParquetImages(path=str(path), mask_column="mask", cluster_column="base").open()
    assert images.clusters.tolist() == [0, 1, 0, 2]
    ((batch, _),) = batches(images)
    assert batch.masks.shape == (4, 1, 32, 32) and batch.masks.mean((1, 2, 3)).tolist() == [0, 1, 0, 1]


def test_a_folder_of_parquet_files_is_read_by_split(tmp_path):
    write_parquet(tmp_path / "test-0.parquet", pictures(2), [0, 1])
    write_parquet(tmp_path / "test-1.parquet", pictures(2, seed=1), [2, 3])
    write_parquet(tmp_path / "train-0.parquet", pictures(1), [4])
    assert ParquetImages(path=str(tmp_path), split="test").open().labels.tolist() == [0, 1, 2, 3]


def test_an_image_folder_with_and_without_splits(tmp_path):
    for split in ("train", "test"):
        for name, color in (("cat", "red"), ("dog", "blue")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), color).save(folder / "a.png")
    images = FolderImages(path=str(tmp_path), split="test").open()
    assert images.label_names == ("cat", "dog") and images.labels.tolist() == [0, 1]
    assert images.image(1).getpixel((0, 0)) == (0, 0, 255) and images.name(1).endswith("dog/a.png")
    assert len(FolderImages(path=str(tmp_path / "test")).open()) == 2
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose" / "a.png")
    with pytest.raises(VitPatchError, match="not in one folder a class"):
        FolderImages(path=str(tmp_path / "loose")).open()
    with pytest.raises(VitPatchError, match=r"data.split None: the data have test, train|have train, test"):
        FolderImages(path=str(tmp_path)).open()


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def test_every_kind_of_image_becomes_upright_rgb_on_white(tmp_path):
    transparent = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    palette = Image.new("RGB", (4, 2), "green").convert("P")
    sixteen = Image.fromarray(np.full((2, 4), 65535, np.uint16))
    turned = Image.new("RGB", (4, 2), "blue")
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    rows = [
        encoded(transparent),
        encoded(palette),
        encoded(Image.new("L", (4, 2), 128)),
        encoded(sixteen),
        encoded(Image.new("CMYK", (4, 2), (0, 0, 0, 0)), "JPEG"),
        encoded(turned, exif=exif),
        encoded(Image.new("LA", (4, 2), (0, 128))),
    ]
    path = write_parquet(tmp_path / "kinds.parquet", rows, [0] * len(rows))
    images = ParquetImages(path=str(path)).open()
    assert all(images.image(row).mode == "RGB" for row in range(len(rows)))
    corner = [images.image(row).getpixel((0, 0)) for row in range(len(rows))]
    assert corner[0] == (255, 255, 255) and corner[1] == (0, 153, 0)  # the web palette's green
    assert corner[2] == (128,) * 3
    assert corner[3] == (255,) * 3 and corner[4] == (255,) * 3 and corner[5] == (0, 0, 255)
    assert images.image(5).getpixel((3, 1)) == (255, 255, 255)
    assert corner[6] == (127,) * 3


@pytest.fixture
def broken(tmp_path):
    rows = [encoded(p) for p in pictures(4)]
    rows[1] = {"bytes": rows[1]["bytes"][:60], "path": "half.png"}
    rows[2] = {"bytes": b"", "path": None}
    return write_parquet(tmp_path / "broken.parquet", rows, [0, 1, 2, 3])


def test_an_unreadable_image_is_reported_by_row_and_file_and_the_rest_goes_on(broken):
    images = ParquetImages(path=str(broken)).open()
    ((batch, bad),) = batches(images)
    assert batch.ids.tolist() == [0, 3] and [b.row for b in bad] == [1, 2]
    assert isinstance(bad[0], BadImage) and "row 1 (half.png)" in bad[0].reason
    assert "broken.parquet" in bad[1].reason and "0 bytes" in bad[1].reason


def test_workers_give_the_same_batches(broken):
    alone = batches(ParquetImages(path=str(broken)).open(), 2)
    helped = batches(ParquetImages(path=str(broken), num_workers=2).open(), 2)
    assert [b.ids.tolist() for b, _ in alone] == [b.ids.tolist() for b, _ in helped]
    assert all(torch.equal(a.images, b.images) for (a, _), (b, _) in zip(alone, helped, strict=True))
    assert [bad for _, bad in alone] == [bad for _, bad in helped]


def test_the_digest_is_of_the_content(made, tmp_path):
    digest = ParquetImages(path=str(made / "images.parquet")).open().digest
    again = write_parquet(tmp_path / "again.parquet", pictures(13), [i % 5 for i in range(13)])
    assert ParquetImages(path=str(again)).open().digest == digest
    for name, images, labels in (
        ("l", pictures(13), [0] * 13),
        ("i", pictures(13, seed=1), [i % 5 for i in range(13)]),
    ):
        other = write_parquet(tmp_path / f"{name}.parquet", images, labels)
        assert ParquetImages(path=str(other)).open().digest != digest
    assert ParquetImages(path=str(made / "images.parquet"), limit=12).open().digest != digest


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"path": "/nowhere.parquet"}, "no such file or folder"),
        ({"path": "vit"}, r"no file \*.parquet in it"),
        (
            {"path": "images.parquet", "label_column": "y"},
            "data.label_column 'y': the data have the columns image, label",
        ),
        ({"path": "images.parquet", "image_column": "label"}, "expected images"),
        ({"path": "images.parquet", "label_column": "image"}, "expected whole numbers or ClassLabel"),
        ({"path": "images.parquet", "mask_column": "m"}, "data.mask_column 'm'"),
        ({"path": "images.parquet", "cluster_column": "c"}, "data.cluster_column 'c'"),
        ({"path": "images.parquet", "limit": 0}, "data.limit 0"),
        ({"path": "images.parquet", "on_error": "ignore"}, "data.on_error 'ignore'"),
        ({"path": "broken.txt"}, "data .*broken.txt"),
    ],
)
def test_wrong_keys_are_named(made, monkeypatch, keys, says):
    monkeypatch.chdir(made)
    (made / "broken.txt").write_text("no parquet")
    with pytest.raises(VitPatchError, match=says) as error:
        ParquetImages(**keys).open()
    assert "\n" not in str(error.value)


def test_an_empty_selection_is_refused(tmp_path):
    path = write_parquet(tmp_path / "none.parquet", [], [])
    with pytest.raises(VitPatchError, match="selection is empty"):
        ParquetImages(path=str(path)).open()


def test_a_hub_id_without_a_network_says_how_to_use_a_copy():
    with pytest.raises(
        VitPatchError, match=r"cannot be reached.*hf download --repo-type dataset owner/data.*data.path"
    ):
        HubImages(path="owner/data", split="test").open()


def test_labels_must_be_the_models(made, tmp_path):
    images = ParquetImages(path=str(made / "images.parquet")).open()
    check_labels(images, 5, NAMES)
    check_labels(images, 5, None)
    check_labels(images, 5, [n.upper().replace("_", " ") for n in NAMES])
    with pytest.raises(VitPatchError, match="5 classes, the model 7"):
        check_labels(images, 7, None)
    with pytest.raises(VitPatchError, match="label 0 is 'class_0' in the data and 'class_1' in the model"):
        check_labels(images, 5, NAMES[1:] + NAMES[:1])
    unnamed = ParquetImages(path=str(write_parquet(tmp_path / "u.parquet", pictures(2), [0, 9], names=None))).open()
    with pytest.raises(VitPatchError, match="labels from 0 to 9; the model's 5 go from 0 to 4"):
        check_labels(unnamed, 5, NAMES)
