"""evaluate.py and its modules metrics, cohort and triage: by hand, by definition, and through the command."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm, t
from sklearn.metrics import average_precision_score

import evaluate
from ct.read import find_scans, read_scan
from ct.scan import Scan
from ct.write import write_nifti
from detect.result import result_folder
from evaluation import cohort, metrics, triage
from evaluation.cohort import InputError, read_truth, read_volume, slice_positions
from evaluation.figures import NO_THRESHOLD, at_threshold
from evaluation.metrics import Undefined
from tests.helpers import synthetic_head
from tests.writers import write_dicom_series, write_nifti_scan, write_slice_folder

SCORES = np.array([0.9, 0.8, 0.4, 0.7, 0.3, 0.2])
LABELS = np.array([1, 1, 1, 0, 0, 0])                                        # 8 of 9 pairs ranked right


# ------------------------------------------------------------------------------------------------------------
# Ranking

def test_auc_counts_pairs_and_halves_ties():
    assert metrics.auc(SCORES, LABELS) == pytest.approx(8 / 9)
    assert metrics.auc(np.array([2, 1, 1, 0]), np.array([1, 1, 0, 0])) == pytest.approx(3.5 / 4)
    assert metrics.auc(np.zeros(4), np.array([1, 1, 0, 0])) == 0.5


@pytest.mark.parametrize("labels", [np.ones(6, int), np.zeros(6, int)])
def test_one_class_is_undefined(labels):
    for figure in (metrics.auc, metrics.average_precision, metrics.delong_interval):
        with pytest.raises(Undefined, match="only one class"):
            figure(SCORES, labels)
    with pytest.raises(Undefined, match="only one class"):
        metrics.bootstrap_interval(metrics.auc, SCORES, labels)


def brute_force_covariance(scores, labels):
    """DeLong's covariance from its definition: sample covariances of the mean comparisons."""
    x, y = [s[labels == 1] for s in scores], [s[labels == 0] for s in scores]
    kernel = [(a[:, None] > b) + 0.5 * (a[:, None] == b) for a, b in zip(x, y)]
    s10, s01 = (np.atleast_2d(np.cov([k.mean(axis=axis) for k in kernel])) for axis in (1, 0))
    return s10 / len(x[0]) + s01 / len(y[0])


def test_roc_points_by_hand():
    # By score: hit, hit, miss, hit, miss, miss
    points = metrics.roc_points(SCORES, LABELS)
    assert points[0] == (0, 0) and points[-1] == (1, 1)
    assert np.allclose(points[2:5], [(0, 2 / 3), (1 / 3, 2 / 3), (1 / 3, 1)])
    with pytest.raises(Undefined, match=r"only one class \(3 abnormal, 0 normal\)"):
        metrics.roc_points(SCORES[:3], LABELS[:3])


def test_delong_interval_by_hand():
    # v10 = 1, 1, 2/3 (variance 1/27) and v01 = 2/3, 1, 1 (1/27), so the variance of the AUC is 2/81 and its
    # deviation sqrt(2)/9. Logit: log(8) +- 1.959964 * (sqrt(2)/9) / (8/81)
    half = 1.959964 * (np.sqrt(2) / 9) * 81 / 8
    expected = [1 / (1 + np.exp(-(np.log(8) + sign * half))) for sign in (-1, 1)]
    assert metrics.delong_interval(SCORES, LABELS) == pytest.approx(expected, abs=1e-6)


def test_delong_equals_its_definition_with_ties():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 40)
    a, b = (np.round(labels + rng.normal(0, 1, 40), 1) for _ in range(2))
    covariance = brute_force_covariance([a, b], labels)
    _, ours = metrics._delong_covariance([a, b], labels, np.arange(40))
    assert np.allclose(ours, covariance, atol=1e-12)
    z = (metrics.auc(a, labels) - metrics.auc(b, labels)) / np.sqrt(covariance @ [1, -1] @ [1, -1])

    assert metrics.delong_paired_test(a, b, labels) == pytest.approx(2 * norm.sf(abs(z)))


def test_delong_paired_test_of_a_score_with_itself_is_undefined():
    with pytest.raises(Undefined, match="no variance"):
        metrics.delong_paired_test(SCORES, SCORES * 2, LABELS)


def test_holm_by_hand():
    """Of four tests the smallest p counts fourfold, the next threefold, and none is smaller than the one before it."""
    found = metrics.holm({"a": 0.04, "b": 0.01, "c": 0.5, "d": 0.045, "e": "undefined: one class"})
    assert found == {"a": pytest.approx(0.12), "b": pytest.approx(0.04), "c": 0.5, "d": pytest.approx(0.12),
                     "e": "undefined: one class"}
    assert metrics.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_delong_bounds_of_perfect_separation():
    scores = np.arange(8.0)
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    low = 0.025 ** (1 / 3)                                                   # three independent pairs
    assert metrics.delong_interval(scores, labels) == pytest.approx((low, 1))
    assert metrics.delong_interval(-scores, labels) == pytest.approx((0, 1 - low))
    with pytest.raises(Undefined, match="variance is zero"):
        metrics.delong_interval(np.zeros(8), labels)
    with pytest.raises(Undefined, match="two independent units"):
        metrics.delong_interval(scores, labels, np.array([0, 1, 2, 3, 4, 5, 5, 5]))


