import io
import shutil

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, pictures, write_parquet
from PIL import Image

from vitpatch.data.datamodule import BadImage, DecodedImages, ImageDataModule, start_method, training_images
from vitpatch.data.files import DiskImages, HubImages
from vitpatch.data.folders import FolderImages
from vitpatch.data.sources import ParquetImages
from vitpatch.errors import VitPatchError


def to_input(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def batches(images, batch_size=5):
    return list(ImageDataModule(DecodedImages(images, to_input), batch_size).predict_dataloader())


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
    assert images.image(1).getpixel((0, 0)) == (0, 0, 255) and images.name(1) == "a"
    assert len(FolderImages(path=str(tmp_path / "test")).open()) == 2
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose" / "a.png")
    with pytest.raises(VitPatchError, match="not in one folder a class"):
        FolderImages(path=str(tmp_path / "loose")).open()
    with pytest.raises(VitPatchError, match=r"the images in loose, test, train lie at different depths"):
        FolderImages(path=str(tmp_path)).open()
    shutil.rmtree(tmp_path / "loose")
    with pytest.raises(VitPatchError, match=r"data.split null: the data have test, train; choose one"):
        FolderImages(path=str(tmp_path)).open()
    with pytest.raises(VitPatchError, match=r"data.split valid: the data have test, train; choose one, or null"):
        FolderImages(path=str(tmp_path), split="valid").open()


def test_names_of_files_and_folders_are_only_names(tmp_path):
    """Words of splits and of globs say nothing here."""
    folder = tmp_path / "br[1]"
    for name in ("bus/a.png", "bus/img_test_1.png", "train/c.png", "train/my-validation.png", "train/deep/e.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    images = FolderImages(path=str(folder)).open()
    assert images.label_names == ("bus", "train") and images.labels.tolist() == [0, 0, 1, 1, 1]
    folder = folder.rename(tmp_path / "br*")
    shutil.rmtree(folder / "bus")
    assert FolderImages(path=str(folder)).open().label_names == ("train",)
    (folder / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "val" / "cat" / "a.png")
    assert FolderImages(path=str(folder), split="validation").open().label_names == ("cat",)


def test_files_with_other_classes_and_other_splits_are_not_joined(tmp_path):
    for name, order in (("a", ["dog", "cat"]), ("b", ["cat", "dog"])):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        write_parquet(tmp_path / "mixed" / f"{name}.parquet", pictures(1), [0], names=order)
    with pytest.raises(VitPatchError, match=r"b.parquet has other columns or classes than a.parquet"):
        ParquetImages(path=str(tmp_path / "mixed")).open()
    for name in ("train-0", "test-0", "train_extra-0"):
        write_parquet(tmp_path / f"{name}.parquet", pictures(1), [3 if "extra" in name else 1])
    assert ParquetImages(path=str(tmp_path), split="train").open().labels.tolist() == [1]
    with pytest.raises(VitPatchError, match=r"data.split null: the data have test, train; choose one"):
        ParquetImages(path=str(tmp_path)).open()
    with pytest.raises(VitPatchError, match=r"no file valid\*.parquet in it.*one of test,train"):
        ParquetImages(path=str(tmp_path), split="valid").open()
    with pytest.raises(VitPatchError, match=r"data.split test: .* is one file"):
        ParquetImages(path=str(tmp_path / "test-0.parquet"), split="test").open()


def test_an_identity_has_rows_and_the_columns_of_a_stream(tmp_path):
    """Noise is a function of an image's row; a stream's images are not read for its identity."""
    columns = dict(a=("i", pictures(3)), b=("i", pictures(3, seed=1)), c=("c", [0, 1, 0]))
    path = save(tmp_path, **columns)
    streams = [HubImages(path=str(tmp_path), split="train", streaming=True, image_column=c).open() for c in "ab"]
    assert streams[0].digest != streams[1].digest
    same = write_parquet(tmp_path / "same.parquet", pictures(1) * 3, [0, 1, 0])
    rows = [ParquetImages(path=str(same), shuffle_seed=seed, classes=[0], limit=1).open() for seed in range(6)]
    assert len({images.digest for images in rows}) == len({images.ids[0] for images in rows}) == 2
    assert path.exists()


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
        ({"path": "images.parquet", "label_column": "image"}, "expected a name, a whole number or a ClassLabel"),
        ({"path": "images.parquet", "mask_column": "m"}, "data.mask_column 'm'"),
        ({"path": "images.parquet", "cluster_column": "c"}, "data.cluster_column 'c'"),
        ({"path": "images.parquet", "limit": 0}, "data.limit 0"),
        ({"path": "images.parquet", "on_error": "ignore"}, "data.on_error 'ignore'"),
        ({"path": "broken.txt"}, "data .*broken.txt"),
        ({"path": ["a"]}, "data.path .'a'.: expected a name"),
        ({"path": "images.parquet", "image_column": None}, "data.image_column None: expected the name"),
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


# --- which columns ---


def save(folder, name="d.parquet", **columns):
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    kinds = {"i": ImageFeature(), "c": ClassLabel(names=["cat", "dog"]), "n": Value("int64"), "s": Value("string")}
    features = Features({key: kinds[kind] for key, (kind, _) in columns.items()})
    data = Dataset.from_dict({key: values for key, (_, values) in columns.items()}, features=features)
    data.to_parquet(str(folder / name))
    return folder / name


def test_the_one_image_and_the_one_label_column_are_found(tmp_path):
    path = save(tmp_path, picture=("i", pictures(3)), kind=("c", [0, 1, 0]), size=("n", [7, 8, 9]))
    images = ParquetImages(path=str(path)).open()
    assert images.label_names == ("cat", "dog") and images.labels.tolist() == [0, 1, 0]
    assert images.image(2).size == (32, 32)


def test_of_several_columns_the_usual_name_is_taken_or_one_must_be_named(tmp_path):
    two = dict(image=("i", pictures(2)), other=("i", pictures(2)))
    path = save(tmp_path, **two, label=("n", [1, 0]))
    assert ParquetImages(path=str(path)).open().labels.tolist() == [1, 0]
    path = save(tmp_path, "two.parquet", a=("i", pictures(2)), b=("i", pictures(2)), kind=("c", [0, 1]))
    with pytest.raises(VitPatchError, match=r"data.image_column is missing: several could be it: a, b"):
        ParquetImages(path=str(path)).open()
    assert ParquetImages(path=str(path), image_column="b", mask_column="a").open().columns.image == "b"
    assert ParquetImages(path=str(path), mask_column="a").open().columns.image == "b"  # the mask is spoken for
    path = save(tmp_path, "y.parquet", a=("i", pictures(2)), y=("n", [0, 1]))
    with pytest.raises(VitPatchError, match=r"data.label_column is missing: none of its columns is one: a, y.*null"):
        ParquetImages(path=str(path)).open()


def test_labels_may_be_names_in_a_column_of_text(tmp_path):
    names = ["dog", "cat", "dog", "ant"]
    path = save(tmp_path, picture=("i", pictures(4)), label=("s", names), other=("n", [0, 1, 2, 3]))
    images = ParquetImages(path=str(path)).open()
    assert images.label_names == ("ant", "cat", "dog") and images.labels.tolist() == [2, 1, 2, 0]
    assert ParquetImages(path=str(path), classes=["dog"]).open().ids.tolist() == [0, 2]
    streamed = HubImages(path=str(tmp_path), split="train", streaming=True).open()
    assert streamed.label_names == images.label_names and streamed.labels.tolist() == [2, 1, 2, 0]
    first = HubImages(path=str(tmp_path), split="train", streaming=True, limit=2).open()
    assert first.label_names == images.label_names and first.labels.tolist() == [2, 1]


# --- which rows ---


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    return write_parquet(folder / "many.parquet", pictures(1) * 40, [i * i % 5 for i in range(40)])


def ids(path, **keys):
    return ParquetImages(path=str(path), **keys).open().ids.tolist()


def test_rows_are_shuffled_then_chosen_by_class_then_counted_then_limited(many):
    labels = np.array([i * i % 5 for i in range(40)])
    order = np.random.default_rng(3).permutation(40)
    of_classes = [i for i in order if labels[i] in (0, 4)]
    first = {label: [i for i in of_classes if labels[i] == label][:6] for label in (0, 4)}
    counted = [i for i in of_classes if i in first[labels[i]]]
    keys = dict(shuffle_seed=3, classes=["class_0", 4], per_class=6, limit=9)
    assert ids(many, **keys) == sorted(counted[:9])
    images = ParquetImages(path=str(many), **keys).open()
    assert images.labels.tolist() == labels[images.ids].tolist() and len(set(images.labels.tolist())) == 2
    ((batch, _),) = batches(images, 9)
    assert batch.ids.tolist() == images.ids.tolist()  # the row in the split, not among the chosen
    assert images.name(int(images.ids[2])) == f"image {images.ids[2]}"


def test_each_key_of_the_selection_by_itself(many):
    assert ids(many, limit=3) == [0, 1, 2]
    assert ids(many, classes="class_4") == [i for i in range(40) if i * i % 5 == 4]
    assert ids(many, per_class=1) == [0, 1, 2]
    assert ids(many, shuffle_seed=0, limit=5) == ids(many, shuffle_seed=0, limit=5) != ids(many, limit=5)
    assert ids(many, shuffle_seed=0, limit=5) != ids(many, shuffle_seed=1, limit=5)
    assert set(ids(many, shuffle_seed=0, limit=4)) <= set(ids(many, shuffle_seed=0, limit=9))
    digests = {ParquetImages(path=str(many), shuffle_seed=s, limit=5).open().digest for s in (0, 1, None)}
    assert len(digests) >= 2


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"classes": ["class_9"]}, r"data.classes 'class_9': none of the data's labels; did you mean 'class_"),
        ({"classes": [5]}, r"data.classes 5: none of the data's labels; names, or numbers from 0 to 4"),
        ({"classes": []}, r"data.classes \(\): expected names or numbers of labels"),
        ({"per_class": 0}, r"data.per_class 0"),
        ({"shuffle_seed": -1}, r"data.shuffle_seed -1"),
        ({"shuffle_seed": True}, r"data.shuffle_seed True"),
        ({"shuffle_seed": "sorted"}, r"data.shuffle_seed 'sorted': expected auto, a whole number"),
        ({"seed": -1}, r"data.seed -1"),
        ({"seed": None}, r"data.seed None"),
        ({"classes": ["class_3"]}, r"selection is empty"),
        ({"label_column": None, "per_class": 2}, r"have no labels"),
        ({"label_column": None, "label_map": {"a": 1}}, r"have no labels"),
        ({"label_map": "x"}, r"data.label_map 'x'"),
    ],
)
def test_a_wrong_selection_is_one_line(many, keys, says):
    with pytest.raises(VitPatchError, match=says) as error:
        ParquetImages(path=str(many), **keys).open()
    assert "\n" not in str(error.value)


