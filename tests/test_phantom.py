"""The phantom's cohorts: the same for the same seed, resumable, and in the shape that evaluation reads."""

from __future__ import annotations

import ast
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ct.geometry import SliceStack
from ct.read import find_scans, read_scan
from ct.scan import Scan
from ct.write import write_nifti
from demos import phantom
from demos.phantom import KINDS, Phantom, PhantomError, make, make_cohort, plan
from evaluation.cohort import read_labels, read_table, read_truth, read_volume
from tests.helpers import shuffled_head

TWO = (KINDS[0], KINDS[3])


def small_phantom(kind, seed, scan_id="phantom"):
    """Four slices of 8x8 that depend on kind and seed; truth on slices 1 and 2 of an emergency."""
    hu = shuffled_head((4, 8, 8), seed)
    truth = np.zeros(hu.shape, bool)
    truth[1:3, 2:4, 2:4] = kind is not None
    position = np.arange(4) * 5.0
    origins = np.stack([0 * position, 0 * position, position], axis=1)
    stack = SliceStack(origins, np.array([0, 0.5, 0]), np.array([0.5, 0, 0]))
    facts = {"age": 40 + seed % 50} | ({"volume_ml": 1.25} if kind else {})
    return Phantom(Scan(scan_id, hu, position, (0.5, 0.5), geometry=stack), truth, kind, facts)


@pytest.fixture
def quick(monkeypatch):
    """Small phantoms, made in this process."""
    monkeypatch.setattr(phantom, "make", small_phantom)
    monkeypatch.setattr(phantom, "_run", lambda jobs, workers: ((job, *phantom.write_phantom(job)) for job in jobs))


def cohort(out, healthy=2, emergency=3, seed=5, **kwargs):
    return make_cohort(healthy, emergency, seed, out, kinds=kwargs.pop("kinds", TWO), log=lambda line: None, **kwargs)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_plan_takes_the_kinds_in_turn_and_grows_without_change():
    small, large = (plan(n, n, 5, Path("out"), TWO) for n in (3, 5))
    assert [job.scan_id for job in small] == ["healthy-0001", "healthy-0002", "healthy-0003",
                                              "emergency-0001", "emergency-0002", "emergency-0003"]
    assert [job.kind for job in small] == [None] * 3 + [TWO[0], TWO[1], TWO[0]]
    assert set(small) < set(large)
    seeds = {job.seed for job in large} | {job.seed for job in plan(5, 5, 6, Path("out"), TWO)}
    assert len(seeds) == 20 and max(seeds) < 10**15


def test_tables_are_in_the_shape_that_evaluation_reads(tmp_path, quick):
    assert cohort(tmp_path / "out") == 5
    labels, _ = read_labels(tmp_path / "out" / "labels.csv")
    assert {key[0]: (label.label, label.types) for key, label in labels.items()} == {
        "emergency-0001": (1, (TWO[0],)), "emergency-0002": (1, (TWO[1],)), "emergency-0003": (1, (TWO[0],)),
        "healthy-0001": (0, ()), "healthy-0002": (0, ())}
    slices, _ = read_labels(tmp_path / "out" / "slices.csv", by_slice=True)
    assert [slices["emergency-0002", s].label for s in range(4)] == [0, 1, 1, 0]
    assert slices["emergency-0002", 1].types == (TWO[1],)
    assert not any(slices["healthy-0001", s].label for s in range(4)) and len(slices) == 20
    header = (tmp_path / "out" / "labels.csv").read_text().splitlines()[0]
    assert header == "scan_id,label,types,seed,age,volume_ml"


@pytest.mark.parametrize("nifti", [False, True])
def test_scans_and_truth_read_back_in_one_geometry(tmp_path, quick, nifti):
    cohort(tmp_path / "out", nifti=nifti)
    sources = {source.scan_id: source for source in find_scans(tmp_path / "out" / "scans")}
    assert sorted(sources) == ["emergency-0001", "emergency-0002", "emergency-0003", "healthy-0001", "healthy-0002"]
    job = plan(0, 1, 5, tmp_path, TWO)[0]
    expected, scan = small_phantom(job.kind, job.seed), read_scan(sources["emergency-0001"])
    np.testing.assert_array_equal(scan.hu, expected.scan.hu)
    write_nifti(tmp_path / "map.nii.gz", scan.hu, scan)
    hu, affine = read_volume(tmp_path / "map.nii.gz")
    truth, counted = read_truth(tmp_path / "out" / "masks", "emergency-0001", hu.shape, affine, "error")
    np.testing.assert_array_equal(truth, expected.truth)
    assert counted.all()


def test_a_cohort_is_the_same_to_the_byte_and_a_larger_one_begins_with_it(tmp_path, quick):
    cohort(tmp_path / "a")
    cohort(tmp_path / "b")
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert cohort(tmp_path / "b", healthy=4, emergency=5) == 4
    larger = contents(tmp_path / "b")
    assert all(larger[name] == data for name, data in first.items() if name.startswith(("scans", "masks")))
    cohort(tmp_path / "c", healthy=4, emergency=5)
    assert larger == contents(tmp_path / "c")


