"""A scan's results as DICOM objects: a structured report, a segmentation, a map, key objects and pictures.

write_dicom writes them for one scan, in new series of the source's study. Each module here makes one kind of object
with one function, build(case); common.py holds what they share. docs/DICOM.md says where each datum lies.

Everything here is research and unverified, and every object says so where it has a place for it.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import pydicom

from common.files import full_disk_named
from common.version import VERSION
from ct.derived import DerivedError
from ct.dicom_pixels import quote_no_headers
from detect.dicom_out import key_objects, parametric_map, secondary_capture, seg, sr
from detect.dicom_out.common import Identity, Result, open_case
from detect.scores import KEY_SLICES

__all__ = ["Identity", "Result", "build_objects", "dicom_writer", "identity_of", "notes_of", "write_dicom"]

NAMES = ("sr", "seg", "map", "key-objects", *(f"picture-{number + 1}" for number in range(KEY_SLICES)))
BURNED_IN = "the source says that its pixels hold burned-in text (BurnedInAnnotation); pictures and overlays show them"


def build_objects(result: Result, identity: Identity, *, phi: bool = True,
                  made: datetime | None = None) -> dict[str, pydicom.Dataset]:
    """The objects of a projected scan by file name: sr, seg (only where something is marked), map, key-objects,
    picture-N.

    result  its scan was read from DICOM: scan.geometry names the files of its slices, whose headers are read again
    phi     whether patient and study modules are copied from the source; without, nothing of them is, and the objects
            join the study by its Study Instance UID alone
    made    content date and time, local where it has no offset from UTC; now by default

    UIDs depend on the source's instances, the identity, the result's threshold and phi alone. Raises DerivedError.
    """
    case = open_case(result, identity, phi, made or datetime.now())
    objects = {}
    segmentation = seg.build(case) if result.mask.any() else None
    if segmentation is not None:
        objects["seg"] = segmentation
    objects["map"] = parametric_map.build(case)
    pictures = [secondary_capture.build(case, number) for number in range(len(case.key_slices))]
    objects |= {f"picture-{number + 1}": picture for number, picture in enumerate(pictures)}
    objects["sr"] = sr.build(case, segmentation)
    objects["key-objects"] = key_objects.build(case, list(objects.values()))
    return objects


def write_dicom(folder: Path, result: Result, identity: Identity, *, phi: bool = True,
                made: datetime | None = None) -> list[Path]:
    """Write build_objects(...) to a folder as NAME.dcm, in place of what an earlier call left there; the paths.

    Other files of the folder stay. Raises DerivedError, also where a file of the source has one of these NAMES there.
    """
    quote_no_headers()
    objects = build_objects(result, identity, phi=phi, made=made)
    folder = Path(folder)
    own = [folder / f"{name}.dcm" for name in NAMES]
    source = {path.resolve() for path, _ in result.scan.geometry.frames}
    if taken := [path for path in own if path.resolve() in source]:
        raise DerivedError(f"{taken[0].name}: an image of the source has the place of a result; give another folder "
                           "for the results")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in own:
        stale.unlink(missing_ok=True)
    paths = [folder / f"{name}.dcm" for name in objects]
    for path, ds in zip(paths, objects.values()):
        with full_disk_named(path):
            ds.save_as(path, enforce_file_format=True)
    return paths


def notes_of(paths: Iterable[Path]) -> list[str]:
    """For a scan's row: what whoever passes on its results should know of the objects that write_dicom wrote."""
    said = (pydicom.dcmread(path, stop_before_pixels=True).get("BurnedInAnnotation") for path in paths)
    return [BURNED_IN] if "YES" in said else []


def identity_of(projector) -> Identity:
    """What a detect.Projector makes results with: its bundle's name and weights, its settings, this version."""
    bundle = projector.bundle
    name = (bundle.meta["provenance"] or {}).get("name") or ""
    settings = json.dumps(projector.key(), sort_keys=True, separators=(",", ":"))
    return Identity(name, VERSION, bundle.weights_hash, settings, bundle.measure.in_hu)


def dicom_writer(projector, phi: bool = True) -> Callable[[Path, Result], list[str]]:
    """A writer for detect.outputs: FOLDER/dicom/*.dcm of a projection, where its scan was read from DICOM.

    A scan whose files do not allow it keeps its other results, with a note.
    """
    identity = identity_of(projector)

    def write(folder: Path, result: Result) -> list[str]:
        if result.scan.source != "dicom":
            return []
        try:
            return notes_of(write_dicom(folder / "dicom", result, identity, phi=phi))
        except DerivedError as error:
            return [f"no DICOM objects: {error}"]
        except OSError:
            raise
        except Exception as error:                    # odd headers fail anywhere in pydicom; its message may quote them
            traceback.print_tb(error.__traceback__)
            return [f"no DICOM objects: the source's header cannot be used ({type(error).__name__})"]

    return write
