"""The residual of a scan against its closest normal, and what a measure is: evidence, findings, the mask.

A tensor [S, H, W] is always a whole scan: neighbouring slices count, so no measure may be called on a part of one.
Residuals are in HU, query minus reconstruction: positive where the scan is denser than its closest normal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import ndimage

from config import check_range, option
from detect.normative import Normal
from detect.reconstruct import Reconstruction, Watch
from op.banded import dilated
from op.median import median2d

HALF, HIGH = 0.5, 90            # a component ends where its contrast is half of this percentile of its own,
REACH_AT_512 = 24               # or so many pixels from it, 10 mm: a hardened beam's rim goes on around the whole brain
PAPER_SIZE = 512                # the frame, in pixels, that the paper's pixel counts refer to


@dataclass(frozen=True)
class Evidence:
    """All that a measure needs of a scan, on the CPU; S slices.

    residual  float32 [S, N, N], HU: query minus closest normal in the brain, median-filtered, signed
    brain     bool [S, N, N]; below_vertex_mm float64 [S]
    scales    float32 [S, 2, N, N], HU: the residual at the scales of normative.py; [S, 4, N, N] with the output of a
              reader; None by votes
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
    """The verdict of a measure on a scan; S slices.

    anomaly       float32 [S, N, N], signed: votes times residual (HU), or weighted surprise
    predicted     bool [S, N, N]: what is predicted anomalous
    mask          bool [S, N, N]: predicted without small components; by surprise those left are grown to half of
                  their contrast
    slice_scores  float32 [S]
    """

    anomaly: torch.Tensor
    predicted: torch.Tensor
    mask: torch.Tensor
    slice_scores: torch.Tensor


@dataclass(frozen=True)
class MaskSettings:
    """How the mask is drawn: scores, percentiles and flags do not depend on it."""

    surprise_mask: float = option(2.5, "surprise from which a pixel is predicted anomalous (by surprise)")
    component_at_512: int = option(600, "smaller predicted components are dropped, pixels at 512; scales with area")
    extent_hu: float = option(8.0, "components are grown and cut to half of their contrast, and grow over no less than "
                              "this, HU; 0: neither (by surprise)")

    def __post_init__(self):
        check_range(self, ("surprise_mask", "component_at_512", "extent_hu"), 0, flags=False)


