"""What all DICOM objects of a scan's results share: UIDs, equipment, the source's frames, patient and study modules."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np
import pydicom
from highdicom import ContributingEquipment, PixelMeasuresSequence
from highdicom.base import SOPClass
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage
from pydicom.valuerep import DA, DT, TM

from ct.dicom import SliceStack, frame_value
from ct.scan import Scan, ScanError

MANUFACTURER = "CN-StyleGAN"
WARNING = "Research, unverified"              # opens every description
LONG_WARNING = "Research only, unverified: not a medical device"        # 64 characters at most
KEY_SLICES = 3
SERIES = {"sr": 1, "seg": 2, "map": 3, "key-objects": 4, "pictures": 5}     # last digits of the series numbers
TYPE_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
          "StudyTime", "ReferringPhysicianName")


class DicomOutError(ScanError):
    """A scan whose results cannot be written as DICOM. The message names the file, what it lacks and the mend."""


@dataclass(frozen=True)
class Identity:
    """What made the results; the objects' UIDs depend on all of it.

    name          of the model, such as 'ct-ich-128'
    version       of the software
    weights_hash  SHA-256 of the weights, hexadecimal
    settings      everything else that decides the result, as one text (settings_text)
    """

    name: str
    version: str
    weights_hash: str
    settings: str = ""

    @property
    def device_uid(self) -> str:
        """Other weights are another device."""
        return make_uid("device", self.weights_hash)


class Result(Protocol):
    """What the objects need of a projected scan (detect.Projection); maps are [S, H, W] of the scan's own slices."""

    anomaly: np.ndarray                       # float: the surprise, no unit
    mask: np.ndarray                          # bool
    slice_scores: np.ndarray                  # [S]
    projected: np.ndarray                     # bool [S]
    score: float
    percentile: float | None                  # of the score among healthy scans, %
    threshold: float | None
    flagged: bool | None                      # None without a threshold
    anomalous_ml: float | None


