"""The folder of results as a queue: runs killed, run twice at once, run in parts; the same tables to the byte.

Promises 8 to 12 of docs/RELIABILITY.md. What is random runs a few times here, and a hundred times in `make soak`.
"""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import shutil
import signal
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

import projector
from ct.read import find_scans
from ct.scan import ScanSource
from detect import Projector, jobs, load_bundle
from detect.claims import Claims
from detect.folder import PARTS, absent, collect, collect_all, note_part, remove_leftovers
from detect.jobs import WORK
from detect.outputs import OUTPUTS
from detect.report.tables import read_results
from detect.report.words import unshown
from detect.result import Result, find_result_folder, is_another, origin, read_result, result_folder
from detect.run import begin_report
from tests import processes
from tests.helpers import project_one, synthetic_head, tiny_bundle
from tests.writers import write_dicom_series

TABLES = ("scores.csv", "slices.csv")
BROKEN = "scan-003"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("model") / "tiny")


def make_scans(folder: Path, count: int) -> Path:
    """Heads of 6 slices of 48 x 48 pixels as NIfTI; one cannot be read."""
    folder.mkdir()
    for i in range(count):
        hu, _ = synthetic_head(slices=6, size=48, spacing_mm=(20.0, 4.8, 4.8), seed=i)
        image = nib.Nifti1Image(hu.transpose(2, 1, 0).astype(np.int16), np.diag([4.8, 4.8, 20.0, 1]))
        nib.save(image, folder / f"scan-{i:03d}.nii")
    (folder / f"{BROKEN}.nii").write_bytes((folder / f"{BROKEN}.nii").read_bytes()[:400])
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return make_scans(tmp_path_factory.mktemp("scans") / "four", 4)


def flags(scans: Path, model: Path, out: Path, *more: object) -> list[str]:
    return [str(a) for a in (scans, "--model", model, "--out", out, "--device", "cpu", "--precision", "fp32", *more)]


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


@pytest.fixture(scope="module")
def whole(scans, model, tmp_path_factory) -> Path:
    """Results of a run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("results") / "whole"
    assert projector.main(flags(scans, model, out)) == 3                 # one scan is broken
    return out


def test_a_bad_scan_costs_one_row(whole):
    with open(whole / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == 3 * ["ok"] + ["failed"]
    assert rows[-1]["scan_id"] == BROKEN and rows[-1]["reason"]
    assert sorted(path.name for path in (whole / BROKEN).iterdir()) == ["result.json"]
    assert not any((whole / WORK).iterdir())                             # no claim, nothing half written


def files_of(folder: Path) -> dict[str, bytes]:
    """By name, without the times in result.json."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = json.loads(found.pop("result.json"))
    result["scan"].pop("seconds", None)
    return found | {"result.json": json.dumps(result | {"seconds": list(result["seconds"])}).encode()}


def test_one_scan_after_the_other_gives_the_same_files(scans, model, whole, tmp_path):
    """As if reading, networks and writing of successive scans did not overlap."""
    one_by_one = Projector(load_bundle(model, precision="fp32"))
    for source in find_scans(scans):
        earlier = read_result(whole / source.scan_id)
        made = {name: earlier[name] for name in ("key", "files", "outputs")}
        project_one(one_by_one, source, tmp_path / source.scan_id, tmp_path / WORK, made)
        assert files_of(tmp_path / source.scan_id) == files_of(whole / source.scan_id)
    assert len(files_of(whole / "scan-000")) > 6                         # maps, overlays, result.json


def test_another_batch_gives_the_same_tables(scans, model, whole, tmp_path):
    assert projector.main(flags(scans, model, tmp_path / "out", "--set", "batch=3")) == 3
    assert tables(tmp_path / "out") == tables(whole)


def test_parts_and_a_merge_give_the_same_tables(scans, model, whole, tmp_path, capsys):
    out = tmp_path / "out"
    codes = [projector.main(flags(scans, model, out, "--part", f"{i}/3")) for i in range(3)]
    assert sorted(codes) == [0, 0, 3] and not (out / "scores.csv").exists()
    assert projector.main(["merge", str(out)]) == 3
    assert tables(out) == tables(whole)
    assert find_result_folder(out, "scan-000").parent.parent == out / "scans"
    report = json.loads((out / "run.json").read_text())
    assert report["scans"] == 3 and report["failed"] == 1 and (out / "report.html").is_file()


