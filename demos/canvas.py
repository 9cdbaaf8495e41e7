"""What a phantom head is painted on and with: a grid of HU and tissue labels, and shapes placed in MNI coordinates.

Points and sizes are (z, y, x) in MNI mm: superior, anterior, right. Volumes are torch, [Z, Y, X] at 1 mm with z
growing upwards, y backwards and x to the patient's left.
"""

from __future__ import annotations

from copy import copy
from enum import IntEnum

import numpy as np
import torch
from torch.nn.functional import grid_sample, interpolate

SHAPE = (201, 241, 201)       # z, y, x voxels of 1 mm
STEP = 4                      # mm, the coarse grid that warps live on, its knots on voxels
SIGNS = (1, -1, -1)           # directions of the voxel axes in MNI space
CENTRE = (99.0, 115.0, 100.0) # the voxel of the MNI point MIDDLE
MIDDLE = (2.0, -16.0, 0.0)
MARGIN_MM = 8.0               # how far a warped shape may reach beyond its affine place

Point = tuple[float, float, float]


class Tissue(IntEnum):
    AIR = 0
    SKIN = 1
    FAT = 2
    MUSCLE = 3
    BONE = 4
    DIPLOE = 5
    SINUS = 6        # air cells, nasal cavity, pharynx
    ORBIT = 7        # globes, optic nerves, eye muscles
    CSF = 8          # subarachnoid space, sulci, cisterns
    VENTRICLE = 9
    GREY = 10
    WHITE = 11
    DEEP_GREY = 12
    BRAINSTEM = 13   # and the upper cord
    CEREBELLUM = 14
    FALX = 15
    TENTORIUM = 16
    CHOROID = 17     # calcified plexus
    PINEAL = 18
    VESSEL = 19      # venous sinuses, arteries of the base


class Canvas:
    """HU and labels, painted back to front; `mni` [3, Z, Y, X] says where each voxel lies in MNI space."""

    def __init__(self, mni: torch.Tensor, scales: Point) -> None:
        self.mni, self.scales = mni, scales
        self.hu = torch.full(SHAPE, -1000.0)
        self.tissue = torch.zeros(SHAPE, dtype=torch.uint8)
        self.start = (0, 0, 0)

    def part(self, at: tuple[slice, ...], mni: torch.Tensor) -> Canvas:
        """A window on the same paint, placed by other coordinates [3, ...], such as the brain's own."""
        part = copy(self)
        part.mni, part.hu, part.tissue = mni, self.hu[at], self.tissue[at]
        part.start = tuple(a.start for a in at)
        return part

    def paint(self, cover: torch.Tensor, hu: float | torch.Tensor, tissue: Tissue, at: tuple = (...,)) -> None:
        """`cover` is the share of each voxel that the paint takes; `at` the part of the grid it spans."""
        self.hu[at].lerp_(torch.as_tensor(hu, dtype=torch.float32), cover)
        self.tissue[at].masked_fill_(cover > 0.5, int(tissue))

    def around(self, low: Point, high: Point) -> tuple[slice, ...]:
        """The part of the grid that holds a box of MNI space."""
        at = []
        for i in range(3):
            ends = sorted(CENTRE[i] + SIGNS[i] * (end - MIDDLE[i]) * self.scales[i] for end in (low[i], high[i]))
            start, stop = int(ends[0] - MARGIN_MM) - self.start[i], int(ends[1] + MARGIN_MM) + 2 - self.start[i]
            size = self.hu.shape[i]
            at.append(slice(min(max(start, 0), size), min(max(stop, 0), size)))
        return tuple(at)

    def ball(self, centre: Point, radii: Point, hu: float | torch.Tensor, tissue: Tissue) -> None:
        at, mni = self.near(centre, centre, max(radii))
        self.paint(cover(ellipsoid(mni, centre, radii)), hu, tissue, at)

    def rod(self, start: Point, end: Point, radii: tuple[float, float], hu: float, tissue: Tissue,
            within: torch.Tensor | None = None) -> None:
        """A capsule; `within` is a signed distance over the grid that cuts it."""
        at, mni = self.near(start, end, max(radii))
        inside = capsule(mni, start, end, radii)
        self.paint(cover(inside if within is None else torch.minimum(inside, within[at])), hu, tissue, at)

    def near(self, start: Point, end: Point, reach: float) -> tuple[tuple[slice, ...], torch.Tensor]:
        """The part of the grid within `reach` mm of the box between two points, and its MNI coordinates."""
        at = self.around(tuple(np.minimum(start, end) - reach), tuple(np.maximum(start, end) + reach))
        return at, self.mni[(slice(None), *at)]


def ellipsoid(mni: torch.Tensor, centre: Point, radii: Point, power: float = 2.0) -> torch.Tensor:
    """About the signed distance in mm to an ellipsoid (boxier with a higher power), positive inside."""
    parts = [(mni[i] - centre[i]).div_(radii[i]) for i in range(3)]
    if power == 2:
        return (1 - sum(part.square_() for part in parts).sqrt_()).mul_(min(radii))
    return (1 - sum(part.abs_().pow_(power) for part in parts).pow_(1 / power)).mul_(min(radii))


def mirrored(point: Point, side: int) -> Point:
    """A point of the right side, on the side that 1 (right) or -1 (left) says."""
    return (point[0], point[1], side * point[2])


def capsule(mni: torch.Tensor, start: Point, end: Point, radii: tuple[float, float]) -> torch.Tensor:
    """Signed distance in mm to a rod between two points, positive inside, its radius growing evenly."""
    axis = np.subtract(end, start)
    along = sum((mni[i] - start[i]) * float(axis[i]) for i in range(3)).div_(float(axis @ axis)).clamp_(0, 1)
    square = sum((mni[i] - start[i] - along * float(axis[i])).square_() for i in range(3))
    return radii[0] + (radii[1] - radii[0]) * along - square.sqrt_()


def cover(distance: torch.Tensor) -> torch.Tensor:
    """Share of a 1 mm voxel inside a surface at this signed distance."""
    return (distance + 0.5).clamp_(0, 1)


def resize(volume: torch.Tensor, shape: tuple) -> torch.Tensor:
    """[C, ...] interpolated so that the corners stay the corners."""
    return interpolate(volume[None], size=shape, mode="trilinear", align_corners=True)[0]


def refine(coarse: torch.Tensor, at: tuple[slice, ...]) -> torch.Tensor:
    """A field [C, ...] on the coarse grid, interpolated at the voxels `at`, whose ends lie on coarse knots."""
    knots = tuple(slice(a.start // STEP, (a.stop - 1) // STEP + 1) for a in at)
    return resize(coarse[(slice(None), *knots)], tuple(a.stop - a.start for a in at))


def smooth_noise(rng: np.random.Generator, knot_mm: float, shape: tuple, channels: int = 1) -> torch.Tensor:
    """Noise of about unit size over the whole grid, one knot each `knot_mm`: [channels, *shape]."""
    knots = tuple(int(round(n / knot_mm)) + 1 for n in SHAPE)
    return resize(torch.from_numpy(rng.standard_normal((channels, *knots), dtype=np.float32)), shape)


def sample(maps: np.ndarray, box: tuple, mni: torch.Tensor) -> torch.Tensor:
    """Maps [C, ...] that span `box` (MNI mm, corner to corner), read at the points `mni` [3, ...]."""
    grid = torch.stack([(mni[i] - (box[i][0] + box[i][1]) / 2) / ((box[i][1] - box[i][0]) / 2) for i in (2, 1, 0)], -1)
    return grid_sample(torch.from_numpy(maps)[None], grid[None], padding_mode="border", align_corners=True)[0]
