"""The PHE-SICH benchmark: peaks, distances and tests by hand; all stages with a stand-in for the projector."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks import phe_sich
from benchmarks.phe_sich import Place
from dataset import SliceDataset
from evaluation.metrics import Undefined
from tests.benchmark_data import FAILS, MM, head, stand_in, write_database, write_fits, write_otherwise
from tests.writers import write_slice_folder

SPACING = (5.0, 2.0, 1.0)       # mm between slices, rows, columns


def place(marked, shape=(4, 20, 40), allowed=None) -> Place:
    """With these pixels marked; the midline lies between columns 19 and 20."""
    truth = np.zeros(shape, bool)
    truth[tuple(np.array(marked).T)] = True
    lateral = np.broadcast_to(np.arange(shape[2]) - (shape[2] - 1) / 2, shape[1:])
    return Place.of(truth, np.ones(shape, bool) if allowed is None else allowed, SPACING, lateral)


# ---- places and peaks

def test_distances_are_in_mm_in_three_dimensions():
    here = place([(1, 5, 30), (1, 5, 31)])
    assert here.distance_mm[1, 5, 31] == 0
    assert here.distance_mm[1, 5, 34] == pytest.approx(3)                 # 3 columns of 1 mm from the nearer one
    assert here.distance_mm[3, 5, 30] == pytest.approx(10)                # 2 slices of 5 mm
    assert here.distance_mm[2, 11, 30] == pytest.approx(13)               # 5, 12 and 0 mm


def test_the_marked_side_is_that_of_most_marked_pixels():
    here = place([(1, 5, 18), (1, 5, 25), (1, 5, 30)])
    assert here.same_side()[0, 20:].all() and not here.same_side()[0, :20].any()


def test_the_peak_is_that_of_a_patch_and_not_of_a_noisy_pixel():
    values, brain = np.zeros((4, 20, 40)), np.ones((4, 20, 40), bool)
    values[2, 8:13, 8:19] = -10.0                                         # thin counts like dense
    values[0, 3, 30] = 60.0
    assert phe_sich.peak(values, brain, place([(0, 0, 0)])) == (2, 10, 13)


def test_the_smoothing_is_in_the_plane_and_in_mm():
    """An equal column of pixels: along rows of 2 mm the Gaussian reaches half as many pixels as along columns."""
    values, brain = np.zeros((3, 60, 60)), np.ones((3, 60, 60), bool)
    values[1, 28:33, 30] = 10.0                                           # 10 mm from end to end
    values[1, 10, 26:31] = 10.0                                           # 5 mm: closer together, so higher
    assert phe_sich.peak(values, brain, place([(0, 0, 0)], brain.shape)) == (1, 10, 28)


def test_the_rim_of_the_brain_is_not_disfavoured_and_ties_take_the_first():
    values, brain = np.full((2, 20, 40), 3.0), np.zeros((2, 20, 40), bool)
    brain[:, 4:, 4:] = True
    assert phe_sich.peak(values * brain, brain, place([(0, 0, 0)], brain.shape, allowed=brain))[0] == 0
    values[1, 4:9, 4:14] = 3.5                                            # a patch in the very corner of the brain
    assert phe_sich.peak(values * brain, brain, place([(0, 0, 0)], brain.shape, allowed=brain)) == (1, 4, 4)
    assert phe_sich.peak(0 * values, brain, place([(0, 0, 0)], brain.shape, allowed=brain)) == (0, 4, 4)


def test_a_peak_lies_where_it_may():
    values, brain, allowed = np.zeros((2, 20, 40)), np.ones((2, 20, 40), bool), np.zeros((2, 20, 40), bool)
    values[0], values[1, 10, 20], allowed[1] = 9.0, 1.0, True
    assert phe_sich.peak(values, brain, place([(0, 0, 0)], brain.shape, allowed=allowed)) == (1, 10, 20)


# ---- figures

def test_mcnemar_by_hand():
    first = np.array([1, 1, 1, 1, 1, 0, 0, 1], bool)
    second = np.array([0, 0, 0, 0, 0, 1, 0, 1], bool)
    assert phe_sich.mcnemar(first, second) == pytest.approx(2 * (1 + 6) / 2**6)             # 5 against 1 of 6
    assert phe_sich.mcnemar(second, first) == phe_sich.mcnemar(first, second)
    with pytest.raises(Undefined, match="never differ"):
        phe_sich.mcnemar(first, first)


def measured(**mm) -> dict:
    kept = {"chance_near": 0.1 if mm["ours"] < 20 else 0.3, "chance_side": 0.5}
    for method, distance in mm.items():
        kept |= {f"{method}_mm": np.array(float(distance)), f"{method}_peak": np.array([1, 2, 3]),
                 f"{method}_side": np.array(distance < 50), f"{method}_seconds": np.array(2.0)}
    return kept


def test_report_and_table_by_hand():
    measures = {"a": measured(ours=0, hu=15, pca=40, dae=40), "b": measured(ours=15.1, hu=60, pca=60, dae=3),
                "c": measured(ours=90, hu=70, pca=80, dae=9), "d": measured(ours=7, hu=30, pca=90, dae=50)}
    found = phe_sich.report(measures, ["ours", "hu", "pca", "dae"])
    near = {method: f["near"][0] for method, f in found["methods"].items()}
    assert near == {"ours": 0.5, "hu": 0.25, "pca": 0, "dae": 0.5}
    assert found["methods"]["ours"]["near"][1:] == pytest.approx((0.1500, 0.8500), abs=1e-4)      # Wilson, 2 of 4
    assert found["methods"]["ours"]["median_mm"] == pytest.approx((7 + 15.1) / 2)
    assert found["methods"]["ours"]["side"][0] == 0.75 and found["chance"]["near"] == pytest.approx(0.15)
    assert found["methods"]["pca"]["p"] == pytest.approx(0.5) and found["methods"]["dae"]["p"] == 1
    assert found["methods"]["pca"]["p_holm"] == 1                                           # the smallest of three
    text = phe_sich.table(found | {"failed": {"e": "no head"}, "trained_on": 2})
    assert "| this project | 0.50 (0.15-0.85) | 0.75 (0.30-0.95) | 11.1 | 2.0 |  |" in text
    assert "| chance, a random brain pixel | 0.15 | 0.50 |" in text
    assert "correction for 3 methods" in text and "e (no head)" in text and "Of 2 of these" in text


# ---- all stages

@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return write_database(tmp_path_factory.mktemp("data") / "healthy.lmdb")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two scans with a bleed on the patient's left and one that fails."""
    folder = tmp_path_factory.mktemp("phe-sich")
    for seed, name in enumerate(("one", "two", FAILS)):
        scan, truth = head(seed, True)
        write_slice_folder(folder / "scans" / name, scan.hu, slice_spacing_mm=MM[0], pixel_spacing_mm=MM[1])
        (folder / "masks" / name).mkdir(parents=True)
        for i in np.flatnonzero(truth.any((1, 2))):
            Image.fromarray(truth[i].astype(np.uint8) * 255).save(folder / "masks" / name / f"{i:02d}.png")
    return folder


