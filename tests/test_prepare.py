"""Scan folders to a database: the split, the choice of slices, broken scans, and the command's exit codes."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import distributed
import prepare
from common.weights import read_json, write_json
from ct import frame
from ct.frame import PreprocessSettings, preprocess_scan
from ct.read import find_scans, open_scan, read_scan
from ct.scan import ScanError
from ct.slab import to_slabs
from ct.standardise import StandardiseSettings, from_frame
from dataset import DatasetError, ScanRecord, SliceDataset, read_manifest, verify
from detect.bundle import load_bundle
from gan import database as database_module
from gan.database import Tables, build_lmdb, ensure_database, listed_slabs, split_by_patient
from tests.helpers import synthetic_head, synthetic_scan, tiny_bundle
from tests.processes import runs
from tests.writers import write_dicom_series, write_nifti_scan, write_slice_folder

SETTINGS = PreprocessSettings(StandardiseSettings(size=32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three heads of 13 slices, 8 mm apart, as grey pictures of HU -20..100."""
    top = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate(("one", "two", "three")):
        hu, _ = synthetic_head(slices=13, size=48, spacing_mm=(8.0, 5.0, 5.0), seed=seed)
        write_slice_folder(top / name, hu, slice_spacing_mm=8.0, pixel_spacing_mm=5.0)
    return top


@pytest.fixture(scope="module")
def database(folder, tmp_path_factory):
    """The three heads, prepared by the command at size 32."""
    out = tmp_path_factory.mktemp("out") / "healthy.lmdb"
    assert prepare.main([str(folder), "--out", str(out), "--size", "32", "--val-fraction", "0.3", "--workers",
                         "1"]) == 0
    return out


def write_csv(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- settings

def test_settings_survive_json_and_refuse_what_they_do_not_know():
    settings = PreprocessSettings(StandardiseSettings(size=64, hu_clip=(-20.0, 100.0)), slab_mm=4.5)
    stored = json.loads(json.dumps(settings.to_json()))
    assert PreprocessSettings.from_json(stored) == settings
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\]"):
        PreprocessSettings.from_json({**stored, "colour": 1})
    with pytest.raises(ValueError, match=r"standardisation settings.*missing keys \['size'\]"):
        PreprocessSettings.from_json({**stored, "standardise": {
            k: v for k, v in stored["standardise"].items() if k != "size"}})
    with pytest.raises(ValueError, match="standardisation settings: expected an object of keys.*found a int"):
        PreprocessSettings.from_json({**stored, "standardise": 128})


# ---- one scan

def test_a_preprocessed_scan_leads_back_to_its_own_pixels():
    scan, brain = synthetic_scan(noise=0.0)
    done = preprocess_scan(scan, SETTINGS)
    assert done.standardised.hu.shape == (24, 32, 32) and done.kept.shape == (24,)
    assert done.brain.shape == done.slabs.scan.hu.shape == (24, 96, 96)
    back = done.slabs.from_slabs(from_frame(done.standardised.brain, done.standardised.frame).astype(np.float32))
    middle = back[12] > 0.5
    assert 2 * (middle & brain[12]).sum() / (middle.sum() + brain[12].sum()) > 0.9      # Dice
    below = done.standardised.below_vertex_mm
    assert not done.kept[below < 0].any()
    assert (done.standardised.brain[done.kept].mean((1, 2)) >= 0.02).all()


def test_slices_further_below_the_vertex_are_left_out():
    scan, _ = synthetic_scan(slices=13, size=48, spacing_mm=(8.0, 5.0, 5.0))
    everything = preprocess_scan(scan, SETTINGS)
    upper = preprocess_scan(scan, PreprocessSettings(SETTINGS.standardise, max_below_vertex_mm=60.0))
    below = upper.standardised.below_vertex_mm
    assert (upper.kept == (everything.kept & (below <= 60))).all() and upper.kept.sum() < everything.kept.sum()
    with pytest.raises(ScanError, match="no slice has brain"):
        preprocess_scan(scan, PreprocessSettings(SETTINGS.standardise, min_brain_fraction=0.99))


def test_a_slab_counts_as_listed_only_if_all_its_slices_are():
    scan, _ = synthetic_scan(slices=60, spacing_mm=(2.5, 2.4, 2.4))
    slabs = to_slabs(scan, slab_mm=5.0, thin_mm=4.0)
    assert len(slabs.scan.hu) == 30                                     # two slices of 2.5 mm a slab
    listed = listed_slabs(slabs, frozenset({0, 1, 2, 5, 6, 7}))
    assert np.flatnonzero(listed).tolist() == [0, 3]
    with pytest.raises(ScanError, match="names slice 60, the scan has 60"):
        listed_slabs(slabs, frozenset({60}))


