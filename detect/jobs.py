"""Scans on their way through three stages, read, project and write, into a folder of results, which is the queue.

No run waits for another, or talks to it: claims on scans (detect.claims), and what is being written, lie in OUT/.work.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import TextIO

import distributed
from common.files import FullDiskError, full_disk_named, replacing_folder
from ct.frame import Preprocessed
from ct.read import ScanSource, open_scan, without_names
from ct.scan import Scan, ScanError, printable
from detect.claims import Claims
from detect.outputs import OUTPUTS, Writer, scan_row, slice_rows
from detect.pipeline import overlapped
from detect.projection import Projection, Projector
from detect.result import (
    file_hashes,
    file_stats,
    find_result_folder,
    is_made_with,
    made_with,
    origin,
    read_result,
    refuse_foreign_folder,
    refuse_other_result,
    source_folders,
)
from op import memory

WORK = ".work"
LARGE_BYTES = 1 << 28            # of HU in float32, 256 slices of 512 x 512: a larger scan is alone in memory, except
                                 # while compressed files, which look smaller, are read to see how large it is
HU_TO_FILES = 2                  # bytes of HU per byte of files of 16 bits a pixel, not compressed


def say(words: str, file: TextIO | None = None) -> None:
    """print0() of a line, in one write, since two threads print: nobody who stops reading ends the run.

    Nor does a character that the stream's encoding lacks, as an id may have: it is written as an escape.
    """
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    distributed.print0(words.encode(encoding, "backslashreplace").decode(encoding) + "\n", end="", file=stream)


def project_all(projector: Projector, sources: list[ScanSource], out: Path, writers: Mapping[str, Writer] = OUTPUTS,
                by_hash: bool = False, numbers: Iterable[int] | None = None, overwrite: bool = False
                ) -> Iterator[None]:
    """Project the scans that are not finished and that no other run has; yields after each.

    While the networks have a scan, the next one is read and the previous one written (detect/pipeline.py). Scans that
    another run has are tried again at the end, in case it has died. Of scans too large to be two in memory, the runs
    on this machine read one at a time. Raises FullDiskError, and ValueError where results would replace those of other
    settings or scans, unless overwrite, or anything but results.

    writers    the outputs by name; a result with others is not finished
    by_hash    where scans without results put theirs (detect.result)
    numbers    which of the sources, in this order; each number is taken when the scan can be read. None: all
    """
    claims, key, folders = Claims(out / WORK), projector.key(), source_folders(sources)
    pending: Iterable[tuple[int, ScanSource]] = ((number, sources[number]) for number in (
        range(len(sources)) if numbers is None else numbers))
    waiting: list[tuple[int, ScanSource]] = []

    def tell(number: int, source: ScanSource, outcome: str) -> None:
        say(f"{number + 1}/{len(sources)} {source.scan_id}: {outcome}")

    def read(numbered: tuple[int, ScanSource]) -> Job | None:
        number, source = numbered
        made = made_with(key, source, writers)

        def place() -> Path:                         # another run may have given it one before we had the claim
            return find_result_folder(out, source.scan_id, by_hash)

        def is_finished() -> bool:
            earlier = read_result(place())
            return is_made_with(made, source, earlier) and earlier["scan"]["status"] != "failed"

        outcome = "finished before, skipped"
        if not is_finished():
            with ExitStack() as held:
                if not held.enter_context(claims.hold(source.scan_id)):
                    waiting.append(numbered)
                    outcome = "another run has it"
                elif not is_finished():              # another run may have finished it before we had the claim
                    refuse_foreign_folder(place(), folders)
                    if not overwrite:
                        refuse_other_result(out, source, read_result(place()), key)
                    job = Job(projector, source, place(), out / WORK, made, writers, held)
                    job.read()
                    job.number, job.held = number, held.pop_all()
                    return job
        tell(number, source, outcome)
        return None

    def write(job: Job) -> None:
        with job.held:
            outcome = job.write()
        tell(job.number, job.source, outcome)

    @contextmanager
    def alone() -> Iterator[None]:
        memory.give_back()                           # where only reading has told how large the scan is
        with claims.one_on_this_machine():
            yield
            memory.give_back()                       # a process would else go on holding as much

    for _ in range(2):
        yield from overlapped(pending, read, Job.project, write, drop=lambda job: job.held.close(),
                              is_large=Job.is_large, large=alone)
        pending, waiting = waiting, []


def stage(do: Callable[[Job], None]) -> Callable[[Job], None]:
    """A stage of Job: skipped after a failed one. Its errors become the job's reason, except FullDiskError."""
    @wraps(do)
    def run(job: Job, *args, **named) -> None:
        if job.reason is not None:
            return
        try:
            do(job, *args, **named)
        except FullDiskError:
            raise
        except Exception as error:       # a scan that breaks us must not cost the others their results
            job.reason = str(error)
            if not isinstance(error, ScanError):
                say(without_names(traceback.format_exc().rstrip(), job.source), sys.stderr)
                job.reason = printable(without_names(f"{type(error).__name__}: {error}", job.source))
    return run


