"""What results and tables may replace: those of the same scan, and nothing else.

Promise 14 of docs/RELIABILITY.md.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

import projector
from ct.read import find_scans
from ct.scan import ScanSource
from detect import Projector, jobs, load_bundle
from detect.folder import PARTS, collect
from detect.jobs import WORK
from detect.outputs import OUTPUTS
from detect.result import is_other_scan, origin, read_result
from tests.helpers import project_one, synthetic_head, tiny_bundle
from tests.queue_data import flags, link_two, made, make_scans, run_whole, tables
from tests.writers import write_dicom_series


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return make_scans(tmp_path_factory.mktemp("scans") / "four", 4)


@pytest.fixture(scope="module")
def whole(scans, model, tmp_path_factory) -> Path:
    return run_whole(scans, model, tmp_path_factory.mktemp("results") / "whole")


@pytest.fixture
def two(scans, tmp_path) -> Path:
    return link_two(scans, tmp_path / "two")


def test_results_of_other_settings_that_come_meanwhile_are_not_replaced(two, model, tmp_path):
    """Of two runs on an empty folder each took the other's results for out of date, and projected them again."""
    out, source, bundle = tmp_path / "out", find_scans(two)[0], load_bundle(model, precision="fp32")
    one, other = Projector(bundle), Projector(bundle, bundle.settings.replace(threshold_hu=900.0))
    list(jobs.project_all(one, [source], out))
    before = (out / "scan-000" / "result.json").read_bytes()
    with pytest.raises(ValueError, match="holds results of scan-000 made with another model or calibration, other sett"
                                         r"ings .* \(settings.scoring.threshold_hu [0-9.]+, now 900.0\)"):
        list(jobs.project_all(other, [source], out))
    assert (out / "scan-000" / "result.json").read_bytes() == before
    list(jobs.project_all(other, [source], out, overwrite=True))
    assert read_result(out / "scan-000")["key"] == other.key()


def test_dicom_objects_of_a_zip_and_none_left_of_an_earlier_run(model, tmp_path):
    hu, _ = synthetic_head(slices=6, size=48, spacing_mm=(20.0, 4.8, 4.8))
    write_dicom_series(tmp_path / "series", hu, (20.0, 4.8, 4.8))
    shutil.make_archive(str(tmp_path / "scans" / "head"), "zip", tmp_path / "series")
    out = tmp_path / "out"
    assert projector.main(flags(tmp_path / "scans", model, out)) == 0
    with open(out / "scores.csv", newline="", encoding="utf-8") as file:
        row, = csv.DictReader(file)
    assert "no DICOM objects" not in row["notes"]
    report = pydicom.dcmread(out / "head" / "dicom" / "sr.dcm")
    assert report.StudyInstanceUID == pydicom.dcmread(tmp_path / "series" / "000.dcm").StudyInstanceUID
    assert projector.main(flags(tmp_path / "scans", model, out, "--no-dicom-out")) == 0
    assert (out / "head" / "mask.nii.gz").is_file() and not (out / "head" / "dicom").exists()


