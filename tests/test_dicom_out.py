"""DICOM results: UIDs, times, no patient data with phi=False, what is refused, and that they conform."""

import copy
import shutil
import subprocess
import time
import warnings
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pydicom
import pytest

from ct.derived import DerivedError
from detect.dicom_out import Identity, build_objects, write_dicom
from tests.dicom_results import HU, IDENTITY, MADE, Negative, Result, read_only, result_of, writer
from tests.writers import complete, make_uid, write_dicom_series, write_slice_folder


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


def test_private_elements_stay_behind_within_sequences_too(tmp_path):
    """Those of a procedure's code came along."""
    def edit(ds, k):
        complete(ds, k)
        inner = pydicom.Dataset()
        inner.CodeValue, inner.CodingSchemeDesignator, inner.CodeMeaning = "IN", "99X", "MARKERKEPT"
        for item in (inner, code := copy.deepcopy(inner)):
            item.add_new(0x00091001, "LO", "MARKERPRIV")
        code.EquivalentCodeSequence = [inner]
        ds.ProcedureCodeSequence = [code]
    scan = read_only(write_dicom_series(tmp_path / "series", HU, edit=edit))
    for path in write_dicom(tmp_path / "out", result_of(scan), IDENTITY):
        content = path.read_bytes()
        assert content.count(b"MARKERKEPT") == 2 and b"MARKERPRIV" not in content, path.name


@pytest.mark.parametrize("keyword", ["PatientID", "PatientName"])
@pytest.mark.parametrize("charset, value, kept", [
    ("ISO_IR 192", "\ud64d^\uae38\ub3d9".encode("euc_kr"), False), (None, "\ud64d^\uae38\ub3d9".encode("euc_kr"), True),
    ("ISO_IR 192", "\ud64d^\uae38\ub3d9".encode(), True), ("ISO_IR 100", b" A^B^^\xa0", True),
    (["", "ISO 2022 IR 87"], b"Yamada=\x1b$B;3ED\x1b(J", True)])
def test_a_patient_who_would_be_written_as_another_is_refused(tmp_path, keyword, charset, value, kept):
    """Korean bytes under the name of UTF-8: what no character has became U+FFFD, and the results another patient's."""
    value += b" " * (len(value) % 2)
    stand_in = "Q" * len(value)

    def edit(ds, k):
        complete(ds, k)
        ds.SpecificCharacterSet = charset
        setattr(ds, keyword, stand_in)
    folder = write_dicom_series(tmp_path / "series", HU, edit=edit)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(stand_in.encode(), value))
    result = result_of(read_only(folder))
    assert len(build_objects(result, IDENTITY, phi=False)) > 4
    if not kept:
        with pytest.raises(DerivedError, match=f"^000.dcm: its {keyword} is not in the character set that it names"):
            build_objects(result, IDENTITY)
        return
    path = write_dicom(tmp_path / "out", result, IDENTITY)[0]
    written, source = pydicom.dcmread(path), pydicom.dcmread(folder / "000.dcm")
    assert source.get_item(keyword).value == value and str(written[keyword].value) == str(source[keyword].value)


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
