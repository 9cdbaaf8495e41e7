"""The canonical frame: head centred, midline upright, scaled to a fixed head size; and the way back.

One in-plane rotation, shift and isotropic scale serves all slices of a scan. Size and centre come from the brain
mask's area and centroid, which a leak or a missing bit moves little; angle and lateral shift come from left-right
symmetry, since an ellipse's axes tell little about a round head and are pulled aside by an asymmetric mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage, optimize
from torch.nn import functional

from ct.morphology import box, dilate, filled, opened
from ct.scan import Scan, ScanError
from ct.settings import StandardiseSettings
from op.threads import in_batches

MIDDLE = 0.7                       # slices with more than this share of the largest area measure the head
HEAD_MM = 150.0                    # diameter of a circle as large as an adult head's mean section in those slices
WORK_SIZE = 96                     # pixels of the small frame in which the midline is searched
WORK_FRACTION = 0.60               # and the head in it
OUTLINE_SIZE = 128                 # pixels of the small frame in which the head's outline is found
SKULL_MM = 16.0                    # from the brain's edge outwards: the skull and most of the scalp
SYMMETRY_SLICES = 6                # of those, for the midline
SYMMETRY_HU = (-20.0, 100.0)       # the range every source has
TRUNCATION_HU = 25.0               # larger left-right differences count no more: a bleed must not turn the head
MAX_TURN_DEG = 25.0                # searched around upright and around the mask's own axis
SURE_BONE_HU, EDGE_HU = 100.0, 50.0    # in native pixels: no blood, with a margin to ct.window.BONE_HU; no brain
LEAST_SOFT = 0.3                   # of a pixel must be soft tissue, or all of it counts as bone
SAMPLES = 4                        # a side of an output pixel at most, against aliasing
WORTH_THREADS = 1 << 19            # points that are: some milliseconds


@dataclass(frozen=True)
class Frame:
    """Where the canonical frame lies in a scan's pixels; plain numbers, so that it can be written as JSON.

    Frame pixel (i, j) lies at native (row, column) = (centre + step * R @ (i - m, j - m)) / spacing, where
    m = (size - 1) / 2 and R = [[cos a, -sin a], [sin a, cos a]] for a = angle_deg.

    size       pixels of the frame's side, N
    shape      (H, W) of a native slice
    spacing    native (row, column) pixel spacing, mm; (1, 1) where unknown
    centre     of the frame, from native pixel (0, 0), in units of spacing
    angle_deg  how far the head is turned, from the row axis towards the column axis
    step       side of a frame pixel, in units of spacing
    """

    size: int
    shape: tuple[int, int]
    spacing: tuple[float, float]
    centre: tuple[float, float]
    angle_deg: float
    step: float


@dataclass(frozen=True)
class Standardised:
    """A scan in the canonical frame.

    hu               float32 [S, N, N], within settings.hu_clip
    brain            bool [S, N, N]
    below_vertex_mm  float64 [S], millimetres below the top of the brain, negative above it
    frame            the way back to native pixels
    """

    hu: np.ndarray
    brain: np.ndarray
    below_vertex_mm: np.ndarray
    frame: Frame


def standardise(scan: Scan, brain: np.ndarray, settings: StandardiseSettings) -> Standardised:
    """Brings a scan and its brain mask, bool [S, H, W], to the canonical frame. Raises ScanError as find_frame."""
    return in_frame(scan, brain, find_frame(scan, brain, settings), settings)


def in_frame(scan: Scan, brain: np.ndarray, frame: Frame, settings: StandardiseSettings) -> Standardised:
    """A scan and its brain mask, bool [S, H, W], in a frame that was found for it."""
    low, high = settings.hu_clip
    above = np.clip(scan.hu, low, high)
    above -= np.float32(low)                                       # outside the slice lies 0, as to_frame has it
    if settings.bone_apart:
        bone = native_bone(scan)
        part = to_frame((~bone).astype(np.float32), frame)
        soft = to_frame(above * ~bone, frame) / np.maximum(part, 1e-6)
        hu = np.where(part < LEAST_SOFT, np.float32(high - low), soft)
    else:
        hu = to_frame(above, frame)
    hu += np.float32(low)
    np.clip(hu, low, high, out=hu)                                 # interpolation rounds a little beyond
    if settings.remove_outside:
        hu[~_head(above, brain, frame, settings)] = low
    below_vertex = vertex_mm(brain, scan.position_mm) - scan.position_mm
    return Standardised(hu, to_frame(brain, frame), below_vertex, frame)


def native_bone(scan: Scan) -> np.ndarray:
    """Bone with the edge that it is blurred into, bool [S, H, W]: SURE_BONE_HU or what the source clipped at, and the
    pixels next to it that are denser than soft tissue without blood. Outside the slice there is none."""
    sure = scan.hu >= min(SURE_BONE_HU, scan.saturation_hu[1] - 0.5)
    return sure | (dilate(sure, 1) & (scan.hu >= EDGE_HU))


# ---- finding the frame


def find_frame(scan: Scan, brain: np.ndarray, settings: StandardiseSettings) -> Frame:
    """The canonical frame of a scan, from its brain mask, bool [S, H, W], and the symmetry of its HU.

    Raises ScanError if the mask does not fit the scan or is empty.
    """
    if brain.shape != scan.hu.shape:
        raise ScanError(f"{scan.scan_id}: brain mask {brain.shape} does not fit the scan {scan.hu.shape}")
    area = brain.sum(axis=(1, 2))
    if not area.any():
        raise ScanError(f"{scan.scan_id}: cannot find the head's frame, the brain mask is empty")
    weight = np.clip((area / area.max() - MIDDLE) / (1 - MIDDLE), 0, 1)    # gradual: no slice decides by a hair
    middle = np.flatnonzero(weight)
    rows, columns = box(brain[middle].any(axis=0))
    presence = np.tensordot(weight[middle] / weight.sum(), brain[middle, rows, columns], 1)      # [h, w] in 0..1
    spacing = tuple(float(x) for x in scan.pixel_spacing_mm or (1.0, 1.0))
    points = (np.argwhere(presence) + (rows.start, columns.start)) * spacing       # [P, 2], units of spacing
    presence = presence[presence > 0]
    centre = np.average(points, axis=0, weights=presence)
    diameter = float(np.sqrt(presence.sum() * np.prod(spacing) * 4 / np.pi))

    rough = Frame(WORK_SIZE, scan.hu.shape[1:], spacing, tuple(centre.tolist()), 0.0,
                  diameter / (WORK_FRACTION * WORK_SIZE))
    chosen = middle[np.linspace(0, len(middle) - 1, min(SYMMETRY_SLICES, len(middle))).astype(int)]
    upright = _find_midline(scan, brain, chosen, rough, _axis_deg(points, presence))

    return replace(upright, size=settings.size, step=diameter / (settings.head_fraction * settings.size))


def vertex_mm(brain: np.ndarray, position_mm: np.ndarray) -> float:
    """Where the brain ends above, mm on the scale of position_mm; from a mask, bool [S, H, W], that is not empty.

    Above its largest section the brain is close to half an ellipsoid: at a fraction f of the largest area a slice
    lies (1 - sqrt(1 - f)) semi-axes below the vertex. A line through those slices finds the vertex between
    slices, and above the top slice where the scan ends too early.
    """
    area = brain.sum(axis=(1, 2))
    top = int(np.flatnonzero(area)[-1])
    depth = 1 - np.sqrt(1 - area / area.max())
    cap = np.arange(int(area.argmax()), top + 1)
    cap = cap[(depth[cap] > 0.02) & (depth[cap] < 0.7)]
    if len(cap) < 3:
        return float(position_mm[top])
    slope, vertex = np.polyfit(depth[cap], position_mm[cap], 1)
    empty_above = position_mm[top + 1] if top + 1 < len(position_mm) else np.inf
    return float(np.clip(vertex, position_mm[top], empty_above)) if slope < 0 else float(position_mm[top])


def _axis_deg(points: np.ndarray, weights: np.ndarray) -> float:
    """Turn of the long axis of points [P, 2] from the row axis, in -90..90 degrees."""
    row, column = np.linalg.eigh(np.cov(points.T, aweights=weights))[1][:, 1]
    return float(np.rad2deg(np.arctan2(column * np.sign(row), abs(row))))


def _find_midline(scan: Scan, brain: np.ndarray, slices: np.ndarray, rough: Frame, axis_deg: float) -> Frame:
    """rough turned and shifted so that its middle column lies on the plane of left-right symmetry."""
    larger = replace(rough, size=int(1.5 * rough.size))            # room to turn in
    hu = to_frame(np.clip(scan.hu[slices], *SYMMETRY_HU), larger, fill=SYMMETRY_HU[0])
    mask = to_frame(brain[slices], larger)
    mm = HEAD_MM / (WORK_FRACTION * WORK_SIZE)
    for image, inside in zip(hu, mask):
        image[~dilate(inside, SKULL_MM / mm)] = SYMMETRY_HU[0]
    hu = torch.from_numpy(ndimage.gaussian_filter(hu, (0, 1, 1)) - SYMMETRY_HU[0])
    # The mask's own symmetry counts like a skull's edge: it stays where HU are blurred or saturated.
    hu = torch.cat([hu, torch.from_numpy(ndimage.gaussian_filter(mask.astype(np.float32), (0, 1, 1))) * 50])

    def turned(angle_deg: float, shift: float) -> torch.Tensor:
        middle = (larger.size - 1) / 2 + shift * _frame_axes(angle_deg)[1]
        local = Frame(WORK_SIZE, (larger.size,) * 2, (1.0, 1.0), tuple(middle), angle_deg, 1.0)
        return _sample(hu, *_to_native(local), (WORK_SIZE, WORK_SIZE), 1)

    def best_shift(angle_deg: float) -> tuple[float, float, float]:
        wrapped = turned(angle_deg, 0.0).repeat(1, 1, 2)
        mirrored, half = wrapped.flip(-1), WORK_SIZE // 2
        # Shifted by k, columns i and j that meet meet again as j and i: half of them tell the mean of all.
        firsts = ((k, (WORK_SIZE - k) // 2) for k in range(-8, 9))
        return min((_asymmetry(wrapped[..., i + k:i + k + half], mirrored[..., i:i + half]), angle_deg, k / 2)
                   for k, i in firsts)

    turns = np.arange(-MAX_TURN_DEG, MAX_TURN_DEG + 1, 2.5)
    starts = sorted(best_shift(a) for a in np.unique(np.concatenate([turns, turns + axis_deg]).round(1)))

    def cost(x: np.ndarray) -> float:
        image = turned(x[0], x[1])
        return _asymmetry(image, image.flip(-1))

    def refined(start: tuple[float, float, float]) -> optimize.OptimizeResult:
        simplex = np.array(start[1:]) + np.array([[0, 0], [2.0, 0], [0, 1.0]])
        options = {"initial_simplex": simplex, "xatol": 0.02, "fatol": 1e-4, "maxfev": 80}
        return optimize.minimize(cost, simplex[0], method="Nelder-Mead", options=options)

    found = min(map(refined, starts[:3]), key=lambda result: result.fun)         # the valley has side pockets
    angle_deg, shift = map(float, found.x)
    centre = np.asarray(rough.centre) + shift * rough.step * _frame_axes(angle_deg)[1]
    return replace(rough, angle_deg=angle_deg, centre=tuple(centre.tolist()))


def _asymmetry(image: torch.Tensor, mirrored: torch.Tensor) -> float:
    """Mean truncated difference; a robust opposite of correlation."""
    return float((image - mirrored).abs_().clamp_(max=TRUNCATION_HU).mean())


# ---- the head's outline


def _head(above: np.ndarray, brain: np.ndarray, frame: Frame, settings: StandardiseSettings) -> np.ndarray:
    """What lies no further than settings.margin_mm outside the head, bool [S, N, N]; above: HU over hu_clip[0].

    The head is the tissue that hangs together with the brain in 3D once thin things are opened away.
    """
    low = settings.hu_clip[0]
    small = replace(frame, size=OUTLINE_SIZE, step=frame.step * frame.size / OUTLINE_SIZE)
    hu, brain = to_frame(above, small, max_samples=2) + np.float32(low), to_frame(brain, small, max_samples=2)
    px = settings.head_fraction * OUTLINE_SIZE / HEAD_MM           # pixels of the small frame per mm
    tissue = opened(hu > low + 12, 4.0 * px) | brain
    labels, _ = ndimage.label(tissue)
    sizes = np.bincount(labels[brain])
    head = labels == sizes.argmax()
    outline = np.stack([filled(image) for image in dilate(head, 6.0 * px)])
    kept = dilate(outline, (settings.margin_mm - 6.0) * px)
    full = replace(frame, shape=(OUTLINE_SIZE, OUTLINE_SIZE), spacing=(1.0, 1.0), angle_deg=0.0,
                   centre=((OUTLINE_SIZE - 1) / 2,) * 2, step=OUTLINE_SIZE / frame.size)
    return to_frame(kept, full)


# ---- resampling


def to_frame(volume: np.ndarray, frame: Frame, fill: float = 0.0, max_samples: int = SAMPLES) -> np.ndarray:
    """Native maps [S, H, W] in the canonical frame: bool stays bool (a majority), all else float32 [S, N, N].

    Linear, and where a frame pixel is larger than a native one the mean of at most max_samples x max_samples
    points in it; fill outside the slice.
    Raises ValueError if the volume is not of the frame's native shape.
    """
    if volume.shape[1:] != tuple(frame.shape):
        raise ValueError(f"to_frame: expected slices of {tuple(frame.shape)}, got {volume.shape[1:]}")
    matrix, offset = _to_native(frame)
    return _resample(volume, matrix, offset, (frame.size, frame.size), fill, max_samples)


def from_frame(maps: np.ndarray, frame: Frame, fill: float = 0.0) -> np.ndarray:
    """Maps of the canonical frame [S, N, N] in native pixels, bool or float32 [S, H, W]; to_frame's inverse.

    Raises ValueError if the maps are not of the frame's size.
    """
    if maps.shape[1:] != (frame.size, frame.size):
        raise ValueError(f"from_frame: expected slices of {(frame.size,) * 2}, got {maps.shape[1:]}")
    matrix, offset = _to_native(frame)
    inverse = np.linalg.inv(matrix)
    return _resample(maps, inverse, -inverse @ offset, tuple(frame.shape), fill, SAMPLES)


def _frame_axes(angle_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """The frame's row and column directions in native (row, column), unit length."""
    a = np.deg2rad(angle_deg)
    return np.array([np.cos(a), np.sin(a)]), np.array([-np.sin(a), np.cos(a)])


