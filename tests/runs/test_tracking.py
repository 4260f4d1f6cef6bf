"""The tracker: failures are marked, nothing leaks, and a broken witness does not stop a run."""

import json
import logging
import subprocess
import sys

import pandas as pd
import pytest

from vitpatch.errors import VitPatchError
from vitpatch.runs.tracking import NoTracker, Results, RunInfo, WandbTracker, history


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    monkeypatch.setattr(WandbTracker, "unreachable", False)


def info(folder):
    folder.mkdir()
    return RunInfo(folder, "group", {"window": 3})


def results():
    row = {"layer": 0, "effect": 0.1, "effect_low": 0.0, "effect_high": 0.2, "recovered": float("nan")}
    summary, scalars = pd.DataFrame([row]), {"total_effect": 0.5, "peak_layer": 0}
    return Results("effects", {"effects": summary}, {}, {}, history(summary, [""]), scalars, "Layer 3 restores most.")


def inspected(folder):
    (log,) = (folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_failed_job_is_marked_and_does_not_leak_into_the_next(tmp_path):
    import wandb

    with pytest.raises(ZeroDivisionError), WandbTracker("offline").run(info(tmp_path / "first")) as first:
        raise ZeroDivisionError
    assert wandb.run is None
    with WandbTracker("offline").run(info(tmp_path / "second")) as second:
        second.log(results())
    assert first.details["id"] != second.details["id"] and wandb.run is None
    assert str(tmp_path / "second" / "wandb") in second.sync_command
    assert "Layer 3 restores most." in str(inspected(tmp_path / "second"))
    codes = [
        next(row["exit"] for row in inspected(tmp_path / name) if row["type"] == "exit") for name in ("first", "second")
    ]
    assert [code.get("exit_code", 0) for code in codes] == [1, 0]


def test_an_id_of_the_environment_is_a_single_runs_and_said(tmp_path, monkeypatch, caplog):
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_RUN_ID", "left-over")
    with caplog.at_level(logging.WARNING), WandbTracker("offline").run(info(tmp_path / "a")) as run:
        assert run.details["id"] == "left-over" and "the id of WANDB_RUN_ID, left-over" in caplog.text
    wandb.teardown()


def test_auto_without_a_key_is_offline_and_the_environment_decides(tmp_path, monkeypatch):
    with WandbTracker("auto").run(info(tmp_path / "a")) as run:
        assert run.details["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with WandbTracker("auto").run(info(tmp_path / "b")) as run:
        assert run.sync_command is None
    assert not list((tmp_path / "b").glob("wandb/offline-run-*"))


def test_auto_with_a_key_and_no_network_goes_offline(tmp_path, monkeypatch, caplog):
    import wandb

    real = wandb.init

    def no_network(**arguments):
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("Run initialization has timed out after 20.0 sec")
        return real(**arguments)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", no_network)
    with caplog.at_level(logging.WARNING), WandbTracker("auto").run(info(tmp_path / "a")) as run:
        assert run.details["mode"] == "offline"
    assert "did not answer" in caplog.text
    with pytest.raises(VitPatchError, match=r"logger.mode=online: Weights & Biases did not start: .*timed out"):
        with WandbTracker("online").run(info(tmp_path / "b")):
            pass


def test_a_server_that_did_not_answer_is_not_asked_again(tmp_path, monkeypatch, caplog):
    import wandb

    asked, real = [], wandb.init

    def no_network(**arguments):
        asked.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("timed out")
        return real(**arguments)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", no_network)
    for name in "ab":
        with WandbTracker("auto").run(info(tmp_path / name)):
            pass
    assert asked == ["online", "offline", "offline"]


def test_a_key_of_the_wrong_form_is_a_warning_or_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with caplog.at_level(logging.WARNING), WandbTracker("auto").run(info(tmp_path / "a")) as run:
        assert run.details["mode"] == "offline"
    assert "Weights & Biases key" in caplog.text
    with pytest.raises(VitPatchError, match=r"logger.mode=online: "), WandbTracker("online").run(info(tmp_path / "b")):
        pass


def test_an_unknown_mode_in_the_environment_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "garbage")
    with pytest.raises(VitPatchError, match="WANDB_MODE=garbage"), WandbTracker("auto").run(info(tmp_path / "a")):
        pass


def test_a_tracker_that_does_not_start_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    import wandb

    def broken(**arguments):
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    with caplog.at_level(logging.WARNING), WandbTracker("offline").run(info(tmp_path / "a")) as run:
        run.log(results())
    assert run.details is None and "did not start (no service)" in caplog.text


def test_a_broken_tracker_is_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), WandbTracker("offline").run(info(tmp_path / "a")) as run:
        for _ in range(2):
            run.log(Results("effects", {}, {}, {}, history(pd.DataFrame(), [])))  # no column to log
    assert caplog.text.count("Weights & Biases failed") == 1 and "wandb sync" in caplog.text