# --- a limit of rows that are sorted by class ---


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory):
    """Two shards of 30 images in 3 classes, each sorted by class; ids from 0 to 59."""
    folder = tmp_path_factory.mktemp("blocks")
    for part in range(2):
        write_parquet(folder / f"test-{part}.parquet", pictures(30, seed=part), np.repeat([0, 1, 2], 10).tolist())
    return folder


def test_a_limit_of_sorted_rows_is_of_all_classes_and_shards(in_blocks, caplog):
    caplog.set_level("INFO", "vitpatch")
    keys = dict(path=str(in_blocks), split="test")
    images = ParquetImages(**keys, limit=12, seed=1).open()
    assert np.bincount(images.labels).tolist() == [4, 4, 4] and images.ids.max() > 30
    line = f"data {in_blocks}, split test: rows are sorted by class; 12 of 60 are taken in rounds over the classes by"
    assert any(message.startswith(f"{line} seed 1") for message in caplog.messages)
    assert set(images.ids) < set(ParquetImages(**keys, limit=24, seed=1).open().ids)
    assert ParquetImages(**keys, limit=12, shuffle_seed=None).open().ids.tolist() == list(range(12))
    assert ParquetImages(**keys, limit=12, seed=1, label_column=None).open().ids.tolist() == list(range(12))
    assert ParquetImages(**keys, limit=12, seed=2).open().digest != images.digest
    assert len({ParquetImages(**keys, seed=seed).open().digest for seed in (1, 2)}) == 1  # all rows: no seed in them
    assert sum("in rounds" in message for message in caplog.messages) == 3


