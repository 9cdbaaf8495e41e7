"""Where the voxels of a Scan lie, and how a volume of the same shape is written there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy import ndimage

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
EVEN = 0.02                                           # of a step: headers round, a smaller offset is none
SHEAR_DEG = 1.0                                       # less is none, by the same reason
HALF = 0.5 - 0.01                                     # of a step, half way: the upper slice, however files round
ASIDE_MM = 3.0                                        # in plane, beyond what a tilted gantry or rounding moves


@dataclass(frozen=True)
class Placed:
    """A volume as a NIfTI file holds it: axes in the file's order, voxel to RAS mm, header codes (0: not written)."""

    array: np.ndarray
    affine: np.ndarray                                # [4, 4]
    sform_code: int
    qform_code: int
    note: str | None                                  # where it is not as the input is, or may not be shown there


class Geometry(Protocol):
    """What Scan.geometry offers."""

    def place(self, volume: np.ndarray) -> Placed:
        """A volume [S, H, W] of the Scan where the input lies."""

    def upended(self) -> Geometry:
        """The geometry of the same slices in reverse order."""


@dataclass(frozen=True)
class SliceStack:
    """Where the slices of a Scan lie: the centre of pixel (0, 0) of slice k is at origins[k].

    All in mm in DICOM's patient coordinates (x to the left, y to the back, z to the head), in the Scan's own
    order of slices, rows and columns. Origins need not lie above each other (gantry tilt) nor evenly.
    """

    origins: np.ndarray                               # [S, 3]
    row_step: np.ndarray                              # [3] from one row to the next
    column_step: np.ndarray                           # [3] from one column to the next
    frames: tuple[tuple[Path, int], ...] = ()         # file and frame (from 0) of each slice; () where it has no file
    transposed: bool = False                          # how the files' pictures were brought to the display:
    rows_flipped: bool = False                        # first transposed,
    columns_flipped: bool = False                     # then flipped
    note: str | None = None                           # what is assumed about the place

    def to_stored(self, volume: np.ndarray) -> np.ndarray:
        """A map [S, H, W] with rows and columns as in the files; slices stay in the Scan's order."""
        volume = volume[:, :, ::-1] if self.columns_flipped else volume
        volume = volume[:, ::-1] if self.rows_flipped else volume
        return np.ascontiguousarray(volume.transpose(0, 2, 1) if self.transposed else volume)

    def upended(self) -> SliceStack:
        """The same slices in reverse order."""
        return replace(self, origins=self.origins[::-1], frames=self.frames[::-1])

    def place(self, volume: np.ndarray) -> Placed:
        """On an even grid, sheared by the gantry tilt: resampled along the slice axis where spacing is uneven."""
        volume, affine, resampled = _even_grid(volume, self)
        note = "; ".join(filter(None, (self.note, resampled))) or None
        return Placed(volume.transpose(2, 1, 0), affine, 1, 0, note)      # a qform cannot hold a tilted gantry's shear


def nominal_stack(position_mm: np.ndarray, pixel_spacing_mm: tuple[float, float] | None) -> SliceStack:
    """A place in space for slices that do not tell theirs: upright, the corner at the origin, pixels of 1 mm."""
    row, column = pixel_spacing_mm or (1.0, 1.0)
    origins = np.stack([0 * position_mm, 0 * position_mm, position_mm], axis=1)
    note = None if pixel_spacing_mm else "pixel spacing unknown, written as 1 mm"
    return SliceStack(origins, np.array([0.0, row, 0.0]), np.array([column, 0.0, 0.0]), note=note)


def shear_deg(origins: np.ndarray, position_mm: np.ndarray) -> float:
    """The angle between the line through the slices' origins [S, 3] and their normal, along which position_mm [S] is.

    A gantry's tilt where the table moved on without it; 0 for a single slice.
    """
    if len(position_mm) < 2:
        return 0.0
    steps = np.diff(origins, axis=0) / np.diff(position_mm)[:, None]         # per mm of the normal: none is shorter
    return float(np.rad2deg(np.arccos(1 / max(1.0, np.linalg.norm(np.median(steps, axis=0))))))


