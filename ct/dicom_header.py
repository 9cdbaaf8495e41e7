"""What the header of a DICOM file tells of its images: whether they are axial CT, where each lies, its HU."""

from __future__ import annotations

import errno
import hashlib
import re
from dataclasses import dataclass, field
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

from ct.dicom_pixels import open_dicom
from ct.limits import check_size
from ct.scan import ScanError

CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
HU_TYPES = ("", "HU", "HU_MOD", "US")                 # of RescaleType, or HOUNSFIELD ...; US: unspecified
NO_HU = "no HU"                                       # begins the reason of an image whose values are something else
AXIAL_COS = float(np.cos(np.deg2rad(45)))             # slice normal to body axis; gantries tilt up to 30 degrees
PROJECTIONS = {"MIP", "MINIP", "AVERAGE", "AVERAGE_IP", "PROJECTION IMAGE", "MPR", "REFORMATTED", "VOLREN",
               "MAXIMUM", "MINIMUM", "MEAN", "STD_DEVIATION", "SUBTRACTION"}              # these of Enhanced CT
MIPS = {"MIP", "MINIP"}                               # also within a value, as in CT_SOM5 MIP
# Contrast agents that are none. Not NON IONIC, which one may be, nor NO ORAL, beside which another may be given.
NO_AGENT = re.compile(r"0?|N/?A?|NIL|PLAIN|NATIVE?|UNENHANCED|(NONE?|NOT?|W/?O|WITHOUT)([\s_-]*(ANY|IV|I\.V\.|"
                      r"INTRAVENOUS|CONTRAST|ENHANCE(D|MENT)|CM|AGENTS?|MEDI(A|UM)|GIVEN|USED))*", re.IGNORECASE)
# What a machine short of memory, processes or open files says, or one whose disk fails
MACHINE_ERRNOS = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EIO)
MACHINE_FAILED = ": memory, open files or a disk of this machine failed; try again"       # ends such a file's reason
OVERLAYS = tuple((group, 0x0102) for group in range(0x6000, 0x6020, 2))            # OverlayBitPosition
HEADER_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality",
    "PatientID", "PatientName", "PatientBirthDate", "ImageType", "InstanceNumber", "AcquisitionNumber",
    "ConvolutionKernel", "KVP", "SliceThickness", "ContrastBolusAgent", "ContrastBolusAgentSequence",
    "TemporalPositionIdentifier", "LossyImageCompression", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "RescaleType", "ImageOrientationPatient",
    "ImagePositionPatient", "PixelSpacing", "GantryDetectorTilt", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


@dataclass(frozen=True)
class Frame:
    """One image of a file, as its header tells it; with the reason for which it is left out, if any."""

    path: Path
    index: int                                        # frame in the file
    size: tuple[int, int]                             # rows, columns
    position: np.ndarray | None = None                # [3]
    orientation: np.ndarray | None = None             # [2, 3] directions of increasing column and of row
    spacing: tuple[float, float] | None = None        # (row, column) mm
    rescale: tuple[float, float] | None = None        # slope, intercept
    padding: tuple[int, int] | None = None            # stored values (inclusive) that mean: not measured
    wide_padding: int | None = None                   # 16 bits, more than BitsStored, that mean the same
    monochrome1: bool = False
    bits: int = 16                                    # BitsStored
    high_bit: int | None = None                       # HighBit, where both are given
    signed: bool = False
    overlay: bool = False                             # the header tells of one in the bits above these
    number: int | None = None                         # InstanceNumber, or the frame's in its file
    copy: bool = False                                # marked as derived or lossy compressed
    derived: bool = False                             # marked as derived and secondary
    traits: dict[str, str] = field(default_factory=dict)
    tilt_deg: float = 0.0                             # GantryDetectorTilt, either way; 0 where it is not given
    left_out: str | None = None

    @property
    def height(self) -> float:
        """Place along the slice normal, mm."""
        return float(self.position @ np.cross(*self.orientation))


@dataclass(frozen=True)
class Header:
    """What discovery needs of a file: what it belongs to, and its frames."""

    path: Path
    study_uid: str
    series_uid: str
    frame_of_reference: str
    patient: str                                      # a hash; empty where the header says nothing
    whose: tuple[str, ...]                            # hashes of patient, study and series: see ct.scan.Found
    instance_uid: str
    frames: tuple[Frame, ...]

    @property
    def left_out(self) -> str | None:
        """Why none of its frames is of use; None where one is."""
        reasons = [frame.left_out for frame in self.frames]
        return reasons[0] if all(reasons) else None


