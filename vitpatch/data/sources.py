"""Sources of images: their keys, which columns and rows of the data these take; and the plainest, parquet files."""

from __future__ import annotations

import glob
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpatch.checks import Count, Expected, Index, Seed, argument_keys, check_fields, is_list
from vitpatch.data.images import ColumnNames, LabelledImages, StreamedRows
from vitpatch.data.labels import (
    TEXT,
    UNKNOWN,
    cluster_values,
    is_sorted_by_class,
    is_text,
    label_numbers,
    mapped_labels,
    number_labels,
    order_in_rounds,
    rank_in_class,
)
from vitpatch.errors import ArgumentError, VitPatchError
from vitpatch.hub import explain_failure

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

AUTO = "auto"
"""A key whose value is found in the data: a column, or whether to shuffle rows."""
SPLIT_FILE = r"(train|test|validation|valid|val|dev)([-_.]?\d.*)?\.parquet$"
LEFT_BY_SYSTEMS = ("__MACOSX", "@eaDir")
"""Folders that macOS puts into archives and network disks beside images, full of files that are named like images."""
Numbers = NDArray[np.int64]
Classes = Annotated[
    str | int | tuple[str | int, ...] | None, Expected("names or numbers of labels, such as [cat,dog], or null for all")
]
LabelMap = Annotated[tuple[tuple[str | int, str | int | None], ...] | None, Expected("{label: class}")]


@dataclass(frozen=True, kw_only=True)
class ImageSource(ABC):
    """Where images are, and which of them: the keys of ``conf/data/*.yaml``.

    Columns: ``image_column`` and ``label_column`` ``auto`` are the one image and the one ClassLabel column (or those
    called image and label, which may hold names or numbers); ``label_column`` ``None``: the images have no labels.
    ``mask_column`` has gray images, white = object; ``pair_column`` each image's own counterpart, for
    ``corruption=other_image corruption.kind=pair``. Images with the same value of ``cluster_column`` are not
    independent.

    Rows, in this order: ``shuffle_seed`` (``None`` = as they come), ``classes`` (names or numbers of labels),
    ``per_class`` (the first so many of each), ``limit`` (the first so many, of labels that are not left out). With
    ``shuffle_seed`` ``auto`` rows stay as they come, but where ``limit`` takes a part of rows that are sorted by class
    it takes them in rounds over the classes: one of each, then the next of each, by ``seed``, the run's. A stream is
    not read to its end for that. ``label_map`` {label: the model's class} where names differ, ``None`` = left out. An
    image that cannot be read stops the run, or with ``on_error="skip"`` is left out and counted.

    ``name`` is what the data are called in titles, instead of the last part of ``path``.
    """

    path: str
    split: str | None = None
    image_column: Annotated[str, Expected("the name of a column, or auto")] = AUTO
    label_column: Annotated[str | None, Expected("the name of a column, auto, or null for none")] = AUTO
    mask_column: str | None = None
    cluster_column: str | None = None
    pair_column: str | None = None
    classes: Classes = None
    per_class: Annotated[Count | None, "for all"] = None
    limit: Annotated[Count | None, "for all"] = None
    shuffle_seed: Annotated[
        Index | Literal["auto"] | None, Expected("auto, a whole number, 0 or more, or null for rows as they come")
    ] = AUTO
    seed: Seed = 0
    label_map: LabelMap = None
    num_workers: Index = 0
    on_error: Literal["raise", "skip"] = "raise"
    name: str | None = field(default=None, compare=False)
    streaming: ClassVar[bool] = False
    """Whether rows are read from where they are, one after the other."""

    def __post_init__(self) -> None:
        if type(self.path) is int:  # a folder called 2024
            object.__setattr__(self, "path", str(self.path))
        if isinstance(self.label_map, Mapping):  # Hydra gives its own kinds of list and dict, which have no hash
            object.__setattr__(self, "label_map", tuple(self.label_map.items()) or None)
        if is_list(self.classes):
            object.__setattr__(self, "classes", tuple(self.classes))
        if self.path in (None, ""):
            raise VitPatchError("data.path is missing: say where the images are")
        check_fields(self, "data")

    @abstractmethod
    def rows(self) -> datasets.Dataset | datasets.IterableDataset:
        """All rows of the split, images undecoded where the format allows it."""

    def open(self, keys: str = "data.") -> LabelledImages:
        """The selected rows, checked; read once per process. Raises ``VitPatchError``.

        ``keys`` stands before the name of a parameter in errors.
        """
        seed_matters = self.shuffle_seed == AUTO and self.limit is not None
        with argument_keys(keys):
            return _open(self if seed_matters else replace(self, seed=0))


