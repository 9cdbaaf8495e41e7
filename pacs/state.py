"""What the node keeps on disk, so that it may be killed at any moment.

    state.json           the last entry of Orthanc's change log that is dealt with, the series that had new images and
                         were not stable by then (an image, where Orthanc did not tell its series), the model in use,
                         and Orthanc's address
    series/ID.json       one per CT series, named after Orthanc's id: waiting, done, refused or failed
    work/                files of the series in work; emptied at every start

Each file is replaced in one move and flushed. A series is written down as waiting before the change that announced it
counts as dealt with, and as done after all its objects are stored: what is lost in between is done again, with the
same UIDs. No file but those in work/ holds patient data.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from common.files import replace_text

WAITING, DONE, REFUSED, FAILED = "waiting", "done", "refused", "failed"
SHORT = 16                                            # characters of a value that a message repeats; a hash has more
ROW = ("state", "sequence", "images", "announced", "study", "objects")           # what each row has


def digest(instances: list[str]) -> str:
    """SHA-256 of sorted instances: what a finished row keeps of them, since there may be hundreds."""
    return hashlib.sha256("\n".join(instances).encode()).hexdigest()


def timestamp() -> str:
    """Now, as rows hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Row(TypedDict, total=False):
    """A series, as its file and State.rows hold it. Those of ROW are always there."""

    state: str                   # WAITING, DONE, REFUSED or FAILED
    sequence: int                # of Orthanc's change log; orders what waits
    announced: str               # as all times here: timestamp()
    study: str                   # Orthanc's id of the series' study
    study_uid: str
    series_uid: str
    images: int
    instances: list[str]         # Orthanc's ids, sorted; of a waiting row
    digest: str                  # of these; of a finished row
    updated: str                 # Orthanc's LastUpdate of the series
    objects: list[str]           # SOP Instance UIDs of the results that are in Orthanc, or on their way
    tries: int                   # so far, of a waiting row whose last one failed,
    since: str                   # and when the first one did
    reason: str                  # why it is refused or has failed, or why the last try did
    finished: str
    seconds: float               # of the last try
    score: float                 # this and what follows: of a done row, as detect.Projection has them
    percentile: float | None     # %
    threshold: float | None
    flagged: bool | None
    unreliable: str | None
    anomalous_ml: float | None
    notes: list[str]             # also of a refused or failed row whose earlier results cannot be deleted


class StateError(ValueError):
    """A state folder that cannot be used. The message names --state, what was found and the mend."""


class State:
    """The folder's content, kept in memory too; one process at a time."""

    def __init__(self, folder: Path, model: dict):
        """model: what the results are made with, plain JSON. Raises StateError for another node's or model's folder."""
        self.folder = Path(folder)
        self._series = self.folder / "series"
        self.work = self.folder / "work"
        try:
            self._series.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")      # held as long as the process lives
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open(model)
        except BlockingIOError as error:
            raise StateError(f"--state {folder}: in use by another node; give each its own folder") from error
        except OSError as error:
            raise StateError(f"--state {folder}: cannot be used ({error.strerror}: {error.filename}); mend that, or "
                             "choose another") from error

    def _open(self, model: dict) -> None:
        known = {"sequence": None, "date": "", "arriving": [], "model": model, "orthanc": None}
        if (path := self.folder / "state.json").exists():
            known = self._read(path, known)
        if known["model"] != model:
            raise StateError(f"--state {self.folder}: its results are of a node that differs in "
                             f"{', '.join(_differences(known['model'], model))}; give a new folder, with --since now "
                             "where what is in the archive is not to be done again, or go back")
        self.sequence: int | None = known["sequence"]         # None before the log was ever looked at
        self.date: str = known["date"]                        # of the newest entry read, by Orthanc's clock; this
        self.arriving = set(known["arriving"])                # and these, Orthanc's ids, are written with `sequence`
        self.model = model
        self.orthanc: str | None = known["orthanc"]           # its address; None before it was ever asked
        self.rows: dict[str, Row] = {path.stem: _compact(self._read(path, ROW))
                                      for path in self._series.glob("*.json")}
        self.clear_work()
        self.advance(self.sequence)

    def waiting(self) -> list[str]:
        """Ids of the series that wait, in the order in which they were announced or, once tried, put back."""
        return sorted((id for id, row in self.rows.items() if row["state"] == WAITING),
                      key=lambda id: (self.rows[id]["sequence"], self.rows[id].get("tries", 0)))

    def put(self, series_id: str, row: Row) -> None:
        """Write a series' row to disk; a finished one keeps the digest of its instances alone."""
        row = _compact(row)
        replace_text(self._series / f"{series_id}.json", json.dumps(row))
        self.rows = self.rows | {series_id: row}              # a new dict: the server reads from another thread

    def advance(self, sequence: int | None) -> None:
        """Write down that changes up to `sequence` are dealt with, except the series that are arriving."""
        self.sequence = sequence
        replace_text(self.folder / "state.json", json.dumps(
            {"sequence": sequence, "date": self.date, "arriving": sorted(self.arriving), "model": self.model,
             "orthanc": self.orthanc}))

    def belong_to(self, url: str) -> None:
        """From now on the state is of the Orthanc at this address; without a series, another's place is forgotten."""
        if self.orthanc not in (None, url) and not self.rows:
            self.sequence, self.date, self.arriving = None, "", set()
        self.orthanc = url
        self.advance(self.sequence)

    def clear_work(self) -> Path:
        """An empty work folder. Raises OSError where it cannot be emptied."""
        if self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(mode=0o700)
        return self.work

    def close(self) -> None:
        self.clear_work()
        self._lock.close()

    def _read(self, path: Path, expected: Iterable[str]) -> dict:
        """A file's object, if it has the members expected."""
        found = None
        with contextlib.suppress(ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not set(expected) <= set(found):
            raise StateError(f"{path}: damaged; delete it, and the series it stands for is looked at again when "
                             "Orthanc announces it")
        return found


def _differences(there: object, here: object, name: str = "") -> list[str]:
    """Names of what differs between two models' keys, with both values where they are short, as versions are."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [found for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)
                for found in _differences(there.get(key), here.get(key), f"{name} {key}".strip())]
    short = max(len(str(there)), len(str(here))) <= SHORT
    return [f"{name or 'model'} ({there} there, {here} here)" if short else name or "model"]


def _compact(row: Row) -> Row:
    if row["state"] == WAITING or "instances" not in row:
        return row
    return {key: value for key, value in row.items() if key != "instances"} | {"digest": digest(row["instances"])}