def read_header(path: Path) -> Header | None:
    """The header of a DICOM file; None for a directory (DICOMDIR). Raises ScanError for a broken file."""
    try:
        ds = _read_tags(path)
        if ds.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return None
        if not ds.get("SOPClassUID"):
            raise ScanError(f"{path.name}: not a DICOM image (neither SOPClassUID nor MediaStorageSOPClassUID)")
        patient = [" ".join(str(ds.get(tag, "")).upper().replace("^", " ").split())
                   for tag in ("PatientID", "PatientName", "PatientBirthDate")]
        uids = [str(ds.get(tag, "")) for tag in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")]
        whose = {"patient": patient[0] or " ".join(filter(None, patient)), "study": uids[0], "series": uids[1]}
        return Header(path, *uids, _hash("|".join(patient)) if any(patient) else "",
                      tuple(_hash(f"{kind} {said}") for kind, said in whose.items() if said),
                      str(ds.get("SOPInstanceUID", "")), tuple(_frames(path, ds)))
    except ScanError:
        raise
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ScanError(f"{path.name}: cannot be read ({why}){MACHINE_FAILED * is_of_machine(error)}") from error
    except RecursionError as error:
        raise ScanError(f"{path.name}: its header nests sequences deeper than any CT image's: it is damaged, or made "
                        "to harm") from error
    except Exception as error:     # a broken header can fail anywhere in pydicom; its message may quote patient data
        raise ScanError(f"{path.name}: cannot be read as DICOM ({type(error).__name__})") from error


def is_of_machine(error: BaseException | None) -> bool:
    """Whether memory, open files or a disk of this machine failed: the same file may be read another time."""
    return isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno in MACHINE_ERRNOS


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_tags(path: Path) -> pydicom.Dataset:
    return with_class(open_dicom(path, stop_before_pixels=True, specific_tags=[*HEADER_TAGS, *OVERLAYS]))


def with_class(ds: pydicom.Dataset) -> pydicom.Dataset:
    """The data set, with the SOPClassUID of the file's meta information where an image has none, as exports of RSNA's.
    """
    if not ds.get("SOPClassUID") and "Rows" in ds and (known := ds.file_meta.get("MediaStorageSOPClassUID")):
        ds.SOPClassUID = known
    return ds


def _frames(path: Path, ds: pydicom.Dataset) -> list[Frame]:
    """The frames of a file, each with the reason for which it is left out, if any."""
    count = int(ds.get("NumberOfFrames", 1) or 1)
    size = (int(ds.get("Rows", 0) or 0), int(ds.get("Columns", 0) or 0))
    modality, colours = str(ds.get("Modality", "")), str(ds.get("PhotometricInterpretation") or "")
    reason = None
    if modality != "CT":
        known = modality if re.fullmatch("[A-Z]{2,10}", modality) else "not given" if not modality else "unknown"
        reason = f"not CT (modality {known})"
    elif ds.SOPClassUID not in CT_CLASSES:
        name = UID(ds.SOPClassUID).name
        reason = f"no CT image (SOP class {name if name != ds.SOPClassUID else 'unknown'})"
    elif 0 in size:
        reason = "no picture"
    elif not colours:
        reason = "without PhotometricInterpretation"
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
    types = value("FrameType", "CTImageFrameTypeSequence") or ds.get("ImageType") or ()
    types = [str(v).strip().upper() for v in ([types] if isinstance(types, str) else types)]
    bits, signed = int(ds.get("BitsStored") or 16), bool(ds.get("PixelRepresentation"))
    number, tilt_deg = text("InstanceNumber"), number_of(text("GantryDetectorTilt", "CTAcquisitionDetailsSequence"))
    traits = {
        "kernel": text("ConvolutionKernel", "CTReconstructionSequence"), "type": " ".join(types[3:]),
        "voltage": text("KVP", "CTXRayDetailsSequence"), "thickness": text("SliceThickness", "PixelMeasuresSequence"),
        "spacing": f"{size} {spacing}", "phase": text("TemporalPositionIdentifier")
        or text("TemporalPositionIndex", "FrameContentSequence"), "contrast": str(_has_contrast(ds)),
        "acquisition": text("FrameAcquisitionNumber", "FrameContentSequence") or text("AcquisitionNumber")}
    return Frame(
        path=path,
        index=index,
        size=size,
        position=position,
        orientation=orientation,
        spacing=None if spacing is None else (float(spacing[0]), float(spacing[1])),
        rescale=None if slope is None or intercept is None else (float(slope[0]), float(intercept[0])),
        padding=_padding(ds, bits, signed),
        wide_padding=_wide_padding(ds, bits, signed),
        monochrome1=text("PhotometricInterpretation") == "MONOCHROME1",
        bits=bits,
        high_bit=int(ds.HighBit) if ds.get("BitsStored") and ds.get("HighBit") is not None else None,
        signed=signed,
        overlay=any(tag in ds and ds[tag].value for tag in OVERLAYS),
        number=index if count > 1 else int(number) if number.lstrip("-").isdecimal() else None,
        copy=types[:1] == ["DERIVED"] or text("LossyImageCompression") == "01",
        derived=types[:2] == ["DERIVED", "SECONDARY"],
        traits={trait: _one_spelling(v) for trait, v in traits.items()},
        tilt_deg=abs(tilt_deg) if np.isfinite(tilt_deg) else 0.0,
        left_out=_why_left_out(types, text("RescaleType", "PixelValueTransformationSequence"), position, orientation))


def number_of(text: str) -> float:
    """Of an attribute's text; infinite for what is no number, so that it comes last."""
    try:
        return float(text)
    except ValueError:
        return np.inf


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
    return not all(NO_AGENT.fullmatch(str(agent or "").strip()) for agent in agents)


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


def _wide_padding(ds: pydicom.Dataset, bits: int, signed: bool) -> int | None:
    """The 16 bits of a padding value that has more bits than the pixels: some writers store it all the same."""
    value = ds.get("PixelPaddingValue")
    if value is None or ds.get("PixelPaddingRangeLimit") is not None or _padding(ds, bits, signed) is not None:
        return None
    return int(value) & 0xFFFF


def stored_values(raw: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Decoded integers as the `bits` lowest bits tell them, with their sign: overlays may lie in the bits above."""
    if not 1 <= bits < 32:
        return raw
    values = raw.astype(np.int64) & ((1 << bits) - 1)
    return np.where(values >> (bits - 1), values - (1 << bits), values) if signed else values


def need_more_bits(raw: np.ndarray, values: np.ndarray, bits: int) -> np.ndarray:
    """Where decoded integers are more than their stored_values, bool. The bits above may repeat a sign, or be 0."""
    if not 1 <= bits < 8 * raw.itemsize:
        return np.zeros(raw.shape, bool)
    return (raw != values) & (raw != values & ((1 << bits) - 1))


def frame_value(ds: pydicom.Dataset, index: int, sequence: str, keyword: str):
    """A frame's value: from its own functional groups, the shared ones, or the file (single-frame images)."""
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or ()
    groups = list(per_frame[index:index + 1]) + list(ds.get("SharedFunctionalGroupsSequence") or ())
    for group in groups:
        for item in group.get(sequence) or ():
            if item.get(keyword) is not None:
                return item.get(keyword)
    return ds.get(keyword)


def _why_left_out(image_type: list[str], rescale_type: str, position, orientation) -> str | None:
    if "LOCALIZER" in image_type:
        return "localiser"
    # Lossy compression makes an axial slice DERIVED PRIMARY AXIAL (in Enhanced CT: VOLUME; some writers: nothing more),
    # anonymisers and archives DERIVED SECONDARY AXIAL; reformats and projections say what they are.
    slices = ("AXIAL", "VOLUME", "") if image_type[1:2] == ["PRIMARY"] else ("AXIAL",)
    if image_type[:1] == ["DERIVED"] and ("".join(image_type[2:3]) not in slices or PROJECTIONS & set(image_type)):
        return "derived"
    if MIPS & {word for value in image_type for word in value.split()}:
        return "maximum or minimum projection"
    if rescale_type not in HU_TYPES and not rescale_type.startswith("HOUNSFIELD"):
        return f"{NO_HU} (RescaleType {rescale_type if re.fullmatch('[A-Z0-9_]{1,16}', rescale_type) else 'unknown'})"
    if position is None or orientation is None:
        return "without a position in space"
    lengths = np.linalg.norm(orientation, axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(orientation[0] @ orientation[1]) > 0.01:
        return "with an orientation that is none"
    if abs(np.cross(*orientation)[2]) < AXIAL_COS:
        return "not axial"
    return None