def test_merge_names_the_part_that_never_began_and_the_scans_without_a_result(scans, model, whole, tmp_path, capsys):
    """It made tables of half of the scans, and said that all was well."""
    out = tmp_path / "out"

    def merged() -> tuple[int, str]:
        return projector.main(["merge", str(out)]), capsys.readouterr().err

    assert projector.main(flags(scans, model, out, "--part", "0/2")) == 0
    code, said = merged()
    assert code == 3 and "1 of 2 parts never began" in said and "--part 1/2" in said
    assert len((out / "scores.csv").read_text().splitlines()) == 3       # what there is, is in the tables
    assert projector.main(flags(scans, model, out, "--part", "1/2")) == 3
    assert merged() == (3, "")                                           # for the scan that is broken
    assert tables(out) == tables(whole)
    place = find_result_folder(out, "scan-001")
    place.rename(tmp_path / "aside")                                     # as if part 1 had been killed before it
    code, said = merged()
    assert code == 3 and said == "not in the tables: 1 scans have no result: scan-001; start their runs again\n"
    (tmp_path / "aside").rename(place)
    for text in ("{", '{"part": 0, "of": 2, "found": "", "scans": null}', "[" * 100_000):
        (out / PARTS / next(iter(os.listdir(out / PARTS)))).write_text(text)
        code, said = merged()
        assert code == 2 and "-of-2.json: " in said and "remove it, and start the part" in said


@pytest.fixture
def two(scans, tmp_path) -> Path:
    """Two of the scans, which can be read."""
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("scan-000.nii", "scan-001.nii"):
        os.link(scans / name, folder / name)
    return folder


def made(capsys) -> int:
    """How many scans have been projected since it was asked."""
    return capsys.readouterr().out.count(": score")


def test_parts_after_a_whole_run_find_its_results(two, model, tmp_path, capsys):
    """They projected all again beside them, and each scan had two rows."""
    out = tmp_path / "out"
    assert projector.main(flags(two, model, out)) == 0 and made(capsys) == 2
    before = tables(out)
    for number in (0, 1):
        assert projector.main(flags(two, model, out, "--part", f"{number}/2")) == 0
    assert made(capsys) == 0 and not (out / "scans").exists()
    assert projector.main(["merge", str(out)]) == 0 and tables(out) == before


def test_a_whole_run_after_parts_replaces_their_results(two, model, tmp_path, capsys):
    """It wrote beside them, read theirs, and never made a table."""
    out, other = tmp_path / "out", ("--overwrite", "--set", "threshold_hu=3")
    for number in (0, 1):
        assert projector.main(flags(two, model, out, "--part", f"{number}/2")) == 0
    assert projector.main(["merge", str(out)]) == 0 and made(capsys) == 2
    first = tables(out)
    assert projector.main(flags(two, model, out)) == 0                   # finished: a part's are a whole run's
    assert made(capsys) == 0 and tables(out) == first
    assert projector.main(flags(two, model, out, *other)) == 0 and made(capsys) == 2
    second = tables(out)
    assert second != first and not (out / "scan-000").exists()
    assert projector.main(["merge", str(out)]) == 0 and tables(out) == second
    assert projector.main(flags(two, model, tmp_path / "alone", *other)) == 0
    assert second == tables(tmp_path / "alone")


def test_a_place_that_another_run_chose_meanwhile_is_taken(two, model, tmp_path, monkeypatch):
    """A part has just finished the scan that a whole run then gets the claim on."""
    source, hold, out = find_scans(two)[0], Claims.hold, tmp_path / "out"
    one = Projector(load_bundle(model, precision="fp32"))

    def finished_first(self, name):
        monkeypatch.setattr(Claims, "hold", hold)
        assert len(list(jobs.project_all(one, [source], out, by_hash=True))) == 1
        return hold(self, name)
    monkeypatch.setattr(Claims, "hold", finished_first)
    list(jobs.project_all(one, [source], out))
    assert find_result_folder(out, source.scan_id).parent.parent == out / "scans" and not (out / "scan-000").exists()


