"""Seeded synthetic heads for tests: ellipsoids with a skull, scalp, ventricles; written in the real formats."""

from __future__ import annotations

import numpy as np

from ct.scan import Scan


def synthetic_head(slices=24, size=96, spacing_mm=(5.0, 2.4, 2.4), angle_deg=0.0, shift_mm=(0.0, 0.0), noise=3.0,
                   lesion=None, seed=0):
    """A head of ellipsoids: hu float32 [S, H, W] (inferior to superior) and its true brain mask, bool [S, H, W].

    lesion: (z_mm, y_mm, x_mm, radius_mm, hu) relative to the brain's centre, or None.
    The brain is 140 mm long, 120 mm wide and 130 mm high; the vertex lies 10 mm below the top slice.
    """
    rng = np.random.default_rng(seed)
    dz, dy, dx = spacing_mm
    z = (np.arange(slices) - (slices - 1)) * dz + 75.0                      # brain top (65 mm) is 10 mm below the top
    y = (np.arange(size) - (size - 1) / 2) * dy - shift_mm[0]
    x = (np.arange(size) - (size - 1) / 2) * dx - shift_mm[1]
    z, y, x = np.meshgrid(z, y, x, indexing="ij")
    a = np.deg2rad(angle_deg)
    y, x = np.cos(a) * y + np.sin(a) * x, -np.sin(a) * y + np.cos(a) * x

    def inside(ry, rx, rz, cy=0.0, cx=0.0, cz=0.0):
        return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 + ((z - cz) / rz) ** 2 <= 1

    egg = 1 + 0.12 * y / 70                                                  # wider behind: front and back differ
    x_true, x = x, x / egg
    brain = inside(70, 60, 65)
    hu = np.full(z.shape, -1000.0)
    hu[inside(84, 74, 79)] = 40                                              # scalp
    hu[inside(78, 68, 73)] = 1000                                            # skull
    hu[brain] = 30
    hu[inside(66, 56, 61) & ~inside(60, 50, 55)] = 38                        # cortex
    x = x_true
    hu[inside(25, 6, 14, cy=-5, cx=9, cz=8) | inside(25, 6, 14, cy=-5, cx=-9, cz=8)] = 8
    if lesion is not None:
        lz, ly, lx, radius, value = lesion
        hu[((z - lz) ** 2 + (y - ly) ** 2 + (x - lx) ** 2 <= radius**2) & brain] = value
    hu = hu + rng.normal(0, noise, hu.shape)
    return hu.astype(np.float32), brain


def synthetic_scan(scan_id="head", **kwargs) -> tuple[Scan, np.ndarray]:
    """The same head as a Scan, with its true brain mask beside it."""
    spacing = kwargs.get("spacing_mm", (5.0, 2.4, 2.4))
    hu, brain = synthetic_head(**kwargs)
    return Scan(scan_id, hu, np.arange(len(hu)) * spacing[0], tuple(spacing[1:])), brain