def test_copies_of_a_unit_add_no_certainty_when_clustered():
    """Slices of a scan are not independent: four copies of each unit must not shrink the interval."""
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 15)
    scores = labels + rng.normal(0, 1, 30)
    copies, copied_labels, clusters = (np.repeat(v, 4) for v in (scores, labels, np.arange(30)))
    plain = metrics.delong_interval(scores, labels)
    assert metrics.delong_interval(copies, copied_labels, clusters) == pytest.approx(plain)
    assert np.ptp(metrics.delong_interval(copies, copied_labels)) < 0.6 * np.ptp(plain)
    boot = [metrics.bootstrap_interval(metrics.auc, copies, copied_labels, c, repeats=300) for c in (clusters, None)]
    assert np.ptp(boot[1]) < 0.6 * np.ptp(boot[0])


def of_scans_with_both(rng, scans=20, slices=6):
    """Two scores of slices, of which half are abnormal and those of a scan all higher or lower; labels, scans."""
    labels, clusters = np.tile([0, 1], scans * slices // 2), np.repeat(np.arange(scans), slices)
    shared = 2 * rng.normal(0, 1, scans)[clusters] + 0.7 * labels
    return *(shared + 0.5 * rng.normal(0, 1, scans * slices) for _ in range(2)), labels, clusters


def test_scans_that_hold_slices_of_both_classes():
    """Obuchowski's variance against what the AUCs of cohorts that are drawn vary by."""
    rng = np.random.default_rng(3)
    found = [metrics._delong_covariance([a, b], labels, clusters)
             for a, b, labels, clusters in (of_scans_with_both(rng) for _ in range(300))]
    told = np.mean([covariance for _, covariance in found], axis=0)
    assert told == pytest.approx(np.cov(np.transpose([areas for areas, _ in found])), rel=0.25)


def test_a_paired_test_of_copies_is_that_of_the_units():
    a, b, labels, clusters = of_scans_with_both(np.random.default_rng(4))
    p = metrics.delong_paired_test(a, b, labels, clusters)
    copies = [np.repeat(column, 4) for column in (a, b, labels, clusters)]
    assert metrics.delong_paired_test(*copies) == pytest.approx(p)
    assert metrics.delong_paired_test(*copies[:3]) < 0.5 * p                     # as if all were independent


def test_average_precision():
    # By score: hit, hit, miss, hit, ...: (1 + 1 + 3/4) / 3
    assert metrics.average_precision(SCORES, LABELS) == pytest.approx((1 + 1 + 0.75) / 3)
    rng = np.random.default_rng(2)
    labels, scores = rng.integers(0, 2, 50), rng.integers(0, 8, 50)
    assert metrics.average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores))
    counted, counts = np.unique(np.stack([scores, labels]), axis=1, return_counts=True)
    assert metrics.average_precision(*counted, counts) == pytest.approx(average_precision_score(labels, scores))


def test_bootstrap_is_seeded_and_stratified():
    interval = metrics.bootstrap_interval(metrics.auc, SCORES, LABELS, repeats=200, seed=3)
    assert interval == metrics.bootstrap_interval(metrics.auc, SCORES, LABELS, repeats=200, seed=3)
    many, labels = np.random.default_rng(0).normal(0, 1, 60), np.tile([0, 1], 30)
    assert (metrics.bootstrap_interval(metrics.auc, many, labels, repeats=50, seed=3)
            != metrics.bootstrap_interval(metrics.auc, many, labels, repeats=50, seed=4))
    assert 0 < interval[0] < 8 / 9 < interval[1] <= 1
    share = metrics.bootstrap_interval(lambda s, y: y.mean() + s[0] * 1e-9, SCORES, LABELS, repeats=200)
    assert share == pytest.approx((0.5, 0.5))                                # classes keep their sizes
    with pytest.raises(Undefined, match="same value"):
        metrics.bootstrap_interval(metrics.auc, np.arange(6), np.array([0, 0, 0, 1, 1, 1]), repeats=100)


def test_no_interval_where_a_class_is_one_patient():
    """Every resample held that one again: the interval was of the other class alone, and far too narrow."""
    scores, labels = np.array([3.0, 1, 2, 4, 5, 0]), np.array([1, 0, 0, 0, 0, 0])
    with pytest.raises(Undefined, match="only one independent unit is abnormal"):
        metrics.bootstrap_interval(metrics.auc, scores, labels, repeats=100)
    labels[3] = 1
    assert metrics.bootstrap_interval(metrics.auc, scores, labels, repeats=100)
    with pytest.raises(Undefined, match="only one independent unit is normal"):
        metrics.bootstrap_interval(metrics.auc, scores, labels, clusters=[0, 1, 1, 2, 1, 1], repeats=100)


# ------------------------------------------------------------------------------------------------------------
# At a threshold, and masks

def test_a_score_at_the_threshold_is_not_above_it():
    counts = metrics.confusion(np.array([0.5, 0.5, 0.6]), np.array([1, 0, 1]), 0.5)
    assert counts == {"tp": 1, "fp": 0, "tn": 1, "fn": 1}


