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
wherever they lie, and no output names its files or folders: SECURITY.md tells how to list which is which. A rerun
skips finished scans; runs into one folder share the work, and the last to finish writes the tables.
Exit codes: 0 done, 2 wrong usage, 3 some scans failed (rows with a reason) or are absent (named: of merge, or their
files changed meanwhile), 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP: temporary files are removed, and the
same command goes on.
Not a medical device: for research only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common.imports import quick_imports
from common.stopping import Terminated, orderly_end
from common.version import VERSION
from ct.settings import UNKNOWN_SLICE_SPACING_MM, PreprocessSettings

if TYPE_CHECKING:                         # what takes seconds to import, functions import: --help needs none of it
    from ct.read import ScanSource
    from detect import Bundle, Projector, Settings
    from detect.outputs import Writer
    from detect.result import Result
    from detect.run import Run


def merge(argv: list[str]) -> int:
    """The command `projector.py merge OUT`."""
    parser = argparse.ArgumentParser(prog="projector.py merge", description="Tables and report of a folder of results, "
                                     "from the results of all parts that are in it. Parts that never began and scans "
                                     "without a result are named (exit code 3).")
    parser.add_argument("out", type=Path, help="results folder")
    out = parser.parse_args(argv).out
    from detect.jobs import say
    from detect.run import merge as merge_results

    try:
        results, missed, others = merge_results(out)
    except (OSError, ValueError) as error:
        say(f"error: {error}", sys.stderr)
        return 2
    if others:
        say(f"also in the tables: {others}")
    for words in missed:
        say(f"not in the tables: {words}", sys.stderr)
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
    add("--unknown-slice-spacing-mm", type=float, default=UNKNOWN_SLICE_SPACING_MM,
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


def load(args: argparse.Namespace) -> tuple[Projector, dict[str, Writer]]:
    """The model with its settings, and what is written of a scan."""
    with quick_imports():
        import distributed
        from detect.bundle import load_bundle
        from detect.dicom_out import dicom_writer
        from detect.outputs import DICOM, DICOM_NO_PHI, OUTPUTS
        from detect.projection import Projector
        from op import memory, set_impl

    memory.keep_freed()
    set_impl(args.ops)
    bundle = load_bundle(args.model, distributed.pick_device(args.device), args.precision)
    projector = Projector(bundle, *resolve(bundle, args), args.threshold, args.alarm_rate)
    writers = dict(OUTPUTS)
    if args.dicom_out:
        writers[DICOM_NO_PHI if args.no_phi else DICOM] = dicom_writer(projector, not args.no_phi)
    return projector, writers


def make_run(args: argparse.Namespace, sources: list[ScanSource],
             loaded: tuple[Projector, dict[str, Writer]] | None = None) -> Run:
    """The run of these scans; loaded: what load() has given, loaded anew where this is another process of it."""
    from detect.run import Run

    return Run(*(loaded or load(args)), sources, args.out, bool(args.part), args.overwrite)


@orderly_end()
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["merge"]:
        return merge(argv[1:])
    args = parse(argv)
    started = time.perf_counter()

    with quick_imports():
        import torch

        import distributed
        from common.machine import usable_cores
        from common.time_zone import check_time_zone
        from ct.read import find_all
        from detect.folder import further_results, remove_leftovers
        from detect.jobs import say
        from detect.processes import suitable
        from detect.run import begin_report, run_report

    threads = torch.get_num_threads()
    try:
        loaded = load(args)
        found = find_all(args.scans, args.unknown_slice_spacing_mm, args.ids, say)
        if args.dicom_out and any(source.kind == "dicom" for source in found):
            check_time_zone()
        number, count = args.part or (0, 1)
        sources = found[number::count]
        if args.part:
            say(f"part {number} of {count} of {len(found)} scans; all of them: --part 0/1")
        run = make_run(args, sources, loaded)
        run.begin(args.scans, found, number, count)
        rank, ranks = distributed.launched()
        if ranks > 1 and args.jobs:
            raise ValueError("--jobs: torchrun has started processes already; give one of the two")
        if not args.jobs:
            on_cpu = run.projector.bundle.reconstructor.device.type == "cpu"
            args.jobs = suitable(len(run.collect()[1])) if on_cpu and ranks == 1 else 1

        torch.set_num_threads(max(1, min(threads, usable_cores()) // args.jobs))
        report = run_report(run.projector, args.jobs * ranks)
        begin_report(args.out, report)
        if args.jobs > 1:
            run.share_out(args.jobs, functools.partial(make_run, args, sources))
        else:
            run.project(range(rank, len(sources), ranks), tables=ranks == 1)
        results, missing, changed = run.finish(tables=ranks == 1)
        if changed:
            say(f"not in the tables: {len(changed)} scans whose files changed while they were projected, also the "
                f"second time: {', '.join(changed)}; run this again when they are written", sys.stderr)
        if missing:                       # no waiting: the run that finishes last finds nothing missing
            say(f"{len(missing)} scans are not finished by other runs, such as {missing[0]}; the last run writes the "
                f"tables. Should it be gone: run this again, or projector.py merge {args.out}")
            # torchrun would stop the other ranks for it; the result is marked, and the last run or merge tells
            return 3 if changed and ranks == 1 else 0
        if args.part:
            say(f"part {number} of {count}: {len(results)} scans are done; when all parts are: "
                f"projector.py merge {args.out}")
        elif results:                     # none where all scans have changed, which was told
            results = run.write_all(results, report, time.perf_counter() - started)
            if others := further_results(args.out, results, changed):
                say(f"not in the tables: {others}")
            remove_leftovers(args.out)
    except (OSError, ValueError) as error:
        say(f"error: {error}", sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        say("stopped; the same command goes on with the scans that are left", sys.stderr)
        return stop.code if isinstance(stop, Terminated) else 130
    finally:
        torch.set_num_threads(threads)                       # whoever calls main() from Python keeps theirs
    return 3 if changed else exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
