"""What of a scan is anomalous: residual, votes, masks and scores (Lee et al. 2022; spec 'Projection of one scan').

Pure functions, tensors in and tensors out. A tensor [S, H, W] is always a whole scan: votes look at neighbouring
slices, so nothing here may be called on a part of one. Residuals are in HU, query minus reconstruction: positive
where the scan is denser than its closest normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from op.gaussian import gaussian_blur
from op.median import median2d

PAPER_SIZE = 512                # the frame, in pixels, that the paper's pixel counts refer to
SCAN_SCORES = ("max", "top3", "mean")


# --- residual ---


def scale_median_size(frame_size: int, size_at_512: int = 19) -> int:
    """Side of the median window in a frame of frame_size pixels: the nearest odd number, at least 3.

    It covers the same part of the head as size_at_512 does at 512: 19 at 512, 9 at 256, 5 at 128, 3 at 64.
    """
    return max(3, 2 * math.floor(size_at_512 * frame_size / PAPER_SIZE / 2) + 1)


def residual(query_hu: torch.Tensor, recon_hu: torch.Tensor, brain: torch.Tensor, median_size: int) -> torch.Tensor:
    """median((query - reconstruction) * brain) * brain, signed, HU, [S, H, W].

    query_hu, recon_hu float [S, H, W] in HU; brain bool [S, H, W]; median_size odd, in pixels. The median commutes
    with the sign, so the paper's residual is `.abs()` of this, and the sign tells dense from thin.
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
    if predicted.dtype != torch.bool or predicted.ndim != 3:
        raise ValueError(f"lesion_mask: expected bool [S, H, W], got {predicted.dtype} {tuple(predicted.shape)}")
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    components, _ = ndimage.label(predicted.cpu().numpy(), structure=in_plane)
    keep = np.bincount(components.ravel()) >= min_component_px_at_512 * (frame_size / PAPER_SIZE) ** 2
    keep[0] = False  # the background
    return torch.from_numpy(keep[components]).to(predicted.device)


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


def peak_scores(surprise: torch.Tensor, brain: torch.Tensor, above: float, sigma: float) -> torch.Tensor:
    """Highest mean of how far the surprise goes beyond `above`, to one side, about any pixel of a slice. [S]

    surprise [S, H, W], signed (normative.py); brain bool [S, H, W]. The mean is over a Gaussian of standard deviation
    sigma pixels in the plane and over the slice and its two neighbours. A lesion is in one place; what is unusual in a
    healthy head is scattered, and a sum over the brain counts it all.
    """
    _check_same_shape(surprise=surprise, brain=brain)
    highest = []
    for side in (surprise, -surprise):
        near = gaussian_blur((side - above).clamp(min=0) * brain, sigma)
        ends = torch.cat([near[:1], near, near[-1:]])
        highest.append(((ends[:-2] + near + ends[2:]) / 3).amax((1, 2)))
    return torch.maximum(*highest)


def scan_score(scores: torch.Tensor, how: str) -> float:
    """One number for a scan from its slice scores [S]: 'max', 'top3' (mean of the three highest), or 'mean'.

    With fewer than three slices 'top3' is their mean. Raises ValueError when there is none or a score isn't finite.
    """
    if how not in SCAN_SCORES:
        raise ValueError(f"scan_score: how must be one of {', '.join(SCAN_SCORES)}, got {how!r}")
    if scores.numel() == 0:
        raise ValueError("scan_score: no slices, so the scan has no score; is the brain mask empty?")
    if not torch.isfinite(scores).all():
        raise ValueError("scan_score: slice scores must be finite")
    if how == "top3":
        scores = scores.topk(min(3, len(scores))).values
    return (scores.max() if how == "max" else scores.mean()).item()


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
