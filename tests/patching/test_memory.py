"""What is free within the limits of control groups, by folders that look like them."""

import math

import pytest

from vitpatch.patching import cost as memory

GB = 10**9


def write(folder, **files):
    """Files of a group; dots of their names are underscores here but for the last of ``_in_bytes``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(f"{value}\n")


def stat(**numbers):
    return "\n".join(f"{name} {value}" for name, value in numbers.items())


def v2(folder, limit="max", used=0, inactive=0, active=0, mapped=0, high="max"):
    cache = stat(anon=used - inactive - active, inactive_file=inactive, active_file=active, file_mapped=mapped)
    write(folder, memory_max=limit, memory_high=high, memory_current=used, memory_stat=cache)


def v1(folder, limit=2**63 - 4096, used=0, inactive=0, active=0, mapped=0, above=2**63 - 4096):
    own = stat(cache=0, inactive_file=0, active_file=0, mapped_file=0, hierarchical_memory_limit=above)
    total = stat(total_inactive_file=inactive, total_active_file=active, total_mapped_file=mapped)
    write(folder, memory_limit_in_bytes=limit, memory_usage_in_bytes=used, memory_stat=f"{own}\n{total}")


@pytest.fixture
def left(tmp_path):
    """What is left to a process whose ``/proc/self/cgroup`` says this."""
    root = tmp_path / "cgroup"
    root.mkdir()

    def of(said="0::/\n"):
        (tmp_path / "self").write_text(said)
        return memory.left_in_groups(tmp_path / "self", root)

    of.root = root
    return of


OF_V1 = "9:name=systemd:/docker/abc\n4:cpu,memory:/docker/abc\n0::/docker/abc\n"


def test_without_groups_or_limits_nothing_is_limited(left, tmp_path):
    assert left() == math.inf
    assert memory.left_in_groups(tmp_path / "nowhere", tmp_path / "nothing") == math.inf
    v2(left.root, used=3 * GB)
    assert left() == math.inf
    v2(left.root / "a" / "b", used=3 * GB)
    assert left("0::/a/b\n") == math.inf


def test_files_that_were_read_are_not_used_memory(left):
    v2(left.root, limit=8 * GB, used=7 * GB)
    assert left() == GB
    v2(left.root, limit=8 * GB, used=7 * GB, inactive=4 * GB)
    assert left() == 5 * GB
    v2(left.root, limit=8 * GB, used=7 * GB, inactive=3 * GB, active=2 * GB)  # read twice
    assert left() == 6 * GB
    v2(left.root, limit=8 * GB, used=7 * GB, inactive=3 * GB, active=2 * GB, mapped=GB)  # libraries, weights in use
    assert left() == 5 * GB
    v2(left.root, limit=8 * GB, used=7 * GB, inactive=3 * GB, active=GB, mapped=4 * GB)  # as Kubernetes counts
    assert left() == 4 * GB


def test_the_tightest_limit_of_all_groups_above_holds(left):
    v2(left.root / "slice", limit=10 * GB, used=9 * GB)
    v2(left.root / "slice" / "pod", used=4 * GB)
    v2(left.root / "slice" / "pod" / "own", limit=6 * GB, used=2 * GB)
    assert left("0::/slice/pod/own\n") == GB
    assert left("0::/slice\n") == GB
    v2(left.root / "slice", limit=20 * GB, used=9 * GB)
    assert left("0::/slice/pod/own\n") == 4 * GB
    v2(left.root / "slice" / "pod", high=5 * GB, used=4 * GB)  # above it processes are slowed down
    assert left("0::/slice/pod/own\n") == GB


@pytest.mark.parametrize("said", ["0::/docker/abc\n", "0::/../other\n", "", "nonsense"])
def test_a_container_sees_its_own_group_at_the_top(left, said):
    v2(left.root, limit=8 * GB, used=7 * GB, inactive=2 * GB)
    assert left(said) == 3 * GB


def test_version_1(left):
    top = left.root / "memory"
    v1(top, used=30 * GB)
    assert left(OF_V1) > 9e18  # what it calls no limit
    v1(top, limit=8 * GB, used=7 * GB, inactive=4 * GB)
    assert left(OF_V1) == 5 * GB  # a container without a namespace
    v1(top, used=30 * GB)
    v1(top / "docker" / "abc", limit=8 * GB, used=7 * GB, inactive=3 * GB, active=2 * GB, mapped=GB)
    assert left(OF_V1) == 5 * GB
    v1(top / "docker", limit=9 * GB, used=9 * GB, inactive=2 * GB)
    assert left(OF_V1) == 2 * GB
    v1(top / "docker", used=9 * GB)
    v1(top / "docker" / "abc", limit=8 * GB, used=2 * GB, above=3 * GB)  # of a group that is not to be seen
    assert left(OF_V1) == GB


def test_what_cannot_be_read_sets_no_limit(left):
    v2(left.root, limit="?", used=GB)
    assert left() == math.inf
    v2(left.root, limit=8 * GB)
    write(left.root, memory_current="")
    assert left() == math.inf
    v2(left.root, limit=8 * GB, used=7 * GB)
    (left.root / "memory.stat").unlink()
    assert left() == GB
    (left.root / "memory.stat").write_text("inactive_file\nactive_file x\n\n")
    assert left() == GB
    (left.root / "memory.max").unlink()
    (left.root / "memory.max").mkdir()
    assert left() == math.inf


def test_more_than_the_limit_leaves_nothing(left):
    v2(left.root, high=4 * GB, used=5 * GB)
    assert left() == 0


def test_of_machine_and_groups_the_less_is_free(monkeypatch, tmp_path):
    import torch

    (tmp_path / "meminfo").write_text("MemTotal:       16000000 kB\nMemAvailable:    2000000 kB\n")
    assert memory.available(tmp_path / "meminfo") == 2_000_000 * 1024
    assert memory.available(tmp_path / "no file") == memory.NOT_LINUX
    for machine, groups in ((2e9, 9e18), (9e9, 1e9), (3e9, math.inf)):
        monkeypatch.setattr(memory, "available", lambda of=machine: of)
        monkeypatch.setattr(memory, "left_in_groups", lambda of=groups: of)
        assert memory.free_bytes(torch.device("cpu")) == min(machine, groups)
