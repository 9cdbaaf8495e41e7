"""What the training commands share around their steps: a run in its folder, its statistics, stopping, going back.

    def work(device, rollback):
        ...
        with Run(out, meta, trainer, config.seed, rollback) as run:
            while trainer.images_seen < end:
                run.log.add(batch, **trainer.step(...))
                if ...:
                    run.tick(trainer.images_seen, device)
                run.end_step(trainer.images_seen, snapshot=...)

    exit_code = run_command(work, "auto", out)

A run that is killed goes on from its last snapshot as if nothing had happened, on CPUs to the bit: statistics, too.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

import distributed
from common.files import locked, replace_text
from common.stopping import end_with_parent
from common.weights import CheckpointError, holds_bundle
from common.wording import differing, some
from dataset import comparable
from gan.snapshots import Snapshot, load_snapshot, save_snapshot, snapshot_steps
from model import ModelConfig

# SIGUSR1 is what SLURM is asked to send before a time limit. Exit codes are the shell's, 128 + signal, of the others
STOP_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 129}
LOCK = ".lock"                   # in a run's folder: held by the run that is at work there
LAST_RANKS_S = 120.0             # a launcher starts ranks anew while those before may still write their snapshot, or a
                                 # file server still holds the lock of a node that is lost

OF_ANY_RUN = ("config", "model", "data", "held_out")          # what the meta of every run of a training command tells
OF_RUNS = {"gan": (), "encoder": ("gan",), "reader": ("beside",)}                     # and of one of a kind


class Stopped(Exception):
    """A signal asked the run to end; its snapshot is written."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
        self.exit_code = STOP_SIGNALS[number]


class Trainer(Protocol):
    """What a run needs of the object that takes the steps."""

    def modules(self) -> dict[str, torch.nn.Module]: ...
    def state(self) -> dict: ...                           # collective; all but the weights that going on needs
    def load_state(self, state: dict) -> None: ...
    def reseed(self, seed: int) -> None: ...               # other random numbers from here on


class Run:
    """A training run in its folder: the snapshot it goes on from, its statistics, new snapshots, signals to stop.

    meta      what the run is (kind, networks, data, config); all but the config must be as in the folder
    seed      of the config. After a rollback `run.seed` is another, also in later goes; samplers take that one
    rollback  the last go diverged: take other random numbers from the last snapshot on
    resumed   whether the folder held a snapshot
    """

    def __init__(self, out: Path, meta: dict, trainer: Trainer, seed: int, rollback: bool = False):
        """Collective. Raises CheckpointError when the folder holds a run of another kind, or one that is at work."""
        with contextlib.ExitStack() as held:                   # let go of where this raises
            hold_folder(out, held)
            self._start(out, meta, trainer, seed, rollback)
            self._held = held.pop_all()

    def _start(self, out: Path, meta: dict, trainer: Trainer, seed: int, rollback: bool) -> None:
        snapshot = start_run(out, meta, trainer.modules())
        state = snapshot.state if snapshot else {}
        self.out, self.meta, self.trainer = out, meta, trainer
        self.resumed, self.saved_at = snapshot is not None, snapshot.step if snapshot else 0
        self.rollbacks = state.get("rollbacks", 0) + rollback
        self.seed = seed + (self.rollbacks << 32)
        trainer.reseed(self.seed)
        if snapshot:
            trainer.load_state(state)
        if rollback:
            trainer.reseed(self.seed)
        self.log = RunLog(out, self.saved_at, state.get("log"))
        self.signal, self.spent, self.start = 0, state.get("seconds", 0.0), time.perf_counter()

    def __enter__(self) -> Run:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS
                        if signal.getsignal(number) != signal.SIG_IGN}              # as SIGHUP is under nohup
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.log.close()
        self._held.close()

    def _note(self, number: int, frame) -> None:
        # Under torchrun a Ctrl-C comes twice, from the terminal and from torchrun: only alone is a second one meant.
        if number == self.signal == signal.SIGINT and distributed.get_world_size() == 1:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def seconds(self) -> float:
        """Collective. What the run has taken until now, up to the snapshots that it went on from."""
        return distributed.all_reduce_max(self.spent + time.perf_counter() - self.start)

    def tick(self, step: int, device: torch.device, **extra: float) -> None:
        """Collective. A row of statistics. Raises FloatingPointError when one of them is not finite."""
        if self.rollbacks:
            extra["rollbacks"] = self.rollbacks
        row = self.log.tick(step, device, **extra)
        if not all(math.isfinite(value) for value in row.values()):
            raise FloatingPointError(f"training diverged at step {step}: {row}")

    def end_step(self, step: int, snapshot: bool, distance: float | None = None) -> None:
        """Collective. Write a snapshot when one is due, or before raising Stopped when a signal has come to any rank.

        distance: of what is drawn to what should be, where it was measured at this step: the snapshot with the least
        is kept besides the last ones.

        Raises FloatingPointError instead of writing weights that are not finite.
        """
        number = distributed.all_reduce_max(self.signal)
        if snapshot or number:
            self._save(step, distance)
        if number:
            raise Stopped(number)

    def _save(self, step: int, distance: float | None) -> None:
        modules = self.trainer.modules()
        if not all(p.isfinite().all() for module in modules.values() for p in module.parameters()):
            raise FloatingPointError(f"training diverged at step {step}: weights are not finite")
        state = {**self.trainer.state(), "log": self.log.state(), "rollbacks": self.rollbacks,
                 "seconds": self.seconds()}
        if distributed.is_main():
            save_snapshot(self.out, step, modules, state, self.meta, distance=distance)
            _write_config(self.out, self.meta)
        distributed.barrier()


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


