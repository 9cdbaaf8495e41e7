"""Healthy scores of held-out scans, thresholds of them, and surprise, by which no scan judges itself."""

import math

import numpy as np
import pytest
import torch

from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.calibration import (
    Threshold,
    at_rate,
    depth_range,
    healthy_count,
    healthy_scores,
    healthy_slices,
    mean_error_hu,
    spacing_range,
    summary,
    threshold_of,
    thresholds,
)
from detect.projection import project_frame
from detect.scores import percentile_of, scan_score
from detect.votes import Votes
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


def calibration_of(scores, whose):
    """A calibration by scans of one slice each."""
    return summary([[5.0]] * len(scores), [torch.tensor([score]) for score in scores], [{"reconstruct": 3.0}] *
                   len(scores), [30.0] * len(scores), len(set(whose)), whose)


def test_many_high_scans_of_one_patient_are_one_high_score():
    """Ranks were taken among scans: 20 low heads and 21 scans of a high one made a score of 21 nothing special."""
    scores, whose = [float(i) for i in range(1, 21)] + [21.0 + i / 64 for i in range(21)], [*range(20), *[20] * 21]
    found = calibration_of(scores, whose)
    assert (found["scans"], found["patients"]) == (41, 21)
    assert found["scan_scores"]["max"] == [*scores[:20], scores[-1]]
    assert found["threshold"] == {"fpr": 0.05, "max": scores[-1], "top3": scores[-1], "mean": scores[-1],
                                  "reason": None}
    assert at_rate(found, 0.1)["threshold"]["max"] == 20.0                             # of 22 patients two may exceed
    assert percentile_of(20.5, found["scan_scores"]["max"]) == pytest.approx(100 * 20 / 22)
    few = calibration_of(scores[2:], [*range(18), *[18] * 21][:-21] + [17] * 21)       # 18 patients
    assert few["threshold"]["max"] is None and "of 19 patients, found those of 18" in few["threshold"]["reason"]
    with pytest.raises(ValueError, match="39 healthy scans of 18 patients cannot tell it; the lowest .* is 0.0527"):
        at_rate(few, 0.05)


def test_the_slices_of_a_patients_scans_are_kept_apart():
    positions = [[40.0, 30.0], [20.0, 15.0], [35.0, 23.0]]
    slices = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])]
    found = summary(positions, slices, [{"reconstruct": 3.0}] * 3, [30.0] * 3, 2, [0, 1, 0])
    assert found["scan_scores"]["max"] == [6.0, 4.0] and [one["scan"] for one in found["slice_scores"]] == [
        0, 0, 1, 1, 0, 0] and [one.get("nth") for one in found["slice_scores"]] == [None] * 4 + [1, 1]
    assert spacing_range(found) == (5.0, 12.0) and depth_range(found) is None
    # One scan each: the same JSON as ever
    alone = summary(positions, slices, [{"reconstruct": 3.0}] * 3, [30.0] * 3, 3, [0, 1, 2])
    assert alone == summary(positions, slices, [{"reconstruct": 3.0}] * 3, [30.0] * 3, 3)
    assert alone["slice_scores"][-1] == {"scan": 2, "below_vertex_mm": 23.0, "score": 6.0}
    assert alone["threshold"]["reason"].startswith("a false-positive rate of 0.05 needs 19 healthy scans, found 3")


def test_errors_are_means_over_scans_and_a_searchs_is_that_of_its_code():
    errors = [{"encode": 6.0, "latent": 4.0, "noise": 1.0}, {"encode": 4.0, "latent": 3.0, "noise": 0.0}]
    found = summary([[5.0]] * 2, [torch.tensor([1.0])] * 2, errors, [30.0, 32.0], 2)
    assert found["error_hu"] == {"encode": 5.0, "latent": 3.5, "noise": 0.5} and mean_error_hu(found) == 3.5
    assert found["healthy"] == {"error_hu": [4.0, 3.0], "brain_hu": [30.0, 32.0]}


def test_slices_weigh_in_a_scans_score_by_what_they_stand_for():
    """Slices at 60, 55, 10, 9 and 8 mm stand for 5, 25, 23, 1 and 1 mm: (5 + 25 + 5 * 25) / 55."""
    found = summary([[60.0, 55.0, 10.0, 9.0, 8.0]], [torch.tensor([1.0, 1.0, 5.0, 5.0, 5.0])],
                    [{"reconstruct": 3.0}], [30.0], 1)
    assert found["scan_scores"]["mean"] == [pytest.approx(155 / 55)]


