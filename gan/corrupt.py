"""Healthy slices with what does not belong in them, for a network that must draw what does, or find what does not.

Done to the brain of a slice:

hiding   blocks of a grid or a chess board, or islands of any shape, are taken away: what is there is drawn from what is
         around it
shapes   random shapes of another density: a blob, a layer along the skull, fluid, or a piece of another head. They are
         no model of any disease; they only differ, as lesions do, from what belongs in their place: brighter or darker,
         sharp or soft, large or small (pieces of another image: Tan et al. 2020, 'Detecting outliers with foreign patch
         interpolation')
scanner  what differs from scanner to scanner, and is healthy: another calibration, noise, shading at two scales, so
         that no local brightness may be trusted, and the rim of the brain, which hardened beams and shared pixels make
         denser under the skull

What a network trained so is measured on, benchmarks/pasted.py, is drawn by other rules. Lengths are in pixels of an
image of AT pixels a side, and scale with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from op.banded import gaussian_blur, smoothed

AT = 128
SECOND = 0.35                              # probability of a second shape in an image that has one
KINDS, SHARES = ("blob", "layer", "fluid", "piece"), (0.42, 0.25, 0.18, 0.15)
FLUID_HU, TISSUE_HU, MIDDLE_HU = 10.0, 28.0, 30.0        # what is all fluid, and none; of brain
DARK_RIM = 0.3                             # probability that a blob has a darker rim, as oedema makes it
CELLS = ((4, 8), (10, 24))                 # of the two scales of shading, per side
GRID_SHARE = 0.55                          # of the images in which blocks are hidden; islands in the others
PERIOD, BLOCK = (16, 48), (0.45, 0.8)      # of the grid; side of a block as a part of it
CHESS = 0.3                                # of the grids, those with every second block, as on a chess board
CHESS_PERIOD, CHESS_BLOCK = (24, 72), (0.5, 0.7)
ISLANDS, LEVEL = (3, 15), (0.0, 1.3)       # islands: smooth noise of so many cells a side, above a level
HARDLY, HARDLY_SHARE = 0.12, 0.15          # of the shapes that hardly differ, up to so much of what they else would
OWN_GRAIN, GRAIN, EDGE = 0.6, 1.0, 0.5     # of the shapes that keep the slice's grain, what is finer than one Gaussian;
#                                            the other takes away the shape's own
GAIN, SHIFT_HU, NOISE_HU = 0.12, 4.0, 6.0  # of another scanner: largest gain about 30 HU less 1, shift, white noise
SHADED = 0.6                               # of the slices whose brain a scanner shades
RIM_HU, RIM_LENGTH = (-5, 12), (2, 10)     # of what it adds under the skull, falling off with depth,
HARD = 0.35                                # and in this part of them of a harder beam:
HARD_HU, HARD_LENGTH = (6, 28), (1.2, 4.5)
SHARED_HU, SHARED = 60.0, (0.6, 1.2, 1.8)      # of what shares pixels with bone, up to so much of one of these
#                                            Gaussians of the bone


def draw_shapes(hu: torch.Tensor, brain: torch.Tensor, p: float, rng: np.random.Generator
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """hu float32 [B, N, N], brain bool [B, N, N] -> (hu with shapes, share of every pixel that is changed, 0 to 1).

    p: probability for each image. An image without brain stays as it is. Pieces come from the same batch.
    """
    images, inside = hu.numpy(), brain.numpy()
    out, changed = images.copy(), np.zeros_like(images)
    for b in range(len(images)):
        if rng.random() >= p or not inside[b].any():
            continue
        for _ in range(1 + int(rng.random() < SECOND)):
            other = images[int(rng.integers(len(images)))]
            out[b], share = _draw_one(out[b], inside[b], other, rng)
            changed[b] = np.maximum(changed[b], share)
    return torch.from_numpy(out), torch.from_numpy(changed)


def draw_grained(hu: torch.Tensor, soft: torch.Tensor, p: float, rng: np.random.Generator) -> torch.Tensor:
    """hu float32 [B, N, N] with shapes in soft brain, bool [B, N, N], of which neither grain nor edge gives them away.

    Most of them keep the grain of the slice, and some hardly differ from it: what tells that something was drawn, but
    not that anything is out of place, then tells nothing.
    """
    drawn, changed = draw_shapes(hu, soft, p, rng)
    hardly, own = (torch.from_numpy(rng.random(len(hu)) < share)[:, None, None] for share in (HARDLY, OWN_GRAIN))
    less = torch.from_numpy(rng.uniform(0, HARDLY_SHARE, len(hu))).to(hu)[:, None, None]
    drawn = hu + (drawn - hu) * torch.where(hardly, less, torch.ones_like(less))
    unit = hu.shape[-1] / AT
    grain = hu - smoothed(hu, soft, GRAIN * unit)
    grained = drawn + changed * (smoothed(drawn, soft, EDGE * unit) - drawn + grain)
    return torch.where(soft, torch.where(own, grained, drawn), hu)


def scanner(hu: torch.Tensor, soft: torch.Tensor, bone: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """hu float32 [B, N, N] as other scanners show the same heads: calibration, shading, rim and noise of soft brain."""
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    batch, unit = len(hu), hu.shape[-1] / AT

    def each(low: float, high: float, of: float = 1.0) -> torch.Tensor:
        values = rng.uniform(low, high, batch) * (rng.random(batch) < of)
        return torch.from_numpy(values).to(hu)[:, None, None]

    rim = torch.stack([_rim(one, unit, rng) for one in soft.numpy()])
    blurred = torch.stack([gaussian_blur(bone.to(hu), pixels * unit) for pixels in SHARED])
    shared = blurred[rng.integers(len(SHARED), size=batch), np.arange(batch)]
    added = shade(each(0, SHARED_HU, 0.4) * shared + rim * each(1, 1, 0.7), soft, SHIFT_HU, generator)
    noise = torch.randn(hu.shape, generator=generator) * each(0, NOISE_HU, 0.5)
    other = (hu + added * each(1, 1, SHADED) - MIDDLE_HU) * each(1 - GAIN, 1 + GAIN) + MIDDLE_HU
    return torch.where(soft, other + each(-SHIFT_HU, SHIFT_HU) + noise, hu)


def _rim(soft: np.ndarray, unit: float, rng: np.random.Generator) -> torch.Tensor:
    """HU [N, N] that a scanner adds under the skull; uneven in half of the slices."""
    depth = ndimage.distance_transform_edt(soft) / unit
    of_hu, of_length = (HARD_HU, HARD_LENGTH) if rng.random() < HARD else (RIM_HU, RIM_LENGTH)
    uneven = 0.4 * _smooth_noise(soft.shape[-1], rng) * (rng.random() < 0.5)
    return torch.from_numpy((rng.uniform(*of_hu) * np.exp(-depth / rng.uniform(*of_length)) * (1 + uneven) * soft)
                            .astype(np.float32))


def hide(batch: int, size: int, p: float, generator: torch.Generator) -> torch.Tensor:
    """What is hidden of each image with probability p, bool [B, N, N]: a fifth to four fifths of it, or less."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    draw = torch.rand(8, batch, 1, 1, generator=generator)
    chess = draw[7] < CHESS

    def drawn(of_grid: tuple[float, float], of_chess: tuple[float, float], share: torch.Tensor) -> torch.Tensor:
        return torch.where(chess, of_chess[0] + (of_chess[1] - of_chess[0]) * share,
                           of_grid[0] + (of_grid[1] - of_grid[0]) * share)

    period, block = drawn(PERIOD, CHESS_PERIOD, draw[0]) * size / AT, drawn(BLOCK, CHESS_BLOCK, draw[1])
    angle = (draw[2] - 0.5) * math.pi * (draw[3] < 0.5)                       # half of the grids stand upright
    rows = (y * angle.cos() - x * angle.sin()) / period + draw[4]
    columns = (x * angle.cos() + y * angle.sin()) / period + draw[5]
    blocks = (rows % 1 < block) & (columns % 1 < block)
    blocks |= chess & ((rows + 0.5) % 1 < block) & ((columns + 0.5) % 1 < block)
    islands = []
    for level in LEVEL[0] + (LEVEL[1] - LEVEL[0]) * draw[6].flatten():
        cells = int(torch.randint(ISLANDS[0], ISLANDS[1] + 1, (), generator=generator))
        noise = F.interpolate(torch.randn(1, 1, cells, cells, generator=generator), size=size, mode="bicubic")
        islands.append(noise[0, 0] > level)
    which = torch.rand(2, batch, 1, 1, generator=generator)
    return torch.where(which[0] < GRID_SHARE, blocks, torch.stack(islands)) & (which[1] < p)


