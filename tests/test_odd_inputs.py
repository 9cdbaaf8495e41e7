"""Odd inputs that people report of CT tools, one test or more per kind: read right, taken apart, or refused by name."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest

from ct.read import find_scans, read_scan
from ct.scan import RESULT_MARK, ScanError
from ct.write import write_nifti
from tests.helpers import read_all
from tests.writers import edited, write_dicom_series, write_nifti_scan, write_slice_folder

RNG = np.random.default_rng(4)
HU = RNG.integers(-1000, 600, (6, 10, 8)).astype(np.float32)


# ---- nothing is passed over in silence

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


# ---- one scan never costs the others

def test_a_name_that_is_no_utf8_has_a_printable_id(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xc3\xee\xeb"
    write_slice_folder(os.fsdecode(folder), HU[:1].clip(-20, 100))
    source, = find_scans(tmp_path)
    assert source.scan_id == "%C3%EE%EB" and len(read_scan(source).hu) == 1


# ---- messages

@pytest.mark.parametrize("change, words", [
    (edited(ImagePositionPatient=[0, 0, 0]), "all 6 slices lie at one ImagePositionPatient"),
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
    write_dicom_series(tmp_path / "case", HU, edit=edited(ContrastBolusAgent="agent", ConvolutionKernel=["H70h", "1"]))
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
    write_dicom_series(tmp_path / "case", HU, edit=edited(ContrastBolusAgentSequence=[code] if item else []))
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
    write_dicom_series(tmp_path / "case", HU[:3], edit=edited(ContrastBolusAgent=agent))
    scan, = read_all(tmp_path)
    assert any(note.startswith("contrast agent given") for note in scan.notes) is given


def test_gzip_called_nii(tmp_path):
    path = write_nifti_scan(tmp_path / "vol.nii.gz", HU)
    path.rename(tmp_path / "vol.nii")
    np.testing.assert_array_equal(read_all(tmp_path)[0].hu, HU)


# ---- what cannot be looked into

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
