"""evaluate.py --masks: truth in files and pictures against the maps of projector.py."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from ct.geometry import SliceStack
from ct.read import find_scans, read_scan
from ct.scan import Scan
from ct.write import write_nifti
from detect.result import result_folder
from evaluation.cohort import InputError, read_truth, read_volume, slice_positions
from tests.evaluation_data import LABELS, run, write_csv, write_results
from tests.helpers import synthetic_head
from tests.writers import write_dicom_series, write_nifti_scan, write_slice_folder


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path / "results")


def display_to_nifti(volume, path):
    """[S, H, W] with anterior and the patient's right first, as NIfTI stored left, posterior, inferior first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume.transpose(2, 1, 0)[::-1, ::-1], np.diag([2.0, 2, 5, 1])), path)


def test_a_damaged_truth_is_exit_2(results, capsys):
    display_to_nifti(np.zeros((3, 4, 5), np.uint8), results / "a" / "mask.nii.gz")
    display_to_nifti(np.zeros((3, 4, 5)), results / "a" / "anomaly.nii.gz")
    (results.parent / "masks").mkdir()
    (results.parent / "masks" / "a.nii.gz").write_bytes(b"no NIfTI")
    assert run(results, "--masks", results.parent / "masks")[0] == 2
    assert "a.nii.gz" in capsys.readouterr().err


def test_masks_nifti_and_pictures(results):
    base, truth = results.parent, np.zeros((3, 4, 5), np.uint8)
    truth[1, 0, :4] = 1                                                      # anterior, towards the right
    predicted = np.zeros_like(truth)
    predicted[1, 0, 2:4], predicted[2, 3, :2] = 1, 1
    for name in "abcdef":
        found = name in "abc"
        display_to_nifti(predicted * found, results / name / "mask.nii.gz")
        display_to_nifti((predicted * 2.0 + truth * 0.5) * found, results / name / "anomaly.nii.gz")
    display_to_nifti(truth, base / "masks" / "a.nii.gz")
    flipped = nibabel.Nifti1Image(truth.transpose(2, 1, 0), np.array(        # the same mask, stored the other way
        [[-2.0, 0, 0, 8], [0, -2, 0, 6], [0, 0, 5, 0], [0, 0, 0, 1]]))
    nibabel.save(flipped, base / "masks" / "b.nii.gz")
    (base / "masks" / "c").mkdir()
    Image.fromarray(truth[1] * 255).save(base / "masks" / "c" / "01.png")
    assert run(results, "--masks", base / "masks", out="none")[0] == 2       # slices 0 and 2 of c: say which
    code, report = run(results, "--masks", base / "masks", "--mask-gaps", "empty")
    assert code == 0
    pixel = report["pixel"]
    assert pixel["dice_by_scan"] == {"a": 0.5, "b": 0.5, "c": 0.5}           # 4 and 4 pixels, 2 in common
    assert pixel["dice_pooled"] == 0.5
    assert pixel["few"]                                                      # three patients with a lesion
    # 2.5: 2 hits of 2; 2.0: 2 misses; 0.5: 2 hits of 6: AP = 0.5 * 1 + 0.5 * 4/6
    assert pixel["pixel_average_precision"] == pytest.approx(0.5 + 0.5 * 4 / 6)
    report = run(results, "--masks", base / "masks", "--mask-gaps", "skip")[1]
    assert report["pixel"]["dice_by_scan"]["c"] == pytest.approx(4 / 6)
    (base / "masks" / "a.nii.gz").unlink()
    assert run(results, "--masks", base / "masks", "--mask-gaps", "empty", out="none")[0] == 2