def test_a_slice_that_two_slabs_share_must_be_listed_for_both():
    scan, _ = synthetic_scan(slices=10, size=8, spacing_mm=(2.0, 2.4, 2.4))
    slabs = to_slabs(scan, slab_mm=5.0, thin_mm=4.0)                    # slice 2 lies in the slabs 0 and 1
    assert len(slabs.scan.hu) == 4
    assert listed_slabs(slabs, frozenset({0, 1, 2})).tolist() == [True, False, False, False]
    assert not listed_slabs(slabs, frozenset({0, 1, 3, 4})).any()


# ---- the split

def test_split_is_by_patient():
    patients = {f"scan{i}": f"patient{i // 2}" for i in range(20)}      # two scans each
    split = split_by_patient(patients, 0.3, seed=0)
    assert sum(side == "val" for side in split.values()) == 6           # 3 of 10 patients
    assert all(split[f"scan{2 * i}"] == split[f"scan{2 * i + 1}"] for i in range(10))
    assert split == split_by_patient(dict(reversed(patients.items())), 0.3, seed=0)
    assert split != split_by_patient(patients, 0.3, seed=1)


def test_split_leaves_both_sides_something():
    two = {"a": "a", "b": "b"}
    assert sorted(split_by_patient(two, 0.01, 0).values()) == ["train", "val"]
    assert sorted(split_by_patient(two, 0.99, 0).values()) == ["train", "val"]
    assert set(split_by_patient(two, 0, 0).values()) == {"train"}
    with pytest.raises(DatasetError, match="one patient cannot be split"):
        split_by_patient({"a": "p", "b": "p"}, 0.5, 0)


def dicom_heads(top, **patients):
    """A DICOM series of 4 slices by name of its folder; each value: PatientID, study and series, to be told apart."""
    for seed, (name, (patient, study, series)) in enumerate(patients.items()):
        def edit(ds, k, patient=patient):
            ds.PatientID = patient
        hu = synthetic_head(slices=4, size=32, spacing_mm=(20.0, 7.0, 7.0), seed=seed)[0]
        write_dicom_series(top / name, hu, (20.0, 7.0, 7.0), study=study, series=series, edit=edit)
    return top


def test_scans_of_one_patient_are_known_by_their_headers(tmp_path):
    """Each counted as a patient of its own, so that one stack of a series trained and another calibrated."""
    top = dicom_heads(tmp_path / "in", a=("p", "s1", "1"), b=("q", "s2", "2"), c=("p", "s3", "3"), d=("", "s2", "4"),
                      e=("q2", "s5", "5"), f=("q2", "s4", "6"), g=("p ", "s4", "7"))

    hu = synthetic_head(slices=4, size=32, spacing_mm=(20.0, 7.0, 7.0), seed=9)[0]
    for kernel in "H30s", "H70h":                                                   # two stacks of one series
        def edit(ds, k, kernel=kernel):
            ds.ConvolutionKernel, ds.SOPInstanceUID = kernel, f"2.25.{k}{kernel[1:3]}"
            ds.PatientID = ds.PatientName = ds.PatientBirthDate = ""
        write_dicom_series(top / "two", hu, (20.0, 7.0, 7.0), study="", series="9", edit=edit,
                           name=lambda k, kernel=kernel: f"{kernel}{k}")
    write_nifti_scan(tmp_path / "in" / "n.nii", hu, (20.0, 7.0, 7.0))
    patients = database_module.patients_of(find_scans(top, log=lambda line: None))
    two = sorted(scan_id for scan_id in patients if scan_id.startswith("two-"))
    assert len(two) == 2 and patients == {"a": "a", "c": "a", "g": "a", "f": "a", "e": "a", "b": "b", "d": "b",
                                          two[0]: two[0], two[1]: two[0], "n": "n"}


