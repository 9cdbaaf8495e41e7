"""A folder of scans projected into a folder of results, which is the queue: no run waits for another, or talks to it.

    OUT/SCAN/             a scan's results, written elsewhere and moved here whole; its result.json tells what with
    OUT/scans/ab/SCAN/    with --part, for very many scans: 256 folders by hash of the name. A scan that has results
                          keeps its place, whichever way the next run goes
    OUT/.work/            claims on scans (detect.claims), and what is being written
    OUT/.parts/           what each run, or part of one, set out to do: so that a merge misses what never began

A scan is finished when its result.json holds the key of the projector, the fingerprint of its files and the outputs
that are asked for. A failed scan has one, too, with the reason, and is tried again by the next run. Tables are made
from these files alone.
Another scan of the same name, as of a second folder, takes no result's place but with --overwrite: result.json tells by
hashes which scan it is of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

from common.files import (
    FullDiskError,
    full_disk_named,
    known_sha256,
    read_object,
    remove_abandoned,
    replace_text,
    replacing_folder,
    write_table,
)
from ct.frame import Preprocessed
from ct.read import RESERVED, ScanSource, open_scan
from ct.scan import Scan, ScanError, printable
from detect.claims import STALE_S, Claims
from detect.outputs import OUTPUTS, SCORE_COLUMNS, SLICE_COLUMNS, WRITTEN, Writer, scan_row, slice_rows
from detect.pipeline import overlapped
from detect.projection import Projection, Projector
from op import memory

WORK, BY_HASH, PARTS = ".work", "scans", ".parts"
NOTE = {"part": int, "of": int, "found": str, "scans": list}         # of a part, in PARTS
# With what is near the beginning of this program's own
TABLES = {"scores.csv": ",".join(SCORE_COLUMNS), "slices.csv": ",".join(SLICE_COLUMNS),
          "seconds.csv": "scan_id,seconds", "run.json": "", "report.html": "<title>Head-CT anomaly report</title>"}
NAMED = 5                        # parts and scans that are absent, the others are counted
LARGE_BYTES = 1 << 28            # of HU in float32, 256 slices of 512 x 512: such a scan is alone in memory, but for
                                 # the moment that it takes to see how large it is where the size of its files is small
HU_TO_FILES = 2                  # times their size a scan's HU take, of files of 16 bits a pixel, not compressed


@dataclass(frozen=True)
class Result:
    """What the tables need of a scan's result.json; its slices stay on the disk."""

    folder: Path
    scan: dict                   # its row of scores.csv
    seconds: dict[str, float]    # by stage
    key: dict

    @property
    def ok(self) -> bool:
        return self.scan["status"] != "failed"

    @property
    def written(self) -> tuple[int, int]:
        """Tells a result from the one that it has replaced, or that has replaced it."""
        found = (self.folder / "result.json").stat()
        return found.st_ino, found.st_mtime_ns

    @property
    def slices(self) -> list[dict]:
        found = read_result(self.folder)
        if found is None or found["scan"] != self.scan:
            raise ValueError(f"{self.folder}: another run has replaced its results while tables were made of them; "
                             "start this run again, or projector.py merge")
        return found["slices"]


def result_folder(out: Path, scan_id: str, by_hash: bool = False) -> Path:
    """Where a scan's results go. Raises ValueError for an id that would lead elsewhere, or is a table's name."""
    if Path(scan_id).name != scan_id or scan_id in ("", ".", "..", *RESERVED) or "\0" in scan_id:
        raise ValueError(f"a scan's id becomes the name of a folder; {scan_id!r} cannot: give the scan another id "
                         "(ct.read.find_scans does)")
    shard = hashlib.sha256(scan_id.encode("utf-8", "surrogateescape")).hexdigest()[:2]
    return out / BY_HASH / shard / scan_id if by_hash else out / scan_id


def find_result_folder(out: Path, scan_id: str, by_hash: bool = False) -> Path:
    """Where a scan's results are, whichever way they were made; where by_hash puts them if there are none.

    Raises ValueError where there are two, as earlier versions made with and without --part.
    """
    places = [result_folder(out, scan_id, way) for way in (by_hash, not by_hash)]
    found = [place for place in places if (place / "result.json").is_file()]
    if len(found) > 1:
        raise _twice(scan_id, *found)
    return (found or places)[0]