@dataclass(frozen=True)
class Case:
    """One scan's results on their way to DICOM.

    images      per source file what may be referred to: identifiers and geometry, no patient data
    frames      [S] per slice its (image, frame from 0) among them
    thickness   [S] slice thickness in mm; the distance to the neighbours where the source does not say
    patient     the source's patient and study modules; None with --no-phi
    key_slices  indices of the slices with the highest scores, highest first
    seed        what the objects' UIDs are made from
    """

    scan: Scan
    result: Result
    identity: Identity
    images: tuple[Dataset, ...]
    frames: tuple[tuple[int, int], ...]
    thickness: np.ndarray
    patient: Dataset | None
    key_slices: tuple[int, ...]
    series_base: int
    seed: tuple
    made: datetime

    def uid(self, *words) -> str:
        return make_uid(*self.seed, *words)

    def header(self, kind: str, description: str, instance: int = 1) -> dict:
        """Arguments that all of highdicom's constructors take. kind: a key of SERIES."""
        return dict(
            series_instance_uid=self.uid("series", kind), series_number=self.series_base + SERIES[kind],
            sop_instance_uid=self.uid("instance", kind, instance), instance_number=instance,
            manufacturer=MANUFACTURER, manufacturer_model_name=self.identity.name,
            software_versions=self.identity.version, device_serial_number=self.identity.weights_hash[:64],
            series_description=f"{WARNING}: {description}", content_date=self.made.date(),
            content_time=self.made.time(), series_date=self.made.date(), series_time=self.made.time(),
            contributing_equipment=[self._equipment()])

    def _equipment(self) -> ContributingEquipment:
        item = ContributingEquipment(
            MANUFACTURER, codes.DCM.ProcessingEquipment, manufacturer_model_name=self.identity.name,
            software_versions=self.identity.version, device_serial_number=self.identity.weights_hash[:64],
            contribution_description=LONG_WARNING)
        item.DeviceUID = self.identity.device_uid
        return item

    def on_source(self, volume: np.ndarray) -> np.ndarray:
        """A map [S, H, W] as the source's frames are stored; frames of a multi-frame source without a slice are 0."""
        stored = self.scan.geometry.to_stored(volume)
        if len(self.images) > 1:
            return stored
        full = np.zeros((int(self.images[0].NumberOfFrames), *stored.shape[1:]), stored.dtype)
        full[[frame for _, frame in self.frames]] = stored
        return full

    def reference(self, k: int) -> tuple[Dataset, list[int] | None]:
        """The image of slice k and, of a multi-frame image, its frame as DICOM counts, from 1."""
        image, frame = self.frames[k]
        return self.images[image], None if len(self.images) > 1 else [frame + 1]

    def finish(self, ds: SOPClass) -> SOPClass:
        """The last touches to an object of highdicom's: patient and study, times, and no UID by chance."""
        if "Rows" in ds:
            ds.BodyPartExamined = "HEAD"
        if self.patient is not None:
            ds.copy_patient_and_study_information(self.patient)
            if "SpecificCharacterSet" in self.patient:
                ds.SpecificCharacterSet = self.patient.SpecificCharacterSet
        ds.InstanceCreationDate, ds.InstanceCreationTime = DA(self.made.date()), TM(self.made.time())
        for item in ds.ContributingEquipmentSequence:             # highdicom adds itself, at the time of the clock
            item.ContributionDateTime = DT(self.made)
        for item in (*ds.get("DimensionOrganizationSequence", ()), *ds.get("DimensionIndexSequence", ())):
            item.DimensionOrganizationUID = self.uid("dimensions", ds.Modality)
        if "PerFrameFunctionalGroupsSequence" in ds and np.ptp(self.thickness) > 0:
            self._own_thickness(ds)
        return ds

    def _own_thickness(self, ds: Dataset) -> None:
        """Pixel measures per frame: highdicom has one slice thickness for all, that of the first source image."""
        del ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        slices = {(self.images[image].SOPInstanceUID, frame): k for k, (image, frame) in enumerate(self.frames)}
        for group in ds.PerFrameFunctionalGroupsSequence:
            source = group.DerivationImageSequence[0].SourceImageSequence[0]
            k = slices.get((source.ReferencedSOPInstanceUID, int(source.get("ReferencedFrameNumber", 1)) - 1))
            thickness = self.thickness[0 if k is None else k]
            group.PixelMeasuresSequence = PixelMeasuresSequence(self.images[0].PixelSpacing, float(thickness))


def make_uid(*words) -> str:
    """A UID under the root 2.25 (PS3.5 B.2), the same for the same words."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:16])}"


def open_case(scan: Scan, result: Result, identity: Identity, phi: bool, made: datetime) -> Case:
    """Read the headers of the scan's files again. Raises DicomOutError where results cannot refer to them."""
    stack = scan.geometry
    if not isinstance(stack, SliceStack) or not stack.frames:
        raise DicomOutError(f"{scan.scan_id}: DICOM results need a scan read from DICOM files; this one came from "
                            f"{scan.source}; use --no-dicom-out")
    for name in ("anomaly", "mask"):
        if getattr(result, name).shape != scan.hu.shape:
            raise DicomOutError(f"{scan.scan_id}: {name} {list(getattr(result, name).shape)} does not fit the scan "
                                f"{list(scan.hu.shape)}")
    paths = list(dict.fromkeys(path for path, _ in stack.frames))
    headers = [pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in paths]
    for path, header in zip(paths, headers):
        _check_source(path, header, alone=len(paths) == 1)
    thickness = _thickness(scan, headers, paths)
    images = tuple(_reference_image(header, headers[0], thickness[0]) for header in headers)
    frames = tuple((paths.index(path), frame) for path, frame in stack.frames)
    instances = sorted((image.SOPInstanceUID, frame) for image, frame in ((images[i], f) for i, f in frames))
    seed = (images[0].SeriesInstanceUID, tuple(instances), identity.name, identity.version, identity.weights_hash,
            identity.settings, result.threshold, phi)
    number = headers[0].get("SeriesNumber")
    return Case(scan, result, identity, images, frames, thickness, _patient(headers[0]) if phi else None,
                choose_key_slices(result), 10 * min(max(int(number or 0), 0), 10**7) + 9000, seed, made)