def test_one_patient_by_the_headers_is_on_one_side(tmp_path, monkeypatch):
    top = dicom_heads(tmp_path / "in", a=("p", "s1", "1"), b=("p", "s2", "2"), c=("r", "s3", "3"))
    split = write_csv(tmp_path / "split.csv", "scan_id,split", "a,train", "b,val", "c,val")
    patients = write_csv(tmp_path / "patients.csv", "scan_id,patient", "a,1", "b,2", "c,3")
    monkeypatch.setattr(database_module, "_encode", lambda job: ScanRecord.encode(
        job.source.scan_id, np.zeros((1, 32, 32)), np.ones((1, 32, 32)), np.zeros(1)))

    def build(**options):
        return build_lmdb([top], tmp_path / "x.lmdb", SETTINGS, overwrite=True, log=lambda line: None, **options)
    with pytest.raises(DatasetError, match="the patient of b is in train and in val.*say who is who with --patients"):
        build(tables=Tables(split=split))
    made = build(tables=Tables(patients, split))
    assert {s["scan_id"]: s["split"] for s in made["scans"]}["b"] == "val"
    for seed in range(4):
        manifest = build(val_fraction=0.5, seed=seed)
        sides = {scan["scan_id"]: scan["split"] for scan in manifest["scans"]}
        assert sides["a"] == sides["b"] != sides["c"] and manifest["split"].startswith("2 patients by PatientID")
    shutil.rmtree(top / "c")
    with pytest.raises(DatasetError, match="one patient cannot be split.*say who is who with --patients"):
        build()


def test_one_series_given_twice_is_refused_by_name(tmp_path):
    """Under two names, the copies came to both sides of the split."""
    top = dicom_heads(tmp_path / "in", a=("p", "s1", "1"), b=("q", "s2", "2"))
    shutil.copytree(top / "a", tmp_path / "more" / "copy")
    with pytest.raises(ScanError, match="^a and copy: one scan, given twice; leave one of them out"):
        build_lmdb([top, tmp_path / "more"], tmp_path / "x.lmdb", SETTINGS, log=lambda line: None)
    for name in "ab":                                                     # of two patients, by a careless anonymiser
        shutil.rmtree(top / name)
    dicom_heads(top, a=("p", "s1", "1"), b=("q", "s1", "1"))
    assert set(database_module.patients_of(find_scans(top)).values()) == {"a"}
    database_module.refuse_twice([source] for source in find_scans(top))


def test_the_end_of_a_sources_range_is_no_measured_hu(folder, tmp_path):
    """--hu-clip beyond what pictures show was taken: bone is 100 HU in them, and 180 in others of the database."""
    with pytest.raises(DatasetError, match="HU clipped to -20..100 by the source, of .*; take a range within"):
        build_lmdb([folder], tmp_path / "x.lmdb", SETTINGS, hu_clip=(-20, 180), log=lambda line: None)
    scan = read_scan(find_scans(folder)[0])
    narrow = PreprocessSettings(StandardiseSettings(size=32, hu_clip=(-20.5, 100.5)))
    assert preprocess_scan(scan, narrow).reservations == ()
    assert preprocess_scan(scan, SETTINGS).reservations == (
        "HU clipped to -20..100 by the source, of -20..180 looked at: what lies beyond looks weaker than it is",)


def test_a_copy_without_uids_fails_by_name(folder, tmp_path):
    shutil.copytree(folder / "two", tmp_path / "more" / "again")
    manifest = build_lmdb([folder, tmp_path / "more"], tmp_path / "x.lmdb", SETTINGS, log=lambda line: None)
    assert manifest["failed"] == [
        {"scan_id": "again", "reason": "again: the same pictures as two; leave one of them out"}]
    assert [scan["scan_id"] for scan in manifest["scans"]] == ["one", "three", "two"]


# ---- the command

def test_the_command_writes_what_preprocess_scan_gives(folder, database):
    manifest = verify(database)
    assert manifest["settings"]["standardise"]["hu_clip"] == [-20.0, 100.0]      # what the pictures can show
    assert [manifest["counts"][s]["scans"] for s in ("train", "val")] == [2, 1]
    assert manifest["failed"] == [] and "a patient of its own" in manifest["split"]
    assert manifest["preprocessing_version"] == frame.VERSION
    data = SliceDataset(database, "all")
    assert sorted(data.scan_ids) == ["one", "three", "two"]
    source = next(s for s in find_scans(folder) if s.scan_id == "two")
    done = preprocess_scan(read_scan(source), PreprocessSettings.from_json(manifest["settings"]))
    stored = data.scan(data.scan_ids.index("two"))
    assert (stored["hu"].numpy() == np.rint(done.standardised.hu[done.kept])).all()
    assert (stored["brain"].numpy() == done.standardised.brain[done.kept]).all()
    assert (stored["below_vertex_mm"].numpy() == done.standardised.below_vertex_mm[done.kept]).all()


