"""Slices for a training, batch after batch for ever: a run that goes on, on however many ranks, meets the same ones."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

import distributed
from common.sampler import InfiniteSampler

# From the parts of a batch of slices, and random numbers for it alone, to what a step takes. It is pickled.
Prepare = Callable[[dict[str, torch.Tensor], torch.Generator], dict[str, torch.Tensor]]
CPU = torch.device("cpu")


def image_batches(slices: Dataset, batch: int, seed: int, workers: int, start: int = 0, device: torch.device = CPU
                  ) -> Iterator[torch.Tensor]:
    """HU of training slices for ever: int16 [batch, N, N], this rank's share of the stream that begins at `start`."""
    for found in slice_batches(slices, batch, seed, workers, start, ("hu",), device=device):
        yield found["hu"]


def slice_batches(slices: Dataset, batch: int, seed: int, workers: int, start: int = 0,
                  keys: tuple[str, ...] = ("hu", "brain"), prepare: Prepare | None = None,
                  device: torch.device = CPU) -> Iterator[dict[str, torch.Tensor]]:
    """The same with more of what SliceDataset holds of a slice; slices may be several of them in a ConcatDataset.

    prepare  what the loader's processes make of a batch: from it, and random numbers that hang on the seed and its
             place in the stream alone, so that a run that goes on meets the same batches, however many processes
    device   of the run: batches for a GPU lie in pinned memory, no others: pinning takes memory of a GPU
    """
    sampler = InfiniteSampler(len(slices), seed, distributed.get_rank(), distributed.get_world_size(), start)
    # A generator of its own: a loader that starts would else take a number from the stream of the noise maps.
    yield from DataLoader(_Parts(slices, keys), batch, sampler=sampler.placed(), num_workers=workers,
                          collate_fn=_Collate(seed, prepare), generator=torch.Generator(),
                          pin_memory=device.type == "cuda", persistent_workers=workers > 0,
                          worker_init_fn=_ignore_signals)


def _ignore_signals(worker: int) -> None:
    # Ctrl-C and a cluster's warning come to all processes of a job; the main one decides when to end (gan.run).
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Parts(Dataset):
    def __init__(self, slices: Dataset, keys: tuple[str, ...]):
        self.slices, self.keys = slices, keys

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, placed: tuple[int, int]) -> tuple[int, dict[str, torch.Tensor]]:
        position, index = placed
        whole = self.slices[index]
        return position, {key: whole[key] for key in self.keys}


class _Collate:
    def __init__(self, seed: int, prepare: Prepare | None):
        self.seed, self.prepare = seed, prepare

    def __call__(self, found: list[tuple[int, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
        batch = default_collate([parts for _, parts in found])
        if self.prepare is None:
            return batch
        state = np.random.SeedSequence((self.seed, found[0][0])).generate_state(1, np.uint64)
        return self.prepare(batch, torch.Generator().manual_seed(int(state[0])))
