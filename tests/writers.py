"""Scans in the formats that ct.read reads, written by tests to temporary folders."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian


def write_slice_folder(folder, hu, window=(-20, 100), slice_spacing_mm=5.0, pixel_spacing_mm=None,
                       order="inferior-to-superior", suffix=".png", bits=8, scan_json=True) -> Path:
    """Grey pictures of hu [S, H, W] (inferior to superior) through one window, with a scan.json; gives the folder."""
    folder, (low, high), full = Path(folder), window, 2**bits - 1
    folder.mkdir(parents=True, exist_ok=True)
    levels = np.round((np.clip(hu, low, high) - low) / (high - low) * full).astype(np.uint8 if bits == 8 else np.uint16)
    for k, image in enumerate(levels if order == "inferior-to-superior" else levels[::-1]):
        Image.fromarray(image).save(folder / f"{k}{suffix}")
    if scan_json:
        write_scan_json(folder, [list(window)], slice_spacing_mm, pixel_spacing_mm, order)
    return folder


def write_rgb_folder(folder, hu, windows=((5, 55), (0, 80), (-20, 180)), scan_json=True, slice_spacing_mm=5.0,
                     pixel_spacing_mm=None, order="inferior-to-superior") -> Path:
    """RGB pictures of hu [S, H, W] (inferior to superior), one channel a window."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    channels = [np.round((np.clip(hu, low, high) - low) / (high - low) * 255) for low, high in windows]
    rgb = np.stack(channels, axis=-1).astype(np.uint8)
    for k, image in enumerate(rgb if order == "inferior-to-superior" else rgb[::-1]):
        Image.fromarray(image).save(folder / f"{k}.png")
    if scan_json:
        write_scan_json(folder, [list(w) for w in windows], slice_spacing_mm, pixel_spacing_mm, order)
    return folder


def write_scan_json(folder, windows_hu, slice_spacing_mm=5.0, pixel_spacing_mm=None, order="inferior-to-superior"):
    Path(folder, "scan.json").write_text(json.dumps({
        "windows_hu": windows_hu, "slice_spacing_mm": slice_spacing_mm, "pixel_spacing_mm": pixel_spacing_mm,
        "order": order}))


# What an attribute of every DICOM file says of a patient, a stay or a person: none of it may turn up in an output.
PATIENT = {
    "PatientName": "Secret^Name", "PatientID": "SECRET-ID", "PatientBirthDate": "19010203",
    "PatientAddress": "1 Secret Street", "PatientTelephoneNumbers": "SECRET-PHONE", "PatientComments": "Secret comment",
    "OtherPatientIDs": "SECRET-OTHER-ID", "AccessionNumber": "SECRET-NUMBER", "StudyID": "SECRET-STUDY",
    "StudyDate": "19990101", "StudyDescription": "Secret study", "SeriesDescription": "Secret series",
    "ProtocolName": "Secret protocol", "ImageComments": "Secret image", "InstitutionName": "Secret Hospital",
    "ReferringPhysicianName": "Secret^Referrer", "PerformingPhysicianName": "Secret^Performer",
    "OperatorsName": "Secret^Operator", "StationName": "SECRETSTATION", "DeviceSerialNumber": "SECRET-SERIAL",
    "RequestedProcedureDescription": "Secret question", "AdmissionID": "SECRET-STAY",
}
PATIENT_MARKERS = (b"secret", b"19010203", b"19990101")             # in lower case; one of them is in each of these


def make_uid(*words) -> str:
    """A DICOM UID that is the same for the same words."""
    return f"2.25.{int(hashlib.sha256(repr(words).encode()).hexdigest()[:24], 16)}"


