"""What the DICOM report, key objects and pictures say of a scan."""

from dataclasses import replace
from types import SimpleNamespace

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from detect.dicom_out import build_objects, identity_of
from detect.dicom_out.common import key_slices_of
from detect.dicom_out.secondary_capture import draw
from detect.outputs import slice_rows
from detect.scores import rounded_down
from detect.surprise import Surprise
from detect.votes import Votes
from tests.dicom_results import HU, IDENTITY, Negative, Result, read_only, result_of
from tests.helpers import synthetic_head
from tests.writers import complete, write_dicom_series


@pytest.fixture
def series(tmp_path):
    return write_dicom_series(tmp_path / "series", HU, (5, 0.5, 0.4), edit=complete)


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
    assert key_slices_of(result) == (10, 14, 20)                 # marked ones first: 13 is too near to 10
    objects = build_objects(result, IDENTITY)
    assert {f"picture-{number}" for number in (1, 2, 3)} <= objects.keys()
    near = replace(result, projected=np.isin(np.arange(24), (9, 10, 11)))
    assert key_slices_of(near) == (10,)
    apart = read_only(write_dicom_series(tmp_path / "apart", HU, (4.0, 0.5, 0.4), edit=complete))
    assert key_slices_of(result_of(apart)) == (4, 3, 2)          # 4 mm apart already


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