def test_the_hu_range_of_pictures_and_dicom_is_told_without_decoding_them(tmp_path, monkeypatch):
    hu = synthetic_head(slices=4, size=32, spacing_mm=(20.0, 7.0, 7.0))[0]
    write_slice_folder(tmp_path / "pictures", hu, window=(0, 80), slice_spacing_mm=20.0, pixel_spacing_mm=7.0)
    write_dicom_series(tmp_path / "dicom", hu, (20.0, 7.0, 7.0))
    nifti = write_nifti_scan(tmp_path / "volume.nii", np.clip(hu, -10, None), (20.0, 7.0, 7.0))
    read = []
    monkeypatch.setattr(database_module, "read_scan", lambda source: read.append(source.kind) or read_scan(source))
    sources = find_scans(tmp_path)
    assert len(sources) == 3 and nifti.exists()
    assert database_module.common_hu_range(sources, workers=1) == (0.0, 80.0)
    assert read == ["nifti"]                                                     # which only its values tell


def test_an_existing_database_is_replaced_only_when_asked(folder, tmp_path, capsys):
    out = tmp_path / "x.lmdb"
    out.write_bytes(b"precious")
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(folder), "--out", str(out)])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"


def test_a_broken_scan_is_reported_and_the_rest_done(folder, tmp_path, capsys):
    write_slice_folder(tmp_path / "more" / "air", np.full((6, 32, 32), -1000.0))
    bad = write_slice_folder(tmp_path / "more" / "bad", np.zeros((6, 32, 32)))
    next(bad.glob("*.png")).write_bytes(b"not a picture")
    out = tmp_path / "x.lmdb"
    code = prepare.main([str(folder), str(tmp_path / "more"), "--out", str(out), "--size", "32", "--workers", "1"])
    assert code == 3
    manifest = verify(out)
    assert [f["scan_id"] for f in manifest["failed"]] == ["air", "bad"]
    assert "picture" in manifest["failed"][1]["reason"]
    assert sum(n["scans"] for n in manifest["counts"].values()) == 3
    assert "failed: bad: " in capsys.readouterr().err


def test_scans_in_a_zip_are_prepared_and_a_broken_scan_json_costs_its_scan_alone(folder, tmp_path):
    """Either ended the run, before anything was prepared."""
    shutil.copytree(folder / "two", tmp_path / "in" / "two")
    shutil.copytree(folder / "three", tmp_path / "in" / "three")
    (tmp_path / "in" / "three" / "scan.json").write_text('{"windows_hu": [[-20, 100]], "slice_spacing_mm": 8,0}')
    with zipfile.ZipFile(tmp_path / "in" / "packed.zip", "w") as file:
        for path in (folder / "one").iterdir():
            file.write(path, f"one/{path.name}")
    manifest = build_lmdb([tmp_path / "in"], tmp_path / "x.lmdb", SETTINGS, val_fraction=0, log=lambda line: None)
    assert [scan["scan_id"] for scan in manifest["scans"]] == ["packed--one", "two"]
    reason, = [one["reason"] for one in manifest["failed"] if one["scan_id"] == "three"]
    assert reason.startswith("scan.json: cannot be read as JSON (line 1; numbers have a point, not a comma)")


def test_what_is_known_to_be_no_scan_is_held_out_for_nobody_and_needs_no_row(folder, tmp_path, monkeypatch):
    """Each counted as a patient: one could be all that was held out."""
    def encode(job):
        with open_scan(job.source) if job.source.error is not None else nullcontext():
            return ScanRecord.encode(job.source.scan_id, np.zeros((1, 32, 32)), np.ones((1, 32, 32)), np.zeros(1))

    monkeypatch.setattr(database_module, "_encode", encode)
    shutil.copytree(folder, tmp_path / "in")
    for k in range(7):                                               # pictures without a scan.json
        write_slice_folder(tmp_path / "in" / f"none{k}", np.zeros((2, 8, 8)), scan_json=False)

    def build(**options):
        lines = []
        manifest = build_lmdb([tmp_path / "in"], tmp_path / "x.lmdb", SETTINGS, hu_clip=(0, 80), overwrite=True,
                              log=lines.append, **options)
        assert [manifest["counts"][side]["scans"] for side in ("train", "val")] == [2, 1]
        assert [one["scan_id"] for one in manifest["failed"]] == [f"none{k}" for k in range(7)]
        assert lines[0].startswith("3 scans; split: ") and not any("warning" in line for line in lines)

    for seed in range(3):
        build(val_fraction=0.1, seed=seed)
    build(tables=Tables(
        write_csv(tmp_path / "patients.csv", "scan_id,patient", "one,p", "two,q", "three,q"),
        write_csv(tmp_path / "split.csv", "scan_id,split", "one,val", "two,train", "three,train")))


