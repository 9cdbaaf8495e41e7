"""Odd inputs that people report of CT tools, one test or more per kind: read right, taken apart, or refused by name."""

import gzip
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import SecondaryCaptureImageStorage

from ct.plausible import refuse_odd_slices
from ct.read import find_scans, read_scan
from ct.scan import RESULT_MARK, Scan, ScanError
from ct.slices import in_order
from ct.write import write_nifti
from tests.helpers import synthetic_head
from tests.writers import make_uid, write_dicom_series, write_nifti_scan, write_scan_json, write_slice_folder

RNG = np.random.default_rng(4)
HU = RNG.integers(-1000, 600, (6, 10, 8)).astype(np.float32)


def edit(**values):
    def change(ds, k):
        for keyword, value in values.items():
            setattr(ds, keyword, value)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = make_uid(str(values), ds.SOPInstanceUID)
    return change


def read_all(folder, **kwargs):
    return [read_scan(source) for source in find_scans(folder, **kwargs)]


def second(folder, hu, offset_mm=0.0, **values):
    """A further stack of the same series and study, beside the first."""
    write_dicom_series(folder, hu, position_mm=np.arange(len(hu)) * 5.0 + offset_mm, name=lambda k: f"second{k}",
                       edit=edit(**values))


# ---- A: what is one scan

@pytest.mark.parametrize("offset_mm", [0.0, 2.5])
@pytest.mark.parametrize("values, words", [
    ({"AcquisitionNumber": 2}, "acquisition number"), ({"ConvolutionKernel": "H70h"}, "reconstruction kernel"),
    ({"ContrastBolusAgent": "agent"}, "contrast agent"), ({"SliceThickness": 1}, "slice thickness")])
def test_two_stacks_in_one_series_are_two_scans(tmp_path, values, words, offset_mm):
    write_dicom_series(tmp_path / "case", HU)
    second(tmp_path / "case", HU + 7, offset_mm, **values)
    scans = read_all(tmp_path)
    assert sorted(float(scan.hu[0, 0, 0] - HU[0, 0, 0]) for scan in scans) == [0, 7]
    assert all(any(f"told apart by {words}" in note for note in scan.notes) for scan in scans)


def test_acquisitions_whose_long_numbers_differ_at_the_end_are_two_scans(tmp_path):
    """Their numbers were cut to six digits, and the slices of one came between those of the other."""
    write_dicom_series(tmp_path / "case", HU, edit=edit(AcquisitionNumber=20240101))
    second(tmp_path / "case", HU + 7, 2.5, AcquisitionNumber=20240102)
    scans = read_all(tmp_path)
    assert sorted(float(scan.hu[0, 0, 0] - HU[0, 0, 0]) for scan in scans) == [0, 7]


def test_thicknesses_that_differ_by_rounding_are_one_scan(tmp_path):
    def thickness(ds, k):
        ds.SliceThickness = "4.9999998" if k % 2 else "5"
    write_dicom_series(tmp_path / "case", HU, edit=thickness)
    np.testing.assert_array_equal(read_all(tmp_path)[0].hu, HU)


def test_acquisitions_above_each_other_are_one_scan(tmp_path):
    def acquisition(ds, k):
        ds.AcquisitionNumber = 1 + k // 2
    write_dicom_series(tmp_path / "case", HU, edit=acquisition)
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.notes == ()


