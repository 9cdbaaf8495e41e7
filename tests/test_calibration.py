"""Healthy scores of held-out scans, thresholds of them, and surprise, by which no scan judges itself."""

import pytest

from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.calibration import at_rate, thresholds
from detect.projection import project_frame
from detect.scores import scan_score
from tests.calibration_data import PLAIN, command, write_inputs, write_run, write_slices


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_thresholds():
    healthy = [float(i) for i in range(1, 20)]                                      # 19 scans: one in 20 may exceed
    found = thresholds({"max": healthy, "mean": [10 * score for score in healthy]}, 0.05)
    assert found == {"fpr": 0.05, "max": 19.0, "mean": 190.0, "reason": None}
    few = thresholds({"max": healthy[:18]}, 0.05)
    assert few["max"] is None and "needs 19" in few["reason"]


def test_twenty_scans_of_one_head_are_no_threshold():
    """They were: what one healthy head in 20 exceeds was told by the scans of however few."""
    scores = {"max": [float(i) for i in range(1, 21)]}
    assert thresholds(scores, 0.05, 19) == thresholds(scores, 0.05) == {"fpr": 0.05, "max": 20.0, "reason": None}
    few = thresholds(scores, 0.05, 18)
    assert few["max"] is None and "needs healthy scans of 19 patients, found those of 18" in few["reason"]
    assert thresholds(scores, 0.2, 4)["max"] == 17.0                       # of 21 scans four may exceed it
    calibration = {"scans": 20, "patients": 3, "scan_scores": scores}
    with pytest.raises(ValueError, match="0.2: 20 healthy scans of 3 patients cannot tell it; the lowest .* is 0.25,"):
        at_rate(calibration, 0.2)
    assert at_rate(calibration, 0.25)["threshold"]["max"] == 16.0


def test_a_patients_other_scan_does_not_judge_his_first(tmp_path, capsys):
    scores = []
    for name, patients in (("own", range(6)), ("shared", (0, 1, 2, 3, 4, 2))):
        data = write_slices(tmp_path / f"{name}.lmdb", held_out=(2, 3, 4, 5), patients=patients)
        run = write_run(tmp_path / name, SliceDataset(data).manifest)
        assert command(data, run, tmp_path / f"{name}-model", "--set", "measure=surprise", "surprise_above=0", *PLAIN,
                       "steps_noise=0", "--components", "2", "--passes", "4") == 0
        calibration = load_bundle(tmp_path / f"{name}-model").meta["calibration"]
        of_fewer = "note: 4 scans of 3 patients" in capsys.readouterr().out
        assert (calibration["patients"], of_fewer) == ((4, False) if name == "own" else (3, True))
        found = calibration["slice_scores"]
        scores.append([[one["score"] for one in found if one["scan"] == scan] for scan in range(4)])
    assert not any(own == shared for own, shared in zip(*scores))      # others by the tails, which come of all


def test_surprise_is_calibrated_on_the_others(tmp_path):
    data = write_slices(tmp_path / "healthy.lmdb", held_out=(2, 3, 4, 5))
    run = write_run(tmp_path / "encoder", SliceDataset(data).manifest)
    out = tmp_path / "mine"
    assert command(data, run, out, "--set", "measure=surprise", *PLAIN, "steps_noise=0", "--components",
                   "2", "--passes", "4") == 0
    bundle = load_bundle(out, precision="fp32")
    assert bundle.measure.normal is not None and "normal.safetensors" in bundle.meta["files"]
    assert len(bundle.meta["calibration"]["scan_scores"]["mean"]) == 4
    # A slice of the healthy, seen again as a new scan, scores; one with a hyperdense blob scores more.
    scan = SliceDataset(data, "val").scan(0)

    def score(hu):
        _, seen, findings, _ = project_frame(bundle.reconstructor, bundle.measure, hu, scan["brain"],
                                             scan["below_vertex_mm"].numpy())
        assert not findings.anomaly[~scan["brain"]].any() and seen.votes is None
        return scan_score(findings.slice_scores, "mean")

    plain = score(scan["hu"].float())
    dense = scan["hu"].float().clone()
    dense[:, 12:16, 12:16] += 60
    assert score(dense) > plain > 0


def test_surprise_needs_three_scans(inputs, tmp_path, capsys):
    assert command(*inputs, tmp_path / "mine", "--set", "measure=surprise") == 2
    error = capsys.readouterr().err
    assert "measure=surprise: needs held-out healthy scans of 3 patients" in error and "has those of 1" in error