def test_no_scan_at_all_among_what_was_found(tmp_path):
    write_slice_folder(tmp_path / "in" / "none", np.zeros((2, 8, 8)), scan_json=False)
    with pytest.raises(DatasetError, match="no scan of 1 could be prepared; the first: 2 pictures without a scan.json"):
        build_lmdb([tmp_path / "in"], tmp_path / "x.lmdb", SETTINGS, log=lambda line: None)


def test_a_side_whose_scans_have_all_failed_is_a_warning(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "in")
    next((tmp_path / "in" / "one").glob("*.png")).write_bytes(b"not a picture")
    split = write_csv(tmp_path / "split.csv", "scan_id,split", "one,val", "two,train", "three,train")
    out = tmp_path / "x.lmdb"
    assert prepare.main([str(tmp_path / "in"), "--out", str(out), "--size", "32", "--split", str(split), "--workers",
                         "1"]) == 3
    assert "warning: val is empty: all of it has failed (one)" in capsys.readouterr().out
    assert verify(out)["counts"]["val"]["scans"] == 0


def test_given_split_patients_and_slices_are_followed(folder, tmp_path):
    split = write_csv(tmp_path / "split.csv", "scan_id,split", "one,val", "two,train", "three,train")
    patients = write_csv(tmp_path / "patients.csv", "scan_id,patient", "one,p", "two,q", "three,q")
    slices = write_csv(tmp_path / "slices.csv", "scan_id,slice,far", *(f"one,{i},1" for i in (6, 7)), "two,8,1",
                       "three.nii.gz,4,1")
    lines = []
    manifest = build_lmdb([folder], tmp_path / "x.lmdb", SETTINGS, tables=Tables(patients, split, slices),
                          hu_clip=(0, 80), log=lines.append)
    assert [(s["scan_id"], s["split"], s["patient"], s["slices"]) for s in manifest["scans"]] == [
        ("one", "val", "p", [6, 7]), ("two", "train", "q", [8])]
    assert manifest["unlisted"] == ["three"] and any("three" in line for line in lines)
    assert "--slices names 1 scans that are not there: three.nii.gz" in lines
    assert manifest["settings"]["standardise"]["hu_clip"] == (0.0, 80.0)


def test_a_folder_of_which_nothing_would_be_used_is_refused(folder, tmp_path, monkeypatch):
    """A folder of loose slices without its scan.json once left a training without two thirds of its slices."""
    shutil.copytree(folder / "three", tmp_path / "more" / "four")
    slices = write_csv(tmp_path / "slices.csv", "scan_id,slice", "one,6", "two,8")
    (tmp_path / "linked").symlink_to(tmp_path / "more")
    monkeypatch.chdir(tmp_path)
    for more in (tmp_path / "more", tmp_path / "linked", "more"):
        with pytest.raises(DatasetError, match=rf"{more}: --slices .* names none of its 1 scans; .*\"loose\": true"):
            build_lmdb([folder, more], tmp_path / "x.lmdb", SETTINGS, tables=Tables(slices=slices))
    assert not (tmp_path / "x.lmdb").exists()


@pytest.mark.parametrize("flag, rows, message", [
    ("split", ("scan_id,split", "one,val", "two,train"), "no split for three"),
    ("split", ("scan_id,split", "one,test", "two,train", "three,train"), "one is 'test', expected train or val"),
    ("split", ("scan_id,side", "one,val"), "expected columns scan_id, split; found scan_id, side"),
    ("split", ("scan_id,split", "one,val", "one,train", "two,train", "three,val"), "one is both"),
    ("patients", ("scan_id,patient", "one,p"), "no patient for three, two"),
    ("slices", ("scan_id,slice", "one,x"), "slice must be 0 or more, got 'x'"),
    ("slices", ("scan_id,slice", "four,1"), "names none of the 3 scans"),
])
def test_tables_that_do_not_fit_are_refused_by_name(folder, tmp_path, flag, rows, message):
    table = write_csv(tmp_path / "table.csv", *rows)
    with pytest.raises(DatasetError, match=message):
        build_lmdb([folder], tmp_path / "x.lmdb", SETTINGS, tables=Tables(**{flag: table}), hu_clip=(0, 80),
                   log=lambda line: None)
    assert not (tmp_path / "x.lmdb").exists()


def test_one_patient_on_both_sides_of_a_given_split_is_refused(folder, tmp_path):
    split = write_csv(tmp_path / "split.csv", "scan_id,split", "one,val", "two,train", "three,train")
    patients = write_csv(tmp_path / "patients.csv", "scan_id,patient", "one,p", "two,p", "three,q")
    with pytest.raises(DatasetError, match="in train and in val"):
        build_lmdb([folder], tmp_path / "x.lmdb", SETTINGS, tables=Tables(patients, split),
                   log=lambda line: None)


