"""How much of a pasted lesion the lesion mask holds, and what it marks in the same heads when they are healthy.

    python benchmarks/lesion_mask.py --model models/head-128 --data scans.lmdb --every 2 --out runs/lesion-mask \\
        --row surprise_mask=3 extent_hu=0 --row surprise_mask=3

The held-out scans, as they are and with the first lesion of each kind of pasted.py in them, are reconstructed once, by
the bundle with its own settings and calibration. Their masks are drawn by these settings, which is the first row, and
by those of each --row, which may change only what draws the mask. What is measured, in the standard frame:

Dice     2 |mask and truth| / (|mask| + |truth|) of a scan with a lesion, all its slices together: the mean over the
         lesions of a kind, and the mean of these means
healthy  pixels marked in a scan without one, the mean over scans; and in how many scans any are

Where the held-out scans are those that calibrate the bundle, each is part of what it is judged by, and a new head may
have more marked in it; a reader that comes of folds has learnt from most of them. Writes table.md and figures.json.
The brain mask has a benchmark of its own, mask.py.

Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

import distributed
from benchmarks import compare, pasted
from benchmarks.inversion import HeldOut, check_preprocessing, held_out_scans, mean
from config import exit_code
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.folder import make_writable
from detect.measure import Measure
from detect.reconstruct import Reconstructor
from detect.settings import Settings
from evaluation.metrics import dice
from op import memory

OWN = "as the bundle has it"


def settings_of(own: Settings, rows: Sequence[Sequence[str]]) -> dict[str, Settings]:
    """The settings of every row by its name: the bundle's own, and those with the texts KEY=VALUE of a --row.

    Raises ValueError where a row changes more than the mask: neither the reconstruction nor the calibration would hold.
    """
    found = {OWN: own}
    for texts in rows:
        changed = own.changed(texts, "--row")
        if dataclasses.replace(changed, mask=own.mask) != own:
            known = ", ".join(field.name for field in dataclasses.fields(own.mask))
            raise ValueError(f"--row {' '.join(texts)}: expected what only draws the mask, {known}; for the rest make "
                             "another bundle (latent_stats.py --encoder MODEL --set)")
        found[" ".join(texts)] = changed
    return found


def evaluate(reconstructor: Reconstructor, measures: Mapping[str, Measure], scans: Sequence[HeldOut], side_mm: float,
             say: Callable[[str], None] | None = None) -> dict[str, dict]:
    """The figures of each of measures, by its name; they differ in what draws the mask alone, so share the evidence.

    side_mm of a pixel (pasted.pixel_mm); say is told of every scan. Of each dict(dice, dice_by_kind: means, None where
    no lesion is; lesions: their number by kind; healthy_pixels: marked in each scan, a list; healthy_marked: scans with
    any; scans: their number; left_out: lesions that found no room and why).
    """
    if not scans:
        raise ValueError("evaluate: expected one scan at least")
    judge = next(iter(measures.values()))
    found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in pasted.KINDS} for name in measures}
    healthy: dict[str, list[int]] = {name: [] for name in measures}
    left_out = []

    def masks(hu: torch.Tensor, scan: HeldOut) -> dict[str, np.ndarray]:
        watch = judge.watch(scan.brain, scan.below_vertex_mm)
        normal = reconstructor.closest_normal(hu, scan.brain, scan.below_vertex_mm, watch)
        seen = judge.evidence(normal, scan.brain, scan.below_vertex_mm, watch)
        return {name: measure.assess(seen).mask.numpy() for name, measure in measures.items()}

    for number, scan in enumerate(scans, 1):
        for name, mask in masks(scan.hu, scan).items():
            healthy[name].append(int(mask.sum()))
        lesions, reasons = pasted.paste_each(scan.scan_id, scan.hu.numpy(), scan.brain.numpy(), scan.below_vertex_mm,
                                             side_mm)
        left_out += reasons
        for lesion in lesions:
            for name, mask in masks(torch.from_numpy(lesion.hu), scan).items():
                found[name][lesion.kind].append(dice(lesion.truth, mask))
        if say:
            say(f"{number}/{len(scans)}: {len(lesions)} lesions")

    def row(name: str) -> dict:
        by_kind = {kind: mean(values) for kind, values in found[name].items()}
        return {"dice": mean([value for value in by_kind.values() if value is not None]), "dice_by_kind": by_kind,
                "lesions": {kind: len(values) for kind, values in found[name].items()},
                "healthy_pixels": healthy[name], "healthy_marked": sum(pixels > 0 for pixels in healthy[name]),
                "scans": len(scans), "left_out": left_out}

    return {name: row(name) for name in measures}


def table(rows: Mapping[str, dict]) -> str:
    """Markdown: a line a row."""
    columns = ["mask", "mean", *pasted.KINDS, "healthy: pixels a scan", "healthy scans with any"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for name, row in rows.items():
        shares = ["-" if value is None else f"{value:.2f}" for value in (row["dice"], *row["dice_by_kind"].values())]
        marked = [f"{np.mean(row['healthy_pixels']):.0f}", f"{row['healthy_marked']} of {row['scans']}"]
        lines.append("| " + " | ".join([name, *shares, *marked]) + " |")
    return "\n".join(lines) + "\n"


def benchmark(args: argparse.Namespace) -> None:
    """Raises OSError, CheckpointError, DatasetError, and ValueError for flags and for files that do not fit."""
    if args.every < 1:
        raise ValueError(f"--every must be at least 1, got {args.every}")
    make_writable(args.out)
    memory.keep_freed()
    bundle, data = load_bundle(args.model, distributed.pick_device(args.device)), SliceDataset(args.data, "val")
    check_preprocessing(bundle.meta["preprocessing"], data.manifest["settings"], f"--model {args.model}")
    compare.refuse_learnt(bundle.meta, data, f"--model {args.model} --data {args.data}")
    bundle.measure.check()
    settings = settings_of(bundle.settings, args.mask_rows)
    side_mm = pasted.pixel_mm(data.size, data.prepared.standardise.head_fraction)
    rows = evaluate(bundle.reconstructor, {name: bundle.with_settings(one).measure for name, one in settings.items()},
                    held_out_scans(data)[::args.every], side_mm, compare.say)
    for reason in rows[OWN]["left_out"]:
        compare.say(reason)
    rows = {name: {"mask": dataclasses.asdict(settings[name].mask), **row} for name, row in rows.items()}
    (args.out / "figures.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (args.out / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows), end="")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model bundle, with its calibration")
    add("--data", type=Path, required=True, help="database made by prepare.py; its validation scans are used")
    add("--row", dest="mask_rows", nargs="+", action="append", default=[], metavar="KEY=VALUE",
        help="another row, by these settings of the mask, as --set of projector.py takes them; may be given several "
             "times")
    add("--every", type=int, default=1, metavar="N",
        help="use every so many-th held-out scan, from the first on (default %(default)s: all)")
    add("--out", type=Path, default=Path("runs/lesion-mask"), help="folder for table.md and figures.json")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return exit_code(benchmark, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
