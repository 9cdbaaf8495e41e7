"""DICOM results lie on the source's own frames to the pixel, and say of their pixels what the source's say."""

import copy
from dataclasses import replace

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import EnhancedCTImageStorage

from ct.write import write_nifti
from detect.dicom_out import build_objects, write_dicom
from tests.dicom_results import DENSE, HU, IDENTITY, read_only, result_of, writer
from tests.helpers import frames_by_source
from tests.writers import complete, make_uid, write_dicom_series, write_enhanced_ct


@pytest.fixture
def series(tmp_path):
    return write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), edit=complete)


@pytest.mark.parametrize("turned", [{}, dict(flip_rows=True), dict(flip_columns=True), dict(transpose=True),
                                    dict(flip_rows=True, transpose=True)])
@pytest.mark.parametrize("tilt, position", [(0, None), (18.5, [0, 4, 8, 12, 19, 26])])
def test_pixels_and_positions_are_the_source_frames_own(tmp_path, turned, tilt, position):
    folder = write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), tilt_deg=tilt, position_mm=position,
                                edit=complete, **turned)
    scan = read_only(folder)
    write_dicom(tmp_path / "out", result_of(scan), IDENTITY)
    seg = pydicom.dcmread(tmp_path / "out/seg.dcm")
    surprise = pydicom.dcmread(tmp_path / "out/map.dcm")
    of_seg, of_map = frames_by_source(seg), frames_by_source(surprise)
    assert len(of_map) == 6
    for path in folder.iterdir():
        source = pydicom.dcmread(path)
        hu = source.pixel_array * float(source.RescaleSlope) + float(source.RescaleIntercept)
        key = source.SOPInstanceUID, 1
        assert key in of_seg or not (hu > DENSE).any()
        for found, expected in ((of_seg, hu > DENSE), (of_map, hu)):
            if key in found:
                np.testing.assert_array_equal(found[key][0], expected)
                np.testing.assert_allclose(found[key][1], source.ImagePositionPatient, atol=1e-6)
    for ds in (seg, surprise):
        shared = ds.SharedFunctionalGroupsSequence[0]
        np.testing.assert_allclose(shared.PlaneOrientationSequence[0].ImageOrientationPatient,
                                   source.ImageOrientationPatient, atol=1e-6)
        assert shared.PixelMeasuresSequence[0].PixelSpacing == source.PixelSpacing
        assert ds.FrameOfReferenceUID == source.FrameOfReferenceUID


@pytest.mark.parametrize("tilt", [0, 18.5])
def test_pixels_are_those_of_the_nifti_at_the_same_place(tmp_path, tilt):
    scan = read_only(write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), tilt_deg=tilt, edit=complete))
    result = result_of(scan)
    write_dicom(tmp_path / "out", result, IDENTITY)
    for name, volume in (("seg", result.mask), ("map", result.anomaly)):
        write_nifti(tmp_path / f"{name}.nii.gz", volume, scan)
        nifti = nib.load(tmp_path / f"{name}.nii.gz")
        ds = pydicom.dcmread(tmp_path / f"out/{name}.dcm")
        shared = ds.SharedFunctionalGroupsSequence[0]
        along_row, along_column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3))
        row_mm, column_mm = shared.PixelMeasuresSequence[0].PixelSpacing
        rows, columns = np.mgrid[:ds.Rows, :ds.Columns]
        for image, origin in frames_by_source(ds).values():
            lps = origin + columns[..., None] * column_mm * along_row + rows[..., None] * row_mm * along_column
            index = nib.affines.apply_affine(np.linalg.inv(nifti.affine), lps * [-1, -1, 1])
            assert np.abs(index - np.rint(index)).max() < 1e-3
            np.testing.assert_array_equal(image, nifti.get_fdata()[tuple(np.rint(index).astype(int).T)].T)


def test_highdicom_reads_the_segmentation_by_source_instance(tmp_path, series):
    scan = read_only(series)
    write_dicom(tmp_path / "out", result_of(scan), IDENTITY)
    seg = highdicom.seg.segread(tmp_path / "out/seg.dcm")
    assert seg.SegmentSequence[0].SegmentAlgorithmType == "AUTOMATIC"
    assert seg.SegmentSequence[0].SegmentAlgorithmName == "tiny"
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in sorted(series.iterdir())]
    read = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)[..., 0]
    np.testing.assert_array_equal(read, HU > DENSE)