@pytest.mark.parametrize("flags, message", [
    (["--hu-clip", "80", "0"], "LOW below HIGH"), (["--size", "0"], "--size must be above 0"),
    (["--seed", "-1"], "--seed must be 0 or more, got -1"),
    (["--hu-clip", "nan", "80"], "both finite, got nan 80"), (["--hu-clip", "0", "inf"], "both finite, got 0 inf"),
    (["--slab-mm", "inf"], "--slab-mm must be above 0 and finite, got inf"), (["--slab-mm", "nan"], "got nan"),
    (["--max-below-vertex-mm", "inf"], "--max-below-vertex-mm must be above 0 and finite"),
    (["--unknown-slice-spacing-mm", "nan"], "--unknown-slice-spacing-mm must be above 0 and finite, or 0"),
    (["--unknown-slice-spacing-mm=-5"], "--unknown-slice-spacing-mm must be"), (["--val-fraction", "nan"], "got nan"),
    (["--val-fraction", "1.5"], "--val-fraction must be"), (["--min-brain-fraction", "1"], "--min-brain-fraction"),
    (["--min-brain-fraction", "nan"], "--min-brain-fraction")])
def test_values_that_cannot_be_meant_end_with_code_2(folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(folder), "--out", str(tmp_path / "x.lmdb"), "--workers", "1", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_flags_reach_the_work(tmp_path, monkeypatch):
    """Each with a value that is not its default, nor another's."""
    asked = {}

    def build(scans, out, settings, **options):
        asked.update(options, scans=scans, settings=settings)
        raise DatasetError("far enough")
    monkeypatch.setattr(database_module, "build_lmdb", build)
    with pytest.raises(SystemExit):
        prepare.main(["a", "b", "--out", str(tmp_path / "x.lmdb"), "--size", "48", "--slab-mm", "6.5", "--seed", "5",
                      "--hu-clip", "-9", "91", "--min-brain-fraction", "0.03", "--max-below-vertex-mm", "77",
                      "--val-fraction", "0.3", "--workers", "2", "--unknown-slice-spacing-mm", "4.5",
                      "--ids", "uid", "--patients", "p", "--slices", "s", "--leave-out", "l"])
    assert asked["scans"] == ["a", "b"] and asked["settings"] == PreprocessSettings(
        StandardiseSettings(size=48), slab_mm=6.5, min_brain_fraction=0.03, max_below_vertex_mm=77)
    assert asked.items() >= {"hu_clip": [-9, 91], "val_fraction": 0.3, "seed": 5, "workers": 2,
                             "unknown_slice_spacing_mm": 4.5, "ids": "uid",
                             "tables": Tables(patients="p", slices="s", leave_out="l")}.items()


def test_slices_like_a_models(tmp_path, capsys):
    """All of them for validation, as its calibration wants them."""
    folder = tmp_path / "wide"
    for seed, name in enumerate(("one", "two", "three")):
        hu, _ = synthetic_head(slices=13, size=48, spacing_mm=(8.0, 5.0, 5.0), seed=seed)
        write_slice_folder(folder / name, hu, window=(-20, 180), slice_spacing_mm=8.0, pixel_spacing_mm=5.0)
    model, out = tiny_bundle(tmp_path / "model"), tmp_path / "own.lmdb"
    command = [str(folder), "--workers", "1", "--out", str(out), "--like"]
    assert prepare.main([*command, str(model), "--val-fraction", "1"]) == 0
    own = SliceDataset(out, "val")
    assert PreprocessSettings.from_json(own.manifest["settings"]) == load_bundle(model).preprocessing
    assert len(own.scan_ids) == 3 and own.manifest["counts"]["train"]["scans"] == 0

    def refused(*flags):
        with pytest.raises(SystemExit) as stop:
            prepare.main([*command, *flags, "--overwrite"])
        assert stop.value.code == 2
        return capsys.readouterr().err
    assert "leave out --size, --bone-apart" in refused(str(model), "--size", "64", "--bone-apart")
    assert f"--like {tmp_path}" in refused(str(tmp_path))
    assert "a model that holds no networks of train_encoder.py" in refused(str(model), "--teach")
    meta = read_json(model / "model.json", "", 2)
    narrow = PreprocessSettings(StandardiseSettings(size=32, hu_clip=(0.0, 70.0)))
    known = {"encoder": {"images_seen": 8}, "taught_with": narrow.to_json()}
    write_json(model / "model.json", meta | {"provenance": known})
    assert prepare.main([*command, str(model), "--teach", "--val-fraction", "1", "--overwrite"]) == 0
    assert PreprocessSettings.from_json(SliceDataset(out, "val").manifest["settings"]) == narrow
    write_json(model / "model.json", meta | {"preprocessing": None})
    for flags in ((), ("--teach",)):
        assert "an imported model, which does not say how its slices are prepared" in refused(str(model), *flags)


def test_what_a_shipped_models_networks_have_learnt_from():
    """Of before it was kept: head-128 learnt 0 to 70 HU, and sees new scans from -20 to 100."""
    for name, size, hu_clip, bone_apart in (
            ("head-128", 128, (0, 70), True), ("head-256", 256, (0, 70), True), ("heads-128", 128, (0, 70), True),
            ("phantom-128", 128, (-20, 180), False)):
        found = prepare.preprocessing_of(Path(prepare.__file__).parent / "models" / name, teach=True)
        assert found == PreprocessSettings(StandardiseSettings(size=size, hu_clip=hu_clip, bone_apart=bone_apart))


def test_slices_to_teach_are_those_of_a_model(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["scans", "--out", "own.lmdb", "--teach"])
    assert "--teach: of which model's networks? Give --like MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("flag, value", [("--val-fraction", "0.3"), ("--seed", "1"), ("--val-fraction", "0.15"),
                                         ("--seed", "0")])