@lru_cache(maxsize=4)
def _open(source: ImageSource) -> LabelledImages:
    try:
        rows, columns, values, number = _read(source)
    except VitPatchError:
        raise
    except Exception as error:  # datasets, pyarrow, fsspec and httpx share no class
        reason = explain_failure(error, source.path, "data.path", "--repo-type dataset ")
        raise VitPatchError(f"data {source.path}: {reason}") from error
    labels, names = np.full(number, UNKNOWN, dtype=np.int64), None
    if columns.label is not None:
        labels, names = number_labels(values[columns.label], rows.features[columns.label], columns.label)
    elif any(key is not None for key in (source.classes, source.per_class, source.label_map)):
        raise VitPatchError("data.classes, data.per_class and data.label_map: the images have no labels")
    ids = select_rows(source, labels, names)
    if not len(ids):
        raise VitPatchError(f"data {source.path}: the selection is empty; there is no image to patch")
    unlabelled = ids[labels[ids] == UNKNOWN]
    if columns.label is not None and len(unlabelled):
        raise VitPatchError(
            f"data.label_column {columns.label!r}: {len(unlabelled)} of {len(ids)} rows have no label, the first is "
            f"row {unlabelled[0]}; data.classes takes only rows of classes, data.label_column=null needs no labels"
        )
    return LabelledImages(
        rows=StreamedRows(rows, ids) if source.streaming else rows.select(ids),
        columns=columns,
        ids=ids,
        labels=labels[ids],
        label_names=names,
        clusters=ids if columns.cluster is None else _clusters(values[columns.cluster], ids, columns),
        where=source.path,
        fingerprint=source.fingerprint() if source.streaming else None,
        on_error=source.on_error,
        num_workers=min(source.num_workers, 1 if source.streaming else os.cpu_count() or 1),
    )


def _read(source: ImageSource) -> tuple[Any, ColumnNames, dict[str, list[Any]], int]:
    """The rows, images undecoded; which columns are used; the values of labels and clusters; and how many rows.

    Of a stream whose order is kept only as many are read as are taken.
    """
    import datasets

    datasets.disable_progress_bars()
    rows = source.rows()
    if rows.features is None:  # of a stream, known from its first rows
        rows = rows._resolve_features()
    columns = resolve_columns(source, rows.features)
    for column in columns.of_images:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    wanted = [column for column in (columns.label, columns.cluster) if column is not None]
    if not source.streaming:
        return rows, columns, {column: rows[column][:] for column in wanted}, len(rows)
    in_order = source.shuffle_seed in (None, AUTO) and source.classes is None and source.per_class is None
    leaves_out = any(of_model is None for _, of_model in source.label_map or ())
    is_enough = in_order and not leaves_out and not any(is_text(rows.features[column]) for column in wanted)
    read = rows.select_columns(wanted or list(rows.features)[:1])
    read = list(islice(read, source.limit if is_enough else None))
    return rows, columns, {column: [row[column] for row in read] for column in wanted}, len(read)


def _clusters(values: Sequence[Any], ids: Numbers, columns: ColumnNames) -> list[Hashable | None]:
    """The values by which the images that are taken are clustered; logs what is unusual in them."""
    by_row = cluster_values(values)
    clusters = [by_row[row] for row in ids]
    where, missing = f"data.cluster_column {columns.cluster!r}", clusters.count(None)
    if missing:
        log.warning("%s: %d of %d images have no value; each is a cluster of its own", where, missing, len(ids))
    if columns.cluster == columns.label:
        log.warning("%s is the label column: each class is one cluster, no image has a partner of its class", where)
    elif len(ids) > 1 and not missing and len(set(clusters)) == 1:
        log.warning("%s: all %d images are one cluster; there is no interval and no p of one", where, len(ids))
    return clusters