def choose_key_slices(result: Result) -> tuple[int, ...]:
    """The KEY_SLICES projected slices with the highest scores, those with a marked pixel first."""
    marked = result.mask.any((1, 2))
    order = sorted(np.flatnonzero(result.projected), key=lambda k: (not marked[k], -result.slice_scores[k]))
    return tuple(int(k) for k in order[:KEY_SLICES])


def _check_source(path: Path, header: Dataset, alone: bool) -> None:
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        if not header.get(keyword):
            raise DicomOutError(f"{path}: no {keyword}: DICOM results would have nothing to refer to; complete the "
                                "header, or use --no-dicom-out")
    if int(header.get("NumberOfFrames") or 1) > 1 and not alone:
        raise DicomOutError(f"{path}: one of several multi-frame files of a series; DICOM results need single-frame "
                            "images or one multi-frame image: convert the series, or use --no-dicom-out")


def _thickness(scan: Scan, headers: Sequence[Dataset], paths: Sequence[Path]) -> np.ndarray:
    """Slice thickness in mm, [S]; type 2 in CT, so it may be empty: then the distance to the neighbours."""
    apart = np.gradient(scan.position_mm)
    said = [frame_value(headers[paths.index(path)], frame, "PixelMeasuresSequence", "SliceThickness")
            for path, frame in scan.geometry.frames]
    return np.array([float(value) if value else mm for value, mm in zip(said, apart)])


def _reference_image(header: Dataset, first: Dataset, thickness_mm: float) -> Dataset:
    """Identifiers and geometry of a source image, and nothing else: what highdicom looks at and refers to.

    Orientation and pixel spacing are the first image's; ct.dicom has seen to it that they agree but for rounding,
    which highdicom does not forgive.
    """
    image = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID",
                    "Rows", "Columns", "LossyImageCompression"):
        if keyword in header:
            setattr(image, keyword, header[keyword].value)
    image.Modality, image.PositionReferenceIndicator = "CT", ""
    for keyword in TYPE_2:
        setattr(image, keyword, "")
    measures = Dataset()
    measures.PixelSpacing = frame_value(first, 0, "PixelMeasuresSequence", "PixelSpacing")
    measures.SliceThickness = thickness_mm
    orientation = frame_value(first, 0, "PlaneOrientationSequence", "ImageOrientationPatient")
    if "SharedFunctionalGroupsSequence" not in header:
        image.update(measures)
        image.ImageOrientationPatient = orientation
        image.ImagePositionPatient = header.ImagePositionPatient
        return image
    image.NumberOfFrames = header.NumberOfFrames
    plane = Dataset()
    plane.ImageOrientationPatient = orientation
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    image.SharedFunctionalGroupsSequence, image.PerFrameFunctionalGroupsSequence = [shared], []
    for frame in range(int(header.NumberOfFrames)):
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = frame_value(header, frame, "PlanePositionSequence", "ImagePositionPatient")
        group.PlanePositionSequence = [position]
        image.PerFrameFunctionalGroupsSequence.append(group)
    return image


def _patient(header: Dataset) -> Dataset:
    """A data set whose patient and study modules highdicom copies, whatever the source's class."""
    header.SOPClassUID = CTImageStorage
    for keyword in TYPE_2:
        if keyword not in header:
            setattr(header, keyword, "")
    if header.get("PatientIdentityRemoved") == "YES" and not (
            header.get("DeidentificationMethod") or header.get("DeidentificationMethodCodeSequence")):
        header.DeidentificationMethod = "Not stated by the source"           # an empty one makes invalid objects
    return header
