"""DICOM results: on the source's own frames to the pixel, valid, repeatable, and no patient data with phi=False."""

import shutil
import subprocess
import time
import warnings
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import SimpleNamespace

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from ct.derived import DerivedError
from ct.read import find_scans, read_scan
from ct.scan import Scan
from ct.write import write_nifti
from detect.dicom_out import Identity, build_objects, dicom_writer, identity_of, write_dicom
from detect.dicom_out.common import choose_key_slices
from detect.dicom_out.secondary_capture import draw
from detect.outputs import slice_rows
from detect.scores import rounded_down
from detect.surprise import Surprise
from detect.votes import Votes
from tests.helpers import frames_by_source, synthetic_head
from tests.writers import complete, make_uid, write_dicom_series, write_enhanced_ct, write_slice_folder

RNG = np.random.default_rng(2)
HU = RNG.permutation(np.arange(6 * 12 * 10)).reshape(6, 12, 10).astype(np.float32) - 700    # every pixel its own value
DENSE = 0                              # about one pixel in 40 is marked
IDENTITY = Identity("tiny", "1.2", "ab" * 32, "{}")
MADE = datetime(2024, 5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Result:
    """A projection whose maps are the scan itself, so that a file's own pixels say what a result must hold."""

    scan: Scan
    anomaly: np.ndarray
    mask: np.ndarray
    slice_scores: np.ndarray
    projected: np.ndarray
    score: float = 3.25
    percentile: float | None = 97.5
    threshold: float | None = 2.5
    flagged: bool | None = True
    anomalous_ml: float | None = 1.5


@dataclass(frozen=True)
class Negative(Result):
    score: float = 0.5
    flagged: bool | None = False
    anomalous_ml: float | None = 0.0
    percentile: float | None = field(default=12.0)


def result_of(scan, kind=Result, **values):
    mask = scan.hu > DENSE if kind is Result else np.zeros(scan.hu.shape, bool)
    scores = np.arange(len(scan.hu), dtype=np.float32)
    return kind(scan, scan.hu.copy(), mask, scores, np.arange(len(scan.hu)) < 5, **values)


def read_only(folder):
    source, = find_scans(folder)
    return read_scan(source)


@pytest.fixture
def series(tmp_path):
    return write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), edit=complete)


@pytest.mark.parametrize("name, shown, charset, patient", [
    ("x" * 70, "x" * 64, None, "A^B"), ("t\u00eate\\\n\u982d 128", "tete___ 128", "ISO_IR 6", "A^B"),
    (" ", "unnamed model", "ISO_IR 100", "M\u00fcller^J")])
def test_a_models_name_fits_whatever_the_sources_character_set(tmp_path, name, shown, charset, patient):
    """A long one cost every scan its objects, and another alphabet's letters became question marks or no valid text."""
    def edit(ds, k):
        complete(ds, k)
        ds.PatientName = patient
        if charset:
            ds.SpecificCharacterSet = charset
        else:
            ds.pop("SpecificCharacterSet", None)
    scan = read_only(write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), edit=edit))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_dicom(tmp_path / "out", result_of(scan), Identity(name, "1.2", "ab" * 32, "{}"))
    for path in (tmp_path / "out").iterdir():
        ds = pydicom.dcmread(path)
        assert ds.ManufacturerModelName == shown and ds.PatientName == patient
    assert len(list((tmp_path / "out").iterdir())) > 4


# ---- geometry and pixels

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
@pytest.mark.parametrize("told, burned_in", [({3: "YES"}, "YES"), ({0: "NO", 3: "NO"}, "NO"), ({}, "NO")])
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


# ---- the report

def presence(report):
    content = highdicom.sr.MeasurementReport.from_sequence([report.content[0]])
    group, = content.get_image_measurement_groups() or content.get_volumetric_roi_measurement_groups()
    evaluation, = group.get_qualitative_evaluations(codes.DCM.PresenceOfProperty)
    return group, evaluation.value


