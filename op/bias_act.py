"""Bias, leaky ReLU and gain in one call (Karras et al. 2020, 'Analyzing and improving ... StyleGAN', section A)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

SQRT2 = 2**0.5


def bias_act(
    x: torch.Tensor, bias: torch.Tensor | None = None, slope: float = 0.2, gain: float = SQRT2
) -> torch.Tensor:
    """gain * leaky_relu(x + bias). x [B, C, ...], bias [C] or None; keeps x's dtype; differentiable to any order.

    Leaky ReLU is positively homogeneous, so the gain (which must be positive) is folded into the addition: two
    passes over the tensor instead of three.
    """
    if gain <= 0:
        raise ValueError(f"bias_act: gain must be positive, got {gain}")
    if bias is None:
        return F.leaky_relu(x * gain if gain != 1 else x, slope)
    bias = (bias * gain).to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
    return F.leaky_relu(torch.add(bias, x, alpha=gain), slope)
