"""detect/result.py: what tells that a result is of a scan as it is now and as it is read."""

import hashlib
import os

import pytest

from ct.read import find_scans
from ct.scan import Found, ScanSource, joined_uid
from detect.outputs import DICOM, DICOM_NO_PHI, DICOM_ONLY, join_notes, split_notes
from detect.result import fingerprint, made_with
from tests.test_read import HU
from tests.writers import write_slice_folder


@pytest.mark.parametrize("given, read_as", [
    ({}, {}),
    ({"notes": ("a", "b"), "options": {"frames": ((0, 1),)}}, {"notes": ("a", "b"), "frames": ((0, 1),)}),
    ({"error": "broken", "notes": ("a",)}, {"notes": ("a",), "error": "broken"}),
])
def test_a_fingerprint_is_what_it_was_when_notes_and_errors_were_options(tmp_path, given, read_as):
    """Results of before are finished: the record was a dict then, in this order, and paths were left out."""
    (tmp_path / "1.dcm").write_bytes(b"four")
    os.utime(tmp_path / "1.dcm", ns=(5, 5))
    facts = ("dicom", [("1.dcm", 4, 5)], read_as)
    found = fingerprint(ScanSource("s", "dicom", (tmp_path / "1.dcm",), **given))
    assert found == hashlib.sha256(repr(facts).encode()).hexdigest()


def test_a_fingerprint_of_pictures_has_the_spacing_that_is_assumed(tmp_path):
    write_slice_folder(tmp_path / "case", HU[:1], slice_spacing_mm=None)
    for name in ("0.png", "scan.json"):
        os.utime(tmp_path / "case" / name, ns=(5, 5))
    source, = find_scans(tmp_path, 2.5)
    sizes = [(name, (tmp_path / "case" / name).stat().st_size, 5) for name in ("0.png", "scan.json")]
    facts = ("slices", sizes, {"mask": None, "unknown_slice_spacing_mm": 2.5})
    assert fingerprint(source) == hashlib.sha256(repr(facts).encode()).hexdigest()


@pytest.mark.parametrize("make", [lambda uid: Found("dicom", (), None, uid=uid),
                                  lambda uid: ScanSource("s", "dicom", (), uid=uid)])
def test_a_uid_tells_series_and_frame_of_reference(make):
    one = make(joined_uid("1.2", "9", "5.0", "x"))
    assert (one.series_uid, one.frame_of_reference) == ("1.2", "9") and one.uid == "1.2|9|5.0|x"
    assert make(joined_uid("1.2", "")).frame_of_reference == ""             # which the files do not tell
    assert (make("abc").series_uid, make("abc").frame_of_reference) == ("abc", None)       # by content
    assert make("").series_uid == ""


def test_dicom_objects_are_asked_for_of_dicom_alone():
    """Every output whose name began with 'dicom' was taken for one of these."""
    assert DICOM_ONLY == {DICOM, DICOM_NO_PHI} == {"dicom", "dicom without patient"}        # as in finished results
    writers = ("maps", DICOM, DICOM_NO_PHI, "dicom statistics")
    made = {kind: made_with({}, ScanSource("s", kind, ()), writers)["outputs"] for kind in ("dicom", "nifti")}
    assert made == {"dicom": ["dicom", "dicom statistics", "dicom without patient", "maps"],
                    "nifti": ["dicom statistics", "maps"]}


def test_notes_are_split_as_they_were_joined():
    assert join_notes(["a", "b; c", "a"]) == "a | b; c" and split_notes("a | b; c") == ["a", "b; c"]
    assert join_notes([]) == "" and split_notes("") == []
