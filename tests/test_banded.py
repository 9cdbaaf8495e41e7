"""op/banded.py beside an ordinary convolution and a maximum filter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from op.banded import dilated, gaussian_blur


@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.5, 4.0, 30.0])
def test_gaussian_is_the_convolution_with_its_taps(sigma):
    x = torch.randn(2, 3, 17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    radius = max(1, round(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma).square())
    taps = taps / taps.sum()
    kernel = (taps[:, None] * taps)[None, None]
    expected = F.conv2d(x.reshape(-1, 1, 17, 24), kernel, padding=radius).reshape(x.shape)
    torch.testing.assert_close(gaussian_blur(x, sigma), expected, atol=1e-12, rtol=0)


def test_matrices_made_in_inference_mode_serve_gradients_later():
    x = torch.ones(1, 9, 11)
    with torch.inference_mode():
        expected = gaussian_blur(x, 1.7)
    x.requires_grad_()
    gaussian_blur(x, 1.7).sum().backward()
    torch.testing.assert_close(x.grad, expected)                          # symmetric


@pytest.mark.parametrize("width", [1, 3, 40])
def test_dilation_is_the_maximum_about_each_place(width):
    mask = torch.rand(3, 19, 26, generator=torch.Generator().manual_seed(0)) > 0.98
    around = F.max_pool2d(F.pad(mask.float(), 4 * [width])[:, None], 2 * width + 1, stride=1)
    assert torch.equal(dilated(mask, width), around[:, 0] > 0)