def _twice(scan_id: str, one: Path, other: Path) -> ValueError:
    return ValueError(f"{scan_id}: has two results, {one} and {other}; remove one of these folders (their result.json "
                      "tells what each was made with)")


def read_result(folder: Path) -> dict | None:
    """The result.json of a scan's folder; None where there is none, or it is not whole. ValueError naming one that
    another program has written.
    """
    path = folder / "result.json"
    try:
        found = read_object(path) if path.is_file() else None
    except (FileNotFoundError, ValueError):           # another run is replacing it; half of it is none
        return None
    if found is not None and not _is_result(found):
        raise ValueError(f"{path}: another program's, or changed: expected key, scan (scan_id, status, score, seconds),"
                         " slices and seconds, as projector.py writes them; move its folder away, or choose another "
                         "--out")
    return found


def _is_result(found: dict) -> bool:
    row = found.get("scan")
    kinds = {"key": dict, "scan": dict, "slices": list, "seconds": dict}
    if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        return False
    numbers = () if row.get("status") == "failed" else ("score", "seconds")
    return (all(isinstance(row.get(name), str) for name in ("scan_id", "status"))
            and all(isinstance(row.get(name), (int, float)) for name in numbers)
            and all(isinstance(one, dict) for one in found["slices"]))


def fingerprint(source: ScanSource) -> str:
    """Changes with the scan's files (names, sizes, times), scan.json included, and with how they are read."""
    facts = [(path.name, *_size_and_time(path)) for path in source.files]
    read_as = {k: v for k, v in source.options.items() if not isinstance(v, Path)}
    return hashlib.sha256(repr((source.kind, facts, read_as)).encode()).hexdigest()


def made_with(key: dict, source: ScanSource, writers: Iterable[str]) -> dict:
    """What a scan's result.json must say for its results to be those of this key, of its files as they are now, and
    of these outputs.
    """
    return {"key": key, "files": fingerprint(source), "outputs": sorted(writers)}


def is_made_with(made: dict, source: ScanSource, earlier: dict | None) -> bool:
    """Whether a result is what made_with() says, failed or not."""
    return bool(earlier) and made.items() <= earlier.items() and not is_another(source, earlier)


def origin(source: ScanSource) -> dict[str, str | None]:
    """Which scan it is, for result.json, in hashes alone: results hold no UIDs, and no folders' names.

    uid      of its series, wherever it lies; where it has none:
    place    of its files
    content  of its pictures, whatever a scan.json says of them; None where they cannot be read
    """
    uid = source.uid.partition("|")[0]
    return {"uid": _digest([uid])} if uid else {"place": _place(source), "content": _content(source)}


def is_another(source: ScanSource, earlier: dict) -> bool:
    """Whether earlier results of this id are of another scan: another series or, without UIDs, files that lie elsewhere
    and hold something else. Files that changed where they lie, and a folder that was moved, are the same scan.
    """
    known, uid = earlier.get("origin"), source.uid.partition("|")[0]
    if not known:
        return False
    if uid or "uid" in known:
        return known.get("uid") != _digest([uid])
    return known["place"] != _place(source) and known["content"] != (_content(source) or "unknown")


def _place(source: ScanSource) -> str:
    return _digest([os.path.commonpath([path.absolute() for path in source.files])])


def _content(source: ScanSource) -> str | None:
    files, inner = source.paths, []
    if source.archive:
        files, inner = [source.archive], [path.as_posix() for path in source.paths]
    try:
        return _digest([*map(known_sha256, files), *inner])
    except OSError:
        return None


def _hu_bytes(source: ScanSource) -> int:
    """What a scan's HU take in float32, by the size of its files; too little of compressed ones, 0 of an archive's."""
    if source.archive is not None:                     # of which it may be a small part
        return 0
    return HU_TO_FILES * sum(_size_and_time(path)[0] for path in source.paths)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:                         # since the search: read_scan will say so
        return 0, 0
    return found.st_size, found.st_mtime_ns


# ---------------------------------------------------------------------------------------------------------------
# Projecting

