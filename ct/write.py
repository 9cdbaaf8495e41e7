"""Write what was found about a scan: maps as NIfTI in the scan's own geometry."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from scipy import ndimage

from ct.dicom import SliceStack
from ct.nifti import NiftiGrid
from ct.scan import Scan

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
GZIP_LEVEL = 1                                        # of ISA-L's 0 to 3; the higher ones save under 2 %
EVEN = 0.02                                           # of a step: headers round, a smaller offset is none


def write_nifti(path: Path, volume: np.ndarray, scan: Scan, dtype=None, step: float | None = None) -> str | None:
    """Write a map or mask [S, H, W] of a scan as NIfTI; gives a note where it could not be as the input is.

    A NIfTI input's map has the input's affine, axis order and shape. A DICOM input's map has an affine in RAS
    mm, sheared by the gantry tilt, and is resampled along the slice axis to the smallest spacing where spacing
    is uneven (linear; nearest for bool and integer volumes). A slice folder's map lies at its scan.json's
    spacing, with 1 mm pixels where that is unknown.

    dtype: on disk; by default float32 for floats, uint8 for bool, int16 or int32 for integers.
    step: floats are stored as whole multiples of it, int16 (int32 where int16 is too narrow), with the step as the
    header's scl_slope: readers that apply the header's scale, as NIfTI asks, give values within half a step.
    Raises ValueError where the volume does not fit the scan, or where step is given and values are not finite.
    """
    if volume.shape != scan.hu.shape:
        raise ValueError(f"{path}: a volume {list(volume.shape)} does not fit the scan {list(scan.hu.shape)}")
    if step is not None:
        dtype = _step_dtype(path, volume, step)
    dtype = np.dtype(dtype or _disk_dtype(volume.dtype))
    if isinstance(scan.geometry, NiftiGrid):
        grid = scan.geometry
        image = nib.Nifti1Image(_cast(grid.from_display(volume), dtype, step), grid.affine)
        image.set_qform(grid.qform, grid.qform_code)
        image.set_sform(grid.sform, grid.sform_code)
        note = None
    else:
        stack, note = (scan.geometry, None) if scan.geometry is not None else _nominal_stack(scan)
        volume, affine, resampled = _even_grid(volume, stack, scan.position_mm)
        note = "; ".join(filter(None, (note, resampled))) or None
        image = nib.Nifti1Image(_cast(volume.transpose(2, 1, 0), dtype, step), affine)
        image.set_sform(affine, "scanner")            # no qform: it cannot hold the shear of a tilted gantry
    image.header.set_xyzt_units("mm")
    if step is not None:
        image.header.set_slope_inter(step, 0)
    _save(image, path)
    return note


def _save(image: nib.Nifti1Image, path: Path) -> None:
    """nib.save, but .gz by ISA-L: as small as zlib's level 1 in a fifth of its time; the same bytes at any date."""
    if path.suffix == ".gz":
        path.write_bytes(igzip.compress(image.to_bytes(), compresslevel=GZIP_LEVEL, mtime=0))
    else:
        nib.save(image, path)


def _step_dtype(path: Path, volume: np.ndarray, step: float) -> type:
    largest = float(np.abs(volume).max(initial=0))
    if not largest < step * np.iinfo(np.int32).max:
        raise ValueError(f"{path}: expected finite values to store in steps of {step:g}, found {largest:g}")
    return np.int16 if largest <= step * np.iinfo(np.int16).max else np.int32


def _disk_dtype(dtype: np.dtype) -> type:
    if dtype.kind == "b":
        return np.uint8
    if np.issubdtype(dtype, np.integer):
        return dtype.type if dtype.itemsize <= 2 else np.int32
    return np.float32


def _cast(array: np.ndarray, dtype: np.dtype, step: float | None) -> np.ndarray:
    if step is not None:
        array = array / array.dtype.type(step)
    rounded = np.issubdtype(dtype, np.integer) and np.issubdtype(array.dtype, np.floating)
    return (np.rint(array) if rounded else array).astype(dtype)


def _nominal_stack(scan: Scan) -> tuple[SliceStack, str | None]:
    """A place in space for slices that do not tell theirs: upright, the corner at the origin."""
    row, column = scan.pixel_spacing_mm or (1.0, 1.0)
    origins = np.stack([0 * scan.position_mm, 0 * scan.position_mm, scan.position_mm], axis=1)
    note = None if scan.pixel_spacing_mm else "pixel spacing unknown, written as 1 mm"
    return SliceStack(origins, np.array([0.0, row, 0.0]), np.array([column, 0.0, 0.0])), note


def _even_grid(volume: np.ndarray, stack: SliceStack,
               position_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Volume on an even, possibly sheared grid; its affine (column, row, slice -> RAS mm); what was done."""
    if len(position_mm) > 1:                          # a tilted gantry's origins lie on a slanted line: fit it
        slope, start = np.polyfit(position_mm, stack.origins, 1)
    else:
        normal = np.cross(stack.column_step, stack.row_step)
        slope = normal / np.linalg.norm(normal)
        start = stack.origins[0] - position_mm[0] * slope
    nearest = volume.dtype == bool or np.issubdtype(volume.dtype, np.integer)
    done = []
    aside = stack.origins - (start + position_mm[:, None] * slope)
    shift = np.stack([aside @ step / (step @ step) for step in (stack.row_step, stack.column_step)], axis=1)
    if np.abs(shift).max() > 0.5:                     # [S, 2] pixels
        volume = np.stack([_shift(image, by, nearest) for image, by in zip(volume, shift)])
        done.append(f"slices shifted in plane by up to {np.abs(shift).max():.1f} pixels onto one line")
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
    upper = np.clip(np.searchsorted(position_mm, even), 1, len(position_mm) - 1)
    weight = (even - position_mm[upper - 1]) / (position_mm[upper] - position_mm[upper - 1])
    if nearest:
        return volume[np.where(weight < 0.5, upper - 1, upper)], float(even[1] - even[0])
    weight = weight[:, None, None].astype(volume.dtype)
    return volume[upper - 1] * (1 - weight) + volume[upper] * weight, float(even[1] - even[0])
