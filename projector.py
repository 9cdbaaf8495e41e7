"""Project head-CT scans: for every slice the closest normal image, maps of what differs, and scores.

    python projector.py SCANS [SCANS ...] --model models/ct-ich-128 --out results
    torchrun --nproc-per-node=4 projector.py SCANS --model models/ct-ich-128 --out results

SCANS is a folder that is searched for DICOM series, NIfTI files and folders of slices, or one such scan. Writes

    scores.csv, slices.csv      one row per scan, highest score first: the worklist; one row per slice
    report.html                 all of it to look at, in one file
    run.json                    versions, weights, settings, seconds
    SCAN/*.nii.gz               reconstruction, residual (HU), anomaly (surprise, or votes times residual), mask,
                                brain: in the scan's own geometry
    SCAN/overlay/NN.png         query, closest normal, residual, mask; NN counts the scan's slices from below
    SCAN/dicom/*.dcm            for scans read from DICOM: report, segmentation, map, key objects, pictures of the key
                                slices (docs/DICOM.md); with the source's patient data, unless --no-phi

A rerun skips finished scans. Exit codes: 0 done, 2 wrong usage, 3 some scans failed (rows with a reason).
Not a medical device: for research only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

import distributed
from ct.frame import PreprocessSettings
from ct.read import find_all
from detect.bundle import Bundle, load_bundle, versions
from detect.dicom_out import dicom_writer
from detect.folder import make_writable, project_all, refuse_other_results
from detect.measure import SCAN_SCORES
from detect.outputs import OUTPUTS, write_tables
from detect.projection import Projector
from detect.report import write_report
from detect.settings import Settings
from op import memory, set_impl
from version import VERSION


def run_report(projector: Projector, done: list[dict], failed: list[dict], seconds: float) -> dict:
    """What ran on what with which weights, and the healthy scores it may be held against: JSON."""
    bundle = projector.bundle
    stages: dict[str, float] = {}
    for d in done:
        for stage, value in d["seconds"].items():
            stages[stage] = stages.get(stage, 0) + value / len(done)
    return {
        "weights_sha256": bundle.weights_hash, "model": bundle.meta["provenance"],
        "settings": projector.settings.to_json(), "preprocessing": projector.preprocessing.to_json(),
        "calibration": projector.calibration, "threshold": projector.threshold,
        "scans": len(done), "failed": len(failed), "seconds": seconds,
        "seconds_per_scan_by_stage": stages, "device": str(bundle.reconstructor.device),
        "precision": str(bundle.reconstructor.precision).removeprefix("torch."), "threads": torch.get_num_threads(),
        "ranks": distributed.get_world_size(),
        "versions": versions() | {"python": platform.python_version(), "torch": torch.__version__,
                                  "numpy": np.__version__},
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scans", nargs="*", type=Path, help="folder that holds scans, or one scan; of several, each scan's id begins "
        "with its input's name (--query_save_path, the original's name for one folder, works, too)")
    add("--query_save_path", dest="query", type=Path, help=argparse.SUPPRESS)
    add("--version", action="version", version=f"CN-StyleGAN {VERSION}")
    add("--model", type=Path, required=True, help="model bundle made by latent_stats.py")
    add("--out", type=Path, default=Path("results"), help="results folder (default: %(default)s)")
    add("--overwrite", action="store_true", help="project again what other settings have projected")
    add("--preset", choices=("model", "published"), default="model",
        help="the settings that the model is calibrated for, or the published search (100 + 100 steps) and votes with "
             "this model's distance, then mostly without percentiles (default: %(default)s)")
    add("--scan-score", choices=list(SCAN_SCORES), help="how slice scores become the scan's (default: the model's)")
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
    add("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own (default: %(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"),
        help="of the networks (default: bf16 where the device is good at it)")
    args = parser.parse_args(argv)
    if bool(args.scans) == (args.query is not None):
        parser.error("give SCANS, the folder that holds the scans, or --query_save_path")
    if args.slab_mm is not None and not args.slab_mm > 0:
        parser.error(f"--slab-mm must be above 0, got {args.slab_mm:g}")
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


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    started = time.perf_counter()
    try:
        memory.keep_freed()
        set_impl(args.ops)
        device = distributed.pick_device(args.device)
        distributed.init(device)
        bundle = load_bundle(args.model, device, args.precision)
        projector = Projector(bundle, *resolve(bundle, args), args.threshold, args.alarm_rate)
        writers = dict(OUTPUTS)
        if args.dicom_out:
            writers["dicom without patient" if args.no_phi else "dicom"] = dicom_writer(projector, not args.no_phi)
        sources = find_all(args.scans, args.unknown_slice_spacing_mm)
        make_writable(args.out)
        if not args.overwrite:
            refuse_other_results(args.out, sources, projector.key())
        distributed.barrier()
        done, failed = project_all(projector, sources, args.out, writers)
        if distributed.is_main():
            write_tables(args.out, done, failed)
            facts = run_report(projector, done, failed, time.perf_counter() - started)
            (args.out / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            page = write_report(args.out, args.out / "report.html")
            print(f"{len(done)} scans projected, {len(failed)} failed: {args.out / 'scores.csv'}, {page}", flush=True)
        distributed.barrier()             # torchrun stops all ranks when the first ends with 3: not before the tables
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the scans that are left", file=sys.stderr)
        return 130
    finally:
        distributed.cleanup()
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