def test_two_masks_of_one_scan_are_refused_and_both_named(results, capsys):
    """One of them counted, the other was not even looked at."""
    masks, truth = results.parent / "masks", np.zeros((3, 4, 5), np.uint8)
    for name in "abcdef":
        for kind in ("mask", "anomaly"):
            display_to_nifti(truth, results / name / f"{kind}.nii.gz")
        display_to_nifti(truth, masks / f"{name}.nii.gz")
    (masks / "b").mkdir()
    Image.fromarray(truth[0]).save(masks / "b" / "00.png")
    assert run(results, "--masks", masks)[0] == 2
    error = capsys.readouterr().err
    assert f"{masks / 'b.nii.gz'} and {masks / 'b' / '00.png'} are both masks of b" in error
    (masks / "b.nii.gz").unlink()
    Image.fromarray(truth[0]).save(masks / "b" / "0.png")
    assert run(results, "--masks", masks, "--mask-gaps", "empty")[0] == 2
    assert f"{masks / 'b' / '0.png'} and {masks / 'b' / '00.png'} are both masks of slice 0" in capsys.readouterr().err
    (masks / "b" / "0.png").rename(masks / "b" / "\u00b2.png")                   # a digit, but no number
    assert run(results, "--masks", masks, "--mask-gaps", "empty")[0] == 2
    assert "expected the number of a slice" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b[:11] + bytes([b[11] ^ 8]) + b[12:]])
def test_a_damaged_picture_of_a_truth_is_exit_2_and_named(results, damage, capsys):
    """Cut short, its error named no file; another length of its header was a traceback."""
    for kind in ("mask", "anomaly"):
        display_to_nifti(np.zeros((3, 4, 5), np.uint8), results / "a" / f"{kind}.nii.gz")
    picture = results.parent / "masks" / "a" / "01.png"
    picture.parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8)).save(picture)
    picture.write_bytes(damage(picture.read_bytes()))
    assert run(results, "--masks", results.parent / "masks", "--mask-gaps", "empty") == (2, None)
    assert f"error: {picture}: cannot be read as a picture (" in capsys.readouterr().err


def test_a_mask_with_pixels_of_a_scan_labelled_normal_is_refused(results, capsys):
    masks, truth = results.parent / "masks", np.zeros((3, 4, 5), np.uint8)
    truth[0, 0, :2] = 1
    for name in "abcdef":
        for kind in ("mask", "anomaly"):
            display_to_nifti(truth, results / name / f"{kind}.nii.gz")
        display_to_nifti(truth * (name in "abcf"), masks / f"{name}.nii.gz")
    assert run(results, "--masks", masks)[0] == 2
    assert "the mask of f has 2 pixels, but its label is 0" in capsys.readouterr().err


def test_the_interval_of_dice_resamples_patients(results):
    masks, truth = results.parent / "masks", np.zeros((3, 4, 5), np.uint8)
    truth[0, 0, :4] = 1
    for name, found in zip("abcdef", (4, 4, 1, 0, 0, 0)):
        predicted = np.zeros_like(truth)
        predicted[0, 0, :found] = 1
        for kind in ("mask", "anomaly"):
            display_to_nifti(predicted, results / name / f"{kind}.nii.gz")
        display_to_nifti(truth * (name in "abc"), masks / f"{name}.nii.gz")
    labels = list(zip("abcdef", LABELS, "ppqrst"))
    write_csv(results.parent / "labels.csv", "scan_id,label,patient", labels)
    pixel = run(results, "--masks", masks)[1]["pixel"]
    assert pixel["dice_by_scan"] == {"a": 1.0, "b": 1.0, "c": pytest.approx(0.4)}
    assert pixel["dice_mean_bootstrap"] == pytest.approx([0.4, 1.0])              # of p and q, not of three scans
    write_csv(results.parent / "labels.csv", "scan_id,label,patient", [(n, y, "p") for n, y, _ in labels])
    assert run(results, "--masks", masks)[1]["pixel"]["dice_mean_bootstrap"].startswith("undefined: only one")


def test_maps_of_a_run_in_parts_are_found(results, capsys):
    """projector.py --part puts them into folders by hash of the id; both kinds may lie beside each other."""
    truth, predicted = np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4, 5), np.uint8)
    truth[1, 0, :4], predicted[1, 0, 2:4], predicted[2, 3, :2] = 1, 1, 1      # 4 and 4 pixels, 2 in common
    for name in "abcdef":
        found = name in "abc"
        folder = result_folder(results, name, by_hash=name != "b")
        display_to_nifti(predicted * found, folder / "mask.nii.gz")
        display_to_nifti(predicted * 1.0 * found, folder / "anomaly.nii.gz")
        if found:
            display_to_nifti(truth, results.parent / "masks" / f"{name}.nii.gz")
    code, report = run(results, "--masks", results.parent / "masks")
    assert code == 0 and report["pixel"]["dice_by_scan"] == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert (report["pixel"]["scans"], report["pixel"]["left_out"]) == (6, 0)