def test_two_results_of_one_scan_are_named(two, model, tmp_path, capsys):
    """As earlier versions made them."""
    out = tmp_path / "out"
    assert projector.main(flags(two, model, out)) == 0
    before = tables(out)
    shutil.copytree(out / "scan-001", result_folder(out, "scan-001", by_hash=True))
    capsys.readouterr()
    for command in (["merge", str(out)], flags(two, model, out), flags(two, model, out, "--part", "0/1")):
        assert projector.main(command) == 2
        said = capsys.readouterr().err
        assert "scan-001: has two results" in said and "remove one of these folders" in said
    assert tables(out) == before                                         # refused before anything is written
    shutil.rmtree(out / "scan-001")
    assert projector.main(["merge", str(out)]) == 0
    shutil.copytree(out / "scan-000", out / "scan-000 (copy)")
    assert projector.main(["merge", str(out)]) == 2
    said = capsys.readouterr().err
    assert "scan-000: has two results" in said and "scan-000 (copy)" in said


def test_the_last_run_on_the_same_inputs_says_what_there_is(tmp_path):
    def noted(*runs: tuple[str, str, int, int]) -> list[str]:
        shutil.rmtree(tmp_path / PARTS, ignore_errors=True)
        for k, (inputs, ids, number, count) in enumerate(runs):
            note_part(tmp_path, [Path(inputs)], [ScanSource(one, "nifti", ()) for one in ids], number, count)
            for path in (tmp_path / PARTS).iterdir():
                if path.stat().st_mtime > 1e6:
                    os.utime(path, (k, k))
        done = [Result(tmp_path, {"scan_id": one, "status": "ok"}, {}, {}) for one in "ab"]
        return absent(tmp_path, done)

    assert noted() == []                                                 # of a version that left no word
    assert noted(("x", "ab", 0, 2), ("x", "ab", 1, 2)) == noted(("x", "ab", 0, 1)) == []
    never = "1 of 2 parts never began, or saw other scans than the last one: start them again, --part "
    assert noted(("x", "ab", 1, 2)) == [never + "0/2"]
    assert noted(("x", "ab", 1, 2), ("x", "ab", 0, 1)) == []             # a whole run has done all
    assert noted(("x", "a", 0, 2), ("x", "ab", 1, 2)) == [never + "0/2"]          # a scan has come between them
    assert noted(("x", "a", 0, 2), ("x", "a", 1, 2), ("x", "ab", 0, 2), ("x", "ab", 1, 2)) == []
    lost = "1 scans have no result: c; start their runs again"
    assert noted(("x", "ab", 0, 1), ("y", "bc", 1, 2)) == [never + "0/2", lost]    # other inputs, another array


def test_results_of_scans_that_are_gone_or_of_other_inputs_are_named(two, scans, model, tmp_path, capsys):
    """A merge took up a scan under its earlier name, too; a run on a second folder left the first one's scans out of
    the tables. Neither said a word."""
    out, second = tmp_path / "out", tmp_path / "second"
    assert projector.main(flags(two, model, out)) == 0
    assert "in the tables" not in capsys.readouterr().out
    (two / "scan-001.nii").rename(two / "renamed.nii")
    assert projector.main(flags(two, model, out)) == 0
    told = f"1 further scans have results in {out}: scan-001; projector.py merge {out} makes tables of all"
    assert f"not in the tables: {told}" in capsys.readouterr().out
    assert projector.main(["merge", str(out)]) == 0
    assert "also in the tables: 1 scans that the last runs have not found: scan-001; remove" in capsys.readouterr().out
    shutil.rmtree(out / "scan-001")

    second.mkdir()
    os.link(scans / "scan-002.nii", second / "scan-002.nii")
    assert projector.main(flags(second, model, out, "--part", "0/2")) == 0
    assert projector.main(flags(second, model, out)) == 0
    assert "2 further scans have results" in capsys.readouterr().out
    assert projector.main(["merge", str(out)]) == 0                      # both inputs' last runs have found all three
    assert "in the tables" not in capsys.readouterr().out and len((out / "scores.csv").read_text().splitlines()) == 4


