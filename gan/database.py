"""Folders of scans to a slice database: for prepare.py, and for training straight from a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import distributed
from common.files import followed
from common.files import read_table as read_rows
from common.groups import connected
from common.stopping import Terminated, end_with_parent, orderly_end
from common.wording import some
from ct import dicom, frame, loose, slices
from ct.frame import PreprocessSettings, clipped_below, preprocess_scan
from ct.read import ScanSource, as_given, find_scans, read_scan, refuse_shared_ids, refuse_twice
from ct.scan import Scan, ScanError, printable
from ct.settings import UNKNOWN_SLICE_SPACING_MM
from ct.slab import Slabs
from ct.standardise import StandardiseSettings
from dataset import SPLITS, DatasetError, ScanRecord, SliceWriter, check_seal, read_manifest
from gan.snapshots import snapshot_steps

PathLike = str | os.PathLike
HU_RANGE = (-20.0, 180.0)     # what the three windows show
LOOSE_A_LINE = 100            # loose slices: a line in the log for so many
TABLE_OF_PATIENTS = "; if their DICOM headers name one patient for several, say who is who with --patients"


# ----------------------------------------------------------------------------------------------------
# Tables and the split

def read_table(path: PathLike, columns: Sequence[str], flag: str) -> list[tuple[str, ...]]:
    """The named columns of a CSV file, row by row. DatasetError names the flag and what is missing."""
    return [tuple((row[c] or "").strip() for c in columns)
            for row in read_rows(Path(path), columns, DatasetError, flag)]


def _by_scan(path: PathLike, column: str, flag: str, scan_ids: Sequence[str]) -> dict[str, str]:
    """scan_id -> value for every scan; a missing or contradictory scan is an error."""
    values: dict[str, str] = {}
    for scan_id, value in read_table(path, ("scan_id", column), flag):
        if values.setdefault(scan_id, value) != value:
            raise DatasetError(f"{flag} {path}: {scan_id} is both '{values[scan_id]}' and '{value}'")
    missing = [s for s in scan_ids if not values.get(s)]
    if missing:
        raise DatasetError(f"{flag} {path}: no {column} for {some(missing)}: add a row for every scan")
    return {s: values[s] for s in scan_ids}


def split_by_patient(patients: dict[str, str], val_fraction: float, seed: int) -> dict[str, str]:
    """scan_id -> 'train' or 'val', given scan_id -> patient: no patient is in both.

    round(val_fraction * patients) of them, but at least one and not all, go to validation; a fraction of 0
    puts everybody into training, one of 1 everybody into validation.
    """
    if not 0 <= val_fraction <= 1:
        raise DatasetError(f"--val-fraction must be from 0 to 1, got {val_fraction}")
    if val_fraction in (0, 1):
        return dict.fromkeys(patients, SPLITS[int(val_fraction)])
    people = sorted(set(patients.values()))
    if len(people) < 2:
        raise DatasetError(f"--val-fraction {val_fraction}: one patient cannot be split, and train.py needs "
                           f"held-out slices: give scans of more patients{TABLE_OF_PATIENTS * (len(patients) > 1)}")
    count = min(max(round(val_fraction * len(people)), 1), len(people) - 1)
    chosen = np.random.default_rng(seed).permutation(len(people))[:count]
    val = {people[i] for i in chosen}
    return {scan_id: "val" if patient in val else "train" for scan_id, patient in patients.items()}


def patients_of(scans: Sequence[ScanSource]) -> dict[str, str]:
    """scan_id -> patient, who is called after one of the scans: scans that share a PatientID, a study or a series are
    of one patient. What is no DICOM tells nothing, and is a patient of its own."""
    ordered = sorted(scans, key=lambda scan: scan.scan_id)
    first = connected([scan.whose for scan in ordered])
    return {scan.scan_id: ordered[i].scan_id for scan, i in zip(ordered, first)}


@dataclass(frozen=True)
class Tables:
    """CSV files that say of scans what is not in them, each named as its flag of prepare.py; None: not given.

    patients   scan_id, patient: whose they are
    split      scan_id, split: on which side they are
    slices     scan_id, slice: what alone is kept
    leave_out  scan_id, slice: what is not kept
    """

    patients: PathLike | None = None
    split: PathLike | None = None
    slices: PathLike | None = None
    leave_out: PathLike | None = None


def _assign(scans: list[ScanSource], tables: Tables, val_fraction: float, seed: int
            ) -> tuple[dict[str, str], dict[str, str], str]:
    """(scan_id -> split, scan_id -> patient, one line that says how)."""
    scan_ids = [scan.scan_id for scan in scans]
    if tables.patients:
        patients, who = _by_scan(tables.patients, "patient", "--patients", scan_ids), "by patient (--patients)"
    elif any(scan.whose for scan in scans):
        patients = patients_of(scans)
        who = (f"{len(set(patients.values()))} patients by PatientID, study and series (no --patients), scans that are "
               "no DICOM each taken for one")
    else:
        patients, who = patients_of(scans), "every scan taken for a patient of its own (no --patients)"
    if not tables.split:
        return split_by_patient(patients, val_fraction, seed), patients, f"{who}, seed {seed}"
    splits = _by_scan(tables.split, "split", "--split", scan_ids)
    sides: dict[str, str] = {}
    for scan_id, split in splits.items():
        if split not in SPLITS:
            raise DatasetError(f"--split {tables.split}: {scan_id} is '{split}', expected {' or '.join(SPLITS)}")
        if sides.setdefault(patients[scan_id], split) != split:
            raise DatasetError(f"--split {tables.split}: the patient of {scan_id} is in train and in val: put "
                               f"all scans of a patient on one side{TABLE_OF_PATIENTS * (not tables.patients)}")
    return splits, patients, f"given (--split), {who}"


def _selection(slices_csv: PathLike | None) -> dict[str, frozenset[int]] | None:
    """scan_id -> listed slices (0: the most inferior); None without a list."""
    return _listed(slices_csv, "--slices") if slices_csv else None


def _left_out(csv_file: PathLike | None, found: Sequence[ScanSource]) -> dict[str, frozenset[int] | None]:
    """scan_id -> slices to leave out, None for all. DatasetError for what is not there."""
    if not csv_file:
        return {}
    rows = read_table(csv_file, ("scan_id", "slice"), "--leave-out")
    whole = {scan_id for scan_id, index in rows if not index}
    listed = _listed(csv_file, "--leave-out", [row for row in rows if row[0] not in whole])
    if unknown := sorted((whole | listed.keys()) - {s.scan_id for s in found}):
        raise DatasetError(f"--leave-out {csv_file}: not among the scans found: {some(unknown)}")
    single = {s.scan_id for s in found if s.kind == loose.KIND}
    if beyond := sorted(scan_id for scan_id, slices in listed.items() if scan_id in single and slices != {0}):
        raise DatasetError(f"--leave-out {csv_file}: a loose slice is slice 0 of its own, found others for "
                           f"{some(beyond)}")
    return {**listed, **dict.fromkeys(whole | (single & listed.keys()))}


def _listed(csv_file: PathLike, flag: str, rows: Sequence[tuple[str, ...]] | None = None) -> dict[str, frozenset[int]]:
    listed: dict[str, set[int]] = {}
    for scan_id, index in read_table(csv_file, ("scan_id", "slice"), flag) if rows is None else rows:
        if not index.isdecimal():
            raise DatasetError(f"{flag} {csv_file}: slice must be 0 or more, got '{index}' for {scan_id}")
        listed.setdefault(scan_id, set()).add(int(index))
    return {scan_id: frozenset(indices) for scan_id, indices in listed.items()}


# ----------------------------------------------------------------------------------------------------
# One scan to a record, in a worker process

@dataclass(frozen=True)
class _Job:
    """A scan or loose slice. selected: the slices to keep, None: all; left_out: not these."""

    source: ScanSource
    settings: PreprocessSettings
    selected: frozenset[int] | None
    left_out: frozenset[int]


def listed_slabs(slabs: Slabs, selected: frozenset[int]) -> np.ndarray:
    """bool [T]: the slabs that are made of no other than the selected slices of their scan."""
    count = len(slabs.position_mm)
    if max(selected) >= count:
        raise ScanError(f"{slabs.scan.scan_id}: --slices names slice {max(selected)}, the scan has {count} "
                        "(0 is the most inferior)")
    return ~slabs.made_of[:, ~np.isin(np.arange(count), list(selected))].any(1)


def _encode(job: _Job) -> ScanRecord:
    if job.source.kind == loose.KIND:
        return _encode_loose(job)
    scan = read_scan(job.source)
    _refuse_clipped(scan, job.settings)
    done = preprocess_scan(scan, job.settings)
    kept = done.kept
    if job.selected is not None or job.left_out:
        kept = kept & listed_slabs(done.slabs, _chosen(job, len(done.slabs.position_mm)))
    if not kept.any():
        raise ScanError(f"{scan.scan_id}: none of the slices that --slices and --leave-out choose shows enough brain")
    shown, standard = np.flatnonzero(kept), done.standardised
    return ScanRecord.encode(scan.scan_id, standard.hu[shown], standard.brain[shown], standard.below_vertex_mm[shown],
                             shown, scan.source, (*done.slabs.scan.notes, *done.reservations), _pixels(scan))


def _refuse_clipped(scan: Scan, settings: PreprocessSettings) -> None:
    """ScanError where networks would take the end of a source's range for HU that were measured."""
    for note in clipped_below(scan, settings):
        raise ScanError(f"{scan.scan_id}: {note}; take a range within it (--hu-clip, or another --like), or leave the "
                        "scan out")


