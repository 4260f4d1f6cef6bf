"""``vitpatch-workspace PROJECT``: a view of a Weights & Biases project, its panels as runs are logged."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING, Any

from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "Patching by layer"
COLUMNS = ("options.model", "options.data", "options.corruption", "window", "metric", "direction")
SCALARS = ("total_effect", "peak_layer", "peak_effect", "prob_clean", "prob_corrupt")


def workspace(project: str, entity: str) -> Workspace:
    """The view: runs grouped by corruption and window; panels by layer, pictures, the runs' results, comparisons.

    Raises ``VitPatchError`` where ``wandb-workspaces`` is not installed.
    """
    ws, panels = _library()
    groups = [ws.Config("options.corruption"), ws.Config("window")]
    columns = ["run:displayName", *(f"config:{key}" for key in COLUMNS), *(f"summary:{key}" for key in SCALARS)]
    sections = _panels_by_section(panels).items()
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[ws.Section(name=name, panels=content, is_open=True) for name, content in sections],
        settings=ws.WorkspaceSettings(x_axis="layer"),
        runset_settings=ws.RunsetSettings(groupby=groups, pinned_columns=columns),
    )


def _library() -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own, of pydantic
            import wandb_workspaces.reports.v2 as panels
            import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise VitPatchError("wandb-workspaces is not installed: pip install 'vitpatch[workspace]'") from error
    return ws, panels


def _panels_by_section(panels: Any) -> dict[str, list[Any]]:
    """By the name of a section its panels, of the module ``panels``."""

    def line(title: str, **metrics: Any) -> Any:
        return panels.LinePlot(title=title, x="layer", title_x="layer", **metrics)

    def table(name: str, width: int, height: int) -> Any:
        return panels.WeavePanelSummaryTable(table_name=name, layout=panels.Layout(w=width, h=height))

    return {
        "By layer": [
            line("Effect, mean and 95 % interval", y=["effect/mean", "effect/low", "effect/high"]),
            line("Recovered part of the total effect", y=["effect/recovered"]),
            line("Effect beside controls", y=["effect/mean", "effect/same_class", "effect/other_class"]),
        ],
        "By layer, several windows, heads or tokens": [  # whose keys have one name more: effect/w3/mean
            line("Effect", metric_regex="effect/[^/]+/mean"),
            line("Recovered part of the total effect", metric_regex="effect/[^/]+/recovered"),
        ],
        "Pictures": [
            panels.MediaBrowser(title=key.replace("_", " "), media_keys=[key])
            for key in ("heatmap", "layer_profile", "examples")
        ],
        "Runs": [
            *(panels.BarPlot(title=key.replace("_", " "), metrics=[key]) for key in SCALARS),
            table("effects", 24, 8),
            panels.RunComparer(diff_only=True, layout=panels.Layout(w=24, h=8)),
        ],
        "Comparisons of sweeps": [
            *(table(f"table/{name}", 24, 10) for name in ("overview", "differences", "not_subtracted")),
            panels.MediaBrowser(title="page", media_keys=["page"], layout=panels.Layout(w=24, h=20)),
        ],
    }


def save_view(project: str, entity: str | None) -> str:
    """Writes the view to the server and returns its address.

    Raises ``VitPatchError`` where the server does not take it.
    """
    import wandb

    try:
        view = workspace(project, entity or wandb.Api().default_entity)
        view.save()  # a request has 19 s
    except VitPatchError:
        raise
    except Exception as error:  # of many classes: no answer, no such entity, no right to write
        raise VitPatchError(f"the view could not be written: {one_line(error, 200)}; --dry-run prints it") from error
    return view.url


def _has_key() -> bool:
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))
        return bool(wandb.login(prompt=False, verify=False))
    except Exception as error:  # of several classes: a key of the wrong form, an unreadable netrc
        raise VitPatchError(f"Weights & Biases key: {one_line(error, 200)}; or use --dry-run") from error


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit code 1, with one line, where the view cannot be made or written."""
    parser = argparse.ArgumentParser(prog="vitpatch-workspace", description=__doc__)
    parser.add_argument("project", help="the project's name, vitpatch where logger.project is not set")
    parser.add_argument("--entity", help="whose project it is; without: the key's default entity")
    parser.add_argument("--dry-run", action="store_true", help="print the view's JSON, and write nothing")
    options = parser.parse_args(arguments)
    try:
        if options.dry_run or not _has_key():
            view = workspace(options.project, options.entity or "ENTITY")
            print(view._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2))  # no public way to it
            why = "dry run" if options.dry_run else "no Weights & Biases key"
            print(f"{why}: nothing is written; this is the view that would be", file=sys.stderr)
            return 0
        print(save_view(options.project, options.entity))
    except VitPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
