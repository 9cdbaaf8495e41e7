"""The fused passes give what PyTorch's separate ones give, to the bit, and step aside where they are not for."""

from __future__ import annotations

import pytest
import torch

from op import bias_act, fused, raised, scaled_sum, set_impl, styled_act
from op.build import BuildError

NHWC = torch.channels_last


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if fused._library() is None:
        pytest.skip("no C compiler")
    yield
    set_impl("auto")


def rand(*shape: int, seed: int = 0, dtype=torch.bfloat16) -> torch.Tensor:
    x = (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    return x.contiguous(memory_format=NHWC) if len(shape) == 4 else x


def both(call) -> tuple[torch.Tensor, torch.Tensor]:
    """What call() gives, fused and by PyTorch alone."""
    found = call()
    set_impl("ref")
    return found, call()


def assert_same(call) -> None:
    found, expected = both(call)
    assert found.dtype == expected.dtype and found.is_contiguous(memory_format=NHWC)
    assert torch.equal(found, expected)


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
def test_a_styled_layer(noise, dtype, used):
    maps = NOISE[noise] and rand(*NOISE[noise], 7, 6, seed=2, dtype=dtype)
    strength, bias = torch.tensor([0.37]), rand(64, seed=3, dtype=torch.float32)
    assert_same(lambda: styled_act(rand(3, 64, 7, 6), rand(3, 64, 1, 1, seed=1), maps, strength, bias))
    assert used == ["styled_act"]


def test_noise_in_another_layout():
    maps = rand(2, 32, 5, 4, seed=2, dtype=torch.float32).contiguous()
    assert_same(lambda: styled_act(rand(2, 32, 5, 4), rand(2, 32, 1, 1), maps, torch.ones(1), torch.zeros(32)))


@pytest.mark.parametrize("gain", [2**0.5, 1.0])
def test_bias_and_activation(gain, used):
    assert_same(lambda: bias_act(rand(3, 32, 9, 5), rand(32, seed=1, dtype=torch.float32), gain=gain))
    assert used == ["bias_act"]


def test_a_scaled_sum(used):
    assert_same(lambda: scaled_sum(rand(2, 32, 4, 4), rand(2, 32, 4, 4, seed=1), 2**-0.5))
    assert used == ["scaled_sum"]


def test_some_of_the_channels_raised(used):
    half = rand(3, 64, 4, 5).chunk(2, dim=1)[1]
    assert_same(lambda: raised(half, rand(1, 1, 4, 5, seed=1, dtype=torch.float32)))
    assert used == ["raised"]


def test_threads_share_the_images_out(monkeypatch):
    monkeypatch.setattr(fused, "PIECE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    maps, bias = rand(3, 32, 4, 4, seed=2, dtype=torch.float32), rand(32, seed=3, dtype=torch.float32)
    assert_same(lambda: styled_act(rand(3, 32, 4, 4), rand(3, 32, 1, 1, seed=1), maps, torch.ones(1), bias))


def test_nan_and_infinity_stay():
    x = rand(1, 32, 2, 2)
    x[0, :3, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found = bias_act(x, torch.zeros(32))[0, :3, 0, 0]
    assert found[0].isnan() and found[1:].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("x", [
    rand(2, 32, 4, 4, dtype=torch.float32), rand(2, 33, 4, 4), rand(2, 32, 4, 4).contiguous(),
], ids=["float32", "33 channels", "NCHW"])
def test_what_is_not_for_here_is_left_to_pytorch(x, used):
    assert fused.bias_act(x, torch.zeros(x.shape[1]), 0.2, 1.0) is None and used == []


def test_gradients_flow_where_they_are_asked_for(used):
    x, bias = rand(1, 32, 2, 2).requires_grad_(), torch.zeros(32, requires_grad=True)
    scaled_sum(bias_act(x, bias), x, 0.5).float().sum().backward()
    assert x.grad is not None and bias.grad is not None and used == []
    with torch.no_grad():
        bias_act(x, bias)
    assert used == ["bias_act"]


def test_without_a_compiler_pytorch_does_it(monkeypatch):
    def fails(name):
        raise BuildError("no C compiler")

    monkeypatch.setattr(fused, "load_c", fails)
    monkeypatch.setattr(fused, "_library", fused._library.__wrapped__)
    assert fused.bias_act(rand(1, 32, 2, 2), torch.zeros(32), 0.2, 1.0) is None
    assert bias_act(rand(1, 32, 2, 2), torch.zeros(32)).shape == (1, 32, 2, 2)
