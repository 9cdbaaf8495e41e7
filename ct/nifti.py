"""NIfTI head CT of any axis order and sign, brought to axial, inferior to superior, in radiological display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

from ct.geometry import Placed
from ct.limits import SLICE_MM, check_pixel_spacing, check_ratio, check_size, check_slice_spacing
from ct.plausible import describe, like_a_head, tissue_shares
from ct.scan import AIR_HU, RESULT_MARK, Found, Scan, ScanError, ScanSource

KIND = "nifti"
SUFFIXES = (".nii", ".nii.gz")
VALUES = (".img", ".img.gz")                                    # of a pair
PAIR_SUFFIXES = (".hdr", ".img", ".hdr.gz", ".img.gz")
GZIP = b"\x1f\x8b"
HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}        # by the size that a header begins with
SINGLE_OFFSET = {348: 352, 540: 544}                            # where values begin at the earliest, in one file
UNITS = {0: ("unknown", 1.0), 1: ("meter", 1000.0), 2: ("mm", 1.0), 3: ("micron", 0.001)}         # by code, with mm
REFORMAT = 2.0                  # pixels this much longer than the slice step are another plane's, reformatted
SPACES = {1: "the scanner", 2: "another scan", 3: "the Talairach atlas", 4: "the MNI template"}


@dataclass(frozen=True)
class NiftiGrid:
    """The input's own grid: array shape, affine (voxel to RAS mm), header codes, and how its axes became a Scan's."""

    shape: tuple[int, ...]                            # of the file, with any trailing axes of length 1
    affine: np.ndarray                                # [4, 4], mm: the one of the two that was taken
    sform_code: int                                   # 0 where the sform was not taken
    qform_code: int                                   # 0 where the qform says something else than the affine
    axes: tuple[int, int, int]                        # file axes that are the Scan's slices, rows, columns
    flips: tuple[bool, bool, bool]                    # which of these run the other way

    def to_display(self, array: np.ndarray) -> np.ndarray:
        """File order [I, J, K] -> [S, H, W]."""
        return np.flip(array.transpose(self.axes), [k for k in range(3) if self.flips[k]])

    def from_display(self, volume: np.ndarray) -> np.ndarray:
        """[S, H, W] -> the file's order and shape."""
        array = np.flip(volume, [k for k in range(3) if self.flips[k]]).transpose(np.argsort(self.axes))
        return array.reshape(self.shape)

    def upended(self) -> NiftiGrid:
        """The grid of the same slices in reverse order."""
        return replace(self, flips=(not self.flips[0], *self.flips[1:]))

    def place(self, volume: np.ndarray) -> Placed:
        """A volume [S, H, W] in the input's shape, axis order and affine."""
        return Placed(self.from_display(volume), self.affine, self.sform_code, self.qform_code, None)


# ---- claims and find

def claims(path: Path, head: bytes) -> bool:
    """Whether a file is NIfTI (or Analyze, which is refused by name), by its first bytes (348 or more) or its name."""
    if path.name.lower().endswith(SUFFIXES):
        return True
    if path.name.lower().endswith(VALUES):
        return _other_of_pair(path) is not None
    if head[:2] == GZIP:
        try:
            head = _begin(path)
        except OSError:                               # its name alone tells
            head = b""
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0") or (
        path.name.lower().endswith((".hdr", ".hdr.gz")) and _header_size(head) is not None)


def find(paths: Sequence[Path]) -> list[Found]:
    """One scan per file, or per pair of .hdr and .img, whichever of the two was given or could be claimed."""
    given: dict[Path, Path] = {}                      # by the header; a scan is named after what was given
    for path in paths:
        given.setdefault(_other_of_pair(path) if path.name.lower().endswith(VALUES) else path, path)
    found = []
    for header, path in given.items():
        image = _other_of_pair(header)
        found.append(Found(KIND, (header,) if image is None else (header, image), path.with_name(stem(path))))
    return found


def stem(path: Path) -> str:
    """File name without .nii, .hdr and .gz."""
    name = path.name
    for suffix in (*SUFFIXES[::-1], *PAIR_SUFFIXES[::-1]):
        if name.lower().endswith(suffix):
            return name[:-len(suffix)]
    return name


def _other_of_pair(path: Path) -> Path | None:
    """The .img of a .hdr, and the reverse; None where there is none. Of a link it may lie where that leads."""
    return _beside(path) or (_beside(path.resolve()) if path.is_symlink() else None)


