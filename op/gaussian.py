"""Gaussian filter with zeros outside, separable; an ordinary convolution does it in every precision and on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gaussian_blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian of standard deviation sigma pixels over the last two axes of x [..., H, W]; zero outside."""
    radius = max(1, round(3 * sigma))
    t = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (t / sigma).square())
    kernel = kernel / kernel.sum()
    planes = x.reshape(-1, 1, *x.shape[-2:])
    planes = F.conv2d(planes, kernel.reshape(1, 1, -1, 1), padding=(radius, 0))
    return F.conv2d(planes, kernel.reshape(1, 1, 1, -1), padding=(0, radius)).reshape(x.shape)
