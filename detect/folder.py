"""A folder of results and its tables, which are made from the scans' results alone.

    OUT/SCAN/             a scan's results (detect.result); with --part OUT/scans/ab/SCAN/
    OUT/.work/            claims on scans, and what is being written (detect.jobs)
    OUT/.parts/           what each run, or part of one, set out to do: so that a merge misses what never began
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from common.files import read_object, remove_abandoned, replace_text, write_table
from common.results import BY_HASH
from common.wording import some
from ct.read import ScanSource
from detect.claims import STALE_S
from detect.jobs import WORK
from detect.outputs import OUTPUTS, SCORE_COLUMNS, SLICE_COLUMNS
from detect.result import (
    Result,
    digest,
    find_result_folder,
    is_made_with,
    made_with,
    read_result,
    refuse_foreign_folder,
    refuse_other_result,
    source_folders,
    told_apart,
    two_results_error,
)

PARTS = ".parts"
NOTE = {"part": int, "of": int, "found": str, "scans": list}         # of a part, in PARTS
# With what is near the beginning of this program's own
TABLES = {"scores.csv": ",".join(SCORE_COLUMNS), "slices.csv": ",".join(SLICE_COLUMNS),
          "seconds.csv": "scan_id,seconds", "run.json": "", "report.html": "<title>Head-CT anomaly report</title>"}


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
    """Every result below a folder of results, also of files that have changed since.

    Raises ValueError where they were made with different settings, or a scan has two.
    """
    results = [result for folder in _folders(out) if (result := _result(folder))]
    for result in results[1:]:
        if result.key != results[0].key:
            raise ValueError(f"{out}: {result.folder.name} was made with "
                             f"{told_apart(result.key, results[0].key)} than {results[0].folder.name}; project it "
                             "again (--overwrite)")
    by_id: dict[str, Result] = {}
    for result in results:
        first = by_id.setdefault(result.scan["scan_id"], result)
        if first is not result:
            raise two_results_error(result.scan["scan_id"], first.folder, result.folder)
    return results


def _result(folder: Path) -> Result | None:
    found = read_result(folder)
    return found and _of(folder, found)


def _of(folder: Path, found: dict) -> Result:
    return Result(folder, found["scan"], found["seconds"], found["key"], found.get("changed", False))


def write_tables(out: Path, results: list[Result]) -> None:
    """scores.csv: highest score first, then what is not to be trusted, then failed scans; slices.csv; seconds.csv,
    which alone differs each time. Scores in full: a threshold may lie on one, and flags are by the score itself.

    Raises ReplacedError where another run has replaced a result since: then no table has changed, as only the slices
    are read here, and are written first.
    """
    by_id = sorted(results, key=lambda result: result.scan["scan_id"])
    ranked = sorted((r.scan for r in by_id if r.ok), key=lambda row: (row["status"] != "ok", -row["score"]))
    write_table(out / "slices.csv", SLICE_COLUMNS, (row for result in by_id for row in result.slices), exact=("score",))
    write_table(out / "scores.csv", SCORE_COLUMNS, [*ranked, *(r.scan for r in by_id if not r.ok)], exact=("score",))
    write_table(out / "seconds.csv", ("scan_id", "seconds"), [r.scan for r in by_id if r.ok])


def note_part(out: Path, inputs: Iterable[Path], found: list[ScanSource], number: int, count: int) -> None:
    """Note what a run is about to do: part `number` of `count` of what was found in `inputs`. A whole run is 0 of 1."""
    where, ids = sorted(str(path.resolve()) for path in inputs), [source.scan_id for source in found]
    (out / PARTS).mkdir(exist_ok=True)
    note = {"part": number, "of": count, "found": digest(ids), "scans": ids[number::count]}
    replace_text(out / PARTS / f"{digest(where)[:16]}-{number}-of-{count}.json", json.dumps(note) + "\n")


def missing_results(out: Path, results: list[Result]) -> list[str]:
    """Sentences on what runs set out to do that is not among the results: parts that never began, scans without one.

    For each set of inputs only the last run counts, whole or in parts: it knew which scans there are. Raises ValueError
    for a note that cannot be read.
    """
    done, words = {result.scan["scan_id"] for result in results}, []
    for run in _last_runs(out):
        count = run[0]["of"]
        if gone := _never_began(run):
            named = some([f"{number}/{count}" for number in gone])
            words.append(f"{len(gone)} of {count} parts never began, or saw other scans than the last one: start "
                         f"them again, --part {named}")
        if left := [scan_id for note in run for scan_id in note["scans"] if scan_id not in done]:
            words.append(f"{len(left)} scans have no result: {some(left)}; start their runs again")
    return words


def unexpected_results(out: Path, results: list[Result]) -> str | None:
    """A sentence on results of scans that the last runs did not find: these may be gone, or have another id now.

    None without any, or where a part that may have found them never began.
    """
    runs = _last_runs(out)
    if not runs or any(map(_never_began, runs)):
        return None
    asked = {scan_id for run in runs for note in run for scan_id in note["scans"]}
    others = sorted({result.scan["scan_id"] for result in results} - asked)
    if not others:
        return None
    return (f"{len(others)} scans that the last runs have not found: {some(others)}; remove their folders to leave "
            "them out")


def further_results(out: Path, results: list[Result], changed: Iterable[str] = ()) -> str | None:
    """A sentence on the results that lie there of scans other than these and the changed ones; None without any."""
    known = {result.folder for result in results}.union(find_result_folder(out, scan_id) for scan_id in changed)
    others = sorted(folder.name for folder in _folders(out)
                    if folder not in known and (folder / "result.json").is_file())
    if not others:
        return None
    return (f"{len(others)} further scans have results in {out}: {some(others)}; projector.py merge {out} makes "
            "tables of all")


def _last_runs(out: Path) -> list[list[dict]]:
    """The notes of the last run on each set of inputs, part by part."""
    notes, mend = defaultdict(list), "remove it, and start the part that it is named after again"
    for path in sorted((out / PARTS).glob("*.json")):
        note = read_object(path, mend=mend)
        if not all(isinstance(note.get(name), kind) for name, kind in NOTE.items()):
            raise ValueError(f"{path}: expected {', '.join(NOTE)}, as projector.py writes them: {mend}")
        notes[path.name.partition("-")[0]].append((path.stat().st_mtime_ns, note))
    runs = []
    for dated in notes.values():
        _, last = max(dated, key=lambda pair: pair[0])
        runs.append([note for _, note in dated if (note["of"], note["found"]) == (last["of"], last["found"])])
    return runs


def _never_began(run: list[dict]) -> list[int]:
    return sorted(set(range(run[0]["of"])) - {note["part"] for note in run})


def _folders(out: Path) -> list[Path]:
    return [*out.iterdir(), *(out / BY_HASH).glob("??/*")]


def remove_leftovers(out: Path) -> None:
    """Remove what killed runs left half-written; nothing while any run is at work."""
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
    """Make the folder. ValueError where it cannot be written to, before hours of work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error


