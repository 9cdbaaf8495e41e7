"""Threads for work that lets go of the interpreter's lock: kernels in C, and networks."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_making = threading.Lock()
_singles: dict[int, ThreadPoolExecutor] = {}


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, for work in C."""
    return ThreadPoolExecutor(threads, "op.threads")


def spread(run: Callable[[int, int, int], Any], count: int, threads: int) -> list:
    """What run(thread, first, last) gives for each of so many shares of `count`; run is in C, without the GIL."""
    if threads == 1:
        return [run(0, 0, count)]
    edges = [count * i // threads for i in range(threads + 1)]
    return list(pool(torch.get_num_threads()).map(run, range(threads), edges[:-1], edges[1:]))


def in_batches(run: Callable[..., torch.Tensor], batch: int, *tensors: torch.Tensor) -> torch.Tensor:
    """torch.cat of run(*parts) of tensors [B, ...], at most `batch` of B in work at a time; without gradients.

    On a CPU each of PyTorch's threads has parts of its own: where all of them share every layer of the same images,
    they wait for each other at its end. An in_batches() within run() stays in its thread. run() sees no autocast and
    no inference mode of the caller's.
    """
    count = len(tensors[0])
    with _making:                                         # meanwhile PyTorch would tell one thread
        available = torch.get_num_threads()
    threads = min(available, count, batch) if tensors[0].device.type == "cpu" else 1
    if 2 * threads <= available:                          # of so few images each is better shared by all threads
        threads = 1
    parts = list(zip(*(tensor.split(max(1, min(batch // threads, -(-count // threads)))) for tensor in tensors)))

    @torch.autocast(tensors[0].device.type, enabled=False)
    @torch.inference_mode(False)                          # which allows gradients
    @torch.no_grad()
    def work(first: int) -> list[torch.Tensor]:
        return [run(*part) for part in parts[first::threads]]

    shares = list(_single(available).map(work, range(threads)) if threads > 1 else map(work, range(1)))
    found = [shares[k % threads][k // threads] for k in range(len(parts))]
    return found[0] if len(found) == 1 else torch.cat(found)


def _single(threads: int) -> ThreadPoolExecutor:
    """So many threads, in each of which PyTorch has one: the same each time."""
    with _making:
        if threads not in _singles:
            _singles[threads] = _begin(threads)
        return _singles[threads]


def _begin(threads: int) -> ThreadPoolExecutor:
    begun = threading.Barrier(threads)

    def alone() -> None:
        torch.get_num_threads()                           # else PyTorch sets it later, to that of the others
        torch.set_num_threads(1)
        begun.wait()                                      # one that is done with this would take another's turn

    workers = ThreadPoolExecutor(threads, "op.threads.single", alone)
    try:
        list(workers.map(int, range(threads)))
    except BaseException:                                 # no more threads to be had, or stopped
        begun.abort()
        workers.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(threads)                    # what threads to come begin with has become 1
    return workers


def _forget() -> None:
    """A fork has none of its parent's threads."""
    global _making
    _making = threading.Lock()
    _singles.clear()
    pool.cache_clear()


os.register_at_fork(after_in_child=_forget)