class Measure(ABC):
    """How unusual a scan is beside its closest normal, by settings of its own and those of the mask.

    A scan goes through watch(), while it is reconstructed, evidence() and assess(). `normal` is what fit() learns from
    healthy scans, and a bundle keeps; None: not fitted, or nothing to learn.
    """

    name: ClassVar[str]                       # in settings and bundles
    Settings: ClassVar[type]                  # a dataclass of config.option fields, with defaults: what scores hang on
    marked: ClassVar[str]                     # what the mask marks: the caption of a picture
    in_hu: ClassVar[bool]                     # whether map and scores are in HU; else they have no unit
    least_patients: ClassVar[int] = 0         # with healthy scans held out, for fit(); 0: scans are judged without it

    def __init__(self, settings: Any = None, mask: MaskSettings | None = None, normal: Normal | None = None):
        """settings: of the measure's Settings. None, as for the mask: their defaults."""
        self.settings, self.mask, self.normal = settings or self.Settings(), mask or MaskSettings(), normal

    @property
    @abstractmethod
    def words(self) -> str:
        """What a slice's score says, to follow 'the score is '."""

    @abstractmethod
    def criterion(self) -> str:
        """When a pixel is marked, as a sentence."""

    def check(self) -> None:
        """ValueError, with the mend, unless scans can be assessed: for a measure that fit() has to come before."""
        if self.least_patients and self.normal is None:
            raise ValueError(f"measure {self.name}: this model holds no statistics of healthy residuals; make it anew "
                             f"with latent_stats.py and held-out healthy scans of at least {self.least_patients} "
                             "patients, or choose another measure (--set measure=)")

    def watch(self, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> Watch | None:  # noqa: B027 - most need none
        """What is to see every step of the reconstruction, for evidence(); None: the last one is enough.

        brain bool [S, N, N]; below_vertex_mm [S], monotonic.
        """

    @abstractmethod
    def evidence(self, found: Reconstruction, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                 watch: Watch | None = None) -> Evidence:
        """What this measure needs of a reconstructed scan; of its settings, not of `normal`.

        brain bool [S, N, N]; below_vertex_mm [S], monotonic; watch: that of watch(), after the reconstruction.
        """

    @abstractmethod
    def fit(self, healthy: Sequence[Evidence], patients: Sequence[str] | None = None
            ) -> tuple[Measure, list[Findings]]:
        """The measure fitted to healthy scans, and its findings in each of them, to be compared with a new scan's.

        No scan may be judged by what it, or another of its patient, has taught. patients: of each scan; None: all
        different. Raises ValueError for scans of fewer than least_patients.
        """

    @abstractmethod
    def assess(self, evidence: Evidence) -> Findings:
        """The findings in a scan. Raises ValueError as check() does, and where no finite ones can be made."""

    @abstractmethod
    def predicted(self, found: Findings, mask: MaskSettings) -> torch.Tensor:
        """What these findings would predict anomalous with other mask settings, bool [S, N, N]."""


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
    check_same_shape(query_hu=query_hu, recon_hu=recon_hu, brain=brain)
    return median2d((query_hu - recon_hu) * brain, median_size) * brain


def filtered(found: Reconstruction, brain: torch.Tensor, median_at_512: int) -> torch.Tensor:
    """residual() of a reconstruction, with the median window scaled to its frame."""
    return residual(found.query_hu, found.normal_hu, brain, scale_median_size(brain.shape[-1], median_at_512))


def slice_medians(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Median of values [S, K, N, N] over a part of each slice, bool [S, N, N]: [S, K]; 0 where it is empty."""
    values = values.movedim(1, -1)
    return torch.stack([of[part].median(0).values if part.any() else of.new_zeros(of.shape[-1])
                        for of, part in zip(values, where)])


# --- mask ---


def lesion_mask(predicted: torch.Tensor, min_component_px_at_512: float) -> torch.Tensor:
    """predicted (bool [S, N, N]) without its small components, those under min_component_px_at_512 pixels.

    Components are taken slice by slice, as in the paper; pixels that touch at a corner belong together (8-connected).
    The limit scales with the frame's area.
    """
    return without_small_components(predicted, min_component_px_at_512 * (predicted.shape[-1] / PAPER_SIZE) ** 2)


def to_half_contrast(mask: torch.Tensor, residual_hu: torch.Tensor, least_hu: float) -> torch.Tensor:
    """mask (bool [S, H, W]) with each component grown and cut to half of its contrast, slice by slice.

    residual_hu float [S, H, W], signed. The sign of its sum over a component says whether that is hyper- or hypodense.
    Adjoining pixels with half of its contrast to that side, and at least least_hu, are added, up to REACH_AT_512.
    Pixels with less than half, to either side, are removed: they are the shine of a bleed.
    """
    check_same_shape(mask=mask, residual_hu=residual_hu)
    whole, components = torch.zeros_like(mask), _components(mask)
    reach = max(1, round(REACH_AT_512 * mask.shape[-1] / PAPER_SIZE))
    for number, (place, *_) in enumerate(ndimage.find_objects(components), 1):
        own = torch.from_numpy(components[place] == number).to(mask.device)
        away = residual_hu[place] * residual_hu[place][own].sum().sign()
        half = HALF * float(np.percentile(away[own].cpu().numpy(), HIGH))
        core = own & (away.abs() >= half)
        whole[place] |= components_touching(core, core | (away > max(least_hu, half)) & dilated(own, reach))
    return whole


def without_small_components(mask: torch.Tensor, pixels: float) -> torch.Tensor:
    """mask (bool [S, H, W]) without its 8-connected components of fewer pixels, slice by slice."""
    components = _components(mask)
    keep = np.bincount(components.ravel()) >= pixels
    keep[0] = False  # the background
    return torch.from_numpy(keep[components]).to(mask.device)


def components_touching(seed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The 8-connected components of mask that hold some of seed, slice by slice; both bool [S, H, W]."""
    check_same_shape(seed=seed, mask=mask)
    components = _components(mask)
    keep = np.zeros(components.max(initial=0) + 1, dtype=bool)
    keep[components[seed.cpu().numpy()]] = True
    keep[0] = False  # the background
    return torch.from_numpy(keep[components]).to(mask.device)


def _components(mask: torch.Tensor) -> np.ndarray:
    """Numbers [S, H, W] of the 8-connected components of mask (bool [S, H, W]), slice by slice; 0 is the rest."""
    if mask.dtype != torch.bool or mask.ndim != 3:
        raise ValueError(f"components: expected bool [S, H, W], got {mask.dtype} {tuple(mask.shape)}")
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    return ndimage.label(mask.cpu().numpy(), structure=in_plane)[0]


# --- checks ---


def check_same_shape(**tensors: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"shapes differ: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
