"""DICOM CT: headers and pixels of the images, which of them are axial slices, where each lies, its HU.

Which images make up one scan is told by ct.series.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom.multival import MultiValue
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from ct.dicom_pixels import open_dicom, read_pixels
from ct.geometry import SliceStack
from ct.limits import check_pixel_spacing, check_size, check_slice_spacing
from ct.plausible import describe, like_a_head, tissue_shares
from ct.scan import AIR_HU, Found, Scan, ScanError, ScanSource
from ct.series import KIND, MIN_SLICES, SAME_PLACE_MM, Frame, Header, describe_left_out, number_of, scans_of

SUFFIXES = (".dcm", ".dicom", ".ima")                 # with these names a file that is no DICOM is an error
CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
HU_TYPES = ("", "HU", "HU_MOD", "US")                 # of RescaleType; US: unspecified
TISSUE_HU = (-300, 300)                               # no padding value lies in here
AXIAL_COS = float(np.cos(np.deg2rad(45)))             # slice normal to body axis; gantries tilt up to 30 degrees
PROJECTIONS = {"MIP", "MINIP", "AVERAGE", "AVERAGE_IP", "PROJECTION IMAGE", "MPR", "REFORMATTED", "VOLREN"}
NO_AGENT = {"", "NO", "N", "NONE", "NO CONTRAST", "WITHOUT", "0"}
HEADER_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality",
    "PatientID", "PatientName", "PatientBirthDate", "ImageType", "SeriesNumber", "InstanceNumber", "AcquisitionNumber",
    "ConvolutionKernel", "KVP", "SliceThickness", "ContrastBolusAgent", "ContrastBolusAgentSequence",
    "TemporalPositionIdentifier", "LossyImageCompression", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "BitsStored", "PixelRepresentation", "PhotometricInterpretation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ImageOrientationPatient", "ImagePositionPatient",
    "PixelSpacing", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)
# Kernels for bone and lung, where noise and edges hide what differs in the brain: Siemens from 55 upwards (H60s,
# Hr68f, J70h), Canon FC30 to 39, 50 to 59 and 80 to 89, Philips D, E, L and the Y family, GE by name.
SHARP_KERNEL = re.compile(r"(?:[A-Z][A-Z]?(?:5[5-9]|[6-9]\d)[A-Z]*|FC[358]\d|[DEL]|Y[A-D]|.*(?:BONE|EDGE|LUNG|"
                          r"SHARP).*)", re.IGNORECASE)
ASIDE_MM = 3.0                                        # in plane, beyond what a tilted gantry or rounding moves
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

def find(paths: Sequence[Path], unknown_slice_spacing_mm: float = 5.0) -> list[Found]:
    """The scans that DICOM files make up; broken files are one Found with an error per folder."""
    headers, broken = [], {}
    for path in paths:
        try:
            header = read_header(path)
        except ScanError as error:
            broken.setdefault(path.parent, []).append((path, str(error)))
        else:
            headers += [header] if header is not None else []
    return [*scans_of(headers), *(_unreadable(folder, files) for folder, files in broken.items())]


def _unreadable(folder: Path, files: list[tuple[Path, str]]) -> Found:
    error = files[0][1] + (f"; and {len(files) - 1} more in this folder" if len(files) > 1 else "")
    return Found(KIND, tuple(path for path, _ in files), folder, "unreadable", options={"error": error})


# ---- headers

def read_header(path: Path) -> Header | None:
    """The header of a DICOM file; None for a directory (DICOMDIR). Raises ScanError for a broken file."""
    try:
        ds = _read_tags(path)
        if ds.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return None
        if "SOPClassUID" not in ds:
            raise ScanError(f"{path.name}: not a DICOM image (its header holds no SOPClassUID)")
        patient = [" ".join(str(ds.get(tag, "")).upper().replace("^", " ").split())
                   for tag in ("PatientID", "PatientName", "PatientBirthDate")]
        uids = [str(ds.get(tag, "")) for tag in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")]
        whose = {"patient": patient[0] or " ".join(filter(None, patient)), "study": uids[0], "series": uids[1]}
        return Header(path, *uids, _hash("|".join(patient)) if any(patient) else "",
                      tuple(_hash(f"{kind} {said}") for kind, said in whose.items() if said),
                      int(ds.get("SeriesNumber") or 0), str(ds.get("SOPInstanceUID", "")), tuple(_frames(path, ds)))
    except ScanError:
        raise
    except RecursionError as error:
        raise ScanError(f"{path.name}: its header nests sequences deeper than any CT image's: it is damaged, or made "
                        "to harm") from error
    except Exception as error:     # a broken header can fail anywhere in pydicom; its message may quote patient data
        raise ScanError(f"{path.name}: cannot be read as DICOM ({type(error).__name__})") from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_tags(path: Path) -> pydicom.Dataset:
    return open_dicom(path, stop_before_pixels=True, specific_tags=list(HEADER_TAGS))


def _frames(path: Path, ds: pydicom.Dataset) -> list[Frame]:
    """The frames of a file, each with the reason for which it is left out, if any."""
    count = int(ds.get("NumberOfFrames", 1) or 1)
    size = (int(ds.get("Rows", 0) or 0), int(ds.get("Columns", 0) or 0))
    modality, colours = str(ds.get("Modality", "")), str(ds.get("PhotometricInterpretation", ""))
    reason = None
    if modality != "CT":
        known = modality if re.fullmatch("[A-Z]{2,10}", modality) else "not given" if not modality else "unknown"
        reason = f"not CT (modality {known})"
    elif ds.SOPClassUID not in CT_CLASSES:
        name = UID(ds.SOPClassUID).name
        reason = f"no CT image (SOP class {name if name != ds.SOPClassUID else 'unknown'})"
    elif 0 in size:
        reason = "no picture"
    elif int(ds.get("SamplesPerPixel", 1) or 1) != 1 or not colours.startswith("MONOCHROME"):
        reason = "in colour"
    if reason is not None:
        return [Frame(path, 0, size, left_out=reason)]
    check_size(path.name, count, *size)
    return [_frame(path, index, count, size, ds) for index in range(count)]


def _frame(path: Path, index: int, count: int, size: tuple[int, int], ds: pydicom.Dataset) -> Frame:
    def value(keyword: str, sequence: str = "", number: bool = False):
        try:
            found = frame_value(ds, index, sequence, keyword)
            return np.asarray(found, np.float64).reshape(-1) if number and found is not None else found
        except (ValueError, TypeError, OverflowError) as error:
            comma = " (a decimal comma; DICOM wants a point)" if re.search(r"\d,\d", str(error)) else ""
            raise ScanError(f"{path.name}: {keyword} is no number{comma}; correct the attribute, or export the series "
                            "again") from error

    def numbers(keyword: str, sequence: str, length: int) -> np.ndarray | None:
        values = value(keyword, sequence, number=True)
        return values if values is not None and len(values) == length and np.isfinite(values).all() else None

    def text(keyword: str, sequence: str = "") -> str:
        found = value(keyword, sequence)
        found = "\\".join(map(str, found)) if isinstance(found, MultiValue) else found
        return "" if found is None else str(found).strip().upper()

    position = numbers("ImagePositionPatient", "PlanePositionSequence", 3)
    orientation = numbers("ImageOrientationPatient", "PlaneOrientationSequence", 6)
    orientation = None if orientation is None else orientation.reshape(2, 3)
    spacing = numbers("PixelSpacing", "PixelMeasuresSequence", 2)
    slope = numbers("RescaleSlope", "PixelValueTransformationSequence", 1)
    intercept = numbers("RescaleIntercept", "PixelValueTransformationSequence", 1)
    kind = text("RescaleType", "PixelValueTransformationSequence")
    if kind not in HU_TYPES:
        known = kind if re.fullmatch("[A-Z0-9_]{1,16}", kind) else "unknown"
        raise ScanError(f"{path.name}: RescaleType is {known}: its values are no Hounsfield units; give the series "
                        "that is in HU")
    types = value("FrameType", "CTImageFrameTypeSequence") or ds.get("ImageType") or ()
    types = [str(v).strip().upper() for v in ([types] if isinstance(types, str) else types)]
    bits, signed = int(ds.get("BitsStored") or 16), bool(ds.get("PixelRepresentation"))
    number = text("InstanceNumber")
    traits = {
        "kernel": text("ConvolutionKernel", "CTReconstructionSequence"), "type": " ".join(types[3:]),
        "voltage": text("KVP", "CTXRayDetailsSequence"), "thickness": text("SliceThickness", "PixelMeasuresSequence"),
        "spacing": f"{size} {spacing}", "phase": text("TemporalPositionIdentifier")
        or text("TemporalPositionIndex", "FrameContentSequence"), "contrast": str(_has_contrast(ds)),
        "acquisition": text("FrameAcquisitionNumber", "FrameContentSequence") or text("AcquisitionNumber")}
    return Frame(
        path, index, size, position, orientation, None if spacing is None else (float(spacing[0]), float(spacing[1])),
        None if slope is None or intercept is None else (float(slope[0]), float(intercept[0])),
        _padding(ds, bits, signed), text("PhotometricInterpretation") == "MONOCHROME1", bits, signed,
        index if count > 1 else int(number) if number.lstrip("-").isdecimal() else None,
        types[:1] == ["DERIVED"] or text("LossyImageCompression") == "01", types[:2] == ["DERIVED", "SECONDARY"],
        {trait: _one_spelling(v) for trait, v in traits.items()},
        _why_left_out(types, position, orientation))


def _one_spelling(text: str) -> str:
    """A number as it is however it was written, whole ones with all their digits: AcquisitionNumber may be a date.

    Others to six digits: a thickness of 4.9999998 is one of 5.
    """
    number = number_of(text)
    if not np.isfinite(number):
        return text
    return f"{number:.15g}" if number.is_integer() else f"{number:g}"


def _has_contrast(ds: pydicom.Dataset) -> bool:
    """By the agent's name or, in Enhanced CT, its code."""
    coded = ds.get("ContrastBolusAgentSequence") or ()
    agents = [ds.get("ContrastBolusAgent"), *(item.get("CodeMeaning") or item.get("CodeValue") for item in coded)]
    return any(str(agent or "").strip().upper() not in NO_AGENT for agent in agents)


