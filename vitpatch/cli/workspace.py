"""``python -m vitpatch.cli.workspace PROJECT``: a view of a Weights & Biases project, its panels as runs are logged."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING, Any

from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

NAME = "Patching by layer"
COLUMNS = ("options.model", "options.data", "options.corruption", "window", "metric", "direction")
SCALARS = ("total_effect", "peak_layer", "peak_effect", "prob_clean", "prob_corrupt")


def workspace(project: str, entity: str) -> Workspace:
    """The view: runs grouped by corruption and window; panels by layer, pictures, the runs' results, comparisons.

    Raises ``VitPatchError`` where ``wandb-workspaces`` is not installed.
    """
    ws, _ = _library()
    groups = [ws.Config("options.corruption"), ws.Config("window")]
    columns = ["run:displayName", *(f"config:{key}" for key in COLUMNS), *(f"summary:{key}" for key in SCALARS)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[_by_layer(), _several_series(), _pictures(), _runs(), _comparisons()],
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
        raise VitPatchError("wandb-workspaces is not installed: pip install -e '.[workspace]'") from error
    return ws, panels


def _by_layer() -> Section:
    ws, panels = _library()
    effect = ["effect/mean", "effect/low", "effect/high"]
    controls = ["effect/mean", "effect/same_class", "effect/other_class"]
    lines = [
        panels.LinePlot(title="Effect, mean and 95 % interval", x="layer", y=effect, title_x="layer"),
        panels.LinePlot(title="Recovered part of the total effect", x="layer", y=["effect/recovered"], title_x="layer"),
        panels.LinePlot(title="Effect beside controls", x="layer", y=controls, title_x="layer"),
    ]
    return ws.Section(name="By layer", panels=lines, is_open=True)


def _several_series() -> Section:
    """Of runs with several windows, heads or token groups, whose keys have one name more: ``effect/w3/mean``."""
    ws, panels = _library()
    lines = [
        panels.LinePlot(title=title, x="layer", metric_regex=f"effect/[^/]+/{key}", title_x="layer")
        for title, key in (("Effect", "mean"), ("Recovered part of the total effect", "recovered"))
    ]
    return ws.Section(name="By layer, several windows, heads or tokens", panels=lines, is_open=True)


def _pictures() -> Section:
    ws, panels = _library()
    keys = ("heatmap", "layer_profile", "examples")
    browsers = [panels.MediaBrowser(title=key.replace("_", " "), media_keys=[key]) for key in keys]
    return ws.Section(name="Pictures", panels=browsers, is_open=True)


def _runs() -> Section:
    ws, panels = _library()
    bars = [panels.BarPlot(title=key.replace("_", " "), metrics=[key]) for key in SCALARS]
    wide = panels.Layout(w=24, h=8)
    rest = [
        panels.WeavePanelSummaryTable(table_name="effects", layout=wide),
        panels.RunComparer(diff_only=True, layout=wide),
    ]
    return ws.Section(name="Runs", panels=[*bars, *rest], is_open=True)


def _comparisons() -> Section:
    ws, panels = _library()
    wide = panels.Layout(w=24, h=10)
    names = ("overview", "differences", "not_subtracted")
    tables = [panels.WeavePanelSummaryTable(table_name=f"table/{name}", layout=wide) for name in names]
    page = panels.MediaBrowser(title="page", media_keys=["page"], layout=panels.Layout(w=24, h=20))
    return ws.Section(name="Comparisons of sweeps", panels=[*tables, page], is_open=True)


def saved(project: str, entity: str | None) -> str:
    """Writes the view to the server; its address. Raises ``VitPatchError`` where the server does not take it."""
    import wandb

    try:
        view = workspace(project, entity or wandb.Api().default_entity)
        view.save()  # a request has 19 s
    except VitPatchError:
        raise
    except Exception as error:  # of many classes: no answer, no such entity, no right to write
        reason = one_line(error, 200)
        raise VitPatchError(f"the view could not be written: {reason}; --dry-run prints it") from error
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
    parser = argparse.ArgumentParser(prog="python -m vitpatch.cli.workspace", description=__doc__)
    parser.add_argument("project", help="the project's name, vitpatch where logger.project is not set")
    parser.add_argument("--entity", help="whose project it is; without: the key's default entity")
    parser.add_argument("--dry-run", action="store_true", help="print the view's JSON, and write nothing")
    asked = parser.parse_args(arguments)
    try:
        if asked.dry_run or not _has_key():
            view = workspace(asked.project, asked.entity or "ENTITY")
            print(view._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2))  # no public way to it
            why = "dry run" if asked.dry_run else "no Weights & Biases key"
            print(f"{why}: nothing is written; this is the view that would be", file=sys.stderr)
            return 0
        print(saved(asked.project, asked.entity))
    except VitPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
