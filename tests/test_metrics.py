"""Figures of scores and masks, by hand and by definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import beta, norm, t
from sklearn.metrics import average_precision_score

from evaluation import metrics
from evaluation.metrics import Undefined
from tests.evaluation_data import LABELS, SCORES


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


def test_a_scan_with_slices_of_both_classes_is_in_one_independent_pair():
    """Four such scans make two pairs without a scan in common."""
    found = metrics.delong_interval([0, 1] * 4, [0, 1] * 4, np.repeat(range(4), 2))
    assert found == pytest.approx((0.025 ** (1 / 2), 1))


def test_copies_of_a_unit_add_no_certainty_when_clustered():
    """Slices of a scan are not independent: four copies of each unit must not shrink the interval."""
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 15)
    scores = labels + rng.normal(0, 1, 30)
    copies, copied_labels, clusters = (np.repeat(v, 4) for v in (scores, labels, np.arange(30)))
    plain, clustered = metrics.delong_interval(scores, labels), metrics.delong_interval(copies, copied_labels, clusters)
    assert clustered[0] < plain[0] and clustered[1] > plain[1]
    assert np.ptp(logit(clustered)) / np.ptp(logit(plain)) == pytest.approx(t.ppf(0.975, 14) / norm.ppf(0.975))
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


def test_a_paired_test_of_a_few_patients_slices():
    """Fifteen slices of each of two abnormal patients and four normal: p was 2 norm.sf(z), here below 1e-6."""
    labels, clusters = np.repeat([1, 1, 0, 0, 0, 0], 15), np.repeat(np.arange(6), 15)
    a, b = np.repeat([9, 8, 4, 3, 2, 1], 15), np.repeat([3, 1, 5, 2, 4, 6], 15)
    # AUCs 1 and 1/8: b's v10 are 1/4 and 0, v01 are 0, 1/2, 0, 0: variance 2 (2/64) / 4 + 4/3 (3/64 + 9/64) / 16 = 1/32
    z = (1 - 1 / 8) / np.sqrt(1 / 32)
    assert metrics.delong_paired_test(a, b, labels, clusters) == pytest.approx(2 * t.sf(z, 1)) and 2 * t.sf(z, 1) > 0.05
    each = slice(None, None, 15)                                                 # and no t where they are independent
    assert metrics.delong_paired_test(a[each], b[each], labels[each], clusters[each]) == pytest.approx(2 * norm.sf(z))


def test_intervals_of_six_patients_slices_hold_the_auc():
    """Thirty each, correlated, nine abnormal in three patients: the normal quantile's hold it in 0.87 of cohorts."""
    rng, clusters = np.random.default_rng(5), np.repeat(np.arange(6), 30)
    labels = (np.arange(180) % 30 < 9) & (clusters < 3)
    shift, held = np.sqrt(2) * norm.ppf(0.9), 0
    for _ in range(200):
        scores = shift * labels + np.sqrt(0.5) * (rng.normal(size=6)[clusters] + rng.normal(size=180))
        low, high = metrics.delong_interval(scores, labels, clusters)
        held += low <= 0.9 <= high
    assert held >= 186


def test_an_interval_far_beyond_its_auc_is_a_number():
    """At a level of 99.99 % two patients' t is 6,366, and the end on the logit scale beyond what math.exp can take."""
    labels, clusters = np.repeat([1, 1, 0, 0], 10), np.repeat(np.arange(4), 10)
    scores = np.where(labels == 1, 1.0, 0.0)
    scores[0] = -1
    assert metrics.delong_interval(scores, labels, clusters, level=0.9999) == pytest.approx((0, 1))


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


def test_a_patient_with_one_abnormal_scan_is_resampled_with_the_abnormal():
    """Of patients A (one abnormal scan, one normal), B (abnormal), C and D (normal), two of A and B are drawn."""
    drawn = []

    def share(scores, labels):
        drawn.append(int(labels.sum()))
        return labels.mean()

    metrics.bootstrap_interval(share, np.arange(5), [1, 0, 1, 0, 0], clusters=list("AABCD"), repeats=100)
    assert drawn == [2] * 101                                                # the data themselves, and 100 resamples


@pytest.mark.parametrize("every, undefined", [(10, 20), (25, 8)])
def test_a_statistic_may_be_undefined_in_one_resample_of_twenty(every, undefined):
    calls = []

    def often(scores, labels):
        calls.append(None)                                                   # the first is of the data themselves
        if len(calls) % every == 0:
            raise Undefined("by chance")
        return scores.mean()

    if undefined > 10:
        with pytest.raises(Undefined, match=f"{undefined} of 200 resamples"):
            metrics.bootstrap_interval(often, SCORES, LABELS, repeats=200)
    else:
        low, high = metrics.bootstrap_interval(often, SCORES, LABELS, repeats=200)
        assert low < SCORES.mean() < high
    assert len(calls) == 201


def test_no_interval_where_a_class_is_one_patient():
    """Every resample held that one again: the interval was of the other class alone, and far too narrow."""
    scores, labels = np.array([3.0, 1, 2, 4, 5, 0]), np.array([1, 0, 0, 0, 0, 0])
    with pytest.raises(Undefined, match="only one independent unit is abnormal"):
        metrics.bootstrap_interval(metrics.auc, scores, labels, repeats=100)
    labels[3] = 1
    assert metrics.bootstrap_interval(metrics.auc, scores, labels, repeats=100)
    with pytest.raises(Undefined, match="only one independent unit is normal"):
        metrics.bootstrap_interval(metrics.auc, scores, labels, clusters=[0, 1, 1, 2, 1, 1], repeats=100)


def test_a_score_at_the_threshold_is_not_above_it():
    counts = metrics.confusion(np.array([0.5, 0.5, 0.6]), np.array([1, 0, 1]), 0.5)
    assert counts == {"tp": 1, "fp": 0, "tn": 1, "fn": 1}


def test_empirical_threshold_lets_through_no_more():
    normal = np.array([5.0, 1, 2, 3, 4])
    assert np.sum(normal > metrics.empirical_threshold(normal, 0.2)) == 1
    assert np.sum(normal > metrics.empirical_threshold(normal, 0.19)) == 0
    # 0.29 * 100 is 28.999999999999996 in floats: 71 to 99 may pass
    assert metrics.empirical_threshold(np.arange(100.0), 0.29) == 70
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


def test_shares_of_correlated_units_have_clopper_and_pearsons_interval():
    # 1 of 2: the chance of at least one is 1 - (1 - p)^2, and 0.025 where p is 1 - sqrt(0.975)
    assert metrics.proportion(60, 120, independent=2) == pytest.approx((0.5, 1 - 0.975**0.5, 0.975**0.5))
    assert metrics.proportion(40, 40, independent=4) == pytest.approx((1, 0.025**0.25, 1))
    assert metrics.proportion(0, 40, independent=4) == pytest.approx((0, 0, 1 - 0.025**0.25))
    assert metrics.proportion(30, 40, independent=2.5)[1:] == pytest.approx(
        (beta.ppf(0.025, 1.875, 1.625), beta.ppf(0.975, 2.875, 0.625)))


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
