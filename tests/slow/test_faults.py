"""Faults that are really made: processes killed, started twice, interrupted, disks that are full."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import CLASSES, pictures, write_parquet
from deaths import DIED, KILL, Starts
from omegaconf import OmegaConf
from run_files import results

from vitpatch.runs.folder import Shards

IMAGES, SOME = 60, 20


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    process = Starts(tmp_path_factory.mktemp("starts") / "output")
    yield process
    process.close()


@pytest.fixture(scope="module")
def many(made, tmp_path_factory):
    """Overrides of a run of 30 batches, but for its folder."""
    path = tmp_path_factory.mktemp("many") / "images.parquet"
    write_parquet(path, pictures(IMAGES), [i % CLASSES for i in range(IMAGES)])
    where = ["model=hf", f"model.path={made / 'vit'}", "data=parquet", f"data.path={path}"]
    return [*where, "trainer=cpu", "logger=none", "batch_size=2"]


@pytest.fixture(scope="module")
def some(many):
    """The same with ten batches."""
    return [*many, f"data.limit={SOME}"]


@pytest.fixture(scope="module")
def few(many):
    """The same with three batches."""
    return [*many, "data.limit=6"]


@pytest.fixture(scope="module")
def whole_of(starts, tmp_path_factory):
    """The files of an undisturbed run, and its acts on the disk."""
    there = {}

    def make(overrides):
        if (key := tuple(overrides)) not in there:
            folder = tmp_path_factory.mktemp("whole") / "run"
            code, printed, _, acts = starts(*overrides, f"hydra.run.dir={folder}")
            assert code == 0, printed
            there[key] = results(folder), acts
        return there[key]

    return make


def run_id(folder):
    return json.loads((folder / "manifest.json").read_text())["run_id"]


def check_a_death(starts, overrides, whole, folder, at):
    """Dies before the act ``at``; what then counts as finished is whole, and the next start ends in the same bytes."""
    code, printed, *_ = starts(*overrides, f"hydra.run.dir={folder}", die_at=at)
    assert code == DIED, f"act {at}: {printed}"
    if (folder / "manifest.json").exists():
        assert {name: (folder / name).read_bytes() for name in whole} == whole, f"act {at}"
    code, printed, *_ = starts(*overrides, f"hydra.run.dir={folder}")
    assert code == 0 and "damaged" not in printed, f"act {at}: {printed}"
    assert results(folder) == whole, f"act {at}"
    assert not (folder / "failed.json").exists() and run_id(folder)


@pytest.mark.parametrize("part", [0.6, *(pytest.param(part, marks=pytest.mark.long) for part in (0.4, 0.97))])
def test_a_death_between_two_acts_on_the_disk(starts, few, whole_of, tmp_path, part):
    whole, acts = whole_of(few)
    check_a_death(starts, few, whole, tmp_path / "run", int(acts * part))


@pytest.mark.long
def test_a_death_before_any_act_on_the_disk(starts, few, whole_of, tmp_path):
    whole, acts = whole_of(few)
    assert acts > 60
    for at in range(1, acts + 1):
        check_a_death(starts, few, whole, tmp_path / f"run{at}", at)


@pytest.mark.long
def test_a_death_before_any_act_while_a_finished_run_is_replaced(starts, few, whole_of, tmp_path):
    """Another run's files are never taken for this one's."""
    first, _ = whole_of([*few, "seed=1", "metric=log_odds"])
    again = [*few, "overwrite=true"]
    whole, acts = whole_of(few)
    for at in range(1, acts + 20, 2):
        folder = tmp_path / f"run{at}"
        assert starts(*few, "seed=1", "metric=log_odds", f"hydra.run.dir={folder}")[0] == 0
        code, printed, *_ = starts(*again, f"hydra.run.dir={folder}", die_at=at)
        assert code in (DIED, 0), printed
        if (folder / "manifest.json").exists():
            kept = {name: (folder / name).read_bytes() for name in whole}
            assert kept in (first, whole) and (kept == first) != (run_id(folder) == run_id_of(few, starts, tmp_path))
        code, printed, *_ = starts(*again, f"hydra.run.dir={folder}")
        assert code == 0 and results(folder) == whole, f"act {at}: {printed}"
        shutil.rmtree(folder)


def run_id_of(overrides, starts, tmp_path):
    folder = tmp_path / "same"
    assert starts(*overrides, f"hydra.run.dir={folder}")[0] == 0  # made once, then finished before
    return run_id(folder)


def kill(starts, overrides, whole, folder, kills, seed):
    """SIGKILL at ``kills`` random moments; how many of these were between the first batch and the last.

    A start that ends before its moment is looked at, and another run begun.
    """
    moments, between, number = random.Random(seed), 0, 0
    _, _, seconds, _ = starts(*overrides, f"hydra.run.dir={folder}-timed", slow=0.05)
    killed = []
    while len(killed) < kills:
        after = moments.uniform(0.3, 1) * seconds
        here = folder.with_name(f"{folder.name}-{number}")
        before = len(Shards(here / "shards").records())
        code, printed, *_ = starts(*overrides, f"hydra.run.dir={here}", kill_after=after, slow=0.05)
        where = f"seed {seed}, after {[*killed, after]} s: {printed}"
        if code == -signal.SIGKILL:
            killed.append(after)
            between += before < len(Shards(here / "shards").records()) < IMAGES // 2
            continue
        assert code == 0 and results(here) == whole, where
        number += 1
    code, printed, *_ = starts(*overrides, f"hydra.run.dir={here}")
    assert code == 0 and results(here) == whole, where
    return between


@pytest.mark.long
def test_killed_twice(starts, many, whole_of, tmp_path):
    kill(starts, many, whole_of(many)[0], tmp_path / "run", 2, seed=0)


@pytest.mark.long
def test_killed_twenty_times_at_random_moments(starts, many, whole_of, tmp_path):
    seed = int(time.time())
    between = kill(starts, many, whole_of(many)[0], tmp_path / "run", 20, seed)
    assert between >= 3, f"seed {seed}: {between} kills between the first batch and the last"


def said(folder):
    """State and reason of ``failed.json``."""
    failed = json.loads((folder / "failed.json").read_text())
    return failed["state"], failed["reason"]


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGINT, 0), *(pytest.param(of, 2, marks=pytest.mark.long) for of in (signal.SIGINT, signal.SIGTERM))],
)
def test_one_signal_keeps_the_batch(starts, some, whole_of, tmp_path, number, workers):
    """Sent to the whole session, as a terminal and a cluster do."""
    folder = tmp_path / "run"
    here = [*some, f"data.num_workers={workers}", f"hydra.run.dir={folder}"]
    code, printed, *_ = starts(*here, signals=[("shards/batch-00000003.json", number)], slow=0.2)
    assert code == 130 and "stopping after this batch; CTRL-C again stops at once" in printed, printed
    assert "Traceback" not in printed and "a bug in" not in printed
    state, reason = said(folder)
    done = len(Shards(folder / "shards").done())
    assert state == "interrupted" and 4 <= done < SOME // 2, printed
    if "batches are done" in reason:
        assert reason == f"{done} of {SOME // 2} batches are done"
    assert printed.splitlines()[-1] == f"interrupted: {folder}: {reason}; the same command goes on with it"
    code, printed, *_ = starts(*here)
    assert code == 0 and f"goes on: {2 * done} of {SOME} images were done before" in printed, printed
    assert results(folder) == whole_of(some)[0] and not (folder / "failed.json").exists()


def test_two_signals_stop_at_once(starts, some, whole_of, tmp_path):
    folder = tmp_path / "run"
    twice = [("shards/batch-00000003.json", signal.SIGINT), ("stopping after this batch", signal.SIGINT)]
    code, printed, *_ = starts(*some, f"hydra.run.dir={folder}", signals=twice, slow=1.0)
    assert code == 130 and said(folder) == ("interrupted", "stopped from outside before it was done"), printed
    assert len(Shards(folder / "shards").done()) == 4 and "Traceback" not in printed  # not the one that was in work
    code, printed, *_ = starts(*some, f"hydra.run.dir={folder}")
    assert code == 0 and results(folder) == whole_of(some)[0], printed


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
@pytest.mark.parametrize(("when", "done"), [(".hydra/holder.json", 0), ("examples.parquet", SOME // 2)])
def test_a_signal_while_it_loads_or_counts_up(starts, some, whole_of, tmp_path, number, when, done):
    folder = tmp_path / "run"
    code, printed, *_ = starts(*some, f"hydra.run.dir={folder}", signals=[(when, number)])
    assert code == 130, printed
    before = "stopped from outside before it began" in printed and not done  # in this case there may be no word of it
    assert before or said(folder) == ("interrupted", "stopped from outside before it was done"), printed
    assert len(Shards(folder / "shards").done()) == done and "Traceback" not in printed
    assert not (folder / "manifest.json").exists()
    code, printed, *_ = starts(*some, f"hydra.run.dir={folder}")
    assert code == 0 and results(folder) == whole_of(some)[0], printed


def files_of(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.*") if path.is_file()}


def composed(folder):
    return OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"))


def test_two_starts_at_once(starts, cli, some, whole_of, tmp_path):
    """The second, in this process, says who is there and touches nothing; the first is not disturbed."""
    folder = tmp_path / "run"
    here = [*some, f"hydra.run.dir={folder}"]
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(starts, *here, until=str(tmp_path / "go on"))
            wait_for(folder / "shards" / "batch-00000002.json", first)
            code, printed = cli(*here, "seed=7")
            held = json.loads((folder / ".hydra" / "holder.json").read_text())
            assert composed(folder)["seed"] == 7  # Hydra was faster
            assert not (folder / "failed.json").exists() and not first.done()
            assert code == 1 and printed.splitlines()[-1] == (
                f"error: {folder}: process {held['process']} on {held['host']} is at work in it since {held['since']}; "
                "wait for it, or stop it"
            )
            (tmp_path / "go on").touch()
            code, printed, *_ = first.result()
    finally:
        (tmp_path / "go on").touch()
    assert code == 0 and results(folder) == whole_of(some)[0], printed
    assert not (folder / "failed.json").exists() and not (folder / ".hydra" / "holder.json").exists()
    assert composed(folder)["seed"] == 0 and composed(folder)["batch_size"] == 2


def wait_for(path, start):
    while not path.exists():
        assert not start.done(), start.result()
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_holder_that_was_killed_lets_go(starts, some, whole_of, tmp_path, workers):
    """Its worker processes, which live a little longer, do not hold the folder."""
    here = [*some, f"data.num_workers={workers}", f"hydra.run.dir={tmp_path / 'run'}"]
    code, *_ = starts(*here, signals=[("shards/batch-00000002.json", KILL)], slow=0.2)
    assert code == -signal.SIGKILL
    code, printed, *_ = starts(*here)
    assert code == 0 and "goes on: " in printed and results(tmp_path / "run") == whole_of(some)[0], printed


def test_a_refused_start_leaves_the_composed_config(starts, few, tmp_path):
    here = [*few, f"hydra.run.dir={tmp_path / 'run'}"]
    assert starts(*here, "metric=log_odds")[0] == 0
    before = files_of(tmp_path / "run")
    code, printed, *_ = starts(*here, "seed=7")
    assert code == 1 and "seed (0 there, 7 here)" in printed and "overwrite=true" in printed, printed
    assert composed(tmp_path / "run")["metric"] == "log_odds" and composed(tmp_path / "run")["seed"] == 0
    after = {path for path, content in files_of(tmp_path / "run").items() if before.get(path) != content}
    assert {path.name for path in after} <= {"config.yaml", "hydra.yaml", "overrides.yaml", "start.json", "patch.log"}


def check_one_line(printed, folder):
    """One error, which names a file of the folder; that file."""
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed and "Logging error" not in printed and "a bug in" not in printed, printed
    assert not (folder / "manifest.json").exists()
    reason, _, file = line.removeprefix("error: ").rpartition(": ")
    assert file.startswith(f"{folder}/") and ".part" not in file, line
    return Path(file), reason


@pytest.mark.parametrize(
    ("batch_size", "file"),
    [pytest.param(30, "shards/effects-00000000.parquet", marks=pytest.mark.long), (4, "effects.parquet")],
)
def test_a_file_that_may_not_grow(starts, many, whole_of, tmp_path, batch_size, file):
    """A quota as any machine can set one, of a process's files: a shard is too large, or the table of all."""
    of_tokens, folder = [*many, "target.tokens=each", f"batch_size={batch_size}"], tmp_path / "run"
    whole, _ = whole_of(of_tokens)
    code, printed, *_ = starts(
        *of_tokens, f"hydra.run.dir={folder}", biggest=66000
    )  # Hydra's folder is tried with 64 KiB
    assert code == 1 and check_one_line(printed, folder) == (folder / file, "File too large"), printed
    assert said(folder) == ("failed", f"File too large: {folder / file}")
    code, printed, *_ = starts(*of_tokens, f"hydra.run.dir={folder}")
    assert code == 0 and results(folder) == whole, printed


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of a given size can be mounted by root only")
@pytest.mark.parametrize("kib", [160, *(pytest.param(kib, marks=pytest.mark.long) for kib in (96, 320))])
def test_a_disk_that_is_full(starts, many, whole_of, tmp_path, kib):
    """After some room is made the same command ends in the same bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        here, folder = [*many, f"hydra.run.dir={disk / 'run'}"], disk / "run"
        code, printed, *_ = starts(*here, pictures=kib > 200)
        assert code == 1 and check_one_line(printed, folder)[1] == "No space left on device", printed
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        code, printed, *_ = starts(*here, pictures=kib > 200)
        assert code == 0 and results(folder) == whole_of(many)[0], printed
    finally:
        subprocess.run(["umount", str(disk)], check=True)