@pytest.mark.parametrize("left_out", [{"class_0": None}, {0: None}, {"class_0": None, "class_2": None}])
def test_a_limit_is_of_images_that_label_map_keeps(in_blocks, left_out):
    for shuffle_seed in ("auto", None, 3):
        keys = dict(path=str(in_blocks), split="test", limit=10, label_map=left_out, shuffle_seed=shuffle_seed)
        labels = ParquetImages(**keys).open().labels
        assert len(labels) == 10 and 0 not in labels


def test_rows_are_sorted_by_the_classes_that_label_map_makes(tmp_path):
    """Breeds take turns, their species do not."""
    names = ["tabby", "siamese", "beagle", "pug"]
    write_parquet(tmp_path / "data.parquet", pictures(24), [0, 1] * 6 + [2, 3] * 6, names)
    species = {"tabby": "cat", "siamese": "cat", "beagle": "dog", "pug": "dog"}
    for label_map in (species, {**species, "kitten": None}):  # kitten: a label of another split
        labels = ParquetImages(path=str(tmp_path / "data.parquet"), limit=8, label_map=label_map).open().labels
        assert np.count_nonzero(labels < 2) == 4
    assert np.count_nonzero(ParquetImages(path=str(tmp_path / "data.parquet"), limit=8).open().labels < 2) == 8


