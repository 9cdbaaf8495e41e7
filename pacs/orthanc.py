"""The part of Orthanc's REST interface that the node needs (Orthanc 1.10 or later), over the standard library."""

from __future__ import annotations

import base64
import hashlib
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pydicom


def orthanc_id(path: Path) -> str:
    """The id that Orthanc gives an instance's file: SHA-1 of what identifies it, in groups of eight."""
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    words = (str(ds.get(keyword) or "").strip() for keyword in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID",
                                                                "SOPInstanceUID"))
    digest = hashlib.sha1("|".join(words).encode(), usedforsecurity=False).hexdigest()
    return "-".join(digest[i:i + 8] for i in range(0, 40, 8))


class OrthancAway(Exception):
    """The server does not answer, or not as it should: worth trying again later."""


class OrthancRefused(Exception):
    """The server answered with an error that waiting does not mend; status is HTTP's."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Change:
    """One entry of the change log; id is Orthanc's own, a hash."""

    sequence: int
    kind: str                                    # such as StableSeries
    id: str


class Orthanc:
    """A server, by its base URL.

    timeout_s is of connecting and of every wait for data. Methods raise OrthancAway or OrthancRefused; messages name
    the path asked for, never the credentials.
    """

    def __init__(self, url: str, user: str | None = None, password: str | None = None, timeout_s: float = 30.0):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--orthanc {url}: expected a URL such as http://127.0.0.1:8042")
        if parts.username or parts.password:
            raise ValueError("--orthanc: leave user and password out of the URL; give them in the environment as "
                             "ORTHANC_USER and ORTHANC_PASSWORD")
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self._headers = {}
        if user is not None:
            token = base64.b64encode(f"{user}:{password or ''}".encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open     # a PACS is never behind one

    def system(self) -> dict:
        """Name, version and so on of the server."""
        return self._json("/system")

    def changes(self, since: int, limit: int) -> tuple[list[Change], int, bool]:
        """Entries of the change log after `since`; the last entry looked at; whether that is all for now."""
        page = self._json(f"/changes?since={since}&limit={limit}")
        changes = [Change(int(c["Seq"]), c["ChangeType"], c["ID"]) for c in page["Changes"]]
        return changes, int(page["Last"]), bool(page["Done"])

    def last_change(self) -> int:
        """Number of the newest entry of the change log; 0 for an empty one."""
        return int(self._json("/changes?last")["Last"])

    def series(self, series_id: str) -> dict:
        """MainDicomTags, Instances and ParentStudy of a series."""
        return self._json(f"/series/{series_id}")

    def study(self, study_id: str) -> dict:
        return self._json(f"/studies/{study_id}")

    def fetch(self, instance_id: str, path: Path) -> None:
        """An instance's file."""
        path.write_bytes(self._request(f"/instances/{instance_id}/file"))

    def store(self, path: Path) -> str:
        """Store a file; gives its Orthanc id. A file that is there already stays as it is."""
        return json.loads(self._request("/instances", path.read_bytes()))["ID"]

    def delete(self, instance_id: str) -> None:
        """Delete an instance; one that is gone already is no error."""
        try:
            self._request(f"/instances/{instance_id}", method="DELETE")
        except OrthancRefused as error:
            if error.status != 404:
                raise

    def _json(self, path: str) -> Any:
        try:
            return json.loads(self._request(path))
        except ValueError as error:
            raise OrthancAway(f"{self.url}{path}: the answer is no JSON; is this Orthanc?") from error

    def _request(self, path: str, body: bytes | None = None, method: str | None = None) -> bytes:
        headers = self._headers | ({"Content-Type": "application/dicom"} if body is not None else {})
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with self._open(request, timeout=self.timeout_s) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (401, 403):
                    raise OrthancRefused(f"{request.get_method()} {self.url}{path}: not allowed ({error.code}); set "
                                         "ORTHANC_USER and ORTHANC_PASSWORD to a user of the server who may read, "
                                         "store and delete", error.code) from error
                if error.code < 500 and error.code not in (408, 429):
                    raise OrthancRefused(f"{self.url}{path}: {error.code} {error.reason}", error.code) from error
                raise OrthancAway(f"{self.url}{path}: {error.code} {error.reason}") from error
        except (OSError, HTTPException) as error:                        # URLError and time-outs are OSErrors
            reason = getattr(error, "reason", None) or error
            raise OrthancAway(f"{self.url}{path}: {reason or type(error).__name__}") from error