def _beside(path: Path) -> Path | None:
    name = path.name
    for one, other in ((".hdr", ".img"), (".img", ".hdr")):
        for end in ("", ".gz"):
            if name.lower().endswith(one + end):
                base = name[:-len(one + end)]
                for candidate in (other, other + ".gz", other.upper()):
                    if (beside := path.with_name(base + candidate)).is_file():
                        return beside
    return None


def _begin(path: Path, count: int = 540) -> bytes:
    """The first bytes of a file, unpacked; empty where they cannot be. Raises OSError where it cannot be opened."""
    try:
        with _open(path) as stream:
            return stream.read(count)
    except (igzip.BadGzipFile, EOFError, isal_zlib.error):
        return b""


def _open(path: Path):
    """A stream of the file's bytes, unpacked where they are gzip's, whatever the name says."""
    return igzip.open(path) if _is_packed(path) else open(path, "rb")


def _is_packed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == GZIP


def _header_size(head: bytes) -> int | None:
    """The size that a NIfTI or Analyze header begins with, in either byte order."""
    sizes = [int.from_bytes(head[:4], order) for order in ("little", "big")]
    return next((size for size in sizes if size in HEADERS), None)


# ---- reading

def read(source: ScanSource) -> Scan:
    """Read a NIfTI file as a Scan; position_mm is RAS mm along the slice normal, until Scan.upended negates it.

    Values that are not finite become air, with a note. Raises ScanError for a file that cannot be read, holds more
    than one volume, does not tell its orientation, is a reformat along another axis, is a result of this program, or
    whose values do not look like HU.
    """
    path = source.paths[0]
    notes: list[str] = []
    header, single = _read_header(source.paths)
    if bytes(header["descrip"].item()).startswith(RESULT_MARK.encode()):
        raise ScanError(f"{path.name}: a result of this program, not a scan; take it out of the folder of scans")
    dtype, shape = _type_and_shape(path, header)
    grid = _grid(path, header, shape, notes)
    matrix, origin = grid.affine[:3, :3], grid.affine[:3, 3]
    axes, flips = list(grid.axes), np.array(grid.flips)
    steps = matrix.T[axes] * np.where(flips, -1, 1)[:, None]              # [3, 3] from slice to slice, row, column
    normal = np.cross(steps[1], steps[2])
    normal *= np.sign(normal @ steps[0]) / np.linalg.norm(normal)
    spacing, step = tuple(np.linalg.norm(steps[1:], axis=1).tolist()), float(steps[0] @ normal)
    check_size(path.name, *(shape[axis] for axis in axes))
    _refuse_reformat(path, spacing, step)
    check_pixel_spacing(path.name, spacing, tuple(shape[axis] for axis in axes[1:]))
    check_slice_spacing(path.name, step)

    values = _values(source.paths if single else source.paths[1:], header, dtype, shape)
    hu, more = _check_hu(path, values)
    saturation = _saturation(hu)
    shares = tissue_shares(hu.T, saturation)                              # in the order that the memory has them
    if not like_a_head(shares):
        raise ScanError(f"{path.name}: the values do not look like HU of a head in air: {describe(shares)} (an offset "
                        "such as 1024 added, no skull, air set to another value, or another kind of map?); give the "
                        "scan in HU")
    notes += more
    if np.isfinite(saturation).any():
        notes.append(f"values saturate at {saturation[0]:g}..{saturation[1]:g} HU")
    hu = np.maximum(np.ascontiguousarray(grid.to_display(hu)), np.float32(AIR_HU))
    corner = np.zeros(3)                                                  # the Scan's first voxel in the file
    corner[axes] = np.where(flips, np.array(shape)[axes] - 1, 0)
    position = (matrix @ corner + origin) @ normal + np.arange(len(hu)) * step
    return Scan(source.scan_id, hu, position, spacing, saturation, geometry=grid, source=KIND, notes=tuple(notes))