def test_results_of_other_settings_that_come_meanwhile_are_not_replaced(two, model, tmp_path):
    """Of two runs on an empty folder each took the other's results for out of date, and projected them again."""
    out, source, bundle = tmp_path / "out", find_scans(two)[0], load_bundle(model, precision="fp32")
    one, other = Projector(bundle), Projector(bundle, bundle.settings.replace(threshold_hu=900.0))
    list(jobs.project_all(one, [source], out))
    before = (out / "scan-000" / "result.json").read_bytes()
    with pytest.raises(ValueError, match="holds results of scan-000 made with another model or calibration, other set"):
        list(jobs.project_all(other, [source], out))
    assert (out / "scan-000" / "result.json").read_bytes() == before
    list(jobs.project_all(other, [source], out, overwrite=True))
    assert read_result(out / "scan-000")["key"] == other.key()


def test_a_page_shows_the_first_scans_and_counts_the_others(whole):
    entries, _, others = read_results(whole, most=2)
    assert len(entries) == 2 and all(entry.ok and entry.slices and entry.overlays for entry in entries)
    assert others == {"total": 2, "flagged": 0, "failed": 1}
    (sentence,) = unshown(entries, others)
    assert sentence.startswith("This page shows the 2 scans with the highest scores of 4; of the others none are ")
    assert unshown(entries, Counter()) == []


def test_the_part_comes_from_a_job_array(monkeypatch):
    for name, value in (("ID", "13"), ("MIN", "10"), ("COUNT", "4")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert projector.part_of_job_array() == "3/4"
    assert projector.parse(["scans", "--model", "m"]).part == (3, 4)
    assert projector.parse(["scans", "--model", "m", "--part", "0/2"]).part == (0, 2)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "17")                      # --array=10,13,17,20: no part can be told
    with pytest.raises(SystemExit):
        projector.parse(["scans", "--model", "m"])


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        projector.parse(["scans", "--model", "m", f"--part={text}"])
    assert "expected I/N with I from 0 to N - 1" in capsys.readouterr().err


def test_merge_refuses_what_was_made_with_other_settings(whole, tmp_path, capsys):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    marker = out / "scan-001" / "result.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"key": {"weights": "others"}}))
    assert projector.main(["merge", str(out)]) == 2
    assert "was made with another model" in capsys.readouterr().err
    assert projector.main(["merge", str(tmp_path)]) == 2


def test_merge_knows_whose_run_json_it_is(two, model, tmp_path, capsys, monkeypatch):
    """A part with other settings, stopped before its first scan, gave the others' results its threshold."""
    out, part, other = tmp_path / "out", ("--part", "0/1"), ("--threshold", "0.001", "--scan-score", "max")
    run_json = out / "run.json"

    def stopped(*args, **named):
        raise KeyboardInterrupt

    assert projector.main(flags(two, model, out, *part)) == 0
    assert projector.main(["merge", str(out)]) == 0
    before = tables(out)
    for way in (part, ()):
        with monkeypatch.context() as patch:
            patch.setattr("detect.run.Run.project", stopped)
            assert projector.main(flags(two, model, out, *way, "--overwrite", *other)) == 130
        assert json.loads(run_json.read_text())["threshold"] == 0.001    # a whole run's, too, from its beginning on
        capsys.readouterr()
        assert projector.main(["merge", str(out)]) == 2
        assert "run.json: is of a run with another model" in capsys.readouterr().err
        assert tables(out) == before
        assert projector.main(flags(two, model, out, *part)) == 0        # the first one's again
        assert projector.main(["merge", str(out)]) == 0
        assert tables(out) == before and json.loads(run_json.read_text())["threshold"] is None
    run_json.write_text("{")
    assert projector.main(["merge", str(out)]) == 2
    assert "or damaged" in capsys.readouterr().err


def test_a_whole_run_that_leaves_a_scan_to_another_can_be_merged(two, model, tmp_path, capsys):
    """It advised that, and had left no run.json to do it with."""
    out = tmp_path / "out"
    with Claims(out / WORK).hold("scan-001"):
        assert projector.main(flags(two, model, out)) == 0
    assert f"or projector.py merge {out}" in capsys.readouterr().out
    assert projector.main(["merge", str(out)]) == 3
    assert len((out / "scores.csv").read_text().splitlines()) == 2
    assert "1 scans have no result: scan-001" in capsys.readouterr().err
    finished = json.loads((out / "run.json").read_text())
    assert finished["seconds"] > 0
    begin_report(out, {"key": finished["key"]})                          # the next run of this key keeps it
    assert json.loads((out / "run.json").read_text()) == finished


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


