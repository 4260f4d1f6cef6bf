"""Sources of images: what each is asked for, which rows are taken; and the hub. Files: ``vitpatch.data.files``."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vitpatch.checks import Count, Expected, Index, Seed, check_fields, is_list
from vitpatch.data.columns import (
    AUTO,
    Labels,
    cluster_values,
    is_sorted_by_class,
    is_text,
    number_labels,
    resolve_columns,
    select_rows,
)
from vitpatch.data.folders import check_images_of_splits, check_same_classes, files_below
from vitpatch.data.images import UNKNOWN, ColumnNames, LabelledImages
from vitpatch.data.labels import label_numbers, mapped_labels
from vitpatch.errors import ArgumentError, VitPatchError, argument_keys
from vitpatch.hub import commit_of, explain, local_copy, resolve

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

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

    def asked(self, features: Mapping[str, Any]) -> ColumnNames:
        """The columns as the keys name them, ``auto`` for those that are to be found."""
        return ColumnNames(
            self.image_column, self.label_column, self.mask_column, self.cluster_column, pair=self.pair_column
        )

    @property
    def streams(self) -> bool:
        """Whether rows are read from where they are, one after the other."""
        return False

    def classes_without_images(self) -> tuple[str, ...]:
        """The names of classes that the source knows, though no image is of them."""
        return ()

    def open(self, keys: str = "data.") -> LabelledImages:
        """The selected rows, checked; read once per process. Raises ``VitPatchError``.

        ``keys`` stands before the name of a parameter in errors.
        """
        seed_matters = self.shuffle_seed == AUTO and self.limit is not None
        with argument_keys(keys):
            return _open(self if seed_matters else replace(self, seed=0))


@dataclass(frozen=True, kw_only=True)
class HubImages(ImageSource):
    """A data set of the Hugging Face hub by its id, or its local copy.

    ``config_name`` where it has several, ``revision`` a commit or tag. ``streaming`` reads the rows where they are, for
    what does not fit the disk: they are gone through once for the labels and once for the images.
    """

    config_name: str | None = None
    revision: str | None = None
    streaming: bool = False

    def rows(self) -> datasets.Dataset | datasets.IterableDataset:
        """The rows of the split, downloaded or from the cache, or a stream of them."""
        from datasets import enable_progress_bars

        where = resolve(self.path, "data.path")
        if self.split is None:
            raise ArgumentError("split is missing: name the split, such as split=test")
        if Path(where).is_dir():
            if self.revision is not None:
                raise VitPatchError(f"data.revision {self.revision}: {self.path} is a local folder; leave it null")
        else:  # a download may take long
            enable_progress_bars()
        try:
            return self._load(where, self.revision)
        except ConnectionError:  # datasets looks for what it prepared itself, not for what was downloaded
            if (copy := local_copy(where, self.revision, "dataset")) is None:
                raise
        return self._load(str(copy), None)

    def _load(self, where: str, revision: str | None) -> datasets.Dataset | datasets.IterableDataset:
        from datasets import load_dataset, load_dataset_builder

        if Path(where).is_dir():
            of_splits = load_dataset_builder(where, self.config_name).config.data_files or {}
            check_images_of_splits(Path(where), of_splits)
            check_same_classes([Path(file) for file in of_splits.get(self.split, ()) if file.endswith(".parquet")])
        return load_dataset(where, self.config_name, revision=revision, split=self.split, streaming=self.streaming)

    @property
    def streams(self) -> bool:
        """Whether rows are read from where they are, one after the other."""
        return self.streaming

    def fingerprint(self) -> str:
        """What stands for the images of a stream: the commit on the hub, or names, sizes and times of local files."""
        path = Path(self.path).expanduser()
        if not path.is_dir():
            commit = commit_of(self.path, self.revision, "dataset") or self.revision
            return f"{self.path} {self.config_name} {self.split} {commit}"
        files = [file for file in files_below(path) if file.is_file()]
        return " ".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)


class StreamedRows:
    """Some rows of a stream by position; going forward continues, going back starts again."""

    def __init__(self, stream: datasets.IterableDataset, ids: NDArray[np.int64]) -> None:
        self._stream, self._ids = stream, ids
        self._next, self._rest, self._last = 0, None, {}

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> dict[str, Any]:
        wanted = int(self._ids[position])
        if self._rest is None or wanted < self._next - 1:
            self._rest, self._next = iter(self._stream), 0
        while self._next <= wanted:
            self._last = next(self._rest)
            self._next += 1
        return self._last

    def __getstate__(self) -> dict[str, Any]:
        return {"_stream": self._stream, "_ids": self._ids, "_next": 0, "_rest": None, "_last": {}}


@lru_cache(maxsize=4)
def _open(source: ImageSource) -> LabelledImages:
    import datasets

    datasets.disable_progress_bars()
    with _one_line(source):
        rows = source.rows()
        if rows.features is None:  # of a stream, known from its first rows
            rows = rows._resolve_features()
        columns = resolve_columns(rows.features, source.asked(rows.features))
        for column in filter(None, (columns.image, columns.mask, columns.pair)):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        of_labels = (source.classes, source.per_class, source.label_map)
        if columns.label is None and any(key is not None for key in of_labels):
            raise VitPatchError("data.classes, data.per_class and data.label_map: the images have no labels")
        values, number = _read(source, rows, [column for column in (columns.label, columns.cluster) if column])
    labels = Labels(np.full(number, UNKNOWN, dtype=np.int64), None)
    if columns.label is not None:
        more = source.classes_without_images()
        if more:
            log.info("data.path %s: %s: a class without images", source.path, ", ".join(more))
        labels = number_labels(values[columns.label], rows.features[columns.label], columns.label, more)
    ids = _selected(source, labels)
    if not len(ids):
        raise VitPatchError(f"data {source.path}: the selection is empty; there is no image to patch")
    if columns.label is not None:
        _check_labels(source, labels.numbers, ids, columns.label)
    clusters: Sequence[Any] = ids.tolist()
    if columns.cluster is not None:
        clusters = _clusters(values[columns.cluster], ids, columns)
    selected = StreamedRows(rows, ids) if source.streams else rows.select(ids)
    return LabelledImages(
        rows=selected,
        columns=columns,
        ids=ids,
        labels=labels.numbers[ids],
        label_names=labels.names,
        alphabetical=labels.alphabetical,
        clusters=clusters,
        where=source.path,
        fingerprint=source.fingerprint() if source.streams else None,
        on_error=source.on_error,
        num_workers=min(source.num_workers, 1 if source.streams else os.cpu_count() or 1),
    )


def _read(source: ImageSource, rows: Any, wanted: list[str]) -> tuple[dict[str, list[Any]], int]:
    """The values of columns, and the number of rows; of a stream whose order is kept only of as many as are taken."""
    if not source.streams:
        return {column: rows[column][:] for column in wanted}, len(rows)
    in_order = source.shuffle_seed in (None, AUTO) and source.classes is None and source.per_class is None
    leaves_out = any(of_model is None for _, of_model in source.label_map or ())
    few = in_order and not leaves_out and not any(is_text(rows.features[column]) for column in wanted)
    one = wanted or list(rows.features)[:1]
    read = list(islice(rows.select_columns(one), source.limit if few else None))
    return {column: [row[column] for row in read] for column in wanted}, len(read)


def _selected(source: ImageSource, labels: Labels) -> NDArray[np.int64]:
    """The rows that are taken, ascending."""
    number = len(labels.names) if labels.names is not None else int(labels.numbers.max(initial=0)) + 1
    classes, left_out = _mapped(source, labels, number)
    taken = select_rows(
        labels.numbers,
        merged=np.where(labels.numbers == UNKNOWN, UNKNOWN, np.unique(classes, return_inverse=True)[1][labels.numbers]),
        classes=None if source.classes is None else label_numbers(source.classes, labels.names, number),
        left_out=left_out,
        per_class=source.per_class,
        limit=source.limit,
        shuffle_seed=None if source.streams and source.shuffle_seed == AUTO else source.shuffle_seed,
        seed=source.seed,
        where=_where(source),
    )
    if source.streams and source.shuffle_seed == AUTO and len(taken) == source.limit:
        _warn_of_order(source, labels.numbers[taken])
    return taken


def _mapped(source: ImageSource, labels: Labels, number: int) -> tuple[list[str], list[int]]:
    """By label its name, or the class that ``label_map`` makes of it; and the labels that it leaves out.

    What it says of labels that are not here is not looked at.
    """
    names = list(labels.names) if labels.names is not None else list(map(str, range(max(number, 1))))
    label_map = dict(source.label_map or ())
    mapped = mapped_labels(label_map, names)
    for key, label in mapped.items():
        names[label] = str(label_map[key])
    return names, [label for key, label in mapped.items() if label_map[key] is None]


def _where(source: ImageSource) -> str:
    return f"data {source.path}" + (f", split {source.split}" if source.split is not None else "")


def _warn_of_order(source: ImageSource, labels: NDArray[np.int64]) -> None:
    """Says where the first images of a stream look as if those of other classes came later."""
    one = len(labels) > 1 and len(np.unique(labels)) == 1 and labels[0] != UNKNOWN
    if one or is_sorted_by_class(labels):
        log.warning(
            "%s: the first %d images of the stream are %s; data.shuffle_seed=0 draws from all of it, read once more",
            _where(source), len(labels), "all of one class" if one else "sorted by class",
        )  # fmt: skip


def _check_labels(source: ImageSource, labels: NDArray[np.int64], ids: NDArray[np.int64], column: str) -> None:
    without = ids[labels[ids] == UNKNOWN]
    if len(without):
        raise VitPatchError(
            f"data.label_column {column!r}: {len(without)} of {len(ids)} rows have no label, the first is row "
            f"{without[0]}; data.classes takes only rows of classes, data.label_column=null needs no labels"
        )


def _clusters(values: Sequence[Any], ids: NDArray[np.int64], columns: ColumnNames) -> list[Hashable]:
    """The cluster of each image that is taken; logs what is unusual in them."""
    by_row, without = cluster_values(values)
    clusters = [by_row[row] for row in ids]
    where, single = f"data.cluster_column {columns.cluster!r}", sum(without[row] for row in ids)
    if single:
        log.warning("%s: %d of %d images have no value; each is a cluster of its own", where, single, len(ids))
    if columns.cluster == columns.label:
        log.warning("%s is the label column: each class is one cluster, no image has a partner of its class", where)
    elif len(ids) > 1 and len(set(clusters)) == 1:
        log.warning("%s: all %d images are one cluster; there is no interval and no p of one", where, len(ids))
    return clusters


@contextmanager
def _one_line(source: ImageSource) -> Iterator[None]:
    """Turns what ``datasets`` raises on loading into one line."""
    try:
        yield
    except VitPatchError:
        raise
    except Exception as error:  # datasets, pyarrow, fsspec and httpx share no class
        download = "--repo-type dataset "
        raise VitPatchError(f"data {source.path}: {explain(error, source.path, 'data.path', download)}") from error
