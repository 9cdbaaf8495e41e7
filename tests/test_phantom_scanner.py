"""The phantom's scanner: where the head comes to lie, what the beam does to it, and files that read back the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from scipy import ndimage

from ct.brain import brain_mask
from ct.read import find_scans, read_scan
from ct.write import write_nifti
from demos import scanner
from demos.scanner import Setup, acquire, draw_setup, write_dicom

STRAIGHT = Setup(fov_mm=220, turn_deg=0.0, pitch_deg=0.0, roll_deg=0.0, shift_mm=(0.0, 0.0),
                 position_mm=np.arange(-20.0, 45, 5), hardening=0.0, cupping_hu=0.0, holder=None)


def ball(shape, centre, radii):
    """bool, an ellipsoid; centre from the middle of the grid, all in voxels."""
    at = np.ogrid[tuple(slice(0, n) for n in shape)]
    return sum(((a - (n - 1) / 2 - c) / r) ** 2 for a, n, c, r in zip(at, shape, centre, radii)) <= 1


@pytest.fixture(scope="module")
def head():
    """Ellipsoids at 1 mm, cut off at the skull base: scalp, skull and brain of 34 HU."""
    shape = (150, 200, 170)
    cavity = ball(shape, (-10, 0, 0), (74, 80, 64))
    hu = np.full(shape, -1000, np.float32)
    hu[ball(shape, (-10, 0, 0), (84, 90, 74))] = 40
    hu[ball(shape, (-10, 0, 0), (80, 86, 70))] = 1000
    hu[cavity] = 34
    depth = ndimage.distance_transform_edt(cavity) - ndimage.distance_transform_edt(~cavity)
    return SimpleNamespace(hu=hu, depth_mm=depth.astype(np.float32), cavity=cavity)


@pytest.fixture(scope="module")
def taken(head):
    """The head as a drawn setup shows it, with the cranial cavity for a truth."""
    return acquire(head, head.cavity, np.random.default_rng(3))


def centre_mm(mask, setup):
    """Centre of mass of a mask [S, 512, 512] in the gantry, mm (z, y, x)."""
    s, row, column = ndimage.center_of_mass(mask)
    pixel = setup.fov_mm / 512
    z = np.interp(s, range(len(mask)), setup.position_mm)
    return np.array([z, (row - 255.5) * pixel, (column - 255.5) * pixel])


def mark(head, centre):
    return ball(head.hu.shape, centre, (8, 8, 8))


def test_directions_and_shift(head):
    setup = replace(STRAIGHT, shift_mm=(6.0, -9.0))
    _, mask = acquire(head, mark(head, (20, -30, 25)), np.random.default_rng(0), setup)
    np.testing.assert_allclose(centre_mm(mask, setup), (20, -24, 16), atol=0.4)


@pytest.mark.parametrize("angle, marked, expected", [
    ("turn_deg", (0, 30, 0), (0, 30 * np.cos(0.2), 30 * np.sin(0.2))),         # the back of the head goes left
    ("pitch_deg", (0, 30, 0), (30 * np.sin(0.2), 30 * np.cos(0.2), 0)),        # chin down: its back comes up
    ("roll_deg", (30, 0, 0), (30 * np.cos(0.2), 0, 30 * np.sin(0.2))),         # the vertex goes left
])
def test_the_head_turns(head, angle, marked, expected):
    setup = replace(STRAIGHT, **{angle: np.rad2deg(0.2)})
    _, mask = acquire(head, mark(head, marked), np.random.default_rng(0), setup)
    np.testing.assert_allclose(centre_mm(mask, setup), expected, atol=0.4)


def test_a_slice_is_the_mean_of_its_five_millimetres(head):
    shape = head.hu.shape
    hu = np.zeros(shape, np.float32)
    hu[75:] = 100                                                  # z >= 0 in the grid, whose middle is at 74.5
    setup = replace(STRAIGHT, position_mm=np.array([-10.0, -1.5, 0.5, 10.0]), noise_hu=0.0)
    scan, mask = acquire(SimpleNamespace(hu=hu, depth_mm=head.depth_mm), hu > 0, np.random.default_rng(0), setup)
    np.testing.assert_array_equal(scan.hu[:, 256, 256], [0, 20, 60, 100])
    np.testing.assert_array_equal(mask[:, 256, 256], [False, False, True, True])


def test_truth_keeps_its_volume_and_a_speck_does_not_vanish(head):
    _, mask = acquire(head, mark(head, (3, 5, 7)), np.random.default_rng(0), STRAIGHT)
    assert mask.sum() * (220 / 512) ** 2 * 5 == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.08)
    speck = np.zeros(head.hu.shape, bool)
    speck[75, 100, 85] = True
    _, mask = acquire(head, speck, np.random.default_rng(0), STRAIGHT)
    assert 1 <= mask.sum() <= 20 and mask.any(axis=(1, 2)).sum() == 1


def test_a_nose_at_the_edge_of_the_grid_ends_there_but_the_neck_goes_on(head):
    hu = np.full(head.hu.shape, -1000, np.float32)
    hu[:90, :, 60:100] = 40                                        # reaches the grid's front, back and bottom
    setup = replace(STRAIGHT, fov_mm=256, position_mm=np.array([-90.0, 0.0, 30.0]), noise_hu=0.0)
    scan, _ = acquire(SimpleNamespace(hu=hu, depth_mm=head.depth_mm), None, np.random.default_rng(0), setup)
    assert (scan.hu[:2, 250, 240] == 40).all()                     # z = -90 lies 15 mm below the grid
    assert (scan.hu[:, 20:48, 200:312] == -1000).all() and (scan.hu[2] <= -1000).all()


def test_motion_blurs_the_slice_where_it_happens(head):
    still, _ = acquire(head, None, np.random.default_rng(0), STRAIGHT)
    moving = replace(STRAIGHT, motion_mm=(0.0, 5.0, 3.0, 0.0))
    moved, _ = acquire(head, None, np.random.default_rng(0), moving)
    different = np.abs(moved.hu - still.hu).max(axis=(1, 2))
    assert different[4] > 300 and different[-1] < 30               # slice 4 lies at z = 0, the last at 40


def test_hu_are_whole_and_in_range_and_corners_are_not_reconstructed(taken):
    scan, _ = taken
    assert scan.hu.dtype == np.float32 and (scan.hu == np.rint(scan.hu)).all()
    assert scan.hu.min() == -1024 and scan.hu.max() <= 3071
    assert (scan.hu[:, :20, :20] == -1024).all()
    assert -1010 < np.median(scan.hu[:, 3, 200:300]) < -990


def test_a_drawn_setup_covers_the_cavity_and_keeps_the_head_in_the_field(head, taken):
    scan, cavity = taken
    assert not cavity[-1].any() and 24 <= len(scan.hu) <= 36
    assert cavity.sum() * scan.pixel_spacing_mm[0] ** 2 * 5 > 0.97 * head.cavity.sum()
    for seed in range(20):
        setup = draw_setup(head, np.random.default_rng(seed))
        outside, _ = scanner._places(head, setup.turn_deg, setup.pitch_deg, setup.roll_deg)
        assert np.abs(outside[:, 1:] + setup.shift_mm).max() <= setup.fov_mm / 2
        assert 24 <= len(setup.position_mm) <= 36 and 205 <= setup.fov_mm <= 256


def test_the_brain_mask_is_found(taken):
    scan, cavity = taken
    found = brain_mask(scan)
    assert 2 * (found & cavity).sum() / (found.sum() + cavity.sum()) > 0.94


# ---- the beam

def test_noise_has_its_size_is_smooth_and_has_no_slow_part():
    noise = scanner._noise(3, STRAIGHT, np.random.default_rng(0))
    assert noise.shape == (3, 512, 512)
    assert noise.std(axis=(1, 2)) == pytest.approx(1, rel=0.03)
    assert (noise[:, 1:] * noise[:, :-1]).mean() > 0.6                         # neighbours resemble each other
    f = np.hypot(*np.meshgrid(*[np.fft.fftfreq(512, 220 / 512)] * 2))
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(axis=0)
    slow, most, fast = (power[(f > low) & (f < high)].mean() for low, high in ((0, 0.02), (0.1, 0.12), (0.7, 0.9)))
    assert slow < 0.4 * most and fast < 0.05 * most                            # |f| exp(-|f| / 0.11): 0.25, 0.01
    assert abs(np.corrcoef(noise.reshape(3, -1)) - np.eye(3)).max() < 0.05


def test_noise_in_the_brain_is_as_drawn(head):
    quiet, _ = acquire(head, None, np.random.default_rng(0), replace(STRAIGHT, noise_hu=0.0))
    scan, _ = acquire(head, None, np.random.default_rng(0), replace(STRAIGHT, noise_hu=4.0))
    middle = (scan.hu - quiet.hu)[:, 156:356, 206:306]
    assert middle.std() == pytest.approx(4.0, rel=0.15)
    rim = (scan.hu - quiet.hu)[:, 30:50, 206:306]              # air in front of the head
    assert rim.std() < 0.9 * middle.std()


def test_filtered_projections_reconstruct_a_disc():
    axis = np.arange(128) - 63.5
    disc = np.hypot(axis[:, None], axis) < 40
    project = scanner._projector()
    again = scanner._back(project, scanner._ramp(project @ disc.reshape(-1, 1).astype(np.float32) * 0.2, 0.2))[0]
    assert again[disc].mean() == pytest.approx(1, abs=0.05)
    outside = np.hypot(axis[:, None], axis) > 45
    assert abs(again[outside].mean()) < 0.05


def test_dark_band_between_two_dense_bones_and_none_without_hardening():
    hu = np.full((1, 256, 256), -1000, np.float32)
    axis = np.arange(256) - 127.5
    hu[0, np.hypot(axis[:, None], axis) < 95] = 30
    hu[0, 118:138, 60:85] = hu[0, 118:138, 171:196] = 1500         # 2 cm each
    setup = replace(STRAIGHT, hardening=0.02)
    error = scanner._beam(hu, setup, np.random.default_rng(0)).error_hu[0]
    assert error[124:132, 120:136].mean() < -4
    assert abs(error[60:70, 120:136].mean()) < 2                   # 5 cm in front of the band
    assert not scanner._beam(hu, STRAIGHT, np.random.default_rng(0)).error_hu.any()


def test_cupping_is_as_drawn():
    hu = np.full((1, 256, 256), -1000, np.float32)
    axis = np.arange(256) - 127.5
    radius = np.hypot(axis[:, None], axis) * 220 / 256
    hu[0, radius < 80] = 0
    error = scanner._beam(hu, replace(STRAIGHT, cupping_hu=10.0), np.random.default_rng(0)).error_hu[0]
    cup = error[(radius > 70) & (radius < 76)].mean() - error[radius < 10].mean()
    assert cup == pytest.approx(10, rel=0.2)


def test_the_holder_clears_the_head(head):
    setup = replace(STRAIGHT, holder=(110.0, 3.0, 5.0, 80.0, 100.0))
    with_, _ = acquire(head, None, np.random.default_rng(0), setup)
    without, _ = acquire(head, None, np.random.default_rng(0), STRAIGHT)
    shell = (with_.hu - without.hu).max(axis=0) > 500
    assert shell.any() and (with_.hu - without.hu)[4][shell].min() > 400      # the same on every slice
    near = ndimage.distance_transform_edt(~(without.hu > -300).any(axis=0)) * 220 / 512
    assert 2.5 < near[shell].min() < 6
    assert np.nonzero(shell)[0].min() > 256                        # behind the middle


# ---- files

def read_back(folder):
    (source,) = find_scans(folder)
    return read_scan(source)


@pytest.fixture(scope="module")
def series(taken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dicom") / "head"
    write_dicom(folder, taken[0], ("tumour", 7))
    return folder


def test_dicom_reads_back_to_the_same_scan(taken, series):
    scan, again = taken[0], read_back(series)
    np.testing.assert_array_equal(again.hu, scan.hu)
    np.testing.assert_allclose(again.position_mm, scan.position_mm, atol=1e-9)
    np.testing.assert_allclose(again.pixel_spacing_mm, scan.pixel_spacing_mm, rtol=1e-9)
    np.testing.assert_allclose(again.geometry.origins, scan.geometry.origins, atol=1e-9)
    assert again.notes == ()


def test_nifti_reads_back_to_the_same_scan(taken, tmp_path):
    scan, mask = taken
    write_nifti(tmp_path / "head.nii.gz", scan.hu, scan, np.int16)
    again = read_back(tmp_path)
    np.testing.assert_array_equal(again.hu, scan.hu)
    np.testing.assert_allclose(again.position_mm, scan.position_mm, atol=1e-3)
    np.testing.assert_allclose(again.pixel_spacing_mm, scan.pixel_spacing_mm, rtol=1e-6)
    assert again.notes == ()


def test_dicom_bytes_depend_on_scan_and_words_alone(taken, series, tmp_path):
    scan = replace(taken[0], hu=taken[0].hu[:2], position_mm=taken[0].position_mm[:2])
    for name, words in (("a", ("tumour", 7)), ("b", ("tumour", 7)), ("c", ("tumour", 8))):
        write_dicom(tmp_path / name, scan, words)
    a, b, c = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc")
    assert a == b == [path.read_bytes() for path in sorted(series.iterdir())[:2]]
    assert a[0] != c[0]


def test_dicom_tells_no_patient_and_fixed_dates(series):
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(series.iterdir())]
    first = headers[0]
    assert str(first.PatientName) == "Phantom" and first.PatientBirthDate == "" and first.StudyDate == "20000101"
    assert first.SOPClassUID.name == "CT Image Storage"
    assert first.file_meta.TransferSyntaxUID.name == "Explicit VR Little Endian"
    uids = {str(ds.SOPInstanceUID) for ds in headers}
    assert len(uids) == len(headers)
    assert all(uid.startswith("2.25.") and len(uid) <= 64 and not uid.startswith("2.25.0") for uid in uids)
    assert len({str(ds.SeriesInstanceUID) for ds in headers}) == 1
