"""Synthetic head CTs with exact truth: a library, and a command that writes a cohort.

    python demos/phantom.py --healthy 20 --emergency 24 --seed 1 --out phantoms

Writes
    scans/SCAN_ID/*.dcm        a CT series a scan (with --nifti scans/SCAN_ID.nii.gz instead)
    masks/SCAN_ID.nii.gz       its truth, in the geometry of the scan; empty for a healthy one
    labels.csv                 scan_id, label, types (the kind of emergency), the seed to make it again, and its facts
    slices.csv                 scan_id, slice (from 0, inferior to superior), label, types: which slices hold truth
    phantom.json               the settings of the cohort
in the shape that evaluate.py reads. A scan depends on --seed, its number and its kind alone: a larger cohort begins
with the smaller one, byte for byte. Scans that are there already are left as they are, so an interrupted run goes on.

No patient's data is in these scans, and nothing that is learnt from them holds for patients without being tested.
Exit codes: 0 all done; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.files import full_disk_named
from config import RESUMES, exit_code
from ct.scan import Scan
from ct.write import write_nifti
from demos.anatomy import build_head
from demos.lesions import KINDS, add_emergency
from demos.scanner import acquire, write_dicom

SOURCES = ("anatomy.py", "atlas.py", "bleeds.py", "canvas.py", "lesions.py", "phantom.py", "scanner.py", "shapes.py",
           "skull.py", "warps.py")
LABEL_COLUMNS = ("scan_id", "label", "types", "seed")        # and the facts
SLICE_COLUMNS = ("scan_id", "slice", "label", "types")
GROUPS = ("healthy", "emergency")


class PhantomError(ValueError):
    """A cohort that cannot be made. The message names the flag or folder, what was found and the mend."""


@dataclass(frozen=True)
class Phantom:
    """A synthetic scan.

    scan   HU in whole numbers, float32 [S, 512, 512], inferior to superior
    truth  bool [S, 512, 512], what is abnormal; empty for a healthy one
    kind   one of lesions.KINDS; None for a healthy one
    facts  age, volume_ml, slices, ...: plain numbers and words
    """

    scan: Scan
    truth: np.ndarray
    kind: str | None
    facts: dict


def make(kind: str | None, seed: int, scan_id: str = "phantom") -> Phantom:
    """The phantom of a kind (None: healthy) and a seed; of one seed, all kinds share the head and its place.

    Raises ValueError for an unknown kind or a negative seed.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be None or one of {', '.join(KINDS)}, got {kind!r}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    for_head, for_lesion, for_scanner = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
    head, truth, found = build_head(for_head), None, {}
    facts = dict(head.facts)
    if kind is not None:
        head, truth, found = add_emergency(head, kind, for_lesion)
    scan, mask = acquire(head, truth, for_scanner)
    return Phantom(replace(scan, scan_id=scan_id), mask, kind, facts | found | {"slices": len(scan.hu)})


# ---- a cohort

@dataclass(frozen=True)
class Job:
    """One scan of a cohort, and how to write it."""

    scan_id: str
    kind: str | None
    seed: int                     # of make(), not of the cohort
    out: Path
    nifti: bool

    @property
    def path(self) -> Path:
        return self.out / "scans" / (f"{self.scan_id}.nii.gz" if self.nifti else self.scan_id)

    @property
    def mask_path(self) -> Path:
        return self.out / "masks" / f"{self.scan_id}.nii.gz"


def plan(healthy: int, emergency: int, seed: int, out: Path, kinds: Sequence[str] = KINDS,
         nifti: bool = False) -> list[Job]:
    """The scans of a cohort; emergencies take the kinds in turn."""
    jobs = []
    for group, (name, count) in enumerate(zip(GROUPS, (healthy, emergency))):
        for i in range(count):
            own = int(np.random.SeedSequence([seed, group, i]).generate_state(1, np.uint64)[0] >> 15)   # 15 digits
            jobs.append(Job(f"{name}-{i + 1:04d}", kinds[i % len(kinds)] if group else None, own, out, nifti))
    return jobs


