"""What the networks do between two convolutions beside bias_act: PyTorch, or one pass where there is one.

That is op/fused.py on a CPU and, for styled_act, op/styled.py on a GPU.
"""

from __future__ import annotations

import torch

from op import fused, styled
from op.bias_act import bias_act


def styled_act(y: torch.Tensor, factor: torch.Tensor, noise: torch.Tensor | None, strength: torch.Tensor,
               bias: torch.Tensor, slope: float = 0.2) -> torch.Tensor:
    """leaky_relu(y * factor + noise * strength + bias), in y's dtype.

    y [B, C, H, W], factor [B, C, 1, 1], noise [B or 1, 1 or C, H, W] or None, strength [1], bias [C].
    """
    for one_pass in (fused.styled_act, styled.styled_act):
        found = one_pass(y, factor, noise, strength, bias, slope)
        if found is not None:
            return found
    y = y * factor
    if noise is not None:
        y.add_((noise * strength).to(y.dtype))
    return bias_act(y, bias, slope, gain=1)


def scaled_sum(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """(a + b) * scale, of one shape."""
    found = fused.scaled_sum(a, b, scale)
    return (a + b) * scale if found is None else found


def raised(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """x + wide in the dtype of wide; x [B, C, H, W], wide [1, 1, H, W]."""
    found = fused.raised(x, wide)
    return x.to(wide.dtype) + wide if found is None else found