@pytest.mark.parametrize("counts", [[1] * 20, [2] * 20, [1] * 15 + [6] * 5, [1] * 19 + [6]])
def test_the_rate_is_held_where_patients_have_several_scans(counts):
    """0.06 to 0.09 of new patients' healthy scans were flagged instead of 0.05."""
    rng, whose, within = np.random.default_rng(0), np.repeat(np.arange(len(counts)), counts), 0.2
    spread, flagged = math.hypot(1, within), []
    for _ in range(400):
        heads = rng.normal(size=len(counts))
        found = calibration_of((heads[whose] + within * rng.normal(size=len(whose))).tolist(), whose.tolist())
        flagged.append(math.erfc(found["threshold"]["max"] / spread / math.sqrt(2)) / 2)      # of a new one's scan
    assert 0.02 < np.mean(flagged) < 0.05 + 2 * np.std(flagged) / math.sqrt(len(flagged))


def test_a_patients_other_scan_does_not_judge_his_first(tmp_path, capsys):
    scores = []
    for name, patients in (("own", range(6)), ("shared", (0, 1, 2, 3, 4, 2))):
        data = write_slices(tmp_path / f"{name}.lmdb", held_out=(2, 3, 4, 5), patients=patients)
        run = write_run(tmp_path / name, SliceDataset(data).manifest)
        assert command(data, run, tmp_path / f"{name}-model", "--set", "measure=surprise", "surprise_above=0", *PLAIN,
                       "steps_noise=0", "--components", "2", "--passes", "4") == 0
        calibration = load_bundle(tmp_path / f"{name}-model").meta["calibration"]
        of_fewer = "note: 4 scans of 3 patients" in capsys.readouterr().out
        assert len(calibration["scan_scores"]["max"]) == calibration["patients"]
        assert (calibration["patients"], of_fewer) == ((4, False) if name == "own" else (3, True))
        found = calibration["slice_scores"]
        by_scan = {}
        for one in found:
            by_scan.setdefault((one["scan"], one.get("nth", 0)), []).append(one["score"])
        scores.append(list(by_scan.values()))                          # of head2, head3, head4 and head5
        assert list(by_scan) == [(0, 0), (1, 0), (2, 0), (3, 0) if name == "own" else (0, 1)]
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
    assert error.rstrip().endswith(", or use measure=votes")


def test_how_many_patients_a_measure_needs_is_its_own_to_say(inputs, tmp_path, capsys, monkeypatch):
    """Of measures by another name than surprise nobody asked."""
    monkeypatch.setattr(Votes, "least_patients", 2)
    assert command(*inputs, tmp_path / "mine", "--set", "measure=votes") == 2
    error = capsys.readouterr().err
    assert "measure=votes: needs held-out healthy scans of 2 patients" in error and "has those of 1" in error
    assert error.rstrip().endswith("larger --val-fraction")                         # no measure does with one


def test_what_is_read_of_a_calibration():
    found = calibration_of([float(i) for i in range(1, 20)], [*range(19)])
    assert threshold_of(found, "max") == Threshold(19.0, 0.05, None)
    assert threshold_of(found, "median") == Threshold(None, 0.05, None)             # as one made before there was that
    few = calibration_of([1.0, 2.0, 3.0], [0, 1, 0])
    assert threshold_of(few, "mean").value is None
    assert threshold_of(few, "mean").reason == few["threshold"]["reason"] != threshold_of(found, "mean").reason
    assert healthy_scores(few)["max"] == [3.0, 2.0] and healthy_count(few) == 2
    assert healthy_count({"scans": 3}) == 3                                         # as the shipped ones: one scan each
    assert [part.tolist() for part in healthy_slices(few)] == [[5.0] * 3, [1.0, 2.0, 3.0]]
    assert mean_error_hu({"error_hu": {"encode": 4.0, "latent": 3.0, "noise": 1.0}}) == 3.0
    assert mean_error_hu({"error_hu": {"reconstruct": 2.0}}) == 2.0
