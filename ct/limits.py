"""What a reader takes: sizes and spacings of a head CT, checked in the header before anything is allocated.

And what there is to take them with: memory and cores, as far as the machine and a container's limits allow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from ct.scan import ScanError

PIXEL_MM = (0.1, 5.0)
SLICE_MM = (0.1, 30.0)
FIELD_MM = 1500.0               # the widest field of view that CT has, and half as much again
MAX_SIDE = 4096                 # pixels
MAX_SLICES = 5000
BYTES_PER_VOXEL = 12            # stored values, float32 HU and one working copy
MAX_RATIO = 250                 # a scan, with its noise, packs to a third; a mask's zeros, or a bomb, to a thousandth
SMALL = 2**24                   # bytes that any file may unpack to
MAX_INFLATED = 2**28            # bytes of a deflated DICOM data set, which is unpacked in memory
ROOT = Path("/")                # what /proc and /sys lie in; of tests another
# Of a control group, version 2 and 1: its limit, what it uses, and what of that is file cache, in memory.stat
MEMORY = (("memory.max", "memory.current", ("inactive_file", "active_file")),
          ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")))


def check_size(name: str, slices: int, rows: int, columns: int) -> None:
    """ScanError, with the file's `name`, for a volume that no head CT has or that the memory cannot hold."""
    if not (0 < rows <= MAX_SIDE and 0 < columns <= MAX_SIDE and 0 < slices <= MAX_SLICES):
        raise ScanError(f"{name}: {slices} slices of {rows} x {columns} pixels; expected 1 to {MAX_SLICES} slices of "
                        f"at most {MAX_SIDE} x {MAX_SIDE}")
    needed, free = slices * rows * columns * BYTES_PER_VOXEL, free_memory()
    if needed > free:
        raise ScanError(f"{name}: {slices} slices of {rows} x {columns} pixels take {needed / 1e9:.1f} GB to read, "
                        f"{free / 1e9:.1f} GB of memory are free; crop or downsample the scan, or use a machine with "
                        "more memory")


def check_ratio(name: str, unpacked: int, packed: int) -> None:
    """ScanError, with the file's `name`, where `packed` bytes are to unpack to more than a scan's ever do."""
    if unpacked > max(SMALL, MAX_RATIO * packed):
        raise ScanError(f"{name}: {unpacked / 1e6:.0f} MB packed in {packed / 1e6:.3g}; no scan packs to less than a "
                        f"{MAX_RATIO}th: it is damaged, or made to fill the memory")


def check_pixel_spacing(name: str, spacing_mm: tuple[float, float], shape: tuple[int, int]) -> None:
    """ScanError, with the file's `name`, for a (row, column) pixel spacing that no head CT of this shape has."""
    low, high = PIXEL_MM
    if not all(low <= mm <= high for mm in spacing_mm):
        raise ScanError(f"{name}: a pixel spacing of {_pair(spacing_mm)} mm; expected {low:g} to {high:g} mm (is it in "
                        "another unit?); correct it at the source")
    field = max(mm * n for mm, n in zip(spacing_mm, shape))
    if field > FIELD_MM:
        raise ScanError(f"{name}: pixels of {_pair(spacing_mm)} mm make a field of view of {field:.0f} mm; expected at "
                        f"most {FIELD_MM:.0f} mm (is the pixel spacing right?)")


def check_slice_spacing(name: str, spacing_mm: float) -> None:
    """ScanError, with the file's `name`, for a usual step from slice to slice that no head CT has."""
    low, high = SLICE_MM
    if not low <= spacing_mm <= high:
        raise ScanError(f"{name}: a slice spacing of {spacing_mm:.4g} mm; expected {low:g} to {high:g} mm (is it in "
                        "another unit, or is this another kind of image?)")


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


def _pair(spacing_mm: tuple[float, float]) -> str:
    return " x ".join(f"{mm:.4g}" for mm in spacing_mm)
