"""Bleeds and infarcts pasted into standardised healthy scans: what settings are chosen on, so that no test scan is.

They are crude on purpose. What separates two ways of scoring is where a lesion lies, how large it is and how far its
HU are from those around it; these are drawn at random, from what is hard to see to what is plain. Kinds:

    intraparenchymal   an ellipsoid of 2 to 40 ml, 55 to 80 HU, with a thin rim of oedema
    subdural           a layer of 3 to 10 mm under the skull of one side, 35 to 75 HU
    epidural           a lens under the skull, 6 to 20 mm thick, 55 to 80 HU
    subarachnoid       the CSF about a point near the rim or the base, at 30 to 55 HU
    intraventricular   the CSF in the middle of the head, its posterior part, at 45 to 65 HU
    infarct            a part of a hemisphere, 6 to 16 HU lower
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

HEAD_MM = 185.0             # of a head from front to back: the standard frame does not keep its scale
CSF_HU, TISSUE_HU, DENSEST_HU = 10.0, 32.0, 40.0        # of soft tissue: what is beyond is a share of bone
LEAST_ML = 0.5              # a lesion smaller than this is drawn again
TRIES = 20


def pixel_mm(size: int, head_fraction: float) -> float:
    """About the side of a pixel of the standard frame, mm, for a head of HEAD_MM."""
    return HEAD_MM / (size * head_fraction)


def paste(hu: np.ndarray, brain: np.ndarray, below_vertex_mm: np.ndarray, kind: str, side_mm: float,
          rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A lesion of a kind of KINDS in hu float32 [S, N, N] within brain bool [S, N, N]: (new hu, truth bool [S, N, N]).

    below_vertex_mm [S], monotonic; side_mm of a pixel. Raises ValueError for an unknown kind, and where TRIES draws
    find no room for LEAST_ML.
    """
    if kind not in KINDS:
        raise ValueError(f"paste: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    head = _Head(hu, brain, np.asarray(below_vertex_mm, float), side_mm)
    for _ in range(TRIES):
        share, change = KINDS[kind](head, rng)
        share = ndimage.gaussian_filter(share.astype(np.float32), (0, 1, 1)) * brain        # partial volume
        truth = share > 0.5
        if truth.sum() * head.voxel_ml >= LEAST_ML:
            return (hu + share * (change - hu * (kind != "infarct"))).astype(np.float32), truth
    raise ValueError(f"paste: no room for {kind} in {TRIES} draws")


@dataclass(frozen=True)
class Pasted:
    """One lesion in a scan: its kind, the scan's new HU float32 [S, N, N], and the truth bool [S, N, N]."""

    kind: str
    hu: np.ndarray
    truth: np.ndarray


def paste_each(scan_id: str, hu: np.ndarray, brain: np.ndarray, below_vertex_mm: np.ndarray, side_mm: float,
               count: int = 1, first: int = 1) -> tuple[list[Pasted], list[str]]:
    """`count` lesions of every kind, each in a copy of its own of the scan, and why some found no room.

    Arguments as for paste(). Seeded by kind and scan_id: the same scan gets the same lesions everywhere. A kind's are
    numbered from 1 as they are drawn, and those from number `first` on are given; one without room keeps its number.
    """
    found, left_out = [], []
    for seed, kind in enumerate(KINDS):
        rng = np.random.default_rng([seed, *scan_id.encode()])
        for number in range(1, first + count):                     # what is drawn depends on what was drawn before
            lesion, reason = [], []
            try:
                lesion = [Pasted(kind, *paste(hu, brain, below_vertex_mm, kind, side_mm, rng))]
            except ValueError as error:
                reason = [f"{scan_id}: {error}"]
            if number >= first:
                found += lesion
                left_out += reason
    return found, left_out


class _Head:
    """Coordinates in mm (z up, y back, x to the left), and depth under the inner skull."""

    def __init__(self, hu, brain, below_vertex_mm, side_mm):
        self.hu, self.brain = hu, brain
        step_mm = float(np.median(np.abs(np.diff(below_vertex_mm)))) if len(hu) > 1 else 5.0
        self.voxel_ml = side_mm**2 * step_mm / 1000
        centre = (np.array(hu.shape[1:]) - 1) / 2
        y, x = ((np.arange(n) - c) * side_mm for n, c in zip(hu.shape[1:], centre))
        self.z, self.y, self.x = -below_vertex_mm[:, None, None], y[None, :, None], x[None, None, :]
        self.depth = np.stack([ndimage.distance_transform_edt(one) for one in brain]) * side_mm

    def distance(self, point: np.ndarray, radii: np.ndarray | float = 1.0) -> np.ndarray:
        """From a point (z, y, x), in radii."""
        return np.sqrt(sum(((axis - at) / r) ** 2
                           for axis, at, r in zip((self.z, self.y, self.x), point, np.broadcast_to(radii, 3))))

    def point(self, where: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random voxel of where bool [S, N, N], in mm; of the brain where there is none."""
        found = np.flatnonzero(where if where.any() else self.brain)
        i, j, k = np.unravel_index(rng.choice(found), self.brain.shape)
        return np.array([self.z[i, 0, 0], self.y[0, j, 0], self.x[0, 0, k]])


def _intraparenchymal(head, rng):
    ml = np.exp(rng.uniform(np.log(2), np.log(40)))
    stretch = np.exp(rng.uniform(-0.3, 0.3, 3))
    radii = (ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3) * stretch / np.cbrt(stretch.prod())
    away = head.distance(head.point(head.depth > 12, rng), radii)
    blood = rng.uniform(55, 80)
    return away < 1.25, np.where(away < 1, blood, np.minimum(head.hu, TISSUE_HU) - 8)


def _layer(head, rng, thick_mm, reach_mm, blood):
    """Blood under the skull about a point of the rim: thick_mm there, thinning out towards reach_mm away.

    The outermost pixels share theirs with the skull. Blood takes the place of the soft tissue in them, not of the bone.
    """
    at = head.point((head.depth > 0) & (head.depth < 6) & (np.abs(head.x) > 15), rng)
    thickness = thick_mm * (1 - head.distance(at, reach_mm) ** 2)
    one_side = np.sign(head.x) == np.sign(at[2])
    bone = np.clip((head.hu - DENSEST_HU) / (head.hu.max() - DENSEST_HU), 0, 1)
    return (head.depth < thickness) & one_side, blood + bone * (head.hu.max() - blood)


def _subdural(head, rng):
    return _layer(head, rng, rng.uniform(3, 10), rng.uniform(45, 80), rng.uniform(35, 75))


def _epidural(head, rng):
    return _layer(head, rng, rng.uniform(6, 20), rng.uniform(20, 40), rng.uniform(55, 80))


def _csf(head):
    """Share of CSF in a voxel, 0 to 1."""
    return np.clip((TISSUE_HU - 4 - head.hu) / (TISSUE_HU - 4 - CSF_HU), 0, 1) * head.brain


def _subarachnoid(head, rng):
    fluid = _csf(head)
    at = head.point((fluid > 0.5) & (head.depth < 30) & (head.z < -25), rng)
    share = fluid * (head.distance(at, rng.uniform(20, 50)) < 1)
    return share, rng.uniform(30, 55)


def _intraventricular(head, rng):
    fluid = _csf(head) * (head.depth > 22)
    at = head.point(fluid > 0.6, rng)
    share = fluid * (head.distance(at, (30, 40, 40)) < 1) * (head.y > at[1] - rng.uniform(0, 20))
    return share, rng.uniform(45, 65)


def _infarct(head, rng):
    at = head.point((head.depth > 5) & (np.abs(head.x) > 15), rng)
    share = (head.distance(at, rng.uniform(15, 40)) < 1) & (np.sign(head.x) == np.sign(at[2]))
    return share, np.where(head.hu > CSF_HU, -rng.uniform(6, 16), 0.0)


KINDS = {"intraparenchymal": _intraparenchymal, "subdural": _subdural, "epidural": _epidural,
         "subarachnoid": _subarachnoid, "intraventricular": _intraventricular, "infarct": _infarct}
