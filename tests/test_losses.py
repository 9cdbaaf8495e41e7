"""Losses by hand: softplus values, penalties of linear networks, and what the perceptual distances see."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torchvision.models import vgg16

from detect.perceptual import DiscriminatorPerceptual, build_perceptual, pixel_distance, prior_excess
from gan.losses import d_logistic, frozen, g_nonsaturating, in_domain, path_lengths, r1_penalty
from model import Discriminator, ModelConfig

TINY = ModelConfig(size=32, style_dim=8, channel_base=64, channel_multiplier=1, channel_max=8)


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_adversarial_losses_by_hand():
    logits = torch.tensor([[0.0], [math.log(3)]])                # softplus(-log 3) = log 4/3, softplus(log 3) = log 4
    assert g_nonsaturating(logits).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, abs=1e-6)
    expected = (math.log(2) + math.log(4 / 3)) / 2 + (math.log(2) + math.log(4)) / 2
    assert d_logistic(logits, logits).item() == pytest.approx(expected, abs=1e-6)
    sure = torch.tensor([[1000.0]])
    assert g_nonsaturating(-sure).item() == 1000 and d_logistic(sure, -sure).item() == 0      # no overflow


def test_r1_of_a_linear_discriminator_is_its_squared_norm():
    weight = rand(3, 4, 4).requires_grad_()
    images = rand(5, 3, 4, 4, seed=2).requires_grad_()
    penalty = r1_penalty((images * weight).sum((1, 2, 3)), images)
    torch.testing.assert_close(penalty, weight.square().sum())
    penalty.backward()                                           # what the discriminator learns from it
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_r1_averages_over_the_batch():
    images = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).requires_grad_()
    penalty = r1_penalty(images.square().sum((1, 2, 3)), images)                   # gradients 2 x: squares 4 and 16
    assert penalty.item() == pytest.approx(10)


def test_path_length_of_a_linear_generator():
    """Image = sum over layers of A_l w_l, so that the length is the rms over layers of |A_l^T y| / sqrt(H W)."""
    matrices, noise = rand(2, 3 * 4 * 4, 5), rand(6, 3, 4, 4, seed=2)
    w_plus = rand(6, 2, 5, seed=3).requires_grad_()
    images = torch.einsum("lpd, bld -> bp", matrices, w_plus).reshape(6, 3, 4, 4)
    pulled = torch.einsum("lpd, bp -> bld", matrices, noise.flatten(1) / 4)        # sqrt(H W) = 4
    expected = (pulled.square().sum((1, 2)) / 2).sqrt()
    torch.testing.assert_close(path_lengths(images, w_plus, noise), expected)


def test_path_lengths_can_be_differentiated():
    scale = torch.tensor(3.0, requires_grad=True)
    w_plus = rand(2, 1, 4).requires_grad_()
    images = (scale * w_plus).reshape(2, 1, 2, 2)
    noise = torch.ones(2, 1, 2, 2)                               # |scale y| = scale |(.5, .5, .5, .5)| = scale
    lengths = path_lengths(images, w_plus, noise)
    torch.testing.assert_close(lengths, torch.tensor([3.0, 3.0]))
    lengths.sum().backward()
    assert scale.grad.item() == pytest.approx(2)


def test_frozen_gives_the_input_a_gradient_and_the_network_none():
    net, x = torch.nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    with frozen(net):
        y = net(x)
    y.sum().backward()
    assert net.weight.grad is None and x.grad is not None
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(RuntimeError), frozen(net):
        raise RuntimeError
    assert all(p.requires_grad for p in net.parameters())


def test_in_domain_by_hand():
    assert in_domain(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]])).item() == 2.5


def test_prior_excess_counts_only_moves_away_from_the_mean():
    p_encoder = torch.tensor([[[1.0, 1.0, -1.0, -1.0, 0.0, 2.0]]])
    p = torch.tensor([[[3.0, 0.5, -2.0, 0.0, 0.5, -3.0]]]).requires_grad_()
    # away by 2, nearer, away by 1, nearer, away by 0.5, away through zero to the far side by 5
    loss = prior_excess(p, p_encoder)
    assert loss.item() == pytest.approx((4 + 0 + 1 + 0 + 0.25 + 25) / 6)
    loss.backward()
    torch.testing.assert_close(p.grad, torch.tensor([[[4.0, 0, -2, 0, 1, -10]]]) / 6)
    assert prior_excess(p_encoder, p_encoder).item() == 0


# ---- Perceptual distance

@pytest.fixture(scope="module")
def perceptual():
    torch.manual_seed(0)
    return build_perceptual("discriminator", Discriminator(TINY), pixels=5.0)


def test_perceptual_distance_is_zero_only_for_equal_images(perceptual):
    x, y = rand(2, 3, 32, 32), rand(2, 3, 32, 32, seed=2)
    distance = perceptual.distance(perceptual.features(x), perceptual.features(torch.cat([x[:1], y[1:]])))
    assert distance.shape == (2,)
    assert distance[0] == 0 and distance[1] > 0.1


def test_perceptual_gradient_goes_to_the_other_image_alone(perceptual):
    query, other = rand(1, 3, 32, 32).requires_grad_(), rand(1, 3, 32, 32, seed=2).requires_grad_()
    perceptual.distance(perceptual.features(query), perceptual.features(other)).sum().backward()
    assert query.grad is None and other.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in perceptual.parameters())


def test_perceptual_distance_by_hand():
    """Stages weigh alike: each squared difference is relative to the query's mean square there; the last is unused.
    The pixels' absolute difference comes on top."""

    class Stages(torch.nn.Module):
        def features(self, images):
            return [images, 10 * images, images / 0]

    perceptual = DiscriminatorPerceptual(Stages(), pixels=0.5)
    query, other = torch.full((1, 3, 2, 2), 2.0), torch.full((1, 3, 2, 2), 3.0)
    distance = perceptual.distance(perceptual.features(query), perceptual.features(other))
    torch.testing.assert_close(distance, torch.tensor([0.745]), atol=1e-4, rtol=0)  # (1/4 + 100/400) / 2 + 0.99/2


