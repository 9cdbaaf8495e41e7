"""The one type that passes between the reading and the writing side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


class ScanError(ValueError):
    """A scan that cannot be handled. The message says what was expected, what was found and the mend."""


@dataclass(frozen=True)
class Scan:
    """A head CT, inferior to superior, in radiological display: row 0 is anterior, column 0 the patient's right.

    hu               float32 [S, H, W], Hounsfield units
    position_mm      float64 [S], strictly increasing (towards the vertex), along the slice normal; uneven steps
                     are allowed
    pixel_spacing_mm (row, column) spacing in mm; None where the source does not tell
    saturation_hu    (low, high): values at or beyond were clipped by the source (8-bit pictures); infinite if not
    brain            bool [S, H, W], a brain mask that came with the scan; None if none did
    geometry         what ct.write needs to place a map in the input's own geometry; opaque to everybody else
    source           'dicom', 'nifti' or 'slices'
    notes            what the reader wants the user to know (left-out images, gaps, assumptions)
    """

    scan_id: str
    hu: np.ndarray
    position_mm: np.ndarray
    pixel_spacing_mm: tuple[float, float] | None = None
    saturation_hu: tuple[float, float] = (-np.inf, np.inf)
    brain: np.ndarray | None = None
    geometry: Any = None
    source: str = "slices"
    notes: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self):
        if self.hu.ndim != 3 or self.hu.dtype != np.float32:
            raise ScanError(f"{self.scan_id}: hu must be float32 [S, H, W], got {self.hu.dtype} {self.hu.shape}")
        if self.position_mm.shape != (self.hu.shape[0],):
            raise ScanError(f"{self.scan_id}: {self.hu.shape[0]} slices but {self.position_mm.shape} positions")
        if self.hu.shape[0] > 1 and not (np.diff(self.position_mm) > 0).all():
            raise ScanError(f"{self.scan_id}: slice positions must increase from inferior to superior")
        if self.brain is not None and self.brain.shape != self.hu.shape:
            raise ScanError(f"{self.scan_id}: brain mask {self.brain.shape} does not fit the scan {self.hu.shape}")

    @property
    def slice_spacing_mm(self) -> float:
        """Median distance between neighbouring slices, mm (5 for a single slice, the usual thickness)."""
        return float(np.median(np.diff(self.position_mm))) if len(self.position_mm) > 1 else 5.0