def test_a_scan_that_another_run_has_is_left_to_it(scans, model, whole, tmp_path, capsys):
    """The run that is last writes the tables; the others do not wait for it."""
    out = tmp_path / "out"
    with Claims(out / WORK).hold("scan-001"):
        assert projector.main(flags(scans, model, out)) == 0
        assert "scan-001: another run has it" in capsys.readouterr().out
        assert not (out / "scores.csv").exists() and read_result(out / "scan-001") is None
    assert projector.main(flags(scans, model, out)) == 3
    assert tables(out) == tables(whole)


@pytest.mark.parametrize("what", ["other files", "other outputs"])
def test_a_result_that_is_out_of_date_is_none_while_another_run_redoes_it(two, model, tmp_path, capsys, what):
    """The tables kept its row, as if it were of the scan as it is now, or had what was asked for."""
    out, more = tmp_path / "out", ["--no-dicom-out"] if what == "other outputs" else []
    assert projector.main(flags(two, model, out)) == 0
    before, seconds = tables(out), (out / "seconds.csv").read_bytes()
    if what == "other files":                                            # a new file: the old one is a link to others'
        (two / "scan-001.nii").unlink()
        shutil.copy(two / "scan-000.nii", two / "scan-001.nii")
    with Claims(out / WORK).hold("scan-001"):
        assert projector.main(flags(two, model, out, *more)) == 0
        assert "1 scans are not finished by other runs, such as scan-001" in capsys.readouterr().out
        assert (out / "seconds.csv").read_bytes() == seconds             # nothing was written
    assert projector.main(flags(two, model, out, *more)) == 0
    assert (tables(out) != before) == (what == "other files") and (out / "seconds.csv").read_bytes() != seconds


def fail(place: Path) -> None:
    """As if a scan could not be read for a moment."""
    found = read_result(place)
    found["scan"] = {"scan_id": place.name, "status": "failed", "reason": "the network was away"}
    (place / "result.json").write_text(json.dumps(found | {"slices": [], "seconds": {}}))


@pytest.mark.parametrize("earlier", ["failed", "out of date"])
def test_what_a_process_that_died_was_to_redo_is_redone(two, scans, model, tmp_path, capsys, monkeypatch, earlier):
    """An earlier result was taken for finished. What has failed in this run, however, is not tried twice."""
    out = tmp_path / "out"
    shutil.copy(scans / f"{BROKEN}.nii", two)
    assert projector.main(flags(two, model, out, "--jobs", "1")) == 3
    before = tables(out)
    if earlier == "failed":
        fail(out / "scan-000")
    else:
        copy = shutil.copy(two / "scan-000.nii", tmp_path)               # not of this time: the link's are others', too
        (two / "scan-000.nii").unlink()
        shutil.move(copy, two)
    capsys.readouterr()

    class Turns(list):
        died = 1

    @contextmanager
    def one_dies(jobs, count, work, *args):
        yield Turns([1, 2])                                              # 0 was the other one's

    monkeypatch.setattr("detect.processes.shared", one_dies)
    assert projector.main(flags(two, model, out, "--jobs", "2")) == 3
    assert capsys.readouterr().out.count(f"{BROKEN}: FAILED") == 1
    assert tables(out) == before


