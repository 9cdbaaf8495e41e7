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


class Draws:
    """A generator that draws the lower end of every range, or what lies `share` of the way up, and the voxel `at`."""

    def __init__(self, at, share=0.0):
        self.at, self.share = at, share

    def uniform(self, low, high, size=None):
        value = low + self.share * (high - low)
        return value if size is None else np.full(size, value)

    def choice(self, found):
        assert self.at in found
        return self.at


def box(hu=32.0):
    """A brain that is a box in bone, four voxels from the sides of every slice: voxel i lies (i - 3) * SIDE mm deep."""
    brain = np.zeros((len(MM), SIZE, SIZE), bool)
    brain[:, 4:-4, 4:-4] = True
    return pasted._Head(np.where(brain, hu, 1000).astype(np.float32), brain, MM, SIDE)


def at(head, *voxel):
    return np.ravel_multi_index(voxel, head.brain.shape)


def test_a_head_is_measured_in_mm_from_its_middle_and_below_its_vertex():
    made = box()
    assert made.voxel_ml == pytest.approx(0.08)                      # 4 x 4 x 5 mm
    ends = [(axis.ravel()[0], axis.ravel()[-1]) for axis in (made.z, made.y, made.x)]
    assert ends == [(-100, 0), (-126, 126), (-126, 126)]
    assert made.depth[8, 32, [3, 4, 5, 31]].tolist() == [0, 4, 8, 112]


def test_the_least_bleed_in_the_brain_has_2_ml_and_a_rim_of_a_quarter_of_its_radius():
    """In voxels of 1 mm: a ball of 2000 of them, and one of 2000 * 1.25^3 with the oedema about it."""
    brain = np.zeros((40, 80, 80), bool)
    brain[:, 2:-2, 2:-2] = True
    hu = np.full(brain.shape, 36, np.float32)
    hu[:, :, 40:] = 20
    made = pasted._Head(hu, brain, np.arange(40.0)[::-1], 1.0)
    share, change = pasted._intraparenchymal(made, Draws(at(made, 20, 40, 40)))
    blood = share & (change == 55)
    assert blood.sum() == pytest.approx(2000, rel=0.03) and share.sum() == pytest.approx(2000 * 1.25**3, rel=0.03)
    assert blood[20, 40, 33:48].all() and not blood[20, 40, [32, 48]].any()      # radius 7.8 mm
    assert set(change[share & ~blood & (hu == 36)]) == {32 - 8} and set(change[share & ~blood & (hu == 20)]) == {20 - 8}


def test_a_layer_thins_out_with_the_square_of_the_distance():
    """10 mm thick at voxel (8, 32, 4) of the skull, gone 40 mm away: at 28 mm it is 10 * (1 - 0.49) = 5.1 mm thick."""
    made = box()
    share, change = pasted._layer(made, Draws(at(made, 8, 32, 4)), 10.0, 40.0, 60.0)
    share &= made.brain
    assert share[8, 32, 4:8].tolist() == [True, True, False, False]                # depths of 4, 8, 12, 16 mm
    assert share[8, [32, 39, 41], 4].tolist() == [True, True, False]               # 36 mm away: 1.9 mm thick
    assert share[[8, 13, 15], 32, 4].tolist() == [True, True, False]               # 25 mm: 6.1; 35 mm: 2.3
    assert set(change[share]) == {60}


def test_a_layer_stays_on_its_side():
    """From 18 mm left of the middle it would reach 20 mm, to the other side, 7.5 mm thick."""
    made = box()
    share, _ = pasted._layer(made, Draws(at(made, 8, 4, 36)), 10.0, 40.0, 60.0)
    assert share[8, 4, 30:34].tolist() == [False, False, True, True] and not share[..., :32].any()


def test_blood_sinks_to_the_posterior_part_of_the_ventricles():
    """At the upper end of the draws it begins 20 mm before the middle, at y above 2 - 20, and ends 40 mm behind it."""
    made = box(pasted.CSF_HU)
    share, blood = pasted._intraventricular(made, Draws(at(made, 8, 32, 32), share=1.0))
    assert np.flatnonzero(share[8, :, 32]).tolist() == list(range(28, 42)) and set(share[8, 28:42, 32]) == {1}
    assert blood == 65
    share, _ = pasted._intraventricular(made, Draws(at(made, 8, 32, 32)))
    assert np.flatnonzero(share[8, :, 32]).tolist() == list(range(33, 42))


def test_an_infarct_lowers_tissue_and_not_csf():
    made = box()
    made.hu[..., ::2] = 8.0
    share, change = pasted._infarct(made, Draws(at(made, 8, 32, 44)))
    assert share[8, 32, 41:48].all() and not share[8, 32, [40, 48]].any()          # 15 mm about it
    assert set(change[share & (made.hu == 8)]) == {0} and set(change[share & (made.hu == 32)]) == {-6}


@pytest.mark.parametrize("voxels, room", [(6, False), (7, True)])
def test_a_lesion_has_half_a_ml_at_least(voxels, room, monkeypatch):
    """Of 0.08 ml each, 6 have 0.48 ml and 7 have 0.56."""
    monkeypatch.setitem(KINDS, "epidural", lambda head, rng: (np.ones(head.brain.shape), 60.0))
    hu, brain = np.full((len(MM), SIZE, SIZE), 32, np.float32), np.zeros((len(MM), SIZE, SIZE), bool)
    brain[8, 32, 20:20 + voxels] = True
    if room:
        changed, truth = paste(hu, brain, MM, "epidural", SIDE, np.random.default_rng(0))
        assert np.array_equal(truth, brain) and changed[truth] == pytest.approx(60)
    else:
        with pytest.raises(ValueError, match="no room for epidural in 20 draws"):
            paste(hu, brain, MM, "epidural", SIDE, np.random.default_rng(0))


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