def test_report_of_a_flagged_scan(tmp_path, series):
    scan = read_only(series)
    objects = build_objects(result_of(scan), IDENTITY)
    objects["sr"].save_as(tmp_path / "sr.dcm")
    report = highdicom.sr.srread(tmp_path / "sr.dcm")
    assert (report.VerificationFlag, report.CompletionFlag, report.PreliminaryFlag) == (
        "UNVERIFIED", "COMPLETE", "PRELIMINARY")
    group, value = presence(report)
    assert value == codes.DCM.Present
    assert group.tracking_uid == objects["seg"].SegmentSequence[0].TrackingUID
    assert group.referenced_segment.referenced_sop_instance_uid == objects["seg"].SOPInstanceUID
    scores = group.get_measurements(codes.SCT.Score)
    assert [m.value for m in scores] == [3.25, 4, 3, 2]             # the scan's; the key slices', of the projected
    assert [m.referenced_images[0].referenced_sop_instance_uid for m in scores[1:]] == [
        pydicom.dcmread(series / f"00{k}.dcm").SOPInstanceUID for k in (4, 3, 2)]
    library, = [item for item in report.content[0].ContentSequence
                if item.ConceptNameCodeSequence[0].CodeMeaning == "Image Library"]
    entries = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in library.ContentSequence[0]
               .ContentSequence if item.ValueType == "IMAGE"]
    assert entries == [m.referenced_images[0].referenced_sop_instance_uid for m in scores[1:]]
    evidence = {item.ReferencedSOPInstanceUID for study in report.CurrentRequestedProcedureEvidenceSequence
                for listed in study.ReferencedSeriesSequence for item in listed.ReferencedSOPSequence}
    assert evidence == {objects["seg"].SOPInstanceUID} | {
        pydicom.dcmread(path).SOPInstanceUID for path in series.glob("*.dcm")}
    percentile, = group.get_measurements(codes.DCM.PercentileRankingOfMeasurement)
    volume, = group.get_measurements(codes.SCT.Volume)
    assert (percentile.value, percentile.unit.value, volume.value, volume.unit.value) == (97.5, "%", 1.5, "ml")
    said = {e.value for e in report.iterall() if e.keyword in ("TextValue", "UID")}
    assert {"weights_sha256=" + "ab" * 32, "threshold=2.5", "settings={}", IDENTITY.maker.device_uid} <= said


@pytest.mark.parametrize(("measure", "unit"), [(Votes, "[hnsf'U]"), (Surprise, "1")])
def test_map_and_scores_are_in_the_measures_unit(measure, unit, series):
    bundle = SimpleNamespace(meta={"provenance": {"name": "tiny"}}, weights_hash="ab" * 32, measure=measure())
    identity = identity_of(SimpleNamespace(bundle=bundle, key=dict))
    objects = build_objects(result_of(read_only(series)), identity)
    scores = presence(objects["sr"])[0].get_measurements(codes.SCT.Score)
    assert [score.unit.value for score in scores] == [unit] * 4
    mapping, = objects["map"].SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == unit


def test_report_of_a_negative_scan_says_absent_without_a_segmentation(series):
    scan = read_only(series)
    objects = build_objects(result_of(scan, Negative), IDENTITY)
    assert "seg" not in objects
    _, value = presence(objects["sr"])
    assert value == codes.DCM.Absent


@pytest.mark.parametrize("flagged, value", [(True, codes.DCM.Present), (False, codes.DCM.Absent)])
@pytest.mark.parametrize("marked", [True, False])
def test_presence_is_the_flag_and_the_segment_what_is_marked(series, flagged, value, marked):
    """A flagged scan without a marked pixel is in the worklist: a report that calls it negative would contradict it.

    TID 1500 has a place for both: TID 1411 of a segment, TID 1501 of a finding that has no region.
    """
    result = result_of(read_only(series), flagged=flagged)
    result = result if marked else replace(result, mask=np.zeros(HU.shape, bool))
    objects = build_objects(result, IDENTITY)
    group, found = presence(objects["sr"])
    kind = highdicom.sr.VolumetricROIMeasurementsAndQualitativeEvaluations
    assert found == value and isinstance(group, kind) == marked == ("seg" in objects)