@pytest.mark.parametrize("told_by", ["files", "reading"])
def test_a_large_scan_is_in_memory_only_while_no_other_is(two, model, tmp_path, monkeypatch, told_by):
    """Each process had its own read, and held it while it waited for its turn."""
    read, held, opened, one_here = [], [], jobs.open_scan, Claims.one_here
    given_back = []

    @contextmanager
    def noted(source):
        with opened(source) as scan:
            read.append(weakref.ref(scan))
            yield scan

    def count() -> int:
        return sum(scan() is not None for scan in read)

    @contextmanager
    def turn(claims):
        held.append(count())
        with one_here(claims):
            yield

    monkeypatch.setattr(jobs, "open_scan", noted)
    monkeypatch.setattr(Claims, "one_here", turn)
    monkeypatch.setattr(jobs.memory, "give_back", lambda: given_back.append(count()))
    monkeypatch.setattr(jobs, "LARGE_BYTES", 4 * 6 * 48 * 48 - 1)      # a scan's HU, and no other's
    if told_by == "reading":
        monkeypatch.setattr(jobs, "HU_TO_FILES", 0)                    # as of files that are compressed
    out, sources = tmp_path / "out", find_scans(two)
    list(jobs.project_all(Projector(load_bundle(model, precision="fp32")), sources, out))
    assert held == [0, 0] and given_back == [0, 0, 0, 0] and len(read) == (2 if told_by == "files" else 4)
    assert {read_result(out / source.scan_id)["scan"]["status"] for source in sources} == {"ok"}


def test_two_runs_at_once_share_the_work(scans, model, whole, tmp_path):
    out, logs = tmp_path / "out", [tmp_path / "a", tmp_path / "b"]
    runs = [processes.start("projector", flags(scans, model, out), log) for log in logs]
    assert set(processes.codes(runs)) <= {0, 3}
    assert tables(out) == tables(whole)
    made = [line.split()[1] for log in logs for line in log.read_text().splitlines() if ": score" in line]
    assert sorted(made) == ["scan-000:", "scan-001:", "scan-002:"]


def test_ranks_need_no_process_group(scans, model, whole, tmp_path):
    """As torchrun would start them, with nobody at the address of the store: rank 1 first, rank 0 much later."""
    out = tmp_path / "out"
    for rank, code in ((1, 0), (0, 3)):                                  # the last one tells of the broken scan
        run = processes.start("projector", flags(scans, model, out), tmp_path / "log", RANK=rank, LOCAL_RANK=rank,
                              WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=processes.free_port())
        assert processes.codes([run]) == [code]
        assert (out / "scores.csv").exists() == (rank == 0)
    assert tables(out) == tables(whole)


def test_leftovers_are_removed_when_they_are_old_and_nobody_is_at_work(tmp_path):
    work = tmp_path / WORK

    def begin() -> None:
        for path in (tmp_path / ".scores.csv.0a.writing", work / "0b.writing" / "map", work / "0c.old" / "map"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            for old in (path, path.parent):
                if old != tmp_path and old != work:
                    os.utime(old, (0, 0))

    begin()
    (tmp_path / ".scores.csv.0d.writing").touch()                        # a living run writes it
    with Claims(work).hold("scan"):
        remove_leftovers(tmp_path)
        assert (tmp_path / ".scores.csv.0a.writing").exists() and (work / "0b.writing").exists()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".scores.csv.0d.writing", WORK]
    assert not [name for name in os.listdir(work) if not name.startswith(".")]


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_at_random_moments(kills, model, tmp_path):
    """A rerun ends with the same tables and does again at most the scans in flight, three a process."""
    count = 4 if kills < 10 else 150
    scans = make_scans(tmp_path / "scans", count)
    out, wait = tmp_path / "out", random.Random(0)
    begin = time.monotonic()
    assert projector.main(flags(scans, model, tmp_path / "whole")) == 3
    per_scan = (time.monotonic() - begin) / count

    def results() -> int:
        return len(list(out.glob("scan-*/result.json")))
    made = []
    for attempt in range(kills):
        log, before = tmp_path / f"log-{attempt}", results()
        run = processes.start("projector", flags(scans, model, out, "--jobs", "1"), log)
        while run.is_alive() and not (log.exists() and "/" in log.read_text()):      # its first line about a scan
            time.sleep(0.01)
        while run.is_alive() and results() < before + attempt % 2:       # every other time with something done
            time.sleep(0.01)
        time.sleep(wait.uniform(0, 1.5 * per_scan))
        processes.kill(run)
        lines = log.read_text().splitlines()
        made += [line.split()[1] for line in lines if ": score" in line]
        finished = [result.scan["scan_id"] for result in collect_all(out) if result.ok]
        assert len(finished) in (len(made), len(made) + 1)               # killed before it could say so
        made = [f"{name}:" for name in finished]
        assert len(set(made)) == len(made)
        if run.exitcode != -signal.SIGKILL:
            break
    print(f"{attempt + (run.exitcode == -signal.SIGKILL)} kills of {kills}, {len(made)} scans done by then")
    assert projector.main(flags(scans, model, out)) == 3
    assert tables(out) == tables(tmp_path / "whole")
    assert sorted(os.listdir(out / "scan-001")) == sorted(os.listdir(tmp_path / "whole" / "scan-001"))


