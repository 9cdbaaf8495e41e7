"""What a reader takes: sizes and spacings of a head CT, checked in the header before anything is allocated."""

from __future__ import annotations

from common.machine import free_memory
from ct.scan import ScanError

PIXEL_MM = (0.1, 5.0)
SLICE_MM = (0.1, 30.0)
FIELD_MM = 1500.0               # the widest field of view that CT has, and half as much again
MAX_SIDE = 4096                 # pixels
MAX_SLICES = 5000
BYTES_PER_VOXEL = 12            # stored values, float32 HU and one working copy
MAX_RATIO = 250                 # a scan, with its noise, packs to a third; a mask's zeros, or a bomb, to a thousandth
SMALL = 2**24                   # bytes that any file may unpack to
MAX_INFLATED = 2**28            # bytes of a deflated DICOM data set, which is unpacked in memory


def check_size(name: str, slices: int, rows: int, columns: int) -> None:
    """ScanError, with the file's `name`, for a volume that no head CT has or that the memory cannot hold."""
    if not (0 < rows <= MAX_SIDE and 0 < columns <= MAX_SIDE and 0 < slices <= MAX_SLICES):
        raise ScanError(f"{name}: {slices} slices of {rows} x {columns} pixels; expected 1 to {MAX_SLICES} slices of "
                        f"at most {MAX_SIDE} x {MAX_SIDE}")
    needed, free = slices * rows * columns * BYTES_PER_VOXEL, free_memory()
    if needed > free:
        raise ScanError(f"{name}: {slices} slices of {rows} x {columns} pixels take {needed / 1e9:.1f} GB to read, "
                        f"{free / 1e9:.1f} GB of memory are free; crop or downsample the scan, or use a machine with "
                        "more memory") from MemoryError()           # a node may have more later


def check_ratio(name: str, unpacked: int, packed: int) -> None:
    """ScanError, with the file's `name`, where `packed` bytes are to unpack to more than a scan's ever do."""
    if unpacked > max(SMALL, MAX_RATIO * packed):
        raise ScanError(f"{name}: {unpacked / 1e6:.0f} MB packed in {packed / 1e6:.3g}; no scan packs to less than a "
                        f"{MAX_RATIO}th: it is damaged, or made to fill the memory")


def check_pixel_spacing(name: str, spacing_mm: tuple[float, float], shape: tuple[int, int]) -> None:
    """ScanError, with the file's `name`, for a (row, column) pixel spacing that no head CT of this shape has."""
    low, high = PIXEL_MM
    if not all(low <= mm <= high for mm in spacing_mm):
        raise ScanError(f"{name}: a pixel spacing of {_pair(spacing_mm)} mm; expected {low:g} to {high:g} mm (is it in "
                        "another unit?); correct it at the source")
    field = max(mm * n for mm, n in zip(spacing_mm, shape))
    if field > FIELD_MM:
        raise ScanError(f"{name}: pixels of {_pair(spacing_mm)} mm make a field of view of {field:.0f} mm; expected at "
                        f"most {FIELD_MM:.0f} mm (is the pixel spacing right?)")


def check_slice_spacing(name: str, spacing_mm: float) -> None:
    """ScanError, with the file's `name`, for a usual step from slice to slice that no head CT has."""
    low, high = SLICE_MM
    if not low <= spacing_mm <= high:
        raise ScanError(f"{name}: a slice spacing of {spacing_mm:.4g} mm; expected {low:g} to {high:g} mm (is it in "
                        "another unit, or is this another kind of image?)")


def _pair(spacing_mm: tuple[float, float]) -> str:
    return " x ".join(f"{mm:.4g}" for mm in spacing_mm)
