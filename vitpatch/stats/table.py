"""The result of the table that ``vitpatch.patch`` returns, by the rules of a run's. Pure: numpy and pandas."""

from __future__ import annotations

from typing import Any

import pandas as pd

from vitpatch.errors import VitPatchError
from vitpatch.formatting import first_few
from vitpatch.schema import PATCH_COLUMNS
from vitpatch.stats.result import RunResult, analyze
from vitpatch.stats.summary import measure, measured_columns
from vitpatch.study import Study
from vitpatch.types import (
    ALL_HEADS,
    JOINT,
    BaseRun,
    Direction,
    Donor,
    Interval,
    Metric,
    Site,
    Target,
    TokenGroup,
    token_position,
)

DONORS = (Donor.PAIR,)
BASE_COLUMNS = [f"{name}_{run}" for name in ("prob", "log_odds", "pred") for run in BaseRun]
"""What of the base runs a table must have; findings also look at the other metrics."""


def result_of(name: str, given: Any, seed: int = 0, interval: str = Interval.PERCENTILE) -> RunResult:
    """The result of a finished run, or of what ``vitpatch.patch`` returned: images are all included, without controls.

    ``name`` is that of the function that asks, for errors; ``seed`` and ``interval`` are of a table alone. Raises
    ``VitPatchError`` for what is neither, and for a table of several calls that do not go together.
    """
    if hasattr(given, "result"):
        return given.result
    if not isinstance(given, pd.DataFrame) or given.empty:
        raise VitPatchError(f"{name}: got {type(given).__name__} without rows; give what vitpatch.patch returned")
    direction, metric = (Direction(_only(name, given, "direction")), Metric(_only(name, given, "metric")))
    _check_columns(name, given)
    patches = given[list(PATCH_COLUMNS)].drop_duplicates(ignore_index=True)
    table = _in_order(name, given, patches)
    study = Study(
        target=_target(patches),
        windows=tuple(patches["window"].unique().tolist()),
        direction=direction,
        seed=seed,
        metric=metric,
        interval=Interval(interval),
    )
    examples = table[:: len(patches)].reset_index(drop=True)
    measured, has_empty_group = measure([table], examples, len(patches), direction, DONORS)
    known = {"included": True, "label_is_predicted": False, "has_empty_group": has_empty_group}
    return analyze(study, DONORS, examples.assign(**known), patches, measured)


def _only(name: str, table: pd.DataFrame, column: str) -> str:
    """The one value of a column that is the same in all rows."""
    if column not in table:
        raise VitPatchError(f"{name}: the table lacks {column}; give what vitpatch.patch returned")
    values = table[column].unique()
    if len(values) > 1:
        raise VitPatchError(f"{name}: {column} {first_few(sorted(values))}; give the rows of one")
    return values[0]


def _check_columns(name: str, table: pd.DataFrame) -> None:
    needed = {"example_id", "cluster", "label", *PATCH_COLUMNS, *measured_columns(DONORS), *BASE_COLUMNS}
    if missing := sorted(needed - set(table.columns)):
        raise VitPatchError(f"{name}: the table lacks {', '.join(missing)}; give what vitpatch.patch returned")


def _in_order(name: str, table: pd.DataFrame, patches: pd.DataFrame) -> pd.DataFrame:
    """The rows in order of images, then patches: one of each."""
    key = ["example_id", *PATCH_COLUMNS]
    if table.duplicated(key).any():
        row = table[table.duplicated(key)].iloc[0]
        raise VitPatchError(
            f"{name}: two rows of example_id {row['example_id']}, layer {row['layer']}; where tables of several "
            "calls are joined, give each its own ids"
        )
    images = table["example_id"].nunique()
    if len(table) != images * len(patches):
        raise VitPatchError(
            f"{name}: {len(table)} rows for {images} images and {len(patches)} patches; expected one of each"
        )
    numbered = table.merge(patches.assign(_patch=range(len(patches))), on=list(PATCH_COLUMNS))
    return numbered.sort_values(["example_id", "_patch"], ignore_index=True)


def _target(patches: pd.DataFrame) -> Target:
    """What was asked for, as far as the patches tell it."""
    site, heads = Site(patches["site"].iloc[0]), None
    if site.by_head:
        single = sorted(set(patches["head"]) - {ALL_HEADS})
        heads = tuple(single) or JOINT
    groups = dict.fromkeys(TokenGroup(tokens.partition(":")[0]) for tokens in patches["tokens"].unique())
    places = [token_position(tokens) for tokens in patches["tokens"].unique() if tokens.startswith(TokenGroup.GRID)]
    grid = tuple(max(at) + 1 for at in zip(*places, strict=True)) if places else None
    return Target(site, tokens=tuple(groups), heads=heads, grid=grid)
