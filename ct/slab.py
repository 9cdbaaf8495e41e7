"""Thin slices averaged into slabs of the thickness the model was trained on, and maps taken back to the slices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ct.scan import Scan, ScanError


@dataclass(frozen=True)
class Slabs:
    """A scan of T slabs, and where the S slices it was made of lay.

    scan         the scan to work on; scan.position_mm is each slab's own mean position
    position_mm  float64 [S], of the original slices
    averaged     whether slabs were made; if not, scan is the original and T = S
    """

    scan: Scan
    position_mm: np.ndarray
    averaged: bool

    def from_slabs(self, maps: np.ndarray) -> np.ndarray:
        """Maps of the slabs, [T, H, W], for the original slices, [S, H, W].

        Numbers are interpolated linearly between slab positions (floats keep their dtype, integers become
        float32); bool takes the nearest slab. Slices beyond the outermost slab positions take that slab's map.
        Raises ValueError if there is not one map a slab.
        """
        centres = self.scan.position_mm
        if len(maps) != len(centres):
            raise ValueError(f"from_slabs: expected {len(centres)} maps, one a slab, got {len(maps)}")
        if not self.averaged:
            return maps
        place = np.interp(self.position_mm, centres, np.arange(len(centres)))
        if maps.dtype == bool:
            return maps[np.rint(place).astype(int)]
        if not np.issubdtype(maps.dtype, np.floating):
            maps = maps.astype(np.float32)
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, len(maps) - 1)
        share = (place - below).astype(maps.dtype)[:, None, None]
        return maps[below] * (1 - share) + maps[above] * share


def to_slabs(scan: Scan, slab_mm: float = 5.0, thin_mm: float = 4.0) -> Slabs:
    """Averages slices into slabs of slab_mm if their median spacing is below thin_mm; else leaves them as they are.

    A slice reaches halfway to its neighbours and counts in a slab by its overlap with it, so uneven spacing keeps
    its millimetres. Slabs are counted from the top, where position is measured from; what is left at the bottom is
    a slab of its own if it is at least half as thick. Where slices are missing there is no slab: one is kept only
    if slices cover half of what they cover in the fullest. A brain mask that came with the scan is averaged
    likewise and cut at a half.

    Raises ScanError if slab_mm is not above zero.
    """
    if not slab_mm > 0:
        raise ScanError(f"{scan.scan_id}: --slab-mm must be above 0, got {slab_mm}")
    if len(scan.hu) == 1 or scan.slice_spacing_mm >= thin_mm or scan.slice_spacing_mm >= slab_mm:
        return Slabs(scan, scan.position_mm, averaged=False)
    weights = _overlaps(scan.position_mm, slab_mm)                   # [T, S], rows add up to 1
    brain = None if scan.brain is None else _average(weights, scan.brain) >= 0.5
    slabs = replace(scan, hu=_average(weights, scan.hu), position_mm=weights @ scan.position_mm, brain=brain)
    return Slabs(slabs, scan.position_mm, averaged=True)


def _overlaps(position_mm: np.ndarray, slab_mm: float) -> np.ndarray:
    """The share of each slice in each slab, float64 [T, S], inferior to superior."""
    low, high = _extents(position_mm)
    count = max(1, int((high[-1] - low[0]) / slab_mm + 0.5))
    tops = high[-1] - slab_mm * np.arange(count)[::-1, None]
    overlap = np.clip(np.minimum(high, tops) - np.maximum(low, tops - slab_mm), 0, None)
    covered = overlap.sum(axis=1)
    overlap = overlap[covered >= covered.max() / 2 - 1e-6]
    return overlap / overlap.sum(axis=1, keepdims=True)


def _extents(position_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of each slice, mm; no slice is taken for thicker than 1.5 times the median spacing."""
    step = np.diff(position_mm)
    half = np.minimum(step, 1.5 * np.median(step)) / 2
    return position_mm - np.append(half[:1], half), position_mm + np.append(half, half[-1:])


def _average(weights: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """Slices [S, H, W] averaged with weights [T, S], float32 [T, H, W], without a copy of the volume."""
    out = np.zeros((len(weights), *volume.shape[1:]), np.float32)
    for slab, row in zip(out, weights):
        for s in np.flatnonzero(row):
            slab += np.float32(row[s]) * volume[s]
    return out
