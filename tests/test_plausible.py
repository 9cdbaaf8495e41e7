"""Numbers that are no HU, or lengths that are not in mm: refused by name, or noted."""

import nibabel as nib
import numpy as np
import pytest

from ct.plausible import refuse_odd_slices
from ct.scan import Scan, ScanError
from tests.helpers import read_all, synthetic_head
from tests.writers import edited, make_uid, second_stack, write_dicom_series, write_nifti_scan, write_slice_folder

RNG = np.random.default_rng(4)
HU = RNG.integers(-1000, 600, (6, 10, 8)).astype(np.float32)


@pytest.mark.parametrize("change, words", [
    (edited(RescaleType="ED"), r"left out: 6 no HU \(RescaleType ED\)\); give the series that is in HU$"),
    (edited(RescaleIntercept=0), "do not look like HU of a head in air"),
    (lambda ds, k: setattr(ds, "PixelData", (-np.frombuffer(ds.PixelData, "<i2")).tobytes()), "do not look like HU")])
def test_other_numbers_are_refused(tmp_path, change, words):
    write_dicom_series(tmp_path / "case", HU, edit=change)
    with pytest.raises(ScanError, match=words):
        read_all(tmp_path)


@pytest.mark.parametrize("folder", ["case", "other"])
@pytest.mark.parametrize("values, words", [
    ({"RescaleType": "MGML", "ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, "no HU (RescaleType MGML)"),
    ({"RescaleType": "UNSPECIFIED", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localiser")])
def test_series_in_another_unit_are_a_note_of_the_study(tmp_path, folder, values, words):
    """Iodine maps: a row with an error, and the good scan beside them was said to miss files that cannot be read."""
    write_dicom_series(tmp_path / "case", HU)
    write_dicom_series(tmp_path / folder, HU / 100, name=lambda k: f"map{k}",
                       edit=edited(SeriesInstanceUID=make_uid("maps"), **values))
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.notes == (f"other series of the study left out: 1 {words}",)


def test_images_in_another_unit_under_the_same_series_are_left_out(tmp_path):
    write_dicom_series(tmp_path / "case", HU)
    second_stack(tmp_path / "case", HU / 100, 2.5, RescaleType="Secret Name")
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.notes == ("left out: 6 no HU (RescaleType unknown)",)


def test_hounsfield_units_by_their_whole_name(tmp_path):
    write_dicom_series(tmp_path / "case", HU, edit=edited(RescaleType="Hounsfield Units"))
    np.testing.assert_array_equal(read_all(tmp_path)[0].hu, HU)


def test_bits_above_those_stored_do_not_count(tmp_path):
    """An overlay in bit 15 of 12-bit pixels, also in signed ones; the sign comes from bit 11."""
    def overlay(ds, k):
        stored = np.frombuffer(ds.PixelData, "<u2").copy()
        if ds.PixelRepresentation:
            stored = (stored.astype(np.int32) - 1024).astype("<u2") & 0xfff           # two's complement in 12 bits
            ds.RescaleIntercept = 0
        stored[::3] |= 0x8000
        ds.BitsStored, ds.HighBit, ds.PixelData = 12, 11, stored.tobytes()

    for signed in (0, 1):
        def change(ds, k, signed=signed):
            ds.PixelRepresentation = signed
            overlay(ds, k)
        write_dicom_series(tmp_path / str(signed), HU, series=signed, edit=change)
    for scan in read_all(tmp_path):
        np.testing.assert_array_equal(scan.hu, HU)


@pytest.mark.parametrize("signed, stored, read, noted", [
    (0, 4324, 228, True),                                         # metal of 3300 HU, which reads as -796
    (0, 4095, 4095, False), (1, 5000, 904, True), (1, -1000, -1000, False),
    (1, 0x0C18, -1000, False)])                                   # with 0 in the bits above
@pytest.mark.parametrize("overlay", [None, 0, 15])
def test_values_with_more_bits_than_are_told_are_noted(tmp_path, signed, stored, read, noted, overlay):
    """Metal turned into air without a word. Not where an overlay may be there: its position is 0 where it is not."""
    def change(ds, k):
        pixels = np.frombuffer(ds.PixelData, "<i2").astype(np.int32) - (1024 if signed else 0)
        pixels[0] = stored
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PixelData = 12, 11, signed, pixels.astype("<i2").tobytes()
        ds.RescaleIntercept = 0 if signed else -1024
        if overlay is not None:
            ds.add_new((0x6002, 0x0102), "US", overlay)
    write_dicom_series(tmp_path / "case", HU, edit=lambda ds, k: change(ds, k) if k > 3 or signed else None)
    scan, = read_all(tmp_path)
    assert scan.hu[4, 0, 0] == max(read - (0 if signed else 1024), -1024)
    note = ("values need more bits than BitsStored says (12), where the header tells of no overlay, and are read "
            f"without these, metal perhaps as air: {6 if signed else 2} slices")
    assert scan.notes == ((note,) if noted and not overlay else ())


def test_padding_among_tissue_is_none(tmp_path):
    write_dicom_series(tmp_path / "case", HU, edit=edited(PixelPaddingValue=1024))            # 0 HU
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert "PixelPaddingValue lies among the HU of tissue" in scan.notes[0]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("change", [
    lambda ds: setattr(ds, "RescaleSlope", 2), lambda ds: setattr(ds, "RescaleIntercept", 0),
    lambda ds: setattr(ds, "PixelData", bytes(len(ds.PixelData)))])
def test_slices_whose_values_are_no_hu_are_refused_by_number(tmp_path, change, count):
    """As long as the scan as a whole looked like a head, a slice of bone in place of brain went in without a word; and
    later two such slices beside each other, each of which had a neighbour like it."""
    hu = np.round(synthetic_head(slices=14, size=48, spacing_mm=(8.0, 5.0, 5.0))[0])
    write_dicom_series(tmp_path, hu, (8.0, 5.0, 5.0), edit=lambda ds, k: change(ds) if 5 <= k < 5 + count else None)
    with pytest.raises(ScanError, match=r"^slice 5 \(0: the most inferior\): .*unlike the slices around it, and "
                       f"{count - 1} more such slices"):
        read_all(tmp_path)


@pytest.mark.parametrize("first", [0, 11])
def test_slices_without_air_are_refused_at_the_ends_too(tmp_path, first):
    """Three at the vertex turned the scan upside down, with a note that the slices had run the other way."""
    hu = np.round(synthetic_head(slices=14, size=48, spacing_mm=(8.0, 5.0, 5.0))[0])
    write_dicom_series(tmp_path, hu, (8.0, 5.0, 5.0),
                       edit=lambda ds, k: setattr(ds, "RescaleIntercept", 0) if first <= k < first + 3 else None)
    with pytest.raises(ScanError, match=rf"^slice {first} \(0: the most inferior\): 0% air.* and 2 more such slices"):
        read_all(tmp_path)


def test_a_picture_cut_within_the_head_may_hold_air_on_some_slices_alone(tmp_path):
    """In a sinus, say."""
    hu = np.clip(np.round(synthetic_head(slices=14, size=48, spacing_mm=(8.0, 5.0, 5.0))[0][:, 14:34, 14:34]), 20, 60)
    hu[2:10, 3:5, 3:5] = -1000
    refuse_odd_slices(Scan("cut", hu.astype(np.float32), np.arange(14) * 8.0, (5.0, 5.0)))


@pytest.mark.parametrize("fill_hu, words", [
    (0, "^filled with 0 HU outside the scan.*; fill with -1024"), (-1024, None),
    (np.arange(50).reshape(5, 10), r"^slice 3 \(0: the most inferior\): 95% air, 0% bone, 5% soft")])
def test_a_scan_filled_with_another_value_than_air_is_named(fill_hu, words):
    """Two halves of 10 x 10 pixels filled, as where a program turned the head: its slice without that was the odd one.
    Of 50 values, which tissue may have, nothing is said."""
    hu = np.full((7, 10, 10), -1000.0)
    hu[:, 8, :5] = 30                                             # 5 % soft tissue, less than a fifth of 55 %
    hu[[2, 4], :5] = fill_hu
    scan = Scan("turned", hu.astype(np.float32), np.arange(7) * 5.0, (1.0, 1.0))
    if words is None:
        refuse_odd_slices(scan)
    else:
        with pytest.raises(ScanError, match=words):
            refuse_odd_slices(scan)


@pytest.mark.parametrize("bits, step_hu", [(8, 16), (16, 2)])
def test_values_in_coarse_steps_are_noted(tmp_path, bits, step_hu):
    """Eight bits for all that CT shows: levels 16 HU apart went in without a word, infarcts lost between them."""
    write_dicom_series(tmp_path / "dicom", HU, slope=step_hu)
    write_slice_folder(tmp_path / "pictures", HU, window=(-1000, 3080), bits=bits)
    stored = ((HU + 1000) / step_hu).astype(f"u{bits // 8}").transpose(2, 1, 0)
    image = nib.Nifti1Image(stored, np.diag([-1, -1, 5, 1]))
    image.header.set_slope_inter(step_hu, -1000)
    nib.save(image, tmp_path / "one.nii")
    scans = read_all(tmp_path)
    note = ("values are stored in steps of 16 HU: what differs by less from healthy tissue is lost",)
    assert [scan.notes for scan in scans] == [note if bits == 8 else ()] * 3


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
@pytest.mark.parametrize("step_hu", [1, 8])
def test_coarse_steps_are_noted_by_the_values_where_the_header_tells_none(tmp_path, kind, step_hu):
    """A slope of 1, and values 8 HU apart: what is coarse was told by the header alone."""
    rounded = np.round(HU / step_hu) * step_hu
    write_dicom_series(tmp_path / "dicom", rounded)
    write_slice_folder(tmp_path / "pictures", rounded, window=(-1024, 2251.75), bits=16)      # 0.05 HU a level
    image = nib.Nifti1Image((rounded + 1024).astype(kind).transpose(2, 1, 0), np.diag([-1, -1, 5, 1]))
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "one.nii")
    note = ("values are stored in steps of 8 HU: what differs by less from healthy tissue is lost",)
    assert [scan.notes for scan in read_all(tmp_path)] == [note if step_hu == 8 else ()] * 3


@pytest.mark.parametrize("spacing_mm, words", [
    ((5, 890, 890), "pixel spacing of 890 x 890 mm"), ((5, 0.09, 0.09), "pixel spacing of 0.09"),
    ((0.01, 0.5, 0.5), "slice spacing of 0.01"), ((50, 0.5, 0.5), "slice spacing of 50")])
def test_sizes_in_another_unit_are_refused(tmp_path, spacing_mm, words):
    write_nifti_scan(tmp_path / "vol.nii", HU, spacing_mm)
    with pytest.raises(ScanError, match=words):
        read_all(tmp_path)
    (tmp_path / "vol.nii").unlink()
    if spacing_mm[0] > 0.05:                                     # closer slices are duplicates in DICOM
        write_dicom_series(tmp_path / "case", HU, spacing_mm)
        with pytest.raises(ScanError, match=words):
            read_all(tmp_path)