def make_cohort(healthy: int, emergency: int, seed: int, out: Path, *, kinds: Sequence[str] = KINDS,
                nifti: bool = False, workers: int = 1, log: Callable[[str], None] = print) -> int:
    """Write the scans that are not there yet, and the tables; gives how many were written.

    Raises PhantomError for values that cannot be meant, and for a folder with other things or another cohort in it.
    """
    _check(healthy, emergency, seed, kinds, workers)
    _claim(out, {"seed": seed, "format": "nifti" if nifti else "dicom", "kinds": list(kinds), "code": code_hash()})
    jobs = plan(healthy, emergency, seed, out, kinds, nifti)
    labels, slices = _read_rows(out / "labels.csv"), _read_rows(out / "slices.csv")
    done = {row["scan_id"] for row in labels} & {row["scan_id"] for row in slices}
    todo = [job for job in jobs if not (job.scan_id in done and job.path.exists() and job.mask_path.exists())]
    again = {job.scan_id for job in todo}
    labels = [row for row in labels if row["scan_id"] not in again]
    slices = [row for row in slices if row["scan_id"] not in again]
    log(f"{out}: {len(jobs)} scans, {len(jobs) - len(todo)} of them there already, "
        f"{len(todo)} to make with {workers} workers")
    started = time.perf_counter()
    for number, (job, label, of_slices, seconds) in enumerate(_run(todo, workers), 1):
        labels.append(label)
        slices += of_slices
        _write_rows(out / "slices.csv", SLICE_COLUMNS, slices)
        _write_rows(out / "labels.csv", LABEL_COLUMNS, labels)
        left = (time.perf_counter() - started) / number * (len(todo) - number)
        log(f"{number}/{len(todo)} {job.scan_id}: {len(of_slices)} slices in {seconds:.1f} s, "
            f"about {left / 60:.0f} min left")
    return len(todo)


def _check(healthy: int, emergency: int, seed: int, kinds: Sequence[str], workers: int) -> None:
    for flag, value, least in (("--healthy", healthy, 0), ("--emergency", emergency, 0), ("--seed", seed, 0),
                               ("--workers", workers, 1)):
        if value < least:
            raise PhantomError(f"{flag} must be at least {least}, got {value}")
    if healthy + emergency == 0:
        raise PhantomError("nothing to make: give --healthy N, --emergency N or both, above 0")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise PhantomError(f"--kinds expects one or more of {','.join(KINDS)}, got {','.join(unknown) or 'none'}")
    if len(set(kinds)) < len(kinds):
        raise PhantomError(f"--kinds {','.join(kinds)}: names a kind twice")


def code_hash() -> str:
    """Of the sources that decide what a phantom looks like."""
    folder = Path(__file__).resolve().parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


