"""Threads for work that lets go of the interpreter's lock: kernels in C, and networks."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, for work in C."""
    return ThreadPoolExecutor(threads, "op.threads")


def in_batches(run: Callable[..., torch.Tensor], batch: int, *tensors: torch.Tensor) -> torch.Tensor:
    """torch.cat of run(*parts) of tensors [B, ...], at most `batch` of B in work at a time; without gradients.

    On a CPU each of PyTorch's threads has parts of its own: where all of them share every layer of the same images,
    they wait for each other at its end. An in_batches() within run() stays in its thread.
    """
    count, on_cpu = len(tensors[0]), tensors[0].device.type == "cpu"
    threads = max(1, min(torch.get_num_threads(), count, batch)) if on_cpu else 1
    size = max(1, min(batch // threads, -(-count // threads)))
    parts = zip(*(tensor.split(size) for tensor in tensors))
    alone = torch.no_grad()(lambda part: run(*part))
    found = list(map(alone, parts) if threads == 1 else _single(threads).map(alone, parts))
    return found[0] if len(found) == 1 else torch.cat(found)


@functools.cache
def _single(threads: int) -> ThreadPoolExecutor:
    """So many threads, in each of which PyTorch has one."""
    begun = threading.Barrier(threads)

    def begin() -> None:
        torch.get_num_threads()                           # else PyTorch sets it later, to that of the others
        torch.set_num_threads(1)
        begun.wait()                                      # one that is done with this would take another's turn

    workers = ThreadPoolExecutor(threads, "op.threads.single", begin)
    list(workers.map(int, range(threads)))
    torch.set_num_threads(torch.get_num_threads())        # what threads to come begin with has become 1
    return workers
