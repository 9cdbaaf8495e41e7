"""What the training commands share around their steps: starting and resuming a run, statistics, exit codes."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import distributed
from gan.snapshots import Snapshot, load_snapshot, snapshot_steps
from weights import CheckpointError


class RunLog:
    """Collects scalars between ticks; at a tick their means over steps and ranks go to every place.

    Only rank 0 writes. TensorBoard is used where it is installed; stats.jsonl always.
    """

    def __init__(self, folder: Path):
        self.folder, self.sums, self.counts = Path(folder), {}, {}
        self.file = self.board = None
        self.last = time.perf_counter()
        if distributed.is_main():
            self.file = open(self.folder / "stats.jsonl", "a", encoding="utf-8")
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(str(self.folder / "tensorboard"))
            except ImportError:
                print("TensorBoard is not installed: curves go to stats.jsonl only", flush=True)

    def add(self, **scalars: torch.Tensor | float) -> None:
        for name, value in scalars.items():
            value = value.detach() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Collective. Means since the last call, over steps and ranks, in one transfer."""
        means = distributed.reduce_mean({k: self.sums[k] / self.counts[k] for k in self.sums})
        self.sums, self.counts = {}, {}
        return means

    def tick(self, step: int, device: torch.device, images: int = 0, **extra: float) -> dict[str, float]:
        """Collective. Write the means since the last tick at `step`, with speed and peak memory; returns the row."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        row = {"step": step, **self.means(), **extra, "seconds": seconds, "memory_gb": peak_memory_gb(device)}
        if images:
            row |= {"img_per_s": images / seconds, "s_per_kimg": 1000 * seconds / images}
        if self.file:
            self.file.write(json.dumps({k: _short(v) for k, v in row.items()}) + "\n")
            self.file.flush()
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
        distributed.print0("  ".join(f"{k} {_short(v)}" for k, v in row.items()))
        return row

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink:
                sink.close()


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _short(value: float) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.5g}")


def run_command(work: Callable[[torch.device], None], device: str, out: Path) -> int:
    """Start up, work(device), clean up; errors become messages.

    Returns the exit code: 0 done, 2 wrong usage, 4 diverged.
    """
    try:
        chosen = distributed.pick_device(device)
        distributed.init(chosen)
        work(chosen)
    except FloatingPointError as error:
        print(f"error: {error}\nThe last good snapshot is kept in {out}.", file=sys.stderr)
        return 4
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.cleanup()
    return 0


def load_run(folder: Path, flag: str, kind: str, command: str) -> Snapshot:
    """The last snapshot of a run of this kind. Raises CheckpointError naming the flag."""
    snapshot = load_snapshot(folder)
    if snapshot.meta.get("kind") != kind:
        raise CheckpointError(f"{flag} {folder}: not a run of {command} "
                                         f"(kind {snapshot.meta.get('kind')!r})")
    return snapshot


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict) -> None:
    """Take the moments of a saved state, but keep the learning rate and the like: those are today's flags."""
    optimiser.load_state_dict({**state, "param_groups": optimiser.state_dict()["param_groups"]})


def start_run(out: Path, meta: dict, modules: dict[str, torch.nn.Module]) -> Snapshot | None:
    """Collective. Open the run folder and, if it holds snapshots, load the last one's weights into modules.

    Writes meta to config.json. Returns the snapshot (for its state), or None for a new run. Raises CheckpointError
    when the folder holds a run whose meta differ in anything but the config (kind, networks, data, GAN).
    """
    if distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    snapshot = load_snapshot(out) if snapshot_steps(out) else None
    if snapshot is not None:
        for key in [key for key in meta if key != "config"]:               # in order: the kind first
            if snapshot.meta.get(key) != json.loads(json.dumps(meta[key])):
                raise CheckpointError(
                    f"{out}: the run there has another {key} ({snapshot.meta.get(key)}, now {meta[key]}); go on with "
                    "the same flags and database, or choose another --out")
        snapshot.restore(modules)
    if distributed.is_main():
        (out / "config.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return snapshot
