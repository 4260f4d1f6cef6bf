"""The tables of a run in another view: what effects are on, whose rival ``logit_diff`` is against, who is included.

A run stores all metrics of all its patches, so that its tables in any view follow from those that it wrote in one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vitpatch.schema import LOGIT_DIFF_OTHER_RIVAL
from vitpatch.stats.result import base_metric, is_included
from vitpatch.study import Study
from vitpatch.types import BaseRun, Metric


def depends_on_view(column: str) -> bool:
    """Whether a column of a run's tables is another one in another view."""
    return column == "included" or column.startswith("effect") or other_rivals_column(column) != column


def other_rivals_column(column: str) -> str:
    """The column that has the same of the other base run's rival; ``column`` itself where no rival plays a part."""
    for one, other in ((LOGIT_DIFF_OTHER_RIVAL, "logit_diff"), ("other_rival", "rival")):
        for start, instead in ((one, other), (other, one)):
            if column.startswith(start):
                return column.replace(start, instead, 1)
    return column


def stored_columns(columns: Sequence[str], study: Study, written: BaseRun) -> list[str]:
    """The columns of a file that those of a view are made of; ``written`` is the file's ``rival``."""
    made_of = dict.fromkeys(column.replace("effect", study.metric, 1) for column in columns)
    return [column if study.rival is written else other_rivals_column(column) for column in made_of]


def examples_in_view(examples: pd.DataFrame, study: Study, written: BaseRun) -> pd.DataFrame:
    """The rows of ``examples.parquet`` as the study reads them; in the file ``rival`` is ``written``."""
    view = _with_rivals(examples, study, written)
    effects = _effects(view, _recipient(view, study), study.metric, list(view))
    included = is_included(study.include, {name: view[name].to_numpy() for name in view}, study.metric)
    if study.donor.partner is not None:
        included &= view[f"partner_{study.donor}"].to_numpy() >= 0
    return view.assign(**effects, included=included)[list(examples)]


def effects_in_view(
    effects: pd.DataFrame, examples: pd.DataFrame, study: Study, written: BaseRun, wanted: Sequence[str]
) -> pd.DataFrame:
    """The ``wanted`` columns of ``effects.parquet`` or ``leave_outs.parquet`` as the study reads them.

    ``effects`` has the ``stored_columns`` of these: as many rows for each of the ``examples``, which are in the view.
    """
    view = _with_rivals(effects, study, written)
    recipient = np.repeat(_recipient(examples, study), len(effects) // len(examples))
    return view.assign(**_effects(view, recipient, study.metric, wanted))[list(wanted)]


def _with_rivals(table: pd.DataFrame, study: Study, written: BaseRun) -> pd.DataFrame:
    return table if study.rival is written else table.rename(columns=other_rivals_column)


def _recipient(examples: pd.DataFrame, study: Study) -> NDArray[np.float32]:
    """The headline metric of the base run that is patched, (images,), as it is stored."""
    return base_metric(examples, study.direction.recipient, study.metric).astype(np.float32)


def _effects(
    table: pd.DataFrame, recipient: NDArray, metric: Metric, columns: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Of ``columns`` those of effects: the metric of the patched run, of the same donor, minus the recipient's."""
    names = [name for name in columns if name.startswith("effect")]
    return {name: table[name.replace("effect", metric, 1)].to_numpy() - recipient for name in names}
