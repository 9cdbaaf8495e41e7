"""The fused passes give what PyTorch gives in float32, rounded once, and step aside where they are not for."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from op import bias_act, binomial_kernel, build, enlarged_beside, fused, scaled_sum, set_impl, styled_act, winograd
from op.build import BuildError
from op.layers import StyledConv
from op.modulated_conv import unfolded

NHWC = torch.channels_last


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if fused._library(torch.bfloat16) is None:
        pytest.skip("no C compiler")
    yield
    set_impl("auto")


def rand(*shape: int, seed: int = 0, dtype=torch.bfloat16) -> torch.Tensor:
    x = (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)).to(dtype)
    return x.contiguous(memory_format=NHWC) if len(shape) == 4 else x


def wider(x):
    """x in float32, tuples of tensors too."""
    if isinstance(x, tuple):
        return tuple(map(wider, x))
    return x.float() if isinstance(x, torch.Tensor) else x


def assert_rounded_once(op, *args, **kwargs) -> None:
    """op gives in bfloat16 what PyTorch gives in float32, to the last bit but where both are near the middle of two.

    And in float32 what PyTorch gives.
    """
    wide = [wider(x) for x in args], {name: wider(x) for name, x in kwargs.items()}
    found, found_wide = op(*args, **kwargs), op(*wide[0], **wide[1])
    set_impl("ref")
    expected = op(*wide[0], **wide[1])
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=NHWC)
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)
    assert (found == expected.bfloat16()).float().mean() > 0.98
    assert found_wide.dtype == torch.float32 and found_wide.is_contiguous(memory_format=NHWC)
    torch.testing.assert_close(found_wide, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def used(monkeypatch):
    """The names of the C functions that were called."""
    names, spread = [], fused._spread

    def watched(run, x):
        names.append(run.__qualname__.partition(".")[0])
        spread(run, x)

    monkeypatch.setattr(fused, "_spread", watched)
    return names


NOISE = {"none": None, "one map": (1, 1), "a map an image": (3, 1), "a channel each": (3, 64), "of all": (1, 64)}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then", [None, rand(3, 64, 1, 1, seed=4)], ids=["", "then"])
def test_a_styled_layer(noise, dtype, then, used):
    maps = NOISE[noise] and rand(*NOISE[noise], 7, 6, seed=2, dtype=dtype)
    strength, bias = torch.tensor([0.37]), rand(64, seed=3)
    assert_rounded_once(styled_act, rand(3, 64, 7, 6), rand(3, 64, 1, 1, seed=1), maps, strength, bias, then=then)
    assert used == 2 * ["styled_act"]


@pytest.mark.parametrize("half", [0, 1, None])
def test_two_noise_maps_that_add_up(half, used):
    """One of them may be some of the channels of another tensor."""
    found, own = rand(3, 64, 4, 5, seed=2), rand(1, 1, 4, 5, seed=5, dtype=torch.float32)
    found = rand(3, 32, 4, 5, seed=2) if half is None else found.chunk(2, dim=1)[half]
    assert_rounded_once(styled_act, rand(3, 32, 4, 5), rand(3, 32, 1, 1, seed=1), (found, own), torch.tensor([0.6]),
                        rand(32, seed=3))
    assert used == 2 * ["styled_act"]


def test_a_folded_layer(used):
    """What a folded convolution gives goes to where it belongs, each place with its own noise."""
    y, factor, bias = rand(2, 128, 3, 5), rand(2, 32, 1, 1, seed=1), rand(32, seed=3)
    noise = rand(2, 32, 6, 10, seed=2, dtype=torch.float32)
    found = styled_act(y, factor, noise, torch.ones(1), bias)
    assert torch.equal(found, styled_act(unfolded(y), factor, noise, torch.ones(1), bias))
    assert used == ["styled_act", "styled_act"]
    assert_rounded_once(styled_act, y, factor, noise, torch.ones(1), bias)


def test_noise_in_another_layout():
    maps = rand(2, 32, 5, 4, seed=2, dtype=torch.float32).contiguous()
    assert_rounded_once(styled_act, rand(2, 32, 5, 4), rand(2, 32, 1, 1), maps, torch.ones(1), torch.zeros(32))


@pytest.mark.parametrize("gain", [2**0.5, 1.0])
def test_bias_and_activation(gain, used):
    bias = (rand(32, seed=1) * 2**0.5).float() / 2**0.5                      # with its gain, a number of bfloat16
    assert_rounded_once(bias_act, rand(3, 32, 9, 5), bias if gain != 1 else rand(32, seed=1), gain=gain)
    assert used == 2 * ["bias_act"]


def test_a_scaled_sum(used):
    assert_rounded_once(scaled_sum, rand(2, 32, 4, 4), rand(2, 32, 4, 4, seed=1), 2**-0.5)
    assert used == 2 * ["scaled_sum"]


@pytest.mark.parametrize("shape", [(5, 3), (1, 1)])
def test_enlarged_beside_another(shape, used):
    rows, columns = shape
    assert_rounded_once(enlarged_beside, rand(2, 64, rows, columns), rand(2, 32, 2 * rows, 2 * columns, seed=1),
                        binomial_kernel(gain=4))
    assert used == 2 * ["enlarged_beside"]


def test_threads_share_the_images_out(monkeypatch):
    monkeypatch.setattr(fused, "PIECE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    maps, bias = rand(3, 32, 4, 4, seed=2, dtype=torch.float32), rand(32, seed=3)
    assert_rounded_once(styled_act, rand(3, 32, 4, 4), rand(3, 32, 1, 1, seed=1), maps, torch.ones(1), bias,
                        then=rand(3, 32, 1, 1, seed=4))
    assert_rounded_once(enlarged_beside, rand(3, 32, 4, 4), rand(3, 32, 8, 8, seed=1), binomial_kernel(gain=4))


def test_nan_and_infinity_stay():
    x = rand(1, 32, 2, 2)
    x[0, :3, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found = bias_act(x, torch.zeros(32))[0, :3, 0, 0]
    assert found[0].isnan() and found[1:].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("x", [
    rand(2, 32, 4, 4, dtype=torch.float64), rand(2, 33, 4, 4), rand(2, 32, 4, 4).contiguous(),
], ids=["float64", "33 channels", "NCHW"])
def test_what_is_not_for_here_is_left_to_pytorch(x, used):
    assert fused.bias_act(x, torch.zeros(x.shape[1]), 0.2, 1.0) is None and used == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        test_nan_and_infinity_stay()
        assert_rounded_once(styled_act, rand(3, 64, 7, 6), rand(3, 64, 1, 1, seed=1), rand(3, 1, 7, 6, seed=2),
                            torch.tensor([0.37]), rand(64, seed=3))
        set_impl("auto")
        assert_rounded_once(enlarged_beside, rand(2, 64, 5, 33), rand(2, 32, 10, 66, seed=1), binomial_kernel(gain=4))
    finally:
        torch.set_default_dtype(before)


def test_another_default_device_changes_nothing():
    y, factor, other, bias, strength = (rand(2, 32, 3, 4), rand(2, 32, 1, 1, seed=1), rand(2, 32, 6, 8, seed=2),
                                        rand(32, seed=3), torch.ones(1))

    def all_of_them():
        return [fused.styled_act(y, factor, None, strength, bias, 0.2, None), fused.enlarged_beside(y, other),
                fused.bias_act(y, bias, 0.2, 1.0), fused.scaled_sum(y, y, 0.5)]

    expected = all_of_them()
    try:
        torch.set_default_device("meta")
        found = all_of_them()
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, found, expected))


def test_factors_and_bias_of_another_dtype_or_layout(used):
    y, factor, then = rand(3, 64, 7, 6), rand(3, 64, 1, 1, seed=1), rand(3, 64, 1, 1, seed=4)
    strength, bias = torch.tensor([0.37]), rand(128, seed=3)[::2]
    expected = styled_act(y, factor, None, strength, bias.clone(), then=then)
    assert torch.equal(styled_act(y, factor, None, strength, bias, then=then), expected)
    wide = [styled_act(y, factor.float(), None, strength, bias.float(), then=then.float()),
            styled_act(y, factor.double(), None, strength.double(), bias.double(), then=then.double())]
    assert all(torch.equal(found, expected) for found in wide)
    assert len(used) == 4


def test_a_layer_under_autocast(monkeypatch, used):
    """PyTorch's convolution gives bfloat16 then, of what is modulated in float32."""
    monkeypatch.setattr(winograd, "VECTORS", ())
    torch.manual_seed(0)
    layer, x = StyledConv(32, 32, 16).requires_grad_(False), rand(2, 32, 5, 5, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        style = layer.style(torch.randn(2, 16))
        found = layer(x, style, None)
        set_impl("ref")
        expected = layer(x, style, None)
    assert found.dtype == torch.bfloat16 and used == ["styled_act"]
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02 * float(expected.abs().max()))


