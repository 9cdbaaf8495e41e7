"""DICOM CT: files found and made scans, slices in their order, in HU.

What a file's header tells is read by ct.dicom_header; which images make up one scan is told by ct.series.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ct.dicom_header import NO_HU, Frame, need_more_bits, read_header, stored_values
from ct.dicom_pixels import read_pixels
from ct.geometry import SliceStack, shear_deg
from ct.limits import check_pixel_spacing, check_size, check_slice_spacing
from ct.plausible import describe, like_a_head, tissue_shares
from ct.scan import AIR_HU, Found, Scan, ScanError, ScanSource
from ct.series import KIND, MIN_SLICES, SAME_PLACE_MM, describe_left_out, scans_of, told_thickness_mm

SUFFIXES = (".dcm", ".dicom", ".ima")                 # with these names a file that is no DICOM is an error
TISSUE_HU = (-300, 300)                               # no padding value lies in here
# Kernels for bone and lung, where noise and edges hide what differs in the brain: Siemens from 55 upwards (H60s,
# Hr68f, J70h), Canon FC30 to 39, 50 to 59 and 80 to 89, Philips D, E, L and the Y family, GE by name.
SHARP_KERNEL = re.compile(r"(?:[A-Z][A-Z]?(?:5[5-9]|[6-9]\d)[A-Z]*|FC[358]\d|[DEL]|Y[A-D]|.*(?:BONE|EDGE|LUNG|"
                          r"SHARP).*)", re.IGNORECASE)
TILT_DEG = 3.0                                        # of the gantry: two that differ by less are one, rounded
MOST_RUNS = 4                                         # of steps of one size, that a note lists
FAR_APART = 1.5                                       # steps from slice to slice, in thicknesses of a slice
VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT OB OF OW PN SH SL SQ SS ST TM UI UL UN US UT".split())


# ---- claims

def claims(path: Path, head: bytes) -> bool:
    """Whether a file is DICOM, by its first bytes (132 or more) or its name."""
    return head[128:132] == b"DICM" or _is_bare(head) or path.suffix.lower() in SUFFIXES


def _is_bare(head: bytes) -> bool:
    """Whether a file without preamble begins as a data set does: with an element of group 2 or 8."""
    if len(head) < 132 or head[:2] not in (b"\x02\x00", b"\x08\x00") or head[3] != 0 or head[2] > 0x20:
        return False
    length = int.from_bytes(head[4:8], "little")
    return head[4:6] in VRS or (length < 128 and length % 2 == 0)


# ---- find

def find(paths: Sequence[Path]) -> list[Found]:
    """The scans that DICOM files make up; broken files are one Found with an error per folder."""
    headers, broken = [], {}
    for path in paths:
        try:
            header = read_header(path)
        except ScanError as error:
            broken.setdefault(path.parent, []).append((path, str(error)))
        else:
            headers += [header] if header is not None else []
    return [*(_beside(found, broken) for found in scans_of(headers)),
            *(_unreadable(folder, files) for folder, files in broken.items())]


def _beside(found: Found, broken: dict[Path, list[tuple[Path, str]]]) -> Found:
    """The scan with a note on broken files in its folders: what is missing at its ends shows nowhere else."""
    count = sum(len(broken.get(folder, ())) for folder in {path.parent for path in found.paths})
    if not count or found.error is not None:
        return found
    note = f"files beside it that cannot be read: {count}; if they are its slices, it is not whole"
    return replace(found, notes=(*found.notes, note))


def _unreadable(folder: Path, files: list[tuple[Path, str]]) -> Found:
    error = files[0][1] + (f"; and {len(files) - 1} more in this folder" if len(files) > 1 else "")
    return Found(KIND, tuple(path for path, _ in files), folder, "unreadable", error=error)


# ---- reading

def read(source: ScanSource) -> Scan:
    """Read a series' files as a Scan, in HU, brought to the display that Scan tells.

    Localisers, derived, non-axial and non-CT images, and those in another unit than HU, are left out with a note.
    Slices are sorted along their common normal and keep their own positions, mm along that normal; gaps, duplicates
    and uneven spacing are noted. Raises ScanError where fewer than 3 axial slices remain, where two different slices
    share a position, where slices differ in size, pixel spacing or orientation, where slope, intercept or pixels are
    missing, and where the values are not those of a head in air.
    """
    chosen = set(source.options.get("frames", ()))
    frames = []
    for number, path in enumerate(source.paths):
        header = read_header(path)
        frames += [frame for frame in header.frames if not chosen or frame.left_out or (number, frame.index) in chosen]
    out = [frame.left_out for frame in frames if frame.left_out]
    frames = [frame for frame in frames if not frame.left_out]
    notes = [f"left out: {describe_left_out(out)}"] if out else []
    if len(frames) < MIN_SLICES:
        remedy = ("give the series that is in HU" if any(reason.startswith(NO_HU) for reason in out)
                  else "give the whole series of axial slices, as the scanner made it")
        raise ScanError(f"{min(source.paths).name} and what belongs to it: {len(frames)} axial CT slices, at least "
                        f"{MIN_SLICES} are needed" + (f" (left out: {describe_left_out(out)})" if out else "")
                        + f"; {remedy}")
    _check_alike(frames)
    notes += _remarks(frames)

    hu = _to_hu(frames, _read_pixels(frames, notes), notes)
    hu, stack = _to_display(hu, frames)
    normal = np.cross(stack.column_step, stack.row_step)
    normal /= np.linalg.norm(normal)
    position = stack.origins @ normal
    order = np.argsort(position, kind="stable")
    order = order[_drop_duplicates(hu[order], position[order], [frames[k].path.name for k in order], notes)]
    if len(order) < MIN_SLICES:
        raise ScanError(f"{min(source.paths).name} and what belongs to it: axial CT slices at {len(order)} different "
                        f"positions, at least {MIN_SLICES} are needed; give the whole series")
    step_mm = float(np.median(np.diff(position[order])))
    check_slice_spacing(frames[0].path.name, step_mm)
    notes += [*spacing_notes(position[order]), *_gap_notes(frames, step_mm)]
    notes += _tilt_notes(frames, stack.origins[order], position[order])
    spacing = (float(np.linalg.norm(stack.row_step)), float(np.linalg.norm(stack.column_step)))
    files = tuple((frames[k].path, frames[k].index) for k in order)
    stack = replace(stack, origins=stack.origins[order], frames=files)
    return Scan(source.scan_id, hu[order], position[order], spacing, geometry=stack, source=KIND, notes=tuple(notes))


def _check_alike(frames: list[Frame]) -> None:
    first = frames[0]
    for frame in frames:
        name = frame.path.name
        if frame.spacing is None or min(frame.spacing) <= 0:
            raise ScanError(f"{name} has no valid PixelSpacing, so its size is unknown; export the series again with "
                            "it, or leave this image out")
        if frame.rescale is None or frame.rescale[0] == 0:
            raise ScanError(f"{name} has no valid RescaleSlope and RescaleIntercept, so its HU are unknown; export the "
                            "series again with them, or leave this image out")
        if frame.high_bit not in (None, frame.bits - 1):
            raise ScanError(f"{name}: HighBit is {frame.high_bit}, BitsStored {frame.bits}: which bits hold its values "
                            f"is unknown, and so are its HU; expected HighBit {frame.bits - 1}; export the series "
                            "again, or correct the attribute")
        if frame.size != first.size:
            raise ScanError(f"{name} has {frame.size} rows and columns, {first.path.name} has {first.size}; "
                            "put the images of different size in folders and series of their own")
        if not np.allclose(frame.spacing, first.spacing, rtol=1e-3):
            raise ScanError(f"{name} has pixels of {frame.spacing} mm, {first.path.name} of {first.spacing} mm "
                            "(two reconstructions in one series?); put them in series of their own")
        if np.abs(frame.orientation - first.orientation).max() > 0.01:
            raise ScanError(f"{name} and {first.path.name} are axial but lie at an angle to each other (two "
                            "gantry tilts in one series?); put them in series of their own")
    check_pixel_spacing(first.path.name, first.spacing, first.size)
    check_size(first.path.name, len(frames), *first.size)
    if np.ptp([frame.height for frame in frames]) <= SAME_PLACE_MM:
        raise ScanError(f"all {len(frames)} slices lie at one ImagePositionPatient ({first.path.name} and others), as "
                        "some exporters write it; export the series again with each slice's own position")


def _remarks(frames: list[Frame]) -> list[str]:
    """What the attributes say that a reader of the score should know."""
    notes = []
    if any(frame.traits["contrast"] == "True" for frame in frames):
        notes.append("contrast agent given (ContrastBolusAgent): enhanced vessels look like blood to a model of scans "
                     "without")
    if any(SHARP_KERNEL.fullmatch(frame.traits["kernel"].split("\\")[0]) for frame in frames):
        notes.append("sharp kernel (ConvolutionKernel): noise and edges are stronger than in the usual brain "
                     "reconstruction")
    derived = sum(frame.derived for frame in frames)
    if derived:
        notes.append(f"marked as derived and secondary (ImageType), taken as axial slices: {derived}")
    return notes


def _read_pixels(frames: list[Frame], notes: list[str]) -> list[np.ndarray]:
    """Stored values [H, W] of each frame."""
    members: dict[Path, list[int]] = {}
    for k, frame in enumerate(frames):
        members.setdefault(frame.path, []).append(k)
    stored = [np.empty(0)] * len(frames)
    relabelled: Counter[str] = Counter()
    for path, indices in members.items():
        pixels, wrong = read_pixels(path)
        relabelled.update([wrong] if wrong else [])
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        for k in indices:
            if frames[k].index >= len(pixels) or pixels[frames[k].index].shape != frames[k].size:
                raise ScanError(f"{path.name}: its pixels are not of the size that Rows, Columns and "
                                "NumberOfFrames say; export the series again")
            stored[k] = pixels[frames[k].index]
    notes += [f"transfer syntax {wrong}: {count} files read as they are" for wrong, count in relabelled.items()]
    return stored


def _to_hu(frames: list[Frame], stored: list[np.ndarray], notes: list[str]) -> np.ndarray:
    """Slope and intercept of each frame; padding becomes air. float32 [S, H, W]."""
    hu, cut = np.empty((len(frames), *frames[0].size), np.float32), set()
    padding = [_padding_outside_tissue(frame) for frame in frames]
    if any(outside is None and frame.padding is not None for frame, outside in zip(frames, padding)):
        notes.append(f"PixelPaddingValue lies among the HU of tissue ({TISSUE_HU[0]}..{TISSUE_HU[1]}): not taken as "
                     "padding")

    def rescale(inverted: bool) -> None:
        for k, (frame, raw, limits) in enumerate(zip(frames, stored, padding)):
            slope, intercept = frame.rescale
            integers = np.issubdtype(raw.dtype, np.integer)
            values = stored_values(raw, frame.bits, frame.signed) if integers else raw
            padded = (values >= limits[0]) & (values <= limits[1]) if limits else np.zeros(values.shape, bool)
            if integers and _has_wide_padding(frame):
                padded |= raw.astype(np.uint16) == frame.wide_padding
            if integers and not frame.overlay and (need_more_bits(raw, values, frame.bits) & ~padded).any():
                cut.add(k)
            values = values.astype(np.float32)
            if inverted and frame.monochrome1:
                values = (-1 if frame.signed else 2**frame.bits - 1) - values
            hu[k] = np.nan_to_num(values * slope + intercept, nan=AIR_HU)
            hu[k][padded] = AIR_HU

    # MONOCHROME1 concerns the display only, but some writers invert the stored values as well.
    rescale(inverted=False)
    shares = tissue_shares(hu)
    if not like_a_head(shares) and any(frame.monochrome1 for frame in frames):
        rescale(inverted=True)
        if not like_a_head(tissue_shares(hu)):
            raise ScanError(f"{frames[0].path.name} and the other slices: MONOCHROME1, and neither the stored values "
                            "nor their inverse look like HU of a head in air; convert the series to MONOCHROME2")
        notes.append("MONOCHROME1 with inverted stored values: inverted back")
    elif not like_a_head(shares):
        raise ScanError(f"the values do not look like HU of a head in air: {describe(shares)}, in "
                        f"{frames[0].path.name} and the other slices; check RescaleSlope, RescaleIntercept, "
                        "PixelRepresentation and BitsStored")
    if cut:
        notes.append(f"values need more bits than BitsStored says ({frames[min(cut)].bits}), where the header tells of "
                     f"no overlay, and are read without these, metal perhaps as air: {len(cut)} slices")
    return np.maximum(hu, np.float32(AIR_HU), out=hu)


def _padding_outside_tissue(frame: Frame) -> tuple[int, int] | None:
    """The frame's padding range, None where it reaches into the HU of tissue."""
    return None if frame.padding is None or _among_tissue(frame, *frame.padding) else frame.padding


