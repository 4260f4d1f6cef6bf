"""The table of a sweep's runs: states from folders, whoever made them; how far a sweep is."""

import errno
import json
import os
import signal
import threading

import pandas as pd
import pytest

from vitpatch.cli import status as states
from vitpatch.cli.commands import run_command
from vitpatch.cli.sweep import Sweep
from vitpatch.errors import SIGNALS
from vitpatch.runs.folder import RunFolder

SINCE = 1000.0


def job(root, name, at=SINCE + 1):
    """A run's folder as Hydra makes it at a time."""
    file = root / name / ".hydra" / "overrides.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("[]")
    os.utime(file, (at, at))
    return RunFolder(root / name)


def finish(folder, at=SINCE + 2, **manifest):
    folder.manifest.write_text(json.dumps({"seconds": 3.21, "config": {"metric": "prob"}} | manifest))
    os.utime(folder.manifest, (at, at))


@pytest.fixture
def sweep(tmp_path):
    peaked = job(tmp_path, "a")
    columns = {"layer": [0, 1, 1], "head": [-1] * 3, "tokens": ["all"] * 3, "window": [3, 1, 3]}
    columns |= {"effect": [0.1, 0.9, 0.2], "effect_low": [0.0, 0.8, 0.1], "effect_high": [0.2, 1.0, 0.3]}
    pd.DataFrame(columns).to_csv(peaked.summary, index=False)
    finish(peaked, peak={"layer": 1, "head": -1, "tokens": "all", "window": 3})
    finish(job(tmp_path, "b"), at=SINCE - 5, peak={"layer": None})
    job(tmp_path, "c").mark_failed("failed", "window 9: the model has 4 layers; " + "x" * 60)
    os.utime(tmp_path / "c" / "failed.json", (SINCE + 3, SINCE + 3))
    job(tmp_path, "d")
    job(tmp_path, "e", at=SINCE - 1)  # of an earlier start
    return tmp_path


def test_states_and_the_effect_at_the_peak(sweep):
    found = {state.run: state for state in states.read_statuses(sweep, SINCE)}
    assert {run: state.status for run, state in found.items()} == {
        "a": "finished", "b": "finished before", "c": "failed", "d": "unfinished",
    }  # fmt: skip
    assert [run for run, state in found.items() if not state.is_done] == ["c", "d"]
    a = found["a"]
    assert (a.seconds, a.peak_layer, a.effect, a.effect_low, a.effect_high) == (3.21, 1, 0.2, 0.1, 0.3)
    assert found["b"].peak_layer is None


def test_a_run_that_another_process_has_is_running(sweep):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with RunFolder(sweep / "d").locked():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert entered.wait(20)
        state = next(s for s in states.read_statuses(sweep, SINCE) if s.run == "d")
        assert state.status == "running" and f"process {os.getpid()} on" in state.reason and not state.is_done
    finally:
        leave.set()
        thread.join()
    assert next(s for s in states.read_statuses(sweep, SINCE) if s.run == "d").status == "unfinished"


def test_the_table_is_aligned_and_short(sweep):
    found = states.read_statuses(sweep, SINCE)
    head, a, b, c, d = states.format_table(found)
    assert head.split() == ["run", "state", "seconds", "peak", "layer", "effect", "(prob)", "reason"]
    assert a.split()[:5] == ["a", "finished", "3.2", "1", "+0.200"] and "[+0.100, +0.300]" in a
    assert b.startswith("b    finished before") and c.endswith("…") and len(c) < 140
    assert len({line.index("finished" if "finished" in line else "failed") for line in (a, b, c)}) == 1
    assert d.endswith("it left neither manifest.json nor failed.json")
    assert states.count_finished(found, sweep) == f"2 of 4 runs finished in {sweep}"
    first, second = states.list_unfinished(found)
    assert first == "failed: c: window 9: the model has 4 layers; " + "x" * 60 and second.startswith("unfinished: d: ")
    states.write_states(found, sweep)
    table = pd.read_csv(sweep / "states.csv")
    assert list(table.columns[:3]) == ["run", "state", "reason"]
    assert list(table["run"]) == ["a", "b", "c", "d"] and table["effect"].dropna().tolist() == [0.2]