def _padding(ds: pydicom.Dataset, bits: int, signed: bool) -> tuple[int, int] | None:
    """Stored values, inclusive, that mean: not measured; as the pixels are stored, whatever the VR says.

    None where there are none, or where one has more bits than the pixels: no pixel has it, and cut to their bits it
    could mean tissue.
    """
    value, limit = ds.get("PixelPaddingValue"), ds.get("PixelPaddingRangeLimit")
    if value is None:
        return None
    pair = np.array([int(value), int(value if limit is None else limit)])
    stored = stored_values(pair, bits, signed)
    fits = ((pair & 0xFFFF) >> bits == 0) | (stored == stored_values(pair, 16, signed))       # the VR has 16 bits
    return (int(stored.min()), int(stored.max())) if fits.all() else None


def stored_values(raw: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Decoded integers as the `bits` lowest bits tell them, with their sign: overlays may lie in the bits above."""
    if not 1 <= bits < 32:
        return raw
    values = raw.astype(np.int64) & ((1 << bits) - 1)
    return np.where(values >> (bits - 1), values - (1 << bits), values) if signed else values


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
    # Lossy compression makes an axial slice DERIVED PRIMARY AXIAL, anonymisers and archives DERIVED SECONDARY AXIAL;
    # reformats and projections say what they are.
    if image_type[:1] == ["DERIVED"] and (image_type[2:3] != ["AXIAL"] or PROJECTIONS & set(image_type)):
        return "derived"
    if position is None or orientation is None:
        return "without a position in space"
    lengths = np.linalg.norm(orientation, axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(orientation[0] @ orientation[1]) > 0.01:
        return "with an orientation that is none"
    if abs(np.cross(*orientation)[2]) < AXIAL_COS:
        return "not axial"
    return None


# ---- reading

def read(source: ScanSource) -> Scan:
    """Read a series' files as a Scan, in HU, brought to the display that Scan tells.

    Localisers, derived, non-axial and non-CT images are left out with a note. Slices are sorted along their
    common normal and keep their own positions, mm along that normal; gaps, duplicates and uneven spacing are
    noted. Raises ScanError where fewer than 3 axial slices remain, where two different slices share a position,
    where slices differ in size, pixel spacing or orientation, where slope, intercept or pixels are missing, and
    where the values are not those of a head in air.
    """
    chosen = set(source.options.get("frames", ()))
    frames = []
    for number, path in enumerate(source.paths):
        header = read_header(path)
        frames += [frame for frame in header.frames if not chosen or frame.left_out or (number, frame.index) in chosen]
    out = [frame.left_out for frame in frames if frame.left_out]
    frames = [frame for frame in frames if not frame.left_out]
    notes = list(source.options.get("notes", ())) + ([f"left out: {describe_left_out(out)}"] if out else [])
    if len(frames) < MIN_SLICES:
        raise ScanError(f"{min(source.paths).name} and what belongs to it: {len(frames)} axial CT slices, at least "
                        f"{MIN_SLICES} are needed" + (f" (left out: {describe_left_out(out)})" if out else "")
                        + "; give the whole series of axial slices, as the scanner made it")
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
    check_slice_spacing(frames[0].path.name, float(np.median(np.diff(position[order]))))
    notes += [*spacing_notes(position[order]), *_aside_notes(stack.origins[order], position[order])]
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
    relabelled = 0
    for path, indices in members.items():
        pixels, native = read_pixels(path)
        relabelled += native
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        for k in indices:
            if frames[k].index >= len(pixels) or pixels[frames[k].index].shape != frames[k].size:
                raise ScanError(f"{path.name}: its pixels are not of the size that Rows, Columns and "
                                "NumberOfFrames say; export the series again")
            stored[k] = pixels[frames[k].index]
    if relabelled:
        notes.append(f"transfer syntax says compressed, the pixels are not: {relabelled} files read as they are")
    return stored


def _to_hu(frames: list[Frame], stored: list[np.ndarray], notes: list[str]) -> np.ndarray:
    """Slope and intercept of each frame; padding becomes air. float32 [S, H, W]."""
    hu = np.empty((len(frames), *frames[0].size), np.float32)
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
    return np.maximum(hu, np.float32(AIR_HU), out=hu)


def _padding_outside_tissue(frame: Frame) -> tuple[int, int] | None:
    """The frame's padding range, None where it reaches into the HU of tissue."""
    if frame.padding is None:
        return None
    slope, intercept = frame.rescale
    low, high = sorted(value * slope + intercept for value in frame.padding)
    return None if low <= TISSUE_HU[1] and high >= TISSUE_HU[0] else frame.padding


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


def _aside_notes(origins: np.ndarray, position_mm: np.ndarray) -> list[str]:
    """A note where a slice's corner lies beside the line of the others, as with another field centre from there on."""
    steps, heights = np.diff(origins, axis=0), np.diff(position_mm)[:, None]
    aside = np.linalg.norm(steps - heights * np.median(steps / heights, axis=0), axis=1)
    if aside.max() <= ASIDE_MM:
        return []
    return [f"slices lie up to {aside.max():.0f} mm beside those next to them, as with another field centre "
            f"(ImagePositionPatient), first {int((aside > ASIDE_MM).argmax())} and the one above; the head is "
            "displaced from there on, and what is found there means little"]


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