def test_a_class_of_several_labels_has_the_models_name(tmp_path):
    write_parquet(tmp_path / "data.parquet", pictures(6), [0, 1, 2] * 2, ["tabby", "siamese", "beagle"])
    images = ParquetImages(path=str(tmp_path / "data.parquet")).open()
    assert images.label_by_classes([1, 1, 0], ["dog", "cat", "cow"], 3).label_names == ("beagle", "cat", "cow")
    assert images.label_by_classes([1, 1, 0], None, 3).label_names == ("beagle", "tabby / siamese", "2")


def test_worker_processes_are_forked_where_joblib_would_start_them(monkeypatch):
    import multiprocessing

    assert start_method(2) is None
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "loky")
    assert start_method(2) == "fork" and start_method(0) is None


def test_the_first_of_a_stream_are_taken_and_it_is_said_where_they_are_of_few_classes(in_blocks, caplog):
    keys = dict(path=str(in_blocks), split="test", streaming=True)
    assert HubImages(**keys, limit=8).open().ids.tolist() == list(range(8))
    assert (
        "the first 8 images of the stream are all of one class; data.shuffle_seed=0 draws from all of it" in caplog.text
    )
    HubImages(**keys, limit=25).open()
    assert "the first 25 images of the stream are sorted by class" in caplog.text
    caplog.clear()
    HubImages(**keys, limit=8, shuffle_seed=None).open()  # asked for
    assert len(np.unique(HubImages(**keys, limit=8, shuffle_seed=0).open().labels)) > 1
    assert len(HubImages(**keys).open()) == 60 and not caplog.messages
    left = HubImages(**keys, limit=8, label_map={"class_0": None}).open()
    assert left.labels.tolist() == [1] * 8


def test_training_images_of_a_stream_say_so_too(in_blocks, caplog):
    source = HubImages(path=str(in_blocks), split="test", streaming=True)
    assert len(training_images(source, "test", 6)) == 6
    assert "the first 6 images of the stream are all of one class" in caplog.text


def test_the_shipped_images_are_in_no_order_of_classes(caplog):
    caplog.set_level("INFO", "vitpatch")
    path = str(ROOT / "vitpatch" / "assets" / "emoji")
    for split, limit in (("test", 256), ("train", 32)):
        rows = ParquetImages(
            path=path, split=split, limit=limit, seed=5, mask_column="mask", cluster_column="base"
        ).open()
        assert rows.ids.tolist() == list(range(limit))
    assert not any("sorted" in message for message in caplog.messages)


# --- clusters ---


@pytest.mark.parametrize(
    ("values", "clusters", "says"),
    [
        (["p", "q", "p", "q"], [0, 1, 0, 1], None),
        (["p", None, "p", None], [0, 1, 0, 2], "'c': 2 of 4 images have no value; each is a cluster of its own"),
        ([None] * 4, [0, 1, 2, 3], "'c': 4 of 4 images have no value"),
        (["p"] * 4, [0, 0, 0, 0], "'c': all 4 images are one cluster; there is no interval and no p of one"),
    ],
)
def test_what_is_odd_about_clusters_is_said(tmp_path, caplog, values, clusters, says):
    path = write_parquet(tmp_path / "c.parquet", pictures(1) * 4, [0, 1, 0, 1], c=values)
    assert ParquetImages(path=str(path), cluster_column="c").open().clusters.tolist() == clusters
    assert (says in caplog.text) if says else not caplog.messages


def test_labels_as_clusters_are_said(many, caplog):
    images = ParquetImages(path=str(many), cluster_column="label").open()
    assert len(set(images.clusters.tolist())) == len(set(images.labels.tolist()))
    assert "'label' is the label column: each class is one cluster" in caplog.text


