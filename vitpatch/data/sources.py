"""Sources of images: what each is asked for, which columns are used, and which rows are taken."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vitpatch.checks import Count, Expected, Index, Seed, check_fields, is_list
from vitpatch.data.images import ColumnNames, LabelledImages, StreamedRows
from vitpatch.data.labels import (
    TEXT,
    UNKNOWN,
    Labels,
    cluster_values,
    is_text,
    label_numbers,
    mapped_labels,
    number_labels,
)
from vitpatch.errors import VitPatchError, argument_keys
from vitpatch.hub import explain

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

AUTO = "auto"
"""A key that the data answer: which column it is, or whether rows are sorted by class."""
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


def resolve_columns(features: Mapping[str, Any], asked: ColumnNames) -> ColumnNames:
    """The ``asked`` columns, ``AUTO`` found; ``features`` are those of ``datasets`` by column name.

    Raises ``VitPatchError`` for a column that is missing or of another kind, or where several could be it.
    """
    import datasets

    for key in ("image", "label", "mask", "cluster", "pair"):
        column = getattr(asked, key)
        if column not in (None, AUTO) and column not in features:
            raise VitPatchError(f"data.{key}_column {column!r}: the data have the columns {', '.join(features)}")
    rest = [name for name in features if name not in (asked.mask, asked.cluster, asked.pair)]
    image, label = asked.image, asked.label
    if image == AUTO:
        image = _the_one([name for name in rest if isinstance(features[name], datasets.Image)], rest, "image")
    if label == AUTO:
        classes = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
        label = _the_one([name for name in classes if name in rest] or classes, rest, "label")
    for column in filter(None, (image, asked.mask, asked.pair)):
        kind = features[column]
        is_stored = isinstance(kind, dict) and set(kind) >= {"bytes", "path"}  # as an Image without its feature
        if not (isinstance(kind, datasets.Image) or is_stored or getattr(kind, "dtype", None) == "binary"):
            raise VitPatchError(f"data column {column!r} holds {kind}; expected images (encoded bytes)")
    dtype = str(getattr(features.get(label), "dtype", ""))
    can_name = hasattr(features.get(label), "names") or dtype.startswith(("int", "uint", "float", "bool", *TEXT))
    if label is not None and not can_name:
        raise VitPatchError(
            f"data.label_column {label!r} holds {features[label]}; expected a name, a whole number or a ClassLabel for "
            "each image (null: the images have no labels)"
        )
    if asked.cluster is not None and not isinstance(features[asked.cluster], datasets.Value | datasets.ClassLabel):
        raise VitPatchError(
            f"data.cluster_column {asked.cluster!r} holds {features[asked.cluster]}; expected one value for each "
            "image: text, a number, a date, or true and false"
        )
    name = "name" if "name" in features else None
    return ColumnNames(image, label, asked.mask, asked.cluster, name, asked.pair)


def _the_one(candidates: list[str], names: list[str], usual: str) -> str:
    """The one column of a kind, or of several, or none, the one with the usual name."""
    if len(candidates) == 1:
        return candidates[0]
    if usual in (candidates or names):
        return usual
    what = (
        f"several could be it: {', '.join(candidates)}"
        if candidates
        else f"none of its columns is one: {', '.join(names)}"
    )
    without = "; images without labels: data.label_column=null" if usual == "label" else ""
    raise VitPatchError(f"data.{usual}_column is missing: {what}; name it{without}")


def is_sorted_by_class(labels: Numbers) -> bool:
    """Whether rows of one class lie together, whatever the order of the classes, in one block each or in several.

    Two neighbours are of different classes at most half as often as they would be in random order, in which that is
    expected (n² − Σ nₖ²) / n times, of n rows, nₖ of them of class k.
    """
    n, counts = len(labels), np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or counts.max() == 1:
        return False
    changes = np.count_nonzero(labels[1:] != labels[:-1])
    return changes == len(counts) - 1 or 2 * changes * n <= n**2 - int((counts.astype(np.int64) ** 2).sum())


def in_rounds(labels: Numbers, seed: int) -> Numbers:
    """Positions in rounds over the classes: one of each class, then the next of each, … (images,) int64.

    The order of the classes, and of the images of a class, is random by the seed, and knows nothing of how many are
    taken: the first 16 are among the first 32.
    """
    rng = np.random.default_rng([seed, 3])  # 3: apart from other draws of the seed
    order = rng.permutation(len(labels))
    classes, which = np.unique(labels, return_inverse=True)
    place = rng.permutation(len(classes))[which]
    return order[np.lexsort((place[order], number_in_class(labels[order])))]


def number_in_class(labels: Numbers) -> Numbers:
    """How many of its class stand before each, (images,) int64."""
    numbers = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = labels == label
        numbers[of_class] = np.arange(np.count_nonzero(of_class))
    return numbers


def select_rows(
    labels: Numbers,
    *,
    merged: Numbers | None = None,
    classes: Collection[int] | None = None,
    left_out: Collection[int] = (),
    per_class: int | None = None,
    limit: int | None = None,
    shuffle_seed: int | str | None = AUTO,
    seed: int = 0,
    where: str = "data",
) -> Numbers:
    """The rows that are taken, ascending, (rows,) int64.

    In this order: shuffled by ``shuffle_seed``, of ``classes``, the first ``per_class`` of each, the first ``limit``,
    for which labels that are ``left_out`` do not count. With ``shuffle_seed`` ``AUTO`` rows stay as they come, but
    where ``limit`` takes a part of rows that are sorted by class, it takes them in rounds over the classes by
    ``seed``, which is logged. Classes are there what is ``merged`` of the labels, (images,). ``where`` names the data.
    """
    rows = np.arange(len(labels))
    if shuffle_seed not in (None, AUTO):
        rows = np.random.default_rng(shuffle_seed).permutation(rows)
    if classes is not None:
        rows = rows[np.isin(labels[rows], list(classes))]
    if per_class is not None:
        rows = rows[number_in_class(labels[rows]) < per_class]
    if limit is None:
        return np.sort(rows)
    rows = rows[~np.isin(labels[rows], list(left_out))]
    of_rows = (labels if merged is None else merged)[rows]
    if shuffle_seed == AUTO and limit < len(rows) and is_sorted_by_class(of_rows):
        log.info(
            "%s: rows are sorted by class; %d of %d are taken in rounds over the classes by seed %d "
            "(data.shuffle_seed=null: the first)",
            where, limit, len(rows), seed,
        )  # fmt: skip
        rows = rows[in_rounds(of_rows, seed)]
    return np.sort(rows[:limit])
