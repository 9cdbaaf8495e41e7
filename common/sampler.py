"""An order of a training's examples that goes on for ever, and where it was: a run that goes on meets the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class InfiniteSampler(Sampler[int]):
    """Indices 0..length-1 for ever, every epoch in a new order drawn from (seed, epoch).

    One global stream has positions 0, 1, 2, ...; rank r of `world` takes start + r, start + r + world,
    ... So all ranks together read what one rank would, and the global position is the whole state: to resume
    after P indices (counted over all ranks), pass start=P.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world: int = 1, start: int = 0):
        if length < 1 or start < 0 or not 0 <= rank < world:
            raise ValueError(f"expected length >= 1, start >= 0 and 0 <= rank < world, got length={length}, "
                             f"start={start}, rank={rank}, world={world}")
        self.length, self.seed, self.rank, self.world, self.start = length, seed, rank, world, start

    def __iter__(self) -> Iterator[int]:
        return (index for _, index in self.placed())

    def placed(self) -> Iterator[tuple[int, int]]:
        """(global position, index) for ever."""
        position, shuffled = self.start + self.rank, -1
        while True:
            epoch, offset = divmod(position, self.length)
            if epoch != shuffled:
                order, shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.length), epoch
            yield position, int(order[offset])
            position += self.world