def test_rows_without_a_label_are_refused_unless_they_are_not_taken(tmp_path):
    path = save(tmp_path, image=("i", pictures(1) * 4), label=("n", [0, 1, -1, None]))
    with pytest.raises(
        VitPatchError, match=r"'label': 2 of 4 rows have no label, the first is row 2; data.classes takes"
    ):
        ParquetImages(path=str(path)).open()
    assert ParquetImages(path=str(path), classes=[0, 1]).open().ids.tolist() == [0, 1]
    assert len(ParquetImages(path=str(path), label_column=None).open()) == 4


# --- other places ---


def test_a_glob_of_parquet_files(tmp_path, monkeypatch):
    for name, label in (("a-1", 1), ("a-0", 0), ("b-0", 4)):
        write_parquet(tmp_path / f"{name}.parquet", pictures(1), [label])
    assert ParquetImages(path=str(tmp_path / "a-*.parquet")).open().labels.tolist() == [0, 1]
    monkeypatch.chdir(tmp_path)
    assert ParquetImages(path="[ab]-0.parquet").open().labels.tolist() == [0, 4]
    with pytest.raises(VitPatchError, match=r"no such file or folder"):
        ParquetImages(path="c-*.parquet").open()


def test_a_data_set_saved_to_disk(made, tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_parquet(str(made / "images.parquet"))
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data, "test": data.select([2, 1])}).save_to_disk(str(tmp_path / "two"))
    images = DiskImages(path=str(tmp_path / "one")).open()
    assert images.digest == ParquetImages(path=str(made / "images.parquet")).open().digest
    assert DiskImages(path=str(tmp_path / "two"), split="test").open().labels.tolist() == [2, 1]
    for path, split, says in (
        ("two", None, r"data.split null: the data have train, test"),
        ("one", "test", r"data.split test: the data have no splits"),
        ("three", None, r"no such folder"),
    ):
        with pytest.raises(VitPatchError, match=says):
            DiskImages(path=str(tmp_path / path), split=split).open()
    with pytest.raises(VitPatchError, match=r"^data "):
        DiskImages(path=str(made / "vit")).open()


def test_a_stream_gives_the_same_images(tmp_path):
    everything = pictures(9)
    for part in range(3):
        here = slice(3 * part, 3 * part + 3)
        write_parquet(tmp_path / f"test-{part}.parquet", everything[here], [i % 5 for i in range(9)][here])
    keys = dict(path=str(tmp_path), split="test")
    for selection in ({}, {"limit": 4}, {"shuffle_seed": 1, "classes": [1, 2, 3], "limit": 4}):
        stream, whole = (HubImages(**keys, **selection, streaming=on).open() for on in (True, False))
        assert stream.ids.tolist() == whole.ids.tolist() and stream.labels.tolist() == whole.labels.tolist()
        assert stream.label_names == whole.label_names
        for (a, _), (b, _) in zip(batches(stream, 2), batches(whole, 2), strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids)
        in_stream, in_whole = (ImageDataModule(DecodedImages(images, to_input), 2) for images in (stream, whole))
        some = [int(stream.ids[i]) for i in (3, 0, 1)]  # also backwards
        assert torch.equal(in_stream.batch_of(some).images, in_whole.batch_of(some).images)
    digest = HubImages(**keys, streaming=True).open().digest
    assert digest != HubImages(**keys, streaming=True, limit=8).open().digest
    worker = HubImages(**keys, streaming=True, num_workers=3).open()
    assert worker.num_workers == 1
    assert [b.ids.tolist() for b, _ in batches(worker, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


# --- no labels ---


def test_images_without_labels(tmp_path, made):
    (tmp_path / "deep").mkdir()
    for name, picture in zip(("b.png", "a.jpg", "deep/c.webp"), pictures(3), strict=True):
        picture.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = FolderImages(path=str(tmp_path), label_column=None).open()
    assert len(images) == 3 and not images.has_labels and images.label_names is None
    assert [images.name(i) for i in range(3)] == ["a", "b", "c"]
    one = FolderImages(path=str(tmp_path / "b.png")).open()
    assert len(one) == 1 and not one.has_labels
    assert not ParquetImages(path=str(made / "images.parquet"), label_column=None).open().has_labels
    with pytest.raises(VitPatchError, match=r"is an image; use data=imagefolder"):
        ParquetImages(path=str(tmp_path / "b.png")).open()
    (tmp_path / "none").mkdir()
    with pytest.raises(VitPatchError, match=r"selection is empty"):
        FolderImages(path=str(tmp_path / "none"), label_column=None).open()