def test_every_stage_and_going_on(data, database, tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, database)
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    command = ["--data", str(data), "--database", str(database), "--model", "model", "--out", str(out), "--fits",
               str(write_fits(tmp_path / "fits", database)), "--baselines", "hu", "pca", "--device", "cpu"]
    assert phe_sich.main(command) == 3                                    # one scan failed
    found, printed = json.loads((out / "metrics.json").read_text()), capsys.readouterr().out
    assert list(found["methods"]) == ["ours", "hu", "pca"] and found["failed"] == {FAILS: "no head"}
    for method, f in found["methods"].items():
        assert (f["near"][0], f["side"][0], f["median_mm"] < 5) == (1, 1, True), method
    assert 0 < found["chance"]["near"] < 0.6
    assert 0.3 < found["chance"]["side"] < 0.7 and found["methods"]["hu"]["p"].startswith("undefined")
    assert (out / "table.md").read_text() in printed and not sheet.exists()

    own = phe_sich.measure
    monkeypatch.setattr(phe_sich, "measure", lambda *_: pytest.fail("measured again"))
    assert phe_sich.main([*command, "--sheet", str(sheet)]) == 3
    assert json.loads((out / "metrics.json").read_text()) == found
    side, pixels = phe_sich.TILE_PX, np.asarray(Image.open(sheet))
    assert pixels.shape == (side, side * phe_sich.COLUMNS, 3)
    first = pixels[:, :side].astype(int)
    red = np.argwhere((first[..., 0] > 180) & (first[..., 1] < 120))
    green = np.argwhere((first[..., 1] > 150) & (first[..., 0] < 120))
    assert np.abs(red.mean(0) - green.mean(0)).max() < 0.1 * side         # the cross in the middle of the marking
    assert red.mean(0)[1] > side / 2                                      # the patient's left is on the right

    monkeypatch.setattr(phe_sich, "measure", lambda source, *rest: again.append(source.scan_id) or own(source, *rest))
    again, corrected = [], tmp_path / "corrected"
    corrected.mkdir()
    (corrected / "scans").symlink_to(data / "scans")
    shutil.copytree(data / "masks", corrected / "masks")
    for path in (corrected / "masks" / "one").iterdir():                  # of one scan the other side is marked
        ImageOps.mirror(Image.open(path)).save(path)
    assert phe_sich.main([*command, "--data", str(corrected)]) == 3 and again == ["one"]
    scans = json.loads((out / "metrics.json").read_text())["scans"]
    assert scans["two"] == found["scans"]["two"] and scans["one"]["hu"]["mm"] > found["scans"]["one"]["hu"]["mm"] + 20


