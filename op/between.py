"""What the networks do between two convolutions beside bias_act: PyTorch, or one pass where there is one.

That is op/fused.py on a CPU and, for styled_act, op/styled.py on a GPU.
"""

from __future__ import annotations

import torch

from op import fused, styled
from op.bias_act import bias_act
from op.fused import Noise
from op.modulated_conv import unfolded
from op.upfirdn2d import upfirdn2d


def styled_act(y: torch.Tensor, factor: torch.Tensor, noise: Noise, strength: torch.Tensor, bias: torch.Tensor,
               slope: float = 0.2, then: torch.Tensor | None = None) -> torch.Tensor:
    """leaky_relu(y * factor + noise * strength + bias) * then, in y's dtype: [B, C, H, W].

    y [B, C, H, W], or [B, 4 C, H/2, W/2] of modulated_conv2d; factor [B, C, 1, 1], strength [1], bias [C]. noise
    [B or 1, 1 or C, H, W], None, or two maps that add up, of y's dtype [B, C, H, W] and float32 [1, 1, H, W]. then
    [B, C, 1, 1], what the next layer multiplies by, or None.
    """
    found = fused.styled_act(y, factor, noise, strength, bias, slope, then)
    if found is not None:
        return found
    if y.shape[1] != len(bias):
        y = unfolded(y)
    if isinstance(noise, tuple):
        noise = noise[0].to(noise[1].dtype) + noise[1]
    out = styled.styled_act(y, factor, noise, strength, bias, slope)
    if out is None:
        out = y * factor
        if noise is not None:
            out.add_((noise * strength).to(y.dtype))
        out = bias_act(out, bias, slope, gain=1)
    return out if then is None else out * then.to(out.dtype)


def scaled_sum(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """(a + b) * scale, of one shape."""
    found = fused.scaled_sum(a, b, scale)
    return (a + b) * scale if found is None else found


def enlarged_beside(x: torch.Tensor, other: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """x [B, C, H, W], twice as wide and high by kernel, binomial_kernel(gain=4), and other [B, O, 2H, 2W] beside it."""
    found = fused.enlarged_beside(x, other)
    return torch.cat([upfirdn2d(x, kernel, up=2, pad=(2, 1)), other], 1) if found is None else found
