"""The published measure (Lee et al. 2022): at every step of a reconstruction pixels vote that stay away from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from config import check_range, option
from detect.reconstruct import Reconstruction
from detect.residual import (
    Evidence,
    Findings,
    MaskSettings,
    Measure,
    check_same_shape,
    filtered,
    lesion_mask,
    residual,
    scale_median_size,
)


@dataclass(frozen=True)
class VotesSettings:
    """What a score by votes hangs on. The values are the paper's."""

    median_at_512: int = option(19, "side of the residual's median filter, pixels at 512; scales with the frame")
    threshold_hu: float = option(5.0, "a pixel votes when its filtered residual exceeds this, HU")
    max_gap_mm: float = option(7.5, "slices further apart than this, mm, and than 1.5 times the scan's usual spacing "
                                    "are no neighbours")

    def __post_init__(self):
        check_range(self, ("median_at_512",), 1, flags=False)
        check_range(self, ("threshold_hu", "max_gap_mm"), 0, flags=False)


class Votes(Measure):
    """The published measure: at every step of a reconstruction pixels vote that stay away from it.

    A method without steps casts its votes once, of its one result.
    """

    name: ClassVar[str] = "votes"
    Settings: ClassVar[type] = VotesSettings
    words: ClassVar[str] = ("how much, and how steadily, the scan differs from its closest normal, in HU over the "
                            "brain")
    marked: ClassVar[str] = "differs steadily"
    in_hu: ClassVar[bool] = True                                # map and scores: HU times a share of the votes

    def criterion(self) -> str:
        return (f"Marked is what differs by more than {self.settings.threshold_hu:g} HU, steadily during the search "
                "and in neighbouring slices.")

    def watch(self, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> VoteWatch:
        """What counts the votes while a scan is reconstructed."""
        return VoteWatch(brain, below_vertex_mm, self.settings)

    def evidence(self, found: Reconstruction, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                 watch: VoteWatch | None = None) -> Evidence:
        """Raises ValueError without the watch that has counted: votes can't be had afterwards."""
        if watch is None or watch.counter is None:
            raise ValueError("measure votes: needs the watch of watch(), which has seen the reconstruction's steps")
        away = filtered(found, brain, self.settings.median_at_512)
        return Evidence(away, brain, np.asarray(below_vertex_mm), brain, votes=watch.counter.votes.cpu(),
                        steps=watch.counter.steps)

    def fit(self, healthy: Sequence[Evidence], patients: Sequence[str] | None = None) -> tuple[Votes, list[Findings]]:
        """Itself, and what it finds in each of them: votes have nothing to learn."""
        return self, [self.assess(one) for one in healthy]

    def assess(self, evidence: Evidence) -> Findings:
        votes, steps, away = evidence.votes, evidence.steps, evidence.residual
        predicted = votes > steps
        return Findings(anomaly_map(votes, away, steps), predicted, lesion_mask(predicted, self.mask.component_at_512),
                        slice_scores(votes, steps, away.abs(), evidence.brain))

    def predicted(self, found: Findings, mask: MaskSettings) -> torch.Tensor:
        """What these findings predict: votes do not hang on `mask`."""
        return found.predicted


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
        check_same_shape(counter=self.votes, votes=votes)
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


# --- map and scores ---


def anomaly_map(votes: torch.Tensor, residual: torch.Tensor, steps: int) -> torch.Tensor:
    """Residual weighted by the share of the possible votes, votes / (2 steps) * residual, HU, float [S, H, W].

    Signed where the residual is. Never larger than the residual, and equal to it where every step voted twice.
    """
    _check_steps(steps)
    check_same_shape(votes=votes, residual=residual)
    return votes / (2 * steps) * residual


def slice_scores(votes: torch.Tensor, steps: int, residual_abs: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """sum(votes / steps * |residual|) over the brain, divided by its area, for each slice; 0 without brain. [S]

    votes, residual_abs (HU), brain [S, H, W]. The unit is HU times votes a step (0..2). The paper doesn't divide by
    the number of steps; here the score must not depend on it, so that one calibration serves any --steps.
    """
    _check_steps(steps)
    check_same_shape(votes=votes, residual_abs=residual_abs, brain=brain)
    weighted = (votes / steps * residual_abs * brain).sum((1, 2), dtype=torch.float64)
    return (weighted / brain.sum((1, 2)).clamp(min=1)).to(residual_abs.dtype)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"votes come from at least one step, got steps={steps}")