def _read_header(paths: Sequence[Path]) -> tuple[nib.Nifti1Header, bool]:
    """The header of a file or a pair, unchecked, and whether the values follow in the same file."""
    path, head = paths[0], _begin(paths[0])
    size = _header_size(head)
    if head.startswith(GZIP):
        raise ScanError(f"{path.name}: packed twice with gzip; unpack it once")
    if size is None or len(head) < size:
        raise ScanError(f"{path.name}: cannot be read as NIfTI: it does not begin with a NIfTI header")
    magic = head[344:347] if size == 348 else head[4:7]
    if magic not in (b"n+1", b"ni1", b"n+2", b"ni2"):
        raise ScanError(f"{path.name}: an Analyze 7.5 header, which does not say where left is; convert the scan to "
                        "NIfTI from its source")
    single = magic[:2] == b"n+"
    if not single and len(paths) < 2:
        raise ScanError(f"{path.name}: a NIfTI header whose .img is not beside it; put it there")
    header = HEADERS[size](head[:size], check=False)
    offset = float(header["vox_offset"])
    if single and not SINGLE_OFFSET[size] <= offset < np.inf:             # nor where it is no number
        raise ScanError(f"{path.name}: its header says that the values begin at byte {offset:g} "
                        f"(vox_offset), within the header; expected {SINGLE_OFFSET[size]} or more; write the file "
                        "again from its source")
    return header, single


def _type_and_shape(path: Path, header: nib.Nifti1Header) -> tuple[np.dtype, tuple[int, ...]]:
    try:
        dtype, shape = header.get_data_dtype(), tuple(int(n) for n in header.get_data_shape())
    except (nib.spatialimages.HeaderDataError, KeyError, ValueError) as error:
        raise ScanError(f"{path.name}: cannot be read as NIfTI: its header is damaged (datatype or dim)") from error
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise ScanError(f"{path.name}: expected one volume [X, Y, Z], found shape {list(shape)}; write one volume per "
                        "file")
    if dtype.kind not in "iuf":
        raise ScanError(f"{path.name}: expected numbers in HU, found {dtype}")
    return dtype, shape


def _refuse_reformat(path: Path, spacing: tuple[float, float], step: float) -> None:
    """ScanError where an axis in the axial plane is the one that the scan's own slices were stacked along."""
    coarse, fine = max(spacing), min(spacing)
    if SLICE_MM[1] >= coarse > REFORMAT * step and (coarse > 1.5 * fine or coarse > 2.0):
        raise ScanError(f"{path.name}: pixels of {spacing[0]:.2f} x {spacing[1]:.2f} mm on axial slices {step:.2f} mm "
                        "apart: coronal or sagittal slices, or a scan reformatted from them; give the axial scan")


