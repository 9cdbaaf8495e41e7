"""projector.py with the shipped phantom model on a bleed known to the voxel: a ball of blood in a phantom's right half.

The files that a user would open are held against hand-computed truth: where, which side, which sign, how much,
flagged or not, how rare. Beside it the same head without the ball, and one whose HU are wrong.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import projector
from ct.scan import Scan
from demos.anatomy import build_head
from demos.phantom import code_hash
from demos.scanner import SIZE, Setup, acquire
from detect import Projector, load_bundle
from tests.writers import make_uid, write_dicom_series

MODEL = Path(__file__).resolve().parents[1] / "models" / "phantom-128"
AT_MNI_MM = (30.0, -18.0, 28.0)                       # right, a little behind the middle, beside the ventricle's roof
RADIUS_MM, BLOOD_HU = 14.0, 68.0
BALL_ML = 4 / 3 * np.pi * RADIUS_MM**3 / 1000         # 11.5
REDUCED = 4                                           # pixels averaged a side, for speed: 128 x 128 of 1.8 mm
SPACING_MM = (5.0, REDUCED * 230 / SIZE, REDUCED * 230 / SIZE)
POSITION_MM = np.arange(17) * SPACING_MM[0] - 16      # of the slices, in the gantry: no skull base
HALF_MM = (SIZE / REDUCED - 1) / 2 * SPACING_MM[1]    # from the field's middle to its outer pixels' centres


@dataclass(frozen=True)
class Truth:
    ball_lps: np.ndarray          # [3] mm, the middle of the ball
    vertex_mm: float              # top of the cranial cavity, on the axis of position_mm
    mask: np.ndarray              # bool [S, H, W], what lies in the ball


def make_phantom() -> dict[str, np.ndarray]:
    """HU [S, H, W] of the head with and without the ball, the ball's share of each pixel, and where both lie in mm."""
    head = build_head(np.random.default_rng(0))
    mni = head.mni_mm.astype(np.float32)
    centre = np.array(np.unravel_index(sum((m - at) ** 2 for m, at in zip(mni, AT_MNI_MM)).argmin(), head.hu.shape))
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.ogrid[tuple(map(slice, head.hu.shape))], centre)))
    ball = distance <= RADIUS_MM
    bleeding = replace(head, hu=np.where(ball, np.float32(BLOOD_HU), head.hu))
    setup = Setup(fov_mm=230, turn_deg=0, pitch_deg=0, roll_deg=0, shift_mm=(0, 0), position_mm=POSITION_MM)

    def taken(one, mask):
        scan, found = acquire(one, mask, np.random.default_rng(1), setup)
        return [v.reshape(len(v), SIZE // REDUCED, REDUCED, -1, REDUCED).mean((2, 4)) for v in (scan.hu, found)]

    (bleed, share), (healthy, _) = taken(bleeding, ball), taken(head, None)
    middle = (np.array(head.hu.shape) - 1) / 2        # of the head's grid of 1 mm, at the gantry's origin
    top = np.flatnonzero((head.depth_mm > 0).any((1, 2))).max() - middle[0]
    return dict(bleed=bleed, healthy=healthy, share=share, ball_lps=(centre - middle)[::-1], vertex_mm=top)


@pytest.fixture(scope="module")
def phantom(request) -> dict[str, np.ndarray]:
    """make_phantom(), which takes longer than all that follows: kept in pytest's cache until a source of it changes."""
    key = hashlib.sha256(code_hash().encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    path = request.config.cache.mkdir("phantoms") / f"{key}.npz"
    if not path.exists():
        np.savez(path, **make_phantom())
    with np.load(path) as kept:
        return dict(kept)


@pytest.fixture(scope="module")
def truth(phantom) -> Truth:
    return Truth(phantom["ball_lps"], float(phantom["vertex_mm"]), phantom["share"] >= 0.5)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Callable[..., Path]:
    """project(name=hu, ...) -> results of projector.py for these scans, DICOM series of the phantom's geometry.

    Their columns are stored from the patient's left to the right, against the display's order.
    """
    def run(**scans: np.ndarray) -> Path:
        folder = tmp_path_factory.mktemp("known-bleed")
        for name, hu in scans.items():
            write_dicom_series(folder / "scans" / name, hu, SPACING_MM, POSITION_MM, flip_columns=True, series=name,
                               study=name, origin_lps=(-HALF_MM, -HALF_MM, 0.0),
                               edit=lambda ds, k: setattr(ds, "FrameOfReferenceUID", make_uid("head")))
        assert projector.main([str(folder / "scans"), "--model", str(MODEL), "--out", str(folder / "results"),
                               "--device", "cpu", "--precision", "fp32"]) == 0
        return folder / "results"
    return run


@pytest.fixture(scope="module")
def results(project, phantom) -> Path:
    return project(bleed=phantom["bleed"])


@pytest.fixture(scope="module")
def others(project, phantom) -> list[dict]:
    """Rows of the head without the ball, and of it with soft tissue 25 HU too low."""
    healthy = phantom["healthy"]
    wrong = np.where((healthy > -20) & (healthy < 120), healthy - 25, healthy)
    return rows(project(healthy=healthy, wrong=wrong) / "scores.csv")


def rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def row(results) -> dict:
    """Of the bleed in scores.csv."""
    (only,) = rows(results / "scores.csv")
    return only


@pytest.fixture(scope="module")
def slices(results) -> list[dict]:
    """Of the bleed, inferior to superior."""
    return rows(results / "slices.csv")


def read_map(results: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] of a map of the bleed, and where they lie in the patient, LPS mm [n, 3]."""
    image = nib.load(results / "bleed" / f"{name}.nii.gz")
    values = np.asarray(image.dataobj)
    ras = nib.affines.apply_affine(image.affine, np.argwhere(np.ones(values.shape, bool)))
    return values.ravel(), ras * (-1, -1, 1)


def in_truth(places: np.ndarray, truth: Truth) -> np.ndarray:
    """Whether places (LPS mm [n, 3]) lie in the ball, by the grid that the test wrote, not by the files' own."""
    x, y, z = places.T
    k, i, j = ((z - POSITION_MM[0]) / SPACING_MM[0], (y + HALF_MM) / SPACING_MM[1], (x + HALF_MM) / SPACING_MM[2])
    index = np.rint([k, i, j]).astype(int)
    assert np.abs(index - [k, i, j]).max() < 0.01     # the maps lie on the scan's own grid
    return truth.mask[tuple(index)]


def test_the_mask_lies_on_the_bleed_and_on_its_side(results, truth):
    values, places = read_map(results, "mask")
    found, inside = values > 0, in_truth(places, truth)
    assert 2 * (found & inside).sum() / (found.sum() + inside.sum()) > 0.8
    middle = places[found].mean(0)
    assert np.abs(middle - truth.ball_lps).max() < 3
    assert (places[found][:, 0] < 0).mean() > 0.95    # x grows to the patient's left: what is found lies right
    brain, places = read_map(results, "brain")
    assert brain[in_truth(places, truth)].mean() > 0.99


def test_what_is_too_dense_is_positive(results, truth):
    maps = {}
    for name in ("residual", "anomaly", "reconstruction"):
        values, places = read_map(results, name)
        maps[name] = np.median(values[in_truth(places, truth)])
    assert 15 < maps["residual"] < BLOOD_HU           # blood is brighter than the closest normal
    assert 10 < maps["reconstruction"] < 50           # which is brain
    assert maps["anomaly"] > 2


def test_the_volume_is_that_of_the_mask_and_about_the_balls(results, row):
    volume = float(row["anomalous_ml"])
    values, _ = read_map(results, "mask")
    assert volume == pytest.approx((values > 0).sum() * np.prod(SPACING_MM) / 1000, rel=1e-4)
    assert BALL_ML / 2 < volume < 2 * BALL_ML


def assert_ranked(row: dict) -> float:
    """Percentile and flag by the healthy scores in model.json; gives score / threshold."""
    calibration = json.loads((MODEL / "model.json").read_text())["calibration"]
    healthy, threshold = np.array(calibration["scan_scores"]["top3"]), calibration["threshold"]["top3"]
    score = float(row["score"])
    assert float(row["percentile"]) == pytest.approx(100 * (healthy < score).sum() / (len(healthy) + 1), abs=1e-3)
    assert row["flagged"] == str(int(score > threshold))
    return score / threshold


def test_the_bleed_is_flagged_and_beyond_all_healthy_scores(row, slices):
    assert assert_ranked(row) > 1.2 and row["flagged"] == "1"
    highest = sorted(float(one["score"]) for one in slices)[-3:]
    assert float(row["score"]) == pytest.approx(np.mean(highest), rel=1e-4)
    assert not row["notes"]


def test_the_slices_know_their_place(slices, truth):
    below = np.array([float(one["below_vertex_mm"]) for one in slices])
    position = np.array([float(one["position_mm"]) for one in slices])
    np.testing.assert_allclose(position - position[0], POSITION_MM - POSITION_MM[0], atol=1e-3)
    np.testing.assert_allclose(below + position - position[0] + POSITION_MM[0], truth.vertex_mm, atol=3)
    holding = np.flatnonzero(truth.mask.any((1, 2)))
    at = np.argmax([float(one["score"]) for one in slices])
    assert holding.min() - 1 <= at <= holding.max() + 1
    assert all(one["projected"] == "1" for one in slices[holding.min():holding.max() + 1])


def test_the_same_head_with_a_thin_base_scores_as_much(phantom, truth, row):
    """Of 17 slices 5 mm apart the lowest eight four times, 1.25 mm apart: half of the ball lies in thick ones."""
    thin = 8
    hu = np.concatenate([np.repeat(phantom["bleed"][:thin], 4, axis=0), phantom["bleed"][thin:]])
    fine = np.repeat(POSITION_MM[:thin], 4) + np.tile([-1.875, -0.625, 0.625, 1.875], thin)
    scan = Scan("hybrid", hu.astype(np.float32), np.concatenate([fine, POSITION_MM[thin:]]),
                pixel_spacing_mm=SPACING_MM[1:])
    found = Projector(load_bundle(MODEL, "cpu", "fp32"))(scan)
    assert truth.mask[thin:].sum() > 0.4 * truth.mask.sum() and len(found.working.slabs.scan.hu) == 17
    assert found.score == pytest.approx(float(row["score"]), rel=0.02)
    both = found.mask[4 * thin:] & truth.mask[thin:]
    assert 2 * both.sum() / (found.mask[4 * thin:].sum() + truth.mask[thin:].sum()) > 0.8


def test_a_healthy_head_is_not_flagged_and_wrong_hu_are_noted(others):
    """Both in one run, whatever the model makes of the wrong one."""
    healthy, wrong = sorted(others, key=lambda row: row["scan_id"])
    assert assert_ranked(healthy) < 0.8 and healthy["flagged"] == "0" and float(healthy["percentile"]) < 95
    assert "is the HU scale right" in wrong["notes"] and not healthy["notes"]
    assert wrong["percentile"] == wrong["flagged"] == ""