def test_empirical_threshold_lets_through_no_more():
    normal = np.array([5.0, 1, 2, 3, 4])
    assert np.sum(normal > metrics.empirical_threshold(normal, 0.2)) == 1
    assert np.sum(normal > metrics.empirical_threshold(normal, 0.19)) == 0
    assert np.sum(np.ones(10) > metrics.empirical_threshold(np.ones(10), 0.5)) == 0     # ties go together


def test_confusion_and_wilson():
    assert metrics.confusion(SCORES, LABELS, 0.69) == {"tp": 2, "fp": 1, "tn": 2, "fn": 1}
    four_counts = metrics.confusion(np.array([9, 8, 7, 1, 6, 6, 0, 0, 0, 0, 0]), np.array([1] * 4 + [0] * 7), 5)
    assert four_counts == {"tp": 3, "fp": 2, "tn": 5, "fn": 1}       # all different: none can stand for another
    # Wilson for 2 of 3: centre (2/3 + z2/6) / (1 + z2/3), half z sqrt(2/27 + z2/36) / (1 + z2/3)
    z2 = 1.959964**2
    centre, half = (2 / 3 + z2 / 6) / (1 + z2 / 3), np.sqrt(z2 * (2 / 27 + z2 / 36)) / (1 + z2 / 3)
    assert metrics.proportion(2, 3) == pytest.approx((2 / 3, centre - half, centre + half), abs=1e-6)
    with pytest.raises(Undefined):
        metrics.proportion(0, 0)


def test_correlated_units_are_worth_fewer_independent_ones():
    right = np.array([1, 1, 0, 1, 0, 0], bool)
    assert metrics.independent_units(right, np.arange(6)) == pytest.approx(6)    # each its own: Wilson's as it is
    assert metrics.independent_units(right.repeat(20), np.arange(6).repeat(20)) == pytest.approx(
        120 / (6 / 5 * 6 * 100 / (120**2 / 4 / 119)) * (t.ppf(0.975, 119) / t.ppf(0.975, 5)) ** 2)
    balanced, clusters = np.tile([1, 0], 100), np.arange(200) // 2               # alike in each: never more than all
    assert metrics.independent_units(balanced, clusters) == pytest.approx(
        200 * (t.ppf(0.975, 199) / t.ppf(0.975, 99)) ** 2)
    assert metrics.independent_units(np.array([1, 0, 1, 0]), [0, 0, 1, 1]) == 1  # two clusters tell next to nothing
    assert metrics.independent_units(np.ones(40), np.arange(4).repeat(10)) == 4  # all right: as many as patients
    assert metrics.independent_units(np.array([1, 0, 1]), [7, 7, 7]) == 1
    low, high = metrics.proportion(60, 120, independent=6)[1:]
    assert (low, high) == pytest.approx(metrics.proportion(3, 6)[1:])


def test_intervals_at_a_threshold_know_what_slices_of_one_patient_are_worth():
    """Ten slices of each of four patients, alike: the interval was that of 40 patients."""
    labels, scores = np.ones(40, int), np.repeat([1.0, 1, 1, 0], 10)
    units = cohort.Units([(str(i),) for i in range(40)], scores, labels, [()] * 40, np.arange(4).repeat(10), {},
                         np.zeros(40, bool))
    args = SimpleNamespace(level=0.95, prevalence=None)
    found = at_threshold(units, labels == 1, 0.5, "", args)["sensitivity"]
    assert (found["value"], found["hits"], found["of"]) == (0.75, 30, 40)
    worth = 40 / 13 * (t.ppf(0.975, 39) / t.ppf(0.975, 3)) ** 2
    assert found["interval"] == pytest.approx(metrics.proportion(30, 40, independent=worth)[1:])
    alone = at_threshold(dataclasses.replace(units, clusters=np.arange(40)), labels == 1, 0.5, "", args)["sensitivity"]
    assert alone["interval"] == pytest.approx(metrics.proportion(30, 40)[1:])


def test_ppv_at_prevalence_is_bayes():
    # 1,000 scans, 100 ill: 80 found, 90 of 900 healthy called too
    assert metrics.ppv_at_prevalence(0.8, 0.9, 0.1) == pytest.approx(80 / 170)
    with pytest.raises(Undefined):
        metrics.ppv_at_prevalence(0.0, 1.0, 0.1)


def test_dice():
    a, b = np.zeros((2, 2, 2), bool), np.zeros((2, 2, 2), bool)
    a[0], b[0, 0], b[1, 0] = True, True, True                                # 4 and 4 pixels, 2 in common
    assert metrics.dice(a, b) == 0.5
    with pytest.raises(Undefined):
        metrics.dice(a & ~a, b & ~b)


def test_pixels_are_ranked_by_their_distance_from_normal_to_either_side():
    """A bleed at +3 and an infarct at -2 stand before all healthy pixels, at -1 to 1."""
    anomaly = np.linspace(-1, 1, 40).reshape(2, 4, 5)
    bleed, infarct = np.zeros((2, 2, 4, 5), bool)
    bleed[0, 0], infarct[1, 3] = True, True
    tally = metrics.PixelTally()
    tally.add("a", bleed | infarct, bleed, np.where(bleed, 3, np.where(infarct, -2, anomaly)))
    assert tally.average_precision() == 1


