"""A model bundle with other settings, calibrated anew on the healthy scans that a database holds out.

    python benchmarks/recalibrate.py --model models/phantom-128 --data scans.lmdb --out runs/phantom-128
    python benchmarks/recalibrate.py --model models/head-128 --data scans.lmdb --set read=0 filter=band --out runs/band

For comparisons by one calibration (--beside of the other benchmarks). The networks must not have been trained on these
scans: a bundle does not say which ones it has seen, so this is for you to know; a reader that was taught in folds of
them is refused unless --set read=0 leaves it out. Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

import distributed  # noqa: E402
from benchmarks import compare  # noqa: E402
from config import exit_code  # noqa: E402
from dataset import SliceDataset  # noqa: E402
from detect.bundle import load_bundle, save_bundle  # noqa: E402
from detect.calibration import Fold, calibrate  # noqa: E402
from detect.measure import MEASURES  # noqa: E402


def recalibrate(args: argparse.Namespace) -> int:
    """Writes the bundle; returns the exit code. Raises ValueError, CheckpointError and DatasetError."""
    bundle, held_out = load_bundle(args.model, distributed.pick_device(args.device)), SliceDataset(args.data, "val")
    bundle, provenance = bundle.with_settings(bundle.settings.changed(args.changes)), bundle.meta["provenance"] or {}
    if compare.is_taught(bundle.meta):
        if getattr(bundle.settings.scoring, "read", 0):
            raise ValueError(f"--model {args.model}: its reader has learnt from healthy scans that calibrate it, and "
                             "would find too little in them: leave it out with --set read=0, or make the model anew "
                             "with latent_stats.py and all its --reader")
        bundle.reconstructor.reader = None
        provenance = {key: value for key, value in provenance.items() if key not in ("reader", "readers")}
    if held_out.size != bundle.reconstructor.size:
        raise ValueError(f"--data {args.data}: slices of {held_out.size} pixels, --model {args.model} takes "
                         f"{bundle.reconstructor.size}")
    settings = bundle.settings
    calibration, measure = calibrate([Fold(bundle.reconstructor, held_out)],
                                     MEASURES[settings.measure](settings.scoring, settings.mask), compare.say)
    provenance = provenance | {
        "name": args.out.name, "held_out": {key: held_out.manifest[key] for key in ("digest", "counts")}}
    meta = {"preprocessing": held_out.manifest["settings"], "calibration": calibration, "provenance": provenance}
    save_bundle(args.out, bundle.reconstructor, settings, meta, measure.normal)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model bundle")
    add("--data", type=Path, required=True, help="database whose held-out scans calibrate it")
    add("--set", dest="changes", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="other settings, as projector.py takes them")
    add("--out", type=Path, required=True, help="folder of the new bundle")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return exit_code(recalibrate, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