def project_all(projector: Projector, sources: list[ScanSource], out: Path, writers: Mapping[str, Writer] = OUTPUTS,
                by_hash: bool = False, numbers: Iterable[int] | None = None, overwrite: bool = False
                ) -> Iterator[None]:
    """Project scans that are not finished and that no other run has; yields after each.

    While the networks have a scan, the next one is read and the one before written (detect/pipeline.py). Those that
    another run has are tried again at the end, in case it has died. writers: what is written, by name; other ones,
    another result. numbers: which of the sources, all by default; the next is asked for when it can be read. Of scans
    that are too large to be two in memory, runs on this machine read one at a time. overwrite: results of other scans
    of the same ids may be replaced. Raises FullDiskError, and ValueError where a scan's results would take the place
    of anything else.
    """
    claims, key, folders = Claims(out / WORK), projector.key(), folders_of(sources)
    pending: Iterable[tuple[int, ScanSource]] = ((number, sources[number]) for number in (
        range(len(sources)) if numbers is None else numbers))
    waiting: list[tuple[int, ScanSource]] = []

    def say(number: int, source: ScanSource, outcome: str) -> None:      # in one piece: two threads say something
        print(f"{number + 1}/{len(sources)} {source.scan_id}: {outcome}\n", end="", flush=True)

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
                    _refuse_others(place(), folders)
                    if not overwrite:
                        _refuse_another(out, source, read_result(place()))
                    job = Job(projector, source, place(), out / WORK, made, writers, held)
                    job.read()
                    job.number, job.held = number, held.pop_all()
                    return job
        say(number, source, outcome)
        return None

    def write(job: Job) -> None:
        with job.held:
            outcome = job.write()
        say(job.number, job.source, outcome)

    @contextmanager
    def alone() -> Iterator[None]:
        memory.give_back()                           # where only reading has told how large the scan is
        with claims.one_here():
            yield
            memory.give_back()                       # a process would else go on holding as much

    for _ in range(2):
        yield from overlapped(pending, read, Job.project, write, drop=lambda job: job.held.close(),
                              is_large=Job.is_large, large=alone)
        pending, waiting = waiting, []


def project_one(projector: Projector, source: ScanSource, place: Path, work: Path, made: dict,
                writers: Mapping[str, Writer] = OUTPUTS) -> str:
    """Project one scan and replace its folder of results; returns what to say of it. Parameters: as of Job."""
    with ExitStack() as held:
        job = Job(projector, source, place, work, made, writers, held)
        job.read(alone=True)
        job.project()
        return job.write()


def stage(do: Callable[[Job], None]) -> Callable[[Job], None]:
    """A stage of Job: left out where one before has failed; an error is kept as the reason, FullDiskError is raised."""
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
                traceback.print_exc()
                job.reason = printable(f"{type(error).__name__}: {error}")
    return run