def _pixels(scan: Scan) -> str:
    """A hash of the HU that every format has: a copy as NIfTI of a DICOM series has the same."""
    shown = np.rint(np.clip(scan.hu, *HU_RANGE)).astype(np.int16)
    return hashlib.sha256(repr(shown.shape).encode() + shown.tobytes()).hexdigest()


def _chosen(job: _Job, count: int) -> frozenset[int]:
    """Of the `count` slices of a scan. ScanError where none is left, or --leave-out names one beyond them."""
    if max(job.left_out, default=0) >= count:
        raise ScanError(f"{job.source.scan_id}: --leave-out names slice {max(job.left_out)}, the scan has {count} "
                        "(0 is the most inferior)")
    chosen = (frozenset(range(count)) if job.selected is None else job.selected) - job.left_out
    if not chosen:
        raise ScanError(f"{job.source.scan_id}: --leave-out leaves no slice of it; give the scan with an empty slice "
                        "to leave it out as a whole")
    return chosen


def _encode_loose(job: _Job) -> ScanRecord:
    scan = loose.read_loose(job.source)
    _refuse_clipped(scan, job.settings)
    done = loose.standardise_loose(scan, job.settings.standardise)
    share = done.brain.mean()
    if share < job.settings.min_brain_fraction:
        raise ScanError(f"{job.source.scan_id}: brain on {share:.1%} of the frame, less than --min-brain-fraction")
    return ScanRecord.encode(job.source.scan_id, done.hu, done.brain, done.below_vertex_mm, source=loose.KIND)


