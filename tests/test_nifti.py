"""NIfTI: any axis order and sign comes to a Scan, and goes back to the very grid it came from."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest

from ct.read import find_scans, read_scan
from ct.scan import ScanError, ScanSource
from ct.write import write_nifti
from tests.writers import write_nifti_scan, write_slice_folder

RNG = np.random.default_rng(2)
HU = RNG.integers(-1000, 600, (6, 10, 8)).astype(np.float32)
ORDERS = ["LPS", "RAS", "LAS", "RPI", "SPL", "IAR", "PSR", "ASL", "AIL", "SRA"]


def read_nifti(scan_id, path):
    return read_scan(ScanSource(scan_id, "nifti", (path,)))


def turned(degrees, shear=0.0):
    """Affine in axes LPS, spacing (0.4, 0.5, 5) mm, turned about x, with slices sheared along y."""
    a = np.deg2rad(degrees)
    turn = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[-0.4, 0, 0], [0, -0.5, shear], [0, 0, 5]])
    affine[:3, 3] = (40, 60, 10)
    return affine


@pytest.mark.parametrize("axes", ORDERS)
def test_any_axes_come_to_display_and_go_back(tmp_path, axes):
    path = write_nifti_scan(tmp_path / "vol.nii.gz", HU, (5, 0.5, 0.4), axes)
    scan = read_nifti("vol", path)
    np.testing.assert_array_equal(scan.hu, HU)
    np.testing.assert_allclose(scan.pixel_spacing_mm, (0.5, 0.4), rtol=1e-6)
    np.testing.assert_allclose(scan.position_mm, 10 + np.arange(6) * 5.0, rtol=1e-6)
    assert write_nifti(tmp_path / "map.nii.gz", scan.hu, scan) is None
    before, after = nib.load(path), nib.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(before.get_fdata(), after.get_fdata())
    np.testing.assert_allclose(before.affine, after.affine, atol=1e-6)
    assert after.get_sform(coded=True)[1] == before.get_sform(coded=True)[1]
    np.testing.assert_allclose(after.header.get_zooms(), before.header.get_zooms(), rtol=1e-6)


def test_qform_only(tmp_path):
    image = nib.Nifti1Image(HU, None)
    image.set_qform(np.diag([0.4, 0.5, 5, 1]), 1)
    nib.save(image, tmp_path / "vol.nii")
    scan = read_nifti("vol", tmp_path / "vol.nii")
    write_nifti(tmp_path / "map.nii", scan.hu, scan)
    saved = nib.load(tmp_path / "map.nii")
    assert saved.get_qform(coded=True)[1] == 1 and saved.get_sform(coded=True)[1] == 0
    np.testing.assert_allclose(saved.affine, np.diag([0.4, 0.5, 5, 1]), rtol=1e-6)
    np.testing.assert_array_equal(saved.get_fdata(), HU)


@pytest.mark.parametrize("degrees", [-40, 15, 40])
def test_oblique(tmp_path, degrees):
    path = write_nifti_scan(tmp_path / "vol.nii", HU, axes="PSR", affine=turned(degrees))
    scan = read_nifti("vol", path)
    np.testing.assert_array_equal(scan.hu, HU)
    np.testing.assert_allclose(np.diff(scan.position_mm), 5, rtol=1e-5)
    write_nifti(tmp_path / "map.nii", scan.hu > 0, scan)
    np.testing.assert_allclose(nib.load(tmp_path / "map.nii").affine, nib.load(path).affine, atol=1e-5)


def test_a_file_packed_twice_is_named_so(tmp_path):
    path = write_nifti_scan(tmp_path / "vol.nii.gz", HU)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ScanError, match="^vol.nii.gz: packed twice with gzip; unpack it once$"):
        read_nifti("vol", path)


def test_sheared_steps_are_measured_along_the_normal(tmp_path):
    scan = read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", HU, affine=turned(18.5, shear=-1.7)))
    np.testing.assert_allclose(np.diff(scan.position_mm), 5, rtol=1e-5)


def test_one_volume_in_four_dimensions(tmp_path):
    path = write_nifti_scan(tmp_path / "vol.nii", HU)
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata()[..., None], image.affine), tmp_path / "four.nii")
    scan = read_nifti("four", tmp_path / "four.nii")
    np.testing.assert_array_equal(scan.hu, HU)
    write_nifti(tmp_path / "map.nii", scan.hu, scan)
    assert nib.load(tmp_path / "map.nii").shape == (8, 10, 6, 1)
    nib.save(nib.Nifti1Image(np.stack([image.get_fdata()] * 2, axis=-1), image.affine), tmp_path / "two.nii")
    with pytest.raises(ScanError, match=r"expected one volume.*\[8, 10, 6, 2\]"):
        read_nifti("two", tmp_path / "two.nii")


def test_rescale_in_the_header_and_values_below_air(tmp_path):
    stored = np.zeros((4, 4, 4), np.int16)
    stored[2], stored[3] = 1032, 1062
    image = nib.Nifti1Image(stored, np.eye(4))
    path = tmp_path / "vol.nii"
    nib.save(image, path)
    with open(path, "r+b") as file:
        file.seek(112)                                                        # scl_slope, scl_inter
        file.write(np.array([2, -2024], "<f4").tobytes())
    assert set(np.unique(read_nifti("vol", path).hu)) == {-1024, 40, 100}


def test_not_finite_becomes_air_with_a_note(tmp_path):
    hu = HU.copy()
    hu[2, 3, 4], hu[3, 3, 4] = np.nan, np.inf
    scan = read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", hu))
    assert scan.hu[2, 3, 4] == scan.hu[3, 3, 4] == -1024
    assert scan.notes == ("2 values not finite, taken as air",)


def test_air_that_is_no_number_is_named(tmp_path):
    """Nothing told why a scan in HU should not look like HU."""
    hu = np.where(HU < -50, np.nan, np.abs(HU))
    with pytest.raises(ScanError, match=rf"{np.isnan(hu).sum()} of 480 values are not finite \(NaN\)"):
        read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", hu))


@pytest.mark.parametrize("values", [RNG.random(HU.shape), np.clip(HU, 0, 255), HU + 1024, RNG.normal(0, 1, HU.shape)])
def test_values_that_are_no_hu_are_refused(tmp_path, values):
    with pytest.raises(ScanError, match="doesn't look like HU"):
        read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", values))


def test_clipped_values_are_told(tmp_path):
    scan = read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", np.clip(HU - 200, -20, 100)))
    assert scan.saturation_hu == (-20, 100) and "saturate at -20..100 HU" in scan.notes[0]
    assert read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", HU)).saturation_hu == (-np.inf, np.inf)


def test_unknown_orientation_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(HU, None), tmp_path / "vol.nii")
    with pytest.raises(ScanError, match="sform and qform codes are 0"):
        read_nifti("vol", tmp_path / "vol.nii")


@pytest.mark.parametrize("name", ["vol.nii", "vol.nii.gz"])
def test_a_file_that_is_gone_is_no_damaged_header(tmp_path, name):
    path = write_nifti_scan(tmp_path / name, HU)
    source, = find_scans(tmp_path)
    path.unlink()
    with pytest.raises(ScanError, match=f"^{name}: cannot be read \\(No such file or directory\\)$"):
        read_scan(source)


def test_truncated_file_is_refused_by_name(tmp_path):
    path = write_nifti_scan(tmp_path / "vol.nii.gz", HU)
    path.write_bytes(path.read_bytes()[:800])
    source, = find_scans(tmp_path)
    with pytest.raises(ScanError, match="vol.nii.gz: cannot be read"):
        read_scan(source)


@pytest.mark.parametrize("kind, place, form", [(nib.Nifti1Image, 108, "<f"), (nib.Nifti2Image, 168, "<q")])
def test_values_that_are_said_to_begin_within_the_header_are_refused(tmp_path, kind, place, form):
    """The header's own bytes were the first voxels, and all others moved."""
    path = tmp_path / "vol.nii"
    nib.save(kind(HU.transpose(2, 1, 0), np.diag([-0.4, -0.5, 5, 1])), path)
    np.testing.assert_array_equal(read_nifti("vol", path).hu, HU)
    least = kind.header_class.single_vox_offset
    for offset in (0, 348, least - 4, -least, *([np.nan, np.inf] if form == "<f" else [])):
        content = bytearray(path.read_bytes())
        struct.pack_into(form, content, place, offset)
        (tmp_path / "wrong.nii").write_bytes(content)
        with pytest.raises(ScanError, match=f"wrong.nii: .*vox_offset.* expected {least} or more"):
            read_nifti("wrong", tmp_path / "wrong.nii")