ODD = {
    "one factor for all images": {"factor": rand(1, 64, 1, 1)}, "a factor a pixel": {"factor": rand(3, 64, 7, 6)},
    "one that the next layer multiplies by": {"then": rand(1, 64, 1, 1)},
    "noise of a row": {"noise": rand(3, 1, 1, 6)}, "noise of no channels of its own": {"noise": rand(1, 7, 6)},
    "a bias for half": {"bias": rand(32)}, "a bias for each pixel": {"bias": rand(64, 42)},
    "one map of an encoder for all": {"noise": (rand(1, 64, 7, 6), rand(1, 1, 7, 6))},
    "a second map an image": {"noise": (rand(3, 64, 7, 6), rand(3, 1, 7, 6))},
    "noise of other images": {"noise": rand(2, 1, 7, 6)}, "noise of other channels": {"noise": rand(3, 32, 7, 6)},
    "maps of fewer channels": {"noise": (rand(3, 32, 7, 6), rand(1, 1, 7, 6))},
}


@pytest.mark.parametrize("odd", ODD)
def test_shapes_that_c_does_not_know_are_left_to_pytorch(odd, used):
    usual = {"y": rand(3, 64, 7, 6), "factor": rand(3, 64, 1, 1, seed=1), "noise": None, "strength": torch.ones(1),
             "bias": rand(64, seed=3), "slope": 0.2, "then": None}
    assert fused.styled_act(**usual) is not None
    assert fused.styled_act(**usual | ODD[odd]) is None and used == ["styled_act"]


