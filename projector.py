"""Project head-CT scans: for every slice the closest normal image, maps of what differs, and scores.

    python projector.py SCANS [SCANS ...] --model models/head-128 --out results
    torchrun --nproc-per-node=4 projector.py SCANS --model models/head-128 --out results
    python projector.py SCANS --model models/head-128 --out results --part 3/1000   # of a job array: docs/SCALE.md
    python projector.py merge results

SCANS is a folder that is searched for DICOM series, NIfTI files and folders of slices, or one such scan. Writes

    scores.csv, slices.csv      one row per scan, highest score first: the worklist; one row per slice
    report.html                 all of it to look at, in one file
    run.json, seconds.csv       versions, weights, settings; seconds per scan
    SCAN/*.nii.gz               reconstruction, residual (HU), anomaly (surprise, or votes times residual), mask,
                                brain: in the scan's own geometry
    SCAN/overlay/NN.png         query, closest normal, residual, mask; NN counts the scan's slices from below
    SCAN/dicom/*.dcm            for scans read from DICOM: report, segmentation, map, key objects, pictures of the key
                                slices (docs/DICOM.md); with the source's patient data, unless --no-phi

A scan is named after its place under SCANS; with --ids uid by a hash of its series UID or, without one, of its files,
wherever they lie. A rerun skips finished scans; runs into one folder share the work, and the last to finish writes the
tables.
Exit codes: 0 done, 2 wrong usage, 3 some scans failed (rows with a reason) or, of merge, are absent (named),
130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP: temporary files are removed, and the same command goes on.
Not a medical device: for research only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import read_object, replace_text
from common.stopping import Terminated, orderly_end
from common.version import VERSION
from ct.settings import PreprocessSettings

if TYPE_CHECKING:                         # what takes seconds to import, functions import: --help needs none of it
    from ct.read import ScanSource
    from detect import Bundle, Projector, Settings
    from detect.outputs import Writer
    from detect.result import Result

TABLES_EVERY_S = 60.0                     # a run of its own keeps its tables so fresh


def run_report(projector: Projector, processes: int) -> dict:
    """What runs on what with which weights, and the healthy scores it may be held against: JSON."""
    import numpy as np
    import torch

    from detect.bundle import versions

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
    if not path.is_file() or read_run(path).get("key") != report["key"]:
        replace_text(path, json.dumps(report | {"seconds": None}, indent=2) + "\n")


def read_run(path: Path) -> dict:
    """A run.json; empty where it is damaged."""
    try:
        return read_object(path)
    except ValueError:
        return {}


def write_all(out: Path, results: list[Result], report: dict, seconds: float) -> None:
    """The tables, run.json and the page."""
    from detect.folder import write_tables
    from detect.report import write_report

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
    print(f"{len(done)} scans projected, {len(results) - len(done)} failed: {out / 'scores.csv'}, {page}", flush=True)


def merge(argv: list[str]) -> int:
    """The command `projector.py merge OUT`."""
    parser = argparse.ArgumentParser(prog="projector.py merge", description="Tables and report of a folder of results, "
                                     "from the results of all parts that are in it. Parts that never began and scans "
                                     "without a result are named (exit code 3).")
    parser.add_argument("out", type=Path, help="results folder")
    out = parser.parse_args(argv).out
    from detect.folder import absent, collect_all, refuse_other_tables, unasked

    try:
        refuse_other_tables(out)
        if not (out / "run.json").is_file():
            raise ValueError(f"{out}: no run.json; give a folder of results of projector.py")
        results = collect_all(out)
        missed, others = absent(out, results), unasked(out, results)
        report = read_run(out / "run.json")
        if results and report.get("key") != results[0].key:
            raise ValueError(f"{out / 'run.json'}: is of a run with another model or calibration, other settings or "
                             "another version of this program than the results, or damaged; start the run that made "
                             "the results again, or the other one with --overwrite until it is done")
        write_all(out, results, report, sum(r.scan["seconds"] for r in results if r.ok))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if others:
        print(f"also in the tables: {others}")
    for words in missed:
        print(f"not in the tables: {words}", file=sys.stderr)
    return 3 if missed else exit_code(results)


def exit_code(results: list[Result]) -> int:
    return 0 if all(result.ok for result in results) else 3


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scans", nargs="*", type=Path, help="folder that holds scans, or one scan; of several, each scan's id begins "
        "with its input's name (--query_save_path, the original's name for one folder, works, too)")
    add("--query_save_path", dest="query", type=Path, help=argparse.SUPPRESS)
    add("--ids", choices=("path", "uid"), default="path", help=argparse.SUPPRESS)         # told above the options
    add("--version", action="version", version=f"CN-StyleGAN {VERSION}")
    add("--model", type=Path, required=True, help="model bundle made by latent_stats.py")
    add("--out", type=Path, default=Path("results"), help="results folder (default: %(default)s)")
    add("--overwrite", action="store_true", help="project again what other settings have projected, and "
        "replace results of other scans of the same ids")
    add("--preset", choices=("model", "published"), default="model",
        help="the settings that the model is calibrated for, or the published search (100 + 100 steps) and votes with "
             "this model's distance, then mostly without percentiles (default: %(default)s)")
    add("--scan-score", metavar="NAME", help="how slice scores become the scan's, such as top3; checkpoint.py show "
        "MODEL lists them (default: the model's)")
    add("--set", dest="changes", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="other values for settings of the model, such as surprise_mask=2.5 batch=8; checkpoint.py show MODEL "
             "lists them")
    add("--dicom-out", action=argparse.BooleanOptionalAction, default=True,
        help="write DICOM objects for the scans read from DICOM (default: yes)")
    add("--no-phi", action="store_true",
        help="copy no patient data to the DICOM objects: they join the study by its UID alone")
    alarm = parser.add_mutually_exclusive_group()
    alarm.add_argument("--threshold", type=float, help="flag the scans that score higher (default: the model's)")
    alarm.add_argument("--alarm-rate", type=float, metavar="SHARE",
                       help="flag at the threshold that healthy scans exceed with this probability at most, by the "
                            "model's calibration, such as 0.05")
    add("--slab-mm", type=float, help="thickness that thin slices are averaged to (default: the model's)")
    add("--unknown-slice-spacing-mm", type=float, default=5.0,
        help="taken (and noted) where a scan does not tell its slice spacing; 0 refuses such scans (default: "
             "%(default)s)")
    add("--default-preprocessing", action="store_true",
        help="for an imported bundle, which has none of its own: standardise as for training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--jobs", type=int, metavar="N", help="processes that share the scans and the cores (default: on a CPU one a "
        "core, as far as memory and the number of scans go; else 1)")
    add("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own (default: %(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"),
        help="of the networks (default: bf16 where the device is good at it)")
    add("--part", type=part, metavar="I/N", default=part_of_job_array(),
        help="project every N-th scan from the I-th on (from 0), into sub-folders; `projector.py merge OUT` then makes "
             "the tables (default: from SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, where set)")
    args = parser.parse_args(argv)
    if bool(args.scans) == (args.query is not None):
        parser.error("give SCANS, the folder that holds the scans, or --query_save_path")
    if args.slab_mm is not None and not 0 < args.slab_mm < math.inf:
        parser.error(f"--slab-mm must be above 0, got {args.slab_mm:g}")
    if not 0 <= args.unknown_slice_spacing_mm < math.inf:
        parser.error(f"--unknown-slice-spacing-mm must be at least 0, got {args.unknown_slice_spacing_mm:g}")
    if args.threshold is not None and not math.isfinite(args.threshold):
        parser.error(f"--threshold must be a finite score, got {args.threshold:g}")
    if args.alarm_rate is not None and not 0 < args.alarm_rate < 1:
        parser.error(f"--alarm-rate must lie between 0 and 1, got {args.alarm_rate:g}")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    args.scans = args.scans or [args.query]
    return args


def resolve(bundle: Bundle, args: argparse.Namespace) -> tuple[Settings, PreprocessSettings]:
    """The bundle's settings with the given ones over them. Raises ValueError where the bundle lacks its own."""
    settings = bundle.published() if args.preset == "published" else bundle.settings
    if args.scan_score:
        settings = settings.replace(scan_score=args.scan_score)
    settings = settings.changed(args.changes)
    preprocessing = bundle.preprocessing
    if preprocessing is None and args.default_preprocessing:
        preprocessing = PreprocessSettings()
        standard = dataclasses.replace(preprocessing.standardise, size=bundle.reconstructor.size)
        preprocessing = dataclasses.replace(preprocessing, standardise=standard)
    if preprocessing is None:
        raise ValueError(f"--model {args.model}: an imported bundle does not say how its scans were prepared; "
                         "give --default-preprocessing to standardise them as ours")
    if args.slab_mm is not None:
        preprocessing = dataclasses.replace(preprocessing, slab_mm=args.slab_mm)
    return settings, preprocessing


