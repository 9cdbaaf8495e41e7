"""Pasted lesions: where they lie, how dense they are, and that the rest stays as it is."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import pasted
from benchmarks.pasted import KINDS, paste, paste_each, pixel_mm

SIZE, SIDE = 64, 4.0
MM = np.arange(100.0, -1, -5)


def head():
    """An ellipsoid of tissue of 32 HU with a ball of CSF of 8 HU in the middle and a rim of CSF; its brain mask."""
    z, y, x = np.meshgrid(MM - 60, *[(np.arange(SIZE) - SIZE / 2) * SIDE] * 2, indexing="ij")
    away = np.sqrt((z / 65) ** 2 + (y / 85) ** 2 + (x / 68) ** 2)
    hu = np.where((away > 0.93) | (np.sqrt(z**2 + y**2 + x**2) < 20), 8.0, 32.0).astype(np.float32)
    return hu, away < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_lesion_lies_in_the_brain_and_changes_nothing_else(kind):
    hu, brain = head()
    changed, truth = paste(hu, brain, MM, kind, SIDE, np.random.default_rng(3))
    assert truth.any() and not (truth & ~brain).any()
    assert np.array_equal(changed[~brain], hu[~brain])
    difference = (changed - hu)[truth].mean()
    assert difference < -3 if kind == "infarct" else 10 < difference < 80
    far = ~truth & ~np.roll(truth, 3, 1) & ~np.roll(truth, -3, 1) & ~np.roll(truth, 3, 2) & ~np.roll(truth, -3, 2)
    assert np.abs((changed - hu)[far]).mean() < 0.5


def test_subdurals_lie_at_the_skull_and_ventricular_blood_does_not():
    hu, brain = head()
    depth = np.stack([_depth(one) for one in brain]) * SIDE
    rim, middle = (paste(hu, brain, MM, kind, SIDE, np.random.default_rng(0))[1]
                   for kind in ("subdural", "intraventricular"))
    assert depth[rim].max() < 16 and depth[middle].min() > 20


def test_blood_under_the_skull_takes_the_soft_tissues_place_and_not_the_bones():
    """A rim that is half bone, (40 + 100) / 2 = 70 HU: with blood of 60 HU it becomes 80, and is no less dense."""
    hu, brain = head()
    rim = brain & (np.stack([_depth(one) for one in brain]) <= 1)
    hu[rim], hu[~brain] = 70.0, 100.0
    share, change = pasted._layer(pasted._Head(hu, brain, MM, SIDE), np.random.default_rng(7), 12.0, 60.0, 60.0)
    share &= brain
    assert (share & rim).any() and (share & ~rim).any()
    assert change[share & rim] == pytest.approx(80) and change[share & ~rim] == pytest.approx(60)


def test_the_same_seed_pastes_the_same_lesion():
    hu, brain = head()
    one, other = (paste(hu, brain, MM, "epidural", SIDE, np.random.default_rng(7))[0] for _ in range(2))
    assert np.array_equal(one, other)


def test_further_lesions_are_those_of_a_longer_list():
    hu, brain = head()
    three, left_out = paste_each("head", hu, brain, MM, SIDE, count=3)
    assert [one.kind for one in three] == [kind for kind in KINDS for _ in range(3)] and not left_out
    assert not any(np.array_equal(a.hu, b.hu) for i, a in enumerate(three) for b in three[:i])
    for first, count in ((1, 1), (2, 2), (3, 1)):
        some, _ = paste_each("head", hu, brain, MM, SIDE, count, first)
        expected = [one for i, one in enumerate(three) if first <= i % 3 + 1 < first + count]
        assert all(np.array_equal(a.hu, b.hu) and np.array_equal(a.truth, b.truth) for a, b in zip(some, expected))
        assert [one.kind for one in some] == [one.kind for one in expected]


def test_a_lesion_without_room_keeps_its_number(monkeypatch):
    """Lesions stand for what they drew; those in `full` find no room, having drawn."""
    full = set()

    def one_draw(hu, brain, mm, kind, side_mm, rng):
        drawn = int(rng.integers(10**9))
        if drawn in full:
            raise ValueError(f"no room for {kind}")
        return drawn, None

    def draws(count, first=1):
        found, left_out = paste_each("head", None, None, None, SIDE, count, first)
        return [one.hu for one in found], left_out

    monkeypatch.setattr(pasted, "paste", one_draw)
    three, _ = draws(3)
    seconds, thirds = three[1::3], three[2::3]
    full.update(seconds)
    told = [f"head: no room for {kind}" for kind in KINDS]
    assert draws(3) == ([drawn for drawn in three if drawn not in full], told)
    assert draws(2, first=2) == (thirds, told) and draws(1, first=2) == ([], told)
    assert draws(1, first=3) == (thirds, [])                       # of the second, nobody asked


def test_no_room_and_unknown_kinds_are_told():
    hu, brain = head()
    with pytest.raises(ValueError, match="kind must be one of intraparenchymal"):
        paste(hu, brain, MM, "tumour", SIDE, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no room for intraventricular"):
        paste(np.full_like(hu, 32), brain, MM, "intraventricular", SIDE, np.random.default_rng(0))


def test_pixels_are_those_of_a_usual_head():
    assert pixel_mm(128, 0.68) == pytest.approx(185 / 87.04)


def _depth(mask):
    from scipy import ndimage
    return ndimage.distance_transform_edt(mask)