def refuse_other_files(out: Path, sources: list[ScanSource], by_hash: bool) -> None:
    """ValueError if results or tables would replace anything but results or tables, such as the scans themselves."""
    refuse_other_tables(out)
    folders = source_folders(sources)
    for source in sources:
        refuse_foreign_folder(find_result_folder(out, source.scan_id, by_hash), folders)


def refuse_other_tables(out: Path) -> None:
    """ValueError if a file of another program lies where a table, the page or run.json is to go."""
    for path in (out / name for name in TABLES):
        if path.exists() and not _is_own_table(path):
            raise ValueError(f"{path}: would be replaced, and this version of this program has not made it; move it "
                             "away, or choose another --out")


def _is_own_table(path: Path) -> bool:
    """By what it begins with; run.json by its key, or where it is damaged, which merge reports."""
    if path.name != "run.json":
        with open(path, encoding="utf-8", errors="replace") as file:
            return TABLES[path.name] in file.read(1000)
    try:
        return "key" in read_object(path)
    except ValueError:
        return True


def refuse_other_results(out: Path, sources: list[ScanSource], key: dict) -> None:
    """ValueError if a scan's results there are of another scan, another model, other settings or another version."""
    for source in sources:
        refuse_other_result(out, source, read_result(find_result_folder(out, source.scan_id)), key)
