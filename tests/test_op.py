"""The resampling, activation and modulated convolution ops against their definitions, with both orders of gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from op import bias_act, binomial_kernel, modulated_conv2d, modulated_product, prepared, upfirdn2d
from op.layers import EqualLinear
from op.modulated_conv import modulated_conv2d_ref, unfolded

F64 = torch.float64


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# ---- upfirdn2d

def brute_force(x, kernel, up, down, pad):
    """Sample by sample: y[m] = sum_k kernel[k] z[m * down + K - 1 - k], z the padded, zero-stuffed x."""
    left, right, top, bottom = pad if len(pad) == 4 else (*pad, *pad)
    (b, c, h, w), (kh, kw) = x.shape, kernel.shape
    out_h, out_w = (h * up + top + bottom - kh) // down + 1, (w * up + left + right - kw) // down + 1
    y = torch.zeros(b, c, out_h, out_w, dtype=F64)
    for i in range(out_h):
        for j in range(out_w):
            for u in range(kh):
                for v in range(kw):
                    row, col = i * down + kh - 1 - u - top, j * down + kw - 1 - v - left
                    if row % up == 0 and col % up == 0 and 0 <= row // up < h and 0 <= col // up < w:
                        y[:, :, i, j] += kernel[u, v].double() * x[:, :, row // up, col // up].double()
    return y


RESAMPLINGS = [
    (1, 1, (0, 0)), (1, 1, (1, 2)), (2, 1, (2, 1)), (1, 2, (1, 1)), (2, 2, (3, 2)), (3, 2, (2, 4)),
    (2, 3, (1, 3, 2, 0)), (1, 1, (-1, 2)), (2, 1, (-1, -2, 3, -1)), (1, 2, (2, -1)),
]


@pytest.mark.parametrize("up, down, pad", RESAMPLINGS)
def test_upfirdn2d_is_its_definition(up, down, pad):
    x, kernel = rand(2, 3, 5, 7), rand(4, 3, seed=1)                       # not symmetric: a flip would show
    expected = brute_force(x, kernel, up, down, pad)
    torch.testing.assert_close(upfirdn2d(x, kernel, up, down, pad), expected, atol=1e-12, rtol=0)
    single = upfirdn2d(x.float(), kernel.float(), up, down, pad)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2)])
def test_upfirdn2d_takes_any_memory_layout(up, down):
    x, kernel = rand(2, 3, 6, 5), rand(3, 4, seed=1)
    expected = brute_force(x, kernel, up, down, (2, 2))
    last = x.contiguous(memory_format=torch.channels_last)
    y = upfirdn2d(last, kernel, up, down, (2, 2))
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    assert y.is_contiguous(memory_format=torch.channels_last)
    strided = torch.stack([x, x * 0], -1).flatten(3)[..., ::2]             # every second column of a wider tensor
    assert not strided.is_contiguous()
    torch.testing.assert_close(upfirdn2d(strided, kernel, up, down, (2, 2)), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("up, down, pad", RESAMPLINGS)
def test_upfirdn2d_gradients_of_both_orders(up, down, pad):
    x, kernel = rand(1, 2, 5, 6).requires_grad_(), rand(4, 3, seed=1)
    assert gradcheck(lambda t: upfirdn2d(t, kernel, up, down, pad), x)
    assert gradgradcheck(lambda t: upfirdn2d(t, kernel, up, down, pad) ** 2, x)


def test_binomial_kernel_by_hand():
    kernel = binomial_kernel(gain=4)
    torch.testing.assert_close(kernel[0], torch.tensor([1.0, 3, 3, 1]) / 16)
    torch.testing.assert_close(kernel[1], torch.tensor([3.0, 9, 9, 3]) / 16)
    assert kernel.sum() == 4


def test_upfirdn2d_refuses_a_one_dimensional_kernel():
    with pytest.raises(ValueError, match=r"kernel must be \[kh, kw\], got \(4,\)"):
        upfirdn2d(torch.zeros(1, 1, 4, 4), torch.ones(4))


# ---- bias_act

@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3, 5)])
def test_bias_act_is_its_definition(shape):
    x, bias = rand(*shape), rand(4, seed=1)
    column = bias.reshape(1, 4, *[1] * (len(shape) - 2))
    torch.testing.assert_close(bias_act(x, bias), F.leaky_relu(x + column, 0.2) * 2**0.5, atol=1e-12, rtol=0)
    torch.testing.assert_close(bias_act(x, bias, 0.1, 3.0), F.leaky_relu(x + column, 0.1) * 3, atol=1e-12, rtol=0)
    torch.testing.assert_close(bias_act(x), F.leaky_relu(x, 0.2) * 2**0.5, atol=1e-12, rtol=0)
    torch.testing.assert_close(bias_act(x, gain=1.0), F.leaky_relu(x, 0.2), atol=0, rtol=0)


def test_bias_act_by_hand_and_keeps_dtype_and_layout():
    y = bias_act(torch.tensor([[1.0, -3.0]]), torch.tensor([1.0, 1.0]), gain=2.0)
    torch.testing.assert_close(y, torch.tensor([[4.0, -0.8]]))
    x = rand(2, 3, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y = bias_act(x, torch.ones(3))
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="gain must be positive, got -1"):
        bias_act(x, gain=-1)


def test_bias_act_gradients_of_both_orders():
    x, bias = rand(2, 3, 2, 2).requires_grad_(), rand(3, seed=1).requires_grad_()
    assert (x + bias.reshape(1, 3, 1, 1)).abs().min() > 1e-3               # clear of the kink
    assert gradcheck(bias_act, (x, bias))
    assert gradgradcheck(lambda a, b: bias_act(a, b) ** 2, (x, bias))


# ---- modulated_conv2d

CONVS = [(kernel, demodulate, upsample) for kernel, upsample in ((3, False), (3, True), (1, False))
         for demodulate in (True, False)]


def complete(x, weight, style, demodulate, upsample):
    """modulated_conv2d with the factor that it leaves to its caller."""
    y, factor = modulated_conv2d(x, prepared(weight, x.dtype, demodulate), style, upsample)
    assert (factor is not None) == demodulate
    return y if factor is None else y * factor


@pytest.mark.parametrize("kernel, demodulate, upsample", CONVS)
def test_modulated_conv2d_equals_the_published_form_with_gradients(kernel, demodulate, upsample):
    inputs = [rand(3, 4, 5, 6, dtype=torch.float32), rand(2, 4, kernel, kernel, seed=1, dtype=torch.float32) / 4,
              1 + rand(3, 4, seed=2, dtype=torch.float32)]
    results = []
    for function in (complete, modulated_conv2d_ref):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = function(*leaves, demodulate, upsample)
        cotangent = rand(*y.shape, seed=3, dtype=torch.float32)
        first = torch.autograd.grad((y * cotangent).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((y, *first, *(g / 100 for g in second)))
    for ours, published in zip(*results):
        torch.testing.assert_close(ours, published, atol=1e-5, rtol=1e-5)
    height = 2 * 5 + 1 if upsample else 5
    assert results[0][0].shape[2] == height


@pytest.mark.parametrize("kernel, demodulate, upsample", CONVS)
def test_modulated_conv2d_gradients_of_both_orders_in_double(kernel, demodulate, upsample):
    leaves = [t.requires_grad_() for t in
              (rand(2, 2, 3, 3), rand(2, 2, kernel, kernel, seed=1), 1 + rand(2, 2, seed=2))]
    assert gradcheck(lambda *t: complete(*t, demodulate, upsample), leaves)
    assert gradgradcheck(lambda *t: complete(*t, demodulate, upsample), leaves)


def test_a_folded_weight_is_the_convolution_and_the_filter_after_it():
    x, weight, style, blur = (rand(2, 5, 6, 7), rand(4, 5, 3, 3, seed=1), 1 + rand(2, 5, seed=2),
                              binomial_kernel(gain=4))
    y, factor = modulated_conv2d(x, prepared(weight, F64), style, upsample=True)
    expected = upfirdn2d(y, blur, pad=(1, 1))
    y, same = modulated_conv2d(x, prepared(weight, F64, upsample=blur), style, upsample=True)
    assert y.shape == (2, 16, 6, 7)
    torch.testing.assert_close(unfolded(y), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(same, factor)


def test_what_is_modulated_already_is_not_modulated_again():
    x, weight, style = rand(2, 5, 6, 7), prepared(rand(4, 5, 3, 3, seed=1), F64), 1 + rand(2, 5, seed=2)
    expected, _ = modulated_conv2d(x, weight, style)
    found, _ = modulated_conv2d(x * style[:, :, None, None], weight, style, modulated=True)
    torch.testing.assert_close(found, expected)


def test_a_modulated_product_is_the_convolution_of_1_x_1():
    x, weight, style = rand(2, 5, 6, 7), rand(3, 5, seed=1), 1 + rand(2, 5, seed=2)
    expected, _ = modulated_conv2d(x, prepared(weight[:, :, None, None], F64, demodulate=False), style)
    torch.testing.assert_close(modulated_product(x, weight, style), expected)


def test_demodulated_filters_have_unit_norm():
    """Eq. 3 of the paper: an impulse of every input channel brings the demodulated filters out."""
    weight, style = rand(5, 4, 3, 3), 1 + rand(1, 4, seed=1)
    impulses = torch.zeros(4, 4, 5, 5, dtype=F64)
    impulses[torch.arange(4), torch.arange(4), 2, 2] = 1
    response = complete(impulses, weight, style.expand(4, -1), True, False)              # (I, O, 5, 5)
    torch.testing.assert_close(response.square().sum((0, 2, 3)), torch.ones(5, dtype=F64), atol=1e-6, rtol=0)


def test_the_factor_is_computed_in_full_precision():
    x, weight, style = rand(1, 4, 3, 3), rand(2, 4, 3, 3, seed=1), 1e4 * (1 + rand(1, 4, seed=2))
    _, factor = modulated_conv2d(x.half(), prepared(weight.float(), torch.half), style.float())  # squares overflow half
    _, exact = modulated_conv2d(x, prepared(weight, F64), style)
    assert factor.dtype == torch.float16 and factor.min() > 0
    torch.testing.assert_close(factor.double(), exact, atol=1e-7, rtol=1e-2)


# ---- what is kept of weights

def test_what_is_kept_is_forgotten_while_it_is_trained():
    """A fused optimiser changes a weight without counting its version up."""
    layer, x = EqualLinear(4, 3), rand(2, 4, dtype=torch.float32)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)

    def frozen():
        layer.requires_grad_(False)
        with torch.no_grad():
            return layer(x)

    frozen()
    layer.requires_grad_()
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)                                          # nor is anything kept in between
    optimiser.step()
    torch.testing.assert_close(frozen(), F.linear(x, layer.weight * layer.scale, layer.bias))
