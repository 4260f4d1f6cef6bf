"""The workspace view: what the library would send, without a key or a network; and what goes wrong in a line."""

import json
import sys

import pytest

from vitpatch.cli.workspace import main

pytest.importorskip("wandb_workspaces")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()  # the settings, with the server's address, are read once a process
    yield
    wandb.teardown()


def view(capsys, *arguments) -> dict:
    assert main([*arguments]) == 0
    return json.loads(capsys.readouterr().out)


def panels(spec: dict, section: str) -> list[dict]:
    (found,) = [s for s in spec["spec"]["section"]["panelBankConfig"]["sections"] if s["name"] == section]
    return found["panels"]


def test_without_a_key_it_prints_the_view_by_layer_grouped_by_corruption_and_window(capsys):
    spec = view(capsys, "demo")
    assert (spec["project"], spec["displayName"]) == ("demo", "Patching by layer")
    lines = [panel["config"] for panel in panels(spec, "By layer")]
    assert {line["xAxis"] for line in lines} == {"layer"}
    assert lines[0]["metrics"] == ["effect/mean", "effect/low", "effect/high"]
    (runs,) = spec["spec"]["section"]["runSets"]
    keys = [(key["section"], key["name"]) for key in runs["grouping"]]
    assert keys == [("config", "options.value.corruption"), ("config", "window.value")]
    several = [panel["config"] for panel in panels(spec, "By layer, several windows, heads or tokens")]
    assert [line["metricRegex"] for line in several] == ["effect/[^/]+/mean", "effect/[^/]+/recovered"]


def test_pictures_runs_and_comparisons_have_their_panels(capsys):
    spec = view(capsys, "demo", "--entity", "somebody", "--dry-run")
    assert spec["entity"] == "somebody"
    media = [panel["config"]["mediaKeys"] for panel in panels(spec, "Pictures")]
    assert media == [["heatmap"], ["layer_profile"], ["examples"]]
    bars = [panel["config"]["metrics"] for panel in panels(spec, "Runs") if panel["viewType"] == "Bar Chart"]
    assert ["total_effect"] in bars and ["peak_layer"] in bars
    assert all(word in json.dumps(panels(spec, "Comparisons of sweeps")) for word in ("table/overview", '"page"'))


def test_the_keys_of_the_view_are_those_that_runs_log():
    import pandas as pd

    from vitpatch.cli import workspace
    from vitpatch.runs.tracking import history

    row = {"layer": 0, "effect": 0.1, "effect_low": 0.0, "effect_high": 0.2, "recovered": 0.5}
    summary = pd.DataFrame([row | {"effect_same_class": 0.3, "effect_other_class": -0.2}])
    logged = set(dict(history(summary, [""]))[0])
    by_layer, *_ = workspace.workspace("demo", "somebody").sections
    asked = {key for panel in by_layer.panels for key in panel._to_model().config.metrics}
    assert asked == logged


def test_a_server_that_is_not_there_is_one_line(capsys, monkeypatch):
    import wandb_workspaces.workspaces as ws

    def unreachable(self):
        raise ConnectionError("no route\nto host")

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(ws.Workspace, "save", unreachable)
    assert main(["demo", "--entity", "somebody"]) == 1
    said = capsys.readouterr()
    assert said.err == "error: the view could not be written: no route to host; --dry-run prints it\n" and not said.out


@pytest.mark.long
def test_a_closed_port_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["demo", "--entity", "somebody"]) == 1
    assert capsys.readouterr().err.startswith("error: the view could not be written: ")


def test_a_key_of_the_wrong_form_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert main(["demo"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: Weights & Biases key: ") and said.count("\n") == 1 and "short" not in said


def test_without_the_library_it_says_what_to_install(capsys, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith("wandb_workspaces"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["demo", "--dry-run"]) == 1
    assert capsys.readouterr().err.strip().endswith("pip install 'vitpatch[workspace]'")
