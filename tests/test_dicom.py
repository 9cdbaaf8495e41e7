"""DICOM series: order, HU, orientation, what is left out, what is refused, and maps written back in place."""

import os
import re
from datetime import datetime

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian, RLELossless
from scipy.ndimage import map_coordinates

from ct.derived import Derived, Maker
from ct.dicom import spacing_notes
from ct.geometry import displaced
from ct.read import find_scans, read_scan
from ct.scan import ScanError
from ct.whole_head import NEGATED, UPSIDE_DOWN
from ct.write import write_nifti
from tests.helpers import synthetic_head
from tests.writers import complete, make_uid, write_dicom_series, write_enhanced_ct

RNG = np.random.default_rng(1)
HU = RNG.integers(-1000, 600, (6, 10, 8)).astype(np.float32)               # more air than bone, as around a head


def read_only(folder):
    source, = find_scans(folder)
    return read_scan(source)


def setting(**values):
    """An edit(ds, k) that sets attributes on every slice."""
    def edit(ds, k):
        for keyword, value in values.items():
            setattr(ds, keyword, value)
    return edit


def on(slices, edit):
    return lambda ds, k: edit(ds, k) if k in slices else None


# ---- order, HU, orientation

def test_sorted_by_position_whatever_the_names(tmp_path):
    names = RNG.permutation(6)
    scan = read_only(write_dicom_series(tmp_path / "case", HU, (5, 0.5, 0.4), name=lambda k: f"IM{names[k]}"))
    np.testing.assert_array_equal(scan.hu, HU)
    np.testing.assert_allclose(scan.position_mm, 10 + np.arange(6) * 5)
    assert scan.pixel_spacing_mm == (0.5, 0.4) and scan.source == "dicom" and scan.notes == ()


