"""NIfTI head CT of any axis order and sign, brought to axial, inferior to superior, in radiological display."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from ct.scan import Scan, ScanError

SUFFIXES = (".nii", ".nii.gz")
AIR_HU = -1024.0


@dataclass(frozen=True)
class NiftiGrid:
    """The input's own grid: array shape, affine (voxel to RAS mm), header codes, and how its axes became a Scan's."""

    shape: tuple[int, ...]                            # of the file, with any trailing axes of length 1
    sform: np.ndarray | None                          # [4, 4]; None where the header's code is 0
    sform_code: int
    qform: np.ndarray | None
    qform_code: int
    axes: tuple[int, int, int]                        # file axes that are the Scan's slices, rows, columns
    flips: tuple[bool, bool, bool]                    # which of these run the other way

    @property
    def affine(self) -> np.ndarray:
        return self.qform if self.sform is None else self.sform

    def to_display(self, array: np.ndarray) -> np.ndarray:
        """File order [I, J, K] -> [S, H, W]."""
        return np.flip(array.transpose(self.axes), [k for k in range(3) if self.flips[k]])

    def from_display(self, volume: np.ndarray) -> np.ndarray:
        """[S, H, W] -> the file's order and shape."""
        array = np.flip(volume, [k for k in range(3) if self.flips[k]]).transpose(np.argsort(self.axes))
        return array.reshape(self.shape)


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    name = path.name
    return name[:-7] if name.lower().endswith(".nii.gz") else name[:-4]


def read_nifti(scan_id: str, path: Path) -> Scan:
    """Read a NIfTI file as a Scan; position_mm is RAS mm along the slice normal.

    Values that are not finite become air, with a note. Raises ScanError for a file that cannot be read, holds more
    than one volume, does not tell its orientation, or whose values do not look like HU.
    """
    try:
        image = nib.load(path)
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise ScanError(f"{path}: cannot be read as NIfTI ({error})") from error
    if array.ndim < 3 or any(n != 1 for n in array.shape[3:]):
        raise ScanError(f"{path}: expected one volume [X, Y, Z], found shape {list(array.shape)}; write one volume a "
                        "file")
    if array.dtype.kind not in "iuf":
        raise ScanError(f"{path}: expected numbers in HU, found {array.dtype}")
    grid = _grid(path, image)
    hu, notes = _check_hu(path, array.reshape(array.shape[:3]).astype(np.float32))
    saturation = _saturation(hu)
    if np.isfinite(saturation).any():
        notes.append(f"values saturate at {saturation[0]:g}..{saturation[1]:g} HU")

    hu = np.maximum(np.ascontiguousarray(grid.to_display(hu)), np.float32(AIR_HU))
    matrix, origin = image.affine[:3, :3], image.affine[:3, 3]
    axes, flips = list(grid.axes), np.array(grid.flips)
    steps = matrix.T[axes] * np.where(flips, -1, 1)[:, None]              # [3, 3] from slice to slice, row, column
    corner = np.zeros(3)                                                  # the Scan's first voxel in the file
    corner[axes] = np.where(flips, np.array(array.shape)[axes] - 1, 0)
    normal = np.cross(steps[1], steps[2])
    normal *= np.sign(normal @ steps[0]) / np.linalg.norm(normal)
    position = (matrix @ corner + origin) @ normal + np.arange(len(hu)) * (steps[0] @ normal)
    spacing = (float(np.linalg.norm(steps[1])), float(np.linalg.norm(steps[2])))
    return Scan(scan_id, hu, position, spacing, saturation, geometry=grid, source="nifti", notes=tuple(notes))


def _grid(path: Path, image: nib.Nifti1Image) -> NiftiGrid:
    sform, sform_code = image.get_sform(coded=True)
    qform, qform_code = image.get_qform(coded=True)
    if not sform_code and not qform_code:
        raise ScanError(f"{path}: sform and qform codes are 0, so the orientation is not known; set one of them")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-6:
        raise ScanError(f"{path}: its affine is singular; set a valid sform or qform")
    orientation = nib.io_orientation(image.affine)    # file axis -> (its world axis: 0 R, 1 A, 2 S; its sign)
    axes = tuple(int(np.flatnonzero(orientation[:, 0] == world)[0]) for world in (2, 1, 0))
    wanted = (1, -1, -1)                              # slices to S, rows to P (not A), columns to L (not R)
    flips = tuple(bool(orientation[axis, 1] != sign) for axis, sign in zip(axes, wanted))
    return NiftiGrid(tuple(image.shape), sform, int(sform_code), qform, int(qform_code), axes, flips)


def _check_hu(path: Path, hu: np.ndarray) -> tuple[np.ndarray, list[str]]:
    finite = np.isfinite(hu)
    if not finite.any():
        raise ScanError(f"{path}: holds no finite value")
    low, high = float(hu[finite].min()), float(hu[finite].max())
    if low >= 0 or high - low <= 50:
        raise ScanError(f"{path}: this NIfTI doesn't look like HU: its values are {low:g}..{high:g}, but air is -1000 "
                        "and brain 30 (a mask, a picture, normalised values, or values without the rescale intercept?)")
    if finite.all():
        return hu, []
    return np.where(finite, hu, np.float32(AIR_HU)), [f"{int((~finite).sum())} values not finite, taken as air"]


def _saturation(hu: np.ndarray) -> tuple[float, float]:
    """HU at which the file was clipped: an end of the range that is no air (or bone) and holds many voxels."""
    low, high = float(hu.min()), float(hu.max())
    return (low if low > -500 and (hu == low).mean() > 0.01 else -np.inf,
            high if high < 500 and (hu == high).mean() > 0.001 else np.inf)