def run_command(work: Callable[[torch.device, bool], None], device: str, out: Path) -> int:
    """Start up, work(device, rollback), clean up; errors become messages.

    A run that diverges goes back once to its last snapshot: work is called again, with rollback=True. Returns the
    exit code: 0 done, 2 wrong usage, 4 diverged again (or before the first snapshot), 129, 130 or 143 stopped by a
    signal; 1, its traceback printed, any other error under several ranks; alone it is raised. What the other ranks may
    know nothing of is told of before the group is left; with NCCL the process then ends here (distributed.end_alone).
    A launcher that is killed takes its ranks with it, as by SIGTERM.
    """
    if distributed.is_launched():
        end_with_parent()
    try:
        chosen = distributed.pick_device(device)
        distributed.init(chosen)
        try:
            work(chosen, False)
            return 0
        except FloatingPointError as error:
            if not snapshot_steps(out):
                raise
            distributed.print0(f"{error}\nGoing back to the last snapshot once, with other random numbers.",
                               file=sys.stderr)
        work(chosen, True)                             # not in the handler: its traceback keeps the first go in memory
        return 0
    except FloatingPointError as error:
        kept = f"The last good snapshot is kept in {out}." if snapshot_steps(out) else f"{out} holds no snapshot yet."
        print(f"error: {error}\n{kept}", file=sys.stderr)
        return 4
    except Stopped as stopped:
        distributed.print0(str(stopped), file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command " + ("goes on from the last snapshot" if snapshot_steps(out) else
                                                  "begins anew: there is no snapshot yet"), file=sys.stderr)
        distributed.end_alone(130)
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.end_alone(2)
        return 2
    except Exception:
        if distributed.get_world_size() == 1:
            raise
        traceback.print_exc()
        distributed.end_alone(1)
        return 1
    finally:
        distributed.cleanup()