def _has_wide_padding(frame: Frame) -> bool:
    """Whether padding has more bits than the pixels; not where these, with an overlay above them, could be tissue."""
    return frame.wide_padding is not None and not _among_tissue(
        frame, int(stored_values(np.array(frame.wide_padding), frame.bits, frame.signed)))


def _among_tissue(frame: Frame, *stored: int) -> bool:
    """Whether the stored values, or one between them, mean HU of tissue."""
    hu = [value * frame.rescale[0] + frame.rescale[1] for value in stored]
    return min(hu) <= TISSUE_HU[1] and max(hu) >= TISSUE_HU[0]


def _to_display(hu: np.ndarray, frames: list[Frame]) -> tuple[np.ndarray, SliceStack]:
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


def _drop_duplicates(hu: np.ndarray, position: np.ndarray, names: list[str], notes: list[str]) -> list[int]:
    """Indices of the slices to keep, of slices sorted by position. ScanError names the first two that differ."""
    keep, different = [0], []
    for k in range(1, len(hu)):
        if position[k] - position[keep[-1]] > SAME_PLACE_MM:
            keep.append(k)
        elif not np.array_equal(hu[k], hu[keep[-1]]):
            different.append(f"{names[k]} and {names[keep[-1]]}")
    if different:
        raise ScanError(f"slices that lie where another, different slice lies: {len(different)}, the first "
                        f"{different[0]} (two acquisitions or reconstructions in one series, or two patients?); put "
                        "each in a series of its own")
    if len(keep) < len(hu):
        notes.append(f"duplicate slices dropped: {len(hu) - len(keep)}")
    return keep


