"""Running averages of a network's weights, which draw better than the weights of any one step."""

from __future__ import annotations

import torch


@torch.no_grad()                                          # or an average keeps the history of all its steps
def follow(averaged: torch.nn.Module, net: torch.nn.Module, step: float, half_life: float, seen: float, ramp: float
           ) -> None:
    """Move averaged weights towards those of net, of which half are forgotten over a half-life. Buffers stay.

    step: what has been seen since the last call; seen: since the start, that included; both and half_life in one unit,
    images or iterations. The half-life is at most `ramp` of what was seen, as in StyleGAN2-ADA's training: the first
    weights, which draw nothing, are soon left behind. ramp 0: no such limit, as published for StyleGAN2.
    """
    if ramp:
        half_life = min(half_life, ramp * seen)
    keep = 0.5 ** (step / max(half_life, 1e-8))
    torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), 1 - keep)
