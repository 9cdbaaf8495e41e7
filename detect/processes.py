"""Several processes of one machine that project scans, each with one thread: for many scans on a CPU.

A scan has stages that one thread at a time can do, so two processes with a thread each do more than one with two. Each
takes the next scan when it has room for one; results meet in the folder of results (detect/jobs.py).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator

from common.machine import free_memory, usable_cores
from common.stopping import end_with_parent, orderly_end

BYTES = 3e9                      # of memory that a process may take, scans of usual size
SCANS = 4                        # that each must have at least, for its start to pay


def suitable(scans: int) -> int:
    """How many processes to use for so many scans: at most one per core, as free memory allows.

    Of both, what a container's limits leave counts.
    """
    return max(1, min(usable_cores(), int(free_memory() / BYTES), scans // SCANS))


class Turns:
    """The numbers 0 to count - 1, each given to one of the processes that iterate."""

    def __init__(self, count: int, context: multiprocessing.context.BaseContext):
        self.count, self._next = count, context.Value("q", 0)
        self.died = 0                                                 # processes that have ended badly

    def __iter__(self) -> Iterator[int]:
        while True:
            with self._next.get_lock():
                number = self._next.value
                self._next.value += 1
            if number >= self.count:
                return
            yield number


@contextlib.contextmanager
def shared(processes: int, count: int, work: Callable[..., None], *args) -> Iterator[Turns]:
    """Run work(*args, turns) in processes - 1 new ones, and yield the same turns, of `count`, to this one.

    At the end of the block the others are waited for; turns.died is then how many did not end well, and the caller has
    to find what they left undone. Where the block raises, or this process dies, they are stopped with SIGTERM, so that
    they clean up.
    """
    context = multiprocessing.get_context("spawn")                    # threads and a fork do not go together
    turns = Turns(count, context)
    others = [context.Process(target=_run, args=(os.getpid(), work, *args, turns)) for _ in range(processes - 1)]
    try:
        for other in others:
            other.start()
        yield turns
        for other in others:
            other.join()
        turns.died = sum(other.exitcode != 0 for other in others)
    finally:
        for other in others:
            if other.is_alive():
                other.terminate()
                other.join()


def _run(parent: int, work: Callable[..., None], *args) -> None:
    end_with_parent(parent)
    with orderly_end(), contextlib.suppress(KeyboardInterrupt):       # Ctrl-C reaches all; the first process tells
        work(*args)
