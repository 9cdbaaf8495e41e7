"""The node's one loop: follow the change log while there is room, then do the series that waits longest."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pydicom
import torch

from common.files import FullDiskError, full_disk_named
from ct.dicom_header import MACHINE_FAILED, is_of_machine
from ct.read import find_scans, read_scan
from ct.scan import Scan, ScanError
from detect.dicom_out import Identity, notes_of, write_dicom
from pacs.changes import RETRY_S, ChangeLog, answer_or_none, series_or_none
from pacs.orthanc import Orthanc, OrthancAway, OrthancRefused, raise_if_general
from pacs.state import DONE, FAILED, REFUSED, ROW, Row, State, StateError, timestamp

STAGES = ("fetch", "project", "write", "store")
QUEUE = 32                                            # series that may wait
POLL_S = 5.0                                          # between looks at the change log
BACKOFF_S = (1.0, 60.0)                               # first and longest pause while Orthanc is away or the disk full
TRIES = 5                                             # of a series that Orthanc does not serve while it is there
TRYING = ("tries", "since", "reason")                 # in the row of a series between its tries
DELETED = "deleted from Orthanc after its results were stored, which are taken back"
CHECKED, CHECK_S = 20, 3600.0                         # done series asked after at a step; seconds between rounds
RECOGNISED = 20                                       # series, those announced last, by which an Orthanc is known
UIDS = ("study_uid", "series_uid")                    # of a row, beside what each has
STILL_THERE = "its earlier results are still in the archive: it does not let them be deleted"
GPU_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
MACHINE_WORDS = ("allocate memory", "can't start new thread", "CUBLAS_STATUS", "cuDNN error")      # of a RuntimeError
STUCK_S = 1800.0                                      # no scan takes so long


def machine_failure(error: BaseException | None) -> str | None:
    """What failed, where that is memory, GPU, open files or a disk of the node's machine; None where it is the series.

    A reader's ScanError has the system's as its cause; of one that a search has met only the words are left.
    """
    if isinstance(error, ScanError):
        return str(error) if MACHINE_FAILED in str(error) else machine_failure(error.__cause__)
    words = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, GPU_ERRORS) or is_of_machine(error) or any(one in words for one in MACHINE_WORDS):
        return (f"{type(error).__name__}: memory, GPU, open files or a disk of the node have failed; where is in its "
                "log")
    return None


class Metrics:
    """Counts since the start, for /metrics."""

    def __init__(self):
        self.outcomes: Counter[str] = Counter({DONE: 0, REFUSED: 0, FAILED: 0})
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.runs: Counter[str] = Counter(dict.fromkeys(STAGES, 0))
        self.put_back = 0
        self.orthanc_up = self.changes_up = True
        self.disk_full = False

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds inside to a stage, if all went well."""
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started
        self.runs[stage] += 1

    def text(self, waiting: int) -> str:
        """Prometheus' text format, version 0.0.4."""
        seconds = {f'_sum{{stage="{stage}"}}': f"{self.seconds[stage]:.6f}" for stage in STAGES}
        runs = {f'_count{{stage="{stage}"}}': self.runs[stage] for stage in STAGES}
        lines = []
        for name, kind, meaning, values in (
                ("queue_length", "gauge", "CT series that wait or are in work.", {"": waiting}),
                ("orthanc_up", "gauge", "Whether Orthanc answered last.", {"": int(self.orthanc_up)}),
                ("changes_up", "gauge", "Whether Orthanc served its change log last.", {"": int(self.changes_up)}),
                ("disk_full", "gauge", "Whether the node waits for room on its disk.", {"": int(self.disk_full)}),
                ("scans_total", "counter", "CT series finished since the start.",
                 {f'{{outcome="{name}"}}': count for name, count in self.outcomes.items()}),
                ("put_back_total", "counter", "CT series put behind the others, to be tried again.",
                 {"": self.put_back}),
                ("stage_seconds", "summary", "Seconds spent on CT series by stage.", seconds | runs)):
            lines += [f"# HELP cn_stylegan_{name} {meaning}", f"# TYPE cn_stylegan_{name} {kind}"]
            lines += [f"cn_stylegan_{name}{label} {value}" for label, value in values.items()]
        return "\n".join(lines) + "\n"


