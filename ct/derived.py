"""DICOM objects derived from a scan's files: on the source's own frames, in its study, with UIDs that repeat."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from pathlib import Path

import numpy as np
import pydicom
from highdicom import ContributingEquipment, PixelMeasuresSequence, PlaneOrientationSequence
from highdicom.base import SOPClass
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage
from pydicom.valuerep import DA, DT, TM

from ct.dicom_header import frame_value, number_of, with_class
from ct.geometry import SliceStack
from ct.scan import Scan, ScanError
from ct.slab import slice_thickness_mm

MANUFACTURER = "CN-StyleGAN"
WARNING = "Research, unverified"              # opens every series' description
LONG_WARNING = "Research only, unverified: not a medical device"        # 64 characters at most
TYPE_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
          "StudyTime", "ReferringPhysicianName")
WHOSE = ("PatientName", "PatientID")                   # by these an archive files what it gets
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
SAME_ORIENTATION = 1e-4                               # differences of direction cosines that are rounding
OFFSET = re.compile(r"[+-]\d\d[0-5]\d")               # of TimezoneOffsetFromUTC, from -1200 to +1400


class DerivedError(ScanError):
    """A scan that DICOM objects cannot refer to. The message names the file, what it lacks and the mend."""


@dataclass(frozen=True)
class Maker:
    """What made the objects: a model's name, the software's version, a serial number such as a hash."""

    name: str
    version: str
    serial: str

    @property
    def device_uid(self) -> str:
        """Another serial number is another device, whatever its name and version."""
        return make_uid("device", self.serial)


@dataclass(frozen=True)
class Derived:
    """A scan read from DICOM, and what its derived objects need of its files; open() makes one.

    images       per source file what may be referred to: identifiers and geometry, no patient data; of a multi-frame
                 file the frames that are slices, in the order of the slices; of several files each as a CT Image
    sop_classes  of source images that are no CT Images, though `images` has them as such, by SOP Instance UID
    frames       [S] per slice its (image, frame from 0 in its file) among them
    thickness    [S] slice thickness in mm; by where the neighbours lie, where the source does not say
    orientation  [S, 6] direction cosines of the slices' stored rows and columns
    patient      the source's patient and study modules; None where they are not to be copied
    burned_in    an image says that text is burned into its pixels
    series_base  what this maker's series numbers begin after
    seed         what the objects' UIDs are made from
    made         content date and time: with the patient, at the source's offset from UTC if it gives one, as the dates
                 copied are; else without one, local
    """

    scan: Scan
    maker: Maker
    images: tuple[Dataset, ...]
    sop_classes: dict[str, str]
    frames: tuple[tuple[int, int], ...]
    thickness: np.ndarray
    orientation: np.ndarray
    patient: Dataset | None
    burned_in: bool
    series_base: int
    seed: tuple
    made: datetime

    @classmethod
    def open(cls, scan: Scan, maker: Maker, words: tuple, phi: bool, made: datetime, **own):
        """Read the headers of the scan's files again.

        words: what decides the content besides the source and the maker, for the UIDs. phi: whether patient and
        study modules are copied. made: local, where it has no offset. own: fields of a subclass. Raises DerivedError
        where nothing can refer to the source.
        """
        stack = scan.geometry
        if not isinstance(stack, SliceStack) or not stack.frames:
            raise DerivedError(f"{scan.scan_id}: DICOM objects need a scan read from DICOM files; this one came from "
                               f"{scan.source}: do without them")
        paths = list(dict.fromkeys(path for path, _ in stack.frames))
        if gone := [path.name for path in paths if not path.is_file()]:
            raise DerivedError(f"{scan.scan_id}: {gone[0]} is no longer there; put it back, or read a scan in an "
                               "archive by ct.read.open_scan, which keeps it unpacked")
        headers = [with_class(pydicom.dcmread(path, stop_before_pixels=True, force=True)) for path in paths]
        for path, header in zip(paths, headers):
            _check_source(path, header, headers[0], alone=len(paths) == 1)
        _check_distinct(paths, headers)
        if phi:
            _check_kept(paths[0], headers[0])
        thickness = _thickness(scan, headers, paths)
        frames = tuple((paths.index(path), frame) for path, frame in stack.frames)
        orientation = np.array([frame_value(headers[image], frame, "PlaneOrientationSequence",
                                            "ImageOrientationPatient") for image, frame in frames], np.float64)
        lossy = _lossy(headers)
        one_file = [frame for _, frame in frames] if len(paths) == 1 else None
        images = tuple(_reference_image(header, headers[0], frames[0][1], thickness[0], one_file, lossy)
                       for header in headers)
        sop_classes = {header.SOPInstanceUID: header.SOPClassUID for header, image in zip(headers, images)
                       if header.SOPClassUID != image.SOPClassUID}
        instances = tuple(sorted((images[image].SOPInstanceUID, frame) for image, frame in frames))
        seed = (images[0].SeriesInstanceUID, instances, maker.name, maker.version, maker.serial, words, phi)
        zone = _zone(headers[0]) if phi else None
        return cls(scan=scan, maker=maker, images=images, sop_classes=sop_classes, frames=frames, thickness=thickness,
                   orientation=orientation, patient=_patient(headers[0]) if phi else None,
                   burned_in=any(map(_burned_in, headers)),
                   series_base=9000 + 10 * _series_number(headers[0]), seed=seed,
                   made=made.astimezone(zone).replace(tzinfo=zone), **own)

    def uid(self, *words) -> str:
        return make_uid(*self.seed, *words)

    def header(self, kind: str, number: int, description: str, instance: int = 1) -> dict:
        """Arguments that all of highdicom's constructors take. kind: names the series; number: its last digit."""
        return dict(
            series_instance_uid=self.uid("series", kind), series_number=self.series_base + number,
            sop_instance_uid=self.uid("instance", kind, instance), instance_number=instance,
            manufacturer=MANUFACTURER, manufacturer_model_name=self.maker.name,
            software_versions=self.maker.version, device_serial_number=self.maker.serial,
            series_description=f"{WARNING}: {description}", content_date=self.made.date(),
            content_time=self.made.time(), series_date=self.made.date(), series_time=self.made.time(),
            contributing_equipment=[self._equipment()])

    def _equipment(self) -> ContributingEquipment:
        item = ContributingEquipment(
            MANUFACTURER, codes.DCM.ProcessingEquipment, manufacturer_model_name=self.maker.name,
            software_versions=self.maker.version, device_serial_number=self.maker.serial,
            contribution_description=LONG_WARNING)
        item.DeviceUID = self.maker.device_uid
        return item

    def on_source(self, volume: np.ndarray) -> np.ndarray:
        """A map [S, H, W] as the source's frames are stored."""
        return self.scan.geometry.to_stored(volume)

    def reference(self, k: int) -> tuple[Dataset, list[int] | None]:
        """The image of slice k and, of a multi-frame image, its frame as DICOM counts, from 1."""
        image, frame = self.frames[k]
        return self.images[image], None if len(self.images) > 1 else [frame + 1]

    def segmentation(self, mask: np.ndarray, segment: SegmentDescription, **header) -> Segmentation:
        """A binary Segmentation of one segment from a mask, bool [S, H, W]; only frames with a marked pixel."""
        segment.SegmentDescription = LONG_WARNING
        return self.finish(Segmentation(
            self.images, self.on_source(mask), "BINARY", [segment], content_label="RESEARCH",
            content_description=LONG_WARNING, **header))

    def finish(self, ds: SOPClass) -> SOPClass:
        """The last touches to an object of highdicom's: patient and study, times, and no UID by chance."""
        if "Rows" in ds:
            ds.BodyPartExamined = "HEAD"
        if self.patient is not None:
            ds.copy_patient_and_study_information(self.patient)
            if "SpecificCharacterSet" in self.patient:
                ds.SpecificCharacterSet = self.patient.SpecificCharacterSet
        if self.made.tzinfo is not None:
            ds.TimezoneOffsetFromUTC = self.made.strftime("%z")
        ds.InstanceCreationDate, ds.InstanceCreationTime = DA(self.made.date()), TM(self.made.time())
        for item in ds.ContributingEquipmentSequence:             # highdicom adds itself, at the time of the clock
            item.ContributionDateTime = DT(self.made)
        for item in (*ds.get("DimensionOrganizationSequence", ()), *ds.get("DimensionIndexSequence", ())):
            item.DimensionOrganizationUID = self.uid("dimensions", ds.Modality)
        if "PerFrameFunctionalGroupsSequence" in ds:
            self._number_sources(ds)
            if np.ptp(self.thickness) > 0:
                spacing = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
                self._own(ds, "PixelMeasuresSequence",
                          lambda k: PixelMeasuresSequence(spacing, float(self.thickness[k])))
            if np.ptp(self.orientation, axis=0).max() > SAME_ORIENTATION:
                self._own(ds, "PlaneOrientationSequence",
                          lambda k: PlaneOrientationSequence("PATIENT", self.orientation[k]))
                ds.pop("DimensionOrganizationType", None)         # 3D says that planes are parallel
        if self.sop_classes:
            ds.walk(self._name_class)
        return ds

    def _number_sources(self, ds: Dataset) -> None:
        """Source frames by their numbers in a multi-frame file: highdicom counts those that it was given."""
        for group in ds.PerFrameFunctionalGroupsSequence:
            source = group.DerivationImageSequence[0].SourceImageSequence[0]
            if "ReferencedFrameNumber" in source:
                source.ReferencedFrameNumber = self.frames[int(source.ReferencedFrameNumber) - 1][1] + 1

    def _own(self, ds: Dataset, keyword: str, of_slice: Callable[[int], pydicom.Sequence]) -> None:
        """A functional group per frame: highdicom has one for all, that of the first source image."""
        del ds.SharedFunctionalGroupsSequence[0][keyword]
        slices = {(self.images[image].SOPInstanceUID, frame): k for k, (image, frame) in enumerate(self.frames)}
        for group in ds.PerFrameFunctionalGroupsSequence:
            source = group.DerivationImageSequence[0].SourceImageSequence[0]
            k = slices[source.ReferencedSOPInstanceUID, int(source.get("ReferencedFrameNumber", 1)) - 1]
            setattr(group, keyword, of_slice(k))

    def _name_class(self, item: Dataset, element: pydicom.DataElement) -> None:
        """For Dataset.walk: the source's images by their own class, where highdicom took them for CT Images."""
        if element.keyword == "ReferencedSOPClassUID":
            element.value = self.sop_classes.get(item.get("ReferencedSOPInstanceUID"), element.value)