def _attempt(work: Callable, job) -> tuple[object, str | None]:
    """(result, None) or (None, reason): one broken scan must not cost the others."""
    try:
        return work(job), None
    except ScanError as error:
        return None, str(error)
    except Exception as error:    # whatever a decoder throws at a damaged file: reported, exit code 3
        return None, printable(f"{type(error).__name__}: {error}")


def _begin_worker(parent: int) -> None:
    torch.set_num_threads(1)
    end_with_parent(parent)              # idle workers of a pool hold its queues open for each other: they never end


def _attempt_apart(work: Callable, job) -> tuple[object, str | None]:
    """_attempt in a worker, whose process ends where it is asked to, and leaves nothing that it has unpacked."""
    try:
        with orderly_end():
            return _attempt(work, job)
    except Terminated as stop:
        os._exit(stop.code)              # the pool would report it as the scan's error, and go on


def _told_saturation(source: ScanSource) -> tuple[float, float] | None:
    """What a source clips its HU to (Scan.saturation_hu); None where only the decoded pixels tell."""
    if source.error is not None or source.archive is not None:
        return None
    if source.kind == dicom.KIND:
        return -np.inf, np.inf
    return slices.spec_of(source).saturation_hu if source.kind in (slices.KIND, loose.KIND) else None


def _saturation(source: ScanSource) -> tuple[float, float]:
    return read_scan(source).saturation_hu


