"""No patient data in anything that is written: every byte of every output and every line of the logs is searched.

The DICOM files that the commands read carry a marker in each attribute that tells of a person (writers.PATIENT).
DICOM outputs are exempt: they belong into the patient's study.
"""

from __future__ import annotations

import base64
import gzip
import io
import logging
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import evaluate
import prepare
import projector
from ct.read import find_scans, read_scan
from ct.scan import ScanError
from detect import Projector
from tests.helpers import leaks, synthetic_head
from tests.writers import PATIENT, PATIENT_MARKERS, make_uid, write_dicom_series

MODEL = Path(__file__).resolve().parents[1] / "models" / "phantom-128"
UIDS = [make_uid(*words).encode() for words in [("study",), *((name,) for name in ("one", "two", "cut", "odd"))]]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> tuple[Path, str]:
    """What prepare.py, projector.py and evaluate.py leave behind, and all that they said.

    A folder with two series, one with a series whose first file is cut short and whose second has a pixel spacing that
    is no number, and one with a file on whose number of frames pydicom fails, quoting it.
    """
    base = tmp_path_factory.mktemp("patient-data")
    hu = synthetic_head(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6), lesion=(5, 10, 25, 22, 75))[0]
    spacing = (10.0, 3.6, 3.6)
    for series in ("one", "two"):
        write_dicom_series(base / "scans" / "head", hu, spacing, series=series, name=lambda k, s=series: f"{s}{k}.dcm")
    write_dicom_series(base / "scans" / "broken", hu, spacing, series="cut", study="cut")
    cut, damaged = (base / "scans" / "broken" / f"{k:03d}.dcm" for k in (0, 1))
    cut.write_bytes(cut.read_bytes()[:-1000])
    damaged.write_bytes(damaged.read_bytes().replace(b"3.6\\3.6 ", b"Secret^N"))        # the pixel spacing
    assert damaged.read_bytes().count(b"Secret^N") == 2
    write_dicom_series(base / "scans" / "odd", hu[:1], spacing, series="odd", study="odd",
                       edit=lambda ds, k: setattr(ds, "NumberOfFrames", 11223344))
    odd = base / "scans" / "odd" / "000.dcm"
    odd.write_bytes(odd.read_bytes().replace(b"11223344", b"Secret^N"))
    assert odd.read_bytes().count(b"Secret^N") == 2
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    out = base / "out"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr("sys.stdout", said)
        patch.setattr("sys.stderr", said)
        assert prepare.main([str(base / "scans"), "--out", str(out / "slices.lmdb"), "--size", "32", "--workers", "1",
                             "--min-brain-fraction", "0.01", "--val-fraction", "0"]) == 3
        assert projector.main([str(base / "scans"), "--model", str(MODEL), "--out", str(out / "results"),
                               "--device", "cpu"]) == 3
        scan_ids = [row.split(",")[0] for row in (out / "results" / "scores.csv").read_text().splitlines()[1:]]
        labels = "scan_id,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(scan_ids))
        (base / "labels.csv").write_text(labels)
        assert evaluate.main([str(out / "results" / "scores.csv"), str(base / "labels.csv"), "--missing", "exclude",
                              "--out", str(out / "metrics")]) == 0
    logging.getLogger().removeHandler(handler)
    return out, said.getvalue() + "\n".join(str(w.message) for w in warned)


def test_no_output_holds_patient_data(outputs):
    out, _ = outputs
    kinds = {"".join(p.suffixes[-2:]) for p in out.rglob("*") if p.is_file()}
    assert kinds >= {".lmdb", ".csv", ".json", ".html", ".png", ".nii.gz", ".md"}
    assert leaks(out, *UIDS) == []


def test_no_log_holds_patient_data(outputs):
    _, said = outputs
    assert "broken" in said and "head-" in said       # the log is that of this run
    assert "000.dcm: cannot be read as DICOM (ValueError)" in said
    assert [m for m in (*PATIENT_MARKERS, *UIDS) if m in said.lower().encode()] == []


