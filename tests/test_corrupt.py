"""What a network that restores healthy slices is trained against."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gan import corrupt
from op.banded import gaussian_blur


@pytest.fixture
def slices():
    """Four slices of 64 pixels: a disc of brain at 30 HU with fluid at 8 HU in its middle."""
    y, x = np.ogrid[:64, :64]
    away = np.hypot(y - 32, x - 32)
    hu = np.where(away < 24, np.where(away < 6, 8.0, 30.0), 0.0).astype(np.float32)
    return torch.from_numpy(hu).repeat(4, 1, 1), torch.from_numpy(away < 24).repeat(4, 1, 1)


def test_shapes_change_the_brain_alone_and_say_where(slices):
    hu, brain = slices
    out, changed = corrupt.draw_shapes(hu, brain, 1.0, np.random.default_rng(0))
    assert all((one != two).any() for one, two in zip(out, hu))
    assert torch.equal(out[~brain], hu[~brain]) and not changed[~brain].any()
    assert torch.equal(out[changed == 0], hu[changed == 0])
    assert 0 <= changed.min() and changed.max() <= 1


def test_no_shape_at_probability_nought_nor_without_brain(slices):
    hu, brain = slices
    for p, where in ((0.0, brain), (1.0, torch.zeros_like(brain))):
        out, changed = corrupt.draw_shapes(hu, where, p, np.random.default_rng(0))
        assert torch.equal(out, hu) and not changed.any()


def test_shapes_hang_on_the_seed_and_leave_the_input_alone(slices):
    hu, brain = slices
    before = hu.clone()
    first, again, other = (corrupt.draw_shapes(hu, brain, 1.0, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(hu, before)


@pytest.mark.parametrize("kind", corrupt.KINDS)
def test_each_kind_draws_where_it_belongs(slices, kind, monkeypatch):
    hu, brain = slices
    monkeypatch.setattr(corrupt, "SHARES", tuple(float(one == kind) for one in corrupt.KINDS))
    monkeypatch.setattr(corrupt, "DARK_RIM", 0.0)
    rng, reached = np.random.default_rng(3), torch.zeros(64, 64)
    for _ in range(10):
        reached += corrupt.draw_shapes(hu, brain, 1.0, rng)[1].sum(0)
    if kind == "fluid":                          # only about the fluid in the middle
        y, x = np.ogrid[:64, :64]
        assert reached[32, 32] > 0 and not reached[torch.from_numpy(np.hypot(y - 32, x - 32) > 12)].any()
    if kind == "layer":                          # the rim far more than the middle
        assert reached[32, 9:12].sum() > 3 * reached[32, 31:34].sum()
    assert reached.any()


def test_shading_is_smooth_and_stays_in_the_brain(slices):
    hu, brain = slices
    shaded = corrupt.shade(hu, brain, 20.0, torch.Generator().manual_seed(0))
    noise = shaded - hu
    assert torch.equal(shaded[~brain], hu[~brain])
    inner = noise[:, 20:44, 20:44]
    assert inner.std() > 3 and inner.diff(dim=-1).abs().mean() < inner.abs().mean()
    assert torch.equal(corrupt.shade(hu, brain, 0.0, torch.Generator().manual_seed(0)), hu)


class Least:
    """A generator that draws the lower end of every range, the first of all places, and no falx."""

    def uniform(self, low, high):
        return low

    def integers(self, high):
        return 0

    def random(self):
        return 0.9


@pytest.fixture
def plain(monkeypatch):
    """Shapes as they are: distances in no direction stretched, edges even."""
    monkeypatch.setattr(corrupt, "_distance", lambda shape, at, rng: np.hypot(
        *(axis - place for axis, place in zip(np.ogrid[:shape[0], :shape[1]], at))))
    monkeypatch.setattr(corrupt, "_smooth_noise", lambda size, rng: np.zeros((size, size)))


def test_a_shape_is_drawn_in_part_and_its_rim_is_darker(monkeypatch):
    """60 HU in brain of 30 by a share of 0.6 to 1; 4 to 14 HU less in the rim; away from what the edges blur."""
    hu, brain = np.full((128, 128), 30, np.float32), np.ones((128, 128), bool)
    away = np.hypot(*(axis - 64 for axis in np.ogrid[:128, :128]))
    monkeypatch.setattr(corrupt, "_share_of", lambda *_: (away < 15, away < 40))
    monkeypatch.setattr(corrupt, "_filling", lambda *_: 60.0)
    middles, losses = [], []
    for seed in range(12):
        drawn, changed = corrupt._draw_one(hu, brain, hu, np.random.default_rng(seed))
        middle, rim, beyond = (drawn[where] for where in (away < 8, (away > 22) & (away < 32), away > 49))
        assert np.ptp(middle) < 1e-3 and np.ptp(rim) < 1e-3 and (beyond == 30).all()
        assert changed[away < 32] == pytest.approx(1) and not changed[away > 49].any()
        middles.append(middle[0] - 30)
        losses.append(30 - rim[0])
    assert 18 <= min(middles) < 22 and 26 < max(middles) < 30
    assert 4 <= min(losses) < 6 and 12 < max(losses) <= 14


def test_the_thinnest_layer_by_hand(plain):
    """1.2 pixels from the corner of a square on, to 10 away: thicker than the outermost pixel's depth of 1 as far as 4.

    1.2 * (1 - 0.4^2) = 1.008, and 1.2 * (1 - 0.5^2) = 0.9.
    """
    hu, brain = np.full((128, 128), 30, np.float32), np.zeros((128, 128), bool)
    brain[20:108, 20:108] = True
    share, rim = corrupt._share_of("layer", hu, brain, 1.0, Least())
    assert share[20, 20:25].all() and share[20:25, 20].all() and (share & brain).sum() == 9 and share is rim


@pytest.mark.parametrize("size", [128, 256])
def test_lengths_of_a_shape_scale_with_the_image(plain, size):
    """Fluid as far as 8 pixels of 128 from the corner: 8 pixels of its row and column, or 16 at 256."""
    share, _ = corrupt._share_of("fluid", np.zeros((size, size), np.float32), np.ones((size, size), bool), size / 128,
                                 Least())
    assert share[0].sum() == share[:, 0].sum() == size / 16 and share[0, 0] == 1


def test_the_share_of_fluid_is_all_at_10_hu_and_none_at_28(plain):
    hu, brain = np.array([[10.0, 19, 28, 5, 40]], np.float32), np.ones((1, 5), bool)
    share, _ = corrupt._share_of("fluid", hu, brain, 1.0, Least())
    assert share[0].tolist() == [1, 0.5, 0, 1, 0]


@pytest.mark.parametrize("angle, stretch, expected", [
    (0.7, 1.0, np.hypot), (0.0, 2.0, lambda y, x: np.hypot(y / 2, 2 * x)),
    (np.pi / 2, 2.0, lambda y, x: np.hypot(2 * y, x / 2)),
    (np.pi / 4, 2.0, lambda y, x: np.hypot((x + y) * 2, (y - x) / 2) / np.sqrt(2))])
def test_distances_are_stretched_in_one_direction(angle, stretch, expected):
    drawn = iter([angle, np.log(stretch)])
    found = corrupt._distance((9, 7), (5, 2), SimpleNamespace(uniform=lambda low, high: next(drawn)))
    y, x = np.ogrid[-5:4, -2:5]
    assert found == pytest.approx(expected(y, x))


def test_what_shares_pixels_with_bone_is_denser_beside_it(monkeypatch):
    """Of a scanner that does nothing else: by up to 60 HU times the blurred bone, in some slices."""
    for name, value in (("SHIFT_HU", 0.0), ("NOISE_HU", 0.0), ("GAIN", 0.0), ("SHADED", 1.0)):
        monkeypatch.setattr(corrupt, name, value)
    monkeypatch.setattr(corrupt, "_rim", lambda soft, unit, rng: torch.zeros(soft.shape))
    bone = torch.zeros(48, 128, 128, dtype=torch.bool)
    bone[..., :20] = True
    hu = torch.full(bone.shape, 30.0)
    added = corrupt.scanner(hu, ~bone, bone, torch.Generator().manual_seed(0)) - hu
    at_most = 60 * torch.stack([gaussian_blur(bone.float(), pixels) for pixels in corrupt.SHARED]).amax(0)
    assert (added <= at_most + 1e-4)[~bone].all() and not added[bone].any()
    beside = added[:, 64, 20]
    assert (beside >= 0).all() and 8 < (beside > 0).sum() < 30 and beside.max() > 10
    assert added[..., 27:].abs().max() < 1e-4                    # further than three times the widest Gaussian


def test_shapes_are_dark_as_well_as_bright():
    """In brain of 29 and 31 HU: half keep its texture, half of these darker; a third of the others is 0 to 22 HU."""
    hu, darker = 30 + (-1.0) ** np.indices((8, 8)).sum(0), {True: [], False: []}
    for seed in range(200):
        filling = corrupt._filling("blob", hu, hu, np.random.default_rng(seed))
        darker[np.ptp(filling - hu) < 1e-6].append(filling.mean() < 30)
    (own, of_own), (_, of_others) = ((len(one), np.mean(one)) for one in (darker[True], darker[False]))
    assert 60 < own < 140 and 0.3 < of_own < 0.7 and 0.15 < of_others < 0.55
