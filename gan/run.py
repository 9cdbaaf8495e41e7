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
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

import distributed
from common.stopping import end_with_parent
from gan.run_folder import hold_folder, start_run, write_config
from gan.runlog import RunLog
from gan.snapshots import save_snapshot, set_aside_newer, snapshot_steps

# SIGUSR1 is what SLURM is asked to send before a time limit. Exit codes are the shell's, 128 + signal, of the others
STOP_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 129}


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
            set_aside_newer(self.out, self.saved_at)           # every rank has loaded by now
            save_snapshot(self.out, step, modules, state, self.meta, distance=distance)
            write_config(self.out, self.meta)
        self.saved_at = step
        distributed.barrier()


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
