"""Convolution as PyTorch has it, but for what a CPU does better otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from op import winograd
from op.cuda import is_ref, is_watched


@dataclass(frozen=True)
class Ready:
    """A weight for conv2d."""

    weight: torch.Tensor                      # [O, I, k, k]
    tiles: torch.Tensor | None = None         # what winograd.transformed makes of it, where that is faster


def conv2d(x: torch.Tensor, weight: torch.Tensor | Ready, stride: int = 1, padding: int = 0) -> torch.Tensor:
    """F.conv2d of x [B, I, H, W] and weight [O, I, k, k].

    PyTorch takes the second derivative by the weight (of R1) for a convolution whose kernel is the size of the picture.
    oneDNN is slow at those, and of some shapes ends the process: 12 channels, 32 images of 64 x 64, bfloat16 with AMX
    divide by zero. For a kernel of 1 x 1 a product of matrices is the same function.
    """
    if isinstance(weight, Ready):
        if (weight.tiles is not None and stride == padding == 1 and x.is_cpu and not is_ref()
                and not is_watched() and not torch.is_autocast_enabled("cpu")):
            return winograd.conv3x3(x, weight.tiles)
        weight = weight.weight
    if (torch.is_grad_enabled() and stride == padding == 1 and x.is_cpu and x.dtype == weight.dtype
            and winograd.is_for(weight)):
        return winograd.conv2d(x, weight)
    twice = torch.is_grad_enabled() and x.requires_grad and weight.requires_grad
    if twice and x.device.type == "cpu" and weight.shape[2:] == (1, 1) and stride == 1 and not padding:
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, stride=stride, padding=padding)


def ready(weight: torch.Tensor, dtype: torch.dtype, plain: bool = True) -> Ready:
    """weight [O, I, k, k] in dtype; without gradients as convolutions else turn it each time, channels-last.

    With gradients the turned weight makes a transposed convolution slower, and it is made anew each time in any case.
    plain: for conv2d with stride 1 and padding 1, as far as the kernel is 3 x 3.
    """
    weight = weight.to(dtype)
    if torch.is_grad_enabled():
        return Ready(weight)
    return Ready(weight.contiguous(memory_format=torch.channels_last),
                 winograd.transformed(weight) if plain and winograd.is_for(weight) else None)