def test_a_given_split_and_how_to_draw_one_are_refused(flag, value, tmp_path, capsys):
    """The drawn one's flags were passed over, and those with their defaults' values still were."""
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(tmp_path), "--out", str(tmp_path / "own.lmdb"), "--split", "split.csv", flag, value])
    assert stop.value.code == 2
    assert f"--split split.csv: says who is held out; leave out {flag}" in capsys.readouterr().err


@pytest.mark.parametrize("flag, value", [("--size", "256"), ("--slab-mm", "5"), ("--min-brain-fraction", "0.02"),
                                         ("--max-below-vertex-mm", "160"), ("--hu-clip", "-20 180")])
def test_a_flag_with_its_defaults_value_is_given_all_the_same(flag, value, capsys):
    """--like MODEL --size 256 made slices of 128."""
    with pytest.raises(SystemExit):
        prepare.main(["scans", "--out", "own.lmdb", "--like", "model", flag, *value.split()])
    assert f"--like model: says how slices are prepared; leave out {flag}" in capsys.readouterr().err


def test_what_is_not_given_has_the_default_that_help_tells(monkeypatch):
    p, asked = prepare.parser(), {}
    monkeypatch.setattr(database_module, "build_lmdb", lambda scans, out, settings, **options: asked.update(
        options, settings=settings) or {}["far enough"])
    args = p.parse_args(["a", "--out", "x.lmdb"])
    prepare.check(p, args)
    with pytest.raises(KeyError):
        prepare.prepare(args)
    assert asked["settings"] == PreprocessSettings() and (asked["val_fraction"], asked["seed"]) == (0.15, 0)


def test_an_out_that_cannot_be_written_is_refused_before_the_work(folder, tmp_path, capsys):
    for out, message in ((tmp_path, "is a folder"), (Path("/proc/x.lmdb"), "cannot be written")):
        with pytest.raises(SystemExit) as stop:
            prepare.main([str(folder), "--out", str(out), "--workers", "1", "--overwrite"])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_to_train_on_is_prepared_once(folder, database, tmp_path):
    assert ensure_database(database, tmp_path / "run", 32) == database
    made = ensure_database(folder, tmp_path / "run", 32)
    before = made.stat().st_mtime_ns
    assert made == tmp_path / "run" / "data.lmdb" and len(SliceDataset(made, "all").scan_ids) == 3
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    for place in (folder, moved):
        assert ensure_database(place, tmp_path / "run", 32).stat().st_mtime_ns == before