class Job:
    """A scan on its way through three stages, each of which may have a thread of its own: read, project, write.

    place  its folder of results, replaced at the end; written in the folder `work` first
    made   made_with() the result, for result.json
    held   closed at the end: the unpacked files of an archive, and the claim
    """

    def __init__(self, projector: Projector, source: ScanSource, place: Path, work: Path, made: dict,
                 writers: Mapping[str, Writer], held: ExitStack):
        self.projector, self.source, self.place, self.work = projector, source, place, work
        self.made, self.writers, self.held = made, writers, held
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.hashes: dict[str, str | None] = {"state": None, "bytes": None}     # of its files just before reading
        self.reason: str | None = None                       # why it has failed
        self.scan: Scan | None = None
        self.prepared: Preprocessed | None = None
        self.projection: Projection | None = None
        self.large = False

    def is_large(self) -> bool:
        """Whether two such scans would take too much memory; if so, it is not read before project()."""
        return self.large

    @stage
    def read(self, alone: bool = False) -> None:
        """Read and prepare the scan; a large one only if alone, with no other in memory."""
        if not alone and _hu_bytes(self.source) > LARGE_BYTES:
            self.large = True
            return
        with self._timed("read"), ExitStack() as opened:
            self.hashes = file_hashes(self.source)
            scan = opened.enter_context(open_scan(self.source))
            if not alone and scan.hu.nbytes > LARGE_BYTES:       # compressed, or in an archive
                self.large = True
                return
            self.scan = scan
            self.held.push(opened.pop_all())
        with self._timed("standardise"):
            self.prepared = self.projector.prepare(self.scan)

    def project(self) -> None:
        if self.large:
            self.read(alone=True)
        self._project()

    @stage
    def _project(self) -> None:
        self.projection = self.projector(self.scan, self.prepared)
        self.seconds |= self.projection.seconds

    def write(self) -> str:
        """Replace the folder of results; returns the outcome in words."""
        with replacing_folder(self.place, self.work) as folder:
            self._write_outputs(folder)
            if self.reason is None:
                scan = scan_row(self.projection, sum(self.seconds.values()), self.notes)
                rows = {"scan": scan, "slices": slice_rows(self.projection), "seconds": self.seconds}
            else:
                shutil.rmtree(folder)
                folder.mkdir()
                scan = {"scan_id": self.source.scan_id, "status": "failed", "reason": self.reason}
                rows = {"scan": scan, "slices": [], "seconds": {}}
            found = {**self.made, **self.hashes, "origin": origin(self.source), **rows}
            (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
        self.scan = self.prepared = self.projection = None       # now, and not when all threads have forgotten the job
        if self.reason is not None:
            return f"FAILED, {self.reason}"
        return f"score {scan['score']:.3f}, {scan['seconds']:.1f} s"

    @stage
    def _write_outputs(self, folder: Path) -> None:
        with self._timed("write"), full_disk_named(folder, 4 * self.scan.hu.nbytes):
            for write in self.writers.values():
                self.notes += [without_names(note, self.source) for note in write(folder, self.projection)]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def _hu_bytes(source: ScanSource) -> int:
    """Estimate of a scan's HU in float32 from the size of its files; too low for compressed ones, 0 in an archive."""
    if source.archive is not None:                     # of which it may be a small part
        return 0
    return HU_TO_FILES * sum(file.st_size for file in file_stats(source) or ())
