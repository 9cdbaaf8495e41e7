"""Loose slices: how a folder of them is read and standardised, and that they stay out of all that needs a position."""

from __future__ import annotations

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import prepare
from ct import loose
from ct.read import find_scans, read_scan
from ct.scan import Scan, ScanError
from ct.slices import load_spec
from ct.standardise import HEAD_MM, StandardiseSettings
from dataset import DatasetError, ScanRecord, SliceDataset, SliceWriter, verify
from detect.codes import CodesConfig, encode_slices, fit_codes
from detect.pca import PcaFit, PositionPca
from gan.database import Tables, build_lmdb
from tests.helpers import synthetic_head
from tests.writers import write_slice_folder

SPEC = {"loose": True, "windows_hu": [[0, 255]], "clipped_hu": [0, 70], "pixel_spacing_mm": 2.4}
SETTINGS = StandardiseSettings(size=64, hu_clip=(0.0, 70.0))
MIDDLE = 8                       # the slice of synthetic_head through the centre of the brain


def write_loose(folder, images, spec=None):
    """Pictures whose grey value is HU clipped to 0..70, 0.png, 1.png, ..."""
    folder.mkdir(parents=True)
    for name, hu in enumerate(images):
        Image.fromarray(np.clip(hu, 0, 70).round().astype(np.uint8)).save(folder / f"{name}.png")
    (folder / "scan.json").write_text(json.dumps(SPEC if spec is None else spec))
    return folder


