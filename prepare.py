"""Folders of scans to one LMDB file of standardised slices, split by patient.

    python prepare.py SCANS [SCANS ...] --out healthy.lmdb --size 256
    python prepare.py SCANS [SCANS ...] --out own.lmdb --like models/head-128 --val-fraction 1
    python prepare.py SCANS [SCANS ...] --out teach.lmdb --like models/head-128 --teach

SCANS are folders with DICOM series, NIfTI files, or folders of PNG or JPEG slices with a scan.json beside
them. Every scan is brought to slabs of one thickness, its brain is found, and the head is centred, turned
upright and scaled. Slices with too little brain are left out. The file is complete or not there at all.

A folder whose scan.json says "loose": true holds single slices of many people (ct/loose.py): each is prepared for
itself and goes into training, never into statistics by position, calibration or validation.

With --like slices are those that a model takes; latent_stats.py then calibrates it on the validation scans. With
--teach they are those that its networks learn from (train_encoder.py --init), which may have fewer HU.

Exit codes: 0 all done; 2 wrong usage or nothing to write; 3 some scans failed (named, the rest done); 130 stopped by
Ctrl-C, 143 by SIGTERM, 129 by SIGHUP (nothing is written, temporary files are removed).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from common.stopping import Terminated, orderly_end
from ct.settings import UNKNOWN_SLICE_SPACING_MM, PreprocessSettings, StandardiseSettings

OF_SETTINGS = ("size", "slab-mm", "hu-clip", "bone-apart", "min-brain-fraction", "max-below-vertex-mm")
OF_DRAWN_SPLIT = ("val-fraction", "seed")
BASE = PreprocessSettings()
# Not argparse's: a flag that is given with its default's value must be known to be given
DEFAULTS = {"size": BASE.standardise.size, "slab_mm": BASE.slab_mm, "bone_apart": BASE.standardise.bone_apart,
            "min_brain_fraction": BASE.min_brain_fraction, "max_below_vertex_mm": BASE.max_below_vertex_mm,
            "val_fraction": 0.15, "seed": 0}


def parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    p.add_argument("scans", nargs="+", metavar="SCANS", help="folders of scans, searched at any depth")
    p.add_argument("--out", required=True, metavar="FILE", help="the database to write, e.g. healthy.lmdb")
    p.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                   help="scans prepared at a time (default: one a CPU core)")
    p.add_argument("--ids", choices=("path", "uid"), default="path",
                   help="name scans after their place under SCANS, or by a hash of the series UID or, without one, of "
                        "the files, wherever they lie (default %(default)s)")

    group = p.add_argument_group("the slices")
    group.add_argument("--like", type=Path, metavar="MODEL",
                       help="as this model bundle takes them, in place of --" + ", --".join(OF_SETTINGS))
    group.add_argument("--teach", action="store_true",
                       help="with --like: as its networks' own training slices were, to teach them on")
    group.add_argument("--size", type=int, metavar="N",
                       help=f"pixels of a slice's side (default {DEFAULTS['size']})")
    group.add_argument("--slab-mm", type=float, metavar="MM",
                       help=f"slices thinner than {BASE.thin_mm:g} mm are averaged to this ({DEFAULTS['slab_mm']:g})")
    group.add_argument("--unknown-slice-spacing-mm", type=float, default=UNKNOWN_SLICE_SPACING_MM, metavar="MM",
                       help="assumed, and noted, where a scan does not tell (default %(default)g; 0: refuse)")
    group.add_argument("--hu-clip", type=float, nargs=2, metavar=("LOW", "HIGH"),
                       help="HU range kept (default: the part of -20..180 that no scan's source has clipped)")
    group.add_argument("--bone-apart", action="store_true", default=None,
                       help="pixels across the edge of a bone show their soft tissue alone: thin blood under the skull "
                            "would else be lost in the mean")
    group.add_argument("--min-brain-fraction", type=float, metavar="F",
                       help="leave out slices with less brain than this part of the frame "
                            f"({DEFAULTS['min_brain_fraction']:g})")
    group.add_argument("--max-below-vertex-mm", type=float, metavar="MM",
                       help="leave out slices further below the top of the brain (default "
                            f"{DEFAULTS['max_below_vertex_mm']:g})")
    group.add_argument("--slices", metavar="FILE.csv",
                       help="columns scan_id, slice (0: the most inferior): keep only these, of these scans; "
                            "loose slices are kept as they are")
    group.add_argument("--leave-out", metavar="FILE.csv",
                       help="columns scan_id, slice (empty: the whole scan): leave these out; wins over --slices. A "
                            "loose slice is FOLDER-FILE, slice 0")

    group = p.add_argument_group("the split into training and validation")
    group.add_argument("--patients", metavar="FILE.csv",
                       help="columns scan_id, patient (default: by PatientID, study and series of DICOM; every other "
                            "scan is a patient of its own)")
    group.add_argument("--val-fraction", type=float, metavar="F",
                       help="part of the patients kept for validation; 0: none, 1: all (default "
                            f"{DEFAULTS['val_fraction']:g})")
    group.add_argument("--seed", type=int, help=f"draws the patients (default {DEFAULTS['seed']})")
    group.add_argument("--split", metavar="FILE.csv",
                       help="columns scan_id, split (train or val): use this split, and draw none")
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with code 2 where a value cannot be meant; fills in DEFAULTS."""
    for flag, says, others in (("like", "how slices are prepared", OF_SETTINGS),
                               ("split", "who is held out", OF_DRAWN_SPLIT)):
        given = [f"--{other}" for other in others if getattr(args, other.replace("-", "_")) is not None]
        if (value := getattr(args, flag)) and given:
            p.error(f"--{flag} {value}: says {says}; leave out {', '.join(given)}")
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for flag, value in (("--size", args.size), ("--slab-mm", args.slab_mm), ("--workers", args.workers),
                        ("--max-below-vertex-mm", args.max_below_vertex_mm)):
        if not 0 < value < math.inf:
            p.error(f"{flag} must be above 0 and finite, got {value:g}")
    if not 0 <= args.unknown_slice_spacing_mm < math.inf:
        p.error("--unknown-slice-spacing-mm must be above 0 and finite, or 0 to refuse such scans, got "
                f"{args.unknown_slice_spacing_mm:g}")
    if not 0 <= args.val_fraction <= 1:
        p.error(f"--val-fraction must be from 0 to 1, got {args.val_fraction:g}")
    if args.seed < 0:
        p.error(f"--seed must be 0 or more, got {args.seed}")
    if args.hu_clip and not -math.inf < args.hu_clip[0] < args.hu_clip[1] < math.inf:
        p.error(f"--hu-clip expects LOW below HIGH, both finite, got {args.hu_clip[0]:g} {args.hu_clip[1]:g}")
    if not 0 <= args.min_brain_fraction < 1:
        p.error(f"--min-brain-fraction must be at least 0 and below 1, got {args.min_brain_fraction:g}")
    if args.teach and not args.like:
        p.error("--teach: of which model's networks? Give --like MODEL")