def test_peaks_of_scans_whose_maps_lie_otherwise(database, tmp_path, monkeypatch):
    """Resampled or put upright: map, brain and marking of one slice lay on three."""
    stand_in(monkeypatch, database)
    data, out = tmp_path / "data", tmp_path / "out"
    for name, truth in write_otherwise(data / "scans").items():
        (data / "masks" / name).mkdir(parents=True)
        for i in np.flatnonzero(truth.any((1, 2))):
            Image.fromarray(truth[i].astype(np.uint8) * 255).save(data / "masks" / name / f"{i:02d}.png")
    command = ["--data", str(data), "--database", str(database), "--model", "model", "--out", str(out), "--fits",
               str(write_fits(tmp_path / "fits", database)), "--baselines", "hu", "--device", "cpu"]
    assert phe_sich.main([*command, "--sheet", str(tmp_path / "sheet.png")]) == 0
    scans = json.loads((out / "metrics.json").read_text())["scans"]
    for method in ("ours", "hu"):
        assert {name: of[method]["mm"] < 5 and of[method]["same_side"] for name, of in scans.items()} == {
            "gap": True, "reversed": True}
        assert abs(scans["gap"][method]["peak"][0] - 4) <= 1               # slices of the map: 4 of 12 from below,
        assert abs(scans["reversed"][method]["peak"][0] - 7) <= 1          # and from above


def test_marked_slices_in_the_database_are_refused(data, database):
    scans = SliceDataset(database)
    held = scans.manifest["scans"][0]
    marked = phe_sich.marked_slices(data / "masks", [phe_sich.ScanSource("one", "slices", ())])
    assert phe_sich.trained_on(marked, scans) == 0
    first = min(marked["one"])
    scans.manifest["scans"] = [held | {"scan_id": "one", "slices": [0, 1]}]
    assert phe_sich.trained_on(marked, scans) == 1
    scans.manifest["scans"] = [held | {"scan_id": "one", "slices": [0, first]}]
    with pytest.raises(ValueError, match=rf"holds marked slices of one \({first}, "):
        phe_sich.trained_on(marked, scans)


def test_missing_folders_and_masks_are_wrong_usage(data, database, tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, database)
    command = ["--data", str(tmp_path), "--database", str(database), "--model", "m", "--out", str(tmp_path / "o")]
    assert phe_sich.main(command) == 2
    assert "has no folder scans" in capsys.readouterr().err
    (tmp_path / "scans").symlink_to(data / "scans")
    (tmp_path / "masks").mkdir()
    assert phe_sich.main(command) == 2
    assert "expected for every scan a folder of masks, SCAN/NN.png, with a marked pixel; 3 have none" in (
        capsys.readouterr().err)
    for path in (data / "masks").iterdir():                                # nothing marked: found after hours of work
        (tmp_path / "masks" / path.name).mkdir()
        black = np.zeros((64, 64, 4), np.uint8) + [0, 0, 0, 255] if path.name == "two" else Image.open(
            next(path.iterdir()))
        Image.fromarray(np.asarray(black, np.uint8)).save(tmp_path / "masks" / path.name / "04.png")
    assert phe_sich.main(command) == 2
    assert "1 have none: two; add theirs, or leave these scans out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        phe_sich.main([*command, "--sheet", str(tmp_path / "masks")])
    assert "--sheet" in capsys.readouterr().err
