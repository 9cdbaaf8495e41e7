"""Sets A and B of slices that differ in disease alone, which a collection of scans seldom gives (healthygan/README.md).

    python -m healthygan.sets halves --data bleeds.lmdb --mixed worse.lmdb --healthy better.lmdb
    python -m healthygan.sets shapes --data loose.lmdb --mixed shapes.lmdb

halves: most lesions lie on one side, and a slice in its frame has its midline upright in the middle. So a slice gives
two: the half with more bright pixels inside its brain, which goes to set A (--mixed), and the half with fewer, which
goes to set B (--healthy), each completed by its mirror image. Both are equally symmetric, of one head, scanner and
height. A slice whose better half has more than --bright of it above --above HU is left out: blood may be on both sides.

shapes: set A is --data with random shapes of another density in every slice (gan/corrupt.py), to be set against --data
itself. They are no model of any disease.

The training split is taken. No label is looked at. Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from config import exit_code
from dataset import ScanRecord, SliceDataset, SliceWriter
from gan.corrupt import draw_shapes

EDGE = 25                                # the outer 1/25 of the frame's side of the brain holds bone's blur
SMOOTH = 3                               # pixels: grain is no blood
BATCH = 32                               # shapes are drawn for so many slices at a time: pieces come from among them


def halves(image: np.ndarray) -> np.ndarray:
    """[N, N] -> [2, N, N]: the left and the right half, each with its mirror image for the other. N is even."""
    left, right = np.split(image, 2, axis=1)
    return np.stack([np.concatenate([left, left[:, ::-1]], 1), np.concatenate([right[:, ::-1], right], 1)])


def bright_share(hu: np.ndarray, brain: np.ndarray, above: float) -> float:
    """Share of the inside of the brain [N, N] that is above `above` HU; infinite where it has no inside."""
    inside = ndimage.binary_erosion(brain, iterations=max(1, len(brain) // EDGE))
    return float((ndimage.uniform_filter(hu.astype(float), SMOOTH)[inside] > above).mean()) if inside.any() else np.inf


def write_halves(args: argparse.Namespace) -> str:
    """Raises DatasetError where a database cannot be read or written, ValueError when no slice is left."""
    slices, taken, left_out = SliceDataset(args.data), 0, 0
    settings = slices.manifest["settings"]
    with (SliceWriter(args.mixed, settings, args.overwrite, "--mixed") as mixed,
          SliceWriter(args.healthy, settings, args.overwrite, "--healthy") as healthy):
        for s in range(len(slices.scan_ids)):
            scan, kept, better, worse = slices.scan(s), [], [], []
            for i, (hu, brain) in enumerate(zip(scan["hu"].numpy(), scan["brain"].numpy())):
                sides = list(zip(halves(hu), halves(brain)))
                shares = [bright_share(*side, args.above) for side in sides]
                if max(shares) < np.inf and min(shares) <= args.bright:
                    kept.append(i)
                    better.append(sides[int(np.argmin(shares))])
                    worse.append(sides[1 - int(np.argmin(shares))])
            taken, left_out = taken + len(kept), left_out + len(scan["hu"]) - len(kept)
            if kept:
                add(healthy, slices, s, kept, *map(np.stack, zip(*better)))
                add(mixed, slices, s, kept, *map(np.stack, zip(*worse)))
        if not taken:
            raise ValueError(f"{args.data}: none of its {left_out} slices has a half with at most {args.bright:g} of "
                             f"its brain above {args.above:g} HU: raise --bright or --above")
    return f"{taken} slices halved, {left_out} left out"


def write_shapes(args: argparse.Namespace) -> str:
    """Raises DatasetError where a database cannot be read or written."""
    slices, rng = SliceDataset(args.data), np.random.default_rng(args.seed)
    low, high = slices.manifest["settings"]["standardise"]["hu_clip"]
    order = rng.permutation(len(slices.scan_ids))
    with SliceWriter(args.mixed, slices.manifest["settings"], args.overwrite, "--mixed") as mixed:
        for part in np.array_split(order, -(-len(order) // BATCH)):
            scans = [slices.scan(int(s)) for s in part]
            hu, brain = (torch.cat([scan[key] for scan in scans]) for key in ("hu", "brain"))
            drawn, _ = draw_shapes(hu.float(), brain, 1.0, rng)
            counts = [len(scan["hu"]) for scan in scans]
            for s, one, its_brain in zip(part, drawn.clamp(low, high).split(counts), brain.split(counts)):
                add(mixed, slices, int(s), range(len(one)), one.numpy(), its_brain.numpy())
    return f"shapes drawn into {len(slices)} slices"


def add(writer: SliceWriter, slices: SliceDataset, scan: int, kept, hu: np.ndarray, brain: np.ndarray) -> None:
    """Writes some slices of a scan, changed, under its id, with their numbers and heights."""
    entry = next(one for one in slices.manifest["scans"] if one["scan_id"] == slices.scan_ids[scan])
    mm = np.array(entry["below_vertex_mm"], float)[list(kept)]
    writer.add(ScanRecord.encode(entry["scan_id"], hu, brain, mm, np.array(entry["slices"])[list(kept)],
                                 entry["source"], tuple(entry["notes"])), "train", entry["patient"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="healthygan.sets", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("halves", "shapes"))
    parser.add_argument("--data", type=Path, required=True, help="database of slices")
    parser.add_argument("--mixed", type=Path, required=True, help="database to write: set A")
    parser.add_argument("--healthy", type=Path, help="halves: database to write: set B")
    parser.add_argument("--above", type=float, default=48, help="halves: what is bright, HU (default %(default)s)")
    parser.add_argument("--bright", type=float, default=0.002,
                        help="halves: the better half's largest share of bright brain (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="shapes: of what is drawn (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace --mixed and --healthy where they exist")
    args = parser.parse_args(argv)
    if (args.what == "halves") != (args.healthy is not None):
        parser.error("--healthy names the second database of 'halves', and is for it alone")
    paths = [path.resolve() for path in (args.data, args.mixed, args.healthy) if path is not None]
    if len(set(paths)) < len(paths):
        parser.error("--data, --mixed and --healthy: one file is named twice; expected a file of its own for each")
    for flag, value in (("--above", args.above), ("--bright", args.bright), ("--seed", args.seed)):
        if not math.isfinite(value) or value < 0 and flag != "--above":
            parser.error(f"{flag} must be a number{'' if flag == '--above' else ' of at least 0'}, got {value:g}")
    return exit_code(lambda args: print({"halves": write_halves, "shapes": write_shapes}[args.what](args)), args)


if __name__ == "__main__":
    sys.exit(main())