@pytest.fixture(scope="module")
def vgg_files(tmp_path_factory) -> tuple[Path, Path]:
    """Random weights of VGG16's convolutions and of LPIPS."""
    folder, rng = tmp_path_factory.mktemp("vgg"), torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in vgg16().state_dict().items()}
    state = {name: torch.randn(shape, generator=rng) * (2 / math.prod(shape[1:])) ** 0.5
             if name.startswith("features") else torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    torch.save(state, folder / "vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1, generator=rng)
                for i, channels in enumerate((64, 128, 256, 512, 512))}, folder / "lpips.pth")
    return folder / "vgg16.pth", folder / "lpips.pth"


def plain_lpips(vgg: dict, weights: dict | None, query: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Zhang et al. 2018, eq. 1, of VGG16 and as released (version 0.1), in double precision: [B]."""
    def stages(images):
        x = (images.double() - torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]).reshape(3, 1, 1)
        for number, convs in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
            x = torch.nn.functional.max_pool2d(x, 2) if number else x
            for conv in convs:
                weight, bias = (vgg[f"features.{conv}.{part}"].double() for part in ("weight", "bias"))
                x = torch.nn.functional.conv2d(x, weight, bias, padding=1).relu()
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    total = 0
    for i, (a, b) in enumerate(zip(stages(query), stages(other))):
        weight = 1 / a.shape[1] if weights is None else weights[f"lin{i}.model.1.weight"].double()
        total = total + ((a - b).square() * weight).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("weighted", [True, False])
def test_lpips_is_the_published_distance(vgg_files, weighted):
    perceptual = build_perceptual("lpips", None, 0.0, vgg16=vgg_files[0], lpips=vgg_files[1] if weighted else None)
    query, other = rand(2, 3, 32, 32), rand(2, 3, 32, 32, seed=2)
    ours = perceptual.distance(perceptual.features(query), perceptual.features(other))
    vgg, weights = (torch.load(path) for path in vgg_files)
    expected = plain_lpips(vgg, weights if weighted else None, query, other)
    torch.testing.assert_close(ours.double(), expected, atol=0, rtol=1e-4)
    assert perceptual.distance(*[perceptual.features(query)] * 2).abs().max() == 0


def test_lpips_looks_at_256_pixels(vgg_files):
    perceptual = build_perceptual("lpips", None, 0.0, vgg16=vgg_files[0])
    perceptual.net = perceptual.net[:4]                              # its first stage is enough
    images = rand(1, 3, 512, 512)
    (large,), (small,) = (perceptual.features(x) for x in (images, torch.nn.functional.avg_pool2d(images, 2)))
    assert large.shape == (1, 64, 256, 256)
    torch.testing.assert_close(large, small, atol=1e-5, rtol=0)


def test_files_that_hold_no_weights_name_their_flag(tmp_path):
    torch.save({"bias": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "hello.pth").write_text("hello")                      # a KeyError of the unpickler's
    with pytest.raises(ValueError, match="--vgg16 .*other.pth: not the state dict of torchvision's vgg16"):
        build_perceptual("lpips", None, 0.0, vgg16=tmp_path / "other.pth")
    for name in ("text.pth", "hello.pth"):
        with pytest.raises(ValueError, match=f"--vgg16 .*{name}: cannot be read as a state dict"):
            build_perceptual("lpips", None, 0.0, vgg16=tmp_path / name)


def test_linear_weights_of_another_network_are_refused(tmp_path):
    """LPIPS-AlexNet's, which have the same names."""
    with torch.device("meta"):
        state = vgg16().state_dict()
    torch.save({name: torch.zeros(1).expand(t.shape) for name, t in state.items()}, tmp_path / "vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": torch.ones(1, channels, 1, 1)
                for i, channels in enumerate((64, 192, 384, 256, 256))}, tmp_path / "alex.pth")
    with pytest.raises(ValueError, match=r"--lpips .*alex.pth: no lin1.model.1.weight of shape \[1, 128, 1, 1\], lin2"):
        build_perceptual("lpips", None, 0.0, vgg16=tmp_path / "vgg16.pth", lpips=tmp_path / "alex.pth")


def test_missing_weights_name_their_flag(tmp_path):
    with pytest.raises(ValueError, match="--vgg16 FILE.*found no flag"):
        build_perceptual("lpips", None, 0.0)
    with pytest.raises(ValueError, match="--vgg16 FILE.*found .*absent.pth"):
        build_perceptual("lpips", None, 0.0, vgg16=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="--perceptual must be one of discriminator, lpips, pixels, got 'vgg'"):
        build_perceptual("vgg", None, 0.0)


def test_pixel_distance_is_rounded_off_below_its_knee():
    query = torch.zeros(1, 3, 4, 4)
    at = [pixel_distance(query, torch.full((1, 3, 4, 4), d), knee=0.2).item() for d in (0.01, 0.02, 1.0)]
    assert at[1] / at[0] == pytest.approx(4, rel=0.02)                # a parabola below
    assert at[2] == pytest.approx((1 + 0.04) ** 0.5 - 0.2)            # the absolute value, shifted, above
    with pytest.raises(ValueError, match="--knee must be above 0"):
        build_perceptual("pixels", None, 0.0, knee=0.0)
