"""Stand-ins for an Orthanc, and studies to send it, for the tests of the PACS node."""

from __future__ import annotations

import hashlib
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from pacs.node import Node
from pacs.orthanc import Change, OrthancAway, OrthancRefused
from pacs.state import State
from tests.pacs_process import IDENTITY, project
from tests.writers import complete, write_dicom_series

PATIENT_IDS = (b"ID 1", b" ID1", b"DEPT\\1234", b"ID1\xa0", b"ID1\r\n")          # what hospitals send; Latin-1


def dashed(text: str) -> str:
    """SHA-1 as Orthanc writes it."""
    digest = hashlib.sha1(text.encode()).hexdigest()
    return "-".join(digest[i:i + 8] for i in range(0, 40, 8))


def orthanc_id(path: Path) -> str:
    """The id that Orthanc 1.10 gives an instance's file."""
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    patient = ds.get_item("PatientID").value.decode("latin-1").rstrip(" \0")
    return dashed("|".join((patient, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID)))


S1, S2, S3, S4 = map(dashed, "1234")                                  # ids of series


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code == 401
    except OSError:
        return False
    return True


def wait_for(happens, seconds: float = 180.0):             # a loaded machine is slow, not broken
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := happens():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{happens} did not happen within {seconds} s")


def write_study(folder: Path, number: int, slices: int = 4, marked: int = 300, patient: bytes | None = None,
                **more) -> Path:
    hu = np.full((slices, 24, 24), -1000.0)
    hu[:, 1:23, 1:23], hu[:, 2:22, 2:22] = 1000, 30                   # air, skull, brain
    brain = hu[:, 2:22, 2:22].reshape(-1)
    brain[:marked] = 70
    hu[:, 2:22, 2:22] = brain.reshape(slices, 20, 20)

    def edit(ds, k):
        complete(ds, k)
        ds.PatientID, ds.PatientName = f"ID{number}", f"SECRET{number}"
        if patient is not None:
            ds.SpecificCharacterSet = "ISO_IR 100"
            value = patient + b" " * (len(patient) % 2)
            ds[0x00100020] = RawDataElement(Tag(0x00100020), "LO", len(value), value, 0, False, True)
    return write_dicom_series(folder / f"study{number}", hu, study=f"study{number}", series=f"series{number}",
                              edit=edit, **more)


class FakeOrthanc:
    """A change log, and series that are stable and CT unless named otherwise; each has one instance."""

    url, updated = "http://fake", "20260101T000000"

    def __init__(self, changes):
        self.log = changes

    def last_change(self):
        return self.log[-1] if self.log else None

    def changes(self, since, limit):
        page = [c for c in self.log if c.sequence > since][:limit]
        return page, page[-1].sequence if page else since, not page or page[-1] is self.log[-1]

    def series(self, series_id):
        if series_id == dashed("deleted"):
            raise OrthancRefused("gone", 404)
        return {"ID": series_id, "MainDicomTags": {"Modality": "SR" if series_id == dashed("report") else "CT"},
                "Instances": ["i"], "ParentStudy": "s", "IsStable": True, "LastUpdate": self.updated}

    def study(self, study_id):
        return {"MainDicomTags": {"StudyInstanceUID": "1.2"}}


def log_of(*ids, kind="StableSeries", first=1, date="20260101T000000"):
    return [Change(number, kind, series_id, date) for number, series_id in enumerate(ids, first)]


def fake_node(folder, changes, **more):
    return Node(FakeOrthanc(changes), State(folder, {"model": "stub"}), project, IDENTITY, **more)


class Archive(FakeOrthanc):
    """Also holds a study of each series of the log; `turned_down` may raise for a request: its verb and id."""

    def __init__(self, folder, *ids, slices=4, patient=None):
        super().__init__(log_of(*ids))
        self.patient = patient
        self.files = {id: sorted(write_study(folder, number, slices, patient=patient).iterdir())
                      for number, id in enumerate(ids)}
        self.fetched, self.stored = [], {}                            # stored: SOP Instance UIDs by Orthanc's ids
        self.unstable, self.parents = set(), {}                       # parents: studies by series, where not the one
        self.studies = {}                                             # studies by their UIDs, as above

    def turned_down(self, verb, what):
        pass

    def system(self):
        self.turned_down("system", None)
        return {"Name": "fake"}

    def series(self, series_id):
        if series_id not in self.files:
            raise OrthancRefused("gone", 404)
        instances = [f"{series_id}.{number}" for number in range(len(self.files[series_id]))]
        self.turned_down("series", series_id)
        return super().series(series_id) | {"Instances": instances, "IsStable": series_id not in self.unstable,
                                            "ParentStudy": self.parents.get(series_id, "s")}

    def study(self, study_id):
        self.turned_down("study", study_id)
        return super().study(study_id)

    def series_of(self, instance_id):
        """Instances have the ids of image_ids() in the log, so that they look like Orthanc's."""
        self.turned_down("series_of", instance_id)
        series_id = next(id for id in self.files if instance_id in self.image_ids(id))
        return self.series(series_id) | {"Instances": self.image_ids(series_id)}

    def image_ids(self, series_id):
        return [dashed(f"{series_id}/{number}") for number in range(len(self.files[series_id]))]

    def find(self, uid, study_id):
        self.turned_down("find", uid)
        return [id for id, stored in self.stored.items() if stored == uid and study_id == "s"]

    def fetch(self, instance_id, path):
        self.fetched.append(instance_id)
        self.turned_down("fetch", instance_id)
        series_id, number = instance_id.split(".")
        shutil.copy(self.files[series_id][int(number)], path)

    def store(self, path):
        self.turned_down("store", path.name)
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        self.stored[orthanc_id(path)] = ds.SOPInstanceUID
        return orthanc_id(path), self.studies.get(ds.StudyInstanceUID, "s")

    def uids(self):
        return set(self.stored.values())

    def delete(self, instance_id):
        self.turned_down("delete", instance_id)
        self.stored.pop(instance_id, None)


def at_once(scan):
    """The stub's projection, without its pause."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", lambda s: None)
        return project(scan)


def archive_node(folder, archive, run=at_once, **more):
    return Node(archive, State(folder / "state", {"model": "stub"}), run, IDENTITY, **more)


def states(node):
    return {id: row["state"] for id, row in node.state.rows.items()}


def one_answers_500(archive, which, verb="fetch"):
    def turned_down(asked, what):
        if asked == verb and what.startswith(which):
            raise OrthancAway(f"http://fake/{what}: 500 Internal Server Error")
    archive.turned_down = turned_down


def more_images(archive, folder, series_id):
    """Another image of the series, and Orthanc's word of it."""
    whole = sorted(write_study(folder / "more", 0, len(archive.files[series_id]) + 1,
                               patient=archive.patient).iterdir())
    archive.files[series_id] = whole
    archive.log = archive.log + log_of(series_id, first=len(archive.log) + 1)