def make_uid(*words) -> str:
    """A UID under the root 2.25 (PS3.5 B.2), the same for the same words."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:16])}"


def _series_number(header: Dataset) -> int:
    """0 where it is not given or no number; no more than leaves room for ours."""
    try:
        return min(max(int(header.get("SeriesNumber") or 0), 0), 10**7)
    except (ValueError, TypeError, OverflowError):
        return 0


def _zone(header: Dataset) -> tzinfo | None:
    """The offset from UTC of the source's dates and times; None where it gives none that can be."""
    offset = str(header.get("TimezoneOffsetFromUTC") or "").strip()
    if not OFFSET.fullmatch(offset) or not -1200 <= int(offset) <= 1400:
        return None
    return datetime.strptime(offset, "%z").tzinfo


def _lossy(headers: Sequence[Dataset]) -> dict:
    """Of the images that say they are lossy the first that says most, ratio and method; empty where none does.

    Without elements that have no value: those would be empty in what is derived, too, where they must not. And without
    a ratio such as 10:1, which no element for numbers can hold.
    """
    said = [{keyword: header.get(keyword) for keyword in LOSSY if header.get(keyword)
             and (keyword != "LossyImageCompressionRatio" or _are_numbers(header.get(keyword)))} for header in headers]
    return max((one for one in said if one.get("LossyImageCompression") == "01"), key=len, default={})


