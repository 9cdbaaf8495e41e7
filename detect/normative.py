"""How unusual a residual is at its place: mean and spread of healthy residuals by position and pixel.

A generator draws some places of every healthy head badly: cisterns, the skull base, the rim of the cortex. What a
residual of 8 HU means depends on where it lies. So the residuals of held-out healthy scans, which the networks have
not seen, give a mean and a standard deviation for every position below the vertex and every place in the standard
frame. A new scan's residual becomes z = (residual - mean) / std, positive where the scan is denser than healthy scans
are there against their closest normal.

Healthy z have heavy tails, heavier on the hypodense side (sulci, old infarcts, cysts) than on the hyperdense one. So z
becomes a surprise, -log10 of the share of healthy brain that is at least as unusual to that side: 3 is what one healthy
pixel in a thousand reaches, whether hyperdense or hypodense, in the mid-brain or at the skull base.

Two scales are kept: FINE, for what is small and distinct (a thin bleed), and COARSE, a wide Gaussian, for what is
faint and large (an early infarct). FINE is the median-filtered residual of residual.residual ('median'), or a narrow
Gaussian less a wide one in the brain away from bone ('band'): a shade over half a head, which beam hardening and
another scanner's calibration make, then is none, and neither are the edges of the skull and calcifications. Of that
band 'hyperdense' takes what is above 0: how far the sulci and ventricles of healthy heads fall below their closest
normal, which draws them too dense, then no longer hides a little blood in them. Heads are centred and upright, so left
and right lend each other their statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ct.window import BONE_HU
from op.banded import dilated, gaussian_blur, smoothed

COARSE_AT_512 = 20.0         # standard deviation of the coarse scale's Gaussian, pixels at 512
FINE_AT_512, WIDE_AT_512 = 6.0, 40.0         # of the two Gaussians of the fine scale in 'band'
CLIP_HU = 40.0               # a residual counts as no more than this in 'band': beyond, a lesion is as plain as it gets
RIM_AT_512 = 2               # in 'band', what is denser than blood is left out, and so wide a rim of it
BLUR_AT_512 = 12.0           # of the Gaussian that lends a place its neighbours' statistics, pixels at 512
REACH_MM = 5.0               # and of the one along the body axis
SPACING_MM = 5.0             # from position to position
PRIOR_SCANS = 2.0            # a place's variance is drawn to its position's as if by so many scans
LEAST_SCANS = 1e-3           # at a position where scans count less than this, all together, nothing is known
FLOOR_HU = 0.5               # no healthy spread is taken to be under this
SCALES = ("fine", "coarse")
FILTERS = ("median", "band", "hyperdense")
COMBINED = ("both", "sides")
LEVELS = torch.arange(0.5, 4.51, 0.25)       # surprises whose z is kept; beyond the last one a line goes on
MIN_SCANS = 3                # each scan is judged by the statistics of the others, and needs two of them
LEAST_PIXELS = 10            # so many healthy pixels have to be as surprising as a level whose z is looked up
GROUPS = 60                  # patients beyond so many share groups that are left out together: work grows by its square
HIGHEST = 8.0                # no surprise is higher: nobody has seen so much healthy brain
BIN, BINS = 0.02, 2500       # of the histograms that the tails come from: z up to 50


def scales(difference_hu: torch.Tensor, median_hu: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """The residual at both scales of 'median', float32 [S, 2, N, N], HU.

    difference_hu [S, N, N]: query minus reconstruction. median_hu [S, N, N]: the same after residual.residual.
    """
    return torch.stack([median_hu, smoothed(difference_hu, brain, COARSE_AT_512 * brain.shape[-1] / 512)], dim=1)


def band_scales(difference_hu: torch.Tensor, soft: torch.Tensor, hyperdense: bool = False) -> torch.Tensor:
    """The residual at both scales of 'band', float32 [S, 2, N, N], HU; soft bool [S, N, N] is that of soft_brain.

    hyperdense: what is hypodense is 0 at the fine scale ('hyperdense').
    """
    fine, wide, coarse = (at_512 * soft.shape[-1] / 512 for at_512 in (FINE_AT_512, WIDE_AT_512, COARSE_AT_512))
    clipped = difference_hu.clamp(-CLIP_HU, CLIP_HU)
    band = smoothed(clipped - smoothed(clipped, soft, wide), soft, fine)
    return torch.stack([band.clamp(min=0) if hyperdense else band, smoothed(clipped, soft, coarse)], dim=1)


def soft_brain(query_hu: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """brain without bone, calcifications and metal and a rim of them, bool [S, N, N].

    Blood does not reach BONE_HU. What is next to bone shares pixels with it, and no two heads share their bones' edges.
    """
    rim = max(1, round(RIM_AT_512 * brain.shape[-1] / 512))
    return brain & ~dilated(query_hu >= BONE_HU, rim)


@dataclass(frozen=True)
class ResidualStats:
    """Healthy residuals at P positions, of K kinds, on a grid of n x n places (half the frame).

    The kinds are the two scales, and where a reader judges, too (reader.py), the two sides of what it says.

    positions_mm  [P], mm below the vertex, increasing
    mean, std     float32 [P, K, n, n], HU
    """

    positions_mm: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __post_init__(self):
        count = len(self.positions_mm)
        if self.mean.ndim != 4 or len(self.mean) != count or self.std.shape != self.mean.shape:
            raise ValueError(f"residual statistics: expected mean and std [{count}, K, n, n] for {count} positions, "
                             f"got {list(self.mean.shape)} and {list(self.std.shape)}")
        if not (torch.isfinite(self.positions_mm).all() and (self.positions_mm.diff() > 0).all()):
            raise ValueError("residual statistics: positions_mm must be finite and increase, from the vertex down")
        if not (torch.isfinite(self.mean) & torch.isfinite(self.std) & (self.std > 0)).all():
            raise ValueError("residual statistics: every mean must be finite, and every std, which is above 0")

    @classmethod
    def fit(cls, moments: Sequence[torch.Tensor], positions_mm: torch.Tensor, frame_size: int) -> ResidualStats:
        """From the moments() of healthy scans. Leave some out by leaving them out of the list.

        A position that no slice comes near, by LEAST_SCANS, takes what is known at the nearest one that has some.
        """
        if not moments:
            raise ValueError("residual statistics: at least one healthy scan is needed")
        sums = torch.stack(list(moments)).sum(0)
        unknown = sums[:, 0].amax((1, 2, 3)) < LEAST_SCANS
        away = (positions_mm[:, None] - positions_mm).abs()
        sums = sums[away.masked_fill(unknown, torch.inf).argmin(1)]
        count, first, second = ((sums + sums.flip(-1)) / 2).unbind(1)                       # each (P, K, n, n)
        sigma = BLUR_AT_512 * frame_size / 512 / 2                                          # on the grid
        overall = [m.sum((2, 3), keepdim=True) for m in (count, first, second)]
        average = overall[1] / overall[0].clamp(min=1e-6)
        spread = (overall[2] / overall[0].clamp(min=1e-6) - average.square()).clamp(min=FLOOR_HU**2)
        count, first, second = (gaussian_blur(m, sigma) for m in (count, first, second))
        mean = (first + PRIOR_SCANS * average) / (count + PRIOR_SCANS)
        around = second - 2 * mean * first + mean.square() * count                          # sum of (r - mean)^2
        variance = (around.clamp(min=0) + PRIOR_SCANS * spread) / (count + PRIOR_SCANS)
        return cls(positions_mm, mean, variance.sqrt().clamp(min=FLOOR_HU))

    def z(self, residuals: torch.Tensor, brain: torch.Tensor, below_vertex_mm: Sequence[float]) -> torch.Tensor:
        """residuals [S, K, N, N] in healthy standard deviations, signed; 0 outside brain [S, N, N].

        Raises ValueError for residuals in the brain that are not finite: none of NaN is surprising, and the scan would
        pass for healthy.
        """
        if not (torch.isfinite(residuals).all(1) | ~brain).all():
            raise ValueError("residuals: not finite in the brain: nothing can be said of this scan; look for values of "
                             "it that are no numbers, or try --precision fp32")
        mm = torch.as_tensor(np.ascontiguousarray(below_vertex_mm), dtype=torch.float32)      # also of a reversed view
        step = (mm - self.positions_mm[0]) / SPACING_MM
        low = step.floor().clamp(0, len(self.positions_mm) - 1).long()
        high = (low + 1).clamp(max=len(self.positions_mm) - 1)
        share = (step - low).clamp(0, 1)[:, None, None, None]

        def here(maps: torch.Tensor) -> torch.Tensor:
            between = torch.lerp(maps[low], maps[high], share)
            return F.interpolate(between, size=residuals.shape[-2:], mode="bilinear").to(residuals)

        return (residuals - here(self.mean)) / here(self.std) * brain[:, None].to(residuals)


@dataclass(frozen=True)
class Tails:
    """How far healthy z reach. z [K, 2, L]: by kind and side (hyperdense, hypodense), that of each of L LEVELS."""

    z: torch.Tensor

    def __post_init__(self):
        if self.z.ndim != 3 or self.z.shape[1:] != (2, len(LEVELS)):
            raise ValueError(f"residual statistics: expected tails [K, 2, {len(LEVELS)}], got {list(self.z.shape)}")
        if not (torch.isfinite(self.z).all() and (self.z >= 0).all() and (self.z.diff() > 0).all()):
            raise ValueError("residual statistics: tails must be finite, not negative, and increase by level")

    @classmethod
    def fit(cls, histograms: Sequence[torch.Tensor]) -> Tails:
        """From the histogram() of healthy scans, or sums of these, each in the z of others. Scans weigh alike.

        Levels that fewer than LEAST_PIXELS healthy pixels can have reached lie on the line over the last four before.
        """
        if not histograms:
            raise ValueError("residual statistics: a surprise needs at least two healthy scans")
        pixels, share = sum(histograms)                                   # each (K, 2, BINS)
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        beyond = share.flip(-1).cumsum(-1).flip(-1)                       # of the brain at or above a bin's lower edge
        reached = (beyond[..., None, :] >= 10 ** -LEVELS.double()[:, None]).sum(-1)       # (K, 2, L)
        z = (reached * BIN + 1e-3 * torch.arange(len(LEVELS))).float()                    # strictly increasing
        last = max(4, int((pixels[0, 0].sum() * 10 ** -LEVELS.double() >= LEAST_PIXELS).sum()) - 1)
        slope = (z[..., last] - z[..., last - 4]) / 4                                     # a level
        z[..., last + 1:] = z[..., last, None] + slope[..., None] * torch.arange(1, len(LEVELS) - last)
        return cls(z)

    def surprise(self, z: torch.Tensor) -> torch.Tensor:
        """z [S, K, N, N] -> signed surprise [S, K, N, N], positive where hyperdense."""
        sides = []
        for kind, reached in enumerate(self.z):
            high, low = (self._one(side * z[:, kind], reached[i]) for i, side in enumerate((1, -1)))
            sides.append(high - low)                         # one of them is 0: z has one sign
        return torch.stack(sides, dim=1)

    @staticmethod
    def _one(z: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        found, above = torch.zeros_like(z), z > 0                        # a fifth of it: half of the brain
        z, at = z[above], torch.cat([torch.zeros(1), at]).to(z)
        levels = torch.cat([torch.zeros(1), LEVELS]).to(z)
        high = torch.searchsorted(at, z).clamp(1, len(at) - 1)
        # Beyond the last level a line over the last four goes on: one step alone hangs on a few pixels.
        start = torch.where(z > at[-1], len(at) - 5, high - 1)
        slope = (levels[high] - levels[start]) / (at[high] - at[start])
        found[above] = (levels[high] + (z - at[high]) * slope).clamp(max=HIGHEST)
        return found


@dataclass(frozen=True)
class Normal:
    """What healthy residuals look like: what a residual's surprise is read from.

    of: the settings of the measure that the residuals were taken by; None: not told. Those of others are another
    quantity, of which this tells nothing.
    """

    stats: ResidualStats
    tails: Tails
    of: Any = None

    def surprise(self, residuals: torch.Tensor, brain: torch.Tensor, below_vertex_mm: Sequence[float]) -> torch.Tensor:
        """residuals [S, K, N, N], HU -> signed surprise [S, K, N, N]; 0 outside brain [S, N, N].

        ValueError for another K than that of the healthy residuals.
        """
        if residuals.shape[1] != len(self.tails.z):
            raise ValueError(f"surprise: the healthy residuals are of {len(self.tails.z)} kinds, these of "
                             f"{residuals.shape[1]}; calibrate anew (latent_stats.py)")
        return self.tails.surprise(self.stats.z(residuals, brain, below_vertex_mm))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """A flat dict for safetensors; the maps in float16."""
        return {"positions_mm": self.stats.positions_mm, "mean": self.stats.mean.half(), "std": self.stats.std.half(),
                "tails": self.tails.z}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], of: Any = None) -> Normal:
        """Back from to_tensors, with `of`. Raises ValueError on missing tensors or shapes that do not fit together."""
        if missing := [name for name in ("positions_mm", "mean", "std", "tails") if name not in tensors]:
            raise ValueError(f"residual statistics: no {', '.join(missing)}")
        stats = ResidualStats(tensors["positions_mm"], tensors["mean"].float(), tensors["std"].float())
        if len(tensors["tails"]) != stats.mean.shape[1]:
            raise ValueError(f"residual statistics: of {stats.mean.shape[1]} kinds, tails of {len(tensors['tails'])}")
        return cls(stats, Tails(tensors["tails"]), of)


def fit_normal(residuals: Sequence[torch.Tensor], brains: Sequence[torch.Tensor],
               below_vertex_mm: Sequence[Sequence[float]], patients: Sequence[str] | None = None
               ) -> tuple[Normal, list[torch.Tensor]]:
    """The statistics of healthy scans, and every scan's own surprise as those of other patients see it.

    residuals: one [S, K, N, N] a scan; brains [S, N, N]; patients: whose scans these are, None: each of another one,
    MIN_SCANS at least. These surprises may be compared with a new scan's.
    """
    normal, by_others = fit_leaving_out(residuals, brains, below_vertex_mm, patients)
    return normal, [other.surprise(r, b, mm) for other, r, b, mm in zip(by_others, residuals, brains, below_vertex_mm)]


def fit_leaving_out(residuals: Sequence[torch.Tensor], brains: Sequence[torch.Tensor],
                    below_vertex_mm: Sequence[Sequence[float]], patients: Sequence[str] | None = None
                    ) -> tuple[Normal, list[Normal]]:
    """The statistics of healthy scans, and for every scan those of the other patients. Arguments as of fit_normal.

    A scan that helped to make the mean would look less unusual than a new one does, and so would another of the same
    head. So its z comes from the other patients' statistics, and its surprise from the tails of their z, each by the
    statistics of the rest: it is judged as if it came after a calibration on the others. Of more than GROUPS patients
    whole groups are left out.
    """
    patients = list(range(len(residuals))) if patients is None else patients
    if (count := len(set(patients))) < MIN_SCANS:
        raise ValueError(f"residual statistics: healthy scans of at least {MIN_SCANS} patients are needed, found "
                         f"{count}: each is judged by the statistics of the others")
    numbers = {patient: number % GROUPS for number, patient in enumerate(dict.fromkeys(patients))}
    scans = list(zip(residuals, brains, below_vertex_mm, strict=True))
    groups: list[list[tuple]] = [[] for _ in range(min(count, GROUPS))]
    for scan, patient in zip(scans, patients, strict=True):
        groups[numbers[patient]].append(scan)
    deepest = [max(float(np.max(mm)) for _, _, mm in group) for group in groups]
    places, size = positions(max(deepest)), brains[0].shape[-1]
    sums = [sum(moments(*scan, places) for scan in group) for group in groups]

    def stats_without(*left_out: int) -> ResidualStats:
        others = [g for g in range(len(groups)) if g not in left_out]
        reach = len(positions(max(deepest[g] for g in others)))          # no deeper than these scans show
        return ResidualStats.fit([sums[g][:reach] for g in others], places[:reach], size)

    def histogram_of(group: list[tuple], stats: ResidualStats) -> torch.Tensor:
        return sum(histogram(stats.z(*scan), scan[1]) for scan in group)

    seen: list[torch.Tensor | int] = [0] * len(groups)                   # by each group, of the z of all others
    for one, other in combinations(range(len(groups)), 2):
        stats = stats_without(one, other)
        seen[one] += histogram_of(groups[other], stats)
        seen[other] += histogram_of(groups[one], stats)
    without = [Normal(stats_without(g), Tails.fit([seen[g]])) for g in range(len(groups))]
    own = [histogram_of(group, normal.stats) for group, normal in zip(groups, without)]
    return Normal(stats_without(), Tails.fit(own)), [without[numbers[patient]] for patient in patients]


def combine(surprise: torch.Tensor, which: str, hypodense: float = 1.0) -> torch.Tensor:
    """Signed surprise [S, 2, N, N] of SCALES -> [S, N, N], by one of COMBINED.

    'both' takes the larger of the two. 'sides' takes what is hyperdense from the fine scale and what is hypodense, with
    weight `hypodense`, from the coarse one: blood is distinct, an infarct faint and large, and hypodense places are
    many in healthy heads (sulci, atrophy).
    """
    if which == "sides":
        high, low = surprise[:, 0].clamp(min=0), hypodense * surprise[:, 1].clamp(max=0)
        return torch.where(high >= -low, high, low)
    larger = surprise.abs().argmax(dim=1, keepdim=True)
    return surprise.gather(1, larger)[:, 0]


def histogram(z: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """Pixels of one healthy scan's brain, and shares of it, by kind, side (hyperdense, hypodense) and |z|.

    float64 [2, K, 2, BINS], of z [S, K, N, N]. What lies to the other side counts in the first bin: over the bins the
    pixels sum to those of the brain, the shares to 1. Histograms of scans may be added: in shares scans weigh alike.
    """
    counts = []
    for kind in range(z.shape[1]):
        values = z[:, kind][brain].float()
        for side in (1, -1):
            bins = (side * values / BIN).clamp(0, BINS - 1).long()
            counts.append(torch.bincount(bins, minlength=BINS).double())
    pixels = torch.stack(counts).unflatten(0, (-1, 2))
    return torch.stack([pixels, pixels / pixels.sum(-1, keepdim=True).clamp(min=1)])


def positions(deepest_mm: float) -> torch.Tensor:
    """Positions from the vertex to the deepest healthy slice, SPACING_MM apart. [P]"""
    return torch.arange(0, max(deepest_mm, SPACING_MM) + SPACING_MM / 2, SPACING_MM)


def moments(residuals: torch.Tensor, brain: torch.Tensor, below_vertex_mm: Sequence[float],
            positions_mm: torch.Tensor) -> torch.Tensor:
    """What one healthy scan adds: sums of 1, r and r^2 over its brain by position and place, [P, 3, K, n, n].

    residuals [S, K, N, N], HU; brain bool [S, N, N]. A slice counts for the positions about it by a Gaussian of
    REACH_MM, made to sum to 1 over the slices of the scan, so that a scan is one observation however thin its slices.
    """
    mm = torch.as_tensor(np.ascontiguousarray(below_vertex_mm), dtype=torch.float32)
    near = torch.exp(-0.5 * ((positions_mm[:, None] - mm) / REACH_MM).square())
    near = near / near.sum(1, keepdim=True).clamp(min=1)                     # beyond the scan's ends it says little
    inside = brain[:, None].to(residuals).expand_as(residuals)
    sums = torch.stack([inside, residuals * inside, residuals.square() * inside], dim=1)     # (S, 3, K, N, N)
    grid = F.avg_pool2d(sums.flatten(0, 2).float(), 2).unflatten(0, sums.shape[:3])
    return torch.einsum("ps,smchw->pmchw", near, grid)