def _claim(out: Path, settings: dict) -> None:
    """Make the folder this cohort's, or see that it is."""
    path = out / "phantom.json"
    if out.exists() and not out.is_dir():
        raise PhantomError(f"--out {out}: a file; give a folder")
    if not path.is_file():
        if out.exists() and any(out.iterdir()):
            raise PhantomError(f"--out {out}: holds other files and no phantom.json; give a new folder")
        for folder in ("scans", "masks"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        _replace_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PhantomError(f"{path}: cannot be read ({error}); give a new folder for --out") from error
    other = [f"{key} {found.get(key)!r}, not {value!r}" for key, value in settings.items() if found.get(key) != value]
    if other:
        raise PhantomError(f"--out {out}: holds a cohort made with {'; '.join(other)}; give a new folder, or the "
                           "settings (and the version of the phantom) that it was made with")


def _run(jobs: list[Job], workers: int) -> Iterable[tuple[Job, dict, list[dict], float]]:
    """write_phantom for every job, as they finish."""
    if not jobs:
        return
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"        # of the workers, which share the cores; read when they start
    spawn = get_context("spawn")               # not fork: PyTorch's threads do not survive it
    with ProcessPoolExecutor(min(workers, len(jobs)), spawn, torch.set_num_threads, (1,)) as pool:
        try:
            running = {pool.submit(write_phantom, job): job for job in jobs}
            for future in as_completed(running):
                yield running[future], *future.result()
        except BrokenProcessPool as error:
            raise PhantomError("a worker process was killed, out of memory most likely: use fewer --workers "
                               "(about 1.5 GB each), and run the same command again to go on") from error
        finally:
            pool.shutdown(cancel_futures=True)
            os.environ.pop("OMP_NUM_THREADS")  # what the caller starts later takes the cores that it took before
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before


def write_phantom(job: Job) -> tuple[dict, list[dict], float]:
    """Make one scan and write its files; its row of labels.csv, its rows of slices.csv, the seconds it took.

    Files get their names when they are complete.
    """
    started = time.perf_counter()
    phantom = make(job.kind, job.seed, job.scan_id)
    partial, partial_mask = (path.with_name(f".partial-{path.name}") for path in (job.path, job.mask_path))
    for old in (partial, job.path):
        if old.is_dir():
            shutil.rmtree(old)
    with full_disk_named(job.path):
        if job.nifti:
            write_nifti(partial, phantom.scan.hu, phantom.scan, np.int16)
        else:
            write_dicom(partial, phantom.scan, (job.kind, job.seed))
        write_nifti(partial_mask, phantom.truth, phantom.scan)
    os.replace(partial_mask, job.mask_path)
    os.replace(partial, job.path)
    types = job.kind or ""
    facts = {key: _plain(value) for key, value in phantom.facts.items()}
    label = {"scan_id": job.scan_id, "label": str(int(job.kind is not None)), "types": types, "seed": str(job.seed)}
    holds = phantom.truth.any(axis=(1, 2))
    rows = [{"scan_id": job.scan_id, "slice": str(s), "label": str(int(held)), "types": types if held else ""}
            for s, held in enumerate(holds)]
    return label | facts, rows, time.perf_counter() - started


def _plain(value) -> str:
    """A fact as a cell of a table: numbers with four digits after the point at most."""
    return f"{round(float(value), 4):g}" if isinstance(value, (float, np.floating)) else str(value)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if value != "" or key in LABEL_COLUMNS}
                for row in csv.DictReader(file)]


def _write_rows(path: Path, columns: Sequence[str], rows: list[dict[str, str]]) -> None:
    """Rows in the order of their ids; further columns in the order of the alphabet. All at once, or not at all."""
    others = sorted({key for row in rows for key in row} - set(columns))
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*columns, *others), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["scan_id"], int(row.get("slice", 0)))))
    os.replace(partial, path)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# ---- the command

def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--healthy", type=int, default=0, metavar="N", help="healthy scans (default 0)")
    p.add_argument("--emergency", type=int, default=0, metavar="N",
                   help="scans with an emergency, the kinds in turn (default 0)")
    p.add_argument("--seed", type=int, required=True, help="of the cohort")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new, or of an interrupted run")
    p.add_argument("--nifti", action="store_true", help="NIfTI instead of DICOM series")
    p.add_argument("--kinds", type=lambda text: tuple(k.strip() for k in text.split(",")), default=KINDS,
                   metavar="A,B", help=f"emergencies to make (default: {', '.join(KINDS)})")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                   help="scans made at a time (default: one a CPU core)")
    return p


def write_cohort(args: argparse.Namespace) -> None:
    """Does what the command line says. Raises PhantomError, OSError."""
    started = time.perf_counter()
    made = make_cohort(args.healthy, args.emergency, args.seed, args.out, kinds=args.kinds, nifti=args.nifti,
                       workers=args.workers, log=lambda line: print(line, flush=True))
    print(f"{made} scans made in {time.perf_counter() - started:.0f} s; {args.out / 'scans'}, {args.out / 'masks'}, "
          f"{args.out / 'labels.csv'}, {args.out / 'slices.csv'}")


def main(argv: list[str] | None = None) -> int:
    return exit_code(write_cohort, parser().parse_args(argv), RESUMES)


if __name__ == "__main__":
    sys.exit(main())
