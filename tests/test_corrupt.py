"""What a network that restores healthy slices is trained against."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gan import corrupt


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