def test_one_marked_slice_is_one_frame(series):
    scan = read_only(series)
    mask = np.zeros(HU.shape, bool)
    mask[3, 2, 1] = True
    seg = build_objects(replace(result_of(scan), mask=mask), IDENTITY)["seg"]
    (uid, _), = frames_by_source(seg)
    assert seg.NumberOfFrames == 1 and uid == pydicom.dcmread(series / "003.dcm").SOPInstanceUID


def test_slices_of_their_own_thickness(tmp_path):
    def edit(ds, k):
        complete(ds, k)
        ds.SliceThickness = 4 if k < 3 else 7
    folder = write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), position_mm=[0, 4, 8, 13, 20, 27], edit=edit)
    scan = read_only(folder)
    surprise = build_objects(result_of(scan), IDENTITY)["map"]
    thickness = {list(group.PlanePositionSequence[0].ImagePositionPatient)[2]:
                 float(group.PixelMeasuresSequence[0].SliceThickness)
                 for group in surprise.PerFrameFunctionalGroupsSequence}
    assert thickness == {10: 4, 14: 4, 18: 4, 23: 7, 30: 7, 37: 7}              # by height above the origin's 10 mm


def test_slices_of_their_own_tilt(tmp_path):
    """All had the first one's: of 512 rows of 0.5 mm the last lay 2.2 mm off."""
    def edit(ds, k):
        complete(ds, k)
        tilt = np.deg2rad(0.0 if k < 3 else 0.5)
        ds.ImageOrientationPatient = [1, 0, 0, 0, f"{np.cos(tilt):.9g}", f"{-np.sin(tilt):.9g}"]
    folder = write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), edit=edit)
    sources = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, folder.iterdir())}
    objects = build_objects(result_of(read_only(folder)), IDENTITY)
    for ds in (objects["seg"], objects["map"]):
        assert "PlaneOrientationSequence" not in ds.SharedFunctionalGroupsSequence[0]
        assert "DimensionOrganizationType" not in ds                                # 3D: of parallel planes
        told = [(group.PlaneOrientationSequence[0].ImageOrientationPatient, sources[
            group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID].ImageOrientationPatient)
            for group in ds.PerFrameFunctionalGroupsSequence]
        assert len(told) == 6 and {round(float(one[5]), 6) for one, _ in told} == {0, -0.008727}     # sin of 0.5 deg
        for one, source in told:
            np.testing.assert_allclose(one, source, rtol=0, atol=1e-9)


def test_orientations_that_differ_by_rounding_are_one(tmp_path):
    def edit(ds, k):
        complete(ds, k)
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, f"{k * 1e-5:g}"]
    scan = read_only(write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), edit=edit))
    surprise = build_objects(result_of(scan), IDENTITY)["map"]
    assert surprise.DimensionOrganizationType == "3D"
    assert "PlaneOrientationSequence" in surprise.SharedFunctionalGroupsSequence[0]


def test_a_slice_thickness_that_is_no_number_is_what_the_neighbours_leave(tmp_path):
    """Of a source that writes '5 mm' no object was made."""
    def edit(ds, k):
        complete(ds, k)
        ds.SliceThickness = "1.25"
    folder = write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), edit=edit)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"1.25", b"5 mm"))
    for name in ("seg", "map"):
        shared = build_objects(result_of(read_only(folder)), IDENTITY)[name].SharedFunctionalGroupsSequence[0]
        assert shared.PixelMeasuresSequence[0].SliceThickness == 5


def test_a_slice_beside_a_gap_is_no_thicker_for_it(tmp_path):
    """Of a source that leaves its slice thickness empty: 30 mm, half of it where there is no slice."""
    folder = write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), position_mm=[0, 5, 10, 65, 70, 75],
                                edit=lambda ds, k: (complete(ds, k), setattr(ds, "SliceThickness", None)))
    surprise = build_objects(result_of(read_only(folder)), IDENTITY)["map"]
    assert [float(group.PixelMeasuresSequence[0].SliceThickness)
            for group in surprise.PerFrameFunctionalGroupsSequence] == [5, 5, 6.25, 6.25, 5, 5]


def test_lossy_compression_of_the_source_is_told_with_ratio_and_method(tmp_path):
    """Each is required of an object that says it comes from lossy images."""
    def lossy(ds, k):
        complete(ds, k)
        ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", 12.5
        ds.LossyImageCompressionMethod = "ISO_15444_1"

    scan = read_only(write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), edit=lossy))
    objects = build_objects(result_of(scan), IDENTITY)
    for name in ("seg", "map"):
        told = objects[name]
        assert (told.LossyImageCompression, told.LossyImageCompressionMethod) == ("01", "ISO_15444_1")
        assert float(told.LossyImageCompressionRatio) == 12.5


