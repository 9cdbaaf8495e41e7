"""DICOM CT series: which images are axial CT, where each lies, its HU. Patient data is never looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MediaStorageDirectoryStorage

from ct.scan import Scan, ScanError

SUFFIXES = (".dcm", ".dicom", ".ima")                 # with these names a missing preamble is forgiven
AIR_HU = -1024.0                                      # padding, and the floor: off the field scanners write -3024
SAME_PLACE_MM = 0.05                                  # closer slices are duplicates
AXIAL_COS = float(np.cos(np.deg2rad(45)))             # slice normal to body axis; gantries tilt up to 30 degrees
HEADER_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "ImageType",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsStored", "PixelRepresentation",
    "PhotometricInterpretation", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept",
    "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


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

    def to_stored(self, volume: np.ndarray) -> np.ndarray:
        """A map [S, H, W] with rows and columns as in the files; slices stay in the Scan's order."""
        volume = volume[:, :, ::-1] if self.columns_flipped else volume
        volume = volume[:, ::-1] if self.rows_flipped else volume
        return np.ascontiguousarray(volume.transpose(0, 2, 1) if self.transposed else volume)


@dataclass(frozen=True)
class Header:
    """What discovery needs of a file: the series it belongs to and why it is of no use (None where it is)."""

    path: Path
    series_uid: str
    study_uid: str
    instance_uid: str
    left_out: str | None


@dataclass(frozen=True)
class _Frame:
    path: Path
    index: int                                        # frame in the file
    size: tuple[int, int]                             # rows, columns
    position: np.ndarray | None = None                # [3]
    orientation: np.ndarray | None = None             # [2, 3] directions of increasing column and of row
    spacing: tuple[float, float] | None = None        # (row, column) mm
    rescale: tuple[float, float] | None = None        # slope, intercept
    padding: tuple[int, int] | None = None            # stored values (inclusive) that mean: not measured
    monochrome1: bool = False
    inverse_of: int = 0                               # a stored value and its inverse add up to this
    left_out: str | None = None


# ---- headers

def read_header(path: Path) -> Header | None:
    """The header of a DICOM file; None for a file that is no DICOM. Raises ScanError for a broken one."""
    try:
        with open(path, "rb") as file:
            marked = file.read(132)[128:] == b"DICM"
        if not marked and path.suffix.lower() not in SUFFIXES:
            return None
        ds = _read_tags(path)
        if ds.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return None                               # a DICOMDIR
        if "SOPClassUID" not in ds:
            raise ScanError(f"{path}: not a DICOM image (its header holds no SOPClassUID)")
        reasons = [frame.left_out for frame in _frames(path, ds)]
    except ScanError:
        raise
    except Exception as error:     # a broken header can fail anywhere in pydicom; its message may quote patient data
        raise ScanError(f"{path}: cannot be read as DICOM ({type(error).__name__})") from error
    return Header(path, str(ds.get("SeriesInstanceUID", "")), str(ds.get("StudyInstanceUID", "")),
                  str(ds.get("SOPInstanceUID", "")), reasons[0] if all(reasons) else None)


def _read_tags(path: Path) -> pydicom.Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(HEADER_TAGS))


def _frames(path: Path, ds: pydicom.Dataset) -> list[_Frame]:
    """The frames of a file, each with the reason for which it is left out, if any."""
    count = int(ds.get("NumberOfFrames", 1) or 1)
    size = (int(ds.get("Rows", 0) or 0), int(ds.get("Columns", 0) or 0))
    reason = None
    if str(ds.get("Modality", "")) != "CT":
        reason = f"not CT (modality {ds.get('Modality', None) or 'not given'})"
    elif 0 in size:
        reason = "no picture"
    elif int(ds.get("SamplesPerPixel", 1) or 1) != 1:
        reason = "in colour"
    if reason is not None:
        return [_Frame(path, 0, size, left_out=reason)]
    return [_frame(path, index, size, ds) for index in range(count)]


