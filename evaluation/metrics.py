"""Statistics of a detector: AUC and its intervals, average precision, figures at a threshold, Dice.

Pure functions on 1-D arrays: `scores` (higher is more abnormal) and `labels` (0 normal, 1 abnormal). A figure
that the data cannot give (one class only, nothing predicted) raises Undefined with the reason; nothing here
returns a number in its place.

Sources: DeLong, DeLong and Clarke-Pearson, Biometrics 44:837 (1988), computed from midranks as in Sun and Xu,
IEEE SPL 21:1389 (2014); for correlated units Obuchowski, Biometrics 53:567 (1997); logit scale as in Pepe,
'The Statistical Evaluation of Medical Tests' (2003), section 5.2; Wilson, JASA 22:209 (1927); Clopper and Pearson,
Biometrika 26:404 (1934), for correlated units as in Korn and Graubard, Survey Methodology 24:193 (1998).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping

import numpy as np
from scipy import special, stats
from sklearn.metrics import roc_curve

FEW = 50                 # of fewer patients of a class bootstrap_interval is too narrow


class Undefined(ValueError):
    """A figure that these data do not define; the message is the reason."""


def defined(function: Callable, *args, **kwargs):
    """The function's result, or 'undefined: <why>'."""
    try:
        return function(*args, **kwargs)
    except Undefined as reason:
        return f"undefined: {reason}"


# ----------------------------------------------------------------------------------------------------------
# Ranking: AUC, DeLong, average precision