# ------------------------------------------------------------------------------------------------------------
# Who is evaluated

def label(value, *types, patient="p"):
    return cohort.Label(value, types, patient)


def test_missing_scans_are_refused_excluded_or_counted_worst():
    scores = {("a",): 3.0, ("b",): 1.0, ("failed",): "failed", ("stray",): 9.0}
    labels = {("a",): label(1), ("b",): label(0), ("failed",): label(1), ("absent",): label(0)}
    with pytest.raises(cohort.InputError) as error:
        cohort.join(scores, labels, "error")
    for told in ("1 scans failed (failed)", "1 scans labelled without a score (absent)", "label (stray)"):
        assert told in str(error.value)

    units = cohort.join(scores, labels, "exclude")
    assert units.keys == [("a",), ("b",)]
    assert units.left_out == {"failed": 1, "labelled without a score": 1, "scored without a label": 1}

    units = cohort.join(scores, labels, "worst")
    assert dict(zip(units.keys, units.scores)) == {("a",): 3, ("b",): 1, ("failed",): 0, ("absent",): 4}
    assert units.counted_worst == 2 and units.left_out == {"scored without a label": 1}
    assert metrics.auc(units.scores, units.labels) == 0.25                   # only a > b is right
    for threshold in (-9.0, 2.0, 9.0):                                       # called wrongly at any threshold
        counts = metrics.confusion(units.scores, units.labels, threshold, units.worst)
        called = units.scores[:2] > threshold
        assert counts == {"tp": called[0], "fp": 1 + called[1], "tn": not called[1], "fn": 1 + (not called[0])}


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


@pytest.mark.parametrize("header, rows, message", [
    ("scan_id,status", [["a", "ok"]], "has no score"),
    ("scan_id,score,status", [["a", "1", "ok"], ["a", "2", "ok"]], "csv, line 3: a is there twice"),
    ("scan_id,score,status", [["a", "1", "ok"], ["", "", ""]], "csv, line 3: has no scan_id"),
    ("scan_id,score,status", [["a\u00a0", "1", "ok"]] * 2, r"line 3: 'a\\xa0' is there twice"),
    ("scan_id,score,status", [["a", "nan", "ok"]], "csv, line 2: score must be a finite number"),
    ("scan_id,score,status", [["two\nlines", "1", "ok"], ["a", "0,5", "ok"]], "csv, line 4: score .* found '0,5'"),
    ("scan_id,score,status", [["a", "1", "done"]], "csv, line 2: .*'ok' or 'failed'"),
    ("scan_id,score,status", [["a", "1", "ok", "", "x"]], "csv, line 2: has 5 cells, the header 3"),
])
def test_unfit_scores_are_refused(tmp_path, header, rows, message):
    with pytest.raises(cohort.InputError, match=message):
        cohort.read_scores(write_csv(tmp_path / "scores.csv", header, rows))


def test_labels_are_checked_and_chosen(tmp_path):
    path = write_csv(tmp_path / "labels.csv", "scan_id,split,label,types",
                     [["a", "test", "1", "Subdural|Epidural"], ["b", "train", "0", ""]])
    labels, not_chosen = cohort.read_labels(path, ["split=test"])
    assert labels == {("a",): cohort.Label(1, ("Epidural", "Subdural"), "a")} and not_chosen == {("b",)}
    everything = cohort.read_labels(path)[0]
    for where in (["split=test", "split=train"], ["split=train", "split=test", "label=0", "label=1"]):
        assert cohort.read_labels(path, where) == (everything, set())            # any value of a column will do
    assert cohort.read_labels(path, ["split=train", "split=test", "label=0"])[1] == {("a",)}
    with pytest.raises(cohort.InputError, match="no labels where split=test, label=0"):
        cohort.read_labels(path, ["split=test", "label=0"])
    for row in (["c", "test", "0", "Epidural"], ["c", "test", "", ""], ["c", "test", "yes", ""]):
        with pytest.raises(cohort.InputError, match="line 2: c has label .*expected label 0 without types, or label 1"):
            cohort.read_labels(write_csv(path, "scan_id,split,label,types", [row]))


def test_a_condition_that_no_row_meets_is_refused(tmp_path):
    """A slip in one of two values of --where cost its scans without a word."""
    path = write_csv(tmp_path / "labels.csv", "scan_id,split,label", [["a", "test", 1], ["b", "train", 0]])
    with pytest.raises(cohort.InputError, match="labels.csv: no row has split=tets; correct --where"):
        cohort.read_labels(path, ["split=train", "split=tets"])


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    """Of two merged tables' labels the last counted."""
    path = write_csv(tmp_path / "labels.csv", "scan_id,label,note,label,", [["a", 1, "", 0, ""]])
    with pytest.raises(cohort.InputError, match="labels.csv: has the column label more than once"):
        cohort.read_labels(path)


def test_a_patient_is_one_whatever_spaces_are_around(tmp_path):
    """'p1' and 'p1 ' counted as two, and intervals came out too narrow."""
    rows = [["a", 1, "p1 "], ["b", 0, " p1"], ["c", 0, " "]]
    path = write_csv(tmp_path / "labels.csv", "scan_id,label,patient", rows)
    assert [label.patient for label in cohort.read_labels(path)[0].values()] == ["p1", "p1", "c"]


