"""Memory and cores that this process may use, as far as the machine and a container's limits allow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")                # what /proc and /sys lie in; of tests another
# Of a control group, version 2 and 1: its limit, what it uses, and what of that is file cache, in memory.stat
MEMORY = (("memory.max", "memory.current", ("inactive_file", "active_file")),
          ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")))


def free_memory() -> int:
    """Bytes that can be allocated without swapping, in the machine and within a container's limit.

    Counts what the system can drop from its file cache; a container's use contains that, too.
    """
    available = _table(ROOT / "proc/meminfo").get("MemAvailable:")
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available * 1024]
    for group in _control_groups("memory"):
        for limit_in, used_in, cached in MEMORY:
            limit, used = _number(group / limit_in), _number(group / used_in)
            if limit is not None and used is not None:
                stat = _table(group / "memory.stat")
                free.append(max(0, limit - max(0, used - sum(stat.get(name, 0) for name in cached))))
    return min(free)


def usable_cores() -> int:
    """Cores that this process may run on, as many as a container's quota of their time is worth, rounded up."""
    cores = [len(os.sched_getaffinity(0))]
    for group in _control_groups("cpu"):
        for quota, period in ((_number(group / "cpu.max"), _number(group / "cpu.max", 1)),              # version 2
                              (_number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us"))):
            if quota and period:
                cores.append(math.ceil(quota / period))
    return min(cores)


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups, of both versions, that limit this process: its own and those around it.

    A container may see its own group as the outermost, and not by the name that /proc has: where a folder is missing
    those around it are there.
    """
    for line in _lines(ROOT / "proc/self/cgroup"):
        _, names, place = (line.split(":", 2) + ["", ""])[:3]
        if names and controller not in names.split(","):
            continue
        for mount in {controller, names} if names else ("",):                 # cpu, or cpu,cpuacct; version 2 has none
            group = top = ROOT / "sys/fs/cgroup" / mount
            if ".." not in Path(place).parts:                                 # as seen from a namespace beside it
                group = top / place.lstrip("/")
            yield from (one for one in (group, *group.parents) if one.is_relative_to(top))


def _lines(path: Path) -> list[str]:
    """Of a file of the system; none where it is missing or no text."""
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []


def _number(path: Path, place: int = 0) -> int | None:
    """A number in the file's first line; None where there is none, as with 'max', or -1, which stands for no limit."""
    words = "".join(_lines(path)[:1]).split()
    return int(words[place]) if len(words) > place and words[place].isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Of a file with a name and a number a line."""
    words = [line.split() for line in _lines(path)]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}