@pytest.mark.parametrize("values", [
    [{"SliceThickness": 5}, {"SliceThickness": 4.8}], [{"SliceThickness": 5}, {"SliceThickness": None}],
    [{"AcquisitionNumber": 1}, {}], [{"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "HELIX"]}, {}],
    [{"PixelSpacing": ["0.48828125", "1"]}, {"PixelSpacing": ["0.488281", "1"]}],
    [{"KVP": 120}, {}], [{"ConvolutionKernel": "H31s"}, {"ConvolutionKernel": ""}],
    [{"TemporalPositionIdentifier": 1}, {}]])
def test_slices_that_fill_each_others_gaps_are_one_scan(tmp_path, values):
    """Every second one, told otherwise, was a scan of its own: half the slices, twice as far apart."""
    hu = np.concatenate([HU, HU])

    def change(ds, k):
        for keyword, value in ({"SliceThickness": 5} | values[k % 2]).items():
            setattr(ds, keyword, value)
    write_dicom_series(tmp_path / "case", hu, edit=change)
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, hu)
    assert scan.notes == ()


def test_slices_that_lack_the_contrast_agent_fill_the_others_gaps(tmp_path):
    hu = np.concatenate([HU, HU])

    def change(ds, k):
        ds.SliceThickness, ds.ContrastBolusAgent = 5, "" if k % 2 else "agent"
    write_dicom_series(tmp_path / "case", hu, edit=change)
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, hu)
    assert len(scan.notes) == 1 and scan.notes[0].startswith("contrast agent given")