def load_run(folder: Path, flag: str, kind: str, command: str) -> Snapshot:
    """The last snapshot of a run of this kind. Raises CheckpointError naming the flag."""
    if not snapshot_steps(folder):
        raise CheckpointError(f"{flag} {folder}: " + (
            f"a model bundle; a run folder of {command} is expected" if holds_bundle(folder) else
            f"holds no run of {command}; give the folder that was its --out"))
    snapshot = load_snapshot(folder)
    if snapshot.meta.get("kind") != kind:
        raise CheckpointError(f"{flag} {folder}: not a run of {command} (kind {snapshot.meta.get('kind')!r})")
    if untold := [key for key in OF_ANY_RUN + OF_RUNS[kind] if key not in snapshot.meta]:
        raise CheckpointError(f"{flag} {folder}: the run there was made by an older version and does not tell its "
                              f"{some(untold, 3)}; make it anew with {command}")
    return snapshot


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict) -> None:
    """Take the moments of a saved state, but keep the learning rate and the like: those are today's flags."""
    optimiser.load_state_dict({**state, "param_groups": optimiser.state_dict()["param_groups"]})


def told_of(meta: dict, key: str) -> Any:
    """An entry of a run's meta, to be compared with another's: of before a network had a setting, its default."""
    if key == "model" and "size" in meta[key]:                                         # a reader has none
        return asdict(ModelConfig(**meta[key]))
    return comparable(meta[key]) if key == "data" else meta[key]


def hold_folder(out: Path, held: contextlib.ExitStack) -> None:
    """Collective. Make the run folder, and lock it against other runs until `held` is closed.

    Raises CheckpointError, on all ranks, when it cannot be made or another run is at work there.
    """
    problem, what = None, "made a folder"
    if distributed.is_main():
        try:
            out.mkdir(parents=True, exist_ok=True)
            what = "written to"
            held.enter_context(locked(out / LOCK, LAST_RANKS_S if distributed.is_launched() else 0.0))
        except BlockingIOError:
            problem = f"another run is at work in {out}; stop it, wait for its end, or choose another --out"
        except OSError as error:
            problem = f"--out {out}: cannot be {what} ({error.strerror}); choose another"
    if problem := distributed.gather(problem)[0]:
        raise CheckpointError(problem)


def start_run(out: Path, meta: dict, modules: dict[str, torch.nn.Module]) -> Snapshot | None:
    """Collective. If the run folder holds snapshots, load the last one's weights into modules.

    Returns the snapshot (for its state), or None for a new run, whose meta go to config.json. Raises CheckpointError
    when the folder holds a run whose meta differ in anything but the config (kind, networks, data, GAN) or lack some of
    these.
    """
    snapshot = load_snapshot(out) if snapshot_steps(out) else None
    if snapshot is not None:
        for key in [key for key in meta if key != "config"]:               # in order: the kind first
            if key not in snapshot.meta:
                raise CheckpointError(f"{out}: the run there was started by an older version and does not tell its "
                                      f"{key}; go on with that version, or choose another --out")
            was, now = told_of(snapshot.meta, key), json.loads(json.dumps(told_of(meta, key)))
            if other := differing(was, now, key):
                raise CheckpointError(f"{out}: the run there has another {key} ({some(other, 3, '; ')}); go on with "
                                      "the same flags and database, or choose another --out")
        before, now = snapshot.meta.get("config", {}), json.loads(json.dumps(meta["config"]))
        if gone := sorted(set(before) - set(now)):
            raise CheckpointError(
                f"{out}: the run there was started by an older version, with settings that this one does not know "
                f"({', '.join(gone)}); go on with that version, or choose another --out")
        if changed := differing(before, {key: now[key] for key in before}, "config"):
            distributed.print0(f"note: the run in {out} goes on with other settings: {'; '.join(changed)}")
        snapshot.restore(modules)
    elif distributed.is_main():
        _write_config(out, meta)
    return snapshot


def _write_config(out: Path, meta: dict) -> None:
    """With a new run and with each of its snapshots: a later call that takes no step leaves it as it is."""
    replace_text(out / "config.json", json.dumps(meta, indent=2) + "\n")