@pytest.mark.parametrize("content, message", [
    ("20\n\n30,5\n", "line 3: expected seconds above 0, one number a line, with a decimal point, found '30,5'"),
    ("1 2\n3 4\n", "line 1: .*found '1 2'"), ("3\n0\n", "line 2: .*found '0'"), ("1\ninf\n", "line 2: .*found 'inf'"),
    ("\n", "expected seconds above 0, .*found none")])
def test_what_is_no_list_of_seconds_is_named(tmp_path, content, message):
    """Two numbers a line were a traceback, or other sessions than meant."""
    (tmp_path / "seconds.txt").write_text(content)
    with pytest.raises(cohort.InputError, match=f"seconds.txt(, |: ){message}"):
        cohort.read_seconds(tmp_path / "seconds.txt")


def test_scans_may_come_at_once_and_a_spreadsheet_may_mark_its_text(tmp_path):
    (tmp_path / "seconds.txt").write_text("# s\r\n0\r\n2.5  # a pause\r\n", encoding="utf-8-sig")
    assert cohort.read_seconds(tmp_path / "seconds.txt", may_be_0=True).tolist() == [0, 2.5]
    starts = triage.read_worklist(np.zeros(3), np.full(3, 10.0), np.array([1.0, 3, 3]), np.zeros(3))
    assert starts.tolist() == [20, 0, 10]                                    # equal scores in order of arrival


def test_transparent_pixels_of_a_mask_are_none(tmp_path):
    """White behind full transparency marked the whole slice."""
    picture = np.full((2, 2, 4), 255, np.uint8)
    picture[1, :, 3] = 0
    picture[0, 0] = (0, 0, 0, 255)
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "0.png")
    truth, counted = cohort.read_truth(tmp_path, "a", (1, 2, 2), np.eye(4), "error")
    assert truth.tolist() == [[[False, True], [False, False]]] and counted.all()


def test_a_scan_that_is_there_twice_is_refused_whichever_row_is_chosen(tmp_path):
    path = tmp_path / "labels.csv"
    for twice in ([1, "a", 0], [2, "a", 0]):                                 # one that is not chosen, one that is
        write_csv(path, "scan_id,split,label", [[1, "b", 0], [2, "a", 0], twice])
        with pytest.raises(cohort.InputError, match=f"line 4: {twice[0]} is there twice"):
            cohort.read_labels(path, ["split=a"])


# ------------------------------------------------------------------------------------------------------------
# The worklist

def test_worklist_of_four_scans_by_hand():
    arrivals, reading = np.array([0.0, 1, 2, 3]), np.full(4, 10.0)
    assert triage.read_worklist(arrivals, reading).tolist() == [0, 10, 20, 30]
    # All scores at once: 0 is being read already, then 3 (highest), 2, 1
    scores, known = np.array([0.0, 1, 2, 3]), arrivals
    assert triage.read_worklist(arrivals, reading, scores, known).tolist() == [0, 30, 20, 10]
    # The score of 3 comes at 12: at 10 it stands behind the scored 2; at 20 it goes first
    known = np.array([0.0, 1, 2, 12])
    assert triage.read_worklist(arrivals, reading, scores, known).tolist() == [0, 30, 10, 20]
    # No score in time: in order of arrival
    assert triage.read_worklist(arrivals, reading, scores, np.full(4, 99.0)).tolist() == [0, 10, 20, 30]


def test_reader_comes_late_and_idles():
    arrivals, reading = np.array([0.0, 5, 100]), np.full(3, 10.0)
    assert triage.read_worklist(arrivals, reading, reader_start_s=50).tolist() == [50, 60, 100]
    by_score = triage.read_worklist(arrivals, reading, np.array([1.0, 2, 3]), arrivals + 1, reader_start_s=50)
    assert by_score.tolist() == [60, 50, 100]                                # 100 is read before it has a score


def test_scores_queue_for_the_machines():
    arrivals = np.array([0.0, 1, 2, 50])
    assert triage.scores_known_from(arrivals, 10, machines=1).tolist() == [10, 20, 30, 60]
    assert triage.scores_known_from(arrivals, 10, machines=2).tolist() == [10, 11, 20, 60]


def test_simulation_helps_with_good_scores_and_not_with_late_ones():
    labels = np.repeat([1, 0], [20, 80])
    scores = labels + np.linspace(0, 0.5, 100)
    settings = triage.TriageSettings(repeats=40, seed=1)
    result = triage.simulate(scores, labels, settings)
    assert result == triage.simulate(scores, labels, settings)
    emergency, other = result["emergency"], result["other"]
    assert emergency["by_score_wait_s"]["median"] < 0.4 * emergency["first_come_wait_s"]["median"]
    assert emergency["wilcoxon_p"] < 0.001
    assert other["mean_wait_change_s"] > 0                                   # the price
    assert emergency["cases"] + other["cases"] == 40 * 60
    late = triage.simulate(scores, labels, triage.TriageSettings(repeats=5, latency_s=1e5))["emergency"]
    assert late["by_score_wait_s"] == late["first_come_wait_s"]
    assert late["wilcoxon_p"].startswith("undefined")
    with pytest.raises(Undefined, match="only one class"):
        triage.simulate(scores, np.ones(100, int), settings)