@pytest.mark.parametrize("volume, dtype, on_disk", [
    (HU > 0, None, np.uint8), (HU.astype(np.int64), None, np.int32), (HU.astype(np.uint8), None, np.uint8),
    (HU.astype(np.float64), None, np.float32), (HU + 0.6, np.int16, np.int16)])
def test_types_on_disk(tmp_path, volume, dtype, on_disk):
    scan = read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", HU, axes="LPS"))
    write_nifti(tmp_path / "map.nii", volume, scan, dtype)
    saved = nib.load(tmp_path / "map.nii")
    assert saved.get_data_dtype() == on_disk
    expected = volume if dtype is None else HU + 1                            # rounded, not cut off
    np.testing.assert_array_equal(saved.get_fdata().transpose(2, 1, 0), expected)


@pytest.mark.parametrize("largest_hu, on_disk", [(180.0, np.int16), (5000.0, np.int32)])
def test_steps_read_back_to_half_a_step(tmp_path, largest_hu, on_disk):
    scan = read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", HU, axes="LPS"))
    values = np.linspace(-largest_hu, largest_hu, scan.hu.size, dtype=np.float32).reshape(scan.hu.shape)
    values[0, 0, :4] = (0.0, 0.04, 0.06, -12.34)
    write_nifti(tmp_path / "map.nii.gz", values, scan, step=0.1)
    saved = nib.load(tmp_path / "map.nii.gz")
    found = saved.get_fdata().transpose(2, 1, 0)
    assert saved.get_data_dtype() == on_disk and saved.dataobj.slope == np.float32(0.1)
    np.testing.assert_allclose(found[0, 0, :4], (0.0, 0.0, 0.1, -12.3), atol=1e-6)
    np.testing.assert_allclose(found, values, atol=0.0501)