def test_without_a_threshold_presence_is_undetermined(series):
    scan = read_only(series)
    result = result_of(scan, threshold=None, flagged=None, percentile=None)
    group, value = presence(build_objects(result, IDENTITY)["sr"])
    assert value == codes.DCM.PresenceUndetermined
    assert group.get_measurements(codes.DCM.PercentileRankingOfMeasurement) == []


def test_key_objects_name_the_key_slices_and_all_other_objects(series):
    scan = read_only(series)
    objects = build_objects(result_of(scan), IDENTITY)
    named = {item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
             for item in objects["key-objects"].ContentSequence if "ReferencedSOPSequence" in item}
    slices = {pydicom.dcmread(series / f"00{k}.dcm").SOPInstanceUID for k in (4, 3, 2)}
    assert named == slices | {ds.SOPInstanceUID for name, ds in objects.items() if name != "key-objects"}


def test_pictures_show_the_outline_in_radiological_display(tmp_path):
    hu = synthetic_head(slices=3, size=64, spacing_mm=(5.0, 3.6, 3.6))[0]
    folder = write_dicom_series(tmp_path / "series", hu, flip_columns=True, edit=complete)
    scan = read_only(folder)
    mask = np.zeros(scan.hu.shape, bool)
    mask[1, 40:50, 8:20] = True                                 # on the patient's right
    picture = build_objects(replace(result_of(scan), mask=mask), IDENTITY)["picture-1"]
    red = picture.pixel_array.astype(int)
    red = red[..., 0] - red[..., 1] > 150
    rows, columns = np.nonzero(red)
    assert picture.pixel_array.shape == (512, 512, 3) and list(picture.PatientOrientation) == ["L", "P"]
    assert picture.ConversionType == "WSD"                      # not digitised film
    assert (rows.min() // 8, rows.max() // 8, columns.min() // 8, columns.max() // 8) == (40, 49, 8, 19)


@pytest.mark.parametrize("transpose", [False, True])
def test_pictures_have_square_pixels(tmp_path, transpose):
    """They had the source's, 2:1, without a Pixel Aspect Ratio."""
    row, column = np.mgrid[:32, :64]
    disc = (2 * (row - 15.5)) ** 2 + (column - 31.5) ** 2 < 20 ** 2                 # 40 mm
    hu = np.tile(np.where(disc, 60, -1000).astype(np.float32), (3, 1, 1))
    scan = read_only(write_dicom_series(tmp_path / "series", hu, (5, 2.0, 1.0), transpose=transpose, edit=complete))
    result = replace(result_of(scan), mask=scan.hu > 0)
    picture = build_objects(result, IDENTITY)["picture-1"].pixel_array.astype(int)
    rows, columns = np.nonzero(picture[..., 0] - picture[..., 1] > 150)
    assert picture.shape == (512, 512, 3)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20 * 16, 40 * 8)             # 20 rows of 2 mm, 40 of 1 mm