def one_slice(spacing_mm=2.4, size=96, level=MIDDLE, **head):
    hu, brain = synthetic_head(size=size, spacing_mm=(5.0, 2.4, 2.4), **head)
    scan = Scan("one", hu[level:level + 1].clip(0, 70), np.zeros(1), (spacing_mm, spacing_mm), (0.0, 70.0))
    return scan, brain[level]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with three scans, and one with four loose slices of two levels."""
    top = tmp_path_factory.mktemp("both")
    for seed, name in enumerate(("one", "two", "three")):
        hu, _ = synthetic_head(slices=13, size=48, spacing_mm=(8.0, 5.0, 5.0), seed=seed)
        write_slice_folder(top / name, hu, (0, 70), slice_spacing_mm=8.0, pixel_spacing_mm=5.0)
    heads = [synthetic_head(seed=seed, angle_deg=5 * seed)[0] for seed in range(2)]
    write_loose(top / "loose", [head[level] for head in heads for level in (MIDDLE, MIDDLE + 5)])
    return top


@pytest.fixture(scope="module")
def database(folders, tmp_path_factory):
    """Both, with scan three held out."""
    out = tmp_path_factory.mktemp("out") / "both.lmdb"
    split = out.with_name("split.csv")
    split.write_text("scan_id,split\none,train\ntwo,train\nthree,val\n")
    assert prepare.main([str(folders), "--out", str(out), "--size", "32", "--split", str(split), "--workers", "1"]) == 0
    return out


# ---- reading

def test_a_folder_of_loose_slices_is_a_source_a_picture(folders):
    source, = find_scans(folders / "loose")
    found = loose.pictures(source)
    assert [one.scan_id for one in found] == ["loose-0", "loose-1", "loose-2", "loose-3"]
    scan = loose.read_loose(found[0])
    assert scan.hu.shape == (1, 96, 96) and scan.hu.max() == 70         # the grey value is the HU
    assert scan.saturation_hu == (0, 70) and scan.pixel_spacing_mm == (2.4, 2.4)
    other, = find_scans(folders / "one")
    assert loose.pictures(other) is None


def test_loose_slices_are_no_scan(folders):
    source, = find_scans(folders / "loose")
    with pytest.raises(ScanError, match=r"scan\.json: loose slices are no scan"):
        read_scan(source)


def test_loose_slices_in_a_zip_are_refused_by_name(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)                            # what lies here is not what lies in the zip
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for path in (folders / "loose").iterdir():
            file.write(path, f"loose/{path.name}")
    source, = find_scans(tmp_path / "all.zip")
    assert loose.pictures(source) is None
    with pytest.raises(ScanError, match=r"prepare\.py\), from a folder: unpack all\.zip"):
        read_scan(source)


def test_the_id_of_a_picture_is_printable(tmp_path):
    folder = write_loose(tmp_path / "loose", [one_slice()[0].hu[0]])
    (folder / "0.png").rename(os.fsdecode(os.path.join(os.fsencode(folder), b"\xcf\xe5.png")))
    source, = find_scans(folder)
    assert [one.scan_id for one in loose.pictures(source)] == ["loose-%CF%E5"]


@pytest.mark.parametrize("change, message", [
    ({"pixel_spacing_mm": None}, "'pixel_spacing_mm' is null, and one slice does not tell"),
    ({"loose": "yes"}, "'loose' must be true or false, found 'yes'"),
    ({"clipped_hu": [70, 0]}, r"'clipped_hu' must be \[low, high\]"),
])
def test_wrong_scan_json_is_refused_by_key(tmp_path, change, message):
    write_loose(tmp_path / "loose", [], {**SPEC, **change})
    with pytest.raises(ScanError, match=message):
        load_spec(tmp_path / "loose" / "scan.json")


def test_a_missing_key_is_named(tmp_path):
    write_loose(tmp_path / "loose", [], {"loose": True, "windows_hu": [[0, 70]]})
    with pytest.raises(ScanError, match="'pixel_spacing_mm' is missing; scan.json of loose slices must hold"):
        load_spec(tmp_path / "loose" / "scan.json")


# ---- standardising

def test_a_loose_slice_is_centred_turned_upright_and_scaled():
    turned, _ = one_slice(angle_deg=12.0, shift_mm=(15.0, -10.0))
    done = loose.standardise_loose(turned, SETTINGS)
    assert done.hu.shape == done.brain.shape == (1, 64, 64) and np.isnan(done.below_vertex_mm).tolist() == [True]
    assert done.frame.angle_deg == pytest.approx(12, abs=1)
    rows, columns = np.nonzero(done.brain[0])
    assert rows.mean() == pytest.approx(31.5, abs=1) and columns.mean() == pytest.approx(31.5, abs=1)
    mm = HEAD_MM / (0.68 * 64)                                         # a pixel of the frame
    assert np.ptp(rows) + 1 == pytest.approx(140 / mm, abs=2)          # the brain is 140 mm long and 120 mm wide
    assert np.ptp(columns) + 1 == pytest.approx(120 / mm, abs=2)


def test_high_levels_stay_smaller_than_the_middle():
    middle, high = (loose.standardise_loose(one_slice(level=level)[0], SETTINGS).brain.sum()
                    for level in (MIDDLE, MIDDLE + 8))                 # 0 and 40 mm above the centre of the brain
    assert high / middle == pytest.approx(1 - (40 / 65) ** 2, abs=0.06)


def test_a_head_larger_than_any_level_of_a_usual_one_is_made_smaller():
    usual, large = (loose.standardise_loose(one_slice(spacing_mm=mm)[0], SETTINGS).brain[0].sum() for mm in (2.4, 4.0))
    assert large > usual
    assert np.sqrt(large * 4 / np.pi) == pytest.approx(loose.LARGEST * 0.68 * 64, abs=1)


def test_a_head_that_the_picture_cuts_off_is_refused():
    scan, _ = one_slice()
    hu = scan.hu[:, :55]                                               # the back of the head is missing
    cut = Scan("cut", hu, np.zeros(1), (2.4, 2.4), (0.0, 70.0), brain=one_slice()[1][None, :55])
    with pytest.raises(ScanError, match="cut: the brain reaches the edge of the picture"):
        loose.standardise_loose(cut, SETTINGS)


# ---- the database

def test_loose_slices_train_without_a_position(database):
    manifest = verify(database)
    assert manifest["settings"]["standardise"]["hu_clip"] == [0, 70]
    assert manifest["counts"]["train"]["loose"] == 4 and manifest["counts"]["train"]["scans"] == 2
    assert manifest["counts"]["val"] == {"scans": 1, "slices": manifest["counts"]["val"]["slices"], "loose": 0}
    assert manifest["failed"] == []
    train = SliceDataset(database, "train")
    unknown = np.isnan(train.below_vertex_mm)
    assert unknown.sum() == 4 and len(train) == manifest["counts"]["train"]["slices"]
    assert all(np.isnan(train[i]["below_vertex_mm"]) == unknown[i] for i in range(len(train)))
    entry = next(scan for scan in manifest["scans"] if scan["scan_id"] == "loose-2")
    assert (entry["source"], entry["below_vertex_mm"], entry["split"]) == ("loose", [None], "train")
    assert not np.isnan(SliceDataset(database, "val").below_vertex_mm).any()


def test_loose_slices_alone_hold_nothing_out(folders, tmp_path):
    settings = prepare.PreprocessSettings(StandardiseSettings(size=32))
    with pytest.raises(DatasetError, match="loose slices are never held out"):
        build_lmdb([folders / "loose"], tmp_path / "out.lmdb", settings, log=lambda line: None)
    build_lmdb([folders / "loose"], tmp_path / "out.lmdb", settings, val_fraction=0, log=lambda line: None)
    assert SliceDataset(tmp_path / "out.lmdb", "train").manifest["counts"]["train"] == {"scans": 0, "slices": 4,
                                                                                       "loose": 4}


def test_broken_and_empty_pictures_are_named_and_the_others_kept(folders, tmp_path):
    head = synthetic_head()[0]
    folder = write_loose(tmp_path / "some", [head[MIDDLE], np.zeros((96, 96)), head[MIDDLE + 2]])
    (folder / "3.png").write_bytes(b"no picture")
    out = tmp_path / "out.lmdb"
    assert prepare.main([str(folder), "--out", str(out), "--size", "32", "--val-fraction", "0", "--workers", "1"]) == 3
    manifest = verify(out)
    assert [scan["scan_id"] for scan in manifest["scans"]] == ["some-0", "some-2"]
    reasons = {one["scan_id"]: one["reason"] for one in manifest["failed"]}
    assert "no head found" in reasons["some-1"] and "cannot be read as a picture" in reasons["some-3"]


def build_without(folders, tmp_path, *rows, slices=None):
    table = tmp_path / "out.csv"
    table.write_text("\n".join(("scan_id,slice", *rows)) + "\n")
    settings = prepare.PreprocessSettings(StandardiseSettings(size=32))
    return build_lmdb([folders], tmp_path / "out.lmdb", settings, tables=Tables(slices=slices, leave_out=table),
                      val_fraction=0, overwrite=True, log=lambda line: None)


def test_leave_out_takes_scans_slices_and_loose_slices_away(folders, database, tmp_path):
    before = {scan["scan_id"]: scan["slices"] for scan in verify(database)["scans"]}
    manifest = build_without(folders, tmp_path, "one,5", "one,6", "three,", "loose-1,0", "loose-3,")
    after = {scan["scan_id"]: scan["slices"] for scan in manifest["scans"]}
    assert {5, 6} < set(before["one"]) and after["one"] == [i for i in before["one"] if i not in (5, 6)]
    assert after["two"] == before["two"] and sorted(after) == ["loose-0", "loose-2", "one", "two"]
    assert manifest["left_out"] == ["loose-1", "loose-3", "three"] and manifest["failed"] == []


def test_leave_out_wins_over_slices_which_do_not_concern_loose_ones(folders, tmp_path):
    slices = tmp_path / "slices.csv"
    slices.write_text("scan_id,slice\none,5\none,6\n")
    manifest = build_without(folders, tmp_path, "one,6", slices=slices)
    after = {scan["scan_id"]: scan["slices"] for scan in manifest["scans"]}
    assert after == {"one": [5], "loose-0": [0], "loose-1": [0], "loose-2": [0], "loose-3": [0]}
    assert manifest["unlisted"] == ["three", "two"]


@pytest.mark.parametrize("row, message", [
    ("four,", "not among the scans found: four"), ("one,x", "slice must be 0 or more, got 'x' for one"),
    ("loose-1,3", "a loose slice is slice 0 of its own, found others for loose-1")])
def test_leave_out_refuses_what_is_not_there(folders, tmp_path, row, message):
    with pytest.raises(DatasetError, match=message):
        build_without(folders, tmp_path, row)


def test_leaving_out_a_slice_beyond_the_scan_is_that_scans_failure(folders, tmp_path):
    manifest = build_without(folders, tmp_path, "one,40")
    assert "--leave-out names slice 40, the scan has 13" in manifest["failed"][0]["reason"]


# ---- what needs a position

class Mean(torch.nn.Module):
    """An encoder whose code is the mean of the image."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None, None]


