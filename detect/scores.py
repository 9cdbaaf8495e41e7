"""Scores of scans, and what they are worth: from slices to a scan, percentile and threshold among healthy scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ct.slab import slice_thickness_mm

SLICE_MM = 5.0                  # what slices are apart where nobody says
TOP_MM = 15.0                   # of the highest slices, what the scan score 'top3' takes a mean over
KEY_SLICES = 3                  # of a scan, that a reader is shown first
KEY_APART_MM = 4.0              # neighbours of a thin-slice series show the same
POSITION_ERROR_MM = 0.01        # of numbers with 16 characters at most


def thickness_mm(positions_mm: Sequence[float]) -> np.ndarray:
    """How much of the body axis each slice stands for, mm [S]; SLICE_MM for a single slice.

    Across gaps: a slice beside one is all that a score has to tell what lies there.
    """
    if len(positions_mm) < 2:
        return np.full(len(positions_mm), SLICE_MM)
    return slice_thickness_mm(np.asarray(positions_mm, dtype=float), across_gaps=True)


@dataclass(frozen=True)
class ScanScore:
    """A way to make a scan's score from those of its slices: of(scores [S], thickness_mm [S]) -> [].

    words: to follow 'the score is ...,'.
    """

    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    words: str


def _mean(scores: torch.Tensor, thickness: torch.Tensor) -> torch.Tensor:
    return (scores * thickness).sum() / thickness.sum()


def _mean_of_highest(scores: torch.Tensor, thickness: torch.Tensor) -> torch.Tensor:
    """Of the highest slices that make up TOP_MM."""
    scores, order = scores.sort(descending=True)
    thickness = thickness[order]
    before = thickness.cumsum(0) - thickness
    return _mean(scores, torch.minimum(thickness, (TOP_MM - before).clamp(min=0)))


SCAN_SCORES = {
    "max": ScanScore(lambda scores, thickness: scores.max(), "of its highest slice"),
    "top3": ScanScore(_mean_of_highest, f"mean of its highest slices, {TOP_MM:g} mm of them"),
    "mean": ScanScore(_mean, "mean of its slices"),
}


def scan_score(scores: torch.Tensor, how: str, thickness_mm: Sequence[float] | None = None) -> float:
    """One number for a scan from its slice scores [S], by one of SCAN_SCORES.

    thickness_mm [S]: what each slice stands for; None: SLICE_MM each, so that 'top3' is the mean of the three highest.
    With less than that 'top3' is the mean of all. Raises ValueError when there is none or a score isn't finite.
    """
    if how not in SCAN_SCORES:
        raise ValueError(f"scan_score: how must be one of {', '.join(SCAN_SCORES)}, got {how!r}")
    if scores.numel() == 0:
        raise ValueError("scan_score: no slices, so the scan has no score; is the brain mask empty?")
    if not torch.isfinite(scores).all():
        raise ValueError("scan_score: slice scores must be finite")
    thickness = torch.full(scores.shape, SLICE_MM) if thickness_mm is None else torch.as_tensor(
        np.asarray(thickness_mm))
    return SCAN_SCORES[how].of(scores.double(), thickness.double()).item()


def choose_key_slices(positions_mm: Sequence[float]) -> list[int]:
    """Of slices at these positions, the most important first, the first KEY_SLICES that lie KEY_APART_MM apart.

    Gives their places in the sequence.
    """
    chosen: list[int] = []
    for place, mm in enumerate(positions_mm):
        if all(abs(mm - positions_mm[other]) > KEY_APART_MM - POSITION_ERROR_MM for other in chosen):
            chosen.append(place)
    return chosen[:KEY_SLICES]


# --- calibration on healthy scans ---


def rounded_up(rate: float) -> float:
    """A rate, above 0, to three digits and never below itself: what is said of it at most, or at least, holds."""
    step = 10.0 ** (math.floor(math.log10(rate)) - 2)
    return math.ceil(rate / step - 1e-9) * step                      # 1e-9 for 0.05, which is 500.00000000000006 steps


def rounded_down(percentile: float) -> float:
    """A percentile as people are shown it, to one digit and never above itself: of 250 healthy scans, 99.602 at most,
    none makes it 100."""
    return math.floor(10 * percentile + 1e-9) / 10                   # 1e-9: ten times 64.1 is 640.9999999999999


def percentile_of(score: float, healthy_scores: Sequence[float]) -> float:
    """Percentile of a score among n healthy ones, each of another patient, 0 to 100 n / (n + 1).

    100 * (healthy scores below it) / (n + 1), which is 100 * (1 - p) for the conformal p-value (1 + healthy scores
    at or above it) / (n + 1): with n healthy scans no scan can be called rarer than one in n + 1.
    """
    healthy = _sorted_healthy(healthy_scores)
    return float(100 * np.searchsorted(healthy, score) / (len(healthy) + 1))


def least_healthy(fpr: float) -> int:
    """How many healthy scans, each of another patient, a false-positive rate needs at least."""
    return math.ceil(1 / fpr - 1 - 1e-9)


def threshold_at_fpr(healthy_scores: Sequence[float], fpr: float) -> float:
    """The threshold that a healthy scan exceeds with a probability of at most fpr, from those of n patients [n].

    The ceil((n + 1)(1 - fpr))-th smallest of them. For a new healthy scan exchangeable with these, the probability of
    `score > threshold` is at most fpr whatever the distribution (split conformal prediction, Vovk et al. 2005); the
    plain quantile would be exceeded more often than that. Raises ValueError when n is under 1 / fpr - 1.
    """
    healthy = _sorted_healthy(healthy_scores)
    if not 0 < fpr < 1:
        raise ValueError(f"a false-positive rate must lie between 0 and 1, got {fpr}")
    may_exceed = math.floor((len(healthy) + 1) * fpr + 1e-9)  # of n + 1 scans; 1e-9 for 20 * 0.05 just under 1
    if may_exceed == 0:
        raise ValueError(f"a false-positive rate of {fpr} needs {least_healthy(fpr)} "
                         f"healthy scans, found {len(healthy)}; add scans or allow a higher rate")
    return float(healthy[-min(may_exceed, len(healthy))])     # all n + 1 at a rate just under 1


def _sorted_healthy(healthy_scores: Sequence[float]) -> np.ndarray:
    healthy = np.sort(np.asarray(healthy_scores, np.float64))
    if len(healthy) == 0 or not np.isfinite(healthy).all():
        raise ValueError(f"calibration needs finite scores of healthy scans, got {healthy.tolist()}")
    return healthy