# ------------------------------------------------------------------------------------------------------------
# The command

@pytest.fixture
def results(tmp_path):
    """Six scans of three slices, scored, with labels and categories."""
    folder = tmp_path / "results"
    folder.mkdir()
    names = list("abcdef")
    write_csv(folder / "scores.csv", "scan_id,score,status,reason", [[n, s, "ok", ""] for n, s in zip(names, SCORES)])
    types = ["Epidural", "Epidural|Subdural", "Subdural", "", "", ""]
    write_csv(tmp_path / "labels.csv", "scan_id,label,types", list(zip(names, LABELS, types)))
    write_csv(folder / "slices.csv", "scan_id,slice,score", [[n, k, s * (k + 1)] for n, s in zip(names, SCORES)
                                                            for k in range(3)])
    write_csv(tmp_path / "slice_labels.csv", "scan_id,slice,label",
              [[n, k, int(y and k == 2)] for n, y in zip(names, LABELS) for k in range(3)])
    return folder


def run(results, *extra, out="metrics"):
    base = results.parent
    code = evaluate.main([str(results / "scores.csv"), str(base / "labels.csv"), "--out", str(base / out),
                          "--bootstrap", "100", *map(str, extra)])
    path = base / out / "metrics.json"
    return code, json.loads(path.read_text()) if path.is_file() else None


