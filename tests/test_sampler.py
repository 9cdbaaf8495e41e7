"""The sampler's arithmetic, and what is made of its batches."""

from __future__ import annotations

import itertools

import pytest
import torch

from common.sampler import InfiniteSampler
from dataset import SliceDataset
from gan.batches import slice_batches


def take(sampler, count):
    return list(itertools.islice(sampler, count))


def test_every_epoch_is_a_new_permutation():
    drawn = take(InfiniteSampler(10, seed=1), 30)
    epochs = [drawn[i:i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert drawn != take(InfiniteSampler(10, seed=2), 30)


def test_sampler_resumes_at_any_global_position():
    whole = take(InfiniteSampler(7, seed=3), 40)
    for start in (1, 7, 20):
        assert take(InfiniteSampler(7, seed=3, start=start), 40 - start) == whole[start:]


def test_ranks_take_turns_in_one_stream():
    whole = take(InfiniteSampler(5, seed=4), 26)
    ranks = [take(InfiniteSampler(5, seed=4, rank=r, world=2, start=6), 10) for r in (0, 1)]
    assert ranks[0] == [whole[g] for g in range(6, 26, 2)]
    assert ranks[1] == [whole[g] for g in range(7, 26, 2)]


def test_what_is_made_of_a_batch_hangs_on_its_place_alone(slices32):
    """The same with and without loaders of its own, and from the middle on; other numbers for each batch and seed."""
    def first(count, seed=5, workers=0, start=0):
        batches = slice_batches(SliceDataset(slices32, "all"), 2, seed, workers, start, ("hu",), noisy)
        return [batch["noise"].item() for batch in itertools.islice(batches, count)]

    whole = first(4)
    assert len(set(whole)) == 4 and first(4, workers=2) == whole and first(2, start=4) == whole[2:]
    assert first(4, seed=6) != whole and first(1, seed=5 + (1 << 32)) != whole[:1]


def noisy(batch, rng):
    return {"noise": torch.randn((), generator=rng) + 0 * batch["hu"].sum()}


@pytest.mark.parametrize("wrong", [dict(length=0), dict(rank=2, world=2), dict(start=-1)])
def test_sampler_refuses_impossible_numbers(wrong):
    with pytest.raises(ValueError, match="expected length"):
        InfiniteSampler(**{"length": 4, "seed": 0, **wrong})
