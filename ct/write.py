"""Write what was found about a scan: maps as NIfTI in the scan's own geometry."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip

from ct.geometry import nominal_stack
from ct.scan import Scan

GZIP_LEVEL = 1                                        # of ISA-L's 0 to 3; the higher ones save under 2 %


def write_nifti(path: Path, volume: np.ndarray, scan: Scan, dtype=None, step: float | None = None,
                description: str = "", packed: bool | None = None) -> str | None:
    """Write a map or mask [S, H, W] of a scan as NIfTI; gives a note where it does not lie or may not be shown as the
    input.

    A NIfTI input's map has the input's affine, axis order and shape. A DICOM input's map has an affine in RAS
    mm, sheared by the gantry tilt, and is resampled along the slice axis to the smallest spacing where spacing
    is uneven (linear; nearest for bool and integer volumes). A slice folder's map lies at its scan.json's
    spacing, with 1 mm pixels where that is unknown.

    dtype: on disk; by default float32 for floats, uint8 for bool, int16 or int32 for integers.
    step: floats are stored as whole multiples of it, int16 (int32 where int16 is too narrow), with the step as the
    header's scl_slope: readers that apply the header's scale, as NIfTI asks, give values within half a step.
    description: of at most 79 characters, for the header; RESULT_MARK in it keeps a map from being read as a scan.
    packed: with gzip; by default where the name ends in .gz.
    Raises ValueError where the volume does not fit the scan, or where step is given and values are not finite.
    """
    if volume.shape != scan.hu.shape:
        raise ValueError(f"{path}: a volume {list(volume.shape)} does not fit the scan {list(scan.hu.shape)}")
    if step is not None:
        dtype = _step_dtype(path, volume, step)
    dtype = np.dtype(dtype or _disk_dtype(volume.dtype))
    geometry = scan.geometry or nominal_stack(scan.position_mm, scan.pixel_spacing_mm)
    placed = geometry.place(volume)
    image = nib.Nifti1Image(_cast(placed.array, dtype, step), placed.affine)
    image.set_qform(placed.affine if placed.qform_code else None, placed.qform_code)
    image.set_sform(placed.affine if placed.sform_code else None, placed.sform_code)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()
    if step is not None:
        image.header.set_slope_inter(step, 0)
    _save(image, path, path.suffix == ".gz" if packed is None else packed)
    return placed.note


def _save(image: nib.Nifti1Image, path: Path, packed: bool) -> None:
    """By ISA-L where packed: as small as zlib's level 1 in a fifth of its time; the same bytes at any date."""
    content = image.to_bytes()
    path.write_bytes(igzip.compress(content, compresslevel=GZIP_LEVEL, mtime=0) if packed else content)


def _step_dtype(path: Path, volume: np.ndarray, step: float) -> type:
    largest = max(float(volume.max(initial=0)), -float(volume.min(initial=0)))
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
        array = array / array.dtype.type(step)                     # a new array, which may be rounded in place
    if np.issubdtype(dtype, np.integer) and np.issubdtype(array.dtype, np.floating):
        array = np.rint(array, out=None if step is None else array)
    return array.astype(dtype)