class Node:
    """Follows one Orthanc server with one model, in one thread; others may read state, metrics and in_work.

    project   Scan -> detect.Projection; raises ScanError for a scan that it refuses
    identity  of the model, for the objects and their UIDs
    queue     series that may wait; while so many do, the change log is left alone
    from_now  with a state that is new, pass over what the change log holds already
    withdraw_deleted  delete the results of a done series that is deleted by itself, and replace those of a part
    """

    def __init__(self, orthanc: Orthanc, state: State, project: Callable[[Scan], object], identity: Identity, *,
                 queue: int = QUEUE, poll_s: float = POLL_S, from_now: bool = False, withdraw_deleted: bool = False):
        self.orthanc, self.state, self.project, self.identity = orthanc, state, project, identity
        self.poll_s, self.withdraw_deleted = poll_s, withdraw_deleted
        self.metrics = Metrics()
        self.stopping = threading.Event()
        self.in_work: str | None = None
        self._not_before: dict[str, float] = {}       # of series that have been tried, on the clock of time.monotonic
        self.log = ChangeLog(orthanc, state, queue, from_now, self.stopping,
                             lambda series_id: self._not_before.pop(series_id, None))
        self._log_again = 0.0, BACKOFF_S[0]           # when the log is asked for again, and the next pause before it
        self._unchecked: list[str] = []               # done series that are still to be asked after in this round
        self._next_round = 0.0                        # on the clock of time.monotonic
        self._no_room: set[str] = set()               # series that found the disk full when they were last tried
        self._ticked = time.monotonic()

    @property
    def stuck(self) -> bool:
        """Whether one step of the loop has taken longer than any scan does."""
        return time.monotonic() - self._ticked > STUCK_S

    def run(self) -> None:
        """Run until stopping is set. While Orthanc is away or the disk is full, it waits.

        Raises OrthancRefused, and StateError where the state is another Orthanc's.
        """
        pause = BACKOFF_S[0]
        while not self.stopping.is_set():
            self._ticked = time.monotonic()
            try:
                with full_disk_named(self.state.work):
                    busy = self.step()
            except (OrthancAway, FullDiskError) as error:
                away = isinstance(error, OrthancAway)
                self._note_health(not away, not away or bool(self._no_room), error)
                self.stopping.wait(pause)
                pause = min(2 * pause, BACKOFF_S[1])
                continue
            self._note_health(True, bool(self._no_room))
            pause = BACKOFF_S[0]
            if not busy:
                self.stopping.wait(self.poll_s)

    def _note_health(self, orthanc_up: bool, disk_full: bool, why: Exception | None = None) -> None:
        """Note what the node waits for, for the page and the metrics; print changes."""
        if orthanc_up != self.metrics.orthanc_up:
            print("Orthanc is back" if orthanc_up else f"Orthanc is away, trying again: {why}", flush=True)
        if disk_full != self.metrics.disk_full:
            print(f"trying again: {why}" if disk_full else "there is room on the disk again", flush=True)
        self.metrics.orthanc_up, self.metrics.disk_full = orthanc_up, disk_full

    def step(self) -> bool:
        """Read a page of the change log, and do one series; False where there is nothing more to do now."""
        if self.state.orthanc != self.orthanc.url:
            self._recognise()
        more = self._follow()
        if self.stopping.is_set():
            return False
        now = time.monotonic()
        due = [series_id for series_id in self.state.waiting() if self._not_before.get(series_id, now) <= now]
        if due:
            self.in_work = due[0]
            try:
                self.do(due[0])
            finally:
                self.in_work = None
        if self.withdraw_deleted:
            self.check_done()
        self.withdraw()
        return bool(due) or more and self.log.room() > 0         # with a full queue the log can wait

    def _follow(self) -> bool:
        """Follow the change log. Where Orthanc fails for that alone, say so and try later: what waits is still done.

        Raises as raise_if_general().
        """
        not_before, pause = self._log_again
        if time.monotonic() < not_before:
            return False
        try:
            more = self.log.follow()
        except (OrthancAway, OrthancRefused) as error:
            raise_if_general(self.orthanc, error)
            if self.metrics.changes_up:
                print(f"the change log cannot be read, trying again: {error}", flush=True)
            self.metrics.changes_up = False
            self._log_again = time.monotonic() + pause, min(2 * pause, BACKOFF_S[1])
            return False
        if not self.metrics.changes_up:
            print("the change log can be read again", flush=True)
        self.metrics.changes_up, self._log_again = True, (0.0, BACKOFF_S[0])
        return more

    def do(self, series_id: str) -> None:
        """Fetch, project and store one waiting series, and write down the outcome.

        Raises OrthancAway, FullDiskError, and OrthancRefused where the node lacks rights; the series then waits on.
        """
        row = self.state.rows[series_id]
        started = time.perf_counter()
        try:
            with full_disk_named(self.state.work):
                result = self._project(series_id, row)
        except FullDiskError:                         # there may be room for another, and later for this one
            self._not_before[series_id] = time.monotonic() + RETRY_S[0]
            self._no_room.add(series_id)
            raise
        except (OrthancAway, OrthancRefused) as error:
            raise_if_general(self.orthanc, error)     # for every series
            result = self._put_back(series_id, row, str(error))
        except Exception as error:                    # a series that breaks us must not stop the others
            failure = machine_failure(error)
            if failure or not isinstance(error, ScanError):
                traceback.print_tb(error.__traceback__)              # no message: a decoder's may quote patient data
            if failure:                               # it may fail every series, until somebody mends it
                result = self._put_back(series_id, row, failure)
            elif isinstance(error, ScanError):
                result = {"state": REFUSED, "reason": str(error)}
            else:
                result = {"state": FAILED, "reason": f"{type(error).__name__}; where it came from is in the node's log"}
        finally:
            with contextlib.suppress(OSError):        # of a machine that fails: before the next series, or at the end
                self.state.clear_work()
        if result is None:
            self._no_room.discard(series_id)
            return
        if self.stopping.is_set() and result["state"] != DONE:
            return                                    # the signal may have reached a decoder as well: at the next start
        result |= {"finished": timestamp(), "seconds": time.perf_counter() - started}
        row = {key: value for key, value in self.state.rows[series_id].items() if key not in TRYING}
        self.state.put(series_id, row | result)
        self.metrics.outcomes[result["state"]] += 1
        self._not_before.pop(series_id, None)
        self._no_room.discard(series_id)
        said = result.get("reason") or f"score {result['score']:.3f}"
        print(f"{series_id}: {result['state']}, {said}", flush=True)

    def _recognise(self) -> None:
        """Note Orthanc's address in the state. StateError where it was another, and none of the series is here."""
        rows = self.state.rows
        last = sorted(rows, key=lambda series_id: rows[series_id]["announced"])[-RECOGNISED:]
        if self.state.orthanc and last and all(answer_or_none(self.orthanc.series, one) is None for one in last):
            raise StateError(f"--state {self.state.folder}: is of the Orthanc at {self.state.orthanc}, and none of the "
                             f"{len(last)} series that came last is at {self.orthanc.url}; choose another folder")
        self.state.belong_to(self.orthanc.url)

    def check_done(self) -> None:
        """Withdraw the results of done series that were deleted since; do those again that lost some of their images.

        Orthanc's log holds no deletions, so some of the done series are asked after at each step, and all of them once
        in CHECK_S. Where the whole study is gone, the results went with it.
        """
        if not self._unchecked and time.monotonic() >= self._next_round:
            self._unchecked = [id for id, row in self.state.rows.items() if row["state"] == DONE and row["objects"]]
            self._next_round = time.monotonic() + CHECK_S
        for _ in range(min(CHECKED, len(self._unchecked))):
            series_id = self._unchecked.pop()
            row = self.state.rows[series_id]
            try:
                series = answer_or_none(self.orthanc.series, series_id)
                fewer = series is not None and len(series["Instances"]) < row["images"]
                if fewer and row["state"] == DONE and 0 < self.log.room():
                    self.log.announce(self.state.sequence, series_id)
                alone = series is None and answer_or_none(self.orthanc.study, row["study"]) is not None
            except (OrthancAway, OrthancRefused) as error:
                raise_if_general(self.orthanc, error)
                return                                # one time-out a step; that series again in the next round
            if alone and row["state"] == DONE:        # without its digest: the same images, sent again, are new
                known = {key: row[key] for key in (*ROW, *UIDS) if key in row}
                self.state.put(series_id, known | {"state": REFUSED, "reason": DELETED, "finished": timestamp()})
                print(f"{series_id}: {DELETED}", flush=True)

    def withdraw(self) -> None:
        """Delete the earlier results of refused and failed series.

        They are forgotten only when all are gone, so that the next step, or the next start, goes on where this one
        was interrupted.
        """
        for series_id, row in self.state.rows.items():
            if row["state"] not in (REFUSED, FAILED) or not row["objects"]:
                continue
            try:
                self._delete(row["objects"], row["study"])
            except (OrthancAway, OrthancRefused) as error:
                raise_if_general(self.orthanc, error)
                if row.get("notes") != [STILL_THERE]:
                    print(f"{series_id}: {STILL_THERE}; trying again: {error}", flush=True)
                    self.state.put(series_id, row | {"notes": [STILL_THERE]})
            else:
                self.state.put(series_id, row | {"objects": [], "notes": []})

    def _delete(self, uids: Iterable[str], study_id: str) -> None:
        for uid in uids:
            for instance in self.orthanc.find(uid, study_id):
                self.orthanc.delete(instance)

    def _put_back(self, series_id: str, row: Row, why: str) -> Row | None:
        """Put a series behind all that wait, to be tried again after a pause; after TRIES, return the result: failed.

        It fails only if another series was done meanwhile: otherwise Orthanc's storage may be failing every series,
        and a night's scans should survive that.
        """
        tries, since = row.get("tries", 0) + 1, row.get("since") or timestamp()
        if tries >= TRIES and any(other["state"] == DONE and other["finished"] >= since
                                  for other in self.state.rows.values()):
            return {"state": FAILED, "reason": f"given up after {tries} tries: {why}"}
        self.metrics.put_back += 1
        self._not_before[series_id] = time.monotonic() + min(RETRY_S[0] * 2 ** (tries - 1), RETRY_S[1])
        self.state.put(series_id, self.state.rows[series_id] | {
            "tries": tries, "since": since, "reason": f"try {tries} failed, another will follow: {why}",
            "sequence": max(self.state.rows[other]["sequence"] for other in self.state.waiting())})
        print(f"{series_id}: put behind the others, try {tries} failed: {why}", flush=True)
        return None

    def _fetch(self, series_id: str, row: Row) -> tuple[Path, Row]:
        """The folder with the series' files, and its row, updated where images were deleted meanwhile.

        Raises ScanError where the series was deleted.
        """
        while True:
            folder = self.state.clear_work() / series_id
            folder.mkdir()
            try:
                for instance in row["instances"]:
                    self.orthanc.fetch(instance, folder / f"{instance}.dcm")       # the name that a reason gives
                return folder, row
            except OrthancRefused as error:
                if error.status != 404:
                    raise
                series = series_or_none(self.orthanc.series, series_id)
                if series is None:
                    raise ScanError("deleted from Orthanc before it was read") from error
                instances = sorted(series["Instances"])
                if instances == row["instances"]:     # it is named, but its file is not there
                    raise OrthancAway(str(error)) from error
                row = row | {"instances": instances, "images": len(instances)}
                self.state.put(series_id, row)

    def _check_source(self, series_id: str, row: Row) -> None:
        """Raise ScanError where the series was deleted since it was fetched, OrthancAway where some images were."""
        series = series_or_none(self.orthanc.series, series_id)
        if series is None:
            raise ScanError("deleted from Orthanc before its results were stored")
        if gone := set(row["instances"]) - set(series["Instances"]):
            raise OrthancAway(f"{len(gone)} of its images were deleted while it was in work")

    def _store(self, path: Path, study_id: str) -> None:
        """Store a file. Raises ScanError where Orthanc files it under another study, and so another patient."""
        instance, filed_under = self.orthanc.store(path)
        if filed_under != study_id:
            self.orthanc.delete(instance)
            raise ScanError("Orthanc files its results under another patient or study; correct its PatientID")

    def _project(self, series_id: str, row: Row) -> Row:
        with self.metrics.timed("fetch"):
            folder, row = self._fetch(series_id, row)
        with self.metrics.timed("project"):
            sources = find_scans(folder)
            if errors := [source.error for source in sources if source.error is not None]:
                raise ScanError(errors[0])                          # beside the scan of its other images
            if len(sources) != 1:
                raise ScanError(f"{series_id}: {len(sources)} scans in one series; put each in a series of its own")
            result = self.project(read_scan(sources[0]))
        with self.metrics.timed("write"):
            paths = write_dicom(self.state.work / "results", result, self.identity)
            objects = [str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in paths]
            notes = list(dict.fromkeys([*result.notes, *notes_of(paths)]))
        with self.metrics.timed("store"):
            self._check_source(series_id, row)                      # or they would bring a deleted study back
            self._delete(row["objects"], row["study"])              # earlier ones: their UIDs may be the same
            self.state.put(series_id, row | {"objects": objects})   # before any is there
            for path in paths:                                      # in this order: the report and key objects last
                self._store(path, row["study"])
            self._check_source(series_id, row)                      # withdrawn, if it was deleted meanwhile
        return {"state": DONE, "score": float(result.score), "percentile": result.percentile,
                "flagged": None if result.flagged is None else bool(result.flagged), "threshold": result.threshold,
                "unreliable": result.unreliable, "anomalous_ml": result.anomalous_ml, "notes": notes,
                "objects": objects}
