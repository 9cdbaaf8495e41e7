"""Shapes of lesions and how they are painted: blobs of a wanted volume, crescents, soft edges, inner texture.

A shape is a float32 field [Z, Y, X] in mm: positive inside, 0 at the edge, about the distance to it nearby. Places
are named in MNI mm, x growing to the right.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from demos.anatomy import Tissue
from demos.warps import Cavity, blocks, smooth_noise, voxels

EDGE_MM = 1.6                      # over this a painted edge rises from 0 to 1
BRAIN = (Tissue.GREY, Tissue.WHITE, Tissue.DEEP_GREY, Tissue.BRAINSTEM, Tissue.CEREBELLUM)
CEREBRUM = (Tissue.GREY, Tissue.WHITE, Tissue.DEEP_GREY)
INFRATENTORIAL = (Tissue.BRAINSTEM, Tissue.CEREBELLUM)
MIDDLE = np.array([0.0, -18.0, 8.0])    # MNI mm, from where directions to the convexity are taken


def between(low: float, high: float, severity: float) -> float:
    """From low at severity 0 to high at severity 1, by equal factors."""
    return float(low * (high / low) ** severity)


def volume_ml(mask: np.ndarray) -> float:
    return round(float(mask.sum()) / 1000, 2)


def soft(shape: np.ndarray, edge_mm: float = EDGE_MM) -> np.ndarray:
    """Coverage 0..1 of a shape, 0.5 at its edge."""
    return np.clip(0.5 + shape / edge_mm, 0, 1)


def nearest(cavity: Cavity, mni: tuple[float, float, float], allowed: np.ndarray | None = None) -> tuple[int, ...]:
    """The voxel (z, y, x) that lies closest to an MNI position, among the allowed ones, bool [Z, Y, X]."""
    coarse = cavity.mni_mm[:, ::2, ::2, ::2]
    distance = sum((axis - target) ** 2 for axis, target in zip(coarse, mni))
    if allowed is not None:
        distance = np.where(allowed[::2, ::2, ::2], distance, np.inf)
    return tuple(2 * int(i) for i in np.unravel_index(distance.argmin(), distance.shape))


def blob(cavity: Cavity, centre: tuple[int, ...], volume: float, allowed: np.ndarray, rng: np.random.Generator,
         rough: float = 0.25, stretch: float = 0.25, reach_mm: float = 0.0) -> np.ndarray:
    """A lump around a voxel, of `volume` ml within allowed, bool [Z, Y, X]; below -reach_mm it may be cut to -99.

    rough: how uneven its surface is, as a share of the radius; stretch: how far its axes differ.
    """
    radius = float(np.cbrt(volume * 1000 * 3 / (4 * np.pi)))
    box = around(cavity, centre, 1.9 * radius + reach_mm + 3)
    axes = np.exp(stretch * rng.standard_normal(3))
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0] / (axes / np.cbrt(axes.prod()) * radius)[:, None]
    z, y, x = (np.arange(s.start, s.stop, dtype=np.float32) - c for s, c in zip(box, centre))
    rho = np.sqrt(sum((a[0] * z[:, None, None] + a[1] * y[:, None] + a[2] * x) ** 2 for a in turn.astype(np.float32)))
    knobbly = smooth_noise(rho.shape, max(4.0, 0.8 * radius), rng) + 0.5 * smooth_noise(rho.shape, 4.0, rng)
    rho *= 1 + rough * np.clip(knobbly, -1.8, 1.8)
    inside = np.sort(rho[allowed[box]])
    if len(inside):
        rho /= max(inside[min(round(volume * 1000), len(inside) - 1)], 1e-3)
    shape = np.full(cavity.hu.shape, -99.0, np.float32)
    shape[box] = (1 - rho) * radius
    return shape


def around(cavity: Cavity, centre: tuple[int, ...], reach_mm: float) -> tuple[slice, ...]:
    """The box of voxels within reach of a voxel."""
    reach = int(np.ceil(reach_mm))
    return tuple(slice(max(0, c - reach), min(n, c + reach + 1)) for c, n in zip(centre, cavity.hu.shape))


def bounds(coverage: np.ndarray) -> tuple[slice, ...]:
    """The smallest box, [Z, Y, X], that holds all coverage above 0."""
    found = ndimage.find_objects((coverage > 0).astype(np.uint8))
    return found[0] if found else (slice(0, 0),) * 3


def paint(cavity: Cavity, coverage: np.ndarray, hu: float | np.ndarray, rng: np.random.Generator,
          texture_hu: float = 2.0) -> None:
    """Mixes hu into the cavity where coverage, 0..1 [Z, Y, X], is above 0, with inner unevenness."""
    box = bounds(coverage)
    cover, old = coverage[box], cavity.hu[box]
    target = hu[box] if isinstance(hu, np.ndarray) else np.full(cover.shape, hu, np.float32)
    if texture_hu and cover.size:
        uneven = smooth_noise(cover.shape, 3, rng) + smooth_noise(cover.shape, 9, rng)
        target = target + 0.7 * texture_hu * uneven
    cavity.hu[box] = old + cover * (target - old)


def direction(azimuth_deg: float, height_deg: float, side: int) -> np.ndarray:
    """Unit vector in MNI axes: azimuth 0 = lateral, 90 = forward, -90 = back; height above the horizontal."""
    a, h = np.deg2rad([azimuth_deg, height_deg])
    return np.array([side * np.cos(a) * np.cos(h), np.sin(a) * np.cos(h), np.sin(h)])


def angle_deg(mni: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """Angle of MNI positions [3, ...], seen from MIDDLE, to a direction."""
    v = mni - MIDDLE[:, None, None, None]
    cosine = np.tensordot(towards, v, 1) / np.maximum(np.sqrt((v**2).sum(0)), 1)
    return np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))


def shell(cavity: Cavity, thickness: np.ndarray) -> np.ndarray:
    """A layer under the inner table, as a shape; thickness in mm of blocks [z, y, x], 0 where there is none."""
    full = voxels(thickness)
    shape = np.where(full > 0.4, full - cavity.depth_mm, -99).astype(np.float32)
    return np.where(cavity.depth_mm > 0.3, shape, -99)


def above_tentorium(mni: np.ndarray) -> np.ndarray:
    """About how far above the tentorium or the skull base of the posterior fossa MNI positions [3, ...] lie, mm."""
    x, y, z = mni
    roof = 4 - 0.36 * abs(x) - 0.3 * np.maximum(-45 - y, 0)
    return np.where(y > -16, 40.0, np.minimum(z - roof, 40.0) + np.maximum(0, y + 28) * 1.5)


def fluid_share(cavity: Cavity, *fluids: Tissue) -> np.ndarray:
    """Share of CSF, 0..1 [Z, Y, X], in the voxels of these fluids and the half-voxels around them."""
    near = cavity.of(*fluids)
    near |= ndimage.uniform_filter(near.astype(np.float32), 3) > 0.3
    return np.where(near & (cavity.depth_mm > 0.5), np.clip((30 - cavity.hu) / 20, 0, 1), 0).astype(np.float32)


def growth(shape: np.ndarray, share: float) -> np.ndarray:
    """The source of mass effect on blocks, [z, y, x], for a shape that pushes by this share of its volume."""
    return share * blocks(soft(shape))


def near_point(mni: np.ndarray, centre: tuple[float, float, float], reach_mm: float) -> np.ndarray:
    """1 at an MNI position, falling to 0 over reach_mm by a Gaussian; on positions [3, ...]."""
    squared = sum((axis - c) ** 2 for axis, c in zip(mni, centre))
    return np.exp(-squared / (2 * reach_mm**2))


