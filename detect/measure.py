"""How unusual a scan is beside its closest normal: votes (Lee et al. 2022) or surprise, maps, masks and scores.

Votes and Surprise are the two measures, with the same methods: watch a reconstruction, take the evidence, be fitted
to healthy scans, assess. Below them are pure functions, tensors in and tensors out. A tensor [S, H, W] is always a
whole scan: neighbouring slices count, so nothing here may be called on a part of one. Residuals are in HU, query minus
reconstruction: positive where the scan is denser than its closest normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage

from config import option
from detect import normative
from detect.normative import Normal
from detect.reconstruct import Reconstruction
from op.banded import gaussian_blur
from op.median import median2d

VERSION = 1                     # of everything here that a score hangs on: calibrations of another are not comparable
PAPER_SIZE = 512                # the frame, in pixels, that the paper's pixel counts refer to
PEAK_AT_512 = 12.0              # standard deviation of the Gaussian of the slice score 'peak', pixels at 512
SLICE_MM = 5.0                  # what slices are apart where nobody says
POOL_MM = 15.0                  # what the slice score 'peak' takes a mean over along the body axis: 3 slices of 5 mm
TOP_MM = 15.0                   # and the scan score 'top3'


# --- settings ---


def _check_range(settings, names: Sequence[str]) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) < float("inf"):
            raise ValueError(f"{name} must be at least 0, got {getattr(settings, name):g}")


def _check_median(settings) -> None:
    if settings.median_at_512 < 1:
        raise ValueError(f"median_at_512 must be at least 1, got {settings.median_at_512}")


@dataclass(frozen=True)
class VotesSettings:
    """What a score by votes hangs on. The values are the paper's."""

    median_at_512: int = option(19, "side of the residual's median filter, pixels at 512; scales with the frame")
    threshold_hu: float = option(5.0, "a pixel votes when its filtered residual exceeds this, HU")
    max_gap_mm: float = option(7.5, "slices further apart than this, mm, and than 1.5 times the scan's usual spacing "
                                    "are no neighbours")

    def __post_init__(self):
        _check_median(self)
        _check_range(self, ("threshold_hu", "max_gap_mm"))


