"""A run into a folder of results: its scans by one process or several, run.json, and at the end tables and page."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.files import read_object, replace_text
from common.stopping import Terminated
from common.wording import some
from ct.read import ScanSource
from detect.bundle import versions
from detect.claims import Claims
from detect.folder import (
    collect,
    collect_all,
    make_writable,
    missing_results,
    note_part,
    refuse_other_files,
    refuse_other_results,
    refuse_other_tables,
    unexpected_results,
    write_tables,
)
from detect.jobs import WORK, project_all, say
from detect.outputs import Writer
from detect.processes import shared
from detect.projection import Projector
from detect.report import write_report
from detect.result import ReplacedError, Result, find_result_folder, is_made_alike, made_with, mark_changed, read_result

TABLES_EVERY_S = 60.0                     # a run of its own keeps its tables so fresh
TRIES = 5                                 # to make tables while other runs replace results


@dataclass(frozen=True)
class Run:
    """Scans, what projects them and what is written of each, in a process of the run.

    is_part    of a run whose parts write to sub-folders, and leave the tables to a merge
    overwrite  results of other settings, and of other scans of the same ids, may be replaced
    """

    projector: Projector
    writers: Mapping[str, Writer]
    sources: list[ScanSource]
    out: Path
    is_part: bool = False
    overwrite: bool = False

    def begin(self, inputs: Iterable[Path], found: list[ScanSource], number: int, count: int) -> None:
        """Make the folder, and leave word of this part of what was found in the inputs.

        ValueError where it cannot be written, or what is there would be replaced and must not be.
        """
        make_writable(self.out)
        refuse_other_files(self.out, self.sources, self.is_part)
        if not self.overwrite:
            refuse_other_results(self.out, self.sources, self.projector.key())
        note_part(self.out, inputs, found, number, count)

    def collect(self) -> tuple[list[Result], list[str]]:
        """Results of these scans, failed ones, too, and the ids of those that have none."""
        return collect(self.out, self.sources, self.projector.key(), self.writers)

    def finish(self, tables: bool = False) -> tuple[list[Result], list[str], list[str]]:
        """collect(), and the ids of the scans whose files changed while they were projected, as they did once more.

        A scan whose files have changed since they were read is projected again, once; where they have changed by then,
        too, its result is marked so. What other runs have is theirs.
        """
        results, missing = self.collect()
        left = set(missing)
        if again := [number for number, source in enumerate(self.sources)
                     if source.scan_id in left and self._has_changed(source)]:
            say(f"{len(again)} scans have changed since they were read: "
                f"{some([self.sources[number].scan_id for number in again])}; once more")
            self.project(again, tables)
            results, missing = self.collect()
            left = set(missing)
        changed = [self.sources[number].scan_id for number in again
                   if self.sources[number].scan_id in left and self._has_changed(self.sources[number], mark=True)]
        return results, [scan_id for scan_id in missing if scan_id not in changed], changed

    def _has_changed(self, source: ScanSource, mark: bool = False) -> bool:
        """Whether a scan without a result of its files as they are has one of them as they were, and no run has it."""
        made = made_with(self.projector.key(), source, self.writers)
        with Claims(self.out / WORK).hold(source.scan_id) as free:
            place = find_result_folder(self.out, source.scan_id)
            if not free or not is_made_alike(made, source, read_result(place)):
                return False
            if mark:
                mark_changed(place)
            return True

    def project(self, numbers: Iterable[int], tables: bool = False) -> None:
        """Project those of the scans; with tables, write these now and then, and where it is interrupted."""
        written, tables = time.perf_counter(), tables and not self.is_part
        try:
            for _ in project_all(self.projector, self.sources, self.out, self.writers, self.is_part, numbers,
                                 self.overwrite):
                if tables and time.perf_counter() - written > TABLES_EVERY_S:
                    self._write_tables_so_far()
                    written = time.perf_counter()
        except (KeyboardInterrupt, Terminated):
            if tables:
                self._write_tables_so_far()
            raise

    def _write_tables_so_far(self) -> None:
        """A convenience: not while another run replaces a result, and none without a row."""
        with contextlib.suppress(ReplacedError):
            if results := self.collect()[0]:
                write_tables(self.out, results)

    def write_all(self, results: list[Result], report: dict, seconds: float) -> list[Result]:
        """write_all() of the folder; returns the results that are in it, collected anew where other runs replace some.

        Raises ReplacedError where that does not end, or the new ones are not of this run's settings or files.
        """
        for tries_left in reversed(range(TRIES)):
            try:
                write_all(self.out, results, report, seconds)
                break
            except ReplacedError:
                again = self.collect()[0]
                if not tries_left or len(again) < len(results):
                    raise
                results = again
        return results

    def share_out(self, processes: int, make: Callable[[], Run]) -> None:
        """Project all scans, by so many processes; this is the first, and does what one that dies leaves undone.

        make: what makes this same run in another one; it is pickled.
        """
        failed = {result.scan["scan_id"]: result.written for result in self.collect()[0] if not result.ok}
        with shared(processes, len(self.sources), share_in, make, torch.get_num_threads(), processes) as turns:
            self.project(turns, tables=True)
        if turns.died:
            results, missing = self.collect()
            untried = [result.scan["scan_id"] for result in results
                       if not result.ok and failed.get(result.scan["scan_id"]) == result.written]
            undone = {*missing, *untried}
            numbers = [number for number, source in enumerate(self.sources) if source.scan_id in undone]
            self.project(numbers, tables=True)


def share_in(make: Callable[[], Run], threads: int, processes: int, numbers: Iterable[int]) -> None:
    """What each further process does. Errors are the first one's to tell: it finds what is left undone."""
    torch.set_num_threads(threads)
    try:
        make().project(numbers)
    except (OSError, ValueError) as error:
        sys.exit(f"one of {processes} processes: {error}")


