"""op/winograd.py is the convolution that PyTorch has, and is used where it is faster."""

from __future__ import annotations

import platform

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from model import Encoder, Generator, ModelConfig
from op import build, set_impl, winograd
from op.build import BuildError
from op.conv import conv2d, ready
from op.layers import EqualConv2d

NHWC = torch.channels_last


@pytest.fixture(autouse=True)
def on_avx2(monkeypatch):
    """A CPU that it is for, whichever this is: the C is plain."""
    if winograd._library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with torch.no_grad():
        yield
    set_impl("auto")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    return numbers.contiguous(memory_format=NHWC)


@pytest.fixture
def used(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that conv3x3 was called with."""
    shapes, conv3x3 = [], winograd.conv3x3

    def watched(x, weight):
        shapes.append(tuple(x.shape))
        return conv3x3(x, weight)

    monkeypatch.setattr(winograd, "conv3x3", watched)
    return shapes


@pytest.fixture(params=["native", "narrow"])
def vectors(request, monkeypatch):
    """The library as this CPU has it, and as one with AVX2 has it."""
    if request.param == "narrow":
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("vectors are told by AVX512, which is x86's")
        monkeypatch.setattr(winograd, "FLAGS", (*winograd.FLAGS, "-mno-avx512f"))
        narrow = winograd._library.__wrapped__()
        monkeypatch.setattr(winograd, "_library", lambda: narrow)


SHAPES = pytest.mark.parametrize("images, into, out, rows, columns", [
    (1, 8, 16, 1, 1), (2, 8, 32, 4, 4), (1, 56, 32, 6, 5), (3, 24, 16, 5, 7), (1, 16, 48, 9, 3),
    (5, 40, 16, 12, 17), (2, 192, 192, 8, 8),
])


def assert_close(found: torch.Tensor, expected: torch.Tensor, share: float = 2e-5) -> None:
    assert found.shape == expected.shape and (found - expected).abs().max() < share * expected.abs().max()


@SHAPES
def test_the_same_as_pytorch(vectors, images, into, out, rows, columns):
    x, weight = rand(images, into, rows, columns), rand(out, into, 3, 3, seed=1)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    found = winograd.conv3x3(x, winograd.transformed(weight))
    assert found.is_contiguous(memory_format=NHWC) and found.dtype == torch.float32
    assert_close(found, expected)


@SHAPES
def test_the_gradient_by_the_weights(vectors, images, into, out, rows, columns):
    x, grad = rand(images, into, rows, columns), rand(images, out, rows, columns, seed=1)
    assert_close(winograd.weight_gradient(x, grad),
                 torch.nn.grad.conv2d_weight(x.double(), (out, into, 3, 3), grad.double(), padding=1))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_another_default_changes_nothing(default):
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        test_the_same_as_pytorch(None, 3, 24, 16, 5, 7)
        test_the_gradient_by_the_weights(None, 3, 24, 16, 5, 7)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def derivatives(conv, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """By x and weight, and the second ones as R1 (by x) and the path length (by an input) take them."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    first = torch.autograd.grad(conv(x, weight).pow(3).sum(), (x, weight), create_graph=True)
    return [*first, *torch.autograd.grad(sum(one.square().sum() for one in first), (x, weight))]


@torch.enable_grad()
def test_derivatives_of_first_and_second_order(monkeypatch):
    x, weight = rand(2, 16, 6, 5), 0.1 * rand(32, 16, 3, 3, seed=1)
    found = derivatives(lambda x, w: conv2d(x, w, padding=1), x, weight)
    expected = derivatives(lambda x, w: F.conv2d(x, w, padding=1), x.double(), weight.double())
    for one, other in zip(found, expected):
        assert_close(one, other, 1e-4)


@torch.enable_grad()
def test_where_gradients_are_taken():
    x, weight = rand(1, 16, 4, 4), rand(16, 16, 3, 3).requires_grad_()
    y = conv2d(x, weight, padding=1)
    assert type(y.grad_fn).__name__ == "_ConvolutionBackward"
    y.sum().backward()
    ones = torch.ones(1, 16, 4, 4).double()
    assert_close(weight.grad, torch.nn.grad.conv2d_weight(x.double(), (16, 16, 3, 3), ones, padding=1))
    y = conv2d(rand(1, 8, 4, 4).requires_grad_(), weight[:, :8], padding=1)               # not in PANELs the other way
    assert type(y.grad_fn).__name__ != "_ConvolutionBackward"


def test_a_kernel_of_one_place_moves_the_picture():
    weight = torch.zeros(16, 8, 3, 3)
    weight[3, 5, 0, 2] = 2.0                              # what lies above on the right, twice
    x = torch.arange(8 * 6 * 6.0).reshape(1, 8, 6, 6)
    found = winograd.conv3x3(x, winograd.transformed(weight))
    expected = torch.zeros(6, 6)
    expected[1:, :-1] = 2 * x[0, 5, :-1, 1:]
    torch.testing.assert_close(found[0, 3], expected, atol=1e-3, rtol=0)
    assert found[0, [0, 2, 4]].abs().max() < 1e-3


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_tiles(monkeypatch, threads):
    x, weight = rand(3, 8, 13, 10), winograd.transformed(rand(16, 8, 3, 3, seed=1))
    alone = winograd.conv3x3(x, weight)
    monkeypatch.setattr(winograd, "TILES", 1)
    monkeypatch.setattr(winograd, "BLOCK", 7)             # other tiles at a time, too
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(winograd.conv3x3(x, weight), alone)
    grad = rand(3, 16, 13, 10, seed=2)                    # here they add up in another order
    assert_close(winograd.weight_gradient(x, grad),
                 torch.nn.grad.conv2d_weight(x.double(), (16, 8, 3, 3), grad.double(), padding=1))


def test_nothing_else_is_written():
    y = winograd.conv3x3(rand(1, 8, 5, 5), winograd.transformed(rand(16, 8, 3, 3)))
    assert y.shape == (1, 16, 5, 5) and torch.isfinite(y).all()
    with pytest.raises(ValueError, match="expected float32 with 8 channels, got torch.float32"):
        winograd.conv3x3(rand(1, 16, 5, 5), winograd.transformed(rand(16, 8, 3, 3)))
    with pytest.raises(ValueError, match="got torch.float64"):
        winograd.conv3x3(rand(1, 8, 5, 5).double(), winograd.transformed(rand(16, 8, 3, 3)))


def test_few_threads_add_up_large_weights(monkeypatch):
    """Each has the sums of its own."""
    counts, spread = [], winograd._spread

    def watched(run, x, out, threads):
        counts.append(threads)
        spread(run, x, out, threads)

    monkeypatch.setattr(winograd, "_spread", watched)
    monkeypatch.setattr(winograd, "TILES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for floats in (3, 2, 0):
        monkeypatch.setattr(winograd, "SUMS", floats * winograd.PLACES * 8 * 16)
        test_the_gradient_by_the_weights(None, 3, 8, 16, 13, 10)
    assert counts == [3, 2, 1]


def test_other_devices(used):
    """Their addresses are none that C could read."""
    x, weight = rand(1, 16, 5, 5), rand(16, 16, 3, 3)
    away = x.to("meta")
    with pytest.raises(ValueError, match="conv3x3: expected tensors on the CPU, got them on meta and cpu"):
        winograd.conv3x3(away, winograd.transformed(weight))
    with pytest.raises(ValueError, match="weight_gradient: expected tensors on the CPU, got them on cpu and meta"):
        winograd.weight_gradient(x, away)
    used.clear()
    assert conv2d(away, ready(weight, torch.float32), padding=1).device.type == "meta"
    with torch.enable_grad():
        assert conv2d(away, weight.requires_grad_(), padding=1).device.type == "meta"
    assert used == []


@pytest.mark.filterwarnings("ignore")                     # that torch.jit is deprecated
def test_a_trace_holds_the_convolution():
    layer = EqualConv2d(16, 16, 3, padding=1).requires_grad_(False)
    weight, other = ready(rand(16, 16, 3, 3), torch.float32), rand(1, 16, 6, 6, seed=1)
    for run in (layer, lambda x: conv2d(x, weight, padding=1)):
        expected = run(other)                             # and what is made of the weight is kept
        traced = torch.jit.trace(run, (rand(1, 16, 6, 6),), check_trace=False)
        assert_close(traced(other), expected)


def test_a_tangent_comes_through():
    layer, slope = EqualConv2d(16, 16, 3, padding=1).requires_grad_(False), rand(1, 16, 6, 6, seed=1)
    expected = layer(slope)                               # it is linear
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(layer(forward_ad.make_dual(rand(1, 16, 6, 6), slope))).tangent, expected)


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_is_pytorchs(used, grad):
    """The weights' transform was rounded to bfloat16: 300 times the error, and in float32."""
    x, weight = rand(2, 16, 12, 12).requires_grad_(grad), rand(16, 16, 3, 3, seed=1).requires_grad_(grad)
    before = None if grad else ready(weight, torch.float32)
    with torch.set_grad_enabled(grad):
        outside = conv2d(x, weight, padding=1).square().sum()
        used.clear()
        with torch.autocast("cpu", torch.bfloat16):
            expected = torch.nn.functional.conv2d(x, weight, padding=1)
            within = [weight] if grad else [before, ready(weight, torch.float32)]
            for one in within:
                found = conv2d(x, one, padding=1)
                assert found.dtype == expected.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert used == []
    if grad:                                              # a backward pass within autocast, of a forward pass without
        whole = torch.autograd.grad(outside, (x, weight), retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(outside, (x, weight))
        assert all(map(torch.equal, found, whole))


def test_when_it_is_used(used, monkeypatch):
    x, weight = rand(2, 8, 6, 6), rand(16, 8, 3, 3)
    conv2d(x, ready(weight, torch.float32), padding=1)
    assert used == [(2, 8, 6, 6)]
    conv2d(x, ready(weight, torch.float32), stride=2, padding=1)
    conv2d(x, ready(weight, torch.float32, plain=False), padding=1)
    for other in (rand(16, 8, 1, 1), rand(8, 8, 3, 3), rand(16, 4, 3, 3), weight.bfloat16()):
        assert not winograd.is_for(other)
    set_impl("ref")
    conv2d(x, ready(weight, torch.float32), padding=1)
    set_impl("auto")
    for capability, times in (("DEFAULT", 1), ("AVX512", 2)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        conv2d(x, ready(weight, torch.float32), padding=1)
        assert len(used) == times


def test_a_layer_uses_it_for_each_part(used):
    layer = EqualConv2d(8, 32, 3, padding=1).requires_grad_(False)
    x = rand(1, 8, 4, 4)
    whole, parts = layer(x), layer.parts(x, 2)
    assert len(used) == 3
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_without_a_compiler_pytorch_does_it(monkeypatch):
    def none(*_):
        raise BuildError("none")

    monkeypatch.setattr(build, "load_c", none)
    monkeypatch.setattr(winograd, "_library", winograd._library.__wrapped__)
    with pytest.warns(UserWarning, match="run in PyTorch, slower: none"):
        assert not winograd.is_for(rand(16, 8, 3, 3))


def test_networks_draw_the_same(used, monkeypatch):
    """With what lies between the convolutions fused, too, and upsampling folded where the picture is large."""
    monkeypatch.setattr("op.modulated_conv.FOLD_TILES_FROM", 8)
    config = ModelConfig(size=32, style_dim=16, channel_base=512, channel_max=64, n_mlp=2, encoder_noise=True,
                         noise_channels=True, encoder_masks=True)
    torch.manual_seed(0)
    generator, encoder = Generator(config).eval(), Encoder(config).eval()
    for net in (generator, encoder):
        for parameter in net.parameters():
            parameter.requires_grad_(False)
    images, hidden = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 32, 32, dtype=torch.bool)
    hidden[:, 8:16, 8:16] = True
    seen = encoder.masked(images, hidden, torch.zeros_like(hidden))
    fast = encoder.redraw(seen, generator)
    count = len(used)
    assert count > 10
    set_impl("ref")                                       # also of weights that are kept, made for the tiles
    torch.testing.assert_close(fast, encoder.redraw(seen, generator), atol=1e-4, rtol=1e-4)
    assert len(used) == count


@torch.enable_grad()
def test_a_generator_learns_the_same(used):
    """Its gradients, and those of its gradient by the code."""
    torch.manual_seed(0)
    generator = Generator(ModelConfig(size=32, style_dim=16, channel_base=512, channel_max=64, n_mlp=2))
    code, names = torch.randn(2, generator.config.n_latent, 16, requires_grad=True), dict(generator.named_parameters())

    def gradients():
        image = generator.synthesis(code, generator.noise_maps("const"))
        slope, = torch.autograd.grad(image.square().sum(), code, create_graph=True)
        loss = image.pow(3).mean() + slope.square().mean()
        return torch.autograd.grad(loss, [*names.values()], allow_unused=True)

    fast = gradients()
    assert any(shape[1:] == (64, 8, 8) for shape in used)
    set_impl("ref")
    for name, one, other in zip(names, fast, gradients()):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-4 * float(other.abs().max()), rtol=1e-3, msg=name)