def resolve_columns(source: ImageSource, features: Mapping[str, Any]) -> ColumnNames:
    """The columns that a source's keys name, ``AUTO`` resolved; ``features`` are those of ``datasets`` by column name.

    Raises ``VitPatchError`` for a column that is missing or of another kind, or where several could be it.
    """
    import datasets

    named = {key: getattr(source, f"{key}_column") for key in ("image", "label", "mask", "cluster", "pair")}
    for key, column in named.items():
        if column not in (None, AUTO) and column not in features:
            raise VitPatchError(f"data.{key}_column {column!r}: the data have the columns {', '.join(features)}")
    unnamed = [name for name in features if name not in (named["mask"], named["cluster"], named["pair"])]
    if named["image"] == AUTO:
        of_images = [name for name in unnamed if isinstance(features[name], datasets.Image)]
        named["image"] = _choose_column(of_images, unnamed, "image")
    if named["label"] == AUTO:
        classes = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
        named["label"] = _choose_column([name for name in classes if name in unnamed] or classes, unnamed, "label")
    columns = ColumnNames(**named, name="name" if "name" in features else None)
    for column in columns.of_images:
        kind = features[column]
        is_stored = isinstance(kind, dict) and set(kind) >= {"bytes", "path"}  # as an Image without its feature
        if not (isinstance(kind, datasets.Image) or is_stored or getattr(kind, "dtype", None) == "binary"):
            raise VitPatchError(f"data column {column!r} holds {kind}; expected images (encoded bytes)")
    label, cluster = features.get(columns.label), features.get(columns.cluster)
    dtype = str(getattr(label, "dtype", ""))
    if label is not None and not (hasattr(label, "names") or dtype.startswith(("int", "uint", "float", "bool", *TEXT))):
        raise VitPatchError(
            f"data.label_column {columns.label!r} holds {label}; expected a name, a whole number or a ClassLabel for "
            "each image (null: the images have no labels)"
        )
    if cluster is not None and not isinstance(cluster, datasets.Value | datasets.ClassLabel):
        raise VitPatchError(
            f"data.cluster_column {columns.cluster!r} holds {cluster}; expected one value for each "
            "image: text, a number, a date, or true and false"
        )
    return columns


def _choose_column(candidates: list[str], names: list[str], usual: str) -> str:
    """The column that ``auto`` stands for: the only candidate, or else the one with the usual name."""
    if len(candidates) == 1:
        return candidates[0]
    if usual in (candidates or names):
        return usual
    several = f"several could be it: {', '.join(candidates)}"
    what = several if candidates else f"none of its columns is one: {', '.join(names)}"
    without = "; images without labels: data.label_column=null" if usual == "label" else ""
    raise VitPatchError(f"data.{usual}_column is missing: {what}; name it{without}")


def select_rows(source: ImageSource, labels: Numbers, names: Sequence[str] | None) -> Numbers:
    """The rows that a source's keys take, ascending, (rows,) int64; ``names`` by label.

    The keys act in the order that ``ImageSource`` describes. Whether rows are sorted by class, and rounds over the
    classes, go by the classes that ``label_map`` makes of labels; its entries for labels of other splits are ignored.
    """
    number = len(names) if names is not None else int(labels.max(initial=0)) + 1
    class_names = list(names or map(str, range(max(number, 1))))
    label_map, left_out = dict(source.label_map or ()), []
    for key, label in mapped_labels(label_map, class_names).items():
        class_names[label] = str(label_map[key])
        left_out += [label] if label_map[key] is None else []
    rows = np.arange(len(labels))
    if source.shuffle_seed not in (None, AUTO):
        rows = np.random.default_rng(source.shuffle_seed).permutation(rows)
    if source.classes is not None:
        rows = rows[np.isin(labels[rows], label_numbers(source.classes, names, number))]
    if source.per_class is not None:
        rows = rows[rank_in_class(labels[rows]) < source.per_class]
    if source.limit is None:
        return np.sort(rows)
    rows = rows[~np.isin(labels[rows], left_out)]
    of_rows = np.unique(class_names, return_inverse=True)[1][labels[rows]]
    of_rows[labels[rows] == UNKNOWN] = UNKNOWN
    first = rows[: source.limit]
    where = f"data {source.path}" + (f", split {source.split}" if source.split is not None else "")
    if source.streaming and source.shuffle_seed == AUTO and len(first) == source.limit:
        is_one = len(first) > 1 and len({*labels[first]}) == 1 and labels[first[0]] != UNKNOWN
        if is_one or is_sorted_by_class(labels[first]):
            log.warning(
                "%s: the first %d images of the stream are %s; data.shuffle_seed=0 draws from all of it, read once "
                "more",
                where, len(first), "all of one class" if is_one else "sorted by class",
            )  # fmt: skip
    elif source.shuffle_seed == AUTO and len(first) < len(rows) and is_sorted_by_class(of_rows):
        log.info(
            "%s: rows are sorted by class; %d of %d are taken in rounds over the classes by seed %d "
            "(data.shuffle_seed=null: the first)",
            where, len(first), len(rows), source.seed,
        )  # fmt: skip
        first = rows[order_in_rounds(of_rows, source.seed)][: source.limit]
    return np.sort(first)