def displaced(origins: np.ndarray, position_mm: np.ndarray) -> tuple[str, ...]:
    """A note where a slice's origin lies beside the line of the others, as with another field centre from there on.

    origins [S, 3] and position_mm [S] along the slices' normal, as of a SliceStack and its Scan.
    """
    if len(position_mm) < 2:
        return ()
    steps, heights = np.diff(origins, axis=0), np.diff(position_mm)[:, None]
    aside = np.linalg.norm(steps - heights * np.median(steps / heights, axis=0), axis=1)
    if aside.max() <= ASIDE_MM:
        return ()
    return (f"slices lie up to {aside.max():.0f} mm beside those next to them, as with another field centre "
            f"(ImagePositionPatient), first {int((aside > ASIDE_MM).argmax())} and the one above; the head is "
            "displaced from there on, and what is found there means little",)


def _even_grid(volume: np.ndarray, stack: SliceStack) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Volume on an even, possibly sheared grid; its affine (column, row, slice -> RAS mm); what was done."""
    normal = np.cross(stack.column_step, stack.row_step)
    normal /= np.linalg.norm(normal)
    position_mm = stack.origins @ normal
    if len(position_mm) > 1 and position_mm[-1] < position_mm[0]:
        normal, position_mm = -normal, -position_mm
    if len(position_mm) > 1:                          # a tilted gantry's origins lie on a slanted line: fit it
        slope, start = np.polyfit(position_mm, stack.origins, 1)
    else:
        slope, start = normal, stack.origins[0] - position_mm[0] * normal
    nearest = volume.dtype == bool or np.issubdtype(volume.dtype, np.integer)
    done = []
    aside = stack.origins - (start + position_mm[:, None] * slope)
    shift = np.stack([aside @ step / (step @ step) for step in (stack.row_step, stack.column_step)], axis=1)
    if np.abs(shift).max() > 0.5:                     # [S, 2] pixels
        volume = np.stack([_shift(image, by, nearest) for image, by in zip(volume, shift)])
        done.append(f"slices shifted in plane by up to {np.abs(shift).max():.1f} pixels onto one line")
    if (angle := shear_deg(stack.origins, position_mm)) > SHEAR_DEG:
        done.append(f"sheared by {angle:.0f} degrees, as the slices of the tilted gantry are: programs that know no "
                    "shear show it askew or not at all")
    steps = np.diff(position_mm)
    spacing = float(steps.mean()) if len(steps) else 5.0
    if np.abs(position_mm - np.linspace(position_mm[0], position_mm[-1], len(position_mm))).max() > EVEN * spacing:
        volume, spacing = _resample(volume, position_mm, nearest)
        done.append(f"resampled along the slice axis from uneven spacing ({steps.min():.2f} to {steps.max():.2f} "
                    f"mm) to {spacing:.2f} mm, {len(volume)} slices")
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.stack([stack.column_step, stack.row_step, slope * spacing], axis=1)
    affine[:3, 3] = LPS_TO_RAS @ (start + position_mm[0] * slope)
    return volume, affine, "; ".join(done) or None


def _shift(image: np.ndarray, by: np.ndarray, nearest: bool) -> np.ndarray:
    moved = ndimage.shift(image.astype(np.float64), by, order=0 if nearest else 1, mode="nearest")
    return moved.astype(image.dtype)


def _resample(volume: np.ndarray, position_mm: np.ndarray, nearest: bool) -> tuple[np.ndarray, float]:
    """Volume at even positions from the first slice to the last, and their step: about the smallest there is.

    Steps under half the median are left aside: two blocks of slices that nearly meet must not make hundreds.
    """
    steps = np.diff(position_mm)
    smallest = steps[steps >= np.median(steps) / 2].min()
    even = np.linspace(position_mm[0], position_mm[-1], round(np.ptp(position_mm) / smallest) + 1)
    upper = np.clip(np.searchsorted(position_mm, even), 1, len(position_mm) - 1)           # as evaluation.cohort has it
    weight = (even - position_mm[upper - 1]) / (position_mm[upper] - position_mm[upper - 1])
    if nearest:
        return volume[np.where(weight < HALF, upper - 1, upper)], float(even[1] - even[0])
    weight = weight[:, None, None].astype(volume.dtype)
    return volume[upper - 1] * (1 - weight) + volume[upper] * weight, float(even[1] - even[0])