@pytest.mark.soak
def test_four_parts_of_200_scans_one_killed_and_restarted(model, tmp_path):
    scans, out = make_scans(tmp_path / "scans", 200), tmp_path / "out"
    parts = [processes.start("projector", flags(scans, model, out, "--part", f"{i}/4"), tmp_path / f"log-{i}")
             for i in range(4)]
    while len(collect_all(out) if out.exists() else []) < 60:
        time.sleep(0.5)
    processes.kill(parts[2])
    parts[2] = processes.start("projector", flags(scans, model, out, "--part", "2/4"), tmp_path / "log-2b")
    assert sorted(processes.codes(parts, 3600)) == [0, 0, 0, 3]
    lines = [line for path in tmp_path.glob("log-*") for line in path.read_text().splitlines() if ": score" in line]
    assert len({line.split()[1] for line in lines}) >= 198               # the one in flight may not have said so
    assert len(lines) == len({line.split()[1] for line in lines})        # exactly once
    assert projector.main(["merge", str(out)]) == 3
    assert len((out / "scores.csv").read_text().splitlines()) == 201


@pytest.mark.soak
def test_time_and_memory_stay_flat_over_1000_scans(model, tmp_path, monkeypatch):
    scans, out = tmp_path / "scans", tmp_path / "out"
    make_scans(scans, 10)
    for i in range(10, 1000):                                            # one broken scan is enough
        os.link(scans / f"scan-{4 if i % 10 == 3 else i % 10:03d}.nii", scans / f"scan-{i:03d}.nii")
    ends, resident, project_all = [], [], jobs.project_all

    def watched(*args):
        for _ in project_all(*args):
            ends.append(time.process_time())                 # of the processor: others may be at work, too
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
            yield

    monkeypatch.setattr(jobs, "project_all", watched)
    assert projector.main(flags(scans, model, out, "--jobs", "1")) == 3
    first, last = ends[100] - ends[0], ends[-1] - ends[-101]
    assert len(ends) == 1000
    print(f"{len(ends)} scans: first 100 {first:.1f} s of a core, last 100 {last:.1f} s; resident "
          f"{resident[100] / 1e6:.0f} and {resident[-1] / 1e6:.0f} MB")
    assert last < 1.3 * first and resident[-1] < 1.1 * resident[100]


def test_a_full_disk_ends_the_run_and_keeps_the_results(scans, model, whole, tmp_path, monkeypatch, capsys):
    def full(folder, projection):
        raise OSError(28, "No space left on device", str(folder / "mask.nii.gz"))
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = {name: (out / "scan-000" / name).read_bytes() for name in os.listdir(out / "scan-000")
              if (out / "scan-000" / name).is_file()}
    monkeypatch.setitem(OUTPUTS, "maps", full)
    assert projector.main(flags(scans, model, out, "--set", "threshold_hu=6", "--overwrite")) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert before == {name: (out / "scan-000" / name).read_bytes() for name in before}


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
    as_before = {name: value for name, value in read_result(out / "scan-1").items() if name not in ("state", "bytes")}
    (out / "scan-1" / "result.json").write_text(json.dumps(as_before))   # of an earlier version, which held less
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
    of_this = read_result(out / "scan-1")
    (out / "scan-1" / "result.json").write_text(json.dumps({k: v for k, v in of_this.items() if k != "state"}))
    assert projector.main(flags(monday, model, out)) == 0 and made(capsys) == 0        # as earlier versions wrote it


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
    assert not is_another(source(where="b", uid="1.2|9|2.5"), earlier)
    assert is_another(source(uid="1.3|9|5.0"), earlier)
    assert is_another(source(uid="", kind="nifti"), earlier)
    without = {"origin": origin(source(uid=""))}                   # its file is not there: no content to know
    assert not is_another(source(uid=""), without) and is_another(source("b", uid=""), without)
    assert is_another(source(), without) and not is_another(source(), {})


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