def test_a_database_of_other_scans_is_not_taken_for_the_folders(folder, tmp_path, monkeypatch):
    """--data was ignored where there was one: a run went on with another hospital's scans, and nobody was told."""
    made = ensure_database(folder, tmp_path / "run", 32)
    fewer = Path(shutil.copytree(folder, tmp_path / "fewer"))
    shutil.rmtree(fewer / "two")
    renamed = Path(shutil.copytree(folder, tmp_path / "renamed"))        # the names of ours, and pictures of others
    (renamed / "two").rename(renamed / "three of them")
    shutil.rmtree(renamed / "three")
    (renamed / "three of them").rename(renamed / "three")
    shutil.copytree(folder / "one", renamed / "two")
    (tmp_path / "empty").mkdir()
    for data, said in ((fewer, r"other scans than --data .*/fewer holds, or of other files of these \(two\)"),
                       (renamed, r"of other files of these \(three, two\)"), (tmp_path / "empty", "no scans found")):
        with pytest.raises(DatasetError, match=rf"{made}: .*{said}.*; remove it, or give it as --data {made}"):
            ensure_database(data, tmp_path / "run", 32)

    def as_older_versions(path):                                         # they kept no sizes
        return {key: value for key, value in read_manifest(path).items() if key != "found"}

    monkeypatch.setattr(database_module, "read_manifest", as_older_versions)
    assert ensure_database(folder, tmp_path / "run", 32) == ensure_database(renamed, tmp_path / "run", 32) == made
    with pytest.raises(DatasetError, match=r"of these \(two\)"):
        ensure_database(fewer, tmp_path / "run", 32)


def prepare_on(folder: Path) -> None:
    list(database_module._parallel(attend, [folder / "idle", folder / "busy"], 2))


def attend(file: Path) -> None:
    """Busy: for two minutes, with a file that is removed in the end, as what a zip was unpacked to is."""
    if file.name == "idle":
        return
    file.touch()
    try:
        time.sleep(120)
    finally:
        file.unlink()


def test_the_workers_of_a_killed_process_end(tmp_path):
    """They stayed for good, with 0.6 GB each: each kept the pool's queue open for the other."""
    first = get_context("spawn").Process(target=prepare_on, args=(tmp_path,))
    first.start()

    def children() -> set[int]:
        return {int(pid) for file in Path(f"/proc/{first.pid}/task").glob("*/children")
                for pid in file.read_text().split()}

    def wait_for(condition, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)
    wait_for((tmp_path / "busy").exists, 120)
    pids = children()
    assert len(pids) >= 2
    first.kill()
    first.join()
    wait_for(lambda: not any(runs(pid) for pid in pids), 30)             # one may still be importing
    assert os.listdir(tmp_path) == []


def test_a_link_to_a_database_stays_one(folder, tmp_path):
    """A file took its place, and what it led to stayed old."""
    (tmp_path / "old.lmdb").write_bytes(b"old")
    (tmp_path / "link.lmdb").symlink_to("old.lmdb")
    build_lmdb([folder], tmp_path / "link.lmdb", SETTINGS, overwrite=True)
    assert (tmp_path / "link.lmdb").is_symlink() and len(SliceDataset(tmp_path / "old.lmdb", "all").scan_ids) == 3


def test_a_run_to_train_on_is_no_folder_of_pictures(gan_run, tmp_path):
    """Its sample grids were read as one."""
    with pytest.raises(DatasetError, match=f"--data {gan_run}: the folder of a training run, .* give the database"):
        ensure_database(gan_run, tmp_path / "run", 32)
    assert not (tmp_path / "run").exists()


def test_several_processes_do_not_prepare_a_folder(folder, tmp_path, monkeypatch):
    """Those that wait for the first one give up after half an hour."""
    made = ensure_database(folder, tmp_path / "run", 32)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(DatasetError, match=f"python prepare.py {folder} --size 32 --out healthy.lmdb"):
        ensure_database(folder, tmp_path / "other", 32)
    assert not (tmp_path / "other").exists()
    assert ensure_database(folder, tmp_path / "run", 32) == made


@pytest.mark.parametrize("error, code, message", [
    (OSError(28, "No space left on device"), 2, "No space left"), (KeyboardInterrupt(), 130, "is not written")])
def test_a_full_disk_and_an_interruption_end_without_a_traceback(folder, tmp_path, monkeypatch, capsys, error, code,
                                                                  message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(database_module, "build_lmdb", fail)
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(folder), "--out", str(tmp_path / "x.lmdb")])
    assert stop.value.code == code and message in capsys.readouterr().err


def test_missing_and_empty_folders_and_repeated_scans_are_refused(folder, tmp_path, capsys):
    for scans, message in (([tmp_path / "none"], "no such file or folder"), ([tmp_path], "no scans found"),
                           ([folder, folder], "one, three, two: found more than once")):
        with pytest.raises(SystemExit) as stop:
            prepare.main([*map(str, scans), "--out", str(tmp_path / "x.lmdb"), "--workers", "1"])
        assert stop.value.code == 2 and message in capsys.readouterr().err