def _are_numbers(value: object) -> bool:
    return all(np.isfinite(number_of(str(one))) for one in (value if isinstance(value, MultiValue) else [value]))


def _burned_in(header: Dataset) -> bool:
    """Whether an image says that it has burned-in text, in whatever letters."""
    return str(header.get("BurnedInAnnotation") or "").strip().upper() in ("YES", "Y")


def _check_source(path: Path, header: Dataset, first: Dataset, alone: bool) -> None:
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        if not header.get(keyword):
            raise DerivedError(f"{path.name}: no {keyword}: DICOM objects would have nothing to refer to; complete the "
                               "header, or do without them")
        if keyword != "SOPInstanceUID" and header[keyword].value != first[keyword].value:
            raise DerivedError(f"{path.name}: another {keyword} than {Path(first.filename).name}: DICOM objects refer "
                               "to one series; send the scan as one, or do without them")
    if int(header.get("NumberOfFrames") or 1) > 1 and not alone:
        raise DerivedError(f"{path.name}: one of several multi-frame files of a series; DICOM objects need "
                           "single-frame images or one multi-frame image: convert the series, or do without them")


def _check_distinct(paths: Sequence[Path], headers: Sequence[Dataset]) -> None:
    """A UID names one image: what refers to two would be shown over the wrong one."""
    of_uid: dict[str, Path] = {}
    for path, header in zip(paths, headers):
        other = of_uid.setdefault(header.SOPInstanceUID, path)
        if other is not path:
            raise DerivedError(f"{path.name}: the same SOPInstanceUID as {other.name}: DICOM objects could refer to "
                               "neither alone; give each image its own, or do without them")