@pytest.mark.parametrize("ratio", ["10:1", "9\\10:1", "nan"])
def test_a_lossy_ratio_that_is_no_number_is_left_out(tmp_path, ratio):
    """Of a source that writes '10:1' no object was made."""
    def lossy(ds, k):
        complete(ds, k)
        ds.LossyImageCompression, ds.LossyImageCompressionMethod = "01", "ISO_10918_1"
        ds[0x00282112] = RawDataElement(Tag(0x00282112), "DS", len(ratio), ratio.encode(), 0, False, True)
    objects = build_objects(result_of(read_only(write_dicom_series(tmp_path / "s", HU, edit=lossy))), IDENTITY)
    for name in ("seg", "map", "picture-1"):
        told = objects[name]
        assert (told.LossyImageCompression, told.LossyImageCompressionMethod) == ("01", "ISO_10918_1")
        assert "LossyImageCompressionRatio" not in told


def test_a_lossy_state_that_is_empty_is_none(tmp_path):
    """Segmentation and map took the empty element along, in which a value is required."""
    def empty(ds, k):
        complete(ds, k)
        ds.LossyImageCompression = ds.LossyImageCompressionRatio = ds.LossyImageCompressionMethod = None
    objects = build_objects(result_of(read_only(write_dicom_series(tmp_path / "s", HU, edit=empty))), IDENTITY)
    assert {objects[name].LossyImageCompression for name in ("seg", "map")} == {"00"}
    assert "LossyImageCompression" not in objects["picture-1"]


def test_one_lossy_image_makes_lossy_results_pictures_too(tmp_path):
    """The first image alone was asked, and pictures told nothing."""
    def one(ds, k):
        complete(ds, k)
        ds.LossyImageCompression = "01" if k in (3, 4) else "00"
        if k == 4:                                                   # 3 says it without ratio and method
            ds.LossyImageCompressionRatio, ds.LossyImageCompressionMethod = 9, "ISO_10918_1"
    objects = build_objects(result_of(read_only(write_dicom_series(tmp_path / "s", HU, edit=one))), IDENTITY)
    for name in ("seg", "map", "picture-1", "picture-3"):
        told = objects[name]
        assert (told.LossyImageCompression, told.LossyImageCompressionMethod) == ("01", "ISO_10918_1")
        assert float(told.LossyImageCompressionRatio) == 9


@pytest.mark.parametrize("phi", [True, False])
@pytest.mark.parametrize("told, burned_in", [({3: "YES"}, "YES"), ({3: "yes"}, "YES"), ({3: "Y "}, "YES"),
                                             ({0: "NO", 3: "NO"}, "NO"), ({}, "NO")])
def test_pictures_of_pixels_with_burned_in_text_say_so(tmp_path, told, burned_in, phi):
    """They said NO, and whoever passes on what says so passes on a name."""
    def edit(ds, k):
        complete(ds, k)
        if k in told:
            ds.BurnedInAnnotation = told[k]
    scan = read_only(write_dicom_series(tmp_path / "series", HU, edit=edit))
    notes = writer(phi)(tmp_path, result_of(scan))
    pictures = [pydicom.dcmread(path) for path in tmp_path.glob("dicom/picture-*.dcm")]
    assert [ds.BurnedInAnnotation for ds in pictures] == [burned_in] * 3
    assert notes == (["the source says that its pixels hold burned-in text (BurnedInAnnotation); pictures and overlays "
                      "show them"] if burned_in == "YES" else [])


def test_multi_frame_source(tmp_path):
    path = write_enhanced_ct(tmp_path / "enhanced", HU, (3, 0.5, 0.4), order=[2, 0, 5, 1, 4, 3])
    ds = pydicom.dcmread(path)
    complete(ds, 0)
    ds.save_as(path)
    scan = read_only(path)
    result = result_of(scan)
    objects = build_objects(result, IDENTITY)
    for (uid, frame), (image, _) in frames_by_source(objects["map"]).items():
        assert uid == ds.SOPInstanceUID
        np.testing.assert_array_equal(image, result.anomaly[[2, 0, 5, 1, 4, 3][frame - 1]])


