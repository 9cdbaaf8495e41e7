"""Upsample, filter, downsample: the resampling op of StyleGAN2 (Karras et al. 2020, appendix B).

Zeros are inserted (`up`), the image padded or cropped (`pad`), convolved with a small kernel and every `down`-th
sample kept. The gradient of the op is the op itself with `up` and `down` swapped and the kernel turned round, so
it is registered as one op that calls itself: any order of differentiation costs one filter a pass.

`ref` is plain PyTorch, `cuda` reads each pixel once from memory (op/csrc/upfirdn2d.cu): a register tile a thread
for the 4 x 4 kernels of the networks (up and down 1, up 2 or down 2), an output a thread for any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from op.cuda import DTYPES, choose, is_transformed, launch, layout_of, register


def binomial_kernel(taps=(1, 3, 3, 1), gain: float = 1.0) -> torch.Tensor:
    """The separable kernel taps x taps, normalised to sum `gain`: float32 [len, len]."""
    k = torch.as_tensor(taps, dtype=torch.float32)
    k = k[:, None] * k[None, :]
    return k * (gain / k.sum())


def upfirdn2d(
    x: torch.Tensor, kernel: torch.Tensor, up: int = 1, down: int = 1,
    pad: tuple[int, int] | tuple[int, ...] = (0, 0), impl: str = "auto",
) -> torch.Tensor:
    """x [B, C, H, W], kernel [kh, kw] -> [B, C, (H*up + pad - kh) // down + 1, ...]; keeps dtype and layout.

    pad: (before, after) for both axes, or (left, right, top, bottom); negative values crop. The kernel is
    convolved (not correlated) and carries no gradient. impl: 'auto', 'ref' or 'cuda' (op/cuda.py).
    """
    if kernel.ndim != 2:
        raise ValueError(f"upfirdn2d: kernel must be [kh, kw], got {tuple(kernel.shape)}")
    pad = tuple(pad) * 2 if len(pad) == 2 else tuple(pad)
    return _call(x, kernel, up, down, pad, False, choose("upfirdn2d", impl, x))


def _upfirdn2d_ref(x, kernel, up, down, pad):
    """Plain PyTorch: zero insertion, padding, one depthwise convolution."""
    b, c, h, w = x.shape
    if up > 1:
        if is_transformed():                                    # into which vmap may write
            spread = x.new_zeros(b, c, h * up, w * up)
        else:
            spread = torch.empty((b, c, h * up, w * up), dtype=x.dtype, device=x.device,
                                 memory_format=layout_of(x)).zero_()
        spread[:, :, ::up, ::up] = x
        x = spread
    left, right, top, bottom = pad
    even = left == right >= 0 and top == bottom >= 0            # then the convolution pads, without a copy
    if not even:
        x = F.pad(x, pad)
    weight = kernel.to(x.dtype).flip(0, 1).expand(c, 1, *kernel.shape)
    return F.conv2d(x, weight, stride=down, padding=(top, left) if even else 0, groups=c)


def _upfirdn2d_cuda(x, kernel, up, down, pad, correlate):
    if x.dtype not in DTYPES:
        raise ValueError(f"upfirdn2d: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    x, kernel = x.contiguous(memory_format=layout_of(x)), kernel.to(torch.promote_types(x.dtype, torch.float32))
    y = _empty_output(x, kernel, up, down, pad)
    b, c, *in_size = x.shape
    planes, inner = (b, c) if layout_of(x) == torch.channels_last else (b * c, 1)
    sizes = [planes, *in_size, *y.shape[2:], inner, *kernel.shape, up, down, pad[0], pad[2], int(correlate)]
    if y.numel():
        launch("upfirdn2d", x, x, kernel.contiguous(), y, DTYPES[x.dtype], sizes)
    return y


def _empty_output(x, kernel, up, down, pad):
    b, c, h, w = x.shape
    left, right, top, bottom = pad
    out_h, out_w = h * up + top + bottom - kernel.shape[0], w * up + left + right - kernel.shape[1]
    shape = b, c, out_h // down + 1, out_w // down + 1
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


# ---- the op as torch knows it. correlate: the kernel isn't turned round, as the gradient wants it

def _upfirdn2d(x, kernel, up, down, pad, correlate, impl):
    if impl == "cuda" and x.is_cuda:
        return _upfirdn2d_cuda(x, kernel, up, down, pad, correlate)
    y = _upfirdn2d_ref(x, kernel.flip(0, 1) if correlate else kernel, up, down, pad)
    return y.contiguous(memory_format=layout_of(x))


def _fake(x, kernel, up, down, pad, correlate, impl):
    return _empty_output(x, kernel, up, down, pad)


def _save(ctx, inputs, output):
    x, kernel, *ctx.args = inputs
    ctx.sizes = x.shape[2:], output.shape[2:]
    ctx.save_for_backward(kernel)


def _backward(call, ctx, grad):
    (kernel,) = ctx.saved_tensors
    up, down, (left, _, top, _), correlate, impl = ctx.args
    (h, w), (out_h, out_w) = ctx.sizes
    kh, kw = kernel.shape
    pad = (
        kw - left - 1, w * up - out_w * down + left - up + 1,
        kh - top - 1, h * up - out_h * down + top - up + 1,
    )
    return call(grad, kernel, down, up, pad, not correlate, impl), None, None, None, None, None, None


_SCHEMA = "upfirdn2d(Tensor x, Tensor kernel, int up, int down, SymInt[] pad, bool correlate, str impl) -> Tensor"
_call = register(_SCHEMA, _upfirdn2d, _fake, _save, _backward)
