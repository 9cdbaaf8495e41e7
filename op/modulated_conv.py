"""Modulated convolution with one shared-weight convolution for the whole batch.

The released form builds one weight per sample and runs a grouped convolution. Scaling the input channels by the
style and the output channels by the demodulation factor is the same function (Karras et al. 2020, eq. 1 and 3):
    w'_ijk = s_i w_ijk,   y_j = (w' * x)_j / sqrt(sum_ik w'_ijk^2 + 1e-8) = d_j (w * (s x))_j
and lets the batch share one large convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def modulated_conv2d(
    x: torch.Tensor, weight: torch.Tensor, style: torch.Tensor, demodulate: bool = True, upsample: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [B, I, H, W], weight [O, I, k, k], style [B, I] -> (y [B, O, H', W'], demodulation [B, O, 1, 1] or None).

    y is not yet demodulated: the caller folds the factor into its next pass. Padding k // 2; with `upsample` a
    transposed convolution of stride 2 without padding (H' = 2 H + k - 2), to be blurred by the caller. The factor
    is computed in float32 (float64 for a double weight) whatever x's dtype is.
    """
    factor = None
    if demodulate:
        wide = torch.promote_types(weight.dtype, torch.float32)
        energy = weight.to(wide).square().sum((2, 3))                         # (O, I)
        factor = torch.rsqrt(style.to(wide).square() @ energy.t() + 1e-8)     # (B, O)
        factor = factor[:, :, None, None].to(x.dtype)
    x = x * style[:, :, None, None].to(x.dtype)
    weight = weight.to(x.dtype)
    if upsample:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    else:
        y = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return y, factor


def modulated_conv2d_ref(x, weight, style, demodulate=True, upsample=False):
    """The published form, one weight a sample in a grouped convolution; demodulated. For tests and benchmarks."""
    b, i, h, w = x.shape
    o, _, k, _ = weight.shape
    per_sample = weight[None] * style[:, None, :, None, None]                 # (B, O, I, k, k)
    if demodulate:
        per_sample = per_sample * torch.rsqrt(per_sample.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, b * i, h, w)
    if upsample:
        y = F.conv_transpose2d(x, per_sample.transpose(1, 2).reshape(b * i, o, k, k), stride=2, groups=b)
    else:
        y = F.conv2d(x, per_sample.reshape(b * o, i, k, k), padding=k // 2, groups=b)
    return y.reshape(b, o, *y.shape[2:])
