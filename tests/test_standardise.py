from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from ct.scan import Scan, ScanError
from ct.settings import PreprocessSettings
from ct.standardise import (
    Frame,
    StandardiseSettings,
    find_frame,
    from_frame,
    in_frame,
    standardise,
    to_frame,
    vertex_mm,
)
from tests.helpers import synthetic_scan

SETTINGS = StandardiseSettings(size=64)
HEAD = {"slices": 14, "size": 180, "spacing_mm": (10.0, 2.0, 2.0), "noise": 1.0}    # room for 30 pixels of shift


def _identity(size):
    return Frame(size, (size, size), (1.0, 1.0), ((size - 1) / 2,) * 2, 0.0, 1.0)


@pytest.fixture(scope="module")
def upright():
    scan, brain = synthetic_scan(**HEAD)
    return standardise(scan, brain, SETTINGS)


# ---- resampling


def test_identity_frame_changes_nothing():
    volume = np.random.default_rng(0).normal(size=(3, 9, 9)).astype(np.float32)
    np.testing.assert_allclose(to_frame(volume, _identity(9)), volume, atol=1e-5)
    np.testing.assert_allclose(from_frame(volume, _identity(9)), volume, atol=1e-5)


def test_quarter_turn_and_pixel_spacing_hand_computed():
    volume = np.arange(9, dtype=np.float32).reshape(1, 3, 3)
    turned = replace(_identity(3), angle_deg=90.0)              # the frame's row axis is the native column axis
    np.testing.assert_allclose(to_frame(volume, turned)[0], [[6, 3, 0], [7, 4, 1], [8, 5, 2]], atol=1e-5)
    # native pixels of 2 x 1 mm, frame pixels of 1 mm: rows lie half a native pixel apart
    wide = Frame(3, (3, 3), (2.0, 1.0), (2.0, 1.0), 0.0, 1.0)
    np.testing.assert_allclose(to_frame(volume, wide)[0], [[1.5, 2.5, 3.5], [3, 4, 5], [4.5, 5.5, 6.5]], atol=1e-5)


def test_downsampling_averages_instead_of_picking():
    """Stripes of which every fourth is 100: its middle lies where none of it is, and its mean is 25."""
    stripes = np.tile(np.array([0, 0, 0, 100], np.float32), 4)[None, None].repeat(16, axis=1)
    coarse = to_frame(stripes, Frame(4, (16, 16), (1.0, 1.0), (7.5, 7.5), 0.0, 4.0))
    np.testing.assert_allclose(coarse[0, 1:3, 1:3], 25, atol=0.1)


def test_outside_is_fill_and_bool_stays_bool():
    far = replace(_identity(8), centre=(40.0, 3.5))
    assert (to_frame(np.ones((1, 8, 8), np.float32), far, fill=-20) == -20).all()
    mask = to_frame(np.ones((1, 8, 8), bool), far)
    assert mask.dtype == bool and not mask.any()
    assert not from_frame(np.ones((1, 8, 8), np.float32), far).any()


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"to_frame: expected slices of \(8, 8\), got \(8, 9\)"):
        to_frame(np.zeros((1, 8, 9)), _identity(8))
    with pytest.raises(ValueError, match=r"from_frame: expected slices of \(8, 8\), got \(9, 8\)"):
        from_frame(np.zeros((1, 9, 8)), _identity(8))


def test_maps_return_to_native_pixels():
    """A spot drawn in native pixels keeps its place and its HU there and back."""
    scan, brain = synthetic_scan(**HEAD, angle_deg=15, shift_mm=(40, -30))
    frame = find_frame(scan, brain, replace(SETTINGS, size=128))
    row, column = np.mgrid[:180, :180]
    spot = 50 * np.exp(-((row - 105) ** 2 + (column - 85) ** 2) / 50)[None].astype(np.float32)
    np.testing.assert_allclose(from_frame(to_frame(spot, frame), frame), spot, atol=2)
    there_and_back = from_frame(to_frame(brain, frame), frame)
    assert (there_and_back & brain).sum() / (there_and_back | brain).sum() > 0.97


# ---- the frame


