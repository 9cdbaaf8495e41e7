"""The folder of results as a queue: runs killed, run twice at once, by several ranks; the same tables to the byte.

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

import pytest

import projector
from common.files import replace_text
from ct.read import find_scans
from detect import Projector, jobs, load_bundle, run
from detect.claims import Claims
from detect.folder import collect_all, remove_leftovers
from detect.jobs import WORK
from detect.outputs import OUTPUTS
from detect.report.tables import read_results
from detect.report.words import unshown
from detect.result import read_result
from tests import processes
from tests.helpers import project_one, synthetic_head, tiny_bundle
from tests.queue_data import BROKEN, flags, link_two, make_scans, run_whole, tables
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


def test_a_page_shows_the_first_scans_and_counts_the_others(whole):
    entries, _, others = read_results(whole, most=2)
    assert len(entries) == 2 and all(entry.ok and entry.slices and entry.overlays for entry in entries)
    assert others == {"total": 2, "flagged": 0, "failed": 1}
    (sentence,) = unshown(entries, others)
    assert sentence.startswith("This page shows the first 2 of 4 rows of scores.csv; of all 4 scans none are ")
    assert unshown(entries, Counter()) == []


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
    if what == "other outputs":                                          # of DICOM, as other scans have no such
        shutil.rmtree(two)
        for seed, name in enumerate(("scan-000", "scan-001")):
            hu, _ = synthetic_head(slices=6, size=48, spacing_mm=(20.0, 4.8, 4.8), seed=seed)
            write_dicom_series(two / name, hu, (20.0, 4.8, 4.8), series=name, study=name)
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


def test_outputs_that_a_scan_cannot_have_do_not_count(two, model, tmp_path, capsys):
    """NIfTI was projected again when DICOM objects were asked for or not, of which it has none."""
    out = tmp_path / "out"
    assert projector.main(flags(two, model, out)) == 0
    for more in (["--no-dicom-out"], [], ["--no-phi"]):
        capsys.readouterr()
        assert projector.main(flags(two, model, out, *more)) == 0
        assert capsys.readouterr().out.count("finished before, skipped") == 2
    path = out / "scan-000" / "result.json"                              # as this version wrote it before
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"outputs": [*found["outputs"], "dicom"]}))
    assert projector.main(flags(two, model, out)) == 0
    assert capsys.readouterr().out.count("finished before, skipped") == 2


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_changes_during_the_run_costs_its_scan_alone(two, model, tmp_path, capsys, monkeypatch, times):
    """It cost the tables of all, with exit code 0, as if another run had the scan; merge took the old result."""
    shutil.copy(two / "scan-000.nii", tmp_path / "own.nii")              # the link's file is others', too
    (tmp_path / "own.nii").replace(two / "scan-000.nii")
    out, write, left = tmp_path / "out", jobs.Job.write, iter(range(times))

    def write_and_grow(job):
        said = write(job)
        if job.source.scan_id == "scan-000" and next(left, None) is not None:
            with open(two / "scan-000.nii", "ab") as file:
                file.write(b"\0")
        return said

    monkeypatch.setattr(jobs.Job, "write", write_and_grow)
    code = projector.main(flags(two, model, out, "--jobs", "1"))
    said = capsys.readouterr()
    assert code == (0 if times == 1 else 3) and said.out.count("scan-000: score") == 2
    assert "1 scans have changed since they were read: scan-000; once more" in said.out
    assert "other runs" not in said.out and ("1 scans whose files changed" in said.err) == (times == 2)
    ids = ["scan-000", "scan-001"][times - 1:]
    assert scan_ids(out) == ids and "further scans" not in said.out
    assert projector.main(["merge", str(out)]) == code and scan_ids(out) == ids
    assert ("1 scans have changed while they were projected: scan-000" in capsys.readouterr().err) == (times == 2)
    assert projector.main(flags(two, model, out)) == 0 and scan_ids(out) == ["scan-000", "scan-001"]
    assert projector.main(["merge", str(out)]) == 0                      # the mark has gone with that result


def scan_ids(out: Path) -> list[str]:
    with open(out / "scores.csv", newline="", encoding="utf-8") as file:
        return sorted(row["scan_id"] for row in csv.DictReader(file))


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


@pytest.mark.parametrize("when", ["now and then", "at the end", "merge"])
def test_a_result_that_is_replaced_while_tables_are_made_ends_nothing(two, scans, model, tmp_path, monkeypatch, when):
    """It ended the run, and its other processes, with exit code 2."""
    out = tmp_path / "out"
    shutil.copy(scans / f"{BROKEN}.nii", two)
    assert projector.main(flags(two, model, out, "--jobs", "1")) == 3
    before, finished, write = tables(out), read_result(out / "scan-001"), run.write_tables
    for name in ("scan-000", "scan-001"):
        if when == "now and then" or name == "scan-001":
            fail(out / name)
    monkeypatch.setattr(run, "TABLES_EVERY_S", 0.0 if when == "now and then" else 60.0)
    if when == "at the end":                                             # this run finds nothing left to do
        monkeypatch.setattr(run.Run, "project", lambda *args, **named: None)
    tries = []

    def replaced_by_another_run(folder, results):
        tries.append(len(results))
        if len(tries) == 1:
            replace_text(out / "scan-001" / "result.json", json.dumps(finished))
        write(folder, results)

    monkeypatch.setattr(run, "write_tables", replaced_by_another_run)
    assert projector.main(["merge", str(out)] if when == "merge" else flags(two, model, out, "--jobs", "1")) == 3
    assert len(tries) >= 2 and tables(out) == before


def test_a_result_that_is_replaced_each_time_is_an_error_in_the_end(two, model, tmp_path, monkeypatch, capsys):
    out, write = tmp_path / "out", run.write_tables
    assert projector.main(flags(two, model, out, "--jobs", "1")) == 0
    before, found, tries = tables(out), read_result(out / "scan-001"), []

    def replaced(folder, results):
        tries.append(1)
        scan = found["scan"] | {"seconds": float(len(tries))}
        replace_text(out / "scan-001" / "result.json", json.dumps(found | {"scan": scan}))
        write(folder, results)

    monkeypatch.setattr(run, "write_tables", replaced)
    assert projector.main(["merge", str(out)]) == 2 and len(tries) == 5 and tables(out) == before
    assert "another run has replaced its results while tables were made of them" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["closed pipe", "latin-1"])
def test_a_run_goes_on_where_nobody_reads_or_a_name_cannot_be_shown(two, model, tmp_path, monkeypatch, kind):
    """`projector.py ... | head -1` ended with 2 and no tables; so did an id that the terminal's encoding lacks."""
    (two / "scan-001.nii").rename(two / "\u8111.nii")
    (two / "\u8111.txt").touch()                                         # the search tells of it
    log = tmp_path / "log"
    if kind == "closed pipe":
        read, opened = os.pipe()
        os.close(read)
    else:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT)
    with os.fdopen(opened, "w", encoding="latin-1") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        assert projector.main(flags(two, model, tmp_path / "out", "--jobs", "1")) == 0
        assert projector.main(["merge", str(tmp_path / "out")]) == 0
    assert scan_ids(tmp_path / "out") == ["scan-000", "\u8111"]
    assert kind == "closed pipe" or "2/2 \\u8111: score" in log.read_text()