def test_files_that_are_broken_are_a_reason(sweep):
    (sweep / "a" / "manifest.json").write_text("{")
    (sweep / "b" / "manifest.json").write_text('{"config": 3}')
    (sweep / "c" / "failed.json").write_text("[]")
    found = states.read_statuses(sweep, SINCE)
    assert [state.status for state in found] == ["failed", "failed", "failed", "unfinished"]
    assert all(state.reason.startswith("its files cannot be read (") for state in found[:3])


def test_runs_are_sorted_by_their_numbers(tmp_path):
    names = ["std=0.05,window=3", "std=0.05,window=10", "std=0.1,window=1", "std=noise", "x"]
    for name in reversed(names):
        job(tmp_path, name)
    assert [state.run for state in states.read_statuses(tmp_path, SINCE)] == names


def test_runs_that_never_began_are_named(sweep):
    found = states.read_statuses(sweep, SINCE)
    found += states.list_not_started(["a", "x", "x", "d", "y"], found)
    assert [state.run for state in found] == [*"abcdxy"] and states.list_unfinished(found)[-1] == "not started: x and y"


@pytest.fixture
def told(sweep, monkeypatch, caplog):
    """A sweep that this process launched."""
    monkeypatch.setattr(Sweep, "launched", Sweep(sweep, since=SINCE))
    caplog.set_level("INFO")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield caplog
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (SystemExit(130), 130), (SystemExit(1), 1)])
def test_a_sweep_that_does_not_reach_its_end_is_told_of(told, sweep, raised, code):
    def main():
        raise raised

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == code and Sweep.launched is None
    assert f"2 of 4 runs finished in {sweep}" in told.messages and (sweep / "states.csv").exists()
    assert ("the same command goes on" in told.text) == isinstance(raised, KeyboardInterrupt)
    if raised.args == (130,):  # there is nothing left to stop
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in SIGNALS)


def test_a_sweep_of_which_nothing_began_has_no_table(told, sweep):
    for file in sweep.glob("*/.hydra/overrides.yaml"):
        file.unlink()
    run_command(lambda: None)
    assert not told.messages and not (sweep / "states.csv").exists()


def test_our_own_mistake_at_the_end_is_no_success(told, sweep, monkeypatch):
    monkeypatch.setattr(states, "format_table", lambda found: found.nothing)
    with pytest.raises(SystemExit) as ended:
        Sweep.launched.end(None)
    assert ended.value.code == 1 and "a bug in vitpatch; please report it" in told.text


def test_a_full_disk_does_not_hide_the_end(told, sweep, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(sweep / "states.csv"))

    monkeypatch.setattr(states, "write_states", full)
    run_command(lambda: None)
    assert f"No space left on device: {sweep / 'states.csv'}" in told.messages
    assert f"2 of 4 runs finished in {sweep}" in told.messages


def test_the_time_left_is_by_the_runs_that_were_made(sweep):
    line = states.describe_progress(sweep, SINCE, now=SINCE + 60, total=5)
    assert line == "sweep: 3 of 5 runs are through, about 2 min left"  # one made in 60 s, two to go
    assert states.describe_progress(sweep, SINCE, now=SINCE + 60, total=3) is None
    (sweep / "a" / "manifest.json").unlink()
    assert states.describe_progress(sweep, SINCE, now=SINCE + 60, total=5) == "sweep: 2 of 5 runs are through"


def test_a_row_is_no_other_runs(tmp_path):
    names = [f"corruption=gray,{'x' * 60}{n}{'y' * 60},window=3" for n in range(3)]
    rows = states.format_table([states.RunStatus(name, "finished") for name in names])[1:]
    assert len({row.split()[0] for row in rows}) == 3
    assert all("…" in row and "  finished" in row for row in rows)
    for name in ("a/run", "b/run"):
        job(tmp_path, name)
    assert [state.run for state in states.read_statuses(tmp_path, SINCE)] == ["a/run", "b/run"]
