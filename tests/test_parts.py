"""projector.py --part and merge: runs in parts end with the tables of a whole run, and a merge names what is missing.

Promises 11 and 12 of docs/RELIABILITY.md.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import projector
from ct.read import find_scans
from ct.scan import ScanSource
from detect import Projector, jobs, load_bundle
from detect.claims import Claims
from detect.folder import PARTS, collect_all, missing_results, note_part
from detect.jobs import WORK
from detect.result import Result, find_result_folder, result_folder
from detect.run import begin_report
from tests import processes
from tests.helpers import tiny_bundle
from tests.queue_data import flags, link_two, made, make_scans, run_whole, tables


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return make_scans(tmp_path_factory.mktemp("scans") / "four", 4)


@pytest.fixture(scope="module")
def whole(scans, model, tmp_path_factory) -> Path:
    return run_whole(scans, model, tmp_path_factory.mktemp("results") / "whole")


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
    return link_two(scans, tmp_path / "two")


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
        return missing_results(tmp_path, done)

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


def test_a_merge_without_results_leaves_the_tables(whole, tmp_path, capsys):
    """It emptied them before it said that there was nothing."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = tables(out)
    for place in out.glob("scan-*"):
        shutil.rmtree(place)
    assert projector.main(["merge", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"{out}: no results, of which tables could be made; expected at least one scan's folder with" in said
    assert "4 scans have no result" in said and tables(out) == before


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