@pytest.mark.parametrize("told_by", ["files", "reading"])
def test_a_large_scan_is_in_memory_only_while_no_other_is(two, model, tmp_path, monkeypatch, told_by):
    """Each process had its own read, and held it while it waited for its turn."""
    read, held, opened, one_on_this_machine = [], [], jobs.open_scan, Claims.one_on_this_machine
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
        with one_on_this_machine(claims):
            yield

    monkeypatch.setattr(jobs, "open_scan", noted)
    monkeypatch.setattr(Claims, "one_on_this_machine", turn)
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


@pytest.mark.parametrize("ranks, missing, code", [(2, ["scan-001"], 0), (1, ["scan-001"], 3), (1, [], 3)])
def test_a_scan_that_changes_stops_no_other_rank(two, model, tmp_path, monkeypatch, ranks, missing, code):
    """torchrun stops all ranks when one ends with anything but 0: the others still had scans. Where all scans change,
    it was an error that the tables, emptied, held none.
    """
    out = tmp_path / "out"
    monkeypatch.setattr(run.Run, "finish", lambda self, tables: ([], missing, ["scan-000"]))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert projector.main(flags(two, model, out, *(() if ranks > 1 else ("--jobs", "1")))) == code
    assert not (out / "scores.csv").exists()


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