def _frame(path: Path, index: int, size: tuple[int, int], ds: pydicom.Dataset) -> _Frame:
    def numbers(sequence: str, keyword: str, count: int) -> np.ndarray | None:
        value = frame_value(ds, index, sequence, keyword)
        if value is None:
            return None
        values = np.asarray(value, np.float64).reshape(-1)
        return values if len(values) == count and np.isfinite(values).all() else None

    position = numbers("PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    slope = numbers("PixelValueTransformationSequence", "RescaleSlope", 1)
    intercept = numbers("PixelValueTransformationSequence", "RescaleIntercept", 1)
    frame_type = frame_value(ds, index, "CTImageFrameTypeSequence", "FrameType") or ds.get("ImageType") or ()
    frame_type = [frame_type] if isinstance(frame_type, str) else list(frame_type)
    orientation = None if orientation is None else orientation.reshape(2, 3)
    return _Frame(path, index, size, position, orientation,
                  None if spacing is None else (float(spacing[0]), float(spacing[1])),
                  None if slope is None or intercept is None else (float(slope[0]), float(intercept[0])),
                  _padding(ds), str(ds.get("PhotometricInterpretation", "")) == "MONOCHROME1",
                  -1 if ds.get("PixelRepresentation") else 2 ** int(ds.get("BitsStored") or 16) - 1,
                  _why_left_out([str(v).upper() for v in frame_type], position, orientation))


def _padding(ds: pydicom.Dataset) -> tuple[int, int] | None:
    value, limit = ds.get("PixelPaddingValue"), ds.get("PixelPaddingRangeLimit")
    if value is None:
        return None
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return low, high


def frame_value(ds: pydicom.Dataset, index: int, sequence: str, keyword: str):
    """A frame's value: from its own functional groups, the shared ones, or the file (single-frame images)."""
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or ()
    groups = list(per_frame[index:index + 1]) + list(ds.get("SharedFunctionalGroupsSequence") or ())
    for group in groups:
        for item in group.get(sequence) or ():
            if item.get(keyword) is not None:
                return item.get(keyword)
    return ds.get(keyword)


def _why_left_out(image_type: list[str], position, orientation) -> str | None:
    if "LOCALIZER" in image_type:
        return "localiser"
    # Lossy compression makes an axial slice DERIVED\PRIMARY\AXIAL; reformats and projections are SECONDARY.
    if image_type[:1] == ["DERIVED"] and image_type[1:3] != ["PRIMARY", "AXIAL"]:
        return "derived"
    if position is None or orientation is None:
        return "without a position in space"
    lengths = np.linalg.norm(orientation, axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(orientation[0] @ orientation[1]) > 0.01:
        return "with an orientation that is none"
    if abs(np.cross(*orientation)[2]) < AXIAL_COS:
        return "not axial"
    return None


def describe_left_out(reasons: Sequence[str]) -> str:
    """Counts by reason: '2 localiser, 1 derived'."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())


# ---- reading

def read_dicom(scan_id: str, paths: Sequence[Path], notes: Sequence[str] = ()) -> Scan:
    """Read a series' files as a Scan, in HU, brought to the display that Scan tells.

    Localisers, derived, non-axial and non-CT images are left out with a note. Slices are sorted along their
    common normal and keep their own positions, mm along that normal; gaps, duplicates and uneven spacing are
    noted. Raises ScanError where fewer than 3 axial slices remain, where two different slices share a position,
    where slices differ in size, pixel spacing or orientation, and where slope, intercept or pixels are missing.
    """
    frames = [frame for path in paths for frame in _frames(path, _read_tags(path))]
    out = [frame.left_out for frame in frames if frame.left_out]
    frames = [frame for frame in frames if not frame.left_out]
    notes = list(notes) + ([f"left out: {describe_left_out(out)}"] if out else [])
    if len(frames) < 3:
        raise ScanError(f"{scan_id}: {len(frames)} axial CT slices, at least 3 are needed"
                        + (f" (left out: {describe_left_out(out)})" if out else ""))
    _check_alike(scan_id, frames)

    hu = _to_hu(scan_id, frames, _read_pixels(frames), notes)
    hu, stack = _to_display(hu, frames)
    normal = np.cross(stack.column_step, stack.row_step)
    normal /= np.linalg.norm(normal)
    position = stack.origins @ normal
    order = np.argsort(position, kind="stable")
    order = order[_drop_duplicates(scan_id, hu[order], position[order], notes)]
    if len(order) < 3:
        raise ScanError(f"{scan_id}: axial CT slices at {len(order)} different positions, at least 3 are needed")
    notes += spacing_notes(position[order])
    spacing = (float(np.linalg.norm(stack.row_step)), float(np.linalg.norm(stack.column_step)))
    stack = replace(stack, origins=stack.origins[order], frames=tuple((frames[k].path, frames[k].index) for k in order))
    return Scan(scan_id, hu[order], position[order], spacing, geometry=stack, source="dicom",
                notes=tuple(notes))


def _check_alike(scan_id: str, frames: list[_Frame]) -> None:
    first = frames[0]
    for frame in frames:
        name = f"{scan_id}: {frame.path.name}"
        if frame.spacing is None or min(frame.spacing) <= 0:
            raise ScanError(f"{name} has no valid PixelSpacing")
        if frame.rescale is None or frame.rescale[0] == 0:
            raise ScanError(f"{name} has no valid RescaleSlope and RescaleIntercept, so its HU are unknown")
        if frame.size != first.size:
            raise ScanError(f"{name} has {frame.size} rows and columns, {first.path.name} has {first.size}; "
                            "put the images of different size in folders and series of their own")
        if not np.allclose(frame.spacing, first.spacing, rtol=1e-3):
            raise ScanError(f"{name} has pixels of {frame.spacing} mm, {first.path.name} of {first.spacing} mm "
                            "(two reconstructions in one series?); put them in series of their own")
        if np.abs(frame.orientation - first.orientation).max() > 0.01:
            raise ScanError(f"{name} and {first.path.name} are axial but lie at an angle to each other (two "
                            "gantry tilts in one series?); put them in series of their own")


def _read_pixels(frames: list[_Frame]) -> list[np.ndarray]:
    """Stored values [H, W] of each frame."""
    members: dict[Path, list[int]] = {}
    for k, frame in enumerate(frames):
        members.setdefault(frame.path, []).append(k)
    stored = [np.empty(0)] * len(frames)
    for path, indices in members.items():
        try:
            ds = pydicom.dcmread(path, force=True)
            if "TransferSyntaxUID" not in ds.file_meta:             # a bare data set: as it could be parsed
                implicit, _ = ds.original_encoding
                ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            pixels = ds.pixel_array
        except Exception as error:              # every decoder raises its own
            raise ScanError(f"{path}: its pixels cannot be decoded ({type(error).__name__}): the file is "
                            "truncated or its compression is not supported") from error
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        for k in indices:
            stored[k] = pixels[frames[k].index]
    return stored


def _to_hu(scan_id: str, frames: list[_Frame], stored: list[np.ndarray], notes: list[str]) -> np.ndarray:
    """Slope and intercept of each frame; padding becomes air. float32 [S, H, W]."""
    hu = np.empty((len(frames), *frames[0].size), np.float32)
    padded = [np.zeros(f.size, bool) if f.padding is None else (v >= f.padding[0]) & (v <= f.padding[1])
              for f, v in zip(frames, stored)]

    def rescale(inverted: bool) -> bool:
        """Fill hu; tells whether it looks like a head in air: more air than bone, and soft tissue."""
        air = bone = soft = total = 0
        for k, (frame, values) in enumerate(zip(frames, stored)):
            slope, intercept = frame.rescale
            values = values.astype(np.float32)
            if inverted and frame.monochrome1:
                values = frame.inverse_of - values
            hu[k] = values * slope + intercept
            measured = hu[k][~padded[k]]
            air += int((measured < -300).sum())
            bone += int((measured > 300).sum())
            soft += int(((measured > -100) & (measured < 150)).sum())
            total += measured.size
            hu[k][padded[k]] = AIR_HU
        return air > bone and soft > 0.01 * total

    # MONOCHROME1 concerns the display only, but some writers invert the stored values as well.
    if not rescale(inverted=False) and any(frame.monochrome1 for frame in frames):
        if not rescale(inverted=True):
            raise ScanError(f"{scan_id}: MONOCHROME1, and neither the stored values nor their inverse look like "
                            "HU of a head in air; convert the series to MONOCHROME2")
        notes.append("MONOCHROME1 with inverted stored values: inverted back")
    return np.maximum(hu, np.float32(AIR_HU), out=hu)


def _to_display(hu: np.ndarray, frames: list[_Frame]) -> tuple[np.ndarray, SliceStack]:
    """Turn by 90 degrees and flip so that rows run to the back and columns to the patient's left."""
    origins = np.array([frame.position for frame in frames])
    column_step = frames[0].orientation[0] * frames[0].spacing[1]
    row_step = frames[0].orientation[1] * frames[0].spacing[0]
    transposed = bool(abs(column_step[0]) * abs(row_step[1]) < abs(column_step[1]) * abs(row_step[0]))
    if transposed:
        hu, column_step, row_step = hu.transpose(0, 2, 1), row_step, column_step
    rows_flipped, columns_flipped = bool(row_step[1] < 0), bool(column_step[0] < 0)
    if rows_flipped:
        origins, hu, row_step = origins + (hu.shape[1] - 1) * row_step, hu[:, ::-1], -row_step
    if columns_flipped:
        origins, hu, column_step = origins + (hu.shape[2] - 1) * column_step, hu[:, :, ::-1], -column_step
    stack = SliceStack(origins, row_step, column_step, (), transposed, rows_flipped, columns_flipped)
    return np.ascontiguousarray(hu), stack


def _drop_duplicates(scan_id: str, hu: np.ndarray, position: np.ndarray, notes: list[str]) -> list[int]:
    """Indices of the slices to keep, of slices sorted by position."""
    keep, different = [0], 0
    for k in range(1, len(hu)):
        if position[k] - position[keep[-1]] > SAME_PLACE_MM:
            keep.append(k)
        elif not np.array_equal(hu[k], hu[keep[-1]]):
            different += 1
    if different:
        raise ScanError(f"{scan_id}: slices that lie where another, different slice lies: {different} (two "
                        "acquisitions or reconstructions in one series, or two patients?); put each in a series of "
                        "its own")
    if len(keep) < len(hu):
        notes.append(f"duplicate slices dropped: {len(hu) - len(keep)}")
    return keep


def spacing_notes(position_mm: np.ndarray) -> list[str]:
    """What to say about uneven steps: missing slices, or a protocol of two spacings (skull base, then vertex).

    A run of at most 2 steps that are a whole multiple of a neighbouring run's step is taken for missing slices.
    """
    steps = np.diff(position_mm)
    starts = [0] + [k for k in range(1, len(steps))
                    if abs(steps[k] - steps[k - 1]) > max(0.2, 0.05 * steps[k - 1])]
    lengths = np.diff(starts + [len(steps)]).tolist()
    sizes = [float(np.median(steps[start:start + length])) for start, length in zip(starts, lengths)]
    notes, regular = [], []
    for k, (start, length, size) in enumerate(zip(starts, lengths, sizes)):
        beside = min(sizes[max(k - 1, 0):k] + sizes[k + 1:k + 2], default=size)
        ratio = size / beside
        if length <= 2 and ratio > 1.5 and abs(ratio - round(ratio)) < 0.15:
            notes.append(f"slices missing: {length * (round(ratio) - 1)}, {position_mm[start] - position_mm[0]:.1f} mm "
                         f"above the lowest slice (a step of {size:.2f} mm among steps of {beside:.2f} mm)")
        else:
            regular.append((length, size))
    if len(regular) > 1 and max(s for _, s in regular) - min(s for _, s in regular) > 0.2:
        runs = ", ".join(f"{length} x {size:.2f}" for length, size in regular)
        notes.append(f"uneven slice spacing ({runs} mm); each slice keeps its own position")
    return notes
