"""NIfTI headers as other programs write them: pairs, units, two forms, and what is wrong with them."""

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ct.read import find_scans, read_scan
from ct.scan import ScanError
from tests.helpers import read_all
from tests.writers import write_nifti_scan

RNG = np.random.default_rng(4)
HU = RNG.integers(-1000, 600, (6, 10, 8)).astype(np.float32)


@pytest.mark.parametrize("values", [HU + 1024 - 30, np.where(HU > 300, 3000, HU + 1000) - 24,
                                    RNG.normal(0, 20, HU.shape)])
def test_nifti_with_an_offset_is_refused(tmp_path, values):
    write_nifti_scan(tmp_path / "vol.nii", values)
    with pytest.raises(ScanError, match="look like HU"):
        read_all(tmp_path)


def test_a_nifti_pair_is_read_and_analyze_is_refused(tmp_path):
    image = nib.load(write_nifti_scan(tmp_path / "one.nii", HU))
    nib.save(nib.Nifti1Pair(image.get_fdata().astype(np.int16), image.affine), tmp_path / "pair.hdr")
    pair = next(scan for scan in read_all(tmp_path) if scan.scan_id == "pair")
    np.testing.assert_array_equal(pair.hu, HU)
    (tmp_path / "old").mkdir()
    nib.save(nib.AnalyzeImage(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "old" / "a.hdr")
    with pytest.raises(ScanError, match="a.hdr: an Analyze 7.5 header"):
        read_all(tmp_path / "old")


def test_a_pair_is_read_whichever_of_its_files_is_given(tmp_path):
    """Given by its .img it was no scan; and one whose header was damaged was passed over without a word."""
    image = nib.load(write_nifti_scan(tmp_path / "one.nii", HU))
    nib.save(nib.Nifti1Pair(image.get_fdata().astype(np.int16), image.affine), tmp_path / "pair.hdr")
    (tmp_path / "links").mkdir()
    for name in ("one.img", "two.hdr"):
        (tmp_path / "links" / name).symlink_to(tmp_path / f"pair{name[3:]}")
    for name in ("pair.img", "pair.hdr", "links/one.img", "links/two.hdr"):
        source, = find_scans(tmp_path / name)
        assert source.scan_id == Path(name).stem and [path.suffix for path in source.paths] == [".hdr", ".img"]
        np.testing.assert_array_equal(read_scan(source).hu, HU)
    (tmp_path / "pair.hdr").write_bytes(b"junk" * 87)
    for place in (tmp_path, tmp_path / "pair.img"):
        source = next(source for source in find_scans(place) if source.scan_id == "pair")
        with pytest.raises(ScanError, match="^pair.hdr: cannot be read as NIfTI"):
            read_scan(source)
    (tmp_path / "pair.hdr").unlink()
    with pytest.raises(ScanError, match="pair.img: the values of a NIfTI pair without their header; put pair.hdr"):
        find_scans(tmp_path / "pair.img")


def test_units_of_nifti_are_converted(tmp_path):
    image = nib.load(write_nifti_scan(tmp_path / "vol.nii", HU, (5000, 500, 400)))
    image = nib.Nifti1Image(image.get_fdata(), image.affine)
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "vol.nii")
    scan, = read_all(tmp_path)
    assert scan.pixel_spacing_mm == pytest.approx((0.5, 0.4)) and scan.slice_spacing_mm == pytest.approx(5)
    assert "lengths in microns (xyzt_units) converted to mm" in scan.notes


@pytest.mark.parametrize("code", [4, 7, 64 + 6, 255])
def test_a_unit_of_length_that_is_none_is_refused(tmp_path, code):
    """It was a KeyError."""
    set_units(write_nifti_scan(tmp_path / "vol.nii", HU), code)
    with pytest.raises(ScanError, match=r"vol.nii: its lengths are in an unknown unit \(xyzt_units\); set mm"):
        read_all(tmp_path)


def test_a_unit_of_time_that_is_none_is_no_matter(tmp_path):
    """It was a KeyError, too."""
    set_units(write_nifti_scan(tmp_path / "vol.nii", HU), 64 + 2)
    np.testing.assert_array_equal(read_all(tmp_path)[0].hu, HU)


def set_units(path, code):
    header = bytearray(path.read_bytes())
    header[123] = code                                           # xyzt_units
    path.write_bytes(header)


def test_a_header_that_promises_too_much_is_refused_before_reading(tmp_path):
    path = write_nifti_scan(tmp_path / "vol.nii.gz", HU)
    header = bytearray(gzip.open(path).read())
    struct.pack_into("<4h", header, 40, 3, 4000, 4000, 4000)
    with gzip.open(path, "wb") as file:
        file.write(bytes(header))
    with pytest.raises(ScanError, match="GB|truncated or damaged"):
        read_all(tmp_path)


def patched(path, offset, form, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, *values)
    path.write_bytes(bytes(data))


def two_forms(path, sform_code, qform_code, mirrored=False):
    image = nib.load(write_nifti_scan(path, HU))
    other = image.affine.copy()
    other[0] *= -1 if mirrored else 1
    image.set_sform(image.affine, sform_code)
    image.set_qform(other, qform_code)
    image = nib.Nifti1Image(image.get_fdata(), None, image.header)
    nib.save(image, path)


def test_an_intercept_that_is_no_number_is_0(tmp_path):
    path = write_nifti_scan(tmp_path / "vol.nii", HU)
    patched(path, 112, "<2f", 1.0, float("nan"))
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)


def test_a_bad_quaternion_beside_a_valid_sform(tmp_path):
    path = write_nifti_scan(tmp_path / "vol.nii", HU)
    patched(path, 252, "<h", 1)
    patched(path, 256, "<3f", 0.9, 0.9, 0.9)
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)


@pytest.mark.parametrize("codes, mirrored, taken", [((1, 1), True, "sform"), ((4, 1), True, "qform"),
                                                    ((1, 4), True, "sform"), ((1, 1), False, None)])
def test_the_scanners_form_is_taken(tmp_path, codes, mirrored, taken):
    two_forms(tmp_path / "vol.nii", *codes, mirrored)
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU[:, :, ::-1] if taken == "qform" else HU)
    assert [note.split(":")[1].split(" (")[0] for note in scan.notes if "disagree" in note] == (
        [f" taken is the {taken}"] if taken else [])


def test_coronal_slices_are_refused(tmp_path):
    write_nifti_scan(tmp_path / "vol.nii", HU, (0.9, 5.0, 0.9))
    with pytest.raises(ScanError, match="coronal or sagittal slices"):
        read_all(tmp_path)