@pytest.mark.parametrize("values, places", [
    (("120", "80"), np.arange(12) * 5.0), (("120", ""), np.arange(12) // 2 * 5.0), (("120", ""), np.arange(12) * 2.5)])
def test_other_voltages_and_slices_beyond_the_gaps_stay_two_scans(tmp_path, values, places):
    """Of two told values, of two at each place, and of slices that overlap."""
    hu = np.repeat(HU, 2, axis=0) + np.tile([0, 7], 6)[:, None, None].astype(np.float32)

    def change(ds, k):
        ds.SliceThickness, ds.KVP = 5, values[k % 2]
    write_dicom_series(tmp_path / "case", hu, position_mm=places, edit=change)
    scans = read_all(tmp_path)
    assert sorted(float(scan.hu[0, 0, 0] - HU[0, 0, 0]) for scan in scans) == [0, 7]
    assert all(len(scan.hu) == 6 and "told apart by tube voltage" in scan.notes[0] for scan in scans)


@pytest.mark.parametrize("number, thickness_mm", [
    (lambda k: 1 + sorted(map(str, range(1, 30))).index(str(k + 1)), None), (lambda k: 1 + k // 2 + 15 * (k % 2), 5)])
def test_slices_numbered_by_their_names_or_every_second_first_are_one_scan(tmp_path, number, thickness_mm):
    """1, 10, 11 ... 19, 2, 20 ...: runs through the same stretch, which were taken for phases."""
    hu = RNG.integers(-1000, 600, (29, 10, 8)).astype(np.float32)

    def change(ds, k):
        ds.InstanceNumber, ds.SliceThickness = number(k), thickness_mm
    write_dicom_series(tmp_path / "case", hu, edit=change)
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, hu)
    assert scan.notes == ()


def test_a_series_in_two_folders_that_share_a_slice_is_one_scan(tmp_path):
    """It was two, the upper one a head without its base that nothing was said of."""
    write_dicom_series(tmp_path / "case" / "a", HU)
    (tmp_path / "case" / "b").mkdir()
    for k in (3, 4, 5):
        (tmp_path / "case" / "a" / f"{k:03d}.dcm").rename(tmp_path / "case" / "b" / f"{k:03d}.dcm")
    shutil.copy(tmp_path / "case" / "b" / "003.dcm", tmp_path / "case" / "a")
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.scan_id == "case" and scan.notes == ("duplicate slices dropped: 1",)


@pytest.mark.parametrize("offset_mm", [1.0, 2.5, 5.0])
@pytest.mark.parametrize("number", [lambda k: 1 + k, lambda k: 24 - k])
def test_two_passes_are_two_scans_by_their_image_numbers(tmp_path, number, offset_mm):
    """Both numbered 1 to 12, or the second back down from 24: one scan of 24 slices of two heads in turn."""
    hu = np.concatenate([HU, HU])
    write_dicom_series(tmp_path / "case", hu)
    write_dicom_series(tmp_path / "case", hu + 7, position_mm=np.arange(12) * 5.0 + offset_mm,
                       name=lambda k: f"second{k}",
                       edit=lambda ds, k: edit(InstanceNumber=number(k), AcquisitionNumber=None)(ds, k))
    scans = read_all(tmp_path)
    assert sorted(float(scan.hu[0, 0, 0] - HU[0, 0, 0]) for scan in scans) == [0, 7]
    assert all(len(scan.hu) == 12 and (np.diff(scan.position_mm) == 5).all() for scan in scans)
    assert [scan.notes for scan in scans] == [("one of 2 stacks in this series, told apart by image number",)] * 2


@pytest.mark.parametrize("first, then", [
    (range(12), np.arange(10.5, 4, -1)), (range(11), np.arange(10.5, 4, -1)), (range(11), np.arange(11, 0, -1))])
def test_the_slice_at_which_two_passes_turn_belongs_where_its_step_fits(tmp_path, first, then):
    places = np.array([*first, *then]) * 5.0
    hu = RNG.integers(-1000, 600, (len(places), 10, 8)).astype(np.float32)
    write_dicom_series(tmp_path / "case", hu, position_mm=places)
    scans = read_all(tmp_path)
    assert sorted(len(scan.hu) for scan in scans) == sorted([len(first), len(then)])
    assert all((np.diff(scan.position_mm) == 5).all() for scan in scans)


def places_and_numbers(kind):
    """Of one pass, in mm and InstanceNumber."""
    mm = np.arange(24) * 5.0
    if kind == "blocks above each other, each numbered from 1":
        return mm, [1 + k % 12 for k in range(24)]
    if kind == "up through one half and down through the other":
        return mm, [1 + k if k < 12 else 36 - k for k in range(24)]
    if kind == "a number that comes once":
        return mm, [1 + k // 2 for k in range(23)] + [99]
    return mm, [1 + (7 * k) % 24 // 2 for k in range(24)]         # in no order


@pytest.mark.parametrize("kind", ["blocks above each other, each numbered from 1", "in no order",
                                  "up through one half and down through the other", "a number that comes once"])
def test_one_pass_is_one_scan_whatever_its_numbers(tmp_path, kind):
    """None of this is two passes."""
    places, numbers = places_and_numbers(kind)
    hu = RNG.integers(-1000, 600, (24, 10, 8)).astype(np.float32)
    write_dicom_series(tmp_path / "case", hu, position_mm=places,
                       edit=lambda ds, k: setattr(ds, "InstanceNumber", numbers[k]))
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, hu)


def test_every_slice_twice_is_one_scan(tmp_path):
    """With the same numbers at the same places: duplicates, no two passes."""
    write_dicom_series(tmp_path / "case", HU)
    second(tmp_path / "case", HU)
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.notes == ("duplicate slices dropped: 6",)


def test_two_patients_under_one_uid_are_two_scans_without_names(tmp_path):
    write_dicom_series(tmp_path / "case", HU)
    second(tmp_path / "case", HU + 7, 2.5, PatientID="SECRET-2", PatientName="Secret^Other")
    scans = read_all(tmp_path)
    assert len(scans) == 2 and all(len(scan.hu) == 6 for scan in scans)
    assert "ecret" not in repr(scans) + str(find_scans(tmp_path)) and "SECRET" not in repr(scans)


def test_a_screenshot_and_compressed_copies_are_left_out(tmp_path):
    write_dicom_series(tmp_path / "case", HU)
    second(tmp_path / "case", HU + 1, ImageType=["DERIVED", "PRIMARY", "AXIAL"], LossyImageCompression="01")
    write_dicom_series(tmp_path / "case", HU[:1], position_mm=[40], name=lambda k: "shot",
                       edit=edit(SOPClassUID=SecondaryCaptureImageStorage))
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert "left out: 6 copy of another slice (derived or lossy compressed)" in scan.notes
    assert any("SOP class Secondary Capture Image Storage" in note for note in scan.notes)


def test_axial_slices_called_derived_are_slices(tmp_path):
    def derived(ds, k):
        if k % 3 == 0:
            ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    write_dicom_series(tmp_path / "case", HU, edit=derived)
    scan, = read_all(tmp_path)
    assert len(scan.hu) == 6 and "marked as derived and secondary (ImageType), taken as axial slices: 2" in scan.notes


def test_series_of_one_image_are_one_scan_or_one_reason(tmp_path):
    for k in range(6):
        write_dicom_series(tmp_path / "case", HU[k:k + 1], position_mm=[5.0 * k], series=k, name=lambda _, k=k: f"{k}")
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.notes == ("6 series of one or two images taken as one scan",)
    for k in range(6):
        write_dicom_series(tmp_path / "case", HU[k:k + 1], position_mm=[5.0 * k], series=k, name=lambda _, k=k: f"{k}",
                           edit=edit(FrameOfReferenceUID=make_uid("frame", k)))
    source, = find_scans(tmp_path)
    with pytest.raises(ScanError, match="0 and 5 more: series of one or two images, which differ in frame"):
        read_scan(source)


def test_a_study_uid_for_each_file_of_a_series_is_one_scan(tmp_path):
    """Each slice was a row of its own."""
    write_dicom_series(tmp_path / "case", HU, edit=lambda ds, k: edit(StudyInstanceUID=make_uid("study", k))(ds, k))
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.scan_id == "case" and scan.notes == (
        "6 studies of one or two images that share series, frame of reference and patient, taken as one",)


@pytest.mark.parametrize("per_file", [True, False])
def test_studies_under_one_series_uid_are_not_joined_across_patients(tmp_path, per_file):
    """Nor where they hold whole scans: careless anonymisers give one series UID, and one patient, to all."""
    for patient, folder in enumerate("ab"):
        values = {"PatientID": f"{patient}"} if per_file else {}
        write_dicom_series(tmp_path / folder, HU + 7 * patient, edit=lambda ds, k, patient=patient, values=values: edit(
            StudyInstanceUID=make_uid("study", patient, k * per_file), **values)(ds, k))
    scans = read_all(tmp_path)
    assert sorted(float(scan.hu[0, 0, 0] - HU[0, 0, 0]) for scan in scans) == [0, 7]
    assert all(len(scan.hu) == 6 for scan in scans)


@pytest.mark.parametrize("values", [{"SeriesInstanceUID": None}, {"FrameOfReferenceUID": ""}])
def test_uids_replaced_file_by_file_are_one_row(tmp_path, values):
    """Or where no frame of reference says that the places can be compared. It was a row for each slice."""
    def change(ds, k):
        own = {name: make_uid(name, k) if uid is None else uid for name, uid in values.items()}
        edit(StudyInstanceUID=make_uid("study", k), **own)(ds, k)
    write_dicom_series(tmp_path / "case", HU, edit=change)
    write_dicom_series(tmp_path / "whole", HU, series="whole", study="whole")
    source, whole = find_scans(tmp_path)
    np.testing.assert_array_equal(read_scan(whole).hu, HU)
    with pytest.raises(ScanError, match="^000.dcm and 5 more: 6 studies of one image in this folder, as where UIDs "
                       "were replaced file by file; export"):
        read_scan(source)


def test_files_that_tell_their_class_outside_the_data_set_alone_are_read(tmp_path):
    """As RSNA's export, which also lacks these others: each file was no DICOM image."""
    def change(ds, k):
        del ds.SOPClassUID, ds.InstanceNumber, ds.ImageType, ds.FrameOfReferenceUID
    scan, = read_all(write_dicom_series(tmp_path / "case", HU, edit=change))
    np.testing.assert_array_equal(scan.hu, HU)
    np.testing.assert_allclose(scan.position_mm, 10 + np.arange(6) * 5)
    assert scan.notes == ()
    for path in (tmp_path / "case").iterdir():
        ds = pydicom.dcmread(path)
        del ds.file_meta.MediaStorageSOPClassUID
        ds.save_as(path)
    with pytest.raises(ScanError, match=r"000.dcm: not a DICOM image \(neither SOPClassUID nor MediaStorageSOPC"):
        read_all(tmp_path)


# ---- B: numbers that are not HU

@pytest.mark.parametrize("change, words", [
    (edit(RescaleType="ED"), r"left out: 6 no HU \(RescaleType ED\)\); give the series that is in HU$"),
    (edit(RescaleIntercept=0), "do not look like HU of a head in air"),
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
                       edit=edit(SeriesInstanceUID=make_uid("maps"), **values))
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.notes == (f"other series of the study left out: 1 {words}",)


def test_images_in_another_unit_under_the_same_series_are_left_out(tmp_path):
    write_dicom_series(tmp_path / "case", HU)
    second(tmp_path / "case", HU / 100, 2.5, RescaleType="Secret Name")
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.notes == ("left out: 6 no HU (RescaleType unknown)",)


def test_hounsfield_units_by_their_whole_name(tmp_path):
    write_dicom_series(tmp_path / "case", HU, edit=edit(RescaleType="Hounsfield Units"))
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
    write_dicom_series(tmp_path / "case", HU, edit=edit(PixelPaddingValue=1024))            # 0 HU
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert "PixelPaddingValue lies among the HU of tissue" in scan.notes[0]


@pytest.mark.parametrize("values", [HU + 1024 - 30, np.where(HU > 300, 3000, HU + 1000) - 24,
                                    RNG.normal(0, 20, HU.shape)])
def test_nifti_with_an_offset_is_refused(tmp_path, values):
    write_nifti_scan(tmp_path / "vol.nii", values)
    with pytest.raises(ScanError, match="look like HU"):
        read_all(tmp_path)


# ---- D: nothing is passed over in silence

def test_bare_dicom_without_suffix_is_read_and_the_rest_is_named(tmp_path):
    folder = write_dicom_series(tmp_path / "case", HU, name=lambda k: f"IM{k}")
    for k in (1, 3):
        ds = pydicom.dcmread(folder / f"IM{k}")
        del ds.file_meta, ds.preamble
        ds.save_as(folder / f"IM{k}", implicit_vr=True, little_endian=True)
    (folder / "report.pdf").write_bytes(b"%PDF-1.4 nothing")
    lines = []
    scan, = read_all(tmp_path, log=lines.append)
    np.testing.assert_array_equal(scan.hu, HU)
    assert lines == ["not read, no scans: 1 files (1 .pdf), the first case/report.pdf"]


def test_a_nifti_pair_is_read_and_analyze_is_refused(tmp_path):
    image = nib.load(write_nifti_scan(tmp_path / "one.nii", HU))
    nib.save(nib.Nifti1Pair(image.get_fdata().astype(np.int16), image.affine), tmp_path / "pair.hdr")
    pair = next(scan for scan in read_all(tmp_path) if scan.scan_id == "pair")
    np.testing.assert_array_equal(pair.hu, HU)
    (tmp_path / "old").mkdir()
    nib.save(nib.AnalyzeImage(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "old" / "a.hdr")
    with pytest.raises(ScanError, match="a.hdr: an Analyze 7.5 header"):
        read_all(tmp_path / "old")


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


def test_a_zip_is_read_and_its_paths_stay_inside(tmp_path):
    series = write_dicom_series(tmp_path / "files", HU)
    with zipfile.ZipFile(tmp_path / "heads.zip", "w") as archive:
        for path in series.iterdir():
            archive.write(path, f"sub/{path.name}")
    source, = find_scans(tmp_path / "heads.zip")
    assert source.scan_id == "heads--sub" and source.files == (tmp_path / "heads.zip",)
    np.testing.assert_array_equal(read_scan(source).hu, HU)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("../escaped.dcm", b"x")
    source, = find_scans(tmp_path / "bad.zip")
    with pytest.raises(ScanError, match="bad.zip: holds a path that leads out"):
        read_scan(source)
    assert not (tmp_path.parent / "escaped.dcm").exists()


def test_results_among_the_scans_are_left_aside(tmp_path):
    path = write_nifti_scan(tmp_path / "scan.nii.gz", HU)
    scan, = read_all(path)
    (tmp_path / "results" / "scan").mkdir(parents=True)
    (tmp_path / "results" / "scan" / "result.json").write_text(json.dumps({"key": {}, "scan": {}, "slices": []}))
    write_nifti(tmp_path / "results" / "scan" / "reconstruction.nii.gz", scan.hu, scan)
    lines = []
    assert [one.scan_id for one in find_scans(tmp_path, log=lines.append)] == ["scan"]
    assert lines == ["left aside: 1 folders with results of this program (results/scan)"]
    write_nifti(tmp_path / "copied.nii.gz", scan.hu, scan, description=f"{RESULT_MARK}: reconstruction")
    with pytest.raises(ScanError, match="copied.nii.gz: a result of this program"):
        read_all(tmp_path / "copied.nii.gz")


# ---- E: one scan never costs the others

def test_a_name_that_is_no_utf8_has_a_printable_id(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xc3\xee\xeb"
    write_slice_folder(os.fsdecode(folder), HU[:1].clip(-20, 100))
    source, = find_scans(tmp_path)
    assert source.scan_id == "%C3%EE%EB" and len(read_scan(source).hu) == 1


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


# ---- F: NIfTI headers

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


# ---- G: pictures

def order(*names):
    return [path.name for _, path in in_order([Path(name) for name in names])]


def test_signs_and_decimals_belong_to_the_number():
    assert order("5.0.png", "-60.0.png", "0.0.png", "-5.0.png") == ["-60.0.png", "-5.0.png", "0.0.png", "5.0.png"]
    assert order("z5.png", "z-60.png", "z0.png") == ["z-60.png", "z0.png", "z5.png"]
    assert order("2.5.png", "10.0.png", "5.0.png") == ["2.5.png", "5.0.png", "10.0.png"]
    assert order("im-0010.png", "im-0002.png") == ["im-0002.png", "im-0010.png"]
    assert order("s-3.png", "s-1.png", "s-2.png") == ["s-1.png", "s-2.png", "s-3.png"]


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("IM-1-2.png", "IM-2-1.png"), ("z-60.png", "z-55.png"),
                                   ("slice1.png", "Slice2.png")])
def test_names_without_an_order_are_refused(names):
    with pytest.raises(ScanError, match="no order|sign"):
        order(*names)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-500, 500), min_size=2, max_size=30, unique=True), st.sampled_from(["", "z", "pos_"]))
def test_slices_come_in_the_order_of_their_positions(positions, prefix):
    names = [f"{prefix}{mm / 2:.1f}.png" for mm in positions]
    try:
        found = order(*names)
    except ScanError:
        return
    wanted = [f"{prefix}{mm / 2:.1f}.png" for mm in sorted(positions)]
    assert found == wanted


def test_pictures_are_turned_as_exif_says(tmp_path):
    grey = np.zeros((16, 24), np.uint8)
    grey[4:8, 2:9] = 200
    exif = Image.Exif()
    exif[0x0112] = 2                                              # mirrored left to right
    (tmp_path / "case").mkdir()
    Image.fromarray(grey[:, ::-1]).save(tmp_path / "case" / "0.jpg", quality=95, exif=exif)
    write_scan_json(tmp_path / "case", [[0, 100]])
    scan, = read_all(tmp_path)
    assert scan.hu[0, 5, 5] > 70 and scan.hu[0, 5, -6] < 5


def test_what_is_transparent_is_outside_and_inverted_is_refused(tmp_path):
    rgba = np.full((1, 8, 8, 4), 255, np.uint8)
    rgba[0, :, :, 3] = 0
    rgba[0, 2:6, 2:6] = (128, 128, 128, 255)
    (tmp_path / "case").mkdir()
    Image.fromarray(rgba[0]).save(tmp_path / "case" / "0.png")
    write_scan_json(tmp_path / "case", [[0, 255]])
    scan, = read_all(tmp_path)
    assert scan.hu[0, 0, 0] == 0 and scan.hu[0, 3, 3] == 128
    Image.fromarray(255 - scan.hu[0].astype(np.uint8)).save(tmp_path / "case" / "0.png")
    with pytest.raises(ScanError, match="white at their border"):
        read_all(tmp_path)


def test_twelve_bits_in_sixteen_are_refused_and_a_byte_order_mark_is_read(tmp_path):
    folder = write_slice_folder(tmp_path / "case", HU, (-1024, 3071), bits=16)
    path = folder / "scan.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    np.testing.assert_allclose(read_all(tmp_path)[0].hu, HU, atol=0.05)
    for k in range(6):
        twelve = (HU[k] + 1024).astype(np.uint16)
        Image.fromarray(twelve).save(folder / f"{k}.png")
    with pytest.raises(ScanError, match="12-bit values"):
        read_all(tmp_path)


# ---- H: messages

@pytest.mark.parametrize("change, words", [
    (edit(ImagePositionPatient=[0, 0, 0]), "all 6 slices lie at one ImagePositionPatient"),
    (lambda ds, k: delattr(ds, "PixelSpacing"), "000.dcm has no valid PixelSpacing")])
def test_messages_name_attribute_and_file_but_no_folder(tmp_path, change, words):
    write_dicom_series(tmp_path / "Ivanov", HU, edit=change)
    with pytest.raises(ScanError, match=words) as error:
        read_all(tmp_path)
    assert "Ivanov" not in str(error.value)


def test_uncompressed_pixels_under_a_compressed_syntax_are_read(tmp_path):
    folder = write_dicom_series(tmp_path / "case", HU)
    for path in folder.iterdir():                                 # Explicit VR Little Endian called RLE Lossless
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert "transfer syntax says compressed, the pixels are not: 6 files read as they are" in scan.notes


def with_syntax(folder, syntax):
    """Each file's transfer syntax replaced by this text, whose bytes are odd."""
    for path in folder.iterdir():
        whole, old = path.read_bytes(), b"\x02\x00\x10\x00UI\x14\x00" + b"1.2.840.10008.1.2.1\0"
        value = syntax.encode() + bytes(len(syntax) % 2)
        length = int.from_bytes(whole[140:144], "little") + len(value) - 20
        assert whole.count(old) == 1
        new = old[:6] + len(value).to_bytes(2, "little") + value
        path.write_bytes(whole[:140] + length.to_bytes(4, "little") + whole[144:].replace(old, new))


@pytest.mark.parametrize("syntax", ["2.25.123456", "1.2.3", "1.2.840.10008.5.1.4.1.1.2", ""])
def test_uncompressed_pixels_under_an_unknown_syntax_are_read(tmp_path, syntax):
    """As anonymisers leave it that replace every UID; a bare ValueError ended the run."""
    with_syntax(write_dicom_series(tmp_path / "case", HU), syntax)
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    note = "transfer syntax is unknown, the pixels are not compressed: 6 files read as they are"
    assert scan.notes == ((note,) if syntax else ())


@pytest.mark.parametrize("syntax, compressed", [("2.25.123456", True), ("1.2.840.113619.5.2", False)])
def test_other_pixels_under_an_unknown_syntax_are_refused_by_name(tmp_path, syntax, compressed):
    """The second is GE's own, whose pixels have their bytes swapped."""
    def change(ds, k):
        if compressed:
            ds.PixelData = ds.PixelData[:20]
    with_syntax(write_dicom_series(tmp_path / "case", HU, edit=change), syntax)
    with pytest.raises(ScanError, match="^000.dcm: its transfer syntax is none of DICOM's.*; export it uncompressed"):
        read_all(tmp_path)


def test_contrast_agent_and_sharp_kernel_are_noted(tmp_path):
    write_dicom_series(tmp_path / "case", HU, edit=edit(ContrastBolusAgent="agent", ConvolutionKernel=["H70h", "1"]))
    scan, = read_all(tmp_path)
    assert scan.notes[0].startswith("contrast agent given") and scan.notes[1].startswith("sharp kernel")


@pytest.mark.parametrize("item, given", [
    ({"CodeMeaning": "Iohexol"}, True), ({"CodeValue": "C-B0322"}, True), ({"CodeMeaning": "None"}, False),
    (None, False)])
def test_a_contrast_agent_by_its_code_alone_is_noted(tmp_path, item, given):
    """As Enhanced CT has it."""
    code = pydicom.Dataset()
    for keyword, value in (item or {}).items():
        setattr(code, keyword, value)
    write_dicom_series(tmp_path / "case", HU, edit=edit(ContrastBolusAgentSequence=[code] if item else []))
    scan, = read_all(tmp_path)
    assert any(note.startswith("contrast agent given") for note in scan.notes) is given


@pytest.mark.parametrize("agent, given", [
    *((agent, False) for agent in (
        "NON CONTRAST", "WITHOUT CONTRAST", "NON-CONTRAST", "Noncontrast", "W/O", "W/O IV CONTRAST", "NO IV CONTRAST",
        "no contrast agent", "UNENHANCED", "NON ENHANCED", "NONE", "No", "n", "N/A", "0", " ", "Native", "not given")),
    *((agent, True) for agent in (
        "OMNIPAQUE", "CE", "IV CONTRAST", "IODINE", "NONIONIC", "NON IONIC CONTRAST", "Novisipaque", "YES", "ENHANCED",
        "WITH AND WITHOUT CONTRAST", "NO ORAL CONTRAST", "CONTRAST", "Iopamiro", "NOVAL", "W CONTRAST"))])
def test_a_contrast_agent_that_is_none_is_not_noted(tmp_path, agent, given):
    """Words for none other than NO and NONE counted as an agent."""
    write_dicom_series(tmp_path / "case", HU[:3], edit=edit(ContrastBolusAgent=agent))
    scan, = read_all(tmp_path)
    assert any(note.startswith("contrast agent given") for note in scan.notes) is given


def test_gzip_called_nii(tmp_path):
    path = write_nifti_scan(tmp_path / "vol.nii.gz", HU)
    path.rename(tmp_path / "vol.nii")
    np.testing.assert_array_equal(read_all(tmp_path)[0].hu, HU)


# ---- I: what cannot be looked into

def test_links_that_lead_nowhere_are_a_row_and_a_note(tmp_path):
    """As of a data set whose content was not fetched: the slices were passed over, and the rest was a whole scan."""
    write_dicom_series(tmp_path / "case", HU, name=lambda k: f"IM{k}")
    for name in ("case/IM5", "volumes/one.nii.gz", "volumes/IM0"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "annex" / "gone")
    case, unreadable, volume, other = find_scans(tmp_path)
    scan = read_scan(case)
    np.testing.assert_array_equal(scan.hu, HU[:5])
    assert scan.notes == ("files beside it that cannot be read: 1; if they are its slices, it is not whole",)
    for source, name in ((unreadable, "IM5"), (other, "IM0"), (volume, "one.nii.gz")):
        with pytest.raises(ScanError, match=rf"^{name}: cannot be read \(No such file or directory\)"):
            read_scan(source)


def test_a_file_that_may_not_be_read_is_a_row(tmp_path, monkeypatch):
    """Without a suffix it was none of ours."""
    write_dicom_series(tmp_path / "case", HU, name=lambda k: f"IM{k}")
    opened = open

    def refuse(path, *how, **named):
        if Path(path).name == "IM0":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *how, **named)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.FileIO", lambda path: refuse(path, "rb", buffering=0))
    case, closed = find_scans(tmp_path)
    with pytest.raises(ScanError, match=r"^IM0: cannot be read \(Permission denied\)"):
        read_scan(closed)


@pytest.mark.parametrize("name, content", [
    *((name, bytes(600)) for name in ("a.tar", "A.TGZ", "a.tar.xz", "a.7z", "a.rar", "a.nii.bz2", "a.dcm.gz")),
    ("a.zip", b"PK\x03\x04")])
def test_archives_that_are_not_looked_into_are_a_row(tmp_path, name, content):
    """They were files that are no scans, in one line of a run's log; so was a zip file within another."""
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as outer:
        outer.writestr(f"sub/{name}", content)
        outer.writestr("sub/notes.txt", "nothing")
    (tmp_path / name).write_bytes(content)
    sources = find_scans(tmp_path)
    assert [source.scan_id for source in sources] == [Path(name).stem, f"outer--sub--{Path(name).stem}"]
    for source in sources:
        with pytest.raises(ScanError, match=f"^{name}: .*unpack"):
            read_scan(source)
