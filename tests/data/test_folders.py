"""Folders of images as people have them: what systems leave there, and metadata files beside the images."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitpatch.data.files import HubImages, images_below, images_in
from vitpatch.data.folders import FolderImages
from vitpatch.data.images import LabelledImages
from vitpatch.data.sources import ParquetImages
from vitpatch.errors import VitPatchError

PIXEL = Image.new("RGB", (2, 2))


def put(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            file.mkdir(exist_ok=True)
        elif "._" in name or Image.registered_extensions().get(file.suffix.lower()) is None:
            file.write_bytes(b"\0\5\x16\7 Mac OS X")
        else:
            PIXEL.save(file)
    return folder


NINE = [f"{name}/{k}.png" for name in "abc" for k in range(3)]
LEFT = [
    "a/.ipynb_checkpoints/0-checkpoint.png",
    ".ipynb_checkpoints/0-checkpoint.png",
    "__MACOSX/a/._0.png",
    "a/__MACOSX/._0.png",
    "b/._0.png",
    "._b.png",
    ".hidden.png",
    ".hidden/d/0.png",
    "b/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "a/.DS_Store",
    ".DS_Store",
    "c/Thumbs.db",
    "c/desktop.ini",
    ".metadata.csv",
    "._metadata.csv",
    "notes.txt",
    ".empty/",
]


@pytest.mark.parametrize(
    "left", [*([one] for one in LEFT), LEFT], ids=lambda left: left[0] if left[1:] == [] else "all"
)
def test_what_systems_leave_behind_is_no_image_no_class_and_no_split(tmp_path, left):
    folder = put(tmp_path / "a", *NINE, *left)
    images = FolderImages(path=str(folder)).open()
    assert images.label_names == ("a", "b", "c") and images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(FolderImages(path=str(folder), label_column=None).open()) == 9
    splits = put(tmp_path / "s", *(f"{split}/{name}" for split in ("train", "test") for name in (*NINE, *left)), *left)
    assert len(FolderImages(path=str(splits), split="test").open()) == 9
    with pytest.raises(VitPatchError, match=r"the data have test, train; choose one"):
        FolderImages(path=str(splits)).open()
    inside = put(tmp_path / "zip", *(f"images/{name}" for name in NINE), *left)
    assert len(FolderImages(path=str(inside)).open()) == 9


def test_names_with_two_underscores_are_classes_and_a_hidden_folder_may_be_asked_for(tmp_path):
    folder = put(tmp_path / ".cache" / "data", "__background__/0.png", "cat/0.PNG", "cat/1.JpEg", "cat/deep/er/2.webp")
    images = FolderImages(path=str(folder)).open()
    assert images.label_names == ("__background__", "cat") and images.labels.tolist() == [0, 1, 1, 1]
    assert len(FolderImages(path=str(put(tmp_path, ".one.png") / ".one.png")).open()) == 1


def test_links_are_followed_and_a_broken_one_is_reported(tmp_path):
    put(tmp_path / "store", "x/0.png", "x/more/1.png", "y/0.png")
    folder = put(tmp_path / "data", "a/", "b/1.png")
    (folder / "a" / "x").symlink_to(tmp_path / "store" / "x")
    (folder / "c").symlink_to(tmp_path / "store" / "y")
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "d").symlink_to("b")
    assert [str(file.relative_to(folder)) for file in images_below(folder / "a")] == ["a/x/0.png", "a/x/more/1.png"]
    assert [file.name for file in images_below(folder / "b")] == ["1.png"]
    assert len(images_below(folder)) == 5
    (folder / "b" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(VitPatchError, match=r"b/2.png.*No such file"):
        images = FolderImages(path=str(folder), label_column=None).open()
        [images.image(row) for row in range(len(images))]
    (folder / "b" / "3.png").mkdir()  # a folder that is called like an image
    assert [file.name for file in images_in(folder / "b")] == ["1.png", "2.png"]


def test_a_class_folder_without_files_keeps_its_place_in_the_order(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = put(tmp_path, "a/0.png", "b/", "c/0.png", "scripts/run.txt", "b/.gitkeep")
    images = FolderImages(path=str(folder)).open()
    assert images.label_names == ("a", "b", "c") and images.labels.tolist() == [0, 2]
    assert any("b: a class without images" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["10", "2", "1"], ("1", "2", "10")),
        (["cafe\u0301", "caf\u00e9", "tea"], ("caf\u00e9", "tea")),
        (["A", "a"], ("A", "a")),
        (["b", "a "], ("a", "b")),
    ],
)
def test_names_of_folders_are_numbered_as_names_in_a_column_are(tmp_path, folders, names):
    images = FolderImages(path=str(put(tmp_path, *(f"{name}/0.png" for name in folders)))).open()
    assert images.label_names == names


def test_hidden_parquet_files_are_none_of_the_data(tmp_path):
    from conftest import pictures, write_parquet

    write_parquet(tmp_path / "test-0.parquet", pictures(2), [0, 1])
    for name in ("._test-0.parquet", ".ipynb_checkpoints/test-0.parquet", "__MACOSX/._test-0.parquet"):
        put(tmp_path, name)
    for path in (tmp_path, tmp_path / "*.parquet", tmp_path / "**" / "*.parquet"):
        assert len(ParquetImages(path=str(path)).open()) == 2
    shutil.copy(tmp_path / "test-0.parquet", tmp_path / ".ipynb_checkpoints")
    assert len(ParquetImages(path=str(tmp_path / ".ipynb*" / "*")).open()) == 2  # asked for
    stream = HubImages(path=str(tmp_path), split="test", streaming=True)
    before = stream.fingerprint()
    put(tmp_path, ".DS_Store")
    assert stream.fingerprint() == before


# --- metadata files ---


def metadata(folder: Path, form: str, name: str = "metadata", **columns) -> Path:
    import pandas as pd

    frame = pd.DataFrame(columns)
    file = folder / f"{name}.{form}"
    if form == "csv":
        frame.to_csv(file, index=False)
    elif form == "parquet":
        frame.to_parquet(file)
    else:
        frame.to_json(file, orient="records", lines=True)
    return folder


def opened(folder: Path, **keys) -> LabelledImages:
    return FolderImages(path=str(folder), **keys).open()


WORDS = ["img_test_1.png", "train.png", "my-validation.png", "eval_0.png"]
"""Names that ``datasets`` takes for splits."""


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_metadata_give_labels_and_clusters_to_every_file_that_they_list(tmp_path, form):
    folder = put(tmp_path / "br[1]", *WORDS)
    metadata(folder, form, file_name=WORDS, label=["dog", "cat", "dog", "NA"], who=["x", "y", "x", None])
    images = opened(folder, cluster_column="who")
    assert images.label_names == ("NA", "cat", "dog") and images.labels.tolist() == [2, 1, 2, 0]
    assert images.clusters.tolist() == [0, 1, 0, 2]
    assert [images.name(row) for row in range(4)] == [Path(word).stem for word in WORDS]


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [
        ([1, 0, 2], [1, 0, 2], None),
        ([1.0, 0.0, 2.0], [1, 0, 2], None),
        (["10", "2", "x"], [0, 1, 2], ("10", "2", "x")),
        ([True, False, True], [1, 0, 1], ("False", "True")),
    ],
)
def test_labels_of_metadata_are_of_every_kind(tmp_path, values, labels, names):
    images = opened(
        metadata(put(tmp_path, "0.png", "1.png", "2.png"), "csv", file_name=["0.png", "1.png", "2.png"], label=values)
    )
    assert images.labels.tolist() == labels and images.label_names == names


def test_metadata_lie_in_the_classes_folders_above_the_split_or_beside_it(tmp_path):
    two = put(tmp_path / "two", "x/0.png", "y/0.png")
    for name, label in (("x", 1), ("y", 0)):
        metadata(two / name, "csv", file_name=["0.png"], label=[label])
    assert opened(two).labels.tolist() == [1, 0]
    above = put(tmp_path / "above", "train/0.png", "test/0.png", "test/1.png")
    metadata(above, "csv", file_name=["train/0.png", "test/1.png", "test\\0.png"], label=["p", "q", "r"])
    images = opened(above, split="test")
    assert [images.label_names[label] for label in images.labels] == ["q", "r"]
    assert len(opened(above)) == 3
    deep = metadata(
        put(tmp_path / "deep", "p/q/0.png", "r/0.png"), "csv", file_name=["p/q/0.png", "r/0.png"], label=[1, 0]
    )
    assert opened(deep).labels.tolist() == [1, 0]


def test_without_labels_of_their_own_metadata_leave_them_to_the_folders(tmp_path):
    folder = metadata(put(tmp_path / "f", *NINE), "csv", file_name=NINE, who=list("xxxyyyzzz"))
    images = opened(folder, cluster_column="who")
    assert images.label_names == ("a", "b", "c") and images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert images.clusters.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert not opened(folder, label_column=None, cluster_column="who").has_labels
    assert opened(folder, label_column="who").label_names == ("x", "y", "z")
    flat = metadata(put(tmp_path / "flat", "0.png"), "csv", file_name=["0.png"], text=["a cat"])
    named = r"not in one folder a class .*metadata.csv with labels: text; without labels: data.label_column=null"
    with pytest.raises(VitPatchError, match=named):
        opened(flat)


def test_labels_that_contradict_the_folders_are_refused_unless_asked_for(tmp_path):
    labels = [name[0] for name in NINE]
    labels[4] = "c"
    folder = metadata(put(tmp_path / "f", *NINE), "csv", file_name=NINE, label=labels)
    with pytest.raises(VitPatchError, match=r"metadata.csv calls b/1.png 'c', its folder 'b'; .*label_column=label"):
        opened(folder)
    assert opened(folder, label_column="label").labels[4] == 2
    parts = metadata(put(tmp_path / "parts", "part1/0.png", "part2/0.png"), "csv",
                     file_name=["part1/0.png", "part2/0.png"], label=["y", "x"])  # fmt: skip
    assert opened(parts).label_names == ("x", "y")


def test_numbers_of_metadata_have_the_names_of_the_folders_that_they_are_of(tmp_path):
    """Else a model that has these names in another order would be asked for its own numbers."""
    folder = put(tmp_path / "f", *NINE)
    numbers = {"a": 2, "b": 0, "c": 1}
    images = opened(metadata(folder, "csv", file_name=NINE, label=[numbers[name[0]] for name in NINE]))
    assert images.label_names == ("b", "c", "a") and images.labels.tolist() == [2, 2, 2, 0, 0, 0, 1, 1, 1]
    other = put(tmp_path / "g", *NINE)  # folders that are no classes
    assert opened(metadata(other, "csv", file_name=NINE, label=[0, 1, 2] * 3)).label_names is None
    named = put(tmp_path / "h", "0/x.png", "1/x.png")
    with pytest.raises(VitPatchError, match=r"metadata.csv calls 0/x.png '1', its folder '0'"):
        opened(metadata(named, "csv", file_name=["0/x.png", "1/x.png"], label=[1, 0]))


def test_metadata_name_classes_masks_and_other_columns_of_files(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    folder = put(tmp_path, "0.png", "m0.png")
    kinds = Features(
        {"file_name": Value("string"), "mask_file_name": Value("string"), "kind": ClassLabel(names=["q", "p"])}
    )
    Dataset.from_dict({"file_name": ["0.png"], "mask_file_name": ["m0.png"], "kind": [0]}, features=kinds).to_parquet(
        str(folder / "metadata.parquet")
    )
    images = opened(folder, mask_column="mask")
    assert images.label_names == ("q", "p") and images.labels.tolist() == [0]
    assert images.mask(0).size == (2, 2)
    (folder / "metadata.parquet").unlink()
    assert opened(metadata(folder, "csv", photo_file_name=["0.png"], label=["q"])).columns.image == "photo"


@pytest.mark.parametrize(
    ("names", "labels", "says"),
    [
        (["0.png", "9.png"], [0, 1], r"metadata.csv lists 1 files that are not there: 9.png"),
        (["0.png", "0.png"], [0, 1], r"metadata.csv lists 1 images more than once: 0.png; leave one row of each"),
        (["0.png", "./0.png"], [0, 0], r"more than once: 0.png"),
        (["../0.png"], [0], r"file_name '../0.png'; expected a path inside its folder"),
        (["/0.png"], [0], r"file_name '/0.png'"),
        (["https://a.b/0.png"], [0], r"file_name 'https"),
        ([0, 1], [0, 1], r"has no column file_name of text"),
        (["0.png", ""], [0, 1], r"row 1 has no file_name"),
        (["0.png", "1.png"], ["x", None], r"data.label_column 'label': 1 of 2 rows have no label, the first is row 1"),
    ],
)
def test_metadata_that_do_not_fit_the_files_are_one_line(tmp_path, names, labels, says):
    folder = metadata(put(tmp_path, "0.png", "1.png"), "csv", file_name=names, label=labels)
    with pytest.raises(VitPatchError, match=says) as error:
        opened(folder)
    assert "\n" not in str(error.value)


def test_files_that_no_row_lists_and_metadata_that_are_not_read_are_said(tmp_path, caplog):
    folder = metadata(put(tmp_path, *NINE), "csv", file_name=NINE[:7], who=list("abcdefg"))
    assert len(opened(folder)) == 7
    assert any(
        "2 images are in no row of metadata.csv and are left out: c/1.png, c/2.png" in m for m in caplog.messages
    )
    shutil.move(folder / "metadata.csv", folder / "Metadata.tsv")
    assert len(opened(folder, on_error="skip")) == 9
    unread = [
        m for m in caplog.messages if "Metadata.tsv is not read; metadata files are metadata.csv, metadata.jsonl" in m
    ]
    assert len(unread) == 1


def test_rows_of_one_image_may_be_a_cluster_and_missing_files_may_be_skipped(tmp_path):
    folder = metadata(
        put(tmp_path, "0.png"), "csv", file_name=["0.png", "0.png", "9.png"], label=[0, 1, 2], of=["p", "p", "q"]
    )
    assert opened(folder, cluster_column="of", on_error="skip").clusters.tolist() == [0, 0, 1]


def test_two_metadata_files_of_one_folder_or_with_other_columns_do_not_mix(tmp_path):
    folder = put(tmp_path / "f", "0.png")
    for form in ("csv", "jsonl"):
        metadata(folder, form, file_name=["0.png"], label=["x"])
    with pytest.raises(VitPatchError, match=r"metadata.csv and metadata.jsonl lists 1 images more than once"):
        opened(folder)
    other = put(tmp_path / "g", "a/0.png", "b/0.png")
    metadata(other / "a", "csv", file_name=["0.png"], label=["x"])
    metadata(other / "b", "jsonl", file_name=["0.png"], kind=["x"])
    with pytest.raises(VitPatchError, match=r"metadata.jsonl has other columns than metadata.csv"):
        opened(other)


def test_metadata_files_may_have_their_columns_in_any_order(tmp_path):
    folder = put(tmp_path, "a/0.png", "b/0.png")
    metadata(folder / "a", "csv", file_name=["0.png"], label=["x"])
    metadata(folder / "b", "jsonl", label=["y"], file_name=["0.png"])
    assert opened(folder).label_names == ("x", "y")


# --- datasets' own reading of a local folder ---


def test_datasets_leaves_no_image_out_and_mixes_no_classes_without_a_word(tmp_path, caplog):
    from conftest import pictures, write_parquet

    names = put(tmp_path / "names", "a/1.png", "a/img_test_1.png", "b/1.png")
    for split in ("train", "test"):
        with pytest.raises(
            VitPatchError, match=r"2 images, such as a/1.png, are in none of its splits \(test\).*imagefolder"
        ):
            HubImages(path=str(names), split=split).open()
    for number, order in enumerate((["dog", "cat"], ["cat", "dog"])):
        (tmp_path / "shards").mkdir(exist_ok=True)
        write_parquet(tmp_path / "shards" / f"test-{number}.parquet", pictures(1), [0], names=order)
    for streaming in (False, True):
        with pytest.raises(VitPatchError, match=r"test-1.parquet has other classes than test-0.parquet"):
            HubImages(path=str(tmp_path / "shards"), split="test", streaming=streaming).open()
    dirs = put(tmp_path / "dirs", "train/a/1.png", "train/b/1.png", "docs/logo.png")
    assert HubImages(path=str(dirs), split="train").open().label_names == ("a", "b")
    assert any("1 images, such as docs/logo.png, are in none of its splits (train)" in m for m in caplog.messages)


def test_a_column_of_categories_is_one_of_names(tmp_path):
    import io

    import pandas as pd

    stream = io.BytesIO()
    PIXEL.save(stream, "PNG")
    of_size = pd.Categorical(["small", "large", "small"], categories=["small", "medium", "large"])
    stored = [{"bytes": stream.getvalue(), "path": None}] * 3
    pd.DataFrame({"image": stored, "label": of_size, "of": of_size}).to_parquet(tmp_path / "c.parquet")
    images = ParquetImages(path=str(tmp_path / "c.parquet"), cluster_column="of").open()
    assert images.label_names == ("large", "small")
    assert images.clusters.tolist() == [0, 1, 0] and np.array_equal(images.labels, [1, 0, 1])