# ---------------------------------------------------------------------------------------------------------------
# run.json, and the end of a run

def run_report(projector: Projector, processes: int) -> dict:
    """What runs on what with which weights, and the healthy scores it may be held against: JSON."""
    bundle = projector.bundle
    return {
        "key": projector.key(), "weights_sha256": bundle.weights_hash, "model": bundle.meta["provenance"],
        "settings": projector.settings.to_json(), "preprocessing": projector.preprocessing.to_json(),
        "calibration": projector.calibration, "threshold": projector.threshold,
        "device": str(bundle.reconstructor.device),
        "precision": str(bundle.reconstructor.precision).removeprefix("torch."), "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": versions() | {"python": platform.python_version(), "torch": torch.__version__,
                                  "numpy": np.__version__},
    }


def begin_report(out: Path, report: dict) -> None:
    """run.json from a run's beginning on, for a merge. One of the same key stays: a finished run's says more.

    Without seconds it is of no finished run: tables that lie beside it may be those of the one before.
    """
    path = out / "run.json"
    if not path.is_file() or _read_report(path).get("key") != report["key"]:
        replace_text(path, json.dumps(report | {"seconds": None}, indent=2) + "\n")


def _read_report(path: Path) -> dict:
    """A run.json; empty where it is damaged."""
    try:
        return read_object(path)
    except ValueError:
        return {}


def write_all(out: Path, results: list[Result], report: dict, seconds: float) -> None:
    """The tables, run.json and the page."""
    done = [result for result in results if result.ok]
    stages: dict[str, float] = {}
    for result in done:
        for stage, value in result.seconds.items():
            stages[stage] = stages.get(stage, 0) + value / len(done)
    write_tables(out, results)
    report = report | {"scans": len(done), "failed": len(results) - len(done), "seconds": seconds,
                       "seconds_per_scan_by_stage": stages}
    replace_text(out / "run.json", json.dumps(report, indent=2) + "\n")
    page = write_report(out, out / "report.html")
    say(f"{len(done)} scans projected, {len(results) - len(done)} failed: {out / 'scores.csv'}, {page}")


def merge(out: Path) -> tuple[list[Result], list[str], str | None]:
    """Write tables, run.json and page of all results in a folder, but of those whose files have changed since.

    Returns these results, sentences on what is missing, and unexpected_results() of them. Raises ValueError where they
    are not of one run, run.json is not theirs, or there are none. Begins anew where other runs replace some meanwhile.
    """
    for _ in range(TRIES - 1):
        with contextlib.suppress(ReplacedError):
            return _merge(out)
    return _merge(out)


def _merge(out: Path) -> tuple[list[Result], list[str], str | None]:
    refuse_other_tables(out)
    if not (out / "run.json").is_file():
        raise ValueError(f"{out}: no run.json; give a folder of results of projector.py")
    results = collect_all(out)
    missed, others = missing_results(out, results), unexpected_results(out, results)
    if changed := [result.scan["scan_id"] for result in results if result.changed]:
        missed.append(f"{len(changed)} scans have changed while they were projected: {some(changed)}; start their runs "
                      "again")
        results = [result for result in results if not result.changed]
    if not results:                                  # before the tables of an earlier run are emptied
        raise ValueError("; ".join([f"{out}: no results, of which tables could be made; expected at least one scan's "
                                    "folder with its result.json: run projector.py into it first", *missed]))
    report = _read_report(out / "run.json")
    if report.get("key") != results[0].key:
        raise ValueError(f"{out / 'run.json'}: is of a run with another model or calibration, other settings or "
                         "another version of this program than the results, or damaged; start the run that made "
                         "the results again, or the other one with --overwrite until it is done")
    write_all(out, results, report, sum(r.scan["seconds"] for r in results if r.ok))
    return results, missed, others