def test_results_never_take_the_place_of_the_scans(model, tmp_path, capsys):
    """--out with the folder of the scans: each was replaced by its results, and gone."""
    hu, _ = synthetic_head(slices=6, size=48, spacing_mm=(20.0, 4.8, 4.8))
    for name in ("one", "two"):
        write_dicom_series(tmp_path / "scans" / name, hu, (20.0, 4.8, 4.8), series=name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.dcm")}
    for more in ((), ("--overwrite",)):
        assert projector.main(flags(tmp_path / "scans", model, tmp_path / "scans", *more)) == 2
        assert "one: results would take the place of what is there" in capsys.readouterr().err
    one = Projector(load_bundle(model, precision="fp32"))
    with pytest.raises(ValueError, match="one: results would take the place"):
        list(jobs.project_all(one, find_scans(tmp_path / "scans"), tmp_path / "scans"))
    assert projector.main(flags(tmp_path / "scans", model, tmp_path / "scans", "--part", "0/2")) == 0
    assert {path: path.read_bytes() for path in before} == before


FOREIGN = {"list": [1], "other": {"score": 1}, "text": "scan-001",
           "row": {"key": {}, "scan": {"scan_id": "a", "status": "ok"}, "slices": [], "seconds": {}}}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_another_programs_result_json_is_named(two, model, tmp_path, capsys, foreign):
    """It was a traceback, and the folder that it lay in was replaced."""
    out = tmp_path / "out"
    place = out / "scan-001"
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(FOREIGN[foreign]))
    (place / "mine.dcm").write_text("the only copy")
    for more in ((), ("--overwrite",)):
        assert projector.main(flags(two, model, out, *more)) == 2
        assert f"error: {place}" in capsys.readouterr().err and (place / "mine.dcm").read_text() == "the only copy"
    with pytest.raises(ValueError, match="scan-001"):
        list(jobs.project_all(Projector(load_bundle(model, precision="fp32")), find_scans(two), out))
    place.rename(out / "aside")
    assert projector.main(flags(two, model, out)) == 0
    assert projector.main(["merge", str(out)]) == (2 if foreign in ("other", "row") else 0)
    assert ("aside/result.json: another program's" in capsys.readouterr().err) == (foreign in ("other", "row"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"key": NaN', '{"key": {}, "scan": {"score": NaN}}', "\xff", ""])
def test_half_a_result_is_done_again_unless_more_lies_beside_it(two, model, tmp_path, capsys, text):
    out = tmp_path / "out"
    assert projector.main(flags(two, model, out)) == 0 and made(capsys) == 2
    before = tables(out)
    (out / "scan-001" / "result.json").write_text(text, encoding="latin-1")
    assert projector.main(flags(two, model, out)) == 0 and made(capsys) == 1 and tables(out) == before
    (out / "scan-001" / "result.json").write_text(text, encoding="latin-1")
    (out / "scan-001" / "notes.txt").write_text("a reader's")
    assert projector.main(flags(two, model, out)) == 2 and (out / "scan-001" / "notes.txt").exists()
    assert "scan-001: results would take the place of what is there" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scores.csv", "slices.csv", "seconds.csv", "run.json", "report.html"])
def test_tables_never_take_the_place_of_another_programs(two, model, whole, tmp_path, capsys, name):
    """--out with a folder that holds labels as scores.csv: they were gone."""
    (two / name).write_text(text := '{"scan_id": "label"}' if name == "run.json" else "scan_id,label\nscan-000,1\n")
    assert projector.main(flags(two, model, two)) == 2
    assert f"{name}: would be replaced, and this version of this program has not made it" in capsys.readouterr().err
    shutil.copytree(whole / "scan-000", two / "scan-000")
    assert projector.main(["merge", str(two)]) == 2
    assert (two / name).read_text() == text and not (two / PARTS).exists()


def test_a_folder_that_holds_scans_is_never_replaced_whatever_lies_beside_them(model, tmp_path, capsys):
    """An earlier result that a scan of the same name was put into, reached through a link."""
    hu, _ = synthetic_head(slices=6, size=48, spacing_mm=(20.0, 4.8, 4.8))
    series = tmp_path / "out" / "one" / "deep" / "one"
    write_dicom_series(series, hu, (20.0, 4.8, 4.8))
    write_head(tmp_path / "first" / "one.nii", seed=0)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = {path: path.read_bytes() for path in series.iterdir()}
    made_elsewhere = tmp_path / "elsewhere"
    assert projector.main(flags(tmp_path / "first", model, made_elsewhere)) == 0
    shutil.copy(made_elsewhere / "one" / "result.json", tmp_path / "out" / "one")
    for out in (tmp_path / "out", tmp_path / "link"):
        assert projector.main(flags(series, model, out, "--overwrite")) == 2
        assert "one: results would take the place of what is there" in capsys.readouterr().err
    with pytest.raises(ValueError, match="would take the place"):
        list(jobs.project_all(Projector(load_bundle(model, precision="fp32")), find_scans(series), tmp_path / "link",
                                overwrite=True))
    assert {path: path.read_bytes() for path in before} == before


def write_head(path: Path, seed: int) -> Path:
    hu, _ = synthetic_head(slices=6, size=48, spacing_mm=(20.0, 4.8, 4.8), seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0).astype(np.int16), np.diag([4.8, 4.8, 20.0, 1])), path)
    os.utime(path, (1, 1))                                               # as of an archive that sets all times alike
    return path.parent


def test_another_scan_of_the_same_name_takes_no_results_place(model, tmp_path, capsys):
    """A second folder's scan-1 replaced the first one's results, or took them for its own."""
    monday, tuesday = (write_head(tmp_path / day / "scan-1.nii", seed) for day, seed in (("monday", 0), ("tuesday", 1)))
    out = tmp_path / "out"
    assert projector.main(flags(monday, model, out)) == 0 and made(capsys) == 1
    first = tables(out)
    assert projector.main(flags(tuesday, model, out)) == 2
    said = capsys.readouterr()
    assert "scan-1 is another scan than the one whose results lie there; choose another --out" in said.err
    assert tables(out) == first and len(list((out / PARTS).iterdir())) == 1
    one = Projector(load_bundle(model, precision="fp32"))
    with pytest.raises(ValueError, match="is another scan"):             # two runs at once, neither of which knew
        list(jobs.project_all(one, find_scans(tuesday), out))
    assert collect(out, find_scans(tuesday), one.key(), [*OUTPUTS, "dicom"]) == ([], ["scan-1"])

    moved = shutil.move(monday, tmp_path / "elsewhere")                  # the same scan: nothing to do
    assert projector.main(flags(moved, model, out)) == 0 and made(capsys) == 0
    (write_head(monday / "scan-1.nii", seed=5) / "scan-1.nii").touch()    # changed where it lay: as before
    assert projector.main(flags(monday, model, out)) == 0 and made(capsys) == 1
    assert projector.main(flags(tuesday, model, out, "--overwrite")) == 0 and made(capsys) == 1
    assert tables(out) not in (first, {})
    text = (out / "scan-1" / "result.json").read_text()
    assert "tuesday" not in text and str(tmp_path) not in text


