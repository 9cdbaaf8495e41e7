"""Mass effect: how the brain gives way inside a rigid skull, and the tools to paint in it.

The brain is taken for a soft solid in a closed box: a source (blood, tumour, swelling) raises the pressure p, tissue
moves down the pressure gradient, and the CSF spaces yield. With u the displacement, s the source (volume gained per
volume) and k the yield, which grows with the square of the share of CSF (wide spaces give way before thin ones),

    u = -c grad p,    div u = s - k p    =>    -div(c grad p) + k p = s,

a screened Poisson equation. c is 0 in bone (no displacement through the skull) and small in falx and tentorium, so
that sulci and ventricles narrow, the midline shifts, and shifts less where the falx holds it, without being told.
Solved on blocks of STEP voxels; large changes go in several steps, each from the state the last one left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage, sparse
from scipy.sparse.linalg import cg
from torch.nn.functional import avg_pool3d, grid_sample, interpolate

from demos.anatomy import Head, Tissue

STEP = 4                        # voxels (mm) a side of a block
YIELD_PER_MM2 = 1 / 60**2       # k in sulci and cisterns: pressure falls off over about 60 mm of pure CSF
VENTRICLES_YIELD = 5.0          # times as much
DURA_STIFFNESS = 12.0           # c falls by 1 + this times the share of falx or tentorium in a block
RIM_MM = 3.0                    # displacement fades to zero over this below the inner table
DURA = (Tissue.FALX, Tissue.TENTORIUM)


@dataclass
class Cavity:
    """The box around a head's intracranial space, [Z, Y, X] voxels of 1 mm, every side a multiple of STEP.

    The arrays are those of Head, cut out and copied: lesions change them in place. box says where they lie.
    """

    tissue: np.ndarray
    hu: np.ndarray
    depth_mm: np.ndarray
    midline_mm: np.ndarray
    mni_mm: np.ndarray          # float32 [3, Z, Y, X]
    box: tuple[slice, slice, slice]

    def of(self, *tissues: Tissue) -> np.ndarray:
        """bool [Z, Y, X]: where one of the tissues lies."""
        table = np.zeros(256, bool)
        table[list(tissues)] = True
        return table[self.tissue]

    def mni(self) -> np.ndarray:
        """MNI mm of the blocks' middles, float32 [3, z, y, x]."""
        return blocks(self.mni_mm)