@dataclass(frozen=True, kw_only=True)
class ParquetImages(ImageSource):
    """A parquet file, a glob, or a folder with ``SPLIT.parquet`` or ``SPLIT-0….parquet``, as ``datasets`` writes."""

    def rows(self) -> datasets.Dataset:
        """The rows of the file or files, in order of their names."""
        from datasets import Dataset
        from pyarrow import parquet

        path = Path(self.path).expanduser()
        if path.is_file():
            if is_image(path):
                raise VitPatchError(f"data.path {self.path}: is an image; use data=imagefolder data.path={self.path}")
            if self.split is not None:
                raise ArgumentError(f"split {self.split}: data.path {self.path} is one file; leave it null")
            files = [path]
        elif path.is_dir():
            files = self._in_folder(path)
        else:
            matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 – Path.glob takes hidden files too
            files = sorted(file for file in matches if not {*file.parts} & ({*LEFT_BY_SYSTEMS} - {*path.parts}))
        if not files:
            raise VitPatchError(
                f"data.path {self.path}: no such file or folder; give a parquet file, a glob, or a folder of them and "
                "its split"
            )
        features = [features_of(file) for file in files]
        if unlike := [file.name for file, of_file in zip(files, features, strict=True) if of_file != features[0]]:
            raise VitPatchError(f"data.path {self.path}: {unlike[0]} has other columns or classes than {files[0].name}")
        if not sum(parquet.read_metadata(file).num_rows for file in files):
            raise VitPatchError(f"data.path {self.path}: the selection is empty; there is no row in it")
        return Dataset.from_parquet([str(file) for file in files])

    def _in_folder(self, folder: Path) -> list[Path]:
        """The files of the split; without one, all, where they are not of several."""
        files = sorted(filter(is_visible, folder.glob("*.parquet")))
        splits = sorted({match[1] for file in files if (match := re.match(SPLIT_FILE, file.name))})
        if self.split is None and len(splits) > 1:
            raise ArgumentError(f"split null: the data have {', '.join(splits)}; choose one")
        if self.split is not None:
            files = [f for f in files if re.fullmatch(rf"{re.escape(self.split)}([-_.]?\d.*)?\.parquet", f.name)]
        if not files:
            raise VitPatchError(
                f"data.path {self.path}: no file {self.split or ''}*.parquet in it; give a parquet file, a glob, or a "
                f"folder of them and its split{f' (one of {chr(44).join(splits)})' if splits else ''}"
            )
        return files


def features_of(file: Path) -> datasets.Features:
    """The columns of a parquet file."""
    from datasets import Features
    from pyarrow import parquet

    return Features.from_arrow_schema(parquet.read_schema(file))


def is_visible(path: Path) -> bool:
    """Whether a file or folder is of the data: its name does not begin with a dot, and no system left it there.

    ``datasets`` passes over these too, and over every folder that begins with two underscores: here ``__background__``
    is a class.
    """
    return not path.name.startswith(".") and path.name not in LEFT_BY_SYSTEMS


def is_image(path: Path) -> bool:
    """Whether the suffix of a file, in upper or lower case, is one of an image that Pillow opens."""
    return path.suffix.lower() in _image_suffixes()


@cache
def _image_suffixes() -> set[str]:
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN} - {".pdf"}