def test_slope_and_intercept_of_each_slice(tmp_path):
    def edit(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = 1 + k, -10 * k
    hu = np.full((3, 4, 4), 100)
    hu[:, 1:] = -1000
    scan = read_only(write_dicom_series(tmp_path / "case", hu, intercept=0, edit=edit))
    np.testing.assert_array_equal(scan.hu[:, 0, 0], [100, 190, 280])          # 100 * (1 + k) - 10 * k


@pytest.mark.parametrize("tilt", [0, 20, -30])
@pytest.mark.parametrize("flip_rows", [False, True])
@pytest.mark.parametrize("flip_columns", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_any_orientation_comes_to_radiological_display(tmp_path, tilt, flip_rows, flip_columns, transpose):
    scan = read_only(write_dicom_series(tmp_path / "case", HU, (5, 0.5, 0.4), tilt_deg=tilt, flip_rows=flip_rows,
                                        flip_columns=flip_columns, transpose=transpose))
    np.testing.assert_array_equal(scan.hu, HU)
    np.testing.assert_allclose(scan.pixel_spacing_mm, (0.5, 0.4))
    np.testing.assert_allclose(np.diff(scan.position_mm), 5, atol=1e-5)       # along the normal, not along z
    np.testing.assert_allclose(scan.geometry.origins[0], (-40, -60, 10), atol=1e-5)


def test_padding_and_values_below_air_become_air(tmp_path):
    hu = HU.copy()
    hu[:, 0, 0], hu[:, 0, 1], hu[:, 0, 2] = -2000, 3000, 3005
    edit = setting(PixelPaddingValue=3000 + 1024, PixelPaddingRangeLimit=3010 + 1024)
    scan = read_only(write_dicom_series(tmp_path / "case", hu, edit=edit))
    assert (scan.hu[:, 0, :3] == -1024).all()
    np.testing.assert_array_equal(scan.hu[:, 1:], hu[:, 1:])


def test_negative_padding_in_implicit_vr(tmp_path):
    def edit(ds, k):
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        ds.PixelPaddingValue = -1500
    hu = HU.copy()
    hu[:, 0, 0] = -1500
    scan = read_only(write_dicom_series(tmp_path / "case", hu, intercept=0, edit=edit))
    assert (scan.hu[:, 0, 0] == -1024).all() and (scan.hu[:, 1:] == hu[:, 1:]).all()


@pytest.mark.parametrize("padding, is_padding", [(63536, False), (2096, True), (4095, True)])
def test_padding_that_the_stored_bits_cannot_hold_is_none(tmp_path, padding, is_padding):
    """63536, left from 16 bits, was 2096 in the lowest 12: bone of 1072 HU became air."""
    def edit(ds, k):
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
        ds.add_new("PixelPaddingValue", "US", padding)
    hu = HU.copy()
    hu[:, 0, 0] = padding % 4096 - 1024
    scan = read_only(write_dicom_series(tmp_path / "case", hu, edit=edit))
    assert (scan.hu[:, 0, 0] == (-1024 if is_padding else 1072)).all()
    np.testing.assert_array_equal(scan.hu[:, 1:], hu[:, 1:])


@pytest.mark.parametrize("above, read", [(0xF000, -1024), (0x7000, 1072), (0, 1072)])
def test_padding_stored_with_more_bits_than_the_header_tells_is_air(tmp_path, above, read):
    """63536 in pixels of 12 bits was bone of 1072 HU; what differs from it by a bit stays."""
    def edit(ds, k):
        stored = np.frombuffer(ds.PixelData, np.uint16).copy()
        stored[:8] |= above
        ds.PixelData = stored.tobytes()
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
        ds.add_new("PixelPaddingValue", "US", 63536)
    hu = HU.copy()
    hu[:, 0] = 1072
    scan = read_only(write_dicom_series(tmp_path / "case", hu, edit=edit))
    assert (scan.hu[:, 0] == read).all()
    np.testing.assert_array_equal(scan.hu[:, 1:], hu[:, 1:])
    assert any("more bits than BitsStored" in note for note in scan.notes) == (above == 0x7000)


def test_padding_with_more_bits_never_takes_tissue(tmp_path):
    """40 HU below an overlay that is set in all four planes."""
    def edit(ds, k):
        stored = np.frombuffer(ds.PixelData, np.uint16).copy()
        stored[:8] |= 0xF000
        ds.PixelData = stored.tobytes()
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
        ds.add_new("PixelPaddingValue", "US", 0xF000 | 1064)
    hu = HU.copy()
    hu[:, 0] = 40
    np.testing.assert_array_equal(read_only(write_dicom_series(tmp_path / "case", hu, edit=edit)).hu, hu)


@pytest.mark.parametrize("vr, padding", [("US", 63536), ("SS", -2000), ("US", 2096)])
def test_negative_padding_of_12_bits_whatever_its_vr(tmp_path, vr, padding):
    """-2000 as a whole, or its lowest 12 bits."""
    def edit(ds, k):
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 1
        ds.add_new("PixelPaddingValue", vr, padding)
    hu = HU.copy()
    hu[:, 0, 0] = -2000
    scan = read_only(write_dicom_series(tmp_path / "case", hu, intercept=0, edit=edit))
    assert (scan.hu[:, 0, 0] == -1024).all() and (scan.hu[:, 1:] == hu[:, 1:]).all()


def test_derived_objects_know_the_class_of_files_that_tell_it_outside_the_data_set(tmp_path):
    def edit(ds, k):
        complete(ds, k)
        del ds.SOPClassUID
    scan = read_only(write_dicom_series(tmp_path / "case", HU, edit=edit))
    derived = Derived.open(scan, Maker("model", "1", "0"), (), False, datetime(2024, 5, 6))
    assert [image.SOPClassUID for image in derived.images] == [CTImageStorage] * 6


@pytest.mark.parametrize("stored_inverted", [False, True])
def test_monochrome1(tmp_path, stored_inverted):
    hu, _ = synthetic_head(slices=4, size=32, spacing_mm=(5, 7, 7), noise=0)

    def edit(ds, k):
        ds.PhotometricInterpretation = "MONOCHROME1"
        if stored_inverted:
            ds.PixelData = (-1 - np.frombuffer(ds.PixelData, np.int16)).astype(np.int16).tobytes()
    scan = read_only(write_dicom_series(tmp_path / "case", hu, edit=edit))
    np.testing.assert_allclose(scan.hu, hu, atol=0.51)
    assert any("MONOCHROME1" in note for note in scan.notes) == stored_inverted


# ---- encodings

def test_rle(tmp_path):
    scan = read_only(write_dicom_series(tmp_path / "case", HU, edit=lambda ds, k: ds.compress(RLELossless)))
    np.testing.assert_array_equal(scan.hu, HU)


@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_compressed(tmp_path, syntax):
    folder = write_dicom_series(tmp_path / "case", HU)                        # stored as HU + 1024: no sign
    for path in folder.iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(os.fspath(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(os.fspath(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(read_only(folder).hu, HU)


def test_multi_frame(tmp_path):
    path = write_enhanced_ct(tmp_path / "enhanced", np.round(HU), (3, 0.5, 0.4), order=[2, 0, 5, 1, 4, 3])
    scan = read_only(path)
    np.testing.assert_allclose(scan.hu, HU, atol=1)                           # odd frames have a slope of 2
    np.testing.assert_array_equal(scan.hu[::2], HU[::2])
    np.testing.assert_allclose(scan.position_mm, 10 + np.arange(6) * 3)
    assert scan.pixel_spacing_mm == (0.5, 0.4)


# ---- what is left out

@pytest.mark.parametrize("edit, words", [
    (setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localiser"),
    (setting(ImageType=["DERIVED", "SECONDARY", "MPR"]), "derived"),
    (setting(ImageType=["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 MIP"]), "maximum or minimum projection"),
    (setting(ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "MINIP"]), "maximum or minimum projection"),
    (setting(ImageType=["DERIVED", "PRIMARY", "MPR"]), "derived"),
    (setting(ImageType=["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]), "derived"),
    (setting(ImageType=["DERIVED", "SECONDARY", "VOLUME"]), "derived"),
    (setting(ImageType=["DERIVED", "SECONDARY"]), "derived"),
    (lambda ds, k: delattr(ds, "PhotometricInterpretation"), "without PhotometricInterpretation"),
    (setting(PhotometricInterpretation="RGB"), "in colour"),
    (setting(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "not axial"),
    (setting(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "not axial"),
    (setting(Modality="MR"), "not CT (modality MR)"),
    (lambda ds, k: delattr(ds, "ImagePositionPatient"), "without a position in space"),
])
def test_left_out_with_counts(tmp_path, edit, words):
    scan = read_only(write_dicom_series(tmp_path / "case", HU, edit=on((0, 1), edit)))
    np.testing.assert_array_equal(scan.hu, HU[2:])
    assert scan.notes == (f"left out: 2 {words}",)
    folder = write_dicom_series(tmp_path / "few", HU, series="few", study="few", edit=on(range(4), edit))
    with pytest.raises(ScanError, match=re.escape(
            f"000.dcm and what belongs to it: 2 axial CT slices, at least 3 are needed (left out: 4 {words}); give")):
        read_only(folder)


@pytest.mark.parametrize("more", [["AXIAL"], ["VOLUME", "NONE"], []])
def test_lossy_axial_slices_are_derived_but_kept(tmp_path, more):
    scan = read_only(write_dicom_series(tmp_path / "case", HU, edit=setting(ImageType=["DERIVED", "PRIMARY", *more])))
    assert len(scan.hu) == 6 and scan.notes == ()


def test_lossy_enhanced_ct_is_derived_but_kept(tmp_path):
    ds = pydicom.dcmread(path := write_enhanced_ct(tmp_path / "enhanced", np.round(HU)))
    ds.ImageType, ds.LossyImageCompression = ["DERIVED", "PRIMARY", "VOLUME", "NONE"], "01"
    ds.save_as(path)
    np.testing.assert_array_equal(read_only(path).hu[::2], np.round(HU)[::2])


# ---- duplicates, gaps, refusals

def test_identical_duplicates_are_dropped(tmp_path):
    folder = write_dicom_series(tmp_path / "case", HU)
    for k in (1, 4):
        ds = pydicom.dcmread(folder / f"{k:03d}.dcm")
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = make_uid("copy", k)
        ds.save_as(folder / f"copy{k}.dcm")
    scan = read_only(folder)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.notes == ("duplicate slices dropped: 2",)


def test_two_different_slices_at_one_place_are_refused(tmp_path):
    folder = write_dicom_series(tmp_path / "case", HU)
    write_dicom_series(folder, HU[:3] + 1, name=lambda k: f"second{k}.dcm",
                       edit=lambda ds, k: setattr(ds, "SOPInstanceUID", make_uid("second", k)))
    with pytest.raises(ScanError, match="another, different slice lies: 3, the first second0.dcm and 000.dcm .*"
                                        "put each in a series of its own"):
        read_only(folder)


def test_missing_slices_are_noted_and_keep_their_gap(tmp_path):
    folder = write_dicom_series(tmp_path / "case", np.concatenate([HU, HU]))
    for k in (4, 8, 9):
        (folder / f"{k:03d}.dcm").unlink()
    scan = read_only(folder)
    np.testing.assert_allclose(np.diff(scan.position_mm), [5, 5, 5, 10, 5, 5, 15, 5])
    assert len(scan.notes) == 2
    assert scan.notes[0].startswith("slices missing: 1, 15.0 mm above")
    assert scan.notes[1].startswith("slices missing: 2, 35.0 mm above")


@pytest.mark.parametrize("thickness_mm, left, share", [
    (5, slice(None, None, 2), "10 mm apart: 50%"), (4, slice(None, None, 2), "10 mm apart: 60%"),
    (2, slice(None), "5 mm apart: 60%"), (3.5, slice(None), None), (None, slice(None, None, 2), None)])
def test_gaps_between_all_slices_are_noted(tmp_path, thickness_mm, left, share):
    """Every second file lost leaves even steps, so that nothing was said."""
    hu = np.concatenate([HU, HU])
    folder = write_dicom_series(tmp_path / "case", hu, edit=setting(SliceThickness=thickness_mm))
    for k in set(range(12)) - set(range(12)[left]):
        (folder / f"{k:03d}.dcm").unlink()
    scan = read_only(folder)
    np.testing.assert_array_equal(scan.hu, hu[left])
    assert scan.notes == ((f"slices are {thickness_mm} mm thick and {share} of the head is not shown; are files "
                           "missing?",) if share else ())


def test_two_spacings_are_no_gap():
    assert spacing_notes(np.arange(9) * 5.0) == []
    note, = spacing_notes(np.cumsum([0, 4, 4, 4, 4, 7, 7, 7, 7]))
    assert note == "uneven slice spacing (4 x 4.00, 4 x 7.00 mm); each slice keeps its own position"


@pytest.mark.parametrize("steps, shown", [
    (np.diff(np.round(4.75 * np.arange(34))), "steps of 4.00 to 5.00 mm, as where positions were rounded"),
    ([5.0, 5, 5, 3, 3, 3] * 4, "steps of 3.00 to 5.00 mm"),                  # up to 3 mm beside steps of 4
    ([4.0, 5, 5, 6, 5] * 4, "steps of 4.00 to 6.00 mm"),                     # of three sizes
    ([4.0, 4, 5, 5] * 2, "2 x 4.00, 2 x 5.00, 2 x 4.00, 2 x 5.00 mm"),       # few enough to list
])
def test_many_runs_of_steps_are_told_in_short(steps, shown):
    """An even series of 4.75 mm whose positions were rounded to 1 mm had a note of 17 runs."""
    note, = spacing_notes(np.cumsum([7.0, *steps]))
    assert note == f"uneven slice spacing ({shown}); each slice keeps its own position" and len(note) < 120


@pytest.mark.parametrize("edit, words", [
    (lambda ds, k: delattr(ds, "RescaleSlope"), "002.dcm has no valid RescaleSlope .*; export the series again"),
    (lambda ds, k: delattr(ds, "PixelSpacing"), "002.dcm has no valid PixelSpacing.*; export the series again"),
    (setting(PixelSpacing=[0.7, 0.7]), "two reconstructions"),
    (setting(ImageOrientationPatient=[1, 0, 0, 0, 0.94, -0.3412]), "at an angle"),
    (setting(Rows=8, Columns=10), "rows and columns"),
])
def test_series_that_do_not_hold_together_are_refused(tmp_path, edit, words):
    folder = write_dicom_series(tmp_path / "case", HU, edit=on((2,), edit))
    with pytest.raises(ScanError, match=words) as error:
        read_only(folder)
    assert "Secret" not in str(error.value)


def test_pixels_in_the_high_bits_are_refused(tmp_path):
    """12 bits that end at bit 15 were read as those that end at bit 11."""
    def edit(ds, k):
        stored = np.frombuffer(ds.PixelData, "<u2") << 4
        ds.BitsStored, ds.HighBit, ds.PixelData = 12, 15, stored.astype("<u2").tobytes()
    folder = write_dicom_series(tmp_path / "case", HU, edit=edit)
    with pytest.raises(ScanError, match="000.dcm: HighBit is 15, BitsStored 12: .*; expected HighBit 11; export the"):
        read_only(folder)
    write_dicom_series(tmp_path / "without", HU, edit=lambda ds, k: delattr(ds, "HighBit"))
    np.testing.assert_array_equal(read_only(tmp_path / "without").hu, HU)


def test_truncated_pixels_are_refused_by_name(tmp_path):
    folder = write_dicom_series(tmp_path / "case", HU)
    path = folder / "003.dcm"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ScanError, match="003.dcm: its pixels cannot be decoded .* truncated; copy or export it again$"):
        read_only(folder)                             # it was told to be exported uncompressed, which it is


# ---- written back

def at_point(image, lps):
    """Value of a NIfTI image at a point in DICOM coordinates, trilinear."""
    ras = np.append(np.array(lps) * (-1, -1, 1), 1)
    voxel = (np.linalg.inv(image.affine) @ ras)[:3]
    return map_coordinates(image.get_fdata(), voxel[:, None], order=1, mode="nearest")[0]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("positions", [np.arange(6) * 5.0, [0, 4, 8, 12, 19, 26]])
def test_a_map_lies_where_the_slices_were(tmp_path, flip, positions):
    """18.5 degrees of tilt; the file's own headers say where each pixel is."""
    folder = write_dicom_series(tmp_path / "case", HU, (5, 0.5, 0.4), position_mm=positions, tilt_deg=18.5,
                                flip_rows=flip, transpose=flip)
    scan = read_only(folder)
    note = write_nifti(tmp_path / "map.nii.gz", scan.hu, scan)
    even = len(set(np.diff(positions))) == 1
    assert note.startswith("sheared by 18 degrees") and ("resampled" in note) != even
    image = nib.load(tmp_path / "map.nii.gz")
    for k in range(6):
        ds = pydicom.dcmread(folder / f"{k:03d}.dcm")
        right, down = np.array(ds.ImageOrientationPatient).reshape(2, 3)
        row, column = 3, 5
        point = (np.array(ds.ImagePositionPatient) + row * ds.PixelSpacing[0] * down
                 + column * ds.PixelSpacing[1] * right)
        value = ds.pixel_array[row, column] * ds.RescaleSlope + ds.RescaleIntercept
        if k in (0, 5) or even:
            np.testing.assert_allclose(at_point(image, point), value, atol=0.1)


def test_positions_of_a_series_put_upright_are_the_negative_of_its_files(tmp_path):
    """Nothing said so, and slices.csv was taken for the files' coordinates."""
    hu, _ = synthetic_head(spacing_mm=(5.0, 2.4, 2.4))
    position = 5.0 * np.arange(len(hu)) + 2.0 * (np.arange(len(hu)) > 5)                     # a step of 7 mm
    write_dicom_series(tmp_path / "case", hu[::-1], (5.0, 2.4, 2.4), position, tilt_deg=10)
    scan = read_only(tmp_path)
    assert scan.notes[-2:] == (UPSIDE_DOWN, NEGATED) and "negative of the coordinate" in NEGATED
    heights = []
    for path, _ in scan.geometry.frames:
        ds = pydicom.dcmread(path)
        column, row = np.reshape(ds.ImageOrientationPatient, (2, 3)).astype(float)
        heights.append(np.array(ds.ImagePositionPatient, float) @ np.cross(column, row))
    np.testing.assert_allclose(-scan.position_mm, heights, atol=1e-6)
    assert np.diff(scan.position_mm).tolist() == pytest.approx([5.0] * 17 + [7.0] + [5.0] * 5, abs=1e-6)


def test_uneven_spacing_is_resampled(tmp_path):
    ramp = np.broadcast_to(np.array([0, 4, 8, 12, 18, 24], np.float32)[:, None, None], (6, 5, 4)).copy()
    ramp[:, 3:] = -1000
    scan = read_only(write_dicom_series(tmp_path / "case", ramp, position_mm=ramp[:, 0, 0]))
    note = write_nifti(tmp_path / "map.nii", scan.hu, scan)
    assert "uneven spacing (4.00 to 6.00 mm) to 4.00 mm, 7 slices" in note
    image = nib.load(tmp_path / "map.nii")
    np.testing.assert_allclose(image.get_fdata()[0, 0], [0, 4, 8, 12, 16, 20, 24], atol=1e-4)   # linear
    mask = np.zeros(ramp.shape, bool)
    mask[4] = True                                                            # 18 mm: nearest to 16 and 20
    write_nifti(tmp_path / "mask.nii", mask, scan)
    saved = nib.load(tmp_path / "mask.nii")
    assert saved.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(saved.get_fdata()[0, 0], [0, 0, 0, 0, 1, 1, 0])


@pytest.mark.parametrize("tilt_deg", [0, 20])
def test_a_field_centre_that_changes_is_noted(tmp_path, tilt_deg):
    """The head went on displaced, without a word."""
    def edit(ds, k):
        ds.ImagePositionPatient[0] += 20 * (k > 2)

    def said(folder, **how):
        scan = read_only(write_dicom_series(tmp_path / folder, HU, tilt_deg=tilt_deg, **how))
        assert scan.notes == ()
        return displaced(scan.geometry.origins, scan.position_mm)

    moved, = said("moved", edit=edit)
    assert moved.startswith("slices lie up to 20 mm beside those next to them") and "first 2 and the one above" in moved
    assert said("whole") == ()


@pytest.mark.parametrize("tilt_deg, told_deg, words", [
    (0, "+18.5", "GantryDetectorTilt is 18.5 degrees, but .*sheared by 0: .*heights are off by 5%"),
    (20, "10", "GantryDetectorTilt is 10 degrees, but .*sheared by 20: .*heights are off by 5%"),
    (20, "-20.4", None), (-20, "20", None), (20, "0", None), (20, "", None)])
def test_a_tilt_that_the_positions_do_not_show_is_noted(tmp_path, tilt_deg, told_deg, words):
    """Some exporters keep the angle of the gantry and write the slices as if they were straight."""
    def edit(ds, k):
        ds.GantryDetectorTilt = told_deg
    notes = read_only(write_dicom_series(tmp_path / "case", HU, tilt_deg=tilt_deg, edit=edit)).notes
    assert re.match(words, *notes) if words else notes == ()


def test_slices_aside_of_the_line_are_moved_onto_it(tmp_path):
    """A block of slices with another field centre: their maps move with them."""
    image = np.full((6, 9, 9), -1000, np.float32)
    image[:, 4, 4] = 100

    def edit(ds, k):
        ds.ImagePositionPatient[0] += 2 * (k in (2, 3))
    scan = read_only(write_dicom_series(tmp_path / "case", image, edit=edit))
    assert displaced(scan.geometry.origins, scan.position_mm) == ()           # 2 mm
    note = write_nifti(tmp_path / "map.nii", scan.hu, scan)
    assert "shifted in plane" in note
    saved = nib.load(tmp_path / "map.nii")
    for k in range(6):
        x = -40 + 4 + 2 * (k in (2, 3))
        peak = np.average(np.arange(9), weights=saved.get_fdata()[:, 4, k] + 1000)
        assert abs(saved.affine[0] @ (peak, 4, k, 1) + x) < 0.01


def test_no_patient_data_in_what_is_written(tmp_path):
    scan = read_only(write_dicom_series(tmp_path / "case", HU))
    write_nifti(tmp_path / "map.nii", scan.hu, scan)
    assert b"Secret" not in (tmp_path / "map.nii").read_bytes()
    assert "Secret" not in repr(scan) and "SECRET" not in repr(scan)


def test_a_volume_that_does_not_fit_is_refused(tmp_path):
    scan = read_only(write_dicom_series(tmp_path / "case", HU))
    with pytest.raises(ValueError, match="does not fit"):
        write_nifti(tmp_path / "map.nii", scan.hu[1:], scan)
