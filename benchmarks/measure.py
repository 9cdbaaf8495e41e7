"""How benchmarks/speed.py measures: variants side by side, the machine's own rates, the floor, the table."""

from __future__ import annotations

import functools
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from op import memory
from op.cuda import set_impl

REFERENCE = "reference"                     # the variant the others are compared with
NOT_MEASURED = "not measured"
LOG = logging.getLogger("benchmarks")       # what is being measured, and how long each part of it took


@dataclass(frozen=True)
class Row:
    """One line of the table. Figures in `unit`; less is better.

    reference None: the goal is absolute, or the reference would take hours. ours None: not measured, `note` says why.
    floor: bytes over bandwidth or operations over rate, in the row's unit. goal: as the issue has it; met: whether.
    """

    name: str
    unit: str
    goal: str
    reference: float | None = None
    ours: float | None = None
    floor: float | None = None
    met: bool | None = None
    note: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return self.reference / self.ours if self.reference and self.ours else None


# ---------------------------------------------------------------------------------------------------------------
# Time

@contextmanager
def phase(name: str) -> Iterator[None]:
    """Tells the log that a part of a measurement begins, and how long it took."""
    LOG.info("%s ...", name)
    start = time.perf_counter()
    yield
    LOG.info("%s: %.1f s", name, time.perf_counter() - start)


def side_by_side(
    variants: dict[str, Callable[[], object]], device: torch.device, repeats: int, calls: int = 1, label: str = ""
) -> dict[str, list[float]]:
    """Seconds of one call of each variant, `repeats` times, turn by turn, after one call that does not count.

    calls: of a turn, for what is too short for the clock. label: what the log calls the turns; none: it hears of none.
    On the CPU the reference returns freed memory as glibc does, the others keep it as our programs do (op/memory.py).
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            memory.keep_freed(name != REFERENCE)
            _wait(device)
            with phase(f"{label}, {name}, {turn or 'first call'}") if label else nullcontext():
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                _wait(device)
                took = time.perf_counter() - start
            if turn:
                seconds[name].append(took / calls)
    return seconds


@contextmanager
def plain_ops() -> Iterator[None]:
    """Every op in its plain PyTorch form, for the reference."""
    set_impl("ref")
    try:
        yield
    finally:
        set_impl("auto")


def seconds_to_start(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Until a call has returned, what it started still at work: nothing takes less while the device is idle."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = (time.perf_counter() - start) / calls
    _wait(device)
    return seconds


def medians(seconds: dict[str, list[float]], scale: float = 1.0) -> dict[str, float]:
    return {name: scale * statistics.median(times) for name, times in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------
# Floors

@functools.cache
def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the largest copy that neither cache nor a small card minds."""
    n = 1 << (30 if device.type == "cuda" else 26)
    source = torch.rand(n // 4, device=device)
    target = torch.empty_like(source)
    seconds = side_by_side({"copy": lambda: target.copy_(source)}, device, repeats=7)["copy"]
    return 2 * n / min(seconds)


@functools.cache
def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second: the better of a matrix product and a 3x3 convolution."""
    big = device.type == "cuda"
    a = torch.randn(*[8192 if big else 1024] * 2, device=device).to(dtype)
    x = torch.randn(16 if big else 2, 512, 64, 64, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(512, 512, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    seconds = side_by_side({"matmul": lambda: a @ a, "conv": lambda: F.conv2d(x, w, padding=1)}, device, repeats=5)
    operations = {"matmul": 2 * a.shape[0] ** 3, "conv": 2 * 9 * 512 * x.numel()}
    return max(operations[name] / min(times) for name, times in seconds.items())


def operations(run: Callable[[], object]) -> int:
    """Floating-point operations of convolutions and matrix products in one call, as plain PyTorch does them.

    What kernels of our own do is not counted, and some do with fewer (op/winograd.py) or more (op/modulated_conv.py).
    """
    with plain_ops(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on."""
    can = getattr(torch.cpu, "get_capabilities", dict)()     # of torch 2.12 and later
    return {
        "date": time.strftime("%Y-%m-%d"), "cpu": can.get("cpu_name", platform.processor()),
        "bf16": next((kind for kind in ("amx_bf16", "avx512_bf16") if can.get(kind)), "emulated"),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
    }


# ---------------------------------------------------------------------------------------------------------------
# Table

COLUMNS = ("row", "reference", "ours", "ratio", "floor", "unit", "goal", "met")


def table(rows: list[Row]) -> str:
    """The rows as text, with their notes below."""
    cells = [COLUMNS] + [
        (row.name, _number(row.reference), NOT_MEASURED if row.ours is None else _number(row.ours),
         "-" if row.ratio is None else f"{row.ratio:.1f}x", _number(row.floor), row.unit, row.goal,
         "-" if row.met is None else "yes" if row.met else "no")
        for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines + [f"{row.name}: {row.note}" for row in rows if row.note])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