def test_no_tracker_tracks_nothing(tmp_path):
    with NoTracker().run(info(tmp_path / "a")) as run:
        run.log(results())
    assert run.sync_command is None and list((tmp_path / "a").iterdir()) == []


def test_several_windows_heads_or_token_groups_have_keys_of_their_own():
    row = {"effect": 0.1, "effect_low": 0.0, "effect_high": 0.2, "recovered": 0.5}
    summary = pd.DataFrame([{"layer": layer, **row} for layer in (1, 0, 1, 0)])
    logged = dict(history(summary, ["w1", "w1", "w3", "w3"]))
    assert list(logged) == [0, 1]
    assert set(logged[0]) == {
        f"effect/{w}/{name}" for w in ("w1", "w3") for name in ("mean", "low", "high", "recovered")
    }
    assert set(dict(history(summary[:2], ["", ""]))[1]) == {
        f"effect/{name}" for name in ("mean", "low", "high", "recovered")
    }
    controls = summary.assign(effect_same_class=0.3, effect_other_class=-0.2)
    of_layer = dict(history(controls[:2], ["", ""]))[0]
    assert (of_layer["effect/same_class"], of_layer["effect/other_class"], of_layer["effect/mean"]) == (0.3, -0.2, 0.1)
    many = pd.DataFrame([{"layer": 0, **row}] * 99)
    assert not list(history(many, [f"each:{i}x0" for i in range(99)]))


def compared(folder):
    """What a comparison shows, its files made."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "profiles.png")
    (folder / "index.html").write_text("<title>Comparison</title>")
    (folder / "overview.csv").write_text("run,effect\na,0.5\n")
    files = {name: folder / name for name in ("index.html", "overview.csv", "profiles.png")}
    tables = {
        "table/overview": pd.DataFrame({"run": ["a"], "effect": [0.5]}),
        "table/rank_correlation": pd.DataFrame([[1.0, 0.5], [0.5, 1.0]], index=["a", "b"], columns=["a", "b"]),
        "table/not_subtracted": pd.DataFrame(columns=["a", "b", "reason"]),
        "table/settings": pd.DataFrame({"key": ["window", "metric"], "a": [3, "prob"], "b": [None, "log_odds"]}),
    }
    pictures = {"figure/profiles": [files["profiles.png"]]}
    return Results("comparison", tables, pictures, files, page=files["index.html"])


def test_a_comparison_is_a_run_of_its_own_with_tables_pictures_and_the_page(tmp_path):
    folder = tmp_path / "demo" / "comparison"
    folder.mkdir(parents=True)
    with WandbTracker("offline").run(RunInfo(folder, "demo", {"sweep": "demo"}, job_type="compare")) as run:
        run.log(compared(folder))
    assert str(folder / "wandb") in run.sync_command
    rows = inspected(folder)
    (begun,) = [row["run"] for row in rows if row["type"] == "run"]
    assert (begun["run_group"], begun["job_type"], begun["display_name"]) == ("demo", "compare", "comparison")
    (media,) = (folder / "wandb").glob("offline-run-*/files/media")
    shown = {path.relative_to(media).as_posix().split("_0_")[0]: path for path in media.rglob("*") if path.is_file()}
    tables = {f"table/table/{name}" for name in ("overview", "rank_correlation", "not_subtracted", "settings")}
    assert set(shown) == tables | {"images/figure/profiles", "html/page"}
    assert shown["html/page"].read_text() == "<title>Comparison</title>"
    correlation = json.loads(shown["table/table/rank_correlation"].read_text())
    assert correlation["columns"] == ["run", "a", "b"] and correlation["data"] == [["a", 1.0, 0.5], ["b", 0.5, 1.0]]
    assert json.loads(shown["table/table/settings"].read_text())["data"][0][:2] == ["window", 3]
    (kept,) = [row["artifact"] for row in rows if row["type"] == "artifact" and row["artifact"]["type"] == "comparison"]
    assert {file["path"] for file in kept["manifest"]["contents"]} == {"index.html", "overview.csv", "profiles.png"}


def test_a_page_that_is_too_big_is_in_the_artifact_only(tmp_path, monkeypatch):
    from vitpatch.runs import tracking

    monkeypatch.setattr(tracking, "MOST_HTML_BYTES", 3)
    folder = tmp_path / "comparison"
    with WandbTracker("offline").run(info(folder)) as run:
        run.log(compared(folder))
    assert not list(folder.rglob("media/html")) and list(folder.rglob("media/table"))
