"""Bias, leaky ReLU and gain in one call (Karras et al. 2020, 'Analyzing and improving ... StyleGAN', section A).

`ref` is plain PyTorch (one pass where op/fused.py can do it), `cuda` one pass over the tensor (op/csrc/bias_act.cu).
The output's sign tells which branch was taken, so that the derivative needs nothing else; it is linear in the gradient,
and its own derivative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from op import fused
from op.cuda import DTYPES, choose, launch, layout_of, register

SQRT2 = 2**0.5


def bias_act(
    x: torch.Tensor, bias: torch.Tensor | None = None, slope: float = 0.2, gain: float = SQRT2, impl: str = "auto"
) -> torch.Tensor:
    """gain * leaky_relu(x + bias). x [B, C, ...], bias [C] or None; keeps x's dtype; differentiable to any order.

    impl: 'auto', 'ref' or 'cuda' (op/cuda.py). Raises ValueError for a gain that isn't positive, a negative slope or
    a bias of another length.
    """
    if gain <= 0:
        raise ValueError(f"bias_act: gain must be positive, got {gain}")
    if slope < 0:
        raise ValueError(f"bias_act: slope must be at least 0, got {slope}")
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias_act: expected a bias of [{x.shape[1]}], got {list(bias.shape)}")
    if choose("bias_act", impl, x) == "ref":
        found = fused.bias_act(x, bias, slope, gain) if impl == "auto" and bias is not None else None
        return _bias_act_ref(x, bias, slope, gain) if found is None else found
    return _call(x, bias, None, slope, gain)


def bias_act_gradient(grad: torch.Tensor, output: torch.Tensor, slope: float = 0.2, gain: float = SQRT2):
    """The gradient of bias_act by x, from that by its output and the output; can be differentiated by `grad`."""
    return _call(grad, None, output, slope, gain)


def _bias_act_ref(x, bias, slope, gain):
    """Leaky ReLU is positively homogeneous, so the gain is folded into the addition: two passes, not three."""
    if bias is None:
        return F.leaky_relu(x * gain if gain != 1 else x, slope)
    bias = (bias * gain).to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
    return F.leaky_relu(torch.add(bias, x, alpha=gain), slope)


def _bias_act_cuda(x, bias, output, slope, gain):
    if x.dtype not in DTYPES:
        raise ValueError(f"bias_act: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    y = torch.empty_like(x)
    if bias is not None:
        bias = bias.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    if x.numel():
        inner = 1 if layout_of(x) == torch.channels_last else x[0, 0].numel()
        launch("bias_act", x, x, bias, output, y, DTYPES[x.dtype], x.numel(), x.shape[1], inner, float(slope),
               float(gain))
    return y


# ---- the op as torch knows it. With an `output` it is the derivative there, applied to x: its own derivative

def _bias_act(x, bias, output, slope, gain):
    layout = layout_of(x if output is None else output)
    x = x.contiguous(memory_format=layout)
    if x.is_cuda:
        return _bias_act_cuda(x, bias, output, slope, gain)
    if output is not None:
        return x * torch.where(output > 0, gain, gain * slope).to(x.dtype)
    y = _bias_act_ref(x, bias, slope, gain)
    return y.contiguous(memory_format=layout)


def _fake(x, bias, output, slope, gain):
    return torch.empty_like(x, memory_format=layout_of(x if output is None else output))


def _save(ctx, inputs, output):
    _, bias, given, *ctx.factors = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(output if given is None else given)


def _backward(call, ctx, grad):
    grad_x = call(grad, None, *ctx.saved_tensors, *ctx.factors)
    grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_bias = grad_x.sum([i for i in range(grad_x.ndim) if i != 1], dtype=ctx.bias_dtype)
    return grad_x, grad_bias, None, None, None


_SCHEMA = "bias_act(Tensor x, Tensor? bias, Tensor? output, float slope, float gain) -> Tensor"
_call = register(_SCHEMA, _bias_act, _fake, _save, _backward)