def test_who_leaves_early_gets_no_traceback_and_all_files(results):
    """`evaluate.py ... | head -1`: the pipe is closed before anything is written."""
    command = [sys.executable, evaluate.__file__, str(results / "scores.csv"), str(results.parent / "labels.csv"),
               "--out", str(results.parent / "m"), "--bootstrap", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == -signal.SIGPIPE
    assert {"metrics.json", "metrics.md"} <= {path.name for path in (results.parent / "m").iterdir()}


def test_command_end_to_end(results, capsys):
    base = results.parent
    code, report = run(results, "--slices", results / "slices.csv", "--slice-labels", base / "slice_labels.csv",
                       "--threshold", 0.69, "--prevalence", 0.1)
    assert code == 0
    scan = report["scan"]
    assert scan["auc"] == pytest.approx(8 / 9) and (scan["abnormal"], scan["normal"]) == (3, 3)
    assert scan["roc"] == [list(point) for point in metrics.roc_points(SCORES, LABELS)]
    assert report["labels"]["b"] == {"label": 1, "types": ["Epidural", "Subdural"]}
    assert scan["at_threshold"]["sensitivity"]["value"] == pytest.approx(2 / 3)
    assert scan["at_threshold"]["ppv_at_prevalence"]["value"] == pytest.approx((2 / 30) / (2 / 30 + 0.9 / 3))
    # A scan of several types counts in each: a and b; b and c
    assert scan["categories"]["Epidural"]["auc"] == 1 and scan["categories"]["Epidural"]["abnormal"] == 2
    assert scan["categories"]["Subdural"]["auc"] == pytest.approx(5 / 6)
    assert scan["categories"]["Subdural"]["sensitivity"]["hits"] == 1
    assert (report["slice"]["n"], report["slice"]["clusters"]) == (18, 6)
    assert report["slice"]["at_threshold"]["sensitivity"] == NO_THRESHOLD
    assert {"numpy", "scipy"} <= set(report["versions"]) and report["settings"]["seed"] == 0
    table = (base / "metrics" / "metrics.md").read_text()
    assert table == capsys.readouterr().out and "| scan | AUC | 0.889 |" in table
    assert {"roc.png", "pr.png"} <= {p.name for p in (base / "metrics").iterdir()}


def test_one_class_gives_undefined_not_a_number(results):
    write_csv(results.parent / "labels.csv", "scan_id,label", [[n, 0] for n in "abcdef"])
    code, report = run(results)
    assert code == 0
    for figure in ("auc", "auc_delong", "auc_bootstrap", "average_precision", "average_precision_bootstrap"):
        assert report["scan"][figure] == "undefined: only one class (0 abnormal, 6 normal)"
    assert report["scan"]["at_threshold"]["sensitivity"] == NO_THRESHOLD


def test_missing_scan_is_exit_2_unless_allowed(results, capsys):
    rows = [[n, s, "failed" if n == "a" else "ok"] for n, s in zip("abcdef", SCORES)]
    write_csv(results / "scores.csv", "scan_id,score,status", rows)
    assert run(results) == (2, None)
    assert "1 scans failed (a)" in capsys.readouterr().err
    code, report = run(results, "--missing", "worst")
    assert code == 0 and report["scan"]["counted_worst"] == 1 and report["scan"]["auc"] == pytest.approx(5 / 9)
    code, report = run(results, "--missing", "exclude")
    assert code == 0 and report["scan"]["left_out"] == {"failed": 1}
    assert "scans left out: 1 (failed)" in (results.parent / "metrics" / "metrics.md").read_text()


def test_scans_not_to_be_trusted_count_by_name_and_take_their_slices_with_them(results, capsys):
    """b is unreliable, d failed and has no slices, f is not in scores.csv; slices of a, c and e remain."""
    status = {"b": "unreliable", "d": "failed"}
    write_csv(results / "scores.csv", "scan_id,score,status",
              [[n, "" if n == "d" else s, status.get(n, "ok")] for n, s in zip("abcde", SCORES)])
    write_csv(results / "slices.csv", "scan_id,slice,score",
              [[n, k, s * (k + 1)] for n, s in zip("abcdef", SCORES) for k in range(3) if n != "d"])
    flags = ["--slices", results / "slices.csv", "--slice-labels", results.parent / "slice_labels.csv"]
    assert run(results, *flags) == (2, None)
    assert "1 scans failed (d); 1 scans unreliable (b); 1 scans labelled without a score (f)" in capsys.readouterr().err
    code, report = run(results, *flags, "--missing", "exclude")
    assert code == 0 and (report["scan"]["n"], report["slice"]["n"]) == (3, 9)
    assert report["scan"]["left_out"] == {"failed": 1, "unreliable": 1, "labelled without a score": 1}
    assert report["slice"]["left_out"] == {"unreliable": 3, "labelled without a score": 6}
    # Abnormal a2 2.7 and c2 1.2; normal a0 0.9, a1 1.8, c0 0.4, c1 0.8, e0 0.3, e1 0.6, e2 0.9: 13 of 14 ranked right
    assert report["slice"]["auc"] == pytest.approx(13 / 14)
    table = (results.parent / "metrics" / "metrics.md").read_text()
    assert "scans left out: 1 (unreliable)" in table and "slices left out: 3 (unreliable)" in table
    report = run(results, *flags, "--missing", "worst")[1]
    assert (report["scan"]["counted_worst"], report["slice"]["counted_worst"]) == (3, 9)


def test_threshold_comes_from_other_data(results, capsys):
    other = write_csv(results.parent / "healthy.csv", "scan_id,score,status",
                      [[f"h{i}", i / 20, "ok"] for i in range(20)])          # 0 .. 0.95
    code, report = run(results, "--threshold-from", other, "--fpr", 0.3)
    at = report["scan"]["at_threshold"]
    assert code == 0 and 0.65 <= at["threshold"] < 0.7 and (at["tp"], at["fp"]) == (2, 1)
    assert "20 normal scans" in at["threshold_source"]
    assert run(results, "--threshold-from", results / "scores.csv", out="none") == (2, None)
    assert "other data" in capsys.readouterr().err


def test_a_threshold_comes_from_other_patients(results, capsys):
    """Scans of the patients evaluated here, under other names, set their threshold."""
    other = write_csv(results.parent / "other.csv", "scan_id,score,status", [[f"h{i}", i, "ok"] for i in range(4)])
    healthy = [[f"h{i}", 0, f"p{i}"] for i in range(4)]
    theirs = write_csv(results.parent / "theirs.csv", "scan_id,label,patient", healthy)
    here = [(scan, int(i < 3), f"p{3 + i}") for i, scan in enumerate("abcdef")]
    write_csv(results.parent / "labels.csv", "scan_id,label,patient", here)
    assert run(results, "--threshold-from", other, theirs) == (2, None)
    assert "1 of its scans are evaluated here too, or others of their patients (h3)" in capsys.readouterr().err


@pytest.mark.parametrize("failed, threshold", [("a", -5), ("d", 5)])
def test_failed_scans_are_called_wrongly_whatever_the_threshold(results, failed, threshold):
    """All that have a score lie above -5 and below 5: the other two of the class are called rightly."""
    write_csv(results / "scores.csv", "scan_id,score,status",
              [[n, s, "failed" if n == failed else "ok"] for n, s in zip("abcdef", SCORES)])
    figure = "sensitivity" if failed == "a" else "specificity"
    scan = run(results, "--missing", "worst", "--threshold", threshold)[1]["scan"]
    assert (scan["at_threshold"][figure]["hits"], scan["at_threshold"][figure]["of"]) == (2, 3)
    if failed == "a":                                                        # an Epidural, with b
        found = scan["categories"]["Epidural"]["sensitivity"]
        assert (found["hits"], found["of"]) == (1, 2)


def test_no_threshold_clears_healthy_scans_that_failed(results, capsys):
    other = write_csv(results.parent / "healthy.csv", "scan_id,score,status",
                      [[f"h{i}", i / 20, "failed" if i < 2 else "ok"] for i in range(20)])
    flags = ["--threshold-from", other, "--missing", "worst"]
    at = run(results, *flags, "--fpr", 0.2)[1]["scan"]["at_threshold"]
    assert at["threshold"] == 0.85                                           # above it 0.9, 0.95 and those that failed
    assert run(results, *flags, "--fpr", 0.09, out="none") == (2, None)
    assert "2 of 20 normal scans have no score" in capsys.readouterr().err


def test_the_level_of_the_intervals_is_told_in_full(results):
    for level, told in ((0.999, "99.9%"), (0.57, "57%")):
        assert run(results, "--level", level)[1]["table"]["columns"][3] == f"{told} interval"


def test_comparison_of_two_methods(results):
    other = write_csv(results.parent / "other.csv", "scan_id,score,status",
                      [[n, s, "ok"] for n, s in zip("abcdef", [1, 5, 2, 4, 3, 0])])
    report = run(results, "--compare", other)[1]
    assert report["comparison"]["auc"] == pytest.approx(5 / 9)
    assert 0 < report["comparison"]["delong_p"] < 1


def test_the_models_own_threshold_is_taken_from_run_json(results):
    run_json = results / "run.json"
    calibration = {"scans": 30, "threshold": {"fpr": 0.05, "max": 0.65, "mean": 0.1}}
    try:
        run_json.write_text(json.dumps({"calibration": calibration, "settings": {"scan_score": "max"}}))
        code, report = run(results)
        at = report["scan"]["at_threshold"]
        assert code == 0 and at["threshold"] == 0.65 and "model's own" in at["threshold_source"]
        assert "flagged" not in at["threshold_source"]                   # which these scores do not tell
        assert run(results, "--threshold", 0.7)[1]["scan"]["at_threshold"]["threshold"] == 0.7
        rows = [[n, s, "" if n in "bc" else int(s > 0.65), "ok"] for n, s in zip("abcdef", SCORES)]
        write_csv(results / "scores.csv", "scan_id,score,flagged,status", rows)
        assert "; 2 of these scans projector.py has not flagged or cleared by it" in (
            run(results)[1]["scan"]["at_threshold"]["threshold_source"])
        began = {"calibration": calibration, "settings": {"scan_score": "max"}, "seconds": None}
        run_json.write_text(json.dumps(began))                           # its scores are not there yet
        assert run(results)[1]["scan"]["at_threshold"]["sensitivity"] == NO_THRESHOLD
        run_json.write_text(json.dumps({"calibration": None, "settings": {"scan_score": "max"}}))
        assert run(results)[1]["scan"]["at_threshold"]["sensitivity"] == NO_THRESHOLD
    finally:
        run_json.unlink(missing_ok=True)


@pytest.mark.parametrize("extra", [["--slices", "x.csv"], ["--threshold", "1", "--threshold-from", "x.csv"],
                                   ["--prevalence", "1.5"], ["--where", "split"], ["--level", "95"],
                                   ["--threshold", "nan"], ["--slice-threshold", "inf"], ["--masks", "nowhere"]])
def test_wrong_usage_is_exit_2(results, extra):
    with pytest.raises(SystemExit) as stop:
        run(results, *extra)
    assert stop.value.code == 2


@pytest.mark.parametrize("content, message", [
    ("scan_id,label\na,0\n".encode("utf-16"), "UTF-8"), ("scan_id,label\nmü,1\n".encode("latin-1"), "UTF-8"),
    (b"scan_id;label\na;0\n", "found scan_id;label;"), (b"", "no header")])
def test_labels_that_are_no_csv_are_exit_2(results, capsys, content, message):
    (results.parent / "labels.csv").write_bytes(content)
    assert run(results)[0] == 2
    error = capsys.readouterr().err
    assert "labels.csv" in error and message in error


def test_a_file_in_place_of_the_out_folder_is_exit_2(results, capsys):
    (results.parent / "taken").write_text("x")
    assert run(results, out="taken/metrics")[0] == 2
    assert "taken" in capsys.readouterr().err


def test_a_damaged_truth_is_exit_2(results, capsys):
    display_to_nifti(np.zeros((3, 4, 5), np.uint8), results / "a" / "mask.nii.gz")
    display_to_nifti(np.zeros((3, 4, 5)), results / "a" / "anomaly.nii.gz")
    (results.parent / "masks").mkdir()
    (results.parent / "masks" / "a.nii.gz").write_bytes(b"no NIfTI")
    assert run(results, "--masks", results.parent / "masks")[0] == 2
    assert "a.nii.gz" in capsys.readouterr().err


def display_to_nifti(volume, path):
    """[S, H, W] with anterior and the patient's right first, as NIfTI stored left, posterior, inferior first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume.transpose(2, 1, 0)[::-1, ::-1], np.diag([2.0, 2, 5, 1])), path)


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
    (folder / "result.json").write_text(json.dumps({"key": {}, "scan": row, "slices": [], "seconds": {}}))
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


@pytest.mark.parametrize("command", [[], ["triage"]])
def test_a_seed_below_0_is_refused(results, command, capsys):
    """It was a traceback."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*command, "scores.csv", "labels.csv", "--out", str(results / "out"), "--seed", "-1"])
    assert stop.value.code == 2 and "argument --seed: must be at least 0, got -1" in capsys.readouterr().err


def test_triage_command(results):
    base = results.parent
    (base / "reading.txt").write_text("20\n25\n")
    command = ["triage", str(results / "scores.csv"), str(base / "labels.csv"), "--out", str(base / "triage")]
    assert evaluate.main([*command, "--repeats", "5", "--reading-times", str(base / "reading.txt")]) == 0
    report = json.loads((base / "triage" / "triage.json").read_text())
    assert report["load"]["latency_s"] == 10 and report["emergency"]["scans"] == 3
    assert "| emergency (3 scans) | by score |" in (base / "triage" / "triage.md").read_text()
    (base / "reading.txt").write_text("20\n-1\n")
    assert evaluate.main([*command, "--reading-times", str(base / "reading.txt")]) == 2