class Job:
    """A scan on its way through three stages, each of which may have a thread of its own: read, project, write.

    place  its folder of results, replaced at the end; work: where that is written
    made   what the result is made with, for result.json: key, files, outputs
    held   what is to be let go of at the end: the files of an archive, until results are written; a claim
    """

    def __init__(self, projector: Projector, source: ScanSource, place: Path, work: Path, made: dict,
                 writers: Mapping[str, Writer], held: ExitStack):
        self.projector, self.source, self.place, self.work = projector, source, place, work
        self.made, self.writers, self.held = made, writers, held
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.reason: str | None = None                       # why it has failed
        self.scan: Scan | None = None
        self.prepared: Preprocessed | None = None
        self.projection: Projection | None = None
        self.large = False

    def is_large(self) -> bool:
        """Whether two of its kind at a time would take too much memory. Then it is not read before project()."""
        return self.large

    @stage
    def read(self, alone: bool = False) -> None:
        """Not of a large scan, unless no other one is in memory: alone."""
        if not alone and _hu_bytes(self.source) > LARGE_BYTES:
            self.large = True
            return
        with self._timed("read"), ExitStack() as opened:
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
        """Replaces the folder of results; returns what to say of it."""
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
            found = {**self.made, "origin": origin(self.source), **rows}
            (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
        self.scan = self.prepared = self.projection = None       # now, and not when all threads have forgotten the job
        if self.reason is not None:
            return f"FAILED, {self.reason}"
        return f"score {scan['score']:.3f}, {scan['seconds']:.1f} s"

    @stage
    def _write_outputs(self, folder: Path) -> None:
        with self._timed("write"), full_disk_named(folder, 4 * self.scan.hu.nbytes):
            for write in self.writers.values():
                self.notes += write(folder, self.projection)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------------------
# Collecting

def collect(out: Path, sources: list[ScanSource], key: dict, writers: Iterable[str] = OUTPUTS
            ) -> tuple[list[Result], list[str]]:
    """Results of these scans, failed ones, too, and the ids of those that have none.

    What was made with another key, of files as they were earlier, or with other outputs than `writers`, is none.
    """
    results, missing = [], []
    for source in sources:
        folder = find_result_folder(out, source.scan_id)
        found = read_result(folder)
        if is_made_with(made_with(key, source, writers), source, found):
            results.append(_of(folder, found))
        else:
            missing.append(source.scan_id)
    return results, missing


def collect_all(out: Path) -> list[Result]:
    """Every result below a folder of results.

    Raises ValueError where they were made with different settings, or a scan has two.
    """
    folders = [*out.iterdir(), *(out / BY_HASH).glob("??/*")]
    results = [result for folder in folders if (result := _result(folder))]
    for result in results[1:]:
        if result.key != results[0].key:
            raise ValueError(f"{out}: {result.folder.name} was made with another model or calibration, other settings "
                             f"or another version of this program than {results[0].folder.name}; project it again "
                             "(--overwrite)")
    by_id: dict[str, Result] = {}
    for result in results:
        first = by_id.setdefault(result.scan["scan_id"], result)
        if first is not result:
            raise _twice(result.scan["scan_id"], first.folder, result.folder)
    return results


def _result(folder: Path) -> Result | None:
    found = read_result(folder)
    return found and _of(folder, found)


def _of(folder: Path, found: dict) -> Result:
    return Result(folder, found["scan"], found["seconds"], found["key"])


def write_tables(out: Path, results: list[Result]) -> None:
    """scores.csv: highest score first, then what is not to be trusted, then failed scans; slices.csv; seconds.csv,
    which alone differs each time.
    """
    by_id = sorted(results, key=lambda result: result.scan["scan_id"])
    ranked = sorted((r.scan for r in by_id if r.ok), key=lambda row: (row["status"] != "ok", -row["score"]))
    write_table(out / "scores.csv", SCORE_COLUMNS, [*ranked, *(r.scan for r in by_id if not r.ok)])
    write_table(out / "slices.csv", SLICE_COLUMNS, (row for result in by_id for row in result.slices))
    write_table(out / "seconds.csv", ("scan_id", "seconds"), [r.scan for r in by_id if r.ok])


def note_part(out: Path, inputs: Iterable[Path], found: list[ScanSource], number: int, count: int) -> None:
    """Leave word of what a run sets out to do, before it does: part `number` of `count` of what was found in `inputs`.

    A whole run is part 0 of 1.
    """
    where, ids = sorted(str(path.resolve()) for path in inputs), [source.scan_id for source in found]
    (out / PARTS).mkdir(exist_ok=True)
    note = {"part": number, "of": count, "found": _digest(ids), "scans": ids[number::count]}
    replace_text(out / PARTS / f"{_digest(where)[:16]}-{number}-of-{count}.json", json.dumps(note) + "\n")


def absent(out: Path, results: list[Result]) -> list[str]:
    """What runs set out to do and is not among the results, in words: parts that never began, scans without a result.

    For each set of inputs the last run counts, whole or in parts: it knew which scans there are. Of runs that
    left no word, as before there was any, nothing is missed. Raises ValueError for a note that cannot be read.
    """
    notes, mend = defaultdict(list), "remove it, and start the part that it is named after again"
    for path in sorted((out / PARTS).glob("*.json")):
        note = read_object(path, mend=mend)
        if not all(isinstance(note.get(name), kind) for name, kind in NOTE.items()):
            raise ValueError(f"{path}: expected {', '.join(NOTE)}, as projector.py writes them: {mend}")
        notes[path.name.partition("-")[0]].append((path.stat().st_mtime_ns, note))
    done, words = {result.scan["scan_id"] for result in results}, []
    for dated in notes.values():
        _, last = max(dated, key=lambda pair: pair[0])
        run = [note for _, note in dated if (note["of"], note["found"]) == (last["of"], last["found"])]
        if gone := sorted(set(range(last["of"])) - {note["part"] for note in run}):
            named = _some([f"{number}/{last['of']}" for number in gone])
            words.append(f"{len(gone)} of {last['of']} parts never began, or saw other scans than the last one: start "
                         f"them again, --part {named}")
        if left := [scan_id for note in run for scan_id in note["scans"] if scan_id not in done]:
            words.append(f"{len(left)} scans have no result: {_some(left)}; start their runs again")
    return words


def _digest(words: list[str]) -> str:
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def remove_leftovers(out: Path) -> None:
    """What runs that were killed had begun to write. Nothing while any run is at work."""
    work = out / WORK
    leftovers = [*work.glob("*.writing"), *work.glob("*.old")]
    if {path for path in work.iterdir() if not path.name.startswith(".")} == set(leftovers):
        for path in leftovers:
            with contextlib.suppress(FileNotFoundError):               # another run removes it, too
                if time.time() - path.stat().st_mtime > STALE_S:
                    shutil.rmtree(path, ignore_errors=True)
        remove_abandoned(out, ".*.writing", STALE_S)


# ---------------------------------------------------------------------------------------------------------------
# Before

def make_writable(out: Path) -> None:
    """Makes the folder. ValueError where nothing can be written there, before hours of work for it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error


def refuse_other_files(out: Path, sources: list[ScanSource], by_hash: bool) -> None:
    """ValueError if results or tables would replace anything but results or tables, such as the scans themselves."""
    refuse_other_tables(out)
    folders = folders_of(sources)
    for source in sources:
        _refuse_others(find_result_folder(out, source.scan_id, by_hash), folders)


def refuse_other_tables(out: Path) -> None:
    """ValueError if a file of another program lies where a table, the page or run.json is to go."""
    for path in (out / name for name in TABLES):
        if path.exists() and not _is_own_table(path):
            raise ValueError(f"{path}: would be replaced, and this version of this program has not made it; move it "
                             "away, or choose another --out")


def _is_own_table(path: Path) -> bool:
    """By what it begins with; run.json by its key, or by being damaged, which merge tells of."""
    if path.name != "run.json":
        with open(path, encoding="utf-8", errors="replace") as file:
            return TABLES[path.name] in file.read(1000)
    try:
        return "key" in read_object(path)
    except ValueError:
        return True


def folders_of(sources: Iterable[ScanSource]) -> set[tuple[int, int]]:
    """The folders that scans lie in, at any depth, by device and inode: known by any name, through links, too."""
    places = {path.parent for source in sources for path in source.files}
    real = {Path(os.path.realpath(place)) for place in places}
    found = set()
    for folder in {one for place in real for one in (place, *place.parents)}:
        with contextlib.suppress(OSError):
            found.add(_identity(folder))
    return found


def _refuse_others(place: Path, folders: set[tuple[int, int]]) -> None:
    """folders: those of scans, folders_of()."""
    if not os.path.lexists(place):
        return
    if not place.is_dir() or _identity(place) in folders or not (read_result(place) or _is_left_over(place)):
        raise ValueError(f"{place}: results would take the place of what is there, which this program has not made (is "
                         "it the scan itself?); choose another --out")

def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _is_left_over(place: Path) -> bool:
    """Whether a folder is empty, or of a result whose result.json is damaged and which holds nothing else."""
    names = set(os.listdir(place))
    return not names or ("result.json" in names and names <= WRITTEN)


def refuse_other_results(out: Path, sources: list[ScanSource], key: dict) -> None:
    """ValueError if a scan's results there are of another scan, another model, other settings or another version."""
    for source in sources:
        earlier = read_result(find_result_folder(out, source.scan_id))
        _refuse_another(out, source, earlier)
        if earlier and earlier["scan"]["status"] != "failed" and earlier["key"] != key:
            raise ValueError(f"--out {out}: holds results of {source.scan_id} made with another model or calibration, "
                             "other settings or another version of this program; choose another folder, or --overwrite")


def _refuse_another(out: Path, source: ScanSource, earlier: dict | None) -> None:
    if earlier and is_another(source, earlier):
        raise ValueError(f"--out {out}: {source.scan_id} is another scan than the one whose results lie there; choose "
                         "another --out, or --ids uid, which no two scans share, or --overwrite")