def test_steps_refuse_what_is_not_finite(tmp_path):
    scan = read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", HU, axes="LPS"))
    with pytest.raises(ValueError, match="map.nii.gz: expected finite values to store in steps of 0.1, found"):
        write_nifti(tmp_path / "map.nii.gz", np.full(HU.shape, np.nan, np.float32), scan, step=0.1)
    assert not (tmp_path / "map.nii.gz").exists()


def test_compressed_and_plain_files_hold_the_same_bytes(tmp_path):
    scan = read_nifti("vol", write_nifti_scan(tmp_path / "vol.nii", HU, axes="LPS"))
    for name in ("map.nii", "map.nii.gz"):
        write_nifti(tmp_path / name, scan.hu, scan, step=0.1)
    packed = (tmp_path / "map.nii.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "map.nii").read_bytes()
    assert packed[4:8] == bytes(4)                                            # no date: equal maps are equal files


def test_map_of_a_slice_folder(tmp_path):
    hu = np.clip(HU, -20, 100)
    source, = find_scans(write_slice_folder(tmp_path / "case", hu, slice_spacing_mm=4, bits=16))
    scan = read_scan(source)
    assert write_nifti(tmp_path / "map.nii", scan.hu, scan) == "pixel spacing unknown, written as 1 mm"
    image = nib.load(tmp_path / "map.nii")
    np.testing.assert_allclose(image.affine, np.diag([-1, -1, 4, 1]), atol=1e-9)
    np.testing.assert_array_equal(image.get_fdata().transpose(2, 1, 0), scan.hu)
