"""What lies between two convolutions of a network, as one pass over the activations where no gradient is asked for.

A CPU spends more time on reading and writing activations than on the convolutions between them. These passes are in C
(op/csrc/fused.c, compiled at first use), for bfloat16 and float32 in channels-last, and round once where PyTorch's
separate passes round each. The functions return None where they are not for here (gradients, traces, other dtypes,
devices and shapes, no compiler, --ops ref); the caller then does it with PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from op.build import load_or_warn
from op.cuda import is_ref, is_watched
from op.threads import spread

LANES = 32                      # channels in multiples of these: what the compiler works on at a time
FLAGS = {torch.bfloat16: (), torch.float32: ("-DFLOAT",)}
PIECE = 1 << 18                 # elements that are worth a thread
NHWC = torch.channels_last
Noise = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None       # as op.styled_act takes it
_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "bias_act": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT] * 2,
    "styled": [_POINTER] * 7 + [_COUNT] * 9 + [_FLOAT] * 2,
    "scaled_sum": [_POINTER] * 3 + [_COUNT, _FLOAT],
    "enlarged_beside": [_POINTER] * 4 + [_COUNT] * 5,
}


def bias_act(x: torch.Tensor, bias: torch.Tensor, slope: float, gain: float) -> torch.Tensor | None:
    """op.bias_act of x [B, C, H, W] and bias [C]."""
    if not _for_here(x, bias):
        return None
    _, channels, rows, columns = x.shape
    bias, out = (bias * gain).to(x.dtype), torch.empty_like(x)
    _spread(lambda first, last: _library(x.dtype).bias_act(
        _at(x, first), _at(bias), _at(out, first), (last - first) * rows * columns, channels, gain, slope), x)
    return out


def styled_act(y: torch.Tensor, factor: torch.Tensor, noise: Noise, strength: torch.Tensor, bias: torch.Tensor,
               slope: float, then: torch.Tensor | None) -> torch.Tensor | None:
    """op.styled_act."""
    channels, folded = len(bias), y.shape[1] != len(bias)
    more, noise = noise if isinstance(noise, tuple) else (None, noise)
    if channels % LANES or not _for_here(y, factor, noise, more, strength, bias, then):
        return None
    rows, columns = (side * 2 if folded else side for side in y.shape[2:])
    shape, each = (len(y), channels, rows, columns), (len(y), channels, 1, 1)
    if (folded and y.shape[1] != 4 * channels or bias.ndim != 1 or factor.shape != each
            or then is not None and then.shape != each):
        return None
    steps, more_steps = (0, 0), (0, 0)
    if more is not None:
        if noise is None or noise.shape != (1, 1, rows, columns) or more.shape != shape or more.dtype != y.dtype:
            return None
        if more.stride(1) != 1 or more.stride(2) != columns * more.stride(3):
            return None
        noise, steps, more_steps = noise.float().contiguous(), (0, 1), (more.stride(0), more.stride(3))
    elif noise is not None:
        if noise.shape[2:] != shape[2:] or len(noise) not in (1, len(y)) or noise.shape[1] not in (1, channels):
            return None
        noise = noise.float().contiguous(memory_format=NHWC)
        steps = (noise[0].numel() if len(noise) > 1 else 0, noise.shape[1])
    factor, bias, then = (None if t is None else t.to(y.dtype).contiguous() for t in (factor, bias, then))
    strength = float(strength)
    out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=NHWC)
    _spread(lambda first, last: _library(y.dtype).styled(
        _at(y, first), _at(factor, first), _at(noise, first if steps[0] else 0), _at(more, first), _at(bias),
        _at(then, first), _at(out, first), last - first, rows, columns, channels, folded, *steps, *more_steps, strength,
        slope), out)
    return out


def scaled_sum(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor | None:
    """op.scaled_sum."""
    if a.shape != b.shape or a.dtype != b.dtype or not (_for_here(a, b) and b.is_contiguous(memory_format=NHWC)):
        return None
    out = torch.empty_like(a)
    _spread(lambda first, last: _library(a.dtype).scaled_sum(
        _at(a, first), _at(b, first), _at(out, first), (last - first) * a[0].numel(), scale), a)
    return out


def enlarged_beside(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """op.enlarged_beside."""
    if not (_for_here(x, other) and _for_here(other)) or other.dtype != x.dtype:
        return None
    images, channels, rows, columns = x.shape
    others = other.shape[1]
    if other.shape != (images, others, 2 * rows, 2 * columns):
        return None
    out = torch.empty(images, channels + others, 2 * rows, 2 * columns, dtype=x.dtype, device=x.device,
                      memory_format=NHWC)

    def run(first: int, last: int) -> None:
        line = torch.empty(columns * channels, dtype=torch.float32, device=x.device)
        _library(x.dtype).enlarged_beside(_at(x, first), _at(other, first), _at(out, first), _at(line), last - first,
                                          rows, columns, channels, others)

    _spread(run, out)
    return out


def _for_here(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    tensors = [x, *(t for t in others if t is not None)]
    return (not is_watched() and x.dtype in FLAGS and all(t.is_cpu for t in tensors) and x.ndim == 4
            and x.shape[1] % LANES == 0 and x.numel() > 0 and x.is_contiguous(memory_format=NHWC)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            and not is_ref() and _library(x.dtype) is not None)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    library = load_or_warn("fused", "what lies between convolutions runs in PyTorch, slower", *FLAGS[dtype])
    if library is None:
        return None
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def _at(x: torch.Tensor | None, image: int = 0) -> int | None:
    return None if x is None else x.data_ptr() + image * x.stride(0) * x.element_size()


def _spread(run: Callable[[int, int], None], x: torch.Tensor) -> None:
    """run(first, last) over the images of x, in as many threads as PyTorch's."""
    threads = min(torch.get_num_threads(), len(x), max(1, x.numel() // PIECE))
    spread(lambda _, first, last: run(first, last), len(x), threads)