def shade(hu: torch.Tensor, brain: torch.Tensor, strength_hu: float, generator: torch.Generator) -> torch.Tensor:
    """hu [B, N, N] plus smooth noise in the brain, at each of two scales of a standard deviation from 0 to strength_hu
    (coarse noise: Kascenas et al. 2022, 'Denoising autoencoders for unsupervised anomaly detection in brain MRI')."""
    batch, size = len(hu), hu.shape[-1]
    for low, high in CELLS:
        cells = int(torch.randint(low, high + 1, (), generator=generator))
        noise = F.interpolate(torch.randn(batch, 1, cells, cells, generator=generator), size=size, mode="bicubic")
        hu = hu + noise[:, 0] * brain * (torch.rand(batch, 1, 1, generator=generator) * strength_hu)
    return hu


def _draw_one(hu: np.ndarray, brain: np.ndarray, other: np.ndarray, rng: np.random.Generator
              ) -> tuple[np.ndarray, np.ndarray]:
    """One image [N, N] with one shape, and the share of every pixel that it changes."""
    unit = hu.shape[-1] / AT
    kind = rng.choice(KINDS, p=SHARES)
    share, rim = _share_of(kind, hu, brain, unit, rng)
    soft = rng.uniform(0.3, 1.5) * unit
    share, rim = (ndimage.gaussian_filter(part.astype(np.float32), soft) * brain for part in (share, rim))
    hu = hu - np.clip(rim - share, 0, 1) * rng.uniform(4, 14)
    mixed = hu + share * rng.uniform(0.6, 1) * (_filling(kind, hu, other, rng) - hu)
    return mixed.astype(np.float32), np.maximum(share, rim).astype(np.float32)