def test_an_id_that_is_no_folders_name_is_exit_2(results, capsys):
    write_csv(results / "scores.csv", "scan_id,score,status", [["../a", 1, "ok"], ["b", 2, "ok"]])
    write_csv(results.parent / "labels.csv", "scan_id,label", [["../a", 0], ["b", 1]])
    (results.parent / "masks").mkdir()
    assert run(results, "--masks", results.parent / "masks")[0] == 2
    error = capsys.readouterr().err
    assert "'../a' cannot" in error and "--maps" in error and "labels.csv" in error


@pytest.mark.parametrize("tilt_deg", [0.0, 12.0, -17.0])
def test_half_way_between_slices_truth_and_map_are_of_one_slice(tmp_path, tilt_deg):
    """Of slices 2.5 mm and, above, 5 mm apart, half of the map's upper ones lie there: floats chose, and a perfect
    mask had a Dice of 0.9."""
    tilt, along = np.deg2rad(tilt_deg), np.append(0, np.cumsum([2.5] * 16 + [5.0] * 20))
    row, column = np.array([0, np.cos(tilt), -np.sin(tilt)]), np.array([1.0, 0, 0])
    truth = np.zeros((37, 6, 7), bool)
    for k in range(37):
        truth[k, :1 + k % 5, :1 + k % 6] = True                           # no two neighbours alike
    (tmp_path / "a").mkdir()
    for k in range(37):
        Image.fromarray(truth[k].astype(np.uint8) * 255).save(tmp_path / "a" / f"{k:02d}.png")
    for bottom in (0.0, -87.25, -312.3, -641.7):
        origins = np.round(np.stack([0 * along - 120, 0 * along - 130, bottom + along / np.cos(tilt)], axis=1), 6)
        position = origins @ np.cross(column, row)
        scan = Scan("a", np.zeros(truth.shape, np.float32), position, (0.5, 0.5),
                    geometry=SliceStack(origins, row / 2, column / 2))
        write_nifti(tmp_path / "mask.nii.gz", truth, scan)
        write_csv(tmp_path / "slices.csv", "scan_id,slice,position_mm",
                  [["a", k, f"{mm:.6g}"] for k, mm in enumerate(position)])
        mask, affine = read_volume(tmp_path / "mask.nii.gz")
        found, _ = read_truth(tmp_path, "a", mask.shape, affine, "error", slice_positions(tmp_path / "slices.csv")["a"])
        assert len(mask) == 57 and (found == mask).all()


def test_pictures_of_an_unevenly_spaced_scan_go_where_its_slices_lie(results):
    """Slices 0 to 2 are 5 mm apart, the others 10 mm: the map, of even steps, has two slices for each of the others."""
    position, truth = np.array([0.0, 5, 10, 20, 30]), np.zeros((5, 4, 5), bool)
    truth[2, 0, :2], truth[3, 1, :3], truth[4, 2, :4] = True, True, True
    scan = Scan("a", np.zeros(truth.shape, np.float32), position, (1.0, 1.0))
    (results / "a").mkdir()
    for name, volume in (("mask", truth), ("anomaly", truth.astype(np.float32))):
        write_nifti(results / "a" / f"{name}.nii.gz", volume, scan)
    folder = results.parent / "masks" / "a"
    folder.mkdir(parents=True)
    for k, image in enumerate(truth):
        Image.fromarray(image.astype(np.uint8) * 255).save(folder / f"{k}.png")
    write_csv(results / "slices.csv", "scan_id,slice,position_mm", [["a", k, p] for k, p in enumerate(position)])
    mask = read_volume(results / "a" / "mask.nii.gz")
    assert mask[0].sum(axis=(1, 2)).tolist() == [0, 0, 2, 3, 3, 4, 4]
    found, counted = read_truth(folder.parent, "a", mask[0].shape, mask[1], "error",
                                slice_positions(results / "slices.csv")["a"])
    assert counted.all() and (found == mask[0]).all()
    (folder / "3.png").unlink()
    found, counted = read_truth(folder.parent, "a", mask[0].shape, mask[1], "skip", position)
    assert counted.tolist() == [True, True, True, False, False, True, True]
    with pytest.raises(InputError, match="4 of 5 slices have a mask"):
        read_truth(folder.parent, "a", mask[0].shape, mask[1], "error", position)
    report = run(results, "--masks", folder.parent, "--mask-gaps", "skip", "--missing", "exclude")[1]
    assert report["pixel"]["dice_by_scan"] == {"a": 1.0}