@pytest.mark.parametrize("angle_deg, shift_mm", [(15, (60, 0)), (-15, (0, 60)), (15, (-60, -60)), (40, (0, 0))])
def test_shift_by_30_pixels_and_turn_stays_under_3_hu(upright, angle_deg, shift_mm):
    scan, brain = synthetic_scan(**HEAD, angle_deg=angle_deg, shift_mm=shift_mm)
    moved = standardise(scan, brain, SETTINGS)
    assert np.abs(moved.hu - upright.hu)[upright.brain].mean() < 3
    assert moved.frame.angle_deg == pytest.approx(angle_deg, abs=1)
    np.testing.assert_allclose(moved.below_vertex_mm, upright.below_vertex_mm, atol=0.5)


def test_head_is_centred_upright_and_of_fixed_size(upright):
    larger, larger_brain = synthetic_scan(slices=14, size=128, noise=1.0, spacing_mm=(10.0, 1.8, 1.8))
    unscaled = standardise(replace(larger, pixel_spacing_mm=None), larger_brain, SETTINGS)
    assert np.abs(unscaled.hu - upright.hu)[upright.brain].mean() < 3
    rows, columns = np.nonzero(upright.brain.any(axis=0))
    assert columns.mean() == pytest.approx(31.5, abs=0.5) and rows.mean() == pytest.approx(31.5, abs=1.5)
    assert np.ptp(rows) + 1 == pytest.approx(0.72 * 64, abs=3)


def test_unknown_and_anisotropic_spacing(upright):
    scan, brain = synthetic_scan(slices=14, size=128, noise=1.0, spacing_mm=(10.0, 2.2, 3.0))
    out = standardise(scan, brain, SETTINGS)
    assert np.abs(out.hu - upright.hu)[upright.brain].mean() < 3
    scan, brain = synthetic_scan(**HEAD)
    unknown = standardise(replace(scan, pixel_spacing_mm=None), brain, SETTINGS)
    np.testing.assert_allclose(unknown.hu, upright.hu, atol=0.1)


def test_one_sided_bleed_does_not_turn_the_head():
    plain = find_frame(*synthetic_scan(**HEAD, angle_deg=8), SETTINGS)
    bleed = find_frame(*synthetic_scan(**HEAD, angle_deg=8, lesion=(0, 20, 35, 30, 75)), SETTINGS)
    assert bleed.angle_deg == pytest.approx(plain.angle_deg, abs=1)
    np.testing.assert_allclose(bleed.centre, plain.centre, atol=1.5)                        # mm


def test_one_sided_mask_loss_does_not_turn_the_head():
    """The ellipse axes of a mask that lost a frontal quarter lie 5 degrees off; symmetry holds."""
    scan, brain = synthetic_scan(**HEAD, angle_deg=8)
    cut = brain.copy()
    cut[:, :66, 108:] = False
    assert find_frame(scan, cut, SETTINGS).angle_deg == pytest.approx(8, abs=1.5)


def test_frame_and_settings_are_json(upright):
    again = Frame(**json.loads(json.dumps(asdict(upright.frame))))
    np.testing.assert_array_equal(from_frame(upright.hu, again), from_frame(upright.hu, upright.frame))
    assert StandardiseSettings(**json.loads(json.dumps(asdict(SETTINGS)))).size == 64


def test_empty_and_misfitting_masks_are_refused():
    scan, brain = synthetic_scan(slices=8, size=32, spacing_mm=(15.0, 7.0, 7.0))
    with pytest.raises(ScanError, match="brain mask is empty"):
        find_frame(scan, np.zeros_like(brain), SETTINGS)
    with pytest.raises(ScanError, match=r"brain mask \(7, 32, 32\) does not fit"):
        find_frame(scan, brain[1:], SETTINGS)


def test_a_single_slice_works():
    scan, brain = synthetic_scan(**HEAD, angle_deg=10)
    k = int(brain.sum(axis=(1, 2)).argmax())
    one = Scan("one", scan.hu[k:k + 1], scan.position_mm[k:k + 1], scan.pixel_spacing_mm)
    out = standardise(one, brain[k:k + 1], SETTINGS)
    assert out.hu.shape == (1, 64, 64) and out.below_vertex_mm.tolist() == [0]
    assert out.frame.angle_deg == pytest.approx(10, abs=1.5)


