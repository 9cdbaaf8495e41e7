"""The statistics of a training run: rows of stats.jsonl, TensorBoard's curves, lines on the screen."""

from __future__ import annotations

import json
import resource
import time
import warnings
from pathlib import Path

import torch

import distributed
from common.files import replace_text


class RunLog:
    """Collects scalars between ticks; at a tick their means over steps and ranks go to every place.

    Only rank 0 writes, and knows how many `rows` there are. TensorBoard is used where it is installed; stats.jsonl
    always. Rows after step `begin`, which a killed run wrote after its last snapshot, are dropped: they come again.
    """

    def __init__(self, folder: Path, begin: int = 0, state: list | None = None):
        """state: what state() gave. Kept only by as many ranks as it came from."""
        self.folder, self.sums, self.counts, self.images = Path(folder), {}, {}, 0
        self.file = self.board = None
        self.last = time.perf_counter()
        if state and len(state) == distributed.get_world_size():
            self.sums, self.counts = state[distributed.get_rank()]
        if distributed.is_main():
            self.rows = _drop_rows_after(self.folder / "stats.jsonl", begin)
            self.file = open(self.folder / "stats.jsonl", "a", encoding="utf-8")
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=begin + 1)
            except ImportError:
                distributed.print0("TensorBoard is not installed: curves go to stats.jsonl only")

    def add(self, images: int = 0, **scalars: torch.Tensor | float) -> None:
        """The scalars of a step over this many images, counted over all ranks."""
        self.images += images
        for name, value in scalars.items():
            value = value.detach() if torch.is_tensor(value) else value
            self.sums[name] = value + self.sums.get(name, 0.0)
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Collective. Means since the last call, over steps and ranks, in one transfer."""
        means = distributed.reduce_mean({k: self.sums[k] / self.counts[k] for k in self.sums})
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> list:
        """Collective. What the ranks have collected since the last tick, by rank."""
        sums = {name: value.cpu() if torch.is_tensor(value) else value for name, value in self.sums.items()}
        return distributed.gather((sums, self.counts))

    def tick(self, step: int, device: torch.device, **extra: float) -> dict[str, float]:
        """Collective. Write the means since the last tick at `step`, with speed and peak memory; returns the row."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        row = {"step": step, **self.means(), **extra, "seconds": seconds, "memory_gb": peak_memory_gb(device)}
        if self.images:
            row |= {"img_per_s": self.images / seconds, "s_per_kimg": 1000 * seconds / self.images}
        self.images = 0
        if self.file:
            self.file.write(json.dumps({k: _short(v) for k, v in row.items()}) + "\n")
            self.file.flush()
            self.rows += 1
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
        distributed.print0("  ".join(f"{k} {_short(v)}" for k, v in row.items()))
        return row

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink:
                sink.close()


def _drop_rows_after(path: Path, step: int) -> int:
    """Also drops a last line that was cut short, and with a warning what is no row. The file is replaced whole. Returns
    how many rows are left."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        if (found := _step_of(line)) is None:
            warnings.warn(f"{path}, line {number}: no row of statistics (a power cut may leave such); dropped",
                          stacklevel=2)
        elif found <= step:
            kept.append(line)
    if kept != lines:
        replace_text(path, b"".join(kept).decode())
    return len(kept)


def _step_of(line: bytes) -> float | None:
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    found = row.get("step") if isinstance(row, dict) else None
    return found if isinstance(found, (int, float)) else None


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _short(value: float) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.5g}")