def test_one_factor_for_all_images_is_pytorchs():
    y, factor = rand(3, 32, 4, 4, dtype=torch.float32), rand(1, 32, 1, 1, seed=1, dtype=torch.float32)
    found = styled_act(y, factor, None, torch.ones(1), torch.zeros(32))
    torch.testing.assert_close(found, torch.nn.functional.leaky_relu(y * factor, 0.2))


@pytest.mark.parametrize("other", [
    rand(2, 32, 8, 8, dtype=torch.float32), rand(1, 32, 8, 8), rand(2, 32, 8, 6), rand(2, 32, 4, 4),
], ids=["another dtype", "fewer images", "narrower", "not larger"])
def test_what_does_not_fit_beside_is_left_to_pytorch(other, used):
    assert fused.enlarged_beside(rand(2, 32, 4, 4), other) is None and used == []


def test_another_device_is_left_to_pytorch(used):
    """Its addresses are none that C could read."""
    y, factor, bias, strength = rand(2, 32, 4, 4), rand(2, 32, 1, 1), rand(32), torch.ones(1)
    away = {name: t.to("meta") for name, t in {"factor": factor, "bias": bias, "noise": rand(1, 1, 4, 4)}.items()}
    assert fused.bias_act(y, away["bias"], 0.2, 1.0) is None
    assert fused.bias_act(y.to("meta"), bias, 0.2, 1.0) is None
    assert fused.scaled_sum(y, y.to("meta"), 0.5) is None
    assert fused.enlarged_beside(y, rand(2, 32, 8, 8).to("meta")) is None
    usual = {"factor": factor, "noise": None, "strength": strength, "bias": bias, "slope": 0.2, "then": None}
    for name in away:
        assert fused.styled_act(y, **usual | {name: away[name]}) is None
    assert used == []


@pytest.mark.filterwarnings("ignore")                     # that torch.jit is deprecated
def test_a_trace_holds_what_pytorch_does():
    bias, other = rand(32, seed=1), rand(1, 32, 4, 4, seed=2)
    traced = torch.jit.trace(lambda x: bias_act(x, bias), (rand(1, 32, 4, 4),), check_trace=False)
    torch.testing.assert_close(traced(other), bias_act(other, bias), rtol=0.02, atol=0.02)
    assert fused.bias_act(other, bias, 0.2, 1.0) is not None


@pytest.mark.filterwarnings("ignore")                     # that torch.jit is deprecated
def test_a_tangent_comes_through():
    x, slope = (rand(1, 32, 4, 4, seed=seed, dtype=torch.float32) for seed in range(2))
    bias = torch.zeros(32)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(bias_act(forward_ad.make_dual(x, slope), bias, gain=1.0)).tangent
    torch.testing.assert_close(found, slope * torch.where(x > 0, 1.0, 0.2))


def test_gradients_flow_where_they_are_asked_for(used):
    x, bias = rand(1, 32, 2, 2).requires_grad_(), torch.zeros(32, requires_grad=True)
    scaled_sum(bias_act(x, bias), x, 0.5).float().sum().backward()
    assert x.grad is not None and bias.grad is not None and used == []
    with torch.no_grad():
        bias_act(x, bias)
    assert used == ["bias_act"]


def test_without_a_compiler_pytorch_does_it(monkeypatch):
    def fails(*_):
        raise BuildError("no C compiler")

    monkeypatch.setattr(build, "load_c", fails)
    monkeypatch.setattr(fused, "_library", fused._library.__wrapped__)
    with pytest.warns(UserWarning, match="runs in PyTorch, slower: no C compiler"):
        assert fused.bias_act(rand(1, 32, 2, 2), torch.zeros(32), 0.2, 1.0) is None
    monkeypatch.setattr(fused, "_library", lambda dtype: None)
    assert bias_act(rand(1, 32, 2, 2), torch.zeros(32)).shape == (1, 32, 2, 2)
