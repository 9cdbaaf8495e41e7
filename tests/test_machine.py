"""common/machine.py: memory and cores, of the machine and within a container's limits, of control groups 1 and 2."""

import os

import pytest

from common import machine as this_machine

GB = 10**9
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes the files of a machine of 64 cores and 400 GB."""
    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())

    monkeypatch.setattr(this_machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    write({"proc/meminfo": "MemTotal:       500000000 kB\nMemAvailable:   400000000 kB"})
    return write


def available():
    return this_machine.free_memory() / GB, this_machine.usable_cores()


UNLIMITED = (400_000_000 * 1024 / GB, 64)


def group_2(place, most="max", used=0, cores="max 100000", stat="anon 5\nfile 7"):
    folder = f"sys/fs/cgroup{place}"
    return {f"{folder}/memory.max": most, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat,
            f"{folder}/cpu.max": cores}


def group_1(place, most=NO_LIMIT_V1, used=0, quota=-1, stat="cache 3\ninactive_file 5", cpu="cpu"):
    memory, cpu = (f"sys/fs/cgroup/{name}{place}" for name in ("memory", cpu))
    return {f"{memory}/memory.limit_in_bytes": most, f"{memory}/memory.usage_in_bytes": used,
            f"{memory}/memory.stat": stat, f"{cpu}/cpu.cfs_quota_us": quota, f"{cpu}/cpu.cfs_period_us": 100000}


V1 = "5:memory:{place}\n4:cpu,cpuacct:{place}\n1:name=systemd:/elsewhere"


def test_without_control_groups_the_machine_counts(machine):
    assert available() == UNLIMITED
    machine({"proc/self/cgroup": "0::/\n5:memory:/a"})                                         # of which no folder is
    assert available() == UNLIMITED


def test_control_groups_2(machine):
    machine({"proc/self/cgroup": "0::/"} | group_2("", 8 * GB, 3 * GB, "200000 100000"))       # as docker shows its own
    assert available() == (5, 2)
    machine(group_2("", "max", 3 * GB))
    assert available() == UNLIMITED


def test_groups_around_it_limit_it_too(machine):
    machine({"proc/self/cgroup": "0::/user/job"} | group_2("/user/job", 8 * GB, 2 * GB, "350000 100000")
            | group_2("/user", 9 * GB, 5 * GB) | group_2("/other", 1 * GB, 1 * GB, "100000 100000"))
    assert available() == (4, 4)                                                               # 3.5 cores, rounded up
    machine(group_2("/user", "max", 5 * GB, "150000 100000"))
    assert available() == (6, 2)


def test_control_groups_1(machine):
    machine({"proc/self/cgroup": V1.format(place="/docker/1f")} | group_1("/docker/1f", 8 * GB, 3 * GB, 200000))
    assert available() == (5, 2)
    machine(group_1("/docker/1f"))
    assert available() == UNLIMITED


@pytest.mark.parametrize("cpu", ["cpu", "cpu,cpuacct"])
def test_a_container_sees_its_own_group_outermost(machine, cpu):
    """/proc has the name that the machine has for it."""
    machine({"proc/self/cgroup": V1.format(place="/docker/1f")} | group_1("", 8 * GB, 3 * GB, 50000, cpu=cpu))
    assert available() == (5, 1)


def test_a_group_beside_the_namespace_leaves_the_outermost(machine):
    machine({"proc/self/cgroup": "0::/../../job"} | group_2("", 8 * GB, 3 * GB, "200000 100000"))
    machine({"sys/memory.max": 1, "sys/memory.current": 1, "sys/fs/memory.max": 1, "sys/fs/memory.current": 1})
    assert available() == (5, 2)


@pytest.mark.parametrize("place, group, stat", [
    ("0::/", group_2, "inactive_file 2000000000\nactive_file 1000000000"),
    ("5:memory:/", group_1, "inactive_file 1\ntotal_inactive_file 2000000000\ntotal_active_file 1000000000")])
def test_the_file_cache_of_a_group_is_free(machine, place, group, stat):
    """Files that were read count as used, up to the limit: after some scans none would have been read any more."""
    machine({"proc/self/cgroup": place} | group("", 8 * GB, 8 * GB, stat=stat))
    assert available()[0] == 3
    machine(group("", 8 * GB, 9 * GB, stat=""))
    assert available()[0] == 0


@pytest.mark.parametrize("odd", ["", "none", "-1", b"\xff\xfe", "8e9"])
def test_odd_files_are_no_limit(machine, odd):
    machine({"proc/self/cgroup": "0::/\n" + V1.format(place="/"), "proc/meminfo": "MemAvailable:   400000000 kB"}
            | dict.fromkeys(group_2("") | group_1(""), odd))
    assert available() == UNLIMITED
    machine({"sys/fs/cgroup/memory.max": 8 * GB, "sys/fs/cgroup/cpu.max": "200000"})            # of which half is told
    assert available() == UNLIMITED
    machine({"proc/self/cgroup": odd, "proc/meminfo": odd})
    assert available() == (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB, 64)


def test_a_period_of_nothing_is_no_limit(machine):
    machine({"proc/self/cgroup": "0::/"} | group_2("", cores="200000 0"))
    assert available() == UNLIMITED


def test_of_this_machine_there_is_some():
    assert this_machine.free_memory() > 0 and 1 <= this_machine.usable_cores() <= len(os.sched_getaffinity(0))