def placements(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Placement values (v10 [M] of the abnormal, v01 [N] of the normal), ties counted half; both average to the AUC.

    v10 is, for each abnormal unit, the share of normals scored below it; v01 is, for each normal unit, the
    share of the abnormal scored above it. Raises Undefined with one class only.
    """
    scores, positive = np.asarray(scores, np.float64), _abnormal(labels)
    ranks = stats.rankdata(scores)
    v10 = (ranks[positive] - stats.rankdata(scores[positive])) / (~positive).sum()
    v01 = 1 - (ranks[~positive] - stats.rankdata(scores[~positive])) / positive.sum()
    return v10, v01


def _abnormal(labels: np.ndarray) -> np.ndarray:
    """Which units are abnormal, bool [n]. Raises Undefined with one class only."""
    positive = np.asarray(labels) == 1
    if positive.all() or not positive.any():
        raise Undefined(f"only one class ({positive.sum()} abnormal, {(~positive).sum()} normal)")
    return positive


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the Mann-Whitney chance that an abnormal unit scores above a normal one."""
    return float(placements(scores, labels)[0].mean())


def roc_points(scores: np.ndarray, labels: np.ndarray) -> list[tuple[float, float]]:
    """Points (1 - specificity, sensitivity) of the ROC curve from (0, 0) to (1, 1). Raises Undefined with one class."""
    x, y, _ = roc_curve(_abnormal(labels), scores)
    return list(zip(x.tolist(), y.tolist()))


def _delong_covariance(scores: list[np.ndarray], labels: np.ndarray,
                       clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs [K] of K scores on the same units, and their covariance [K, K] (Obuchowski 1997, equations 3 to 6).

    With every unit its own cluster this is DeLong's estimate exactly.
    """
    positive = np.asarray(labels) == 1
    v10, v01 = (np.stack(v) for v in zip(*(placements(s, labels) for s in scores)))
    areas = v10.mean(axis=1)
    m, n = v10.shape[1], v01.shape[1]
    _, index = np.unique(clusters, return_inverse=True)
    count = index.max() + 1
    i10, i01 = len(np.unique(index[positive])), len(np.unique(index[~positive]))
    if min(i10, i01) < 2:
        raise Undefined(f"needs two independent units of each class ({i10} abnormal, {i01} normal)")

    def by_cluster(deviation, members):                                      # (K, members) -> (K, clusters)
        return np.stack([np.bincount(index[members], weights=d, minlength=count) for d in deviation])

    d10, d01 = by_cluster(v10 - areas[:, None], positive), by_cluster(v01 - areas[:, None], ~positive)
    s10, s01 = i10 / (i10 - 1) * d10 @ d10.T, i01 / (i01 - 1) * d01 @ d01.T
    s11 = count / (count - 1) * d10 @ d01.T
    return areas, s10 / m**2 + s01 / n**2 + (s11 + s11.T) / (m * n)


def _of_standard_errors(labels: np.ndarray, clusters: np.ndarray):
    """The distribution (ppf, sf) of an AUC's error over its standard error, or of a difference of two.

    Normal where every unit is its own cluster, as DeLong has it. Elsewhere few clusters may tell the variance, however
    many units they hold: Student's t, whose degrees of freedom are one fewer than the clusters of the class that has
    fewer, the least that Welch's can be. For regressions t of clusters less one is usual (Cameron and Miller, Journal
    of Human Resources 50:317, 2015).
    """
    positive = np.asarray(labels) == 1
    if len(np.unique(clusters)) == len(positive):
        return stats.norm
    return stats.t(min(len(np.unique(clusters[positive])), len(np.unique(clusters[~positive]))) - 1)


def delong_interval(scores: np.ndarray, labels: np.ndarray, clusters: np.ndarray | None = None,
                    level: float = 0.95) -> tuple[float, float]:
    """Interval of the AUC from DeLong's variance on the logit scale, so that it stays within 0..1.

    clusters [n]: units with the same value belong together (slices of a scan, scans of a patient); the
    variance is then Obuchowski's, and the quantile Student's (_of_standard_errors), chosen by simulation. The normal
    one, which Obuchowski takes, is for many clusters: with slices of 6 or 10 patients 95 % intervals by it held the AUC
    in as few as 73 of 100 cohorts, by Student's in 93 or more. With 20 to 40 patients and an AUC near 1 these, too,
    still hold it in 90 to 92 alone, for its estimate is skewed there.

    An AUC of exactly 1 (or 0) has no DeLong variance: its lower (upper) bound is exact and conservative instead. k
    pairs without a cluster in common are independent and were all ranked right, which has the chance AUC^k, so the
    bound is ((1 - level) / 2)^(1/k), as Clopper and Pearson's for k right out of k. Raises Undefined with one class,
    with fewer than two independent units of a class, or with a variance of zero.
    """
    clusters = np.arange(len(scores)) if clusters is None else np.asarray(clusters)
    (area,), ((variance,),) = _delong_covariance([scores], labels, clusters)
    if area in (0.0, 1.0):
        bound = ((1 - level) / 2) ** (1 / _independent_pairs(labels, clusters))
        return (bound, 1.0) if area == 1 else (0.0, 1 - bound)
    if variance <= 1e-15:
        raise Undefined("the DeLong variance is zero (scores do not vary enough)")
    half = _of_standard_errors(labels, clusters).ppf((1 + level) / 2) * math.sqrt(variance) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    return tuple(float(special.expit(x)) for x in (logit - half, logit + half))


def _independent_pairs(labels: np.ndarray, clusters: np.ndarray) -> int:
    """How many (abnormal, normal) pairs can be formed at once with no cluster used twice."""
    positive = np.asarray(labels) == 1
    abnormal, normal = np.unique(clusters[positive]), np.unique(clusters[~positive])
    return min(len(abnormal), len(normal), len(np.union1d(abnormal, normal)) // 2)


def delong_paired_test(scores_a: np.ndarray, scores_b: np.ndarray, labels: np.ndarray,
                       clusters: np.ndarray | None = None) -> float:
    """Two-sided p of equal AUCs of two scores on the same units (DeLong 1988, equation 5 for two curves).

    clusters: as in delong_interval, with its variance and Student's t.
    """
    clusters = np.arange(len(labels)) if clusters is None else np.asarray(clusters)
    areas, covariance = _delong_covariance([scores_a, scores_b], labels, clusters)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if variance <= 1e-15:
        raise Undefined("the difference of the two AUCs has no variance")
    errors = abs(areas[0] - areas[1]) / math.sqrt(variance)
    return float(2 * _of_standard_errors(labels, clusters).sf(errors))


def holm(p: Mapping[Hashable, float | str]) -> dict[Hashable, float | str]:
    """The p-values of one family of tests, by name, corrected for their number (Holm, Scand. J. Statist. 6:65, 1979).

    An undefined one ('undefined: <why>') stays as it is and does not count.
    """
    ordered = sorted((name for name, value in p.items() if not isinstance(value, str)), key=p.get)
    found, largest = dict(p), 0.0
    for i, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - i) * p[name]))
        found[name] = largest
    return found


def average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the precision-recall steps, sum of (R_i - R_i-1) P_i over distinct scores (ties enter together).

    weights [n]: how many units stand behind each entry (one by default).
    """
    scores, positive = np.asarray(scores), np.asarray(labels) == 1
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    total = weights[positive].sum()
    if total == 0 or total == weights.sum():
        raise Undefined(f"only one class ({total:.0f} abnormal, {weights.sum() - total:.0f} normal)")
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum((weights * positive)[order])[last_of_tie]
    predicted = np.cumsum(weights[order])[last_of_tie]
    return float(np.sum(np.diff(hits, prepend=0) / total * hits / predicted))


def bootstrap_interval(statistic: Callable[[np.ndarray, np.ndarray], float], scores: np.ndarray,
                       labels: np.ndarray, clusters: np.ndarray | None = None, level: float = 0.95,
                       repeats: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of statistic(scores, labels) over resampled clusters (every unit its own by default).

    Clusters are drawn whole and with replacement, those with an abnormal unit apart from those without: with
    units as clusters this is resampling stratified by class. Raises Undefined when the statistic is
    undefined, is so in over 5 % of the resamples, or does not vary (an AUC of 1 stays 1 in every resample: no
    information, no interval), and when a class comes from one cluster alone, which no resample could replace.

    Too narrow where few clusters tell: resamples of few vary less than new ones would, and an average precision of few
    is too high on average. Simulated with as many patients of either class, alone or with ten slices each, AUC 0.7 to
    0.97, 95 % intervals of the average precision held it, where they were defined, on average (and at the least) in 68
    (51) of 100 cohorts with 2 patients of a class, 76 (67) with 3, 84 (74) with 5, 85 (80) with 10, 89 (84) with 20,
    92 (88) with FEW, 93 (92) with 100; of the AUC in 72 (51), 80 (67), 87 (76), 89 (81), 91 (85), 94 (90), 93 (92).
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    statistic(scores, labels)
    clusters = np.arange(len(scores)) if clusters is None else np.asarray(clusters)
    _, index = np.unique(clusters, return_inverse=True)
    for value, name in ((1, "abnormal"), (0, "normal")):
        if len(np.unique(index[labels == value])) == 1:
            raise Undefined(f"only one independent unit is {name}")
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    abnormal = [c for c in members if labels[c].any()]
    normal = [c for c in members if not labels[c].any()]
    rng, values = np.random.default_rng(seed), []
    for _ in range(repeats):
        chosen = np.concatenate([group[i] for group in (abnormal, normal) if group
                                 for i in rng.integers(len(group), size=len(group))])
        try:
            values.append(statistic(scores[chosen], labels[chosen]))
        except Undefined:
            continue
    if len(values) < 0.95 * repeats:
        raise Undefined(f"{repeats - len(values)} of {repeats} resamples hold one class only")
    if np.ptp(values) == 0:
        raise Undefined("every resample gives the same value")
    return tuple(float(v) for v in np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))


# ----------------------------------------------------------------------------------------------------------
# At a threshold

def empirical_threshold(normal_scores: np.ndarray, fpr: float) -> float:
    """The smallest threshold at which at most `fpr` of these normal scores are positive (score > threshold).

    It holds for these scans; new healthy ones pass it somewhat more often. The bound for those, which needs more
    scans, is detect.scores.threshold_at_fpr.
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"the false-positive rate must lie in [0, 1), got {fpr}")
    if len(normal_scores) == 0:
        raise Undefined("no normal scans to set the threshold on")
    allowed = math.floor(fpr * len(normal_scores) + 1e-9)
    return float(np.sort(normal_scores)[::-1][allowed])


def called(scores: np.ndarray, labels: np.ndarray, threshold: float, worst: np.ndarray | bool = False) -> np.ndarray:
    """Which units are called abnormal, bool [n]: those of score > threshold.

    worst: bool [n], units that count as called wrongly whatever the threshold is.
    """
    return np.where(worst, np.asarray(labels) != 1, np.asarray(scores) > threshold)


def confusion(scores: np.ndarray, labels: np.ndarray, threshold: float,
              worst: np.ndarray | bool = False) -> dict[str, int]:
    """Counts tp, fp, tn, fn of units that are called() abnormal or not."""
    positive, abnormal = np.asarray(labels) == 1, called(scores, labels, threshold, worst)
    return {"tp": int((abnormal & positive).sum()), "fp": int((abnormal & ~positive).sum()),
            "tn": int((~abnormal & ~positive).sum()), "fn": int((~abnormal & positive).sum())}


def proportion(hits: int, total: int, level: float = 0.95,
               independent: float | None = None) -> tuple[float, float, float]:
    """hits / total with an interval, Wilson's unless units are correlated: (value, low, high).

    independent: of correlated units, how many independent ones they are worth (independent_units); the interval is then
    Clopper's and Pearson's of so many, which need be no whole number. It is still short for a share near 0 or 1 that
    few clusters tell.
    Raises Undefined for total 0.
    """
    if total == 0:
        raise Undefined("0 of 0")
    share = hits / total
    if independent is not None:
        n, tail = independent, (1 - level) / 2
        low = stats.beta.ppf(tail, share * n, (1 - share) * n + 1) if hits > 0 else 0.0
        high = stats.beta.isf(tail, share * n + 1, (1 - share) * n) if hits < total else 1.0
        return share, float(low), float(high)
    n, z = total, stats.norm.ppf((1 + level) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return share, float(max(0.0, centre - half)), float(min(1.0, centre + half))


def independent_units(right: np.ndarray, clusters: np.ndarray, level: float = 0.95) -> float:
    """How many independent units n correlated ones are worth where their share of right ones is estimated, 1 to n.

    right: bool [n]; clusters [n], whose units hang together (slices of a scan, scans of a patient). n over the design
    effect: the variance of the share with clusters as units over that with units as such (Rao and Scott, Biometrics
    48:577, 1992), and fewer still for an interval of this level where few clusters tell it (Korn and Graubard, Survey
    Methodology 24:193, 1998). Where all are right, or none, it is the number of clusters. Not for n = 0.
    """
    right, (found, index) = np.asarray(right, float), np.unique(clusters, return_inverse=True)
    n, count, share = len(right), len(found), right.mean()
    if share in (0.0, 1.0) or count == 1:
        return float(count)
    residuals = np.bincount(index, weights=right - share)
    effect = count / (count - 1) * np.square(residuals).sum() / (n**2 * share * (1 - share) / (n - 1))
    few = stats.t.ppf((1 + level) / 2, n - 1) / stats.t.ppf((1 + level) / 2, count - 1)
    return float(max(1.0, n / max(1.0, effect) * few**2))


def ppv_at_prevalence(sensitivity: float, specificity: float, prevalence: float) -> float:
    """Chance that a called scan is abnormal where `prevalence` of scans are (Bayes)."""
    true, false = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    if true + false == 0:
        raise Undefined("nothing is called abnormal")
    return true / (true + false)


# ----------------------------------------------------------------------------------------------------------
# Masks

def dice(truth: np.ndarray, predicted: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two bool arrays of one shape. Raises Undefined when both are empty."""
    total = int(truth.sum()) + int(predicted.sum())
    if total == 0:
        raise Undefined("truth and prediction are both empty")
    return 2 * int((truth & predicted).sum()) / total


class PixelTally:
    """Masks of scans, added one at a time so that only one volume is held.

    dice_by_scan  Dice of each scan whose truth is not empty
    """

    def __init__(self):
        self.dice_by_scan: dict[str, float] = {}
        self._intersection = self._total = 0
        self._values, self._truths, self._counts = [], [], []

    def add(self, scan_id: str, truth: np.ndarray, predicted: np.ndarray, anomaly: np.ndarray) -> None:
        """truth, predicted bool [S, H, W]; anomaly [S, H, W]: the further from 0, the more abnormal, hyperdense
        above it and hypodense below.
        """
        if truth.any():
            self.dice_by_scan[scan_id] = dice(truth, predicted)
        self._intersection += int((truth & predicted).sum())
        self._total += int(truth.sum()) + int(predicted.sum())
        for value in (False, True):                       # equal pixels counted together: less to sort
            level, count = np.unique(np.abs(anomaly[truth == value]), return_counts=True)
            self._values.append(level)
            self._counts.append(count)
            self._truths.append(np.full(len(level), value))

    def pooled_dice(self) -> float:
        """Dice of all scans as if they were one. Raises Undefined when all masks are empty."""
        if self._total == 0:
            raise Undefined("all masks are empty")
        return 2 * self._intersection / self._total

    def average_precision(self) -> float:
        """Of the pixels of all scans. Raises Undefined without a scan or with one class only."""
        if not self._values:
            raise Undefined("no maps with a truth")
        return average_precision(*(np.concatenate(v) for v in (self._values, self._truths, self._counts)))