def part(text: str) -> tuple[int, int]:
    """'3/1000' as numbers, for --part."""
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal() or int(number) >= int(count):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(number), int(count)


def part_of_job_array() -> str | None:
    """The part of a SLURM array 0-N, 1-N or 0-N:2; anything else gives one that is refused."""
    number, count = (os.environ.get(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT"))
    first, step = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", value)) for name, value in (("MIN", 0), ("STEP", 1)))
    return f"{(int(number) - first) / step:g}/{count}" if number and count else None


def build(args: argparse.Namespace) -> tuple[Projector, dict[str, Writer]]:
    """The model with its settings, and what is written of a scan."""
    import distributed
    from detect.bundle import load_bundle
    from detect.dicom_out import dicom_writer
    from detect.outputs import OUTPUTS
    from detect.projection import Projector
    from op import memory, set_impl

    memory.keep_freed()
    set_impl(args.ops)
    bundle = load_bundle(args.model, distributed.pick_device(args.device), args.precision)
    projector = Projector(bundle, *resolve(bundle, args), args.threshold, args.alarm_rate)
    writers = dict(OUTPUTS)
    if args.dicom_out:
        writers["dicom without patient" if args.no_phi else "dicom"] = dicom_writer(projector, not args.no_phi)
    return projector, writers


def project(args: argparse.Namespace, projector: Projector, writers: dict[str, Writer], sources: list[ScanSource],
            numbers: Iterable[int], tables: Callable[[], None] | None = None) -> None:
    """Project those of `sources`; now and then, and where it is interrupted, write the tables of what is done."""
    from detect.jobs import project_all

    written = time.perf_counter()
    try:
        for _ in project_all(projector, sources, args.out, writers, bool(args.part), numbers, args.overwrite):
            if tables and time.perf_counter() - written > TABLES_EVERY_S:
                tables()
                written = time.perf_counter()
    except (KeyboardInterrupt, Terminated):
        if tables:
            tables()
        raise


def share_in(args: argparse.Namespace, threads: int, sources: list[ScanSource], numbers: Iterable[int]) -> None:
    """What each further process of --jobs does. Errors are the first one's to tell: it finds what is left undone."""
    import torch

    torch.set_num_threads(threads)
    try:
        project(args, *build(args), sources, numbers)
    except (OSError, ValueError) as error:
        sys.exit(f"one of {args.jobs} processes: {error}")


def share_out(args: argparse.Namespace, projector: Projector, writers: dict[str, Writer], sources: list[ScanSource],
              tables: Callable[[], None]) -> None:
    """Project all of `sources` by args.jobs processes; this is the first, and does what one that dies leaves undone."""
    import torch

    from detect.folder import collect
    from detect.processes import shared

    failed = {result.scan["scan_id"]: result.written
              for result in collect(args.out, sources, projector.key(), writers)[0] if not result.ok}
    with shared(args.jobs, len(sources), share_in, args, torch.get_num_threads(), sources) as turns:
        project(args, projector, writers, sources, turns, tables)
    if turns.died:
        results, missing = collect(args.out, sources, projector.key(), writers)
        untried = [result.scan["scan_id"] for result in results
                   if not result.ok and failed.get(result.scan["scan_id"]) == result.written]
        undone = {*missing, *untried}
        numbers = [number for number, source in enumerate(sources) if source.scan_id in undone]
        project(args, projector, writers, sources, numbers, tables)


@orderly_end()
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["merge"]:
        return merge(argv[1:])
    args = parse(argv)
    started = time.perf_counter()

    import torch

    import distributed
    from ct.read import find_all
    from detect.folder import (
        collect,
        further,
        make_writable,
        note_part,
        refuse_other_files,
        refuse_other_results,
        remove_leftovers,
        write_tables,
    )
    from detect.processes import suitable

    threads = torch.get_num_threads()
    try:
        projector, writers = build(args)
        found = find_all(args.scans, args.unknown_slice_spacing_mm, args.ids)
        number, count = args.part or (0, 1)
        sources = found[number::count]
        if args.part:
            print(f"part {number} of {count} of {len(found)} scans; all of them: --part 0/1", flush=True)
        make_writable(args.out)
        refuse_other_files(args.out, sources, bool(args.part))
        if not args.overwrite:
            refuse_other_results(args.out, sources, projector.key())
        note_part(args.out, args.scans, found, number, count)
        rank, ranks = distributed.launched()
        if ranks > 1 and args.jobs:
            raise ValueError("--jobs: torchrun has started processes already; give one of the two")
        if not args.jobs:
            undone = len(collect(args.out, sources, projector.key(), writers)[1])
            on_cpu = projector.bundle.reconstructor.device.type == "cpu"
            args.jobs = suitable(undone) if on_cpu and ranks == 1 else 1

        def tables():
            if not args.part:
                write_tables(args.out, collect(args.out, sources, projector.key(), writers)[0])

        torch.set_num_threads(max(1, threads // args.jobs))
        report = run_report(projector, args.jobs * ranks)
        begin_report(args.out, report)
        if args.jobs > 1:
            share_out(args, projector, writers, sources, tables)
        else:
            numbers = range(rank, len(sources), ranks)
            project(args, projector, writers, sources, numbers, tables if ranks == 1 else None)
        results, missing = collect(args.out, sources, projector.key(), writers)
        if missing:                       # no waiting: the run that finishes last finds nothing missing
            print(f"{len(missing)} scans are not finished by other runs, such as {missing[0]}; the last run writes the "
                  f"tables. Should it be gone: run this again, or projector.py merge {args.out}", flush=True)
            return 0
        if args.part:
            print(f"part {number} of {count}: {len(results)} scans are done; when all parts are: "
                  f"projector.py merge {args.out}", flush=True)
        else:
            write_all(args.out, results, report, time.perf_counter() - started)
            if others := further(args.out, results):
                print(f"not in the tables: {others}")
            remove_leftovers(args.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        print("stopped; the same command goes on with the scans that are left", file=sys.stderr)
        return stop.code if isinstance(stop, Terminated) else 130
    finally:
        torch.set_num_threads(threads)                       # whoever calls main() from Python keeps theirs
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