# ---- position


@pytest.mark.parametrize("offset, slices", [(0.0, 30), (1.7, 30), (3.4, 30), (0.0, 26)])
def test_vertex_is_found_between_slices_and_above_them(offset, slices):
    """An ellipsoid of semi-axis 65 mm cut every 5 mm: the top slice lies 0 to 5 mm below the vertex, or 15 mm."""
    position = np.arange(0.0, 150.0, 5.0) + offset
    radius = 60 * np.sqrt(np.clip(1 - ((position - 75) / 65) ** 2, 0, None))
    row, column = np.mgrid[-64:65, -64:65]
    brain = row**2 + column**2 < (radius**2)[:, None, None]
    assert vertex_mm(brain[:slices], position[:slices]) == pytest.approx(140, abs=0.7)


def test_below_vertex_grows_downwards(upright):
    np.testing.assert_allclose(np.diff(upright.below_vertex_mm), -10)
    top = np.flatnonzero(upright.brain.any(axis=(1, 2)))[-1]
    assert 0 <= upright.below_vertex_mm[top] <= 10


# ---- HU


def test_saturated_and_full_range_sources_come_out_alike():
    """Clipping comes before interpolation: bone of 1000 HU must not bleed into its neighbours."""
    scan, brain = synthetic_scan(**HEAD)
    saturated = replace(scan, hu=np.clip(scan.hu, -20, 100), saturation_hu=(-20.0, 100.0))
    settings = replace(SETTINGS, hu_clip=(-20.0, 100.0))
    a, b = standardise(scan, brain, settings), standardise(saturated, brain, settings)
    np.testing.assert_array_equal(a.hu, b.hu)
    assert a.hu.dtype == np.float32 and a.hu.min() == -20 and a.hu.max() <= 100


def test_what_lies_outside_the_head_is_removed():
    scan, brain = synthetic_scan(**HEAD)
    hu = scan.hu.copy()
    hu[:, 42:66, 135:140] = 80                                 # a holder and a tube, 40 mm from the scalp
    hu[:, 42:46, 42:46] = 200
    held = standardise(replace(scan, hu=hu), brain, SETTINGS).hu
    np.testing.assert_allclose(held, standardise(scan, brain, SETTINGS).hu, atol=2)
    kept = standardise(replace(scan, hu=hu), brain, replace(SETTINGS, remove_outside=False)).hu
    assert np.abs(kept - held).max() > 50


def test_soft_tissue_at_bone_is_not_mixed_with_it():
    """Frame pixels of 2 x 2 native ones: of brain (30), blood (60) and bone (1000), with an edge of 70 at the bone.

    Mixed, a pixel of a column of brain and one of the bone's edge is 50 HU; apart, it is 30. A pixel of which less
    than LEAST_SOFT is soft is bone, the upper end of the range.
    """
    hu = np.full((1, 8, 8), 30.0, np.float32)
    hu[0, :, 5], hu[0, :, 6:] = 70.0, 1000.0
    hu[0, 2:4, 4] = 60.0
    scan = Scan("one", hu, np.zeros(1), (1.0, 1.0), source="test")
    brain = np.ones((1, 8, 8), bool)
    frame = Frame(4, (8, 8), (1.0, 1.0), (3.5, 3.5), 0.0, 2.0)
    settings = StandardiseSettings(size=4, hu_clip=(0.0, 100.0), remove_outside=False)
    mixed, apart = (in_frame(scan, brain, frame, replace(settings, bone_apart=on)).hu[0] for on in (False, True))
    assert mixed[0] == pytest.approx([30, 30, 50, 100]) and mixed[1] == pytest.approx([30, 30, 65, 100])
    assert apart[0] == pytest.approx([30, 30, 30, 100]) and apart[1] == pytest.approx([30, 30, 60, 100])


def test_settings_of_before_can_be_read_and_stay_as_they_are():
    stored = PreprocessSettings().to_json()
    assert "bone_apart" not in stored["standardise"]
    assert PreprocessSettings.from_json(stored) == PreprocessSettings()
    apart = PreprocessSettings(StandardiseSettings(bone_apart=True))
    assert PreprocessSettings.from_json(apart.to_json()) == apart
