"""Thin slices averaged into slabs of the thickness the model was trained on, and maps taken back to the slices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ct.scan import Scan, ScanError

SAME_MM = 0.01      # lengths that differ by less are one: files round positions, and those along a tilt are sums


@dataclass(frozen=True)
class Slabs:
    """A scan of T slabs, and where the S slices it was made of lay.

    scan         the scan to work on; scan.position_mm is each slab's own mean position
    position_mm  float64 [S], of the original slices
    made_of      bool [T, S]: which of them each slab is made of
    covered      bool [S]: which of them lie in slabs by half or more
    averaged     whether slabs were made; if not, scan is the original and T = S
    """

    scan: Scan
    position_mm: np.ndarray
    made_of: np.ndarray
    covered: np.ndarray
    averaged: bool

    def from_slabs(self, maps: np.ndarray) -> np.ndarray:
        """Maps of the slabs, [T, H, W], for the original slices, [S, H, W].

        Numbers are interpolated linearly between slab positions (floats keep their dtype, integers become
        float32); bool takes the nearest slab, and is False for slices that no slab covers. Slices beyond the outermost
        slab positions take that slab's map. Raises ValueError if there is not one map a slab.
        """
        centres = self.scan.position_mm
        if len(maps) != len(centres):
            raise ValueError(f"from_slabs: expected {len(centres)} maps, one a slab, got {len(maps)}")
        if not self.averaged:
            return maps
        place = np.interp(self.position_mm, centres, np.arange(len(centres)))
        if maps.dtype == bool:
            return maps[np.rint(place).astype(int)] & self.covered.reshape(-1, 1, 1)
        if not np.issubdtype(maps.dtype, np.floating):
            maps = maps.astype(np.float32)
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, len(maps) - 1)
        share = (place - below).astype(maps.dtype)[:, None, None]
        return maps[below] * (1 - share) + maps[above] * share


def to_slabs(scan: Scan, slab_mm: float = 5.0, thin_mm: float = 4.0) -> Slabs:
    """Averages runs of slices that stand for less than thin_mm into slabs of slab_mm; without any, nothing changes.

    A thick slice (_thick) is a slab of its own, as in series whose base is thin and whose upper slices are thick. The
    others reach halfway to their neighbours and count in a slab by their overlap with it, so uneven spacing keeps its
    millimetres. Slabs are counted from the top of a run, where position is measured from; what is left at the scan's
    bottom is a slab of its own if it is at least half as thick. Where slices are missing there is no slab. A brain mask
    that came with the scan is averaged likewise and cut at a half. Slices of slab_mm are thick, too.

    Raises ScanError if slab_mm is not above zero.
    """
    if not slab_mm > 0:
        raise ScanError(f"{scan.scan_id}: --slab-mm must be above 0, got {slab_mm}")
    count = len(scan.hu)
    thick = np.ones(1, bool) if count == 1 else _thick(scan.position_mm, min(thin_mm, slab_mm))
    if thick.all():
        return Slabs(scan, scan.position_mm, np.eye(count, dtype=bool), np.ones(count, bool), averaged=False)
    shares, whole = _shares(scan.position_mm, slab_mm, thick)
    weights = shares / shares.sum(axis=1, keepdims=True)
    brain = None if scan.brain is None else _average(weights, scan.brain) >= 0.5
    slabs = replace(scan, hu=_average(weights, scan.hu), position_mm=weights @ scan.position_mm, brain=brain)
    return Slabs(slabs, scan.position_mm, shares > SAME_MM, shares.sum(axis=0) >= whole / 2 - SAME_MM, averaged=True)


def _thick(position_mm: np.ndarray, thin_mm: float) -> np.ndarray:
    """Which of two slices or more stand for thin_mm or more, bool [S].

    Those that lie so far from both neighbours; and the first and the last of thick ones beside thin ones, which may lie
    nearer to these. Slices that touch are half of both thicknesses apart: a step to a thin slice, twice, less that
    slice's own spacing (the step beyond) is how thick the other one is, and the step to its other side must say so,
    too. Not where that is a gap (slice_thickness_mm): beside missing slices thin ones stay thin. Nor does a single
    slice between thin ones, or at a scan's end beside them, count as thick for what touching would make of it.
    """
    steps = np.diff(position_mm)
    below, above = np.append(steps[:1], steps), np.append(steps, steps[-1:])     # at the ends as on the other side
    beyond_below, beyond_above = np.append(below[:1], below[:-1]), np.append(above[1:], above[-1:])
    least = thin_mm - SAME_MM
    thick = np.minimum(below, above) >= least
    for near, far, beyond_near, beyond_far in ((below, above, beyond_below, beyond_above),
                                               (above, below, beyond_above, beyond_below)):
        thick |= (2 * near - beyond_near >= least) & (far >= least) & (far <= 1.5 * np.maximum(near, beyond_far))
    return thick


def _shares(position_mm: np.ndarray, slab_mm: float, thick: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each slice is in each slab, float64 [T, S], inferior to superior, and all of it [S]: mm, or 1 of a
    thick slice."""
    low, high = _extents(position_mm)
    rows, s = [], 0
    while s < len(position_mm):
        end = s + 1
        while not thick[s] and end < len(position_mm) and not thick[end]:
            end += 1
        part = np.ones((1, 1)) if thick[s] else _overlaps(low[s:end], high[s:end], slab_mm, bottom=s == 0)
        rows.append(np.pad(part, ((0, 0), (s, len(position_mm) - end))))
        s = end
    return np.concatenate(rows), np.where(thick, 1.0, high - low)


