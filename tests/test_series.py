"""What is one scan: stacks, passes, acquisitions and copies in a folder of DICOM files, joined or told apart."""

import shutil

import numpy as np
import pydicom
import pytest
from pydicom.uid import SecondaryCaptureImageStorage

from ct.read import find_scans, read_scan
from ct.scan import ScanError
from tests.helpers import read_all
from tests.writers import edited, make_uid, second_stack, write_dicom_series

RNG = np.random.default_rng(4)
HU = RNG.integers(-1000, 600, (6, 10, 8)).astype(np.float32)


@pytest.mark.parametrize("offset_mm", [0.0, 2.5])
@pytest.mark.parametrize("values, words", [
    ({"AcquisitionNumber": 2}, "acquisition number"), ({"ConvolutionKernel": "H70h"}, "reconstruction kernel"),
    ({"ContrastBolusAgent": "agent"}, "contrast agent"), ({"SliceThickness": 1}, "slice thickness")])
def test_two_stacks_in_one_series_are_two_scans(tmp_path, values, words, offset_mm):
    write_dicom_series(tmp_path / "case", HU)
    second_stack(tmp_path / "case", HU + 7, offset_mm, **values)
    scans = read_all(tmp_path)
    assert sorted(float(scan.hu[0, 0, 0] - HU[0, 0, 0]) for scan in scans) == [0, 7]
    assert all(any(f"told apart by {words}" in note for note in scan.notes) for scan in scans)


def test_acquisitions_whose_long_numbers_differ_at_the_end_are_two_scans(tmp_path):
    """Their numbers were cut to six digits, and the slices of one came between those of the other."""
    write_dicom_series(tmp_path / "case", HU, edit=edited(AcquisitionNumber=20240101))
    second_stack(tmp_path / "case", HU + 7, 2.5, AcquisitionNumber=20240102)
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
                       edit=lambda ds, k: edited(InstanceNumber=number(k), AcquisitionNumber=None)(ds, k))
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
    second_stack(tmp_path / "case", HU)
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.notes == ("duplicate slices dropped: 6",)


def test_two_patients_under_one_uid_are_two_scans_without_names(tmp_path):
    write_dicom_series(tmp_path / "case", HU)
    second_stack(tmp_path / "case", HU + 7, 2.5, PatientID="SECRET-2", PatientName="Secret^Other")
    scans = read_all(tmp_path)
    assert len(scans) == 2 and all(len(scan.hu) == 6 for scan in scans)
    assert "ecret" not in repr(scans) + str(find_scans(tmp_path)) and "SECRET" not in repr(scans)


def test_a_screenshot_and_compressed_copies_are_left_out(tmp_path):
    write_dicom_series(tmp_path / "case", HU)
    second_stack(tmp_path / "case", HU + 1, ImageType=["DERIVED", "PRIMARY", "AXIAL"], LossyImageCompression="01")
    write_dicom_series(tmp_path / "case", HU[:1], position_mm=[40], name=lambda k: "shot",
                       edit=edited(SOPClassUID=SecondaryCaptureImageStorage))
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
                           edit=edited(FrameOfReferenceUID=make_uid("frame", k)))
    source, = find_scans(tmp_path)
    with pytest.raises(ScanError, match="0 and 5 more: series of one or two images, which differ in frame"):
        read_scan(source)


def test_a_study_uid_for_each_file_of_a_series_is_one_scan(tmp_path):
    """Each slice was a row of its own."""
    write_dicom_series(tmp_path / "case", HU, edit=lambda ds, k: edited(StudyInstanceUID=make_uid("study", k))(ds, k))
    scan, = read_all(tmp_path)
    np.testing.assert_array_equal(scan.hu, HU)
    assert scan.scan_id == "case" and scan.notes == (
        "6 studies of one or two images that share series, frame of reference and patient, taken as one",)


@pytest.mark.parametrize("per_file", [True, False])
def test_studies_under_one_series_uid_are_not_joined_across_patients(tmp_path, per_file):
    """Nor where they hold whole scans: careless anonymisers give one series UID, and one patient, to all."""
    for patient, folder in enumerate("ab"):
        values = {"PatientID": f"{patient}"} if per_file else {}
        def own_study(ds, k, patient=patient, values=values):
            edited(StudyInstanceUID=make_uid("study", patient, k * per_file), **values)(ds, k)
        write_dicom_series(tmp_path / folder, HU + 7 * patient, edit=own_study)
    scans = read_all(tmp_path)
    assert sorted(float(scan.hu[0, 0, 0] - HU[0, 0, 0]) for scan in scans) == [0, 7]
    assert all(len(scan.hu) == 6 for scan in scans)


@pytest.mark.parametrize("values", [{"SeriesInstanceUID": None}, {"FrameOfReferenceUID": ""}])
def test_uids_replaced_file_by_file_are_one_row(tmp_path, values):
    """Or where no frame of reference says that the places can be compared. It was a row for each slice."""
    def change(ds, k):
        own = {name: make_uid(name, k) if uid is None else uid for name, uid in values.items()}
        edited(StudyInstanceUID=make_uid("study", k), **own)(ds, k)
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