def _parallel(work: Callable, jobs: list, workers: int) -> Iterator[tuple[object, str | None]]:
    """_attempt(work, job) for every job, in order."""
    if workers == 1 or len(jobs) <= 1:
        yield from map(_attempt, itertools.repeat(work), jobs)
        return
    spawn = get_context("spawn")           # not fork: PyTorch's threads do not survive it
    try:
        with ProcessPoolExecutor(min(workers, len(jobs)), spawn, _begin_worker, (os.getpid(),)) as pool:
            yield from pool.map(_attempt_apart, itertools.repeat(work), jobs)
    except BrokenProcessPool as error:
        raise DatasetError("a worker process was killed, out of memory most likely: use fewer --workers") from error


# ----------------------------------------------------------------------------------------------------
# Folders of scans to a database

def common_hu_range(sources: list[ScanSource], workers: int) -> tuple[float, float]:
    """The part of HU_RANGE that no scan's source has clipped: one HU range for all scans of a database."""
    told = [_attempt(_told_saturation, source)[0] for source in sources]
    decoded = [source for source, limits in zip(sources, told) if limits is None]
    ranges = [limits for limits in told if limits is not None]
    ranges += [limits for limits, reason in _parallel(_saturation, decoded, workers) if reason is None]
    low = max([HU_RANGE[0], *(r[0] for r in ranges)])
    high = min([HU_RANGE[1], *(r[1] for r in ranges)])
    if low >= high:
        raise DatasetError(f"the scans share no HU range (they were clipped to {sorted(set(ranges))}): "
                           "prepare them apart, or give --hu-clip LOW HIGH")
    return low, high


def find_sources(folders: Sequence[PathLike], unknown_slice_spacing_mm: float, ids: str = "path") -> list[ScanSource]:
    """The scans of several folders, and loose slices, each a source of its own (ct.loose).

    ids: as of find_scans, of each folder by itself: tables of patients, splits and slices name scans so, whichever
    folders are given together. (ct.read.find_all, which has no tables to fit, puts the folder's name before them.)
    DatasetError where a folder is missing, before any is searched; ScanError where two sources share an id.
    """
    for folder in folders:
        if not Path(folder).exists():
            raise DatasetError(f"{folder}: no such file or folder; expected a folder of scans")
    found = [s for folder in folders for s in find_scans(Path(folder), unknown_slice_spacing_mm, ids)]
    sources = [one for source in found for one in loose.pictures(source) or [source]]
    refuse_shared_ids(sources)
    return sources


def _check_all_used(folders: Sequence[PathLike], remaining: Sequence[ScanSource], sources: Sequence[ScanSource],
                    slices_csv: PathLike | None) -> None:
    """DatasetError for a folder of which --slices names nothing: it was given to be used."""
    for folder in folders:
        whole = as_given(folder)
        mine, used = ([s for s in some if s.files[0].is_relative_to(whole)] for some in (remaining, sources))
        if mine and not used:
            raise DatasetError(f"{folder}: --slices {slices_csv} names none of its {len(mine)} scans; leave it out. If "
                               'these are loose slices, its scan.json must say "loose": true (docs/DATA.md)')


