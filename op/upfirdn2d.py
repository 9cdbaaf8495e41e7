"""Upsample, filter, downsample: the resampling op of StyleGAN2 (Karras et al. 2020, appendix B).

Zeros are inserted (`up`), the image padded or cropped (`pad`), convolved with a small kernel and every `down`-th
sample kept. The gradient of the op is the op itself with `up` and `down` swapped and the kernel turned round, so
it is written as one autograd function that calls itself: any order of differentiation costs one filter a pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def binomial_kernel(taps=(1, 3, 3, 1), gain: float = 1.0) -> torch.Tensor:
    """The separable kernel taps x taps, normalised to sum `gain`: float32 [len, len]."""
    k = torch.as_tensor(taps, dtype=torch.float32)
    k = k[:, None] * k[None, :]
    return k * (gain / k.sum())


def upfirdn2d(
    x: torch.Tensor, kernel: torch.Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] | tuple[int, ...] = (0, 0)
) -> torch.Tensor:
    """x [B, C, H, W], kernel [kh, kw] -> [B, C, (H*up + pad - kh) // down + 1, ...]; keeps dtype and layout.

    pad: (before, after) for both axes, or (left, right, top, bottom); negative values crop. The kernel is
    convolved (not correlated) and carries no gradient.
    """
    if kernel.ndim != 2:
        raise ValueError(f"upfirdn2d: kernel must be [kh, kw], got {tuple(kernel.shape)}")
    pad = tuple(pad) * 2 if len(pad) == 2 else tuple(pad)
    return _UpFirDn2d.apply(x, kernel, up, down, pad)


class _UpFirDn2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, up, down, pad):
        y = _upfirdn2d_ref(x, kernel, up, down, pad)
        ctx.save_for_backward(kernel)
        ctx.args = up, down, pad, x.shape, y.shape
        return y

    @staticmethod
    def backward(ctx, grad):
        (kernel,) = ctx.saved_tensors
        up, down, (left, _, top, _), (_, _, h, w), (_, _, out_h, out_w) = ctx.args
        kh, kw = kernel.shape
        pad = (
            kw - left - 1, w * up - out_w * down + left - up + 1,
            kh - top - 1, h * up - out_h * down + top - up + 1,
        )
        return _UpFirDn2d.apply(grad, kernel.flip(0, 1), down, up, pad), None, None, None, None


def _upfirdn2d_ref(x, kernel, up, down, pad):
    """Plain PyTorch: zero insertion, padding, one depthwise convolution."""
    b, c, h, w = x.shape
    if up > 1:
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        spread = torch.empty((b, c, h * up, w * up), dtype=x.dtype, device=x.device, memory_format=layout).zero_()
        spread[:, :, ::up, ::up] = x
        x = spread
    left, right, top, bottom = pad
    even = left == right >= 0 and top == bottom >= 0            # then the convolution pads, without a copy
    if not even:
        x = F.pad(x, pad)
    weight = kernel.to(x.dtype).flip(0, 1).expand(c, 1, *kernel.shape)
    return F.conv2d(x, weight, stride=down, padding=(top, left) if even else 0, groups=c)