def _values(paths: Sequence[Path], header: nib.Nifti1Header, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The scaled values, float32 [I, J, K]. An intercept that is no number is 0, and so is a slope 1."""
    path, count = paths[0], int(np.prod(shape[:3]))
    offset, slope, intercept = (float(header[key]) for key in ("vox_offset", "scl_slope", "scl_inter"))
    held, needed = path.stat().st_size, count * dtype.itemsize
    if _is_packed(path):                              # before anything of that size is allocated
        check_ratio(path.name, needed + (int(offset) if np.isfinite(offset) else 0), held)
    elif held < needed:
        raise ScanError(f"{path.name}: cannot be read as NIfTI: its header says {needed} bytes of values, the file "
                        f"holds {held}: it is truncated or damaged")
    try:
        with _open(path) as stream:
            stream.seek(int(offset) if np.isfinite(offset) else 0)
            stored = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
        stored = stored.reshape(shape[:3], order="F")
    except (OSError, EOFError, ValueError, OverflowError, isal_zlib.error) as error:
        raise ScanError(f"{path.name}: cannot be read as NIfTI: it is truncated or damaged ({type(error).__name__})"
                        ) from error
    if slope == 0 or not np.isfinite(slope):
        return stored.astype(np.float32)
    intercept = intercept if np.isfinite(intercept) else 0.0
    values = np.empty(stored.shape, np.float32, order="F")                # as stored: other orders take longer
    with np.errstate(invalid="ignore", over="ignore"):      # stored values that are no numbers: the scan's check tells
        for k in range(shape[2]):                           # in double precision, a slice at a time
            values[:, :, k] = stored[:, :, k] * np.float64(slope) + np.float64(intercept)
    return values


# ---- orientation

def _grid(path: Path, header: nib.Nifti1Header, shape: tuple[int, ...], notes: list[str]) -> NiftiGrid:
    """The grid by the header's sform or qform, in mm: the scanner's before any other, the sform before the qform."""
    forms = {"sform": (int(header["sform_code"]), header.get_sform()), "qform": (int(header["qform_code"]),
                                                                                 _qform(header))}
    valid = {name: (code, affine) for name, (code, affine) in forms.items()
             if code > 0 and affine is not None and np.isfinite(affine).all()
             and np.abs(affine[:3, :3]).max() < 1e6 and abs(np.linalg.det(affine[:3, :3])) > 1e-12}
    if not valid:
        raise ScanError(f"{path.name}: neither sform nor qform is valid (sform and qform codes are 0, or the matrix is "
                        "singular), so the orientation is not known; set one of them")
    taken = min(valid, key=lambda name: (valid[name][0] != 1, name != "sform"))
    other = "qform" if taken == "sform" else "sform"
    code, affine = valid[taken]
    agree = other in valid and _agree(affine, valid[other][1], shape)
    if other in valid and not agree:
        notes.append(f"sform and qform disagree: taken is the {taken} ({_space(code)}), not the {other} "
                     f"({_space(valid[other][0])})")
    elif taken == "qform":
        notes.append("no valid sform: the qform is taken")
    if code not in (1, 2):
        notes.append(f"in the space of {_space(code)}: sizes may be the template's, not the patient's")
    unit, mm = UNITS.get(int(header["xyzt_units"]) & 7, ("", None))       # the bits above are the unit of time
    if mm is None:
        raise ScanError(f"{path.name}: its lengths are in an unknown unit (xyzt_units); set mm")
    if mm != 1.0:
        notes.append(f"lengths in {unit}s (xyzt_units) converted to mm")
        affine = np.diag([mm] * 3 + [1.0]) @ affine
    orientation = nib.io_orientation(affine)          # file axis -> (its world axis: 0 R, 1 A, 2 S; its sign)
    axes = tuple(int(np.flatnonzero(orientation[:, 0] == world)[0]) for world in (2, 1, 0))
    wanted = (1, -1, -1)                              # slices to S, rows to P (not A), columns to L (not R)
    flips = tuple(bool(orientation[axis, 1] != sign) for axis, sign in zip(axes, wanted))
    codes = {name: forms[name][0] if name == taken or agree else 0 for name in forms}
    return NiftiGrid(shape, affine, codes["sform"], codes["qform"], axes, flips)


def _space(code: int) -> str:
    return SPACES.get(code, "another template")


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    """The qform; None where its quaternion or voxel sizes are none. Rounding beyond unit length is forgiven."""
    b, c, d = (float(header[f"quatern_{letter}"]) for letter in "bcd")
    length, zooms = b * b + c * c + d * d, np.array(header["pixdim"][1:4], np.float64)
    if not length <= 1.001 or not (zooms > 0).all():
        return None
    affine = np.eye(4)
    affine[:3, :3] = nib.quaternions.quat2mat([np.sqrt(max(0.0, 1.0 - length)), b, c, d]) * zooms
    affine[:3, 2] *= -1 if float(header["pixdim"][0]) < 0 else 1
    affine[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
    return affine


def _agree(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether two affines place the grid's corners within a voxel's longest side of each other."""
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape[:3]])).reshape(3, -1)
    apart = np.linalg.norm((one - other)[:3] @ np.concatenate([corners, np.ones((1, 8))]), axis=0)
    return bool(apart.max() <= np.linalg.norm(one[:3, :3], axis=0).max())


# ---- values

def _check_hu(path: Path, hu: np.ndarray) -> tuple[np.ndarray, list[str]]:
    finite = np.isfinite(hu)
    if not finite.any():
        raise ScanError(f"{path.name}: holds no finite value; export the scan again")
    low, high = (float(end(hu, where=finite, initial=start)) for end, start in ((np.min, np.inf), (np.max, -np.inf)))
    if low >= 0 or high - low <= 50:
        others = "" if finite.all() else (f", and {int((~finite).sum())} of {hu.size} values are not finite (NaN): if "
                                          "these are its air, export it with -1000 there")
        raise ScanError(f"{path.name}: this NIfTI doesn't look like HU: its values are {low:g}..{high:g}, but air is "
                        "-1000 and brain 30 (a mask, a picture, normalised values, or values without the rescale "
                        f"intercept?){others}")
    if finite.all():
        return hu, []
    return np.where(finite, hu, np.float32(AIR_HU)), [f"{int((~finite).sum())} values not finite, taken as air"]


def _saturation(hu: np.ndarray) -> tuple[float, float]:
    """HU at which the file was clipped: an end of the range that is no air (or bone) and holds many voxels."""
    low, high = float(hu.min()), float(hu.max())
    return (low if low > -500 and (hu == low).mean() > 0.01 else -np.inf,
            high if high < 500 and (hu == high).mean() > 0.001 else np.inf)
