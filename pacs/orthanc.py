"""The part of Orthanc's REST interface that the node needs (Orthanc 1.10 or later), over the standard library."""

from __future__ import annotations

import base64
import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{8}){4}")       # of a patient, study, series or instance: a hash
BASE = re.compile('[!"$->@-~]+')                       # of a URL's characters, ASCII without blanks, all but ? and #
STORED = ("Success", "AlreadyStored")
TIMEOUT_S = 30.0
FILTERED = "; let the server's ReceivedInstanceFilter take SR, SEG, KO and OT from this node"
TOO_LARGE = "; let the proxy before Orthanc take larger bodies (nginx: client_max_body_size)"
SERIES = {"ID": str, "MainDicomTags": dict, "Instances": list, "ParentStudy": str, "IsStable": bool,
          "LastUpdate": str}


class OrthancAway(Exception):
    """The server does not answer, or not as it should: worth trying again later."""


class OrthancRefused(Exception):
    """The server answered with an error that waiting does not mend; status is HTTP's."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status

    @property
    def for_all(self) -> bool:
        """Whether every request will fail until somebody changes the set-up: missing rights, another address."""
        return self.status in (401, 403) or 300 <= self.status < 400


def raise_if_general(orthanc: Orthanc, error: OrthancAway | OrthancRefused) -> None:
    """Raise where every request would fail: Orthanc is away, or refuses this user. Return where only this one did."""
    if isinstance(error, OrthancRefused) and error.for_all:
        raise error
    orthanc.system()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would make a GET of a POST, and send the credentials to whatever address is named."""

    def redirect_request(self, *_) -> None:
        return None


@dataclass(frozen=True)
class Change:
    """One entry of the change log; id is Orthanc's own, a hash."""

    sequence: int
    kind: str                                    # such as StableSeries
    id: str
    date: str                                    # of the server's clock: YYYYMMDDThhmmss

    @classmethod
    def of(cls, entry: Any, url: str) -> Change:
        entry = _checked(entry, {"Seq": int, "ChangeType": str, "ID": str, "Date": str}, url)
        return cls(entry["Seq"], entry["ChangeType"], entry["ID"], entry["Date"])