def test_latent_statistics_leave_loose_slices_out(database, tmp_path, capsys):
    train = SliceDataset(database, "train")
    known = (~np.isnan(train.below_vertex_mm)).sum()
    codes, mm = encode_slices(Mean(), train, 2, 3, lambda images: images)
    assert len(codes) == len(mm) == 2 * known and not mm.isnan().any()
    path = tmp_path / "loose.lmdb"
    image = np.zeros((1, 32, 32))
    with SliceWriter(path, {}) as writer:
        writer.add(ScanRecord.encode("one", image, image > 0, np.array([np.nan])), "train", "one")
    with pytest.raises(ValueError, match="only loose slices to train on"):
        fit_codes(Mean(), SliceDataset(path, "train"), CodesConfig(), 32, lambda images: images)


def test_components_by_position_leave_loose_slices_out(database, capsys):
    train = SliceDataset(database, "train")
    pca = PositionPca(PcaFit(components=2, step_mm=20.0))
    pca.fit(train)
    assert not pca.centres.isnan().any()
    assert "pca: 4 loose slices without a position are left out" in capsys.readouterr().out


def test_loose_slices_are_no_scans_in_what_is_told(tmp_path):
    """Each was told of as a scan: '8 slices of 4 scans'."""
    rng, brain = np.random.default_rng(0), np.ones((3, 16, 16), bool)
    hu = rng.integers(0, 70, (3, 16, 16)).astype(np.float32)
    with SliceWriter(tmp_path / "both.lmdb", {}) as writer:
        for name, split in (("a", "train"), ("b", "train"), ("c", "val")):
            writer.add(ScanRecord.encode(name, hu, brain, np.array([10.0, 5, 0])), split, name)
        for name in ("x", "y"):
            writer.add(ScanRecord.encode(name, hu[:1], brain[:1], np.array([np.nan])), "train", name)
    train, val, everything = (SliceDataset(tmp_path / "both.lmdb", split) for split in ("train", "val", "all"))
    assert train.told() == "6 slices of 2 scans and 2 loose ones" and val.told() == "3 slices of 1 scans"
    assert everything.told() == "9 slices of 3 scans and 2 loose ones"
    assert SliceDataset(tmp_path / "both.lmdb", scans=["x", "y"]).told() == "2 loose slices"