def test_an_enhanced_series_of_one_frame_a_file(tmp_path):
    """No scan of such files had objects."""
    whole = pydicom.dcmread(write_enhanced_ct(tmp_path / "enhanced", HU, (5, 0.5, 0.4)))
    complete(whole, 0)
    (tmp_path / "series").mkdir()
    frames = whole.pixel_array
    for k, group in enumerate(whole.PerFrameFunctionalGroupsSequence):
        ds = copy.deepcopy(whole)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = make_uid("one frame", k)
        ds.NumberOfFrames, ds.PerFrameFunctionalGroupsSequence, ds.InstanceNumber = 1, [group], k + 1
        ds.PixelData = frames[k].tobytes()
        ds.save_as(tmp_path / "series" / f"{k}.dcm")
    result = result_of(read_only(tmp_path / "series"))
    objects = build_objects(result, IDENTITY)
    for name, maps in (("seg", result.mask), ("map", result.anomaly)):
        found = frames_by_source(objects[name])
        assert len(found) == 6
        for k in range(6):
            image, place = found[make_uid("one frame", k), 1]
            np.testing.assert_array_equal(image, maps[k])
            assert place == [-40, -60, 10 + 5 * k]
    uids = {make_uid("one frame", k) for k in range(6)}
    named = {}
    for name, ds in objects.items():                                 # by their own class, wherever they are named
        ds.walk(lambda item, e, name=name: str(e.value) in uids and named.setdefault(name, set()).add(
            item.ReferencedSOPClassUID))
    assert named == dict.fromkeys(objects, {EnhancedCTImageStorage})


def test_frames_of_a_multi_frame_source_that_are_no_slices_have_no_part_in_its_objects(tmp_path):
    """A localiser in front, whose orientation the maps had; and a second phase or copies at the places of the first,
    which highdicom refuses: no scan of such a file had objects."""
    path = write_enhanced_ct(tmp_path / "enhanced", HU, (5, 0.5, 0.4), order=[5, 3, 2, 0, 5, 1, 4, 3])
    ds = pydicom.dcmread(path)
    complete(ds, 0)
    shared, plane, kind = ds.SharedFunctionalGroupsSequence[0], pydicom.Dataset(), pydicom.Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    kind.FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    for k, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        group.PixelMeasuresSequence = shared.PixelMeasuresSequence
        group.PlaneOrientationSequence = shared.PlaneOrientationSequence if k else [plane]
        if not k:
            group.CTImageFrameTypeSequence = [kind]
    del ds.SharedFunctionalGroupsSequence
    ds.save_as(path)
    result = result_of(read_only(path))
    objects = build_objects(result, IDENTITY)
    found = frames_by_source(objects["map"])
    assert {frame for _, frame in found} == {3, 4, 5, 6, 7, 2} and len(objects["seg"].pixel_array) == 6
    for (_, frame), (image, place) in found.items():
        k = [5, 3, 2, 0, 5, 1, 4, 3][frame - 1]
        np.testing.assert_array_equal(image, result.anomaly[k])
        assert place == [-40, -60, 10 + 5 * k]
    shared = objects["map"].SharedFunctionalGroupsSequence[0]
    assert list(shared.PlaneOrientationSequence[0].ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]


def test_key_objects_name_the_key_frames_of_a_multi_frame_source(tmp_path):
    """The whole image, which every viewer opens at its first frame, says nothing."""
    path = write_enhanced_ct(tmp_path / "enhanced", HU, (5, 0.5, 0.4), order=[2, 0, 5, 1, 4, 3])
    ds = pydicom.dcmread(path)
    complete(ds, 0)
    ds.save_as(path)
    objects = build_objects(result_of(read_only(path)), IDENTITY)
    named = [item.ReferencedSOPSequence[0] for item in objects["key-objects"].ContentSequence
             if "ReferencedSOPSequence" in item]
    source, = (item for item in named if item.ReferencedSOPInstanceUID == ds.SOPInstanceUID)
    assert source.ReferencedFrameNumber == [5, 6, 1]                 # slices 4, 3 and 2
    assert len(named) == 1 + len(objects) - 1


@pytest.mark.parametrize("told, number", [("2A", 9001), ("20", 9201), ("-1", 9001)])
def test_a_series_number_that_is_none_costs_nothing(tmp_path, told, number):
    """No file of the series could be read."""
    def edit(ds, k):
        complete(ds, k)
        ds.SeriesNumber = 77
    folder = write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), edit=edit)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"IS\x02\x0077", b"IS\x02\x00" + told.encode()))
    scan = read_only(folder)
    np.testing.assert_array_equal(scan.hu, HU)
    assert build_objects(result_of(scan), IDENTITY)["sr"].SeriesNumber == number
