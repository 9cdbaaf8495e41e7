"""gan/augment.py: every transform against hand-computed pixels, derivatives, and the adaptive probability."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ct import window
from gan.augment import AdaptiveAugment, AugmentSettings, augment, change_intensity, random_flip, warp

OFF = AugmentSettings(integer_shift=0, scale_std=0, rotation_std_deg=0, aniso_std=0, shift_std=0,
                      brightness_std_hu=0, contrast_std=0, noise_std_hu=0, cutout=0)


def rng(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heads(batch=4, size=16, dtype=torch.float32) -> torch.Tensor:
    """Random HU in -10..70 with a rim of air, encoded."""
    hu = torch.rand(batch, size, size, generator=rng(1), dtype=dtype) * 80 - 10
    hu[:, :2], hu[:, -2:], hu[:, :, :2], hu[:, :, -2:] = -1000, -1000, -1000, -1000
    return window.encode(hu)


def dot(row: int, column: int, height=6, width=8) -> torch.Tensor:
    """One bright pixel in air."""
    images = torch.full((1, 3, height, width), -1.0)
    images[:, :, row, column] = 1.0
    return images


def shift(x: float, y: float) -> torch.Tensor:
    return torch.tensor([[[1.0, 0, x], [0, 1, y], [0, 0, 1]]])


def test_p_zero_returns_the_images_themselves():
    images = heads()
    assert augment(images, 0.0, rng()) is images


def test_all_strengths_zero_leave_only_the_flip():
    images = heads(batch=64)
    out = augment(images, 1.0, rng(), OFF)
    flipped = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(out, images)]
    for image, result, flip in zip(images, out, flipped):
        torch.testing.assert_close(result, image.flip(-1) if flip else image, atol=1e-4, rtol=0)
    assert 20 <= sum(flipped) <= 44               # p / 2 of them: a flip of all would leak a mirrored anatomy


def test_random_flip():
    images = torch.arange(6.0).view(1, 1, 2, 3).repeat(40, 1, 1, 1)
    out = random_flip(images, rng())
    mirrored = torch.tensor([[[2.0, 1, 0], [5, 4, 3]]])
    flips = sum(torch.equal(image, mirrored) for image in out)
    assert flips + sum(torch.equal(image, images[0]) for image in out) == 40
    assert 10 <= flips <= 30
    assert random_flip(images[:, 0], rng()).shape == (40, 2, 3)


def test_warp_moves_a_dot_where_it_should():
    # 6 x 8 pixels: the centre lies between rows 2 and 3 and between columns 3 and 4.
    torch.testing.assert_close(warp(dot(1, 2), shift(2, 1)), dot(2, 4), atol=1e-5, rtol=0)
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])        # clockwise, as y points down
    # (row 1, column 2) is (x, y) = (-1.5, -1.5); a quarter turn takes it to (1.5, -1.5): row 1, column 5.
    torch.testing.assert_close(warp(dot(1, 2), quarter), dot(1, 5), atol=1e-5, rtol=0)
    double = torch.diag(torch.tensor([2.0, 2.0, 1.0]))[None]
    mass = warp(dot(5, 6, 12, 12), double)[0, 0] + 1                      # (-0.5, 0.5) goes to (-1, 1)
    rows, columns = torch.meshgrid(torch.arange(12) - 5.5, torch.arange(12) - 5.5, indexing="ij")
    assert (mass * columns).sum() / mass.sum() == pytest.approx(1, abs=1e-4)
    assert (mass * rows).sum() / mass.sum() == pytest.approx(-1, abs=1e-4)
    assert mass.sum() == pytest.approx(2 * 4, rel=0.1)                    # four times the area


def test_half_a_pixel_is_bicubic():
    # Keys' kernel with a = -0.75 at distances 0.5 and 1.5: 0.59375 and -0.09375.
    images = torch.zeros(1, 3, 9, 8)
    images[..., 4, 3] = 0.8
    images[..., 0, 0] = -1                                                # room for the negative lobes
    expected = 0.8 * torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])
    torch.testing.assert_close(warp(images, shift(0.5, 0))[0, 0, 4, 2:6], expected, atol=1e-5, rtol=0)


def test_overshoot_is_clamped_but_not_what_the_generator_overdid():
    half = torch.where(torch.arange(8) < 4, -1.0, 1.0).repeat(16, 3, 8, 1)
    real = augment(half, 1.0, rng())
    assert (real.min(), real.max()) == (-1, 1)
    generated = augment(half * 3, 1.0, rng(), replace(OFF, shift_std=0.05))
    assert (generated.min(), generated.max()) == (-3, 3)


def test_what_comes_in_is_air():
    out = warp(torch.ones(1, 3, 6, 8), shift(3, 0))
    torch.testing.assert_close(out[..., :3], torch.full((1, 3, 6, 3), -1.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[..., 3:], torch.ones(1, 3, 6, 5), atol=1e-5, rtol=0)


def test_strengths_are_as_set():
    # A dot at the centre of 64 x 64: the whole-pixel shift never leaves +-4 and reaches it.
    images = dot(32, 32, 64, 64).repeat(200, 1, 1, 1)
    out = augment(images, 1.0, rng(), replace(OFF, integer_shift=1 / 16))[:, 0].flatten(1)
    assert out.amax(1) == pytest.approx(torch.ones(200), abs=1e-3)
    row, column = out.argmax(1) // 64, out.argmax(1) % 64
    assert (row.min(), row.max()) == (28, 36)
    assert (column.min(), column.max()) == (27, 36)                       # the flip takes column 32 to 31
    # A dot far out on the x axis turns by N(0, 10 degrees).
    out = augment(dot(32, 60, 64, 64).repeat(400, 1, 1, 1), 1.0, rng(), replace(OFF, rotation_std_deg=10))
    mass = (out[:, 0] + 1).clamp(min=0)
    offset = torch.arange(64) - 31.5
    x, y = (mass.sum(1) * offset).sum(1), (mass.sum(2) * offset).sum(1)
    angle = torch.rad2deg(torch.atan(y / x))
    assert angle.std() == pytest.approx(10, rel=0.15)


def test_hu_changes_are_the_same_in_every_window():
    hu = torch.tensor([[[-1000.0, 3, 10, 35, 53, 78, 100, 500]]])
    out = change_intensity(window.encode(hu), torch.tensor([1.1]), torch.tensor([4.0]), torch.zeros(1))
    # 35 + 1.1 (HU - 35) + 4; air and bone are clipped in the source and stay.
    expected = torch.tensor([[[-20, 3.8, 11.5, 39, 58.8, 86.3, 110.5, 180]]])
    torch.testing.assert_close(window.decode(out), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(out, window.encode(expected), atol=1e-5, rtol=0)
    noise = torch.linspace(-3, 3, 8)
    out = change_intensity(window.encode(hu), torch.ones(1), torch.zeros(1), noise[None, None])
    torch.testing.assert_close(window.decode(out)[..., 1:7], (hu + noise)[..., 1:7], atol=1e-3, rtol=0)


def test_contradictions_of_a_generated_image_stay_in_sight():
    # If windows were refitted or clamped, the discriminator could not punish a generator that leaves [-1, 1].
    images = window.encode(torch.full((1, 1, 1), 35.0))
    wrong = images + torch.tensor([0.0, 0.3, 0.0]).view(1, 3, 1, 1)
    args = torch.tensor([1.2]), torch.tensor([-5.0]), torch.zeros(1)
    difference = change_intensity(wrong, *args) - change_intensity(images, *args)
    torch.testing.assert_close(difference.flatten(), torch.tensor([0.0, 0.3, 0.0]))
    far = torch.full((1, 3, 1, 1), -3.0, requires_grad=True)
    out = change_intensity(far, *args)
    assert (out == -3).all()
    assert torch.autograd.grad(out.sum(), far)[0].flatten().tolist() == [1, 1, 1]


def test_brightness_strength():
    images = window.encode(torch.full((400, 2, 2), 35.0))
    hu = window.decode(augment(images, 1.0, rng(), replace(OFF, brightness_std_hu=4)))
    assert (hu[:, 0, 0] - 35).std() == pytest.approx(4, rel=0.1)
    torch.testing.assert_close(hu[:, 0, 0], hu[:, 1, 1], atol=1e-2, rtol=0)


def test_cutout_is_a_square_of_air():
    out = augment(torch.full((50, 3, 16, 16), 0.5), 1.0, rng(), replace(OFF, cutout=0.5))
    hole = torch.isclose(out, torch.tensor(-1.0)).all(1)
    assert hole.sum((1, 2)).max() == 64 and hole.sum((1, 2)).min() >= 16       # 8 x 8, at a corner 4 x 4
    for mask in hole:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)


def test_each_transform_has_probability_p():
    out = augment(torch.full((2000, 3, 2, 2), 0.5), 0.3, rng(), replace(OFF, cutout=4))
    assert (out == -1).all((1, 2, 3)).float().mean() == pytest.approx(0.3, abs=0.03)


def test_twice_differentiable():
    cos, sin = math.cos(0.2), math.sin(0.2)
    forward = torch.tensor([[[cos, -sin, 0.3], [sin, cos, -0.2], [0, 0, 1]]]).repeat(2, 1, 1)
    gain, shift_hu = torch.tensor([1.1, 0.9]).double(), torch.tensor([3.0, -2.0]).double()

    def transform(x):
        return change_intensity(warp(x, forward), gain, shift_hu, torch.zeros(1)) ** 2

    images = (torch.rand(2, 3, 3, 4, generator=rng(), dtype=torch.float64) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(transform, images)
    assert torch.autograd.gradgradcheck(transform, images)


def test_r1_through_the_whole_chain():
    torch.manual_seed(0)
    critic = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(),
                                 torch.nn.Linear(4 * 14 * 14, 1))
    images = heads().requires_grad_()
    gradient, = torch.autograd.grad(critic(augment(images, 0.8, rng())).sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert critic[0].weight.grad.isfinite().all() and critic[0].weight.grad.abs().sum() > 0


def test_seeded():
    images = heads()
    a, b, c = (augment(images, 0.8, rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(augment(images, 0.8, g := rng(3)), augment(images, 0.8, g))


def test_type_and_memory_format_are_kept():
    images = heads()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = augment(images.to(dtype), 0.8, rng())
        assert out.dtype == dtype and out.shape == images.shape and out.is_contiguous()
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(out.float(), augment(images, 0.8, rng()), atol=tolerance, rtol=0)
    out = augment(images.to(memory_format=torch.channels_last), 0.8, rng())
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match="probability: expected 0 to 1, got 1.5"):
        augment(heads(), 1.5, rng())
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \[4, 1, 16, 16\]"):
        augment(heads()[:, :1], 0.5, rng())


def test_p_follows_r_t():
    ada = AdaptiveAugment(target=0.6, speed_kimg=0.1, interval=2, p_max=0.85)      # 100 images from 0 to 1
    sure, unsure = torch.full((10, 1), 2.0), torch.tensor([[1.0]] * 8 + [[-1.0]] * 2)
    ada.observe(sure)
    ada.step()
    assert ada.p == 0                                       # an interval is two steps
    ada.observe(sure)
    ada.step()
    assert ada.p == pytest.approx(0.2) and ada.r_t == 1     # 20 images of 100
    ada.observe(unsure)                                     # r_t = (8 - 2) / 10 = 0.6: on target
    ada.observe(-sure)
    ada.step()
    ada.step()
    assert ada.p == 0 and ada.r_t == pytest.approx(-0.2)    # down by 20 images
    for _ in range(20):
        ada.observe(sure)
        ada.step()
    assert ada.p == 0.85
    ada.step()
    with pytest.raises(ValueError, match="no real logits"):
        ada.step()


def test_on_target_p_stays():
    ada = AdaptiveAugment(target=0.5, interval=1)
    ada.p = 0.3
    ada.observe(torch.tensor([1.0, 1, 1, -1]))
    ada.step()
    assert ada.p == 0.3 and ada.r_t == 0.5


def test_all_ranks_together():
    other_rank = torch.tensor([-30.0, 30.0])                # 30 logits below zero elsewhere outvote ten here
    ada = AdaptiveAugment(speed_kimg=0.1, interval=1)
    ada.p = 0.8
    ada.observe(torch.ones(10))
    ada.step(lambda total: total + other_rank)
    assert ada.r_t == -0.5 and ada.p == pytest.approx(0.8 - 0.4)


def test_state_round_trip():
    one = AdaptiveAugment(speed_kimg=0.1, interval=4)
    for logit in (1.0, 1.0, 1.0, 1.0, 1.0, -1.0):
        one.observe(torch.full((5,), logit))
        one.step()
    two = AdaptiveAugment(speed_kimg=0.1, interval=4)
    two.load_state_dict(one.state_dict())
    assert two.state_dict() == one.state_dict() == {"p": 0.2, "r_t": 1.0, "steps": 2, "signs": [0.0, 10.0]}
    for ada in (one, two):
        ada.observe(torch.ones(10))
        ada.step()
        ada.step()
    assert one.p == two.p == pytest.approx(0.0) and two.r_t == 0.5


def test_adaptive_call_uses_p():
    ada, images = AdaptiveAugment(), heads()
    assert ada(images, rng()) is images
    ada.p = 0.5
    assert torch.equal(ada(images, rng()), augment(images, 0.5, rng()))