def written(reader, folder, hu):
    """The scan that is read of these slices, written in this format; uneven: DICOM, the last slice 10 mm off, not 5."""
    spacing = (5.0, 2.4, 2.4)
    if reader == "slices":
        write_slice_folder(folder / "a", hu, slice_spacing_mm=5.0, pixel_spacing_mm=2.4)
    elif reader == "nifti":
        folder.mkdir()
        write_nifti_scan(folder / "a.nii.gz", hu, spacing, axes="RAS")
    else:
        position_mm = np.arange(len(hu)) * 5.0
        position_mm[-1] += 5.0 * (reader == "uneven")
        write_dicom_series(folder / "a", hu, spacing, position_mm)
    return read_scan(find_scans(folder)[0])


@pytest.mark.parametrize("came", ("upright", "upside down"))
@pytest.mark.parametrize("reader", ("dicom", "uneven", "nifti", "slices"))
def test_pictures_of_a_stack_that_was_put_upright_lie_on_their_slices(results, reader, came):
    """NN is the slice of slices.csv, from the head's lower end; the maps lie as the input did."""
    hu = synthetic_head()[0]
    scan = written(reader, results.parent / "scans", hu if came == "upright" else hu[::-1])
    turned = [note for note in scan.notes if note.startswith("upside down")]
    assert len(scan.hu) == 24 and len(turned) == (came == "upside down")
    mask = np.zeros(scan.hu.shape, bool)
    mask[20, 30:40, 30:50], mask[21, 30:35, 30:50] = True, True
    folder = results / "a"
    folder.mkdir()
    write_nifti(folder / "mask.nii.gz", mask, scan)
    write_nifti(folder / "anomaly.nii.gz", mask.astype(np.float32), scan)
    row = {"scan_id": "a", "status": "ok", "score": 1.0, "seconds": 1.0, "notes": " | ".join([*scan.notes, "another"])}
    (folder / "result.json").write_text(json.dumps({"key": {}, "origin": {}, "scan": row, "slices": [], "seconds": {}}))
    write_csv(results / "slices.csv", "scan_id,slice,position_mm", [["a", *p] for p in enumerate(scan.position_mm)])
    (results.parent / "masks" / "a").mkdir(parents=True)
    for k in (20, 21, 22):
        Image.fromarray(mask[k].astype(np.uint8) * 255).save(results.parent / "masks" / "a" / f"{k}.png")
    for gaps in ("empty", "skip"):
        code, report = run(results, "--masks", results.parent / "masks", "--mask-gaps", gaps, "--missing", "exclude")
        assert code == 0 and report["pixel"]["dice_by_scan"] == {"a": 1.0}
        assert report["pixel"]["pixel_average_precision"] == 1.0


def test_a_damaged_result_beside_maps_is_exit_2(results, capsys):
    display_to_nifti(np.zeros((3, 4, 5), np.uint8), results / "a" / "mask.nii.gz")
    (results / "a" / "result.json").write_text('{"scan": ')
    (results.parent / "masks").mkdir()
    assert run(results, "--masks", results.parent / "masks", "--missing", "exclude")[0] == 2
    assert "result.json: cannot be read as JSON; project the scan again" in capsys.readouterr().err