def _overlaps(low: np.ndarray, high: np.ndarray, slab_mm: float, bottom: bool) -> np.ndarray:
    """mm of each slice in each slab, float64 [T, S], of slices that reach from low to high, mm.

    A slab is kept if slices cover half of what they cover in the fullest, or if more of one lies there than in those
    that are kept. What is left below the lowest falls off at the scan's bottom; elsewhere it is part of the lowest.
    """
    count = max(1, int((high[-1] - low[0] + SAME_MM) / slab_mm + 0.5))
    tops = high[-1] - slab_mm * np.arange(count)[::-1, None]
    bottoms = tops - slab_mm
    if not bottom:
        bottoms[0] = min(bottoms[0], low[0])
    overlap = np.clip(np.minimum(high, tops) - np.maximum(low, bottoms), 0, None)
    covered = overlap.sum(axis=1)
    kept = covered >= covered.max() / 2 - SAME_MM
    for slice_mm in overlap.T:
        if slice_mm[kept].sum() < slice_mm.sum() / 2 - SAME_MM:
            kept[slice_mm.argmax()] = True
    return overlap[kept]


def nearest_mm(position_mm: np.ndarray) -> np.ndarray:
    """From each of two slices or more to its nearer neighbour, mm [S]. Positions rise, or fall all the way."""
    steps = np.abs(np.diff(position_mm))
    return np.minimum(np.append(np.inf, steps), np.append(steps, np.inf))


def slice_thickness_mm(position_mm: np.ndarray, across_gaps: bool = False) -> np.ndarray:
    """What each of two slices or more stands for, mm [S]: it reaches halfway to its neighbours, at the scan's ends as
    far as on the other side.

    across_gaps: whether it does so where slices are missing, too. If not, a gap, a step over 1.5 times as large as both
    beside it, counts as if it were just that. Where one spacing ends and another begins there may be a short step:
    there is no gap. Positions rise, or fall all the way.
    """
    if across_gaps:
        return np.abs(np.gradient(position_mm))
    steps = np.abs(np.diff(position_mm))
    if len(steps) > 1:
        steps = np.minimum(steps, 1.5 * np.maximum(np.append(0, steps[:-1]), np.append(steps[1:], 0)))
    return (np.append(steps[:1], steps) + np.append(steps, steps[-1:])) / 2


def _extents(position_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of each of two slices or more, mm [S]: halfway to its neighbours, but no farther than as if
    the one were 1.5 times as far as the nearer one; at the scan's ends as far as on the other side.
    """
    half = np.diff(position_mm) / 2
    below, above = np.append(half[:1], half), np.append(half, half[-1:])
    most = 1.5 * nearest_mm(position_mm) / 2
    return position_mm - np.minimum(below, most), position_mm + np.minimum(above, most)


def _average(weights: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """Slices [S, H, W] averaged with weights [T, S], float32 [T, H, W], without a copy of the volume."""
    out = np.zeros((len(weights), *volume.shape[1:]), np.float32)
    for slab, row in zip(out, weights):
        for s in np.flatnonzero(row):
            slab += np.float32(row[s]) * volume[s]
    return out
