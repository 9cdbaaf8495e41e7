"""HealthyGAN's networks against an independent building of the released ones, and its losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.weights import CheckpointError, load_strictly
from healthygan import losses
from healthygan.model import Discriminator, Generator, InstanceNorm2d, ModelConfig, Translation
from healthygan.weights import without_running_statistics


class PlainBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), released_norm(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), released_norm(channels))

    def forward(self, x):
        return x + self.main(x)


def released_norm(channels):
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


class PlainGenerator(nn.Module):
    """The released generator's layers, written out with torch.nn alone."""

    def __init__(self, width=64, blocks=6):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, width, 7, 1, 3, bias=False), released_norm(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), released_norm(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False), released_norm(4 * width), nn.ReLU(),
            *[PlainBlock(4 * width) for _ in range(blocks)],
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False), released_norm(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), released_norm(width), nn.ReLU(),
            nn.Conv2d(width, 4, 7, 1, 3, bias=False))


def plain_generator(width=64, blocks=6) -> PlainGenerator:
    """With random affine parameters and running statistics, so that each must be in its place, or unused."""
    torch.manual_seed(0)
    net = PlainGenerator(width, blocks)
    for layer in net.modules():
        if isinstance(layer, nn.InstanceNorm2d):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias, 0, 0.3)
            nn.init.normal_(layer.running_mean)
    return net.train()                                            # the released code infers in training mode


def test_generator_agrees_with_the_released_network():
    plain, ours = plain_generator(), Generator()
    load_strictly(ours, without_running_statistics(plain.state_dict()), "released")
    x = torch.rand(2, 3, 24, 32) * 2 - 1
    with torch.no_grad():
        z = plain.main(x)
        t, m, y = ours.eval()(x)
    torch.testing.assert_close(t, torch.tanh(z[:, :3]), atol=1e-5, rtol=0)
    torch.testing.assert_close(m, (torch.tanh(z[:, 3:]) + 1) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(y, m * t + (1 - m) * x, atol=1e-5, rtol=0)
    assert m.shape == (2, 1, 24, 32) and m.std() > 0.01


def test_critic_agrees_with_plain_layers():
    torch.manual_seed(0)
    ours = Discriminator(4, 3, 8)
    convs = [layer for layer in ours.main if hasattr(layer, "weight")]
    assert [conv.weight.shape[0] for conv in convs] == [4, 8, 8]
    x = torch.rand(2, 3, 32, 32)
    h = x
    for conv in convs:
        h = F.leaky_relu(F.conv2d(h, conv.weight, conv.bias, stride=2, padding=1), 0.01)
    torch.testing.assert_close(ours(x), F.conv2d(h, ours.conv1.weight, padding=1))


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in net.parameters()) for net in (Generator(), Discriminator())]
    assert counts == [8_417_984, 44_721_088]


def test_loading_stays_strict():
    state = without_running_statistics(plain_generator(8, 1).state_dict() | {"main.1.running_men": torch.zeros(8)})
    with pytest.raises(CheckpointError, match="main.1.running_men is not known"):
        load_strictly(Generator(8, 1), state, "released")
    del state["main.4.bias"]
    with pytest.raises(CheckpointError, match="main.4.bias is missing"):
        load_strictly(Generator(8, 1), state, "released")


def test_norm_in_bfloat16_uses_the_images_own_statistics():
    torch.manual_seed(0)
    x = (3 * torch.randn(3, 4, 8, 8) + torch.arange(3.0).reshape(3, 1, 1, 1)).to(torch.bfloat16)
    norm = InstanceNorm2d(4)
    expected = F.instance_norm(x.double()).float()
    got = norm(x.contiguous(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0)


def test_bfloat16_is_near_float32_and_gradients_reach_every_parameter():
    torch.manual_seed(0)
    net, x = Generator(8, 2), torch.rand(2, 3, 16, 16) * 2 - 1
    exact = net(x).y.detach()
    net.compute_dtype = torch.bfloat16
    y = net(x).y
    assert y.dtype == torch.float32 and (y - exact).abs().mean() < 0.01
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 3, 16, 18), (3, 16, 16)])
def test_generator_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\]"):
        Generator(4, 1)(torch.zeros(shape))


def test_a_critic_too_deep_for_the_images_is_refused():
    with pytest.raises(ValueError, match="at least 2.critic_layers = 64, got 32"):
        ModelConfig(size=32)


# ---------------------------------------------------------------------------------------------------------------
# Losses

def translation(t, m, x):
    t, m, x = (torch.as_tensor(v, dtype=torch.float32) for v in (t, m, x))
    return Translation(t, m, m * t + (1 - m) * x)


def test_wasserstein_rises_with_the_real_values():
    assert losses.wasserstein(torch.tensor([1.0, 4.0]), torch.tensor([0.5, -0.5])).item() == 2.5


def test_gradient_penalty_of_the_sum_of_a_map_of_values():
    # D = (x, 2 x) a pixel: the gradient of the sum is 3 in each of 12 entries, its norm sqrt(12 * 9)
    b, y = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    penalty = losses.gradient_penalty(lambda x: torch.cat([x, 2 * x], 1), b, y, torch.rand(2, 1, 1, 1))
    assert penalty.item() == pytest.approx((math.sqrt(108) - 1) ** 2, rel=1e-5)


def test_gradient_penalty_is_taken_between_the_two_images():
    # D = |x|^2 / 2: the gradient is the mixed image itself, share b + (1 - share) y = 0.25 * 2 + 0.75 * 0 = 0.5
    b, y = torch.full((1, 3, 2, 2), 2.0), torch.zeros(1, 3, 2, 2)
    scale = torch.ones((), requires_grad=True)
    penalty = losses.gradient_penalty(lambda x: scale * x.square() / 2, b, y, torch.full((1, 1, 1, 1), 0.25))
    norm = math.sqrt(12 * 0.25)
    assert penalty.item() == pytest.approx((norm - 1) ** 2)
    penalty.backward()                                            # double backward: d/ds (s norm - 1)^2 at s = 1
    assert scale.grad.item() == pytest.approx(2 * (norm - 1) * norm, rel=1e-5)


def test_identity_looks_at_the_raw_translation():
    b = torch.zeros(1, 3, 1, 2)
    assert losses.identity(b, translation([[[[0.5, -0.1]]] * 3], 0.0, b)).item() == pytest.approx(0.3)


def test_reconstruction_weighs_by_what_the_mask_leaves():
    # |a - t| (1 - m): 1 * 0.75 and 2 * 0
    a = torch.tensor([[[[1.0, 1.0]]] * 3])
    of_a = translation([[[[0.0, -1.0]]] * 3], [[[[0.25, 1.0]]]], a)
    assert losses.reconstruction(a, of_a).item() == pytest.approx(0.375)


@pytest.mark.parametrize("values, expected", [
    ([0.0, 0.0], 0.0),
    ([1.0, 1.0], 1.0),
    ([0.5, 0.5], 0.25 + 100 - 1 / 0.51),
    ([0.0, 0.5], 0.0625 + (1 / 0.51 + 100) / 2 - 1 / 0.51),
])
def test_focus_wants_a_small_and_decided_mask(values, expected):
    m = torch.tensor(values).reshape(2, 1, 1, 1)
    assert losses.focus(m).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    size = (sum(values) / 2) ** 2
    assert losses.focus(m, 0.5).item() == pytest.approx((size + expected) / 2, rel=1e-4, abs=1e-6)
    assert losses.focus(m, 0).item() == pytest.approx(size)
