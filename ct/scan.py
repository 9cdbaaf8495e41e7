"""What passes between the readers and everybody else: a scan that was found, and a scan that was read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:                                     # it needs SciPy, which ct.decoder_process can do without
    from ct.geometry import Geometry

AIR_HU = -1024.0                # padding, and the floor: off the field of view scanners write -3024
RESULT_MARK = "CN-StyleGAN result"       # in the header of every map that is written, so that none is read as a scan
UID_SEPARATOR = "|"


def printable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 and characters that do not print become %XX."""
    return "".join(c if c.isprintable() else "".join(f"%{b:02X}" for b in c.encode("utf-8", "surrogateescape"))
                   for c in name)


class ScanError(ValueError):
    """A scan that cannot be handled. The message says what was expected, what was found and the mend.

    It names files by their name alone: folders may be named after patients, and the message is written to tables.
    Names that are no UTF-8 could not be written there, or said: they are made printable.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def joined_uid(series_uid: str, frame_of_reference: str, *more: str) -> str:
    """The uid of a Found of DICOM: of its series, its frame of reference, and what tells it from others of these."""
    return UID_SEPARATOR.join([series_uid, frame_of_reference, *more])


class _Identified:
    """What is known of a scan by its uid, joined_uid() of DICOM."""

    uid: str

    @property
    def series_uid(self) -> str:
        """Of DICOM the series UID; of other scans all of their uid."""
        return self.uid.partition(UID_SEPARATOR)[0]

    @property
    def frame_of_reference(self) -> str | None:
        """Of DICOM, empty where the files tell none; None of other scans."""
        _, *more = self.uid.split(UID_SEPARATOR)
        return more[0] if more else None


@dataclass(frozen=True)
class Found(_Identified):
    """A scan as a format found it, before it has an id.

    kind     the format's name
    paths    the files that make it up
    anchor   the file (without suffix) or folder that it is named after
    suffix   what follows the name where the anchor may hold several scans
    uid      what identifies it wherever it lies; empty where only its content does
    options  what its format's reader needs besides
    whose    hashes of what says whose scan it is: scans that share one are of one patient
    error    why it cannot be a scan as it is; None of one that can
    notes    what the search wants the user to know of it
    """

    kind: str
    paths: tuple[Path, ...]
    anchor: Path
    suffix: str = ""
    uid: str = field(default="", repr=False)         # what tells of a patient stays out of messages
    options: dict[str, Any] = field(default_factory=dict)
    whose: tuple[str, ...] = field(default=(), repr=False)
    error: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScanSource(_Identified):
    """A scan that was found but not read.

    scan_id  from folder and file names or a hash of the series UID (ct.read.find_scans); unique in one search
    kind     'dicom', 'nifti' or 'slices'
    paths    the files that make it up; within the archive where there is one
    options  what its format's reader needs besides
    archive  the zip file that holds the paths; None if they lie in a folder
    uid      what identifies it wherever it lies; empty where only its content does
    whose    of DICOM, hashes of what says whose scan it is: scans that share one are of one patient
    error    why it cannot be a scan as it is; None of one that can
    notes    what the search wants the user to know of it
    """

    scan_id: str
    kind: str
    paths: tuple[Path, ...]
    options: dict[str, Any] = field(default_factory=dict)
    archive: Path | None = None
    uid: str = field(default="", repr=False)         # what tells of a patient stays out of messages
    whose: tuple[str, ...] = field(default=(), repr=False)
    error: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files on disk that the scan is made of: when none of them changes, the scan does not."""
        if self.archive is not None:
            return (self.archive,)
        return (*self.paths, *(value for value in self.options.values() if isinstance(value, Path)))


@dataclass(frozen=True)
class Scan:
    """A head CT, inferior to superior, in radiological display: row 0 is anterior, column 0 the patient's right.

    hu               float32 [S, H, W], Hounsfield units
    position_mm      float64 [S], strictly increasing (towards the vertex), along the slice normal; uneven steps
                     are allowed
    pixel_spacing_mm (row, column) spacing in mm; None where the source does not tell
    saturation_hu    (low, high): values at or beyond were clipped by the source (8-bit pictures); infinite if not
    brain            bool [S, H, W], a brain mask that came with the scan; None if none did
    geometry         what ct.write needs to place a map in the input's own geometry; opaque to everybody else
    source           'dicom', 'nifti' or 'slices'
    notes            what the reader wants the user to know (left-out images, gaps, assumptions)
    """

    scan_id: str
    hu: np.ndarray
    position_mm: np.ndarray
    pixel_spacing_mm: tuple[float, float] | None = None
    saturation_hu: tuple[float, float] = (-np.inf, np.inf)
    brain: np.ndarray | None = None
    geometry: Geometry | None = None
    source: str = "slices"
    notes: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self):
        if self.hu.ndim != 3 or self.hu.dtype != np.float32:
            raise ScanError(f"{self.scan_id}: hu must be float32 [S, H, W], got {self.hu.dtype} {self.hu.shape}")
        if self.position_mm.shape != (self.hu.shape[0],):
            raise ScanError(f"{self.scan_id}: {self.hu.shape[0]} slices but {self.position_mm.shape} positions")
        if self.hu.shape[0] > 1 and not (np.diff(self.position_mm) > 0).all():
            raise ScanError(f"{self.scan_id}: slice positions must increase from inferior to superior")
        if self.brain is not None and self.brain.shape != self.hu.shape:
            raise ScanError(f"{self.scan_id}: brain mask {self.brain.shape} does not fit the scan {self.hu.shape}")

    @property
    def slice_spacing_mm(self) -> float:
        """Median distance between neighbouring slices, mm (5 for a single slice, the usual thickness)."""
        return float(np.median(np.diff(self.position_mm))) if len(self.position_mm) > 1 else 5.0

    def upended(self) -> Scan:
        """The same slices in reverse order, for a stack that came upside down; maps still go back to where it lay.

        position_mm is then the negative of what the source says, since it must rise towards the vertex.
        """
        return replace(self, hu=self.hu[::-1].copy(), position_mm=-self.position_mm[::-1],
                       brain=None if self.brain is None else self.brain[::-1].copy(),
                       geometry=None if self.geometry is None else self.geometry.upended())
