"""How rare the residual is at its place among healthy scans (normative.py): the measure of the shipped models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from config import check_choices, check_range, option
from detect import normative
from detect.reconstruct import Reconstruction, Watch
from detect.residual import (
    PAPER_SIZE,
    Evidence,
    Findings,
    MaskSettings,
    Measure,
    check_same_shape,
    filtered,
    lesion_mask,
    residual,
    scale_median_size,
    to_half_contrast,
)
from detect.scores import SLICE_MM
from op.banded import gaussian_blur

PEAK_AT_512 = 12.0              # standard deviation of the Gaussian of the slice score 'peak', pixels at 512
POOL_MM = 15.0                  # what 'peak' takes a mean over along the body axis: 3 slices of 5 mm


@dataclass(frozen=True)
class SurpriseSettings:
    """All that a score by surprise depends on. The defaults are those that did best on real scans (docs/RESULTS.md)."""

    median_at_512: int = option(19, "side of the residual's median filter, pixels at 512; scales with the frame")
    filter: str = option("hyperdense", "fine scale: the median-filtered residual, a band of it away from bone, or of "
                                       "that band what is hyperdense", normative.FILTERS)
    scale: str = option("sides", "sides: what is hyperdense by the fine scale, what is hypodense by the coarse one; "
                                "both: the more surprising of the two scales", normative.COMBINED)
    hypodense: float = option(0.6, "weight of the surprise of what is hypodense in scale=sides")
    pool: str = option("peak", "a slice's score: mean over the brain (area), or highest mean about any place (peak)")
    surprise_above: float = option(2.0, "surprise (-log10 of the share of healthy brain) that a score counts from")
    read: float = option(0.6, "weight, 0 to 1, of the surprise of the reader's output where the model holds a reader; "
                              "the residual has the rest")

    def __post_init__(self):
        check_range(self, ("median_at_512",), 1, flags=False)
        check_range(self, ("hypodense", "surprise_above"), 0, flags=False)
        check_range(self, ("read",), 0, 1, flags=False)
        check_choices(self)
        if self.pool not in SLICE_SCORES:
            raise ValueError(f"pool must be one of {', '.join(SLICE_SCORES)}, got {self.pool!r}")
        if self.filter == "hyperdense" and self.scale != "sides":
            raise ValueError(f"filter hyperdense: needs scale sides, got {self.scale!r}: at its fine scale nothing is "
                             "hypodense")


def before_surprise(settings: Any) -> dict[str, Any]:
    """Of a measure's settings those that the judged residuals hang on, by name; none of another measure's.

    The others act on the surprise, or on the mask alone, as the median filter does in all but 'median'.
    """
    if not isinstance(settings, SurpriseSettings):
        return {}
    names = ("filter", "median_at_512") if settings.filter == "median" else ("filter",)
    return {name: getattr(settings, name) for name in names}


class Surprise(Measure):
    """How rare the residual is at its place among healthy scans (normative.py)."""

    name: ClassVar[str] = "surprise"
    Settings: ClassVar[type] = SurpriseSettings
    marked: ClassVar[str] = "rare in healthy scans"
    in_hu: ClassVar[bool] = False
    least_patients: ClassVar[int] = normative.MIN_SCANS

    @property
    def words(self) -> str:
        return ("how far the scan differs from its closest normal beyond what healthy scans do at the same place, in "
                f"powers of ten of rarity {SLICE_SCORES[self.settings.pool].words}")

    def criterion(self) -> str:
        s, above = self.settings, self.mask.surprise_mask
        weight = s.hypodense if s.scale == "sides" else 1.0
        further = ", and what adjoins it with at least half of that difference" if self.mask.extent_hu else ""
        differs, less_dense = "differs", ""
        if weight * normative.HIGHEST <= above:                   # no hypodense surprise comes to so much
            differs = "is denser"
        elif weight != 1:
            less_dense = f" if denser, more than {_of_places(above / weight)} if less dense"
        return (f"Marked is what {differs} by more than {_of_places(above)} places of healthy brain at that "
                f"position{less_dense}{further}.")

    def check(self) -> None:
        """ValueError besides where the statistics are of residuals by other settings: of ours they tell nothing."""
        super().check()
        ours, theirs = (before_surprise(one) for one in (self.settings, self.normal.of))
        if ours != theirs:
            asked, known = (" ".join(f"{name}={value}" for name, value in one.items()) for one in (ours, theirs))
            raise ValueError(f"measure {self.name}: this model's statistics of healthy residuals are of "
                             f"{known or 'settings that it does not tell'}, not of {asked}; leave that as the model "
                             f"has it, calibrate it anew (latent_stats.py --encoder MODEL --set {asked}), or choose "
                             "another measure (--set measure=)")

    def evidence(self, found: Reconstruction, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                 watch: Watch | None = None) -> Evidence:
        """watch is of no use: only the last reconstruction counts."""
        away, difference = filtered(found, brain, self.settings.median_at_512), found.difference_hu
        mm = np.asarray(below_vertex_mm)
        if self.settings.filter == "median":
            judged = away
            if found.expected_hu is not None:
                window = scale_median_size(brain.shape[-1], self.settings.median_at_512)
                judged = residual(found.query_hu, found.expected_hu, brain, window)
            searched, scales = brain, normative.scales(difference, judged, brain)
        else:
            searched = normative.soft_brain(found.query_hu, brain)
            scales = normative.band_scales(difference, searched, self.settings.filter == "hyperdense")
        if found.read is not None:
            scales = torch.cat([scales, found.read * searched[:, None]], dim=1)
        return Evidence(away, brain, mm, searched, scales)

    def fit(self, healthy: Sequence[Evidence], patients: Sequence[str] | None = None
            ) -> tuple[Surprise, list[Findings]]:
        """With the statistics of all, and the findings in each scan by those of the other patients."""
        normal, surprises = normative.fit_normal([e.scales for e in healthy], [e.searched for e in healthy],
                                                 [e.below_vertex_mm for e in healthy], patients)
        fitted = Surprise(self.settings, self.mask, replace(normal, of=self.settings))
        return fitted, [self.findings(surprise, e) for surprise, e in zip(surprises, healthy)]

    def assess(self, evidence: Evidence) -> Findings:
        self.check()
        surprise = self.normal.surprise(evidence.scales, evidence.searched, evidence.below_vertex_mm)
        return self.findings(surprise, evidence)

    def predicted(self, found: Findings, mask: MaskSettings) -> torch.Tensor:
        return found.anomaly.abs() > mask.surprise_mask

    def findings(self, surprise: torch.Tensor, evidence: Evidence) -> Findings:
        """Findings of signed surprises [S, K, N, N] of normative.Normal."""
        s, kinds = self.settings, len(normative.SCALES)
        if surprise.shape[1] > kinds:
            surprise = torch.lerp(surprise[:, :kinds], surprise[:, kinds:], s.read)
        combined = normative.combine(surprise, s.scale, s.hypodense)
        predicted = combined.abs() > self.mask.surprise_mask
        scores = SLICE_SCORES[s.pool].of(combined, evidence.searched, s.surprise_above, evidence.below_vertex_mm)
        mask = lesion_mask(predicted, self.mask.component_at_512)
        if self.mask.extent_hu:
            mask = to_half_contrast(mask, evidence.residual, self.mask.extent_hu)
        return Findings(combined, predicted, mask, scores)


def _of_places(surprise: float) -> str:
    """'315 of 316': one place in 316 of healthy brain is as surprising."""
    places = round(10 ** surprise)
    return f"{places - 1:,} of {places:,}"


# --- scores of slices ---


def surprise_scores(surprise: torch.Tensor, brain: torch.Tensor, above: float) -> torch.Tensor:
    """Mean over the brain of how far the surprise goes beyond `above`, for each slice; 0 without brain. [S]

    surprise [S, H, W], signed (normative.py); brain bool [S, H, W]. What is no rarer than 10^-above counts nothing.
    """
    check_same_shape(surprise=surprise, brain=brain)
    beyond = ((surprise.abs() - above).clamp(min=0) * brain).sum((1, 2), dtype=torch.float64)
    return (beyond / brain.sum((1, 2)).clamp(min=1)).to(surprise.dtype)


def peak_scores(surprise: torch.Tensor, brain: torch.Tensor, above: float, sigma: float,
                positions_mm: Sequence[float] | None = None) -> torch.Tensor:
    """Highest mean of how far the surprise goes beyond `above`, to one side, about any pixel of a slice. [S]

    surprise [S, H, W], signed (normative.py); brain bool [S, H, W]. The mean is over a Gaussian of standard deviation
    sigma pixels in the plane and over POOL_MM along the body axis. A lesion is in one place; what is unusual in a
    healthy head is scattered, and a sum over the brain counts it all. positions_mm [S], as of pool_along_axis.
    """
    check_same_shape(surprise=surprise, brain=brain)
    highest = []
    for side in (surprise, -surprise):
        near = gaussian_blur((side - above).clamp(min=0) * brain, sigma)
        highest.append(pool_along_axis(near, positions_mm).amax((1, 2)))
    return torch.maximum(*highest)


def pool_along_axis(maps: torch.Tensor, positions_mm: Sequence[float] | None = None) -> torch.Tensor:
    """Mean of maps [S, H, W] over POOL_MM along the body axis about each slice, [S, H, W].

    A slice stands for the space up to half-way to its neighbours, over gaps, too; the first and the last one for what
    lies beyond, too. So at 5 mm it is the mean of the slice and its two neighbours. positions_mm [S], monotonic;
    without them slices are SLICE_MM apart.
    """
    mm = SLICE_MM * torch.arange(len(maps), dtype=torch.float64) if positions_mm is None else torch.as_tensor(
        np.ascontiguousarray(positions_mm), dtype=torch.float64)
    steps = mm.diff()
    if not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError("pool_along_axis: positions_mm must run steadily up or down; sort the slices by position")
    if (steps < 0).any():
        mm = -mm
    between, beyond = (mm[1:] + mm[:-1]) / 2, torch.tensor([torch.inf], dtype=torch.float64)
    low, high = torch.cat([-beyond, between]), torch.cat([between, beyond])
    start, end = mm[:, None] - POOL_MM / 2, mm[:, None] + POOL_MM / 2
    share = (torch.minimum(high, end) - torch.maximum(low, start)).clamp(min=0) / POOL_MM            # [S, S]
    return torch.einsum("st,thw->shw", share.to(maps), maps)


@dataclass(frozen=True)
class SliceScore:
    """A way to score slices by their surprise: of(surprise, searched [S, N, N], above, positions_mm) -> [S]."""

    of: Callable[[torch.Tensor, torch.Tensor, float, np.ndarray], torch.Tensor]
    words: str


def _peak(surprise: torch.Tensor, searched: torch.Tensor, above: float, positions_mm: np.ndarray) -> torch.Tensor:
    return peak_scores(surprise, searched, above, PEAK_AT_512 * surprise.shape[-1] / PAPER_SIZE, positions_mm)


SLICE_SCORES = {
    "area": SliceScore(lambda surprise, brain, above, _: surprise_scores(surprise, brain, above), "over the brain"),
    "peak": SliceScore(_peak, "where it is rarest"),
}