def _share_of(kind: str, hu: np.ndarray, brain: np.ndarray, unit: float, rng: np.random.Generator
              ) -> tuple[np.ndarray, np.ndarray]:
    """Where a shape is, 0 to 1 [N, N], and where it is with its rim."""
    depth = ndimage.distance_transform_edt(brain) / unit if kind == "layer" else None
    rows, columns = np.nonzero(brain if depth is None else brain & (depth < max(4, 2 / unit)))
    at = int(rng.integers(len(rows)))
    away = _distance(hu.shape, (rows[at], columns[at]), rng) / unit
    uneven = _smooth_noise(hu.shape[-1], rng)
    if kind == "layer":
        thickness = np.exp(rng.uniform(np.log(1.2), np.log(10))) * (1 - (away / rng.uniform(10, 45)) ** 2)
        share = depth < thickness * (1 + 0.3 * uneven)
        if rng.random() < 0.7:                                       # the falx stops most of them
            middle = columns.mean()
            share = share & (np.sign(np.arange(hu.shape[1]) - middle) == np.sign(columns[at] - middle))
        return share, share
    if kind == "fluid":
        fluid = np.clip((TISSUE_HU - hu) / (TISSUE_HU - FLUID_HU), 0, 1) * brain
        share = fluid * (away + 6 * uneven < rng.uniform(8, 30))
        return share, share
    radius = np.exp(rng.uniform(np.log(3), np.log(26)))
    share = away / radius + rng.uniform(0, 0.5) * uneven < 1
    if kind == "blob" and rng.random() < DARK_RIM:
        return share, share | (away / (radius * rng.uniform(1.1, 1.6)) < 1)
    return share, share


def _filling(kind: str, hu: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """HU [N, N] of what fills a shape."""
    grain = ndimage.gaussian_filter(rng.standard_normal(hu.shape), 0.6) * rng.uniform(0, 8) * (rng.random() < 0.6)
    if kind == "piece":
        return np.roll(other[:, ::-1] if rng.random() < 0.5 else other, rng.integers(-20, 21, 2), (0, 1))
    if kind == "fluid":
        return rng.uniform(28, 70) + grain
    if rng.random() < 0.5:                                           # another density
        return (rng.uniform(42, 85) if rng.random() < 0.65 else rng.uniform(0, 22)) + grain
    return hu + rng.choice((-1, 1)) * np.exp(rng.uniform(np.log(4), np.log(35)))       # its own texture, shifted


def _distance(shape: Sequence[int], at: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """From a place, in a metric that is stretched in a random direction: [N, N], pixels."""
    y, x = (axis - place for axis, place in zip(np.ogrid[:shape[0], :shape[1]], at))
    angle, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.4, 0.4))
    cos, sin = np.cos(angle), np.sin(angle)
    return np.hypot((cos * x + sin * y) * stretch, (cos * y - sin * x) / stretch)


def _smooth_noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth normal noise [size, size] with 3 to 11 cells a side."""
    cells = int(rng.integers(3, 12))
    grid = torch.from_numpy(rng.standard_normal((1, 1, cells, cells)).astype(np.float32))
    return F.interpolate(grid, size=size, mode="bicubic", align_corners=False)[0, 0].numpy()