def test_ids_by_uid_keep_names_of_files_out_of_everything(tmp_path, monkeypatch, capfd):
    """Reasons named the file, remarks of the search the first folder, notes the other archive."""
    hu = np.random.default_rng(0).integers(-1000, 600, (12, 10, 8)).astype(np.float32)
    scans = tmp_path / "scans" / "DOE_JOHN"
    scans.mkdir(parents=True)
    (scans / "DOE_JOHN.nii.gz").write_bytes(b"no header")
    (scans / "letter.DOE_JOHN").touch()
    (scans / "DOE_JOHN.zip").write_bytes(b"PK\3\4 no archive")
    files = sorted(write_dicom_series(tmp_path / "files", hu, name=lambda k: f"DOE_JOHN{k:03d}.dcm").iterdir())
    for part, some in (("DOE_JOHN 1.zip", files[:7]), ("DOE_JOHN 2.zip", files[6:])):
        with zipfile.ZipFile(scans / part, "w") as archive:
            for path in some:
                archive.write(path, f"DOE_JOHN/{path.name}")
    write_dicom_series(scans / "DOE_JOHN", hu, series="cut", study="cut", name=lambda k: f"DOE_JOHN{k}")
    cut = scans / "DOE_JOHN" / "DOE_JOHN4"
    cut.write_bytes(cut.read_bytes()[:-100])
    (scans / "results").mkdir()
    (scans / "results" / "result.json").write_text('{"key": {}, "scan": {}, "slices": []}')
    prepare_scan = Projector.prepare

    def odd(self, scan):                                                 # an error of the system, which quotes a path
        if scan.source == "dicom" and len(scan.hu) == 7:
            raise FileNotFoundError(2, "No such file or directory", str(scans / "DOE_JOHN 1.zip"))
        return prepare_scan(self, scan)

    monkeypatch.setattr(Projector, "prepare", odd)
    out = tmp_path / "out"
    assert projector.main([str(tmp_path / "scans"), "--model", str(MODEL), "--device", "cpu", "--jobs", "1", "--out",
                           str(out), "--ids", "uid"]) == 3
    said = "".join(capfd.readouterr())
    rows = (out / "scores.csv").read_text()
    assert len(rows.splitlines()) == 6 and "file 1 of 1: cannot be read as NIfTI" in rows
    assert re.search(r"file \d+ of 12", rows) and "DOE" not in rows
    assert "left aside: 1 folders" in said and "not read, no scans: 1 files" in said and "its archive" in said
    assert "DOE" not in said
    written = [path for path in out.rglob("*") if path.is_file()]
    assert written and not any("DOE" in str(path) or b"DOE" in path.read_bytes() for path in written)
    found = find_scans(tmp_path / "scans", ids="uid", log=lambda line: None)
    notes = [note for source in found for note in source.notes]
    assert notes == 2 * ["another part of this series lies in another archive, with an id that begins alike: unpack "
                         "both into one folder"]
    by_path = {source.scan_id: source for source in find_scans(tmp_path / "scans", log=lambda line: None)}
    with pytest.raises(ScanError, match="DOE_JOHN.nii.gz: cannot be read as NIfTI"):
        read_scan(next(source for source in by_path.values() if source.kind == "nifti"))


def test_every_attribute_has_a_marker_and_reaches_the_commands(tmp_path):
    assert all(any(m in value.lower().encode() for m in PATIENT_MARKERS) for value in PATIENT.values())
    write_dicom_series(tmp_path, np.zeros((1, 4, 4)))
    content = (tmp_path / "000.dcm").read_bytes()
    assert all(value.encode() in content for value in PATIENT.values())


def test_the_search_finds_what_is_packed(tmp_path):
    """Or the tests above would prove nothing."""
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("Comment", "of Secret^Name", zip=True)
    picture = io.BytesIO()
    Image.new("L", (2, 2)).save(picture, "PNG", pnginfo=notes)
    page = b"<img src='data:image/png;base64," + base64.b64encode(picture.getvalue()) + b"'>"
    for name, content in (("a.csv", b"x,SECRET-ID"), ("b.nii.gz", gzip.compress(b"born 19010203")), ("c.html", page),
                          ("d.png", picture.getvalue()), ("secret.txt", b""), ("e.json", make_uid("one").encode()),
                          ("clean.csv", b"x"), ("f.dcm", b"SECRET-ID")):
        (tmp_path / name).write_bytes(content)
    found = leaks(tmp_path, *UIDS)
    assert [line.split(":")[0] for line in found] == ["a.csv", "b.nii.gz", "c.html", "d.png", "e.json", "secret.txt"]


def test_what_git_ignores_gets_into_no_image():
    """A pattern without a slash is for any depth in .gitignore, and for the root alone in .dockerignore."""
    ignored, left_out = ((MODEL.parents[1] / name).read_text().split("\n") for name in (".gitignore", ".dockerignore"))
    patterns = [line.rstrip("/") for line in ignored if line and not line.startswith("#")]
    assert {"runs", "datasets", "*.dcm", "demos/out"} < set(patterns)
    assert not {one if "/" in one else f"**/{one}" for one in patterns} - set(left_out)