def _gap_notes(frames: list[Frame], step_mm: float) -> list[str]:
    """A note where much lies between the slices: every second file is missing, or the protocol leaves gaps."""
    thickness_mm = told_thickness_mm(frames)
    if not 0 < FAR_APART * thickness_mm < step_mm:
        return []
    return [f"slices are {thickness_mm:.3g} mm thick and {step_mm:.3g} mm apart: {1 - thickness_mm / step_mm:.0%} of "
            "the head is not shown; are files missing?"]


def _tilt_notes(frames: list[Frame], origins: np.ndarray, position_mm: np.ndarray) -> list[str]:
    """A note where the gantry was tilted by another angle than the slices are sheared by."""
    told_deg, sheared_deg = max(frame.tilt_deg for frame in frames), shear_deg(origins, position_mm)
    if not told_deg or abs(told_deg - sheared_deg) <= TILT_DEG:
        return []
    told, sheared = np.cos(np.deg2rad([told_deg, sheared_deg]))
    return [f"GantryDetectorTilt is {told_deg:g} degrees, but by ImageOrientationPatient and ImagePositionPatient the "
            f"slices are sheared by {sheared_deg:.0f}: unless they were straightened, heights are off by "
            f"{abs(1 - told / sheared):.0%} and maps lie askew in space"]


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
        if len(regular) <= MOST_RUNS:
            how = ", ".join(f"{length} x {size:.2f}" for length, size in regular) + " mm"
        else:
            sizes = [size for _, size in regular]
            how = (f"steps of {min(sizes):.2f} to {max(sizes):.2f} mm"
                   + (", as where positions were rounded" if _may_be_rounded(position_mm) else ""))
        notes.append(f"uneven slice spacing ({how}); each slice keeps its own position")
    return notes


def _may_be_rounded(position_mm: np.ndarray) -> bool:
    """Whether rounding makes these of even positions: steps of two sizes, so mixed that no slice lies further from
    even ones than these sizes differ by."""
    steps = np.diff(position_mm)
    smallest, apart = steps.min(), np.ptp(steps)
    even = np.linspace(position_mm[0], position_mm[-1], len(position_mm))
    beside = np.minimum(steps - smallest, smallest + apart - steps)
    return bool(beside.max() < 0.05 * apart and np.abs(position_mm - even).max() <= apart)