@dataclass(frozen=True)
class SurpriseSettings:
    """What a score by surprise hangs on. The defaults are what the benchmarks on real scans recommend."""

    median_at_512: int = option(19, "side of the residual's median filter, pixels at 512; scales with the frame")
    filter: str = option("hyperdense", "fine scale: the median-filtered residual, a band of it away from bone, or of "
                                       "that band what is hyperdense", normative.FILTERS)
    scale: str = option("sides", "scale of the residual; sides: hyperdense at the fine scale, hypodense at the coarse "
                                "one", normative.COMBINED)
    hypodense: float = option(0.6, "weight of the surprise of what is hypodense in scale=sides")
    pool: str = option("peak", "a slice's score: mean over the brain (area), or highest mean about any place (peak)")
    surprise_above: float = option(2.0, "surprise (-log10 of the share of healthy brain) that a score counts from")

    def __post_init__(self):
        _check_median(self)
        _check_range(self, ("hypodense", "surprise_above"))
        for name, allowed in (("filter", normative.FILTERS), ("scale", normative.COMBINED), ("pool", SLICE_SCORES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.filter == "hyperdense" and self.scale not in ("sides", "coarse"):
            raise ValueError(f"filter hyperdense: needs scale sides or coarse, got {self.scale!r}: at its fine scale "
                             "nothing is hypodense")


@dataclass(frozen=True)
class MaskSettings:
    """What only draws the mask: scores, percentiles and flags do not hang on it."""

    surprise_mask: float = option(3.0, "surprise from which a pixel is predicted anomalous (by surprise)")
    component_at_512: int = option(600, "smaller predicted components are dropped, pixels at 512; scales with area")

    def __post_init__(self):
        _check_range(self, ("surprise_mask", "component_at_512"))


# --- the two measures ---


@dataclass(frozen=True)
class Evidence:
    """What a measure needs to know of a scan, on the CPU; S slices.

    residual  float32 [S, N, N], HU: query minus closest normal in the brain, median-filtered, signed
    brain     bool [S, N, N]; below_vertex_mm float64 [S]
    scales    float32 [S, 2, N, N], HU: the residual at the scales of normative.py; None by votes
    searched  bool [S, N, N]: the part of the brain in which surprises are looked for; the brain by votes
    votes     int32 [S, N, N] over `steps` steps, two a step at most; None by surprise
    """

    residual: torch.Tensor
    brain: torch.Tensor
    below_vertex_mm: np.ndarray
    searched: torch.Tensor
    scales: torch.Tensor | None = None
    votes: torch.Tensor | None = None
    steps: int = 0


@dataclass(frozen=True)
class Findings:
    """What a measure makes of a scan; S slices.

    anomaly       float32 [S, N, N], signed: votes times residual (HU), or surprise
    predicted     bool [S, N, N]: what is predicted anomalous
    mask          bool [S, N, N]: predicted without small components
    slice_scores  float32 [S]
    """

    anomaly: torch.Tensor
    predicted: torch.Tensor
    mask: torch.Tensor
    slice_scores: torch.Tensor


class Votes:
    """The published measure: at every step of a reconstruction pixels vote that stay away from it.

    A method without steps casts its votes once, of its one result.
    """

    name: ClassVar[str] = "votes"
    Settings: ClassVar[type] = VotesSettings
    words: ClassVar[str] = ("how much, and how steadily, the scan differs from its closest normal, in HU over the "
                            "brain")
    marked: ClassVar[str] = "differs steadily"

    def __init__(self, settings: VotesSettings | None = None, mask: MaskSettings | None = None,
                 normal: Normal | None = None):
        self.settings, self.mask, self.normal = settings or VotesSettings(), mask or MaskSettings(), normal

    def criterion(self) -> str:
        """When a pixel is marked, to follow 'where the two differ inside the brain,'."""
        return f"by more than {self.settings.threshold_hu:g} HU, steadily during the search and in neighbouring slices"

    def check(self) -> None:
        """ValueError unless scans can be assessed: always possible by votes."""

    def watch(self, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> VoteWatch:
        """What counts the votes while a scan is reconstructed; brain bool [S, N, N]."""
        return VoteWatch(brain, below_vertex_mm, self.settings)

    def evidence(self, found: Reconstruction, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                 watch: VoteWatch) -> Evidence:
        filtered = _filtered(found, brain, self.settings.median_at_512)
        return Evidence(filtered, brain, np.asarray(below_vertex_mm), brain, votes=watch.counter.votes.cpu(),
                        steps=watch.counter.steps)

    def fit(self, healthy: Sequence[Evidence]) -> tuple[Votes, list[Findings]]:
        """The measure that healthy scans make, and what it finds in each of them: votes have nothing to learn."""
        return self, [self.assess(one) for one in healthy]

    def assess(self, seen: Evidence) -> Findings:
        predicted = seen.votes > seen.steps
        scores = slice_scores(seen.votes, seen.steps, seen.residual.abs(), seen.brain)
        return Findings(anomaly_map(seen.votes, seen.residual, seen.steps), predicted,
                        lesion_mask(predicted, predicted.shape[-1], self.mask.component_at_512), scores)


class Surprise:
    """How rare the residual is at its place among healthy scans (normative.py)."""

    name: ClassVar[str] = "surprise"
    Settings: ClassVar[type] = SurpriseSettings
    marked: ClassVar[str] = "rare in healthy scans"

    def __init__(self, settings: SurpriseSettings | None = None, mask: MaskSettings | None = None,
                 normal: Normal | None = None):
        self.settings, self.mask, self.normal = settings or SurpriseSettings(), mask or MaskSettings(), normal

    @property
    def words(self) -> str:
        return ("how far the scan differs from its closest normal beyond what healthy scans do at the same place, in "
                f"powers of ten of rarity {SLICE_SCORES[self.settings.pool].words}")

    def criterion(self) -> str:
        """When a pixel is marked, to follow 'where the two differ inside the brain,'."""
        return (f"by more than all but one in {10 ** self.mask.surprise_mask:,.0f} places of healthy brain do, for "
                "where it lies")

    def check(self) -> None:
        """ValueError unless scans can be judged."""
        if self.normal is None:
            raise ValueError("measure surprise: this model holds no statistics of healthy residuals; make it anew with "
                             f"latent_stats.py and at least {normative.MIN_SCANS} held-out scans, or use "
                             "--set measure=votes")

    def watch(self, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> None:
        """Only the last reconstruction counts."""

    def evidence(self, found: Reconstruction, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                 watch: None = None) -> Evidence:
        filtered, difference = _filtered(found, brain, self.settings.median_at_512), found.difference_hu
        mm = np.asarray(below_vertex_mm)
        if self.settings.filter == "median":
            judged = filtered
            if found.expected_hu is not None:
                window = scale_median_size(brain.shape[-1], self.settings.median_at_512)
                judged = residual(found.query_hu, found.expected_hu, brain, window)
            return Evidence(filtered, brain, mm, brain, normative.scales(difference, judged, brain))
        soft = normative.soft_brain(found.query_hu, brain)
        scales = normative.band_scales(difference, soft, self.settings.filter == "hyperdense")
        return Evidence(filtered, brain, mm, soft, scales)

    def fit(self, healthy: Sequence[Evidence]) -> tuple[Surprise, list[Findings]]:
        """The measure that healthy scans make, and what is found in each by the statistics of the others.

        Raises ValueError for fewer than normative.MIN_SCANS of them.
        """
        normal, surprises = normative.fit_normal([e.scales for e in healthy], [e.searched for e in healthy],
                                                 [e.below_vertex_mm for e in healthy])
        fitted = Surprise(self.settings, self.mask, normal)
        return fitted, [self.findings(surprise, e) for surprise, e in zip(surprises, healthy)]

    def assess(self, seen: Evidence) -> Findings:
        self.check()
        return self.findings(self.normal.surprise(seen.scales, seen.searched, seen.below_vertex_mm), seen)

    def findings(self, surprise: torch.Tensor, seen: Evidence) -> Findings:
        """What signed surprises [S, 2, N, N] of normative.Normal amount to."""
        s = self.settings
        combined = normative.combine(surprise, s.scale, s.hypodense)
        predicted = combined.abs() > self.mask.surprise_mask
        scores = SLICE_SCORES[s.pool].of(combined, seen.searched, s.surprise_above, seen.below_vertex_mm)
        return Findings(combined, predicted, lesion_mask(predicted, predicted.shape[-1], self.mask.component_at_512),
                        scores)


Measure = Votes | Surprise
MEASURES: dict[str, type[Measure]] = {cls.name: cls for cls in (Votes, Surprise)}


def _filtered(found: Reconstruction, brain: torch.Tensor, median_at_512: int) -> torch.Tensor:
    return residual(found.query_hu, found.normal_hu, brain, scale_median_size(brain.shape[-1], median_at_512))


# --- residual ---


def scale_median_size(frame_size: int, size_at_512: int = 19) -> int:
    """Side of the median window in a frame of frame_size pixels: the nearest odd number, at least 3.

    It covers the same part of the head as size_at_512 does at 512: 19 at 512, 9 at 256, 5 at 128, 3 at 64.
    """
    return max(3, 2 * math.floor(size_at_512 * frame_size / PAPER_SIZE / 2) + 1)


def residual(query_hu: torch.Tensor, recon_hu: torch.Tensor, brain: torch.Tensor, median_size: int) -> torch.Tensor:
    """median((query - reconstruction) * brain) * brain, signed, HU, [S, H, W].

    query_hu, recon_hu float [S, H, W] in HU; brain bool [S, H, W]; median_size odd, in pixels. The median commutes
    with the sign, so the paper's residual is `.abs()` of this; it is positive where hyperdense.
    """
    _check_same_shape(query_hu=query_hu, recon_hu=recon_hu, brain=brain)
    return median2d((query_hu - recon_hu) * brain, median_size) * brain


# --- votes ---


def frame_votes(residual_abs: torch.Tensor, threshold_hu: float = 5.0, positions_mm: Sequence[float] | None = None,
                max_gap_mm: float = 7.5) -> torch.Tensor:
    """The votes of one step, 0, 1 or 2 for each pixel, uint8 [S, H, W].

    One where the residual (absolute, HU, [S, H, W]) exceeds threshold_hu, and one more where at least two of {slice
    above, this slice, slice below} exceed it there; the slice itself need not be one of the two. What lies beyond
    the ends of the scan doesn't vote.

    positions_mm [S], monotonic: neighbours further apart than max_gap_mm don't count as such (a missing slice in a
    series 5 mm apart). Without positions every neighbour counts.
    """
    if residual_abs.ndim != 3:
        raise ValueError(f"frame_votes: expected a whole scan [S, H, W], got {tuple(residual_abs.shape)}")
    exceeds = (residual_abs > threshold_hu).to(torch.uint8)
    linked = _linked(len(exceeds), positions_mm, max_gap_mm).to(exceeds)[:, None, None]
    supporters = exceeds.clone()
    supporters[:-1] += exceeds[1:] * linked
    supporters[1:] += exceeds[:-1] * linked
    return exceeds + (supporters >= 2)


def _linked(slices: int, positions_mm: Sequence[float] | None, max_gap_mm: float) -> torch.Tensor:
    """Whether slice i and i + 1 are neighbours, bool [S - 1]."""
    if positions_mm is None:
        return torch.ones(max(slices - 1, 0), dtype=torch.bool)
    positions = torch.as_tensor(positions_mm, dtype=torch.float64).cpu()
    if positions.shape != (slices,):
        raise ValueError(f"frame_votes: {slices} slices but positions_mm of shape {tuple(positions.shape)}")
    steps = positions.diff()
    if not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError("frame_votes: positions_mm must run steadily up or down; sort the slices by position")
    return steps.abs() <= max_gap_mm


class VoteCounter:
    """Votes over the steps of a search.

    votes  int32 [S, H, W], the sum of frame_votes so far
    steps  how many steps they come from
    """

    def __init__(self, shape: Sequence[int], device: torch.device | str = "cpu"):
        self.votes = torch.zeros(*shape, dtype=torch.int32, device=device)
        self.steps = 0

    def add(self, votes: torch.Tensor) -> None:
        """Count one step's votes, [S, H, W]."""
        _check_same_shape(counter=self.votes, votes=votes)
        self.votes += votes
        self.steps += 1

    @property
    def predicted(self) -> torch.Tensor:
        """bool [S, H, W]: more votes than steps, which takes both kinds of vote most of the time."""
        return self.votes > self.steps


class VoteWatch:
    """Counts the votes of a reconstruction's steps; what Reconstructor.closest_normal calls a watch.

    brain bool [S, N, N]; below_vertex_mm [S], monotonic. Thick slices have neighbours, too: up to 1.5 times the scan's
    usual spacing.
    """

    def __init__(self, brain: torch.Tensor, below_vertex_mm: Sequence[float], settings: VotesSettings | None = None):
        self.settings, self.brain, self.counter = settings or VotesSettings(), brain, None
        self.positions = np.ascontiguousarray(below_vertex_mm)           # torch takes no reversed views
        usual_mm = np.median(np.abs(np.diff(self.positions))) if len(brain) > 1 else 0
        self.max_gap_mm = max(self.settings.max_gap_mm, 1.5 * usual_mm)
        self.window = scale_median_size(brain.shape[-1], self.settings.median_at_512)

    def __call__(self, query_hu: torch.Tensor, normal_hu: torch.Tensor) -> torch.Tensor:
        """Count one step's votes, of images [S, N, N] in HU; returns what is predicted anomalous so far."""
        if self.counter is None:                                         # on the device of the method
            self.brain = self.brain.to(query_hu.device)
            self.counter = VoteCounter(query_hu.shape, query_hu.device)
        away = residual(query_hu, normal_hu, self.brain, self.window).abs()
        self.counter.add(frame_votes(away, self.settings.threshold_hu, self.positions, self.max_gap_mm))
        return self.counter.predicted


# --- maps ---


def anomaly_map(votes: torch.Tensor, residual: torch.Tensor, steps: int) -> torch.Tensor:
    """Residual weighted by the share of the possible votes, votes / (2 steps) * residual, HU, float [S, H, W].

    Signed where the residual is. Never larger than the residual, and equal to it where every step voted twice.
    """
    _check_steps(steps)
    _check_same_shape(votes=votes, residual=residual)
    return votes / (2 * steps) * residual


def lesion_mask(predicted: torch.Tensor, frame_size: int, min_component_px_at_512: float = 600) -> torch.Tensor:
    """predicted (bool [S, H, W]) without its small components, those under min_component_px_at_512 pixels.

    Components are taken slice by slice, as in the paper; pixels that touch at a corner belong together (8-connected).
    The limit scales with area: frame_size is the side, in pixels, of the frame that predicted lies in.
    """
    return without_small(predicted, min_component_px_at_512 * (frame_size / PAPER_SIZE) ** 2)


def without_small(mask: torch.Tensor, pixels: float) -> torch.Tensor:
    """mask (bool [S, H, W]) without its 8-connected components of fewer pixels, slice by slice."""
    if mask.dtype != torch.bool or mask.ndim != 3:
        raise ValueError(f"without_small: expected bool [S, H, W], got {mask.dtype} {tuple(mask.shape)}")
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    components, _ = ndimage.label(mask.cpu().numpy(), structure=in_plane)
    keep = np.bincount(components.ravel()) >= pixels
    keep[0] = False  # the background
    return torch.from_numpy(keep[components]).to(mask.device)


# --- scores ---


def slice_scores(votes: torch.Tensor, steps: int, residual_abs: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """sum(votes / steps * |residual|) over the brain, divided by its area, for each slice; 0 without brain. [S]

    votes, residual_abs (HU), brain [S, H, W]. The unit is HU times votes a step (0..2). The paper doesn't divide by
    the number of steps; here the score must not depend on it, so that one calibration serves any --steps.
    """
    _check_steps(steps)
    _check_same_shape(votes=votes, residual_abs=residual_abs, brain=brain)
    weighted = (votes / steps * residual_abs * brain).sum((1, 2), dtype=torch.float64)
    return (weighted / brain.sum((1, 2)).clamp(min=1)).to(residual_abs.dtype)


def surprise_scores(surprise: torch.Tensor, brain: torch.Tensor, above: float) -> torch.Tensor:
    """Mean over the brain of how far the surprise goes beyond `above`, for each slice; 0 without brain. [S]

    surprise [S, H, W], signed (normative.py); brain bool [S, H, W]. What is no rarer than 10^-above counts nothing.
    """
    _check_same_shape(surprise=surprise, brain=brain)
    beyond = ((surprise.abs() - above).clamp(min=0) * brain).sum((1, 2), dtype=torch.float64)
    return (beyond / brain.sum((1, 2)).clamp(min=1)).to(surprise.dtype)


def peak_scores(surprise: torch.Tensor, brain: torch.Tensor, above: float, sigma: float,
                positions_mm: Sequence[float] | None = None) -> torch.Tensor:
    """Highest mean of how far the surprise goes beyond `above`, to one side, about any pixel of a slice. [S]

    surprise [S, H, W], signed (normative.py); brain bool [S, H, W]. The mean is over a Gaussian of standard deviation
    sigma pixels in the plane and over POOL_MM along the body axis. A lesion is in one place; what is unusual in a
    healthy head is scattered, and a sum over the brain counts it all. positions_mm [S], as of pool_along_axis.
    """
    _check_same_shape(surprise=surprise, brain=brain)
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
        np.asarray(positions_mm), dtype=torch.float64)
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


def thickness_mm(positions_mm: Sequence[float]) -> np.ndarray:
    """How much of the body axis each slice stands for, mm [S]; SLICE_MM for a single slice."""
    if len(positions_mm) < 2:
        return np.full(len(positions_mm), SLICE_MM)
    return np.abs(np.gradient(np.asarray(positions_mm, dtype=float)))


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


# --- calibration on healthy scans ---


def percentile_of(scores: torch.Tensor, healthy_scores: torch.Tensor) -> torch.Tensor:
    """Percentile of each score among healthy ones, [...] in 0 to 100 n / (n + 1).

    100 * (healthy scores below it) / (n + 1), which is 100 * (1 - p) for the conformal p-value (1 + healthy scores
    at or above it) / (n + 1): with n healthy scans no scan can be called rarer than one in n + 1.
    """
    healthy = _sorted_healthy(healthy_scores)
    below = torch.searchsorted(healthy, scores.to(healthy).contiguous(), right=False)
    return 100 * below / (len(healthy) + 1)


def threshold_at_fpr(healthy_scores: torch.Tensor, fpr: float) -> float:
    """The threshold that a healthy scan exceeds with a probability of at most fpr, from n healthy scores [n].

    The ceil((n + 1)(1 - fpr))-th smallest of them. For a new healthy scan exchangeable with these, the probability of
    `score > threshold` is at most fpr whatever the distribution (split conformal prediction, Vovk et al. 2005); the
    plain quantile would be exceeded more often than that. Raises ValueError when n is under 1 / fpr - 1.
    """
    healthy = _sorted_healthy(healthy_scores)
    if not 0 < fpr < 1:
        raise ValueError(f"threshold_at_fpr: fpr must lie between 0 and 1, got {fpr}")
    may_exceed = math.floor((len(healthy) + 1) * fpr + 1e-9)  # of n + 1 scans; 1e-9 for 20 * 0.05 just under 1
    if may_exceed == 0:
        raise ValueError(f"threshold_at_fpr: a false-positive rate of {fpr} needs {math.ceil(1 / fpr - 1 - 1e-9)} "
                         f"healthy scans, found {len(healthy)}; add scans or allow a higher rate")
    return healthy[len(healthy) - may_exceed].item()


def _sorted_healthy(healthy_scores: torch.Tensor) -> torch.Tensor:
    healthy = torch.as_tensor(healthy_scores, dtype=torch.float64).flatten()
    if len(healthy) == 0 or not torch.isfinite(healthy).all():
        raise ValueError(f"calibration needs finite scores of healthy scans, got {healthy.tolist()}")
    return healthy.sort().values


# --- checks ---


def _check_same_shape(**tensors: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"shapes differ: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"votes come from at least one step, got steps={steps}")