def prepare(args: argparse.Namespace) -> int:
    """Does what the command line says; returns the exit code."""
    from ct.scan import printable
    from gan.database import Tables, build_lmdb

    if args.like:
        settings = preprocessing_of(args.like, args.teach)
        hu_clip = settings.standardise.hu_clip
    else:
        settings = PreprocessSettings(StandardiseSettings(size=args.size, bone_apart=args.bone_apart),
                                      slab_mm=args.slab_mm, min_brain_fraction=args.min_brain_fraction,
                                      max_below_vertex_mm=args.max_below_vertex_mm)
        hu_clip = args.hu_clip
    tables = Tables(args.patients, args.split, args.slices, args.leave_out)
    manifest = build_lmdb(args.scans, args.out, settings, hu_clip=hu_clip, val_fraction=args.val_fraction,
                          seed=args.seed, tables=tables,
                          unknown_slice_spacing_mm=args.unknown_slice_spacing_mm, ids=args.ids, workers=args.workers,
                          overwrite=args.overwrite)
    counts = [f"{split} {n['scans']} scans, {n['slices']} slices" + f" ({n['loose']} loose)" * bool(n["loose"])
              for split, n in manifest["counts"].items()]
    print(f"{printable(args.out)}: {'; '.join(counts)}; {Path(args.out).stat().st_size / 1e6:.1f} MB")
    for failure in manifest["failed"]:
        print(f"failed: {failure['scan_id']}: {failure['reason']}", file=sys.stderr)
    return 3 if manifest["failed"] else 0


def preprocessing_of(model: Path, teach: bool = False) -> PreprocessSettings:
    """How a model bundle's slices are prepared; teach: those that its networks learn from.

    DatasetError where it is none, or does not say.
    """
    from bundling.origins import taught_with
    from dataset import DatasetError
    from detect.bundle import read_bundle_meta

    try:
        meta, _ = read_bundle_meta(model)
        if meta["preprocessing"] is None:
            raise ValueError(f"{model}: an imported model, which does not say how its slices are prepared; give "
                             f"--{', --'.join(OF_SETTINGS)} as they were")
        if not teach:
            return PreprocessSettings.from_json(meta["preprocessing"])
        if not (found := taught_with(meta)):
            raise ValueError(f"{model} --teach: a model that holds no networks of train_encoder.py, which alone can be "
                             "taught; leave --teach out, or give one that does (checkpoint.py show)")
        return found
    except ValueError as error:
        raise DatasetError(f"--like {error}") from error


@orderly_end()
def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    check(p, args)

    from ct.scan import ScanError  # only now: --help needs none of what takes seconds to import
    from dataset import DatasetError

    try:
        return prepare(args)
    except (DatasetError, ScanError, OSError) as error:
        p.exit(2, f"prepare.py: {error}\n")
    except (KeyboardInterrupt, Terminated) as stop:
        p.exit(stop.code if isinstance(stop, Terminated) else 130, f"prepare.py: stopped; {args.out} is not written\n")


if __name__ == "__main__":
    sys.exit(main())