def build_lmdb(folders: Sequence[PathLike], out: PathLike, settings: PreprocessSettings, *,
               hu_clip: Sequence[float] | None = None, val_fraction: float = 0.15, seed: int = 0,
               tables: Tables = Tables(), unknown_slice_spacing_mm: float = UNKNOWN_SLICE_SPACING_MM,
               ids: str = "path", workers: int = 1, overwrite: bool = False,
               log: Callable[[str], None] = distributed.print0) -> dict:
    """Prepares every scan under `folders` and writes the database `out`; returns its manifest.

    hu_clip None: the HU range that all scans share (common_hu_range). It replaces that of the settings.
    Loose slices all go into training; the tables of patients, split and slices are about scans.
    Scans that fail are left out and named with their reason in manifest['failed']; a scan that --slices does
    not name is in manifest['unlisted'], one that --leave-out names as a whole in manifest['left_out']. What is known
    to be no scan before it is read is on no side, and needs no row in a table. Where all of a side fail, a warning.
    Raises DatasetError (nothing is written) for wrong values or tables, an existing `out`, or when no scan is left,
    be it of one of the folders; ScanError where a folder holds no scans.
    """
    writer = SliceWriter(followed(Path(out)), {}, overwrite)        # refuses an existing file before the long work
    found = find_sources(folders, unknown_slice_spacing_mm, ids)
    sizes = _sizes(found)
    left_out = _left_out(tables.leave_out, found)
    remaining = [s for s in found if left_out.get(s.scan_id, ()) is not None]
    selection = _selection(tables.slices)
    unknown = sorted(set(selection or ()) - {s.scan_id for s in found})      # of a list for a larger cohort, or a slip
    scans = [s for s in remaining if s.kind != loose.KIND and (selection is None or s.scan_id in selection)]
    singles = [s for s in remaining if s.kind == loose.KIND]
    sources = [*scans, *singles]
    unlisted = sorted({s.scan_id for s in remaining} - {s.scan_id for s in sources})
    if not sources:
        raise DatasetError(f"--slices {tables.slices}: names none of the {len(remaining)} scans found" if remaining else
                           f"--leave-out {tables.leave_out}: names all of the {len(found)} scans found")
    _check_all_used(folders, remaining, sources, tables.slices)
    possible = [s for s in scans if s.error is None]                      # the others are known to be no scans
    refuse_twice([scan] for scan in possible)
    if possible:
        splits, patients, how = _assign(possible, tables, val_fraction, seed)
        log(f"{len(possible)} scans; split: {how}")
    elif singles and val_fraction > 0:
        raise DatasetError(f"--val-fraction {val_fraction}: loose slices are never held out, and there is no scan; add "
                           "scans, or give --val-fraction 0")
    else:
        splits, patients, how = {}, {}, "none: loose slices alone"
    if singles:
        log(f"{len(singles)} loose slices, without neighbours and positions, all for training")
        splits |= {s.scan_id: "train" for s in singles}
        patients |= {s.scan_id: s.scan_id for s in singles}
    if unknown:
        log(f"--slices names {len(unknown)} scans that are not there: {some(unknown)}")
    if unlisted:
        log(f"{len(unlisted)} further scans are not in --slices and left out: {some(unlisted)}")
    if len(remaining) < len(found):
        log(f"--leave-out: {len(found) - len(remaining)} scans or loose slices")
    hu_clip = hu_clip or common_hu_range(sources, workers)
    standardising = dataclasses.replace(settings.standardise, hu_clip=tuple(float(v) for v in hu_clip))
    settings = dataclasses.replace(settings, standardise=standardising)
    log(f"HU clipped to {hu_clip[0]:g}..{hu_clip[1]:g}, slices of {standardising.size}x{standardising.size}")

    jobs = [_Job(s, settings, None if selection is None or s.kind == loose.KIND else selection[s.scan_id],
                 left_out.get(s.scan_id, frozenset())) for s in sources]
    writer.settings = settings.to_json()
    with writer:
        failed = _write(writer, jobs, splits, patients, workers, log)
        if len(failed) == len(jobs):
            raise DatasetError(f"no scan of {len(jobs)} could be prepared; the first: {failed[0]['reason']}")
        writer.facts = {"preprocessing_version": frame.VERSION, "split": how, "failed": failed, "unlisted": unlisted,
                        "left_out": sorted({s.scan_id for s in found} - {s.scan_id for s in remaining}),
                        "found": sizes}
    for side, count in writer.manifest["counts"].items():
        meant = [scan_id for scan_id in splits if splits[scan_id] == side]
        if meant and not count["slices"]:
            log(f"warning: {side} is empty: all of it has failed ({some(meant)}); mend that, or choose others "
                "with --seed or --split")
    return writer.manifest