def _to_native(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """matrix [2, 2] and offset [2] with native = matrix @ (i, j) + offset."""
    rotation = np.stack(_frame_axes(frame.angle_deg), axis=1)
    matrix = frame.step * rotation / np.asarray(frame.spacing)[:, None]
    return matrix, np.asarray(frame.centre) / frame.spacing - matrix @ np.full(2, (frame.size - 1) / 2)


def _resample(volume: np.ndarray, matrix: np.ndarray, offset: np.ndarray, shape: tuple[int, int],
              fill: float, max_samples: int) -> np.ndarray:
    """volume [S, H, W] at matrix @ (i, j) + offset for (i, j) in shape, as float32, or bool where it was."""
    samples = int(np.clip(np.ceil(np.linalg.norm(matrix, axis=0).max()), 1, max_samples))
    if volume.dtype == bool:
        out, some = np.zeros((len(volume), *shape), bool), volume.any(axis=(1, 2))
        if some.any():
            source = torch.from_numpy(volume[some].astype(np.float32))
            out[some] = _sample(source, matrix, offset, shape, samples) >= 0.5
        return out
    if not fill:
        source = np.ascontiguousarray(volume, np.float32)
        return _sample(torch.from_numpy(source), matrix, offset, shape, samples).numpy()
    source = np.subtract(volume, np.float32(fill), dtype=np.float32)
    return _sample(torch.from_numpy(source), matrix, offset, shape, samples).numpy() + np.float32(fill)


def _sample(source: torch.Tensor, matrix: np.ndarray, offset: np.ndarray, shape: tuple[int, int],
            samples: int) -> torch.Tensor:
    """Bilinear, the mean of samples x samples points a pixel, zero outside; float32 [S, H, W] -> [S, *shape]."""
    rows, columns = ((np.arange(n * samples) + 0.5) / samples - 0.5 for n in shape)
    grid = np.empty((1, len(rows), len(columns), 2), np.float32)
    for k, length in enumerate(source.shape[-2:]):
        native = matrix[k, 0] * rows[:, None] + matrix[k, 1] * columns
        native += offset[k]
        native *= 2                                                # to grid_sample's -1..1, from edge to edge
        native += 1
        native /= length
        native -= 1
        grid[0, ..., 1 - k] = native
    places = torch.from_numpy(grid)

    def sampled(part: torch.Tensor) -> torch.Tensor:               # PyTorch itself uses one thread: this is one image
        out = functional.grid_sample(part[None], places, align_corners=False)[0]
        return functional.avg_pool2d(out, samples) if samples > 1 else out

    if len(source) * places[..., 0].numel() < WORTH_THREADS:
        return sampled(source)
    return in_batches(sampled, len(source), source)