def write_dicom_series(folder, hu, spacing_mm=(5.0, 1.0, 1.0), position_mm=None, tilt_deg=0.0, flip_rows=False,
                       flip_columns=False, transpose=False, name=lambda k: f"{k:03d}.dcm", slope=1, intercept=-1024,
                       series="series", study="study", origin_lps=(-40.0, -60.0, 10.0),
                       edit: Callable[[pydicom.Dataset, int], None] | None = None) -> Path:
    """One file a slice of hu [S, H, W] (inferior to superior, radiological display); gives the folder.

    position_mm: along the slice normal, overrides spacing_mm[0]. With tilt_deg the table still moves along z, as a
    scanner's does, so that the slices are sheared. flip_rows, flip_columns and transpose (after these) store the same
    picture in another orientation. edit(ds, k) changes slice k's data set before it is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    position_mm = np.arange(len(hu)) * spacing_mm[0] if position_mm is None else np.asarray(position_mm)
    tilt = np.deg2rad(tilt_deg)
    for k, image in enumerate(hu):
        row, column = np.array([0, np.cos(tilt), -np.sin(tilt)]), np.array([1.0, 0, 0])
        steps = list(spacing_mm[1:])
        origin = np.array(origin_lps) + np.array([0, 0, position_mm[k] / np.cos(tilt)])
        if flip_rows:
            origin, row, image = origin + (image.shape[0] - 1) * steps[0] * row, -row, image[::-1]
        if flip_columns:
            origin, column, image = origin + (image.shape[1] - 1) * steps[1] * column, -column, image[:, ::-1]
        if transpose:
            row, column, image, steps = column, row, image.T, steps[::-1]
        ds = _ct_dataset(make_uid(study), make_uid(series), make_uid(series, k), CTImageStorage)
        ds.InstanceNumber = k + 1
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.ImagePositionPatient = [f"{v:.9g}" for v in origin]
        ds.ImageOrientationPatient = [f"{v:.9g}" for v in (*column, *row)]
        ds.PixelSpacing = steps
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        _set_pixels(ds, np.round((image - intercept) / slope).astype(np.int16))
        if edit is not None:
            edit(ds, k)
        ds.save_as(folder / name(k), enforce_file_format=True)
    return folder


def write_enhanced_ct(path, hu, spacing_mm=(5.0, 1.0, 1.0), order=None) -> Path:
    """One multi-frame file of hu [S, H, W]; frame i holds slice order[i]. Slope and intercept differ by frame."""
    order = list(range(len(hu))) if order is None else list(order)
    ds = _ct_dataset(make_uid("study"), make_uid("enhanced"), make_uid("enhanced", 0), EnhancedCTImageStorage)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared = pydicom.Dataset()
    shared.PixelMeasuresSequence = [_item(PixelSpacing=list(spacing_mm[1:]), SliceThickness=spacing_mm[0])]
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames, stored = [], []
    for k in order:
        slope, intercept = 1 + k % 2, -1024 - k
        frame = pydicom.Dataset()
        frame.PlanePositionSequence = [_item(ImagePositionPatient=[-40, -60, 10 + k * spacing_mm[0]])]
        frame.PixelValueTransformationSequence = [
            _item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")]
        frames.append(frame)
        stored.append(np.round((hu[k] - intercept) / slope))
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.NumberOfFrames = len(frames)
    _set_pixels(ds, np.stack(stored).astype(np.int16))
    ds.save_as(path, enforce_file_format=True)
    return Path(path)


def _item(**values) -> pydicom.Dataset:
    ds = pydicom.Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def _ct_dataset(study_uid: str, series_uid: str, instance_uid: str, sop_class: str) -> pydicom.Dataset:
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop_class
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = instance_uid
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, series_uid
    ds.FrameOfReferenceUID = make_uid("frame", study_uid)
    ds.Modality = "CT"
    for keyword, value in PATIENT.items():
        setattr(ds, keyword, value)
    return ds


def _set_pixels(ds: pydicom.Dataset, stored: np.ndarray) -> None:
    """Stored values [(frames,) H, W], int16 or uint16."""
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(stored.dtype == np.int16)
    ds.PixelData = np.ascontiguousarray(stored).tobytes()


def write_nifti_scan(path, hu, spacing_mm=(5.0, 1.0, 1.0), axes="LPS", affine=None) -> Path:
    """hu [S, H, W] (inferior to superior, radiological display) in a NIfTI of any axis order, 'RAS', 'PSR', ...

    The letters tell where the file's three axes point to. affine: of the array in axes 'LPS' (columns, rows, slices),
    in RAS mm; upright by default.
    """
    if affine is None:
        affine = np.diag([-spacing_mm[2], -spacing_mm[1], spacing_mm[0], 1.0])
        affine[:3, 3] = (40, 60, 10)
    image = nib.Nifti1Image(np.asarray(hu, np.float32).transpose(2, 1, 0), affine)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"),
                                           nib.orientations.axcodes2ornt(tuple(axes)))
    nib.save(image.as_reoriented(turn), path)
    return Path(path)


def complete(ds, k):
    """What a scanner writes besides the pixels: `edit` of write_dicom_series()."""
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = make_uid("frame of reference"), ""
    ds.PatientBirthDate, ds.PatientSex, ds.AccessionNumber, ds.StudyID = "", "", "", "1"
    ds.StudyDate, ds.StudyTime, ds.ReferringPhysicianName = "20240506", "070000", ""
    ds.SliceThickness = 5


def edited(**values):
    """For write_dicom_series(edit=): these attributes in every file, and SOP instance UIDs of their own."""
    def change(ds, k):
        for keyword, value in values.items():
            setattr(ds, keyword, value)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = make_uid(str(values), ds.SOPInstanceUID)
    return change


def second_stack(folder, hu, offset_mm=0.0, **values):
    """A further stack of the same series and study, beside the first."""
    write_dicom_series(folder, hu, position_mm=np.arange(len(hu)) * 5.0 + offset_mm, name=lambda k: f"second{k}",
                       edit=edited(**values))


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """[H, W, C] as a PNG; Pillow writes none of 16 bits but grey."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)
