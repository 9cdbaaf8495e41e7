"""op.styled_act on a GPU: one pass over the activations forward and one backward (op/csrc/styled_act.cu).

Apart they are a product, a sum and bias_act forward, and backward some six passes more: the derivative, two products
and the sums for factor, noise, strength and bias. For channels-last tensors of float32, float16 or bfloat16; sums are
formed in float32, and rounded once where the separate passes round each time.

A gradient that is to be differentiated again (path length) is composed of PyTorch's operations, which are.
"""

from __future__ import annotations

import torch

from op.bias_act import bias_act_gradient
from op.cuda import DTYPES, choose, is_watched, launch

NHWC = torch.channels_last
THREADS, PACKS, PIXELS = 256, 4096, 1024                              # as op/csrc/styled_act.h has them
PACK_BYTES = 16


def styled_act(y: torch.Tensor, factor: torch.Tensor, noise: torch.Tensor | None, strength: torch.Tensor,
               bias: torch.Tensor, slope: float) -> torch.Tensor | None:
    """op.styled_act, or None where it is not for here: the caller then does it with PyTorch."""
    if choose("styled_act", "auto", y) != "cuda" or is_watched() or not _fits(y):
        return None
    return StyledAct.apply(y, factor, noise, strength, bias, slope)


def _fits(y: torch.Tensor) -> bool:
    """Whether the kernel takes a tensor of this dtype, shape and layout."""
    if y.dtype not in DTYPES or y.dtype == torch.float64 or y.ndim != 4 or not y.numel():
        return False
    width = PACK_BYTES // y.element_size()
    return (y.is_contiguous(memory_format=NHWC) and y.data_ptr() % PACK_BYTES == 0 and y.shape[1] % width == 0
            and THREADS % (y.shape[1] // width) == 0 and y[0].numel() < 1 << 31)


class StyledAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, factor, noise, strength, bias, slope):
        out = torch.empty_like(y)
        _start(y, factor, noise, strength, slope, out, bias=bias)
        ctx.slope, ctx.bias_dtype = slope, bias.dtype
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, factor, noise, strength, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        y, factor, noise, strength, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _composed(ctx, grad, y, factor, noise, strength, out)
        return _fused(ctx, grad, y, factor, noise, strength, out)


def _composed(ctx, grad, y, factor, noise, strength, out):
    """The gradients by operations that can be differentiated again."""
    by_y, by_factor, by_noise, by_strength, by_bias, _ = ctx.needs_input_grad
    d = bias_act_gradient(grad, out, ctx.slope, gain=1)
    wide = d.float() if by_factor or by_noise or by_strength else None
    return (
        d * factor if by_y else None,
        (wide * y).sum((2, 3), keepdim=True).to(factor.dtype) if by_factor else None,
        (wide * strength).sum_to_size(noise.shape).to(noise.dtype) if by_noise else None,
        (wide * noise).sum().reshape(strength.shape) if by_strength and noise is not None else None,
        d.sum((0, 2, 3), dtype=ctx.bias_dtype) if by_bias else None,
        None,
    )


def _fused(ctx, grad, y, factor, noise, strength, out):
    _, by_factor, by_noise, by_strength, by_bias, _ = ctx.needs_input_grad
    grad = _aligned(grad, out.dtype, NHWC)
    images, channels, *side = out.shape
    packs, pixels = channels * out.element_size() // PACK_BYTES, side[0] * side[1]
    pieces = -(-pixels // min(PACKS // packs, PIXELS))                # blocks of an image

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=out.device)

    grad_y = torch.empty_like(out)
    grad_noise = empty(images, pixels, noise.shape[1]) if by_noise else None
    sums = empty(images, pieces, 2, channels) if by_factor or by_bias else None
    strengths = empty(images, pieces, packs) if by_strength and noise is not None else None
    _start(y, factor, noise, strength, ctx.slope, grad_y, output=out, grad=grad, grad_noise=grad_noise, sums=sums,
           strengths=strengths)
    if by_noise:
        grad_noise = grad_noise.reshape(images, *side, -1).permute(0, 3, 1, 2)
        grad_noise = grad_noise.sum_to_size(noise.shape).to(noise.dtype)
    return (
        grad_y,
        sums[:, :, 0].sum(1).reshape(factor.shape).to(factor.dtype) if by_factor else None,
        grad_noise,
        strengths.sum().reshape(strength.shape).to(strength.dtype) if strengths is not None else None,
        sums[:, :, 1].sum((0, 1)).to(ctx.bias_dtype) if by_bias else None,
        None,
    )


def _start(y, factor, noise, strength, slope, into, bias=None, output=None, grad=None, grad_noise=None, sums=None,
           strengths=None):
    """Starts the kernel: forward into the output, or, with `grad`, into the gradient by y."""
    images, channels, *side = into.shape
    steps = [0, 0]
    if noise is not None:
        noise = _aligned(noise, torch.float32, NHWC)
        steps = [noise[0].numel() if len(noise) > 1 else 0, noise.shape[1]]
    launch("styled_act", into, y, _aligned(factor, into.dtype), noise, strength.float(),
           None if bias is None else _aligned(bias, torch.float32), output, grad, into, grad_noise, sums, strengths,
           DTYPES[into.dtype], [images, side[0] * side[1], channels, *steps], float(slope))


def _aligned(x: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format):
    """x laid out so and where the kernel can read PACK_BYTES at once; a copy only where that takes one."""
    x = x.to(dtype).contiguous(memory_format=layout)
    return x.clone(memory_format=layout) if x.data_ptr() % PACK_BYTES else x
