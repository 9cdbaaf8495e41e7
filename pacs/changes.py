"""Orthanc's change log, followed: which CT series are to be projected."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from pacs.orthanc import ID, Change, Orthanc, OrthancAway, OrthancRefused, raise_if_general
from pacs.state import WAITING, State, digest, timestamp

PAGE = 100                                            # changes asked for at a time
REMEMBERED = 50_000                                   # instances of series that are no CT, 8 MB
RETRY_S = (60.0, 3600.0)                              # first and longest pause before what is not served is asked again


class ChangeLog:
    """Follows the log of one Orthanc server and writes new stable CT series down as waiting.

    queue      series that may wait; while so many do, the log is not read
    from_now   with a new state, skip what the log holds already
    stopping   once it is set, Orthanc is asked nothing more
    announced  called with the id of each series that is written down
    """

    def __init__(self, orthanc: Orthanc, state: State, queue: int, from_now: bool, stopping: threading.Event,
                 announced: Callable[[str], None]):
        self.orthanc, self.state, self.queue, self.from_now = orthanc, state, queue, from_now
        self._stopping, self._announced = stopping, announced
        self._no_ct: set[str] = set()                 # instances of series that are no CT, not to be asked after each
        self._unserved: dict[str, tuple[float, float]] = {}     # what arrives, but is not served: not before, pause

    def follow(self) -> bool:
        """Write down the new stable CT series of one page of the log, as far as the queue has room.

        Returns whether there is more, for the next step: an archive's log is long, and between its pages series are
        done and the node can be stopped. A series that Orthanc does not serve ends the step, too: time-outs take long.
        """
        near = self._find_place() <= PAGE             # only then: what arrives is asked after one by one
        room = self.room()
        if room <= 0:
            return True
        settled = self._settled() if near else set()  # before the log is read: what it says of them comes first
        changes, last, all_read = self.orthanc.changes(self.state.sequence, PAGE)
        self.state.date = max([self.state.date, *(change.date for change in changes)])
        self._arrive({change.id for change in changes if change.kind == "NewInstance"})
        for change in changes:
            if self._stopping.is_set():
                return True
            if change.kind == "StableSeries":
                if room == 0:
                    return True
                with self._retry_later(change.id):
                    room -= self.announce(change.sequence, change.id)
                    self.state.arriving.discard(change.id)
                self.state.advance(change.sequence)
                if change.id in self._unserved:
                    return True
        self.state.advance(max(last, self.state.sequence))
        if not all_read or not near:
            return True
        return self._announce_settled(settled)

    def room(self) -> int:
        """How many series may still be written down; those that are being tried again do not count."""
        return self.queue - sum("tries" not in self.state.rows[series_id] for series_id in self.state.waiting())

    def _find_place(self) -> int:
        """Set where to read on: where a new state begins, and at the beginning of a log that has started anew.

        Returns how many entries are left at most. A log has started anew where an entry up to our place is younger
        than all that we have read. A newest entry below our place shows nothing: entries go with what is deleted.
        """
        newest = self.orthanc.last_change()
        if self.state.sequence is None:
            place = newest.sequence if self.from_now and newest else 0
            self.state.date = self._youngest(place, newest)
            self.state.advance(place)
        elif self._youngest(self.state.sequence, newest) > self.state.date:
            print("Orthanc's change log starts anew: read from its beginning", flush=True)
            self.state.advance(0)
        return newest.sequence - self.state.sequence if newest else 0

    def _youngest(self, place: int, newest: Change | None) -> str:
        """The date of the youngest of the last PAGE entries up to a place; empty without any.

        The newest entry alone is not enough: another log may have grown beyond our place.
        """
        if not place or newest is None:
            return ""
        before = [newest, *self.orthanc.changes(max(place - PAGE, 0), PAGE)[0]]
        return max((change.date for change in before if change.sequence <= place), default="")

    def _arrive(self, instances: set[str]) -> None:
        """Note the CT series of new instances: after a restart Orthanc never announces those that were arriving.

        One request for each series: the answer names all of its instances. Where Orthanc does not serve one, the
        remaining instances are noted in place of their series: most are probably of the same.
        """
        instances = instances - self._no_ct
        while instances and not self._stopping.is_set():
            instance = instances.pop()
            with self._retry_later(instance):
                series = series_or_none(self.orthanc.series_of, instance)
                if series:
                    instances -= set(series["Instances"])
                self._note(instance, series)
            if instance in self._unserved:
                self.state.arriving |= instances
                return

    def _settled(self) -> set[str]:
        """The arriving series that are stable by now; those deleted, or not CT, are arriving no longer."""
        self._unserved = {known: when for known, when in self._unserved.items() if known in self.state.arriving}
        settled, now = set(), time.monotonic()
        for known in sorted(self.state.arriving):
            if self._stopping.is_set():
                break
            if known not in self.state.arriving or self._unserved.get(known, (now,))[0] > now:
                continue                              # of a series that has just been noted, or for later
            with self._retry_later(known):
                series = series_or_none(self.orthanc.series, known) or series_or_none(self.orthanc.series_of, known)
                self._note(known, series)
                if series and series["IsStable"]:
                    settled.add(series["ID"])
            if known in self._unserved:
                break
        return settled & self.state.arriving

    def _note(self, known: str, series: dict | None) -> None:
        """Note the series as arriving, if it is a CT, in place of `known`, its id or that of an instance."""
        self.state.arriving.discard(known)
        if series is None:
            return
        self.state.arriving -= set(series["Instances"])
        if _is_ct(series):
            self.state.arriving.add(series["ID"])
        else:
            if len(self._no_ct) >= REMEMBERED:
                self._no_ct.clear()
            self._no_ct.update(series["Instances"])

    def _announce_settled(self, settled: set[str]) -> bool:
        """Announce those that the log has not announced, as far as there is room; returns whether there are more."""
        for series_id in sorted(settled & self.state.arriving):
            if self.room() <= 0 or self._stopping.is_set():
                return True
            with self._retry_later(series_id):
                self.announce(self.state.sequence, series_id)
                self.state.arriving.discard(series_id)
            self.state.advance(self.state.sequence)
            if series_id in self._unserved:
                return True
        return False

    @contextlib.contextmanager
    def _retry_later(self, known: str) -> Iterator[None]:
        """Where the block fails for one series alone, keep `known` as arriving, to be tried again after a pause.

        known: the id of a series or of an instance. Raises as raise_if_general().
        """
        try:
            yield
        except (OrthancAway, OrthancRefused) as error:
            raise_if_general(self.orthanc, error)
            if known not in self._unserved:
                print(f"{known}: passed over, to be asked after again: {error}", flush=True)
            pause = min(2 * self._unserved.get(known, (0.0, RETRY_S[0] / 2))[1], RETRY_S[1])
            self._unserved[known] = time.monotonic() + pause, pause
            self.state.arriving.add(known)
        else:
            self._unserved.pop(known, None)

    def announce(self, sequence: int, series_id: str) -> bool:
        """Write a series down as waiting, if it is a CT series with other images than before; returns whether it is."""
        series = series_or_none(self.orthanc.series, series_id)
        if series is None or not _is_ct(series):
            return False
        self.state.arriving -= set(series["Instances"])
        study = answer_or_none(self.orthanc.study, series["ParentStudy"])
        if study is None:                             # deleted since
            return False
        earlier = self.state.rows.get(series_id, {})
        instances = sorted(series["Instances"])
        if earlier.get("digest") == digest(instances) and earlier.get("updated") == series["LastUpdate"]:
            return False                              # finished: neither new images nor others under the same UIDs
        self._announced(series_id)
        self.state.put(series_id, {
            "state": WAITING, "sequence": sequence, "instances": instances, "images": len(instances),
            "updated": series["LastUpdate"], "announced": timestamp(),
            "study": series["ParentStudy"], "study_uid": study["MainDicomTags"].get("StudyInstanceUID", ""),
            "series_uid": series["MainDicomTags"].get("SeriesInstanceUID", ""),
            "objects": earlier.get("objects", [])})
        return True


def series_or_none(ask: Callable[[str], dict], known: str) -> dict | None:
    """Orthanc's answer; None for what was deleted since, or has no id of Orthanc's."""
    series = answer_or_none(ask, known) if _is_id(known) else None
    return series if series is not None and _is_id(series["ID"]) else None


def answer_or_none(ask: Callable[[str], dict], known: str) -> dict | None:
    """Orthanc's answer; None where it has nothing of this id. Raises OrthancAway and OrthancRefused."""
    try:
        return ask(known)
    except OrthancRefused as error:
        if error.status == 404:
            return None
        raise


def _is_ct(series: dict) -> bool:
    """Our own results are of other modalities."""
    return series["MainDicomTags"].get("Modality") == "CT"


def _is_id(text: str) -> bool:
    """Whether it has the form of Orthanc's ids, which become file names; prints a line where not."""
    if ID.fullmatch(text):
        return True
    print(f"passed over: {text[:50]!r} is no id of Orthanc's", flush=True)
    return False