def _write(writer: SliceWriter, jobs: list[_Job], splits: dict[str, str], patients: dict[str, str], workers: int,
           log: Callable[[str], None]) -> list[dict[str, str]]:
    """Prepare the scans and add them to the database; those that fail, and why."""
    failed, seen, terminal = [], {}, sys.stderr.isatty()
    results = tqdm(_parallel(_encode, jobs, workers), total=len(jobs), unit="scan", disable=not terminal)
    for number, (job, (record, reason)) in enumerate(zip(jobs, results), 1):
        scan_id = job.source.scan_id
        if record is not None and record.pixels:
            same = seen.setdefault(record.pixels, scan_id)
            if same != scan_id:
                reason = f"{scan_id}: the same pictures as {same}; leave one of them out"
        if reason is not None:
            failed.append({"scan_id": scan_id, "reason": reason})
            log(f"{number}/{len(jobs)} {scan_id}: FAILED, {reason}")
            continue
        writer.add(record, splits[scan_id], patients[scan_id])
        if not terminal and (job.source.kind != loose.KIND or number % LOOSE_A_LINE == 0):
            log("; ".join((f"{number}/{len(jobs)} {scan_id}: {len(record.slices)} slices, {splits[scan_id]}",
                           *record.notes)))
    return failed


def ensure_database(data: Path, out: Path, size: int, like: PreprocessSettings | None = None) -> Path:
    """`data` itself if it is a database; a folder of scans is prepared first, into out/data.lmdb.

    Collective. like: how, in place of this size and prepare.py's defaults. An existing out/data.lmdb is taken as it is
    (a run that goes on must not see other slices), if it was made of these scans. Raises DatasetError where it was not,
    for a training run's folder, and for one that is yet to be prepared under torchrun: the other ranks would wait
    longer for the first one than they may.
    """
    if not data.is_dir():
        return data
    if snapshot_steps(data):
        raise DatasetError(f"--data {data}: the folder of a training run, which holds networks; give the database that "
                           "it was trained on, or a folder of scans")
    database = out / "data.lmdb"
    if not database.exists():
        if distributed.get_world_size() > 1:
            raise DatasetError(f"--data {data}: several processes do not prepare a folder of scans; prepare it first: "
                               f"python prepare.py {data} {like.flags() if like else f'--size {size}'} "
                               "--out healthy.lmdb")
        out.mkdir(parents=True, exist_ok=True)
        build_lmdb([data], database, like or PreprocessSettings(StandardiseSettings(size=size)),
                   hu_clip=like and like.standardise.hu_clip)
    elif problem := distributed.gather(_made_of_others(database, data) if distributed.is_main() else None)[0]:
        raise DatasetError(problem)
    return database


def _made_of_others(database: Path, folder: Path) -> str | None:
    """What tells that a database was not made of the scans in a folder; None where nothing does."""
    mend = f"remove it, or give it as --data {database}"
    try:
        check_seal(database, whole=False)
        manifest, now = read_manifest(database), _sizes(find_sources([folder], UNKNOWN_SLICE_SPACING_MM))
    except (DatasetError, ScanError) as error:
        return f"{database}: cannot be held against --data {folder}: {error}; {mend}"
    before = manifest.get("found") or _ids(manifest)
    other = [scan_id for scan_id in {**before, **now} if scan_id not in before or scan_id not in now
             or None not in (before[scan_id], now[scan_id]) and before[scan_id] != now[scan_id]]
    if not other:
        return None
    return (f"{database}: was made of other scans than --data {folder} holds, or of other files of these "
            f"({some(sorted(other), 3)}); {mend}")


def _sizes(sources: Sequence[ScanSource]) -> dict[str, int | None]:
    """scan_id -> bytes of its files; None where one is gone since the search."""
    found: dict[str, int | None] = {}
    for source in sources:
        try:
            found[source.scan_id] = sum(path.stat().st_size for path in source.files)
        except OSError:
            found[source.scan_id] = None
    return found


def _ids(manifest: dict) -> dict[str, None]:
    """As _sizes, of a database that an older version has made: it tells which scans it was made of, not their sizes."""
    named = [*(one["scan_id"] for one in [*manifest["scans"], *manifest.get("failed", [])]),
             *manifest.get("unlisted", []), *manifest.get("left_out", [])]
    return dict.fromkeys(named)