def _check_kept(path: Path, header: Dataset) -> None:
    """Patient's name and ID must be written as they were read: results with others are another patient's.

    Escape sequences of the same text may differ. Bytes that are none of the character set's are read as U+FFFD, which
    would be written in their place.
    """
    stored = {keyword: header.get_item(keyword).value for keyword in WHOSE if keyword in header}
    whose, file = Dataset(), DicomBytesIO()
    for keyword in header.dir("SpecificCharacterSet") + [*stored]:
        whose.add(header[keyword])
    file.is_little_endian = file.is_implicit_VR = True
    write_dataset(file, whose)
    file.seek(0)
    written = read_dataset(file, is_implicit_VR=True, is_little_endian=True)
    for keyword, value in stored.items():
        same = (written.get_item(keyword).value or b"").rstrip(b" \0") == (value or b"").rstrip(b" \0")
        if not same and ("\ufffd" in str(whose[keyword].value) or written[keyword].value != whose[keyword].value):
            raise DerivedError(f"{path.name}: its {keyword} is not in the character set that it names "
                               "(SpecificCharacterSet), so results would be filed under another patient; correct the "
                               "one or the other, or do without the objects or the patient's data in them")


def _thickness(scan: Scan, headers: Sequence[Dataset], paths: Sequence[Path]) -> np.ndarray:
    """Slice thickness in mm, [S]; type 2 in CT, so it may be empty, or no number: then what its neighbours leave it."""
    said = [number_of(str(frame_value(headers[paths.index(path)], frame, "PixelMeasuresSequence", "SliceThickness")))
            for path, frame in scan.geometry.frames]
    return np.array([value if 0 < value < np.inf else mm
                     for value, mm in zip(said, slice_thickness_mm(scan.position_mm))])


def _reference_image(header: Dataset, first: Dataset, first_frame: int, thickness_mm: float,
                     frames: Sequence[int] | None, lossy: dict) -> Dataset:
    """Identifiers and geometry of a source image, and nothing else: what highdicom looks at and refers to.

    frames: of the only file of a scan, which are slices, in their order; None for one of several. Those have a frame
    each and become CT Images, Enhanced ones, too, of which highdicom takes no more than one; finish() names the class.
    Of a multi-frame image it has these frames alone: others, of a second phase or copies, lie at the same places,
    which highdicom refuses.
    lossy: of all images, since highdicom asks the first one alone.
    Orientation and pixel spacing are the first slice's, since highdicom does not forgive their rounding; finish() puts
    orientations that differ by more in their frames.
    """
    image = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID",
                    "Rows", "Columns"):
        if keyword in header:
            setattr(image, keyword, header[keyword].value)
    for keyword, value in lossy.items():
        setattr(image, keyword, value)
    image.Modality, image.PositionReferenceIndicator = "CT", ""
    for keyword in TYPE_2:
        setattr(image, keyword, "")
    measures = Dataset()
    measures.PixelSpacing = frame_value(first, first_frame, "PixelMeasuresSequence", "PixelSpacing")
    measures.SliceThickness = thickness_mm
    orientation = frame_value(first, first_frame, "PlaneOrientationSequence", "ImageOrientationPatient")
    if frames is None:
        image.SOPClassUID = CTImageStorage
        image.update(measures)
        image.ImageOrientationPatient = orientation
        image.ImagePositionPatient = frame_value(header, 0, "PlanePositionSequence", "ImagePositionPatient")
        return image
    image.NumberOfFrames = len(frames)
    plane, shared = Dataset(), Dataset()
    plane.ImageOrientationPatient = orientation
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    image.SharedFunctionalGroupsSequence, image.PerFrameFunctionalGroupsSequence = [shared], []
    for frame in frames:
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = frame_value(header, frame, "PlanePositionSequence", "ImagePositionPatient")
        group.PlanePositionSequence = [position]
        image.PerFrameFunctionalGroupsSequence.append(group)
    return image


def _patient(header: Dataset) -> Dataset:
    """A data set whose patient and study modules highdicom copies, whatever the source's class."""
    _remove_private(header)
    header.SOPClassUID = CTImageStorage
    for keyword in TYPE_2:
        if keyword not in header:
            setattr(header, keyword, "")
    if header.get("PatientIdentityRemoved") == "YES" and not (
            header.get("DeidentificationMethod") or header.get("DeidentificationMethodCodeSequence")):
        header.DeidentificationMethod = "Not stated by the source"           # an empty one makes invalid objects
    return header


def _remove_private(ds: Dataset) -> None:
    """In the items of its sequences, too. Other values stay as they were read, which Dataset.walk would decode."""
    for tag in list(ds.keys()):
        if tag.is_private:
            del ds[tag]
        elif dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ":
            for item in ds[tag].value or ():
                _remove_private(item)