def test_an_interrupted_cohort_goes_on(tmp_path, monkeypatch, quick):
    cohort(tmp_path / "whole")

    def breaking(kind, seed, scan_id):
        if scan_id == "emergency-0002":
            raise KeyboardInterrupt
        return small_phantom(kind, seed, scan_id)

    monkeypatch.setattr(phantom, "make", breaking)
    with pytest.raises(KeyboardInterrupt):
        cohort(tmp_path / "out")
    monkeypatch.setattr(phantom, "make", small_phantom)
    partial = tmp_path / "out" / "scans" / ".partial-emergency-0002"             # as if killed while writing
    partial.mkdir()
    (partial / "9999.dcm").write_bytes(b"half")
    kept = tmp_path / "out" / "scans" / "healthy-0001" / "0001.dcm"
    before = kept.stat().st_mtime_ns
    assert cohort(tmp_path / "out") == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert kept.stat().st_mtime_ns == before


def test_a_scan_that_was_deleted_is_made_again(tmp_path, quick):
    cohort(tmp_path / "out")
    before = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "scans" / "emergency-0001")
    (tmp_path / "out" / "masks" / "healthy-0002.nii.gz").unlink()
    assert cohort(tmp_path / "out") == 2
    assert contents(tmp_path / "out") == before
    assert cohort(tmp_path / "out") == 0


@pytest.mark.parametrize("change, complaint", [
    ({"seed": 6}, "seed 5, not 6"),
    ({"nifti": True}, "format 'dicom', not 'nifti'"),
    ({"kinds": TWO[:1]}, "kinds"),
])
def test_a_folder_of_another_cohort_is_refused(tmp_path, quick, change, complaint):
    cohort(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(PhantomError, match=complaint):
        cohort(tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_a_cohort_of_another_version_is_refused(tmp_path, quick):
    cohort(tmp_path / "out")
    path = tmp_path / "out" / "phantom.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "older"}))
    with pytest.raises(PhantomError, match="code 'older'"):
        cohort(tmp_path / "out")


def test_a_folder_with_other_things_is_refused(tmp_path, quick):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PhantomError, match="no phantom.json"):
        cohort(tmp_path)
    with pytest.raises(PhantomError, match="a file"):
        cohort(tmp_path / "thesis.txt")


@pytest.mark.parametrize("flags, complaint", [
    (["--healthy", "-1"], "--healthy must be at least 0, got -1"),
    (["--healthy", "1", "--seed", "-2"], "--seed must be at least 0"),
    (["--healthy", "1", "--workers", "0"], "--workers must be at least 1"),
    ([], "nothing to make"),
    (["--emergency", "1", "--kinds", "epidural,headache"], "got headache"),
    (["--emergency", "1", "--kinds", "epidural,epidural"], "a kind twice"),
])
def test_wrong_usage_ends_with_code_2_and_makes_nothing(tmp_path, capsys, flags, complaint):
    seed = [] if "--seed" in flags else ["--seed", "1"]
    assert phantom.main([*flags, *seed, "--out", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_wrong_usage(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert phantom.main(["--healthy", "1", "--seed", "1", "--out", str(tmp_path / "file/out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(tmp_path / "file/out") in said


@pytest.mark.parametrize("before", [None, "7"])
@pytest.mark.parametrize("fails", [False, True])
def test_only_the_workers_have_one_thread(before, fails, monkeypatch):
    """What the phantom benchmark starts after its cohort takes as many threads as without one."""
    seen = []

    def write(job):
        seen.append(os.environ["OMP_NUM_THREADS"])
        if fails:
            raise OSError("disk")
        return {}, [], 0.0

    monkeypatch.setattr(phantom, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(phantom, "write_phantom", write)
    monkeypatch.setenv("OMP_NUM_THREADS", before or "")
    if before is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    jobs = plan(1, 0, 5, Path("out"), TWO)
    if fails:
        with pytest.raises(OSError, match="disk"):
            list(phantom._run(jobs, 1))
    else:
        assert [job for job, *_ in phantom._run(jobs, 1)] == jobs
    assert seen == ["1"] and os.environ.get("OMP_NUM_THREADS") == before


def test_make_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="headache"):
        make("headache", 1)
    with pytest.raises(ValueError, match="at least 0"):
        make(None, -1)


def test_the_code_hash_covers_every_module_that_the_phantom_is_made_of():
    folder, seen, todo = Path(phantom.__file__).parent, set(), ["phantom.py"]
    while todo:
        name = todo.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "demos":
                below = node.module.partition(".")[2]
                names = [f"{below}.py"] if below else [f"{alias.name}.py" for alias in node.names]
                todo += [n for n in names if n not in seen]
    assert sorted(seen) == sorted(phantom.SOURCES)


def test_one_real_phantom_from_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert phantom.main(["--emergency", "1", "--kinds", "intraparenchymal", "--seed", "2", "--out", str(out),
                         "--workers", "1"]) == 0
    assert "1 scans made" in capsys.readouterr().out
    (source,) = find_scans(out / "scans")
    scan = read_scan(source)
    assert 24 <= len(scan.hu) <= 36 and scan.hu.shape[1:] == (512, 512) and scan.notes == ()
    truth = read_volume(out / "masks" / "emergency-0001.nii.gz")[0] > 0
    (row,) = read_table(out / "labels.csv", ("volume_ml",))
    assert truth.sum() * scan.pixel_spacing_mm[0] ** 2 * 5 / 1000 == pytest.approx(float(row["volume_ml"]), rel=0.3)
    assert 45 < scan.hu[truth].mean() < 90                         # fresh blood