@pytest.mark.parametrize("shape", [(512, 512), (512, 200), (512, 100), (40, 12), (100, 512)])
def test_the_text_lies_within_the_picture(shape):
    """Of a narrow one the end of the score was cut off."""
    lines = ["RESEARCH ONLY", "unverified, not for diagnosis", "slice 12 of 0 to 131 from below, score 5.85"]
    picture = draw(np.full(shape, -1000, np.float32), np.zeros(shape, bool), lines)
    rows, columns = np.nonzero(picture[:len(picture) // 4].max(-1) > 60)           # above the letters of the sides
    margin = columns.min()
    assert 3 <= margin and columns.max() < picture.shape[1] - margin               # letters of 6 pixels at least
    assert np.ptp(columns) > 150                                                  # all of the line is there
    assert max(picture.shape) >= 512 and min(picture.shape[:2]) >= 256


def test_a_picture_names_its_slice_as_the_tables_do(series, monkeypatch):
    """It was one more, as if counted from 1."""
    said = []
    monkeypatch.setattr("detect.dicom_out.secondary_capture.draw", lambda hu, mask, lines, spacing: (
        said.append((lines[-1], float(hu[0, 0]))), draw(hu, mask, lines, spacing))[1])
    result = result_of(read_only(series))
    build_objects(result, IDENTITY)
    working = SimpleNamespace(**vars(result), below_vertex_mm=np.zeros(6))
    of_row = {row["slice"]: row["score"] for row in slice_rows(working)}
    assert said == [(f"slice {k} of 0 to 5 from below, score {of_row[k]:.3g}", HU[k, 0, 0]) for k in (4, 3, 2)]


def test_key_slices_of_a_thin_series_are_not_neighbours(tmp_path):
    """Three of 0.6 mm apart show the same."""
    hu = np.tile(HU, (4, 1, 1))
    scan = read_only(write_dicom_series(tmp_path / "series", hu, (1.0, 0.5, 0.4), edit=complete))
    scores = np.zeros(24, np.float32)
    scores[[8, 9, 10, 11, 12, 13, 20]] = 5, 6, 9, 8, 7, 4, 3
    marked = np.zeros(hu.shape, bool)
    marked[[10, 13, 14], 2, 2] = True
    result = Result(scan, scan.hu, marked, scores, np.arange(24) < 22)
    assert choose_key_slices(result) == (10, 14, 20)                 # marked ones first: 13 is too near to 10
    objects = build_objects(result, IDENTITY)
    assert {f"picture-{number}" for number in (1, 2, 3)} <= objects.keys()
    near = replace(result, projected=np.isin(np.arange(24), (9, 10, 11)))
    assert choose_key_slices(near) == (10,)
    apart = read_only(write_dicom_series(tmp_path / "apart", HU, (4.0, 0.5, 0.4), edit=complete))
    assert choose_key_slices(result_of(apart)) == (4, 3, 2)          # 4 mm apart already


def test_numbers_of_the_report_have_digits_that_mean_something(series):
    result = result_of(read_only(series), score=1e-7 / 3, percentile=97.48743718592965, anomalous_ml=123.45678901234567)
    objects = build_objects(replace(result, slice_scores=result.slice_scores / 3), IDENTITY)
    content = highdicom.sr.MeasurementReport.from_sequence([objects["sr"].content[0]])
    group, = content.get_volumetric_roi_measurement_groups()
    found = [measured[0].MeasuredValueSequence[0] for measured in group.get_measurements()]
    numbers = [(str(item["NumericValue"].value), item.get("FloatingPointValue")) for item in found]
    assert numbers == [("3.33333e-08", 3.33333e-08), ("97.4", 97.4), ("123.0", 123.0), ("1.33333", 1.33333),
                       ("1.0", 1.0), ("0.666667", 0.666667)]


@pytest.mark.parametrize("percentile, said", [
    (100 * 250 / 251, 99.6), (100 * 200 / 201, 99.5), (100 * 30 / 31, 96.7), (96.7742, 96.7), (64.1, 64.1),
    (80.0, 80.0), (100 * 99999 / 100000, 99.9), (0.0, 0.0)])
def test_a_percentile_is_rounded_down(percentile, said):
    """Of the top scan among 200 healthy ones, 99.5025, the page said 100."""
    assert rounded_down(percentile) == said


# ---- UIDs, files

def test_uids_depend_on_scan_weights_settings_threshold_and_nothing_else(tmp_path, series):
    scan = read_only(series)

    def uids(result=None, identity=IDENTITY, **more):
        objects = build_objects(result or result_of(scan), identity, **more).values()
        found = {e.value for ds in objects for e in ds.iterall() if e.VR == "UI" and str(e.value).startswith("2.25.")}
        return found - {e.value for path in series.iterdir() for e in pydicom.dcmread(path) if e.VR == "UI"}

    first = uids(made=MADE)
    assert len(first) == 5 + 7 + 2 + 1 + 1                      # series, instances, dimensions, tracking, device
    assert uids(made=datetime(2025, 1, 1)) == first
    device = {IDENTITY.maker.device_uid}
    for changed in (uids(result_of(scan, threshold=2.0)), uids(identity=replace(IDENTITY, settings="{1}")),
                    uids(phi=False)):
        assert changed & first == device
    other = replace(IDENTITY, weights_hash="cd" * 32)
    assert not uids(identity=other) & first and other.maker.device_uid in uids(identity=other)


def test_a_repeated_run_replaces_the_files(tmp_path, series):
    scan = read_only(series)
    first = write_dicom(tmp_path / "out", result_of(scan), IDENTITY, made=MADE)
    before = {path: path.read_bytes() for path in first}
    assert write_dicom(tmp_path / "out", result_of(scan), IDENTITY, made=MADE) == first
    assert {path: path.read_bytes() for path in first} == before
    write_dicom(tmp_path / "out", result_of(scan, Negative), IDENTITY)
    assert not (tmp_path / "out/seg.dcm").exists()


def test_files_of_other_names_stay(series):
    """The source's own were deleted, where the results were to lie beside them."""
    scan = read_only(series)
    source = {path: path.read_bytes() for path in series.iterdir()}
    for stale in ("seg", "picture-3"):
        (series / f"{stale}.dcm").write_bytes(b"of an earlier run")
    written = write_dicom(series, replace(result_of(scan, Negative), projected=np.arange(6) < 2), IDENTITY)
    assert {path.name for path in written} == {"sr.dcm", "map.dcm", "key-objects.dcm", "picture-1.dcm", "picture-2.dcm"}
    assert {*series.iterdir()} == {*source, *written}
    assert {path: path.read_bytes() for path in source} == source


@pytest.mark.parametrize("name", ["seg.dcm", "picture-3.dcm"])
def test_a_source_that_has_a_results_name_is_refused_whole(series, name):
    (series / "003.dcm").rename(series / name)
    scan = read_only(series)
    before = {path: path.read_bytes() for path in series.iterdir()}
    with pytest.raises(DerivedError, match=f"^{name}: an image of the source has the place of a result; give another"):
        write_dicom(series / ".." / "series", result_of(scan, Negative), IDENTITY)
    assert {path: path.read_bytes() for path in series.iterdir()} == before


def test_every_object_says_research_and_names_the_device(series):
    for ds in build_objects(result_of(read_only(series)), IDENTITY).values():
        assert ds.SeriesDescription.startswith("Research, unverified")
        equipment = ds.ContributingEquipmentSequence[0]
        assert equipment.DeviceUID == IDENTITY.maker.device_uid
        assert equipment.ContributionDescription.startswith("Research only, unverified")


# ---- times

@pytest.fixture
def clock_of(monkeypatch):
    """Sets the zone of local times."""
    def set_to(zone):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
    yield set_to
    monkeypatch.undo()
    time.tzset()


def times_of(ds):
    """Date and time as each place of an object tells them, to the second."""
    names = ("Content", "Series", "InstanceCreation", "OfSecondaryCapture")
    found = {(str(ds[date].value), str(ds[date.replace("Date", "Time")].value)[:6])
             for date in (f"Date{name}" if name.startswith("Of") else f"{name}Date" for name in names) if date in ds}
    return found | {(str(item.ContributionDateTime)[:8], str(item.ContributionDateTime)[8:14])
                    for item in ds.ContributingEquipmentSequence}


@pytest.mark.parametrize("made", [MADE, MADE.replace(tzinfo=UTC)])
@pytest.mark.parametrize("phi, offset, date, clock, copied", [
    (True, "+0900", "20240506", "160809", "+0900"), (True, "-0930 ", "20240505", "213809", "-0930"),
    (True, "+1400", "20240506", "210809", "+1400"), (False, "+0900", "20240506", "070809", None),
    (True, None, "20240506", "070809", None), (True, "", "20240506", "070809", None),
    (True, "+1445", "20240506", "070809", None),
    (True, "+9900", "20240506", "070809", None), (True, "KST", "20240506", "070809", None)])
def test_times_are_at_the_sources_offset_where_its_own_times_are_copied(tmp_path, clock_of, made, phi, offset, date,
                                                                        clock, copied):
    """Where the clock is UTC's, as in a container, a report was hours older than the scan that it is of."""
    clock_of("UTC")

    def edit(ds, k):
        complete(ds, k)
        if offset is not None:
            ds.TimezoneOffsetFromUTC = offset
    scan = read_only(write_dicom_series(tmp_path / "series", HU, edit=edit))
    for path in write_dicom(tmp_path / "out", result_of(scan), IDENTITY, phi=phi, made=made):
        ds = pydicom.dcmread(path)
        assert times_of(ds) == {(date, clock)} and ds.get("TimezoneOffsetFromUTC") == copied, path.name


def test_times_without_an_offset_are_local(series, clock_of):
    clock_of("Asia/Seoul")
    scan = read_only(series)
    for made in (MADE, datetime(2024, 5, 5, 22, 8, 9, tzinfo=UTC)):
        for ds in build_objects(result_of(scan), IDENTITY, made=made).values():
            assert times_of(ds) == {("20240506", "070809")} and "TimezoneOffsetFromUTC" not in ds


# ---- patient data

MARKERS = dict(PatientName="MARKER^NAME", PatientID="MARKERID", PatientBirthDate="19010203",
               PatientComments="MARKERCOMM", OtherPatientNames="MARKER^OTHER", PatientAge="077Y",
               AccessionNumber="MARKERACC", StudyID="MARKERSTUDY", StudyDescription="MARKERDESC",
               ReferringPhysicianName="MARKER^REF", AdmissionID="MARKERADM",
               AdditionalPatientHistory="MARKERHIST")
ELSEWHERE = dict(InstitutionName="MARKERINST", StationName="MARKERSTAT", OperatorsName="MARKER^OP",
                 SeriesDescription="MARKERSER", DeviceSerialNumber="MARKERDEV", ProtocolName="MARKERPROT")


def marked_series(folder):
    def edit(ds, k):
        complete(ds, k)
        for keyword, value in (MARKERS | ELSEWHERE).items():
            setattr(ds, keyword, value)
        ds.add_new(0x00091001, "LO", "MARKERPRIV")
    return write_dicom_series(folder, HU, edit=edit)


def test_no_byte_of_the_patient_without_phi(tmp_path):
    scan = read_only(marked_series(tmp_path / "series"))
    for path in write_dicom(tmp_path / "out", result_of(scan), IDENTITY, phi=False):
        content = path.read_bytes()
        for marker in ("MARKER", "19010203", "077Y", "20240506", "Secret"):
            assert marker.encode() not in content, f"{marker} in {path.name}"


def test_with_phi_the_patient_and_study_modules_and_no_more(tmp_path):
    scan = read_only(marked_series(tmp_path / "series"))
    for path in write_dicom(tmp_path / "out", result_of(scan), IDENTITY, made=MADE):
        ds = pydicom.dcmread(path)
        for keyword, value in MARKERS.items():
            assert str(ds[keyword].value) == value, f"{keyword} in {path.name}"
            del ds[keyword]
        left = [e.keyword for e in ds.iterall() if e.VR not in ("OB", "OW", "OF") and "MARKER" in str(e.value)]
        assert left == [], path.name


# ---- what cannot be written

def test_a_source_without_a_frame_of_reference_is_refused_by_name(tmp_path):
    folder = write_dicom_series(tmp_path / "series", HU)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        del ds.FrameOfReferenceUID
        ds.save_as(path)
    scan = read_only(folder)
    with pytest.raises(DerivedError, match=r"^[^/]*\.dcm: no FrameOfReferenceUID: .*do without them"):
        build_objects(result_of(scan), IDENTITY)


def test_two_images_of_one_sop_instance_uid_are_refused(series):
    """What lay on one would be shown over the other."""
    ds, other = pydicom.dcmread(series / "003.dcm"), pydicom.dcmread(series / "002.dcm")
    ds.SOPInstanceUID = other.SOPInstanceUID
    ds.save_as(series / "003.dcm")
    scan = read_only(series)
    with pytest.raises(DerivedError, match=r"^003.dcm: the same SOPInstanceUID as 002.dcm: .*give each image its own"):
        build_objects(result_of(scan), IDENTITY)


def test_a_scan_from_two_series_is_refused(series):
    scan = read_only(series)
    ds = pydicom.dcmread(series / "003.dcm")
    ds.SeriesInstanceUID = make_uid("another")
    ds.save_as(series / "003.dcm")
    with pytest.raises(DerivedError, match="003.dcm: another SeriesInstanceUID than .*000.dcm"):
        build_objects(result_of(scan), IDENTITY)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_makes_no_report(series, score):
    """It is above no threshold: the finding was absent."""
    with pytest.raises(DerivedError, match="its score is no number"):
        build_objects(result_of(read_only(series), score=score, flagged=False), IDENTITY)


def test_a_scan_that_is_no_dicom_is_refused(tmp_path):
    scan = read_only(write_slice_folder(tmp_path / "case", HU))
    with pytest.raises(DerivedError, match="need a scan read from DICOM files; this one came from slices"):
        build_objects(result_of(scan), IDENTITY)


def test_maps_of_another_scan_are_refused(series):
    scan = read_only(series)
    with pytest.raises(DerivedError, match=r"mask \[5, 12, 10\] does not fit the scan \[6, 12, 10\]"):
        build_objects(replace(result_of(scan), mask=np.zeros((5, 12, 10), bool)), IDENTITY)


def writer(phi=True):
    key = {"weights": "w", "threshold": 1.0}
    bundle = SimpleNamespace(meta={"provenance": {"name": "tiny"}}, weights_hash="ab" * 32, measure=Surprise())
    return dicom_writer(SimpleNamespace(bundle=bundle, key=lambda: key), phi)


def test_a_writer_for_the_results_folder(tmp_path, series):
    scan = read_only(series)
    assert writer()(tmp_path, result_of(scan)) == []
    report = pydicom.dcmread(tmp_path / "dicom/sr.dcm")
    assert 'settings={"threshold":1.0,"weights":"w"}' in [e.value for e in report.iterall() if e.keyword == "TextValue"]
    other = result_of(replace(scan, source="nifti"))
    assert writer()(tmp_path / "other", other) == [] and not (tmp_path / "other").exists()


def test_what_cannot_be_written_is_a_note_and_quotes_no_header(tmp_path, series, capfd, caplog, recwarn):
    scan = read_only(series)
    for path in series.iterdir():
        path.write_bytes(path.read_bytes().replace(b"0.5\\0.4", b"Secret!"))       # the pixel spacing, read already
    note, = writer()(tmp_path, result_of(scan))
    assert note.startswith("no DICOM objects: the source's header cannot be used") and "Secret" not in note
    said = "".join(capfd.readouterr()) + caplog.text + "".join(str(w.message) for w in recwarn)
    assert "Secret!" not in said
    (series / "002.dcm").unlink()
    note, = writer()(tmp_path, result_of(scan))
    assert "002.dcm is no longer there" in note


# ---- conformance

@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy is not installed (Debian package dicom3tools)")
@pytest.mark.parametrize("phi", [True, False])
@pytest.mark.parametrize("kind, tilt", [(Result, 18.5), (Negative, 0)])
def test_dciodvfy_finds_no_error(tmp_path, kind, tilt, phi):
    position = [0, 4, 8, 12, 19, 26] if tilt else None

    def edit(ds, k):
        complete(ds, k)
        if tilt:
            ds.TimezoneOffsetFromUTC, ds.BurnedInAnnotation, ds.LossyImageCompression = "+0900", "YES", None
        elif k == 3:
            ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", 9
            ds.LossyImageCompressionMethod = "ISO_10918_1"
    scan = read_only(write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), tilt_deg=tilt, position_mm=position,
                                        edit=edit))
    for path in write_dicom(tmp_path / "out", result_of(scan, kind), IDENTITY, phi=phi):
        said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        errors = [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]
        assert errors == [], path.name
