"""op.conv2d is PyTorch's convolution to the second derivative, also where PyTorch's own ends the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from op import conv2d

R1 = """
import torch
from op import conv2d
x = torch.randn(32, 12, 64, 64).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
weight = torch.randn(8, 12, 1, 1).bfloat16().requires_grad_()
(slope,) = torch.autograd.grad(conv2d(x, weight).float().square().sum(), x, create_graph=True)
slope.float().square().sum().backward()
print(weight.grad.isfinite().all().item())
"""


def derivatives(convolve, kernel: int, stride: int, padding: int) -> list[torch.Tensor]:
    """The output, its gradient, and R1's gradient by the weight."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 6, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, kernel, kernel, generator=rng, dtype=torch.float64, requires_grad=True)
    y = convolve(x, weight, stride=stride, padding=padding)
    gradients = torch.autograd.grad(y.pow(3).sum(), (x, weight), create_graph=True)
    return [y, *gradients, *torch.autograd.grad(gradients[0].square().sum(), (x, weight))]


@pytest.mark.parametrize("kernel, stride, padding", [(1, 1, 0), (1, 2, 0), (1, 1, 1), (3, 1, 1), (3, 2, 0)])
def test_the_same_function_with_its_derivatives(kernel, stride, padding):
    for ours, theirs in zip(*(derivatives(f, kernel, stride, padding) for f in (conv2d, F.conv2d)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_r1_of_32_images_in_bfloat16_ends_well():
    """F.conv2d, on a processor with AMX, is killed by SIGFPE there."""
    done = subprocess.run([sys.executable, "-c", R1], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_layout_is_kept():
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = conv2d(x, torch.randn(5, 4, 1, 1, requires_grad=True))
    assert y.is_contiguous(memory_format=torch.channels_last)