class Orthanc:
    """A server, by its base URL.

    timeout_s is of connecting and of every wait for data. Methods raise OrthancAway or OrthancRefused; messages name
    the path asked for, never the credentials.
    """

    def __init__(self, url: str, user: str | None = None, password: str | None = None, timeout_s: float = TIMEOUT_S):
        self.url, self.timeout_s = checked_url("--orthanc", url), timeout_s
        self._was_there = False                       # at this address
        self._headers = {}
        if user is not None:
            if ":" in user:
                raise ValueError("ORTHANC_USER: has a colon, which HTTP takes for the end of the name; choose another")
            token = base64.b64encode(f"{user}:{password or ''}".encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        no_proxy = urllib.request.ProxyHandler({})                                         # a PACS is never behind one
        self._open = urllib.request.build_opener(no_proxy, _NoRedirects).open

    def system(self) -> dict:
        """Name, version and so on of the server. Once it has been there, a 404 means that it is away."""
        try:
            return self._json("/system", {})
        except OrthancRefused as error:
            if error.status != 404 or not self._was_there:
                raise
            raise OrthancAway(str(error)) from error

    def changes(self, since: int, limit: int) -> tuple[list[Change], int, bool]:
        """Entries of the change log after `since`; the last entry looked at; whether that is all for now."""
        path = f"/changes?since={since}&limit={limit}"
        page = self._json(path, {"Changes": list, "Last": int, "Done": bool})
        return [Change.of(entry, self.url + path) for entry in page["Changes"]], page["Last"], page["Done"]

    def last_change(self) -> Change | None:
        """The newest entry of the change log; None for an empty one. Entries go with what they are of."""
        path = "/changes?last"
        entries = self._json(path, {"Changes": list})["Changes"]
        return Change.of(entries[-1], self.url + path) if entries else None

    def series(self, series_id: str) -> dict:
        """ID, MainDicomTags, Instances, ParentStudy, IsStable and LastUpdate, when its last image came, of a series."""
        return self._series(f"/series/{series_id}")

    def series_of(self, instance_id: str) -> dict:
        """As series(), of an instance."""
        return self._series(f"/instances/{instance_id}/series")

    def study(self, study_id: str) -> dict:
        return self._json(f"/studies/{study_id}", {"MainDicomTags": dict})

    def find(self, uid: str, study_id: str) -> list[str]:
        """Orthanc's ids of the instances with this SOP Instance UID in the study of this Orthanc id.

        Not computed here: the ids are hashes that include the PatientID as Orthanc decodes and trims it.
        """
        found = []
        for match in self._json("/tools/lookup", list, uid.encode()):
            match = _checked(match, {"ID": str, "Type": str}, f"{self.url}/tools/lookup")
            try:
                if match["Type"] == "Instance" and self._json(
                        f"/instances/{match['ID']}/study", {"ID": str})["ID"] == study_id:
                    found.append(match["ID"])
            except OrthancRefused as error:           # deleted in between
                if error.status != 404:
                    raise
        return found

    def fetch(self, instance_id: str, path: Path) -> None:
        """An instance's file."""
        path.write_bytes(self._request(f"/instances/{instance_id}/file"))

    def store(self, path: Path) -> tuple[str, str]:
        """Store a file; gives its Orthanc id and its study's. A file that is there already stays as it is.

        Raises OrthancAway where the server answers that it has not been stored: a filter's answer is no error to HTTP.
        """
        answer = self._json("/instances", {"ID": str, "ParentStudy": str, "Status": str}, path.read_bytes())
        if answer["Status"] not in STORED:
            raise OrthancAway(f"{self.url}/instances: {path.name} is not stored: {answer['Status']}"
                              + FILTERED * (answer["Status"] == "FilteredOut"))
        return answer["ID"], answer["ParentStudy"]

    def delete(self, instance_id: str) -> None:
        """Delete an instance; one that is gone already is no error."""
        try:
            self._request(f"/instances/{instance_id}", method="DELETE")
        except OrthancRefused as error:
            if error.status != 404:
                raise

    def _series(self, path: str) -> dict:
        series = self._json(path, SERIES)
        for instance in series["Instances"]:          # they become parts of addresses
            if not isinstance(instance, str) or not ID.fullmatch(instance):
                raise OrthancAway(f"{self.url}{path}: names an instance by what is no id; is this Orthanc?")
        return series

    def _json(self, path: str, expected: type | dict[str, type], body: bytes | None = None) -> Any:
        answer = self._request(path, body)
        try:
            answer = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise OrthancAway(f"{self.url}{path}: the answer is no JSON; is this Orthanc?") from error
        answer = _checked(answer, expected, self.url + path)
        self._was_there = True
        return answer

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
                if 300 <= error.code < 400:
                    raise OrthancRefused(f"{self.url}{path}: redirects to {_target(error, path)}; give --orthanc that "
                                         "address", error.code) from error
                if error.code == 404 and path != "/system" and self._was_there:
                    self.system()                     # a proxy's 404 before a server that is away deletes nothing
                if error.code < 500 and error.code not in (408, 429):
                    raise OrthancRefused(f"{self.url}{path}: {error.code} {error.reason}"
                                         + TOO_LARGE * (error.code == 413), error.code) from error
                raise OrthancAway(f"{self.url}{path}: {error.code} {error.reason}") from error
        except (OSError, HTTPException) as error:                        # URLError and time-outs are OSErrors
            reason = getattr(error, "reason", None) or error
            raise OrthancAway(f"{self.url}{path}: {reason or type(error).__name__}") from error


def checked_url(flag: str, url: str) -> str:
    """The base URL of an Orthanc that a flag gives, without a slash at its end. Raises ValueError, naming the flag."""
    expected = "expected a URL such as http://127.0.0.1:8042"
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:                       # not quoted: a user and password may be in it
        raise ValueError(f"{flag}: {expected}, with a host's name and a port from 1 to 65535 or none") from error
    if parts.username or parts.password:
        raise ValueError(f"{flag}: leave user and password out of the URL; give them in the environment as "
                         "ORTHANC_USER and ORTHANC_PASSWORD")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"{flag} {url}: {expected}")
    if not BASE.fullmatch(url):
        raise ValueError(f"{flag} {url!r}: {expected}, without ?, # and blanks, other characters %-encoded")
    return url.rstrip("/")


def _checked(answer: Any, expected: type | dict[str, type], url: str) -> Any:
    """The answer, if it is of this type, or an object with such members; else raises OrthancAway."""
    if isinstance(expected, dict):
        right = isinstance(answer, dict) and all(isinstance(answer.get(key), kind) for key, kind in expected.items())
    else:
        right = isinstance(answer, expected)
    if not right:
        raise OrthancAway(f"{url}: the answer is not as Orthanc's; is this Orthanc?")
    return answer


def _target(error: urllib.error.HTTPError, path: str) -> str:
    """Where a redirect of `path` leads, as a base URL; without its query, which may hold secrets."""
    target = urlsplit(urljoin(error.url, error.headers.get("Location", "")))
    return f"{target.scheme}://{target.netloc.rpartition('@')[2]}{target.path}".removesuffix(path.split("?")[0])
