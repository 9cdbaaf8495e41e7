from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import synthetic_head, synthetic_scan

from ct.brain import _is_canal, _resize, bone_threshold, brain_mask, estimate_pixel_mm
from ct.scan import Scan, ScanError

SPACING_MM = (8.0, 2.4, 2.4)


def head(**kwargs) -> tuple[Scan, np.ndarray]:
    """A synthetic head in thick slices (the tests are quicker), from 45 mm below the brain's centre upwards."""
    return synthetic_scan(slices=16, spacing_mm=SPACING_MM, **kwargs)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def grid_mm(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, y, x in mm as synthetic_head lays them out, brain centre at 0."""
    slices, height, width = shape
    z = (np.arange(slices) - (slices - 1)) * SPACING_MM[0] + 75.0
    y = (np.arange(height) - (height - 1) / 2) * SPACING_MM[1]
    x = (np.arange(width) - (width - 1) / 2) * SPACING_MM[2]
    return np.meshgrid(z, y, x, indexing="ij")


def edited(scan: Scan, hu: np.ndarray, **changes) -> Scan:
    return dataclasses.replace(scan, hu=hu.astype(np.float32), **changes)


def saturated(scan: Scan, low: float = -20.0, high: float = 100.0) -> Scan:
    """As a grey picture of the brain window gives it: clipped, and without pixel spacing."""
    return edited(scan, np.clip(scan.hu, low, high), saturation_hu=(low, high), pixel_spacing_mm=None)


def test_brain_of_a_synthetic_head_is_found():
    scan, truth = head()
    mask = brain_mask(scan)
    assert mask.dtype == bool and mask.shape == scan.hu.shape
    assert dice(mask, truth) > 0.95


def test_brain_of_a_head_in_oblong_pixels_is_found_in_square_ones(monkeypatch):
    """96 rows of 2 mm and 96 columns of 3.2 mm are worked on in pixels of 1 mm."""
    (scan, truth), shapes = synthetic_scan(slices=16, spacing_mm=(8.0, 2.0, 3.2)), []
    monkeypatch.setattr("ct.brain._resize", lambda image, shape: shapes.append(shape) or _resize(image, shape))
    assert dice(brain_mask(scan), truth) > 0.95 and shapes[0] == (192, 307)


@pytest.mark.parametrize("window, bone", [((-1024.0, 3071.0), 110), ((-20.0, 180.0), 110), ((-20.0, 100.0), 94)])
def test_bone_is_denser_than_blood_and_what_the_window_ends_is_bone(window, bone):
    """Acute blood reaches 90 HU; where a window ends below 116, its end less 6."""
    assert bone_threshold(saturated(Scan("one", np.zeros((1, 2, 2), np.float32), np.zeros(1), None), *window)) == bone


@pytest.mark.parametrize("window", [(-20.0, 100.0), (0.0, 80.0)])
def test_saturated_window_without_spacing_gives_the_same_brain(window):
    scan, truth = head()
    mask = brain_mask(saturated(scan, *window))
    assert dice(mask, truth) > 0.95
    assert dice(mask, brain_mask(scan)) > 0.97


@pytest.mark.parametrize("angle_deg, shift_mm", [(20, (0, 0)), (-35, (10, -12))])
def test_turned_and_shifted_heads(angle_deg, shift_mm):
    scan, truth = head(angle_deg=angle_deg, shift_mm=shift_mm)
    assert dice(brain_mask(saturated(scan)), truth) > 0.95


def test_head_holder_and_tube_stay_outside():
    scan, truth = head()
    z, y, x = grid_mm(scan.hu.shape)
    hu = scan.hu.copy()
    radius = np.hypot(y, x)
    hu[(radius > 98) & (radius < 104) & (y > 20)] = 900                       # holder behind the head
    hu[np.hypot(y - 60, x - 88) < 10] = 60                                    # a filled tube beside it
    mask = brain_mask(saturated(edited(scan, hu)))
    assert dice(mask, truth) > 0.95
    assert not (mask & ~truth & (radius > 85)).any()


def test_epidural_blood_on_the_inner_table_is_inside():
    scan, truth = head()
    z, y, x = grid_mm(scan.hu.shape)
    blood = truth & (np.hypot(y, x - 58) < 20) & (np.abs(z - 10) < 15)
    hu = np.where(blood, 75 + 0.2 * scan.hu, scan.hu)
    mask = brain_mask(saturated(edited(scan, hu)))
    assert mask[blood].mean() > 0.95


def test_calcification_and_air_are_filled_but_a_clinoid_is_not():
    scan, truth = head()
    z, y, x = grid_mm(scan.hu.shape)
    middle = np.abs(z - 10) < 8
    calcification, air = (np.hypot(y - 20, x) < 6) & middle, (np.hypot(y + 30, x - 20) < 6) & middle
    clinoid = (np.hypot(y, x) < 9) & (z < -5)
    floor = (z < -35) & (np.abs(x) < 9) & (y < 0)                             # joins it to the skull
    hu = np.where(calcification | ((clinoid | floor) & truth), 900, np.where(air, -1000, scan.hu))
    mask = brain_mask(edited(scan, hu))
    assert mask[calcification].all() and mask[air].all()
    assert mask[clinoid].mean() < 0.3


def test_csf_near_the_window_s_floor_is_no_fat():
    """Some scanners show the brain at 18 HU and wide CSF over it at -14, in a picture that ends at -20 HU."""
    scan, truth = head(noise=2.0)
    z, y, x = grid_mm(scan.hu.shape)
    rim = truth & ((y / 62) ** 2 + (x / 52) ** 2 + (z / 57) ** 2 > 1)
    hu = scan.hu - 14.0 * (scan.hu < 100)
    mask = brain_mask(saturated(edited(scan, np.where(rim, scan.hu - 44.0, hu))))
    assert dice(mask, truth) > 0.95
    assert mask[rim].mean() > 0.9


def test_air_under_the_vault_is_inside():
    scan, truth = head()
    z, y, x = grid_mm(scan.hu.shape)
    air = truth & (z > 30) & (y < -30)                                         # reaches the bone: no hole to fill
    mask = brain_mask(saturated(edited(scan, np.where(air, -1000, scan.hu))))
    assert mask[air].mean() > 0.9


def test_orbits_sinus_and_a_suture_gap():
    """Orbits open to the front and to the brain by a fissure, an air sinus between, a 6 mm gap in the vault."""
    scan, truth = head()
    z, y, x = grid_mm(scan.hu.shape)
    low = z < -15
    bone = low & (y < -20) & truth
    orbits = low & (np.hypot((y + 48) / 1.4, np.abs(x) - 28) < 13)
    globes = low & (np.hypot(y + 55, np.abs(x) - 28) < 10)
    sinus = low & (np.abs(x) < 8) & (y > -70) & (y < -40)
    fissure = low & (np.abs(np.abs(x) - 18) < 3) & (y > -36) & (y < -16)
    opening = low & (np.abs(np.abs(x) - 28) < 9) & (y < -48)
    gap = (z > 0) & (z < 40) & (np.abs(y) < 3) & (x > 40) & (scan.hu > 500)
    hu = scan.hu.copy()
    for where, value in ((bone, 900), (orbits, -90), (globes, 15), (sinus, -1000), (fissure, 30), (gap, 40)):
        hu[where] = value
    hu[opening & (scan.hu > 100)] = -90
    brain = truth & ~bone
    mask = brain_mask(saturated(edited(scan, hu)))
    assert dice(mask, brain) > 0.93
    assert mask[globes].mean() < 0.02 and mask[orbits].mean() < 0.05 and mask[sinus].mean() < 0.05
    scalp = (np.abs(scan.hu - 40) < 15) & ~truth
    assert not (mask & scalp).any()


def test_craniectomy_keeps_the_brain_and_bounds_it_by_the_hull_of_the_skull():
    scan, truth = head()
    z, y, x = grid_mm(scan.hu.shape)
    flap = (scan.hu > 500) & (z > 0) & (z < 40) & (np.abs(y) < 30) & (x > 0)
    mask = brain_mask(saturated(edited(scan, np.where(flap, 40, scan.hu))))
    assert dice(mask, truth) > 0.93
    assert mask[truth].mean() > 0.95
    assert not mask[(z > 0) & (z < 40) & (x > 72)].any()


def test_open_fontanelle_and_sutures_of_a_newborn():
    scan, truth = head()
    z, y, x = grid_mm(scan.hu.shape)
    suture = (scan.hu > 500) & (np.minimum(np.abs(x), np.abs(y)) < 16)        # 32 mm wide: wider than any seal
    scan = saturated(edited(scan, np.where(suture, 40, scan.hu)))
    assert estimate_pixel_mm(scan) == pytest.approx(estimate_pixel_mm(saturated(head()[0])), rel=0.03)
    mask = brain_mask(scan)
    assert mask[truth].mean() > 0.93
    assert dice(mask, truth) > 0.9


def test_spinal_canal_below_the_foramen_is_dropped():
    hu, truth = synthetic_head(slices=25, spacing_mm=SPACING_MM)
    z = (np.arange(25) - 24) * SPACING_MM[0] + 75.0
    y, x = np.meshgrid((np.arange(96) - 47.5) * 2.4, (np.arange(96) - 47.5) * 2.4, indexing="ij")
    for s in np.flatnonzero(z < -60):
        hu[s] = np.where(np.hypot(y, x) < 70, 50, -1000)
        hu[s][np.hypot(y - 30, x) < 28] = 900
        hu[s][np.hypot(y - 30, x) < 14] = 30
    mask = brain_mask(Scan("neck", hu, np.arange(25) * SPACING_MM[0], SPACING_MM[1:]))
    assert not mask[z < -60].any()
    assert dice(mask[z > -55], truth[z > -55]) > 0.93


def test_the_canal_is_dropped_beside_what_is_brain():
    """Below -20 mm all is bone but for a hole of 15 cm2 in front, and one of 6 cm2 behind."""
    scan, truth = head()
    z, y, x = grid_mm(scan.hu.shape)
    low, front, canal = z < -20, np.hypot(y + 25, x) < 22, np.hypot(y - 30, x) < 14
    mask = brain_mask(edited(scan, np.where(low & truth & ~front & ~canal, 900, scan.hu)))
    assert mask[low & front & truth].mean() > 0.9 and not mask[low & canal].any()


@pytest.mark.parametrize("row, column, side, found", [
    (20, 0, 20, True), (8, 0, 20, False), (-20, 0, 20, False), (20, 30, 20, False), (20, -30, 20, False),
    (20, 20, 20, True), (20, 0, 34, False)])
def test_the_canal_is_small_behind_the_middle_and_near_the_midline(row, column, side, found):
    """A square of so many mm a side, so far behind and beside the middle: 11 cm2, 10 mm and 25 mm are the limits."""
    part = np.zeros((128, 128), bool)
    part[64 + row - side // 2:64 + row + side // 2, 64 + column - side // 2:64 + column + side // 2] = True
    assert _is_canal(part, (63.5, 63.5)) == found


def test_the_highest_part_of_a_tilted_head_is_no_canal():
    """8 cm2 at 2 mm below the vertex, and with every slice upwards all lies a pixel of 2.4 mm further behind."""
    hu, truth = (np.stack([np.roll(image, k - 10, 0) for k, image in enumerate(volume)])
                 for volume in synthetic_head(slices=20, spacing_mm=(6.0, 2.4, 2.4)))
    mask = brain_mask(Scan("tilted", hu, np.arange(20) * 6.0, (2.4, 2.4)))
    assert 700 < truth[17].sum() * 2.4**2 < 900 and mask[17][truth[17]].mean() > 0.9


def test_a_given_mask_is_returned_as_it_is():
    scan, _ = head()
    given = np.zeros(scan.hu.shape, bool)
    given[3, 10:20, 10:20] = True
    assert brain_mask(dataclasses.replace(scan, brain=given)) is given


def test_pixel_size_is_estimated_from_the_head():
    scan, _ = synthetic_scan(slices=12, size=128, spacing_mm=(10.0, 1.8, 1.8))
    found = estimate_pixel_mm(saturated(scan))
    smaller_than_an_adult = np.sqrt(180 * 145 / (156 * 136))                  # the synthetic skull is 156 x 136 mm
    assert found == pytest.approx(1.8 * smaller_than_an_adult, rel=0.03)
    double = edited(scan, np.repeat(np.repeat(scan.hu, 2, 1), 2, 2))
    assert estimate_pixel_mm(double) == pytest.approx(found / 2, rel=0.03)


@pytest.mark.parametrize("value", [-1000.0, 40.0])
def test_no_head_is_an_error_that_says_what_was_expected(value):
    hu = np.full((6, 64, 64), value, np.float32)
    for spacing in (None, (2.4, 2.4)):
        with pytest.raises(ScanError, match=r"blank: no head found.*0\.\.80 HU.*skull"):
            brain_mask(Scan("blank", hu, np.arange(6) * 5.0, spacing))
