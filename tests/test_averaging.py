"""gan/averaging.py by hand."""

from __future__ import annotations

import pytest
import torch

from gan.averaging import follow


@pytest.mark.parametrize("seen, ramp, kept", [(1000, 0.0, 0.5), (1000, 0.5, 0.5), (8, 0.5, 0.25), (8, 0.0, 0.5),
                                              (0, 0.5, 0.0)])
def test_a_half_life_forgets_half_and_a_quarter_is_left_of_two(seen, ramp, kept):
    """8 images, a half-life of 8 or, by the ramp, of half of those seen: 4 of 8, 0 of none."""
    averaged, net = (torch.nn.Linear(1, 1) for _ in range(2))
    for module, weight in ((averaged, 1.0), (net, 5.0)):
        torch.nn.init.constant_(module.weight, weight)
    averaged.register_buffer("own", torch.ones(1))
    follow(averaged, net, 8, 8, seen, ramp)
    assert averaged.weight.item() == pytest.approx(kept * 1 + (1 - kept) * 5)
    assert net.weight.item() == 5 and averaged.own.item() == 1