def test_other_content_of_the_same_size_and_time_is_projected_again(model, tmp_path, capsys):
    """As of an export that sets all times alike: the first scan's results went on to stand for the second."""
    monday, other = (write_head(tmp_path / day / "scan-1.nii", seed) for day, seed in (("monday", 0), ("other", 1)))
    out = tmp_path / "out"
    assert projector.main(flags(monday, model, out)) == 0 and made(capsys) == 1
    first = tables(out)
    (monday / "scan-1.nii").chmod(0o600)                                 # the system sees a change, but of nothing read
    assert projector.main(flags(monday, model, out)) == 0 and made(capsys) == 0
    earlier = monday.joinpath("scan-1.nii").stat()
    shutil.copyfile(other / "scan-1.nii", monday / "scan-1.nii")
    os.utime(monday / "scan-1.nii", (1, 1))
    now = monday.joinpath("scan-1.nii").stat()
    assert (now.st_ino, now.st_size, now.st_mtime) == (earlier.st_ino, earlier.st_size, earlier.st_mtime)
    assert projector.main(flags(monday, model, out)) == 0 and made(capsys) == 1
    assert tables(out) != first


def test_files_go_and_results_stay(model, tmp_path, capsys, monkeypatch):
    """A share that is gone, or an export that is cleared, when the scans are done: there were no tables, and exit 0."""
    folder, out = write_head(tmp_path / "scans" / "scan-1.nii", seed=0), tmp_path / "out"
    write_head(folder / "scan-2.nii", seed=1)
    write, read = jobs.Job.write, jobs.Job.read

    def then_gone(job):
        said = write(job)
        job.source.paths[0].unlink()
        return said

    def gone(job, alone=False):
        if job.source.scan_id == "scan-2":
            job.source.paths[0].unlink()
        read(job, alone)

    monkeypatch.setattr(jobs.Job, "write", then_gone)
    assert projector.main(flags(folder, model, out, "--jobs", "1")) == 0 and made(capsys) == 2
    before = tables(out)
    sources = [ScanSource(name, "nifti", (folder / f"{name}.nii",)) for name in ("scan-1", "scan-2")]
    monkeypatch.setattr("ct.read.find_all", lambda *_: sources)          # as if they went after the search
    assert projector.main(flags(folder, model, out, "--jobs", "1")) == 0 and made(capsys) == 0
    assert tables(out) == before
    monkeypatch.setattr(jobs.Job, "write", write)
    monkeypatch.setattr(jobs.Job, "read", gone)
    write_head(folder / "scan-2.nii", seed=1)
    assert projector.main(flags(folder, model, tmp_path / "new", "--jobs", "1")) == 3       # gone before it was read
    rows = (tmp_path / "new" / "scores.csv").read_text()
    assert "scan-2,,,,failed,scan-2.nii: cannot be read" in rows and str(tmp_path) not in rows


def test_a_series_is_known_by_its_uid_wherever_it_lies(tmp_path):
    """More of its slices, another place: the same scan. Another series at the same place: another scan."""
    def source(where="a", uid="1.2|9|5.0", kind="dicom"):
        return ScanSource("s", kind, (tmp_path / where / "1.dcm",), uid=uid)

    earlier = {"origin": origin(source())}
    assert "1.2" not in str(earlier).replace(earlier["origin"]["uid"], "")
    assert not is_other_scan(source(where="b", uid="1.2|9|2.5"), earlier)
    assert is_other_scan(source(uid="1.3|9|5.0"), earlier)
    assert is_other_scan(source(uid="", kind="nifti"), earlier)
    without = {"origin": origin(source(uid=""))}                   # its file is not there: no content to know
    assert not is_other_scan(source(uid=""), without) and is_other_scan(source("b", uid=""), without)
    assert is_other_scan(source(), without)


def test_a_scan_is_replaced_whole(scans, tmp_path):
    """A failed one leaves nothing of an earlier result, which would be taken for its own."""
    class Failing:
        def prepare(self, scan):
            raise RuntimeError("broken")
    place = tmp_path / "out" / "scan-000"
    place.mkdir(parents=True)
    (place / "mask.nii.gz").write_text("old")
    source = find_scans(scans)[0]
    assert project_one(Failing(), source, place, tmp_path / "out" / WORK, {"key": {}}).startswith("FAILED, Runt")
    assert os.listdir(place) == ["result.json"] and read_result(place)["scan"]["status"] == "failed"