def enter(head: Head) -> Cavity:
    """The intracranial box of a head, as copies."""
    inside = head.depth_mm > 0
    box = tuple(_span(inside.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    arrays = (head.tissue, head.hu, head.depth_mm, head.midline_mm)
    return Cavity(*(a[box].copy() for a in arrays), head.mni_mm[(slice(None), *box)].astype(np.float32), box)


def leave(head: Head, cavity: Cavity) -> Head:
    """A head like this one with the cavity's tissue, HU, midline and MNI positions; skull and depth are as before."""
    fields = {}
    for name in ("tissue", "hu", "midline_mm"):
        fields[name] = getattr(head, name).copy()
        fields[name][cavity.box] = getattr(cavity, name)
    mni = np.array(head.mni_mm)
    mni[(slice(None), *cavity.box)] = cavity.mni_mm
    return replace(head, mni_mm=mni, **fields)


def _span(occupied: np.ndarray) -> slice:
    first, last = np.flatnonzero(occupied)[[0, -1]]
    size = min(-(-(last + 1 - first) // STEP) * STEP, len(occupied) // STEP * STEP)
    start = min(first, len(occupied) - size)
    return slice(int(start), int(start + size))


# ---- blocks and smooth fields


def blocks(field: np.ndarray) -> np.ndarray:
    """Means over blocks of STEP voxels, float32: [..., Z, Y, X] to [..., z, y, x]."""
    x = torch.from_numpy(np.ascontiguousarray(field, dtype=np.float32))
    coarse = avg_pool3d(x.reshape(-1, 1, *field.shape[-3:]), STEP)[:, 0].numpy()
    return coarse.reshape(*field.shape[:-3], *coarse.shape[1:])


def voxels(field: np.ndarray) -> np.ndarray:
    """Blocks back to voxels, linearly, float32: [z, y, x] or [C, z, y, x] to [.., Z, Y, X]."""
    x = torch.from_numpy(np.ascontiguousarray(field, dtype=np.float32)).reshape(1, -1, *field.shape[-3:])
    full = interpolate(x, scale_factor=STEP, mode="trilinear", align_corners=False)[0].numpy()
    return full.reshape(*field.shape[:-3], *full.shape[1:])


def smooth_noise(shape: tuple[int, ...], length_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of about unit variance and zero mean, float32 [Z, Y, X]; length_mm is half a typical blob."""
    step = length_mm / 2
    coarse = tuple(int(np.ceil(n / step)) + 3 for n in shape)
    noise = ndimage.gaussian_filter(rng.standard_normal(coarse).astype(np.float32), 1.2)
    size = [round(n * step) for n in coarse]
    x = interpolate(torch.from_numpy(noise / noise.std())[None, None], size=size, mode="trilinear", align_corners=True)
    return x[0, 0, :shape[0], :shape[1], :shape[2]].numpy()


# ---- displacement


def displacement(cavity: Cavity, growth: np.ndarray, steps: int = 1, carried: bool = False,
                 ventricles_yield: float = VENTRICLES_YIELD) -> np.ndarray:
    """Where each block's contents come from: float32 [3, z, y, x] mm (z, y, x), to be added to its position.

    growth   float [z, y, x], volume gained per volume (negative: lost), over all steps. 1 in one step clears a layer
             along the skull of what was there; a ball takes 2 in two steps for nine tenths
    ventricles_yield  how many times as much as sulci they yield; 0 where they themselves are under pressure
    carried  the source moves with the tissue (swelling, ventricles) instead of staying (a clot that fills a place)
    """
    csf = blocks(cavity.of(Tissue.CSF)) ** 2 + ventricles_yield * blocks(cavity.of(Tissue.VENTRICLE)) ** 2
    dura = blocks(cavity.of(*DURA))
    inside = blocks(cavity.depth_mm > 0) > 0.5
    come_from = np.zeros((3, *inside.shape), np.float32)
    for _ in range(steps):
        source = pulled(growth, come_from) if carried else growth
        step = -_push(inside, source / steps, pulled(csf, come_from), pulled(dura, come_from))
        come_from = step + np.stack([pulled(axis, step) for axis in come_from])
    return np.round(come_from, 3)           # um: the order of sums, which depends on the machine's cores, stays below


def pulled(field: np.ndarray, come_from: np.ndarray) -> np.ndarray:
    """A field of blocks [z, y, x] sampled where each block's contents come from."""
    at = np.indices(field.shape, np.float32) + come_from / STEP
    return ndimage.map_coordinates(field, at, order=1, mode="nearest")


def _push(inside: np.ndarray, source: np.ndarray, csf: np.ndarray, dura: np.ndarray) -> np.ndarray:
    """Displacement of the tissue in mm, float32 [3, z, y, x], by the equation of the module's docstring."""
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(inside.sum())
    conduct = 1 / (1 + DURA_STIFFNESS * dura)
    diagonal = csf[inside].astype(np.float64) * YIELD_PER_MM2 + 1e-7
    faces = []
    for axis in range(3):
        here, there = _neighbours(inside.ndim, axis)
        both = inside[here] & inside[there]
        c = np.minimum(conduct[here], conduct[there])[both] / STEP**2
        faces.append((number[here][both], number[there][both], c))
    a, b, c = map(np.concatenate, zip(*faces))
    count = len(diagonal)
    diagonal += np.bincount(a, c, count) + np.bincount(b, c, count)
    matrix = sparse.coo_matrix((-np.r_[c, c], (np.r_[a, b], np.r_[b, a])), (count, count)).tocsr()
    matrix += sparse.diags(diagonal)
    solution, _ = cg(matrix, source[inside].astype(np.float64), rtol=1e-4, maxiter=400, M=sparse.diags(1 / diagonal))
    pressure = np.zeros(inside.shape)
    pressure[inside] = solution

    push = np.zeros((3, *inside.shape), np.float32)
    for axis in range(3):                                       # mean of the two faces of a block
        here, there = _neighbours(inside.ndim, axis)
        flow = np.where(inside[here] & inside[there], np.minimum(conduct[here], conduct[there]), 0)
        flow = flow * (pressure[here] - pressure[there]) / STEP
        push[axis][here] += flow / 2
        push[axis][there] += flow / 2
    return push


def _neighbours(ndim: int, axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    here, there = [slice(None)] * ndim, [slice(None)] * ndim
    here[axis], there[axis] = slice(None, -1), slice(1, None)
    return tuple(here), tuple(there)


def move(cavity: Cavity, come_from: np.ndarray) -> float:
    """Warps the cavity in place by a displacement of blocks; returns the midline shift, mm, the largest at the septum.

    HU are interpolated linearly, tissue by nearest neighbour; midline and MNI positions, which are smooth, by blocks.
    The skull, and depth with it, stays.
    """
    fade = np.clip(cavity.depth_mm / RIM_MM, 0, 1)
    size = cavity.hu.shape
    grid = torch.from_numpy(voxels(come_from)) * torch.from_numpy(fade)
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = -1
        grid[axis].add_(torch.arange(size[axis], dtype=torch.float32).reshape(shape)).mul_(2 / (size[axis] - 1)).sub_(1)
    grid = grid.flip(0).permute(1, 2, 3, 0)[None]               # grid_sample wants x, y, z last
    inside = cavity.depth_mm > 0

    def sample(array: np.ndarray, mode: str) -> np.ndarray:
        x = torch.from_numpy(array.astype(np.float32))[None, None]
        return grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=True)[0, 0].numpy()

    cavity.hu = np.where(inside, sample(cavity.hu, "bilinear"), cavity.hu)
    cavity.tissue = np.where(inside, sample(cavity.tissue, "nearest").astype(np.uint8), cavity.tissue)

    smooth = np.stack([blocks(cavity.midline_mm), *cavity.mni()])
    change = voxels(np.stack([pulled(field, come_from) - field for field in smooth])) * fade
    x, y, z = smooth[1:]
    septum = (abs(x) < 5) & (y > -25) & (y < 28) & (z > 0) & (z < 26)
    shift = float(abs(pulled(smooth[0], come_from) - smooth[0])[septum].max(initial=0.0))
    cavity.midline_mm += change[0]
    cavity.mni_mm += change[1:]
    return shift
