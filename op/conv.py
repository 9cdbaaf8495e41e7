"""Convolution as PyTorch has it, but for a kernel of 1 x 1 on a CPU whose gradient may be differentiated again."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def conv2d(x: torch.Tensor, weight: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
    """F.conv2d of x [B, I, H, W] and weight [O, I, k, k].

    PyTorch takes the second derivative by the weight (of R1) for a convolution whose kernel is the size of the picture.
    oneDNN is slow at those, and of some shapes ends the process: 12 channels, 32 images of 64 x 64, bfloat16 with AMX
    divide by zero. For a kernel of 1 x 1 a product of matrices is the same function.
    """
    twice = torch.is_grad_enabled() and x.requires_grad and weight.requires_grad
    if twice and x.device.type == "cpu" and weight.shape[2:] == (1, 1) and stride == 1 and not padding:
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, stride=stride, padding=padding)


def ready(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight [O, I, k, k] in dtype, without gradients turned to channels-last, as convolutions else do each time.

    With gradients the turned weight makes a transposed convolution slower, and it is made anew each time in any case.
    """
    weight = weight.to(dtype)
    return weight if torch.is_grad_enabled() else weight.contiguous(memory_format=torch.channels_last)
