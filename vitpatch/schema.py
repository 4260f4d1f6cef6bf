"""The columns of a run's parquet files."""

from __future__ import annotations

import pyarrow as pa

from vitpatch.types import BaseRun, Metric

LOGIT_DIFF_OTHER_RIVAL = "logit_diff_other_rival"
"""``logit_diff`` against the runner-up of the base run that ``rival`` does not name."""
STORED_METRICS = (*Metric, LOGIT_DIFF_OTHER_RIVAL)
"""Of every run, so that it can be read again in any metric."""
CONTROL_METRICS = (*STORED_METRICS, "effect")
"""What is stored of a patch that is no row of its own: with another image as donor, or of all layers at once."""
_METRICS_OF_BASE_RUNS = (Metric.PROB, Metric.LOG_ODDS, Metric.LOGIT, Metric.LOGIT_DIFF, LOGIT_DIFF_OTHER_RIVAL)


EXAMPLES_SCHEMA = pa.schema(
    [("example_id", pa.int64()), ("label", pa.int64()), ("label_name", pa.string())]
    + [("rival", pa.int64()), ("other_rival", pa.int64())]
    + [("label_is_predicted", pa.bool_()), ("included", pa.bool_()), ("cluster", pa.int64())]
    + [(f"{metric}_{run}", pa.float32()) for run in BaseRun for metric in _METRICS_OF_BASE_RUNS]
    + [(f"pred_{run}", pa.int64()) for run in BaseRun]
    + [("kl_corrupt", pa.float32())]
)
"""One row an image, in order of ``example_id``; with partners for donors and with controls also columns for these.

``label_is_predicted``: the image has no label, and the clean run's prediction stands in for it.
"""


PATCH_COLUMNS = ("site", "layer", "head", "tokens", "window", "first_layer", "last_layer", "n_layers")
"""The columns that identify a patch in ``effects.parquet`` and ``summary.csv``."""


EFFECTS_SCHEMA = pa.schema(
    [("example_id", pa.int64())]
    + [(name, pa.string() if name in ("site", "tokens") else pa.int64()) for name in PATCH_COLUMNS]
    + [(str(metric), pa.float32()) for metric in STORED_METRICS]
    + [("pred", pa.int64()), ("effect", pa.float32())]
    + [("delta_norm", pa.float32()), ("direct_log_odds", pa.float32()), ("n_tokens", pa.int64())]
)
"""One row an image and patch, in order of ``example_id``, then patch.

``delta_norm``: norm of donor − recipient over norm of the recipient at the site, over the patched tokens and layers.
``direct_log_odds``: change of the log odds where the replacement is carried straight to the readout, the scale of the
last layer norm frozen. ``n_tokens``: how many tokens of this image are patched. With controls also columns for these.
"""


LEAVE_OUTS_SCHEMA = pa.schema(
    [("example_id", pa.int64())]
    + [(name, pa.string() if name in ("site", "tokens") else pa.int64()) for name in (*PATCH_COLUMNS, "without")]
    + [(str(metric), pa.float32()) for metric in CONTROL_METRICS]
)
"""One row an image and window of ``effects.parquet`` without one of its layers, ``without``; in their order."""


PAGES_SCHEMA = pa.schema(
    [("page", pa.string()), ("chosen", pa.string()), ("example_id", pa.int64()), ("name", pa.string())]
    + [(f"{run}_png", pa.binary()) for run in BaseRun]
    + [(f"predicted_{run}", pa.string()) for run in BaseRun]
    + [(f"metric_{run}", pa.float64()) for run in BaseRun]
    + [("patched", pa.list_(pa.float64()))]
)
"""One row an image of an example page, in their order; ``chosen`` says in words how the page's images were picked.

``*_png`` are the images as the model was given them; ``metric_*`` and ``patched`` the headline metric of the base runs
and, a value a patch, of the patched ones.
"""


OBJECT_OVERLAP = "random_object_overlap"
"""Column of ``examples.parquet``: the share of the object's patches that ``random_object`` has too; NaN where there is
no object."""


OF_CORRUPTION = "partner_corruption"
"""Column of ``examples.parquet``: ``example_id`` of the image that a corruption with partners takes."""
